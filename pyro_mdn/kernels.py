r"""Pure functions on raw tensors: the arithmetic under every density.

Public tensors are batch-first, ``(*batch, K, D)``. Their memory is channel-first, ``(D, K, *batch)``, so that
elementwise work streams over a contiguous batch and sums over components and outputs are outer reductions.
:func:`channels_first` and :func:`channels_last` go between the two views without copying.

:func:`mixture_log_density` has its first derivatives by hand: the responsibilities are the gradient of its
log-sum-exp, and a :class:`Whitening` pulls them back to the factors of the covariances.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DIAGONAL",
    "FULL",
    "Whitening",
    "cat_channels",
    "channels_first",
    "channels_last",
    "location_and_scale",
    "low_rank_capacitance",
    "low_rank_project",
    "mixture_log_density",
    "normal_log_density",
    "normalize_logits",
    "split_channels",
    "sum_outputs",
    "tril_matvec",
    "tril_solve",
    "unpack_tril",
]

_BITS = 1 / math.log(2)  # of a nat; powers of two take a quarter of the time of exponentials


def channels_first(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(*batch, A, B)`` as ``(B, A, *batch)``, for ``event_dim`` trailing dimensions."""
    batch = tensor.ndim - event_dim
    return tensor.permute(*range(tensor.ndim - 1, batch - 1, -1), *range(batch))


def channels_last(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(B, A, *batch)`` as ``(*batch, A, B)``: the inverse of :func:`channels_first`."""
    return tensor.permute(*range(event_dim, tensor.ndim), *range(event_dim - 1, -1, -1))


def cat_channels(*tensors: Tensor) -> Tensor:
    """Concatenate ``(*batch, K, C_i)`` along the last dimension, in channel-first memory."""
    return channels_last(torch.cat([channels_first(t, 2) for t in tensors]), 2)


def split_channels(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split ``(*batch, K, C)`` along the last dimension; its gradient is channel-first in memory too."""
    return [channels_last(part, 2) for part in channels_first(tensor, 2).split(list(sizes))]


def sum_outputs(tensor: Tensor) -> Tensor:
    """Sum ``(*batch, K, D)`` over D; the result ``(*batch, K)`` is channel-first in memory."""
    if tensor.shape[-1] == 1:
        return tensor.squeeze(-1)
    return channels_last(channels_first(tensor, 2).sum(0), 1)


def location_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in float64, of the columns of ``(N, ...)``; constant ones have a scale of 1.

    NaN are left out.
    """
    location = rows.double().nanmean(0)
    scale = (rows.double() - location).square().nanmean(0).sqrt()
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.nan_to_num().abs().amax(0)
    return location, torch.where(scale > rounding, scale, 1.0)


def normalize_logits(logits: Tensor) -> Tensor:
    """Log-weights that sum to one: unlike a plain ``log_softmax`` this keeps the strides."""
    return channels_last(channels_first(logits, 1).log_softmax(0), 1)


def normal_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Gaussian log-density ``(*batch, K)`` from a whitened residual ``(*batch, K, D)`` and ½ log det Σ."""
    constant = 0.5 * math.log(2 * math.pi) * whitened.shape[-1]
    return -0.5 * sum_outputs(whitened.square()) - half_log_det - constant


# Log-densities of mixtures


class Whitening(NamedTuple):
    r"""How covariances of one structure whiten residuals.

    Attributes:
        whiten: ``(residual, *factors)`` to the whitened residual z, ``(*batch, K, D)``, and
            :math:`\tfrac12 \log\det\Sigma`, ``(*batch, K)``; differentiable.
        pull_back: ``(weight, whitened, locs, value, *factors)`` to the gradients of
            :math:`\sum_k a_k \log\mathcal{N}(y \mid \mu_k, \Sigma_k)` with respect to the locations and each factor,
            for weights :math:`a_k`, ``(*batch, K)``. What was broadcast is not summed yet.
    """

    whiten: Callable[..., tuple[Tensor, Tensor]]
    pull_back: Callable[..., Sequence[Tensor]]


def mixture_log_density(
    whitening: Whitening, logits: Tensor, locs: Tensor, value: Tensor, *factors: Tensor, normalize: bool = True
) -> Tensor:
    r"""Log-density of a Gaussian mixture in nats, shape ``(*batch,)``.

    .. math:: \log \sum_k w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k), \qquad w_k \propto e^{l_k}

    First derivatives are by hand, in few passes over memory; those of higher order, those under the transforms of
    ``torch.func`` and compiled ones are by autograd.

    Args:
        whitening: Structure of the covariances.
        logits: Log-weights :math:`l_k` up to a constant, ``(*batch, K)``.
        locs: Means, ``(*batch, K, D)``.
        value: Points y, ``(*batch, D)``.
        factors: What the whitening takes; all of these broadcast.
        normalize: Whether to normalise the weights; if not, :math:`w_k = e^{l_k}`.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _by_autograd(whitening, normalize, logits, locs, value, *factors)
    return _MixtureLogDensity.apply(whitening, normalize, logits, locs, value, *factors)


def _by_autograd(
    whitening: Whitening, normalize: bool, logits: Tensor, locs: Tensor, value: Tensor, *factors: Tensor
) -> Tensor:
    log_weights = normalize_logits(logits) if normalize else logits
    return (log_weights + normal_log_density(*whitening.whiten(locs - value.unsqueeze(-2), *factors))).logsumexp(-1)


class _MixtureLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whitening: Whitening, normalize: bool, *arguments: Tensor) -> Tensor:
        logits, locs, value, *factors = arguments
        whitened, half_log_det = whitening.whiten(locs - value.unsqueeze(-2), *factors)
        log_weights = (normalize_logits(logits) if normalize else logits) * _BITS
        joint, outputs = torch.sub(log_weights, half_log_det, alpha=_BITS), whitened.unbind(-1)
        joint = torch.addcmul(joint, outputs[0], outputs[0], value=-0.5 * _BITS)
        for output in outputs[1:]:
            joint.addcmul_(output, output, value=-0.5 * _BITS)
        top = joint.amax(-1, keepdim=True).clamp_(min=torch.finfo(joint.dtype).min)
        share = joint.sub_(top).exp2_()
        total = share.sum(-1)
        ctx.save_for_backward(*arguments, whitened, log_weights, share, total)
        ctx.whitening, ctx.normalize = whitening, normalize
        constant = 0.5 * math.log(2 * math.pi) * len(outputs)
        return total.log().add_(top.squeeze(-1), alpha=1 / _BITS).sub_(constant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, whitened, log_weights, share, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants derivatives of these
            return None, None, *_differentiable_gradients(ctx, arguments, grad)
        _, locs, value, *factors = arguments
        weight = share * (grad / total).unsqueeze(-1)
        grad_locs, *grads = ctx.whitening.pull_back(weight, whitened, locs, value, *factors)
        grad_value = -grad_locs.sum(-2) if ctx.needs_input_grad[4] else None
        if ctx.normalize:
            weight = torch.addcmul(weight, log_weights.exp2(), grad.unsqueeze(-1), value=-1)
        gradients = zip([weight, grad_locs, grad_value, *grads], arguments, strict=True)
        return None, None, *(g if g is None or g.shape == a.shape else g.sum_to_size(a.shape) for g, a in gradients)


def _differentiable_gradients(ctx: Any, arguments: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    aliases = [a.view_as(a) for a in arguments]  # the same tensor may have been given twice
    wanted = [a for a, needed in zip(aliases, ctx.needs_input_grad[2:], strict=True) if needed]
    log_density = _by_autograd(ctx.whitening, ctx.normalize, *aliases)
    gradients = iter(torch.autograd.grad(log_density, wanted, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[2:]]


def _whiten_diagonal(residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    half_log_det = sum_outputs(scale.log())
    shared_by = residual.shape[-1] // scale.shape[-1]  # one scale may stand for all outputs
    return residual / scale, half_log_det if shared_by == 1 else shared_by * half_log_det


def _pull_back_diagonal(weight: Tensor, whitened: Tensor, locs: Tensor, value: Tensor, scale: Tensor) -> list[Tensor]:
    slope = (weight.unsqueeze(-1) / scale).neg_()
    grad_locs = slope * whitened
    return [grad_locs, torch.addcmul(slope, grad_locs, whitened, value=-1)]


def _whiten_full(residual: Tensor, diagonal: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    return tril_matvec(diagonal, lower, residual), -sum_outputs(diagonal.log())


def _pull_back_full(
    weight: Tensor, whitened: Tensor, locs: Tensor, value: Tensor, diagonal: Tensor, lower: Tensor
) -> list[Tensor]:
    weight = weight.unsqueeze(-1)
    residual, slope = locs - value.unsqueeze(-2), whitened * -weight
    grad_diagonal = torch.addcdiv(slope * residual, weight, diagonal)
    grad_locs = slope * diagonal
    slopes, residuals, grads = channels_first(slope, 2), channels_first(residual, 2), channels_first(grad_locs, 2)
    grad_lower = slope.new_empty(lower.shape[-1], *slopes.shape[1:])
    rows = zip(_tril_rows(lower, slope), grad_lower.split([*range(len(slopes))]), strict=True)
    for i, (row, grad_row) in enumerate(rows):
        if i:
            grads[:i].addcmul_(row, slopes[i])
            torch.mul(slopes[i], residuals[:i], out=grad_row)
    return [grad_locs, grad_diagonal, channels_last(grad_lower, 2)]


DIAGONAL = Whitening(_whiten_diagonal, _pull_back_diagonal)
FULL = Whitening(_whiten_full, _pull_back_full)


# Triangles, packed: the diagonal (*batch, K, D), and what is below it row by row (*batch, K, D(D-1)/2)


def tril_matvec(diagonal: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Product of a triangle and a vector ``(*batch, K, D)``."""
    channels = channels_first(vector, 2)
    below = [(row * channels[:i]).sum(0) for i, row in enumerate(_tril_rows(lower, vector))]
    return torch.addcmul(channels_last(torch.stack(below), 2), diagonal, vector)


def tril_solve(diagonal: Tensor, lower: Tensor, vector: Tensor) -> Tensor:
    """Solve a triangle for a vector by forward substitution: the inverse of :func:`tril_matvec`."""
    solution: list[Tensor] = []
    rows = zip(_tril_rows(lower, vector), _aligned(diagonal, vector), channels_first(vector, 2), strict=True)
    for row, pivot, rest in rows:
        for coefficient, known in zip(row, solution, strict=True):
            rest = rest - coefficient * known
        solution.append(rest / pivot)
    return channels_last(torch.stack(solution), 2)


def _tril_rows(lower: Tensor, vector: Tensor) -> Sequence[Tensor]:
    """Rows of what is below the diagonal, ``(i, K, *batch)``, aligned with the channels of a vector."""
    return _aligned(lower, vector).split([*range(vector.shape[-1])])


def _aligned(tensor: Tensor, vector: Tensor) -> Tensor:
    """View ``(C, K, *batch)`` of ``(*batch, K, C)`` with as many dimensions as a vector has."""
    return channels_first(tensor[(None,) * (vector.ndim - tensor.ndim)], 2)


def unpack_tril(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Dense lower-triangular ``(*batch, K, D, D)``."""
    dim = diagonal.shape[-1]
    dense = diagonal.diag_embed()
    rows, columns = torch.tril_indices(dim, dim, -1, device=diagonal.device)
    position = torch.full((dim, dim), lower.shape[-1], device=diagonal.device)
    position[rows, columns] = torch.arange(lower.shape[-1], device=diagonal.device)
    padded = torch.cat([lower, torch.zeros_like(diagonal[..., :1])], -1)
    return dense + padded[..., position.flatten()].unflatten(-1, (dim, dim))


# Low rank


def low_rank_capacitance(factor: Tensor) -> Tensor:
    """Cholesky factor of ``I + BᵀB``, shape ``(*batch, R, R)``, for a factor B ``(*batch, D, R)``.

    By modified Gram-Schmidt on the columns of B stacked on I, which never forms the squares: row i of I stands in
    column i alone, so that the diagonal is at least 1 in floating point too, however dependent the columns.
    """
    rank = factor.shape[-1]
    identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
    stacked = torch.cat([factor, identity.expand(*factor.shape[:-2], rank, rank)], -2)
    directions: list[Tensor] = []
    rows: list[Tensor] = []
    for i, column in enumerate(stacked.unbind(-1)):
        row = []
        for direction in directions:
            row.append((direction * column).sum(-1))
            column = column - row[-1].unsqueeze(-1) * direction
        row.append(column.norm(dim=-1))
        directions.append(column / row[-1].unsqueeze(-1))
        rows.append(torch.nn.functional.pad(torch.stack(row, -1), (0, rank - 1 - i)))
    return torch.stack(rows, -2)


def low_rank_project(factor: Tensor, vector: Tensor) -> Tensor:
    """``Bᵀv``, shape ``(*batch, R)``, for B ``(*batch, D, R)`` and v ``(*batch, D)``."""
    return torch.stack([(column * vector).sum(-1) for column in factor.unbind(-1)], -1)
