r"""Shortest intervals of counts, by branch and bound over their first counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.counts.count_marginals import CountMarginals

__all__ = ["shortest_counts"]

_STARTS = 64
"""First counts of the first round, for each distribution."""

_PARTS = 8
"""Parts of a block of counts in the next round."""


def shortest_counts(marginals: CountMarginals, outside: float) -> tuple[Tensor, Tensor]:
    r"""Find the lower and upper ends ``(N,)`` of the shortest intervals; the first of those that hold most.

    The last count of an interval grows with its first one. Therefore no interval that begins within a block of counts
    is shorter than that from its beginning by more than the size of the block. Blocks that cannot have the shortest
    interval are left out, and the others divided.

    Args:
        marginals: Distributions of one output each, with parameters ``(N, K, 1)`` in double precision.
        outside: Largest probability outside of the intervals.
    """
    last = marginals.quantile(torch.full_like(marginals.logits[:, :1], outside)).squeeze(-1)
    size = ((last + 1) / _STARTS).ceil()
    row = torch.arange(len(last), device=last.device)
    row, start = _children(row, torch.zeros_like(last), last + 1, size, last)
    while True:
        width, missed = _evaluated(marginals, row, start, outside)
        best = torch.full_like(last, torch.inf).scatter_reduce(0, row, width, "amin")
        if not bool((size > 1).any()):
            break
        kept = width - (size[row] - 1) <= best[row]
        block, size = size, (size / _PARTS).ceil()
        row, start = _children(row[kept], start[kept], block[row[kept]], size, last)
    # A probability decides among intervals of equal length, and then the order.
    missed = missed.masked_fill(width > best[row], torch.inf)
    least = torch.full_like(last, torch.inf).scatter_reduce(0, row, missed, "amin")
    start = start.masked_fill(missed > least[row], torch.inf)
    low = torch.full_like(last, torch.inf).scatter_reduce(0, row, start, "amin")
    return low, low + best


def _children(row: Tensor, start: Tensor, block: Tensor, size: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Divide blocks of distributions ``row`` that begin at ``start`` into blocks of the sizes ``(N,)``."""
    count = (block / size[row]).ceil().long()
    parent = torch.arange(len(row), device=row.device).repeat_interleave(count)
    place = torch.arange(len(parent), device=row.device) - (count.cumsum(0) - count)[parent]
    row, start = row[parent], start[parent] + place * size[row[parent]]
    possible = start <= last[row]
    return row[possible], start[possible]


def _evaluated(marginals: CountMarginals, row: Tensor, start: Tensor, outside: float) -> tuple[Tensor, Tensor]:
    """Compute the lengths of intervals of distributions ``row``, and the probabilities outside of them."""
    own = marginals.rows(row)
    first = start.unsqueeze(-1)
    below = own.cdf(first - 1)
    end = own.upper_quantile((outside - below).clamp(min=0))
    return (end - first).squeeze(-1), (below + own.sf(end)).squeeze(-1)
