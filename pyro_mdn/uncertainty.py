r"""Aleatoric uncertainty (noise) and epistemic uncertainty (what the data leave open), from draws of the weights.

All functions take mixtures of ``batch_shape`` ``(S, *batch)``. The first dimension has S draws of the weights from a
posterior, or S members of an ensemble, all equally likely. Their average density is ``mixture.pool(0)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.special import entr

from pyro_mdn.distributions.covariance.low_rank import low_rank_capacitance
from pyro_mdn.distributions.families.components import not_closed
from pyro_mdn.distributions.gaussian.mixture import GaussianMixture
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.scores import Estimate
from pyro_mdn.support.checks import require_counts

__all__ = ["aleatoric_variance", "epistemic_variance", "mutual_information", "mutual_information_bounds"]

M = TypeVar("M", bound=Mixture)

_ELEMENTS = 2**20
"""Numbers in the largest tensor at a time, unless a single row of the batch needs more."""

_OF_ANGLES = "variances of directions do not add up; mutual_information estimates what weights and y share"


def aleatoric_variance(mixture: Mixture) -> Tensor:
    r"""Compute the variance of each output that remains if the weights are known, shape ``(*batch, D)``.

    .. math:: E_s[\mathrm{Var}(y \mid s)]

    By the law of total variance, aleatoric and :func:`epistemic_variance` add up to the variance of the pooled mixture.
    ``mixture.split_variance`` gives both as matrices.

    Args:
        mixture: Mixtures by S draws of the weights, ``batch_shape`` ``(S, *batch)``.

    Raises:
        ValueError: If the mixture has no batch dimension, or there are no draws.

    References:
        Depeweg, Hernández-Lobato, Doshi-Velez & Udluft (2018), Decomposition of uncertainty in Bayesian deep learning
        for efficient and risk-sensitive learning.

    >>> from pyro_mdn import DiagonalCovariance
    >>> locs, covariance = torch.tensor([[[-1.0]], [[1.0]]]), DiagonalCovariance(torch.tensor([[3.0]]))
    >>> mixture = GaussianMixture(torch.zeros(2, 1), locs, covariance)
    >>> aleatoric_variance(mixture), epistemic_variance(mixture), mixture.pool(0).variance
    (tensor([9.]), tensor([1.]), tensor([10.]))
    """
    _check_draws(mixture)
    mixture.components.require_line("aleatoric_variance", _OF_ANGLES)
    return mixture.variance.mean(0)


def epistemic_variance(mixture: Mixture) -> Tensor:
    r"""Compute the variance of each output's mean over the draws of the weights, shape ``(*batch, D)``.

    .. math:: \mathrm{Var}_s(E[y \mid s])

    Draws that have the same mean and differ otherwise have no epistemic variance; :func:`mutual_information` sees them.

    Args:
        mixture: Mixtures by S draws of the weights, ``batch_shape`` ``(S, *batch)``.

    Raises:
        ValueError: If the mixture has no batch dimension, or there are no draws.

    References:
        Depeweg, Hernández-Lobato, Doshi-Velez & Udluft (2018), Decomposition of uncertainty in Bayesian deep learning
        for efficient and risk-sensitive learning.
    """
    _check_draws(mixture)
    mixture.components.require_line("epistemic_variance", _OF_ANGLES)
    return mixture.mean.var(0, correction=0)


@torch.no_grad()
def mutual_information(mixture: Mixture, *, num_samples: int = 1000) -> Estimate:
    r"""Estimate the mutual information of weights and y in nats, with its standard error, ``(*batch,)`` each.

    .. math:: I(y; s) = H\Big[\frac1S \sum_s p_s\Big] - \frac1S \sum_s H[p_s]
              = E_y\Big[\log S - H[s \mid y]\Big] \in [0, \log S]

    This is the information that one observation of y is expected to give about the weights: the entropy of the average
    prediction less the mean entropy of the predictions. It is invariant under invertible maps of y. Active learning
    that labels the rows with the largest mutual information is known as BALD.

    The Monte Carlo estimate draws equally many y from each of the S mixtures. Each draw contributes the information
    about which mixture it came from, a number in :math:`[0, \log S]`. The estimate is not differentiable; the bounds
    of :func:`mutual_information_bounds` are.

    Args:
        mixture: Mixtures by S draws of the weights, ``batch_shape`` ``(S, *batch)``.
        num_samples: Number of draws of y in total, rounded up so that each of the S mixtures has equally many, and at
            least two.

    Raises:
        ValueError: If the mixture has no batch dimension, if there are no draws of the weights, or if ``num_samples``
            is not a positive integer.

    References:
        Houlsby, Huszár, Ghahramani & Lengyel (2011), Bayesian active learning for classification and preference
        learning.
        Depeweg, Hernández-Lobato, Doshi-Velez & Udluft (2018), Decomposition of uncertainty in Bayesian deep learning
        for efficient and risk-sensitive learning.

    >>> from pyro_mdn import DiagonalCovariance
    >>> locs = torch.tensor([[[0.0]], [[100.0]]])
    >>> mixture = GaussianMixture(torch.zeros(2, 1), locs, DiagonalCovariance(torch.ones(1, 1)))
    >>> mutual_information(mixture).value  # two mixtures far apart: log 2
    tensor(0.6931)
    """
    _check_draws(mixture)
    require_counts(num_samples=num_samples)
    n_draws = mixture.batch_shape[0]
    each = max(2, math.ceil(num_samples / n_draws))
    per_row = n_draws**2 * mixture.n_components * mixture.dim
    gains = torch.cat([_information_gains(part, each) for part in _split(mixture, per_row)], -1)
    variance = (gains - gains.mean(0)).square().sum(0) / (each - 1)
    error = (variance.mean(0) / (each * n_draws)).sqrt()
    batch_shape = mixture.batch_shape[1:]
    return Estimate(gains.mean((0, 1)).reshape(batch_shape), error.reshape(batch_shape))


@in_widest_precision
def mutual_information_bounds(mixture: Mixture) -> tuple[Tensor, Tensor]:
    r"""Compute lower and upper bounds of the mutual information of weights and y in nats, ``(*batch,)`` each.

    The bounds are in closed form, differentiable, and cost :math:`O(S^2 K^2)`. With the index s of the draw and k of
    the component, both
    :math:`I(y; s) = I(y; (s, k)) - I(y; k \mid s)` and :math:`I(y; s) \le I(k; s) + I(y; s \mid k)`, where components
    of the same k are taken together. The information about a component is bounded by pairwise distances,

    .. math:: -\sum_i w_i \log \sum_j w_j \, e^{-B(i, j)} \le I(y; i) \le
              -\sum_i w_i \log \sum_j w_j \, e^{-\mathrm{KL}(i \Vert j)}

    with the Bhattacharyya distance B, and from above also by the entropy of the Gaussian with the same covariance.
    A second lower bound has the draws in place of i, because :math:`e^{-B}` of two mixtures is at most the sum over
    their components. The result has the tightest of these bounds, within :math:`[0, \log S]`. Equal draws give zeros.

    Args:
        mixture: Mixtures by S draws of the weights, ``batch_shape`` ``(S, *batch)``.

    Raises:
        ValueError: If the mixture has no batch dimension, or there are no draws.

    References:
        Kolchinsky & Tracey (2017), Estimating mixture entropy with pairwise distances.
        Huber et al. (2008), On entropy approximation for Gaussian mixture random vectors.

    >>> from pyro_mdn import DiagonalCovariance
    >>> locs = torch.tensor([[[0.0]], [[1.0]]])
    >>> mixture = GaussianMixture(torch.zeros(2, 1), locs, DiagonalCovariance(torch.ones(1, 1)))
    >>> mutual_information_bounds(mixture)
    (tensor(0.0605), tensor(0.1116))
    """
    _check_draws(mixture)
    if not isinstance(mixture, GaussianMixture):
        not_closed("mutual_information_bounds", mixture.components, "mutual_information estimates it from draws")
    n_draws, n_components, dim = mixture.batch_shape[0], mixture.n_components, mixture.dim
    per_row = n_draws * n_components * dim * (dim + 1) * n_components
    parts = [_bounds(part) for part in _split(mixture, per_row)]
    lower, upper = (torch.cat(part).reshape(mixture.batch_shape[1:]) for part in zip(*parts, strict=True))
    return lower, upper


def _check_draws(mixture: Mixture) -> None:
    if not mixture.batch_shape or mixture.batch_shape[0] == 0:
        shape = tuple(mixture.batch_shape)
        raise ValueError(f"mixture: expected batch_shape (S, *batch) with S > 0 draws of the weights, got {shape}")


def _split(mixture: M, per_row: int) -> Iterator[M]:
    """Yield mixtures ``(S, rows)`` with so few rows that ``per_row`` numbers for each fit into memory."""
    n_draws, *batch = mixture.batch_shape
    n_rows, size = math.prod(batch), max(1, _ELEMENTS // per_row)
    components = mixture.components.expand((*mixture.batch_shape, mixture.n_components))
    for start in range(0, max(1, n_rows), size):

        def rows(tensor: Tensor, start: int = start) -> Tensor:
            flat = tensor.reshape(n_draws, n_rows, *tensor.shape[1 + len(batch) :])
            return flat[:, start : start + size]

        yield mixture.reweighted(rows(mixture.logits), components.map(lambda t, n: rows(t)))


# Monte Carlo


def _information_gains(draws: Mixture, each: int) -> Tensor:
    """Draw ``each`` y from each mixture; information about which mixture they came from, ``(each, S, rows)``."""
    n_draws, n_rows = draws.batch_shape
    y = draws.sample((each,)).flatten(0, 1).unsqueeze(1)
    size = max(1, _ELEMENTS // max(1, draws.components.locs.numel()))
    remaining = [entr(draws.log_prob(some).softmax(1)).sum(1) for some in y.split(size)]
    gains = (math.log(n_draws) - torch.cat(remaining)).clamp(min=0)
    return gains.reshape(each, n_draws, n_rows)


# Bounds


def _bounds(draws: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Compute both bounds, ``(rows,)`` each, for ``batch_shape`` ``(S, rows)``."""
    n_draws = draws.batch_shape[0]
    pooled, by_component, within = draws.pool(0), _by_component(draws), draws.logits.movedim(0, 1)
    both, inside, whole, across = [], [], [], []
    for s in range(n_draws):
        weights, distances = within[:, s].exp(), _distances(draws, pooled, s)
        both.append(_average(weights, _information(pooled.logits.unsqueeze(1), distances.flatten(-2))))
        inside.append(_average(weights, _information(within[:, s].unsqueeze(1), distances[..., s, :])))
        affinity = 0.5 * within[:, s].unsqueeze(-1) + (0.5 * within.unsqueeze(1) - distances[0]).logsumexp(-1)
        whole.append(math.log(n_draws) - affinity.logsumexp(1).clamp(max=0).logsumexp(-1))
        across.append(_information(by_component.logits, distances[1].diagonal(dim1=1, dim2=3).mT))
    (both_low, both_high), (inside_low, inside_high) = torch.stack(both).mean(0), torch.stack(inside).unbind(1)
    inside_high = torch.minimum(inside_high, _gaussian_bound(draws)).mean(0)
    lower = torch.maximum(both_low - inside_high, torch.stack(whole).mean(0))
    # From above: components apart, or taken together over the draws.
    apart = torch.minimum(both_high, _gaussian_bound(pooled)) - inside_low.mean(0)
    across_high = _average(by_component.logits.exp(), torch.stack(across, -1))
    across_high = torch.minimum(across_high, _gaussian_bound(by_component))
    label, mean_weights = _surprise(within.exp()), within.exp().mean(1)
    together = (_surprise(mean_weights) - label.mean(1)).sum(-1) + _average(mean_weights, across_high)
    upper = torch.minimum(apart, together).clamp(0.0, math.log(n_draws))
    return torch.minimum(lower.clamp(min=0), upper), upper


def _by_component(draws: GaussianMixture) -> GaussianMixture:
    """Mixtures over the draws, one for each component: ``batch_shape`` ``(rows, K)``."""
    logits = draws.logits.movedim(0, -1)
    unused = (logits == -math.inf).all(-1, keepdim=True)
    return draws.reweighted(logits.masked_fill(unused, 0.0), draws.components.map(lambda t, n: t.movedim(0, 2)))


def _surprise(weights: Tensor) -> Tensor:
    """Compute -w log w, with finite gradients also at w = 0."""
    return -weights * weights.masked_fill(weights == 0, 1.0).log()


def _average(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(-1)


def _information(log_weights: Tensor, distances: Tensor) -> Tensor:
    """Compute -log Σ w exp(-distance): a bound of the information of a point about the index."""
    return -(log_weights - distances).logsumexp(-1)


def _gaussian_bound(mixture: GaussianMixture) -> Tensor:
    """Compute an upper bound of the information about the component: Gaussian entropy less that of components."""
    whole = mixture.as_gaussian().half_log_det().squeeze(-1)
    return whole - _average(mixture.logits.exp(), mixture.covariance.half_log_det())


def _distances(draws: GaussianMixture, pooled: GaussianMixture, s: int) -> Tensor:
    """Compute Bhattacharyya and KL distances of the components of draw s from all, ``(2, rows, K, S, K)``."""
    others = pooled.covariance.map(lambda t, n: t.unsqueeze(1))
    own = draws.covariance.map(lambda t, n: t[s].unsqueeze(2))
    apart = others.whiten(draws.locs[s].unsqueeze(2) - pooled.locs.unsqueeze(1))
    if others.is_diagonal:
        ratio = (own.stddev() / others.stddev()).square()
        trace, widening = ratio.sum(-1), 0.5 * ratio.log1p().sum(-1)
        pulled = apart / (1 + ratio).sqrt()
    else:
        images = others.whiten(own.root().movedim(-1, 0))
        capacitance = low_rank_capacitance(images.movedim(0, -2))
        trace, widening = images.square().sum((0, -1)), capacitance.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        pulled = torch.linalg.solve_triangular(capacitance, apart.unsqueeze(-1), upper=False).squeeze(-1)
    log_ratio = others.half_log_det() - own.half_log_det()
    kullback_leibler = 0.5 * (trace - draws.dim + apart.square().sum(-1)) + log_ratio
    bhattacharyya = 0.25 * pulled.square().sum(-1) + widening + 0.5 * log_ratio - 0.5 * draws.dim * math.log(2)
    both = torch.stack([bhattacharyya, kullback_leibler]).clamp(min=0)
    return both.unflatten(-1, (draws.batch_shape[0], draws.n_components))
