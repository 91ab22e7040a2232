r"""Whitening by each structure of covariances, with gradients by hand.

The factors are those of a covariance operator, or raw channels of a network that are constrained on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_mdn.kernels import Whitening, gram_schmidt, sum_logs
from pyro_mdn.triangles import tril_add_transposed_, tril_matvec, tril_outer

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
    return softplus(raw).add_(least)


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
    r""":math:`z = u - B (C^\top + I)^{-1} C^{-1} B^\top u`, :math:`u = r / \sigma`, :math:`C C^\top = I + B^\top B`.

    Factors: σ, ``(D, K, *batch)``, and F row by row, ``(D·R, K, *batch)``; :math:`B = \mathrm{diag}(\sigma)^{-1} F`.

    References:
        Andrews (1968), A square root formulation of the Kalman covariance equations, *AIAA Journal* 6.
    """

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        scale, factor = factors
        columns = (factor.unflatten(0, (len(scale), -1)) / scale.unsqueeze(1)).transpose(0, 1)
        capacitance = gram_schmidt(columns)
        standardized = residual / scale
        weights = _solve(capacitance, [(column * standardized).sum(0) for column in columns])
        weights = _solve_transposed(capacitance, weights, shift=1.0)
        half_log_det = sum_logs(scale) + torch.stack([row[-1] for row in capacitance]).log().sum(0)
        kept = [scale, columns, *(entry for row in capacitance for entry in row)]
        return standardized - _combined(columns, weights), half_log_det, kept

    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        scale, columns, *entries = kept
        capacitance = [entries[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(len(columns))]
        weights = _solve(capacitance, [(column * whitened).sum(0) for column in columns], shift=1.0)
        pulled = whitened - _combined(columns, _solve_transposed(capacitance, weights))  # diag(σ) Σ⁻¹ r
        posterior = _solve_transposed(capacitance, _solve(capacitance, list(columns)))  # of B (I + BᵀB)⁻¹, by column
        slope = weight / scale
        leverage = torch.stack([c * p for c, p in zip(columns, posterior, strict=True)]).sum(0)
        grad_scale = slope * (pulled.square() - 1).add_(leverage)
        loadings = [(column * pulled).sum(0) for column in columns]
        grads = [slope * torch.addcmul(-p, pulled, n) for p, n in zip(posterior, loadings, strict=True)]
        return -pulled * slope, grad_scale, torch.stack(grads, 1).flatten(0, 1)


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
        grad_residual, grad_scale, grad_factor = _LOW_RANK.pull_back(weight, whitened, *rest)
        for_raw = None if out is None else out[1]
        return grad_residual, torch.cat([grad_scale.mul_(raw_scale.sigmoid()), grad_factor], out=for_raw)


def _solve(triangle: Sequence[Sequence[Tensor]], vector: Sequence[Tensor], shift: float = 0.0) -> list[Tensor]:
    """Solve a lower triangle, ``shift`` added to its diagonal."""
    solution: list[Tensor] = []
    for (*row, pivot), rest in zip(triangle, vector, strict=True):
        for coefficient, known in zip(row, solution, strict=True):
            rest = torch.addcmul(rest, coefficient, known, value=-1)
        solution.append(rest / (pivot + shift))
    return solution


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


def _combined(columns: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([c * w for c, w in zip(columns, weights, strict=True)]).sum(0)


_DIAGONAL, _FULL, _LOW_RANK = DiagonalWhitening(), FullWhitening(), LowRankWhitening()
