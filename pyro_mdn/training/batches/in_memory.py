r"""Batches of rows that are in memory, in a new random order for each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.missing_targets import Gaps, gaps_in

__all__ = ["InMemory", "default_batch_size"]


class InMemory:
    """Batches of rows in memory, in a new random order each time; their sizes differ by at most one.

    Args:
        rows: The rows.
        batch_size: Rows in a batch at most; by default 1/64 of all rows, but at least 32 and at most 256.
        gaps: Counts of missing targets, by :func:`gaps_in`, in the data that the rows were chosen from, if they were.
    """

    def __init__(self, rows: Rows, batch_size: int | None = None, gaps: Gaps | None = None) -> None:
        self.rows, self.gaps = rows, gaps_in(rows.y) if gaps is None else gaps
        self.n_batches = math.ceil(len(rows) / (batch_size or default_batch_size(len(rows))))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Rows]:
        order = torch.randperm(len(self.rows), device=self.rows.x.device)
        return (self.rows[index] for index in order.tensor_split(self.n_batches))

    def head(self, size: int) -> Rows:
        """Return all rows, because they are in memory anyway."""
        return self.rows

    def digest(self) -> str:
        """Compute a checksum of the contents."""
        return self.rows.digest()

    def generators(self) -> list[torch.Generator]:
        """Return no generators: the order is drawn from torch's default generator."""
        return []


def default_batch_size(rows: int) -> int:
    """Choose the number of rows in a batch: 1/64 of all rows, but at least 32 and at most 256.

    >>> default_batch_size(100), default_batch_size(10_000), default_batch_size(10**6)
    (32, 156, 256)
    """
    return min(256, max(32, rows // 64))
