r"""Mixture of Gaussians over vectors, with its closed-form algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_mdn import kernels
from pyro_mdn.covariance import Covariance, DiagonalCovariance, IsotropicCovariance, LowRankCovariance

__all__ = ["GaussianMixture"]


class GaussianMixture(dist.MixtureSameFamily):
    r"""Mixture of :math:`K` Gaussians over :math:`\mathbb{R}^D`.

    .. math:: p(y) = \sum_{k=1}^K w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

    A Pyro distribution with ``event_shape`` ``(D,)``. Arguments broadcast over the batch.

    Args:
        logits: Log-weights up to a constant, shape ``(*batch, K)``. A weight of zero is ``-inf``.
        locs: Component means, shape ``(*batch, K, D)``.
        covariance: Component covariances; a component axis of 1 ties them.
        validate_args: Check values of parameters and arguments; by default as Pyro is set.

    Raises:
        ValueError: If shapes or dtypes do not agree or, when validating, if a parameter is not finite or a
            covariance not positive definite.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> mixture = GaussianMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), IsotropicCovariance(torch.ones(1)))
    >>> mixture.mean, mixture.variance
    (tensor([0.]), tensor([2.]))
    """

    arg_constraints = {}  # noqa: RUF012  (the parameters are checked together, by _validate)
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self, logits: Tensor, locs: Tensor, covariance: Covariance, *, validate_args: bool | None = None
    ) -> None:
        covariance = _check_shapes(logits, locs, covariance)
        batch_shape = torch.broadcast_shapes(logits.shape[:-1], locs.shape[:-2], covariance.batch_shape[:-1])
        self.logits = kernels.normalize_logits(logits).expand(*batch_shape, -1)
        self.locs = locs.expand(*batch_shape, -1, -1)
        self.covariance = covariance
        torch.distributions.Distribution.__init__(self, batch_shape, locs.shape[-1:], validate_args)
        if self._validate_args:
            self._validate()

    def _validate(self) -> None:
        if bool(self.logits.isnan().any()):
            raise ValueError("logits: expected numbers below +inf, one at least finite; got NaN, +inf or all -inf")
        if not bool(self.locs.isfinite().all()):
            raise ValueError("locs: expected finite numbers, got NaN or Inf")
        self.covariance.validate()

    def _new(self, logits: Tensor, locs: Tensor, covariance: Covariance) -> GaussianMixture:
        """Build a mixture from parameters derived from valid ones."""
        new = GaussianMixture(logits, locs, covariance, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return (
            f"GaussianMixture(batch_shape={tuple(self.batch_shape)}, n_components={self.n_components}, "
            f"dim={self.dim}, covariance={type(self.covariance).__name__})"
        )

    # What MixtureSameFamily promises

    @property
    def mixture_distribution(self) -> dist.Categorical:
        """Distribution of the component index."""
        return dist.Categorical(logits=self.logits, validate_args=False)

    @property
    def component_distribution(self) -> dist.Distribution:
        """Distribution of the components, with ``batch_shape`` ``(*batch, K)``."""
        shape = (*self.batch_shape, self.n_components)
        return _gaussian(self.covariance.expand(shape), self.locs)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> GaussianMixture:
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
        return self.locs.shape[-1]

    # Density

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density in nats, all constants included, shape ``(*sample, *batch)``.

        .. math:: \log p(y) = \log \sum_k w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

        Args:
            value: Points y, shape ``(*sample, *batch, D)``.

        Raises:
            ValueError: If the last dimension is not D or, when validating, if a value is NaN.
        """
        return self._joint_log_prob(value).logsumexp(-1)

    def component_log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density :math:`\log \mathcal{N}(y \mid \mu_k, \Sigma_k)` per component, ``(*sample, *batch, K)``."""
        self._check_value(value)
        residual = value.unsqueeze(-2) - self.locs
        return kernels.normal_log_density(self.covariance.whiten(residual), self.covariance.half_log_det())

    def responsibilities(self, value: Tensor) -> Tensor:
        r"""Posterior probability of each component given ``value``, ``(*sample, *batch, K)``.

        .. math:: r_k = \frac{w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)}{p(y)}
        """
        return self._joint_log_prob(value).softmax(-1)

    def _joint_log_prob(self, value: Tensor) -> Tensor:
        return self.logits + self.component_log_prob(value)

    def _check_value(self, value: Tensor) -> None:
        if value.ndim == 0 or value.shape[-1] != self.dim:
            raise ValueError(f"value: expected shape (*batch, {self.dim}), got {tuple(value.shape)}")
        if self._validate_args:
            self._validate_sample(value)

    # Samples

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample_shape, *batch, D)``: a component each, then a point of it."""
        with torch.no_grad():
            component = self.mixture_distribution.sample(torch.Size(sample_shape))
            locs = _take(self.locs, component)
            noise = torch.randn_like(locs)
            return (locs + self.covariance.select(component).colorize(noise)).squeeze(-2)

    # Moments

    @property
    def mean(self) -> Tensor:
        r""":math:`\sum_k w_k \mu_k`, shape ``(*batch, D)``."""
        return self._average(self.locs)

    @property
    def variance(self) -> Tensor:
        r"""Variance of each output, shape ``(*batch, D)``, by the law of total variance."""
        return self._average(self.covariance.variance() + self._deviation().square())

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each output, shape ``(*batch, D)``."""
        return self.variance.sqrt()

    @property
    def covariance_matrix(self) -> Tensor:
        r"""Covariance of the mixture, shape ``(*batch, D, D)``.

        .. math:: \sum_k w_k \left( \Sigma_k + (\mu_k - \bar\mu)(\mu_k - \bar\mu)^\top \right)
        """
        weight, deviation = self.logits.exp()[..., None, None], self._deviation()
        between = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
        return (weight * (self.covariance.matrix() + between)).sum(-3)

    def _average(self, values: Tensor) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * values).sum(-2)

    def _deviation(self) -> Tensor:
        return self.locs - self.mean.unsqueeze(-2)

    # Closed forms: each is again a mixture

    def marginal(self, dims: int | Sequence[int]) -> GaussianMixture:
        """Distribution of the outputs ``dims``, in that order.

        Raises:
            ValueError: If an index repeats or is out of range, or if there is none.
        """
        dims = _check_dims(dims, self.dim)
        return self._new(self.logits, self.locs[..., dims], self.covariance.marginal(dims))

    def condition(self, values: Tensor, dims: int | Sequence[int]) -> GaussianMixture:
        r"""Distribution of the remaining outputs, in ascending order, given ``values`` at ``dims``.

        .. math:: w_k' \propto w_k \, \mathcal{N}(v \mid \mu_{k,G}, \Sigma_{k,GG}), \quad
                  \mu_k' = \mu_{k,F} + \Sigma_{k,FG} \Sigma_{k,GG}^{-1} (v - \mu_{k,G})

        Args:
            values: What is known, shape ``(*sample, *batch, len(dims))``, in the order of ``dims``.
            dims: The outputs that are known; one at least must remain.

        Raises:
            ValueError: If an index repeats or is out of range, if none is free, or if ``values`` has another width.
        """
        dims = _check_dims(dims, self.dim)
        free = [d for d in range(self.dim) if d not in dims]
        if not free:
            raise ValueError(f"dims: expected at least one of {self.dim} outputs to stay free, got all of them")
        known = self.marginal(dims)
        logits = known._joint_log_prob(values)
        residual = values.unsqueeze(-2) - known.locs
        shift, covariance = self.covariance.condition(residual, dims, free)
        return self._new(logits, self.locs[..., free] + shift, covariance)

    def affine(self, shift: Tensor | float, scale: Tensor | float) -> GaussianMixture:
        """Distribution of ``shift + scale * y``, elementwise.

        Args:
            shift: Number or tensor, shape ``(*batch, D)`` (broadcast).
            scale: Number or tensor, shape ``(*batch, D)`` (broadcast); not zero, either sign. One number for all
                outputs keeps an isotropic covariance isotropic.

        Raises:
            ValueError: If the shapes do not agree or, when validating, if a scale is zero or not finite.
        """
        shift, scale = self._as_vector(shift, "shift"), self._as_vector(scale, "scale")
        if self._validate_args and not bool((scale.isfinite() & (scale != 0)).all()):
            raise ValueError("scale: expected finite numbers other than zero")
        shift, scale = shift.unsqueeze(-2), scale.unsqueeze(-2)
        return self._new(self.logits, shift + scale * self.locs, self.covariance.affine(scale))

    def _as_vector(self, value: Tensor | float, name: str) -> Tensor:
        value = torch.as_tensor(value, dtype=self.locs.dtype, device=self.locs.device)
        value = value.unsqueeze(-1) if value.ndim == 0 else value
        if value.shape[-1] not in (1, self.dim):
            raise ValueError(f"{name}: expected a last dimension of 1 or {self.dim}, got {tuple(value.shape)}")
        return value

    def temper(self, temperature: float) -> GaussianMixture:
        r"""Divide the logits by :math:`\tau` and multiply the scales by :math:`\sqrt\tau`.

        Args:
            temperature: :math:`\tau > 0`; below 1 the mixture is more cautious, above 1 more adventurous.

        References:
            Ha & Schmidhuber (2018), World Models.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        scale = self.locs.new_full((1,), math.sqrt(temperature))
        return self._new(self.logits / temperature, self.locs, self.covariance.affine(scale))

    def pool(self, dim: int, weights: Tensor | None = None) -> GaussianMixture:
        r"""Average the density over batch dimension ``dim``: exactly one mixture of S·K components.

        .. math:: p(y) = \sum_{s=1}^S a_s \, p_s(y)

        Args:
            dim: Batch dimension to fold into the components.
            weights: Weights :math:`a_s \ge 0`, shape ``(S,)``, normalised here; by default all equal.

        Raises:
            ValueError: If there is no such batch dimension or the weights do not fit it.
        """
        n = len(self.batch_shape)
        if not -n <= dim < n:
            raise ValueError(f"dim: expected one of {n} batch dimensions, got {dim}")
        dim %= n
        full = (*self.batch_shape, self.n_components)
        log_weights = _log_weights(weights, self.batch_shape[dim], self.logits)
        logits = self.logits + log_weights.reshape(-1, *(1,) * (n - dim))

        def fold(tensor: Tensor, event_dim: int) -> Tensor:
            return tensor.movedim(dim, n - 1).flatten(n - 1, n)

        return self._new(fold(logits, 0), fold(self.locs, 1), self.covariance.expand(full).map(fold))


def _check_shapes(logits: Tensor, locs: Tensor, covariance: Covariance) -> Covariance:
    if not (logits.is_floating_point() and locs.is_floating_point()):
        raise ValueError(f"logits, locs: expected floating point, got {logits.dtype} and {locs.dtype}")
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


def _check_dims(dims: int | Sequence[int], dim: int) -> list[int]:
    listed = [dims] if isinstance(dims, int) else [int(d) for d in dims]
    wrapped = [d + dim if d < 0 else d for d in listed]
    if not wrapped or len(set(wrapped)) != len(wrapped) or not all(0 <= d < dim for d in wrapped):
        raise ValueError(f"dims: expected distinct indices of {dim} outputs, one at least, got {listed}")
    return wrapped


def _log_weights(weights: Tensor | None, size: int, like: Tensor) -> Tensor:
    if weights is None:
        return like.new_full((size,), -math.log(size))
    if weights.shape != (size,) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(f"weights: expected {size} numbers, none negative and not all zero")
    return kernels.normalize_logits(weights.to(like).log())


def _take(locs: Tensor, component: Tensor) -> Tensor:
    index = component[..., None, None]
    return locs.expand(*component.shape, *locs.shape[-2:]).take_along_dim(index, dim=-2)


@singledispatch
def _gaussian(covariance: Covariance, locs: Tensor) -> dist.Distribution:
    """Pyro distribution of the components."""
    scale_tril = torch.linalg.cholesky(covariance.matrix())
    return dist.MultivariateNormal(locs, scale_tril=scale_tril, validate_args=False)


@_gaussian.register
def _(covariance: DiagonalCovariance, locs: Tensor) -> dist.Distribution:
    return dist.Normal(locs, covariance.scale, validate_args=False).to_event(1)


@_gaussian.register
def _(covariance: IsotropicCovariance, locs: Tensor) -> dist.Distribution:
    return dist.Normal(locs, covariance.scale.unsqueeze(-1), validate_args=False).to_event(1)


@_gaussian.register
def _(covariance: LowRankCovariance, locs: Tensor) -> dist.Distribution:
    variance = covariance.scale.square()
    return dist.LowRankMultivariateNormal(locs, covariance.factor, variance, validate_args=False)
