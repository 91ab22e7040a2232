r"""Monotone rational-quadratic splines: one piece, its slope and its inverse; and the warp that is made of pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.units.warps import ElementwiseWarp
from pyro_mdn.tensors.tensor_batch import stored

__all__ = ["REACH", "Piece", "SplineWarp", "scores_of"]

REACH = 3.0
"""Normal score of the last knot."""


class Piece(NamedTuple):
    r"""A monotone rational-quadratic function between two knots (Gregory & Delbourgo, 1982).

    .. math:: f(x) = f_0 + h \, \frac{s \theta^2 + d_0 \theta \eta}{s + (d_0 + d_1 - 2 s) \, \theta \eta}

    where :math:`\theta = (x - x_0) / w`, :math:`\eta = 1 - \theta` and :math:`s = h / w`.

    It is increasing for any positive slopes, which no cubic is, and its inverse is the root of a quadratic equation.

    Attributes:
        start: First knot :math:`x_0`.
        width: Distance w to the second knot.
        low: Value :math:`f_0` at the first knot.
        height: Difference h of the values.
        first: Slope :math:`d_0` at the first knot.
        last: Slope :math:`d_1` at the second knot.
    """

    start: Tensor
    width: Tensor
    low: Tensor
    height: Tensor
    first: Tensor
    last: Tensor

    def value(self, x: Tensor) -> Tensor:
        """Compute f(x)."""
        part, mixed, secant, bend = self._parts(x)
        return self.low + self.height * (secant * part.square() + self.first * mixed) / (secant + bend * mixed)

    def log_slope(self, x: Tensor) -> Tensor:
        """Compute the logarithm of the derivative of f at x."""
        part, mixed, secant, bend = self._parts(x)
        slopes = self.last * part.square() + 2 * secant * mixed + self.first * (1 - part).square()
        return 2 * (secant.log() - (secant + bend * mixed).log()) + slopes.log()

    def inverse(self, value: Tensor) -> Tensor:
        """Compute x from f(x), by the solution of the quadratic equation in which nothing cancels."""
        secant = self.height / self.width
        rise, bend = (value - self.low) / self.height, self.first + self.last - 2 * secant
        a, b = secant - self.first + rise * bend, self.first - rise * bend
        root = (b.square() + 4 * a * secant * rise).clamp(min=0.0).sqrt()
        return self.start + self.width * (2 * secant * rise / (b + root))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        secant, part = self.height / self.width, (x - self.start) / self.width
        return part, part * (1 - part), secant, self.first + self.last - 2 * secant


@dataclass(frozen=True, eq=False)
class SplineWarp(ElementwiseWarp):
    r"""A monotone rational-quadratic spline of :math:`t = (y - m) / u`, and straight lines beyond its outer knots.

    Knots are where the spline reaches normal scores at equal distances, from -3 to 3 (:func:`scores_of`).

    Args:
        centre: Centre m, shape ``(*batch, D)``.
        unit: Unit u, likewise.
        knots: Positions t of the knots, in ascending order, ``(*batch, n, D)``.
        slopes: Slopes of the spline in t at the knots, likewise.
    """

    centre: Tensor = stored(1)
    unit: Tensor = stored(1)
    knots: Tensor = stored(2)
    slopes: Tensor = stored(2)

    def forward(self, y: Tensor) -> Tensor:
        t = self._relative(y)
        inner = self._inner(t)
        return self._piece(self._passed(inner)).value(inner) + self._outer_slope(t <= self.knots[..., 0, :]) * (
            t - inner
        )

    def inverse(self, w: Tensor) -> Tensor:
        inner = w.clamp(-REACH, REACH)
        passed = ((inner + REACH) / self._step).nan_to_num().long().clamp(0, self.knots.shape[-2] - 2)
        t = self._piece(passed).inverse(inner) + (w - inner) / self._outer_slope(w <= -REACH)
        return self.centre + self.unit * t

    def log_slope(self, y: Tensor) -> Tensor:
        inner = self._inner(self._relative(y))
        return self._piece(self._passed(inner)).log_slope(inner) - self.unit.log()

    def kinks(self) -> Tensor | None:
        # Four times as many points, because pieces may bend sharply.
        scores = scores_of(4 * self.knots.shape[-2] - 3).to(self.knots)
        return scores.reshape(-1, *(1,) * self.centre.ndim)

    @property
    def _step(self) -> float:
        return 2 * REACH / (self.knots.shape[-2] - 1)

    def _relative(self, y: Tensor) -> Tensor:
        return (y - self.centre) / self.unit

    def _inner(self, t: Tensor) -> Tensor:
        return torch.clamp(t, self.knots[..., 0, :], self.knots[..., -1, :])

    def _outer_slope(self, below: Tensor) -> Tensor:
        return torch.where(below, self.slopes[..., 0, :], self.slopes[..., -1, :])

    def _passed(self, t: Tensor) -> Tensor:
        """Count the knots after the first that points have passed."""
        return (t.unsqueeze(-2) >= self.knots[..., 1:-1, :]).sum(-2)

    def _piece(self, index: Tensor) -> Piece:
        start, first = _at(self.knots, index), _at(self.slopes, index)
        end, last = _at(self.knots, index + 1), _at(self.slopes, index + 1)
        step = torch.full_like(start, self._step)
        return Piece(start, end - start, step * index - REACH, step, first, last)


def scores_of(n_knots: int) -> Tensor:
    """Normal scores of the knots, in double precision."""
    return torch.linspace(-REACH, REACH, n_knots, dtype=torch.float64, device="cpu")


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Take numbers ``(*sample, *batch, D)`` from a table ``(*batch, n, D)``."""
    shape = torch.broadcast_shapes(table[..., 0, :].shape, index.shape)
    table = table.expand(*shape[:-1], *table.shape[-2:])
    return table.gather(-2, index.expand(shape).unsqueeze(-2)).squeeze(-2)
