r"""Missing targets: count them, and say where so few are missing that it may be an accident."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.checks import unmasked

__all__ = ["MissingTargetsWarning", "few_missing", "gaps_given", "gaps_in"]

_FEW = 0.05


class MissingTargetsWarning(UserWarning):
    """So few targets are NaN that an operation may have made them, such as the logarithm of a negative number."""


def gaps_in(y: Tensor) -> Tensor:
    """Count what is NaN in targets ``(N, ..., D)``, what of it is no padding, and what is no padding: ``(3, D)``.

    Padding are the steps of sequences that have no output at all.

    >>> gaps_in(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])).tolist()
    [[1, 2], [1, 2], [3, 3]]
    """
    missing = y.isnan().reshape(-1, y.shape[-1])
    steps = missing[~missing.all(1)] if y.ndim > 2 else missing
    return torch.stack([missing.sum(0), steps.sum(0), torch.full_like(missing.sum(0), len(steps))]).cpu()


def gaps_given(rows: Rows, given: Any) -> Tensor:
    """Count what is missing in targets as they were given: what a mask says is no accident."""
    gaps = gaps_in(rows.y)
    if unmasked(given) is not given:
        gaps[1] = 0
    return gaps


def few_missing(gaps: Tensor) -> str | None:
    """Say in which outputs so few entries are missing that it may be an accident; None if in none."""
    few = (gaps[1] > 0) & (gaps[1] < _FEW * gaps[2])
    counts = [f"{gaps[1, i]} of {gaps[2, i]} in output {i}" for i in few.nonzero().flatten().tolist()]
    return ", ".join(counts) or None
