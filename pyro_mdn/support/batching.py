r"""Passes over draws of weights and rows of data that fit into a cache: what one takes is measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_traced
from pyro_mdn.support.torch_compat import TorchDispatchMode, storage_id, tree_leaves

__all__ = ["BYTES", "Cost", "bytes_made", "cost_of"]

BYTES = 2**24  # of intermediate results in one pass: beyond a cache it gets slower


class Cost(NamedTuple):
    """Bytes of all tensors that a function of rows makes, intermediate ones included.

    Attributes:
        fixed: Whatever the number of rows.
        each: For each row.
        separable: Whether each row has results of its own, so that rows may go in parts.
    """

    fixed: float
    each: float
    separable: bool

    def units(self, rows: int) -> int:
        """How many such functions of so many rows fit into one pass, 1 at least."""
        return max(1, int(BYTES // max(1.0, self.fixed + self.each * rows)))

    def rows(self, rows: int) -> int:
        """How many of so many rows fit into one pass of one function, 1 at least; all if they cannot be separated."""
        if not self.separable or self.fixed + self.each * rows <= BYTES:
            return max(1, rows)
        return max(1, min(rows, int((BYTES - self.fixed) // max(1.0, self.each))))


def cost_of(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, repeats: int = 1) -> Cost:
    """Measure what a function of rows takes, by calls with one row and with two.

    Rows are separable if each of two has the same results alone as before, or after, the other: not if they are the
    steps of a sequence to a recurrent layer, for example, which may run either way.

    Args:
        function: Takes rows, and returns tensors ``(N, ...)``, or ``(1, ...)`` of what is the same for all rows.
        x: All rows, ``(N, ...)``; with fewer than two, the function is called once.
        repeats: How many such functions there are: if all surely fit into one pass, there is no other call.
    """
    if is_traced(x):  # numbers cannot be read: everything in one pass
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
    """Result of a call, and the bytes of all tensors that it makes on the way."""
    with _Counting() as counting:
        result = call()
    return result, counting.total


class _Counting(TorchDispatchMode):
    """Add up the memory of what operations return, but for views of what they are given."""

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
    """Two rows, of the first ones those that differ most from each other: equal ones would not tell them apart."""
    few = x[:most].detach()
    other = (few - few[:1]).abs().flatten(1).sum(1).argmax().clamp(min=1)
    return torch.cat([x[:1], x[other].unsqueeze(0)])


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether results are equal but for rounding, which depends on the number of rows."""
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
