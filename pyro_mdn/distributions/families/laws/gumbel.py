r"""Gumbel components: skewed to the right, for maxima and for errors that are larger above than below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.location_scale import LocationScale
from pyro_mdn.tensors.univariate import Law

__all__ = ["Gumbel", "GumbelLaw", "MirroredGumbelLaw"]

_EULER = 0.5772156649015329


@dataclass(frozen=True, eq=False)
class GumbelLaw(Law):
    r"""Standard Gumbel law, the limit of shifted maxima, with :math:`P(Z \le z) = \exp(-e^{-z})`.

    The probability below 0 falls doubly exponentially. :math:`e^{-z}` is continued linearly where it exceeds about
    :math:`10^{15}` in single precision, and :math:`10^{123}` in double precision, so that log-densities have finite
    gradients there, which point to the component.
    """

    def log_density(self, z: Tensor) -> Tensor:
        below = (-z).clamp(max=torch.finfo(z.dtype).max)  # an infinite z has the density 0
        return below - _growth(below)

    def slope(self, z: Tensor) -> Tensor:
        return torch.expm1((-z).clamp(max=_limit(z)))

    def cdf(self, z: Tensor) -> Tensor:
        return (-_growth(-z)).exp()

    def log_cdf(self, z: Tensor) -> Tensor:
        return -_growth(-z)

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        # F(b) - F(a) = F(b) (1 - exp(exp(-b) - exp(-a))), and the difference of exponentials is again an exponential.
        difference = half - centre + torch.log(-torch.expm1(-2 * half))
        return self.log_cdf(centre + half) + _log_upper_tail(difference)

    def quantile(self, q: Tensor) -> Tensor:
        return -(-q.log()).log()

    def mean_distance(self, z: Tensor) -> Tensor:
        r"""Expected distance :math:`z - \gamma + 2 \, \mathrm{Ein}(e^{-z})`, and :math:`\gamma - z` far below 0."""
        far = z < -math.log(_REACH[z.dtype])
        inside = torch.where(far, 0.0, z)
        return torch.where(far, _EULER - z, inside - _EULER + 2 * _entire_exponential_integral((-inside).exp()))

    def mean_below(self, z: Tensor) -> Tensor:
        r"""Expected distance :math:`E_1(e^{-z})` of Z below z."""
        low = z < -math.log(_LARGE)
        t = _growth(-torch.where(low, 0.0, z))
        above = _entire_exponential_integral(t) - _EULER + torch.where(low, 0.0, z)
        return torch.where(low, _exponential_integral(_growth(-torch.where(low, z, -1.0))), above)

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        return math.log(2) * scale.squeeze(-1) if locs.shape[-1] == 1 else None

    def mirrored(self) -> Law:
        return _MIRRORED

    def mean(self) -> float:
        return _EULER

    def stddev(self) -> float:
        return math.pi / math.sqrt(6)


@dataclass(frozen=True, eq=False)
class MirroredGumbelLaw(Law):
    """Law of -Z for a Gumbel variable Z: that of minima."""

    def log_density(self, z: Tensor) -> Tensor:
        return _GUMBEL.log_density(-z)

    def slope(self, z: Tensor) -> Tensor:
        return -_GUMBEL.slope(-z)

    def cdf(self, z: Tensor) -> Tensor:
        return -torch.expm1(-_growth(z))

    def log_cdf(self, z: Tensor) -> Tensor:
        return _log_upper_tail(z)

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        return _GUMBEL.log_mass(-centre, half)

    def quantile(self, q: Tensor) -> Tensor:
        return (-torch.log1p(-q)).log()

    def mean_distance(self, z: Tensor) -> Tensor:
        return _GUMBEL.mean_distance(-z)

    def mean_below(self, z: Tensor) -> Tensor:
        far = z > math.log(_REACH[z.dtype])
        return torch.where(far, z + _EULER, _entire_exponential_integral(torch.where(far, 0.0, z).exp()))

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        return _GUMBEL.half_mean_difference(weights, locs, scale)

    def mirrored(self) -> Law:
        return _GUMBEL

    def mean(self) -> float:
        return -_EULER

    def stddev(self) -> float:
        return _GUMBEL.stddev()


_GUMBEL, _MIRRORED = GumbelLaw(), MirroredGumbelLaw()


def _limit(like: Tensor) -> float:
    """Exponent from which on exponentials are continued linearly: even their squares are far from an overflow."""
    return 0.4 * math.log(torch.finfo(like.dtype).max)


def _growth(x: Tensor) -> Tensor:
    """Compute the exponential, continued linearly from :func:`_limit` on."""
    limit = _limit(x)
    return x.clamp(max=limit).exp() * (1 + (x - limit).relu())


_SMALL = -6.0
"""Logarithm of a number t for which a few terms of the series of log((1 - exp(-t)) / t) are accurate."""


def _log_upper_tail(x: Tensor) -> Tensor:
    r"""Compute :math:`\log(1 - \exp(-e^x))`, the log-probability above -x, accurately for all x."""
    small, large = x < _SMALL, x > 0
    t = _growth(torch.where(small | large, -1.0, x))
    middle = torch.log(-torch.expm1(-t))
    rare = torch.log1p(-(-_growth(torch.where(large, x, 0.0))).exp())
    t = torch.where(small, x, _SMALL).exp()
    series = x - 0.5 * t + t.square() / 24
    return torch.where(small, series, torch.where(large, rare, middle))


def _entire_exponential_integral(t: Tensor) -> Tensor:
    r"""Compute :math:`\mathrm{Ein}(t) = \int_0^1 (1 - e^{-t s}) / s \, ds` by quadrature, for t up to the reach.

    It is related to the exponential integral by :math:`E_1(t) = \mathrm{Ein}(t) - \gamma - \log t`.

    References:
        Abramowitz & Stegun (1964), Handbook of Mathematical Functions, 5.1.39.
    """
    total = torch.zeros_like(t)
    for node, weight in _NODES[t.dtype]:  # one node at a time, so that memory does not grow with their number
        total = total - weight / node * torch.expm1(-node * t)
    return total


_LARGE, _TERMS = 2.0, 40
"""From ``_LARGE`` on, ``_TERMS`` terms of a continued fraction are accurate in double precision."""


def _exponential_integral(t: Tensor) -> Tensor:
    r"""Compute :math:`E_1(t)` by its continued fraction, for t of at least 2.

    References:
        Abramowitz & Stegun (1964), Handbook of Mathematical Functions, 5.1.22.
    """
    rest = t + 2 * _TERMS + 1
    for k in range(_TERMS, 0, -1):
        rest = t + 2 * k - 1 - k * k / rest
    return (-t).exp() / rest


_REACH = {torch.float64: 34.0, torch.float32: 16.0}
"""Arguments from which on the exponential integral is less than the rounding error of the expected distance."""

_LEGENDRE = {dtype: np.polynomial.legendre.leggauss(n) for dtype, n in ((torch.float64, 28), (torch.float32, 13))}
_NODES = {
    dtype: list(zip((0.5 * (x + 1)).tolist(), (0.5 * w).tolist(), strict=True)) for dtype, (x, w) in _LEGENDRE.items()
}


@dataclass(frozen=True)
class Gumbel(LocationScale):
    r"""Gumbel components with independent outputs, skewed to the right.

    .. math:: p_k(y) = \prod_d \frac{1}{\sigma_{kd}} \exp\left( -z_d - e^{-z_d} \right), \qquad
              z_d = \frac{y_d - \mu_{kd}}{\sigma_{kd}}

    The locations are the modes, the means are :math:`\mu_{kd} + \gamma \sigma_{kd}` with Euler's constant
    :math:`\gamma \approx 0.577`, and the standard deviations are :math:`\pi \sigma_{kd} / \sqrt{6}`. For targets that
    are skewed to the left, train on minus the targets.

    Args:
        noise: Noise model of the scales :math:`\sigma_{kd}`, without correlations.

    Raises:
        ValueError: If the noise model correlates the outputs.

    References:
        Gumbel (1958), Statistics of Extremes.

    >>> Gumbel()
    Gumbel(noise=Diagonal(tied=False, homoscedastic=False, min_scale=0.001))
    """

    law: ClassVar[Law] = _GUMBEL
