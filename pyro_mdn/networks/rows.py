r"""Rows of data: inputs, targets and weights, as tensors on the device of a network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_mdn.distributions.observations.targets import (
    Targets,
    TargetsOrTensor,
    as_targets,
    joined,
    missing,
    without_intervals,
)
from pyro_mdn.networks import inputs
from pyro_mdn.support.arrays import as_tensor, require_no_infinity
from pyro_mdn.support.checks import is_known, require_range
from pyro_mdn.support.process_state import evaluating

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.tensors.numerics import single_at_least

__all__ = [
    "Rows",
    "as_device_inputs",
    "as_device_targets",
    "as_device_tensor",
    "as_rows",
    "checked",
    "converted_targets",
    "require_usable",
]


@dataclass(frozen=True)
class Rows:
    """Inputs, targets and, unless all rows count alike, weights of some rows.

    An entry is a vector of targets: that of a row or, in a sequence, that of a step. NaN marks missing targets.

    Attributes:
        weight: Weights of the rows ``(N,)``, or weights of the shape of y, which are 0 for missing targets.
        leading: Number of dimensions of x and y before those of one row.
    """

    x: Tensor
    y: TargetsOrTensor
    weight: Tensor | None = None
    leading: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.x[index], self.y[index], None if self.weight is None else self.weight[index])

    def informative(self) -> Rows:
        """Select the rows that count, with weights whose mean is 1; raise a ``ValueError`` if there are none."""
        rows = self.counted()
        if not len(rows):
            raise ValueError("x, y: expected rows of positive weight with a target, got none")
        if rows.weight is None:
            return rows
        return Rows(rows.x, rows.y, rows.weight / rows.weight[rows.weight > 0].mean())

    def counted(self) -> Rows:
        """Select rows with a positive weight and an observed target; missing targets of these rows weigh 0."""
        if self.weight is None and not bool(missing(self.y).any()):
            return self
        rows = self.masked()
        weight: Any = rows.weight
        rows = rows[_aligned(weight, weight.shape[:1]) > 0]
        complete = self.weight is None and not bool(missing(rows.y).any())
        return Rows(rows.x, rows.y) if complete else rows

    def masked(self) -> Rows:
        """Give the weights the shape of y, 0 for missing targets, as losses of outputs, entries or rows need them."""
        observed = (~missing(self.y)).to(single_at_least(self.x.dtype))
        return Rows(
            self.x, self.y, observed if self.weight is None else observed * _aligned(self.weight, observed.shape)
        )

    def num_counted(self) -> Tensor:
        """Count the rows of positive weight."""
        return (self.weights(self.x.new_ones(self.x.shape[: self.leading])) > 0).sum()

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Join rows of several parts. Rows without weights weigh 1 beside others; shorter sequences are padded."""
        if all(part.y.ndim > 2 for part in parts):
            steps = max(part.y.shape[1] for part in parts)
            parts = [part._padded(steps) for part in parts]
        x, y = torch.cat([part.x for part in parts]), joined([part.y for part in parts])
        if all(part.weight is None for part in parts):
            return Rows(x, y)
        weights: Any = [part.masked().weight for part in parts]
        return Rows(x, y, torch.cat(weights))

    def _padded(self, steps: int) -> Rows:
        """Pad sequences to a number of steps by steps of x = 0 without a target."""
        if (more := steps - self.y.shape[1]) == 0:
            return self
        rows: Any = self.masked()
        if isinstance(rows.y, Targets):
            y = Targets(_longer(rows.y.lower, more, -math.inf), _longer(rows.y.upper, more, math.inf))
        else:
            y = _longer(rows.y, more, math.nan)
        return Rows(_longer(rows.x, more, 0.0), y, _longer(rows.weight, more, 0.0))

    def chunks(self, size: int) -> Iterator[Rows]:
        """Iterate over successive rows, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def weights(self, losses: Tensor) -> Tensor:
        """Return the weights of losses of rows, entries or outputs, whose shape is that of y up to some dimension."""
        if self.weight is None:
            return torch.ones_like(losses)
        return _aligned(self.weight, losses.shape).to(losses).expand_as(losses)

    def totals(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Sum losses ``(N, ...)`` times their weights, and the weights; separately for each member of an ensemble."""
        first = self.leading - 1
        if self.weight is None:
            total = losses.flatten(first).sum(-1)
            return total, torch.full_like(total, losses.numel() / total.numel())
        weights = self.weights(losses)
        counted = torch.where(weights > 0, losses, 0)  # the loss of a missing target may be NaN
        return (counted * weights).flatten(first).sum(-1), weights.flatten(first).sum(-1)

    def row_weight(self, losses: Tensor) -> Tensor:
        """Average over the rows the sum of the weights in a row, for losses of this shape."""
        shape = *self.x.shape[: self.leading], *losses.shape[self.leading :]
        return self.totals(losses.new_zeros(()).expand(shape))[1] / len(self)

    def targets(self) -> int:
        """Count rows, or steps of sequences, with an observed target."""
        return int(_observed(self.y).sum())

    def targets_per_row(self) -> float:
        """Average the number of rows, or steps of sequences, with an observed target over the rows."""
        return self.targets() / math.prod(self.y.shape[: self.leading])

    def digest(self) -> str:
        """Compute a checksum of the contents."""
        digest = hashlib.sha256()
        targets = [self.y.lower, self.y.upper] if isinstance(self.y, Targets) else [self.y]
        for tensor in (self.x, *targets, self.weight):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _observed(y: TargetsOrTensor) -> Tensor:
    """Mark the entries of targets ``(..., D)`` with at least one observed output."""
    unknown = missing(y)
    return ~unknown.all(-1) if y.ndim > 1 else ~unknown


def _aligned(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Reduce weights to the shape of losses: a loss of several entries has the largest of their weights."""
    while weight.shape != shape[: weight.ndim]:
        weight = weight.amax(-1)
    return weight.reshape(*weight.shape, *(1,) * (len(shape) - weight.ndim))


def _longer(sequences: Tensor, more: int, padding: float) -> Tensor:
    """Append steps to sequences ``(N, T, ...)``."""
    return torch.cat([sequences, sequences.new_full((len(sequences), more, *sequences.shape[2:]), padding)], 1)


def checked(network: MixtureDensityNetwork, x: Any, y: Any, given: tuple[Any, Any]) -> tuple[Tensor, TargetsOrTensor]:
    """Check data as :meth:`MixtureDensityNetwork.check` does."""
    x = network.inputs(x)
    network.require_batch(x)
    if x.numel() == 0:
        raise ValueError(f"x: expected data, got shape {tuple(x.shape)}")
    with network.calling(), evaluating(network):
        features = network.features(x[:1])
    y = network.targets(y, x.shape[: x.ndim - len(network.input_shape)][: features.ndim - 1])
    dtype = network.x_shift.dtype
    inputs.require_usable(network, x, given[0], dtype)
    require_usable(y, given[1], dtype)
    network.head.units.require_inside(y, "y", given[1])
    columns = (y.points() if isinstance(y, Targets) else y).reshape(-1, network.dim_out)
    if bool((unobserved := columns.isnan().all(0)).any()):
        positions = unobserved.nonzero().flatten().tolist()
        raise ValueError(f"y: expected an observed target in each column, got none in {positions}")
    require_range(columns, "y", dtype)
    return x, y


def converted_targets(
    network: MixtureDensityNetwork, y: Any, batch_shape: torch.Size, *, replicated: bool
) -> TargetsOrTensor:
    """Convert targets as :meth:`MixtureDensityNetwork.targets` does."""
    unit = network.x_shift  # once: an attribute of a Pyro module takes microseconds to look up
    given, y = y, as_targets(y, "y", unit.device)
    inputs.require_device(y, "y", unit.device)
    y = y.unsqueeze(-1) if network.dim_out == 1 and y.shape == batch_shape else y
    expected = (*batch_shape, network.dim_out)
    if y.shape[max(0, y.ndim - len(expected)) if replicated else 0 :] != expected:
        raise ValueError(f"y: expected shape {expected} as x has it, got {tuple(y.shape)}")
    if is_validation_enabled():
        require_usable(y, given, unit.dtype)
    return y


def as_rows(network: MixtureDensityNetwork, x: Any, y: Any, weight: Any = None, name: str = "") -> Rows:
    """Check whole arrays, and convert them to rows on the device of the network.

    Raises:
        ValueError: If they are not usable.
    """
    device, given = network.x_shift.device, (x, y)
    x, y = as_device_inputs(network, x, f"{name}x"), as_device_targets(y, f"{name}y", device)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"{name}x, {name}y: expected equally many rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    weight = _as_weight(weight, len(x), x, device, f"{name}weight" if name else "sample_weight")
    return Rows(*network.check(x, y, given=given), weight)


def as_device_tensor(value: Any, name: str, device: torch.device) -> Tensor:
    """Convert numbers of any container to a tensor on the device, without a graph."""
    return as_tensor(value, name, device).detach().to(device)


def as_device_inputs(network: MixtureDensityNetwork, x: Any, name: str = "x") -> Tensor:
    """Convert inputs of any container to a tensor on the device of a network, without a graph."""
    device = network.x_shift.device
    return network.as_numbers(x, name, device).detach().to(device)


def as_device_targets(value: Any, name: str, device: torch.device) -> TargetsOrTensor:
    """Convert targets of any container, or :class:`Targets`, on the device, without a graph."""
    return without_intervals(as_targets(value, name, device).detach().to(device))


def require_usable(y: TargetsOrTensor, given: Any, dtype: torch.dtype) -> None:
    """Raise a ``ValueError`` if a target, or a limit of its interval, is infinite in a precision without being so.

    Args:
        y: Targets.
        given: The data before conversion, which may have names of rows and columns.
        dtype: Precision of the network.
    """
    if isinstance(y, Tensor):
        if is_known(y):
            require_no_infinity(y, "y", given, dtype)
        return
    for limit in (y.lower, y.upper):
        if is_known(limit):
            require_no_infinity(limit.masked_fill(limit.isinf(), math.nan), "y", None, dtype)


def _as_weight(weight: Any, rows: int, like: Tensor, device: torch.device, name: str) -> Tensor | None:
    if weight is None:
        return None
    weight = as_device_tensor(weight, name, device).to(torch.float64)
    if weight.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(weight.shape)}")
    if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool(weight.max() > 0):
        raise ValueError(f"{name}: expected finite numbers that are not negative, one positive at least")
    return (weight / weight.max()).to(single_at_least(like.dtype))
