r"""The mixture: a Pyro distribution given by weights and components of one family."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions import algebra, density, indexing, precision, quantiles, transport
from pyro_mdn.distributions.families.components import Components, not_closed
from pyro_mdn.distributions.parameters import Origin, broadcast, check_shapes
from pyro_mdn.support.checks import all_finite, bounds, is_known, is_recorded
from pyro_mdn.tensors.channels import normalize_logits

__all__ = ["Mixture"]


class Mixture(dist.MixtureSameFamily):
    r"""Mixture of :math:`K` components of one family over :math:`\mathbb{R}^D`.

    .. math:: p(y) = \sum_{k=1}^K w_k \, p_k(y)

    A mixture is a Pyro distribution with ``event_shape`` ``(D,)``. Arguments broadcast over the batch. Closed forms are
    differentiable; a closed form that is a distribution is again a mixture. An operation without a closed form for the
    family raises a ``NotImplementedError`` that names an alternative. :class:`pyro_mdn.GaussianMixture` has more closed
    forms.

    Results have the precision of the parameters, which may be half precision. They are computed in at least single
    precision, and in double if an argument is double. A batch of mixtures is indexed like a tensor: ``mixture[rows]``.

    Args:
        logits: Log-weights up to a constant, shape ``(*batch, K)``. A weight of zero is ``-inf``.
        components: Components of one family, with locations ``(*batch, K, D)``.
        validate_args: Whether to check values of parameters and arguments; by default as set by
            ``pyro.enable_validation``.

    Raises:
        ValueError: If shapes or dtypes do not agree or, when validating, if a parameter is out of range.

    >>> from pyro_mdn import DiagonalCovariance, StudentTComponents
    >>> scales = DiagonalCovariance(torch.ones(1, 1))
    >>> components = StudentTComponents(torch.tensor([[-1.0], [1.0]]), scales, torch.tensor([4.0]))
    >>> Mixture(torch.zeros(2), components).variance
    tensor([3.])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # the parameters are checked together, by _validate
    _origin: Origin | None = None

    def __init__(self, logits: Tensor, components: Components, *, validate_args: bool | None = None) -> None:
        components = check_shapes(logits, components)
        self._set(normalize_logits(logits), components, validate_args)
        if self._validate_args:
            self._validate()

    def _set(self, logits: Tensor, components: Components, validate_args: bool | None) -> None:
        locs = components.locs
        batch_shape = broadcast(logits.shape[:-1], locs.shape[:-2], components.batch_shape[:-1])
        self.logits = logits if logits.shape[:-1] == batch_shape else logits.expand(*batch_shape, -1)
        if locs.shape[:-2] != batch_shape:
            components = components.over_batch(batch_shape)
        self.components = components
        self._initialize(torch.Size(batch_shape), torch.Size(locs.shape[-1:]), validate_args)

    def _initialize(self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None) -> None:
        """Set shapes and validation, by default as Pyro is set: ``torch.compile`` turns torch's off for good."""
        validates = is_validation_enabled() if validate_args is None else validate_args
        torch.distributions.Distribution.__init__(self, batch_shape, event_shape, validates)

    def _validate(self) -> None:
        if not is_known(self.logits, *self.components.tensors()):
            return
        if bool(bounds(self.logits)[0].isnan()):
            raise ValueError("logits: expected numbers below +inf, one at least finite; got NaN, +inf or all -inf")
        if not all_finite(self.components.locs):
            raise ValueError("locs: expected finite numbers, got NaN or Inf")
        self.components.validate()

    # Building mixtures from other mixtures

    @classmethod
    def of_components(cls, logits: Tensor, components: Components, *, validate_args: bool | None = None) -> Self:
        """Build a mixture of this class, whatever arguments its constructor takes."""
        new = cls.__new__(cls)
        Mixture.__init__(new, logits, components, validate_args=validate_args)
        return new

    @classmethod
    def deferred(cls, origin: Origin) -> Self:
        """Build a mixture that computes its parameters on first use; see :meth:`origin_for` for its density.

        Nothing may trace the tensors of the origin.
        """
        new = cls.__new__(cls)
        new._origin = origin
        new._initialize(origin.batch_shape, torch.Size((origin.dim,)), None)
        if new._validate_args and not origin.is_moderate():
            new._validate()
        return new

    def reweighted(self, logits: Tensor, components: Components) -> Self:
        """Build a mixture from parameters derived from valid ones, and normalise the log-weights."""
        new = self.of_components(logits, components, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def derived(self, logits: Tensor, components: Components) -> Self:
        """Build a mixture from parameters derived from valid ones, with log-weights that are already normalised."""
        new = type(self).__new__(type(self))
        new._set(logits, components, self._validate_args)
        return new

    def with_components(self, components: Components) -> Self:
        """Build a mixture with the same weights; raise a ``ValueError`` if the components do not fit them."""
        return self.derived(self.logits, check_shapes(self.logits, components))

    def of_any_family(self, components: Components) -> Mixture:
        """Build a mixture with the same weights whose components may be of another family than those of this class."""
        new = Mixture.__new__(Mixture)
        new._set(self.logits, components, self._validate_args)
        return new

    @cached_property
    def _parameters(self) -> tuple[Tensor, Components]:
        """Parameters that the origin builds; also under ``torch.no_grad`` they have a graph if its tensors have one."""
        assert self._origin is not None
        with torch.inference_mode(False), torch.enable_grad():
            return self._origin.parameters()

    # A mixture that is not deferred sets these two attributes when it is built.

    @cached_property
    def logits(self) -> Tensor:
        """Normalised log-weights, ``(*batch, K)``."""
        return self._parameters[0]

    @cached_property
    def components(self) -> Components:
        """Components; tensors that they share may have a batch or component axis of 1."""
        return self._parameters[1]

    @property
    def locs(self) -> Tensor:
        """Locations of the components, ``(*batch, K, D)``."""
        return self.components.locs

    @locs.setter
    def locs(self, value: Tensor) -> None:
        self.components = replace(self.components, locs=value)

    def origin_for(self, value: Tensor) -> Origin | None:
        """Return the origin if it should compute the density of ``value``, instead of the parameters; else ``None``.

        It does so once, for one point of each mixture, and only while no parameter is built or set.
        """
        origin, built = self._origin, self.__dict__
        if origin is None or "logits" in built or "components" in built or "_asked" in built:
            return None
        if is_recorded():  # recorded code must check the points of each run for NaN: see ``complete_when_run``
            return None
        self._asked = True  # a second call may be followed by many, for which built parameters are quicker
        return origin if value.is_floating_point() and value.shape[:-1] == self.batch_shape else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, n_components={self.n_components}, "
            f"dim={self.dim}, {self.components.describe()})"
        )

    # Size, precision, device

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.logits.shape[-1]

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        return self.event_shape[0]

    @property
    def validates(self) -> bool:
        """Whether values of arguments are checked."""
        return bool(self._validate_args)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        if self._origin is None or "components" in self.__dict__:
            return self.components.like.dtype
        return self._origin.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.components.like.device

    # An array of mixtures

    __getitem__ = indexing.rows_of
    __len__ = indexing.length
    __iter__ = indexing.iterate
    __deepcopy__ = precision.copied
    cat, stack = staticmethod(indexing.cat), staticmethod(indexing.stack)
    expand, flatten = indexing.expand, indexing.flatten
    to, cpu, double, float, detach = precision.to, precision.cpu, precision.double, precision.single, precision.detach

    def __bool__(self) -> bool:
        """Return ``True``, also for an empty batch, because Pyro's handlers test whether there is a distribution."""
        return True

    # Interface of MixtureSameFamily

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether draws have pathwise gradients; no if outputs are counts or angles."""
        return (self._origin or self.components).has_pathwise_draws

    @property
    def support(self) -> constraints.Constraint:
        """Set of the values that a draw may have."""
        return self.components.support

    @property
    def mixture_distribution(self) -> dist.Categorical:
        """Distribution of the component index."""
        return dist.Categorical(logits=self.logits, validate_args=False)

    @property
    def component_distribution(self) -> dist.TorchDistribution:
        """Distribution of the components, with ``batch_shape`` ``(*batch, K)``."""
        return self.components.expand((*self.batch_shape, self.n_components)).as_pyro()

    # Density

    as_points = density.as_points
    log_prob = density.log_prob
    component_log_prob = density.component_log_prob
    relative_joint_log_prob = density.relative_joint_log_prob
    responsibilities = density.responsibilities

    # Draws

    sample = density.sample
    rsample = transport.rsample

    # Moments

    mean, variance, stddev = property(density.mean), property(density.variance), property(density.stddev)
    covariance_matrix = property(density.covariance_matrix)
    as_gaussian = density.as_gaussian
    split_variance = density.split_variance

    # Operations whose result is again a mixture

    marginal = algebra.marginal
    condition = algebra.condition
    affine = algebra.affine
    temper = algebra.temper
    pool = algebra.pool
    prune = algebra.prune
    truncated = algebra.truncated

    # Single outputs

    univariate = quantiles.univariate
    cdf, sf = quantiles.cdf, quantiles.sf
    log_cdf, log_sf = quantiles.log_cdf, quantiles.log_sf
    icdf = quantiles.icdf
    interval = quantiles.interval

    # Regions of highest density

    highest_density_threshold = quantiles.highest_density_threshold
    in_highest_density_region = quantiles.in_highest_density_region

    # Transport to and from independent uniforms

    rosenblatt = transport.rosenblatt
    inverse_rosenblatt = transport.inverse_rosenblatt

    # Operations that only normal components have

    def product(self, other: Any) -> Any:
        """Multiply two densities and normalise the product; only for normal components."""
        not_closed("product", self.components, "a GaussianMixture with the same mean and covariance has it")

    def reduce(self, n_components: int) -> Any:
        """Merge components; only for normal components."""
        not_closed("reduce", self.components, "prune drops components that weigh little")

    def modes(self) -> Tensor:
        """Find local maxima of the density; only for normal components."""
        not_closed("modes", self.components, "evaluate log_prob on a grid, or climb from the locations")

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """Compute bounds of the entropy; only for normal components."""
        not_closed("entropy_bounds", self.components, "average -log_prob over draws")
