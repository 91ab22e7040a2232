"""Lower triangles in packed form: the diagonal, and the bands below it, each shorter by one than the one before.

A product with a vector then takes one multiplication and addition for each band, over contiguous memory. On a GPU, each
band would be a launch of its own, so larger triangles are expanded to squares there. Tensors are channel-first, except
in :func:`pack_tril` and :func:`unpack_tril`.
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
    """Multiply a triangle, diagonal ``(D, ...)`` and bands ``(D(D-1)/2, ...)``, by a vector ``(D, ...)``."""
    product, traced = diagonal * vector, is_traced(diagonal, lower, vector)
    if _is_launched(vector):
        return product.add_((_square(lower, vector.shape[0]) * vector).sum(1))
    for i, band in enumerate(_bands(lower, vector.shape[0]), start=1):
        if traced:
            product = product + pad(band * vector[:-i], (0, 0) * (vector.ndim - 1) + (i, 0))
        else:
            product[i:].addcmul_(band, vector[:-i])
    return product


def tril_add_transposed_(target: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Add the product of the transpose of ``lower``, without the diagonal, and a vector ``(D, ...)`` to ``target``."""
    if _is_launched(vector):
        return target.add_((_square(lower, vector.shape[0]) * vector.unsqueeze(1)).sum(0))
    for i, band in enumerate(_bands(lower, vector.shape[0]), start=1):
        target[:-i].addcmul_(band, vector[i:])
    return target


def tril_outer(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write the entries below the diagonal of the outer product of two vectors ``(D, ...)``, packed, into ``out``."""
    if _is_launched(left):
        rows, columns = _entries(left.shape[0], left.device)
        return torch.mul(left[rows], right[columns], out=out)
    for i, band in enumerate(_bands(out, left.shape[0]), start=1):
        torch.mul(left[i:], right[:-i], out=band)
    return out


def tril_solve(diagonal: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Solve a triangular system by forward substitution: the inverse of :func:`tril_matvec`."""
    bands = [band.unbind() for band in _bands(lower, vector.shape[0])]
    solution: list[Tensor] = []
    for i, (pivot, rest) in enumerate(zip(diagonal, vector, strict=True)):
        for j, known in enumerate(solution):
            rest = rest - bands[i - j - 1][j] * known
        solution.append(rest / pivot)
    return torch.stack(solution)


def tril_block(lower: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Return the packed entries of the rows and columns from ``start`` to ``stop``."""
    bands = _bands(lower, dim)[: stop - start - 1]
    return torch.cat([lower[:0], *(band[start : stop - i] for i, band in enumerate(bands, start=1))])


def tril_below(lower: Tensor, dim: int, vector: Tensor) -> Tensor:
    """Multiply the block of rows n to D and columns 0 to n by a vector ``(n, ...)``; the result is ``(D-n, ...)``."""
    n = vector.shape[0]
    entries = lower[[tril_position(i, j, dim) for i in range(n, dim) for j in range(n)]]
    return (entries.unflatten(0, (dim - n, n)) * vector).sum(1)


def tril_position(row: Any, column: Any, dim: int) -> Any:
    """Compute the packed position of an entry below the diagonal."""
    below = row - column
    return (below - 1) * dim - below * (below - 1) // 2 + column


def tril_positions(dim: int, device: torch.device | None = None) -> Tensor:
    """Compute packed positions of all entries, ``(D, D)``; on and above the diagonal, the number of packed entries."""
    index = torch.arange(dim, device=device)
    rows = index.unsqueeze(-1)
    return torch.where(rows > index, tril_position(rows, index, dim), dim * (dim - 1) // 2)


def pack_tril(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix ``(*batch, D, D)``: diagonal ``(*batch, D)`` and bands below it; the upper triangle is ignored."""
    diagonal, *bands = (matrix.diagonal(-i, -2, -1) for i in range(matrix.shape[-1]))
    return diagonal, torch.cat([diagonal[..., :0], *bands], -1)


def unpack_tril(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Build the dense lower triangle ``(*batch, D, D)``: the inverse of :func:`pack_tril`."""
    dim = diagonal.shape[-1]
    padded = torch.cat([lower, torch.zeros_like(diagonal[..., :1])], -1)
    below = padded[..., tril_positions(dim, lower.device).flatten()].unflatten(-1, (dim, dim))
    return diagonal.diag_embed() + below


def _bands(lower: Tensor, dim: int) -> Sequence[Tensor]:
    """View the bands that are 1 to D-1 places below the diagonal, ``(D-1, ...)`` to ``(1, ...)``."""
    return lower.split_with_sizes([*range(dim - 1, 0, -1)])


def _is_launched(vector: Tensor) -> bool:
    """Check whether launching a kernel for each band would take longer than working on a square."""
    return vector.is_cuda and vector.shape[0] > 8 and not is_traced(vector)


def _square(lower: Tensor, dim: int) -> Tensor:
    """Expand packed entries to a square ``(D, D, ...)`` with zeros on and above the diagonal."""
    rows, columns = _entries(dim, lower.device)
    return lower.new_zeros(dim, dim, *lower.shape[1:]).index_put_((rows, columns), lower)


@functools.cache
def _entries(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the rows and columns of the packed entries, in their order."""
    pairs = [(j + i, j) for i in range(1, dim) for j in range(dim - i)]
    rows, columns = (torch.tensor([pair[k] for pair in pairs], dtype=torch.int64, device=device) for k in (0, 1))
    return rows, columns
