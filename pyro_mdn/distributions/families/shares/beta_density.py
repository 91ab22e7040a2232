r"""The density of the logit of a beta-distributed share, without cancellation up to concentrations of 1e6."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_mdn.distributions.families.counts.log_probabilities import stirling_error

__all__ = ["log_beta_density"]

_FAR = 30.0
"""Difference of logits from which on exponentials are taken apart."""


def log_beta_density(z: Tensor, location: Tensor, concentration: Tensor) -> Tensor:
    r"""Log-density of the logit w of a share at :math:`w = \lambda + z`, for a mean with the logit λ.

    .. math:: \log p = \tfrac12 \log \frac{a b}{2 \pi n} - \delta(a) - \delta(b) + \delta(n) - n D, \qquad
              D = \log\left(1 + m (e^z - 1)\right) - m z

    with the mean m, the concentration n, :math:`a = m n`, :math:`b = (1 - m) n`, and the errors δ of Stirling's
    formula. D is the Kullback-Leibler divergence of a coin with the mean m from one with that share.

    Args:
        z: Differences of logits.
        location: Logits λ of means.
        concentration: Concentrations n.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities.
    """
    log_mean, log_rest = logsigmoid(location), logsigmoid(-location)
    log_height = 0.5 * (log_mean + log_rest + concentration.log() - math.log(2 * math.pi))
    sizes = log_mean.exp() * concentration, log_rest.exp() * concentration, concentration
    of_mean, of_rest, of_both = stirling_error(torch.stack(torch.broadcast_tensors(*sizes))).unbind(0)
    return log_height + of_both - of_mean - of_rest - concentration * _divergence(z, location)


def _divergence(z: Tensor, location: Tensor) -> Tensor:
    """Divergence D, from the end that is nearer to the mean, so that its terms cancel as little as the logit does."""
    above = location > 0
    z, location = torch.where(above, -z, z), torch.where(above, -location, location)
    mean = location.sigmoid()
    far = z > _FAR
    near = torch.log1p(mean * torch.expm1(torch.where(far, 0.0, z))) - mean * z
    beyond = torch.where(far, z, _FAR)
    apart = beyond + (mean + (1 - mean) * (-beyond).exp()).log() - mean * beyond
    return torch.where(far, apart, near)
