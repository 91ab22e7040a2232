r"""Components pushed through a warp: what is closed for a family is closed for its image under an increasing map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.families.components import Components, OutputsInOrder, not_closed
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.units.compound_warps import Rescaled
from pyro_mdn.distributions.units.expectations import expectation
from pyro_mdn.distributions.units.warped_marginals import WarpedMarginals
from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.support.arrays import refuse
from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.tensor_batch import nested
from pyro_mdn.tensors.univariate import Law

__all__ = ["WarpedComponents", "require_inside"]


@dataclass(frozen=True, eq=False)
class WarpedComponents(Components):
    r"""Components of :math:`y = w^{-1}(z)`, for components of z on the whole real line and a warp w.

    .. math:: p_k(y) = q_k(w(y)) \prod_d w_d'(y_d)

    Args:
        base: Components of z.
        warp: The warp.
    """

    base: Components = nested()
    warp: Warp = nested()

    @property
    def locs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Images of the locations, ``(*batch, K, D)``: medians of the outputs, for symmetric components."""
        return self.warp.inverse(self.base.locs)

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def support(self) -> constraints.Constraint:
        return self.warp.support(self.base.locs)

    @property
    def has_independent_outputs(self) -> bool:
        return self.base.has_independent_outputs

    # The space of the base

    @property
    def inner(self) -> Components:
        return self.base

    def to_inner(self, value: Tensor) -> Tensor:
        return self.warp.clamped(value.unsqueeze(-2)).squeeze(-2)

    def from_inner(self, value: Tensor) -> Tensor:
        return self.warp.inverse(value.unsqueeze(-2)).squeeze(-2)

    def log_slope(self, value: Tensor) -> Tensor:
        return self.warp.log_slope(value.unsqueeze(-2)).squeeze(-2)

    def over_batch(self, batch_shape: Sequence[int]) -> Self:
        return replace(self, base=self.base.over_batch(batch_shape))

    def expand(self, batch_shape: Sequence[int]) -> Self:
        warp = self.warp.map(lambda t, n: t.expand(*batch_shape[:-1], *t.shape[-2:]))
        return replace(self, base=self.base.expand(batch_shape), warp=warp)

    def pooled(self, full: torch.Size, dim: int) -> Self:
        def shared(tensor: Tensor, event_dim: int) -> Tensor:
            place = dim - (len(full) - 1) + tensor.ndim - 2
            if place < 0:
                return tensor
            first = tensor.narrow(place, 0, 1)
            if is_known(tensor) and not bool((tensor == first).all()):
                raise ValueError(f"pool: expected one {type(self.warp).__name__} for all mixtures, got different ones")
            return first.squeeze(place)

        return replace(self, base=self.base.pooled(full, dim), warp=self.warp.map(shared))

    def select(self, component: Tensor) -> Self:
        return replace(self, base=self.base.select(component))

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        z, log_slope = self._at(value)
        return self.base.log_prob(z) + log_slope.unsqueeze(-1)

    def mixture_log_prob(self, logits: Tensor, value: Tensor, *, normalize: bool = False) -> Tensor:
        z, log_slope = self._at(value)
        return self.base.mixture_log_prob(logits, z, normalize=normalize) + log_slope

    def relative_log_prob(self, value: Tensor) -> Tensor:
        return self.base.relative_log_prob(self._at(value)[0])

    def _at(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Image of points, and log-volume ``(*sample, *batch)``, which is minus infinity outside of the support."""
        points = value.unsqueeze(-2)
        if is_validation_enabled():
            require_inside(self.warp, value, "value")
        inside = self.warp.contains(points)
        points = torch.where(inside, points, self.warp.inverse(torch.zeros_like(points)))
        log_slope = self.warp.log_slope(points).masked_fill(~inside, -torch.inf)
        return self.warp.forward(points).squeeze(-2), log_slope.sum((-2, -1))

    def draw(self) -> Tensor:
        return self.warp.within(self.warp.inverse(self.base.draw()))

    # Moments, by quadrature

    def mean(self) -> Tensor:
        return self._expectation(lambda y: y)

    def variance(self) -> Tensor:
        mean = self.mean()
        return self._expectation(lambda y: (y - mean).square())

    def stddev(self) -> Tensor:
        return self.variance().sqrt()

    def covariance_root(self) -> Tensor:
        self._require_independence("covariance_root")
        return super().covariance_root()

    def covariance_matrix(self) -> Tensor:
        self._require_independence("covariance_matrix")
        return super().covariance_matrix()

    def narrowest(self) -> Tensor:
        inner = self.base.narrowest()
        return inner * (-self.warp.log_slope(self.warp.within(self.locs))).exp().amin(-1)

    def _expectation(self, function: object) -> Tensor:
        locs, scale, law = self.base.univariate()

        def of_image(z: Tensor) -> Tensor:
            return function(self.warp.inverse(z.mT)).mT  # pyright: ignore[reportCallIssue]

        shape = torch.broadcast_shapes(locs.shape, scale.shape)
        return expectation(of_image, locs.expand(shape), scale, law).mT

    def _require_independence(self, operation: str) -> None:
        if not self.has_independent_outputs:
            not_closed(operation, self, "variances are; or estimate it from draws")

    # What is again warped

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, base=self.base.marginal(dims), warp=self.warp.marginal(dims))

    def marginals(self, logits: Tensor) -> Marginals:
        return WarpedMarginals(self.base.marginals(logits), self.warp)

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("univariate", self, "marginals are; or inner.univariate, before the warp")

    def in_order(self) -> OutputsInOrder:
        not_closed("outputs in order", self, "inner has them, before the warp")

    def condition(self, values: Tensor) -> Components:
        n = values.shape[-1]
        known, rest = self.warp.marginal(range(n)), self.warp.marginal(range(n, self.dim))
        require_inside(known, values, "values")
        base = self.base.condition(known.forward(values.unsqueeze(-2)).squeeze(-2))
        return replace(self, base=base, warp=rest)

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        if is_known(scale) and bool((scale <= 0).any()):
            raise ValueError("scale: expected positive numbers for outputs with a warp, which is increasing")
        return replace(self, warp=Rescaled(shift, scale, self.warp))

    def widen(self, factor: Tensor) -> Self:
        return replace(self, base=self.base.widen(factor))

    # Checks

    def validate(self) -> None:
        self.base.validate()

    def require_components(self, count: int) -> None:
        self.base.require_components(count)

    def of_dim(self, dim: int) -> Self:
        return replace(self, base=self.base.of_dim(dim))

    def describe(self) -> str:
        return f"{self.base.describe()}, warp={self.warp.describe()}"


def require_inside(warp: Warp, value: Tensor, name: str, given: object = None) -> None:
    """Raise a ``ValueError`` that names the first value outside of the support, if values are known; NaN is missing.

    Args:
        warp: The warp.
        value: Values ``(..., D)``.
        name: Name of the argument.
        given: The data before conversion, which may have names of rows and columns.
    """
    if not is_known(value):
        return
    outside = ~(warp.contains(value.unsqueeze(-2)).squeeze(-2) | value.isnan())
    if bool(outside.any()):
        low, high = (end.detach().flatten().unique().tolist() for end in warp.limits(value.unsqueeze(-2)))
        ends = " and ".join(f"{end[0]:g}" if len(end) == 1 else f"one of {end}" for end in (low, high))
        refuse(value, outside, name, f"numbers between {ends}", given)
