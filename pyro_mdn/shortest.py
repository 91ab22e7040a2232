r"""Shortest interval of given probability under a univariate mixture.

The width as a function of the probability below the interval has many local minima. The density is the same at both
ends of each. A grid that follows every component finds them. Newton's method refines those that may be the shortest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn import kernels, univariate

__all__ = ["shortest_tails"]

_ELEMENTS = 2**18
"""Points of the grid at once, where one row does not need more."""

_STEPS = 10


class _Ends(NamedTuple):
    """Candidates, in ascending order along the last dimension: tail below, lower and upper end."""

    tail: Tensor
    lower: Tensor
    upper: Tensor


@torch.no_grad()
def shortest_tails(outside: float, logits: Tensor, locs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Find the probabilities below and above the shortest interval that leaves ``outside`` out, ``(*batch)`` each.

    Args:
        outside: Probability outside the interval, in (0, 1).
        logits: Normalised log-weights, ``(*batch, K)``.
        locs: Means.
        scale: Standard deviations; all of these broadcast.
    """
    parameters = torch.broadcast_tensors(logits, locs, scale)
    batch, n_components = parameters[0].shape[:-1], parameters[0].shape[-1]
    dtype = torch.promote_types(locs.dtype, torch.float32)
    flat = [p.detach().reshape(-1, n_components).to(dtype) for p in parameters]
    size = max(1, _ELEMENTS // (n_components * len(_nodes(locs))))
    parts = [_search(outside, *part) for part in zip(*(p.split(size) for p in flat), strict=True)]
    left = torch.cat(parts).reshape(batch)
    return left.to(locs), (outside - left).to(locs)


def _search(outside: float, *parameters: Tensor) -> Tensor:
    """Probability below the shortest interval, ``(N,)``, for parameters ``(N, K)``."""
    rows, *candidates = _basins(_on_grid(outside, *parameters))
    # The grid is in the dtype of the mixture; differences between nearly equal densities need more digits.
    width, tail = _refine(outside, [p[rows].double() for p in parameters], *candidates)
    count = len(parameters[0])
    shortest = width.new_full((count,), math.inf).scatter_reduce(0, rows, width, "amin")
    chosen = (width == shortest[rows]).nonzero().squeeze(-1)
    return tail.new_full((count,), outside / 2).index_put((rows[chosen],), tail[chosen])


def _nodes(like: Tensor) -> Tensor:
    """Points of the grid for a standard normal component, close where its density bends."""
    half = [0.8, 1.6, 2.4, 3.4, 5.0, 8.5]
    return like.new_tensor([-z for z in reversed(half)] + [0.0] + half)


def _on_grid(outside: float, logits: Tensor, locs: Tensor, scale: Tensor) -> _Ends:
    """Intervals one end of which is a point of the grid, ``(N, M)``: the other end is interpolated."""
    points = (locs.unsqueeze(-1) + scale.unsqueeze(-1) * _nodes(locs)).flatten(-2).sort(-1).values
    below, above, density = _tails(points, logits.exp(), locs, scale)
    log_density = density.clamp(min=torch.finfo(density.dtype).tiny).log()
    lower = _interpolate(outside - above, below, points, log_density)
    upper = _interpolate(below - outside, -above, points, log_density)
    tail = torch.cat([below, outside - above], -1)
    lower, upper = torch.cat([points, lower], -1), torch.cat([upper, points], -1)
    tail = tail.masked_fill((tail <= 0) | (tail >= outside), math.inf)
    tail, order = tail.sort(-1)
    return _Ends(tail, lower.gather(-1, order), upper.gather(-1, order))


def _tails(points: Tensor, weights: Tensor, locs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probability below and above points ``(N, M)``, and density; both tails keep their relative accuracy."""
    passed, tail, density = (torch.zeros_like(points) for _ in range(3))
    total = torch.zeros_like(points[:, :1])
    precision = math.sqrt(0.5) / scale
    height = weights * precision / math.sqrt(math.pi)
    for k in range(locs.shape[-1]):  # one at a time, so that memory does not grow with the square of their number
        standardized = (points - locs[:, k, None]).mul_(precision[:, k, None])
        weight = weights[:, k, None]
        passed.addcmul_(standardized >= 0, weight)
        total = total + weight
        tail.addcmul_(standardized.abs().erfc_().copysign_(standardized), weight, value=0.5)
        density.addcmul_(kernels.exp(standardized.square_().neg_()), height[:, k, None])
    return passed - tail, total - passed + tail, density


def _interpolate(level: Tensor, levels: Tensor, points: Tensor, log_density: Tensor) -> Tensor:
    """Points at which a cumulative probability, known at ``points``, reaches ``level``: its logarithm bends little."""
    after = torch.searchsorted(levels, level).clamp(1, levels.shape[-1] - 1)
    low, high = levels.gather(-1, after - 1), levels.gather(-1, after)
    start, end = points.gather(-1, after - 1), points.gather(-1, after)
    rise = (log_density.gather(-1, after) - log_density.gather(-1, after - 1)).clamp(-50, 50)
    rise = torch.where(rise.abs() < 1e-6, 1e-6, rise)
    share = ((level - low) / (high - low)).clamp(0, 1).nan_to_num(0.5)
    return start + (end - start) * (share * rise.expm1()).log1p() / rise


def _basins(ends: _Ends) -> tuple[Tensor, _Ends, _Ends, _Ends]:
    """Rows, and neighbours, of candidates narrower than these that may be near the narrowest, ``(P,)``."""
    width = (ends.upper - ends.lower).masked_fill(ends.tail == math.inf, math.inf)
    outer = width.new_full((len(width), 1), math.inf)
    before, after = torch.cat([outer, width[:, :-1]], -1), torch.cat([width[:, 1:], outer], -1)
    # Between two candidates no interval is shorter than from the lower end of one to the upper end of the other.
    step = torch.zeros_like(width)
    step[:, :-1] = ends.lower.diff(dim=-1)
    step[:, 1:] = torch.maximum(step[:, 1:], ends.upper.diff(dim=-1))
    near = torch.maximum(width - step.abs(), 0.5 * width) <= width.amin(-1, keepdim=True)
    rows, columns = ((width <= before) & (width <= after) & (width < math.inf) & near).nonzero().unbind(-1)
    last = (ends.tail < math.inf).sum(-1)[rows] - 1
    # Two neighbours on each side, since widths are interpolated.
    picks = ((columns - 2).clamp(min=0), torch.minimum(columns + 2, last), columns)
    lowest, highest, start = (_Ends(*(t[rows, pick].double() for t in ends)) for pick in picks)
    return rows, lowest, highest, start


def _refine(
    outside: float, parameters: list[Tensor], lowest: _Ends, highest: _Ends, start: _Ends
) -> tuple[Tensor, Tensor]:
    """Width, and tail below, where the densities at both ends agree: Newton's method within brackets, ``(P,)``."""
    logits, locs, scale = parameters
    tail, low, high = start.tail, lowest.tail, highest.tail
    ends, signs = torch.stack([start.lower, start.upper]), tail.new_tensor([[1.0], [-1.0]])
    smallest, largest = torch.stack([lowest.lower, lowest.upper]), torch.stack([highest.lower, highest.upper])
    width, best = torch.full_like(tail, math.inf), tail
    for _ in range(_STEPS):
        log_density, bend = univariate.log_density_by_level(ends, *parameters)
        below = univariate.mixture_cdf(ends[0], *parameters)
        above = univariate.mixture_cdf(-ends[1], logits, -locs, scale)
        # How far the ends are from leaving this tail out, as a probability and, to first order, as a distance.
        lack, stretch = torch.stack([tail - below, tail - outside + above]), (-log_density).exp()
        reached = (ends + lack * stretch).diff(dim=0)[0] + (lack * stretch).abs().sum(0)
        better = reached <= width * (1 + 1e-12)  # of equal ones the last, where the densities agree best
        width, best = torch.where(better, reached, width), torch.where(better, tail, best)
        excess, slope = ((log_density + bend * lack) * signs).sum(0), (bend * signs).sum(0)
        low, high = torch.where(excess > 0, low, tail), torch.where(excess > 0, tail, high)
        newton = tail - excess / slope
        helps = (slope > 0) & (newton >= low) & (newton <= high)
        new = torch.where(helps, newton, low + (high - low) / 2)
        ends = (ends + (lack + new - tail) * stretch).clamp(smallest, largest)
        tail = new
    return width, best
