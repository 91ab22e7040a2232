r"""Distributions of single outputs with a point mass at the lower end of their support."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mdn.distributions.marginals import Marginals, shortest_by_search

__all__ = ["AtomMarginals"]

_TAILS = 129
"""Probabilities below an interval that a search begins with."""


class AtomMarginals(Marginals):
    r"""A point mass of probability :math:`\pi` at the lower end l, and a distribution above it otherwise.

    Args:
        inner: Distributions above the lower ends.
        log_zero: Logarithm of π, ``(*batch, D)``.
        log_rest: Logarithm of 1 - π, likewise.
        low: Lower ends, which broadcast with these.
    """

    def __init__(self, inner: Marginals, log_zero: Tensor, log_rest: Tensor, low: Tensor) -> None:
        self.inner, self.log_zero, self.log_rest, self.low = inner, log_zero, log_rest, low

    def is_differentiated(self) -> bool:
        return False  # an end of an interval may be the point mass

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value == self.low, self.log_zero, self.log_rest + self.inner.log_prob(value))

    def cdf(self, value: Tensor) -> Tensor:
        level = torch.where(value >= self.low, self._zero + self._rest * self.inner.cdf(value), 0.0)
        return torch.where(value.isnan(), value, level.clamp(max=1))

    def sf(self, value: Tensor) -> Tensor:
        return torch.where(value < self.low, 1.0, self._rest * self.inner.sf(value))

    def steps(self, value: Tensor) -> tuple[Tensor, Tensor]:
        level = self.cdf(value)
        return torch.where(value == self.low, 0.0, level), level

    def log_cdf(self, value: Tensor) -> Tensor:
        level = torch.logaddexp(self.log_zero, self.log_rest + self.inner.log_cdf(value))
        above = torch.log1p(-self.sf(value).clamp(max=0.5))
        level = torch.where(self.sf(value) < 0.5, above, level)
        return torch.where(value < self.low, -math.inf, torch.where(value.isnan(), value, level))

    def log_sf(self, value: Tensor) -> Tensor:
        level = torch.where(value < self.low, 0.0, self.log_rest + self.inner.log_sf(value))
        return torch.where(value.isnan(), value, level)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        others = self.log_rest + self.inner.log_between(lower, upper)
        inside = (lower <= self.low) & (upper >= self.low)
        return torch.where(inside, torch.logaddexp(others, self.log_zero), others)

    def quantile(self, q: Tensor) -> Tensor:
        level, above = ((q - self._zero) / self._rest).clamp(0, 1), ((1 - q) / self._rest).clamp(max=1)
        # The nearer tail has the digits.
        other = torch.where(level < 0.5, self.inner.quantile(level), self.inner.upper_quantile(above))
        return torch.where(q <= self._zero, self.low, other)

    def upper_quantile(self, q: Tensor) -> Tensor:
        level = (q / self._rest).clamp(max=1)
        return torch.where(q >= self._rest, self.low, self.inner.upper_quantile(level))

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("intervals beside a point mass have no derivatives")

    @torch.no_grad()
    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose the shorter one of the interval that begins at the point mass and the best one above it."""
        zero, rest = self._zero, self._rest
        tail = torch.full_like(zero, outside)
        low, high = self.low.expand(zero.shape), self.upper_quantile(tail)
        above = self._shortest_above(1 - outside)
        better = above[1] - above[0] < high - low
        low, high = torch.where(better, above[0], low), torch.where(better, above[1], high)
        below = torch.where(low > self.low, zero + rest * self.inner.cdf(low), 0.0)
        return below, self.sf(high), low, high

    def _shortest_above(self, mass: float) -> tuple[Tensor, Tensor]:
        """Find shortest intervals of a probability above the point mass, of infinite length where there is none."""
        outside = 1 - mass / self._rest
        shares = torch.linspace(0, 1, _TAILS, dtype=outside.dtype, device=outside.device)
        tails = outside.clamp(min=0) * shares.reshape(-1, *(1,) * outside.ndim)
        left = shortest_by_search(self.inner, tails, outside.clamp(min=0))
        low, high = self.inner.quantile(left), self.inner.upper_quantile((outside - left).clamp(min=0))
        return low, high.masked_fill(outside < 0, math.inf)

    # Partial moments, and the continuous ranked probability score

    def expected_below(self, value: Tensor) -> Tensor:
        return self._zero * (value - self.low).clamp(min=0) + self._rest * self.inner.expected_below(value)

    def expected_above(self, value: Tensor) -> Tensor:
        return self._zero * (self.low - value).clamp(min=0) + self._rest * self.inner.expected_above(value)

    def crps(self, value: Tensor) -> Tensor:
        r"""Score of a mixture of a point mass and a distribution above it.

        .. math:: \pi |y - l| + (1 - \pi) E|X - y| - \pi (1 - \pi) E|X - l| - \tfrac12 (1 - \pi)^2 E|X - X'|
        """
        zero, rest, inner = self._zero, self._rest, self.inner
        distance = inner.expected_below(value) + inner.expected_above(value)
        half_difference = distance - inner.crps(value)
        from_zero = inner.expected_above(self.low.expand(zero.shape))
        score = zero * (value - self.low).abs() + rest * distance
        return score - zero * rest * from_zero - rest.square() * half_difference

    @property
    def _zero(self) -> Tensor:
        return self.log_zero.exp()

    @property
    def _rest(self) -> Tensor:
        return self.log_rest.exp()
