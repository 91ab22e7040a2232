r"""Distributions of single outputs: what quantiles, intervals and scores ask of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.boxes import log_interval_probability
from pyro_mdn.tensors.expected_distances import distance_to, half_mean_difference
from pyro_mdn.tensors.numerics import log_sum_exp
from pyro_mdn.tensors.roots import follow_root
from pyro_mdn.tensors.shortest_intervals import shortest_intervals
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["LocationScaleMarginals", "Marginals", "MarginalsByColumn", "follow_shortest", "shortest_by_search"]


class Marginals(ABC):
    """Distributions of the outputs of a batch of mixtures, each by itself; values have the shape ``(*batch, D)``."""

    @abstractmethod
    def is_differentiated(self) -> bool:
        """Whether a parameter needs a gradient."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density."""

    @abstractmethod
    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution, with relative accuracy in the lower tail."""

    @abstractmethod
    def sf(self, value: Tensor) -> Tensor:
        """Probability above a value, with relative accuracy in the upper tail."""

    def steps(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities below a value, and up to it; the same tensor twice for a distribution with a density."""
        level = self.cdf(value)
        return level, level

    def levels(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities below intervals, and up to their upper ends; one turn more beyond the end of a period."""
        return self.steps(lower)[0], self.steps(upper)[1]

    @abstractmethod
    def log_cdf(self, value: Tensor) -> Tensor:
        """Logarithm of :meth:`cdf`, accurate in both tails."""

    @abstractmethod
    def log_sf(self, value: Tensor) -> Tensor:
        """Logarithm of :meth:`sf`, accurate in both tails."""

    def log_sf_from(self, value: Tensor) -> Tensor:
        """Log-probability of a value and all above it; that of :meth:`log_sf` for a distribution with a density."""
        return self.log_sf(value)

    @abstractmethod
    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        """Log-probability of the interval within ``half`` of a centre."""

    @abstractmethod
    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Log-probability of the interval between two ends, either of which may be infinite."""

    @abstractmethod
    def quantile(self, q: Tensor) -> Tensor:
        """Quantile at probability q, differentiable."""

    @abstractmethod
    def upper_quantile(self, q: Tensor) -> Tensor:
        """Quantile at probability 1 - q, for q whose digits 1 - q would lose."""

    @abstractmethod
    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density, and its derivative with respect to the cumulative distribution."""

    @abstractmethod
    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shortest intervals of probability ``1 - outside``, without a graph.

        Returns:
            Probabilities below and above them, and their lower and upper ends, ``(*batch, D)`` each.
        """

    def central_quantile(self, q: Tensor) -> Tensor:
        """Quantile at probability q; that of an angle is counted from the angle opposite to its mean direction."""
        return self.quantile(q)

    def central_interval(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of intervals with a probability ``(*batch, D)`` on each side."""
        return self.quantile(tail), self.upper_quantile(tail)

    def shortest_interval(self, outside: float) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of the shortest intervals of probability ``1 - outside``, with their derivatives."""
        left, right, *ends = self.shortest(outside)
        if not self.is_differentiated():
            return ends[0], ends[1]
        left = follow_shortest(self, left, lambda tail: (self.quantile(tail), self.upper_quantile(outside - tail)))
        return self.quantile(left), self.upper_quantile(right + (left.detach() - left))

    def missed(self, value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """How far values lie outside of intervals; 0 inside of them."""
        return (lower - value).clamp(min=0) + (value - upper).clamp(min=0)

    @abstractmethod
    def expected_below(self, value: Tensor) -> Tensor:
        r"""Compute :math:`E[(y - Y)^+]`, how far the variable falls short of a value on average."""

    @abstractmethod
    def expected_above(self, value: Tensor) -> Tensor:
        r"""Compute :math:`E[(Y - y)^+]`, how far the variable exceeds a value on average."""

    @abstractmethod
    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score of a value, in its units."""


def follow_shortest(marginals: Marginals, left: Tensor, ends: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Give the probabilities below shortest intervals their derivatives, from the equality of densities at the ends.

    Args:
        marginals: The distributions.
        left: The probabilities, without a graph.
        ends: Lower and upper ends of the intervals that have these probabilities below them.
    """

    def equation(tail: Tensor) -> tuple[Tensor, Tensor]:
        (low, bend_low), (high, bend_high) = (marginals.log_density_by_level(end) for end in ends(tail))
        slope, terms = bend_low - bend_high, bend_low.abs() + bend_high.abs()
        # Where two shortest intervals merge into one, there are no derivatives.
        return low - high, slope.masked_fill(~(slope > 1e-3 * terms), math.inf)

    return follow_root(left, equation)


class LocationScaleMarginals(Marginals):
    """Marginals that are mixtures of laws with a location and a scale.

    Args:
        mixture: The mixtures, with parameters ``(*batch, D, K)``.
    """

    def __init__(self, mixture: UnivariateMixture) -> None:
        self.mixture = mixture

    def is_differentiated(self) -> bool:
        return self.mixture.is_differentiated()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.mixture.log_prob(value)

    def cdf(self, value: Tensor) -> Tensor:
        return self.mixture.cdf(value)

    def sf(self, value: Tensor) -> Tensor:
        return self.mixture.mirrored().cdf(-value)

    def log_cdf(self, value: Tensor) -> Tensor:
        return self.mixture.log_cdf(value)

    def log_sf(self, value: Tensor) -> Tensor:
        return self.mixture.mirrored().log_cdf(-value)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.mixture.log_mass(centre, half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        logits, locs, scale, law = self.mixture
        known = (lower < upper) & ~(lower.isinf() & upper.isinf())
        start = torch.where(known, lower, -math.inf).unsqueeze(-1)
        end = torch.where(known, upper, 0.0).unsqueeze(-1)
        mass = log_sum_exp((logits + log_interval_probability(law, start, end, locs, scale)).movedim(-1, 0))
        everything = torch.where(lower < upper, 0.0, -math.inf).to(mass)
        return torch.where(known, mass, everything)

    def quantile(self, q: Tensor) -> Tensor:
        return self.mixture.quantile(q)

    def upper_quantile(self, q: Tensor) -> Tensor:
        return -self.mixture.mirrored().quantile(q)

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixture.log_density_by_level(value)

    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return shortest_intervals(outside, self.mixture)

    def expected_below(self, value: Tensor) -> Tensor:
        return self.mixture.expected_below(value)

    def expected_above(self, value: Tensor) -> Tensor:
        return self.mixture.mirrored().expected_below(-value)

    def crps(self, value: Tensor) -> Tensor:
        return distance_to(self.mixture, value) - half_mean_difference(self.mixture)


class MarginalsByColumn(Marginals):
    """Marginals of which each output has its own kind.

    Args:
        parts: Marginals of one output each.
    """

    def __init__(self, parts: Sequence[Marginals]) -> None:
        self.parts = list(parts)

    def is_differentiated(self) -> bool:
        return any(part.is_differentiated() for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._each("log_prob", value)

    def cdf(self, value: Tensor) -> Tensor:
        return self._each("cdf", value)

    def sf(self, value: Tensor) -> Tensor:
        return self._each("sf", value)

    def steps(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("steps", value)

    def levels(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("levels", lower, upper)

    def log_cdf(self, value: Tensor) -> Tensor:
        return self._each("log_cdf", value)

    def log_sf(self, value: Tensor) -> Tensor:
        return self._each("log_sf", value)

    def log_sf_from(self, value: Tensor) -> Tensor:
        return self._each("log_sf_from", value)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self._each("log_mass", centre, torch.as_tensor(half, dtype=centre.dtype, device=centre.device))

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self._each("log_between", lower, upper)

    def quantile(self, q: Tensor) -> Tensor:
        return self._each("quantile", q)

    def upper_quantile(self, q: Tensor) -> Tensor:
        return self._each("upper_quantile", q)

    def central_quantile(self, q: Tensor) -> Tensor:
        return self._each("central_quantile", q)

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("log_density_by_level", value)

    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _joined([part.shortest(outside) for part in self.parts])

    def central_interval(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("central_interval", tail)

    def shortest_interval(self, outside: float) -> tuple[Tensor, Tensor]:
        return _joined([part.shortest_interval(outside) for part in self.parts])

    def missed(self, value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return self._each("missed", value, lower, upper)

    def expected_below(self, value: Tensor) -> Tensor:
        return self._each("expected_below", value)

    def expected_above(self, value: Tensor) -> Tensor:
        return self._each("expected_above", value)

    def crps(self, value: Tensor) -> Tensor:
        return self._each("crps", value)

    def _each(self, name: str, *arguments: Tensor) -> Tensor:
        return torch.cat(self._columns(name, arguments), -1)

    def _all(self, name: str, *arguments: Tensor) -> Any:
        return _joined(self._columns(name, arguments))

    def _columns(self, name: str, arguments: Sequence[Tensor]) -> list[Any]:
        count = len(self.parts)
        split = [t.expand(*t.shape[:-1], count).split(1, -1) if t.ndim else [t] * count for t in arguments]
        columns = zip(*split, strict=True)
        return [getattr(part, name)(*own) for part, own in zip(self.parts, columns, strict=True)]


def _joined(several: Sequence[Sequence[Tensor]]) -> Any:
    return tuple(torch.cat(columns, -1) for columns in zip(*several, strict=True))


_REFINEMENTS = ((4, 97), (2, 33), (1, 17), (1, 17), (1, 17), (1, 17))
"""Neighbours of the best probability on each side, and probabilities between them, of each round of refinement."""


def shortest_by_search(marginals: Marginals, tails: Tensor, outside: Tensor | float) -> Tensor:
    """Search for the probabilities below shortest intervals, and refine the best ones between their neighbours.

    Args:
        marginals: The distributions.
        tails: Probabilities to begin with, in ascending order, from 0 to ``outside``, ``(T, *batch, D)``.
        outside: Probability outside of the intervals, one number or ``(*batch, D)``.
    """

    def width(tails: Tensor) -> Tensor:
        ends = marginals.upper_quantile((outside - tails).clamp(min=0)) - marginals.quantile(tails)
        return ends.nan_to_num(math.inf, math.inf, math.inf)

    for reach, count in _REFINEMENTS:
        best = width(tails).argmin(0, keepdim=True)
        low, high = (tails.gather(0, (best + step).clamp(0, len(tails) - 1)) for step in (-reach, reach))
        shares = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)
        tails = low + (high - low) * shares.reshape(-1, *(1,) * (low.ndim - 1))
    return tails.gather(0, width(tails).argmin(0, keepdim=True)).squeeze(0)
