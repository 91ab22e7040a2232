r"""Data for the members of an ensemble: rows of its own for each, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.sources import InMemory, Streamed, default_batch_size, held_out_count, prepare

__all__ = ["MemberBatches", "MemberRows", "SharedBatches", "prepare_members", "shared"]


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
        """What :func:`pyro_mdn.training.batches.sources.gaps_in` says of the rows of the last pass."""
        return self.batches.gaps

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        return (shared(batch, self.size) for batch in self.batches)

    def head(self, size: int) -> Rows:
        """Rows of the first batches, ``size`` of them or a few more."""
        return shared(self.batches.head(size), self.size)


def prepare_members(
    network: MixtureDensityNetwork,
    size: int,
    x: Any,
    y: Any,
    weight: Any,
    validation: Any,
    batch_size: int | None,
    *,
    bootstrap: bool = False,
) -> tuple[MemberBatches | SharedBatches, MemberRows | SharedBatches | None]:
    """Batches to train the members of an ensemble on, and rows held out: a split, drawn anew for each, of arrays.

    Raises:
        ValueError: If the data are not usable or the validation leaves nothing.
    """
    streamed = isinstance(x, DataLoader | Dataset) and type(x) is not TensorDataset
    if streamed and bootstrap:
        raise ValueError("x: expected arrays for an ensemble with bootstrap, got a loader or data set")
    fraction = isinstance(validation, Real) and not streamed
    batches, held_out = prepare(network, x, y, weight, 0.0 if fraction else validation, batch_size)
    for_each = None if held_out is None else _shared(held_out, size)
    if isinstance(batches, Streamed):
        return SharedBatches(batches, size), for_each
    rows = batches.rows
    n = held_out_count(validation, len(rows)) if fraction else 0
    positions = torch.stack([torch.randperm(len(rows), device=rows.x.device) for _ in range(size)])
    if n:
        everything = MemberBatches(rows, positions[:, :n])
        positions, for_each = positions[:, n:], everything.head(n)
    if bootstrap:
        drawn = torch.randint(positions.shape[1], positions.shape, device=positions.device)
        positions = positions.gather(1, drawn)
    return MemberBatches(rows, positions, batch_size, batches.gaps), for_each


def _shared(data: Rows | Streamed, size: int) -> MemberRows | SharedBatches:
    return SharedBatches(data, size) if isinstance(data, Streamed) else shared(data, size)


def shared(rows: Rows, size: int) -> MemberRows:
    """Have all members of an ensemble look at the same rows."""
    weight = None if rows.weight is None else rows.weight.expand(size, *rows.weight.shape)
    return MemberRows(rows.x.expand(size, *rows.x.shape), rows.y.expand(size, *rows.y.shape), weight)
