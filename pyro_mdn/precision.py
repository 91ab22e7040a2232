"""The precision in which a mixture computes: the widest of its own, of its arguments, and single precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from pyro.distributions.torch import MixtureSameFamily  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from pyro_mdn.covariance import Covariance

__all__ = ["in_widest_precision"]

Mixture = TypeVar("Mixture")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_widest_precision(
    function: Callable[Concatenate[Mixture, Arguments], Result],
) -> Callable[Concatenate[Mixture, Arguments], Result]:
    """Have a function of a mixture compute in the widest precision, and give results in that of the mixture.

    LAPACK knows no half precision, torch does not promote what it multiplies, and arguments in double precision keep
    their digits until the result is rounded.
    """

    @wraps(function)
    def computed(mixture: Mixture, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        own: torch.dtype = mixture.dtype  # pyright: ignore[reportAttributeAccessIssue]
        wide = _widest(own, (*args, *kwargs.values()))
        if wide == own:
            return function(mixture, *args, **kwargs)
        widened: Any = [_converted(argument, wide) for argument in args]
        named: Any = {name: _converted(argument, wide) for name, argument in kwargs.items()}
        result: Any = function
        result = result(_converted(mixture, wide), *widened, **named)
        return _converted(result, own)

    return computed


def _widest(own: torch.dtype, arguments: Iterable[Any]) -> torch.dtype:
    wide = own if own.itemsize >= 4 else torch.float32
    for argument in arguments:
        if isinstance(argument, Tensor):
            dtype = argument.dtype if argument.is_floating_point() else wide
        elif isinstance(argument, MixtureSameFamily):
            dtype: Any = getattr(argument, "dtype", wide)
        else:
            dtype = torch.float64 if _has_doubles(argument) else wide
        wide = wide if dtype == wide else torch.promote_types(wide, dtype)
    return wide


def _has_doubles(argument: Any) -> bool:
    """Whether what is no tensor is data in double precision, as it becomes a tensor; indices are not."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.kind in "fO" and argument.dtype.itemsize >= 8
    if isinstance(argument, list | tuple):
        return len(argument) > 0 and _is_data(argument[0])
    return hasattr(argument, "__array__")


def _is_data(first: Any) -> bool:
    """Whether a list that begins like this holds data: rows, or numbers that are no indices."""
    return isinstance(first, float | list | tuple) or (hasattr(first, "__array__") and first.ndim > 0)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Give tensors of floating point, and what has some, another precision; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Covariance):
        return value.map(lambda t, n: t.to(dtype))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_converted(part, dtype) for part in value))
    if type(value) is tuple:
        return tuple(_converted(part, dtype) for part in value)
    mixture: Any = value
    return mixture.to(dtype) if isinstance(value, MixtureSameFamily) and hasattr(value, "dtype") else value
