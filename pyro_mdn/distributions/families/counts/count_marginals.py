r"""Distributions of single outputs that are counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mdn.distributions.families.counts.count_law import CountLaw, smallest_count
from pyro_mdn.distributions.families.counts.shortest_counts import shortest_counts
from pyro_mdn.distributions.families.counts.squared_tails import squared_tails
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.support.checks import require_unmapped
from pyro_mdn.tensors.numerics import as_before, in_double, log_sum_exp

__all__ = ["CountMarginals", "log_between"]


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

    def log_sf_from(self, value: Tensor) -> Tensor:
        return self.log_sf(value.ceil() - 1)

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

    def probability(self, k: Tensor) -> Tensor:
        """Probability of counts."""
        return self._mixed(self.law.log_prob(k.unsqueeze(-2))).exp()

    def continued(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth functions of real numbers k ≥ 0 that are the cdf and the survival function at counts."""
        return self._cdf(k), self._sf(k)

    def _search(self, q: Tensor, reached: Callable[[CountMarginals, Tensor], Tensor], never: Tensor) -> Tensor:
        """Find the smallest count that satisfies a condition in double precision; infinity where none does."""
        require_unmapped("icdf", q, *self.law.tensors(), self.logits)
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

        .. math:: |y - m| + \sum_{k < m} F(k)^2 + \sum_{k \ge m} (1 - F(k))^2 - 2 \left| \int_m^y T(t) \, dt \right|

        for the median m, with T the probability beyond t on its side of m.

        References:
            Epstein (1969), A scoring system for probability forecasts of ranked categories.
        """
        rates = self.law.mean()
        require_unmapped("crps", value, self.logits, rates)
        shape = torch.broadcast_shapes(self.logits.shape[:-1], rates.shape[:-2])
        middle = self.quantile(rates.new_full((*shape, rates.shape[-1]), 0.5))
        y = torch.where(value.isnan(), middle, value)
        above = self.expected_above(middle) - self.expected_above(torch.maximum(y, middle))
        below = self.expected_below(middle) - self.expected_below(torch.minimum(y, middle))
        score = (y - middle).abs() + squared_tails(self, middle) - 2 * (above + below)
        return torch.where(value.isnan(), value, score)

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
