r"""The Gaussian mixture and its closed-form algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_mdn import kernels, reduction
from pyro_mdn.correlated import FullCovariance
from pyro_mdn.covariance import Covariance, DiagonalCovariance
from pyro_mdn.density import MixtureDensity, check_dims, has_missing

__all__ = ["GaussianMixture", "Product", "VarianceSplit"]


class Product(NamedTuple):
    """Normalised product of two mixtures, and the logarithm of what normalised it, shape ``(*batch,)``."""

    mixture: GaussianMixture
    log_normalizer: Tensor


class VarianceSplit(NamedTuple):
    """Law of total variance over a batch dimension: covariances ``(*batch, D, D)`` that add up to the whole."""

    aleatoric: Tensor
    epistemic: Tensor


class GaussianMixture(MixtureDensity):
    r"""Mixture of :math:`K` Gaussians over :math:`\mathbb{R}^D`.

    .. math:: p(y) = \sum_{k=1}^K w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

    A Pyro distribution with ``event_shape`` ``(D,)``. Arguments broadcast over the batch. Every closed form is
    differentiable, and is again a mixture where it is a distribution.

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

    >>> locs, covariance = torch.tensor([[-1.0], [1.0]]), DiagonalCovariance(torch.ones(1, 1))
    >>> mixture = GaussianMixture(torch.zeros(2), locs, covariance)
    >>> mixture.mean, mixture.variance
    (tensor([0.]), tensor([2.]))
    """

    has_rsample = True

    # Conditioning and maps

    def condition(self, values: Tensor, dims: int | Sequence[int]) -> GaussianMixture:
        r"""Distribution of the remaining outputs, in ascending order, given ``values`` at ``dims``.

        .. math:: w_k' \propto w_k \, \mathcal{N}(v \mid \mu_{k,G}, \Sigma_{k,GG}), \quad
                  \mu_k' = \mu_{k,F} + \Sigma_{k,FG} \Sigma_{k,GG}^{-1} (v - \mu_{k,G})

        Args:
            values: What is known, shape ``(*sample, *batch, len(dims))``, in the order of ``dims``. An entry that is
                NaN was not observed: that row is conditioned on its other entries.
            dims: The outputs that are known; one at least must remain.

        Raises:
            ValueError: If an index repeats or is out of range, if none is free, or if ``values`` has another width.
        """
        dims = check_dims(dims, self.dim)
        free = [d for d in range(self.dim) if d not in dims]
        if not free:
            raise ValueError(f"dims: expected at least one of {self.dim} outputs to stay free, got all of them")
        known = self.marginal(dims)
        known._check_value(values)
        if has_missing(values):
            return self._condition_on_observed(values, dims, free)
        logits = known._joint_log_prob(values)
        shift, covariance = self.covariance.condition(values.unsqueeze(-2) - known.locs, dims, free)
        return self._new(logits, self.locs[..., free] + shift, covariance)

    def _condition_on_observed(self, values: Tensor, dims: list[int], free: list[int]) -> GaussianMixture:
        form: Covariance = self.marginal(free).covariance

        def given(mixture: GaussianMixture, known: Tensor, observed: list[int]) -> tuple[Tensor, ...]:
            nonlocal form
            rest = mixture.marginal([*(dims[i] for i in observed), *free])
            rest = rest.condition(known, range(len(observed))) if observed else rest
            form = rest.covariance
            return rest.logits, rest.locs, *form.tensors()

        logits, locs, *tensors = self._by_pattern(values, given)
        stored = iter(tensors)
        return self._new(logits, locs, form.map(lambda t, n: next(stored)))

    def affine(
        self, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0, *, matrix: Tensor | None = None
    ) -> GaussianMixture:
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
        if self._validate_args and not bool((scale.isfinite() & (scale != 0)).all() & shift.isfinite().all()):
            raise ValueError("shift, scale: expected finite numbers, and scales other than zero")
        shift, scale = shift.unsqueeze(-2), scale.unsqueeze(-2)
        return self._new(self.logits, shift + scale * self.locs, self.covariance.affine(scale))

    def _map_linearly(self, shift: Tensor | float, scale: Tensor | float, matrix: Tensor) -> GaussianMixture:
        if not isinstance(scale, float | int) or scale != 1:
            raise ValueError("affine: expected a scale or a matrix, got both")
        if matrix.ndim < 2 or matrix.shape[-1] != self.dim or not 0 < matrix.shape[-2] <= self.dim:
            raise ValueError(
                f"matrix: expected shape (*batch, M, {self.dim}), M <= {self.dim}, got {tuple(matrix.shape)}"
            )
        matrix = matrix.to(self.locs).unsqueeze(-3)
        shift = self._as_vector(shift, "shift", matrix.shape[-2]).unsqueeze(-2)
        covariance = FullCovariance.from_root(matrix @ self.covariance.root())
        return self._new(self.logits, shift + (matrix @ self.locs.unsqueeze(-1)).squeeze(-1), covariance)

    def _as_vector(self, value: Tensor | float, name: str, dim: int) -> Tensor:
        value = torch.as_tensor(value, dtype=self.locs.dtype, device=self.locs.device)
        value = value.unsqueeze(-1) if value.ndim == 0 else value
        if value.shape[-1] not in (1, dim):
            raise ValueError(f"{name}: expected a last dimension of 1 or {dim}, got {tuple(value.shape)}")
        return value

    def temper(self, temperature: float) -> GaussianMixture:
        r"""Divide the logits by :math:`\tau` and multiply the scales by :math:`\sqrt\tau`.

        Args:
            temperature: :math:`\tau > 0`; below 1 the mixture is more cautious, above 1 more adventurous.

        References:
            Ha & Schmidhuber (2018), World Models.
        """
        if not 0 < temperature < math.inf:
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

    def product(self, other: GaussianMixture) -> Product:
        r"""Normalised product of the two densities, of :math:`K K'` components, with its log-normaliser.

        .. math:: p(y)\, q(y) = Z \sum_{kl} w_{kl} \, \mathcal{N}(y \mid \mu_{kl}, \Sigma_{kl}), \quad
                  \Sigma_{kl} = (\Sigma_k^{-1} + \Sigma_l'^{-1})^{-1}

        Two diagonal or isotropic mixtures give a diagonal one, others a full one.

        Raises:
            ValueError: If ``other`` has another number of outputs.
        """
        if other.dim != self.dim:
            raise ValueError(f"product: expected a mixture over {self.dim} outputs, got {other.dim}")
        left, right = self._paired(1, other.n_components), other._paired(0, self.n_components)
        apart = right.locs - left.locs
        if left.covariance.is_diagonal and right.covariance.is_diagonal:
            a, b = left.covariance.variance(), right.covariance.variance()
            pull, covariance = apart * a / (a + b), DiagonalCovariance((a * b / (a + b)).sqrt())
        else:
            pull, covariance = _precision_weighted(left.covariance, right.covariance, apart)
        peak = left.locs + pull
        log_scale = _at(left, peak) + _at(right, peak) - _at(left._new(left.logits, peak, covariance), peak)
        logits = left.logits + right.logits + log_scale
        return Product(self._new(logits, peak, covariance), logits.logsumexp(-1))

    def _paired(self, axis: int, count: int) -> GaussianMixture:
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

    def prune(self, threshold: float) -> GaussianMixture:
        """Drop components of weight below ``threshold``, and give their weight to the others in proportion.

        In a batch, a component stays, with weight zero where it is small, as long as one mixture keeps it.

        Raises:
            ValueError: If the threshold is not in [0, 1), or if nothing would be left of a mixture.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: expected a number in [0, 1), got {threshold}")
        small = self.logits < math.log(threshold) if threshold else torch.zeros_like(self.logits, dtype=torch.bool)
        if bool(small.all(-1).any()):
            raise ValueError(f"threshold: expected to leave components, got {threshold}, above all weights")
        kept = (~small).reshape(-1, self.n_components).any(0).nonzero().squeeze(-1)
        covariance = self.covariance
        if covariance.batch_shape[-1] > 1:
            axis = len(covariance.batch_shape) - 1
            covariance = covariance.map(lambda t, n: t.index_select(axis, kept))
        return self._new(self.logits.masked_fill(small, -math.inf)[..., kept], self.locs[..., kept, :], covariance)

    def reduce(self, n_components: int) -> GaussianMixture:
        """Merge components until ``n_components`` are left; mean and covariance of the mixture stay as they are.

        Not differentiable. The cost is quadratic in the number of components: prune first where most weigh nothing.

        Raises:
            ValueError: If ``n_components`` is not between 1 and the present number.

        References:
            Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction.
        """
        if not 1 <= n_components <= self.n_components:
            raise ValueError(f"n_components: expected 1 to {self.n_components}, got {n_components}")
        with torch.no_grad():
            flat = self._flat(self.batch_shape)
            matrices = flat.covariance.matrix().expand(-1, self.n_components, -1, -1)
            merged = reduction.merge_components(flat.logits.exp(), flat.locs, matrices, n_components)
        weights, locs, matrices = (part.reshape(*self.batch_shape, *part.shape[1:]) for part in merged)
        return self._new(weights.log(), locs, FullCovariance.from_matrix(matrices))

    # Quantiles, one output at a time

    def cdf(self, value: Tensor) -> Tensor:
        r"""Marginal cumulative distribution of each output, shape ``(*sample, *batch, D)``.

        .. math:: F_d(y_d) = \sum_k w_k \, \Phi\left( (y_d - \mu_{kd}) / \sigma_{kd} \right)
        """
        self._check_value(value)
        return kernels.mixture_cdf(value, *self._univariate())

    def icdf(self, value: Tensor | float) -> Tensor:
        """Marginal quantile of each output: the inverse of :meth:`cdf`, shape ``(*sample, *batch, D)``.

        Gradients are those of the implicit function, also with respect to ``value``.

        Args:
            value: Probabilities, broadcast against ``(*batch, D)``; 0 and 1 give ∓inf.

        Raises:
            ValueError: If a probability is outside [0, 1] or the shape does not fit.
        """
        q = torch.as_tensor(value, dtype=self.locs.dtype, device=self.locs.device)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError("value: expected probabilities in [0, 1]")
        q = q.expand(torch.broadcast_shapes(q.shape, (*self.batch_shape, self.dim)))
        return kernels.mixture_quantile(q, *self._univariate())

    def _univariate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters of the marginals: logits ``(*batch, 1, K)``, locations and scales ``(*batch, D, K)``."""
        return self.logits.unsqueeze(-2), self.locs.mT, self.covariance.variance().sqrt().mT

    def interval(self, mass: float, *, kind: Literal["central", "shortest"] = "central") -> tuple[Tensor, Tensor]:
        """Lower and upper ends, ``(*batch, D)`` each, of an interval with probability ``mass`` for each output.

        Args:
            mass: Probability inside, in (0, 1).
            kind: ``"central"`` leaves equal tails; ``"shortest"`` is the shortest single interval, which contains
                the points of highest density if there is one mode.

        Raises:
            ValueError: If the mass is not in (0, 1) or the kind is unknown.
        """
        _check_mass(mass)
        if kind not in ("central", "shortest"):
            raise ValueError(f"kind: expected 'central' or 'shortest', got {kind!r}")
        left = torch.full((*self.batch_shape, self.dim), (1 - mass) / 2).to(self.locs)
        if kind == "shortest":
            left = kernels.minimize_bracketed(lambda p: self.icdf(p + mass) - self.icdf(p), left, 1 - mass)
        return self.icdf(left), self.icdf(left + mass)

    # Regions of highest density

    def highest_density_threshold(self, mass: float, *, num_samples: int = 10_000) -> Tensor:
        r"""Log-density above which the points have probability ``mass``, shape ``(*batch,)``, from draws.

        .. math:: P(\log p(Y) \ge t) = \text{mass}

        Raises:
            ValueError: If the mass is not in (0, 1).

        References:
            Hyndman (1996), Computing and graphing highest density regions.
        """
        _check_mass(mass)
        return self.log_prob(self.sample((num_samples,))).quantile(1 - mass, 0)

    def in_highest_density_region(self, value: Tensor, mass: float, *, num_samples: int = 10_000) -> Tensor:
        """Whether points lie in the smallest region of probability ``mass``, shape ``(*sample, *batch)``."""
        return self.log_prob(value) >= self.highest_density_threshold(mass, num_samples=num_samples)

    # Transport to and from independent uniforms

    def rosenblatt(self, value: Tensor) -> Tensor:
        r"""Conditional probability integral transforms, shape ``(*sample, *batch, D)``.

        .. math:: u_d = F(y_d \mid y_1, \dots, y_{d-1})

        If y follows the mixture, they are independent and uniform.

        References:
            Rosenblatt (1952), Remarks on a multivariate transformation.
        """
        self._check_value(value)

        def walk(d: int, *univariate: Tensor) -> Tensor:
            levels.append(kernels.mixture_cdf(value[..., d], *univariate))
            return value[..., d]

        levels: list[Tensor] = []
        self._walk(walk)
        return torch.stack(levels, -1)

    def inverse_rosenblatt(self, value: Tensor) -> Tensor:
        """Points whose :meth:`rosenblatt` is ``value``, shape ``(*sample, *batch, D)``."""
        self._check_value(value)
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError("value: expected probabilities in [0, 1]")
        value = value.expand(torch.broadcast_shapes(value.shape, (*self.batch_shape, self.dim)))
        return self._walk(lambda d, *univariate: kernels.mixture_quantile(value[..., d], *univariate))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws with pathwise gradients to locations, covariances and logits, ``(*sample_shape, *batch, D)``.

        The draw is that of :meth:`sample`. Its derivatives keep the conditional probability integral transforms
        fixed, one output after another. For modes far apart the gradients of the logits are right on average, but
        vary without bound: the few draws between the modes carry all of it.

        References:
            Figurnov, Mohamed & Mnih (2018), Implicit reparameterization gradients.
            Graves (2016), Stochastic backpropagation through mixture density distributions.
        """
        draws = self.sample(sample_shape)

        def follow(d: int, *univariate: Tensor) -> Tensor:
            logits, locs, scale = univariate
            level = kernels.mixture_cdf(draws[..., d], logits, locs, scale).detach()

            def equation(point: Tensor) -> tuple[Tensor, Tensor]:
                slope = kernels.mixture_log_density(point, logits, locs, scale).exp()
                return kernels.mixture_cdf(point, logits, locs, scale) - level, slope

            return kernels.follow_root(draws[..., d], equation)

        tracked = (self.logits, self.locs, *self.covariance.tensors())
        if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
            return self._walk(follow)
        return draws

    def _walk(self, choose: Callable[..., Tensor]) -> Tensor:
        """Choose outputs in order, each from its univariate mixture given those before it.

        ``choose(d, logits, locs, scale)`` sees parameters ``(*sample, *batch, K)`` and returns ``(*sample, *batch)``.
        """
        covariance, logits = self.covariance.triangular(), self.logits
        residuals: list[Tensor] = []
        outputs: list[Tensor] = []
        for d in range(self.dim):
            shift, scale = covariance.next_output(residuals)
            locs = self.locs[..., d] + shift
            outputs.append(choose(d, logits, locs, scale))
            standardized = (outputs[-1].unsqueeze(-1) - locs) / scale
            logits = kernels.normalize_logits(logits - 0.5 * standardized.square() - scale.log())
            residuals.append(outputs[-1].unsqueeze(-1) - self.locs[..., d])
        return torch.stack(outputs, -1)

    # Shape of the density

    def modes(self) -> Tensor:
        """Local maxima of the density, highest first, shape ``(*batch, M, D)``; NaN where a mixture has fewer than M.

        Not differentiable.

        References:
            Carreira-Perpiñán (2000), Mode-finding for mixtures of Gaussian distributions.
        """
        with torch.no_grad():
            flat = self._flat(self.batch_shape)
            precision_tril = flat.covariance.expand((len(flat.locs), self.n_components)).precision_tril()
            log_weights = flat.logits - flat.covariance.half_log_det()
            points, distinct = reduction.find_modes(log_weights, flat.locs, precision_tril.mT @ precision_tril)
            points = points.masked_fill(~distinct.unsqueeze(-1), math.nan)
            first = torch.argsort((~distinct).to(torch.int8), dim=-1, stable=True)
            points = points.gather(1, first.unsqueeze(-1).expand_as(points))[:, : int(distinct.sum(-1).max())]
        return points.reshape(*self.batch_shape, *points.shape[1:])

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        r"""Lower and upper bound of the differential entropy in nats, shape ``(*batch,)`` each.

        .. math:: -\sum_k w_k \log \sum_l w_l \, \mathcal{N}(\mu_k \mid \mu_l, \Sigma_k + \Sigma_l) \le H \le
                  \sum_k w_k \left( -\log w_k + \tfrac12 \log\det(2 \pi e \Sigma_k) \right)

        The upper bound is also kept below the entropy of the Gaussian with the same covariance.

        References:
            Huber et al. (2008), On entropy approximation for Gaussian mixture random vectors.
        """
        weights, constant = self.logits.exp(), 0.5 * self.dim * math.log(2 * math.pi * math.e)
        components = torch.where(weights > 0, weights * (self.covariance.half_log_det() - self.logits), 0.0).sum(-1)
        gaussian = 0.5 * torch.logdet(self.covariance_matrix)
        lower = torch.zeros_like(components)
        shape = (*self.batch_shape, self.n_components)
        matrices = self.covariance.matrix().expand(*shape, self.dim, self.dim)
        for k in range(self.n_components):
            summed = FullCovariance.from_matrix(matrices + matrices[..., k, None, :, :])
            crossed = self._new(self.logits, self.locs, summed).log_prob(self.locs[..., k, :])
            lower = lower - torch.where(weights[..., k] > 0, weights[..., k] * crossed, 0.0)
        return lower, torch.minimum(components, gaussian) + constant

    def split_variance(self, dim: int = 0) -> VarianceSplit:
        r"""Split the covariance of the mixture pooled over batch dimension ``dim`` (draws of the weights, say).

        .. math:: \mathrm{Cov}(y) = \underbrace{E_s[\mathrm{Cov}(y \mid s)]}_{\text{aleatoric}} +
                  \underbrace{\mathrm{Cov}_s(E[y \mid s])}_{\text{epistemic}}
        """
        n = len(self.batch_shape)
        if not -n <= dim < n:
            raise ValueError(f"dim: expected one of {n} batch dimensions, got {dim}")
        deviation = self.mean - self.mean.mean(dim % n, keepdim=True)
        epistemic = (deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).mean(dim % n)
        return VarianceSplit(self.covariance_matrix.mean(dim % n), epistemic)


def _check_mass(mass: float) -> None:
    if not 0 < mass < 1:
        raise ValueError(f"mass: expected a probability in (0, 1), got {mass}")


def _at(mixture: GaussianMixture, points: Tensor) -> Tensor:
    """Log-density of each component at a point of its own, ``(*batch, K)``."""
    whitened = mixture.covariance.whiten(points - mixture.locs)
    return kernels.normal_log_density(whitened, mixture.covariance.half_log_det())


def _precision_weighted(left: Covariance, right: Covariance, apart: Tensor) -> tuple[Tensor, FullCovariance]:
    """Pull of the mean from the left one, and covariance, of products of Gaussians ``apart`` from each other."""
    roots = torch.broadcast_tensors(left.precision_tril(), right.precision_tril())
    covariance = FullCovariance.from_precision_root(torch.cat(roots, -2))
    root = covariance.precision_tril()
    target = roots[1].mT @ (roots[1] @ apart.unsqueeze(-1))
    half = torch.linalg.solve_triangular(root.mT, target, upper=True)
    return torch.linalg.solve_triangular(root, half, upper=False).squeeze(-1), covariance


def _log_weights(weights: Tensor | None, size: int, like: Tensor) -> Tensor:
    if weights is None:
        return like.new_full((size,), -math.log(size))
    if weights.shape != (size,) or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
        raise ValueError(f"weights: expected {size} finite numbers, none negative and not all zero")
    return kernels.normalize_logits(weights.to(like).log())
