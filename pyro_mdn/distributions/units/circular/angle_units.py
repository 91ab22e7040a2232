r"""Units of targets of which some are angles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_mdn.distributions.observations.targets import INTERVAL, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.circular.circles import Circles, in_batch
from pyro_mdn.distributions.units.circular.wrapped import wrapped_components
from pyro_mdn.distributions.units.units import StandardUnits, Units
from pyro_mdn.distributions.units.warped_units import WarpedUnits

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["AngleUnits"]


class AngleUnits(Units):
    """The map of other units, whose results are angles for some outputs: whole turns of these do not matter.

    Args:
        line: Map from standardised units to the line; angles are standardised and no more.
        circles: Circles of the outputs.
    """

    __slots__ = ("circles", "line")
    is_affine: ClassVar[bool] = False
    has_angles: ClassVar[bool] = True

    def __init__(self, line: StandardUnits | WarpedUnits, circles: Circles) -> None:
        self.line, self.circles = line, circles

    @property
    def standard(self) -> StandardUnits:
        """The affine part of the map, whose shift is the mean direction of the training targets."""
        return self.line.standard if isinstance(self.line, WarpedUnits) else self.line

    def standardize(self, y: Tensor) -> Tensor:
        """Convert targets to standardised units, angles to those within half a turn of 0."""
        if is_validation_enabled():
            self.circles.require_inside(y, "y")  # the other outputs are checked by the map to the line
        return self.line.standardize(self.circles.around(y, self.standard.shift))

    def images(self, y: Tensor, batch_dims: int) -> Tensor:
        if is_validation_enabled():
            self.circles.require_inside(y, "y")  # the other outputs are checked by the map to the line
        return self.circles.images(self.line.standardize(in_batch(y, batch_dims)), self.unit)

    def nearest(self, locs: Tensor) -> Tensor:
        shift, unit = self.standard.shift.unsqueeze(-2).to(locs), self.unit.unsqueeze(-2).to(locs)
        centres = (self.circles.centres(locs) - shift) / unit
        return self.circles.around(locs, centres, self.circles.periods(locs) / unit)

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        return self.line.log_volume(y, observed=observed)

    def push(self, mixture: Mixture) -> Mixture:
        line = self.line.push(mixture)
        return line.of_any_family(wrapped_components(line.components, self.circles))

    @property
    def unit(self) -> Tensor:
        return self.line.unit

    def tensors(self) -> list[Tensor]:
        return self.line.tensors()

    def to_line(self, y: Tensor) -> Tensor:
        return self.line.to_line(y)

    def from_line(self, w: Tensor) -> Tensor:
        return self.circles.wrap(self.line.from_line(w))

    def inside(self, y: Tensor) -> Tensor:
        return self.line.inside(y) & self.circles.inside(y)

    def slope(self, y: Tensor) -> Tensor | float:
        return self.line.slope(y)

    def steady(self, moved: Targets, y: Targets) -> Targets:
        """Put intervals of angles back after noise, which may have moved their ends to different turns."""
        kept = self.circles.is_angle(y.lower) & (y.kinds() == INTERVAL)
        return Targets(torch.where(kept, y.lower, moved.lower), torch.where(kept, y.upper, moved.upper))

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        self.circles.require_inside(y, name, given)
        self.line.require_inside(y, name, given)
