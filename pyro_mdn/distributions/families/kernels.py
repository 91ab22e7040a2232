r"""Kernels of elliptical families: a whitening, and a radial law, which is that of the length of whitened residuals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Whitening
from pyro_mdn.support.checks import is_traced
from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["EllipticalKernel", "NormalKernel", "RadialLaw"]


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
        if is_traced(log_weights, residual, *factors):
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


class RadialLaw(ABC):
    r"""Density of whitened residuals as a function of their squared length :math:`q`, with its derivatives.

    .. math:: \log p = g(q; D, \theta) - \tfrac12 \log\det\Sigma
    """

    @abstractmethod
    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        r"""Compute :math:`g` with its constants, for parameters :math:`\theta` that broadcast with ``square``."""

    @abstractmethod
    def derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        r"""Compute :math:`-2 \, \partial g / \partial q`, and the derivatives of g with respect to the parameters."""


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
        return self.radial.log_density(whitened.square().sum(0), len(residual), *parameters) - half_log_det

    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        shaping, parameters = self._apart(factors)
        dim, scratch = len(residual), not is_traced(log_weights, residual, *factors)
        whitened, half_log_det, kept = self.whitening.whiten(residual, *shaping, scratch=scratch)
        square = whitened.square().sum(0)
        joint = log_weights - half_log_det + self.radial.log_density(square, dim, *parameters)
        radial, *slopes = self.radial.derivatives(square, dim, *parameters)
        return joint, [radial, *slopes, whitened, *kept]

    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        radial, slopes, rest = kept[0], kept[1 : 1 + self.parameters], kept[1 + self.parameters :]
        gradients = self.whitening.pull_back(weight, weight * radial, *rest, out=out)
        return *gradients, *((weight * slope).unsqueeze(0) for slope in slopes)

    def _apart(self, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Split factors into those of the covariances, and the parameters of the radial law without their row axis."""
        first = len(factors) - self.parameters
        return factors[:first], [factor.squeeze(0) for factor in factors[first:]]
