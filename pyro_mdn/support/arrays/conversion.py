r"""Convert what users have, such as NumPy arrays, data frames, lists and tensors, to arrays and tensors of numbers.

All functions share this conversion, so that each of them takes the containers that :func:`pyro_mdn.fit` takes.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from pyro_mdn.support.checks import describe, is_subclassed, unmasked

__all__ = [
    "Array",
    "as_array",
    "as_tensor",
    "columns_of",
    "in_columns",
    "is_frame",
    "names_of_columns",
    "require_columns",
    "to_numpy",
]

Array = NDArray[Any]
Numbers = TypeVar("Numbers", Tensor, Array)

_INSTEAD = {
    "M": "dates: give them as numbers, such as days since a date",
    "m": "time spans: give them as numbers, such as seconds",
    "U": "text: encode it as numbers, such as one column for each category",
    "S": "bytes: encode them as numbers",
    "c": "complex numbers: give their real and imaginary parts as two columns",
}


def as_tensor(values: Any, name: str, device: torch.device | None = None, *, integers: bool = False) -> Tensor:
    """Convert numbers of any container to a floating-point tensor.

    A floating-point tensor is returned as it is, on its own device and with its graph. Everything else is copied; a
    list of tensors keeps their graphs. Floating point keeps its precision (extended precision becomes float64).
    Booleans and integers of up to 16 bits become float32, wider integers float64, so that no integer below
    :math:`2^{53}` is rounded. Masked entries, ``None`` and ``pandas.NA`` become NaN.

    Args:
        values: A tensor, NumPy array, data frame or series (pandas or polars), Arrow table, or nested lists.
        name: Name of the argument, for error messages.
        device: Device for values that are not a tensor; by default the CPU.
        integers: Whether integers stay what they are.

    Raises:
        ValueError: If a value is not a number; the error names the column of a data frame.

    >>> as_tensor([[1, 2], [3, None]], "x")
    tensor([[1., 2.],
            [3., nan]], dtype=torch.float64)
    >>> as_tensor(["a"], "y")
    Traceback (most recent call last):
    ValueError: y: expected numbers, got text: encode it as numbers, such as one column for each category
    """
    if isinstance(values, Tensor):
        values = unmasked(values) if is_subclassed(values) else values
        return values if integers and _is_integer(values) else _floating(values, name)
    if isinstance(values, (float, int)):  # which compilers know how to trace, unlike a union of types
        return torch.tensor(values, dtype=torch.float64, device="cpu" if device is None else device)
    if isinstance(values, list | tuple) and _holds_tensors(values):
        return _stacked(values, name, device, integers)
    array = _any_array(values, name)
    if integers and array.dtype.kind in "iu":
        known = array.dtype.kind == "i" or array.dtype.itemsize == 1  # torch does little with other unsigned ones
        return _moved(torch.tensor(array if known else array.astype(np.int64), device="cpu"), device)
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else _float_for(array.dtype.kind, array.itemsize)
    dtype = np.dtype(np.float64) if dtype.itemsize > 8 else dtype
    on_cpu = torch.tensor(np.ascontiguousarray(array, dtype).reshape(array.shape), device="cpu")
    return _moved(on_cpu, device)


def _holds_tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, list | tuple) and _holds_tensors(v[:1])) for v in values)


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _stacked(rows: list[Any] | tuple[Any, ...], name: str, device: torch.device | None, integers: bool) -> Tensor:
    """Stack tensors, and values between them, into one tensor of the widest precision, with their graphs."""
    on = torch.device("cpu") if device is None else device
    rows = [math.nan if _is_missing(row) else row for row in rows]
    tensors = [_moved(as_tensor(row, name, integers=integers), on) for row in rows]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"{name}: expected numbers in rows of one length, got {describe(rows)}")
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return torch.stack([tensor.to(dtype) for tensor in tensors])


def _floating(values: Tensor, name: str) -> Tensor:
    if values.is_floating_point():
        return values
    if values.is_complex():
        raise ValueError(f"{name}: expected numbers, got {_INSTEAD['c']}")
    wide = values.dtype.itemsize > 2 and values.device.type != "mps"  # which has no float64
    return values.to(torch.float64 if wide else torch.float32)


def _float_for(kind: str, itemsize: int) -> np.dtype[Any]:
    return np.dtype(np.float32 if kind == "b" or itemsize <= 2 else np.float64)


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is None or tensor.device == device:
        return tensor
    return tensor.to(device, torch.float32 if device.type == "mps" and tensor.dtype == torch.float64 else None)


def as_array(values: Any, name: str) -> Array:
    """Convert numbers of any container, one row for each observation, to a NumPy array; missing entries are NaN.

    Floating point, integers and booleans keep their types.

    Raises:
        ValueError: If a value is not a number (the error names the column of a data frame), or if there is only a
            single number.

    >>> as_array(np.ma.masked_equal([1, -999], -999), "x")
    array([ 1., nan])
    """
    array = _any_array(values, name)
    if array.ndim == 0:
        raise ValueError(f"{name}: expected a row for each observation, got a single number")
    return array


def _any_array(values: Any, name: str) -> Array:
    if hasattr(values, "as_exact"):  # Targets
        return to_numpy(values.as_exact(name))
    if is_frame(values):
        return _of_frame(values, name)
    if not isinstance(values, Tensor) and hasattr(values, "to_numpy"):
        return _of_column(values, name)
    if any(isinstance(v, Distribution) for v in (values if isinstance(values, list | tuple) else [values])):
        raise ValueError(f"{name}: expected numbers, got {describe(values)}")  # NumPy would index a batch of mixtures
    try:
        array = to_numpy(values)
    except (ValueError, TypeError) as error:  # for instance rows of unequal length
        raise ValueError(f"{name}: expected numbers in rows of one length, got {describe(values)}") from error
    return _numbers(array, values, name)


def to_numpy(values: Any) -> Array:
    """Convert a tensor on any device, with or without gradients, or anything that NumPy takes; NaN where masked."""
    if isinstance(values, Tensor):
        values = unmasked(values).detach().resolve_conj().resolve_neg().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    if isinstance(values, list | tuple) and any(isinstance(row, Tensor) for row in values):
        values = [to_numpy(row) for row in values]
    return np.asarray(unmasked(values))


def in_columns(values: Numbers) -> Numbers:
    """Give rows of one number each, ``(N,)``, the axis of columns, ``(N, 1)``; other shapes come back as they are.

    >>> in_columns(torch.zeros(3)).shape, in_columns(np.zeros((3, 2))).shape
    (torch.Size([3, 1]), (3, 2))
    """
    return values[:, None] if values.ndim == 1 else values


def is_frame(values: Any) -> bool:
    """Check for a data frame of pandas or polars, or a table of Arrow: its columns may have several types."""
    return _is_arrow(values) or all(hasattr(values, name) for name in ("columns", "dtypes", "to_numpy"))


def _is_arrow(values: Any) -> bool:
    return hasattr(values, "column_names") and hasattr(values, "schema")


def columns_of(values: Any) -> list[Any] | None:
    """Return the names of the columns of a data frame or table; None for anything else."""
    if not is_frame(values):
        return None
    return list(values.column_names if _is_arrow(values) else values.columns)


def names_of_columns(values: Any) -> list[str] | None:
    """Return the names of the columns of a data frame or table; None for anything else, and if some are no text."""
    labels = columns_of(values)
    return labels if labels and all(isinstance(label, str) for label in labels) else None


def require_columns(expected: list[str] | None, values: Any, name: str) -> None:
    """Raise a ``ValueError`` if a data frame has other columns than expected, or the same ones in another order.

    Args:
        expected: Names of the columns; None if any will do.
        values: Data of any container; without names there is nothing to compare.
        name: Name of the argument, for the message.
    """
    if expected is None or isinstance(values, Tensor):  # most calls, which should cost nothing
        return
    got = names_of_columns(values)
    if got is None or got == expected:
        return
    if sorted(got) == sorted(expected):
        raise ValueError(f"{name}: expected columns in the order of training, {expected}, got {got}: reorder them")
    lost, new = [c for c in expected if c not in got], [c for c in got if c not in expected]
    raise ValueError(f"{name}: expected the columns of training, {expected}; missing {lost}, and unknown {new}")


def _of_frame(frame: Any, name: str) -> Array:
    """Convert a data frame column by column, because each column may have its own type."""
    labels = columns_of(frame) or []
    columns = [
        _of_column(part, f"{name}, column {label!r}") for part, label in zip(_series(frame), labels, strict=True)
    ]
    if not columns:
        return np.empty((len(frame), 0))
    return np.stack(columns, 1)


def _series(frame: Any) -> list[Any]:
    if hasattr(frame, "iloc"):
        return [frame.iloc[:, i] for i in range(frame.shape[1])]
    return frame.columns if _is_arrow(frame) else frame.get_columns()


def _of_column(column: Any, name: str) -> Array:
    dtype = getattr(column, "dtype", getattr(column, "type", None))  # pandas and polars have dtype, Arrow has type
    if str(dtype).lower().startswith(("categor", "enum", "dictionary")):  # refused even if the categories are numbers
        raise ValueError(f"{name}: expected numbers, got categories: encode them, by pandas.get_dummies for instance")
    array = np.asarray(column)
    if array.dtype.kind == "O" and str(getattr(dtype, "kind", "O")) in "fiub":  # pandas numbers with missing entries
        array = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return _numbers(array, column, name)


def _numbers(array: Array, values: Any, name: str) -> Array:
    """Return an array of numbers, NaN where one is missing; raise a ``ValueError`` for anything else."""
    if array.dtype.kind in "fiub":
        return array
    if array.dtype.kind == "O" and array.size and (array.ndim or isinstance(values, int)):
        return _of_objects(array, values, name)
    raise ValueError(f"{name}: expected numbers, got {_INSTEAD.get(array.dtype.kind, describe(values))}")


def _of_objects(array: Array, values: Any, name: str) -> Array:
    """Convert an array of Python objects: numbers, None and ``pandas.NA``."""
    flat = [None if _is_missing(value) else value for value in array.ravel()]
    for value in flat:
        kind = np.asarray(value).dtype.kind
        kind = "M" if hasattr(value, "isoformat") else kind  # dates, for which NumPy may only see objects
        if kind in _INSTEAD:
            raise ValueError(f"{name}: expected numbers, got {_INSTEAD[kind]}")
    try:
        return np.array([np.nan if value is None else float(value) for value in flat]).reshape(array.shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, got {describe(values)}") from error


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType")
