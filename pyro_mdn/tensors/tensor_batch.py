r"""Batches of objects whose parameters are tensors, such as covariances and the components of mixtures."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["TensorBatch", "broadcast_shapes", "folded", "nested", "stored", "take_component"]


def stored(event_dim: int, **settings: Any) -> Any:
    """Declare a tensor with ``event_dim`` dimensions after the component axis; settings go to the dataclass field."""
    return field(metadata={"event_dim": event_dim}, **settings)


def nested() -> Any:
    """Declare a field that holds another batch."""
    return field()


@dataclass(frozen=True, eq=False)
class TensorBatch(ABC):  # noqa: B024 (its subclasses have abstract methods)
    """Base of frozen dataclasses whose fields are tensors, other batches, tuples of batches, or plain settings.

    A tensor is declared by :func:`stored` and has the shape ``(*batch, K, *event)``. The batch shapes of different
    fields broadcast. A tensor with a component axis of 1 is shared by all components.
    """

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch, with the component axis as its last dimension."""
        return broadcast_shapes(*[t.shape[: t.ndim - event_dim] for t, event_dim in self.stored])

    @property
    def like(self) -> Tensor:
        """Stored tensor that new ones take their dtype and device from."""
        return self.stored[0][0]

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors, including those of nested batches."""
        return [tensor for tensor, _ in self.stored]

    def map(self, function: Callable[[Tensor, int], Tensor]) -> Self:
        """Apply ``function(tensor, event_dim)`` to each stored tensor; it may reshape only the batch dimensions."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            value, event_dim = getattr(self, f.name), f.metadata.get("event_dim")
            if event_dim is not None:
                value = function(value, event_dim)
            elif isinstance(value, TensorBatch):
                value = value.map(function)
            elif isinstance(value, tuple):
                value = tuple(part.map(function) for part in value)
            changes[f.name] = value
        return type(self)(**changes)

    def expand(self, batch_shape: Sequence[int]) -> Self:
        """Expand the batch, including the component axis, without copying."""
        return self.map(lambda t, n: t.expand(*batch_shape, *t.shape[t.ndim - n :]))

    def select(self, component: Tensor) -> Self:
        """Pick one component per entry of ``component`` (``(*sample, *batch)``); the component axis becomes 1."""
        return self.map(lambda t, n: t if t.shape[t.ndim - n - 1] == 1 else take_component(t, component, n))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """Replace the stored tensors by others, given in the order of :meth:`tensors`."""
        rest = iter(tensors)
        return self.map(lambda t, n: next(rest))

    @property
    def stored(self) -> list[tuple[Tensor, int]]:
        """Stored tensors, each with its number of dimensions after the component axis."""
        kept = self.__dict__.get("_stored")  # a density of few points asks several times, and takes ten times as long
        if kept is None:
            object.__setattr__(self, "_stored", kept := self._look_up())
        return kept

    def _look_up(self) -> list[tuple[Tensor, int]]:
        found: list[tuple[Tensor, int]] = []
        for f in self.__dataclass_fields__.values():  # ``fields`` takes as long as a density of few points
            value, event_dim = getattr(self, f.name), f.metadata.get("event_dim")
            if event_dim is not None:
                found.append((value, event_dim))
            elif isinstance(value, TensorBatch):
                found.extend(value.stored)
            elif isinstance(value, tuple):
                for part in value:
                    found.extend(part.stored)
        return found


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Broadcast shapes; equal ones skip torch's search, which takes as long as the density of a few points."""
    return shapes[0] if all(shape == shapes[0] for shape in shapes) else torch.broadcast_shapes(*shapes)


def take_component(tensor: Tensor, component: Tensor, event_dim: int) -> Tensor:
    """Gather ``(*batch, K, *event)`` at indices ``(*sample, *batch)`` into ``(*sample, *batch, 1, *event)``."""
    event = tensor.shape[tensor.ndim - event_dim :]
    index = component.reshape(*component.shape, *(1,) * (event_dim + 1)).expand(*component.shape, 1, *event)
    tensor = tensor.expand(*component.shape, *tensor.shape[tensor.ndim - event_dim - 1 :])
    return tensor.gather(component.ndim, index)


def folded(tensor: Tensor, dim: int, n: int) -> Tensor:
    """Fold batch dimension ``dim`` of n into the component axis, which comes next."""
    return tensor.movedim(dim, n - 1).flatten(n - 1, n)
