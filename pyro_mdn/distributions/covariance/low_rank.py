r"""Low rank plus diagonal covariances: the operator, and its whitening."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, Whitening, require_positive
from pyro_mdn.distributions.covariance.full import FullCovariance, in_single, solve_lower
from pyro_mdn.support.checks import all_finite
from pyro_mdn.tensors.channels import sum_outputs, with_channels
from pyro_mdn.tensors.numerics import norm, positive, sum_logs
from pyro_mdn.tensors.tensor_batch import stored

__all__ = [
    "LowRankCovariance",
    "LowRankWhitening",
    "RawLowRankWhitening",
    "gram_schmidt",
    "low_rank_capacitance",
    "low_rank_project",
]


class LowRankWhitening(Whitening):
    r"""Whitening :math:`z = (u - Q Q^\top u, -C^{-\top} Q^\top u)`, :math:`u = r / \sigma`, :math:`Q = B C^{-\top}`.

    Factors are σ, ``(D, K, *batch)``, and F row by row, ``(D·R, K, *batch)``, with
    :math:`B = \mathrm{diag}(\sigma)^{-1} F` and :math:`C C^\top = I + B^\top B`.

    Gram-Schmidt orthonormalisation of the columns of B stacked on I gives the columns of Q stacked on
    :math:`C^{-\top}`. One more step of it, in which nothing cancels, gives z: the part of u stacked on 0 that is
    orthogonal to these columns.

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
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        grad_residual, packed = self.packed_pull_back(weight, radial, whitened, *kept)
        return grad_residual, *packed.split_with_sizes(
            [grad_residual.shape[0], packed.shape[0] - grad_residual.shape[0]]
        )

    def packed_pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of :meth:`pull_back`, those of σ and F in one tensor."""
        scale, *rest = kept
        for_residual, packed = out or (None, None)
        dim, rank = scale.shape[0], whitened.shape[0] - scale.shape[0]
        columns, entries = [direction[:dim] for direction in rest[:rank]], rest[rank:]
        capacitance = [entries[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(rank)]
        pulled, *loadings = whitened.split_with_sizes([dim, *[1] * rank])  # diag(σ) Σ⁻¹ r, and the rows of -Fᵀ Σ⁻¹ r
        slope = -weight / scale
        inward = slope if radial is weight else -radial / scale
        grad_residual = torch.mul(inward, pulled, out=for_residual)
        if packed is None:
            packed = slope.new_empty(dim * (1 + rank), *slope.shape[1:])
        squares = pulled.square()
        if radial is not weight:
            squares = squares * (radial / weight.masked_fill(weight == 0, 1.0))
        for column in columns:
            squares.addcmul_(column, column)
        torch.addcmul(slope, slope, squares, value=-1, out=packed[:dim])
        grad_factor = packed[dim:].view(dim, rank, *packed.shape[1:])
        posterior = _solve_transposed(capacitance, columns)  # diag(σ) Σ⁻¹ F, by column
        for i, (column, loading) in enumerate(zip(posterior, loadings, strict=True)):
            if radial is weight:
                torch.mul(torch.addcmul(column, pulled, loading), slope, out=grad_factor[:, i])
            else:
                torch.addcmul(column * slope, pulled * loading, inward, out=grad_factor[:, i])
        return grad_residual, packed

    def outputs(self, residual: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        r"""Compute D whitened residuals, one for each output, :math:`u - B (C^\top + I)^{-1} Q^\top u`."""
        directions, capacitance = _orthonormal(scale, factor)
        whitened, coefficients = _remainder(residual / scale, directions)
        whitened = whitened[: scale.shape[0]]
        weights = _solve_transposed(capacitance, coefficients, shift=1.0)
        for direction, weight in zip(directions, weights, strict=True):
            whitened = torch.addcmul(whitened, direction[: scale.shape[0]], weight)
        return whitened


@dataclass(frozen=True)
class RawLowRankWhitening(Whitening):
    """Low-rank whitening from raw channels, of which :func:`positive` maps the first D to σ."""

    min_scale: float

    def whiten(self, residual: Tensor, *factors: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        (raw,) = factors
        raw_scale, factor = raw.split_with_sizes([residual.shape[0], raw.shape[0] - residual.shape[0]])
        whitened, half_log_det, kept = _LOW_RANK.whiten(residual, positive(raw_scale, self.min_scale), factor)
        return whitened, half_log_det, [raw_scale, *kept]

    def pull_back(
        self,
        weight: Tensor,
        radial: Tensor,
        whitened: Tensor,
        *kept: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        raw_scale, *rest = kept
        slope = raw_scale.sigmoid()  # now, because ``out`` may overwrite the raw channels
        grad_residual, packed = _LOW_RANK.packed_pull_back(weight, radial, whitened, *rest, out=out)
        packed[: slope.shape[0]].mul_(slope)
        return grad_residual, packed


_LOW_RANK = LowRankWhitening()


@dataclass(frozen=True, eq=False)
class LowRankCovariance(Covariance):
    r"""Low-rank-plus-diagonal covariance :math:`\Sigma = F F^\top + \mathrm{diag}(\sigma^2)`.

    With :math:`B = \mathrm{diag}(\sigma)^{-1} F` and the Cholesky factor :math:`C C^\top = I + B^\top B`,

    .. math:: \mathrm{whiten}(r) = u - B (C^\top + I)^{-1} C^{-1} B^\top u, \qquad u = r / \sigma,

    in :math:`O(DR)`, without the cancellation of the Woodbury identity.

    Args:
        factor: F, shape ``(*batch, K, D, R)``.
        scale: Standard deviations :math:`\sigma` of the diagonal part, shape ``(*batch, K, D)``.

    References:
        Andrews (1968), A square root formulation of the Kalman covariance equations, *AIAA Journal* 6.

    >>> LowRankCovariance(torch.ones(1, 2, 1), torch.ones(1, 2)).matrix()
    tensor([[[2., 1.],
             [1., 2.]]])
    """

    factor: Tensor = stored(2)
    scale: Tensor = stored(1)
    is_diagonal: ClassVar[bool] = False
    whitening: ClassVar[Whitening | None] = _LOW_RANK

    def __post_init__(self) -> None:
        if self.factor.shape[:-1] != self.scale.shape:
            got = f"{tuple(self.factor.shape)} and {tuple(self.scale.shape)}"
            raise ValueError(f"factor, scale: expected shapes (*batch, K, D, R) and (*batch, K, D), got {got}")

    @property
    def dim(self) -> int:
        return self.scale.shape[-1]

    def factors(self) -> list[Tensor]:
        return [self.scale, self.factor.flatten(-2)]

    def whiten(self, residual: Tensor) -> Tensor:
        tensors = residual, *self.factors()
        return in_single(lambda *t: with_channels(_LOW_RANK.outputs, *t), *tensors)

    def colorize(self, noise: Tensor) -> Tensor:
        projection = low_rank_project(self._ratio(), noise)
        weights = _solve(_plus_identity(self._capacitance()), projection)
        return (noise + self._combine(weights)) * self.scale

    def half_log_det(self) -> Tensor:
        diagonal = self._capacitance().diagonal(dim1=-2, dim2=-1)
        return sum_outputs(self.scale.log()) + diagonal.log().sum(-1)

    def variance(self) -> Tensor:
        return self.factor.square().sum(-1) + self.scale.square()

    def stddev(self) -> Tensor:
        return norm(torch.cat([self.factor, self.scale.unsqueeze(-1)], -1))

    def matrix(self) -> Tensor:
        return self.factor @ self.factor.mT + self.scale.square().diag_embed()

    def triangular(self) -> FullCovariance:
        return FullCovariance.from_root(self.root())

    def root(self) -> Tensor:
        return torch.cat([self.factor, self.scale.diag_embed()], -1)

    def precision_tril(self) -> Tensor:
        return self.triangular().precision_tril()

    def next_output(self, residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.triangular().next_output(residuals)

    def conditional_scale(self) -> Tensor:
        return self.triangular().conditional_scale()

    def marginal(self, dims: Sequence[int]) -> LowRankCovariance:
        return LowRankCovariance(self.factor[..., list(dims), :], self.scale[..., list(dims)])

    def condition(self, residual: Tensor) -> tuple[Tensor, Covariance]:
        n = residual.shape[-1]
        known, rest = self.marginal(range(n)), self.marginal(range(n, self.dim))
        capacitance = known._capacitance()
        pull = _solve(capacitance, low_rank_project(known._ratio(), residual / known.scale))
        factor = solve_lower(capacitance, rest.factor.mT).mT
        return (factor @ pull.unsqueeze(-1)).squeeze(-1), LowRankCovariance(factor, rest.scale)

    def affine(self, scale: Tensor) -> LowRankCovariance:
        return LowRankCovariance(self.factor * scale.unsqueeze(-1), self.scale * scale.abs())

    def validate(self) -> None:
        require_positive(self.scale, "LowRankCovariance.scale")
        if not all_finite(self.factor):
            raise ValueError("LowRankCovariance.factor: expected finite numbers, got NaN or Inf")

    def _ratio(self) -> Tensor:
        return self.factor / self.scale.unsqueeze(-1)

    def _capacitance(self) -> Tensor:
        return in_single(low_rank_capacitance, self._ratio())

    def _combine(self, weights: Tensor) -> Tensor:
        columns = self._ratio().unbind(-1)
        return torch.stack([c * w.unsqueeze(-1) for c, w in zip(columns, weights.unbind(-1), strict=True)]).sum(0)


def _orthonormal(scale: Tensor, factor: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Orthonormalise the columns of B stacked on I; return them, ``(D + R, K, *batch)`` each, and the rows of C."""
    columns = factor.unflatten(0, (len(scale), -1)) / scale.unsqueeze(1)
    return gram_schmidt(columns.transpose(0, 1))


def _remainder(vector: Tensor, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Split a vector stacked on 0 into a part orthogonal to directions, and coefficients along each in turn."""
    remainder = torch.cat([vector, vector.new_zeros(len(directions), *vector.shape[1:])])
    coefficients = []
    for direction in directions:
        coefficients.append((direction * remainder).sum(0))
        remainder = torch.addcmul(remainder, direction, coefficients[-1], value=-1)
    return remainder, coefficients


def _solve_transposed(
    triangle: Sequence[Sequence[Tensor]], vector: Sequence[Tensor], shift: float = 0.0
) -> list[Tensor]:
    """Solve the transposed system of a lower triangle, with ``shift`` added to its diagonal."""
    solution = list(vector)
    for i in reversed(range(len(solution))):
        for j in range(i + 1, len(solution)):
            solution[i] = torch.addcmul(solution[i], triangle[j][i], solution[j], value=-1)
        solution[i] = solution[i] / (triangle[i][i] + shift)
    return solution


def gram_schmidt(columns: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Orthonormalise the columns of B stacked on I, given the columns ``(R, D, ...)`` of B, by modified Gram-Schmidt.

    The matrix ``I + BᵀB`` is never formed. The 1 of I in column i stays as it is, because all columns before it have a
    0 in that row. So no norm is below 1, in floating point too, however dependent the columns are.

    Returns:
        The orthonormal columns, ``(D + R, ...)`` each, and the rows of the Cholesky factor of ``I + BᵀB``, with entries
        ``(...)``.
    """
    rank = len(columns)
    identity = torch.eye(rank, dtype=columns.dtype, device=columns.device)
    identity = identity.reshape(rank, rank, *(1,) * (columns.ndim - 2)).expand(-1, -1, *columns.shape[2:])
    directions: list[Tensor] = []
    rows: list[list[Tensor]] = []
    for column in torch.cat([columns, identity], 1):
        row = []
        for direction in directions:
            row.append((direction * column).sum(0))
            column = torch.addcmul(column, direction, row[-1], value=-1)
        row.append(column.square().sum(0).sqrt())
        directions.append(column / row[-1])
        rows.append(row)
    return directions, rows


def low_rank_capacitance(factor: Tensor) -> Tensor:
    """Compute the Cholesky factor of ``I + BᵀB``, shape ``(*batch, R, R)``, for a factor B ``(*batch, D, R)``."""
    _, rows = gram_schmidt(factor.movedim((-1, -2), (0, 1)))
    zero = torch.zeros_like(rows[0][0])
    return torch.stack([torch.stack([*row, *[zero] * (len(rows) - len(row))], -1) for row in rows], -2)


def low_rank_project(factor: Tensor, vector: Tensor) -> Tensor:
    """Compute ``Bᵀv``, shape ``(*batch, R)``, for B ``(*batch, D, R)`` and v ``(*batch, D)``."""
    return torch.stack([(column * vector).sum(-1) for column in factor.unbind(-1)], -1)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _solve(triangle: Tensor, vector: Tensor) -> Tensor:
    return solve_lower(triangle, vector.unsqueeze(-1)).squeeze(-1)
