r"""Merging of components with dense covariance matrices, by Runnalls' algorithm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.tensors.numerics import sum_logs

__all__ = ["merge_components"]

_ELEMENTS = 2**20
"""Largest size of a tensor in one pass; a single row may need a larger one."""


class _Parts(NamedTuple):
    """Parameters of components ``(K, N)`` as views of one table ``(C, K, N)``, which is changed in place."""

    table: Tensor
    dim: int

    @property
    def weights(self) -> Tensor:
        return self.table[0]

    @property
    def log_det(self) -> Tensor:
        return self.table[1]

    @property
    def place(self) -> Tensor:
        """Position in the order in which the components were given."""
        return self.table[2]

    @property
    def locs(self) -> Tensor:
        """Means, ``(D, K, N)``."""
        return self.table[3 : 3 + self.dim]

    @property
    def columns(self) -> Tensor:
        """Columns of the lower triangles of covariances, one after another, ``(D * (D + 1) / 2, K, N)``."""
        return self.table[3 + self.dim :]

    def at(self, index: Tensor) -> _Parts:
        """Return component ``index[n]`` of each row n, ``(1, N)``."""
        n = self.table.shape[-1]
        places = index * n + torch.arange(n, device=index.device)
        return _Parts(self.table.flatten(1).index_select(1, places).unsqueeze(1), self.dim)  # quicker than ``gather``

    def span(self, start: int, stop: int) -> _Parts:
        return _Parts(self.table[:, start:stop], self.dim)

    def put(self, index: Tensor, values: _Parts) -> None:
        # A copy, since ``values`` may be a span of this table.
        self.table.scatter_(1, index.expand(len(self.table), 1, -1), values.table.clone())


def merge_components(weights: Tensor, locs: Tensor, matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Merge pairs of components, the cheapest first, until ``count`` are left.

    Mean and covariance of the mixture stay as they are. The cost of a pair is an upper bound of the Kullback-Leibler
    divergence that merging it adds:

    .. math:: B_{ij} = \tfrac12 \left( (w_i + w_j) \log\det\Sigma_{ij} - w_i \log\det\Sigma_i
              - w_j \log\det\Sigma_j \right)

    Args:
        weights: Weights, shape ``(N, K)``.
        locs: Means, shape ``(N, K, D)``.
        matrices: Covariance matrices, shape ``(N, K, D, D)``.
        count: Number of components to keep.

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
    """Merge by Runnalls' algorithm, one pair in each row at a time, with the cheapest partner of each component known.

    The components that are left stand first: after j has been merged into i, the last one moves to place j.
    """
    n, k = weights.shape
    rows = torch.arange(n, device=weights.device)
    parts = _as_parts(weights, locs, matrices)
    cost = _all_costs(parts)
    best, partner = cost.min(-1)
    for left in range(k - 1, count - 1, -1):
        i = best[: left + 1].argmin(0)
        j = partner[i, rows]
        i, j = torch.minimum(i, j), torch.maximum(i, j)  # a partner may stand before its component
        stale = (partner == i) | (partner == j)
        merged = _merge_pair(parts.at(i), parts.at(j))
        parts.put(j, parts.span(left, left + 1))
        partner = torch.where(partner == left, j, partner)
        for tensor in (best, partner, stale):
            tensor[j, rows] = tensor[left].clone()
        cost[j, rows] = cost[left].clone()
        _put_column(cost, j, cost[:, :, left].clone())
        now = cost[:left, :, :left]
        parts.put(i, merged)
        pairs = _Pairs.of(merged, parts.span(0, left))
        # One of the pairs is the merged component with itself, which has the log-determinant of that component.
        merged.log_det.copy_(pairs.log_det.gather(0, i.unsqueeze(0)))
        parts.log_det.scatter_(0, i.unsqueeze(0), merged.log_det)
        new = pairs.cost(merged, parts.span(0, left))
        new[i, rows] = torch.inf
        now[i, rows] = new.T
        _put_column(now, i, new)
        best, partner, stale = best[:left], partner[:left], stale[:left]
        closer = new < best
        best, partner, stale = torch.where(closer, new, best), torch.where(closer, i, partner), stale & ~closer
        stale[i, rows] = True
        where = stale.nonzero(as_tuple=True)
        best[where], partner[where] = now[where].min(-1)
    return _as_tensors(parts.span(0, count))


def _put_column(cost: Tensor, index: Tensor, values: Tensor) -> None:
    """Set the costs ``(K, N)`` of merging component ``index[n]`` of each row n, in one quick operation."""
    cost.scatter_(-1, index[:, None].expand(*values.shape, 1), values.unsqueeze(-1))


def _as_parts(weights: Tensor, locs: Tensor, matrices: Tensor) -> _Parts:
    n, k, dim = locs.shape
    column, row = torch.triu_indices(dim, dim, device=matrices.device)
    place = torch.arange(k, device=weights.device).to(weights).expand(n, k)
    single = torch.stack([weights, torch.zeros_like(weights), place], -1)
    table = torch.cat([single, locs, matrices[..., row, column]], -1).permute(2, 1, 0).contiguous()
    parts = _Parts(table, dim)
    parts.log_det.copy_(_eliminate(parts.columns.clone(), torch.zeros_like(parts.locs))[0])
    return parts


def _as_tensors(parts: _Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and covariance matrices, rows first, in the order in which components were given."""
    order = parts.place.argsort(0)
    kept = parts.table.gather(1, order.expand_as(parts.table)).permute(2, 1, 0)
    parts = _Parts(kept.movedim(-1, 0), parts.dim)
    column, row = torch.triu_indices(parts.dim, parts.dim, device=kept.device)
    matrices = kept.new_empty(*kept.shape[:2], parts.dim, parts.dim)
    matrices[..., row, column] = matrices[..., column, row] = parts.columns.movedim(0, -1)
    return parts.weights, parts.locs.movedim(0, -1), matrices


def _merge_pair(one: _Parts, other: _Parts) -> _Parts:
    """Compute weight, mean and covariance of two components merged into one."""
    share, inner, apart = _blend(one, other)
    squares = torch.cat([apart[i:] * apart[i] for i in range(len(apart))])
    columns = torch.addcmul(inner, share * (1 - share), squares)
    single = torch.stack([one.weights + other.weights, one.log_det, torch.minimum(one.place, other.place)])
    return _Parts(torch.cat([single, one.locs + share * apart, columns]), one.dim)


def _blend(one: _Parts, other: _Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the other component's share of the total weight, the average covariance, and the difference of means."""
    total = one.weights + other.weights
    share = torch.where(total > 0, other.weights / total, 0.5)
    return share, torch.lerp(one.columns, other.columns, share), other.locs - one.locs


class _Pairs(NamedTuple):
    """Weights and log-determinants of the covariances of pairs of components merged into one."""

    weights: Tensor
    log_det: Tensor

    @classmethod
    def of(cls, one: _Parts, other: _Parts) -> _Pairs:
        share, inner, apart = _blend(one, other)
        log_det, squared = _eliminate(inner, apart)
        # By the matrix determinant lemma, since the merged matrix may be singular in floating point.
        return cls(one.weights + other.weights, log_det + (share * (1 - share) * squared).log1p())

    def cost(self, one: _Parts, other: _Parts) -> Tensor:
        return 0.5 * (self.weights * self.log_det - one.weights * one.log_det - other.weights * other.log_det)


def _all_costs(parts: _Parts) -> Tensor:
    """Compute the cost of merging each pair, ``(K, N, K)``; it is infinite for a component with itself."""
    k, n = parts.weights.shape
    steps = k // 2
    around = _Parts(torch.cat([parts.table, parts.table], 1), parts.dim)
    by_distance = parts.table.new_full((steps + 1, k, n), torch.inf)
    for step in range(1, steps + 1):  # by distance of the indices, so that each operation is on many pairs
        other = around.span(step, step + k)
        by_distance[step] = _Pairs.of(parts, other).cost(parts, other)
    one = torch.arange(k, device=parts.table.device)
    ahead = (one - one.unsqueeze(1)) % k  # from the first component of a pair to the second
    first = torch.where(ahead <= steps, one.unsqueeze(1), one)
    return by_distance[torch.minimum(ahead, (k - ahead) % k), first].transpose(1, 2).contiguous()


def _eliminate(columns: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute log-determinants and :math:`v^\top \Sigma^{-1} v` of matrices given by columns of their lower triangles.

    Both arguments are overwritten. A pivot is at least the rounding error of its diagonal entry, so that elimination
    goes on where a Cholesky decomposition would fail.
    """
    rest, pivots = columns.split([*range(len(vector), 0, -1)]), torch.empty_like(vector)
    least = torch.finfo(columns.dtype).eps * torch.stack([column[0] for column in rest])
    for j, column in enumerate(rest):
        pivot = torch.maximum(column[0], least[j], out=pivots[j])
        below = column[1:] * pivot.reciprocal()
        for i, other in enumerate(rest[j + 1 :]):
            other.addcmul_(below[i:], column[i + 1], value=-1)
        vector[j + 1 :].addcmul_(below, vector[j], value=-1)
    return sum_logs(pivots), (vector.square_().div_(pivots)).sum(0)
