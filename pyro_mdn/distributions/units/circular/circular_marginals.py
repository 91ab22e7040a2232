r"""Distributions of single angles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_mdn.distributions.marginals import LocationScaleMarginals, Marginals, follow_shortest
from pyro_mdn.distributions.units.circular.circles import ROUNDING, Circle, wrapped_into
from pyro_mdn.distributions.units.circular.circular_mixture import (
    CircularMixture,
    direction_and_spread,
    integrals,
    level_of_shortest_arc,
)
from pyro_mdn.support.checks import is_differentiated
from pyro_mdn.tensors.roots import follow_root, solve_tail
from pyro_mdn.tensors.univariate import UnivariateMixture

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components

__all__ = ["CircularMarginals"]


class CircularMarginals(Marginals):
    r"""Marginal of one output that is an angle: a mixture on the line, wrapped around the circle.

    Distribution functions go from the start of the period to its end. Intervals are arcs: they begin in the period, and
    may go on beyond its end. Probabilities are divided by that of all images together.

    Args:
        mixture: The mixture on the line, with parameters ``(*batch, 1, K)``.
        circle: The circle.
        components: Components that this is a marginal of, for errors.
        start: Where distribution functions start, ``(*batch, 1)``; by default at the start of the period.
    """

    def __init__(
        self, mixture: UnivariateMixture, circle: Circle, components: Components, *, start: Tensor | None = None
    ) -> None:
        self.circle, self.components, self.period = circle, components, circle.period
        self.wrapped = CircularMixture.wrapped(mixture, circle, start)
        self.start, self.end = self.wrapped.start, self.wrapped.end
        self.total = self.wrapped.probability(self.start, self.end)

    def is_differentiated(self) -> bool:
        return self.wrapped.line.is_differentiated()

    # Distribution functions

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value - self.start - 0.5 * self.period).abs() <= (0.5 + ROUNDING) * self.period
        points = torch.where(inside, value, self.start)
        result = self._images().log_prob(points) - self.total.log()
        return torch.where(value.isnan(), value, result.masked_fill(~inside, -math.inf))

    def cdf(self, value: Tensor) -> Tensor:
        return self._side(value, above=False)

    def sf(self, value: Tensor) -> Tensor:
        return self._side(value, above=True)

    def levels(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        below = self.cdf(wrapped_into(lower, self.start, self.period))
        return below, below + self.log_between(lower, upper).exp()

    def log_cdf(self, value: Tensor) -> Tensor:
        return self._log_side(value, above=False)

    def log_sf(self, value: Tensor) -> Tensor:
        return self._log_side(value, above=True)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        half = torch.as_tensor(half, dtype=centre.dtype, device=centre.device).clamp(max=0.5 * self.period)
        return self._log_arc(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        lower = torch.where(lower == -math.inf, self.start, lower)
        upper = torch.where(upper == math.inf, self.end, upper)
        # All of the circle, if it is a turn or more.
        whole = upper - lower >= self.period
        arc = self._log_arc(lower, torch.where(whole, lower + 0.5 * self.period, upper))
        return arc.masked_fill(whole, 0.0)

    def _side(self, value: Tensor, *, above: bool) -> Tensor:
        """Probability below a value, or above it."""
        log_side = self._log_part(value, above=above)
        # At the end where it is 0, its logarithm has no derivatives, but the probability has.
        empty = value == (self.end if above else self.start)
        points = torch.where(empty, value, self.start)
        part = self._part(points, above=above)
        return torch.where(empty, self.wrapped.probability(*part) / self.total, log_side.exp())

    def _log_side(self, value: Tensor, *, above: bool) -> Tensor:
        other = self._side(value, above=not above)
        near = other < 0.5
        result = torch.where(near, torch.log1p(-torch.where(near, other, 0.0)), self._log_part(value, above=above))
        return torch.where(value.isnan(), value, result)

    def _log_part(self, value: Tensor, *, above: bool) -> Tensor:
        """Log-probability below a value, or above it, with relative accuracy where that is small."""
        inside = (value >= self.start) & (value < self.end) if above else (value > self.start) & (value <= self.end)
        points = torch.where(inside, value, self.start + 0.5 * self.period)
        beyond = torch.where((value >= self.end) == above, -math.inf, 0.0).to(value)
        log_arc = self._log_arc(*self._part(points, above=above))
        whole = points == (self.start if above else self.end)
        excess = log_arc.detach()  # of rounding, but for the derivative at the other end
        log_arc = log_arc - torch.where(whole, excess, excess.clamp(min=0))
        result = torch.where(inside, log_arc, beyond)
        return torch.where(value.isnan(), value, result)

    def _part(self, value: Tensor, *, above: bool) -> tuple[Tensor, Tensor]:
        return (value, self.end) if above else (self.start, value)

    def _log_arc(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Log-probability of an arc that begins anywhere; all of it at once, after turns into the period."""
        moved = (wrapped_into(lower, self.start, self.period) - lower).detach()
        line = LocationScaleMarginals(self._images())
        return line.log_between(lower + moved, upper + moved) - self.total.log()

    def _images(self) -> UnivariateMixture:
        """Mixture on the line with a component for each image."""
        logits, locs, scale, law = self.wrapped.line
        most = self.circle.turns
        turns = self.period * torch.arange(-most, most + 1, dtype=locs.dtype, device=locs.device)
        count = len(turns)
        moved = (locs.unsqueeze(-2) + turns.unsqueeze(-1)).flatten(-2)
        shape = torch.broadcast_shapes(logits.shape, locs.shape, scale.shape)[-1:]

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.expand(*tensor.shape[:-1], *shape).repeat(*(1,) * (tensor.ndim - 1), count)

        return UnivariateMixture(repeated(logits), moved, repeated(scale), law.map(lambda t, n: repeated(t)))

    # Quantiles

    def quantile(self, q: Tensor) -> Tensor:
        upper = q > 0.5
        return self._quantile(torch.where(upper, 1 - q, q), from_end=upper)

    def upper_quantile(self, q: Tensor) -> Tensor:
        lower = q > 0.5
        return self._quantile(torch.where(lower, 1 - q, q), from_end=~lower)

    def _quantile(self, tail: Tensor, from_end: Tensor) -> Tensor:
        """Find the angle with a probability up to a half between the start and it, or between it and the end."""
        shape = torch.broadcast_shapes(tail.shape, self.start.shape)
        tail, from_end = tail.expand(shape), from_end.expand(shape)
        known = torch.where(tail > 0, tail, 0.5)

        def point_at(way: Tensor) -> Tensor:
            return torch.where(from_end, self.end - way, self.start + way)

        def tail_and_density(way: Tensor) -> tuple[Tensor, Tensor]:
            point = point_at(way)
            ends = torch.where(from_end, point, self.start), torch.where(from_end, self.end, point)
            return self.wrapped.probability(*ends) / self.total, self.wrapped.density(point) / self.total

        with torch.no_grad():
            none = torch.zeros_like(known)
            way = solve_tail(known, none, none + self.period, tail_and_density)
            way = torch.where(tail > 0, way, 0.0).detach()
        if self.is_differentiated() or is_differentiated(tail, self.start):

            def equation(way: Tensor) -> tuple[Tensor, Tensor]:
                probability, height = tail_and_density(way)
                return probability - tail, height

            way = follow_root(way, equation)
        return point_at(way)

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        log_density, bend = self._images().log_density_by_level(value)
        return log_density - self.total.log(), bend * self.total

    # Arcs

    def central_quantile(self, q: Tensor) -> Tensor:
        return wrapped_into(self._opened().quantile(q), self.circle.start, self.period)

    def central_interval(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of arcs with probability ``tail`` on each side, between them and the angle opposite to the mean."""
        opened = self._opened()
        return self._begun(opened.quantile(tail), opened.upper_quantile(tail))

    def _opened(self) -> CircularMarginals:
        """The same with distribution functions that start opposite to the mean direction."""
        cut = direction_and_spread(self.wrapped.line, self.circle)[0] - 0.5 * self.period
        return CircularMarginals(self.wrapped.line, self.circle, self.components, start=cut)

    @torch.no_grad()
    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Search for the shortest arcs, by the probability between the start of the period and theirs."""
        mass = 1 - outside
        left = self._polished(level_of_shortest_arc(self.wrapped, self.total, mass), mass)
        return left, outside - left, *self._begun(self._turning(left), self._turning(left + mass))

    def _polished(self, left: Tensor, mass: float) -> Tensor:
        """Make the densities at both ends equal by Newton's method, where that is a step of rounding errors."""
        for _ in range(2):
            ends = self._turning(left), self._turning(left + mass)
            (low, bend_low), (high, bend_high) = (self.log_density_by_level(end) for end in ends)
            step = (low - high) / (bend_low - bend_high)
            left = torch.where((step.abs() < 1e-3) & (bend_low > bend_high), left - step, left)
        return left

    def shortest_interval(self, outside: float) -> tuple[Tensor, Tensor]:
        left, _, *ends = self.shortest(outside)
        if not self.is_differentiated():
            return ends[0], ends[1]
        mass = 1 - outside
        left = follow_shortest(self, left, lambda level: (self._turning(level), self._turning(level + mass)))
        return self._begun(self._turning(left), self._turning(left + mass))

    def _turning(self, level: Tensor) -> Tensor:
        """Quantile at any level: each whole number is a turn."""
        turns = level.detach().floor()
        return self.quantile(level - turns) + turns * self.period

    def _begun(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Move arcs by whole turns, so that they begin in the period."""
        begun = wrapped_into(lower, self.circle.start, self.period)
        return begun, upper + (begun - lower).detach()

    def missed(self, value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        past = value - wrapped_into(value, lower, self.period)
        value = value - past.detach()
        beyond = (value - upper).clamp(min=0)
        return torch.minimum(beyond, torch.where(beyond > 0, lower + self.period - value, 0.0))

    # Scores

    def expected_below(self, value: Tensor) -> Tensor:
        self.components.require_line("expected_below", "an angle is neither more nor less than another; use crps")
        raise AssertionError

    def expected_above(self, value: Tensor) -> Tensor:
        self.components.require_line("expected_above", "an angle is neither more nor less than another; use crps")
        raise AssertionError

    def crps(self, value: Tensor) -> Tensor:
        r"""Score of angles: the CRPS with angular distances d in the place of differences, by quadrature.

        .. math:: E \, d(Y, y) - \tfrac12 E \, d(Y, Y')
                  = \int_0^{P/2} \left( P(Y \in H_t) - 1\{y \in H_t\} \right)^2 dt

        The half circle :math:`H_t` begins at t. Two angles lie on different sides of as many half circles as their
        distance says, so that both sides are equal.

        References:
            Grimit, Gneiting, Berrocal & Johnson (2006), The continuous ranked probability score for circular variables.
        """
        half = 0.5 * self.period
        edges = self.wrapped.edges(half)

        def squares(point: Tensor) -> Tensor:
            """Squared probabilities of being outside of half circles, and inside."""
            inside = self.wrapped.probability(point, point + half) / self.total
            return torch.stack([(1 - inside).square(), inside.square()])

        panels = integrals(squares, edges[:-1], edges[1:], self.wrapped.size)
        sums = torch.cat([torch.zeros_like(panels[:, :1]), panels.cumsum(1)], 1)
        place = wrapped_into(value, self.start, self.period)
        second = place >= self.start + half
        place = torch.where(second, place - half, place)
        shape = torch.broadcast_shapes(place.shape, edges.shape[1:])
        place, second = place.expand(shape), second.expand(shape)
        edges, sums = _aligned(edges, shape, 0), _aligned(sums, shape, 1)
        near = ((edges <= place).sum(0) - 1).clamp(0, len(edges) - 2).unsqueeze(0)
        start = edges.gather(0, near)
        rest = integrals(squares, start, place.unsqueeze(0), 1)
        before = sums.gather(1, near.expand(2, *near.shape)).squeeze(1) + rest.squeeze(1)
        after = sums[:, -1] - before
        score = torch.where(second, before[1] + after[0], before[0] + after[1])
        return torch.where(value.isnan(), value, score)


def _aligned(tensor: Tensor, shape: torch.Size, several: int) -> Tensor:
    """Expand ``(*several, P, *batch)`` to ``(*several, P, *sample, *batch)``."""
    front = tensor.shape[: several + 1]
    own = tensor.shape[several + 1 :]
    return tensor.reshape(*front, *(1,) * (len(shape) - len(own)), *own).expand(*front, *shape)
