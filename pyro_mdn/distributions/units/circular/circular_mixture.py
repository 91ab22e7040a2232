r"""Mixtures wrapped around a circle: probabilities and integrals, mean directions, and shortest arcs."""

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

__all__ = ["CircularMixture", "direction_and_spread", "integrals", "level_of_shortest_arc"]

_LEGENDRE = np.polynomial.legendre.leggauss(7)
_NODES, _WEIGHTS = (0.5 * (_LEGENDRE[0] + 1)).tolist(), (0.5 * _LEGENDRE[1]).tolist()

_EVEN = 24
"""Panels of equal width, beside those that follow the components."""

_MOST = 600
"""Largest number of panels."""

_ELEMENTS = 2**20
"""Numbers of a part of a sum over panels."""

_PARTS = 3
"""Parts of the panels between the points of a grid."""

_ROUNDS, _POINTS = 4, 33
"""Rounds of refinement, and points around each end of an arc in a round."""


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


# Mean directions


def direction_and_spread(mixture: UnivariateMixture, circle: Circle) -> tuple[Tensor, Tensor]:
    r"""Compute the mean direction and the circular standard deviation, ``(*batch)`` each, in units of y.

    .. math:: E[e^{i \omega Y}] = R e^{i \omega \mu}, \qquad \sigma = \frac{\sqrt{-2 \log R}}{\omega},
              \qquad \omega = \frac{2\pi}{P}

    They are closed forms for normal components, and computed by quadrature for others. A distribution without a mean
    direction, such as the uniform one, has an arbitrary one, and a large standard deviation.

    Args:
        mixture: Mixture on the line, with parameters ``(*batch, K)`` and locations in one period.
        circle: The circle.

    References:
        Mardia & Jupp (2000), Directional statistics.
    """
    logits, locs, scale, law = mixture
    rate = 2 * math.pi / circle.period
    lost = law.mean_versine(rate * scale)
    if lost is None:
        direction, variance = _by_quadrature(mixture, circle)
    else:
        weights, angles = logits.exp(), rate * locs
        resultant = weights * (1 - lost)
        direction = torch.atan2((resultant * angles.sin()).sum(-1), (resultant * angles.cos()).sum(-1))
        # The part of 1 - R that a difference from 1 would leave no digits of.
        deviation = (0.5 * (angles - direction.detach().unsqueeze(-1))).sin().square()
        variance = (weights * lost + 2 * resultant * deviation).sum(-1)
    variance = variance.clamp(max=1 - torch.finfo(variance.dtype).eps)
    return wrapped_into(direction / rate, circle.start, circle.period), (-2 * torch.log1p(-variance)).sqrt() / rate


def _by_quadrature(mixture: UnivariateMixture, circle: Circle) -> tuple[Tensor, Tensor]:
    """Direction in radians, and 1 - R."""
    rate = 2 * math.pi / circle.period
    wrapped = CircularMixture.wrapped(mixture, circle)
    edges = wrapped.edges(circle.period)

    def moments(y: Tensor) -> Tensor:
        return wrapped.density(y) * torch.stack([(rate * y).cos(), (rate * y).sin(), torch.ones_like(y)])

    cosine, sine, total = integral(moments, edges, wrapped.size)
    direction = torch.atan2(sine, cosine)
    known = direction.detach()

    def versine(y: Tensor) -> Tensor:
        return 2 * (0.5 * (rate * y - known)).sin().square() * wrapped.density(y)

    return direction, integral(versine, edges, wrapped.size) / total


# Shortest arcs


@torch.no_grad()
def level_of_shortest_arc(wrapped: CircularMixture, total: Tensor, mass: float) -> Tensor:
    r"""Search for the shortest arcs, by the probability between the start of the period and theirs, ``(*batch)``.

    Arcs are compared that begin or end at a point of a grid that follows every component. The distribution function is
    linear between the points. In each round, the grid is refined around both ends of the shortest arc.

    Args:
        wrapped: The mixtures.
        total: Probability of all images.
        mass: Probability of the arcs, in (0, 1).
    """

    def levels_at(points: Tensor) -> Tensor:
        turns = ((points - wrapped.start) / wrapped.period).floor()
        return turns + wrapped.probability(wrapped.start, points - turns * wrapped.period) / total

    edges = wrapped.edges(wrapped.period)
    shares = torch.arange(_PARTS, dtype=edges.dtype, device=edges.device).reshape(-1, *(1,) * edges.ndim) / _PARTS
    parts = (edges[:-1] + shares * edges.diff(dim=0)).transpose(0, 1).flatten(0, 1)
    turn = wrapped.period
    starts = torch.cat([parts, edges[-1:]])
    ends = torch.cat([parts, starts + turn])
    below = levels_at(parts)
    below = torch.cat([below, torch.ones_like(below[:1])]).cummax(0).values
    until, level = torch.cat([below[:-1], 1 + below]), below[0]
    for i in range(_ROUNDS):
        if i:
            below, until = (levels_at(points).cummax(0).values for points in (starts, ends))  # rounded, they may fall
        candidates = torch.cat([below, until - mass]).sort(0).values
        low, high = torch.maximum(below[:1], until[:1] - mass), torch.minimum(below[-1:], until[-1:] - mass)
        candidates = torch.maximum(torch.minimum(candidates, high), low)
        width = _at(until - mass, ends, candidates, right=False) - _at(below, starts, candidates, right=True)
        best = width.argmin(0, keepdim=True)
        level = candidates.gather(0, best)
        near = [candidates.gather(0, (best + step).clamp(0, len(candidates) - 1)) for step in (-3, 3)]
        share = torch.linspace(0, 1, _POINTS, dtype=edges.dtype, device=edges.device)
        share = share.reshape(-1, *(1,) * (edges.ndim - 1))
        starts, ends = (
            _between(*(_at(levels, points, end, right=right) for end in near), share)
            for levels, points, right in ((below, starts, True), (until - mass, ends, False))
        )
    return level.squeeze(0)


def _between(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    return low + share * (high - low)


def _at(levels: Tensor, points: Tensor, level: Tensor, *, right: bool) -> Tensor:
    """Interpolate the points ``(P, *batch)`` of levels in ascending order at other levels."""
    known, wanted = levels.movedim(0, -1).contiguous(), level.movedim(0, -1).contiguous()
    after = torch.searchsorted(known, wanted, right=right).clamp(1, len(levels) - 1).movedim(-1, 0)
    (low, high), (start, end) = ((t.gather(0, after - 1), t.gather(0, after)) for t in (levels, points))
    share = (level - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    return start + share.clamp(0, 1) * (end - start)
