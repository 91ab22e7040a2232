r"""Covariance operators: positive-definite matrices, each given by one factor.

Each operator stores its factor and derives the rest on demand. A batch of matrices has the shape ``(*batch, K)``, with
the component axis last. A component axis of 1 means one matrix *tied* across components.
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
    """Whitening of residuals by covariances of one structure, with gradients by hand, on channel-first tensors.

    Factors are those of a covariance operator, or raw channels of a network, which the whitening constrains.
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
            Whitened residuals z, ``(D, K, *batch)`` or with more rows than D, whose squares sum to
            :math:`r^\top \Sigma^{-1} r`; :math:`\tfrac12 \log\det\Sigma`, ``(K, *batch)``; and the tensors that
            :meth:`pull_back` takes. Without ``scratch`` the results are differentiable.
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
        r"""Compute the gradients of half the log-determinants and squared lengths, weighted and summed.

        They are those of :math:`-\sum_k (a_k \tfrac12 \log\det\Sigma_k + b_k \tfrac12 r_k^\top \Sigma_k^{-1} r_k)`.

        Args:
            weight: The coefficients :math:`a_k`, ``(K, *batch)``.
            radial: The coefficients :math:`b_k`; for normal components the same tensor as ``weight``.
            whitened: The whitened residuals that :meth:`whiten` returned.
            kept: The other tensors that :meth:`whiten` returned for this method.
            out: Tensors into which to write the gradients of the residual and of the factor, if there is one factor and
                nothing was broadcast. The second may be the memory of the factor itself.

        Returns:
            The gradients with respect to the residual and each factor, not yet summed over broadcast dimensions.
        """

    has_columns: ClassVar[bool] = False
    """Whether there are :meth:`column` and :meth:`pull_back_column`, which angles need; the factor has to be one."""

    def column(self, output: int, *kept: Tensor) -> Tensor:
        """Whiten a residual of 1 in one output and 0 in the others.

        Args:
            output: Index of the output.
            kept: What :meth:`whiten` kept.

        Returns:
            The rows of the whitened residual from ``output`` on, up to the last one that is not 0.
        """
        raise NotImplementedError

    def pull_back_column(self, output: int, grad: Tensor, *kept: Tensor) -> tuple[Sequence[int], Sequence[Tensor]]:
        """Pull a gradient of :meth:`column` back to the factor: its rows, and what is to be added to each."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Covariance(TensorBatch):
    r"""A batch of covariance matrices :math:`\Sigma` over :math:`\mathbb{R}^D`, given by a factor.

    Densities of elliptical families use :meth:`whiten` and :meth:`half_log_det`, which come from the same factor:

    .. math:: r^\top \Sigma^{-1} r = \lVert \mathrm{whiten}(r) \rVert^2, \qquad
              \mathrm{half\_log\_det} = \tfrac12 \log\det\Sigma.

    Attributes:
        is_diagonal: Whether outputs are uncorrelated.
        whitening: Whitening on raw tensors with derivatives by hand; ``None`` leaves derivatives to autograd.
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
        """Compute half the log-determinant, shape ``(*batch, K)``."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Compute the diagonal of the matrix, shape ``(*batch, K, D)``."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Compute the dense matrix, shape ``(*batch, K, D, D)``."""

    @abstractmethod
    def triangular(self) -> Covariance:
        """Return the same covariance as an operator whose whitening is lower triangular (itself, if it already is)."""

    @abstractmethod
    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the shift of the mean and the standard deviation of the next output, given those before it.

        The operator has to be triangular. The residuals are those of the first outputs, in order. All shapes are
        ``(*batch, K)``.
        """

    @abstractmethod
    def conditional_scale(self) -> Tensor:
        """Compute the standard deviation of each output given those before it, ``(*batch, K, D)``.

        The operator has to be triangular.
        """

    @abstractmethod
    def marginal(self, dims: Sequence[int]) -> Covariance:
        """Return the covariance of the outputs ``dims``, in that order."""

    @abstractmethod
    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        """Return the shift of the mean and the covariance of the outputs after the first n, given residuals of these.

        The residuals have the shape ``(*batch, K, n)``.
        """

    @abstractmethod
    def affine(self, scale: Tensor) -> Covariance:
        """Return the covariance of the outputs times ``scale``, shape ``(*batch, K, D)`` (broadcast)."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ``ValueError`` unless every matrix is finite and positive definite."""

    def stddev(self) -> Tensor:
        """Compute the standard deviation of each output, ``(*batch, K, D)``.

        An operator that can do without squares, which may over- or underflow, overrides this method.
        """
        return self.variance().sqrt()

    def precision_tril(self) -> Tensor:
        r"""Compute the dense lower-triangular W with :math:`\Sigma^{-1} = W^\top W`, shape ``(*batch, K, D, D)``."""
        return self.conditional_scale().reciprocal().diag_embed()

    def root(self) -> Tensor:
        r"""Compute a dense A with :math:`\Sigma = A A^\top`, shape ``(*batch, K, D, M)``, M ≥ D."""
        return self.stddev().diag_embed()

    def of_dim(self, dim: int) -> Covariance:
        """Return this operator for ``dim`` outputs; raise a ``ValueError`` if it is for another number of outputs."""
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
