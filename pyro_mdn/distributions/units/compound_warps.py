r"""Warps made of others: rescaled, one after another, or one for each output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.tensors.tensor_batch import nested, stored

__all__ = ["Chained", "Rescaled", "SideBySide"]


@dataclass(frozen=True, eq=False)
class Rescaled(Warp):
    r"""A warp of :math:`(y - a) / b`, for b > 0: what becomes of a warp if y is measured in other units.

    Args:
        shift: Shift a, shape ``(*batch, D | 1)``.
        scale: Scale b, likewise.
        then: The warp.
    """

    shift: Tensor = stored(1)
    scale: Tensor = stored(1)
    then: Warp = nested()

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.then.limits(like)
        return self.shift + self.scale * low, self.shift + self.scale * high

    def forward(self, y: Tensor) -> Tensor:
        return self.then.forward((y - self.shift) / self.scale)

    def inverse(self, w: Tensor) -> Tensor:
        return self.shift + self.scale * self.then.inverse(w)

    def log_slope(self, y: Tensor) -> Tensor:
        return self.then.log_slope((y - self.shift) / self.scale) - self.scale.log()

    def kinks(self) -> Tensor | None:
        return self.then.kinks()

    def marginal(self, dims: Sequence[int]) -> Self:
        rescaled = super().marginal(dims)
        return replace(rescaled, then=self.then.marginal(dims))


@dataclass(frozen=True, eq=False)
class _Several(Warp):
    parts: tuple[Warp, ...] = ()

    def describe(self) -> str:
        return f"{type(self).__name__}({', '.join(part.describe() for part in self.parts)})"


@dataclass(frozen=True, eq=False)
class Chained(_Several):
    """Warps one after another: each but the first is of the whole real line.

    Args:
        parts: The warps, that of y first.
    """

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts[0].limits(like)

    def forward(self, y: Tensor) -> Tensor:
        for part in self.parts:
            y = part.forward(y)
        return y

    def inverse(self, w: Tensor) -> Tensor:
        for part in reversed(self.parts):
            w = part.inverse(w)
        return w

    def log_slope(self, y: Tensor) -> Tensor:
        total = torch.zeros_like(y)
        for part in self.parts:
            total, y = total + part.log_slope(y), part.forward(y)
        return total

    def kinks(self) -> Tensor | None:
        found: list[Tensor] = []
        for part in self.parts:
            found = [part.forward(points) for points in found]
            own = part.kinks()
            found += [] if own is None else [own]
        if not found:
            return None
        shape = torch.broadcast_shapes(*(points.shape[1:] for points in found))
        return torch.cat([points.expand(-1, *shape) for points in found])

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, parts=tuple(part.marginal(dims) for part in self.parts))


@dataclass(frozen=True, eq=False)
class SideBySide(_Several):
    """A warp for each output.

    Args:
        parts: The warps, each of one output.
    """

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [part.limits(column) for part, column in zip(self.parts, like.split(1, -1), strict=True)]
        low, high = (_joined([torch.atleast_1d(end) for end in ends]) for ends in zip(*pairs, strict=True))
        return low, high

    def forward(self, y: Tensor) -> Tensor:
        return self._each("forward", y)

    def inverse(self, w: Tensor) -> Tensor:
        return self._each("inverse", w)

    def log_slope(self, y: Tensor) -> Tensor:
        return self._each("log_slope", y)

    def kinks(self) -> Tensor | None:
        found = [part.kinks() for part in self.parts]
        known = [points for points in found if points is not None]
        if not known:
            return None
        size = max(map(len, known))
        # An output with fewer kinks has one of them several times, and one without any those of another output.
        padded = [known[0] if points is None else points for points in found]
        return _joined([torch.cat([p, p[-1:].expand(size - len(p), *p.shape[1:])]) for p in padded])

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, parts=tuple(self.parts[d] for d in dims))

    def _each(self, name: str, values: Tensor) -> Tensor:
        columns = zip(self.parts, values.split(1, -1), strict=True)
        return _joined([getattr(part, name)(column) for part, column in columns])


def _joined(columns: Sequence[Tensor]) -> Tensor:
    """Join outputs ``(..., 1)``, which may have different batch dimensions."""
    return torch.cat(torch.broadcast_tensors(*columns), -1)
