r"""Shortest intervals of given probability under univariate mixtures.

The width of an interval, as a function of the probability below it, may have many local minima. At each minimum, the
density is the same at both ends of the interval. A grid that follows every component finds the minima, and Newton's
method refines those that may be the shortest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.tensors.numerics import exp, single_at_least
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["Shortest", "shortest_intervals"]

_ELEMENTS = 2**16
"""Largest number of grid points that are processed at once; a single row may have more."""

_STEPS = 10

_SLACK = 4.0
"""Safety factor on the gain in width that a Newton step promises to first order; to second order, half is gained."""


class _Ends(NamedTuple):
    """Candidate intervals in ascending order along the last dimension: probability below, lower and upper end."""

    tail: Tensor
    lower: Tensor
    upper: Tensor


class Shortest(NamedTuple):
    """Shortest intervals, ``(*batch)``: probabilities below and above them, and their ends."""

    left: Tensor
    right: Tensor
    lower: Tensor
    upper: Tensor


@torch.no_grad()
def shortest_intervals(outside: float, mixture: UnivariateMixture) -> Shortest:
    """Find the shortest intervals of probability ``1 - outside``.

    Args:
        outside: Probability outside the interval, in (0, 1).
        mixture: Univariate mixtures, ``(*batch)``.
    """
    locs = mixture.locs
    shape = torch.broadcast_shapes(mixture.logits.shape, locs.shape, mixture.scale.shape)
    batch, dtype = shape[:-1], single_at_least(locs.dtype)
    flat = _changed(mixture, lambda t: t.detach().expand(shape).reshape(-1, shape[-1]).to(dtype))
    size = max(1, _ELEMENTS // (shape[-1] * mixture.law.grid(locs).shape[-1]))
    parts = [
        _basins(start, outside, _on_grid(outside, _changed(flat, lambda t, start=start: t[start : start + size])))
        for start in range(0, max(1, batch.numel()), size)
    ]
    rows = torch.cat([part[0] for part in parts])
    candidates = [
        _Ends(*(torch.cat(t) for t in zip(*ends, strict=True))) for ends in list(zip(*parts, strict=True))[1:]
    ]
    left, lower, upper = _narrowest(outside, flat, rows, candidates)
    shortest = Shortest(*(t.to(locs) for t in (left, outside - left, lower, upper)))
    _set_ends(shortest, lower.isnan().nonzero().squeeze(-1), flat)
    return Shortest(*(t.reshape(batch) for t in shortest))


def _changed(mixture: UnivariateMixture, function: Callable[[Tensor], Tensor]) -> UnivariateMixture:
    """Apply a function to all parameters, including those of the law."""
    logits, locs, scale, law = mixture
    return UnivariateMixture(function(logits), function(locs), function(scale), law.map(lambda t, n: function(t)))


def _set_ends(shortest: Shortest, rows: Tensor, mixture: UnivariateMixture) -> None:
    """Set the ends of these rows, for which Newton's method has given no accurate ones, to quantiles."""
    if not len(rows):
        return
    some = _changed(mixture, lambda t: t[rows])
    left, right = (tail[rows].to(some.locs) for tail in (shortest.left, shortest.right))
    shortest.lower[rows] = some.quantile(left).to(shortest.lower)
    shortest.upper[rows] = -some.mirrored().quantile(right).to(shortest.upper)


def _narrowest(outside: float, mixture: UnivariateMixture, rows: Tensor, candidates: list[_Ends]) -> Tensor:
    """Find the probability below the shortest interval and both ends, ``(3, N)``, for parameters ``(N, K)``."""
    # The grid is in the dtype of the mixture, but differences between nearly equal densities need more digits.
    width, found = _refine(outside, rows, _changed(mixture, lambda t: t[rows].double()), *candidates)
    count = len(mixture.locs)
    shortest = width.new_full((count,), math.inf).scatter_reduce(0, rows, width, "amin")
    chosen = (width == shortest[rows]).nonzero().squeeze(-1)
    none = width.new_tensor([outside / 2, math.nan, math.nan]).unsqueeze(-1).repeat(1, count)
    return none.index_copy(1, rows[chosen], found[:, chosen])


def _on_grid(outside: float, mixture: UnivariateMixture) -> _Ends:
    """Build intervals ``(N, M)`` with one end on a point of the grid; the other end is interpolated."""
    locs, scale = mixture.locs.unsqueeze(-1), mixture.scale.unsqueeze(-1)
    points = (locs + scale * mixture.law.grid(mixture.locs)).flatten(-2).sort(-1).values
    below, above, density = _tails(points, mixture)
    below, level = below.cummax(-1).values, (outside - above).cummax(-1).values  # rounding leaves them unsorted
    log_density = density.clamp(min=torch.finfo(density.dtype).tiny).log()
    # Both lists are sorted: the place of an entry in the merged list is its index plus its rank in the other list.
    after = torch.searchsorted(below, level)
    before = after.new_zeros((len(after), after.shape[-1] + 1))
    before = before.scatter_add_(-1, after, torch.ones_like(after)).cumsum(-1)[:, :-1]
    count = torch.arange(after.shape[-1], device=after.device)
    order = torch.cat([before + count, after + count], -1)
    lower = _interpolate(level, below, after, points, log_density)
    upper = _interpolate(below - outside, -above, before, points, log_density)
    tail, lower, upper = torch.cat([below, level], -1), torch.cat([points, lower], -1), torch.cat([upper, points], -1)
    return _Ends(*(torch.empty_like(t).scatter_(-1, order, t) for t in (tail, lower, upper)))


def _tails(points: Tensor, mixture: UnivariateMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Compute probabilities below and above points ``(N, M)``, and densities; both tails keep relative accuracy."""
    logits, locs, scale, law = mixture
    passed, tail, density = (torch.zeros_like(points) for _ in range(3))
    total = torch.zeros_like(points[:, :1])
    weights, precision = logits.exp(), scale.reciprocal()
    for k in range(locs.shape[-1]):  # one at a time, so that memory does not grow with the square of K
        own, weight = law.map(lambda t, n, k=k: t[:, k, None]), weights[:, k, None]
        z = (points - locs[:, k, None]).mul_(precision[:, k, None])
        passed.addcmul_(z >= 0, weight)
        total = total + weight
        tail.addcmul_(own.outer_tail(z).copysign_(z), weight)
        density.addcmul_(exp(own.log_density(z)), weight * precision[:, k, None])
    return passed - tail, total - passed + tail, density


def _interpolate(level: Tensor, levels: Tensor, after: Tensor, points: Tensor, log_density: Tensor) -> Tensor:
    """Interpolate where a cumulative probability reaches ``level``; the log-density is taken as linear in between."""
    before = (after - 1).clamp(0, points.shape[-1] - 2)
    rise = log_density.diff(dim=-1).clamp(-50, 50)
    rise = torch.where(rise.abs() < 1e-6, 1e-6, rise)
    density, pace = levels.diff(dim=-1).reciprocal(), points.diff(dim=-1) / rise
    share = ((level - levels.gather(-1, before)) * density.gather(-1, before)).clamp(0, 1).nan_to_num(0.5)
    grown = (share * rise.expm1().gather(-1, before)).log1p()
    return points.gather(-1, before) + grown * pace.gather(-1, before)


def _basins(offset: int, outside: float, ends: _Ends) -> tuple[Tensor, _Ends, _Ends, _Ends]:
    """Find candidates ``(P,)`` that are local minima of the width and may lie near the shortest interval of their row.

    Returns:
        Their rows, counted from ``offset``; their neighbours below and above, between which the minimum lies; and the
        candidates themselves.
    """
    valid = (ends.tail > 0) & (ends.tail < outside)
    width = torch.where(valid, ends.upper - ends.lower, math.inf)
    outer = width.new_full((len(width), 1), math.inf)
    before, after = torch.cat([outer, width[:, :-1]], -1), torch.cat([width[:, 1:], outer], -1)
    # An interval between two neighbouring candidates reaches at least from the lower end of the later one to the upper
    # end of the earlier one.
    step = torch.zeros_like(width)
    step[:, :-1] = ends.lower.diff(dim=-1)
    step[:, 1:] = torch.maximum(step[:, 1:], ends.upper.diff(dim=-1))
    near = torch.maximum(width - step.abs(), 0.5 * width) <= width.amin(-1, keepdim=True)
    rows, columns = ((width <= before) & (width <= after) & valid & near).nonzero().unbind(-1)
    first = (ends.tail <= 0).sum(-1)[rows]
    last = first + valid.sum(-1)[rows] - 1
    # Two neighbours on each side, since widths are interpolated.
    picks = torch.maximum(columns - 2, first), torch.minimum(columns + 2, last), columns
    lowest, highest, start = (_Ends(*(t[rows, pick].double() for t in ends)) for pick in picks)
    return offset + rows, lowest, highest, start


class _Bracket(NamedTuple):
    """Candidates under refinement, ``(P,)``: indices, rows, probabilities below them, and bounds of the probabilities.

    The ends and their bounds, ``smallest`` and ``largest``, have the shape ``(2, P)``, for lower and upper ends.
    """

    which: Tensor
    row: Tensor
    tail: Tensor
    low: Tensor
    high: Tensor
    ends: Tensor
    smallest: Tensor
    largest: Tensor

    def keep(self, chosen: Tensor) -> _Bracket:
        return _Bracket(*(t.index_select(-1, chosen) for t in self))


def _refine(
    outside: float, rows: Tensor, mixture: UnivariateMixture, lowest: _Ends, highest: _Ends, start: _Ends
) -> tuple[Tensor, Tensor]:
    """Find intervals with equal densities at both ends: width ``(P,)``; probability below and both ends ``(3, P)``.

    Newton's method runs within brackets, until a candidate has settled or can no longer be the shortest.
    """
    ends = (torch.stack([e.lower, e.upper]) for e in (start, lowest, highest))
    which = torch.arange(len(rows), device=rows.device)
    now = _Bracket(which, rows, start.tail, lowest.tail, highest.tail, *ends)
    width, found = torch.full_like(start.tail, math.inf), start.tail.expand(3, -1).clone()
    shortest = width.new_full((int(rows.amax()) + 1 if len(rows) else 0,), math.inf)
    for _ in range(_STEPS):
        new, reached, ends, gain, settled = _newton_step(outside, mixture, now)
        # Of equally wide steps, keep the last: there the densities agree best, and the ends are most accurate.
        better = reached <= width[now.which] * torch.where(ends[0].isnan(), 1 + 1e-12, 1 + 1e-10)
        where = now.which[better]
        width[where], found[0, where], found[1:, where] = reached[better], now.tail[better], ends[:, better]
        shortest.scatter_reduce_(0, now.row, reached, "amin")
        hopeless = reached - _SLACK * gain > shortest[now.row] * (1 + 1e-9)
        chosen = (~(settled | hopeless)).nonzero().squeeze(-1)
        now, mixture = new.keep(chosen), _changed(mixture, lambda t, chosen=chosen: t.index_select(0, chosen))
    return width, found


def _newton_step(
    outside: float, mixture: UnivariateMixture, now: _Bracket
) -> tuple[_Bracket, Tensor, Tensor, Tensor, Tensor]:
    """Take one Newton step within the brackets.

    Returns:
        The next brackets; an upper bound of the present width; the present ends, corrected to first order, or NaN where
        that is not accurate enough; the width that the step may gain; and whether a candidate has settled.
    """
    tail, ends = now.tail, now.ends
    log_density, bend = mixture.log_density_by_level(ends)
    below, above = mixture.cdf(ends[0]), mixture.mirrored().cdf(-ends[1])
    # The probability that each end still has to pass to leave its tail out; times ``stretch``, a first-order distance.
    lack, stretch = torch.stack([tail - below, tail - outside + above]), (-log_density).exp()
    corrected, error = ends + lack * stretch, (lack * stretch).abs().sum(0)
    reached = corrected[1] - corrected[0] + error
    excess, slope = ((log_density + bend * lack) * _signs(tail)).sum(0), (bend * _signs(tail)).sum(0)
    low, high = torch.where(excess > 0, now.low, tail), torch.where(excess > 0, tail, now.high)
    newton = tail - excess / slope
    helps = (slope > 0) & (newton >= low) & (newton <= high)
    new = torch.where(helps, newton, low + (high - low) / 2)
    moved = (new - tail).abs()
    reach = torch.where(helps, moved, torch.where(slope > 0, high - low, math.inf))
    gain = reach * (stretch[1] - stretch[0]).abs() + error
    settled = (moved <= 1e-12 * torch.minimum(tail, outside - tail)) & (error <= 1e-9 * reached)
    ends = (ends + (lack + new - tail) * stretch).clamp(now.smallest, now.largest)
    # Where the error is larger, a first-order correction is not accurate enough.
    corrected = torch.where(error <= 1e-9 * reached, corrected, math.nan)
    return now._replace(tail=new, low=low, high=high, ends=ends), reached, corrected, gain, settled


def _signs(like: Tensor) -> Tensor:
    return like.new_tensor([[1.0], [-1.0]])
