r"""Data for training: arrays, data sets and loaders become batches of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows, as_device_tensor, as_rows
from pyro_mdn.support.checks import describe, shown, unmasked
from pyro_mdn.support.evaluation_mode import evaluating
from pyro_mdn.support.process_state import give_way, own_generators

__all__ = [
    "Batches",
    "InMemory",
    "MissingTargetsWarning",
    "Streamed",
    "default_batch_size",
    "few_missing",
    "gaps_in",
    "grid_spacing",
    "held_out_count",
    "prepare",
]


_FEW = 0.05


class MissingTargetsWarning(UserWarning):
    """So few targets are NaN that an operation may have made them, such as the logarithm of a negative number."""


class InMemory:
    """Batches of rows in memory, in a new random order each time; their sizes differ by one at most.

    Args:
        rows: The rows.
        batch_size: Rows in a batch at most; by default 1/64 of all, but 32 at least and 256 at most.
        gaps: What :func:`gaps_in` says of the data that the rows were chosen from, if they were.
    """

    def __init__(self, rows: Rows, batch_size: int | None = None, gaps: Tensor | None = None) -> None:
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
        """All rows: they fit."""
        return self.rows

    def digest(self) -> str:
        """Checksum of the contents."""
        return self.rows.digest()

    def generators(self) -> list[torch.Generator]:
        """No generators but torch's own."""
        return []


class Streamed:
    """Batches ``(x, y)`` or ``(x, y, weight)`` of a loader, one after the other."""

    def __init__(self, network: MixtureDensityNetwork, loader: DataLoader) -> None:
        self.network, self.loader = network, loader
        self.counted = 0
        self.gaps = torch.zeros(3, network.dim_out, dtype=torch.int64, device="cpu")  # of the rows of the last pass
        self.flat: bool | None = None  # whether targets (N, ...) stand for (N, ..., 1)
        try:
            self.n_batches = len(loader)
        except TypeError as error:
            raise ValueError("x: expected a loader of known length, got one over a stream without") from error
        if self.n_batches == 0:
            raise ValueError("x: expected data, got a loader without batches")

    @property
    def num_rows(self) -> int:
        """Rows that the loader goes over in one pass."""
        if isinstance(self.loader.dataset, IterableDataset):
            stream: Any = self.loader.dataset
            return len(stream)
        if self.loader.batch_sampler is None:  # the data set gives whole batches
            self.counted = self.counted or sum(len(rows) for rows in self)
            return self.counted
        sampler: Any = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
        return len(sampler)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Rows]:
        self.gaps = torch.zeros_like(self.gaps)
        for batch in self.loader:
            rows = self._rows(batch)
            if rows.y.shape[-1] == self.network.dim_out:  # else it is refused where it is used
                self.gaps = self.gaps + _gaps(rows, batch[1])
            if len(rows := rows.counted()):
                yield rows
            give_way()

    def head(self, size: int) -> Rows:
        """Rows of the first batches, ``size`` of them or a few more."""
        batches, count = [], 0
        for batch in self:
            batches.append(batch)
            count += len(batch)
            if count >= size:
                break
        if not batches:
            raise ValueError("x: expected rows of positive weight with a target, got a loader without")
        rows = Rows.joined(batches)
        return Rows(*self.network.check(rows.x, rows.y), rows.weight)

    def digest(self) -> str:
        """Size alone: a stream is not read for it."""
        return f"{self.num_rows} rows in {self.n_batches} batches"

    def _rows(self, batch: Any) -> Rows:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) not in (2, 3):
            raise ValueError(f"x: expected batches (x, y) or (x, y, weight), got {describe(batch)}")
        device = self.network.x_shift.device
        x, y, *weight = (
            as_device_tensor(value, name, device) for value, name in zip(batch, ("x", "y", "weight"), strict=False)
        )
        if len(y) != len(x) or any(w.shape != (len(x),) for w in weight):
            raise ValueError(f"x: expected batches of equally many rows, got {[tuple(b.shape) for b in batch]}")
        if weight and not bool((weight[0].isfinite() & (weight[0] >= 0)).all()):
            raise ValueError("weight: expected finite numbers that are not negative")
        return Rows(x, y.unsqueeze(-1) if self._is_flat(x, y) else y, *weight)

    def _is_flat(self, x: Tensor, y: Tensor) -> bool:
        network = self.network
        if self.flat is None:
            self.flat = network.dim_out == 1 and y.ndim <= x.ndim - len(network.input_shape)
            if self.flat:
                with own_generators(), torch.no_grad(), evaluating(network), network.calling():
                    self.flat = y.ndim == network.features(x[:1]).ndim - 1
        return self.flat

    def generators(self) -> list[torch.Generator]:
        """Generators of the loader's own."""
        parts = [self.loader, self.loader.sampler, self.loader.batch_sampler]
        parts.append(getattr(self.loader.batch_sampler, "sampler", None))
        found = {id(generator): generator for part in parts if (generator := getattr(part, "generator", None))}
        return list(found.values())


Batches = InMemory | Streamed


def default_batch_size(rows: int) -> int:
    """Rows in a batch: 1/64 of all, but 32 at least and 256 at most.

    >>> default_batch_size(100), default_batch_size(10_000), default_batch_size(10**6)
    (32, 156, 256)
    """
    return min(256, max(32, rows // 64))


def gaps_in(y: Tensor) -> Tensor:
    """Count what is NaN in targets ``(N, ..., D)``, what of it is no padding, and what is no padding: ``(3, D)``.

    Padding are the steps of sequences that have no output at all.

    >>> gaps_in(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])).tolist()
    [[1, 2], [1, 2], [3, 3]]
    """
    missing = y.isnan().reshape(-1, y.shape[-1])
    steps = missing[~missing.all(1)] if y.ndim > 2 else missing
    return torch.stack([missing.sum(0), steps.sum(0), torch.full_like(missing.sum(0), len(steps))]).cpu()


def _gaps(rows: Rows, given: Any) -> Tensor:
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


def grid_spacing(y: Tensor, rows_per_value: int = 5) -> Tensor:
    """Smallest difference between targets of each column, ``(D,)``, that repeat; 0 where half of them do not.

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
    """Sorted values and how often each is there, those taken together that rounding alone keeps apart."""
    rounding = 16 * torch.finfo(values.dtype).eps * values.abs().amax() if len(values) else 0.0
    new = torch.cat([values.new_ones(min(1, len(values)), dtype=torch.bool), values.diff() > rounding])
    totals = counts.new_zeros(int(new.sum())).index_add(0, new.cumsum(0) - 1, counts)
    return values[new], totals


def prepare(
    network: MixtureDensityNetwork, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None
) -> tuple[Batches, Rows | Streamed | None]:
    """Batches to train on, and rows or batches held out.

    Raises:
        ValueError: If the data are not usable or the validation leaves nothing.
    """
    if type(x) is TensorDataset:
        if y is not None or weight is not None or len(x.tensors) not in (2, 3):
            raise ValueError("x: expected a data set of x, y and perhaps weight, and nothing else")
        x, y, weight = (*x.tensors, None)[:3]
    if isinstance(x, DataLoader | Dataset):
        if y is not None or weight is not None:
            raise ValueError("y, sample_weight: expected None beside a data set or loader, which has them")
        return _prepare_stream(network, x, validation, batch_size)
    if y is None:
        raise ValueError("y: expected targets beside x, got none")
    rows = as_rows(network, x, y, weight)
    gaps = _gaps(rows, y)
    rows = rows.informative()
    held_out = _given(network, validation)
    if held_out is None and (n := held_out_count(validation, len(rows))):
        order = torch.randperm(len(rows), device=rows.x.device)
        rows, held_out = rows[order[n:]], rows[order[:n]]
    return InMemory(rows, batch_size, gaps), held_out


def _prepare_stream(
    network: MixtureDensityNetwork, data: DataLoader | Dataset, validation: Any, batch_size: int | None
) -> tuple[Streamed, Rows | Streamed | None]:
    held_out = _given(network, validation)
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError("batch_size: expected None beside a loader, which has its own")
        if held_out is None and validation:
            expected = "expected a pair (x, y), a triple (x, y, weight), a loader or 0"
            raise ValueError(f"validation: {expected} beside a loader, which cannot be split")
        return Streamed(network, data), held_out
    if isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        raise ValueError(f"x: expected a loader over {type(data).__name__}, which cannot be shuffled or split")
    if not hasattr(data, "__len__"):
        raise ValueError(f"x: expected a data set of known length, got {type(data).__name__}")
    size = len(data)  # pyright: ignore[reportArgumentType]  (it has one, as was just seen)
    if held_out is None and (n := held_out_count(validation, size)):
        data, rest = random_split(data, [size - n, n])
        held_out = Streamed(network, DataLoader(rest, default_batch_size(n)))
        size -= n
    return Streamed(network, DataLoader(data, batch_size or default_batch_size(size), shuffle=True)), held_out


def _given(network: MixtureDensityNetwork, validation: Any) -> Rows | Streamed | None:
    """Validation data of the caller's own, if any."""
    if isinstance(validation, DataLoader):
        held_out = Streamed(network, validation)
        held_out.head(1)
        return held_out
    if isinstance(validation, list | tuple) and len(validation) in (2, 3):
        return as_rows(network, *validation, name="validation ").informative()
    return None


def held_out_count(validation: Any, size: int) -> int:
    """Rows to hold out of so many; a ``ValueError`` if the fraction is not one or leaves nothing."""
    if isinstance(validation, bool) or not isinstance(validation, Real) or not 0 <= float(validation) < 1:
        expected = "a fraction in [0, 1), a pair (x, y), a triple (x, y, weight) or a loader"
        raise ValueError(f"validation: expected {expected}, got {shown(validation)}")
    held_out = max(1, round(float(validation) * size)) if validation else 0
    if held_out and held_out >= size:
        raise ValueError(f"validation: expected to leave rows for training, got {size} rows in all")
    return held_out
