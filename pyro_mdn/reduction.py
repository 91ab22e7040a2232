r"""Fewer components of mixtures given by dense covariance matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["merge_components"]

_ELEMENTS = 2**20
"""Numbers in the largest tensor at once, where one row does not need more."""


class _Parts(NamedTuple):
    """Components ``(K, N)`` and what is derived from them, changed in place; rows are the last dimension."""

    weights: Tensor
    locs: Tensor  # (D, K, N)
    columns: Tensor  # of the lower triangles of covariances, one after another, (D * (D + 1) / 2, K, N)
    log_det: Tensor
    place: Tensor  # in the order of the components that were given

    def at(self, index: Tensor, rows: Tensor) -> _Parts:
        """Component ``index[n]`` of each row n, ``(N,)``."""
        return _Parts(*(t[..., index, rows] for t in self))

    def span(self, start: int, stop: int) -> _Parts:
        return _Parts(*(t[..., start:stop, :] for t in self))

    def put(self, index: Tensor, rows: Tensor, values: _Parts) -> None:
        for tensor, value in zip(self, values, strict=True):
            tensor[..., index, rows] = value


def merge_components(weights: Tensor, locs: Tensor, matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Merge pairs of components, the cheapest first, until ``count`` are left; mean and covariance stay.

    The cost of a pair bounds the Kullback-Leibler divergence that its merging adds:

    .. math:: B_{ij} = \tfrac12 \left( (w_i + w_j) \log\det\Sigma_{ij} - w_i \log\det\Sigma_i
              - w_j \log\det\Sigma_j \right)

    Args:
        weights: Shape ``(N, K)``.
        locs: Shape ``(N, K, D)``.
        matrices: Shape ``(N, K, D, D)``.
        count: Components to keep.

    References:
        Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction.
    """
    k, dim = locs.shape[1:]
    size = max(1, _ELEMENTS // (k * max(k, dim**2)))
    pieces = zip(weights.split(size), locs.split(size), matrices.split(size), strict=True)
    merged = [_merge_rows(w, m, s, count) for w, m, s in pieces]
    kept_weights, kept_locs, kept_matrices = (torch.cat(kept) for kept in zip(*merged, strict=True))
    return kept_weights, kept_locs, kept_matrices


def _merge_rows(weights: Tensor, locs: Tensor, matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runnalls' algorithm, one merge in each row at a time. Each component knows its cheapest partner.

    Those that are left come first: the last one moves to where one was merged into another.
    """
    n, k = weights.shape
    rows, place = torch.arange(n, device=weights.device), torch.arange(k, device=weights.device)
    column, row = torch.triu_indices(*matrices.shape[-2:], device=matrices.device)
    stored = weights.mT.clone(), locs.permute(2, 1, 0).clone(), matrices[..., row, column].permute(2, 1, 0).contiguous()
    parts = _Parts(*stored, _eliminate(stored[2], locs.shape[-1])[0], place.unsqueeze(-1).expand(k, n).clone())
    cost = _all_costs(parts)
    best, partner = cost.min(-1)
    for left in range(k - 1, count - 1, -1):
        i = best[: left + 1].argmin(0)
        j = partner[i, rows]
        i, j = torch.minimum(i, j), torch.maximum(i, j)  # either may be the first of the two
        stale = (partner == i) | (partner == j)
        parts.put(i, rows, _merge_pair(parts.at(i, rows), parts.at(j, rows)))
        parts.put(j, rows, parts.at(torch.full_like(j, left), rows))
        partner = torch.where(partner == left, j, partner)
        for tensor in (best, partner, stale):
            tensor[j, rows] = tensor[left].clone()
        cost[j, rows] = cost[left].clone()
        cost[:, rows, j] = cost[:, :, left].clone()
        now = cost[:left, :, :left]
        new = _cost_of_merging(parts.span(0, left), parts.at(i, rows))
        new[i, rows] = torch.inf
        now[i, rows], now[:, rows, i] = new.T, new
        best, partner, stale = best[:left], partner[:left], stale[:left]
        closer = new < best
        best, partner, stale = torch.where(closer, new, best), torch.where(closer, i, partner), stale & ~closer
        stale[i, rows] = True
        where = stale.nonzero(as_tuple=True)
        best[where], partner[where] = now[where].min(-1)
    kept = parts.span(0, count)
    order = kept.place.argsort(0)
    weights, locs, columns = (t.gather(-2, order.expand(t.shape)).transpose(0, -1) for t in kept[:3])
    matrices = matrices.new_empty(*locs.shape, locs.shape[-1])
    matrices[..., row, column] = matrices[..., column, row] = columns
    return weights, locs, matrices


def _merge_pair(one: _Parts, other: _Parts) -> _Parts:
    """Weight, mean and covariance of two components together."""
    share, inner, apart = _blend(one, other)
    squares = torch.cat([apart[i:] * apart[i] for i in range(len(apart))])
    columns = torch.addcmul(inner, share * (1 - share), squares)
    log_det, _ = _eliminate(columns, len(apart))
    place = torch.minimum(one.place, other.place)
    return _Parts(one.weights + other.weights, one.locs + share * apart, columns, log_det, place)


def _blend(one: _Parts, other: _Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Share of the other in the sum of the two, average covariance, and difference of means."""
    total = one.weights + other.weights
    share = torch.where(total > 0, other.weights / total, 0.5)
    return share, torch.lerp(one.columns, other.columns, share), other.locs - one.locs


def _all_costs(parts: _Parts) -> Tensor:
    """Cost of merging each pair, ``(K, N, K)``; infinite with itself."""
    k, n = parts.weights.shape
    cost = parts.weights.new_full((k, n, k), torch.inf)
    for i in range(k - 1):
        new = _cost_of_merging(parts.span(i + 1, k), parts.span(i, i + 1))
        cost[i, :, i + 1 :], cost[i + 1 :, :, i] = new.T, new
    return cost


def _cost_of_merging(parts: _Parts, one: _Parts) -> Tensor:
    """Cost of merging one component of each row with each of these, ``(K, N)``."""
    one = one if one.weights.ndim == 2 else _Parts(*(t.unsqueeze(-2) for t in one))
    share, inner, apart = _blend(one, parts)
    log_det, squared = _eliminate(inner, len(apart), apart)
    # The determinant lemma, since the matrix itself may be singular in floating point.
    merged = log_det + (share * (1 - share) * squared).log1p()
    weights = one.weights + parts.weights
    return 0.5 * (weights * merged - one.weights * one.log_det - parts.weights * parts.log_det)


def _eliminate(columns: Tensor, dim: int, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Log-determinant, and :math:`v^\top \Sigma^{-1} v`, of matrices given by columns of their lower triangles.

    A pivot that rounding has left below its share of the diagonal, where a Cholesky decomposition would fail, is
    as large as that rounding.
    """
    rest, eps = [c.clone() for c in columns.split([*range(dim, 0, -1)])], torch.finfo(columns.dtype).eps
    right = torch.zeros_like(columns[:dim]) if vector is None else vector.clone()
    least = [eps * column[0] for column in rest]
    log_det = squared = torch.zeros_like(columns[0])
    for j, column in enumerate(rest):
        pivot = torch.maximum(column[0], least[j])
        log_det = log_det + pivot.log()
        below = column[1:] / pivot
        for i, other in enumerate(rest[j + 1 :]):
            other.addcmul_(below[i:], column[i + 1], value=-1)
        if vector is not None:
            squared = squared + right[j].square() / pivot
            right[j + 1 :].addcmul_(below, right[j], value=-1)
    return log_det, squared
