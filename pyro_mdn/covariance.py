r"""Covariance operators: positive-definite matrices known by one factor.

Each operator stores its factor and derives the rest on demand. Shapes are ``(*batch, K)`` for the batch of
matrices, ``K`` being the component axis; a component axis of 1 is one matrix *tied* across components.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

from pyro_mdn import kernels

__all__ = ["Covariance", "DiagonalCovariance", "FullCovariance", "IsotropicCovariance", "LowRankCovariance"]


def _factor(event_dim: int) -> Tensor:
    """Declare a stored tensor with that many dimensions behind the component axis."""
    return field(metadata={"event_dim": event_dim})


@dataclass(frozen=True, eq=False)
class Covariance(ABC):
    r"""A batch of covariance matrices :math:`\Sigma` over :math:`\mathbb{R}^D`, known by a factor.

    Whatever is elliptical is built from :meth:`whiten` and :meth:`half_log_det`, which come from the same factor:

    .. math:: r^\top \Sigma^{-1} r = \lVert \mathrm{whiten}(r) \rVert^2, \qquad
              \mathrm{half\_log\_det} = \tfrac12 \log\det\Sigma.
    """

    @property
    @abstractmethod
    def dim(self) -> int:
        """Number of outputs D."""

    @abstractmethod
    def whiten(self, residual: Tensor) -> Tensor:
        """Map residuals ``(*batch, K, D)`` to uncorrelated ones of unit variance."""

    @abstractmethod
    def colorize(self, noise: Tensor) -> Tensor:
        """Map standard normal noise ``(*batch, K, D)`` to residuals: the inverse of :meth:`whiten`."""

    @abstractmethod
    def half_log_det(self) -> Tensor:
        """Half the log-determinant, shape ``(*batch, K)``."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Diagonal of the matrix, shape ``(*batch, K, D)``."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Dense matrix, shape ``(*batch, K, D, D)``."""

    @abstractmethod
    def marginal(self, dims: Sequence[int]) -> Covariance:
        """Covariance of the outputs ``dims``, in that order."""

    @abstractmethod
    def condition(self, residual: Tensor, given: Sequence[int], free: Sequence[int]) -> tuple[Tensor, Covariance]:
        """Shift of the mean and covariance of the outputs ``free``, the residuals at ``given`` being known."""

    @abstractmethod
    def affine(self, scale: Tensor) -> Covariance:
        """Covariance after multiplying the outputs by ``scale``, shape ``(*batch, K, D)`` (broadcast)."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ``ValueError`` unless every matrix is finite and positive definite."""

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of matrices, the component axis last."""
        first = fields(self)[0]
        tensor: Tensor = getattr(self, first.name)
        return tensor.shape[: tensor.ndim - first.metadata["event_dim"]]

    def of_dim(self, dim: int) -> Covariance:
        """Return this operator for ``dim`` outputs; a ``ValueError`` if it is for another number."""
        if self.dim != dim:
            raise ValueError(f"covariance: expected one over {dim} outputs, got {self.dim}")
        return self

    def map(self, function: Callable[[Tensor, int], Tensor]) -> Self:
        """Apply ``function(tensor, event_dim)`` to each stored tensor; it may change the batch only."""
        changes = {
            f.name: function(getattr(self, f.name), f.metadata["event_dim"])
            if f.metadata
            else getattr(self, f.name)
            for f in fields(self)
        }
        return type(self)(**changes)

    def expand(self, batch_shape: Sequence[int]) -> Self:
        """Expand the batch, component axis included; a view."""
        return self.map(lambda t, n: t.expand(*batch_shape, *t.shape[t.ndim - n :]))

    def select(self, component: Tensor) -> Self:
        """Pick one matrix per entry of ``component`` (``(*sample, *batch)``); the component axis becomes 1."""
        if self.batch_shape[-1] == 1:
            return self
        return self.map(lambda t, n: _take_component(t, component, n))


def _take_component(tensor: Tensor, component: Tensor, event_dim: int) -> Tensor:
    """Gather ``(*batch, K, *event)`` at ``(*sample, *batch)`` into ``(*sample, *batch, 1, *event)``."""
    index = component.reshape(*component.shape, *(1,) * (event_dim + 1))
    tensor = tensor.expand(*component.shape, *tensor.shape[tensor.ndim - event_dim - 1 :])
    return tensor.take_along_dim(index, dim=tensor.ndim - event_dim - 1)


def _require_positive(scale: Tensor, name: str) -> None:
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"{name}: expected positive finite numbers, got some that are not")


def _require_square(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name}: expected shape (*batch, K, D, D), got {tuple(matrix.shape)}")


@dataclass(frozen=True, eq=False)
class IsotropicCovariance(Covariance):
    r""":math:`\Sigma = \sigma^2 I`.

    Args:
        scale: Standard deviation :math:`\sigma`, shape ``(*batch, K)``.
        outputs: Number of outputs D; a mixture fills it in.

    >>> IsotropicCovariance(torch.tensor([2.0]), outputs=2).matrix()
    tensor([[[4., 0.],
             [0., 4.]]])
    """

    scale: Tensor = _factor(0)
    outputs: int | None = None

    @property
    def dim(self) -> int:
        if self.outputs is None:
            raise ValueError("IsotropicCovariance: expected outputs=D, got a scale alone")
        return self.outputs

    def of_dim(self, dim: int) -> IsotropicCovariance:
        return IsotropicCovariance(self.scale, dim) if self.outputs is None else super().of_dim(dim)  # type: ignore[return-value]

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.scale.unsqueeze(-1)

    def colorize(self, noise: Tensor) -> Tensor:
        return noise * self.scale.unsqueeze(-1)

    def half_log_det(self) -> Tensor:
        return self.dim * self.scale.log()

    def variance(self) -> Tensor:
        return self.scale.square().unsqueeze(-1).expand(*self.scale.shape, self.dim)

    def matrix(self) -> Tensor:
        return self.variance().diag_embed()

    def marginal(self, dims: Sequence[int]) -> IsotropicCovariance:
        return IsotropicCovariance(self.scale, len(dims))

    def condition(self, residual: Tensor, given: Sequence[int], free: Sequence[int]) -> tuple[Tensor, Covariance]:
        return torch.zeros_like(residual[..., :1]), self.marginal(free)

    def affine(self, scale: Tensor) -> Covariance:
        if scale.shape[-1] == 1:
            return IsotropicCovariance(self.scale * scale.squeeze(-1).abs(), self.dim)
        return DiagonalCovariance(self.scale.unsqueeze(-1) * scale.abs())

    def validate(self) -> None:
        _require_positive(self.scale, "IsotropicCovariance.scale")


@dataclass(frozen=True, eq=False)
class DiagonalCovariance(Covariance):
    r""":math:`\Sigma = \mathrm{diag}(\sigma^2)`.

    Args:
        scale: Standard deviations :math:`\sigma`, shape ``(*batch, K, D)``.

    >>> DiagonalCovariance(torch.tensor([[1.0, 3.0]])).variance()
    tensor([[1., 9.]])
    """

    scale: Tensor = _factor(1)

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.scale

    def colorize(self, noise: Tensor) -> Tensor:
        return noise * self.scale

    def half_log_det(self) -> Tensor:
        return kernels.sum_outputs(self.scale.log())

    def variance(self) -> Tensor:
        return self.scale.square()

    def matrix(self) -> Tensor:
        return self.variance().diag_embed()

    def marginal(self, dims: Sequence[int]) -> DiagonalCovariance:
        return DiagonalCovariance(self.scale[..., list(dims)])

    def condition(self, residual: Tensor, given: Sequence[int], free: Sequence[int]) -> tuple[Tensor, Covariance]:
        return torch.zeros_like(residual[..., :1]), self.marginal(free)

    def affine(self, scale: Tensor) -> DiagonalCovariance:
        return DiagonalCovariance(self.scale * scale.abs())

    def validate(self) -> None:
        _require_positive(self.scale, "DiagonalCovariance.scale")


@dataclass(frozen=True, eq=False)
class FullCovariance(Covariance):
    r"""Unrestricted :math:`\Sigma`, stored as its whitening factor :math:`W = L^{-1}`.

    .. math:: \Sigma = L L^\top, \qquad \Sigma^{-1} = W^\top W, \qquad \mathrm{whiten}(r) = W r.

    A density is then a product, not a triangular solve. :math:`1 / W_{dd}` is the conditional standard deviation
    of output d given the outputs before it.

    Args:
        packed: W with a positive diagonal, shape ``(*batch, K, D(D+1)/2)``: the diagonal first, then the
            strictly lower triangle row by row.

    >>> FullCovariance.from_matrix(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]])).packed
    tensor([[ 0.5000,  0.5000, -0.2500]])
    """

    packed: Tensor = _factor(1)

    @classmethod
    def from_precision_tril(cls, precision_tril: Tensor) -> FullCovariance:
        r"""From lower-triangular W with :math:`\Sigma^{-1} = W^\top W`, shape ``(*batch, K, D, D)``."""
        _require_square(precision_tril, "precision_tril")
        dim = precision_tril.shape[-1]
        rows, columns = torch.tril_indices(dim, dim, -1, device=precision_tril.device)
        diagonal = precision_tril.diagonal(dim1=-2, dim2=-1)
        return cls(torch.cat([diagonal, precision_tril[..., rows, columns]], -1))

    @classmethod
    def from_scale_tril(cls, scale_tril: Tensor) -> FullCovariance:
        r"""From lower-triangular L with :math:`\Sigma = L L^\top`, shape ``(*batch, K, D, D)``."""
        _require_square(scale_tril, "scale_tril")
        return cls.from_precision_tril(_tril_inverse(scale_tril))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> FullCovariance:
        """From the covariance matrix, shape ``(*batch, K, D, D)``; a ``ValueError`` if not positive definite."""
        return cls.from_scale_tril(_cholesky(matrix, "matrix"))

    @classmethod
    def from_precision(cls, precision: Tensor) -> FullCovariance:
        """From the inverse covariance, shape ``(*batch, K, D, D)``; a ``ValueError`` if not positive definite."""
        reverse_tril = _cholesky(precision.flip(-2, -1), "precision")
        return cls.from_precision_tril(reverse_tril.flip(-2, -1).mT)

    @property
    def dim(self) -> int:
        return (math.isqrt(8 * self.packed.shape[-1] + 1) - 1) // 2

    def precision_tril(self) -> Tensor:
        """Dense W, shape ``(*batch, K, D, D)``."""
        return kernels.unpack_tril(self.packed, self.dim)

    def scale_tril(self) -> Tensor:
        """Dense Cholesky factor L, shape ``(*batch, K, D, D)``."""
        return _tril_inverse(self.precision_tril())

    def whiten(self, residual: Tensor) -> Tensor:
        return kernels.tril_matvec(self.packed, residual)

    def colorize(self, noise: Tensor) -> Tensor:
        return kernels.tril_solve(self.packed, noise)

    def half_log_det(self) -> Tensor:
        return -kernels.sum_outputs(self.packed[..., : self.dim].log())

    def variance(self) -> Tensor:
        return self.scale_tril().square().sum(-1)

    def matrix(self) -> Tensor:
        scale_tril = self.scale_tril()
        return scale_tril @ scale_tril.mT

    def marginal(self, dims: Sequence[int]) -> FullCovariance:
        rest = [d for d in range(self.dim) if d not in dims]
        n = len(dims)
        return self.from_precision_tril(self._reordered([*dims, *rest])[..., :n, :n])

    def condition(self, residual: Tensor, given: Sequence[int], free: Sequence[int]) -> tuple[Tensor, Covariance]:
        n = len(given)
        rows = self._reordered([*given, *free])[..., n:, :]
        known, precision_tril = rows[..., :n], rows[..., n:]
        pull = -(known @ residual.unsqueeze(-1))
        shift = torch.linalg.solve_triangular(precision_tril, pull, upper=False).squeeze(-1)
        return shift, self.from_precision_tril(precision_tril)

    def affine(self, scale: Tensor) -> FullCovariance:
        scale = scale.expand(*scale.shape[:-1], self.dim)
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=self.packed.device)
        sign = scale.sign()
        diagonal = self.packed[..., : self.dim] / scale.abs()
        lower = self.packed[..., self.dim :] * sign[..., rows] / scale[..., columns]
        return FullCovariance(kernels.cat_channels(diagonal, lower))

    def validate(self) -> None:
        _require_positive(self.packed[..., : self.dim], "FullCovariance: diagonal of the factor")
        if not bool(self.packed.isfinite().all()):
            raise ValueError("FullCovariance: expected a finite factor, got NaN or Inf")

    def _reordered(self, order: Sequence[int]) -> Tensor:
        """Dense W of the outputs in another order, by a QL decomposition of the permuted factor.

        Its leading block whitens the marginal of the leading outputs; the rows below whiten the others given them.
        """
        flipped = self.precision_tril()[..., list(order)].flip(-2, -1)
        upper = torch.linalg.qr(flipped).R
        lower = upper.flip(-2, -1)
        return lower * lower.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)


def _tril_inverse(matrix: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(matrix, identity, upper=False)


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    _require_square(matrix, name)
    scale_tril, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise ValueError(f"{name}: expected positive-definite matrices, got {int((info != 0).sum())} that are not")
    return scale_tril


@dataclass(frozen=True, eq=False)
class LowRankCovariance(Covariance):
    r"""Low rank plus diagonal: :math:`\Sigma = F F^\top + \mathrm{diag}(\sigma^2)`.

    With :math:`B = \mathrm{diag}(\sigma)^{-1} F` and the Cholesky factor :math:`C C^\top = I + B^\top B`,

    .. math:: \mathrm{whiten}(r) = u - B (C^\top + I)^{-1} C^{-1} B^\top u, \qquad u = r / \sigma,

    in :math:`O(DR)`, without the cancellation of the Woodbury identity.

    Args:
        factor: F, shape ``(*batch, K, D, R)``.
        scale: Standard deviations :math:`\sigma` of the diagonal part, shape ``(*batch, K, D)``.

    References:
        Andrews (1968), A square root formulation of the Kalman covariance equations, *AIAA Journal* 6.

    >>> LowRankCovariance(torch.ones(1, 2, 1), torch.ones(1, 2)).matrix()
    tensor([[[2., 1.],
             [1., 2.]]])
    """

    factor: Tensor = _factor(2)
    scale: Tensor = _factor(1)

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def whiten(self, residual: Tensor) -> Tensor:
        standardized, capacitance = residual / self.scale, self._capacitance()
        projection = kernels.low_rank_project(self._ratio(), standardized)
        weights = _solve(capacitance, projection)
        weights = _solve(_plus_identity(capacitance).mT, weights, upper=True)
        return standardized - self._combine(weights)

    def colorize(self, noise: Tensor) -> Tensor:
        projection = kernels.low_rank_project(self._ratio(), noise)
        weights = _solve(_plus_identity(self._capacitance()), projection)
        return (noise + self._combine(weights)) * self.scale

    def half_log_det(self) -> Tensor:
        diagonal = self._capacitance().diagonal(dim1=-2, dim2=-1)
        return kernels.sum_outputs(self.scale.log()) + diagonal.log().sum(-1)

    def variance(self) -> Tensor:
        return self.factor.square().sum(-1) + self.scale.square()

    def matrix(self) -> Tensor:
        return self.factor @ self.factor.mT + self.scale.square().diag_embed()

    def marginal(self, dims: Sequence[int]) -> LowRankCovariance:
        return LowRankCovariance(self.factor[..., list(dims), :], self.scale[..., list(dims)])

    def condition(self, residual: Tensor, given: Sequence[int], free: Sequence[int]) -> tuple[Tensor, Covariance]:
        known, rest = self.marginal(given), self.marginal(free)
        capacitance = known._capacitance()
        pull = _solve(capacitance, kernels.low_rank_project(known._ratio(), residual / known.scale))
        factor = torch.linalg.solve_triangular(capacitance, rest.factor.mT, upper=False).mT
        return (factor @ pull.unsqueeze(-1)).squeeze(-1), LowRankCovariance(factor, rest.scale)

    def affine(self, scale: Tensor) -> LowRankCovariance:
        return LowRankCovariance(self.factor * scale.unsqueeze(-1), self.scale * scale.abs())

    def validate(self) -> None:
        _require_positive(self.scale, "LowRankCovariance.scale")
        if not bool(self.factor.isfinite().all()):
            raise ValueError("LowRankCovariance.factor: expected finite numbers, got NaN or Inf")

    def _ratio(self) -> Tensor:
        return self.factor / self.scale.unsqueeze(-1)

    def _capacitance(self) -> Tensor:
        return kernels.low_rank_capacitance(self._ratio())

    def _combine(self, weights: Tensor) -> Tensor:
        columns = self._ratio().unbind(-1)
        return torch.stack([c * w.unsqueeze(-1) for c, w in zip(columns, weights.unbind(-1), strict=True)]).sum(0)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _solve(triangle: Tensor, vector: Tensor, *, upper: bool = False) -> Tensor:
    return torch.linalg.solve_triangular(triangle, vector.unsqueeze(-1), upper=upper).squeeze(-1)
