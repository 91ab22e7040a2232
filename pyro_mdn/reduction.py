r"""Fewer components, and the modes, of mixtures given by dense covariance matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_modes", "merge_components"]


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
        i = int(best.argmin())
        j = int(partner[i])
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


def _merge_pair(components: tuple[Tensor, Tensor, Tensor], i: int, j: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mean and covariance of component i together with each of j."""
    weights, locs, matrices = components
    total = weights[i] + weights[j]
    share = torch.where(total > 0, weights[j] / total, 0.5)
    apart = locs[j] - locs[i]
    loc = locs[i] + share.unsqueeze(-1) * apart
    spread = (share * (1 - share))[..., None, None] * apart.unsqueeze(-1) * apart.unsqueeze(-2)
    inner = (1 - share)[..., None, None] * matrices[i] + share[..., None, None] * matrices[j]
    return total, loc, inner + spread


def _cost_of_merging(components: tuple[Tensor, Tensor, Tensor], log_det: Tensor, i: int) -> Tensor:
    """Cost of merging component i with each other one; infinite with itself."""
    weights = components[0]
    total, _, merged = _merge_pair(components, i, torch.arange(len(weights), device=weights.device))
    cost = 0.5 * (total * _log_det(merged) - weights[i] * log_det[i] - weights * log_det)
    cost[i] = torch.inf
    return cost


def _log_det(matrices: Tensor) -> Tensor:
    scale_tril = torch.linalg.cholesky_ex(matrices).L
    return 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def find_modes(
    log_weights: Tensor, locs: Tensor, precisions: Tensor, steps: int = 1000, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    r"""Climb from every mean by the fixed-point iteration, then tell which ends are distinct.

    .. math:: y \leftarrow \Big(\sum_k r_k(y) \Sigma_k^{-1}\Big)^{-1} \sum_k r_k(y) \Sigma_k^{-1} \mu_k

    Args:
        log_weights: Log-weights with the components' normalising constants, shape ``(N, K)``.
        locs: Shape ``(N, K, D)``.
        precisions: Shape ``(N, K, D, D)``.
        steps: Iterations at most.
        tolerance: Ends closer than this many standard deviations of the narrowest component there are one.

    Returns:
        The ends ``(N, K, D)``, highest density first, and whether each is a maximum and distinct from those
        before it, ``(N, K)``.

    References:
        Carreira-Perpiñán (2000), Mode-finding for mixtures of Gaussian distributions.
    """
    pulls = (precisions @ locs.unsqueeze(-1)).squeeze(-1)
    point, joint = locs, _joint(log_weights, locs, precisions, locs)
    eps = torch.finfo(locs.dtype).eps
    for _ in range(steps):
        share = joint.softmax(-1)
        precision = torch.einsum("nsk,nkij->nsij", share, precisions)
        new = torch.linalg.solve(precision, torch.einsum("nsk,nki->nsi", share, pulls))
        moved = _length(new - point, precision)
        point, joint = new, _joint(log_weights, locs, precisions, new)
        if bool((moved <= 100 * eps * (1 + _length(point, precision))).all()):
            break
    order = joint.logsumexp(-1).argsort(-1, descending=True)
    point = point.gather(1, order.unsqueeze(-1).expand_as(point))
    narrowest = precisions.diagonal(dim1=-2, dim2=-1).amax(1).sqrt()
    apart = ((point.unsqueeze(2) - point.unsqueeze(1)) * narrowest[:, None, None]).norm(dim=-1)
    earlier = torch.ones_like(apart[0], dtype=torch.bool).tril(-1)
    top = torch.linalg.eigvalsh(_curvature(log_weights, locs, precisions, point)).amax(-1) < 0
    return point, top & ~((apart < tolerance) & earlier & top.unsqueeze(1)).any(-1)


def _curvature(log_weights: Tensor, locs: Tensor, precisions: Tensor, points: Tensor) -> Tensor:
    """Hessian of the density over the density, ``(N, S, D, D)``: saddles and troughs are stationary too."""
    share = _joint(log_weights, locs, precisions, points).softmax(-1)
    pull = torch.einsum("nkij,nskj->nski", precisions, points.unsqueeze(2) - locs.unsqueeze(1))
    return torch.einsum("nsk,nski,nskj->nsij", share, pull, pull) - torch.einsum("nsk,nkij->nsij", share, precisions)


def _joint(log_weights: Tensor, locs: Tensor, precisions: Tensor, points: Tensor) -> Tensor:
    """Log of weight times density of each component at each point, ``(N, S, K)``."""
    residual = points.unsqueeze(2) - locs.unsqueeze(1)
    return log_weights.unsqueeze(1) - 0.5 * torch.einsum("nski,nkij,nskj->nsk", residual, precisions, residual)


def _length(vector: Tensor, precision: Tensor) -> Tensor:
    return torch.einsum("nsi,nsij,nsj->ns", vector, precision, vector).clamp(min=0).sqrt()
