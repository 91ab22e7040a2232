r"""The law of one output given that it lies in an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.special import erfc

from pyro_mdn.distributions.observations.boxes import log_interval_probability, quantile_within
from pyro_mdn.distributions.units.expectations import expectation
from pyro_mdn.tensors.tensor_batch import nested, stored
from pyro_mdn.tensors.univariate import GRID, Law, TailAndDensity

__all__ = ["TruncatedLaw", "standardized"]


@dataclass(frozen=True, eq=False)
class TruncatedLaw(Law):
    r"""Law of Z given :math:`a \le Z \le b`, accurate however far out the interval is.

    .. math:: p(z) = \frac{q(z)}{P(a \le Z \le b)}

    Args:
        base: Law of Z, with the density q.
        low: Lower ends a; minus infinity where there is none.
        high: Upper ends b, above the lower ones; infinity where there is none.
    """

    base: Law = nested()
    low: Tensor = stored(0)
    high: Tensor = stored(0)

    @cached_property
    def log_total(self) -> Tensor:
        """Log-probability of the interval under the base; with a graph, also if it is first asked for without."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._log_base(self.low, self.high)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Log-probability between two ends, either of which may be infinite; NaN where one is NaN."""
        inside = self._log_base(torch.maximum(lower, self.low), torch.minimum(upper, self.high)) - self.log_total
        return torch.where(lower.isnan() | upper.isnan(), math.nan, inside.clamp(max=0))

    def log_density(self, z: Tensor) -> Tensor:
        inside = (z >= self.low) & (z <= self.high)
        density = self.base.log_density(torch.where(inside, z, self._a_point())) - self.log_total
        return torch.where(z.isnan(), z, density.masked_fill(~inside, -math.inf))

    def cdf(self, z: Tensor) -> Tensor:
        return self.log_cdf(z).exp()

    def log_cdf(self, z: Tensor) -> Tensor:
        return self.log_between(torch.full_like(z, -math.inf), z)

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def slope(self, z: Tensor) -> Tensor:
        inside = (z >= self.low) & (z <= self.high)
        return self.base.slope(torch.where(inside, z, self._a_point())).masked_fill(~inside, 0.0)

    @torch.no_grad()
    def quantile(self, q: Tensor) -> Tensor:
        bounded = self.low.isfinite() | self.high.isfinite()
        level = torch.where((q > 0) & bounded, q, 0.5)
        inside = quantile_within(
            self.base, torch.where(bounded, self.low, 0.0), torch.where(bounded, self.high, 1.0), level
        )
        point = torch.where(bounded, inside, self.base.quantile(torch.where(bounded, 0.5, q)))
        return torch.where(q > 0, torch.maximum(torch.minimum(point, self.high), self.low), self.low)

    def tail_and_density(self, weights: Tensor, locs: Tensor, scale: Tensor) -> TailAndDensity:
        height = weights / scale

        def function(point: Tensor) -> tuple[Tensor, Tensor]:
            z = (point.unsqueeze(-1) - locs) / scale
            return (weights * self.cdf(z)).sum(-1), (height * self.log_density(z).exp()).sum(-1)

        return function

    def mirrored(self) -> Law:
        return TruncatedLaw(self.base.mirrored(), -self.high, -self.low)

    def mean(self) -> Tensor:
        """Mean of Z, by quadrature over its quantiles."""
        zero = self.log_total.new_zeros(self.batch_shape)
        return expectation(lambda z: z, zero, torch.ones_like(zero), self)

    def stddev(self) -> Tensor:
        """Standard deviation of Z, likewise."""
        mean = self.mean()
        finite = mean.isfinite()
        centre = torch.where(finite, mean, 0.0)
        square = expectation(lambda z: (z - centre).square(), torch.zeros_like(mean), torch.ones_like(mean), self)
        return torch.where(finite, square.sqrt(), mean.abs())

    def mean_distance(self, z: Tensor) -> Tensor:
        raise NotImplementedError("mean_distance: scores of truncated mixtures are integrals over the mixture")

    def grid(self, like: Tensor) -> Tensor:
        """Thirteen points as those of other laws, but the median in the place of 0, which may be outside."""
        levels = 0.5 * erfc(-math.sqrt(0.5) * like.new_tensor(GRID[: len(GRID) // 2 + 1]))
        spread = self.map(lambda t, n: t.unsqueeze(-1))
        upper = -spread.mirrored().quantile(levels[:-1]).flip(-1)
        return torch.cat([spread.quantile(levels), upper], -1)

    def _a_point(self) -> Tensor:
        """A number in the interval, at which nothing is NaN or infinite."""
        return torch.where(self.low.isfinite(), self.low, torch.where(self.high.isfinite(), self.high, 0.0)).detach()

    def _log_base(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Log-probability of intervals under the base, 0 for the whole line, and minus infinity for empty ones."""
        lower, upper = torch.broadcast_tensors(lower, upper)
        known = (lower < upper) & ~(lower.isinf() & upper.isinf())
        start, end = torch.where(known, lower, -math.inf), torch.where(known, upper, 0.0)
        mass = log_interval_probability(self.base, start, end, start.new_zeros(()), start.new_ones(()))
        return torch.where(known, mass, torch.where(lower < upper, 0.0, -math.inf).to(mass))


def standardized(end: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Standardise ends; infinite ones stay what they are, without gradients that would be NaN."""
    z = (torch.where(end.isinf(), 0.0, end) - locs) / scale
    return torch.where(end.isinf(), end, z)
