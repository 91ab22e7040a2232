r"""Missing targets: count them, and find outputs where so few are missing that it may be an accident."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.checks import unmasked

__all__ = ["MissingTargetsWarning", "few_missing", "gaps_given", "gaps_in"]

_FEW = 0.05  # share of missing targets below which they may be an accident


class MissingTargetsWarning(UserWarning):
    """A few targets are NaN, as after the logarithm of a negative number: they may be missing by accident."""


def gaps_in(y: Tensor) -> Tensor:
    """Count missing targets by output: NaN in ``(N, ..., D)``, those of them outside padding, all outside padding.

    The counts have shape ``(3, D)``. Padding consists of the steps of sequences that have no observed output at all.

    >>> gaps_in(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])).tolist()
    [[1, 2], [1, 2], [3, 3]]
    """
    missing = y.isnan().reshape(-1, y.shape[-1])
    steps = missing[~missing.all(1)] if y.ndim > 2 else missing
    return torch.stack([missing.sum(0), steps.sum(0), torch.full_like(missing.sum(0), len(steps))]).cpu()


def gaps_given(rows: Rows, given: Any) -> Tensor:
    """Count missing targets by :func:`gaps_in`, where targets that came with a mask are not missing by accident."""
    gaps = gaps_in(rows.y)
    if unmasked(given) is not given:
        gaps[1] = 0
    return gaps


def few_missing(gaps: Tensor) -> str | None:
    """Say in which outputs so few targets are missing that it may be an accident; None if there is no such output."""
    few = (gaps[1] > 0) & (gaps[1] < _FEW * gaps[2])
    counts = [f"{gaps[1, i]} of {gaps[2, i]} in output {i}" for i in few.nonzero().flatten().tolist()]
    return ", ".join(counts) or None
