r"""Batches of rows that a loader reads, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows, as_device_inputs, as_device_targets, as_device_tensor
from pyro_mdn.support.checks import describe
from pyro_mdn.support.process_state import evaluating, give_way, own_generators
from pyro_mdn.training.batches.missing_targets import Gaps, gaps_given

__all__ = ["Streamed"]


class Streamed:
    """Batches ``(x, y)`` or ``(x, y, weight)`` of a loader, one after the other."""

    def __init__(self, network: MixtureDensityNetwork, loader: DataLoader) -> None:
        self.network, self.loader = network, loader
        self.counted = 0
        self.gaps = Gaps.none(network.dim_out)  # in the rows of the last pass
        self.flat: bool | None = None  # whether targets (N, ...) stand for (N, ..., 1); None until the first batch
        try:
            self.n_batches = len(loader)
        except TypeError as error:
            raise ValueError("x: expected a loader of known length, got one over a stream without") from error
        if self.n_batches == 0:
            raise ValueError("x: expected data, got a loader without batches")

    @property
    def num_rows(self) -> int:
        """Number of rows that the loader goes over in one pass."""
        if isinstance(self.loader.dataset, IterableDataset):
            stream: Any = self.loader.dataset
            return len(stream)
        if self.loader.batch_sampler is None:  # the data set gives whole batches, whose rows can only be counted
            self.counted = self.counted or sum(len(rows) for rows in self)
            return self.counted
        sampler: Any = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
        return len(sampler)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Rows]:
        self.gaps = Gaps.none(self.network.dim_out)
        for batch in self.loader:
            rows = self._rows(batch)
            if rows.y.shape[-1] == self.network.dim_out:  # targets of another shape are refused where they are used
                self.gaps = self.gaps.plus(gaps_given(rows, batch[1]))
            if len(rows := rows.counted()):
                yield rows
            give_way()

    def head(self, size: int) -> Rows:
        """Read the rows of the first batches, ``size`` rows or a few more."""
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
        """Describe the size alone, because a checksum would have to read the whole stream."""
        return f"{self.num_rows} rows in {self.n_batches} batches"

    def _rows(self, batch: Any) -> Rows:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) not in (2, 3):
            raise ValueError(f"x: expected batches (x, y) or (x, y, weight), got {describe(batch)}")
        device = self.network.x_shift.device
        x, y = as_device_inputs(self.network, batch[0]), as_device_targets(batch[1], "y", device)
        weight = [as_device_tensor(value, "weight", device) for value in batch[2:]]
        if len(y) != len(x) or any(w.shape != (len(x),) for w in weight):
            raise ValueError(f"x: expected batches of equally many rows, got {[tuple(b.shape) for b in batch]}")
        if weight and not bool((weight[0].isfinite() & (weight[0] >= 0)).all()):
            raise ValueError("weight: expected finite numbers that are not negative")
        return Rows(x, y.unsqueeze(-1) if self._is_flat(x, y) else y, *weight)

    def _is_flat(self, x: Tensor, y: TargetsOrTensor) -> bool:
        network = self.network
        if self.flat is None:
            self.flat = network.dim_out == 1 and y.ndim <= x.ndim - len(network.input_shape)
            if self.flat:
                with own_generators(), torch.no_grad(), evaluating(network), network.calling():
                    self.flat = y.ndim == network.features(x[:1]).ndim - 1
        return self.flat

    def generators(self) -> list[torch.Generator]:
        """List the random generators that the loader has of its own."""
        parts = [self.loader, self.loader.sampler, self.loader.batch_sampler]
        parts.append(getattr(self.loader.batch_sampler, "sampler", None))
        found = {id(generator): generator for part in parts if (generator := getattr(part, "generator", None))}
        return list(found.values())
