"""Mixtures as arrays of mixtures: rows of the batch, and batches put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
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
"""Log-weights ``(*batch, K)`` and components, whose batch may be broadcast."""


def rows_of(mixture: M, rows: Any) -> M:
    """Mixtures of some rows of the batch, as a tensor of shape ``batch_shape`` would be indexed.

    Integers, slices, masks, arrays of integers, tuples of these, ``...`` and ``None``. Components are not indexed:
    ``mixture[..., 0]`` is the first along the last batch dimension.

    Raises:
        IndexError: If there is no such row, or if there are more indices than batch dimensions.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> mixture = GaussianMixture(torch.zeros(5, 1), torch.zeros(5, 1, 2), IsotropicCovariance(torch.ones(1)))
    >>> mixture[0].batch_shape, mixture[1:3].batch_shape, len(mixture)
    (torch.Size([]), torch.Size([2]), 5)
    """
    return mixture.derived(*indexed((mixture.logits, mixture.components), rows))


def length(mixture: Mixture) -> int:
    """Size of the first batch dimension; a ``TypeError`` if there is none."""
    if not mixture.batch_shape:
        raise TypeError("len: expected a mixture with a batch dimension, got one of batch_shape ()")
    return mixture.batch_shape[0]


def iterate(mixture: M) -> Iterator[M]:
    """Iterate over the first batch dimension; a ``TypeError`` if there is none."""
    return (mixture[i] for i in range(len(mixture)))


def cat(mixtures: Iterable[M], dim: int = 0) -> M:
    """Put mixtures one after another along batch dimension ``dim``, as ``torch.cat`` does tensors.

    Raises:
        ValueError: If there are none, or if they do not agree in all but that dimension of their batches, in
            their numbers of components and outputs and in the family and structure of their components.
    """
    listed = _listed(mixtures)
    return listed[0].derived(*joined([(m.logits, m.components) for m in listed], dim))


def stack(mixtures: Iterable[M], dim: int = 0) -> M:
    """Put mixtures side by side along a new batch dimension ``dim``, as ``torch.stack`` does tensors.

    Raises:
        ValueError: If there are none or they do not agree, as for :meth:`cat`.
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
    """Expand to ``batch_shape``; a view."""
    shape = torch.Size(batch_shape)
    locs = mixture.components.locs.expand(*shape, -1, -1)
    return mixture.derived(mixture.logits.expand(*shape, -1), replace(mixture.components, locs=locs))


def flatten(mixture: M, batch_shape: torch.Size) -> M:
    """Expand to ``batch_shape``, and flatten that to one dimension."""
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
    """Parameters of the mixtures that ``rows`` picks, as it would pick entries of a tensor of their batch shape.

    Integers and slices give views. What is the same for all rows, like a homoscedastic covariance, stays one.

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
    """Function of tensors ``(*batch, *event)`` and the number of their event dimensions, which picks rows."""
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
    """Whether an index makes a view."""
    integer = isinstance(row, Integral) and not isinstance(row, bool)
    return row is None or integer or isinstance(row, slice | EllipsisType)


def _with_all_dimensions(rows: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Indices of all batch dimensions, so that none is left for those of the parameters."""
    given = sum(r is not None and r is not ... for r in rows)
    if given > n:
        raise IndexError(f"rows: expected at most {n} indices, one for each batch dimension, got {given}")
    rest = (slice(None),) * (n - given)
    at = rows.index(...) if ... in rows else len(rows)
    return *rows[:at], *rest, *rows[at + 1 :]


def joined(several: Sequence[Parameters], dim: int) -> Parameters:
    """Parameters of mixtures one after another along batch dimension ``dim``.

    Raises:
        ValueError: If they do not agree in all but that dimension, or in the family and structure of their components.
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
    """Put components together; of tensors that are broadcast over a batch, only the dimension to join is expanded."""
    event_dims = [event_dim for _, event_dim in several[0].stored()]
    columns = zip(*(components.tensors() for components in several), strict=True)
    return several[0].with_tensors([_joined(c, n, shapes, dim) for c, n in zip(columns, event_dims, strict=True)])


def _joined(tensors: Sequence[Tensor], event_dim: int, shapes: Sequence[torch.Size], dim: int) -> Tensor:
    n = len(shapes[0])
    own = [(*(1,) * (n + 1 + event_dim - t.ndim), *t.shape) for t in tensors]
    before = torch.broadcast_shapes(*(o[:dim] for o in own))
    after = torch.broadcast_shapes(*(o[dim + 1 :] for o in own))
    return torch.cat([t.expand(*before, s[dim], *after) for t, s in zip(tensors, shapes, strict=True)], dim)


def _structure(components: Components) -> str:
    sizes = [tuple(tensor.shape[tensor.ndim - event_dim :]) for tensor, event_dim in components.stored()]
    return f"{components.describe()} of {sizes}"


def _require_alike(what: str, values: Sequence[Any]) -> None:
    if others := [value for value in values if value != values[0]]:
        raise ValueError(f"cat: expected equal {what}, got {values[0]} and {others[0]}")
