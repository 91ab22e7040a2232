r"""Targets on a grid, such as counts or rounded numbers: find the spacing of their values, for dequantisation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grid_spacing"]


def grid_spacing(y: Tensor, rows_per_value: int = 5) -> Tensor:
    """Find the smallest difference between the values that repeat in each column, ``(D,)``; 0 where half do not repeat.

    >>> grid_spacing(torch.stack([torch.arange(20.0) % 4, torch.arange(20.0)], 1))
    tensor([1., 0.])
    """
    spacing = y.new_zeros(y.shape[-1])
    for i, column in enumerate(y.reshape(-1, y.shape[-1]).unbind(-1)):
        values, counts = _apart(*column[~column.isnan()].unique(return_counts=True))
        often = counts >= rows_per_value
        if often.sum() > 1 and 2 * counts[often].sum() > counts.sum():
            spacing[i] = values[often].diff().min()
    return spacing


def _apart(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge sorted values that differ by rounding alone, and add up how often each occurs."""
    rounding = 16 * torch.finfo(values.dtype).eps * values.abs().amax() if len(values) else 0.0
    new = torch.cat([values.new_ones(min(1, len(values)), dtype=torch.bool), values.diff() > rounding])
    totals = counts.new_zeros(int(new.sum())).index_add(0, new.cumsum(0) - 1, counts)
    return values[new], totals
