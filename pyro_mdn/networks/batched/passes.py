r"""Split computations over draws of weights and rows of data into passes that fit into a cache, by measured cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_traced
from pyro_mdn.support.torch_compat import TorchDispatchMode, storage_id, tree_leaves

__all__ = ["BYTES", "Cost", "bytes_made", "cost_of"]

BYTES = 2**24
"""Bytes of intermediate results in one pass: larger passes leave the cache and get slower."""


class Cost(NamedTuple):
    """Bytes of all tensors that a function of rows creates, including intermediate results.

    Attributes:
        fixed: Bytes that do not depend on the number of rows.
        each: Bytes for each row.
        separable: Whether the results of a row do not depend on the other rows, so that rows may be split.
    """

    fixed: float
    each: float
    separable: bool

    def units(self, rows: int) -> int:
        """Count how many such functions of this many rows fit into one pass, at least 1."""
        return max(1, int(BYTES // max(1.0, self.fixed + self.each * rows)))

    def rows(self, rows: int) -> int:
        """Count how many rows fit into one pass of one function, at least 1; all rows if they are not separable."""
        if not self.separable or self.fixed + self.each * rows <= BYTES:
            return max(1, rows)
        return max(1, min(rows, int((BYTES - self.fixed) // max(1.0, self.each))))


def cost_of(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, repeats: int = 1) -> Cost:
    """Measure the memory of a function of rows, by calling it with one row and with two rows.

    Rows are separable if each of two rows has the same results alone as together with the other. Rows that are the
    steps of a sequence, for a recurrent layer in either direction, are not separable.

    Args:
        function: Takes rows, and returns tensors ``(N, ...)``, or ``(1, ...)`` for results that all rows share.
        x: All rows, ``(N, ...)``; with fewer than two rows, the function is called once.
        repeats: Number of such functions. If all of them fit into one pass, the second call is skipped.
    """
    if is_traced(x):  # values cannot be read, so everything is one pass
        return Cost(0.0, 0.0, False)
    pair = _unlike(x) if len(x) > 1 else x
    alone, one = bytes_made(lambda: function(pair[-1:]))
    if len(x) < 2 or one * len(x) * repeats <= BYTES:
        return Cost(0.0, one, False)
    beside, two = bytes_made(lambda: function(pair))
    each = max(0, two - one)
    separable = all(map(_agree, alone, [part[-1:] for part in beside]))
    separable = separable and all(map(_agree, function(pair[:1]), [part[:1] for part in beside]))
    return Cost(max(0, one - each), each, separable)


def bytes_made(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of a call, and the bytes of all tensors that the call creates."""
    with _Counting() as counting:
        result = call()
    return result, counting.total


class _Counting(TorchDispatchMode):
    """Add up the memory of the results of operations, except for views of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_id(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = {storage_id(tensor): tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        self.total += sum(t.untyped_storage().nbytes() for memory, t in made.items() if memory not in given)
        return result


def _unlike(x: Tensor, most: int = 100) -> Tensor:
    """Choose the first row and, of the first ``most`` rows, the one that differs most from it."""
    few = x[:most].detach()
    other = (few - few[:1]).abs().flatten(1).sum(1).argmax().clamp(min=1)
    return torch.cat([x[:1], x[other].unsqueeze(0)])


def _agree(a: Tensor, b: Tensor) -> bool:
    """Check that results are equal up to rounding, which depends on the number of rows."""
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
