r"""Unrestricted covariances: the operator, and its whitening."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, Whitening, require_positive
from pyro_mdn.distributions.covariance.diagonal import DiagonalCovariance
from pyro_mdn.support.checks import all_finite, is_known
from pyro_mdn.tensors import packed_triangles
from pyro_mdn.tensors.channels import sum_outputs, with_channels
from pyro_mdn.tensors.numerics import norm, positive, single_at_least, sum_logs
from pyro_mdn.tensors.tensor_batch import stored

__all__ = ["FullCovariance", "FullWhitening", "RawFullWhitening", "in_single", "plus", "solve_lower"]


class FullWhitening(Whitening):
    """Whitening :math:`z = W r` by a lower triangle W.

    Factors are the diagonal of W, ``(D, K, *batch)``, and the packed entries below it, ``(D(D-1)/2, K, *batch)``.
    """

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        diagonal, lower = factors
        return packed_triangles.tril_matvec(diagonal, lower, residual), -sum_logs(diagonal), [residual, diagonal, lower]

    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        _, diagonal, lower = kept
        grad_residual, packed = self.packed_pull_back(weight, radial, whitened, *kept)
        return grad_residual, *packed.split_with_sizes([diagonal.shape[0], lower.shape[0]])

    def packed_pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of :meth:`pull_back`, those of both factors in one tensor."""
        residual, diagonal, lower = kept
        for_residual, packed = out or (None, None)
        slope = whitened * -radial
        grad_residual = torch.mul(slope, diagonal, out=for_residual)
        if packed is None:
            packed = slope.new_empty(diagonal.shape[0] + lower.shape[0], *slope.shape[1:])
        grad_diagonal, grad_lower = packed.split_with_sizes([diagonal.shape[0], lower.shape[0]])
        # Before gradients are written: ``lower`` may be a view of raw channels, which ``out`` may overwrite.
        packed_triangles.tril_add_transposed_(grad_residual, lower, slope)
        torch.mul(slope, residual, out=grad_diagonal).addcdiv_(weight, diagonal)
        packed_triangles.tril_outer(slope, residual, out=grad_lower)
        return grad_residual, packed


@dataclass(frozen=True)
class RawFullWhitening(Whitening):
    """Full whitening from raw channels; the diagonal of W is the reciprocal of :func:`positive` of the first D."""

    min_scale: float
    has_columns: ClassVar[bool] = True

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        raw_diagonal, lower = raw.split_with_sizes([residual.shape[0], raw.shape[0] - residual.shape[0]])
        diagonal = positive(raw_diagonal, self.min_scale).reciprocal_()
        whitened, half_log_det, kept = _FULL.whiten(residual, diagonal, lower)
        return whitened, half_log_det, [*kept, raw_diagonal]

    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        residual, diagonal, lower, raw_diagonal = kept
        # Before gradients are written, because ``out`` may overwrite the raw channels.
        slope = raw_diagonal.sigmoid().mul_(diagonal).mul_(diagonal).neg_()
        grad_residual, packed = _FULL.packed_pull_back(weight, radial, whitened, residual, diagonal, lower, out=out)
        packed[: diagonal.shape[0]].mul_(slope)
        return grad_residual, packed

    def column(self, output: int, *kept: Tensor) -> Tensor:
        _, diagonal, lower, _ = kept
        below = [lower[row : row + 1] for row in _below(output, len(diagonal))]
        return torch.cat([diagonal[output : output + 1], *below])

    def pull_back_column(self, output: int, grad: Tensor, *kept: Tensor) -> tuple[list[int], list[Tensor]]:
        _, diagonal, _, raw_diagonal = kept
        first = -grad[0] * raw_diagonal[output].sigmoid() * diagonal[output].square()
        return [output, *(len(diagonal) + row for row in _below(output, len(diagonal)))], [first, *grad[1:]]


def _below(output: int, dim: int) -> list[int]:
    """Positions of the packed entries of a column below the diagonal, from the top."""
    return [packed_triangles.tril_position(row, output, dim) for row in range(output + 1, dim)]


_FULL = FullWhitening()


@dataclass(frozen=True, eq=False)
class FullCovariance(Covariance):
    r"""Unrestricted covariance :math:`\Sigma`, stored as its whitening factor :math:`W = L^{-1}`.

    .. math:: \Sigma = L L^\top, \qquad \Sigma^{-1} = W^\top W, \qquad \mathrm{whiten}(r) = W r.

    A density then takes a product with W, not a triangular solve. :math:`1 / W_{dd}` is the conditional standard
    deviation of output d given the outputs before it.

    Args:
        diagonal: Diagonal of W, positive, shape ``(*batch, K, D)``.
        lower: Entries of W below the diagonal, band by band, each band shorter by one than the one before, shape
            ``(*batch, K, D(D-1)/2)``.

    >>> FullCovariance.from_matrix(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]]))
    FullCovariance(diagonal=tensor([[0.5000, 0.5000]]), lower=tensor([[-0.2500]]))
    """

    diagonal: Tensor = stored(1)
    lower: Tensor = stored(1)
    is_diagonal: ClassVar[bool] = False
    whitening: ClassVar[Whitening | None] = _FULL

    def __post_init__(self) -> None:
        shape = self.diagonal.shape
        if not shape or self.lower.shape != (*shape[:-1], shape[-1] * (shape[-1] - 1) // 2):
            expected = "expected shapes (*batch, K, D) and (*batch, K, D(D-1)/2)"
            raise ValueError(f"diagonal, lower: {expected}, got {tuple(shape)} and {tuple(self.lower.shape)}")

    @classmethod
    def from_precision_tril(cls, precision_tril: Tensor) -> FullCovariance:
        r"""Build from a lower-triangular W with :math:`\Sigma^{-1} = W^\top W`, shape ``(*batch, K, D, D)``."""
        _require_square(precision_tril, "precision_tril")
        return cls(*packed_triangles.pack_tril(precision_tril))

    @classmethod
    def from_scale_tril(cls, scale_tril: Tensor) -> FullCovariance:
        r"""Build from a lower-triangular L with :math:`\Sigma = L L^\top`, shape ``(*batch, K, D, D)``."""
        _require_square(scale_tril, "scale_tril")
        return cls.from_precision_tril(_tril_inverse(scale_tril))

    @classmethod
    def from_root(cls, root: Tensor) -> FullCovariance:
        r"""Build from any root A with :math:`\Sigma = A A^\top`, shape ``(*batch, K, D, M)``, M ≥ D, of full rank."""
        upper = in_single(_triangle, root.mT)
        return cls.from_scale_tril(_positive_diagonal(upper).mT)

    @classmethod
    def from_precision_root(cls, root: Tensor) -> FullCovariance:
        r"""Build from any A with :math:`\Sigma^{-1} = A^\top A`, shape ``(*batch, K, M, D)``, M ≥ D, of full rank."""
        upper = in_single(_triangle, root.flip(-2, -1))
        return cls.from_precision_tril(_positive_diagonal(upper.flip(-2, -1)))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> FullCovariance:
        """Build from the covariance matrix, shape ``(*batch, K, D, D)``.

        Raises:
            ValueError: If a matrix is not positive definite.
        """
        return cls.from_scale_tril(_cholesky(matrix, "matrix"))

    @classmethod
    def from_precision(cls, precision: Tensor) -> FullCovariance:
        """Build from the inverse of the covariance matrix, shape ``(*batch, K, D, D)``.

        Raises:
            ValueError: If a matrix is not positive definite.
        """
        reverse_tril = _cholesky(precision.flip(-2, -1), "precision")
        return cls.from_precision_tril(reverse_tril.flip(-2, -1).mT)

    @property
    def dim(self) -> int:
        return self.diagonal.shape[-1]

    def precision_tril(self) -> Tensor:
        """Return the dense W, shape ``(*batch, K, D, D)``."""
        return packed_triangles.unpack_tril(self.diagonal, self.lower)

    def scale_tril(self) -> Tensor:
        """Compute the dense Cholesky factor L, shape ``(*batch, K, D, D)``."""
        return _tril_inverse(self.precision_tril())

    def whiten(self, residual: Tensor) -> Tensor:
        return with_channels(packed_triangles.tril_matvec, self.diagonal, self.lower, residual)

    def colorize(self, noise: Tensor) -> Tensor:
        return with_channels(packed_triangles.tril_solve, self.diagonal, self.lower, noise)

    def half_log_det(self) -> Tensor:
        return -sum_outputs(self.diagonal.log())

    def variance(self) -> Tensor:
        return self.scale_tril().square().sum(-1)

    def stddev(self) -> Tensor:
        return norm(self.scale_tril())

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
        # The leading block of W whitens the leading outputs; the rows below it whiten the other outputs given these.
        return self._reordered(dims)._block(0, len(dims))

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        rest = self._block(residual.shape[-1], self.dim)
        pull = with_channels(lambda w, r: packed_triangles.tril_below(w, self.dim, r), self.lower, residual)
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
        """Return the covariance of which W is the block of rows and columns from ``start`` to ``stop``."""
        lower = with_channels(lambda w: packed_triangles.tril_block(w, self.dim, start, stop), self.lower)
        return FullCovariance(self.diagonal[..., start:stop], lower)

    def _reordered(self, first: Sequence[int]) -> FullCovariance:
        """Return the covariance of the outputs in another order: ``first``, and then the others."""
        order = [*first, *(d for d in range(self.dim) if d not in first)]
        if order == [*range(self.dim)]:
            return self
        return self.from_precision_root(self.precision_tril()[..., order])


def plus(one: Covariance, other: Covariance) -> Covariance:
    """Compute the covariance of the sum of two independent variables by roots; squares would lose half the digits."""
    if one.is_diagonal and other.is_diagonal:
        return DiagonalCovariance(torch.hypot(one.stddev(), other.stddev()))
    shape = torch.broadcast_shapes(one.batch_shape, other.batch_shape)
    return FullCovariance.from_root(torch.cat([c.expand(shape).root() for c in (one, other)], -1))


def _positive_diagonal(triangle: Tensor) -> Tensor:
    """Flip the signs of rows so that the diagonal is positive."""
    return triangle * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)


def _require_square(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name}: expected shape (*batch, K, D, D), got {tuple(matrix.shape)}")


def _tril_inverse(matrix: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return solve_lower(matrix, identity)


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    _require_square(matrix, name)
    if not is_known(matrix):
        return in_single(torch.linalg.cholesky, matrix)
    scale_tril, info = torch.linalg.cholesky_ex(matrix.to(single_at_least(matrix.dtype)))
    if bool((info != 0).any()):
        raise ValueError(f"{name}: expected positive-definite matrices, got {int((info != 0).sum())} that are not")
    return scale_tril.to(matrix.dtype)


def _triangle(root: Tensor) -> Tensor:
    return torch.linalg.qr(root).R


# LAPACK has no half precision, and takes only tensors of equal dtype.


def in_single(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function with tensors of at least single precision; the result has the dtype to which they promote."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    wide = single_at_least(dtype)
    return function(*(tensor.to(wide) for tensor in tensors)).to(dtype)


def solve_lower(triangle: Tensor, right: Tensor) -> Tensor:
    """Solve a lower-triangular system in at least single precision."""
    return in_single(lambda t, r: torch.linalg.solve_triangular(t, r, upper=False), triangle, right)
