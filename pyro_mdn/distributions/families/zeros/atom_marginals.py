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
        above = self.sf(value)
        level = torch.where(above < 0.5, torch.log1p(-above.clamp(max=0.5)), level)
        return torch.where(value < self.low, -math.inf, torch.where(value.isnan(), value, level))

    def log_sf(self, value: Tensor) -> Tensor:
        level = torch.where(value < self.low, 0.0, self.log_rest + self.inner.log_sf(value))
        return torch.where(value.isnan(), value, level)

    def log_sf_from(self, value: Tensor) -> Tensor:
        return torch.where(value <= self.low, 0.0, self.log_sf(value))

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        others = self.log_rest + self.inner.log_between(lower, upper)
        inside = (lower <= self.low) & (upper >= self.low)
        return torch.where(inside, torch.logaddexp(others, self.log_zero), others)

    def quantile(self, q: Tensor) -> Tensor:
        at_end = q <= self._zero
        # Other numbers keep NaN out of the gradients of what is not used. The nearer tail has the digits.
        rest = torch.where(at_end, 1.0, self._rest)
        level, above = (q - self._zero) / rest, (1 - q) / rest
        lower = level < 0.5
        low = self.inner.quantile(torch.where(lower & ~at_end, level, 0.5))
        high = self.inner.upper_quantile(torch.where(lower | at_end, 0.5, above))
        return torch.where(at_end, self.low, torch.where(lower, low, high))

    def upper_quantile(self, q: Tensor) -> Tensor:
        at_end = q >= self._rest
        level = torch.where(at_end, 0.5, q) / torch.where(at_end, 1.0, self._rest)
        return torch.where(at_end, self.low, self.inner.upper_quantile(level))

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

        .. math:: \pi |y - l| + \pi (1 - \pi) \left( 2 E[(y - X)^+] - (y - l) \right) + (1 - \pi)^2 \mathrm{CRPS}_X(y)
        """
        zero, rest, distance = self._zero, self._rest, value - self.low
        beside = 2 * self.inner.expected_below(value) - distance  # how much further X is from y than from l
        return zero * distance.abs() + zero * rest * beside + rest.square() * self.inner.crps(value)

    @property
    def _zero(self) -> Tensor:
        return self.log_zero.exp()

    @property
    def _rest(self) -> Tensor:
        return self.log_rest.exp()
