r"""Probabilities and integrals over a circle, by quadrature between points that follow every component."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.circles import Circle, wrapped_into
from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["CircularMixture", "integral", "integrals"]

_LEGENDRE = np.polynomial.legendre.leggauss(7)
_NODES, _WEIGHTS = (0.5 * (_LEGENDRE[0] + 1)).tolist(), (0.5 * _LEGENDRE[1]).tolist()

_EVEN = 24
"""Panels of equal width, beside those that follow the components."""

_MOST = 600
"""Largest number of panels."""

_ELEMENTS = 2**20
"""Numbers of a part of a sum over panels."""


class CircularMixture(NamedTuple):
    """A univariate mixture, wrapped around a circle. Values have the shape ``(*sample, *batch)``.

    Attributes:
        line: Mixture on the line, with parameters ``(*batch, K)`` and locations in the period.
        period: Length of a turn.
        start: Start of the period, ``(*batch)``.
        turns: Turns to each side at which an image has a probability.
    """

    line: UnivariateMixture
    period: float
    start: Tensor
    turns: int

    @classmethod
    def wrapped(cls, line: UnivariateMixture, circle: Circle, start: Tensor | None = None) -> CircularMixture:
        """Wrap a mixture with any locations.

        Args:
            line: Mixture on the line.
            circle: The circle.
            start: Another start of the period, ``(*batch)``.
        """
        logits, locs, scale, law = line
        shape = torch.broadcast_shapes(logits.shape, locs.shape, scale.shape)[:-1]
        begun, period = locs.new_full(shape, circle.start) if start is None else start, circle.period
        locs, turns = wrapped_into(locs, begun.unsqueeze(-1), period), circle.turns
        if is_known(scale) and scale.numel():
            reach = (scale.detach().unsqueeze(-1) * law.grid(locs).detach().abs()).amax().item() / period
            turns = min(turns, max(1, math.ceil(reach))) if math.isfinite(reach) else turns
        return cls(UnivariateMixture(logits, locs, scale, law), period, begun, turns)

    @property
    def end(self) -> Tensor:
        """End of the period."""
        return self.start + self.period

    @property
    def size(self) -> int:
        """Numbers that one value of each mixture of the batch needs."""
        return self.start.numel() * self.line.logits.shape[-1] * (2 * self.turns + 1)

    def probability(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Probability of arcs between two angles of the period, by differences of distribution functions."""
        ndim = max(lower.ndim, upper.ndim)
        start, end = (self._images(t.reshape(*(1,) * (ndim - t.ndim), *t.shape)) for t in (lower, upper))
        return (self.line.logits.exp() * (self.line.law.cdf(end) - self.line.law.cdf(start))).sum((0, -1))

    def density(self, value: Tensor) -> Tensor:
        """Density of angles of the period."""
        logits, _, scale, law = self.line
        return ((logits + law.log_density(self._images(value))).exp() / scale).sum((0, -1))

    def _images(self, value: Tensor) -> Tensor:
        """Standardised images of angles for each component, ``(images, *sample, *batch, K)``."""
        turns = self.period * torch.arange(-self.turns, self.turns + 1, dtype=value.dtype, device=value.device)
        images = value + turns.reshape(-1, *(1,) * value.ndim)
        return (images.unsqueeze(-1) - self.line.locs) / self.line.scale

    @torch.no_grad()
    def edges(self, length: float) -> Tensor:
        """Points ``(P, *batch)`` in ascending order from the start over a length, dense where components bend.

        The points around each component are moved into the range by multiples of its length.
        """
        logits, locs, scale, law = self.line
        points = locs.unsqueeze(-1) + scale.unsqueeze(-1) * law.grid(locs)
        shape = torch.broadcast_shapes(logits.shape, locs.shape, scale.shape)
        points = points.expand(*shape, points.shape[-1]).flatten(-2)
        start = self.start.unsqueeze(-1)
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
