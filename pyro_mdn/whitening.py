r"""Whitening by each structure of covariances, with gradients by hand.

The factors are those of a covariance operator, or raw channels of a network that are constrained on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_mdn.kernels import Whitening, tril_matvec, tril_rows

__all__ = ["DiagonalWhitening", "FullWhitening", "RawDiagonalWhitening", "RawFullWhitening", "positive"]


def positive(raw: Tensor, least: float) -> Tensor:
    """Softplus, and no less than ``least``."""
    return softplus(raw).add_(least)


class DiagonalWhitening(Whitening):
    r""":math:`z = r / \sigma`. Factor: :math:`\sigma`, ``(D, K, *batch)``, or ``(1, K, *batch)`` for all outputs alike."""

    def whiten(self, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        (scale,) = factors
        half_log_det, outputs_each = scale.log().sum(0), residual.shape[0] // scale.shape[0]
        return residual / scale, half_log_det if outputs_each == 1 else outputs_each * half_log_det, [scale]

    def pull_back(self, weight: Tensor, whitened: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        (scale,) = kept
        slope = (weight / scale).neg_()
        grad_residual = slope * whitened
        return grad_residual, torch.addcmul(slope, grad_residual, whitened, value=-1)


@dataclass(frozen=True)
class RawDiagonalWhitening(Whitening):
    """The same from raw channels, through :func:`positive`."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        whitened, half_log_det, kept = _DIAGONAL.whiten(residual, positive(raw, self.min_scale))
        return whitened, half_log_det, [*kept, raw]

    def pull_back(self, weight: Tensor, whitened: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        scale, raw = kept
        grad_residual, grad_scale = _DIAGONAL.pull_back(weight, whitened, scale)
        return grad_residual, grad_scale.mul_(raw.sigmoid())


class FullWhitening(Whitening):
    """:math:`z = W r`. Factors: diagonal of W, ``(D, K, *batch)``, and what is below it, ``(D(D-1)/2, K, *batch)``."""

    def whiten(self, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        diagonal, lower = factors
        return tril_matvec(diagonal, lower, residual), -diagonal.log().sum(0), [residual, diagonal, lower]

    def pull_back(self, weight: Tensor, whitened: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        _, diagonal, lower = kept
        grad_residual, packed = self.packed_pull_back(weight, whitened, *kept)
        return grad_residual, *packed.split_with_sizes([len(diagonal), len(lower)])

    def packed_pull_back(self, weight: Tensor, whitened: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        """Have the gradients of diagonal and what is below it in one tensor."""
        residual, diagonal, lower = kept
        dim, slope = len(residual), whitened * -weight
        grad_residual = slope * diagonal
        packed = slope.new_empty(len(diagonal) + len(lower), *slope.shape[1:])
        grad_diagonal, _, *grad_rows = packed.split_with_sizes([dim, *range(dim)])
        torch.mul(slope, residual, out=grad_diagonal).addcdiv_(weight, diagonal)
        for i, (row, grad_row) in enumerate(zip(tril_rows(lower, dim)[1:], grad_rows, strict=True), start=1):
            grad_residual[:i].addcmul_(row, slope[i])
            torch.mul(slope[i], residual[:i], out=grad_row)
        return grad_residual, packed


@dataclass(frozen=True)
class RawFullWhitening(Whitening):
    """The same from raw channels; the diagonal of W is the reciprocal of :func:`positive`."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        raw_diagonal, lower = raw.split_with_sizes([len(residual), len(raw) - len(residual)])
        diagonal = positive(raw_diagonal, self.min_scale).reciprocal_()
        whitened, half_log_det, kept = _FULL.whiten(residual, diagonal, lower)
        return whitened, half_log_det, [*kept, raw_diagonal]

    def pull_back(self, weight: Tensor, whitened: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        residual, diagonal, lower, raw_diagonal = kept
        grad_residual, packed = _FULL.packed_pull_back(weight, whitened, residual, diagonal, lower)
        packed[: len(diagonal)].mul_(raw_diagonal.sigmoid().mul_(diagonal).mul_(diagonal).neg_())
        return grad_residual, packed


_DIAGONAL, _FULL = DiagonalWhitening(), FullWhitening()
