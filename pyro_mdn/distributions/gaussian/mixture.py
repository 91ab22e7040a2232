r"""The Gaussian mixture: a mixture of normal components, with the operations that only these have."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.distributions.covariance.diagonal import DiagonalCovariance
from pyro_mdn.distributions.covariance.full import FullCovariance, plus
from pyro_mdn.distributions.families.normal import NormalComponents, normal_log_density, relative_log_density
from pyro_mdn.distributions.gaussian.merging import merge_components
from pyro_mdn.distributions.gaussian.modes import find_modes
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.checks import is_count, require_unmapped, shown

__all__ = ["GaussianMixture", "Product"]


class Product(NamedTuple):
    """Normalised product of two mixtures, and the logarithm of its normaliser Z, shape ``(*batch,)``."""

    mixture: GaussianMixture
    log_normalizer: Tensor


class GaussianMixture(Mixture):
    r"""Mixture of :math:`K` Gaussians over :math:`\mathbb{R}^D`.

    .. math:: p(y) = \sum_{k=1}^K w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

    A mixture is a Pyro distribution with ``event_shape`` ``(D,)``. Arguments broadcast over the batch. Closed forms are
    differentiable; a closed form that is a distribution is again a mixture.

    Results have the precision of the parameters, which may be half precision. They are computed in at least single
    precision, and in double if an argument is double. A batch of mixtures is indexed like a tensor: ``mixture[rows]``.

    Args:
        logits: Log-weights up to a constant, shape ``(*batch, K)``. A weight of zero is ``-inf``.
        locs: Component means, shape ``(*batch, K, D)``.
        covariance: Component covariances; a component axis of 1 ties them.
        validate_args: Whether to check values of parameters and arguments; by default as set by
            ``pyro.enable_validation``.

    Raises:
        ValueError: If shapes or dtypes do not agree or, when validating, if a parameter is not finite or a
            covariance not positive definite.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> from pyro_mdn import DiagonalCovariance
    >>> locs, covariance = torch.tensor([[-1.0], [1.0]]), DiagonalCovariance(torch.ones(1, 1))
    >>> mixture = GaussianMixture(torch.zeros(2), locs, covariance)
    >>> mixture.mean, mixture.variance
    (tensor([0.]), tensor([2.]))
    """

    components: NormalComponents  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, logits: Tensor, locs: Tensor, covariance: Covariance, *, validate_args: bool | None = None
    ) -> None:
        super().__init__(logits, NormalComponents(locs, covariance), validate_args=validate_args)

    @property
    def covariance(self) -> Covariance:
        """Component covariances; a component axis of 1 ties them."""
        return self.components.covariance

    @covariance.setter
    def covariance(self, value: Covariance) -> None:
        changed = NormalComponents(self.components.locs, value.of_dim(self.dim))
        self.components = changed  # pyright: ignore[reportIncompatibleVariableOverride]

    @in_widest_precision
    def product(self, other: Self) -> Product:
        r"""Multiply two densities and normalise: return a mixture of :math:`K K'` components and its log-normaliser.

        .. math:: p(y)\, q(y) = Z \sum_{kl} w_{kl} \, \mathcal{N}(y \mid \mu_{kl}, \Sigma_{kl}), \quad
                  \Sigma_{kl} = (\Sigma_k^{-1} + \Sigma_l'^{-1})^{-1}

        If both mixtures have diagonal or isotropic covariances, the product has diagonal ones; otherwise full ones.

        Raises:
            ValueError: If ``other`` is not a Gaussian mixture, or has another number of outputs.
        """
        if not isinstance(other, GaussianMixture) or other.dim != self.dim:
            got = other.dim if isinstance(other, GaussianMixture) else shown(other)
            raise ValueError(f"product: expected a Gaussian mixture over {self.dim} outputs, got {got}")
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
        logits = log_weights + relative_log_density(whitened, half_log_det)
        log_density = normal_log_density(whitened, half_log_det) + 0.5 * self.dim * math.log(2 * math.pi)
        mixture = self.reweighted(logits, NormalComponents(peak, covariance))
        return Product(mixture, (log_weights + log_density).logsumexp(-1))

    def _paired(self, axis: int, count: int) -> Self:
        """Repeat each component ``count`` times in turn (axis 1), or all components one after another (axis 0)."""
        index = torch.arange(self.n_components, device=self.locs.device)
        index = index.repeat_interleave(count) if axis else index.repeat(count)
        covariance = self.covariance
        covariance = covariance.expand((*covariance.batch_shape[:-1], self.n_components))
        axis = len(covariance.batch_shape) - 1
        covariance = covariance.map(lambda t, n: t.index_select(axis, index))
        new = self.reweighted(self.logits[..., index], NormalComponents(self.locs[..., index, :], covariance))
        new.logits = self.logits[..., index]  # not normalised, to be added to those of the other mixture
        return new

    @in_widest_precision
    def reduce(self, n_components: int) -> Self:
        """Merge components until ``n_components`` are left; mean and covariance of the mixture stay as they are.

        The result is not differentiable. The cost is quadratic in the number of components: call :meth:`prune` first if
        most of them have next to no weight.

        Raises:
            ValueError: If ``n_components`` is not between 1 and the present number.

        References:
            Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction.
        """
        if not is_count(n_components) or n_components > self.n_components:
            raise ValueError(f"n_components: expected 1 to {self.n_components}, got {shown(n_components)}")
        require_unmapped("reduce", self.logits, self.locs, *self.covariance.tensors())
        with torch.no_grad():
            flat = self.flatten(self.batch_shape)
            matrices = flat.covariance.map(lambda t, n: t.double()).matrix().expand(-1, self.n_components, -1, -1)
            merged = merge_components(flat.logits.double().exp(), flat.locs.double(), matrices, n_components)
        weights, locs, matrices = (part.reshape(*self.batch_shape, *part.shape[1:]) for part in merged)
        covariance = FullCovariance.from_matrix(matrices).map(lambda t, n: t.to(self.locs))
        return self.reweighted(weights.log().to(self.locs), NormalComponents(locs.to(self.locs), covariance))

    @in_widest_precision
    def modes(self) -> Tensor:
        """Find local maxima of the density, highest first, ``(*batch, M, D)``; NaN where a mixture has fewer than M.

        The search climbs from the mean of each component. It misses a maximum to which no mean leads, which is rare.
        The result is not differentiable.

        References:
            Carreira-Perpiñán (2000), Mode-finding for mixtures of Gaussian distributions.
        """
        if not self.batch_shape.numel():
            return self.locs[..., :0, :].detach()
        require_unmapped("modes", self.logits, self.locs, *self.covariance.tensors())
        with torch.no_grad():
            flat = self.flatten(self.batch_shape)
            precision_tril = flat.covariance.expand((len(flat.locs), self.n_components)).precision_tril().double()
            log_weights = (flat.logits - flat.covariance.half_log_det()).double()
            precisions = precision_tril.mT @ precision_tril
            points, distinct = find_modes(log_weights, flat.locs.double(), precisions)
            points = points.masked_fill(~distinct.unsqueeze(-1), math.nan)
            first = torch.argsort((~distinct).to(torch.int8), dim=-1, stable=True)
            points = points.gather(1, first.unsqueeze(-1).expand_as(points))[:, : int(distinct.sum(-1).max())]
        return points.reshape(*self.batch_shape, *points.shape[1:]).to(self.locs)

    @in_widest_precision
    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        r"""Compute a lower and an upper bound of the differential entropy in nats, shape ``(*batch,)`` each.

        .. math:: -\sum_k w_k \log \sum_l w_l \, \mathcal{N}(\mu_k \mid \mu_l, \Sigma_k + \Sigma_l) \le H \le
                  \sum_k w_k \left( -\log w_k + \tfrac12 \log\det(2 \pi e \Sigma_k) \right)

        The upper bound is the smaller of this one and the entropy of the Gaussian with the same covariance.

        References:
            Huber et al. (2008), On entropy approximation for Gaussian mixture random vectors.
        """
        weights, constant = self.logits.exp(), 0.5 * self.dim * math.log(2 * math.pi * math.e)
        surprise = -self.logits.masked_fill(weights == 0, 0.0)
        components = (weights * (surprise + self.covariance.half_log_det())).sum(-1)
        gaussian = self.as_gaussian().half_log_det().squeeze(-1)
        lower = torch.zeros_like(components)
        covariance = self.covariance.expand((*self.covariance.batch_shape[:-1], self.n_components))
        axis = len(covariance.batch_shape) - 1
        for k in range(self.n_components):
            summed = plus(covariance, covariance.map(lambda t, n, k=k: t.narrow(axis, k, 1)))
            crossed = self.with_components(NormalComponents(self.locs, summed)).log_prob(self.locs[..., k, :])
            lower = lower - weights[..., k] * crossed
        return lower, torch.minimum(components, gaussian) + constant


def _precision_weighted(left: Covariance, right: Covariance, apart: Tensor) -> tuple[Tensor, FullCovariance]:
    """Compute the shift from the left mean, and the covariance, of products of Gaussians whose means are ``apart``."""
    roots = torch.broadcast_tensors(left.precision_tril(), right.precision_tril())
    covariance = FullCovariance.from_precision_root(torch.cat(roots, -2))
    root = covariance.precision_tril()
    target = roots[1].mT @ (roots[1] @ apart.unsqueeze(-1))
    half = torch.linalg.solve_triangular(root.mT, target, upper=True)
    return torch.linalg.solve_triangular(root, half, upper=False).squeeze(-1), covariance
