r"""Components of a mixture: what every family of distributions has to provide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.marginals import LocationScaleMarginals, Marginals
from pyro_mdn.distributions.observations.boxes import log_interval_probability
from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.tensors.channels import channels_first
from pyro_mdn.tensors.numerics import log_sum_exp, norm
from pyro_mdn.tensors.tensor_batch import TensorBatch, folded, nested, take_component
from pyro_mdn.tensors.univariate import Law, UnivariateMixture

__all__ = ["Components", "DerivedComponents", "OutputsInOrder", "not_closed", "repeated", "total_stddev"]


def not_closed(operation: str, components: Components, instead: str) -> NoReturn:
    """Raise ``NotImplementedError`` for an operation that has no closed form for a family, and say what to use."""
    raise NotImplementedError(f"{operation}: not closed for {type(components).__name__} components; {instead}")


class Components(TensorBatch):
    r"""K components over :math:`\mathbb{R}^D` for each mixture of a batch, all of one family.

    Shapes are those of a mixture: ``(*batch, K)`` before the dimensions of an output. Values are given as
    ``(*sample, *batch, D)`` and broadcast. A family has to provide the abstract methods. The others have a default, or
    say what is not closed for the family.

    Attributes:
        locs: Locations, shape ``(*batch, K, D)``; most families store them, by ``locs: Tensor = stored(1)``.
    """

    locs: Tensor

    has_angles: ClassVar[bool] = False
    """Whether an output is an angle: values have several images, and means are no averages over components."""

    has_parts: ClassVar[bool] = False
    """Whether components are products of parts, see :meth:`over_parts`; parts with angles sum over their own images."""

    is_circular: ClassVar[bool] = False
    """Whether all outputs are angles whose densities are periodic by themselves, so that one image is enough."""

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        return self.locs.shape[-1]

    @property
    def support(self) -> constraints.Constraint:
        """Set of the values that a draw may have, for all outputs together."""
        return constraints.real_vector

    @property
    def inner(self) -> Components:
        """Components in the space of their locations and scales: these, unless they were pushed through a warp."""
        return self

    def of_inner(self, inner: Components) -> Components:
        """Push other components of the space of :attr:`inner` through the same warp."""
        return inner

    def to_inner(self, value: Tensor) -> Tensor:
        """Map values ``(*sample, *batch, D)`` to the space of :attr:`inner`; ends of the support become infinite."""
        return value

    def from_inner(self, value: Tensor) -> Tensor:
        """Map values ``(*sample, *batch, D)`` from the space of :attr:`inner`."""
        return value

    def pulled_back(self, value: TargetsOrTensor) -> tuple[Components, TargetsOrTensor, Tensor | None]:
        """Change variables to the space of :attr:`inner`, for a density of values ``(*sample, *batch, D)``.

        Returns:
            Components of that space, the values there, and what the change adds to log-densities
            ``(*sample, *batch)``; ``None`` for nothing. If there are angles, values have a first dimension of images,
            over which densities are to be summed.
        """
        return self, value, None

    def over_parts(self, function: Callable[..., Any], *values: TargetsOrTensor) -> list[Any]:
        """Apply a function to each part of the outputs, a factor of the density, and to its values; most have one."""
        return [function(self, *values)]

    def of_parts(self, parts: Sequence[Components]) -> Components:
        """Put others in the place of these parts."""
        return parts[0]

    @property
    def lowest(self) -> Tensor:
        """Lower ends of the support, which broadcast with :attr:`locs`."""
        return torch.full_like(self.locs[..., :1, :], -math.inf)

    def mapped(self, function: Callable[[Components], Components]) -> Components:
        """Apply a function to the components that have a density; others have a point mass besides."""
        return function(self)

    def over_batch(self, batch_shape: Sequence[int]) -> Self:
        """Expand the locations, and so the components, to a batch ``(*batch)`` without copying."""
        return replace(self, locs=self.locs.expand(*batch_shape, *self.locs.shape[-2:]))

    @property
    def has_independent_outputs(self) -> bool:
        """Whether the outputs of each component are independent."""
        return self.dim == 1

    @property
    def has_pathwise_draws(self) -> bool:
        """Whether draws can be differentiated with respect to the parameters."""
        return True

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each component, shape ``(*sample, *batch, K)``."""

    def output_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each output by itself, shape ``(*sample, *batch, D, K)``."""
        locs, scale, law = self.univariate()
        return law.log_density((value.unsqueeze(-1) - locs) / scale) - scale.log()

    def output_log_interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Log-probability of an interval of each output by itself, of which one end may be infinite; likewise."""
        locs, scale, law = self.univariate()
        return log_interval_probability(law, lower.unsqueeze(-1), upper.unsqueeze(-1), locs, scale)

    @abstractmethod
    def draw(self) -> Tensor:
        """One independent draw from each component, shape ``(*batch, K, D)``."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Means, shape ``(*batch, K, D)``; NaN where there is none."""

    @abstractmethod
    def stddev(self) -> Tensor:
        """Standard deviations of outputs, shape ``(*batch, K, D)``; infinite or NaN where there is none."""

    @abstractmethod
    def marginal(self, dims: Sequence[int]) -> Self:
        """Distribution of the outputs ``dims``, in that order."""

    @abstractmethod
    def univariate(self) -> tuple[Tensor, Tensor, Law]:
        """Marginals: locations and scales, ``(*batch, D, K)``, and the law, with tensors ``(*batch, D | 1, K)``."""

    @abstractmethod
    def affine(self, shift: Tensor, scale: Tensor) -> Self:
        """Distribution of ``shift + scale * y``, for tensors ``(*batch, 1, D | 1)``."""

    @abstractmethod
    def widen(self, factor: Tensor) -> Self:
        """Multiply the scales by a positive tensor that broadcasts with ``(*batch, K, 1)``; locations stay."""

    def select(self, component: Tensor) -> Self:
        # Locations also where there is one component, so that each draw has its own.
        return replace(super().select(component), locs=take_component(self.locs, component, 1))

    def pooled(self, full: torch.Size, dim: int) -> Self:
        """Fold batch dimension ``dim`` into the component axis, for components of shape ``(*batch, K)``, ``full``."""
        return self.expand(full).map(lambda t, n: folded(t, dim, len(full) - 1))

    def mixture_moments(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Means and standard deviations of outputs of the mixture, ``(*batch, D)``; ``None`` if they are averages."""
        return None

    def given_images(self, logits: Tensor, values: Tensor) -> tuple[Tensor, Components] | None:
        """Log-weights and components of the other outputs given the first ones, of which some are angles.

        Values are ``(*sample, *batch, n)``. Each image has components of its own; ``None`` if there is one image.
        """
        return None

    def facing(self, value: Tensor, periods: Tensor, angles: Sequence[int]) -> Self:
        """Move locations of angles by whole turns to where they are closest to values, given the other outputs."""
        return self

    def num_given(self, dims: Sequence[int], count: int) -> int:
        """Return how many of ``count`` components there are given the outputs ``dims``; more if these have images."""
        return count

    def require_inside(self, value: TargetsOrTensor, name: str) -> None:
        """Raise a ``ValueError`` that names the first angle outside of its period, if values are known."""

    def require_line(self, operation: str, instead: str) -> None:
        """Raise ``NotImplementedError`` for an operation that has no meaning for angles, if an output is one."""

    def variance(self) -> Tensor:
        """Variances of outputs, shape ``(*batch, K, D)``."""
        return self.stddev().square()

    def covariance_root(self) -> Tensor:
        r"""Dense A with :math:`\mathrm{Cov} = A A^\top`, shape ``(*batch, K, D, M)``, M ≥ D."""
        return self.stddev().diag_embed()

    def covariance_matrix(self) -> Tensor:
        """Covariances, shape ``(*batch, K, D, D)``."""
        return self.variance().diag_embed()

    def narrowest(self) -> Tensor:
        """Smallest scale of an output given the others, shape ``(*batch, K)``: what the finest detail is as wide as."""
        return self.stddev().amin(-1)

    def mixture_log_prob(self, logits: Tensor, value: Tensor, *, normalize: bool = False) -> Tensor:
        """Log-density of the mixture with these log-weights, shape ``(*sample, *batch)``.

        Args:
            logits: Log-weights, ``(*batch, K)``.
            value: Points ``(*sample, *batch, D)``.
            normalize: Whether to normalise the weights.
        """
        log_weights = channels_first(logits, 1)
        log_weights = log_weights.log_softmax(0) if normalize else log_weights
        joint = channels_first(self.log_prob(value), 1)
        return log_sum_exp(log_weights[(slice(None), *(None,) * (joint.ndim - log_weights.ndim))] + joint)

    def relative_log_prob(self, value: Tensor) -> Tensor:
        """Log-density up to a constant for all components; finite for the nearest one however far the value is."""
        return self.log_prob(value)

    def condition(self, values: Tensor) -> Components:
        """Distribution of the other outputs given the first ones, ``(*sample, *batch, n)``; theirs if independent."""
        if not self.has_independent_outputs:
            not_closed("condition", self, "marginals are; or draw, and weight the draws")
        shape = torch.broadcast_shapes(values.shape[:-1], self.batch_shape[:-1])
        return self.marginal(range(values.shape[-1], self.dim)).over_batch(shape)

    def map_linearly(self, shift: Tensor, matrix: Tensor) -> Components:
        """Distribution of ``shift + matrix @ y``, for ``(*batch, 1, M)`` and ``(*batch, 1, M, D)``."""
        not_closed("affine with a matrix", self, "elementwise scales are")

    def reordered(self, order: Tensor) -> Components:
        """Permute the outputs, those of each component by its own indices ``(*batch, K, D)``."""
        not_closed("intervals of several dependent outputs", self, "an interval of one output is")

    def in_order(self) -> OutputsInOrder:
        """Start going through the outputs in order, each given those before it."""
        not_closed("conditionals of outputs in order", self, "with one output they are not needed")

    def as_pyro(self) -> dist.TorchDistribution:
        """Components as a distribution of Pyro's own, ``batch_shape`` ``(*batch, K)``."""
        raise NotImplementedError(f"component_distribution: no Pyro distribution is known for {type(self).__name__}")

    def validate(self) -> None:
        """Raise ``ValueError`` unless every parameter is finite and in its range."""

    def of_dim(self, dim: int) -> Self:
        """Return these components for ``dim`` outputs; a ``ValueError`` if they are for another number."""
        return self

    def require_components(self, count: int) -> None:
        """Raise ``ValueError`` unless every tensor has a component axis of ``count``, or of 1."""

    def describe(self) -> str:
        """Describe the structure in a mixture's printout."""
        return f"components={type(self).__name__}"

    def marginals(self, logits: Tensor) -> Marginals:
        """Marginal mixtures of all outputs, ``(*batch, D)``, for log-weights ``(*batch, K)``."""
        return self.output_marginals(logits.unsqueeze(-2))

    def output_marginals(self, logits: Tensor) -> Marginals:
        """Marginal mixtures of all outputs, ``(*batch, D)``, each with its own log-weights ``(*batch, D | 1, K)``."""
        return LocationScaleMarginals(UnivariateMixture(logits, *self.univariate()))


def total_stddev(logits: Tensor, stddev: Tensor, deviation: Tensor) -> Tensor:
    """Standard deviations ``(*batch, D)`` of a mixture, also where variances over- or underflow.

    Args:
        logits: Normalised log-weights ``(*batch, K)``.
        stddev: Standard deviations of the components, ``(*batch, K, D)``.
        deviation: Differences of their means from that of the mixture, likewise.
    """
    parts = torch.stack([stddev.expand(deviation.shape), deviation], -1)
    weighted = (0.5 * logits).exp()[..., None, None] * parts
    return norm(weighted.movedim(-3, -2).flatten(-2))


@dataclass(frozen=True, eq=False)
class DerivedComponents(Components):
    """Base of components that are made of others, and have their size, their batch and their checks.

    Args:
        base: The other components.
    """

    base: Components = nested()

    @property
    def locs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Locations of the other components, ``(*batch, K, D)``."""
        return self.base.locs

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def has_independent_outputs(self) -> bool:
        return self.base.has_independent_outputs

    def over_batch(self, batch_shape: Sequence[int]) -> Self:
        return replace(self, base=self.base.over_batch(batch_shape))

    def select(self, component: Tensor) -> Self:
        return replace(self, base=self.base.select(component))

    def narrowest(self) -> Tensor:
        return self.base.narrowest()

    def widen(self, factor: Tensor) -> Self:
        return replace(self, base=self.base.widen(factor))

    def validate(self) -> None:
        self.base.validate()

    def require_components(self, count: int) -> None:
        self.base.require_components(count)

    def of_dim(self, dim: int) -> Self:
        return replace(self, base=self.base.of_dim(dim))


def repeated(components: Components, times: int, batch_shape: Sequence[int]) -> Components:
    """Repeat all components of a batch ``(*batch, K)``, one set after another; what they share stays as it is."""
    return components if times == 1 else components.pooled(torch.Size((times, *batch_shape)), 0)


class OutputsInOrder(ABC):
    """Outputs of components in order: the distribution of each given those before it."""

    @abstractmethod
    def next_output(self) -> tuple[Tensor, Tensor, Law]:
        """Locations and scales, ``(*sample, *batch, K)``, and law of the next output."""

    @abstractmethod
    def observe(self, value: Tensor) -> None:
        """Take the value of that output, ``(*sample, *batch, 1)``, as given for those after it."""
