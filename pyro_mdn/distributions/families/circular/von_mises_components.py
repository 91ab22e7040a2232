r"""Components with independent outputs that are angles with von Mises laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import VonMises

from pyro_mdn.distributions.families.circular.von_mises_law import VonMisesLaw
from pyro_mdn.distributions.families.components import OutputsInOrder, not_closed
from pyro_mdn.distributions.families.location_scale import IndependentComponents
from pyro_mdn.tensors.tensor_batch import nested
from pyro_mdn.tensors.univariate import Law

__all__ = ["VonMisesComponents"]

_LEAST = 1e-12
"""Concentration below which draws are uniform."""


@dataclass(frozen=True, eq=False)
class VonMisesComponents(IndependentComponents):
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

    def marginal(self, dims: Sequence[int]) -> Self:
        dims = list(dims)
        return replace(super().marginal(dims), standard=self.standard.map(lambda t, n: t[..., dims]))

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        return self.locs.mT, self.scale.mT, self.standard.map(lambda t, n: t.mT)

    def widen(self, factor: Tensor) -> Self:
        """Divide the concentrations by the square of a factor, as that of the scales of narrow components."""
        return replace(self, standard=self.standard.map(lambda t, n: t / factor.square()))

    def in_order(self) -> OutputsInOrder:
        not_closed("outputs in order", self, "marginals are, since outputs of a component are independent")

    def require_components(self, count: int) -> None:
        super().require_components(count)
        shape = self.standard.concentration.shape
        if len(shape) < 2 or shape[-2] not in (1, count):
            raise ValueError(f"concentration: expected a component axis of 1 or {count}, got {tuple(shape)}")

    def of_dim(self, dim: int) -> Self:
        if self.standard.concentration.shape[-1] != dim:
            raise ValueError(f"concentration: expected {dim} outputs, got {tuple(self.standard.concentration.shape)}")
        return super().of_dim(dim)

    def validate(self) -> None:
        super().validate()
        concentration = self.standard.concentration
        if not bool(((concentration >= 0) & concentration.isfinite()).all()):
            raise ValueError("concentration: expected finite numbers, none negative")

    def _law(self) -> Law:
        return self.standard
