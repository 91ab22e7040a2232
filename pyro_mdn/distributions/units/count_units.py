r"""Units of counts, which stay what they are, and their target transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.distributions.units.warps import IdentityWarp, Warp
from pyro_mdn.support.arrays import refuse
from pyro_mdn.support.checks import is_known

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["CountUnits", "Counts", "are_counts", "require_counts"]


class CountUnits(Units):
    """Units of counts: nothing is mapped, and :attr:`unit` is the mean of the training targets."""

    __slots__ = ("mean",)
    is_affine: ClassVar[bool] = False
    keeps_targets: ClassVar[bool] = True
    has_cells: ClassVar[bool] = False

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def standardize(self, y: Tensor) -> Tensor:
        return y

    def standardize_limits(self, limit: Tensor) -> Tensor:
        return limit

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        return y.new_zeros(())

    def push(self, mixture: Mixture) -> Mixture:
        return mixture

    @property
    def unit(self) -> Tensor:
        return self.mean

    def tensors(self) -> list[Tensor]:
        return [self.mean]

    def inside(self, y: Tensor) -> Tensor:
        return are_counts(y)

    def points(self, y: Targets) -> Tensor:
        return y.points().floor().clamp(min=0)

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        require_counts(y, name, given)


@dataclass(frozen=True)
class Counts(TargetTransform):
    """Leave counts as they are, and take their means as the unit of rates; families of counts have this transform."""

    of_family: ClassVar[bool] = True

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return IdentityWarp()

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        mean = y.double().nanmean(0)
        mean = mean.mean(0, keepdim=True) if common_unit else mean
        return {"shift": torch.zeros_like(y[0], dtype=mean.dtype), "scale": torch.where(mean > 0, mean, 1.0)}

    def units(self, tensors: Mapping[str, Any]) -> CountUnits:
        return CountUnits(tensors["scale"])

    @property
    def takes_any_number(self) -> bool:
        return False

    def inside(self, y: Tensor) -> Tensor:
        return are_counts(y)


def are_counts(y: Tensor) -> Tensor:
    """Check which numbers are 0, 1, 2, ...; NaN is missing, and counts as one."""
    return y.isnan() | ((y >= 0) & (y == y.floor()) & y.isfinite())


def require_counts(value: TargetsOrTensor, name: str, given: object = None) -> None:
    """Raise a ``ValueError`` that names the first exact value that is no count, or an interval without one.

    Args:
        value: Values ``(..., D)``.
        name: Name of the argument.
        given: The data before conversion, which may have names of rows and columns.
    """
    shown = value.lower if isinstance(value, Targets) else value
    if not is_known(shown):
        return
    outside = ~are_counts(shown)
    if isinstance(value, Targets):
        empty = value.upper.floor() < value.lower.ceil().clamp(min=0)
        outside = torch.where(value.kinds() == EXACT, outside, empty)
    if bool(outside.any()):
        refuse(shown, outside, name, "counts 0, 1, 2, ...", given)
