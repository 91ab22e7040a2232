r"""Kernels of elliptical families: a whitening, and a radial law, which is that of the length of whitened residuals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Whitening
from pyro_mdn.support.checks import is_recorded
from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["EllipticalKernel", "NormalKernel", "RadialLaw", "WrappedNormalKernel"]


@dataclass(frozen=True)
class NormalKernel(Kernel):
    r"""Normal kernel: :math:`\log p_k = -\tfrac12 \lVert z \rVert^2 - \tfrac12 \log\det\Sigma` up to a constant."""

    whitening: Whitening

    def constant(self, dim: int) -> float:
        return -0.5 * math.log(2 * math.pi) * dim

    def log_density(self, residual: Tensor, *factors: Tensor) -> Tensor:
        whitened, half_log_det, _ = self.whitening.whiten(residual, *factors)
        return -0.5 * whitened.square().sum(0) - half_log_det

    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        if is_recorded():
            whitened, half_log_det, kept = self.whitening.whiten(residual, *factors)
            return log_weights - 0.5 * whitened.square().sum(0) - half_log_det, [whitened, *kept]
        whitened, half_log_det, kept = self.whitening.whiten(residual, *factors, scratch=True)
        joint, outputs = log_weights - half_log_det, whitened.unbind()
        into = joint if joint.shape == outputs[0].shape and joint.dtype == outputs[0].dtype else None
        joint = torch.addcmul(joint, outputs[0], outputs[0], value=-0.5, out=into)
        for output in outputs[1:]:
            joint.addcmul_(output, output, value=-0.5)
        return joint, [whitened, *kept]

    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        return self.whitening.pull_back(weight, weight, *kept, out=out)

    def wrapped(self, output: int, period: Tensor) -> Kernel | None:
        return WrappedNormalKernel(self.whitening, output, period) if self.whitening.has_columns else None


@dataclass(frozen=True, eq=False)
class WrappedNormalKernel(NormalKernel):
    r"""Normal kernel of which one output is an angle: a sum over seven images of each residual.

    An image moves the whitened residual z by multiples of one vector v, the whitened turn. With z at its smallest,

    .. math:: \log \sum_{m=-3}^3 e^{-\frac12 \lVert z + m v \rVert^2}
              = -\tfrac12 \lVert z \rVert^2 + \log \sum_m t_m, \qquad
              t_{\pm 2} = t_{\pm 1}^2 q, \quad t_{\pm 3} = t_{\pm 1}^3 q^3, \qquad
              q = t_1 t_{-1} = e^{-\lVert v \rVert^2}

    so that two exponentials serve all images. Gradients are those of the mean image, and of the variance of m.

    Attributes:
        output: Index of the output that is an angle.
        period: Length of a turn in standardised units, which broadcasts with ``(*batch)``.
    """

    output: int
    period: Tensor

    def log_density(self, residual: Tensor, *factors: Tensor) -> Tensor:
        turns = (residual[self.output].detach() / self.period).round()
        residual = _plus(residual, self.output, (-turns * self.period).unsqueeze(0))
        whitened, half_log_det, kept = self.whitening.whiten(residual, *factors)
        turn = self._turn(*kept)
        square = _product(turn, turn).clamp(min=torch.finfo(turn.dtype).tiny)
        turns = (_product(self._rows(whitened, turn), turn) / square).detach().round()
        whitened = _plus(whitened, self.output, -turns * turn)
        joint = -0.5 * whitened.square().sum(0) - half_log_det
        sums, _, _ = _sums_over_images(-0.5 * square, _product(self._rows(whitened, turn), turn))
        return joint + torch.log1p(sums)

    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        period = self.period
        residual = _writable(residual, period, *factors)
        angle = residual[self.output]
        angle.sub_((angle / period).round_().mul_(period))
        whitened, half_log_det, kept = self.whitening.whiten(residual, *factors)
        turn = self._turn(*kept)
        rows = self._rows(whitened, turn)
        product, square = _product(rows, turn), _product(turn, turn)
        if len(whitened) > 1:  # an output that is correlated with the angle moves the nearest image
            turns = (product / square.clamp_(min=torch.finfo(square.dtype).tiny)).round_()
            rows.addcmul_(turns, turn, value=-1)
            angle.addcmul_(turns, period, value=-1)
            product.addcmul_(turns, square, value=-1)
        joint = log_weights - half_log_det
        for output in whitened.unbind():
            joint = torch.addcmul(joint, output, output, value=-0.5)
        others, first, second = _sums_over_images(square.mul_(-0.5), product)
        total = others + 1
        mean = first.div_(total)
        # From here on, residuals are those of the mean image.
        rows.addcmul_(mean, turn)
        angle.addcmul_(mean, period)
        variance = second.div_(total).addcmul_(mean, mean, value=-1)
        return joint.add_(others.log1p_()), [variance, turn, whitened, *kept]

    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        variance, turn, whitened, *rest = kept
        # Before gradients are written: ``out`` may overwrite the factors.
        slope = turn * (weight * variance * -self.period)
        rows, change = self.whitening.pull_back_column(self.output, slope, *rest)
        grad_residual, grad_factor = self.whitening.pull_back(weight, weight, whitened, *rest, out=out)
        for row, part in zip(rows, change, strict=True):
            grad_factor[row].add_(part)
        return grad_residual, grad_factor

    def wrapped(self, output: int, period: Tensor) -> Kernel | None:
        return None

    def _turn(self, *kept: Tensor) -> Tensor:
        return self.whitening.column(self.output, *kept) * self.period

    def _rows(self, whitened: Tensor, turn: Tensor) -> Tensor:
        """Rows of whitened residuals that a turn changes."""
        return whitened[self.output : self.output + len(turn)]


def _writable(residual: Tensor, period: Tensor, *factors: Tensor) -> Tensor:
    """Give residuals the whole batch, of which periods and factors may have more dimensions."""
    shape = torch.broadcast_shapes(residual.shape[1:], period.shape, *(factor.shape[1:] for factor in factors))
    return residual if shape == residual.shape[1:] else residual.expand(-1, *shape).clone()


def _plus(tensor: Tensor, row: int, change: Tensor) -> Tensor:
    """Add to some rows of a tensor, from one on, without changing it in place."""
    end = row + len(change)
    return torch.cat([tensor[:row].expand(-1, *change.shape[1:]), tensor[row:end] + change, tensor[end:]])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply the vectors along the first dimension."""
    total = left[0] * right[0]
    for one, other in zip(left[1:].unbind(), right[1:].unbind(), strict=True):
        total = torch.addcmul(total, one, other)
    return total


def _sums_over_images(half: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sum :math:`t_m`, :math:`m t_m` and :math:`m^2 t_m` over :math:`m \ne 0`, where no product underflows.

    Args:
        half: Minus half the squared length of v.
        product: Product of z and v, of half that length at most.
    """
    least = math.log(torch.finfo(half.dtype).eps) - 1
    exponents = torch.stack([half - product, half + product]).clamp(max=1.0)  # 0, but for rounding of huge residuals
    sides = torch.threshold(exponents, least, -math.inf).exp()
    both = sides[0] * sides[1]
    second = sides * both
    third = second * both
    sums = sides * (1 + second * (1 + third))
    moments = sides * (1 + second * (2 + 3 * third))
    squares = sides * (1 + second * (4 + 9 * third))
    return sums[0] + sums[1], moments[0] - moments[1], squares[0] + squares[1]


class RadialLaw(ABC):
    r"""Density of whitened residuals as a function of their squared length :math:`q`, with its derivatives.

    .. math:: \log p = g(q; D, \theta) - \tfrac12 \log\det\Sigma
    """

    @abstractmethod
    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        r"""Compute :math:`g` with its constants, for parameters :math:`\theta` that broadcast with ``square``."""

    @abstractmethod
    def with_derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        r"""Compute g, :math:`-2 \, \partial g / \partial q`, and the derivatives of g by the parameters."""


@dataclass(frozen=True)
class EllipticalKernel(Kernel):
    """Kernel of components with elliptical contours.

    The first factors are those of the covariances. The last ones are the parameters of the radial law, one row each.

    Attributes:
        whitening: Whitening by the covariances.
        radial: Radial law.
        parameters: Number of parameters of the radial law.
    """

    whitening: Whitening
    radial: RadialLaw
    parameters: int

    def constant(self, dim: int) -> float:
        return 0.0

    def log_density(self, residual: Tensor, *factors: Tensor) -> Tensor:
        shaping, parameters = self._apart(factors)
        whitened, half_log_det, _ = self.whitening.whiten(residual, *shaping)
        return self.radial.log_density(whitened.square().sum(0), residual.shape[0], *parameters) - half_log_det

    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        shaping, parameters = self._apart(factors)
        dim = residual.shape[0]
        whitened, half_log_det, kept = self.whitening.whiten(residual, *shaping, scratch=not is_recorded())
        square = _product(whitened, whitened)
        log_density, radial, *slopes = self.radial.with_derivatives(square, dim, *parameters)
        return log_weights - half_log_det + log_density, [radial, *slopes, whitened, *kept]

    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        radial, slopes, rest = kept[0], kept[1 : 1 + self.parameters], kept[1 + self.parameters :]
        gradients = self.whitening.pull_back(weight, weight * radial, *rest, out=out)
        return *gradients, *((weight * slope).unsqueeze(0) for slope in slopes)

    def _apart(self, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Split factors into those of the covariances, and the parameters of the radial law without their row axis."""
        first = len(factors) - self.parameters
        return factors[:first], [factor.squeeze(0) for factor in factors[first:]]
