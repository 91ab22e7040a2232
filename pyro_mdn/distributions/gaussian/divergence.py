r"""Kullback-Leibler divergence between mixtures, which has no closed form: an approximation and an estimate.

``torch.distributions.kl_divergence`` takes only mixtures of one component, for which it is exact. For others it raises
``NotImplementedError``, and Pyro's ``TraceMeanField_ELBO`` then estimates the term from draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_mdn.distributions.families.components import not_closed
from pyro_mdn.distributions.gaussian.mixture import GaussianMixture
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.precision import in_widest_precision

__all__ = ["kl_monte_carlo", "kl_variational_approximation"]


@in_widest_precision
def kl_variational_approximation(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    r"""Compute a variational approximation, not a bound, of :math:`\mathrm{KL}(p \Vert q)` in nats, ``(*batch,)``.

    .. math:: \sum_k w_k \log \frac{\sum_{k'} w_{k'} e^{-\mathrm{KL}(p_k \Vert p_{k'})}}
              {\sum_l v_l e^{-\mathrm{KL}(p_k \Vert q_l)}}

    The approximation is exact for one component each, and zero for equal mixtures. Otherwise it may be negative, so
    ``torch.distributions.kl_divergence`` does not return it then.

    Raises:
        ValueError: If the numbers of outputs differ.
        NotImplementedError: If components are not normal.

    References:
        Hershey & Olsen (2007), Approximating the Kullback Leibler divergence between Gaussian mixture models.
    """
    _check_pair(p, q)
    for mixture in (p, q):
        if not isinstance(mixture, GaussianMixture):
            not_closed("kl_variational_approximation", mixture.components, "kl_monte_carlo estimates it from draws")
    own = (p.logits.unsqueeze(-2) - _component_kl(p, p)).logsumexp(-1)
    other = (q.logits.unsqueeze(-2) - _component_kl(p, q)).logsumexp(-1)
    return (p.logits.exp() * (own - other)).sum(-1)


@in_widest_precision
def kl_monte_carlo(p: Mixture, q: Mixture, *, num_samples: int = 10_000) -> tuple[Tensor, Tensor]:
    r"""Estimate :math:`\mathrm{KL}(p \Vert q)` from draws of p, with pathwise gradients; also its standard error.

    Raises:
        ValueError: If the numbers of outputs differ, or if there are fewer than 2 draws.
    """
    _check_pair(p, q)
    if num_samples < 2:
        raise ValueError(f"num_samples: expected 2 at least, got {num_samples}")
    draws = p.rsample((num_samples,))
    ratio = p.log_prob(draws) - q.log_prob(draws)
    return ratio.mean(0), ratio.std(0) / math.sqrt(num_samples)


@register_kl(GaussianMixture, GaussianMixture)
def _kl_of_single_components(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    if p.n_components > 1 or q.n_components > 1:
        got = f"{p.n_components} and {q.n_components}: kl_monte_carlo and kl_variational_approximation take any number"
        raise NotImplementedError(f"kl_divergence: expected mixtures of one component, got {got}")
    return kl_variational_approximation(p, q)


def _component_kl(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """Compute the divergence of each component of p from each of q, shape ``(*batch, K, L)``."""
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(batch), q.expand(batch)
    half_log_det = p.covariance.half_log_det().expand(*p.batch_shape, p.n_components)
    root = p.covariance.root()
    roots = root.expand(*p.batch_shape, p.n_components, *root.shape[-2:])
    columns = []
    for k in range(p.n_components):
        images = q.covariance.whiten(roots[..., k, :, :].movedim(-1, 0).unsqueeze(-2))
        apart = q.covariance.whiten(p.locs[..., k, None, :] - q.locs)
        quadratic = images.square().sum(-1).sum(0) + apart.square().sum(-1)
        columns.append(0.5 * (quadratic - p.dim) + q.covariance.half_log_det() - half_log_det[..., k, None])
    return torch.stack(torch.broadcast_tensors(*columns), -2)


def _check_pair(p: Mixture, q: Mixture) -> None:
    if p.dim != q.dim:
        raise ValueError(f"kl: expected mixtures over equally many outputs, got {p.dim} and {q.dim}")
