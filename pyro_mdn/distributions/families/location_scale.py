r"""Families with independent outputs, from the law of one output: a few lines make a new one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.families.components import Components, OutputsInOrder
from pyro_mdn.distributions.families.family import Family, require_uncorrelated
from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.tensor_batch import nested, stored
from pyro_mdn.tensors.univariate import Law

__all__ = ["IndependentComponents", "IndividualComponents", "LocationScale"]


@dataclass(frozen=True, eq=False)
class IndependentComponents(Components):
    r"""Components with independent outputs :math:`y_d = \mu_{kd} + \sigma_{kd} Z_d`, each Z of the same law.

    Args:
        locs: Locations, shape ``(*batch, K, D)``.
        scale: Scales, positive, shape ``(*batch, K, D)``.
        standard: Law of Z.
    """

    locs: Tensor = stored(1)
    scale: Tensor = stored(1)
    standard: Law = nested()

    @property
    def has_independent_outputs(self) -> bool:
        return True

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value.unsqueeze(-2) - self.locs) / self.scale
        return (self._law().log_density(z) - self.scale.log()).sum(-1)

    def draw(self) -> Tensor:
        # A draw of 0 stands for all numbers below the next one; a smaller one would be an outlier far too often.
        u = torch.rand_like(self.locs).clamp(min=0.25 * torch.finfo(self.locs.dtype).eps)
        return self.locs + self.scale * self._law().two_sided_quantile(u)

    def mean(self) -> Tensor:
        return self.locs + self.scale * self._law().mean()

    def stddev(self) -> Tensor:
        return self.scale * self._law().stddev()

    def marginal(self, dims: Sequence[int]) -> Self:
        dims = list(dims)
        return replace(self, locs=self.locs[..., dims], scale=self.scale[..., dims])

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        return self.locs.mT, self.scale.mT, self.standard.map(lambda t, n: t.unsqueeze(-2))

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        law = self.standard
        if law.mirrored() is not law and is_known(scale) and bool((scale < 0).any()):
            raise ValueError("scale: expected positive numbers for a law that is not symmetric")
        return replace(self, locs=torch.addcmul(shift, scale, self.locs), scale=self.scale * scale.abs())

    def widen(self, factor: Tensor) -> Self:
        return replace(self, scale=self.scale * factor)

    def in_order(self) -> OutputsInOrder:
        return _InOrder(self)

    def require_components(self, count: int) -> None:
        if self.scale.ndim < 2 or self.scale.shape[-2] not in (1, count):
            raise ValueError(f"scale: expected a component axis of 1 or {count}, got {tuple(self.scale.shape)}")

    def of_dim(self, dim: int) -> Self:
        if self.scale.shape[-1] != dim:
            raise ValueError(f"scale: expected {dim} outputs, got {tuple(self.scale.shape)}")
        return self

    def validate(self) -> None:
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise ValueError("scale: expected positive finite numbers")

    def describe(self) -> str:
        return f"components={type(self).__name__}({type(self.standard).__name__})"

    def _law(self) -> Law:
        """Law with tensors that broadcast with ``(*batch, K, D)``."""
        return self.standard.map(lambda t, n: t.unsqueeze(-1))

    def law_of_output(self, d: int) -> Law:
        """Law of one output, with tensors ``(*batch, K)``."""
        return self.standard


@dataclass(frozen=True, eq=False)
class IndividualComponents(IndependentComponents):
    """Components with independent outputs, whose laws have parameters ``(*batch, K, D)`` of their own."""

    def marginal(self, dims: Sequence[int]) -> Self:
        dims = list(dims)
        return replace(super().marginal(dims), standard=self.standard.map(lambda t, n: t[..., dims]))

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        return self.locs.mT, self.scale.mT, self.standard.map(lambda t, n: t.mT)

    def require_components(self, count: int) -> None:
        super().require_components(count)
        for name, shape in self._shapes():
            if len(shape) < 2 or shape[-2] not in (1, count):
                raise ValueError(f"{name}: expected a component axis of 1 or {count}, got {shape}")

    def of_dim(self, dim: int) -> Self:
        for name, shape in self._shapes():
            if shape[-1] != dim:
                raise ValueError(f"{name}: expected {dim} outputs, got {shape}")
        return super().of_dim(dim)

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names of the parameters of the law, and their shapes."""
        names = (f.name for f in fields(self.standard))
        return [(name, tuple(t.shape)) for name, t in zip(names, self.standard.tensors(), strict=True)]

    def _law(self) -> Law:
        return self.standard

    def law_of_output(self, d: int) -> Law:
        return self.standard.map(lambda t, n: t[..., d])


class _InOrder(OutputsInOrder):
    """Outputs of independent components: what came before does not matter."""

    def __init__(self, components: IndependentComponents) -> None:
        self.components, self.count = components, 0

    def next_output(self) -> tuple[Tensor, Tensor, Law]:
        d, components = self.count, self.components
        return components.locs[..., d], components.scale[..., d], components.law_of_output(d)

    def observe(self, value: Tensor) -> None:
        self.count += 1


@dataclass(frozen=True)
class LocationScale(Family, by_name=False):
    """Base of families with independent outputs; a subclass says the :attr:`law` of one output.

    The noise model says whether scales are shared by components or outputs, and where they come from; it must not
    correlate the outputs. Training starts with scales at which components have the standard deviations of the clusters
    of the data; they are the scales themselves if the law does not say its standard deviation, or it is infinite.

    Attributes:
        law: Law at location 0 and scale 1.

    Raises:
        ValueError: If the noise model correlates the outputs.
    """

    law: ClassVar[Law]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if not isinstance(getattr(cls, "law", None), Law):
            raise TypeError(f"{cls.__name__}: expected a class attribute law with the Law of one output")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_uncorrelated(self.noise)

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> IndependentComponents:
        return IndependentComponents(locs, self.noise.build(blocks[0], locs.shape[-1], unit).stddev(), self.law)

    def start(self, scale: Tensor) -> list[Tensor]:
        return super().start(scale / _unit_stddev(self.law))


def _unit_stddev(law: Law) -> Tensor | float:
    """Standard deviation of a law, ``(K, 1)`` or a number; 1 where it is infinite or not known."""
    try:
        spread = law.map(lambda t, n: t.unsqueeze(-1)).stddev()
    except NotImplementedError:
        return 1.0
    if isinstance(spread, Tensor):
        return torch.where(spread.isfinite(), spread, 1.0)
    return spread if math.isfinite(spread) else 1.0
