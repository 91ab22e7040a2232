r"""Targets on a grid, such as counts or rounded numbers: spacing of their values, and points for dequantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.tensors.numerics import winsorized

__all__ = ["grid_spacing", "kept_inside", "points_in_cells"]


def grid_spacing(y: Tensor, rows_per_value: int = 5) -> Tensor:
    """Find the smallest difference between the values that repeat in each column, ``(D,)``; 0 where half do not repeat.

    >>> grid_spacing(torch.stack([torch.arange(20.0) % 4, torch.arange(20.0)], 1))
    tensor([1., 0.])
    """
    spacing = y.new_zeros(y.shape[-1])
    for i, column in enumerate(y.reshape(-1, y.shape[-1]).unbind(-1)):
        column = column[~column.isnan()]
        values, counts = column.unique(return_counts=True)
        values, counts = _apart(values, counts, _rounding(column))
        often = counts >= rows_per_value
        if often.sum() > 1 and 2 * counts[often].sum() > counts.sum():
            spacing[i] = values[often].diff().min()
    return spacing


def _rounding(column: Tensor) -> Tensor | float:
    """Bound the difference that rounding makes between equal values, gross outliers apart."""
    return 16 * torch.finfo(column.dtype).eps * winsorized(column).abs().amax() if len(column) else 0.0


def _apart(values: Tensor, counts: Tensor, rounding: Tensor | float) -> tuple[Tensor, Tensor]:
    """Merge sorted values that differ by rounding alone, and add up how often each occurs."""
    new = torch.cat([values.new_ones(min(1, len(values)), dtype=torch.bool), values.diff() > rounding])
    totals = counts.new_zeros(int(new.sum())).index_add(0, new.cumsum(0) - 1, counts)
    return values[new], totals


def points_in_cells(y: TargetsOrTensor, cell: Tensor, num_points: int, *, anew: bool) -> TargetsOrTensor:
    """Draw a Latin hypercube of points ``(S, N, ..., D)`` in the cells around targets; intervals stay what they are.

    Args:
        y: Targets ``(N, ..., D)``.
        cell: Size of the cells ``(D,)``.
        num_points: Number S of points.
        anew: Whether to draw from torch's generator; otherwise the points are the same each time.
    """
    generator = None if anew else torch.Generator(y.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # torch.compile refuses symbolic sizes where a generator is given, even generator=None.
        size = (num_points, *shape)
        if generator is None:
            return torch.rand(size, device=y.device)
        return torch.rand(size, device=y.device, generator=generator)

    # A Latin hypercube pairs strata at random; those of the first output may stay in order.
    first = torch.arange(num_points, device=y.device).reshape(-1, *(1,) * y.ndim)
    others = draw(*y.shape[:-1], y.shape[-1] - 1).argsort(0)
    stratum = torch.cat([first.expand(-1, *y.shape[:-1], 1), others], -1)
    within = draw(*y.shape) if anew else 0.5
    offset = cell * ((stratum + within) / num_points - 0.5)
    if isinstance(y, Targets):
        offset = offset.masked_fill(y.kinds() != EXACT, 0.0)
        return y.limits(lambda t: t + offset)
    return y + offset


def kept_inside(moved: TargetsOrTensor, y: TargetsOrTensor, transform: TargetTransform) -> TargetsOrTensor:
    """Move points that have left the support of a transform back, by a mirror at the exact targets or by whole turns.

    Each training step does this for targets on a grid: nothing is computed where every number is a target.

    Args:
        moved: Points around targets, ``(*sample, N, ..., D)``.
        y: The targets, inside of the support.
        transform: Transform of the targets.
    """
    if transform.takes_any_number:
        return moved
    if isinstance(moved, Targets):
        of: Any = y
        exact = of.kinds() == EXACT
        ends = (moved.lower, of.lower), (moved.upper, of.upper)
        return Targets(*(_inward(*pair, transform, exact) for pair in ends))
    assert isinstance(y, Tensor)
    return transform.inward(moved, y)


def _inward(moved: Tensor, y: Tensor, transform: TargetTransform, exact: Tensor) -> Tensor:
    return torch.where(exact, transform.inward(moved, y), moved)
