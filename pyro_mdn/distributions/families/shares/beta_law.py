r"""The law of the logit of a beta-distributed share: density, distribution function and quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import digamma, polygamma

from pyro_mdn.distributions.families.shares.beta_density import log_beta_density
from pyro_mdn.distributions.families.shares.beta_tails import log_beta_cdf, lower_beta_quantile
from pyro_mdn.tensors.tensor_batch import stored
from pyro_mdn.tensors.univariate import Law

__all__ = ["BetaLogitLaw"]

_BENDS = (-36.0, -24.0, -16.0, -10.0, -6.0, -3.0, -1.0, 1.0, 3.0, 6.0, 10.0, 16.0, 24.0, 36.0)
"""Logits between which a share is smooth for quadrature."""


@dataclass(frozen=True, eq=False)
class BetaLogitLaw(Law):
    r"""Law of the logit of a share with a beta distribution, less the logit λ of its mean.

    .. math:: p(z) = \frac{y^{m n} (1 - y)^{(1 - m) n}}{B(m n, (1 - m) n)}, \qquad \log \frac{y}{1 - y} = \lambda + z

    On this line every density is bounded and smooth, also where that of the share is infinite at an end.

    Args:
        location: Logits λ of the means m, ``(*batch, K, D)``.
        concentration: Concentrations n, likewise.

    References:
        Ferrari & Cribari-Neto (2004), Beta regression for modelling rates and proportions.
    """

    location: Tensor = stored(1)
    concentration: Tensor = stored(1)

    def log_density(self, z: Tensor) -> Tensor:
        return log_beta_density(z, self.location, self.concentration)

    def slope(self, z: Tensor) -> Tensor:
        return (self.concentration * (self.location.sigmoid() - (self.location + z).sigmoid())).detach()

    def cdf(self, z: Tensor) -> Tensor:
        return self.log_cdf(z).exp()

    def log_cdf(self, z: Tensor) -> Tensor:
        return log_beta_cdf(z, self.location, self.concentration)

    def quantile(self, q: Tensor) -> Tensor:
        return lower_beta_quantile(q, self.location, self.concentration)

    def mean_distance(self, z: Tensor) -> Tensor:
        raise NotImplementedError("mean_distance: scores of shares are integrals in their own units; use scores.crps")

    def mirrored(self) -> Law:
        return BetaLogitLaw(-self.location, self.concentration)

    def mean(self) -> Tensor:
        a, b = self.shapes()
        return digamma(a) - digamma(b) - self.location

    def stddev(self) -> Tensor:
        a, b = self.shapes()
        return (polygamma(1, a) + polygamma(1, b)).sqrt()

    def shapes(self) -> tuple[Tensor, Tensor]:
        """Parameters a and b of the beta distribution."""
        return self.concentration * self.location.sigmoid(), self.concentration * (-self.location).sigmoid()

    def grid(self, like: Tensor) -> Tensor:
        """Points as those of other laws, and where shares bend as a function of their logits."""
        bends = like.new_tensor(_BENDS) - self.location.unsqueeze(-1)
        quantiles = super().grid(like)
        return torch.cat([quantiles, bends.expand(*quantiles.shape[:-1], -1)], -1).sort(-1).values
