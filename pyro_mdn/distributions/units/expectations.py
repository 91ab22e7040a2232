r"""Expectations of functions of univariate components, by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_differentiated
from pyro_mdn.tensors.univariate import Law

__all__ = ["expectation"]

_REACH, _STEP = 12.0, 0.2
_NEGLIGIBLE = 1e-5


def expectation(function: Callable[[Tensor], Tensor], locs: Tensor, scale: Tensor, law: Law) -> Tensor:
    r"""Compute :math:`E[f(\mu + \sigma Z)]` for Z of a law, in the shape of the locations.

    .. math:: E[f(\mu + \sigma Z)] = \int f(\mu + \sigma Q(\Phi(s))) \, \varphi(s) \, ds

    The trapezoidal rule over normal scores s from -12 to 12 converges exponentially for smooth functions. Where the
    ends still contribute, the result is infinite: the expectation is, or is beyond what the rule can tell. It has no
    gradients then, and does not make those of others NaN.

    Args:
        function: Function f, elementwise.
        locs: Locations.
        scale: Scales, which broadcast with the locations.
        law: Law, whose tensors broadcast with the locations.
    """
    total, size, largest = torch.zeros_like(locs), torch.zeros_like(locs), torch.zeros_like(locs)
    count = round(_REACH / _STEP)
    for i in range(-count, count + 1):
        weight = _STEP * math.exp(-0.5 * (_STEP * i) ** 2) / math.sqrt(2 * math.pi)
        term = weight * _without_overflow(function, locs + scale * _quantile(law, _STEP * i, locs), locs)
        total, size = total + term, size + term.abs()
        largest = torch.maximum(largest, term.abs()) if abs(i) == count else largest
    return torch.where(largest > _NEGLIGIBLE * size, math.inf, total)


def _without_overflow(function: Callable[[Tensor], Tensor], points: Tensor, others: Tensor) -> Tensor:
    """Apply a function; infinity where it is, or NaN, with gradients of 0 in the place of NaN."""
    if not is_differentiated(points):
        return function(points)
    finite = function(points.detach()).isfinite()
    return torch.where(finite, function(torch.where(finite, points, others)), math.inf)


def _quantile(law: Law, score: float, like: Tensor) -> Tensor:
    """Quantile of a law at the probability of a normal score."""
    level = like.new_tensor(0.5 * math.erfc(abs(score) / math.sqrt(2)))
    return law.followed_quantile(level) if score <= 0 else -law.mirrored().followed_quantile(level)
