r"""Errors that name the number which came, by the row and the column of the caller's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.support.arrays.conversion import columns_of
from pyro_mdn.support.checks import all_finite, bounds, indices, unwrapped

__all__ = ["among", "further_on", "refuse", "require_finite", "require_no_infinity"]


def require_finite(values: Tensor, name: str, given: Any = None, dtype: torch.dtype | None = None) -> None:
    """Raise a ``ValueError`` that says which number is NaN or infinite, and where it is.

    Args:
        values: Numbers, ``(N, ...)``.
        name: Name of the argument, for the error message.
        given: The data before conversion, which may have names of rows and columns.
        dtype: Precision in which the numbers have to be finite, if not their own.

    >>> require_finite(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "x")
    Traceback (most recent call last):
    ValueError: x: expected finite numbers, got nan in row 1, column 1
    """
    if not _all_finite_in(values, dtype):
        refuse(values, ~values.to(dtype).isfinite(), name, "finite numbers", given, dtype)


def require_no_infinity(values: Tensor, name: str, given: Any = None, dtype: torch.dtype | None = None) -> None:
    """Raise a ``ValueError`` that says which number is infinite, and where it is; NaN (missing) is allowed.

    The arguments are those of :func:`require_finite`.
    """
    if not _all_finite_in(values, dtype) and bool((infinite := values.to(dtype).isinf()).any()):
        refuse(values, infinite, name, "finite numbers, or NaN for missing ones", given, dtype)


def _all_finite_in(values: Tensor, dtype: torch.dtype | None) -> bool:
    """Check that no number is NaN, or infinite in a precision, by converting only the extremes."""
    if dtype is None or dtype == values.dtype or torch.promote_types(values.dtype, dtype) == dtype:
        return all_finite(values)
    low, high = bounds(values)
    most = torch.finfo(dtype).max
    return -most <= low.item() <= high.item() <= most or bool(low.to(dtype).isfinite() & high.to(dtype).isfinite())


def refuse(
    values: Tensor, bad: Tensor, name: str, expected: str, given: Any = None, dtype: torch.dtype | None = None
) -> NoReturn:
    """Raise a ``ValueError`` that says what was expected and which number came, by its row and column.

    Args:
        values: Numbers, ``(N, ...)``.
        bad: Which of them are refused, one at least.
        name: Name of the argument.
        expected: What was expected.
        given: The data before conversion, which may have names of rows and columns.
        dtype: Precision in which the numbers were expected to be finite, if that is not their own.
    """
    position = indices(unwrapped(bad).nonzero()[0])
    value = values[tuple(position)].item()
    beyond = f", beyond the range of {dtype}," if dtype is not None and np.isfinite(value) else ""
    others = int(bad.sum()) - 1
    more = f", and {others} more" if others else ""
    raise _error(f"{name}: expected {expected}, got {value:g}{beyond}", position, given, more)


def among(error: ValueError, columns: Sequence[int]) -> ValueError:
    """Return an error of :func:`refuse` for numbers that have these columns in the caller's data; others stay."""
    if (told := vars(error).get("told")) is None:
        return error
    before, position, given, after = told
    return _error(before, [*position[:-1], columns[position[-1]]], given, after)


def further_on(error: ValueError, rows: int, given: Any) -> ValueError:
    """Return an error of :func:`refuse` for numbers that are so many rows further on in these data; others stay."""
    if not (told := vars(error).get("told")) or not told[1]:
        return error
    before, (row, *others), _, after = told
    return _error(before, [rows + row, *others], given, after)


def _error(before: str, position: list[int], given: Any, after: str) -> ValueError:
    error = ValueError(f"{before}{_place(position, given)}{after}")
    vars(error)["told"] = before, position, given, after
    return error


def _place(position: list[int], given: Any) -> str:
    """Describe the position of an entry by the names of the caller's rows and columns."""
    if not position:
        return ""
    if len(position) > 2:
        return f" at position {tuple(position)}"
    row, columns, index = position[0], columns_of(given), getattr(given, "index", None)
    label = "" if index is None or callable(index) or index[row] == row else f" (index {index[row]!r})"
    if len(position) == 1:
        return f" in row {row}{label}"
    return f" in row {row}{label}, column {position[1] if columns is None else repr(columns[position[1]])}"
