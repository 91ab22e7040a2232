r"""Warps: increasing elementwise maps from the support of a target to the whole real line."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_mdn.support.torch_compat import cached
from pyro_mdn.tensors.tensor_batch import TensorBatch, stored

__all__ = [
    "AsinhWarp",
    "ElementwiseWarp",
    "IdentityWarp",
    "LogWarp",
    "LogitWarp",
    "PowerWarp",
    "SoftplusWarp",
    "Warp",
    "support_between",
]


@dataclass(frozen=True, eq=False)
class Warp(TensorBatch):
    r"""An increasing elementwise map :math:`w(y)` from an interval of the real line onto the whole line.

    Values ``(*sample, *batch, D)`` broadcast with the tensors ``(*batch, D)`` that a warp stores. The warp of
    components, whose values are ``(*batch, K, D)``, has a component axis of 1 in all tensors: :meth:`of_components`.
    """

    @abstractmethod
    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of the support, which broadcast with values ``(..., D)``, in their precision."""

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """Map values inside of the support to the real line."""

    @abstractmethod
    def inverse(self, w: Tensor) -> Tensor:
        """Map the real line to the support; infinite numbers become its ends."""

    @abstractmethod
    def log_slope(self, y: Tensor) -> Tensor:
        r"""Logarithm of the derivative :math:`w'(y)` of each output, at values inside of the support."""

    def kinks(self) -> Tensor | None:
        """Points of the line ``(P, *batch, D)`` between which the inverse is smooth; ``None`` if it is everywhere.

        Quadrature goes from one to the next.
        """
        return None

    def marginal(self, dims: Sequence[int]) -> Self:
        """Warp of the outputs ``dims``, in that order."""
        dims = list(dims)
        return self.map(lambda t, n: t if t.shape[-1] == 1 else t[..., dims])

    def describe(self) -> str:
        """Name of the map and its settings."""
        plain = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if "event_dim" not in f.metadata]
        return f"{type(self).__name__}({', '.join(plain)})"

    # What follows

    def of_components(self) -> Self:
        """The same warp for values of components, ``(*batch, K, D)``."""
        return self.map(lambda t, n: t.unsqueeze(-1 - n))

    def of_values(self) -> Self:
        """The same warp for values without a component axis, from that of components."""
        return self.map(lambda t, n: t.squeeze(-1 - n))

    def contains(self, y: Tensor) -> Tensor:
        """Check which values lie inside of the support, whose ends do not belong to it."""
        low, high = self.limits(y)
        return (low < y) & (y < high)

    def clamped(self, y: Tensor) -> Tensor:
        """Map values to the real line, those at an end of the support or beyond it to infinity, without a gradient."""
        low, high = self.limits(y)
        below, above = y <= low, y >= high
        inside = self.some_inside(y, ~(below | above))
        return torch.where(below, -math.inf, torch.where(above, math.inf, self.forward(inside)))

    def some_inside(self, y: Tensor, chosen: Tensor) -> Tensor:
        """Replace values that are not chosen by one inside of the support, at which nothing is NaN or infinite."""
        return torch.where(chosen, y, self.inverse(torch.zeros_like(y)))

    def within(self, y: Tensor) -> Tensor:
        """Move values that rounding has put on an end of the support to the nearest number inside of it."""
        low, high = self.limits(y)
        inner = torch.nextafter(low, high), torch.nextafter(high, low)
        return torch.maximum(torch.minimum(y, inner[1]), inner[0])

    def support(self, like: Tensor) -> constraints.Constraint:
        """Support of values ``(..., D)`` as torch names it."""
        return support_between(*self.limits(like), like)


def support_between(low: Tensor, high: Tensor, like: Tensor) -> constraints.Constraint:
    """Support of values ``(..., D)`` between ends that broadcast with them, as torch names it."""
    low, high = (torch.broadcast_to(end, torch.broadcast_shapes(end.shape, like.shape[-1:])) for end in (low, high))
    single = [_interval(*ends) for ends in zip(low.unbind(-1), high.unbind(-1), strict=True)]
    return constraints.stack(single, -1) if len(single) > 1 else constraints.independent(_interval(low, high), 1)


def _interval(low: Tensor, high: Tensor) -> constraints.Constraint:
    if bool(high.isinf().all()):
        return constraints.real if bool(low.isinf().all()) else constraints.greater_than(low)
    return constraints.interval(low, high)


@dataclass(frozen=True, eq=False)
class ElementwiseWarp(Warp):
    """A warp that is the same function for every output."""

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the support of an output."""
        return -math.inf, math.inf

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.interval[0]), like.new_tensor(self.interval[1])

    def within(self, y: Tensor) -> Tensor:
        # Each training step does this: as numbers, the ends cost no operation.
        return y.clamp(*_next_inside(self.interval, y.dtype))


@cached
def _next_inside(interval: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """Find the smallest and the largest number of a precision inside of an interval."""
    low, high = torch.tensor(interval, dtype=dtype, device="cpu").unbind()
    return torch.nextafter(low, high).item(), torch.nextafter(high, low).item()


@dataclass(frozen=True, eq=False)
class IdentityWarp(ElementwiseWarp):
    """The map :math:`w = y`, of outputs without a warp beside others that have one."""

    def forward(self, y: Tensor) -> Tensor:
        return y

    def inverse(self, w: Tensor) -> Tensor:
        return w

    def log_slope(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


@dataclass(frozen=True, eq=False)
class LogWarp(ElementwiseWarp):
    r"""The map :math:`w = \log(y + s)` of values above :math:`-s`."""

    shift: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return 0.0 - self.shift, math.inf

    def forward(self, y: Tensor) -> Tensor:
        return self._shifted(y).log()

    def inverse(self, w: Tensor) -> Tensor:
        return w.exp() - self.shift if self.shift else w.exp()

    def log_slope(self, y: Tensor) -> Tensor:
        return -self._shifted(y).log()

    def _shifted(self, y: Tensor) -> Tensor:
        return y + self.shift if self.shift else y


@dataclass(frozen=True, eq=False)
class SoftplusWarp(ElementwiseWarp):
    r"""The map :math:`w = u \log(e^{y/u} - 1)` of positive values: logarithmic below the unit u, and linear above it.

    Args:
        unit: Unit u, shape ``(*batch, D)``.
    """

    unit: Tensor = stored(1)

    @property
    def interval(self) -> tuple[float, float]:
        return 0.0, math.inf

    def forward(self, y: Tensor) -> Tensor:
        return y + self.unit * (-torch.expm1(-y / self.unit)).log()

    def inverse(self, w: Tensor) -> Tensor:
        return -self.unit * logsigmoid(-w / self.unit)  # torch's softplus is linear from 20 on

    def log_slope(self, y: Tensor) -> Tensor:
        return -(-torch.expm1(-y / self.unit)).log()


@dataclass(frozen=True, eq=False)
class LogitWarp(ElementwiseWarp):
    r"""The map :math:`w = \log\frac{y - l}{h - y}` of values between two ends l and h."""

    low: float = 0.0
    high: float = 1.0

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def forward(self, y: Tensor) -> Tensor:
        return (y - self.low).log() - (self.high - y).log()

    def inverse(self, w: Tensor) -> Tensor:
        size = self.high - self.low
        # From the nearer end, so that distances from both ends keep their digits.
        return torch.where(w < 0, self.low + size * torch.sigmoid(w), self.high - size * torch.sigmoid(-w))

    def log_slope(self, y: Tensor) -> Tensor:
        return math.log(self.high - self.low) - (y - self.low).log() - (self.high - y).log()


@dataclass(frozen=True, eq=False)
class AsinhWarp(ElementwiseWarp):
    r"""The map :math:`w = \operatorname{asinh}((y - m) / u)`, logarithmic on both sides of m, and linear near it.

    Args:
        centre: Centre m, shape ``(*batch, D)``.
        unit: Unit u, likewise.
    """

    centre: Tensor = stored(1)
    unit: Tensor = stored(1)

    def forward(self, y: Tensor) -> Tensor:
        return ((y - self.centre) / self.unit).asinh()

    def inverse(self, w: Tensor) -> Tensor:
        return self.centre + self.unit * w.sinh()

    def log_slope(self, y: Tensor) -> Tensor:
        return -torch.hypot(y - self.centre, self.unit).log()


@dataclass(frozen=True, eq=False)
class PowerWarp(ElementwiseWarp):
    r"""The map of Yeo and Johnson (2000) of :math:`t = (y - m) / u`, for a power :math:`0 \le \lambda \le 2`.

    .. math:: w = \frac{(1 + t)^\lambda - 1}{\lambda} \ (t \ge 0), \qquad
              w = -\frac{(1 - t)^{2 - \lambda} - 1}{2 - \lambda} \ (t < 0)

    Powers outside of [0, 2] would map the real line to a part of it.

    Args:
        centre: Centre m, shape ``(*batch, D)``.
        unit: Unit u, likewise.
        power: Power λ, likewise.
    """

    centre: Tensor = stored(1)
    unit: Tensor = stored(1)
    power: Tensor = stored(1)

    def forward(self, y: Tensor) -> Tensor:
        t = (y - self.centre) / self.unit
        length = t.abs().log1p()
        grown = length * _ratio(torch.expm1, 0.5, self._power_at(t) * length)
        return grown.copysign(t)

    def inverse(self, w: Tensor) -> Tensor:
        size = w.abs()
        length = size * _ratio(torch.log1p, -0.5, self._power_at(w) * size)
        return self.centre + self.unit * length.expm1().copysign(w)

    def log_slope(self, y: Tensor) -> Tensor:
        t = (y - self.centre) / self.unit
        return (self._power_at(t) - 1) * t.abs().log1p() - self.unit.log()

    def _power_at(self, t: Tensor) -> Tensor:
        return torch.where(t < 0, 2 - self.power, self.power)


def _ratio(function: Callable[[Tensor], Tensor], bend: float, v: Tensor) -> Tensor:
    """Compute f(v) / v for a function with f(0) = 0, f'(0) = 1 and half the second derivative ``bend`` at 0."""
    small = v.abs() < torch.finfo(v.dtype).eps ** 0.5
    safe = torch.where(small, 1.0, v)
    return torch.where(small, 1 + bend * v, function(safe) / safe)
