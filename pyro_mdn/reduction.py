r"""Fewer components of mixtures given by dense covariance matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_components"]


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
    if not len(weights):
        return weights[:, :count], locs[:, :count], matrices[:, :count]
    merged = [_merge_row(w, m, s, count) for w, m, s in zip(weights, locs, matrices, strict=True)]
    kept_weights, kept_locs, kept_matrices = (torch.stack(parts) for parts in zip(*merged, strict=True))
    return kept_weights, kept_locs, kept_matrices


def _merge_row(weights: Tensor, locs: Tensor, matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runnalls' algorithm for one mixture. Each row of the costs knows its minimum, so that a merge is O(K)."""
    components, log_det = (weights.clone(), locs.clone(), matrices.clone()), _log_det(matrices)
    cost = torch.stack([_cost_of_merging(components, log_det, i) for i in range(len(weights))])
    best, partner = cost.min(-1)
    alive = torch.ones_like(weights, dtype=torch.bool)
    for _ in range(len(weights) - count):
        first = int(best.argmin())
        i, j = sorted([first, int(partner[first])])  # the two costs of a pair differ by rounding
        for tensor, value in zip(components, _merge_pair(components, i, j), strict=True):
            tensor[i] = value
        components[0][j], log_det[i] = 0.0, _log_det(components[2][i])
        alive[j] = False
        cost[j], cost[:, j], best[j] = torch.inf, torch.inf, torch.inf
        new = _cost_of_merging(components, log_det, i).masked_fill(~alive, torch.inf)
        cost[i], cost[:, i] = new, new
        closer = new < best
        best, partner = torch.where(closer, new, best), torch.where(closer, i, partner)
        stale = (alive & ((partner == i) & ~closer | (partner == j))).nonzero().squeeze(-1)
        stale = torch.cat([stale, torch.tensor([i], device=stale.device)])
        best[stale], partner[stale] = cost[stale].min(-1)
    return components[0][alive], components[1][alive], components[2][alive]


def _merge_pair(components: tuple[Tensor, Tensor, Tensor], i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mean and covariance of two components together."""
    weights, locs, _ = components
    share, inner, apart = _blend(components, i, j)
    return weights[i] + weights[j], locs[i] + share * apart, inner + share * (1 - share) * torch.outer(apart, apart)


def _blend(components: tuple[Tensor, Tensor, Tensor], i: int, j: int | slice) -> tuple[Tensor, Tensor, Tensor]:
    """Share of j in its sum with component i, average covariance of the two, and difference of their means."""
    weights, locs, matrices = components
    total = weights[i] + weights[j]
    share = torch.where(total > 0, weights[j] / total, 0.5)
    wide = share[..., None, None]
    return share, (1 - wide) * matrices[i] + wide * matrices[j], locs[j] - locs[i]


def _cost_of_merging(components: tuple[Tensor, Tensor, Tensor], log_det: Tensor, i: int) -> Tensor:
    """Cost of merging component i with each other one; infinite with itself."""
    weights = components[0]
    share, inner, apart = _blend(components, i, slice(None))
    scale_tril = torch.linalg.cholesky_ex(inner).L
    whitened = torch.linalg.solve_triangular(scale_tril, apart.unsqueeze(-1), upper=False).squeeze(-1)
    # The determinant lemma, since the matrix itself may be singular in floating point.
    spread = (share * (1 - share) * whitened.square().sum(-1)).log1p()
    merged = 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + spread
    cost = 0.5 * ((weights[i] + weights) * merged - weights[i] * log_det[i] - weights * log_det)
    cost[i] = torch.inf
    return cost


def _log_det(matrices: Tensor) -> Tensor:
    scale_tril = torch.linalg.cholesky_ex(matrices).L
    return 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
