r"""Units of targets: maps between them and standardised units, in which components are built."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components
    from pyro_mdn.distributions.mixture import Mixture
    from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["StandardUnits", "Units", "UnscaledUnits", "without_ends"]

V = TypeVar("V", bound=TargetsOrTensor)


class Units(ABC):
    """An increasing elementwise map between the units of y and the standardised units of the components."""

    @abstractmethod
    def standardize(self, y: Tensor) -> Tensor:
        """Convert targets ``(*sample, *batch, D)``, which :meth:`require_inside` has checked, to standardised units."""

    @abstractmethod
    def log_volume(self, y: Tensor, *, observed: Tensor | None = None) -> Tensor:
        """Compute the log-size of a standardised unit at y, in the units of y, summed over outputs.

        This is the log-determinant of the Jacobian of the map to the units of y.

        Args:
            y: Targets ``(*sample, *batch, D)``.
            observed: Mask of the outputs that count, in the shape of y; by default all count.
        """

    @abstractmethod
    def push(self, mixture: Mixture) -> Mixture:
        """Convert a distribution in standardised units to one in the units of y."""

    @property
    @abstractmethod
    def unit(self) -> Tensor:
        """Size of a standardised unit in the units of y, ``(*batch, D)``, or ``(*batch, 1)`` if outputs share it."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the tensors that define the map."""

    # What differs for a map that is not affine, and for counts

    is_affine: ClassVar[bool] = True
    """Whether the map is affine, so that mixtures of a family stay mixtures of this family."""

    has_angles: ClassVar[bool] = False
    """Whether an output is an angle, so that densities are sums over images."""

    keeps_targets: ClassVar[bool] = False
    """Whether training leaves targets as they are, without noise on them."""

    has_line: ClassVar[bool] = True
    """Whether densities can be computed in standardised units; no where a point mass is, which has no place there."""

    has_cells: ClassVar[bool] = True
    """Whether targets on a grid stand for cells around them."""

    def over_parts(self, function: Callable[..., TargetsOrTensor], y: V, *values: Tensor) -> V:
        """Apply a function to the units, the targets and other values of each part of the outputs.

        Most units have one part, of all outputs. Values are ``(..., D)``.
        """
        result: Any = function(self, y, *values)
        return result

    is_unscaled: ClassVar[bool] = False
    """Whether numbers stay what they are, so that a standardised unit says nothing of their size."""

    def standardize_limits(self, limit: Tensor) -> Tensor:
        """Convert limits of intervals, of which those at an end of the support of y, or beyond it, become infinite."""
        return self.standardize(limit)

    def images(self, y: Tensor, batch_dims: int) -> Tensor:
        """Convert targets to the standardised points at which densities are needed.

        Args:
            y: Targets ``(*sample, *batch, D)``.
            batch_dims: Number of dimensions of the batch, of which targets may lack some.

        Returns:
            Points ``(*sample, *batch, D)``; if there are angles, with a first dimension of images, over which densities
            are to be summed.
        """
        return self.standardize(y)

    def kernel(self, kernel: Kernel) -> Kernel | None:
        """Return the kernel of densities at :meth:`placed` targets, from that of components on the line.

        It is ``None`` if densities are to be summed over :meth:`images`.
        """
        return kernel

    def placed(self, y: Tensor) -> Tensor:
        """Convert targets to standardised units, angles to ones that may differ by whole turns."""
        return self.standardize(y)

    def facing(self, components: Components, y: Tensor) -> Components:
        """Move standardised locations of angles by whole turns to where the images of targets are around them."""
        return components

    def to_line(self, y: Tensor) -> Tensor:
        """Map targets to the real line, on which the rest of the map is affine; without checks."""
        return y

    def from_line(self, w: Tensor) -> Tensor:
        """Map the real line to targets."""
        return w

    def inside(self, y: Tensor) -> Tensor:
        """Check which targets lie inside of the support, whose ends do not belong to it."""
        return y.isfinite()

    def slope(self, y: Tensor) -> Tensor | float:
        """Derivative of :meth:`to_line` at y."""
        return 1.0

    def with_lower_ends(self) -> Units:
        """Return the same map for targets that may also be at the lower end of the support."""
        return self

    def above(self, y: TargetsOrTensor) -> TargetsOrTensor:
        """Leave out targets at the lower end of the support, as missing ones, if these are allowed."""
        return y

    def points(self, y: Targets) -> Tensor:
        """Return a number that each target may be, which training starts from; NaN for missing ones, or if unknown."""
        return y.points()

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        """Raise a ``ValueError`` that names the first target outside of the support, if targets are known."""
        return  # the real line is the support of an affine map


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

    def push(self, mixture: Mixture) -> Mixture:
        return mixture.affine(self.shift, self.scale)

    @property
    def unit(self) -> Tensor:
        return self.scale

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.shift]


class UnscaledUnits(StandardUnits):
    """The map :math:`y = z`, with a shift of 0 and a scale of 1, which also leaves integers as they are."""

    __slots__ = ()
    is_unscaled: ClassVar[bool] = True

    def standardize(self, y: Tensor) -> Tensor:
        return y


def without_ends(y: TargetsOrTensor, low: Tensor) -> TargetsOrTensor:
    """Mark targets that can be these lower ends ``(D,)`` of the support, and nothing above them, as missing."""
    if isinstance(y, Tensor):
        return y.masked_fill(y == low, math.nan)
    ends = y.upper == low
    return type(y)(y.lower.masked_fill(ends, -math.inf), y.upper.masked_fill(ends, math.inf))
