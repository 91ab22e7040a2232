"""Mixtures as arrays of mixtures: rows of the batch, and batches put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from numbers import Integral
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.tensors import kernels

__all__ = ["Parameters", "indexed", "joined"]

Parameters = tuple[Tensor, Tensor, Covariance]
"""Log-weights ``(*batch, K)``, locations ``(*batch, K, D)`` and covariances, whose batch may be broadcast."""


def indexed(parameters: Parameters, rows: Any) -> Parameters:
    """Parameters of the mixtures that ``rows`` picks, as it would pick entries of a tensor of their batch shape.

    Integers and slices give views. What is the same for all rows, like a homoscedastic covariance, stays one.

    Raises:
        IndexError: If there is no such row, or if there are more indices than batch dimensions.
    """
    batch_shape = parameters[0].shape[:-1]
    pick = _picker(batch_shape, parameters[0].device, rows)

    def of_rows(tensor: Tensor, event_dim: int) -> Tensor:
        own = tensor.shape[: tensor.ndim - event_dim]
        if prod(own) == 1:
            return tensor.reshape(tensor.shape[tensor.ndim - event_dim :])
        return pick(tensor if own == batch_shape else tensor.expand(*batch_shape, *tensor.shape[len(own) :]), event_dim)

    logits, locs, covariance = parameters
    picked = pick(logits, 1), pick(locs, 2)
    return *picked, covariance.map(lambda t, n: of_rows(t, n + 1))


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
        return kernels.channels_last(kernels.channels_first(flat, event_dim)[..., positions], event_dim)

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
        ValueError: If they do not agree in all but that dimension, or in the structure of their covariances.
    """
    shapes = [logits.shape[:-1] for logits, _, _ in several]
    n = len(shapes[0])
    if not n or not -n <= dim < n:
        raise ValueError(f"dim: expected one of {n} batch dimensions, got {dim}")
    dim %= n
    _require_alike("batch shapes, but for their dimension to join", [(*s[:dim], *s[dim + 1 :]) for s in shapes])
    _require_alike("numbers of components and outputs", [tuple(locs.shape[-2:]) for _, locs, _ in several])
    _require_alike("devices", [str(logits.device) for logits, _, _ in several])
    covariances = [covariance for _, _, covariance in several]
    _require_alike("structures of covariances", [_structure(covariance) for covariance in covariances])
    logits, locs = (torch.cat(parts, dim) for parts in zip(*((p[0], p[1]) for p in several), strict=True))
    return logits, locs, _joined_covariances(covariances, shapes, dim)


def _joined_covariances(covariances: Sequence[Covariance], shapes: Sequence[torch.Size], dim: int) -> Covariance:
    """Put covariances together that are broadcast over a batch; only the dimension to join is expanded."""
    n = len(shapes[0])
    own = [(*(1,) * (n + 1 - len(c.batch_shape)), *c.batch_shape) for c in covariances]
    before = torch.broadcast_shapes(*(o[:dim] for o in own))
    after = torch.broadcast_shapes(*(o[dim + 1 :] for o in own))
    expanded = [c.expand((*before, s[dim], *after)) for c, s in zip(covariances, shapes, strict=True)]
    joined = iter([torch.cat(parts, dim) for parts in zip(*(c.tensors() for c in expanded), strict=True)])
    return covariances[0].map(lambda t, n: next(joined))


def _structure(covariance: Covariance) -> str:
    sizes: list[tuple[int, ...]] = []
    covariance.map(lambda t, n: sizes.append(tuple(t.shape[t.ndim - n :])) or t)
    return f"{type(covariance).__name__} of {sizes}"


def _require_alike(what: str, values: Sequence[Any]) -> None:
    if others := [value for value in values if value != values[0]]:
        raise ValueError(f"cat: expected equal {what}, got {values[0]} and {others[0]}")
