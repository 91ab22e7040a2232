r"""Components with elliptical contours: a location, a covariance and a law of the distance from the location."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.families.components import Components, OutputsInOrder
from pyro_mdn.tensors.channels import sum_outputs
from pyro_mdn.tensors.mixture_density import Kernel, mixture_log_density
from pyro_mdn.tensors.tensor_batch import nested, stored
from pyro_mdn.tensors.univariate import Law

__all__ = ["Elliptical"]


@dataclass(frozen=True, eq=False)
class Elliptical(Components):
    r"""Components whose density depends on :math:`q = (y - \mu)^\top \Sigma^{-1} (y - \mu)` and :math:`\det\Sigma`.

    Args:
        locs: Locations :math:`\mu`, shape ``(*batch, K, D)``.
        covariance: Operator of the scale matrices :math:`\Sigma`; a component axis of 1 ties them.
    """

    locs: Tensor = stored(1)
    covariance: Covariance = nested()

    # What a family says

    @abstractmethod
    def radial_log_density(self, square: Tensor) -> Tensor:
        r"""Log-density at squared distances q, ``(*sample, *batch, K)``, without :math:`\tfrac12 \log\det\Sigma`."""

    @abstractmethod
    def spread(self) -> Tensor | None:
        """Factor from scales to standard deviations, which broadcasts with ``(*batch, K)``; ``None`` if it is 1."""

    @abstractmethod
    def law(self) -> Law:
        """Law of one output, with tensors ``(*batch, K)``."""

    @abstractmethod
    def kernel(self) -> tuple[Kernel, list[Tensor]] | None:
        """Density with gradients by hand, and the factors that it takes; ``None`` leaves gradients to autograd."""

    @abstractmethod
    def given(self, square: Callable[[], Tensor], count: int) -> tuple[Tensor | None, Self]:
        """What knowing ``count`` outputs makes of the family.

        Args:
            square: Function that gives their squared distance from the location, ``(*sample, *batch, K)``.
            count: Number of known outputs.

        Returns:
            Factor on the conditional scales, ``(*sample, *batch, K)``, or ``None`` if it is 1; and these components
            with the other parameters of the conditional distribution.
        """

    # What follows

    def log_prob(self, value: Tensor) -> Tensor:
        residual = self.locs - value.unsqueeze(-2)  # this way round it has the memory layout of the locations
        square = sum_outputs(self.covariance.whiten(residual).square())
        return self.radial_log_density(square) - self.covariance.half_log_det()

    def mixture_log_prob(self, logits: Tensor, value: Tensor, *, normalize: bool = False) -> Tensor:
        kernel = self.kernel()
        if kernel is None:
            return super().mixture_log_prob(logits, value, normalize=normalize)
        return mixture_log_density(kernel[0], logits, self.locs, value, *kernel[1], normalize=normalize)

    def draw(self) -> Tensor:
        return self.locs + self.covariance.colorize(torch.randn_like(self.locs))

    def mean(self) -> Tensor:
        return self.locs

    def stddev(self) -> Tensor:
        return self._spread_out(self.covariance.stddev())

    def variance(self) -> Tensor:
        spread, variance = self.spread(), self.covariance.variance()
        return variance if spread is None else variance * spread.square().unsqueeze(-1)

    def covariance_root(self) -> Tensor:
        return self._spread_out(self.covariance.root(), 2)

    def covariance_matrix(self) -> Tensor:
        spread, matrix = self.spread(), self.covariance.matrix()
        return matrix if spread is None else matrix * spread.square()[..., None, None]

    def narrowest(self) -> Tensor:
        scale = self.covariance.stddev()
        return (self.covariance.half_log_det() - scale.log().sum(-1)).exp() * scale.amin(-1)

    def _spread_out(self, tensor: Tensor, event_dim: int = 1) -> Tensor:
        spread = self.spread()
        return tensor if spread is None else tensor * spread.reshape(*spread.shape, *(1,) * event_dim)

    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        return self.locs.mT, self.covariance.stddev().mT, self.law().map(lambda t, n: t.unsqueeze(-2))

    def marginal(self, dims: Sequence[int]) -> Self:
        return replace(self, locs=self.locs[..., dims], covariance=self.covariance.marginal(dims))

    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        locs = torch.addcmul(shift, scale, self.locs)
        return replace(self, locs=locs, covariance=self.covariance.affine(scale))

    def widen(self, factor: Tensor) -> Self:
        return replace(self, covariance=self.covariance.affine(factor))

    def map_linearly(self, shift: Tensor, matrix: Tensor) -> Self:
        locs = shift + (matrix @ self.locs.unsqueeze(-1)).squeeze(-1)
        return replace(self, locs=locs, covariance=FullCovariance.from_root(matrix @ self.covariance.root()))

    def condition(self, values: Tensor) -> Self:
        n = values.shape[-1]
        residual = values.unsqueeze(-2) - self.locs[..., :n]
        shift, covariance = self.covariance.condition(residual)
        known = self.covariance.marginal(range(n))
        factor, others = self.given(lambda: sum_outputs(known.whiten(residual).square()), n)
        covariance = covariance if factor is None else covariance.affine(factor.unsqueeze(-1))
        return replace(others, locs=self.locs[..., n:] + shift, covariance=covariance)

    def facing(self, value: Tensor, periods: Tensor, angles: Sequence[int]) -> Self:
        if self.covariance.is_diagonal:
            return self
        turns = (self._whitened_turn(periods, d) for d in angles)
        moved = _closest_turns(self.covariance.whiten(self.locs.detach() - value.detach().unsqueeze(-2)), list(turns))
        columns = [torch.zeros_like(self.locs[..., 0])] * self.dim
        for d, number in zip(angles, moved, strict=True):
            columns[d] = number * periods[..., d]
        return replace(self, locs=self.locs - torch.stack(torch.broadcast_tensors(*columns), -1))

    def _whitened_turn(self, periods: Tensor, output: int) -> Tensor:
        one = torch.arange(self.dim, device=periods.device) == output
        return self.covariance.whiten((one * periods).expand_as(self.locs))

    def reordered(self, order: Tensor) -> Self:
        root = self.covariance.root()
        root = root.expand(*order.shape[:-1], *root.shape[-2:])
        root = root.gather(-2, order.unsqueeze(-1).expand(*order.shape, root.shape[-1]))
        locs = self.locs.expand(order.shape).gather(-1, order)
        return replace(self, locs=locs, covariance=FullCovariance.from_root(root))

    def in_order(self) -> OutputsInOrder:
        return _InOrder(self)

    def validate(self) -> None:
        self.covariance.validate()

    def of_dim(self, dim: int) -> Self:
        covariance = self.covariance.of_dim(dim)
        return self if covariance is self.covariance else replace(self, covariance=covariance)

    def require_components(self, count: int) -> None:
        shape = self.covariance.batch_shape
        if not shape or shape[-1] not in (1, count):
            raise ValueError(f"covariance: expected a component axis of 1 or {count}, got {tuple(shape)}")

    def describe(self) -> str:
        return f"{super().describe()}, covariance={type(self.covariance).__name__}"


@torch.no_grad()
def _closest_turns(residual: Tensor, turns: Sequence[Tensor]) -> list[Tensor]:
    """Choose whole numbers of turns, ``(*sample, *batch, K)`` each, so that a residual without them is short.

    Turns are vectors ``(*batch, K, D)``. The last one is chosen first, without what the others can do (Babai, 1986).
    Where a residual is not known, there are none.
    """
    orthogonal: list[Tensor] = []
    for turn in turns:
        orthogonal.append(turn - sum(_share(turn, other) * other for other in orthogonal))
    numbers: list[Tensor] = []
    for turn, alone in zip(reversed(turns), reversed(orthogonal), strict=True):
        number = _share(residual, alone).round().nan_to_num()
        residual = residual - number * turn
        numbers.insert(0, number.squeeze(-1))
    return numbers


def _share(vector: Tensor, other: Tensor) -> Tensor:
    """Coefficient of the projection on another vector."""
    square = other.square().sum(-1, keepdim=True).clamp(min=torch.finfo(other.dtype).tiny)
    return (vector * other).sum(-1, keepdim=True) / square


class _InOrder(OutputsInOrder):
    def __init__(self, components: Elliptical) -> None:
        self.components, self.covariance = components, components.covariance.triangular()
        self.residuals: list[Tensor] = []
        self.values: list[Tensor] = []
        self.conditionals: list[tuple[Tensor, Tensor]] = []  # location and scale by the covariance alone

    def next_output(self) -> tuple[Tensor, Tensor, Law]:
        d, components = len(self.residuals), self.components
        shift, scale = self.covariance.next_output(self.residuals)
        locs = components.locs[..., d] + shift
        self.conditionals.append((locs, scale))
        if d == 0:
            return locs, scale, components.law()
        factor, given = components.given(self._square, d)
        return locs, scale if factor is None else scale * factor, given.law()

    def observe(self, value: Tensor) -> None:
        self.residuals.append(value - self.components.locs[..., len(self.residuals)])
        self.values.append(value)

    def _square(self) -> Tensor:
        """Squared distance of the outputs that are known from their locations."""
        known = zip(self.values, self.conditionals, strict=False)
        squares = [((value - locs) / scale).square() for value, (locs, scale) in known]
        return sum(squares[1:], squares[0])
