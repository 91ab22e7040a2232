r"""Target transforms: the units of targets, apart from the components that live in standardised units.

A transform is a specification. Its tensors are buffers of a head, which :meth:`TargetTransform.fit` computes from
targets, and :meth:`TargetTransform.units` makes a function of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pyro_mdn.support.registry import Specification
from pyro_mdn.tensors.numerics import location_and_scale

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

M = TypeVar("M", bound="Mixture")

__all__ = ["StandardUnits", "Standardize", "TargetTransform", "Units"]


class Units(ABC):
    """An increasing elementwise map between the units of y and those in which the components live."""

    @abstractmethod
    def standardize(self, y: Tensor) -> Tensor:
        """Targets ``(*sample, *batch, D)`` in standardised units."""

    @abstractmethod
    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        """Logarithm of the size that a standardised unit has at y in the units of y, summed over outputs.

        Args:
            y: Targets ``(*sample, *batch, D)``.
            observed: Which outputs count, of the shape of y; by default all.
        """

    @abstractmethod
    def push(self, mixture: M) -> M:
        """Distribution in the units of y of what has the given one in standardised units."""

    @property
    @abstractmethod
    def unit(self) -> Tensor:
        """Size of a standardised unit in the units of y, ``(*batch, D)``, or ``(*batch, 1)`` if all have one."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Tensors that the map is made of."""


class StandardUnits(Units):
    """The map :math:`y = a + b z`, for a shift a ``(*batch, D)`` and a scale b ``(*batch, D)`` or ``(*batch, 1)``."""

    __slots__ = ("scale", "shift")

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        self.shift, self.scale = shift, scale

    def standardize(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.scale

    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        logs = self.scale.log()
        if observed is not None:
            return logs.expand(y.shape).masked_fill(~observed, 0.0).sum(-1)
        total = logs.sum(-1)
        return total if self.scale.shape[-1] == y.shape[-1] else y.shape[-1] * total

    def push(self, mixture: M) -> M:
        return mixture.affine(self.shift, self.scale)

    @property
    def unit(self) -> Tensor:
        return self.scale

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.shift]


@dataclass(frozen=True)
class TargetTransform(Specification, ABC):
    """Which map goes between the units of y and standardised units, and how it is found from targets."""

    kind: ClassVar[str] = "target_transform"
    known: ClassVar[dict[str, type[TargetTransform]]] = {}

    @abstractmethod
    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        """Tensors of the identity, by name.

        Args:
            dim: Number of outputs D.
            common_unit: Whether all outputs have one unit, as isotropic noise needs it.
        """

    @abstractmethod
    def fit(self, y: Tensor, *, common_unit: bool) -> dict[str, Tensor]:
        """Tensors for targets ``(N, D)``, of which NaN are left out."""

    @abstractmethod
    def units(self, tensors: Mapping[str, Any]) -> Units:
        """Map that these tensors make, which may have batch dimensions in front."""


@dataclass(frozen=True)
class Standardize(TargetTransform):
    """Subtract the mean and divide by the standard deviation of each output, the default."""

    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        return {"shift": torch.zeros(dim), "scale": torch.ones(1 if common_unit else dim)}

    def fit(self, y: Tensor, *, common_unit: bool) -> dict[str, Tensor]:
        shift, scale = location_and_scale(y, common_unit=common_unit)
        return {"shift": shift, "scale": scale}

    def units(self, tensors: Mapping[str, Any]) -> StandardUnits:
        return StandardUnits(tensors["shift"], tensors["scale"])
