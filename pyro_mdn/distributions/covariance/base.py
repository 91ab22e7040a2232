r"""Covariance operators: positive-definite matrices known by one factor.

Each operator stores its factor and derives the rest on demand. Shapes are ``(*batch, K)`` for the batch of
matrices, ``K`` being the component axis; a component axis of 1 is one matrix *tied* across components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyro_mdn.support.checks import bounds
from pyro_mdn.tensors.tensor_batch import TensorBatch

__all__ = ["Covariance", "Whitening", "require_positive"]


class Whitening(ABC):
    """How covariances of one structure whiten residuals, and what that makes of gradients; on channel-first tensors.

    Factors are those of a covariance operator, or raw channels of a network that are constrained on the way.
    """

    @abstractmethod
    def whiten(
        self, residual: Tensor, *factors: Tensor, scratch: bool = False
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        r"""Whiten residuals.

        Args:
            residual: Residuals r, ``(D, K, *batch)``.
            factors: Factors of the covariances, ``(C, K, *batch)`` each.
            scratch: Whether the residual may be overwritten: touching new memory costs more than arithmetic.

        Returns:
            Numbers z, ``(D, K, *batch)`` or more, whose squares sum to :math:`r^\top \Sigma^{-1} r`;
            :math:`\tfrac12 \log\det\Sigma`, ``(K, *batch)``; and what :meth:`pull_back` takes. Without ``scratch`` all
            of it is differentiable.
        """

    @abstractmethod
    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        r"""Gradients of :math:`-\sum_k (a_k \tfrac12 \log\det\Sigma_k + b_k \tfrac12 r_k^\top \Sigma_k^{-1} r_k)`.

        Args:
            weight: The :math:`a_k`, ``(K, *batch)``.
            radial: The :math:`b_k`; for normal components the same tensor.
            whitened: What :meth:`whiten` gave.
            kept: What else it gave.
            out: Where to put the gradients, if there is one factor and nothing was broadcast; that for the factor
                may take its place.

        Returns:
            Those with respect to the residual and each factor; what was broadcast is not summed yet.
        """


@dataclass(frozen=True, eq=False)
class Covariance(TensorBatch):
    r"""A batch of covariance matrices :math:`\Sigma` over :math:`\mathbb{R}^D`, known by a factor.

    Whatever is elliptical is built from :meth:`whiten` and :meth:`half_log_det`, which come from the same factor:

    .. math:: r^\top \Sigma^{-1} r = \lVert \mathrm{whiten}(r) \rVert^2, \qquad
              \mathrm{half\_log\_det} = \tfrac12 \log\det\Sigma.

    Attributes:
        is_diagonal: Whether outputs are uncorrelated.
        whitening: The same on raw tensors, with derivatives by hand; ``None`` leaves them to autograd.
    """

    is_diagonal: ClassVar[bool] = True
    whitening: ClassVar[Whitening | None] = None

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
    def triangular(self) -> Covariance:
        """Return the same covariance as an operator whose whitening is lower triangular (this one, if it is)."""

    @abstractmethod
    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Shift of the mean and standard deviation, ``(*batch, K)``, of the output that follows known residuals.

        For a triangular operator; the residuals, ``(*batch, K)`` each, are those of the first outputs in order.
        """

    @abstractmethod
    def conditional_scale(self) -> Tensor:
        """Standard deviation of each output given those before it, ``(*batch, K, D)``; for a triangular operator."""

    @abstractmethod
    def marginal(self, dims: Sequence[int]) -> Covariance:
        """Covariance of the outputs ``dims``, in that order."""

    @abstractmethod
    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        """Shift of the mean and covariance of the last outputs, given the residuals ``(*batch, K, n)`` of the first."""

    @abstractmethod
    def affine(self, scale: Tensor) -> Covariance:
        """Covariance after multiplying the outputs by ``scale``, shape ``(*batch, K, D)`` (broadcast)."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ``ValueError`` unless every matrix is finite and positive definite."""

    def stddev(self) -> Tensor:
        """Standard deviation of each output, ``(*batch, K, D)``, if it can be also where squares over- or underflow."""
        return self.variance().sqrt()

    def precision_tril(self) -> Tensor:
        r"""Dense lower-triangular W with :math:`\Sigma^{-1} = W^\top W`, shape ``(*batch, K, D, D)``."""
        return self.conditional_scale().reciprocal().diag_embed()

    def root(self) -> Tensor:
        r"""Dense A with :math:`\Sigma = A A^\top`, shape ``(*batch, K, D, M)``, M ≥ D."""
        return self.stddev().diag_embed()

    def of_dim(self, dim: int) -> Covariance:
        """Return this operator for ``dim`` outputs; a ``ValueError`` if it is for another number."""
        if self.dim != dim:
            raise ValueError(f"covariance: expected one over {dim} outputs, got {self.dim}")
        return self

    def factors(self) -> list[Tensor]:
        """Return the tensors that ``whitening`` takes, ``(*batch, K, C)`` each."""
        return self.tensors()


def require_positive(scale: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless all of ``scale`` is positive and finite."""
    low, high = bounds(scale)
    if not bool((low > 0) & high.isfinite()):
        raise ValueError(f"{name}: expected positive finite numbers, got {low.item():.3g} to {high.item():.3g}")
