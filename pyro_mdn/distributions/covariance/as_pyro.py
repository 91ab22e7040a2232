r"""The components of a mixture as distributions of Pyro's own."""

from __future__ import annotations

from functools import singledispatch

import pyro.distributions as dist
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, DiagonalCovariance, IsotropicCovariance
from pyro_mdn.distributions.covariance.correlated import FullCovariance, LowRankCovariance

__all__ = ["components"]


@singledispatch
def components(covariance: Covariance, locs: Tensor) -> dist.Distribution:
    """Distribution of the components, ``batch_shape`` ``(*batch, K)``, for covariances of that shape, and means."""
    raise NotImplementedError(f"no Pyro distribution is known for {type(covariance).__name__}")


@components.register
def _(covariance: FullCovariance, locs: Tensor) -> dist.Distribution:
    return dist.MultivariateNormal(locs, scale_tril=covariance.scale_tril(), validate_args=False)


@components.register
def _(covariance: DiagonalCovariance, locs: Tensor) -> dist.Distribution:
    return dist.Normal(locs, covariance.scale, validate_args=False).to_event(1)


@components.register
def _(covariance: IsotropicCovariance, locs: Tensor) -> dist.Distribution:
    return dist.Normal(locs, covariance.scale.unsqueeze(-1), validate_args=False).to_event(1)


@components.register
def _(covariance: LowRankCovariance, locs: Tensor) -> dist.Distribution:
    variance = covariance.scale.square()
    return dist.LowRankMultivariateNormal(locs, covariance.factor, variance, validate_args=False)
