r"""Components with independent outputs that are shares with beta distributions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Gamma

from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.families.location_scale import IndividualComponents
from pyro_mdn.distributions.families.shares.beta_law import BetaLogitLaw
from pyro_mdn.distributions.units.warped import WarpedComponents
from pyro_mdn.distributions.units.warps import LogitWarp
from pyro_mdn.tensors.tensor_batch import nested

__all__ = ["BetaComponents", "BetaLogitComponents"]

_LEAST = 1e-30
"""Smallest uniform number, whose logarithm is finite."""


@dataclass(frozen=True, eq=False)
class BetaLogitComponents(IndividualComponents):
    r"""Components whose outputs are logits of shares with beta distributions.

    Args:
        locs: Logits of the mean shares, shape ``(*batch, K, D)``.
        scale: Size of a unit of the logits, shape ``(*batch, K, D)``: 1.
        standard: Law of logits, less those of the means.
    """

    standard: BetaLogitLaw = nested()

    def draw(self) -> Tensor:
        # Draws of one component have locations of their own, but share its law.
        a, b = (shape.expand(self.locs.shape) for shape in self.standard.shapes())
        return self.locs + self.scale * (_log_gamma(a) - _log_gamma(b) - self.standard.location)

    def widen(self, factor: Tensor) -> Self:
        """Divide the concentrations by the square of a factor; the means stay."""
        law = self.standard
        return replace(self, standard=replace(law, concentration=law.concentration / factor.square()))

    def validate(self) -> None:
        super().validate()
        location, concentration = self.standard.location, self.standard.concentration
        if not bool((location.isfinite() & concentration.isfinite() & (concentration > 0)).all()):
            raise ValueError("location, concentration: expected finite numbers, and positive concentrations")


def _log_gamma(shape: Tensor) -> Tensor:
    """Draw logarithms of gamma variables, which do not underflow however small the shapes are."""
    u = torch.rand_like(shape).clamp(min=_LEAST)
    return Gamma(shape + 1, torch.ones_like(shape), validate_args=False).rsample().log() + u.log() / shape


@dataclass(frozen=True, eq=False)
class BetaComponents(WarpedComponents):
    r"""Components with independent outputs :math:`l + (h - l) Y_d`, each Y a share with a beta distribution.

    Args:
        base: The logits of the shares, as :class:`BetaLogitComponents`.
        warp: The logit of numbers between l and h.
    """

    base: BetaLogitComponents = nested()

    def of_inner(self, inner: Components) -> WarpedComponents:
        return WarpedComponents(inner, self.warp)  # which may be truncated

    def mean(self) -> Tensor:
        low, size = self._range()
        return low + size * self.base.standard.location.sigmoid()

    def variance(self) -> Tensor:
        _, size = self._range()
        location, concentration = self.base.standard.location, self.base.standard.concentration
        return size.square() * location.sigmoid() * (-location).sigmoid() / (1 + concentration)

    def as_pyro(self) -> dist.TorchDistribution:
        if not (isinstance(self.warp, LogitWarp) and self.warp.interval == (0.0, 1.0)):
            return super().as_pyro()
        return dist.Beta(*self.base.standard.shapes(), validate_args=False).to_event(1)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Lower ends, and distances between the ends."""
        low, high = self.warp.limits(self.base.locs)
        return low, high - low
