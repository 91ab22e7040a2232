r"""Preparation of data: arrays, data sets and loaders become batches to train on, and rows held out."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows, as_rows
from pyro_mdn.support.arrays import names_of_columns, require_columns
from pyro_mdn.support.checks import shown
from pyro_mdn.training.batches.copies import copies_of, random_order
from pyro_mdn.training.batches.in_memory import InMemory, default_batch_size
from pyro_mdn.training.batches.members import MemberBatches, MemberRows, SharedBatches, shared
from pyro_mdn.training.batches.missing_targets import gaps_given
from pyro_mdn.training.batches.streams import Streamed
from pyro_mdn.training.schedules import VALIDATION, default_smoothing

__all__ = ["Batches", "held_out_count", "prepare", "prepare_members"]

Batches = InMemory | Streamed


def prepare(
    network: MixtureDensityNetwork, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None
) -> tuple[Batches, Rows | Streamed | None]:
    """Prepare batches to train a network on, and rows or batches that are held out, by default for the number of rows.

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
    if isinstance(validation, list | tuple) and validation:
        require_columns(names_of_columns(x), validation[0], "validation x")
    rows = as_rows(network, x, y, weight)
    gaps = gaps_given(rows, y)
    rows = rows.informative()
    held_out = _given(network, validation)
    if validation is None:
        validation = default_smoothing(rows.targets()).validation
    if held_out is None and (n := held_out_count(validation, len(rows))):
        order = random_order(copies_of(rows), len(rows), rows.x.device)
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
    if validation is None:
        validation = VALIDATION  # no more, because there is no second training on all rows
    if held_out is None and (n := held_out_count(validation, size)):
        data, rest = random_split(data, [size - n, n])
        held_out = Streamed(network, DataLoader(rest, default_batch_size(n)))
        size -= n
    return Streamed(network, DataLoader(data, batch_size or default_batch_size(size), shuffle=True)), held_out


def _given(network: MixtureDensityNetwork, validation: Any) -> Rows | Streamed | None:
    """Prepare validation data that the caller has given, if any."""
    if isinstance(validation, DataLoader):
        held_out = Streamed(network, validation)
        held_out.head(1)
        return held_out
    if isinstance(validation, list | tuple) and len(validation) in (2, 3):
        return as_rows(network, *validation, name="validation ").informative()
    return None


def held_out_count(validation: Any, size: int) -> int:
    """Compute how many rows to hold out; a ``ValueError`` if this is no fraction or leaves no rows for training."""
    if isinstance(validation, bool) or not isinstance(validation, Real) or not 0 <= float(validation) < 1:
        expected = "a fraction in [0, 1), a pair (x, y), a triple (x, y, weight) or a loader"
        raise ValueError(f"validation: expected {expected}, got {shown(validation)}")
    held_out = max(1, round(float(validation) * size)) if validation else 0
    if held_out and held_out >= size:
        raise ValueError(f"validation: expected to leave rows for training, got {size} rows in all")
    return held_out


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
    """Prepare batches to train the members of an ensemble on, and held-out rows; arrays are split anew for each member.

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
    copies = copies_of(rows) if n else None
    positions = torch.stack([random_order(copies, len(rows), rows.x.device) for _ in range(size)])
    if n:
        everything = MemberBatches(rows, positions[:, :n])
        positions, for_each = positions[:, n:], everything.head(n)
    if bootstrap:
        drawn = torch.randint(positions.shape[1], positions.shape, device=positions.device)
        positions = positions.gather(1, drawn)
    return MemberBatches(rows, positions, batch_size, batches.gaps), for_each


def _shared(data: Rows | Streamed, size: int) -> MemberRows | SharedBatches:
    return SharedBatches(data, size) if isinstance(data, Streamed) else shared(data, size)
