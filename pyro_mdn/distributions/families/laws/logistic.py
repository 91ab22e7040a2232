r"""Logistic components: tails a little heavier than normal ones, and distribution functions in elementary functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_mdn.distributions.families.location_scale import LocationScale
from pyro_mdn.tensors.univariate import Law, SymmetricLaw

__all__ = ["Logistic", "LogisticLaw"]


@dataclass(frozen=True, eq=False)
class LogisticLaw(SymmetricLaw):
    r"""Standard logistic law, whose cdf is the sigmoid function :math:`s`.

    .. math:: p(z) = s(z) \, s(-z), \qquad E|Z - z| = -\log p(z)
    """

    def log_density(self, z: Tensor) -> Tensor:
        return logsigmoid(z) + logsigmoid(-z)

    def slope(self, z: Tensor) -> Tensor:
        return -torch.tanh(0.5 * z)

    def cdf(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def log_cdf(self, z: Tensor) -> Tensor:
        return logsigmoid(z)

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        # s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)) has no difference of nearly equal numbers.
        return logsigmoid(half + centre) + logsigmoid(half - centre) + torch.log(-torch.expm1(-2 * half))

    def quantile(self, q: Tensor) -> Tensor:
        # Near the median the two logarithms would cancel.
        return torch.where(q > 0.25, -2 * torch.atanh(1 - 2 * q), q.log() - torch.log1p(-q))

    def mean_distance(self, z: Tensor) -> Tensor:
        return -self.log_density(z)

    def mean_below(self, z: Tensor) -> Tensor:
        return -logsigmoid(-z)  # torch's softplus is linear from 20 on

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        return scale.squeeze(-1) if locs.shape[-1] == 1 else None

    def stddev(self) -> float:
        return math.pi / math.sqrt(3)


@dataclass(frozen=True)
class Logistic(LocationScale):
    r"""Logistic components with independent outputs, whose tails are between those of normal and Laplace components.

    .. math:: p_k(y) = \prod_d \frac{e^{-z_d}}{\sigma_{kd} (1 + e^{-z_d})^2}, \qquad
              z_d = \frac{y_d - \mu_{kd}}{\sigma_{kd}}

    The standard deviations are :math:`\pi \sigma_{kd} / \sqrt{3}`.

    Args:
        noise: Noise model of the scales :math:`\sigma_{kd}`, without correlations.

    Raises:
        ValueError: If the noise model correlates the outputs.

    References:
        Johnson, Kotz & Balakrishnan (1995), Continuous Univariate Distributions, volume 2, chapter 23.

    >>> Logistic()
    Logistic(noise=Diagonal(tied=False, homoscedastic=False, min_scale=0.001))
    """

    law: ClassVar[Law] = LogisticLaw()
