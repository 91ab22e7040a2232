r"""Expectations of functions of univariate components, by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.support.checks import is_differentiated
from pyro_mdn.tensors.univariate import Law

__all__ = ["NODES", "WEIGHTS", "expectation", "with_kinks"]

_REACH, _STEP = 12.0, 0.2
_NEGLIGIBLE = 1e-5
_LEGENDRE = np.polynomial.legendre.leggauss(10)
NODES, WEIGHTS = (0.5 * (_LEGENDRE[0] + 1)).tolist(), (0.5 * _LEGENDRE[1]).tolist()


def expectation(
    function: Callable[[Tensor], Tensor], locs: Tensor, scale: Tensor, law: Law, *, kinks: Tensor | None = None
) -> Tensor:
    r"""Compute :math:`E[f(\mu + \sigma Z)]` for Z of a law, in the shape of the locations.

    .. math:: E[f(\mu + \sigma Z)] = \int f(\mu + \sigma Q(\Phi(s))) \, \varphi(s) \, ds

    The trapezoidal rule over normal scores s from -12 to 12 converges exponentially for smooth functions. Where the
    ends still contribute, the result is infinite: the expectation is, or is beyond what the rule can tell. It has no
    gradients then, and does not make those of others NaN. For functions with kinks, the rule of Gauss and Legendre goes
    from one of them to the next, over panels of one normal score at most.

    Args:
        function: Function f, elementwise.
        locs: Locations.
        scale: Scales, which broadcast with the locations.
        law: Law, whose tensors broadcast with the locations.
        kinks: Points in ascending order, ``(P, ...)`` with dimensions that broadcast with those of the locations,
            between which the function is smooth. By default, it is smooth everywhere.
    """
    if kinks is not None:
        return _by_panels(function, locs, scale, law, kinks)
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


def _by_panels(function: Callable[[Tensor], Tensor], locs: Tensor, scale: Tensor, law: Law, kinks: Tensor) -> Tensor:
    """Integrate over panels in which the function is smooth."""
    with torch.no_grad():
        scores = range(-round(_REACH), round(_REACH) + 1)
        edges = with_kinks(torch.stack([locs + scale * _quantile(law, score, locs) for score in scores]), kinks)
    start, width = edges[:-1], edges.diff(dim=0)
    terms, sizes = torch.zeros_like(start), torch.zeros_like(start)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        z = start + node * width
        density = law.log_density((z - locs) / scale).exp() / scale
        term = weight * width * density * function(z)
        terms, sizes = terms + term, sizes + term.abs()
    largest = torch.maximum(sizes[0], sizes[-1])
    return torch.where(largest > _NEGLIGIBLE * sizes.sum(0), math.inf, terms.sum(0))


def with_kinks(edges: Tensor, kinks: Tensor | None) -> Tensor:
    """Put kinks ``(P, ...)`` among the edges ``(E, *shape)`` of panels, between the second and the last but one."""
    if kinks is None:
        return edges
    shape = edges.shape[1:]
    kinks = kinks.reshape(len(kinks), *(1,) * (len(shape) - kinks.ndim + 1), *kinks.shape[1:]).expand(-1, *shape)
    kinks = torch.maximum(torch.minimum(kinks, edges[-2]), edges[1])
    return torch.cat([edges, kinks.to(edges)]).sort(0).values


def _quantile(law: Law, score: float, like: Tensor) -> Tensor:
    """Quantile of a law at the probability of a normal score."""
    level = like.new_tensor(0.5 * math.erfc(abs(score) / math.sqrt(2)))
    return law.followed_quantile(level) if score <= 0 else -law.mirrored().followed_quantile(level)
