r"""Families of counts: how raw channels of a network become rates and spreads of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal
from pyro_mdn.distributions.families.counts.count_components import CountComponents
from pyro_mdn.distributions.families.counts.count_law import CountLaw, NegativeBinomialLaw, PoissonLaw
from pyro_mdn.distributions.families.family import Block, Family, require_uncorrelated
from pyro_mdn.distributions.units.count_units import Counts
from pyro_mdn.distributions.units.target_transforms import TargetTransform

__all__ = ["CountFamily", "NegativeBinomial", "Poisson"]

_RANGE = 30.0
"""Largest logarithm of a rate relative to the mean of the training targets."""

_LEAST = 0.05
"""Smallest rate at the start, relative to the mean of the training targets."""

_START = 0.5
"""Coefficient of variation of rates at the start."""


@dataclass(frozen=True)
class CountFamily(Family, by_name=False):
    """Base of families of counts, with independent outputs; a subclass says the :meth:`law` of one output.

    Locations are logarithms of rates, relative to the mean of the training targets.
    """

    @property
    def target_transform(self) -> TargetTransform:
        return Counts()

    @abstractmethod
    def law(self, rate: Tensor, blocks: Sequence[Tensor]) -> CountLaw:
        """Build the law of each output from rates ``(*batch, K, D)`` and the raw channels of each block."""

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> CountComponents:
        return CountComponents(self.law(unit.unsqueeze(-2) * locs.clamp(-_RANGE, _RANGE).exp(), blocks))

    def start_locs(self, centres: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Tensor:
        return (centres / unit).clamp(min=_LEAST).log()


@dataclass(frozen=True)
class Poisson(CountFamily):
    r"""Poisson components, for counts of independent events; a mixture of them is overdispersed.

    .. math:: p_k(y) = \prod_d \frac{\lambda_{kd}^{y_d}}{y_d!} e^{-\lambda_{kd}}

    Args:
        noise: Has no meaning for this family, which has no scales.

    Raises:
        ValueError: If a noise model is given.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, family="poisson")
    >>> network(torch.zeros(1, 1)).support
    IndependentConstraint(IntegerGreaterThan(lower_bound=0), 1)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise != Diagonal():
            raise ValueError(f"noise: expected none for Poisson, which has no scales, got {self.noise}")

    def blocks(self, dim: int) -> list[Block]:
        return []

    def start(self, scale: Tensor) -> list[Tensor]:
        return []

    def law(self, rate: Tensor, blocks: Sequence[Tensor]) -> PoissonLaw:
        return PoissonLaw(rate)


@dataclass(frozen=True)
class NegativeBinomial(CountFamily):
    r"""Negative binomial components, for counts that vary more than Poisson ones: rates have a gamma distribution.

    .. math:: y_{d} \sim \mathrm{Poisson}(\mu_{kd} \, g), \qquad g \sim \mathrm{Gamma}(r_{kd}, r_{kd}), \qquad
              r_{kd} = \sigma_{kd}^{-2}

    The variance is :math:`\mu + \mu^2 / r`. The noise model says where the coefficients of variation σ of the rates
    come from, and which of them are shared.

    Args:
        noise: Noise model of the coefficients of variation, without correlations.

    Raises:
        ValueError: If the noise model correlates the outputs.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_uncorrelated(self.noise)

    def start(self, scale: Tensor) -> list[Tensor]:
        return super().start(torch.full_like(scale, _START))

    def law(self, rate: Tensor, blocks: Sequence[Tensor]) -> NegativeBinomialLaw:
        spread = self.noise.build(blocks[0], rate.shape[-1], rate.new_ones(1)).stddev()
        return NegativeBinomialLaw(rate, spread.square().reciprocal())
