r"""Distributions of single outputs that are counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.counts.count_law import CountLaw, smallest_count
from pyro_mdn.distributions.families.counts.shortest_counts import shortest_counts
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.tensors.numerics import as_before, in_double, log_sum_exp

__all__ = ["CountMarginals", "log_between"]

_REST, _NOTHING = 1e-3, 1e-9
"""Probabilities above the last count of sums, and above the last one of integrals."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_LEGENDRE = (0.5 * (_NODES + 1)).tolist(), (0.5 * _WEIGHTS).tolist()

_TERMS = 2**20
"""Numbers of a part of a sum."""


class CountMarginals(Marginals):
    r"""Marginals that are mixtures of counts.

    Distribution functions are step functions of real numbers. Quantiles are counts: the smallest one with at least the
    probability in question. They have no derivatives. Intervals contain their ends, and at least their probability.

    Args:
        logits: Log-weights ``(*batch, K)``.
        law: Laws of the components, with parameters ``(*batch, K, D)``.
    """

    def __init__(self, logits: Tensor, law: CountLaw) -> None:
        self.logits, self.law = logits, law

    def is_differentiated(self) -> bool:
        return False  # ends of intervals are counts

    # Distribution functions

    def log_prob(self, value: Tensor) -> Tensor:
        counts = (value >= 0) & (value == value.floor()) & value.isfinite()
        terms = self.law.log_prob(torch.where(counts, value, 0.0).unsqueeze(-2))
        density = self._mixed(terms).masked_fill(~counts, -math.inf)
        return torch.where(value.isnan(), value, density)

    def cdf(self, value: Tensor) -> Tensor:
        return self._by_steps(value, self._cdf, below=0.0, above=1.0)

    def sf(self, value: Tensor) -> Tensor:
        return self._by_steps(value, self._sf, below=1.0, above=0.0)

    def steps(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cdf(value.ceil() - 1), self.cdf(value)

    def log_cdf(self, value: Tensor) -> Tensor:
        def function(k: Tensor) -> Tensor:
            return _log_of_tail(self.log_between(torch.zeros_like(k), k), self._sf(k))

        return self._by_steps(value, function, below=-math.inf, above=0.0)

    def log_sf(self, value: Tensor) -> Tensor:
        def function(k: Tensor) -> Tensor:
            return _log_of_tail(self.log_between(k + 1, torch.full_like(k, math.inf)), self._cdf(k))

        return self._by_steps(value, function, below=0.0, above=-math.inf)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self._mixed(log_between(self.law, lower.unsqueeze(-2), upper.unsqueeze(-2)))

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("intervals of counts have no derivatives")

    # Quantiles and intervals

    @torch.no_grad()
    def quantile(self, q: Tensor) -> Tensor:
        level = in_double(q) * (1 - 4 * torch.finfo(q.dtype).eps)  # a level that a count reaches up to rounding
        return self._search(q, lambda double, k: double._cdf(k) >= level, never=q >= 1)

    @torch.no_grad()
    def upper_quantile(self, q: Tensor) -> Tensor:
        level = in_double(q) * (1 + 4 * torch.finfo(q.dtype).eps)
        return self._search(q, lambda double, k: double._sf(k) <= level, never=q <= 0)

    @torch.no_grad()
    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        law, logits = self.law, self.logits
        batch = torch.broadcast_shapes(logits.shape[:-1], law.batch_shape[:-1])
        shape = *batch, law.mean().shape[-1]
        logits = in_double(logits).unsqueeze(-2).expand(*shape, -1).flatten(0, -2)
        law = law.map(lambda t, n: in_double(t).mT.expand(*shape, t.shape[-2]).flatten(0, -2).unsqueeze(-1))
        ends = shortest_counts(CountMarginals(logits, law), outside)
        low, high = (as_before(end, self.logits).reshape(shape) for end in ends)
        return self._cdf(low - 1), self._sf(high), low, high

    def rows(self, index: Tensor) -> CountMarginals:
        """Distributions of some rows, for parameters ``(N, K, D)``."""
        return CountMarginals(self.logits[index], self.law.map(lambda t, n: t[index]))

    def _search(self, q: Tensor, reached: Callable[[CountMarginals, Tensor], Tensor], never: Tensor) -> Tensor:
        """Find the smallest count that satisfies a condition in double precision; infinity where none does."""
        double = CountMarginals(in_double(self.logits), self.law.map(lambda t, n: in_double(t)))
        known = in_double(q)
        never = never.to(known.device)
        guess = (double.law.mean() + 6 * double.law.variance().sqrt() + 4).amax(-2)
        guess = guess.expand(torch.broadcast_shapes(guess.shape, q.shape))
        found = smallest_count(lambda k: reached(double, k) | never | known.isnan(), guess)
        found = torch.where(known.isnan(), known, found.masked_fill(never, math.inf))
        return as_before(found, self.logits)

    # Partial moments, and the ranked probability score

    def expected_below(self, value: Tensor) -> Tensor:
        k = value.clamp(min=-1).floor()
        part = self._weights() * self.law.mean_up_to(k.unsqueeze(-2))
        return torch.where(value > 0, value * self._cdf(k) - part.sum(-2), 0.0)

    def expected_above(self, value: Tensor) -> Tensor:
        k = value.clamp(min=-1).floor()
        part = self._weights() * self.law.mean_beyond(k.unsqueeze(-2))
        return part.sum(-2) - value * self._sf(k)

    def crps(self, value: Tensor) -> Tensor:
        r"""Ranked probability score :math:`\sum_k (F(k) - 1\{y \le k\})^2`, differentiable.

        The sum goes up to a count that is exceeded with a probability of 1e-3 at most. Beyond, where terms are small
        and smooth, it is an integral. The error is below 1e-6.

        References:
            Epstein (1969), A scoring system for probability forecasts of ranked categories.
        """
        rates = self.law.mean()
        shape = torch.broadcast_shapes(self.logits.shape[:-1], rates.shape[:-2])
        with torch.no_grad():
            rest = rates.new_full((*shape, rates.shape[-1]), _REST)
            size = int(self.upper_quantile(rest).amax().item()) + 1
        last = rates.new_full((), size)
        # Beyond the sum, a count below y adds F squared, which is (1 - F) squared plus 2 F - 1.
        beyond = torch.maximum(value, last)
        missed = self.expected_above(last.expand(rest.shape)) - self.expected_above(beyond)
        total = self._squared_tail(last) + beyond - last - 2 * missed + (-value).clamp(min=0)
        below = torch.zeros_like(rest)
        numbers = torch.arange(size, dtype=rates.dtype, device=rates.device)
        for part in numbers.split(max(1, _TERMS // max(1, rates.numel()))):
            counts = part.reshape(-1, *(1,) * rates.ndim)
            cdf = below + self._mixed(self.law.log_prob(counts)).exp().cumsum(0)
            below = cdf[-1]
            cdf = cdf.reshape(len(part), *(1,) * (value.ndim - below.ndim), *below.shape)
            passed = (value - part.reshape(-1, *(1,) * value.ndim)).clamp(0, 1)  # share of the step below y
            total = total + (passed * cdf.square() + (1 - passed) * (1 - cdf).square()).sum(0)
        return torch.where(value.isnan(), value, total)

    def _squared_tail(self, first: Tensor) -> Tensor:
        """Sum the squares of the probabilities above k, for k from ``first`` on, by an integral over logarithms."""
        start = first - 0.5
        with torch.no_grad():
            rest = torch.full_like(self._weights()[..., 0, :] * self.law.mean()[..., 0, :], _NOTHING)
            reach = ((self.upper_quantile(rest) + 1) / start).clamp(min=1).log()
        total = torch.zeros_like(reach)
        for node, weight in zip(*_LEGENDRE, strict=True):
            point = start * (node * reach).exp()
            total = total + weight * reach * point * self._sf(point).square()
        return total

    # Parts

    def _weights(self) -> Tensor:
        return self.logits.exp().unsqueeze(-1)

    def _mixed(self, terms: Tensor) -> Tensor:
        """Logarithm of the mean over components of the exponentials of terms ``(*sample, *batch, K, D)``."""
        return log_sum_exp((self.logits.unsqueeze(-1) + terms).movedim(-2, 0))

    def _cdf(self, k: Tensor) -> Tensor:
        return (self._weights() * self.law.cdf(k.unsqueeze(-2))).sum(-2).clamp(max=1)

    def _sf(self, k: Tensor) -> Tensor:
        return (self._weights() * self.law.sf(k.unsqueeze(-2))).sum(-2).clamp(max=1)

    @staticmethod
    def _by_steps(value: Tensor, function: Callable[[Tensor], Tensor], *, below: float, above: float) -> Tensor:
        """Apply a function of counts to the largest one up to each value; NaN stays NaN."""
        inside = (value >= 0) & value.isfinite()
        ends = torch.where(value < 0, below, above).to(value)
        result = torch.where(inside, function(torch.where(inside, value, 0.0).floor()), ends)
        return torch.where(value.isnan(), value, result)


def _log_of_tail(log_tail: Tensor, other: Tensor) -> Tensor:
    """Logarithm of a tail, from that of the other one where this is smaller."""
    near = other < 0.5
    return torch.where(near, torch.log1p(-torch.where(near, other, 0.0)), log_tail)


def log_between(law: CountLaw, lower: Tensor, upper: Tensor) -> Tensor:
    """Log-probability of counts from ``lower`` to ``upper``, both included, of which either may be infinite."""
    first, last = lower.ceil().clamp(min=0), upper.floor()
    possible = (first <= last) & first.isfinite()
    first, last = torch.where(possible, first, 0.0), torch.where(possible, last, 0.0)
    return law.log_between(first, last).masked_fill(~possible, -math.inf)
