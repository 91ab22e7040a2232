r"""Functions of concentrations: the scale factor of von Mises densities and their mean, for small and large ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bessel_and_lost", "lost_resultant", "log_scaled_bessel"]

_LARGE = 20.0
"""Concentration from which on asymptotic series are used, which have all digits there."""

_COEFFICIENTS = [1 / 8]
"""Coefficients of the asymptotic series from the first power on; that of the power 0 is 1."""

for _j in range(2, 17):
    _COEFFICIENTS.append(_COEFFICIENTS[-1] * (2 * _j - 1) ** 2 / (8 * _j))

_SINGLE = 6
"""Coefficients that matter in single precision."""


def log_scaled_bessel(concentration: Tensor) -> Tensor:
    r"""Compute :math:`\log(e^{-\kappa} I_0(\kappa))` for :math:`\kappa \ge 0`, with derivatives that keep their digits.

    The derivative of torch's own function is a difference of nearly equal numbers for large concentrations.

    References:
        Abramowitz & Stegun (1964), Handbook of mathematical functions, 9.7.1.
    """
    return bessel_and_lost(concentration)[0]


def lost_resultant(concentration: Tensor) -> Tensor:
    r"""Compute :math:`1 - I_1(\kappa) / I_0(\kappa)`, what a mean resultant length lacks to 1.

    It is minus the derivative of :func:`log_scaled_bessel`.
    """
    return bessel_and_lost(concentration)[1]


def bessel_and_lost(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`log_scaled_bessel` and :func:`lost_resultant` together."""
    large = concentration > _LARGE
    # Numbers without meaning in the place of the others keep NaN out of gradients.
    small_one, large_one = concentration.masked_fill(large, 1.0), concentration.masked_fill(~large, _LARGE)
    series, slope = _series(large_one)
    bessel, inverse = torch.special.i0(small_one), large_one.reciprocal()
    log_large = torch.log1p(series) - 0.5 * (2 * math.pi * large_one).log()
    lost_large = inverse * (0.5 + inverse * slope / (1 + series))
    return (
        torch.where(large, log_large, bessel.log() - small_one),
        torch.where(large, lost_large, 1 - torch.special.i1(small_one) / bessel),
    )


def _series(concentration: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sum :math:`\sum_{j \ge 1} a_j \kappa^{-j}`, and its derivative with respect to :math:`1 / \kappa`."""
    inverse = concentration.reciprocal()
    terms = _COEFFICIENTS if concentration.dtype == torch.float64 else _COEFFICIENTS[:_SINGLE]
    total, slope = torch.full_like(inverse, terms[-1]), torch.zeros_like(inverse)
    for term in (*terms[-2::-1], 0.0):
        slope = torch.addcmul(total, slope, inverse)
        total = torch.addcmul(torch.full_like(inverse, term), total, inverse)
    return total, slope
