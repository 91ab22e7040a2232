r"""Components pushed through a warp: what is closed for a family is closed for its image under an increasing map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.families.components import Components, DerivedComponents, OutputsInOrder, not_closed
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.compound_warps import Rescaled
from pyro_mdn.distributions.units.expectations import expectation
from pyro_mdn.distributions.units.warped_marginals import WarpedMarginals
from pyro_mdn.distributions.units.warps import Warp
from pyro_mdn.support.arrays import refuse
from pyro_mdn.support.checks import is_known, unwrapped
from pyro_mdn.tensors.tensor_batch import nested
from pyro_mdn.tensors.univariate import Law

__all__ = ["WarpedComponents", "require_inside"]


@dataclass(frozen=True, eq=False)
class WarpedComponents(DerivedComponents):
    r"""Components of :math:`y = w^{-1}(z)`, for components of z on the whole real line and a warp w.

    .. math:: p_k(y) = q_k(w(y)) \prod_d w_d'(y_d)

    Args:
        base: Components of z.
        warp: The warp.
    """

    warp: Warp = nested()

    @property
    def locs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Images of the locations, ``(*batch, K, D)``: medians of the outputs, for symmetric components."""
        return self.warp.inverse(self.base.locs)

    @property
    def support(self) -> constraints.Constraint:
        return self.warp.of_values().support(self.base.locs[..., 0, :])

    @property
    def lowest(self) -> Tensor:
        low, _ = self.warp.limits(self.base.locs[..., :1, :])
        return torch.broadcast_to(low, torch.broadcast_shapes(low.shape, self.base.locs.shape[-1:]))

    # The space of the base

    @property
    def inner(self) -> Components:
        return self.base

    def of_inner(self, inner: Components) -> WarpedComponents:
        return replace(self, base=inner)

    def to_inner(self, value: Tensor) -> Tensor:
        return self.warp.of_values().clamped(value)

    def from_inner(self, value: Tensor) -> Tensor:
        return self.warp.of_values().inverse(value)

    def pulled_back(self, value: TargetsOrTensor) -> tuple[Components, TargetsOrTensor, Tensor | None]:
        warp = self.warp.of_values()
        if is_validation_enabled():
            require_inside(warp, value, "value")
        if isinstance(value, Targets):
            kinds, mapped = value.kinds(), value.limits(warp.clamped)
            exact, possible = kinds == EXACT, mapped.lower < mapped.upper
            possible |= exact & warp.contains(value.lower)
            # What cannot be is left out here, and has the density 0 by its slope.
            lower = mapped.lower.masked_fill(~possible, -torch.inf)
            mapped = Targets(lower, mapped.upper.masked_fill(~possible, torch.inf))
            return self.base, mapped, self._slopes(warp, value.lower, exact, possible)
        inside = warp.contains(value)
        image = torch.where(value.isnan(), value, warp.forward(warp.some_inside(value, inside)))
        return self.base, image, self._slopes(warp, value, ~value.isnan(), inside)

    def _slopes(self, warp: Warp, value: Tensor, exact: Tensor, possible: Tensor) -> Tensor:
        """Sum of the logarithms of slopes at exact values; minus infinity where a value is not possible."""
        slopes = warp.log_slope(warp.some_inside(value, exact & possible)).masked_fill(~exact, 0.0)
        return slopes.masked_fill(~possible & (exact | ~value.isnan()), -torch.inf).sum(-1)

    def expand(self, batch_shape: Sequence[int]) -> Self:
        warp = self.warp.map(lambda t, n: t.expand(*batch_shape[:-1], *t.shape[-1 - n :]))
        return replace(self, base=self.base.expand(batch_shape), warp=warp)

    def pooled(self, full: torch.Size, dim: int) -> Self:
        def shared(tensor: Tensor, event_dim: int) -> Tensor:
            place = dim - (len(full) - 1) + tensor.ndim - 1 - event_dim
            if place < 0:
                return tensor
            first = tensor.narrow(place, 0, 1)
            if is_known(tensor) and not bool((tensor == first).all()):
                name, instead = type(self.warp).__name__, "fit of an ensemble gives its members the same one"
                raise ValueError(f"pool: expected one {name} for all mixtures, got different ones; {instead}")
            return first.squeeze(place)

        return replace(self, base=self.base.pooled(full, dim), warp=self.warp.map(shared))

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        base, image, log_slope = self.pulled_back(value)
        assert isinstance(image, Tensor)
        assert log_slope is not None
        return base.log_prob(image) + log_slope.unsqueeze(-1)

    def output_log_prob(self, value: Tensor) -> Tensor:
        warp = self.warp.of_values()
        inside = warp.contains(value)
        points = warp.some_inside(value, inside)
        log_slope = warp.log_slope(points).masked_fill(~inside, -torch.inf)
        return self.base.output_log_prob(warp.forward(points)) + log_slope.unsqueeze(-1)

    def output_log_interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        warp = self.warp.of_values()
        lower, upper = warp.clamped(lower), warp.clamped(upper)
        possible = (lower < upper) & ~(lower.isinf() & upper.isinf())
        # An interval over the whole support is certain, and one outside of it is impossible.
        mass = self.base.output_log_interval(
            torch.where(possible, lower, -torch.inf), torch.where(possible, upper, 0.0)
        )
        everything = torch.where(lower < upper, 0.0, -torch.inf).to(mass).unsqueeze(-1)
        return torch.where(possible.unsqueeze(-1), mass, everything)

    def draw(self) -> Tensor:
        return self.warp.within(self.warp.inverse(self.base.draw()))

    # Moments, by quadrature

    def mean(self) -> Tensor:
        return self._expectation(lambda y: y)

    def variance(self) -> Tensor:
        mean = self.mean()
        finite = mean.isfinite()
        centre = torch.where(finite, mean, 0.0)
        spread = self._expectation(lambda y: (y - centre).square())
        return torch.where(finite, spread, mean.abs())

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

    def _expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        locs, scale, law = self.base.univariate()

        def of_image(z: Tensor) -> Tensor:
            return function(self.warp.inverse(z.mT)).mT

        shape = torch.broadcast_shapes(locs.shape, scale.shape)
        kinks = self.warp.kinks()
        kinks = None if kinks is None else kinks.mT
        return expectation(of_image, locs.expand(shape), scale, law, kinks=kinks).mT

    def _require_independence(self, operation: str) -> None:
        if not self.has_independent_outputs:
            not_closed(operation, self, "variances are; or estimate it from draws")

    # What is again warped

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, base=self.base.marginal(dims), warp=self.warp.marginal(dims))

    def output_marginals(self, logits: Tensor) -> Marginals:
        return WarpedMarginals(self.base.output_marginals(logits), self.warp.of_values())

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("univariate", self, "marginals are; or inner.univariate, before the warp")

    def in_order(self) -> OutputsInOrder:
        not_closed("outputs in order", self, "inner has them, before the warp")

    def condition(self, values: Tensor) -> Components:
        n = values.shape[-1]
        known, rest = self.warp.marginal(range(n)), self.warp.marginal(range(n, self.dim))
        require_inside(known.of_values(), values, "values")
        base = self.base.condition(known.of_values().forward(values))
        return replace(self, base=base, warp=rest)

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        if is_known(scale) and bool((scale <= 0).any()):
            raise ValueError("scale: expected positive numbers for outputs with a warp, which is increasing")
        return replace(self, warp=Rescaled(shift, scale, self.warp))

    def describe(self) -> str:
        return f"{self.base.describe()}, warp={self.warp.describe()}"


def require_inside(warp: Warp, value: TargetsOrTensor, name: str, given: object = None, instead: str = "") -> None:
    """Raise a ``ValueError`` that names the first value outside of the support, if values are known; NaN is missing.

    Exact values have to lie inside of the support, and intervals have to meet it.

    Args:
        warp: The warp.
        value: Values ``(..., D)``.
        name: Name of the argument.
        given: The data before conversion, which may have names of rows and columns.
        instead: What to add to what was expected.
    """
    shown = value.lower if isinstance(value, Targets) else value
    if not is_known(shown):
        return
    low, high = warp.limits(shown)
    outside = (shown <= low) | (shown >= high)  # no if it is NaN
    if isinstance(value, Targets):
        exact = value.kinds() == EXACT
        outside = torch.where(exact, outside, (value.upper <= low) | (value.lower >= high))
    if bool(outside.any()):
        shown, low, high = (tensor.expand(outside.shape) for tensor in (shown, low, high))
        first = tuple(unwrapped(outside).nonzero()[0])
        ends = (unwrapped(end)[first].item() for end in (low, high))
        refuse(shown, outside, name, "numbers between {:g} and {:g}".format(*ends) + instead, given)
