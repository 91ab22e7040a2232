r"""Components of counts: independent outputs, each with a law over 0, 1, 2, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.families.components import Components, OutputsInOrder, not_closed
from pyro_mdn.distributions.families.counts.count_law import CountLaw
from pyro_mdn.distributions.families.counts.count_marginals import CountMarginals, log_between
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.count_units import are_counts, require_counts
from pyro_mdn.tensors.tensor_batch import nested, take_component
from pyro_mdn.tensors.univariate import Law

__all__ = ["CountComponents"]


@dataclass(frozen=True, eq=False)
class CountComponents(Components):
    r"""Components with independent outputs that are counts, :math:`p_k(y) = \prod_d p_{kd}(y_d)`.

    Densities are probabilities. An interval of a target contains its ends.

    Args:
        law: Law of each output of each component, with parameters ``(*batch, K, D)``.
    """

    law: CountLaw = nested()

    @property
    def locs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Means, ``(*batch, K, D)``."""
        return self.law.mean()

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.nonnegative_integer, 1)

    @property
    def has_independent_outputs(self) -> bool:
        return True

    @property
    def has_pathwise_draws(self) -> bool:
        return False

    def pulled_back(self, value: TargetsOrTensor) -> tuple[Components, TargetsOrTensor, Tensor | None]:
        if is_validation_enabled():
            require_counts(value, "value")
        exact = value.lower if isinstance(value, Targets) else value
        counts = are_counts(exact)
        if isinstance(value, Targets):
            counts |= value.kinds() != EXACT
            value = value.limits(lambda t: t.masked_fill(~counts, 0.0))
        else:
            value = value.masked_fill(~counts, 0.0)
        # What is no count has the density 0.
        impossible = torch.zeros_like(exact, dtype=self.like.dtype).masked_fill(~counts, -torch.inf)
        return self, value, impossible.sum(-1)

    def over_batch(self, batch_shape: Sequence[int]) -> Self:
        return self.expand((*batch_shape, self.locs.shape[-2]))

    def select(self, component: Tensor) -> Self:
        count = self.locs.shape[-2]
        return self.map(lambda t, n: take_component(t.expand(*t.shape[:-2], count, -1), component, n))

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(value.unsqueeze(-2)).sum(-1)

    def output_log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(value.unsqueeze(-2)).mT

    def output_log_interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        return log_between(self.law, lower.unsqueeze(-2), upper.unsqueeze(-2)).mT

    def draw(self) -> Tensor:
        return self.law.draw()

    # Moments

    def mean(self) -> Tensor:
        return self.law.mean()

    def stddev(self) -> Tensor:
        return self.law.variance().sqrt()

    def variance(self) -> Tensor:
        return self.law.variance()

    def narrowest(self) -> Tensor:
        return self.stddev().amin(-1)

    # Marginals and conditionals

    def marginal(self, dims: Sequence[int]) -> Self:
        dims = list(dims)
        return replace(self, law=self.law.map(lambda t, n: t[..., dims]))

    def marginals(self, logits: Tensor) -> Marginals:
        return CountMarginals(logits, self.law)

    def as_pyro(self) -> dist.TorchDistribution:
        return self.law.as_pyro().to_event(1)

    # What counts do not have

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("a location and a scale", self, "marginals are")

    def in_order(self) -> OutputsInOrder:
        not_closed("transport", self, "scores.pit draws uniform numbers in the steps of each output")

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        not_closed("affine", self, "map draws")

    def widen(self, factor: Tensor) -> Self:
        not_closed("temper", self, "divide the logits by the temperature")

    # Checks

    def require_components(self, count: int) -> None:
        for tensor in self.tensors():
            if tensor.ndim < 2 or tensor.shape[-2] not in (1, count):
                raise ValueError(f"law: expected a component axis of 1 or {count}, got {tuple(tensor.shape)}")

    def of_dim(self, dim: int) -> Self:
        if any(tensor.shape[-1] != dim for tensor in self.tensors()):
            shapes = [tuple(tensor.shape) for tensor in self.tensors()]
            raise ValueError(f"law: expected parameters of {dim} outputs, got {shapes}")
        return self

    def validate(self) -> None:
        self.law.validate()

    def describe(self) -> str:
        return f"components={type(self).__name__}({type(self.law).__name__})"
