"""Mixtures as arrays of mixtures: indexing and expanding their batches, and joining several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from numbers import Integral
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.families.components import Components
from pyro_mdn.tensors.channels import channels_first, channels_last

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

M = TypeVar("M", bound="Mixture")

__all__ = ["Parameters", "cat", "expand", "flatten", "indexed", "iterate", "joined", "length", "rows_of", "stack"]

Parameters = tuple[Tensor, Components]
"""Log-weights ``(*batch, K)``, and components whose tensors broadcast over the batch."""


def rows_of(mixture: M, rows: Any) -> M:
    """Return the mixtures of some rows of the batch, indexed like a tensor of shape ``batch_shape``.

    An index is an integer, slice, mask, array of integers, ``...``, ``None`` or a tuple of these. Components are not
    indexed: ``mixture[..., 0]`` is the first mixture along the last batch dimension.

    Raises:
        IndexError: If there is no such row, or if there are more indices than batch dimensions.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> mixture = GaussianMixture(torch.zeros(5, 1), torch.zeros(5, 1, 2), IsotropicCovariance(torch.ones(1)))
    >>> mixture[0].batch_shape, mixture[1:3].batch_shape, len(mixture)
    (torch.Size([]), torch.Size([2]), 5)
    """
    return mixture.derived(*indexed((mixture.logits, mixture.components), rows))


def length(mixture: Mixture) -> int:
    """Return the size of the first batch dimension; raise a ``TypeError`` if there is none."""
    if not mixture.batch_shape:
        raise TypeError("len: expected a mixture with a batch dimension, got one of batch_shape ()")
    return mixture.batch_shape[0]


def iterate(mixture: M) -> Iterator[M]:
    """Iterate over the first batch dimension; raise a ``TypeError`` if there is none."""
    return (mixture[i] for i in range(len(mixture)))


def cat(mixtures: Iterable[M], dim: int = 0) -> M:
    """Concatenate mixtures along batch dimension ``dim``, as ``torch.cat`` does with tensors.

    Raises:
        ValueError: If there are no mixtures, or if they differ in another batch dimension, in their numbers of
            components or outputs, in device, or in the family or structure of their components.
    """
    listed = _listed(mixtures)
    return listed[0].derived(*joined([(m.logits, m.components) for m in listed], dim))


def stack(mixtures: Iterable[M], dim: int = 0) -> M:
    """Stack mixtures along a new batch dimension ``dim``, as ``torch.stack`` does with tensors.

    Raises:
        ValueError: If there are no mixtures, if their batch shapes differ, or if they differ otherwise, as for
            :meth:`cat`.
    """
    listed = _listed(mixtures)
    n = len(listed[0].batch_shape) + 1
    if not -n <= dim < n:
        raise ValueError(f"dim: expected a place among {n - 1} batch dimensions, got {dim}")
    dim %= n
    if any(m.batch_shape != listed[0].batch_shape for m in listed):
        shapes = ", ".join(str(tuple(m.batch_shape)) for m in listed)
        raise ValueError(f"stack: expected mixtures of equal batch shape, got {shapes}")
    return type(listed[0]).cat([m[(*(slice(None),) * dim, None)] for m in listed], dim)


def expand(mixture: M, batch_shape: Sequence[int], _instance: object = None) -> M:
    """Expand the batch to ``batch_shape`` without copying."""
    shape = torch.Size(batch_shape)
    return mixture.derived(mixture.logits.expand(*shape, -1), mixture.components.over_batch(shape))


def flatten(mixture: M, batch_shape: torch.Size) -> M:
    """Expand the batch to ``batch_shape``, and flatten it to one dimension."""
    size = batch_shape.numel()

    def flat(tensor: Tensor, event_dim: int) -> Tensor:
        event = tensor.shape[tensor.ndim - event_dim :]
        return tensor.expand(*batch_shape, *event).reshape(size, *event)

    return mixture.derived(flat(mixture.logits, 1), mixture.components.map(lambda t, n: flat(t, n + 1)))


def _listed(mixtures: Iterable[M]) -> list[M]:
    listed: list[Any] = [*mixtures]
    if not listed or not all(isinstance(getattr(m, "components", None), Components) for m in listed):
        got = ", ".join(type(m).__name__ for m in listed) or "none"
        raise ValueError(f"mixtures: expected one mixture at least, got {got}")
    return listed


def indexed(parameters: Parameters, rows: Any) -> Parameters:
    """Return the parameters of the mixtures that ``rows`` picks, like entries of a tensor of their batch shape.

    Integers and slices give views. Tensors that all rows share, such as a homoscedastic covariance, are not repeated.

    Raises:
        IndexError: If there is no such row, or if there are more indices than batch dimensions.
    """
    logits, components = parameters
    batch_shape = logits.shape[:-1]
    pick = _picker(batch_shape, logits.device, rows)

    def of_rows(tensor: Tensor, event_dim: int) -> Tensor:
        own = tensor.shape[: tensor.ndim - event_dim]
        if prod(own) == 1:
            return tensor.reshape(tensor.shape[tensor.ndim - event_dim :])
        return pick(tensor if own == batch_shape else tensor.expand(*batch_shape, *tensor.shape[len(own) :]), event_dim)

    return pick(logits, 1), components.map(lambda t, n: of_rows(t, n + 1))


def _picker(batch_shape: torch.Size, device: torch.device, rows: Any) -> Callable[[Tensor, int], Tensor]:
    """Build a function ``(tensor, event_dim)`` that picks rows of a tensor ``(*batch, *event)``."""
    listed = rows if isinstance(rows, tuple) else (rows,)
    if all(_is_basic(r) for r in listed) and listed.count(...) <= 1:
        whole = _with_all_dimensions(listed, len(batch_shape))
        return lambda tensor, event_dim: tensor[whole]
    count = prod(batch_shape)
    positions = torch.arange(count, device=device).reshape(batch_shape)[listed]

    def pick(tensor: Tensor, event_dim: int) -> Tensor:
        flat = tensor.reshape(count, *tensor.shape[tensor.ndim - event_dim :])
        return channels_last(channels_first(flat, event_dim)[..., positions], event_dim)

    return pick


def _is_basic(row: Any) -> bool:
    """Check whether an index makes a view."""
    integer = isinstance(row, Integral) and not isinstance(row, bool)
    return row is None or integer or isinstance(row, slice | EllipsisType)


def _with_all_dimensions(rows: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Extend indices to all batch dimensions, so that none of them applies to the dimensions of the parameters."""
    given = sum(r is not None and r is not ... for r in rows)
    if given > n:
        raise IndexError(f"rows: expected at most {n} indices, one for each batch dimension, got {given}")
    rest = (slice(None),) * (n - given)
    at = rows.index(...) if ... in rows else len(rows)
    return *rows[:at], *rest, *rows[at + 1 :]


def joined(several: Sequence[Parameters], dim: int) -> Parameters:
    """Concatenate the parameters of mixtures along batch dimension ``dim``.

    Raises:
        ValueError: If the mixtures differ in another batch dimension, in their numbers of components or outputs, in
            device, or in the family or structure of their components.
    """
    shapes = [logits.shape[:-1] for logits, _ in several]
    n = len(shapes[0])
    if not n or not -n <= dim < n:
        raise ValueError(f"dim: expected one of {n} batch dimensions, got {dim}")
    dim %= n
    _require_alike("batch shapes, but for their dimension to join", [(*s[:dim], *s[dim + 1 :]) for s in shapes])
    _require_alike("numbers of components and outputs", [tuple(c.locs.shape[-2:]) for _, c in several])
    _require_alike("devices", [str(logits.device) for logits, _ in several])
    every = [components for _, components in several]
    _require_alike("structures of components", [_structure(components) for components in every])
    return torch.cat([logits for logits, _ in several], dim), _joined_components(every, shapes, dim)


def _joined_components(several: Sequence[Components], shapes: Sequence[torch.Size], dim: int) -> Components:
    """Concatenate components; of tensors that broadcast over the batch, only the dimension to join is expanded."""
    event_dims = [event_dim for _, event_dim in several[0].stored]
    columns = zip(*(components.tensors() for components in several), strict=True)
    return several[0].with_tensors([_joined(c, n, shapes, dim) for c, n in zip(columns, event_dims, strict=True)])


def _joined(tensors: Sequence[Tensor], event_dim: int, shapes: Sequence[torch.Size], dim: int) -> Tensor:
    n = len(shapes[0])
    own = [(*(1,) * (n + 1 + event_dim - t.ndim), *t.shape) for t in tensors]
    before = torch.broadcast_shapes(*(o[:dim] for o in own))
    after = torch.broadcast_shapes(*(o[dim + 1 :] for o in own))
    return torch.cat([t.expand(*before, s[dim], *after) for t, s in zip(tensors, shapes, strict=True)], dim)


def _structure(components: Components) -> str:
    sizes = [tuple(tensor.shape[tensor.ndim - event_dim :]) for tensor, event_dim in components.stored]
    return f"{components.describe()} of {sizes}"


def _require_alike(what: str, values: Sequence[Any]) -> None:
    if others := [value for value in values if value != values[0]]:
        raise ValueError(f"cat: expected equal {what}, got {values[0]} and {others[0]}")
