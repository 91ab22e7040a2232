r"""Components wrapped around circles: angles, beside outputs that may be anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.families.components import (
    Components,
    DerivedComponents,
    OutputsInOrder,
    not_closed,
    total_stddev,
)
from pyro_mdn.distributions.marginals import Marginals, MarginalsByColumn
from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.circular.circles import ROUNDING, Circles, in_batch
from pyro_mdn.distributions.units.circular.circular_marginals import CircularMarginals
from pyro_mdn.distributions.units.circular.circular_mixture import direction_and_spread
from pyro_mdn.distributions.units.warped import WarpedComponents
from pyro_mdn.distributions.units.warps import support_between
from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.numerics import log_sum_exp
from pyro_mdn.tensors.tensor_batch import folded, nested
from pyro_mdn.tensors.univariate import Law, UnivariateMixture

__all__ = ["WrappedComponents", "wrapped_components"]


@dataclass(frozen=True, eq=False)
class WrappedComponents(DerivedComponents):
    r"""Components of :math:`y = z \bmod P`, for components of z on the real line and a period P; also of some outputs.

    .. math:: p_k(y) = \sum_{m=-3}^3 q_k(y + m P)

    The sum goes over all combinations of the turns of two angles. It is exact to 1e-9 for normal components with scales
    of up to 3 radians, at which a wrapped normal is within 2 % of uniform. In general it lacks the probability of z
    more than three periods from its location. Components that are made wider have more turns: see :meth:`widen`.

    Args:
        base: Components of z, with the locations of angles in their periods: see :func:`wrapped_components`.
        circles: Circles of the outputs, one angle at least.

    References:
        Mardia & Jupp (2000), Directional statistics, on wrapped distributions.
    """

    has_angles: ClassVar[bool] = True

    circles: Circles = nested()

    @property
    def support(self) -> constraints.Constraint:
        like = self.base.locs[..., 0, :]
        line = like.new_full((self.dim,), torch.inf)
        low, high = (
            self.base.warp.of_values().limits(like) if isinstance(self.base, WarpedComponents) else (-line, line)
        )
        half = (0.5 + ROUNDING) * self.circles.periods(like)
        centres, angle = self.circles.centres(like), self.circles.is_angle(like)
        return support_between(torch.where(angle, centres - half, low), torch.where(angle, centres + half, high), like)

    @property
    def has_pathwise_draws(self) -> bool:
        return False

    # The space of the base

    @property
    def inner(self) -> Components:
        return self.base.inner

    def to_inner(self, value: Tensor) -> Tensor:
        not_closed("transport to and from uniforms", self, "marginals have cdf and icdf")

    def from_inner(self, value: Tensor) -> Tensor:
        return self.circles.wrap(self.base.from_inner(value))

    def pulled_back(self, value: TargetsOrTensor) -> tuple[Components, TargetsOrTensor, Tensor | None]:
        """Change variables; values and what the change adds have a dimension of images first."""
        if is_validation_enabled():
            self.require_inside(value, "value")
        value = in_batch(value, self.base.locs.ndim - 2)
        share = self.circles.log_share(value)
        closed = self.circles.closed(value) if isinstance(value, Targets) else value
        base, point, log_slope = self.base.pulled_back(closed)
        known = torch.where(point.kinds() == EXACT, point.lower, math.nan) if isinstance(point, Targets) else point
        base = base.facing(known, self.circles.periods(known), self.circles.angles)
        return base, self.circles.images(point), share if log_slope is None else share + log_slope

    def widen(self, factor: Tensor) -> Self:
        """Multiply the scales, and add turns to images that wider components need."""
        wide = replace(self, base=self.base.widen(factor))
        if self.inner.is_circular:
            return wide
        circles = list(self.circles.of_outputs)
        for d, circle in enumerate(circles):
            if circle is not None:
                _, scale, _ = wide.inner.marginal([d]).univariate()
                circles[d] = circle.reaching(scale.amax().item()) if is_known(scale) and scale.numel() else circle
        return replace(wide, circles=Circles(tuple(circles)))

    def expand(self, batch_shape: Sequence[int]) -> Self:
        return replace(self, base=self.base.expand(batch_shape))

    def pooled(self, full: torch.Size, dim: int) -> Self:
        return replace(self, base=self.base.pooled(full, dim))

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        base, images, log_share = self.pulled_back(value)
        assert isinstance(images, Tensor)
        assert log_share is not None
        return log_sum_exp(base.log_prob(images) + log_share.unsqueeze(-1))

    def draw(self) -> Tensor:
        return self.circles.wrap(self.base.draw())

    # Moments

    def mean(self) -> Tensor:
        return self._of_components(0, lambda base: base.mean())

    def stddev(self) -> Tensor:
        return self._of_components(1, lambda base: base.stddev())

    def _of_components(self, which: int, on_the_line: Any) -> Tensor:
        """Put the moments of components that are angles beside those of the other outputs."""
        columns = []
        for d, circle in enumerate(self.circles.of_outputs):
            if circle is None:
                columns.append(on_the_line(self.base.marginal([d])).squeeze(-1))
            else:
                locs, scale, law = self.inner.marginal([d]).univariate()
                # Each component as a mixture of one.
                single = UnivariateMixture(torch.zeros_like(locs.mT), locs.mT, scale.mT, law.map(lambda t, n: t.mT))
                columns.append(direction_and_spread(single, circle)[which])
        return torch.stack(torch.broadcast_tensors(*columns), -1)

    def mixture_moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        pairs = []
        for d, circle in enumerate(self.circles.of_outputs):
            if circle is None:
                single = self.base.marginal([d])
                mean = single.mean()
                centre = (logits.exp().unsqueeze(-1) * mean).sum(-2)
                pairs.append((centre, total_stddev(logits, single.stddev(), mean - centre.unsqueeze(-2))))
            else:
                mixture = UnivariateMixture(logits.unsqueeze(-2), *self.inner.marginal([d]).univariate())
                pairs.append(direction_and_spread(mixture, circle))
        means, spreads = (torch.cat(torch.broadcast_tensors(*parts), -1) for parts in zip(*pairs, strict=True))
        return means, spreads

    def covariance_root(self) -> Tensor:
        not_closed("covariance_root", self, "stddev is the circular standard deviation")

    def covariance_matrix(self) -> Tensor:
        if self.dim > 1:
            not_closed("covariance_matrix", self, "variance is, of each output; or estimate it from draws")
        return super().covariance_matrix()

    def require_inside(self, value: TargetsOrTensor, name: str) -> None:
        self.circles.require_inside(value, name)

    def require_line(self, operation: str, instead: str) -> None:
        not_closed(operation, self, instead)

    # Marginals and conditionals

    def marginal(self, dims: Sequence[int]) -> Any:
        return _around(self.base.marginal(dims), self.circles.marginal(dims))

    def marginals(self, logits: Tensor) -> Marginals:
        columns: list[Marginals] = []
        for d, circle in enumerate(self.circles.of_outputs):
            if circle is None:
                columns.append(self.base.marginal([d]).marginals(logits))
            else:
                single = UnivariateMixture(logits.unsqueeze(-2), *self.inner.marginal([d]).univariate())
                columns.append(CircularMarginals(single, circle, self))
        return columns[0] if len(columns) == 1 else MarginalsByColumn(columns)

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("univariate", self, "marginals are; or inner.univariate, before they are wrapped")

    def in_order(self) -> OutputsInOrder:
        not_closed("outputs in order", self, "inner has them, before they are wrapped")

    def condition(self, values: Tensor) -> Components:
        n = values.shape[-1]
        rest = self.circles.marginal(range(n, self.dim))
        if self.circles.marginal(range(n)).angles and not self.has_independent_outputs:
            not_closed("condition on an angle", self, "condition of a mixture is: it weights images")
        return wrapped_components(self.base.condition(values), rest)

    def given_images(self, logits: Tensor, values: Tensor) -> tuple[Tensor, Components] | None:
        n = values.shape[-1]
        known = self.circles.marginal(range(n))
        if not known.angles or self.has_independent_outputs:
            return None
        values = in_batch(values, self.base.locs.ndim - 2)
        base, images, log_share = self.marginal(range(n)).pulled_back(values)
        assert isinstance(images, Tensor)
        assert log_share is not None
        joint = logits + base.log_prob(images) + log_share.unsqueeze(-1)
        others = self.inner.locs[..., n:].expand(*base.locs.shape[:-1], -1)
        whole = self.base.of_inner(replace(self.inner, locs=torch.cat([base.locs, others], -1)))
        rest = whole.condition(known.images(values)).pooled(joint.shape, 0)
        rest = wrapped_components(rest, self.circles.marginal(range(n, self.dim)))
        return folded(joint, 0, joint.ndim - 1), rest

    def num_given(self, dims: Sequence[int], count: int) -> int:
        return count if self.has_independent_outputs else count * self.circles.marginal(dims).num_images

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        not_closed("affine", self, "Angle(period, low) takes other units; or map draws")

    def describe(self) -> str:
        return f"{self.base.describe()}, {self.circles.describe()}"


def wrapped_components(base: Components, circles: Circles) -> Components:
    """Wrap components on the real line around circles, after moving their locations into the periods.

    Args:
        base: Components whose angles have not gone through a warp.
        circles: Circles of the outputs; components without an angle stay as they are.
    """
    if not circles.angles:
        return base
    return _around(_recentred(base, circles), circles.without_images() if base.inner.is_circular else circles)


def _around(base: Components, circles: Circles) -> Components:
    return WrappedComponents(base, circles) if circles.angles else base


def _recentred(base: Components, circles: Circles) -> Components:
    """Move the locations of angles by whole turns into their periods."""
    if isinstance(base, WarpedComponents):
        return replace(base, base=_recentred(base.base, circles))
    return replace(base, locs=circles.around(base.locs, circles.centres(base.locs)))
