r"""Units of targets of different kinds, and the target transform of a product of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.families.products.columns import Columns
from pyro_mdn.distributions.families.products.product_components import ProductComponents
from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.distributions.units.compound_transforms import CompoundTransform
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.distributions.units.warps import Warp

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["PerPart", "ProductUnits"]

V = TypeVar("V", bound=TargetsOrTensor)


class ProductUnits(Units):
    """Units of their own for each part of the outputs, which come one after another.

    Args:
        parts: Units of each part.
        sizes: Number of outputs of each part.
    """

    __slots__ = ("columns", "parts")
    is_affine: ClassVar[bool] = False

    def __init__(self, parts: Sequence[Units], sizes: Sequence[int]) -> None:
        self.parts, self.columns = tuple(parts), Columns.of_sizes(sizes)

    @property
    def has_line(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(units.has_line and not units.has_angles for units in self.parts)

    def over_parts(self, function: Callable[..., TargetsOrTensor], y: V, *values: Tensor) -> V:
        results: Any = self.columns.join_targets(self.columns.each(function, self.parts, y, *values))
        return results

    def standardize(self, y: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: units.standardize(own), y)

    def standardize_limits(self, limit: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: units.standardize_limits(own), limit)

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        def of_part(units: Units, own: Tensor, *mask: Tensor) -> Tensor:
            return units.log_volume(own, observed=mask[0] if mask else None)

        values = (y,) if observed is None else (y, observed)
        return reduce(torch.add, self.columns.each(of_part, self.parts, *values))

    def push(self, mixture: Mixture) -> Mixture:
        components: Any = mixture.components
        own = [mixture.of_any_family(part) for part in components.parts]
        parts = [units.push(part).components for units, part in zip(self.parts, own, strict=True)]
        return mixture.of_any_family(ProductComponents(tuple(parts), components.columns))

    @property
    def unit(self) -> Tensor:
        sizes = map(len, self.columns.of_parts)
        units = zip([units.unit for units in self.parts], sizes, strict=True)
        return self.columns.join([unit.expand(*unit.shape[:-1], size) for unit, size in units])

    def tensors(self) -> list[Tensor]:
        return [tensor for units in self.parts for tensor in units.tensors()]

    def to_line(self, y: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: units.to_line(own), y)

    def from_line(self, w: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: units.from_line(own), w)

    def inside(self, y: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: units.inside(own), y)

    def slope(self, y: Tensor) -> Tensor:
        return self.over_parts(lambda units, own: torch.ones_like(own) * units.slope(own), y)

    def above(self, y: TargetsOrTensor) -> TargetsOrTensor:
        return self.over_parts(lambda units, own: units.above(own), y)

    def points(self, y: Targets) -> Tensor:
        return self.columns.join(self.columns.each(lambda units, own: units.points(own), self.parts, y))

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        self.columns.each(lambda units, own: units.require_inside(own, name, given), self.parts, y)


@dataclass(frozen=True)
class PerPart(CompoundTransform, by_name=False):
    """Transforms of the parts of a product of families, which builds them from those of its outputs.

    Args:
        parts: Transform of each part.
        sizes: Number of outputs of each part.
        common_units: Whether the outputs of each part have one unit.
        with_ends: Whether targets of each part may be at the lower end of the support.
    """

    sizes: Sequence[int] = ()
    common_units: Sequence[bool] = ()
    with_ends: Sequence[bool] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sizes", "common_units", "with_ends"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def columns(self) -> Columns:
        """Outputs of each part."""
        return Columns.of_sizes(self.sizes)

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        raise NotImplementedError("PerPart: expected a call of units, since counts have no warp")

    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        settings = zip(self.transforms, self.sizes, self.common_units, strict=True)
        return self._joined([part.identity(size, common_unit=shared) for part, size, shared in settings])

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        settings = zip(self.transforms, self.columns.split(y), self.common_units, strict=True)
        warps = [None if warp is None else self._of_part(warp, i) for i in range(len(self.parts))]
        return self._joined(
            [
                part.fit(own, common_unit=shared, warp=warp_of_part)
                for (part, own, shared), warp_of_part in zip(settings, warps, strict=True)
            ]
        )

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        return self._named([part.fit_warp(own) for part, own in self._parts_of(y)])

    def start(self, dim: int) -> dict[str, Tensor]:
        return self._named([part.start(size) for part, size in zip(self.transforms, self.sizes, strict=True)])

    def units(self, tensors: Mapping[str, Any]) -> ProductUnits:
        shifts, scales = self.columns.split(tensors["shift"]), self.columns.split(tensors["scale"])
        units = []
        for i, (part, shift, scale) in enumerate(zip(self.transforms, shifts, scales, strict=True)):
            own = {"shift": shift, "scale": scale[..., :1] if self.common_units[i] else scale}
            of_part = part.units({**own, **self._of_part(tensors, i)})
            units.append(of_part.with_lower_ends() if self.with_ends[i] else of_part)
        return ProductUnits(units, self.sizes)

    @property
    def takes_any_number(self) -> bool:
        return all(part.takes_any_number for part in self.transforms)

    def inside(self, y: Tensor) -> Tensor:
        return self.columns.join([part.inside(own) for part, own in self._parts_of(y)])

    def inward(self, moved: Tensor, y: Tensor) -> Tensor:
        return self.columns.join([part.inward(*own) for part, *own in self._parts_of(moved, y)])

    def _parts_of(self, *values: Tensor) -> Iterator[Any]:
        return zip(self.transforms, *(self.columns.split(value) for value in values), strict=True)

    def _joined(self, several: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join shifts and scales of all outputs, and name the tensors of warps by their parts."""
        shifts, scales = ([tensors.pop(name) for tensors in several] for name in ("shift", "scale"))
        scales = [scale.expand(size) for scale, size in zip(scales, self.sizes, strict=True)]
        return {"shift": torch.cat(shifts), "scale": torch.cat(scales), **self._named(several)}

    @staticmethod
    def _named(several: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {f"{name}_{i}": tensor for i, tensors in enumerate(several) for name, tensor in tensors.items()}
