r"""Covariance operators with correlated outputs: full, and low rank plus diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, DiagonalCovariance, require_positive, stored
from pyro_mdn.distributions.covariance.whitening import FullWhitening, LowRankWhitening
from pyro_mdn.support.checks import all_finite, is_known
from pyro_mdn.tensors import kernels, packed_triangles

__all__ = ["FullCovariance", "LowRankCovariance", "plus"]


@dataclass(frozen=True, eq=False)
class FullCovariance(Covariance):
    r"""Unrestricted :math:`\Sigma`, stored as its whitening factor :math:`W = L^{-1}`.

    .. math:: \Sigma = L L^\top, \qquad \Sigma^{-1} = W^\top W, \qquad \mathrm{whiten}(r) = W r.

    A density is then a product, not a triangular solve. :math:`1 / W_{dd}` is the conditional standard deviation
    of output d given the outputs before it.

    Args:
        diagonal: Diagonal of W, positive, shape ``(*batch, K, D)``.
        lower: What is below it, band by band, each shorter by one, shape ``(*batch, K, D(D-1)/2)``.

    >>> FullCovariance.from_matrix(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]]))
    FullCovariance(diagonal=tensor([[0.5000, 0.5000]]), lower=tensor([[-0.2500]]))
    """

    diagonal: Tensor = stored(1)
    lower: Tensor = stored(1)
    is_diagonal: ClassVar[bool] = False
    whitening: ClassVar[kernels.Whitening | None] = FullWhitening()

    def __post_init__(self) -> None:
        shape = self.diagonal.shape
        if not shape or self.lower.shape != (*shape[:-1], shape[-1] * (shape[-1] - 1) // 2):
            expected = "expected shapes (*batch, K, D) and (*batch, K, D(D-1)/2)"
            raise ValueError(f"diagonal, lower: {expected}, got {tuple(shape)} and {tuple(self.lower.shape)}")

    @classmethod
    def from_precision_tril(cls, precision_tril: Tensor) -> FullCovariance:
        r"""From lower-triangular W with :math:`\Sigma^{-1} = W^\top W`, shape ``(*batch, K, D, D)``."""
        _require_square(precision_tril, "precision_tril")
        return cls(*packed_triangles.pack_tril(precision_tril))

    @classmethod
    def from_scale_tril(cls, scale_tril: Tensor) -> FullCovariance:
        r"""From lower-triangular L with :math:`\Sigma = L L^\top`, shape ``(*batch, K, D, D)``."""
        _require_square(scale_tril, "scale_tril")
        return cls.from_precision_tril(_tril_inverse(scale_tril))

    @classmethod
    def from_root(cls, root: Tensor) -> FullCovariance:
        r"""From any root A with :math:`\Sigma = A A^\top`, shape ``(*batch, K, D, M)`` with M ≥ D, of full rank."""
        upper = _in_single(_triangle, root.mT)
        return cls.from_scale_tril(_positive_diagonal(upper).mT)

    @classmethod
    def from_precision_root(cls, root: Tensor) -> FullCovariance:
        r"""From any root A with :math:`\Sigma^{-1} = A^\top A`, shape ``(*batch, K, M, D)``, M ≥ D, of full rank."""
        upper = _in_single(_triangle, root.flip(-2, -1))
        return cls.from_precision_tril(_positive_diagonal(upper.flip(-2, -1)))

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
        return self.diagonal.shape[-1]

    def precision_tril(self) -> Tensor:
        """Dense W, shape ``(*batch, K, D, D)``."""
        return packed_triangles.unpack_tril(self.diagonal, self.lower)

    def scale_tril(self) -> Tensor:
        """Dense Cholesky factor L, shape ``(*batch, K, D, D)``."""
        return _tril_inverse(self.precision_tril())

    def whiten(self, residual: Tensor) -> Tensor:
        return kernels.with_channels(packed_triangles.tril_matvec, self.diagonal, self.lower, residual)

    def colorize(self, noise: Tensor) -> Tensor:
        return kernels.with_channels(packed_triangles.tril_solve, self.diagonal, self.lower, noise)

    def half_log_det(self) -> Tensor:
        return -kernels.sum_outputs(self.diagonal.log())

    def variance(self) -> Tensor:
        return self.scale_tril().square().sum(-1)

    def stddev(self) -> Tensor:
        return kernels.norm(self.scale_tril())

    def matrix(self) -> Tensor:
        scale_tril = self.scale_tril()
        return scale_tril @ scale_tril.mT

    def triangular(self) -> FullCovariance:
        return self

    def root(self) -> Tensor:
        return self.scale_tril()

    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        i = len(residuals)
        scale = self.diagonal[..., i].reciprocal()
        row = [self.lower[..., packed_triangles.tril_position(i, j, self.dim)] for j in range(i)]
        pull = sum((w * r for w, r in zip(row, residuals, strict=True)), torch.zeros_like(scale))
        return -scale * pull, scale

    def conditional_scale(self) -> Tensor:
        return self.diagonal.reciprocal()

    def marginal(self, dims: Sequence[int]) -> FullCovariance:
        # The leading block of W whitens the leading outputs; the rows below whiten the others given them.
        return self._reordered(dims)._block(0, len(dims))

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        rest = self._block(residual.shape[-1], self.dim)
        pull = kernels.with_channels(lambda w, r: packed_triangles.tril_below(w, self.dim, r), self.lower, residual)
        return -rest.colorize(pull), rest

    def affine(self, scale: Tensor) -> FullCovariance:
        scale = scale.expand(*scale.shape[:-1], self.dim)
        _, ratios = packed_triangles.pack_tril(scale.sign().unsqueeze(-1) / scale.unsqueeze(-2))
        return FullCovariance(self.diagonal / scale.abs(), self.lower * ratios)

    def validate(self) -> None:
        require_positive(self.diagonal, "FullCovariance.diagonal")
        if not all_finite(self.lower):
            raise ValueError("FullCovariance.lower: expected finite numbers, got NaN or Inf")

    def _block(self, start: int, stop: int) -> FullCovariance:
        """Rows and columns of W from ``start`` to ``stop``."""
        lower = kernels.with_channels(lambda w: packed_triangles.tril_block(w, self.dim, start, stop), self.lower)
        return FullCovariance(self.diagonal[..., start:stop], lower)

    def _reordered(self, first: Sequence[int]) -> FullCovariance:
        """Covariance of the outputs ``first`` and then the others."""
        order = [*first, *(d for d in range(self.dim) if d not in first)]
        if order == [*range(self.dim)]:
            return self
        return self.from_precision_root(self.precision_tril()[..., order])


_WHITENING = LowRankWhitening()


def _positive_diagonal(triangle: Tensor) -> Tensor:
    """Flip the signs of rows so that the diagonal is positive."""
    return triangle * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)


def plus(one: Covariance, other: Covariance) -> Covariance:
    """Covariance of the sum of two independent variables, from their roots: squares would lose half the digits."""
    if one.is_diagonal and other.is_diagonal:
        return DiagonalCovariance(torch.hypot(one.stddev(), other.stddev()))
    shape = torch.broadcast_shapes(one.batch_shape, other.batch_shape)
    return FullCovariance.from_root(torch.cat([c.expand(shape).root() for c in (one, other)], -1))


def _require_square(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name}: expected shape (*batch, K, D, D), got {tuple(matrix.shape)}")


def _tril_inverse(matrix: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return _solve_lower(matrix, identity)


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    _require_square(matrix, name)
    if not is_known(matrix):
        return _in_single(torch.linalg.cholesky, matrix)
    scale_tril, info = torch.linalg.cholesky_ex(matrix.to(_single_at_least(matrix)))
    if bool((info != 0).any()):
        raise ValueError(f"{name}: expected positive-definite matrices, got {int((info != 0).sum())} that are not")
    return scale_tril.to(matrix.dtype)


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

    factor: Tensor = stored(2)
    scale: Tensor = stored(1)
    is_diagonal: ClassVar[bool] = False
    whitening: ClassVar[kernels.Whitening | None] = _WHITENING

    def __post_init__(self) -> None:
        if self.factor.shape[:-1] != self.scale.shape:
            got = f"{tuple(self.factor.shape)} and {tuple(self.scale.shape)}"
            raise ValueError(f"factor, scale: expected shapes (*batch, K, D, R) and (*batch, K, D), got {got}")

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def factors(self) -> list[Tensor]:
        return [self.scale, self.factor.flatten(-2)]

    def whiten(self, residual: Tensor) -> Tensor:
        tensors = residual, *self.factors()
        return _in_single(lambda *t: kernels.with_channels(_WHITENING.outputs, *t), *tensors)

    def colorize(self, noise: Tensor) -> Tensor:
        projection = kernels.low_rank_project(self._ratio(), noise)
        weights = _solve(_plus_identity(self._capacitance()), projection)
        return (noise + self._combine(weights)) * self.scale

    def half_log_det(self) -> Tensor:
        diagonal = self._capacitance().diagonal(dim1=-2, dim2=-1)
        return kernels.sum_outputs(self.scale.log()) + diagonal.log().sum(-1)

    def variance(self) -> Tensor:
        return self.factor.square().sum(-1) + self.scale.square()

    def stddev(self) -> Tensor:
        return kernels.norm(torch.cat([self.factor, self.scale.unsqueeze(-1)], -1))

    def matrix(self) -> Tensor:
        return self.factor @ self.factor.mT + self.scale.square().diag_embed()

    def triangular(self) -> FullCovariance:
        return FullCovariance.from_root(self.root())

    def root(self) -> Tensor:
        return torch.cat([self.factor, self.scale.diag_embed()], -1)

    def precision_tril(self) -> Tensor:
        return self.triangular().precision_tril()

    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.triangular().next_output(residuals)

    def conditional_scale(self) -> Tensor:
        return self.triangular().conditional_scale()

    def marginal(self, dims: Sequence[int]) -> LowRankCovariance:
        return LowRankCovariance(self.factor[..., list(dims), :], self.scale[..., list(dims)])

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        n = residual.shape[-1]
        known, rest = self.marginal(range(n)), self.marginal(range(n, self.dim))
        capacitance = known._capacitance()
        pull = _solve(capacitance, kernels.low_rank_project(known._ratio(), residual / known.scale))
        factor = _solve_lower(capacitance, rest.factor.mT).mT
        return (factor @ pull.unsqueeze(-1)).squeeze(-1), LowRankCovariance(factor, rest.scale)

    def affine(self, scale: Tensor) -> LowRankCovariance:
        return LowRankCovariance(self.factor * scale.unsqueeze(-1), self.scale * scale.abs())

    def validate(self) -> None:
        require_positive(self.scale, "LowRankCovariance.scale")
        if not all_finite(self.factor):
            raise ValueError("LowRankCovariance.factor: expected finite numbers, got NaN or Inf")

    def _ratio(self) -> Tensor:
        return self.factor / self.scale.unsqueeze(-1)

    def _capacitance(self) -> Tensor:
        return _in_single(kernels.low_rank_capacitance, self._ratio())

    def _combine(self, weights: Tensor) -> Tensor:
        columns = self._ratio().unbind(-1)
        return torch.stack([c * w.unsqueeze(-1) for c, w in zip(columns, weights.unbind(-1), strict=True)]).sum(0)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _solve(triangle: Tensor, vector: Tensor) -> Tensor:
    return _solve_lower(triangle, vector.unsqueeze(-1)).squeeze(-1)


# LAPACK knows no half precision, and takes tensors of one dtype alone.


def _single_at_least(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _in_single(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call with tensors of single precision at least; the result is of the dtype to which they promote."""
    wide, dtype = _single_at_least(*tensors), tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return function(*(tensor.to(wide) for tensor in tensors)).to(dtype)


def _triangle(root: Tensor) -> Tensor:
    return torch.linalg.qr(root).R


def _solve_lower(triangle: Tensor, right: Tensor) -> Tensor:
    return _in_single(lambda t, r: torch.linalg.solve_triangular(t, r, upper=False), triangle, right)
