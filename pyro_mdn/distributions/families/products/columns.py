r"""Columns: which outputs belong to which part of a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.support.arrays import among
from pyro_mdn.support.checks import is_recorded

__all__ = ["Columns"]

V = TypeVar("V", bound=TargetsOrTensor)


@dataclass(frozen=True)
class Columns:
    """Indices of the outputs of each part, which are in ascending order; each output belongs to one part.

    Args:
        of_parts: The indices of each part.

    >>> columns = Columns.of_sizes([2, 1])
    >>> columns.split(torch.tensor([[1.0, 2.0, 3.0]]))
    [tensor([[1., 2.]]), tensor([[3.]])]
    >>> columns.marginal([2, 0])
    ([[0], [0]], Columns(of_parts=((1,), (0,))))
    """

    of_parts: tuple[tuple[int, ...], ...]

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Self:
        """Let parts of these sizes have their outputs one after another."""
        ends = accumulate(sizes)
        return cls(tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)))

    @property
    def dim(self) -> int:
        """Number of outputs."""
        return sum(map(len, self.of_parts))

    def split(self, value: V) -> list[V]:
        """Split values ``(..., D)`` into those of each part."""
        parts: Any = [value[..., _index(columns)] for columns in self.of_parts]
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put values of the parts, whose other dimensions broadcast, in the order of the outputs, ``(..., D)``."""
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        joined = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        order = [d for columns in self.of_parts for d in columns]
        if order == sorted(order):
            return joined
        return joined[..., sorted(range(len(order)), key=order.__getitem__)]

    def join_targets(self, parts: Sequence[TargetsOrTensor]) -> TargetsOrTensor:
        """Join targets as :meth:`join` joins tensors."""
        if not isinstance(parts[0], Targets):
            tensors: Any = parts
            return self.join(tensors)
        targets: Any = parts
        return Targets(self.join([part.lower for part in targets]), self.join([part.upper for part in targets]))

    def each(self, function: Callable[..., Any], parts: Sequence[Any], *values: TargetsOrTensor) -> list[Any]:
        """Apply a function to each part and its own values; errors name the columns of all outputs."""
        results = []
        split = [self.split(value) for value in values]
        if is_recorded():  # compilers cannot follow an error that is changed
            return [function(*own) for own in zip(parts, *split, strict=True)]
        for part, columns, *own in zip(parts, self.of_parts, *split, strict=True):
            try:
                results.append(function(part, *own))
            except ValueError as error:
                raise among(error, columns) from None
        return results

    def marginal(self, dims: Sequence[int]) -> tuple[list[list[int]], Columns]:
        """Look for the outputs ``dims``, in that order.

        Returns:
            Their indices within each part, and where they go; a part may be left without outputs.
        """
        places = {d: (p, i) for p, columns in enumerate(self.of_parts) for i, d in enumerate(columns)}
        chosen: list[list[int]] = [[] for _ in self.of_parts]
        columns: list[list[int]] = [[] for _ in self.of_parts]
        for new, d in enumerate(dims):
            part, own = places[d]
            chosen[part].append(own)
            columns[part].append(new)
        return chosen, Columns(tuple(map(tuple, columns)))


def _index(columns: tuple[int, ...]) -> slice | list[int]:
    """Neighbours as a slice, which makes a view."""
    if columns and columns == tuple(range(columns[0], columns[-1] + 1)):
        return slice(columns[0], columns[-1] + 1)
    return list(columns)
