r"""Von Mises components: how raw channels of a network become mean directions and concentrations, and their density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.diagonal import RawDiagonalWhitening
from pyro_mdn.distributions.families.circular.concentrations import bessel_and_lost, log_scaled_bessel
from pyro_mdn.distributions.families.circular.von_mises_components import VonMisesComponents
from pyro_mdn.distributions.families.circular.von_mises_law import VonMisesLaw
from pyro_mdn.distributions.families.family import Family, require_uncorrelated
from pyro_mdn.distributions.units.circular.angles import Angle
from pyro_mdn.distributions.units.compound_transforms import as_transform
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.tensors.mixture_density import Kernel
from pyro_mdn.tensors.numerics import positive

__all__ = ["RawVonMisesKernel", "VonMises"]


@dataclass(frozen=True)
class VonMises(Family):
    r"""Von Mises components of independent outputs that are all angles: the normal distribution of the circle.

    .. math:: p_k(y) = \prod_d \frac{e^{\kappa_{kd} \cos(y_d - \mu_{kd})}}{2\pi I_0(\kappa_{kd})}, \qquad
              \kappa_{kd} = \sigma_{kd}^{-2}

    with angles in radians. The noise model says where the scales σ come from, and which of them are shared. A narrow
    component is close to a normal one with the standard deviation σ; a wide one approaches the uniform distribution.
    Targets are angles in radians, between -π and π, unless ``target_transform`` of the network says otherwise, such as
    ``Angle(360, low=0)`` for degrees. At most two outputs of a network may be angles.

    Args:
        noise: Noise model of the scales, without correlations. Its ``min_scale`` bounds the concentrations: they are at
            most 1e6 by default.

    Raises:
        ValueError: If the noise model correlates the outputs.

    References:
        Mardia & Jupp (2000), Directional statistics.
        Bishop & Nabney (1996), Modeling conditional probability distributions for periodic variables.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, family="von_mises")
    >>> network(torch.zeros(3, 1)).mean.abs().max() <= math.pi
    tensor(True)
    """

    is_circular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_uncorrelated(self.noise)

    def transform_for(
        self, given: TargetTransform | str | Sequence[TargetTransform | str | None] | None, dim: int
    ) -> TargetTransform:
        transform = Angle() if given is None else as_transform(given)
        circles = transform.circles(dim)
        if circles is None or len(circles.angles) < dim:
            expected = "angles for all outputs, such as 'angle' or Angle(360, low=0),"
            raise ValueError(f"target_transform: expected {expected} beside {self}, got {transform}")
        if self.noise.common_unit and len({circle.period for circle in circles.of_outputs if circle is not None}) > 1:
            raise ValueError(f"target_transform: expected one period for all outputs beside {self}, got {transform}")
        return transform

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> VonMisesComponents:
        scale = self.noise.build(blocks[0], locs.shape[-1], unit).stddev()
        return VonMisesComponents(locs, torch.ones_like(locs), VonMisesLaw(scale.square().reciprocal()))

    @property
    def kernel(self) -> Kernel | None:
        whitening = self.noise.whitening
        return RawVonMisesKernel(whitening.min_scale) if isinstance(whitening, RawDiagonalWhitening) else None


@dataclass(frozen=True)
class RawVonMisesKernel(Kernel):
    """Kernel of von Mises components from the raw channels of scales.

    Attributes:
        min_scale: Smallest scale.
    """

    is_circular: ClassVar[bool] = True

    min_scale: float

    def constant(self, dim: int) -> float:
        return -math.log(2 * math.pi) * dim

    def log_density(self, residual: Tensor, *factors: Tensor) -> Tensor:
        (raw,) = factors
        concentration = positive(raw, self.min_scale).square().reciprocal()
        versine = 2 * (0.5 * residual).sin().square()
        return -(concentration * versine + log_scaled_bessel(concentration)).sum(0)

    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        (raw,) = factors
        scale = positive(raw, self.min_scale)
        concentration = scale.square().reciprocal()
        versine = 2 * (0.5 * residual).sin().square()
        log_bessel, lost = bessel_and_lost(concentration)
        joint = log_weights - (concentration * versine + log_bessel).sum(0)
        for_raw = (versine - lost) * (2 * concentration / scale * raw.sigmoid())
        return joint, [residual.sin() * -concentration, for_raw]

    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        places = out or (None, None)
        return tuple(
            torch.mul(weight, slope, out=place if place is not None and place.shape == slope.shape else None)
            for slope, place in zip(kept, places, strict=True)
        )
