r"""Whitening by each structure of covariances, with gradients by hand.

The factors are those of a covariance operator, or raw channels of a network that are constrained on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_mdn.support.checks import is_traced
from pyro_mdn.tensors.kernels import Whitening, constant, gram_schmidt, sum_logs
from pyro_mdn.tensors.packed_triangles import tril_add_transposed_, tril_matvec, tril_outer

__all__ = [
    "DiagonalWhitening",
    "FullWhitening",
    "LowRankWhitening",
    "RawDiagonalWhitening",
    "RawFullWhitening",
    "RawLowRankWhitening",
    "positive",
]


def positive(raw: Tensor, least: float) -> Tensor:
    """Softplus, and no less than ``least``."""
    scale = softplus(raw)
    if is_traced(raw):
        return scale + least  # what is differentiated from a trace must not change
    return scale.add_(constant(least, scale.dtype))


class DiagonalWhitening(Whitening):
    r""":math:`z = r / \sigma`. Factor: σ, ``(D, K, *batch)``, or ``(1, K, *batch)`` for all outputs alike."""

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (scale,) = factors
        half_log_det, outputs_each = sum_logs(scale), residual.shape[0] // scale.shape[0]
        whitened = torch.div(
            residual, scale, out=residual if scratch and scale.shape[1:] == residual.shape[1:] else None
        )
        return whitened, half_log_det if outputs_each == 1 else outputs_each * half_log_det, [scale]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        (scale,) = kept
        for_residual, for_scale = out or (None, None)
        slope = torch.div(-weight, scale, out=for_scale)
        grad_residual = torch.mul(slope, whitened, out=for_residual)
        if slope.shape != grad_residual.shape:
            return grad_residual, torch.addcmul(slope, grad_residual, whitened, value=-1)
        return grad_residual, slope.addcmul_(grad_residual, whitened, value=-1)


@dataclass(frozen=True)
class RawDiagonalWhitening(Whitening):
    """The same from raw channels, through :func:`positive`."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        whitened, half_log_det, kept = _DIAGONAL.whiten(residual, positive(raw, self.min_scale), scratch=scratch)
        return whitened, half_log_det, [*kept, raw]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        scale, raw = kept
        slope = raw.sigmoid()  # before the gradient takes the place of the channels
        grad_residual, grad_scale = _DIAGONAL.pull_back(weight, whitened, scale, out=out)
        return grad_residual, grad_scale.mul_(slope)


class FullWhitening(Whitening):
    """:math:`z = W r`. Factors: diagonal of W, ``(D, K, *batch)``, and what is below it, ``(D(D-1)/2, K, *batch)``."""

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        diagonal, lower = factors
        return tril_matvec(diagonal, lower, residual), -sum_logs(diagonal), [residual, diagonal, lower]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        _, diagonal, lower = kept
        grad_residual, packed = self.packed_pull_back(weight, whitened, *kept)
        return grad_residual, *packed.split_with_sizes([len(diagonal), len(lower)])

    def packed_pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Have the gradients of diagonal and what is below it in one tensor."""
        residual, diagonal, lower = kept
        for_residual, packed = out or (None, None)
        slope = whitened * -weight
        grad_residual = torch.mul(slope, diagonal, out=for_residual)
        if packed is None:
            packed = slope.new_empty(len(diagonal) + len(lower), *slope.shape[1:])
        grad_diagonal, grad_lower = packed.split_with_sizes([len(diagonal), len(lower)])
        tril_add_transposed_(grad_residual, lower, slope)  # before the gradient takes the place of the channels
        torch.mul(slope, residual, out=grad_diagonal).addcdiv_(weight, diagonal)
        tril_outer(slope, residual, out=grad_lower)
        return grad_residual, packed


@dataclass(frozen=True)
class RawFullWhitening(Whitening):
    """The same from raw channels; the diagonal of W is the reciprocal of :func:`positive`."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        raw_diagonal, lower = raw.split_with_sizes([len(residual), len(raw) - len(residual)])
        diagonal = positive(raw_diagonal, self.min_scale).reciprocal_()
        whitened, half_log_det, kept = _FULL.whiten(residual, diagonal, lower)
        return whitened, half_log_det, [*kept, raw_diagonal]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        residual, diagonal, lower, raw_diagonal = kept
        # Before the gradient takes the place of the channels.
        slope = raw_diagonal.sigmoid().mul_(diagonal).mul_(diagonal).neg_()
        grad_residual, packed = _FULL.packed_pull_back(weight, whitened, residual, diagonal, lower, out=out)
        packed[: len(diagonal)].mul_(slope)
        return grad_residual, packed


class LowRankWhitening(Whitening):
    r""":math:`z = (u - Q Q^\top u, -C^{-\top} Q^\top u)`, :math:`u = r / \sigma`, :math:`Q = B C^{-\top}`.

    Factors: σ, ``(D, K, *batch)``, and F row by row, ``(D·R, K, *batch)``; :math:`B = \mathrm{diag}(\sigma)^{-1} F` and
    :math:`C C^\top = I + B^\top B`. The columns of Q on :math:`C^{-\top}` are those of B on I made orthonormal, and z
    is what of u on 0 is orthogonal to them: one more step of Gram and Schmidt, in which nothing cancels.

    References:
        Björck (1967), Solving linear least squares problems by Gram-Schmidt orthogonalization, *BIT* 7.
    """

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        scale, factor = factors
        directions, capacitance = _orthonormal(scale, factor)
        whitened, _ = _remainder(residual / scale, directions)
        half_log_det = sum_logs(scale) + torch.stack([row[-1] for row in capacitance]).log().sum(0)
        return whitened, half_log_det, [scale, *directions, *(entry for row in capacitance for entry in row)]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        grad_residual, packed = self.packed_pull_back(weight, whitened, *kept)
        return grad_residual, *packed.split_with_sizes([len(grad_residual), len(packed) - len(grad_residual)])

    def packed_pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Have the gradients of σ and F in one tensor."""
        scale, *rest = kept
        for_residual, packed = out or (None, None)
        dim, rank = len(scale), len(whitened) - len(scale)
        columns, entries = [direction[:dim] for direction in rest[:rank]], rest[rank:]
        capacitance = [entries[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(rank)]
        pulled, *loadings = whitened.split_with_sizes([dim, *[1] * rank])  # diag(σ) Σ⁻¹ r, and minus those on F
        slope = -weight / scale
        grad_residual = torch.mul(slope, pulled, out=for_residual)
        if packed is None:
            packed = slope.new_empty(dim * (1 + rank), *slope.shape[1:])
        squares = pulled.square()
        for column in columns:
            squares.addcmul_(column, column)
        torch.addcmul(slope, slope, squares, value=-1, out=packed[:dim])
        grad_factor = packed[dim:].view(dim, rank, *packed.shape[1:])
        posterior = _solve_transposed(capacitance, columns)  # diag(σ) Σ⁻¹ F, by column
        for i, (column, loading) in enumerate(zip(posterior, loadings, strict=True)):
            torch.mul(torch.addcmul(column, pulled, loading), slope, out=grad_factor[:, i])
        return grad_residual, packed

    def outputs(self, residual: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        r"""As many whitened numbers as there are outputs, :math:`u - B (C^\top + I)^{-1} Q^\top u`."""
        directions, capacitance = _orthonormal(scale, factor)
        whitened, coefficients = _remainder(residual / scale, directions)
        whitened = whitened[: len(scale)]
        weights = _solve_transposed(capacitance, coefficients, shift=1.0)
        for direction, weight in zip(directions, weights, strict=True):
            whitened = torch.addcmul(whitened, direction[: len(scale)], weight)
        return whitened


@dataclass(frozen=True)
class RawLowRankWhitening(Whitening):
    """The same from raw channels, those of σ through :func:`positive`."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        raw_scale, factor = raw.split_with_sizes([len(residual), len(raw) - len(residual)])
        whitened, half_log_det, kept = _LOW_RANK.whiten(residual, positive(raw_scale, self.min_scale), factor)
        return whitened, half_log_det, [raw_scale, *kept]

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        raw_scale, *rest = kept
        slope = raw_scale.sigmoid()  # before the gradient takes the place of the channels
        grad_residual, packed = _LOW_RANK.packed_pull_back(weight, whitened, *rest, out=out)
        packed[: len(slope)].mul_(slope)
        return grad_residual, packed


def _orthonormal(scale: Tensor, factor: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Orthonormal columns ``(D + R, K, *batch)`` of B on I, and the rows of C."""
    columns = factor.unflatten(0, (len(scale), -1)) / scale.unsqueeze(1)
    return gram_schmidt(columns.transpose(0, 1))


def _remainder(vector: Tensor, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What of a vector on 0 is orthogonal to directions, and its coefficients along them, one after the other."""
    # Not ``pad``, which torch 2.8 refuses for a batch without rows.
    remainder = torch.cat([vector, vector.new_zeros((len(directions), *vector.shape[1:]))])
    coefficients = []
    for direction in directions:
        coefficients.append((direction * remainder).sum(0))
        remainder = torch.addcmul(remainder, direction, coefficients[-1], value=-1)
    return remainder, coefficients


def _solve_transposed(
    triangle: Sequence[Sequence[Tensor]], vector: Sequence[Tensor], shift: float = 0.0
) -> list[Tensor]:
    """Solve the transpose of a lower triangle, ``shift`` added to its diagonal."""
    solution = list(vector)
    for i in reversed(range(len(solution))):
        for j in range(i + 1, len(solution)):
            solution[i] = torch.addcmul(solution[i], triangle[j][i], solution[j], value=-1)
        solution[i] = solution[i] / (triangle[i][i] + shift)
    return solution


_DIAGONAL, _FULL, _LOW_RANK = DiagonalWhitening(), FullWhitening(), LowRankWhitening()
