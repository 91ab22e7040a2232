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
    point = _polish(log_weights, locs, precisions, point)
    joint = _joint(log_weights, locs, precisions, point)
    order = joint.logsumexp(-1).argsort(-1, descending=True)
    point = point.gather(1, order.unsqueeze(-1).expand_as(point))
    joint = joint.gather(1, order.unsqueeze(-1).expand_as(joint))
    precision = torch.einsum("nsk,nkij->nsij", joint.softmax(-1), precisions)
    difference = point.unsqueeze(2) - point.unsqueeze(1)
    apart = torch.einsum("nsti,nsij,nstj->nst", difference, precision, difference).clamp(min=0).sqrt()
    same = apart < tolerance + 1e3 * eps * _length(point, precision).unsqueeze(-1)
    earlier = torch.ones_like(apart[0], dtype=torch.bool).tril(-1)
    top = torch.linalg.eigvalsh(_curvature(log_weights, locs, precisions, point)).amax(-1) < 0
    return point, top & ~(same & earlier & top.unsqueeze(1)).any(-1)


def _polish(log_weights: Tensor, locs: Tensor, precisions: Tensor, point: Tensor, steps: int = 30) -> Tensor:
    """Newton steps on the log-density, where it is concave and they climb: the fixed point is slow on flat tops."""
    height = _joint(log_weights, locs, precisions, point).logsumexp(-1)
    for _ in range(steps):
        share = _joint(log_weights, locs, precisions, point).softmax(-1)
        pull = torch.einsum("nkij,nskj->nski", precisions, locs.unsqueeze(1) - point.unsqueeze(2))
        slope = (share.unsqueeze(-1) * pull).sum(-2)
        curvature = _curvature(log_weights, locs, precisions, point) - slope.unsqueeze(-1) * slope.unsqueeze(-2)
        values, vectors = torch.linalg.eigh(curvature)
        along = (vectors.mT @ slope.unsqueeze(-1)).squeeze(-1) / values.clamp(max=-torch.finfo(values.dtype).tiny)
        new = point - (vectors @ along.unsqueeze(-1)).squeeze(-1)
        reached = _joint(log_weights, locs, precisions, new).logsumexp(-1)
        climbs = (values.amax(-1) < 0) & (reached >= height)
        point, height = torch.where(climbs.unsqueeze(-1), new, point), torch.where(climbs, reached, height)
    return point


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
