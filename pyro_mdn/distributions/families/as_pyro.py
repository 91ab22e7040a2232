r"""Conversion of normal components to Pyro's own distributions, by the structure of their covariances."""

from __future__ import annotations

from functools import singledispatch

import pyro.distributions as dist
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.distributions.covariance.diagonal import DiagonalCovariance, IsotropicCovariance
from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.covariance.low_rank import LowRankCovariance

__all__ = ["normal_components"]


@singledispatch
def normal_components(covariance: Covariance, locs: Tensor) -> dist.TorchDistribution:
    """Build Pyro's distribution of components, ``batch_shape`` ``(*batch, K)``, for covariances of that batch shape.

    Raises:
        NotImplementedError: If no distribution is known for the class of the covariances.
    """
    raise NotImplementedError(f"no Pyro distribution is known for {type(covariance).__name__}")


@normal_components.register
def _(covariance: FullCovariance, locs: Tensor) -> dist.TorchDistribution:
    return dist.MultivariateNormal(locs, scale_tril=covariance.scale_tril(), validate_args=False)


@normal_components.register
def _(covariance: DiagonalCovariance, locs: Tensor) -> dist.TorchDistribution:
    return dist.Normal(locs, covariance.scale, validate_args=False).to_event(1)


@normal_components.register
def _(covariance: IsotropicCovariance, locs: Tensor) -> dist.TorchDistribution:
    return dist.Normal(locs, covariance.scale.unsqueeze(-1), validate_args=False).to_event(1)


@normal_components.register
def _(covariance: LowRankCovariance, locs: Tensor) -> dist.TorchDistribution:
    variance = covariance.scale.square()
    return dist.LowRankMultivariateNormal(locs, covariance.factor, variance, validate_args=False)
