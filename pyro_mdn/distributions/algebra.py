r"""The algebra of mixtures: conditioning, maps, products, and fewer components."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions import merging
from pyro_mdn.distributions.covariance.base import Covariance, DiagonalCovariance
from pyro_mdn.distributions.covariance.correlated import FullCovariance
from pyro_mdn.distributions.density import Dims, MixtureDensity, check_dims, has_missing
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import describe, is_count, is_differentiated, is_known, require_unmapped, shown
from pyro_mdn.tensors import kernels

__all__ = ["MixtureAlgebra", "Product", "VarianceSplit"]


class Product(NamedTuple):
    """Normalised product of two mixtures, and the logarithm of what normalised it, shape ``(*batch,)``."""

    mixture: MixtureDensity
    log_normalizer: Tensor


class VarianceSplit(NamedTuple):
    """Law of total variance over a batch dimension: covariances ``(*batch, D, D)`` that add up to the whole."""

    aleatoric: Tensor
    epistemic: Tensor


class MixtureAlgebra(MixtureDensity):
    """What is again a mixture, in closed form; see :class:`pyro_mdn.GaussianMixture`."""

    # Conditioning and maps

    @in_widest_precision
    def condition(self, values: Any, dims: Dims) -> Self:
        r"""Distribution of the remaining outputs, in ascending order, given ``values`` at ``dims``.

        .. math:: w_k' \propto w_k \, \mathcal{N}(v \mid \mu_{k,G}, \Sigma_{k,GG}), \quad
                  \mu_k' = \mu_{k,F} + \Sigma_{k,FG} \Sigma_{k,GG}^{-1} (v - \mu_{k,G})

        Args:
            values: What is known, shape ``(*sample, *batch, len(dims))``, in the order of ``dims``. An entry that is
                NaN was not observed: that row is conditioned on its other entries.
            dims: The outputs that are known, an integer or several; one at least must remain.

        Raises:
            ValueError: If an index repeats or is out of range, if none is free, or if ``values`` has another width.
        """
        dims = check_dims(dims, self.dim)
        free = [d for d in range(self.dim) if d not in dims]
        if not free:
            raise ValueError(f"dims: expected at least one of {self.dim} outputs to stay free, got all of them")
        ordered, n = self.marginal([*dims, *free]), len(dims)
        known = ordered.marginal(range(n))
        values = known._points(values, "values")
        if has_missing(values):
            return self._condition_on_observed(values, dims, free)
        logits = known._joint_log_prob(values)
        shift, covariance = ordered.covariance.condition(values.unsqueeze(-2) - known.locs)
        return self._new(logits, ordered.locs[..., n:] + shift, covariance)

    def _condition_on_observed(self, values: Tensor, dims: list[int], free: list[int]) -> Self:
        form: Covariance = self.marginal(free).covariance

        def given(mixture: Self, known: Tensor, observed: list[int]) -> tuple[Tensor, ...]:
            nonlocal form
            rest = mixture.marginal([*(dims[i] for i in observed), *free])
            rest = rest.condition(known, range(len(observed))) if observed else rest
            form = rest.covariance
            return rest.logits, rest.locs, *form.tensors()

        logits, locs, *tensors = self._by_pattern(values, given)
        stored = iter(tensors)
        return self._new(logits, locs, form.map(lambda t, n: next(stored)))

    @in_widest_precision
    def affine(self, shift: Any = 0.0, scale: Any = 1.0, *, matrix: Any = None) -> Self:
        r"""Distribution of ``shift + scale * y``, elementwise, or of ``shift + matrix @ y``.

        Args:
            shift: Number or tensor, shape ``(*batch, D)`` (broadcast).
            scale: Number or tensor, shape ``(*batch, D)`` (broadcast); not zero, either sign. One number for all
                outputs keeps an isotropic covariance isotropic.
            matrix: In place of ``scale``: shape ``(*batch, M, D)`` with M ≤ D, of full rank. The covariance is full.

        Raises:
            ValueError: If the shapes do not agree, if both a scale and a matrix are given or, when validating, if a
                scale is zero or not finite.
        """
        if matrix is not None:
            return self._map_linearly(shift, scale, matrix)
        shift, scale = self._as_vector(shift, "shift", self.dim), self._as_vector(scale, "scale", self.dim)
        if self._validates(shift, scale) and not bool((scale.isfinite() & (scale != 0)).all() & shift.isfinite().all()):
            raise ValueError("shift, scale: expected finite numbers, and scales other than zero")
        shift, scale = shift.unsqueeze(-2), scale.unsqueeze(-2)
        return self._with(torch.addcmul(shift, scale, self.locs), self.covariance.affine(scale))

    def _map_linearly(self, shift: Any, scale: Any, matrix: Any) -> Self:
        if not isinstance(scale, float | int) or scale != 1:
            raise ValueError("affine: expected a scale or a matrix, got both")
        matrix = as_tensor(matrix, "matrix", self.locs.device).to(self.locs)
        if matrix.ndim < 2 or matrix.shape[-1] != self.dim or not 0 < matrix.shape[-2] <= self.dim:
            raise ValueError(
                f"matrix: expected shape (*batch, M, {self.dim}), M <= {self.dim}, got {tuple(matrix.shape)}"
            )
        matrix = matrix.unsqueeze(-3)
        shift = self._as_vector(shift, "shift", matrix.shape[-2]).unsqueeze(-2)
        covariance = FullCovariance.from_root(matrix @ self.covariance.root())
        if self._validates(covariance.diagonal) and not bool(covariance.diagonal.isfinite().all()):
            raise ValueError("matrix: expected finite numbers and full rank")
        return self._with(shift + (matrix @ self.locs.unsqueeze(-1)).squeeze(-1), covariance)

    def _as_vector(self, value: Any, name: str, dim: int) -> Tensor:
        value = as_tensor(value, name, self.locs.device).to(self.locs)
        value = value.unsqueeze(-1) if value.ndim == 0 else value
        if value.shape[-1] not in (1, dim):
            raise ValueError(f"{name}: expected a last dimension of 1 or {dim}, got {tuple(value.shape)}")
        return value

    def temper(self, temperature: float) -> Self:
        r"""Divide the logits by :math:`\tau` and multiply the scales by :math:`\sqrt\tau`.

        Args:
            temperature: :math:`\tau > 0`; below 1 the mixture is more cautious, above 1 more adventurous.

        Raises:
            ValueError: If the temperature is not positive, or if its root over- or underflows in the mixture's dtype.

        References:
            Ha & Schmidhuber (2018), World Models.
        """
        given, temperature = temperature, _number(temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {shown(given)}")
        root, limits = math.sqrt(temperature), torch.finfo(self.locs.dtype)
        if not limits.tiny <= root <= limits.max:
            raise ValueError(f"temperature: expected a number with a root in {self.locs.dtype}, got {temperature}")
        scale = self.locs.new_full((1,), root)
        # The largest logit stays 0, however small the temperature.
        logits = (self.logits - self.logits.detach().amax(-1, keepdim=True)) / scale / scale
        return self._new(logits, self.locs, self.covariance.affine(scale))

    @in_widest_precision
    def pool(self, dim: int, weights: Any = None) -> Self:
        r"""Average the density over batch dimension ``dim``: exactly one mixture of S·K components.

        .. math:: p(y) = \sum_{s=1}^S a_s \, p_s(y)

        Args:
            dim: Batch dimension to fold into the components.
            weights: Weights :math:`a_s \ge 0`, shape ``(S,)``, normalised here; by default all equal. Their gradient
                is right at 0 too: a weight of 0 that is differentiated is taken as the square root of the smallest
                number of its dtype.

        Raises:
            ValueError: If there is no such batch dimension, nothing along it, or the weights do not fit it.
        """
        n = len(self.batch_shape)
        dim = _batch_dim(dim, n)
        full = (*self.batch_shape, self.n_components)
        log_weights = _log_weights(weights, self.batch_shape[dim], self.logits)
        logits = self.logits + log_weights.reshape(-1, *(1,) * (n - dim))

        def fold(tensor: Tensor, event_dim: int) -> Tensor:
            return tensor.movedim(dim, n - 1).flatten(n - 1, n)

        return self._new(fold(logits, 0), fold(self.locs, 1), self.covariance.expand(full).map(fold))

    @in_widest_precision
    def product(self, other: Self) -> Product:
        r"""Normalised product of the two densities, of :math:`K K'` components, with its log-normaliser.

        .. math:: p(y)\, q(y) = Z \sum_{kl} w_{kl} \, \mathcal{N}(y \mid \mu_{kl}, \Sigma_{kl}), \quad
                  \Sigma_{kl} = (\Sigma_k^{-1} + \Sigma_l'^{-1})^{-1}

        Two diagonal or isotropic mixtures give a diagonal one, others a full one.

        Raises:
            ValueError: If ``other`` is no mixture, or has another number of outputs.
        """
        if not isinstance(other, MixtureAlgebra) or other.dim != self.dim:
            got = other.dim if isinstance(other, MixtureAlgebra) else shown(other)
            raise ValueError(f"product: expected a mixture over {self.dim} outputs, got {got}")
        left, right = self._paired(1, other.n_components), other._paired(0, self.n_components)
        apart = right.locs - left.locs
        if left.covariance.is_diagonal and right.covariance.is_diagonal:
            a, b = left.covariance.stddev(), right.covariance.stddev()
            ratio = a / b
            covariance = DiagonalCovariance(a / torch.hypot(torch.ones_like(ratio), ratio))
            pull = apart / (1 + (b / a).square())
        else:
            pull, covariance = _precision_weighted(left.covariance, right.covariance, apart)
        peak = left.locs + pull
        sides = left.covariance.whiten(pull), right.covariance.whiten(peak - right.locs)
        whitened = torch.cat(torch.broadcast_tensors(*sides), -1)
        half_log_det = left.covariance.half_log_det() + right.covariance.half_log_det() - covariance.half_log_det()
        log_weights = left.logits + right.logits
        logits = log_weights + kernels.relative_log_density(whitened, half_log_det)
        log_density = kernels.normal_log_density(whitened, half_log_det) + 0.5 * self.dim * math.log(2 * math.pi)
        return Product(self._new(logits, peak, covariance), (log_weights + log_density).logsumexp(-1))

    def _paired(self, axis: int, count: int) -> Self:
        """Repeat each component ``count`` times in turn (axis 1), or all components one after another (axis 0)."""
        index = torch.arange(self.n_components, device=self.locs.device)
        index = index.repeat_interleave(count) if axis else index.repeat(count)
        covariance = self.covariance
        covariance = covariance.expand((*covariance.batch_shape[:-1], self.n_components))
        axis = len(covariance.batch_shape) - 1
        covariance = covariance.map(lambda t, n: t.index_select(axis, index))
        new = self._new(self.logits[..., index], self.locs[..., index, :], covariance)
        new.logits = self.logits[..., index]  # of the pairs, not normalised
        return new

    def prune(self, threshold: float) -> Self:
        """Drop components of weight below ``threshold``, and give their weight to the others in proportion.

        In a batch, a component stays, with weight zero where it is small, as long as one mixture keeps it. All of them
        stay under ``torch.vmap`` and in compiled functions, where no shape may depend on numbers.

        Raises:
            ValueError: If the threshold is not in [0, 1), or if nothing would be left of a mixture.
        """
        given, threshold = threshold, _number(threshold)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: expected a number in [0, 1), got {shown(given)}")
        small = self.logits < math.log(threshold) if threshold else torch.zeros_like(self.logits, dtype=torch.bool)
        if not small.numel():
            return self
        if not is_known(small):
            return self._new(self.logits.masked_fill(small, -math.inf), self.locs, self.covariance)
        if bool(small.all(-1).any()):
            raise ValueError(f"threshold: expected to leave components, got {threshold}, above all weights")
        kept = (~small).reshape(-1, self.n_components).any(0).nonzero().squeeze(-1)
        covariance = self.covariance
        if covariance.batch_shape[-1] > 1:
            axis = len(covariance.batch_shape) - 1
            covariance = covariance.map(lambda t, n: t.index_select(axis, kept))
        return self._new(self.logits.masked_fill(small, -math.inf)[..., kept], self.locs[..., kept, :], covariance)

    @in_widest_precision
    def reduce(self, n_components: int) -> Self:
        """Merge components until ``n_components`` are left; mean and covariance of the mixture stay as they are.

        Not differentiable. The cost is quadratic in the number of components: prune first where most weigh nothing.

        Raises:
            ValueError: If ``n_components`` is not between 1 and the present number.

        References:
            Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction.
        """
        if not is_count(n_components) or n_components > self.n_components:
            raise ValueError(f"n_components: expected 1 to {self.n_components}, got {shown(n_components)}")
        require_unmapped("reduce", self.logits, self.locs, *self.covariance.tensors())
        with torch.no_grad():
            flat = self._flat(self.batch_shape)
            matrices = flat.covariance.map(lambda t, n: t.double()).matrix().expand(-1, self.n_components, -1, -1)
            merged = merging.merge_components(flat.logits.double().exp(), flat.locs.double(), matrices, n_components)
        weights, locs, matrices = (part.reshape(*self.batch_shape, *part.shape[1:]) for part in merged)
        covariance = FullCovariance.from_matrix(matrices).map(lambda t, n: t.to(self.locs))
        return self._new(weights.log().to(self.locs), locs.to(self.locs), covariance)

    @in_widest_precision
    def split_variance(self, dim: int = 0) -> VarianceSplit:
        r"""Split the covariance of the mixture pooled over batch dimension ``dim`` (draws of the weights, say).

        .. math:: \mathrm{Cov}(y) = \underbrace{E_s[\mathrm{Cov}(y \mid s)]}_{\text{aleatoric}} +
                  \underbrace{\mathrm{Cov}_s(E[y \mid s])}_{\text{epistemic}}
        """
        dim = _batch_dim(dim, len(self.batch_shape))
        deviation = self.mean - self.mean.mean(dim, keepdim=True)
        epistemic = (deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).mean(dim)
        return VarianceSplit(self.covariance_matrix.mean(dim), epistemic)


def _number(value: Any) -> float:
    """Give back a number as it is, that of an array or tensor without dimensions, NaN of anything else."""
    if isinstance(value, float | int):  # which compilers know how to trace
        return value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else math.nan


def _batch_dim(dim: Any, n: int) -> int:
    """Batch dimension counted from the first; a ``ValueError`` if it is none of n."""
    if not isinstance(dim, Integral) or not -n <= int(dim) < n:
        raise ValueError(f"dim: expected one of {n} batch dimensions, got {shown(dim)}")
    return int(dim) % n


def _precision_weighted(left: Covariance, right: Covariance, apart: Tensor) -> tuple[Tensor, FullCovariance]:
    """Pull of the mean from the left one, and covariance, of products of Gaussians ``apart`` from each other."""
    roots = torch.broadcast_tensors(left.precision_tril(), right.precision_tril())
    covariance = FullCovariance.from_precision_root(torch.cat(roots, -2))
    root = covariance.precision_tril()
    target = roots[1].mT @ (roots[1] @ apart.unsqueeze(-1))
    half = torch.linalg.solve_triangular(root.mT, target, upper=True)
    return torch.linalg.solve_triangular(root, half, upper=False).squeeze(-1), covariance


def _log_weights(weights: Any, size: int, like: Tensor) -> Tensor:
    if not size:
        raise ValueError("dim: expected mixtures along it, got none")
    if weights is None:
        return like.new_full((size,), -math.log(size))
    given, weights = weights, as_tensor(weights, "weights", like.device).to(like)
    total = weights.detach().sum()
    known = weights.shape == (size,) and is_known(weights)
    if weights.shape != (size,) or (known and not bool((weights >= 0).all() & (total > 0) & total.isfinite())):
        expected = f"{size} finite numbers, none negative and not all zero"
        raise ValueError(f"weights: expected {expected}, got {describe(given)}")
    if is_differentiated(weights):  # a logarithm has no gradient at 0
        least = math.sqrt(torch.finfo(weights.dtype).tiny)
        weights = weights + (least - weights.detach()).clamp(min=0)
    return kernels.normalize_logits(weights.log())
