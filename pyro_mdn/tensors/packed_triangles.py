"""Lower triangles, packed: their diagonal, and the bands below it, each shorter by one.

A product with a vector then takes one multiplication and addition for each band, over contiguous memory; on a GPU,
where many of these are many launches, the triangle is made a square. Tensors are channel-first, but for
:func:`pack_tril` and :func:`unpack_tril`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_mdn.support.checks import is_traced

__all__ = [
    "pack_tril",
    "tril_add_transposed_",
    "tril_below",
    "tril_block",
    "tril_matvec",
    "tril_outer",
    "tril_position",
    "tril_positions",
    "tril_solve",
    "unpack_tril",
]


def tril_matvec(diagonal: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Product of a triangle, ``(D, ...)`` and ``(D(D-1)/2, ...)``, and a vector ``(D, ...)``."""
    product, traced = diagonal * vector, is_traced(diagonal, lower, vector)
    if _is_launched(vector):
        return product.add_((_square(lower, len(vector)) * vector).sum(1))
    for i, band in enumerate(_bands(lower, len(vector)), start=1):
        if traced:
            product = product + pad(band * vector[:-i], (0, 0) * (vector.ndim - 1) + (i, 0))
        else:
            product[i:].addcmul_(band, vector[:-i])
    return product


def tril_add_transposed_(target: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Add the product of what is above a diagonal, the transpose of ``lower``, and a vector ``(D, ...)``."""
    if _is_launched(vector):
        return target.add_((_square(lower, len(vector)) * vector.unsqueeze(1)).sum(0))
    for i, band in enumerate(_bands(lower, len(vector)), start=1):
        target[:-i].addcmul_(band, vector[i:])
    return target


def tril_outer(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write what is below the diagonal of the outer product of two vectors ``(D, ...)``."""
    if _is_launched(left):
        rows, columns = _entries(len(left), left.device)
        return torch.mul(left[rows], right[columns], out=out)
    for i, band in enumerate(_bands(out, len(left)), start=1):
        torch.mul(left[i:], right[:-i], out=band)
    return out


def tril_solve(diagonal: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Solve a triangle for a vector by forward substitution: the inverse of :func:`tril_matvec`."""
    bands = [band.unbind() for band in _bands(lower, len(vector))]
    solution: list[Tensor] = []
    for i, (pivot, rest) in enumerate(zip(diagonal, vector, strict=True)):
        for j, known in enumerate(solution):
            rest = rest - bands[i - j - 1][j] * known
        solution.append(rest / pivot)
    return torch.stack(solution)


def tril_block(lower: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """What is packed of the rows and columns from ``start`` to ``stop``."""
    bands = _bands(lower, dim)[: stop - start - 1]
    return torch.cat([lower[:0], *(band[start : stop - i] for i, band in enumerate(bands, start=1))])


def tril_below(lower: Tensor, dim: int, vector: Tensor) -> Tensor:
    """Product ``(D-n, ...)`` of the rows below the first n, up to column n, and a vector ``(n, ...)``."""
    n = len(vector)
    entries = lower[[tril_position(i, j, dim) for i in range(n, dim) for j in range(n)]]
    return (entries.unflatten(0, (dim - n, n)) * vector).sum(1)


def tril_position(row: Any, column: Any, dim: int) -> Any:
    """Where an entry below a diagonal is packed."""
    below = row - column
    return (below - 1) * dim - below * (below - 1) // 2 + column


def tril_positions(dim: int, device: torch.device | None = None) -> Tensor:
    """That of all entries, ``(D, D)``; from the diagonal on, the number of those that are packed."""
    index = torch.arange(dim, device=device)
    rows = index.unsqueeze(-1)
    return torch.where(rows > index, tril_position(rows, index, dim), dim * (dim - 1) // 2)


def pack_tril(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal ``(*batch, D)`` and what is packed of ``(*batch, D, D)``; nothing else of it is looked at."""
    diagonal, *bands = (matrix.diagonal(-i, -2, -1) for i in range(matrix.shape[-1]))
    return diagonal, torch.cat([diagonal[..., :0], *bands], -1)


def unpack_tril(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Dense lower-triangular ``(*batch, D, D)``: the inverse of :func:`pack_tril`."""
    dim = diagonal.shape[-1]
    padded = torch.cat([lower, torch.zeros_like(diagonal[..., :1])], -1)
    below = padded[..., tril_positions(dim, lower.device).flatten()].unflatten(-1, (dim, dim))
    return diagonal.diag_embed() + below


def _bands(lower: Tensor, dim: int) -> Sequence[Tensor]:
    """Views ``(D-1, ...)`` to ``(1, ...)`` of what is one to D-1 below a diagonal."""
    return lower.split_with_sizes([*range(dim - 1, 0, -1)])


def _is_launched(vector: Tensor) -> bool:
    """Whether launching a kernel for each band would take longer than working on a square."""
    return vector.is_cuda and len(vector) > 8 and not is_traced(vector)


def _square(lower: Tensor, dim: int) -> Tensor:
    """What is below a diagonal, ``(D, D, ...)``, and zeros."""
    rows, columns = _entries(dim, lower.device)
    return lower.new_zeros(dim, dim, *lower.shape[1:]).index_put_((rows, columns), lower)


@functools.cache
def _entries(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is packed, in its order."""
    pairs = [(j + i, j) for i in range(1, dim) for j in range(dim - i)]
    rows, columns = (torch.tensor([pair[k] for pair in pairs], dtype=torch.int64, device=device) for k in (0, 1))
    return rows, columns
