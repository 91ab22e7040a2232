r"""Missing targets: count them, and find outputs where so few are missing that it may be an accident."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import INTERVAL, Targets, TargetsOrTensor, missing
from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.checks import unmasked

__all__ = ["MissingTargetsWarning", "few_missing", "gaps_given", "gaps_in"]

_FEW = 0.05  # share of missing targets below which they may be an accident


class MissingTargetsWarning(UserWarning):
    """A few targets are NaN, as after the logarithm of a negative number: they may be missing by accident."""


def gaps_in(y: TargetsOrTensor) -> Tensor:
    """Count missing targets ``(N, ..., D)`` by output, those of them outside padding, all outside padding, intervals.

    The counts have shape ``(4, D)``. Padding consists of the steps of sequences that have no observed output at all.

    >>> gaps_in(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])).tolist()
    [[1, 2], [1, 2], [3, 3], [0, 0]]
    """
    unknown = missing(y).reshape(-1, y.shape[-1])
    steps, count = unknown[~unknown.all(1)] if y.ndim > 2 else unknown, unknown.sum(0)
    within = (y.kinds() == INTERVAL).reshape(-1, y.shape[-1]).sum(0) if isinstance(y, Targets) else 0 * count
    return torch.stack([count, steps.sum(0), torch.full_like(count, len(steps)), within]).cpu()


def gaps_given(rows: Rows, given: Any) -> Tensor:
    """Count missing targets by :func:`gaps_in`; with a mask, or in :class:`Targets`, they are missing on purpose."""
    gaps = gaps_in(rows.y)
    if isinstance(given, Targets) or unmasked(given) is not given:
        gaps[1] = 0
    return gaps


def few_missing(gaps: Tensor) -> str | None:
    """Say in which outputs so few targets are missing that it may be an accident; None if there is no such output."""
    few = (gaps[1] > 0) & (gaps[1] < _FEW * gaps[2])
    counts = [f"{gaps[1, i]} of {gaps[2, i]} in output {i}" for i in few.nonzero().flatten().tolist()]
    return ", ".join(counts) or None
