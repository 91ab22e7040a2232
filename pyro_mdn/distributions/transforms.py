r"""Target transforms: maps between the units of targets and standardised units, in which components are built.

A transform is a specification that holds no tensors. Its tensors are buffers of a head. :meth:`TargetTransform.fit`
computes them from targets, and :meth:`TargetTransform.units` builds the map from them.
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
    """An increasing elementwise map between the units of y and the standardised units of the components."""

    @abstractmethod
    def standardize(self, y: Tensor) -> Tensor:
        """Convert targets ``(*sample, *batch, D)`` to standardised units."""

    @abstractmethod
    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        """Compute the log-size of a standardised unit at y, in the units of y, summed over outputs.

        This is the log-determinant of the Jacobian of the map to the units of y.

        Args:
            y: Targets ``(*sample, *batch, D)``.
            observed: Mask of the outputs that count, in the shape of y; by default all count.
        """

    @abstractmethod
    def push(self, mixture: M) -> M:
        """Convert a distribution in standardised units to one in the units of y."""

    @property
    @abstractmethod
    def unit(self) -> Tensor:
        """Size of a standardised unit in the units of y, ``(*batch, D)``, or ``(*batch, 1)`` if outputs share it."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the tensors that define the map."""


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
    """Specification of a map between the units of y and standardised units, and of its fit to targets."""

    kind: ClassVar[str] = "target_transform"
    known: ClassVar[dict[str, type[TargetTransform]]] = {}

    @abstractmethod
    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        """Return the tensors of the identity map, by name.

        Args:
            dim: Number of outputs D.
            common_unit: Whether all outputs have one unit, as isotropic noise requires.
        """

    @abstractmethod
    def fit(self, y: Tensor, *, common_unit: bool) -> dict[str, Tensor]:
        """Compute the tensors, by name, from targets ``(N, D)``; NaN are left out."""

    @abstractmethod
    def units(self, tensors: Mapping[str, Any]) -> Units:
        """Build the map that these tensors define; they may have leading batch dimensions."""


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
