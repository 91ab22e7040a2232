"""Precision and device of a mixture, and the precision in which it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from pyro.distributions.torch import MixtureSameFamily  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.tensors.channels import normalize_logits
from pyro_mdn.tensors.tensor_batch import TensorBatch

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

M = TypeVar("M", bound="Mixture")

__all__ = ["copied", "cpu", "detach", "double", "in_widest_precision", "single", "to"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_DATA = {"value", "values", "y", "low", "high", "shift", "scale", "matrix", "weights"}


def in_widest_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function of a mixture compute in the widest precision, and return results in the precision of the mixture.

    The widest precision is that to which mixture and arguments promote, and at least single: LAPACK has no half
    precision, and torch does not promote the factors of matrix products. Arguments in double precision keep their
    digits until the result is rounded. Arguments whose names say that they are data are converted to tensors first, so
    that every container has the precision of its numbers.
    """
    names = list(signature(function).parameters)

    @wraps(function)
    def computed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        call: Any = function
        if args and not kwargs and _is_plain(args):
            return call(*args)
        given: dict[str, Any] = dict(zip(names[: len(args)], args, strict=False)) | kwargs
        mixture = given.get(names[0])
        if len(args) > len(names) or mixture is None:
            return function(*args, **kwargs)  # Python raises the error
        given = {name: _as_data(value, name, mixture) if name in _DATA else value for name, value in given.items()}
        own: torch.dtype = mixture.dtype
        wide = _widest(own, given.values())
        if wide == own:
            return call(**given)
        return _converted(call(**{name: _converted(value, wide) for name, value in given.items()}), own)

    return computed


def _is_plain(arguments: Sequence[Any]) -> bool:
    """Check for a mixture and tensors of its precision, at least single: the call of nearly every training step."""
    own: torch.dtype = arguments[0].dtype
    for argument in arguments[1:]:  # a generator would take longer than all of this
        if type(argument) is not Tensor or argument.dtype != own:
            return False
    return own.itemsize >= 4


def _as_data(value: Any, name: str, mixture: Any) -> Any:
    """Convert data to a tensor; single numbers, ``None`` and :class:`Targets` stay as they are."""
    plain = value is None or isinstance(value, (float, int, Targets))  # a union of types would not compile on torch 2.8
    if plain or (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return as_tensor(value, name, mixture.device)


def _widest(own: torch.dtype, arguments: Iterable[Any]) -> torch.dtype:
    wide = own if own.itemsize >= 4 else torch.float32
    for argument in arguments:
        dtype: Any = wide
        if isinstance(argument, Tensor):
            dtype = argument.dtype if argument.is_floating_point() else wide
        elif isinstance(argument, Targets):
            dtype = argument.dtype
        elif isinstance(argument, MixtureSameFamily):
            dtype = getattr(argument, "dtype", wide)
        wide = wide if dtype == wide else torch.promote_types(wide, dtype)
    return wide


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors, and objects that contain some, to another precision; leave the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Targets):
        return value.to(dtype)
    if isinstance(value, TensorBatch):
        return value.map(lambda t, n: t.to(dtype))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_converted(part, dtype) for part in value))
    if type(value) is tuple:
        return tuple(_converted(part, dtype) for part in value)
    mixture: Any = value
    return mixture.to(dtype) if isinstance(value, MixtureSameFamily) and hasattr(value, "dtype") else value


# Conversions


def to(mixture: M, *args: Any, **kwargs: Any) -> M:
    """Move the parameters to another device or floating-point dtype; arguments are those of ``torch.Tensor.to``.

    In a wider precision the weights are normalised again.

    Raises:
        ValueError: If the dtype is not of floating point.
    """
    dtype = mixture.components.like.new_empty(0).to(*args, **kwargs).dtype
    if not dtype.is_floating_point:
        raise ValueError(f"to: expected a floating-point dtype, got {dtype}")
    components = mixture.components.map(lambda t, n: t.to(*args, **kwargs))
    if dtype == mixture.dtype:
        return mixture.derived(mixture.logits.to(*args, **kwargs), components)
    wide = normalize_logits(mixture.logits.to(torch.promote_types(mixture.dtype, dtype)))
    return mixture.derived(wide.to(*args, **kwargs), components)


def cpu(mixture: M) -> M:
    """Move the parameters to the CPU."""
    return to(mixture, "cpu")


def double(mixture: M) -> M:
    """Convert the parameters to double precision."""
    return to(mixture, torch.float64)


def single(mixture: M) -> M:
    """Convert the parameters to single precision."""
    return to(mixture, torch.float32)


def detach(mixture: M) -> M:
    """Return the mixture without a graph: no gradients flow to its parameters."""
    return mixture.derived(mixture.logits.detach(), mixture.components.map(lambda t, n: t.detach()))


def copied(mixture: M, memo: dict[int, Any]) -> M:
    """Copy a mixture; parameters that were computed from others lose their graph, which torch cannot copy."""

    def copy_of(tensor: Tensor, event_dim: int = 0) -> Tensor:
        return copy.deepcopy(tensor if tensor.is_leaf else tensor.detach(), memo)

    new = mixture.derived(copy_of(mixture.logits), mixture.components.map(copy_of))
    memo[id(mixture)] = new
    return new
