r"""Functions of concentrations: the scale factor of von Mises densities and their mean, for small and large ones."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["lost_resultant", "log_scaled_bessel"]

_LARGE = 20.0
"""Concentration from which on asymptotic series are used, which have all digits there."""

_TERMS = {torch.float64: 16}
_FEW_TERMS = 6


def log_scaled_bessel(concentration: Tensor) -> Tensor:
    r"""Compute :math:`\log(e^{-\kappa} I_0(\kappa))` for :math:`\kappa \ge 0`, with derivatives that keep their digits.

    The derivative of torch's own function is a difference of nearly equal numbers for large concentrations.

    References:
        Abramowitz & Stegun (1964), Handbook of mathematical functions, 9.7.1.
    """
    large = concentration > _LARGE
    small_one, large_one = _apart(concentration, large)
    series = _series(large_one)[0]
    asymptotic = torch.log1p(series) - 0.5 * (2 * math.pi * large_one).log()
    return torch.where(large, asymptotic, torch.special.i0(small_one).log() - small_one)


def lost_resultant(concentration: Tensor) -> Tensor:
    r"""Compute :math:`1 - I_1(\kappa) / I_0(\kappa)`, what a mean resultant length lacks to 1.

    It is minus the derivative of :func:`log_scaled_bessel`.
    """
    large = concentration > _LARGE
    small_one, large_one = _apart(concentration, large)
    series, slope = _series(large_one)
    inverse = large_one.reciprocal()
    asymptotic = inverse * (0.5 + inverse * slope / (1 + series))
    return torch.where(large, asymptotic, 1 - torch.special.i1(small_one) / torch.special.i0(small_one))


def _apart(concentration: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
    """Small and large concentrations, with numbers without meaning in the place of others."""
    return concentration.masked_fill(large, 1.0), concentration.masked_fill(~large, _LARGE)


def _series(concentration: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sum :math:`\sum_{j \ge 1} a_j \kappa^{-j}`, and its derivative with respect to :math:`1 / \kappa`."""
    inverse = concentration.reciprocal()
    terms = _coefficients(_TERMS.get(concentration.dtype, _FEW_TERMS))
    total, slope = torch.full_like(inverse, terms[-1]), torch.zeros_like(inverse)
    for term in (*terms[-2::-1], 0.0):
        slope = torch.addcmul(total, slope, inverse)
        total = torch.addcmul(torch.full_like(inverse, term), total, inverse)
    return total, slope


@functools.cache
def _coefficients(count: int) -> tuple[float, ...]:
    """Coefficients of the first powers, without that of the power 0, which is 1."""
    terms = [1 / 8]
    for j in range(2, count + 1):
        terms.append(terms[-1] * (2 * j - 1) ** 2 / (8 * j))
    return tuple(terms)
