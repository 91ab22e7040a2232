r"""Data for training: arrays, data sets and loaders become batches of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from pyro_mdn.checks import unmasked
from pyro_mdn.isolation import own_generators
from pyro_mdn.network import MixtureDensityNetwork, evaluating

__all__ = [
    "Batches",
    "InMemory",
    "Rows",
    "Streamed",
    "as_rows",
    "default_batch_size",
    "grid_spacing",
    "held_out_count",
    "prepare",
]


@dataclass(frozen=True)
class Rows:
    """Inputs, targets and, if they are weighted, weights of some rows.

    Attributes:
        leading: Dimensions of x and y before those of one row.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    leading: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.x[index], self.y[index], None if self.weight is None else self.weight[index])

    def informative(self) -> Rows:
        """Rows that count: those of a positive weight and with an observed target; weights of mean 1."""
        useful = ~self.y.isnan().flatten(1).all(1)
        if self.weight is not None:
            useful &= self.weight > 0
        if not bool(useful.any()):
            raise ValueError("x, y: expected rows of positive weight with a target, got none")
        rows = self if bool(useful.all()) else self[useful]
        return rows if rows.weight is None else Rows(rows.x, rows.y, rows.weight / rows.weight.mean())

    def joined(self, other: Rows) -> Rows:
        """These rows and those of another; without weights, theirs count 1."""
        weight = None
        if self.weight is not None or other.weight is not None:
            weight = torch.cat([r.x.new_ones(len(r)) if r.weight is None else r.weight for r in (self, other)])
        return Rows(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), weight)

    def chunks(self, size: int) -> Iterator[Rows]:
        """Successive rows, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def weigh(self, losses: Tensor) -> Tensor:
        """Multiply the losses of the rows ``(N, ...)`` by their weights."""
        return losses if self.weight is None else losses * self.weight.reshape(-1, *(1,) * (losses.ndim - 1))

    def digest(self) -> str:
        """Checksum of the contents."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y, self.weight):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class InMemory:
    """Batches of rows in memory, in a new random order each time; their sizes differ by one at most.

    Args:
        rows: The rows.
        batch_size: Rows in a batch at most; by default 1/64 of all, but 32 at least and 256 at most.
    """

    def __init__(self, rows: Rows, batch_size: int | None = None) -> None:
        self.rows = rows
        self.n_batches = math.ceil(len(rows) / (batch_size or default_batch_size(len(rows))))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def num_targets(self) -> int:
        """Number of target vectors: of rows, or of all steps of sequences."""
        return self.rows.y[..., 0].numel()

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

    @property
    def num_targets(self) -> int:
        """Number of target vectors, as far as it is known without reading them: of rows."""
        return self.num_rows

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Rows]:
        for batch in self.loader:
            rows = self._rows(batch)
            observed = ~rows.y.isnan()
            observed = observed.flatten(1).any(1) if observed.ndim > 1 else observed
            if bool(observed.all()):
                yield rows
            elif bool(observed.any()):  # as of arrays, rows without a target are left out
                yield rows[observed]

    def head(self, size: int) -> Rows:
        """Rows of the first batches, ``size`` of them or a few more."""
        batches, count = [], 0
        for batch in self:
            batches.append(batch)
            count += len(batch)
            if count >= size:
                break
        x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
        return Rows(x, self.network.check(x, y))

    def digest(self) -> str:
        """Size alone: a stream is not read for it."""
        return f"{self.num_rows} rows in {self.n_batches} batches"

    def _rows(self, batch: Any) -> Rows:
        if not isinstance(batch, Sequence) or len(batch) not in (2, 3) or not all(isinstance(b, Tensor) for b in batch):
            raise ValueError(f"x: expected batches (x, y) or (x, y, weight) of tensors, got {type(batch).__name__}")
        device = self.network.x_shift.device
        x, y, *weight = (
            _as_tensor(value, name, device) for value, name in zip(batch, ("x", "y", "weight"), strict=False)
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
                with own_generators(), torch.no_grad(), evaluating(network), network._context():
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


def as_rows(network: MixtureDensityNetwork, x: Any, y: Any, weight: Any = None, name: str = "") -> Rows:
    """Check arrays as a whole and make them tensors on the device of the network.

    Raises:
        ValueError: If they are not usable.
    """
    device = network.x_shift.device
    x, y = _as_tensor(x, f"{name}x", device), _as_tensor(y, f"{name}y", device)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"{name}x, {name}y: expected equally many rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    return Rows(x, network.check(x, y), _as_weight(weight, len(x), x, device))


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
    rows = as_rows(network, x, y, weight).informative()
    held_out = _given(network, validation)
    if held_out is None and (n := held_out_count(validation, len(rows))):
        order = torch.randperm(len(rows), device=rows.x.device)
        rows, held_out = rows[order[n:]], rows[order[:n]]
    return InMemory(rows, batch_size), held_out


def _prepare_stream(
    network: MixtureDensityNetwork, data: DataLoader | Dataset, validation: Any, batch_size: int | None
) -> tuple[Streamed, Rows | Streamed | None]:
    held_out = _given(network, validation)
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError("batch_size: expected None beside a loader, which has its own")
        if held_out is None and validation:
            raise ValueError("validation: expected a pair (x, y), a loader or 0 beside a loader, which cannot be split")
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
    if isinstance(validation, Sequence) and len(validation) == 2:
        return as_rows(network, validation[0], validation[1], name="validation ").informative()
    return None


def held_out_count(validation: Any, size: int) -> int:
    """Rows to hold out of so many; a ``ValueError`` if the fraction is not one or leaves nothing."""
    if isinstance(validation, bool) or not isinstance(validation, Real) or not 0 <= float(validation) < 1:
        raise ValueError(f"validation: expected a fraction in [0, 1), a pair (x, y) or a loader, got {validation!r}")
    held_out = max(1, round(float(validation) * size)) if validation else 0
    if held_out and held_out >= size:
        raise ValueError(f"validation: expected to leave rows for training, got {size} rows in all")
    return held_out


def _as_tensor(value: Any, name: str, device: torch.device) -> Tensor:
    value = unmasked(value)
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name}: expected floating-point numbers, got dtype {array.dtype}")
        dtype = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        value = torch.tensor(np.ascontiguousarray(array, dtype), device="cpu")
    return value.detach().to(device)


def _as_weight(weight: Any, rows: int, like: Tensor, device: torch.device) -> Tensor | None:
    if weight is None:
        return None
    weight = unmasked(weight)
    if not isinstance(weight, Tensor):
        array = np.asarray(weight)
        if not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"sample_weight: expected numbers, got dtype {array.dtype}")
        weight = torch.tensor(np.ascontiguousarray(array), device="cpu")
    weight = weight.detach().to(device, torch.float64)
    if weight.shape != (rows,):
        raise ValueError(f"sample_weight: expected shape ({rows},), got {tuple(weight.shape)}")
    if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool(weight.max() > 0):
        raise ValueError("sample_weight: expected finite numbers that are not negative, one positive at least")
    return (weight / weight.max()).to(torch.promote_types(like.dtype, torch.float32))
