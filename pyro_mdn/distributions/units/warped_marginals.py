r"""Distributions of single outputs that were pushed through a warp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.marginals import LocationScaleMarginals, Marginals, shortest_by_search
from pyro_mdn.distributions.units.expectations import NODES, WEIGHTS, with_kinks
from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["WarpedMarginals"]


class WarpedMarginals(Marginals):
    r"""Marginals of :math:`y = w^{-1}(z)`, from those of z.

    Distribution functions, quantiles and central intervals carry over exactly. Shortest intervals, and the continuous
    ranked probability score, depend on the units of y, and are computed in these.

    Args:
        inner: Marginals of z.
        warp: The warp w, of values without a component axis.
    """

    def __init__(self, inner: Marginals, warp: Warp) -> None:
        assert isinstance(inner, LocationScaleMarginals)
        self.inner, self.warp = inner, warp

    def is_differentiated(self) -> bool:
        return self.inner.is_differentiated()

    def log_prob(self, value: Tensor) -> Tensor:
        points, inside = self._inside(value)
        density = self.inner.log_prob(self.warp.forward(points)) + self.warp.log_slope(points)
        return torch.where(value.isnan(), value, density.masked_fill(~inside, -math.inf))

    def cdf(self, value: Tensor) -> Tensor:
        return self._by_tail(self.inner.cdf, value, below=0.0, above=1.0)

    def sf(self, value: Tensor) -> Tensor:
        return self._by_tail(self.inner.sf, value, below=1.0, above=0.0)

    def log_cdf(self, value: Tensor) -> Tensor:
        return self._by_tail(self.inner.log_cdf, value, below=-math.inf, above=0.0)

    def log_sf(self, value: Tensor) -> Tensor:
        return self._by_tail(self.inner.log_sf, value, below=0.0, above=-math.inf)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.inner.log_between(self.warp.clamped(lower), self.warp.clamped(upper))

    def quantile(self, q: Tensor) -> Tensor:
        return self.warp.inverse(self.inner.quantile(q))

    def upper_quantile(self, q: Tensor) -> Tensor:
        return self.warp.inverse(self.inner.upper_quantile(q))

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        points, _ = self._inside(value)
        z = self.warp.forward(points)
        log_density, bend = self.inner.log_density_by_level(z)
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            slope = self.warp.log_slope(self.warp.inverse(point))
            slope = torch.autograd.grad(slope.sum(), point)[0] if slope.requires_grad else torch.zeros_like(point)
        return log_density + self.warp.log_slope(points), bend + slope * (-log_density).exp()

    def _inside(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Values, with one inside of the support in the place of others, and which values are inside of it."""
        inside = self.warp.contains(value)
        return self.warp.some_inside(value, inside), inside

    def _by_tail(self, function: Callable[[Tensor], Tensor], value: Tensor, *, below: float, above: float) -> Tensor:
        """Apply a function of z inside of the support; NaN where the value is, and constants below and above."""
        points, inside = self._inside(value)
        outside = torch.where(value <= self.warp.limits(value)[0], below, above).to(value)
        result = torch.where(inside, function(self.warp.forward(points)), outside)
        return torch.where(value.isnan(), value, result)

    # Shortest intervals

    @torch.no_grad()
    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Search for the shortest intervals, by the probability below them.

        The probabilities are those at which an end meets a point of a grid that follows every component, and some more
        in between. The best one is refined between its neighbours.
        """
        mixture = self.inner.mixture
        below = self.inner.cdf(_grid(mixture))
        even = torch.linspace(0, 1, _EVEN, dtype=below.dtype, device=below.device).square()
        even = 0.5 * outside * torch.cat([even, 2 - even])
        even = even.reshape(-1, *(1,) * (below.ndim - 1)).expand(-1, *below.shape[1:])
        tails = torch.cat([below, below - (1 - outside), even]).clamp(0, outside).sort(0).values
        left = shortest_by_search(self, tails, outside)
        return left, outside - left, self.quantile(left), self.upper_quantile(outside - left)

    # Partial moments, and the continuous ranked probability score

    def expected_below(self, value: Tensor) -> Tensor:
        return _Tails(self).expected_below(value)

    def expected_above(self, value: Tensor) -> Tensor:
        return _Tails(self).expected_above(value)

    def crps(self, value: Tensor) -> Tensor:
        r"""Score by quadrature (Gauss-Legendre) between points that follow every component.

        .. math:: |y - m| + \int T(t)^2 \, dt - 2 \left| \int_m^y T(t) \, dt \right|

        for any m, with T the probability beyond t on its side of m. The relative error is below 1e-6 in double
        precision unless standard deviations of :math:`\log y` exceed 3. It is infinite where the mean is.
        """
        return _Tails(self).crps(value)


_EVEN = 33
_REPRESENTABLE = 1e-9
"""Share of the largest number up to which a product with the width of a panel is one."""


def _grid(mixture: UnivariateMixture) -> Tensor:
    """Points ``(P, *batch, D)`` in ascending order that follow every component."""
    logits, locs, scale, law = mixture
    points = locs.unsqueeze(-1) + scale.unsqueeze(-1) * law.grid(locs)
    shape = torch.broadcast_shapes(logits.shape, locs.shape, scale.shape)
    return points.expand(*shape, -1).flatten(-2).sort(-1).values.movedim(-1, 0)


class _Panels(NamedTuple):
    """Integrals over the panels between the points of a grid, which are not negative.

    Attributes:
        edges: Points of the grid, ``(P, *batch, D)``.
        middle: Index of the point m, ``(1, *batch, D)``.
        inward: Integrals of T between m and each point, ``(P, *batch, D)``.
        outward: Integrals of T from each point away from m, likewise.
        squared: Integral of T squared, ``(*batch, D)``.
        finite: Whether the integrals of T below and above m are finite, ``(2, *batch, D)``.
    """

    edges: Tensor
    middle: Tensor
    inward: Tensor
    outward: Tensor
    squared: Tensor
    finite: Tensor


class _Tails:
    """Integrals of the tail probability T(t), the probability beyond t on its side of a point m.

    Small ones keep their digits, until the grid ends at probabilities of about 1e-17: further out they are 0.
    """

    def __init__(self, marginals: WarpedMarginals) -> None:
        self.marginals, self.warp = marginals, marginals.warp
        with torch.no_grad():
            edges = with_kinks(_grid(marginals.inner.mixture), self.warp.kinks())
            middle = (marginals.inner.cdf(edges) >= 0.5).to(torch.int8).argmax(0, keepdim=True)
        self.panels = self._integrated(edges, middle)

    def crps(self, value: Tensor) -> Tensor:
        """Score of values ``(*sample, *batch, D)``."""
        z, distance, _ = self._placed(value)
        between = self._integral(z, torch.zeros_like(z, dtype=torch.bool))
        score = distance.abs() + self.panels.squared - 2 * between
        return torch.where(self.panels.finite.all(0), score, math.inf)

    def expected_below(self, value: Tensor) -> Tensor:
        """How far the variable falls short of values on average."""
        z, distance, upper = self._placed(value)
        integral, total = self._integral(z, ~upper), self.panels.outward.gather(0, self.panels.middle).squeeze(0)
        moment = torch.where(upper, total + distance - integral, integral)
        return torch.where(self.panels.finite[0], moment, math.inf)

    def expected_above(self, value: Tensor) -> Tensor:
        """How far the variable exceeds values on average."""
        z, distance, upper = self._placed(value)
        integral, total = self._integral(z, upper), self.panels.inward[-1]
        moment = torch.where(upper, integral, total - distance - integral)
        return torch.where(self.panels.finite[1], moment, math.inf)

    def _integrated(self, edges: Tensor, middle: Tensor) -> _Panels:
        start, width = edges[:-1], edges.diff(dim=0)
        column = (-1, *(1,) * (edges.ndim - 1))
        index = torch.arange(len(edges), device=edges.device).reshape(column)
        upper = index[:-1] >= middle
        single, squared = torch.zeros_like(start), torch.zeros_like(start)
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            z = start + node * width
            tail, pace = self._tail(z, upper), weight * width * self._pace(z)
            single, squared = single + pace * tail, squared + pace * tail.square()
        none = torch.zeros_like(single[:1])
        # Sums of what lies on one side of m alone, so that an infinite one does not enter the other.
        below, above = torch.where(upper, 0.0, single), torch.where(upper, single, 0.0)
        from_below = torch.cat([none, below.cumsum(0)])
        from_above = torch.cat([above.flip(0).cumsum(0).flip(0), none])
        inward = torch.where(
            index >= middle,
            torch.cat([none, above.cumsum(0)]),
            torch.cat([below.flip(0).cumsum(0).flip(0), none]),
        )
        outward = torch.where(index > middle, from_above, from_below)
        ends = edges[[0, -1]]
        last = self._tail(ends, torch.tensor([False, True], device=edges.device).reshape(column))
        last = last * self._pace(ends, math.inf) * width[[0, -1]]
        finite = last < 1e-3 * torch.stack([from_below[-1], from_above[0]])
        return _Panels(edges, middle, inward, outward, squared.sum(0), finite)

    def _placed(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images of values on the line, within the grid; the distances of values from m; which are above it."""
        edges, middle = self.panels.edges, self.panels.middle
        centre = edges.gather(0, middle).squeeze(0)
        z = torch.maximum(torch.minimum(self.warp.clamped(value), edges[-1]), edges[0])
        return z, value - self.warp.inverse(centre), z >= centre

    def _integral(self, z: Tensor, outwards: Tensor) -> Tensor:
        """Integrate T from points ``(*sample, *batch, D)`` away from m where it is asked for, and else up to m."""
        shape = torch.broadcast_shapes(z.shape, outwards.shape, self.panels.edges.shape[1:])
        z, outwards = z.expand(shape), outwards.expand(shape)
        edges, middle, inward, outward = (
            t.reshape(len(t), *(1,) * (len(shape) - t.ndim + 1), *t.shape[1:]).expand(-1, *shape)
            for t in (self.panels.edges, self.panels.middle, self.panels.inward, self.panels.outward)
        )
        upper = z >= edges.gather(0, middle).squeeze(0)
        passed = (edges <= z).sum(0)
        near = torch.where(upper == outwards, passed, passed - 1).clamp(0, len(edges) - 1).unsqueeze(0)
        start = edges.gather(0, near).squeeze(0)
        part = torch.zeros_like(z)
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            point = start + node * (z - start)
            part = part + weight * (z - start).abs() * self._tail(point, upper) * self._pace(point)
        return torch.where(outwards, outward.gather(0, near), inward.gather(0, near)).squeeze(0) + part

    def _tail(self, z: Tensor, upper: Tensor) -> Tensor:
        inner = self.marginals.inner
        return torch.where(upper, inner.sf(z), inner.cdf(z))

    def _pace(self, z: Tensor, beyond: float = 0.0) -> Tensor:
        """Derivative of y with respect to z; a constant where y is beyond the numbers of its precision.

        Infinite numbers would make gradients NaN, even where an integral is infinite and not used.
        """
        known = self.warp.inverse(z.detach()).abs() < _REPRESENTABLE * torch.finfo(z.dtype).max
        slope = self.warp.log_slope(self.warp.inverse(torch.where(known, z, 0.0)))
        return torch.where(known, (-slope).exp(), beyond)
