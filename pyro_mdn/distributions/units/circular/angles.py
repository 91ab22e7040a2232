r"""Target transform of angles, and units of targets of which some are angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import INTERVAL, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.circular.circles import Circle, Circles, in_batch, wrapped_into
from pyro_mdn.distributions.units.circular.wrapped import wrapped_components
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.distributions.units.units import StandardUnits, Units
from pyro_mdn.distributions.units.warped_units import WarpedUnits
from pyro_mdn.distributions.units.warps import IdentityWarp, Warp
from pyro_mdn.support.checks import require_numbers
from pyro_mdn.support.torch_compat import cached

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components
    from pyro_mdn.distributions.mixture import Mixture
    from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["Angle", "AngleUnits"]


@dataclass(frozen=True)
class Angle(TargetTransform):
    r"""Angles, such as directions, phases and times of the day: components are wrapped around a circle.

    With normal components, y is a mixture of wrapped normal distributions,

    .. math:: p(y) = \sum_k w_k \sum_{m=-3}^3 \mathcal{N}(y + m P \mid \mu_k, \sigma_k^2)

    which is exact to 1e-9 for scales of up to 3 radians. A wrapped normal is within 2 % of uniform there, so that no
    wider one is needed. Other families, of which some have heavier tails, lack the probability of more than three
    turns. At most two outputs of a network may be angles.

    Targets are angles from ``low`` to ``low + period``; both ends are the same angle. Intervals are arcs of one turn at
    most, which may go on beyond an end of the period: from 350 to 370 degrees, say. The shift of angles in standardised
    space is the circular mean of the training targets, and their unit is a radian. With isotropic noise all outputs
    share one unit: the root mean square of a radian and of the standard deviations of the outputs that are no angles.

    Args:
        period: Length of a turn in the units of y: 2π by default, 360 for degrees, 24 for hours of the day.
        low: Smallest angle, by default minus half the period.

    Raises:
        ValueError: If the period is not positive and finite, or the smallest angle is not finite.

    References:
        Mardia & Jupp (2000), Directional statistics.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, target_transform=Angle(period=24, low=0))
    >>> hours = network.sample(torch.zeros(100, 1))
    >>> bool(((hours >= 0) & (hours < 24)).all())
    True
    """

    period: float = 2 * math.pi
    low: float | None = None

    def __post_init__(self) -> None:
        require_numbers(period=self.period)
        require_numbers(least=-math.inf, low=self.low)
        if self.period is None or (self.low is not None and not math.isfinite(self.low)):
            raise ValueError(f"period, low: expected finite numbers, got {self.period} and {self.low}")

    def circles(self, dim: int) -> Circles:
        return _circles(float(self.period), None if self.low is None else float(self.low), dim)

    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        circle = self._circle
        middle, radian = circle.start + 0.5 * circle.period, circle.period / (2 * math.pi)
        self.circles(dim)
        return {"shift": torch.full((dim,), middle), "scale": torch.full((1 if common_unit else dim,), radian)}

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        circle, radian = self._circle, self.period / (2 * math.pi)
        angles = y.double() / radian
        mean = radian * torch.atan2(angles.sin().nanmean(0), angles.cos().nanmean(0))
        scale = torch.full_like(mean[:1] if common_unit else mean, radian)
        return {"shift": wrapped_into(mean, circle.start, circle.period), "scale": scale}

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return IdentityWarp()

    def units(self, tensors: Mapping[str, Any]) -> AngleUnits:
        standard = StandardUnits(tensors["shift"], tensors["scale"])
        return AngleUnits(standard, self.circles(standard.shift.shape[-1]))

    @property
    def takes_any_number(self) -> bool:
        return False

    def inside(self, y: Tensor) -> Tensor:
        return self.circles(y.shape[-1]).inside(y)

    def inward(self, moved: Tensor, y: Tensor) -> Tensor:
        return wrapped_into(moved, self._circle.start, self._circle.period)

    @property
    def _circle(self) -> Circle:
        circle = self.circles(1).of_outputs[0]
        assert circle is not None
        return circle


@cached
def _circles(period: float, low: float | None, dim: int) -> Circles:
    """Circles of outputs that are all angles; heads ask for them in each call."""
    return Circles((Circle(period, -0.5 * period if low is None else low),) * dim)


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
        return self.line.standardize(self.circles.around(y, self.standard.shift))

    def kernel(self, kernel: Kernel) -> Kernel | None:
        if kernel.is_circular:
            return kernel
        angles, unit = self.circles.angles, self.unit
        if len(angles) > 1:
            return None
        (output,) = angles
        circle = self.circles.of_outputs[output]
        assert circle is not None
        return kernel.wrapped(output, circle.period / unit[..., output if unit.shape[-1] > 1 else 0])

    def placed(self, y: Tensor) -> Tensor:
        return self.line.standardize(y)

    def images(self, y: Tensor, batch_dims: int) -> Tensor:
        return self.circles.images(self.line.standardize(in_batch(y, batch_dims)), self.unit)

    def facing(self, components: Components, y: Tensor) -> Components:
        locs = components.locs
        shift, unit = self.standard.shift.unsqueeze(-2).to(locs), self.unit.unsqueeze(-2).to(locs)
        centres, periods = (self.circles.centres(locs) - shift) / unit, self.circles.periods(locs) / unit
        near = replace(components, locs=self.circles.around(locs, centres, periods))
        return near.facing(self.placed(y).to(locs), periods, self.circles.angles)

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

    def points(self, y: Targets) -> Tensor:
        return self.line.points(y)

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        self.circles.require_inside(y, name, given)
        self.line.require_inside(y, name, given)
