r"""Units of targets that go through a warp before they are standardised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_mdn.distributions.units.units import StandardUnits, Units
from pyro_mdn.distributions.units.warped import WarpedComponents, require_inside
from pyro_mdn.distributions.units.warps import Warp

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["WarpedUnits"]


class WarpedUnits(Units):
    """The map from standardised units to the real line, and from there by the inverse of a warp to the units of y.

    Args:
        standard: Map from standardised units to the real line.
        warp: Map from the units of y to the real line.
        plain: Class of mixtures that have any components.
    """

    __slots__ = ("standard", "warp")
    is_affine: ClassVar[bool] = False

    def __init__(self, standard: StandardUnits, warp: Warp) -> None:
        self.standard, self.warp = standard, warp

    def standardize(self, y: Tensor) -> Tensor:
        if is_validation_enabled():
            require_inside(self.warp, y, "y")
        return self.standard.standardize(self.to_line(y))

    def standardize_limits(self, limit: Tensor) -> Tensor:
        return self.standard.standardize(self.warp.clamped(limit.unsqueeze(-2)).squeeze(-2))

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        points = y.unsqueeze(-2)
        if observed is None:
            return self.standard.log_volume(y) - self.warp.log_slope(points).sum((-2, -1))
        known = observed.unsqueeze(-2)
        points = torch.where(known, points, self.warp.inverse(torch.zeros_like(points)))
        slopes = self.warp.log_slope(points).masked_fill(~known, 0.0).sum((-2, -1))
        return self.standard.log_volume(y, observed=observed) - slopes

    def push(self, mixture: Mixture) -> Mixture:
        from pyro_mdn.distributions.mixture import Mixture as AnyMixture

        line = self.standard.push(mixture)
        warped = AnyMixture.__new__(AnyMixture)
        warped._set(line.logits, WarpedComponents(line.components, self.warp), line.validates)
        return warped

    @property
    def unit(self) -> Tensor:
        return self.standard.unit

    def tensors(self) -> list[Tensor]:
        return [*self.standard.tensors(), *self.warp.tensors()]

    def to_line(self, y: Tensor) -> Tensor:
        return self.warp.forward(y.unsqueeze(-2)).squeeze(-2)

    def from_line(self, w: Tensor) -> Tensor:
        return self.warp.within(self.warp.inverse(w.unsqueeze(-2))).squeeze(-2)

    def inside(self, y: Tensor) -> Tensor:
        return self.warp.contains(y.unsqueeze(-2)).squeeze(-2)

    def slope(self, y: Tensor) -> Tensor:
        return self.warp.log_slope(y.unsqueeze(-2)).exp().squeeze(-2)

    def require_inside(self, y: Tensor, name: str, given: Any = None) -> None:
        require_inside(self.warp, y, name, given)
