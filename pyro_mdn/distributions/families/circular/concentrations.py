r"""Functions of concentrations: the scale factor of von Mises densities and their mean, for small and large ones."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["bessel_and_lost", "log_scaled_bessel", "lost_resultant"]


class _Precision(NamedTuple):
    """What gives all digits of a precision.

    Attributes:
        large: Concentration from which on the asymptotic series is used.
        asymptotic: Number of its terms.
        power: Number of terms of the power series.
    """

    large: float
    asymptotic: int
    power: int


_PRECISIONS = {torch.float64: _Precision(20.0, 16, 34)}
_SINGLE = _Precision(8.0, 10, 14)


def _products(ratios: Iterable[float]) -> list[float]:
    """Return 1, and the products of the first ratios."""
    return list(itertools.accumulate(ratios, operator.mul, initial=1.0))


# Of the reciprocal of the concentration, and of a quarter of its square.
_ASYMPTOTIC = _products((2 * j - 1) ** 2 / (8 * j) for j in range(1, 17))
_POWER = _products(1 / j**2 for j in range(1, 35))


def log_scaled_bessel(concentration: Tensor) -> Tensor:
    r"""Compute :math:`\log(e^{-\kappa} I_0(\kappa))` for :math:`\kappa \ge 0`, with derivatives that keep their digits.

    The derivative of torch's own function is a difference of nearly equal numbers for large concentrations.

    References:
        Abramowitz & Stegun (1964), Handbook of mathematical functions, 9.6.10 and 9.7.1.
    """
    return bessel_and_lost(concentration)[0]


def lost_resultant(concentration: Tensor) -> Tensor:
    r"""Compute :math:`1 - I_1(\kappa) / I_0(\kappa)`, what a mean resultant length lacks to 1.

    It is minus the derivative of :func:`log_scaled_bessel`.
    """
    return bessel_and_lost(concentration)[1]


def bessel_and_lost(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`log_scaled_bessel` and :func:`lost_resultant` together."""
    switch, asymptotic, power = _PRECISIONS.get(concentration.dtype, _SINGLE)
    large = concentration > switch
    # Numbers without meaning in the place of the others keep NaN out of gradients.
    small_one, inverse = concentration.masked_fill(large, 1.0), concentration.masked_fill(~large, switch).reciprocal()
    series, bend = _polynomial(_ASYMPTOTIC[: asymptotic + 1], inverse)
    log_large = series.log() + 0.5 * (inverse / (2 * math.pi)).log()
    lost_large = inverse * (0.5 + inverse * bend / series)
    half = 0.5 * small_one
    bessel, slope = _polynomial(_POWER[: power + 1], half.square())
    return (
        torch.where(large, log_large, bessel.log() - small_one),
        torch.where(large, lost_large, 1 - half * slope / bessel),
    )


def _polynomial(coefficients: Sequence[float], x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate a polynomial and its derivative."""
    *rest, last = coefficients
    total, slope = torch.full_like(x, last), torch.zeros_like(x)
    for coefficient in reversed(rest):
        slope = torch.addcmul(total, slope, x)
        total = total * x + coefficient
    return total, slope
