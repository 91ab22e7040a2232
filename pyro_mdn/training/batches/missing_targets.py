r"""Missing targets: count them, and find outputs where so few are missing that it may be an accident."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import INTERVAL, Targets, TargetsOrTensor, missing
from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.checks import unmasked

__all__ = ["Gaps", "MissingTargetsWarning", "few_missing", "gaps_given", "gaps_in"]

_FEW = 0.05  # share of missing targets below which they may be an accident


class MissingTargetsWarning(UserWarning):
    """A few targets are NaN, as after the logarithm of a negative number: they may be missing by accident."""


class Gaps(NamedTuple):
    """Counts of targets by output, ``(D,)`` each; those of several batches are added by :meth:`plus`.

    Attributes:
        missing: Targets that were not observed.
        unexplained: Those of them that may be missing by accident: outside of padding, and not on purpose.
        counted: All targets outside of padding.
        intervals: Targets that are known to lie in an interval.
    """

    missing: Tensor
    unexplained: Tensor
    counted: Tensor
    intervals: Tensor

    @classmethod
    def none(cls, dim: int) -> Gaps:
        """Counts of no targets of D outputs."""
        return cls(*torch.zeros(len(cls._fields), dim, dtype=torch.int64, device="cpu"))

    def plus(self, other: Gaps) -> Gaps:
        """Add the counts of other targets."""
        return Gaps(*(a + b for a, b in zip(self, other, strict=True)))


def gaps_in(y: TargetsOrTensor) -> Gaps:
    """Count missing targets and intervals of y, ``(N, ..., D)``.

    Padding consists of the steps of sequences that have no observed output at all.

    >>> gaps_in(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])).missing
    tensor([1, 2])
    """
    unknown = missing(y).reshape(-1, y.shape[-1])
    steps, count = unknown[~unknown.all(1)] if y.ndim > 2 else unknown, unknown.sum(0)
    within = (y.kinds() == INTERVAL).reshape(-1, y.shape[-1]).sum(0) if isinstance(y, Targets) else 0 * count
    return Gaps(*torch.stack([count, steps.sum(0), torch.full_like(count, len(steps)), within]).cpu())


def gaps_given(rows: Rows, given: Any) -> Gaps:
    """Count missing targets by :func:`gaps_in`; with a mask, or in :class:`Targets`, they are missing on purpose."""
    gaps = gaps_in(rows.y)
    on_purpose = isinstance(given, Targets) or unmasked(given) is not given
    return gaps._replace(unexplained=0 * gaps.unexplained) if on_purpose else gaps


def few_missing(gaps: Gaps) -> str | None:
    """Say in which outputs so few targets are missing that it may be an accident; None if there is no such output."""
    few = (gaps.unexplained > 0) & (gaps.unexplained < _FEW * gaps.counted)
    outputs = few.nonzero().flatten().tolist()
    return ", ".join(f"{gaps.unexplained[i]} of {gaps.counted[i]} in output {i}" for i in outputs) or None
