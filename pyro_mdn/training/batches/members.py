r"""Data for the members of an ensemble: rows of its own for each, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.in_memory import InMemory, default_batch_size
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
    """Batches of rows in memory for each member of an ensemble: of its own rows, in its own order.

    Args:
        rows: All rows.
        positions: Where the rows of each member are, ``(M, N)``.
        batch_size: Rows in a batch of a member, as for :class:`InMemory`.
        gaps: As for :class:`InMemory`.
    """

    def __init__(
        self, rows: Rows, positions: Tensor, batch_size: int | None = None, gaps: Tensor | None = None
    ) -> None:
        super().__init__(rows, batch_size, gaps)
        self.positions = positions
        self.n_batches = math.ceil(self.num_rows / (batch_size or default_batch_size(self.num_rows)))

    @property
    def num_rows(self) -> int:
        """Number of rows of a member."""
        return self.positions.shape[1]

    def __iter__(self) -> Iterator[Rows]:
        order = torch.rand(self.positions.shape, device=self.positions.device).argsort(1)
        positions = self.positions.gather(1, order)
        return (self._at(part) for part in positions.tensor_split(self.n_batches, 1))

    def head(self, size: int) -> MemberRows:
        """Rows of each member, ``size`` at most."""
        return self._at(self.positions[:, :size])

    def _at(self, positions: Tensor) -> MemberRows:
        rows = self.rows
        return MemberRows(rows.x[positions], rows.y[positions], None if rows.weight is None else rows.weight[positions])

    def digest(self) -> str:
        """Checksum of the contents."""
        return Rows(self.rows.x, self.rows.y, self.rows.weight).digest() + Rows(self.positions, self.positions).digest()


class SharedBatches:
    """Batches of a loader that all members of an ensemble have in common."""

    def __init__(self, batches: Streamed, size: int) -> None:
        self.batches, self.size = batches, size
        self.num_rows = batches.num_rows
        self.digest, self.generators = batches.digest, batches.generators

    @property
    def gaps(self) -> Tensor:
        """What :func:`pyro_mdn.training.batches.missing_targets.gaps_in` says of the rows of the last pass."""
        return self.batches.gaps

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        return (shared(batch, self.size) for batch in self.batches)

    def head(self, size: int) -> Rows:
        """Rows of the first batches, ``size`` of them or a few more."""
        return shared(self.batches.head(size), self.size)


def shared(rows: Rows, size: int) -> MemberRows:
    """Have all members of an ensemble look at the same rows."""
    weight = None if rows.weight is None else rows.weight.expand(size, *rows.weight.shape)
    return MemberRows(rows.x.expand(size, *rows.x.shape), rows.y.expand(size, *rows.y.shape), weight)
