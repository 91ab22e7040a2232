r"""Expected distances under univariate mixtures, of which the continuous ranked probability score is made."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.tensors.univariate import Law, UnivariateMixture

__all__ = ["distance_to", "half_mean_difference", "mean_difference_by_quadrature"]

_POINTS = {torch.float64: 40, torch.float32: 20}  # on each side of the median


def distance_to(mixture: UnivariateMixture, value: Tensor) -> Tensor:
    """Expected distance E|Y - y| from values ``(*batch)``."""
    z = (value.unsqueeze(-1) - mixture.locs) / mixture.scale
    return (mixture.logits.exp() * mixture.scale * mixture.law.mean_distance(z)).sum(-1)


def half_mean_difference(mixture: UnivariateMixture) -> Tensor:
    """Half the expected distance of two independent draws, ``(*batch)``."""
    arguments = torch.broadcast_tensors(mixture.logits.exp(), mixture.locs, mixture.scale)
    closed = mixture.law.half_mean_difference(*arguments)
    return mean_difference_by_quadrature(mixture.law, *arguments) if closed is None else closed


def mean_difference_by_quadrature(law: Law, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    r"""Half the expected distance of two draws, for laws without a closed form.

    .. math:: \tfrac12 \sum_{kl} w_k w_l \, E|Y_k - Y_l|, \qquad E|Y_k - Y_l| = E[a_l(Y_k)], \quad a_l(y) = E|Y_l - y|

    The expectation is over the narrower component of a pair, for which :math:`a_l` is smooth, by Gauss-Legendre
    quadrature on each side of its median.

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
    """Component k along the last dimension, which may be shared and which stays."""
    return tensor if tensor.shape[-1] == 1 else tensor[..., k : k + 1]


def _nodes(law: Law, like: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles ``(*batch, K | 1, P)`` with their probabilities ``(P,)``, dense where the law needs it."""
    x, w = np.polynomial.legendre.leggauss(_POINTS[like.dtype])
    reach = math.sqrt(-2 * math.log(torch.finfo(like.dtype).eps))
    normal = like.new_tensor(0.5 * reach * (x - 1))  # standard normal quantiles below the median
    probabilities = 0.5 * torch.erfc(-math.sqrt(0.5) * normal)  # ndtr underflows here
    masses = like.new_tensor(0.5 * reach * w) * torch.exp(-0.5 * normal.square()) / math.sqrt(2 * math.pi)
    spread = law.map(lambda t, n: t.unsqueeze(-1))
    lower, upper = (side.followed_quantile(probabilities) for side in (spread, spread.mirrored()))
    nodes = torch.cat([lower, -upper.flip(-1)], -1)
    return nodes if nodes.ndim > 1 else nodes.unsqueeze(0), torch.cat([masses, masses.flip(-1)])
