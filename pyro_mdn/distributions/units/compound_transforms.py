r"""Target transforms made of others: one after another, or one for each output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.angles import AngleUnits
from pyro_mdn.distributions.units.circular.circles import Circles
from pyro_mdn.distributions.units.compound_warps import Chained, SideBySide
from pyro_mdn.distributions.units.target_transforms import Identity, Standardize, TargetTransform
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.distributions.units.warped_units import WarpedUnits
from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.support.checks import shown
from pyro_mdn.support.torch_compat import cached

__all__ = ["Chain", "CompoundTransform", "PerOutput", "as_transform"]


@dataclass(frozen=True)
class CompoundTransform(TargetTransform, by_name=False):
    """Base of transforms made of others, whose tensors have the number of their part in their names."""

    parts: Sequence[TargetTransform | str | None] = ()

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence) or not self.parts:
            raise ValueError(f"parts: expected a sequence of transforms, one at least, got {shown(self.parts)}")
        object.__setattr__(self, "parts", tuple(as_transform(part) for part in self.parts))

    @property
    def transforms(self) -> tuple[TargetTransform, ...]:
        """The parts."""
        parts: Any = self.parts
        return parts

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "parts": tuple(TargetTransform.from_config(part) for part in settings.get("parts", ()))}

    def _of_part(self, tensors: Mapping[str, Any], number: int) -> dict[str, Any]:
        ending = f"_{number}"
        return {name.removesuffix(ending): t for name, t in tensors.items() if name.endswith(ending)}


@dataclass(frozen=True)
class Chain(CompoundTransform, by_name=False):
    """Several transforms one after another, such as ``Chain([Log(), YeoJohnson()])``.

    Args:
        parts: Transforms or their names, that of y first.

    Raises:
        ValueError: If there is none, if one after the first does not take every number, or if one is of angles.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.transforms:
            if _has_angles(part):
                raise ValueError(f"Chain: expected transforms of numbers that are no angles, got {part}")
        for before, part in pairwise(self.transforms):
            if not part.takes_any_number:
                raise ValueError(f"Chain: expected a transform of any number after {before}, got {part}")

    def start(self, dim: int) -> dict[str, Tensor]:
        parts = enumerate(self.transforms)
        return {f"{name}_{i}": t for i, part in parts for name, t in part.start(dim).items()}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(self.transforms):
            own = part.fit_warp(y)
            y = part.warp(own).forward(y)
            tensors |= {f"{name}_{i}": t for name, t in own.items()}
        return tensors

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return Chained(tuple(part.warp(self._of_part(tensors, i)) for i, part in enumerate(self.transforms)))


@dataclass(frozen=True)
class PerOutput(CompoundTransform, by_name=False):
    """A transform for each output, such as ``PerOutput([Log(), Standardize()])``.

    Args:
        parts: Transforms or their names, one for each output.
    """

    @property
    def takes_any_number(self) -> bool:
        return all(part.takes_any_number for part in self.transforms)

    def start(self, dim: int) -> dict[str, Tensor]:
        return {f"{name}_{i}": t for i, part in enumerate(self.transforms) for name, t in part.start(1).items()}

    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        if dim != len(self.parts):
            raise ValueError(f"target_transform: expected {dim} transforms, one for each output, got {len(self.parts)}")
        tensors = super().identity(dim, common_unit=False)
        starts = [part.identity(1, common_unit=False) for part in self.transforms]
        return self._with_own_units(tensors, starts, common_unit=common_unit)

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if not any(map(_has_own_unit, self.transforms)):
            return super().fit(y, common_unit=common_unit, warp=warp)
        tensors = super().fit(y, common_unit=False, warp=warp)
        columns = zip(self.transforms, y.split(1, -1), strict=True)
        fitted = [part.fit(column, common_unit=False) if _has_own_unit(part) else {} for part, column in columns]
        return self._with_own_units(tensors, fitted, common_unit=common_unit)

    def _with_own_units(
        self, tensors: dict[str, Tensor], own: Sequence[Mapping[str, Tensor]], *, common_unit: bool
    ) -> dict[str, Tensor]:
        """Put shift and scale of the outputs that are not standardised into those of all outputs."""
        shift, scale = tensors["shift"].clone(), tensors["scale"].clone()
        for d, (part, tensors_of_part) in enumerate(zip(self.transforms, own, strict=True)):
            if _has_own_unit(part):
                shift[d], scale[d] = tensors_of_part["shift"][0], tensors_of_part["scale"][0]
        scale = scale.square().mean().sqrt().reshape(1) if common_unit else scale
        return {**tensors, "shift": shift, "scale": scale}

    def units(self, tensors: Mapping[str, Any]) -> Units:
        units, circles = super().units(tensors), self.circles(len(self.parts))
        if circles is None:
            return units
        assert isinstance(units, WarpedUnits)
        return AngleUnits(units, circles)

    def circles(self, dim: int) -> Circles | None:
        return _circles_of(self.transforms)

    def inside(self, y: Tensor) -> Tensor:
        columns = zip(self.transforms, y.split(1, -1), strict=True)
        return torch.cat([part.inside(column) for part, column in columns], -1)

    def inward(self, moved: Tensor, y: Tensor) -> Tensor:
        columns = zip(self.transforms, moved.split(1, -1), y.split(1, -1), strict=True)
        return torch.cat([part.inward(*pair) for part, *pair in columns], -1)

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        columns = enumerate(zip(self.transforms, y.split(1, -1), strict=True))
        return {f"{name}_{i}": t for i, (part, column) in columns for name, t in part.fit_warp(column).items()}

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return SideBySide(tuple(part.warp(self._of_part(tensors, i)) for i, part in enumerate(self.transforms)))


@cached
def _circles_of(transforms: tuple[TargetTransform, ...]) -> Circles | None:
    """Circles of outputs with one transform each; heads ask for them in each call."""
    every = [part.circles(1) for part in transforms]
    if not any(every):
        return None
    return Circles(tuple(None if circles is None else circles.of_outputs[0] for circles in every))


def _has_angles(transform: TargetTransform) -> bool:
    return transform.circles(1) is not None


def _has_own_unit(transform: TargetTransform) -> bool:
    """Whether a transform has a shift and a scale of its own, in place of mean and standard deviation."""
    return isinstance(transform, Identity) or _has_angles(transform)


def as_transform(given: TargetTransform | str | Sequence[TargetTransform | str | None] | None) -> TargetTransform:
    """Return the transform that an argument stands for: by default :class:`Standardize`; several are one per output.

    Raises:
        ValueError: If no transform has the name given.
    """
    if given is None:
        return Standardize()
    if isinstance(given, TargetTransform):
        return given
    if isinstance(given, list | tuple):
        return PerOutput(given)
    if not isinstance(given, str):
        raise ValueError(f"target_transform: expected a TargetTransform or a name, got {shown(given)}")
    return TargetTransform.named(given)()
