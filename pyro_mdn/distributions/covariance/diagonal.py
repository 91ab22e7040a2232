r"""Covariances with independent outputs: diagonal and isotropic, each operator with its whitening."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, Whitening, require_positive
from pyro_mdn.tensors.channels import sum_outputs
from pyro_mdn.tensors.numerics import positive, sum_logs
from pyro_mdn.tensors.tensor_batch import stored

__all__ = ["DiagonalCovariance", "DiagonalWhitening", "IsotropicCovariance", "RawDiagonalWhitening"]


class DiagonalWhitening(Whitening):
    r"""Whitening :math:`z = r / \sigma` by one factor σ, ``(D, K, *batch)``, or ``(1, K, *batch)`` for all outputs."""

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (scale,) = factors
        half_log_det, outputs_each = sum_logs(scale), residual.shape[0] // scale.shape[0]
        whitened = torch.div(
            residual, scale, out=residual if scratch and scale.shape[1:] == residual.shape[1:] else None
        )
        return whitened, half_log_det if outputs_each == 1 else outputs_each * half_log_det, [scale]

    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        (scale,) = kept
        for_residual, for_scale = out or (None, None)
        inward = None if radial is weight else -radial / scale  # now, because ``out`` may overwrite the factor
        slope = torch.div(-weight, scale, out=for_scale)
        grad_residual = torch.mul(slope if inward is None else inward, whitened, out=for_residual)
        if slope.shape != grad_residual.shape:
            return grad_residual, torch.addcmul(slope, grad_residual, whitened, value=-1)
        return grad_residual, slope.addcmul_(grad_residual, whitened, value=-1)


@dataclass(frozen=True)
class RawDiagonalWhitening(Whitening):
    """Diagonal whitening from raw channels, which :func:`positive` maps to σ."""

    min_scale: float
    has_columns: ClassVar[bool] = True

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        whitened, half_log_det, kept = _DIAGONAL.whiten(residual, positive(raw, self.min_scale), scratch=scratch)
        return whitened, half_log_det, [*kept, raw]

    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        scale, raw = kept
        slope = raw.sigmoid()  # now, because ``out`` may overwrite the raw channels
        grad_residual, grad_scale = _DIAGONAL.pull_back(weight, radial, whitened, scale, out=out)
        return grad_residual, grad_scale.mul_(slope)

    def column(self, output: int, *kept: Tensor) -> Tensor:
        scale = kept[0]
        return scale[output if len(scale) > 1 else 0].reciprocal().unsqueeze(0)

    def pull_back_column(self, output: int, grad: Tensor, *kept: Tensor) -> tuple[list[int], list[Tensor]]:
        scale, raw = kept
        row = output if len(scale) > 1 else 0
        return [row], [-grad[0] * raw[row].sigmoid() / scale[row].square()]


_DIAGONAL = DiagonalWhitening()


@dataclass(frozen=True, eq=False)
class IsotropicCovariance(Covariance):
    r"""Isotropic covariance :math:`\Sigma = \sigma^2 I`.

    Args:
        scale: Standard deviation :math:`\sigma`, shape ``(*batch, K)``.
        outputs: Number of outputs D; a mixture fills it in.

    >>> IsotropicCovariance(torch.tensor([2.0]), outputs=2).matrix()
    tensor([[[4., 0.],
             [0., 4.]]])
    """

    scale: Tensor = stored(0)
    outputs: int | None = None
    whitening: ClassVar[Whitening | None] = _DIAGONAL

    @property
    def dim(self) -> int:
        if self.outputs is None:
            raise ValueError("IsotropicCovariance: expected outputs=D, got a scale alone")
        return self.outputs

    def factors(self) -> list[Tensor]:
        return [self.scale.unsqueeze(-1)]

    def of_dim(self, dim: int) -> Covariance:
        return IsotropicCovariance(self.scale, dim) if self.outputs is None else super().of_dim(dim)

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.scale.unsqueeze(-1)

    def colorize(self, noise: Tensor) -> Tensor:
        return noise * self.scale.unsqueeze(-1)

    def half_log_det(self) -> Tensor:
        return self.dim * self.scale.log()

    def variance(self) -> Tensor:
        return self.stddev().square()

    def stddev(self) -> Tensor:
        return self.scale.unsqueeze(-1).expand(*self.scale.shape, self.dim)

    def matrix(self) -> Tensor:
        return self.variance().diag_embed()

    def triangular(self) -> IsotropicCovariance:
        return self

    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.scale), self.scale

    def conditional_scale(self) -> Tensor:
        return self.stddev()

    def marginal(self, dims: Sequence[int]) -> IsotropicCovariance:
        return IsotropicCovariance(self.scale, len(dims))

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        return torch.zeros_like(residual[..., :1]), self.marginal(range(residual.shape[-1], self.dim))

    def affine(self, scale: Tensor) -> Covariance:
        if scale.shape[-1] == 1:
            return IsotropicCovariance(self.scale * scale.squeeze(-1).abs(), self.dim)
        return DiagonalCovariance(self.scale.unsqueeze(-1) * scale.abs())

    def validate(self) -> None:
        require_positive(self.scale, "IsotropicCovariance.scale")


@dataclass(frozen=True, eq=False)
class DiagonalCovariance(Covariance):
    r"""Diagonal covariance :math:`\Sigma = \mathrm{diag}(\sigma^2)`.

    Args:
        scale: Standard deviations :math:`\sigma`, shape ``(*batch, K, D)``.

    >>> DiagonalCovariance(torch.tensor([[1.0, 3.0]])).variance()
    tensor([[1., 9.]])
    """

    scale: Tensor = stored(1)
    whitening: ClassVar[Whitening | None] = _DIAGONAL

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.scale

    def colorize(self, noise: Tensor) -> Tensor:
        return noise * self.scale

    def half_log_det(self) -> Tensor:
        return sum_outputs(self.scale.log())

    def variance(self) -> Tensor:
        return self.scale.square()

    def stddev(self) -> Tensor:
        return self.scale

    def matrix(self) -> Tensor:
        return self.variance().diag_embed()

    def triangular(self) -> DiagonalCovariance:
        return self

    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        scale = self.scale[..., len(residuals)]
        return torch.zeros_like(scale), scale

    def conditional_scale(self) -> Tensor:
        return self.scale

    def marginal(self, dims: Sequence[int]) -> DiagonalCovariance:
        return DiagonalCovariance(self.scale[..., list(dims)])

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        return torch.zeros_like(residual[..., :1]), self.marginal(range(residual.shape[-1], self.dim))

    def affine(self, scale: Tensor) -> DiagonalCovariance:
        return DiagonalCovariance(self.scale * scale.abs())

    def validate(self) -> None:
        require_positive(self.scale, "DiagonalCovariance.scale")
