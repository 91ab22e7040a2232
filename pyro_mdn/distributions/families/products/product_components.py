r"""Components whose outputs are of different families: each is the product of independent parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from pyro_mdn.distributions.families.components import (
    Components,
    OutputsInOrder,
    not_closed,
    repeated,
    total_stddev,
)
from pyro_mdn.distributions.families.products.columns import Columns
from pyro_mdn.distributions.marginals import Marginals, MarginalsByColumn
from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.tensors.univariate import Law

__all__ = ["ProductComponents", "product_components"]


@dataclass(frozen=True, eq=False)
class ProductComponents(Components):
    r"""Components that are products of independent parts, each a distribution of some of the outputs.

    .. math:: p_k(y) = \prod_j p_{kj}(y_{G_j})

    for parts j with the outputs :math:`G_j`. Within a part, outputs may be dependent. What depends between parts is
    carried by the mixture, whose components all have the same number K.

    Args:
        parts: Components of each part.
        columns: Which outputs belong to which part.
    """

    has_parts: ClassVar[bool] = True

    parts: tuple[Components, ...]
    columns: Columns

    @property
    def locs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Locations of the parts, side by side, ``(*batch, K, D)``."""
        return self._joined(lambda part: part.locs)

    @property
    def dim(self) -> int:
        return self.columns.dim

    @property
    def support(self) -> constraints.Constraint:
        single: list[Any] = [self.marginal([d]).support for d in range(self.dim)]
        each = constraints.cat([support.base_constraint for support in single], -1, [1] * self.dim)
        return constraints.independent(each, 1)

    @property
    def lowest(self) -> Tensor:
        return self._joined(lambda part: part.lowest)

    @property
    def has_independent_outputs(self) -> bool:
        return all(part.has_independent_outputs for part in self.parts)

    @property
    def has_pathwise_draws(self) -> bool:
        return all(part.has_pathwise_draws for part in self.parts)

    def mapped(self, function: Callable[[Components], Components]) -> Self:
        return self._with(part.mapped(function) for part in self.parts)

    def over_parts(self, function: Callable[..., Any], *values: TargetsOrTensor) -> list[Any]:
        return self.columns.each(function, self.parts, *values)

    def of_parts(self, parts: Sequence[Components]) -> Self:
        return self._with(parts)

    # The space before warps

    @property
    def inner(self) -> Components:
        return self._with(part.inner for part in self.parts)

    def to_inner(self, value: Tensor) -> Tensor:
        return self._joined(lambda part, own: part.to_inner(own), value)

    def from_inner(self, value: Tensor) -> Tensor:
        return self._joined(lambda part, own: part.from_inner(own), value)

    # Batches

    def over_batch(self, batch_shape: Sequence[int]) -> Self:
        return self._with(part.over_batch(batch_shape) for part in self.parts)

    def expand(self, batch_shape: Sequence[int]) -> Self:
        return self._with(part.expand(batch_shape) for part in self.parts)

    def select(self, component: Tensor) -> Self:
        return self._with(part.select(component) for part in self.parts)

    def pooled(self, full: torch.Size, dim: int) -> Self:
        return self._with(part.pooled(full, dim) for part in self.parts)

    # Density and draws

    def log_prob(self, value: Tensor) -> Tensor:
        return self._sum(lambda part, own: part.log_prob(own), value)

    def relative_log_prob(self, value: Tensor) -> Tensor:
        return self._sum(lambda part, own: part.relative_log_prob(own), value)

    def draw(self) -> Tensor:
        batch = self.locs.shape[:-2]  # parts must not share random numbers over a batch that they lack
        return self._joined(lambda part: part.over_batch(batch).draw())

    # Moments

    def mean(self) -> Tensor:
        return self._joined(lambda part: part.mean())

    def stddev(self) -> Tensor:
        return self._joined(lambda part: part.stddev())

    def variance(self) -> Tensor:
        return self._joined(lambda part: part.variance())

    def covariance_root(self) -> Tensor:
        self.require_line("covariance_root", "stddev is, of each output")
        return self._side_by_side([part.covariance_root() for part in self.parts])

    def covariance_matrix(self) -> Tensor:
        self.require_line("covariance_matrix", "variance is, of each output; or estimate it from draws")
        matrix = self._side_by_side([part.covariance_matrix() for part in self.parts])
        order = [d for columns in self.columns.of_parts for d in columns]
        return matrix[..., sorted(range(self.dim), key=order.__getitem__)]

    def mixture_moments(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        own = [part.mixture_moments(logits) for part in self.parts]
        if all(moments is None for moments in own):
            return None
        pairs = [_moments(logits, part) if m is None else m for part, m in zip(self.parts, own, strict=True)]
        means, spreads = zip(*pairs, strict=True)
        return self.columns.join(means), self.columns.join(spreads)

    def narrowest(self) -> Tensor:
        return reduce(torch.minimum, [part.narrowest() for part in self.parts])

    # Marginals and conditionals

    def marginal(self, dims: Sequence[int]) -> Any:
        chosen, columns = self.columns.marginal(dims)
        parts = [part.marginal(own) if own else None for part, own in zip(self.parts, chosen, strict=True)]
        return product_components(parts, columns)

    def condition(self, values: Tensor) -> Components:
        shape = torch.broadcast_shapes(values.shape[:-1], self.batch_shape[:-1])
        rest = [_given(part, own, shape) for part, own in self._known(values)]
        return product_components(rest, self._free(values.shape[-1]))

    def given_images(self, logits: Tensor, values: Tensor) -> tuple[Tensor, Components] | None:
        """Condition one part after another; for each image of one of them, the others are repeated."""
        if self.num_given(range(values.shape[-1]), 1) == 1:
            return None
        shape, count = torch.broadcast_shapes(values.shape[:-1], logits.shape[:-1]), logits.shape[-1]
        logits, done = logits.expand(*shape, count), list[Components | None]()
        for part, own in self._known(values):
            before = logits.shape[-1]
            part = repeated(part, before // count, (*shape, count))
            if own.shape[-1] in (0, part.dim) or (given := part.given_images(logits, own)) is None:
                known = part.marginal(range(own.shape[-1])).log_prob(own) if own.shape[-1] else 0.0
                logits, rest = logits + known, _given(part, own, shape)
            else:
                logits, rest = given
            times = logits.shape[-1] // before
            done = [None if other is None else repeated(other, times, (*shape, before)) for other in done]
            done.append(rest)
        return logits, product_components(done, self._free(values.shape[-1]))

    def num_given(self, dims: Sequence[int], count: int) -> int:
        chosen, _ = self.columns.marginal(dims)
        for part, own in zip(self.parts, chosen, strict=True):
            count = part.num_given(own, count) if 0 < len(own) < part.dim else count
        return count

    def _known(self, values: Tensor) -> list[tuple[Components, Tensor]]:
        """Values of the first outputs, those of each part."""
        _, columns = self.columns.marginal(range(values.shape[-1]))
        return list(zip(self.parts, columns.split(values), strict=True))

    def _free(self, count: int) -> Columns:
        """Columns of the outputs after the first ones."""
        return self.columns.marginal(range(count, self.dim))[1]

    def marginals(self, logits: Tensor) -> Marginals:
        return MarginalsByColumn([self.marginal([d]).marginals(logits) for d in range(self.dim)])

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        not_closed("a location and a scale", self, "marginals are")

    def in_order(self) -> OutputsInOrder:
        return _InOrder(self)

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        numbers = [self.columns.split(t.expand(*t.shape[:-1], self.dim)) for t in (shift, scale)]
        return self._with(part.affine(*own) for part, *own in zip(self.parts, *numbers, strict=True))

    def widen(self, factor: Tensor) -> Self:
        return self._with(part.widen(factor) for part in self.parts)

    # Checks

    def require_inside(self, value: TargetsOrTensor, name: str) -> None:
        self.columns.each(lambda part, own: part.require_inside(own, name), self.parts, value)

    def require_line(self, operation: str, instead: str) -> None:
        for part in self.parts:
            part.require_line(operation, instead)

    def require_components(self, count: int) -> None:
        for part in self.parts:
            part.require_components(count)

    def of_dim(self, dim: int) -> Self:
        if dim != self.dim or [part.dim for part in self.parts] != [len(own) for own in self.columns.of_parts]:
            raise ValueError(f"columns: expected {[part.dim for part in self.parts]} outputs, got {self.columns}")
        return self._with(part.of_dim(part.dim) for part in self.parts)

    def validate(self) -> None:
        for part in self.parts:
            part.validate()

    def describe(self) -> str:
        parts = zip(self.parts, self.columns.of_parts, strict=True)
        return f"parts=({', '.join(f'{list(own)}: {part.describe()}' for part, own in parts)})"

    # Parts

    def _with(self, parts: Iterable[Components]) -> Self:
        return replace(self, parts=tuple(parts))

    def _joined(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Put results of the parts, ``(..., D)``, side by side; the function gets a part, and its own values."""
        return self.columns.join(self.columns.each(function, self.parts, *values))

    def _sum(self, function: Callable[[Components, Any], Tensor], value: Tensor) -> Tensor:
        return reduce(torch.add, self.over_parts(function, value))

    def _side_by_side(self, blocks: Sequence[Tensor]) -> Tensor:
        """Put blocks ``(*batch, K, D, M)`` on the diagonal of a matrix, whose rows are in the order of the outputs."""
        width = sum(block.shape[-1] for block in blocks)
        rows, start = [], 0
        for block in blocks:
            rows.append(pad(block, (start, width - start - block.shape[-1])).mT)
            start += block.shape[-1]
        return self.columns.join(rows).mT


class _InOrder(OutputsInOrder):
    """Outputs in order: each given those before it in its own part, which has them in ascending order."""

    def __init__(self, components: ProductComponents) -> None:
        self.parts = [part.in_order() for part in components.parts]
        owners = {d: p for p, columns in enumerate(components.columns.of_parts) for d in columns}
        self.owners = [owners[d] for d in range(components.dim)]
        self.count = 0

    def next_output(self) -> tuple[Tensor, Tensor, Law]:
        return self.parts[self.owners[self.count]].next_output()

    def observe(self, value: Tensor) -> None:
        self.parts[self.owners[self.count]].observe(value)
        self.count += 1


def product_components(parts: Sequence[Components | None], columns: Columns) -> Components:
    """Product of parts, of which some may have no outputs; a single one is itself, not a product.

    Args:
        parts: Components of each part; ``None`` for one without outputs.
        columns: Which outputs belong to which part.
    """
    kept = [(part, own) for part, own in zip(parts, columns.of_parts, strict=True) if part is not None]
    if len(kept) == 1:
        return kept[0][0]
    return ProductComponents(tuple(part for part, _ in kept), Columns(tuple(own for _, own in kept)))


def _given(part: Components, values: Tensor, shape: Sequence[int]) -> Components | None:
    """Part given its first outputs, none to all of them; ``None`` if nothing is left of it."""
    if values.shape[-1] == part.dim:
        return None
    return part.condition(values) if values.shape[-1] else part.over_batch(shape)


def _moments(logits: Tensor, part: Components) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``(*batch, D)`` of outputs that are no angles."""
    mean = part.mean()
    centre = (logits.exp().unsqueeze(-1) * mean).sum(-2)
    return centre, total_stddev(logits, part.stddev(), mean - centre.unsqueeze(-2))
