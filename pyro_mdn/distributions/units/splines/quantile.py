r"""The target transform through the quantiles of the training targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.units.splines.rational_quadratic import REACH, Piece, SplineWarp, scores_of
from pyro_mdn.distributions.units.target_transforms import TargetTransform, centre_and_unit
from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.support.checks import is_count, shown

__all__ = ["Quantile"]

_BEYOND = 5
"""Targets beyond the outer points of a spline, which the straight lines there are fitted to."""


@dataclass(frozen=True)
class Quantile(TargetTransform):
    r"""Targets of any shape: quantiles of the training targets become those of a normal distribution.

    A monotone rational-quadratic spline goes through the quantiles, as a function of normal scores. Beyond all but five
    targets at each end it is a straight line, whose slope is that of the mean excess of these targets. Few targets give
    a spline of few pieces: half the square root of their number, so that its slopes are not those of single targets. Of
    equal targets, the spline takes the middle of their ranks.

    Args:
        n_knots: Number of knots, at equal distances of normal scores from -3 to 3: the most detail that there can be.

    Raises:
        ValueError: If there are not three knots at least.

    References:
        Gregory & Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
        Durkan, Bekasov, Murray & Papamakarios (2019), Neural spline flows.

    >>> y = torch.randn(1000, 1).double().exp() - 5
    >>> transform = Quantile()
    >>> z = transform.warp(transform.fit_warp(y)).forward(y)
    >>> bool(((z - y.add(5).log()).abs() < 0.3).double().mean() > 0.95)
    True
    """

    n_knots: int = 25

    def __post_init__(self) -> None:
        if not is_count(self.n_knots) or self.n_knots < 3:
            raise ValueError(f"n_knots: expected an integer, 3 at least, got {shown(self.n_knots)}")

    def start(self, dim: int) -> dict[str, Tensor]:
        knots = scores_of(self.n_knots).float().unsqueeze(-1).repeat(1, dim)
        one = torch.ones(dim)
        return {"centre": 0 * one, "unit": one, "knots": knots, "slopes": torch.ones_like(knots)}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        tensors = centre_and_unit(y)
        columns = ((y - tensors["centre"]) / tensors["unit"]).unbind(-1)
        splines = [_spline(column[~column.isnan()], self.n_knots) for column in columns]
        knots, slopes = (torch.stack(parts, -1) for parts in zip(*splines, strict=True))
        return {**tensors, "knots": knots, "slopes": slopes}

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return SplineWarp(**tensors)


def _spline(values: Tensor, n_knots: int) -> tuple[Tensor, Tensor]:
    """Fit a spline to numbers; return its knots and its slopes there, ``(n_knots,)``."""
    distinct, counts = values.unique(return_counts=True)
    scores = scores_of(n_knots)
    if len(distinct) < 2:
        return scores + (distinct.sum() if len(distinct) else 0.0), torch.ones_like(scores)
    ranks = torch.special.ndtri((counts.cumsum(0) - 0.5 * counts) / len(values))
    outer = -torch.special.ndtri(distinct.new_tensor(min(0.25, _BEYOND / len(values)))).clamp(min=-REACH)
    ends = torch.maximum(-outer, ranks[0]), torch.minimum(outer, ranks[-1])
    n_points = min(n_knots, max(3, int(len(values) ** 0.5 / 2)))
    points = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, n_points, dtype=scores.dtype, device="cpu")
    quantiles = torch.from_numpy(np.interp(points.numpy(), ranks.numpy(), distinct.numpy()))
    slopes = _slopes(points, quantiles, (distinct, counts, ranks))
    return _resampled(points, quantiles, slopes, scores)


def _slopes(points: Tensor, quantiles: Tensor, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Choose slopes at points: inside geometric means of the chords, which those of the inverse are, too.

    At the ends they are those of the data beyond.
    """
    secants = quantiles.diff() / points.diff()
    inside = (secants[1:] * secants[:-1]).sqrt()
    distinct, counts, ranks = data
    ends = []
    for i, beyond in ((0, ranks < points[0]), (-1, ranks > points[-1])):
        excess, scores = (
            (counts * (values - end))[beyond].sum() for values, end in ((distinct, quantiles[i]), (ranks, points[i]))
        )
        tail = torch.where(scores == 0, secants[i], excess / torch.where(scores == 0, 1.0, scores))
        ends.append(torch.clamp(tail, secants[i] / _TIMES, secants[i] * _TIMES).reshape(1))
    return torch.cat([ends[0], inside, ends[1]])


def _resampled(points: Tensor, quantiles: Tensor, slopes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Give a spline of scores other knots, at these scores; return its values there, and slopes of its inverse."""
    inner = scores.clamp(points[0], points[-1])
    index = (torch.searchsorted(points, inner, right=True) - 1).clamp(0, len(points) - 2)
    width, height = points.diff(), quantiles.diff()
    piece = Piece(*(t[index] for t in (points, width, quantiles, height, slopes[:-1], slopes[1:])))
    outer = torch.where(scores < inner, slopes[0], slopes[-1])
    knots, inverse_slopes = piece.value(inner) + outer * (scores - inner), (-piece.log_slope(inner)).exp()
    for i in range(1, len(knots)):  # apart in single precision, too
        knots[i] = torch.maximum(knots[i], knots[i - 1] + _LEAST_GAP * (1 + knots[i - 1].abs()))
    secants = scores.diff() / knots.diff()
    nearby = torch.stack([torch.cat([secants[:1], secants]), torch.cat([secants, secants[-1:]])])
    return knots, inverse_slopes.clamp(nearby.amin(0) / _TIMES, nearby.amax(0) * _TIMES)


_TIMES = 30.0
"""Largest ratio of a slope to those of the chords beside it."""

_LEAST_GAP = 1e-5
"""Smallest distance of knots, relative to their positions."""
