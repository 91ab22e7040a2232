r"""Units of targets that go through a warp before they are standardised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.distributions.units.units import StandardUnits, Units, without_ends
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
    """

    __slots__ = ("standard", "warp")
    is_affine: ClassVar[bool] = False

    def __init__(self, standard: StandardUnits, warp: Warp) -> None:
        self.standard, self.warp = standard, warp

    def standardize(self, y: Tensor) -> Tensor:
        return self.standard.standardize(self.to_line(y))

    def standardize_limits(self, limit: Tensor) -> Tensor:
        return self.standard.standardize(self.warp.clamped(limit))

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        if observed is None:
            return self.standard.log_volume(y) - self.warp.log_slope(y).sum(-1)
        slopes = self.warp.log_slope(self.warp.some_inside(y, observed)).masked_fill(~observed, 0.0)
        return self.standard.log_volume(y, observed=observed) - slopes.sum(-1)

    def push(self, mixture: Mixture) -> Mixture:
        line = self.standard.push(mixture)
        warp = self.warp.of_components()
        return line.of_any_family(line.components.mapped(lambda components: WarpedComponents(components, warp)))

    @property
    def unit(self) -> Tensor:
        return self.standard.unit

    def tensors(self) -> list[Tensor]:
        return [*self.standard.tensors(), *self.warp.tensors()]

    def to_line(self, y: Tensor) -> Tensor:
        return self.warp.forward(y)

    def from_line(self, w: Tensor) -> Tensor:
        return self.warp.within(self.warp.inverse(w))

    def inside(self, y: Tensor) -> Tensor:
        return self.warp.contains(y)

    def slope(self, y: Tensor) -> Tensor:
        return self.warp.log_slope(y).exp()

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        require_inside(self.warp, y, name, given)

    def points(self, y: Targets) -> Tensor:
        points = y.points()
        return points.masked_fill(~self.inside(points), math.nan)

    def with_lower_ends(self) -> WarpedUnits:
        return _ClosedUnits(self.standard, self.warp)


class _ClosedUnits(WarpedUnits):
    """The same for targets that may be at the lower end of the support, where components have a point mass."""

    __slots__ = ()
    has_line: ClassVar[bool] = False
    has_cells: ClassVar[bool] = False

    def above(self, y: TargetsOrTensor) -> TargetsOrTensor:
        return without_ends(y, self.warp.limits(y.lower if isinstance(y, Targets) else y)[0])

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        super().require_inside(self.above(y), name, given)
