r"""Circles: which outputs are angles, and the images of a point that differ from it by whole turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import INTERVAL, MISSING, Targets, TargetsOrTensor, missing
from pyro_mdn.support.arrays import refuse
from pyro_mdn.support.checks import is_known

__all__ = ["ROUNDING", "TURNS", "Circle", "Circles", "in_batch", "wrapped_into"]

V = TypeVar("V", bound=TargetsOrTensor)

TURNS = 3
"""Whole turns to each side that images go to: enough for scales of as many radians."""

_MOST_TURNS = 30

_MOST_ANGLES = 2

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Share of a period by which values may lie beyond its ends, such as the angle π in single precision."""


class Circle(NamedTuple):
    """Values of one angle.

    Attributes:
        period: Length of a turn.
        start: Smallest value.
        turns: Whole turns to each side that images go to.
    """

    period: float
    start: float
    turns: int = TURNS

    @property
    def end(self) -> float:
        """End of the period, which is the same angle as its start."""
        return self.start + self.period

    def reaching(self, scale: float) -> Circle:
        """Return the circle with as many turns as a scale has radians, and not fewer than it has."""
        radians = 2 * math.pi * scale / self.period
        if not radians <= _MOST_TURNS:
            raise ValueError(
                f"temper: expected scales of angles up to {_MOST_TURNS} radians, got {radians:.3g}; "
                "a wrapped distribution is all but uniform from 3 radians on"
            )
        return Circle(self.period, self.start, max(self.turns, math.ceil(radians)))


@dataclass(frozen=True)
class Circles:
    """Circles of outputs that are angles; ``None`` for the other outputs.

    Args:
        of_outputs: The circle of each output.

    Raises:
        ValueError: If there are more than two angles.
    """

    of_outputs: tuple[Circle | None, ...]

    def __post_init__(self) -> None:
        if len(self.angles) > _MOST_ANGLES:
            raise ValueError(f"target_transform: expected {_MOST_ANGLES} angles at most, got {len(self.angles)}")

    @property
    def angles(self) -> list[int]:
        """Indices of the outputs that are angles."""
        return [d for d, circle in enumerate(self.of_outputs) if circle is not None]

    @property
    def num_images(self) -> int:
        """Number of images of a point."""
        return math.prod(2 * c.turns + 1 for c in self.of_outputs if c is not None)

    def without_images(self) -> Circles:
        """Return circles of angles that have one image, because their densities are periodic by themselves."""
        return Circles(tuple(None if c is None else Circle(c.period, c.start, 0) for c in self.of_outputs))

    def marginal(self, dims: Sequence[int]) -> Circles:
        """Circles of the outputs ``dims``, in that order."""
        return Circles(tuple(self.of_outputs[d] for d in dims))

    def describe(self) -> str:
        """Describe period and start of each angle."""
        circles = [(d, circle) for d, circle in enumerate(self.of_outputs) if circle is not None]
        return ", ".join(f"angle {d} from {c.start:g} to {c.end:g}" for d, c in circles)

    # Points; all functions take values ``(..., D)``

    def periods(self, like: Tensor) -> Tensor:
        """Return the periods ``(D,)``, 1 for outputs that are no angles."""
        return like.new_tensor([1.0 if c is None else c.period for c in self.of_outputs])

    def centres(self, like: Tensor) -> Tensor:
        """Return the middles of the periods ``(D,)``, 0 for outputs that are no angles."""
        return like.new_tensor([0.0 if c is None else c.start + 0.5 * c.period for c in self.of_outputs])

    def is_angle(self, like: Tensor) -> Tensor:
        """Mark the outputs that are angles, ``(D,)``."""
        return torch.tensor([c is not None for c in self.of_outputs], device=like.device)

    def around(self, value: Tensor, centre: Tensor, period: Tensor | None = None) -> Tensor:
        """Move angles by whole turns to within half a turn of a centre, without a change of gradients.

        Args:
            value: Values.
            centre: Centres, which broadcast with the values.
            period: Lengths of a turn, by default those of the circles.
        """
        period = self.periods(value) if period is None else period
        turns = ((value.detach() - centre.detach()) / period + 0.5).floor()
        return torch.where(self.is_angle(value), value - turns * period, value)

    def wrap(self, value: Tensor) -> Tensor:
        """Move angles by whole turns into their periods, whose ends do not belong to them."""
        columns = [
            column if circle is None else wrapped_into(column, circle.start, circle.period)
            for column, circle in zip(value.unbind(-1), self.of_outputs, strict=True)
        ]
        return torch.stack(columns, -1)

    def offsets(self, like: Tensor) -> Tensor:
        """Return the differences of the images from a point, ``(images, D)``; 0 for outputs that are no angles."""
        steps = [(0.0,) if c is None else range(-c.turns, c.turns + 1) for c in self.of_outputs]
        periods = [0.0 if c is None else c.period for c in self.of_outputs]
        return like.new_tensor(
            [[n * p for n, p in zip(turns, periods, strict=True)] for turns in itertools.product(*steps)]
        )

    def images(self, value: V, unit: Tensor | float = 1.0) -> V:
        """Return the images of points, ``(images, ..., D)``.

        The points must have all dimensions of their batch of mixtures, as :func:`in_batch` gives them: otherwise the
        dimension of images would be taken for one of the batch.

        Args:
            value: Points ``(..., D)``.
            unit: Unit of the points, which broadcasts with them.
        """
        offsets = self.offsets(value if isinstance(value, Tensor) else value.lower)
        offsets = offsets.reshape(len(offsets), *(1,) * (value.ndim - 1), -1) / unit
        result: Any = value.limits(lambda t: t + offsets) if isinstance(value, Targets) else value + offsets
        return result

    def log_share(self, value: TargetsOrTensor) -> Tensor:
        """Say which images count: 0 for those that do, and otherwise minus infinity, ``(images, ...)``.

        An angle that is missing has one image, itself. What lies beyond its period is impossible, and has none.
        """
        exact = value.lower if isinstance(value, Targets) else value
        offsets = self.offsets(exact)
        elsewhere = (offsets != 0).reshape(len(offsets), *(1,) * (exact.ndim - 1), -1)
        left_out = ((elsewhere & missing(value)) | ~self.contains(value)).any(-1)
        return exact.new_zeros(()).expand(left_out.shape).masked_fill(left_out, -math.inf)

    # Checks

    def inside(self, y: Tensor, *, turns: int = 0) -> Tensor:
        """Check which values are no angles, or lie in their periods, whose ends both belong to them.

        Args:
            y: Values.
            turns: Turns to each side of the period that are allowed as well.
        """
        near = (y - self.centres(y)).abs() <= (0.5 + turns + ROUNDING) * self.periods(y)
        return near | ~self.is_angle(y)

    def contains(self, value: TargetsOrTensor) -> Tensor:
        """Check which values are inside or missing; intervals have to be arcs of one turn at most.

        An arc may go on beyond an end of its period, but not farther than a turn. One that is open on one side goes on
        to the end of the period, which its limit must not lie beyond.
        """
        if isinstance(value, Tensor):
            return self.inside(value) | value.isnan()
        lower, upper, kinds = value.lower, value.upper, value.kinds()
        arc = (kinds == INTERVAL) & lower.isfinite() & upper.isfinite()
        short = upper - lower <= (1 + ROUNDING) * self.periods(lower)
        ends = [torch.where(arc, self.inside(end, turns=1), self.inside(end) | end.isinf()) for end in (lower, upper)]
        return (ends[0] & ends[1] & (short | ~arc | ~self.is_angle(lower))) | (kinds == MISSING)

    def closed(self, targets: Targets) -> Targets:
        """Give intervals of angles that are open on one side the end of the period, and let all begin in the period."""
        arcs = self.is_angle(targets.lower) & (targets.kinds() == INTERVAL)
        half, centres = 0.5 * self.periods(targets.lower), self.centres(targets.lower)
        lower = torch.where(arcs, torch.where(targets.lower.isinf(), centres - half, targets.lower), 0.0)
        upper = torch.where(arcs, torch.where(targets.upper.isinf(), centres + half, targets.upper), 0.0)
        moved = (self.wrap(lower) - lower).detach()
        return Targets(torch.where(arcs, lower + moved, targets.lower), torch.where(arcs, upper + moved, targets.upper))

    def require_inside(self, value: TargetsOrTensor, name: str, given: object = None) -> None:
        """Raise a ``ValueError`` that names the first angle outside of its period, if values are known.

        Args:
            value: Values.
            name: Name of the argument.
            given: The data before conversion, which may have names of rows and columns.
        """
        shown = value.lower if isinstance(value, Targets) else value
        if not is_known(shown):
            return
        outside = ~self.contains(value)
        if not bool(outside.any()):
            return
        if isinstance(value, Targets):
            shown = torch.where(self.inside(value.lower) | value.lower.isinf(), value.upper, value.lower)
        d = int(outside.reshape(-1, len(self.of_outputs)).any(0).nonzero()[0])
        circle = self.of_outputs[d]
        assert circle is not None
        single = torch.zeros_like(outside)
        single[..., d] = outside[..., d]
        arcs = ", or arcs of one turn at most, not farther than a turn from there" if isinstance(value, Targets) else ""
        refuse(shown, single, name, f"numbers between {circle.start:g} and {circle.end:g}{arcs}", given)


def in_batch(value: V, batch_dims: int) -> V:
    """Give points ``(..., D)`` the dimensions of a batch, so that one of images before them is none of the batch."""
    missing_dims = max(0, batch_dims - (value.ndim - 1))
    result: Any = value.reshape(*(1,) * missing_dims, *value.shape)
    return result


def wrapped_into(value: Tensor, start: Tensor | float, period: float) -> Tensor:
    """Move values by whole turns into a period, whose end does not belong to it, without a change of gradients."""
    known = start.detach() if isinstance(start, Tensor) else start
    moved = value - period * ((value.detach() - known) / period).floor()
    # Rounding may put a value on the end, or below the start.
    low = value.new_tensor(known) if isinstance(known, float) else known
    moved = torch.where(moved >= low + period, moved - period, moved)
    return torch.where(moved < low, moved + (low - moved).detach(), moved)
