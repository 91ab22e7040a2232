r"""Components given that each output lies in an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.families.components import Components, DerivedComponents, OutputsInOrder, not_closed
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.truncation.truncated_law import TruncatedLaw, standardized
from pyro_mdn.distributions.truncation.truncated_marginals import TruncatedMarginals
from pyro_mdn.distributions.units.warps import support_between
from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.tensor_batch import folded, stored, take_component
from pyro_mdn.tensors.univariate import Law, UnivariateMixture

__all__ = ["TruncatedComponents", "truncated_components"]


@dataclass(frozen=True, eq=False)
class TruncatedComponents(DerivedComponents):
    r"""Components given that :math:`a_d \le y_d \le b_d` for every output d.

    .. math:: p_k(y) = \prod_d \frac{q_{kd}(y_d)}{P_k(a_d \le y_d \le b_d)}

    Outputs of a component are independent, before and after. Locations are those of the base, and may lie outside.

    Args:
        base: Components q with independent outputs, each of which has a location, a scale and a law.
        low: Lower ends a, ``(*batch, 1 | K, D)``; minus infinity where there is none.
        high: Upper ends b, likewise.
    """

    low: Tensor = stored(1)
    high: Tensor = stored(1)

    @property
    def support(self) -> constraints.Constraint:
        return support_between(self.low.amin(-2), self.high.amax(-2), self.base.locs[..., 0, :])

    @property
    def lowest(self) -> Tensor:
        return self.low.amin(-2, keepdim=True)

    # Batches

    def expand(self, batch_shape: Sequence[int]) -> Self:
        low, high = (t.expand(*batch_shape, t.shape[-1]) for t in (self.low, self.high))
        return replace(self, base=self.base.expand(batch_shape), low=low, high=high)

    def pooled(self, full: torch.Size, dim: int) -> Self:
        ends = (folded(t.expand(*full, t.shape[-1]), dim, len(full) - 1) for t in (self.low, self.high))
        return replace(self, **dict(zip(("low", "high"), ends, strict=True)), base=self.base.pooled(full, dim))

    def select(self, component: Tensor) -> Self:
        low, high = (t if t.shape[-2] == 1 else take_component(t, component, 1) for t in (self.low, self.high))
        return replace(self, base=self.base.select(component), low=low, high=high)

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        return self.output_log_prob(value).sum(-2)

    def output_log_prob(self, value: Tensor) -> Tensor:
        low, high, points = self.low.mT, self.high.mT, value.unsqueeze(-1)
        inside = (points >= low) & (points <= high)
        density = self.base.output_log_prob(value) - self._law().log_total
        return torch.where(points.isnan(), points, density.masked_fill(~inside, -math.inf))

    def output_log_interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        (locs, scale, _), law = self.base.univariate(), self._law()
        return law.log_between(*(standardized(end.unsqueeze(-1), locs, scale) for end in (lower, upper)))

    def draw(self) -> Tensor:
        locs, scale, law = self.univariate()
        u = torch.rand_like(law.log_total).clamp(min=0.25 * torch.finfo(locs.dtype).eps)
        draws = (locs + scale * law.two_sided_quantile(u)).mT
        return torch.maximum(torch.minimum(draws, self.high), self.low)

    # Moments

    def mean(self) -> Tensor:
        locs, scale, law = self.univariate()
        return (locs + scale * law.mean()).mT

    def stddev(self) -> Tensor:
        _, scale, law = self.univariate()
        return (scale * law.stddev()).mT

    # What is again truncated

    def marginal(self, dims: Sequence[int]) -> Self:
        dims = list(dims)
        return replace(self, base=self.base.marginal(dims), low=self.low[..., dims], high=self.high[..., dims])

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        low, high = (_scaled(end, shift, scale) for end in (self.low, self.high))
        low, high = torch.where(scale > 0, low, high), torch.where(scale > 0, high, low)
        return replace(self, base=self.base.affine(shift, scale), low=low, high=high)

    # Single outputs

    def univariate(self) -> tuple[Tensor, Tensor, TruncatedLaw]:
        locs, scale, _ = self.base.univariate()
        return locs, scale, self._law()

    def output_marginals(self, logits: Tensor) -> Marginals:
        locs, scale, law = self.univariate()
        mixture = UnivariateMixture(logits, locs, scale, law)
        return TruncatedMarginals(mixture, law, self.low.amin(-2), self.high.amax(-2))

    def in_order(self) -> OutputsInOrder:
        return _InOrder(*self.univariate())

    def log_total(self) -> Tensor:
        """Log-probabilities of the intervals under the base, ``(*batch, D, K)``."""
        return self._law().log_total

    def _law(self) -> TruncatedLaw:
        locs, scale, law = self.base.univariate()
        ends = (standardized(end.mT, locs, scale) for end in (self.low, self.high))
        return TruncatedLaw(law, *torch.broadcast_tensors(*ends))

    # Checks

    def validate(self) -> None:
        super().validate()
        if not self.base.has_independent_outputs:
            raise ValueError("base: expected components with independent outputs")
        if is_known(self.low, self.high) and not bool((self.low < self.high).all()):
            raise ValueError("low, high: expected lower ends below the upper ones")

    def describe(self) -> str:
        return f"{self.base.describe()}, truncated"


def truncated_components(base: Components, low: Tensor, high: Tensor) -> tuple[Components, Tensor]:
    """Truncate components to the ranges between ends ``(*batch, D)``; a part without finite ends may be of any family.

    Returns:
        The truncated components, and the log-probabilities of the ranges under the base, ``(*batch, K)``.

    Raises:
        NotImplementedError: Unless outputs are independent, and each has a location, a scale and a law.
    """
    try:
        _require_truncatable(base)
    except NotImplementedError:
        if not is_known(low, high) or bool((low.isfinite() | high.isfinite()).any()):
            raise
        return base, torch.zeros_like(base.locs[..., 0])
    inner, log_mass = _truncated(base.inner, *(base.to_inner(end).unsqueeze(-2) for end in (low, high)))
    return base.of_inner(inner), log_mass


def _require_truncatable(components: Components) -> None:
    components.require_line("truncated", "probability_between is of arcs")
    if not components.has_independent_outputs:
        not_closed("truncated", components, "marginals of one output are; or draw, and keep the draws inside")
    try:
        components.inner.univariate()
    except NotImplementedError:
        not_closed("truncated", components, "divide probabilities by that of the range; or keep the draws inside")


def _truncated(base: Components, low: Tensor, high: Tensor) -> tuple[TruncatedComponents, Tensor]:
    if isinstance(base, TruncatedComponents):
        inside = torch.maximum(low, base.low), torch.minimum(high, base.high)
        new = replace(base, low=inside[0], high=inside[1])
        return new, (new.log_total() - base.log_total()).sum(-2)
    new = TruncatedComponents(base, low, high)
    return new, new.log_total().sum(-2)


class _InOrder(OutputsInOrder):
    """Outputs of independent components: what came before does not matter."""

    def __init__(self, locs: Tensor, scale: Tensor, law: Law) -> None:
        self.locs, self.scale, self.law, self.count = locs, scale, law, 0

    def next_output(self) -> tuple[Tensor, Tensor, Law]:
        d = self.count
        law = self.law.map(lambda t, n: t[..., min(d, t.shape[-2] - 1), :])
        return self.locs[..., d, :], self.scale[..., min(d, self.scale.shape[-2] - 1), :], law

    def observe(self, value: Tensor) -> None:
        self.count += 1


def _scaled(end: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    finite = shift + scale * torch.where(end.isinf(), 0.0, end)
    return torch.where(end.isinf(), end * scale.detach().sign(), finite)
