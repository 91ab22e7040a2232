r"""Batches for the members of an ensemble: each member has its own rows, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.in_memory import InMemory, default_batch_size
from pyro_mdn.training.batches.missing_targets import Gaps
from pyro_mdn.training.batches.streams import Streamed

__all__ = ["MemberBatches", "MemberRows", "SharedBatches", "shared"]


class MemberRows(Rows):
    """Rows of each member of an ensemble, ``(M, N, ...)``; the length is N."""

    leading: ClassVar[int] = 2

    def __len__(self) -> int:
        return self.x.shape[1]

    def __getitem__(self, index: Any) -> MemberRows:
        return MemberRows(self.x[:, index], self.y[:, index], None if self.weight is None else self.weight[:, index])

    def member(self, i: int) -> Rows:
        """Rows of one member."""
        return Rows(self.x[i], self.y[i], None if self.weight is None else self.weight[i])


class MemberBatches(InMemory):
    """Batches of rows in memory for the members of an ensemble: each has its own rows, in its own order.

    Args:
        rows: All rows.
        positions: Positions of the rows of each member among all rows, ``(M, N)``.
        batch_size: Rows in a batch of a member at most; the default is that of :class:`InMemory`.
        gaps: Counts of missing targets, as for :class:`InMemory`.
    """

    def __init__(self, rows: Rows, positions: Tensor, batch_size: int | None = None, gaps: Gaps | None = None) -> None:
        super().__init__(rows, batch_size, gaps)
        self.positions = positions
        self.n_batches = math.ceil(self.num_rows / (batch_size or default_batch_size(self.num_rows)))

    @property
    def num_rows(self) -> int:
        """Number N of rows of a member."""
        return self.positions.shape[1]

    def __iter__(self) -> Iterator[Rows]:
        order = torch.rand(self.positions.shape, device=self.positions.device).argsort(1)
        positions = self.positions.gather(1, order)
        return (self._at(part) for part in positions.tensor_split(self.n_batches, 1))

    def head(self, size: int) -> MemberRows:
        """Return the first rows of each member, ``size`` at most."""
        return self._at(self.positions[:, :size])

    def _at(self, positions: Tensor) -> MemberRows:
        rows = self.rows
        return MemberRows(rows.x[positions], rows.y[positions], None if rows.weight is None else rows.weight[positions])

    def digest(self) -> str:
        """Compute a checksum of the contents."""
        return Rows(self.rows.x, self.rows.y, self.rows.weight).digest() + Rows(self.positions, self.positions).digest()


class SharedBatches:
    """Batches of a loader, which all members of an ensemble share."""

    def __init__(self, batches: Streamed, size: int) -> None:
        self.batches, self.size = batches, size
        self.num_rows = batches.num_rows
        self.digest, self.generators = batches.digest, batches.generators

    @property
    def gaps(self) -> Gaps:
        """Counts of missing targets in the rows of the last pass."""
        return self.batches.gaps

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        return (shared(batch, self.size) for batch in self.batches)

    def head(self, size: int) -> Rows:
        """Read the rows of the first batches, ``size`` rows or a few more."""
        return shared(self.batches.head(size), self.size)


def shared(rows: Rows, size: int) -> MemberRows:
    """Give all members of an ensemble the same rows, without copying them."""
    weight = None if rows.weight is None else rows.weight.expand(size, *rows.weight.shape)
    return MemberRows(rows.x.expand(size, *rows.x.shape), rows.y.expand(size, *rows.y.shape), weight)
