r"""Mixture of Gaussians over vectors: parameters, density, draws and moments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from operator import index
from typing import Any, ClassVar, Protocol, Self, SupportsIndex, TypeVar

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn.distributions.covariance.as_pyro import components
from pyro_mdn.distributions.covariance.base import Covariance, take_component
from pyro_mdn.distributions.covariance.correlated import FullCovariance
from pyro_mdn.distributions.indexing import indexed, joined
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import (
    all_finite,
    bounds,
    is_known,
    is_mapped,
    is_recorded,
    is_traced,
    sample_shape_of,
    unwrapped,
)
from pyro_mdn.support.torch_compat import assert_async, functional_assert_async, transforms_active
from pyro_mdn.tensors import kernels

__all__ = ["MixtureDensity", "check_dims", "complete_when_run", "has_missing", "log_density"]

_COMPLETE = "value: expected complete points under {}, got NaN for missing ones"
Mixture = TypeVar("Mixture", bound="MixtureDensity")
Dims = int | Sequence[int] | Tensor | np.ndarray
"""Indices of outputs: one integer, or several."""
_FEW = 16  # so many comparisons are quicker than a search


class Origin(Protocol):
    """What a mixture is made from where its parameters are not built yet."""

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        ...

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        ...

    def parameters(self) -> tuple[Tensor, Tensor, Covariance]:
        """Normalised log-weights, locations and covariances."""
        ...

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of points, NaN for what was not observed."""
        ...

    def is_moderate(self) -> bool:
        """Whether the parameters need no validation."""
        ...


class MixtureDensity(dist.MixtureSameFamily):
    """Parameters, density, draws and moments of a Gaussian mixture; see :class:`pyro_mdn.GaussianMixture`."""

    _origin: Origin | None = None
    arg_constraints: ClassVar[dict[str, Any]] = {}  # the parameters are checked together, by _validate
    support: ClassVar[constraints.Constraint] = constraints.real_vector

    def __init__(
        self, logits: Tensor, locs: Tensor, covariance: Covariance, *, validate_args: bool | None = None
    ) -> None:
        covariance = _check_shapes(logits, locs, covariance)
        self._set(kernels.normalize_logits(logits), locs, covariance, validate_args)
        if self._validates(logits, locs, *covariance.tensors()):
            self._validate()

    def _set(self, logits: Tensor, locs: Tensor, covariance: Covariance, validate_args: bool | None) -> None:
        batch_shape = _broadcast(logits.shape[:-1], locs.shape[:-2], covariance.batch_shape[:-1])
        self.logits = logits if logits.shape[:-1] == batch_shape else logits.expand(*batch_shape, -1)
        self.locs = locs if locs.shape[:-2] == batch_shape else locs.expand(*batch_shape, -1, -1)
        self.covariance = covariance
        _initialize(self, torch.Size(batch_shape), torch.Size(locs.shape[-1:]), validate_args)

    @classmethod
    def deferred(cls, origin: Origin) -> Self:
        """Mixture whose parameters are built when they are asked for; its density comes from the origin itself."""
        new = cls.__new__(cls)
        new._origin = origin
        _initialize(new, origin.batch_shape, torch.Size((origin.dim,)), None)
        if new._validate_args and not is_traced() and not origin.is_moderate():
            new._validate()
        return new

    @cached_property
    def _parameters(self) -> tuple[Tensor, Tensor, Covariance]:
        """What the origin makes, with a graph if what it is made from has one, wherever it is asked for."""
        assert self._origin is not None
        with torch.inference_mode(False), torch.enable_grad():
            return self._origin.parameters()

    # In a mixture with parameters of its own these are set.

    @cached_property
    def logits(self) -> Tensor:
        """Normalised log-weights, ``(*batch, K)``."""
        return self._parameters[0]

    @cached_property
    def locs(self) -> Tensor:
        """Component means, ``(*batch, K, D)``."""
        return self._parameters[1]

    @cached_property
    def covariance(self) -> Covariance:
        """Component covariances; a component axis of 1 ties them."""
        return self._parameters[2]

    def _validates(self, *tensors: Tensor) -> bool:
        """Whether to look at the numbers of arguments."""
        return bool(self._validate_args) and is_known(*tensors)

    def _validate(self) -> None:
        if not is_known(self.logits, self.locs, *self.covariance.tensors()):
            return
        if bool(bounds(self.logits)[0].isnan()):
            raise ValueError("logits: expected numbers below +inf, one at least finite; got NaN, +inf or all -inf")
        if not all_finite(self.locs):
            raise ValueError("locs: expected finite numbers, got NaN or Inf")
        self.covariance.validate()

    def _new(self, logits: Tensor, locs: Tensor, covariance: Covariance) -> Self:
        """Build a mixture from parameters derived from valid ones."""
        new = type(self)(logits, locs, covariance, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _with(self, locs: Tensor, covariance: Covariance) -> Self:
        """Build a mixture with the same weights from parameters derived from valid ones."""
        return self._derived(self.logits, locs, _check_shapes(self.logits, locs, covariance))

    def _derived(self, logits: Tensor, locs: Tensor, covariance: Covariance) -> Self:
        """Build a mixture from valid parameters whose weights are normalised."""
        new = type(self).__new__(type(self))
        new._set(logits, locs, covariance, self._validate_args)
        return new

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, n_components={self.n_components}, "
            f"dim={self.dim}, covariance={type(self.covariance).__name__})"
        )

    # An array of mixtures

    def __getitem__(self, rows: Any) -> Self:
        """Mixtures of some rows of the batch, as a tensor of shape ``batch_shape`` would be indexed.

        Integers, slices, masks, arrays of integers, tuples of these, ``...`` and ``None``. Components are not indexed:
        ``mixture[..., 0]`` is the first along the last batch dimension.

        Raises:
            IndexError: If there is no such row, or if there are more indices than batch dimensions.

        >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
        >>> mixture = GaussianMixture(torch.zeros(5, 1), torch.zeros(5, 1, 2), IsotropicCovariance(torch.ones(1)))
        >>> mixture[0].batch_shape, mixture[1:3].batch_shape, len(mixture)
        (torch.Size([]), torch.Size([2]), 5)
        """
        return self._derived(*indexed((self.logits, self.locs, self.covariance), rows))

    def __len__(self) -> int:
        """Size of the first batch dimension; a ``TypeError`` if there is none."""
        if not self.batch_shape:
            raise TypeError("len: expected a mixture with a batch dimension, got one of batch_shape ()")
        return self.batch_shape[0]

    def __bool__(self) -> bool:
        """Return ``True``, also for an empty batch: handlers ask whether there is a distribution."""
        return True

    def __iter__(self) -> Iterator[Self]:
        """Iterate over the first batch dimension; a ``TypeError`` if there is none."""
        return (self[i] for i in range(len(self)))

    @staticmethod
    def cat(mixtures: Iterable[Mixture], dim: int = 0) -> Mixture:
        """Put mixtures one after another along batch dimension ``dim``, as ``torch.cat`` does tensors.

        Raises:
            ValueError: If there are none, or if they do not agree in all but that dimension of their batches, in
                their numbers of components and outputs and in the structure of their covariances.
        """
        listed = _listed(mixtures)
        return listed[0]._derived(*joined([(m.logits, m.locs, m.covariance) for m in listed], dim))

    @staticmethod
    def stack(mixtures: Iterable[Mixture], dim: int = 0) -> Mixture:
        """Put mixtures side by side along a new batch dimension ``dim``, as ``torch.stack`` does tensors.

        Raises:
            ValueError: If there are none or they do not agree, as for :meth:`cat`.
        """
        listed = _listed(mixtures)
        n = len(listed[0].batch_shape) + 1
        if not -n <= dim < n:
            raise ValueError(f"dim: expected a place among {n - 1} batch dimensions, got {dim}")
        dim %= n
        if any(m.batch_shape != listed[0].batch_shape for m in listed):
            shapes = ", ".join(str(tuple(m.batch_shape)) for m in listed)
            raise ValueError(f"stack: expected mixtures of equal batch shape, got {shapes}")
        return type(listed[0]).cat([m[(*(slice(None),) * dim, None)] for m in listed], dim)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return self.locs.dtype if self._origin is None or "locs" in self.__dict__ else self._origin.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.locs.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the parameters to another device or floating-point dtype; arguments are those of ``torch.Tensor.to``.

        In a wider precision the weights are normalised again.

        Raises:
            ValueError: If the dtype is not of floating point.
        """
        locs = self.locs.to(*args, **kwargs)
        if not locs.is_floating_point():
            raise ValueError(f"to: expected a floating-point dtype, got {locs.dtype}")
        covariance = self.covariance.map(lambda t, n: t.to(*args, **kwargs))
        if locs.dtype == self.dtype:
            return self._derived(self.logits.to(*args, **kwargs), locs, covariance)
        wide = kernels.normalize_logits(self.logits.to(torch.promote_types(self.dtype, locs.dtype)))
        return self._derived(wide.to(*args, **kwargs), locs, covariance)

    def cpu(self) -> Self:
        """Move the parameters to the CPU."""
        return self.to("cpu")

    def double(self) -> Self:
        """Convert the parameters to double precision."""
        return self.to(torch.float64)

    def float(self) -> Self:
        """Convert the parameters to single precision."""
        return self.to(torch.float32)

    def detach(self) -> Self:
        """Return the mixture without a graph: no gradients flow to its parameters."""
        return self._derived(self.logits.detach(), self.locs.detach(), self.covariance.map(lambda t, n: t.detach()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the parameters; what was computed from others is copied without its graph, which torch cannot copy."""

        def copied(tensor: Tensor, event_dim: int = 0) -> Tensor:
            return copy.deepcopy(tensor if tensor.is_leaf else tensor.detach(), memo)

        new = self._derived(copied(self.logits), copied(self.locs), self.covariance.map(copied))
        memo[id(self)] = new
        return new

    # What MixtureSameFamily promises

    @property
    def mixture_distribution(self) -> dist.Categorical:
        """Distribution of the component index."""
        return dist.Categorical(logits=self.logits, validate_args=False)

    @property
    def component_distribution(self) -> dist.Distribution:
        """Distribution of the components, with ``batch_shape`` ``(*batch, K)``."""
        shape = (*self.batch_shape, self.n_components)
        return components(self.covariance.expand(shape), self.locs)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Self:
        """Expand to ``batch_shape``; a view."""
        shape = torch.Size(batch_shape)
        return self._new(self.logits.expand(*shape, -1), self.locs.expand(*shape, -1, -1), self.covariance)

    # Size

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.logits.shape[-1]

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        return self.event_shape[0]

    # Density

    def log_prob(self, value: Any) -> Tensor:
        r"""Log-density in nats, all constants included, shape ``(*sample, *batch)``.

        .. math:: \log p(y) = \log \sum_k w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

        Args:
            value: Points y, shape ``(*sample, *batch, D)``: a tensor, array, data frame or list. For D = 1,
                ``(*batch,)`` is read as ``(*batch, 1)``. An entry that is NaN was not observed: the density is that
                of the other entries, and 1 if there are none.

        Raises:
            ValueError: If the shape does not fit.
        """
        value = self.as_points(value)
        if self._is_quickest_from_origin(value):
            return self._origin.log_density(value)  # pyright: ignore[reportOptionalMemberAccess]
        return self._log_prob(value)

    @in_widest_precision
    def _log_prob(self, value: Tensor) -> Tensor:
        if has_missing(value):
            return self._by_pattern(value, type(self)._observed_log_prob)[0]
        return log_density(self.logits, self.locs, self.covariance, complete_when_run(value), normalize=False)

    def _is_quickest_from_origin(self, value: Tensor) -> bool:
        """Whether to have the density without the parameters: once, for one point each, while none is built or set."""
        origin, built = self._origin, self.__dict__
        if origin is None or "logits" in built or "locs" in built or "covariance" in built or "_asked" in built:
            return False
        if is_recorded():  # what runs later must look at its own points
            return False
        self._asked = True  # whoever asks again may ask a hundred times
        return value.is_floating_point() and value.shape[:-1] == self.batch_shape

    @in_widest_precision
    def component_log_prob(self, value: Any) -> Tensor:
        r"""Log-density :math:`\log \mathcal{N}(y \mid \mu_k, \Sigma_k)` per component, ``(*sample, *batch, K)``."""
        value = self._points(value)
        if has_missing(value):
            return self._by_pattern(value, type(self)._observed_component_log_prob)[0]
        return _component_log_density(self.locs, self.covariance, value)

    @in_widest_precision
    def responsibilities(self, value: Any) -> Tensor:
        r"""Posterior probability of each component given ``value``, ``(*sample, *batch, K)``.

        .. math:: r_k = \frac{w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)}{p(y)}

        One below about 1e-29 (1e-231 in double precision) is exactly 0.
        """
        joint = self._joint_log_prob(value)
        return kernels.channels_last(kernels.shares(kernels.channels_first(joint, 1)), 1)

    @in_widest_precision
    def _joint_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of component and value, up to a constant for all components, ``(*sample, *batch, K)``."""
        value = self._points(value)
        if has_missing(value):
            return self._by_pattern(value, type(self)._observed_joint_log_prob)[0]
        whitened = self.covariance.whiten(self.locs - value.unsqueeze(-2))
        return self.logits + kernels.relative_log_density(whitened, self.covariance.half_log_det())

    def as_points(self, value: Any, name: str = "value") -> Tensor:
        """Convert points of any container to a tensor ``(*sample, *batch, D)``, as all methods do.

        Args:
            value: A tensor, array, data frame or nested lists. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``.
            name: What to call it in errors.

        Raises:
            ValueError: If there is something else than numbers, or the shape does not fit.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point():
            value = as_tensor(value, name, self.locs.device)
        if value.ndim == 0 or value.shape[-1] != self.dim:
            if self.dim > 1 or value.shape != self.batch_shape:
                raise ValueError(f"{name}: expected shape (*batch, {self.dim}), got {tuple(value.shape)}")
            value = value.unsqueeze(-1)
        if self._validate_args:
            _broadcast(value.shape[:-1], self.batch_shape)
        return value

    def _points(self, value: Any, name: str = "value") -> Tensor:
        """Points in the precision of the mixture, which was widened to theirs where that is known."""
        return self.as_points(value, name).to(self.dtype)

    # Missing entries

    def _observed_log_prob(self, value: Tensor, observed: list[int]) -> tuple[Tensor]:
        if not observed:
            return (0 * self.logits.logsumexp(-1),)  # not a constant, so that the result keeps a graph
        return (self.marginal(observed).log_prob(value),)

    def _observed_component_log_prob(self, value: Tensor, observed: list[int]) -> tuple[Tensor]:
        if not observed:
            return (torch.zeros_like(self.logits),)
        return (self.marginal(observed).component_log_prob(value),)

    def _observed_joint_log_prob(self, value: Tensor, observed: list[int]) -> tuple[Tensor]:
        return (self.marginal(observed)._joint_log_prob(value) if observed else self.logits,)

    def _by_pattern(
        self, value: Tensor, function: Callable[[Self, Tensor, list[int]], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """Apply ``function(mixture, observed values, observed columns)`` to the rows of each missingness pattern.

        Its tensors, one row for each row, come back in the batch shape. NaN never enters a computation, so that
        gradients stay finite.
        """
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows, mixture = value.expand(*batch, -1).reshape(-1, value.shape[-1]), self._flat(batch)
        patterns, which = rows.isnan().unique(dim=0, return_inverse=True)
        members = [(which == i).nonzero().squeeze(-1) for i in range(len(patterns))]
        columns = [(~pattern).nonzero().squeeze(-1).tolist() for pattern in patterns]
        pieces = [
            function(mixture._pick(member), rows[member][:, observed], observed)
            for member, observed in zip(members, columns, strict=True)
        ]
        order = torch.cat(members).argsort()
        results = (torch.cat(parts)[order] for parts in zip(*pieces, strict=True))
        return [result.reshape((*batch, *result.shape[1:])) for result in results]

    def _flat(self, batch: torch.Size) -> Self:
        """Expand to ``batch``, and flatten that to one dimension."""
        expanded = self.expand(batch)
        covariance = self.covariance.expand((*batch, self.covariance.batch_shape[-1]))
        flat = covariance.map(lambda t, n: t.reshape(batch.numel(), *t.shape[len(batch) :]))
        return self._new(
            expanded.logits.reshape(-1, self.n_components), expanded.locs.reshape(-1, *self.locs.shape[-2:]), flat
        )

    def _pick(self, rows: Tensor) -> Self:
        return self._new(self.logits[rows], self.locs[rows], self.covariance.map(lambda t, n: t[rows]))

    # Samples

    @in_widest_precision
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample_shape, *batch, D)``: a component each, then a point of it."""
        with torch.no_grad():
            component = self._draw_components(torch.Size(sample_shape_of(sample_shape)))
            locs = take_component(self.locs, component, 1)
            noise = torch.randn_like(locs)
            return (locs + self.covariance.select(component).colorize(noise)).squeeze(-2)

    def _draw_components(self, sample_shape: torch.Size) -> Tensor:
        """Indices of components, ``(*sample, *batch)``, by their cumulative weights: quicker than a ``Categorical``."""
        # In bfloat16 there would be 256 levels.
        levels = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)).exp().cumsum(-1)
        # Below the last level also after rounding, so that no component of weight zero is found.
        u = torch.rand(sample_shape + self.batch_shape, dtype=levels.dtype, device=levels.device) * levels[..., -1]
        if self.n_components <= _FEW:
            passed = kernels.channels_first(levels, 1)[:-1].unflatten(0, (-1, *(1,) * len(sample_shape)))
            return (u >= passed).sum(0)
        together = u.reshape(sample_shape.numel(), *self.batch_shape).movedim(0, -1)
        found = torch.searchsorted(levels.contiguous(), together.contiguous(), right=True)
        return found.movedim(-1, 0).reshape(u.shape)

    # Moments

    @property
    @in_widest_precision
    def mean(self) -> Tensor:
        r""":math:`\sum_k w_k \mu_k`, shape ``(*batch, D)``."""
        return self._average(self.locs)

    @property
    @in_widest_precision
    def variance(self) -> Tensor:
        r"""Variance of each output, shape ``(*batch, D)``, by the law of total variance."""
        return self._average(self.covariance.variance() + self._deviation().square())

    @property
    @in_widest_precision
    def stddev(self) -> Tensor:
        """Standard deviation of each output, shape ``(*batch, D)``, also where the variance over- or underflows."""
        deviation = self._deviation()
        parts = torch.stack([self.covariance.stddev().expand(deviation.shape), deviation], -1)
        weighted = (0.5 * self.logits).exp()[..., None, None] * parts
        return kernels.norm(weighted.movedim(-3, -2).flatten(-2))

    @property
    @in_widest_precision
    def covariance_matrix(self) -> Tensor:
        r"""Covariance of the mixture, shape ``(*batch, D, D)``.

        .. math:: \sum_k w_k \left( \Sigma_k + (\mu_k - \bar\mu)(\mu_k - \bar\mu)^\top \right)
        """
        weight, deviation = self.logits.exp()[..., None, None], self._deviation()
        between = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
        return (weight * (self.covariance.matrix() + between)).sum(-3)

    @in_widest_precision
    def as_gaussian(self) -> FullCovariance:
        """Covariance of the mixture as one operator, component axis 1; accurate also where the matrix is not."""
        root = self.covariance.root()
        root = root.expand(*self.batch_shape, self.n_components, *root.shape[-2:])
        stacked = torch.cat([root, self._deviation().unsqueeze(-1)], -1) * (0.5 * self.logits).exp()[..., None, None]
        return FullCovariance.from_root(stacked.movedim(-3, -2).flatten(-2).unsqueeze(-3))

    def _average(self, values: Tensor) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * values).sum(-2)

    def _deviation(self) -> Tensor:
        return self.locs - self.mean.unsqueeze(-2)

    @in_widest_precision
    def marginal(self, dims: Dims) -> Self:
        """Distribution of the outputs ``dims``, an integer or several, in that order.

        Raises:
            ValueError: If an index repeats or is out of range, or if there is none.
        """
        dims = check_dims(dims, self.dim)
        return self._with(self.locs[..., dims], self.covariance.marginal(dims))


def _listed(mixtures: Iterable[Mixture]) -> list[Mixture]:
    listed = [*mixtures]
    if not listed or not all(isinstance(m, MixtureDensity) for m in listed):
        got = ", ".join(type(m).__name__ for m in listed) or "none"
        raise ValueError(f"mixtures: expected one Gaussian mixture at least, got {got}")
    return listed


def _initialize(
    mixture: MixtureDensity, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None
) -> None:
    """Set shapes and validation, by default as Pyro is set: ``torch.compile`` ends that of torch, for good."""
    validates = is_validation_enabled() if validate_args is None else validate_args
    torch.distributions.Distribution.__init__(mixture, batch_shape, event_shape, validates)


def log_density(
    logits: Tensor, locs: Tensor, covariance: Covariance, value: Tensor, *, normalize: bool = True
) -> Tensor:
    """Log-density of complete values under the mixture of these parameters, ``(*sample, *batch)``.

    Args:
        logits: Log-weights up to a constant.
        locs: Component means.
        covariance: Component covariances.
        value: Points y, shape ``(*sample, *batch, D)``.
        normalize: Whether to normalise the weights; if not, they are taken as they are.
    """
    if covariance.whitening is not None:
        factors = covariance.factors()
        return kernels.mixture_log_density(covariance.whitening, logits, locs, value, *factors, normalize=normalize)
    log_weights = kernels.normalize_logits(logits) if normalize else logits
    joint = log_weights + _component_log_density(locs, covariance, value)
    return kernels.log_sum_exp(kernels.channels_first(joint, 1))


def _component_log_density(locs: Tensor, covariance: Covariance, value: Tensor) -> Tensor:
    residual = locs - value.unsqueeze(-2)  # this way round it has the memory layout of the locations
    return kernels.normal_log_density(covariance.whiten(residual), covariance.half_log_det())


def _check_shapes(logits: Tensor, locs: Tensor, covariance: Covariance) -> Covariance:
    if not (logits.is_floating_point() and locs.is_floating_point()):
        raise ValueError(f"logits, locs: expected floating point, got {logits.dtype} and {locs.dtype}")
    stored = [logits, locs, *covariance.tensors()]
    if len({(t.dtype, t.device) for t in stored}) > 1:
        got = ", ".join(f"{t.dtype} on {t.device}" for t in stored)
        raise ValueError(f"logits, locs, covariance: expected one dtype and device, got {got}")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (*batch, K) with K > 0, got {tuple(logits.shape)}")
    if locs.ndim < 2 or locs.shape[-1] == 0:
        raise ValueError(f"locs: expected shape (*batch, K, D) with D > 0, got {tuple(locs.shape)}")
    if locs.shape[-2] != logits.shape[-1]:
        raise ValueError(f"locs: expected {logits.shape[-1]} components, got {locs.shape[-2]}")
    if not covariance.batch_shape or covariance.batch_shape[-1] not in (1, logits.shape[-1]):
        raise ValueError(
            f"covariance: expected a component axis of 1 or {logits.shape[-1]}, got {tuple(covariance.batch_shape)}"
        )
    return covariance.of_dim(locs.shape[-1])


def _broadcast(*shapes: torch.Size) -> torch.Size:
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]  # torch takes longer over this than over a density of small size
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"batch shapes: expected some that broadcast, got {listed}") from error


def check_dims(dims: Dims, dim: int) -> list[int]:
    """Indices of outputs, all non-negative; a ``ValueError`` unless they are distinct and in range.

    >>> check_dims(range(2), 3), check_dims(np.array([0, -1]), 3), check_dims(torch.tensor(1), 3)
    ([0, 1], [0, 2], [1])
    """
    listed = _integers(dims)
    wrapped = [d + dim if d < 0 else d for d in listed]
    if not wrapped or len(set(wrapped)) != len(wrapped) or not all(0 <= d < dim for d in wrapped):
        raise ValueError(f"dims: expected distinct indices of {dim} outputs, one at least, got {listed}")
    return wrapped


def _integers(dims: Any) -> list[int]:
    """One integer or several, of Python, NumPy or torch; a ``ValueError`` unless all are integers."""
    array = isinstance(dims, Tensor | np.ndarray | np.generic)
    values = dims.tolist() if array else dims
    listed = [v.item() if _is_scalar(v) else v for v in (values if isinstance(values, Iterable) else [values])]
    if all(isinstance(v, SupportsIndex) and not isinstance(v, bool | Tensor) for v in listed):
        return [index(v) for v in listed]
    kinds = f"{dims.dtype} and shape {tuple(dims.shape)}" if array else ", ".join({type(v).__name__: 0 for v in listed})
    raise ValueError(f"dims: expected integers, got {type(dims).__name__} of {kinds}")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0


def has_missing(value: Tensor) -> bool:
    """Whether an entry is NaN; no under compilation, where control flow must not depend on data.

    What is compiled raises a ``RuntimeError`` where an entry is NaN at run time. On a GPU an error would end the
    process: densities are NaN there.

    Raises:
        ValueError: If one is under ``torch.vmap`` or ``torch.jit``, for the same reason.
    """
    if torch.compiler.is_compiling():
        if value.is_cpu and not transforms_active():
            assert_async(~value.isnan().any(), _COMPLETE.format("torch.compile"))
        return False
    whole, mapped = unwrapped(value), is_mapped(value)
    missing = math.isnan(whole.sum().item()) and bool(whole.isnan().any())  # the sum is quicker, and NaN if any is
    if missing and (mapped or torch.jit.is_tracing()):  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(_COMPLETE.format("torch.vmap" if mapped else "torch.jit"))
    return missing


def complete_when_run(value: Tensor) -> Tensor:
    """Give a value back; what ``torch.jit`` traces then raises a ``RuntimeError`` where an entry is NaN at run time.

    A trace leaves out what nothing depends on: what is checked is a part of a sum.
    """
    if not torch.jit.is_tracing() or not value.is_cpu:  # pyright: ignore[reportPrivateImportUsage]
        return value
    has_missing(value)  # an error that names its caller, for the numbers that are there already
    return value + functional_assert_async(~value.isnan().any(), _COMPLETE.format("torch.jit"), value.new_zeros(()))
