r"""Probabilities and integrals over a circle, by quadrature between points that follow every component."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.circles import TURNS
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["arc_probability", "density", "edges_between", "integral", "integrals"]

_LEGENDRE = np.polynomial.legendre.leggauss(10)
_NODES, _WEIGHTS = (0.5 * (_LEGENDRE[0] + 1)).tolist(), (0.5 * _LEGENDRE[1]).tolist()

_EVEN = 24
"""Panels of equal width, beside those that follow the components."""

_MOST = 600
"""Largest number of panels."""

_ELEMENTS = 2**22
"""Numbers of a part of a sum over panels."""


def arc_probability(mixture: UnivariateMixture, lower: Tensor, upper: Tensor, period: float) -> Tensor:
    """Probability of the arcs between two angles, by differences of distribution functions.

    Args:
        mixture: Mixture on the line, with parameters ``(*batch, K)`` and locations in one period.
        lower: Start of each arc, ``(*sample, *batch)``.
        upper: End of each arc, not before its start and at most a turn after it.
        period: Length of a turn.
    """
    logits, locs, scale, law = mixture
    total = torch.zeros((), dtype=locs.dtype, device=locs.device)
    for turns in range(-TURNS, TURNS + 1):
        start, end = (((t + turns * period).unsqueeze(-1) - locs) / scale for t in (lower, upper))
        total = total + (logits.exp() * (law.cdf(end) - law.cdf(start))).sum(-1)
    return total


def density(mixture: UnivariateMixture, value: Tensor, period: float) -> Tensor:
    """Density of the angles ``(*sample, *batch)``, for arguments as in :func:`arc_probability`."""
    logits, locs, scale, law = mixture
    total = torch.zeros((), dtype=locs.dtype, device=locs.device)
    for turns in range(-TURNS, TURNS + 1):
        z = ((value + turns * period).unsqueeze(-1) - locs) / scale
        total = total + ((logits + law.log_density(z)).exp() / scale).sum(-1)
    return total


@torch.no_grad()
def edges_between(mixture: UnivariateMixture, start: Tensor, length: float) -> Tensor:
    """Points ``(P, *batch)`` in ascending order from a start ``(*batch)`` over a length, dense where components bend.

    The points around each component are moved into the range by multiples of its length.
    """
    logits, locs, scale, law = mixture
    points = locs.unsqueeze(-1) + scale.unsqueeze(-1) * law.grid(locs)
    shape = torch.broadcast_shapes(logits.shape, locs.shape, scale.shape)
    points = points.expand(*shape, points.shape[-1]).flatten(-2)
    start = start.unsqueeze(-1)
    even = start + length * torch.linspace(0, 1, _EVEN + 1, dtype=locs.dtype, device=locs.device)
    points = start + torch.remainder(points - start, length)
    points = torch.cat([points, even.expand(*points.shape[:-1], -1)], -1)
    points = torch.maximum(torch.minimum(points, start + length), start).sort(-1).values
    if points.shape[-1] > _MOST + 1:
        kept = torch.linspace(0, points.shape[-1] - 1, _MOST + 1, device=points.device).round().long()
        points = points[..., kept]
    return points.movedim(-1, 0)


def integrals(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, elements: int) -> Tensor:
    """Integrate a function of points ``(P, *batch)`` over each of the panels between ``start`` and ``end``.

    The function may give results ``(*several, P, *batch)``, for several integrands at a time.

    Args:
        function: The integrands.
        start: Starts of the panels, ``(P, *batch)``.
        end: Their ends, likewise.
        elements: Numbers that the function needs for one panel.
    """
    parts = []
    rows = max(1, _ELEMENTS // max(1, elements))
    for low, high in zip(start.split(rows), end.split(rows), strict=True):
        width = high - low
        parts.append(sum(w * width * function(low + x * width) for x, w in zip(_NODES, _WEIGHTS, strict=True)))
    return torch.cat(parts, parts[0].ndim - start.ndim)


def integral(function: Callable[[Tensor], Tensor], edges: Tensor, elements: int) -> Tensor:
    """Integrate a function, as for :func:`integrals`, over all panels between the points of a grid."""
    each = integrals(function, edges[:-1], edges[1:], elements)
    return each.sum(each.ndim - edges.ndim)
