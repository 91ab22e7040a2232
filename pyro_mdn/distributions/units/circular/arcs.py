r"""The shortest arc of given probability."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.panels import CircularMixture

__all__ = ["level_of_shortest_arc"]

_PARTS = 3
"""Parts of the panels between the points of a grid."""

_ROUNDS, _POINTS = 4, 33
"""Rounds of refinement, and points around each end of an arc in a round."""


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
