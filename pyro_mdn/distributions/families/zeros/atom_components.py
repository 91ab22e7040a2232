r"""Components with a point mass at the lower end of the support of each output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_mdn.distributions.families.components import Components, DerivedComponents, OutputsInOrder, not_closed
from pyro_mdn.distributions.families.zeros.atom_marginals import AtomMarginals
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.distributions.units.units import without_ends
from pyro_mdn.tensors.tensor_batch import folded, stored, take_component
from pyro_mdn.tensors.univariate import Law

__all__ = ["AtomComponents"]


@dataclass(frozen=True, eq=False)
class AtomComponents(DerivedComponents):
    r"""Components whose outputs are at the lower end of their support with a probability, and else follow others.

    .. math:: p_{kd}(l) = \pi_{kd}, \qquad p_{kd}(y) = (1 - \pi_{kd}) \, q_{kd}(y) \; \text{for} \; y > l

    On the real line, the lower end is minus infinity; a warp takes it to where the support begins. Outputs of a
    component are independent.

    Args:
        base: Components q of the other values, with independent outputs.
        logit: Logits of the probabilities π, ``(*batch, K, D)``.
    """

    logit: Tensor = stored(1)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.greater_than_eq(self._low()), 1)

    @property
    def lowest(self) -> Tensor:
        return self.base.lowest

    @property
    def has_pathwise_draws(self) -> bool:
        return False

    def mapped(self, function: Callable[[Components], Components]) -> Self:
        return replace(self, base=function(self.base))

    def pulled_back(self, value: TargetsOrTensor) -> tuple[Components, TargetsOrTensor, Tensor | None]:
        if is_validation_enabled():
            # An error for values outside of the support.
            self.base.pulled_back(without_ends(value, self._low()))
        return self, value, None

    # Batches

    def expand(self, batch_shape: Sequence[int]) -> Self:
        return replace(
            self, base=self.base.expand(batch_shape), logit=self.logit.expand(*batch_shape, self.logit.shape[-1])
        )

    def pooled(self, full: torch.Size, dim: int) -> Self:
        logit = folded(self.logit.expand(*full, self.logit.shape[-1]), dim, len(full) - 1)
        return replace(self, base=self.base.pooled(full, dim), logit=logit)

    def select(self, component: Tensor) -> Self:
        return replace(self, base=self.base.select(component), logit=take_component(self.logit, component, 1))

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        return self.output_log_prob(value).sum(-2)

    def output_log_prob(self, value: Tensor) -> Tensor:
        at_end = (value == self._low()).unsqueeze(-1)
        return torch.where(
            at_end, logsigmoid(self.logit).mT, logsigmoid(-self.logit).mT + self.base.output_log_prob(value)
        )

    def output_log_interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        low = self._low()
        others = logsigmoid(-self.logit).mT + self.base.output_log_interval(lower, upper)
        inside = ((lower <= low) & (upper >= low)).unsqueeze(-1)
        return torch.where(inside, torch.logaddexp(others, logsigmoid(self.logit).mT), others)

    def draw(self) -> Tensor:
        draws = self.base.draw()
        return torch.where(torch.rand_like(draws) < self.logit.sigmoid(), self.base.lowest, draws)

    # Moments

    def mean(self) -> Tensor:
        return self.logit.sigmoid() * self.base.lowest + (-self.logit).sigmoid() * self.base.mean()

    def variance(self) -> Tensor:
        distance = self.base.mean() - self.base.lowest
        return (-self.logit).sigmoid() * (self.base.variance() + self.logit.sigmoid() * distance.square())

    def stddev(self) -> Tensor:
        return self.variance().sqrt()

    # What has again an atom

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, base=self.base.marginal(dims), logit=self.logit[..., list(dims)])

    def marginals(self, logits: Tensor) -> Marginals:
        joint = logits.unsqueeze(-2)
        zero = (joint + logsigmoid(self.logit).mT).logsumexp(-1)
        others = joint + logsigmoid(-self.logit).mT
        rest = others.logsumexp(-1)
        return AtomMarginals(self.base.output_marginals(others - rest.unsqueeze(-1)), zero, rest, self._low())

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        return replace(self, base=self.base.affine(shift, scale))

    # What is not closed

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("a location and a scale", self, "marginals are")

    def in_order(self) -> OutputsInOrder:
        not_closed("transport", self, "scores.pit draws uniform numbers where an output may be zero")

    # Checks

    def validate(self) -> None:
        super().validate()
        if not self.base.has_independent_outputs:
            raise ValueError("base: expected components with independent outputs")
        if not bool(self.logit.isfinite().all()):
            raise ValueError("logit: expected finite logits of the probability of zero")

    def describe(self) -> str:
        return f"{self.base.describe()}, zeros"

    def _low(self) -> Tensor:
        """Lower ends for values without a component axis."""
        low = self.base.lowest
        return low.squeeze(-2) if low.ndim > 1 else low
