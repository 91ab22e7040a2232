r"""Expected distances under univariate mixtures: the two terms of the continuous ranked probability score (CRPS)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.special import erfc

from pyro_mdn.tensors.univariate import Law, UnivariateMixture

__all__ = ["distance_to", "half_mean_difference", "mean_difference_by_quadrature"]

_POINTS = {torch.float64: 40, torch.float32: 20}  # nodes on each side of the median


def distance_to(mixture: UnivariateMixture, value: Tensor) -> Tensor:
    """Compute the expected distance E|Y - y| of the mixture from values y, ``(*batch)``."""
    z = (value.unsqueeze(-1) - mixture.locs) / mixture.scale
    return (mixture.logits.exp() * mixture.scale * mixture.law.mean_distance(z)).sum(-1)


def half_mean_difference(mixture: UnivariateMixture) -> Tensor:
    """Compute half the expected distance of two independent draws, ``(*batch)``."""
    arguments = torch.broadcast_tensors(mixture.logits.exp(), mixture.locs, mixture.scale)
    closed = mixture.law.half_mean_difference(*arguments)
    return mean_difference_by_quadrature(mixture.law, *arguments) if closed is None else closed


def mean_difference_by_quadrature(law: Law, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    r"""Compute half the expected distance of two draws by quadrature, for laws without a closed form.

    .. math:: \tfrac12 \sum_{kl} w_k w_l \, E|Y_k - Y_l|, \qquad E|Y_k - Y_l| = E[a_l(Y_k)], \quad a_l(y) = E|Y_l - y|

    The expectation is over the narrower component of each pair, because :math:`a_l` of the wider component is smooth on
    that scale. It is computed by Gauss-Legendre quadrature on each side of the median of the narrower component.

    Args:
        law: Law of the components.
        weights: Weights of the components, ``(*batch, K)``.
        locs: Locations.
        scale: Scales.
    """
    nodes, masses = _nodes(law, locs)
    columns = law.map(lambda t, n: t.unsqueeze(-1))
    total = torch.zeros_like(locs[..., 0])
    for k in range(locs.shape[-1]):
        own = law.map(lambda t, n, k=k: _component(t, k).unsqueeze(-1))
        own_nodes, own_loc, own_scale = _component(nodes.mT, k).mT, locs[..., k, None, None], scale[..., k, None, None]
        narrow = own_scale <= scale.unsqueeze(-1)
        points = torch.where(narrow, own_loc + own_scale * own_nodes, locs.unsqueeze(-1) + scale.unsqueeze(-1) * nodes)
        of_others = _distance(columns, points, locs.unsqueeze(-1), scale.unsqueeze(-1))
        of_this = _distance(own, points, own_loc, own_scale)
        expected = (torch.where(narrow, of_others, of_this) * masses).sum(-1)
        total = total + weights[..., k] * (weights * expected).sum(-1)
    return 0.5 * total


def _distance(law: Law, points: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    return scale * law.mean_distance((points - locs) / scale)


def _component(tensor: Tensor, k: int) -> Tensor:
    """Select component k along the last dimension, which is kept; a dimension of 1 is shared by all components."""
    return tensor if tensor.shape[-1] == 1 else tensor[..., k : k + 1]


def _nodes(law: Law, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute nodes ``(*batch, K | 1, P)``, quantiles that follow the shape of the law, with probabilities ``(P,)``."""
    x, w = np.polynomial.legendre.leggauss(_POINTS[like.dtype])
    reach = math.sqrt(-2 * math.log(torch.finfo(like.dtype).eps))
    normal = like.new_tensor(0.5 * reach * (x - 1))  # standard normal quantiles below the median
    masses = like.new_tensor(0.5 * reach * w) * torch.exp(-0.5 * normal.square()) / math.sqrt(2 * math.pi)
    spread = law.map(lambda t, n: t.unsqueeze(-1))
    levels = 0.5 * erfc(-math.sqrt(0.5) * normal)  # instead of ndtr, which rounds to multiples of eps
    lower, upper = (side.followed_quantile(levels) for side in (spread, spread.mirrored()))
    nodes = torch.cat([lower, -upper.flip(-1)], -1)
    return nodes if nodes.ndim > 1 else nodes.unsqueeze(0), torch.cat([masses, masses.flip(-1)])
