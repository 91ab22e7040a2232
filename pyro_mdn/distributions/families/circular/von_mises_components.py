r"""Components with independent outputs that are angles with von Mises laws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import VonMises

from pyro_mdn.distributions.families.circular.von_mises_law import VonMisesLaw
from pyro_mdn.distributions.families.components import OutputsInOrder, not_closed
from pyro_mdn.distributions.families.location_scale import IndividualComponents
from pyro_mdn.tensors.tensor_batch import nested

__all__ = ["VonMisesComponents"]

_LEAST = 1e-12
"""Concentration below which draws are uniform."""


@dataclass(frozen=True, eq=False)
class VonMisesComponents(IndividualComponents):
    r"""Components with independent outputs that are angles.

    .. math:: p_k(y) = \prod_d \frac{e^{\kappa_{kd} \cos((y_d - \mu_{kd}) / u_d)}}{2\pi u_d \, I_0(\kappa_{kd})}

    The density is that of one turn, wherever it is: angles need no images.

    Args:
        locs: Mean directions, shape ``(*batch, K, D)``.
        scale: Size u of a radian, shape ``(*batch, K, D)``.
        standard: Law of angles in radians.
    """

    is_circular: ClassVar[bool] = True

    standard: VonMisesLaw = nested()

    def draw(self) -> Tensor:
        concentration = self.standard.concentration.clamp(min=_LEAST).expand(self.locs.shape)
        angle = VonMises(torch.zeros_like(concentration), concentration, validate_args=False).sample()
        return self.locs + self.scale * angle

    def widen(self, factor: Tensor) -> Self:
        """Divide the concentrations by the square of a factor, as that of the scales of narrow components."""
        return replace(self, standard=self.standard.map(lambda t, n: t / factor.square()))

    def in_order(self) -> OutputsInOrder:
        not_closed("outputs in order", self, "marginals are, since outputs of a component are independent")

    def validate(self) -> None:
        super().validate()
        concentration = self.standard.concentration
        if not bool(((concentration >= 0) & concentration.isfinite()).all()):
            raise ValueError("concentration: expected finite numbers, none negative")
