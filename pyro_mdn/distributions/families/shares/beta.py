r"""Beta components: how raw channels of a network become means and concentrations of shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mdn.distributions.families.family import Family, require_uncorrelated
from pyro_mdn.distributions.families.shares.beta_components import BetaLogitComponents
from pyro_mdn.distributions.families.shares.beta_law import BetaLogitLaw
from pyro_mdn.distributions.families.shares.share_units import Shares

__all__ = ["Beta"]

_RANGE = 30.0
"""Largest logit of a mean."""

_WIDEST = 10.0
"""Largest scale: the concentration is 0.01 at least."""

_START = 0.5
"""Largest scale at the start."""


@dataclass(frozen=True)
class Beta(Family):
    r"""Beta components with independent outputs, for shares, and with other ends for percentages.

    .. math:: p_k(y) = \prod_d \frac{y_d^{m_{kd} n_{kd} - 1} (1 - y_d)^{(1 - m_{kd}) n_{kd} - 1}}
                       {B(m_{kd} n_{kd}, (1 - m_{kd}) n_{kd})}, \qquad n_{kd} = \sigma_{kd}^{-2}

    The logits of the means m are the locations. The noise model says where the scales σ come from, and which of them
    are shared. The variance is :math:`m (1 - m) / (1 + n)`, close to :math:`m (1 - m) \sigma^2` for small scales.

    Concentrations n stay between 0.01 and ``min_scale`` to the power of -2, which is 1e6 by default, and logits of
    means between -30 and 30. Therefore the density of the logit of y is bounded, and no component becomes a point mass:
    neither at a value that repeats, nor at an end, where the density of y may be infinite.

    Targets lie between the ends. Values at an end are refused, because their density may be infinite; rounded ones are
    :meth:`Targets.cells <pyro_mdn.Targets.cells>`.

    Args:
        noise: Noise model of the scales, without correlations.
        low: Lower end of the targets.
        high: Upper end of the targets.

    Raises:
        ValueError: If the noise model correlates the outputs, or the ends are not finite and in ascending order.

    References:
        Ferrari & Cribari-Neto (2004), Beta regression for modelling rates and proportions.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, family=Beta(low=0, high=100))
    >>> percent = network.sample(torch.zeros(100, 1))
    >>> bool(((percent > 0) & (percent < 100)).all())
    True
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_uncorrelated(self.noise)
        Shares(self.low, self.high)  # an error for ends that are none

    @property
    def target_transform(self) -> Shares:
        return Shares(self.low, self.high)

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> BetaLogitComponents:
        location = locs.clamp(-_RANGE, _RANGE)
        scale = self.noise.build(blocks[0], locs.shape[-1], locs.new_ones(1)).stddev().clamp(max=_WIDEST)
        concentration = scale.square().reciprocal().expand(location.shape)
        return BetaLogitComponents(location, torch.ones_like(location), BetaLogitLaw(location, concentration))

    def start(self, scale: Tensor) -> list[Tensor]:
        # Logits of shares near one half have twice the scale as their standard deviation.
        return super().start((0.5 * scale).clamp(max=_START))

    def start_locs(self, centres: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Tensor:
        return centres.clamp(-_RANGE, _RANGE)
