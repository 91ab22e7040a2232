r"""Laplace components: exponential tails and a peak, for errors of which most are small and some are large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.location_scale import LocationScale
from pyro_mdn.tensors.numerics import exp
from pyro_mdn.tensors.univariate import Law, SymmetricLaw

__all__ = ["Laplace", "LaplaceLaw"]


@dataclass(frozen=True, eq=False)
class LaplaceLaw(SymmetricLaw):
    r"""Standard Laplace law, :math:`p(z) = \tfrac12 e^{-|z|}`.

    The derivative of the log-density at 0, where it has a kink, is 0.
    """

    def log_density(self, z: Tensor) -> Tensor:
        return -z.abs() - math.log(2)

    def slope(self, z: Tensor) -> Tensor:
        return -z.sign()

    def cdf(self, z: Tensor) -> Tensor:
        tail = 0.5 * _below(z).exp()
        return torch.where(z <= 0, tail, 1 - tail)

    def log_cdf(self, z: Tensor) -> Tensor:
        below = _below(z)
        return torch.where(z <= 0, below - math.log(2), torch.log1p(-0.5 * below.exp()))

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        below = _below(centre)
        around = half + below > 0
        near, far = (torch.where(around, half + sign * below, 1.0) for sign in (1, -1))
        inside = torch.log(-0.5 * (torch.expm1(-near) + torch.expm1(-far)))
        beside = below + half + torch.log(-torch.expm1(-2 * half)) - math.log(2)
        return torch.where(around, inside, beside)

    def quantile(self, q: Tensor) -> Tensor:
        return (2 * q).log()

    def mean_distance(self, z: Tensor) -> Tensor:
        below = _below(z)
        return exp(below) - below

    def mean_below(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0.0) + 0.5 * exp(_below(z))

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
        total = 0.75 * (weights.square() * scale).sum(-1)
        for k in range(locs.shape[-1] - 1):
            own, others = slice(k, k + 1), slice(k + 1, None)
            distance = -_below(locs[..., own] - locs[..., others])
            expected = _mean_difference(distance, scale[..., own], scale[..., others])
            total = total + weights[..., k] * (weights[..., others] * expected).sum(-1)
        return total

    def stddev(self) -> float:
        return math.sqrt(2)


def _below(z: Tensor) -> Tensor:
    """Compute minus the absolute value, with derivative 1 at 0: functions of it that are smooth there keep theirs."""
    return torch.where(z <= 0, z, -z)


def _mean_difference(distance: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""Compute :math:`E|d + a Z - b Z'|` of independent standard Laplace variables, for scales a and b.

    By partial fractions of its characteristic function, :math:`a Z - b Z'` has the density of a mixture of Laplace
    variables with the scales a and b, and the weights :math:`a^2 / (a^2 - b^2)` and :math:`-b^2 / (a^2 - b^2)`:

    .. math:: E|d + a Z - b Z'| = d + \frac{g(a^2) - g(b^2)}{a^2 - b^2}, \qquad g(s) = s^{3/2} e^{-d / \sqrt{s}}

    Where the scales are nearly equal, the divided difference is the mean of :math:`g'` between them, by quadrature.
    """
    larger, smaller = (torch.where((first > second) ^ swapped, first, second) for swapped in (False, True))
    ratio, unit = smaller / larger, distance / larger
    near = ratio > 0.9
    apart, alike = torch.where(near, 0.5, ratio), torch.where(near, ratio, 1.0)
    difference = (exp(-unit) - apart**3 * exp(-unit / apart)) / (1 - apart.square())
    mean = torch.zeros_like(ratio)
    for node, weight in _NODES:
        root = (1 + node * (alike.square() - 1)).sqrt()
        mean = mean + weight * (1.5 * root + 0.5 * unit) * exp(-unit / root)
    return distance + larger * torch.where(near, mean, difference)


_X, _W = np.polynomial.legendre.leggauss(5)
_NODES = list(zip((0.5 * (_X + 1)).tolist(), (0.5 * _W).tolist(), strict=True))


@dataclass(frozen=True)
class Laplace(LocationScale):
    r"""Laplace components with independent outputs: their likelihood is that of least absolute deviations.

    .. math:: p_k(y) = \prod_d \frac{1}{2 \sigma_{kd}} \exp\left( -\frac{|y_d - \mu_{kd}|}{\sigma_{kd}} \right)

    The standard deviations are :math:`\sqrt{2} \, \sigma_{kd}`. The CRPS of mixtures has a closed form.

    Args:
        noise: Noise model of the scales :math:`\sigma_{kd}`, without correlations.

    Raises:
        ValueError: If the noise model correlates the outputs.

    References:
        Kotz, Kozubowski & Podgórski (2001), The Laplace Distribution and Generalizations.

    >>> Laplace()
    Laplace(noise=Diagonal(tied=False, homoscedastic=False, min_scale=0.001))
    """

    law: ClassVar[Law] = LaplaceLaw()
