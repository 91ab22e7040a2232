r"""Covariance operators: positive-definite matrices known by one factor.

Each operator stores its factor and derives the rest on demand. Shapes are ``(*batch, K)`` for the batch of
matrices, ``K`` being the component axis; a component axis of 1 is one matrix *tied* across components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.whitening import DiagonalWhitening
from pyro_mdn.support.checks import bounds
from pyro_mdn.tensors import kernels

__all__ = ["Covariance", "DiagonalCovariance", "IsotropicCovariance", "require_positive", "stored", "take_component"]


def stored(event_dim: int) -> Tensor:
    """Declare a stored tensor with that many dimensions behind the component axis."""
    return field(metadata={"event_dim": event_dim})


@dataclass(frozen=True, eq=False)
class Covariance(ABC):
    r"""A batch of covariance matrices :math:`\Sigma` over :math:`\mathbb{R}^D`, known by a factor.

    Whatever is elliptical is built from :meth:`whiten` and :meth:`half_log_det`, which come from the same factor:

    .. math:: r^\top \Sigma^{-1} r = \lVert \mathrm{whiten}(r) \rVert^2, \qquad
              \mathrm{half\_log\_det} = \tfrac12 \log\det\Sigma.

    Attributes:
        is_diagonal: Whether outputs are uncorrelated.
        whitening: The same on raw tensors, with derivatives by hand; ``None`` leaves them to autograd.
    """

    is_diagonal: ClassVar[bool] = True
    whitening: ClassVar[kernels.Whitening | None] = None

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

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of matrices, the component axis last."""
        first = fields(self)[0]
        tensor: Tensor = getattr(self, first.name)
        return tensor.shape[: tensor.ndim - first.metadata["event_dim"]]

    def of_dim(self, dim: int) -> Covariance:
        """Return this operator for ``dim`` outputs; a ``ValueError`` if it is for another number."""
        if self.dim != dim:
            raise ValueError(f"covariance: expected one over {dim} outputs, got {self.dim}")
        return self

    def map(self, function: Callable[[Tensor, int], Tensor]) -> Self:
        """Apply ``function(tensor, event_dim)`` to each stored tensor; it may change the batch only."""
        changes = {
            f.name: function(getattr(self, f.name), f.metadata["event_dim"])
            if "event_dim" in f.metadata
            else getattr(self, f.name)
            for f in fields(self)
        }
        return type(self)(**changes)

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors."""
        return [getattr(self, f.name) for f in fields(self) if "event_dim" in f.metadata]

    def factors(self) -> list[Tensor]:
        """Return the tensors that ``whitening`` takes, ``(*batch, K, C)`` each."""
        return self.tensors()

    def expand(self, batch_shape: Sequence[int]) -> Self:
        """Expand the batch, component axis included; a view."""
        return self.map(lambda t, n: t.expand(*batch_shape, *t.shape[t.ndim - n :]))

    def select(self, component: Tensor) -> Self:
        """Pick one matrix per entry of ``component`` (``(*sample, *batch)``); the component axis becomes 1."""
        if self.batch_shape[-1] == 1:
            return self
        return self.map(lambda t, n: take_component(t, component, n))


def take_component(tensor: Tensor, component: Tensor, event_dim: int) -> Tensor:
    """Gather ``(*batch, K, *event)`` at ``(*sample, *batch)`` into ``(*sample, *batch, 1, *event)``."""
    event = tensor.shape[tensor.ndim - event_dim :]
    index = component.reshape(*component.shape, *(1,) * (event_dim + 1)).expand(*component.shape, 1, *event)
    tensor = tensor.expand(*component.shape, *tensor.shape[tensor.ndim - event_dim - 1 :])
    return tensor.gather(component.ndim, index)


def require_positive(scale: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless all of ``scale`` is positive and finite."""
    low, high = bounds(scale)
    if not bool((low > 0) & high.isfinite()):
        raise ValueError(f"{name}: expected positive finite numbers, got {low.item():.3g} to {high.item():.3g}")


@dataclass(frozen=True, eq=False)
class IsotropicCovariance(Covariance):
    r""":math:`\Sigma = \sigma^2 I`.

    Args:
        scale: Standard deviation :math:`\sigma`, shape ``(*batch, K)``.
        outputs: Number of outputs D; a mixture fills it in.

    >>> IsotropicCovariance(torch.tensor([2.0]), outputs=2).matrix()
    tensor([[[4., 0.],
             [0., 4.]]])
    """

    scale: Tensor = stored(0)
    outputs: int | None = None
    whitening: ClassVar[kernels.Whitening | None] = DiagonalWhitening()

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
    r""":math:`\Sigma = \mathrm{diag}(\sigma^2)`.

    Args:
        scale: Standard deviations :math:`\sigma`, shape ``(*batch, K, D)``.

    >>> DiagonalCovariance(torch.tensor([[1.0, 3.0]])).variance()
    tensor([[1., 9.]])
    """

    scale: Tensor = stored(1)
    whitening: ClassVar[kernels.Whitening | None] = DiagonalWhitening()

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.scale

    def colorize(self, noise: Tensor) -> Tensor:
        return noise * self.scale

    def half_log_det(self) -> Tensor:
        return kernels.sum_outputs(self.scale.log())

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
