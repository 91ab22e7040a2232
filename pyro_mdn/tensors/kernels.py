r"""Pure functions on raw tensors: the arithmetic under every density.

Public tensors are batch-first, ``(*batch, K, D)``. Their memory is channel-first, ``(D, K, *batch)``, so that
elementwise work streams over a contiguous batch and sums over components and outputs are outer reductions.
:func:`channels_first` and :func:`channels_last` go between the two views without copying.

:func:`mixture_log_density` has its first derivatives by hand: the responsibilities are the gradient of its
log-sum-exp, and a :class:`Whitening` pulls them back to the factors of the covariances.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.support.checks import bounds, is_recorded, is_traced, is_transformed
from pyro_mdn.support.torch_compat import is_legacy_batched, log_softmax_gradient

__all__ = [
    "Whitening",
    "cat_channels",
    "channels_first",
    "channels_last",
    "constant",
    "density_backward",
    "density_by_autograd",
    "density_forward",
    "differentiable_gradients",
    "exp",
    "gram_schmidt",
    "is_gradient_traced",
    "location_and_scale",
    "log_sum_exp",
    "logits_gradient",
    "low_rank_capacitance",
    "low_rank_project",
    "mixture_log_density",
    "negligible",
    "norm",
    "normal_log_density",
    "normalize_logits",
    "relative_log_density",
    "shares",
    "split_channels",
    "sum_logs",
    "sum_outputs",
    "with_channels",
]


def channels_first(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(*batch, A, B)`` as ``(B, A, *batch)``, for ``event_dim`` trailing dimensions."""
    batch = tensor.ndim - event_dim
    return tensor.permute((*range(tensor.ndim - 1, batch - 1, -1), *range(batch)))


def channels_last(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(B, A, *batch)`` as ``(*batch, A, B)``: the inverse of :func:`channels_first`."""
    return tensor.permute((*range(event_dim, tensor.ndim), *range(event_dim - 1, -1, -1)))


def with_channels(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function of channel-first tensors to batch-first ones, ``(*batch, K, C)``; they broadcast."""
    ndim = max(t.ndim for t in tensors)
    return channels_last(function(*(channels_first(t[(None,) * (ndim - t.ndim)], 2) for t in tensors)), 2)


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


def sum_logs(factors: Tensor) -> Tensor:
    """Sum logarithms over the first dimension: of products of two, half as many, if all these are in range."""
    half = len(factors) // 2
    # For small tensors, checking the range costs as much as the logarithms. On GPUs and under tracing we cannot branch
    # on values.
    if half > 1 and factors.numel() > 8192 and factors.is_cpu and not is_traced(factors):
        pairs = factors[:half] * factors[half : 2 * half]
        (low, high), limits = bounds(pairs), torch.finfo(pairs.dtype)
        if limits.tiny <= low.item() and high.item() <= limits.max:
            logs = pairs.log_().sum(0)
            return logs if len(factors) == 2 * half else logs + factors[-1].log()
    return factors[0].log() if len(factors) == 1 else factors.log().sum(0)


@functools.cache
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor: torch adds it in half the time of a Python number."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def norm(rows: Tensor) -> Tensor:
    """Euclidean norm along the last axis; no square over- or underflows, and its gradient at 0 is 0."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    unit = largest.masked_fill((largest == 0) | (largest == math.inf), 1.0)
    return unit.squeeze(-1) * (rows / unit).norm(dim=-1)


def location_and_scale(rows: Tensor, *, common_unit: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in float64, of the columns of ``(N, ...)``; constant ones have a scale of 1.

    NaN are left out.

    Args:
        rows: The data.
        common_unit: One scale, of shape ``(1,)``, for all columns: the root mean square over those that are not
            constant, and 1 if all are.
    """
    location = rows.double().nanmean(0)
    scale = (rows.double() - location).square().nanmean(0).sqrt()
    varies = scale > 4 * torch.finfo(rows.dtype).eps * rows.nan_to_num().abs().amax(0)
    if common_unit:
        varying = scale[varies]
        scale, varies = varying.square().mean().sqrt().reshape(1), varies.any()
    return location, torch.where(varies, scale, 1.0)


def normalize_logits(logits: Tensor) -> Tensor:
    """Log-weights that sum to one: unlike a plain ``log_softmax`` this keeps the strides."""
    return channels_last(channels_first(logits, 1).log_softmax(0), 1)


# A share of a sum that is too small to show in any result counts as 0. Otherwise its products with gradients become
# subnormal numbers, for which a CPU may take ten times as long.
_NEGLIGIBLE = {
    dtype: min(torch.finfo(dtype).tiny ** 0.75, torch.finfo(dtype).eps ** 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def negligible(dtype: torch.dtype) -> float:
    """Return the largest share of a sum that counts as 0: 4e-29 in single precision.

    >>> round(math.log10(negligible(torch.float32)), 1)
    -28.4
    """
    return _NEGLIGIBLE[dtype]


def exp(exponent: Tensor) -> Tensor:
    """Exponential, with about the least normal number in place of what underflows.

    For results that underflow, a CPU may take thirty times as long.

    >>> exp(torch.tensor([0.0, -1e6]))
    tensor([1.0000e+00, 3.1953e-38])
    """
    return exponent.clamp(min=math.log(torch.finfo(exponent.dtype).tiny) + 1).exp()


def log_sum_exp(terms: Tensor) -> Tensor:
    """Log-sum-exp over the first dimension; its gradient is exactly 0 at terms of a :func:`negligible` share."""
    return _raised(terms).logsumexp(0)


def shares(terms: Tensor) -> Tensor:
    """Softmax over the first dimension; :func:`negligible` shares are exactly 0, and so are their gradients."""
    return torch.threshold(_raised(terms).softmax(0), 2 * negligible(terms.dtype), 0.0)  # twice: they were rounded


def _raised(terms: Tensor) -> Tensor:
    """Raise logarithms of negligible shares to that of the largest negligible one, without a gradient."""
    top = terms.detach().amax(0, keepdim=True)
    return terms.clamp(min=top + math.log(negligible(terms.dtype)))


def normal_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Gaussian log-density ``(*batch, K)`` from a whitened residual ``(*batch, K, D)`` and ½ log det Σ."""
    constant = 0.5 * math.log(2 * math.pi) * whitened.shape[-1]
    return -0.5 * sum_outputs(whitened.square()) - half_log_det - constant


def relative_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Compute :func:`normal_log_density` up to a constant that is common to all components.

    Far from all components, where squares overflow, the result is still finite for the nearest one.
    """
    # A unit of about the root of the largest number. It is a power of two, and 1 at least, so that nothing is rounded.
    size = whitened.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1)
    unit = torch.exp2((0.5 * size.log2()).floor())
    squares = sum_outputs((whitened / unit).square())
    farther = squares - squares.detach().amin(-1, keepdim=True)
    return farther * (-0.5 * unit.squeeze(-1).square()) - half_log_det


# Log-densities of mixtures


class Whitening(ABC):
    """How covariances of one structure whiten residuals, and what that makes of gradients; on channel-first tensors."""

    @abstractmethod
    def whiten(
        self, residual: Tensor, *factors: Tensor, scratch: bool = False
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        r"""Whiten residuals.

        Args:
            residual: Residuals r, ``(D, K, *batch)``.
            factors: Factors of the covariances, ``(C, K, *batch)`` each.
            scratch: Whether the residual may be overwritten: memory that is touched anew costs more than arithmetic.

        Returns:
            Numbers z, ``(D, K, *batch)`` or more, whose squares sum to :math:`r^\top \Sigma^{-1} r`;
            :math:`\tfrac12 \log\det\Sigma`, ``(K, *batch)``; and what :meth:`pull_back` takes. Without ``scratch`` all
            of it is differentiable.
        """

    @abstractmethod
    def pull_back(
        self, weight: Tensor, whitened: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        r"""Gradients of :math:`\sum_k a_k \log\mathcal{N}(r_k \mid 0, \Sigma_k)`, the :math:`a_k` being ``weight``.

        Args:
            weight: The :math:`a_k`, ``(K, *batch)``.
            whitened: What :meth:`whiten` gave.
            kept: What else it gave.
            out: Where to put the gradients, if there is one factor and nothing was broadcast; that for the factor
                may take its place.

        Returns:
            Those with respect to the residual and each factor; what was broadcast is not summed yet.
        """


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
        factors: What the whitening takes, each ``(*batch, K, C)``; all of these broadcast.
        normalize: Whether to normalise the weights; if not, :math:`w_k = e^{l_k}`.
    """
    if is_traced(logits, locs, value, *factors):
        return density_by_autograd(whitening, normalize, logits, locs, value, *factors)
    return _MixtureLogDensity.apply(whitening, normalize, logits, locs, value, *factors)


def density_by_autograd(whitening: Whitening, normalize: bool, *arguments: Tensor) -> Tensor:
    """:func:`mixture_log_density` of logits, locations, values and factors, in differentiable operations."""
    logits, locs, value, *factors = _channels(*arguments)
    whitened, half_log_det, _ = whitening.whiten(locs - value, *factors)
    log_weights = logits - log_sum_exp(logits) if normalize else logits
    joint = log_weights - 0.5 * whitened.square().sum(0) - half_log_det
    return log_sum_exp(joint) - 0.5 * math.log(2 * math.pi) * len(value)


_EVENT_DIMS = (1, 2, 1, 2, 2, 2)  # of logits, locations, values and factors


class _MixtureLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whitening: Whitening, normalize: bool, *arguments: Tensor) -> Tensor:
        log_density, sums, kept = density_forward(whitening, normalize, *_channels(*arguments))
        ctx.save_for_backward(*arguments, *sums, *kept)
        ctx.whitening, ctx.normalize, ctx.count = whitening, normalize, len(arguments)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        arguments, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        if is_gradient_traced(grad):
            again = density_by_autograd, (ctx.whitening, ctx.normalize), arguments
            return None, None, *differentiable_gradients(*again, needed, grad)
        weight, log_weights, grad_locs, *grads = density_backward(ctx.whitening, grad, *saved)
        grad_value = -grad_locs.sum(1) if needed[2] else None
        if ctx.normalize:
            weight = logits_gradient(weight.sum_to_size(log_weights.shape), log_weights.to(weight.dtype))
        gradients = zip([weight, grad_locs, grad_value, *grads], arguments, _EVENT_DIMS[: ctx.count], strict=True)
        return None, None, *[None if g is None else _as_argument(g, a, n) for g, a, n in gradients]


# Both on channel-first tensors


def density_forward(
    whitening: Whitening, normalize: bool, logits: Tensor, locs: Tensor, value: Tensor, *factors: Tensor
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Log-density, and what :func:`density_backward` takes."""
    residual, dim = locs - value.contiguous(), len(locs)  # a row of values is read once for each component
    whitened, half_log_det, kept = whitening.whiten(residual, *factors, scratch=True)
    log_weights, outputs = logits.log_softmax(0) if normalize else logits, whitened.unbind()
    joint = log_weights - half_log_det
    if normalize:  # what is left of them is for the gradient of the logits
        torch.threshold_(log_weights, math.log(negligible(joint.dtype)), -math.inf)
    into = joint if joint.shape == outputs[0].shape and joint.dtype == outputs[0].dtype else None
    joint = torch.addcmul(joint, outputs[0], outputs[0], value=-0.5, out=into)
    for output in outputs[1:]:
        joint.addcmul_(output, output, value=-0.5)
    share, top = joint.softmax(0), joint.amax(0)
    others = share.amax(0).log_().nan_to_num_()  # what they add to the top one; where all are -inf, the share is NaN
    log_density = top.sub_(others).sub_(constant(0.5 * math.log(2 * math.pi) * dim, top.dtype))
    torch.threshold_(share, negligible(share.dtype), 0.0)
    return log_density, (log_weights, share, whitened), kept


def density_backward(
    whitening: Whitening,
    grad: Tensor,
    log_weights: Tensor,
    share: Tensor,
    whitened: Tensor,
    *kept: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Weight of each component in the gradient, log-weights, gradients with respect to locations and factors."""
    weight = share * grad
    return weight, log_weights, *whitening.pull_back(weight, whitened, *kept, out=out)


def logits_gradient(weight: Tensor, log_weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of logits ``(K, ...)`` from that of their ``log_softmax``; ``out`` must be contiguous."""
    return log_softmax_gradient(weight, log_weights, 0, weight.dtype, out=out)


def is_gradient_traced(grad: Tensor) -> bool:
    """Whether a gradient is to be had in differentiable operations: for derivatives of it, or for many at once.

    ``torch.autograd.grad(is_grads_batched=True)`` and ``torch.autograd.functional.jacobian(vectorize=True)`` map the
    backward pass over gradients; what is written in place has no batch dimension then.
    """
    if torch.is_grad_enabled() or is_recorded():  # compiled autograd takes no such look at a gradient
        return torch.is_grad_enabled()
    return is_legacy_batched(grad) or is_transformed(grad)


def differentiable_gradients(
    function: Callable[..., Tensor],
    settings: Sequence[Any],
    arguments: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients with respect to the arguments that need one, with a graph of their own where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [a.view_as(a) for a in arguments]  # the same tensor may have been given twice
        wanted = [a for a, needs in zip(aliases, needed, strict=True) if needs]
        log_density = function(*settings, *aliases)
    gradients = torch.autograd.grad(log_density, wanted, grad, create_graph=create_graph, materialize_grads=True)
    gradients = iter(gradients)
    return [next(gradients) if needs else None for needs in needed]


def _channels(*arguments: Tensor) -> list[Tensor]:
    """Channel-first logits, locations, values and factors, with equally many batch dimensions."""
    event_dims = _EVENT_DIMS[: len(arguments)]  # torch 2.6 compiles no other zip than one of equal lengths
    batch = max([t.ndim - n for t, n in zip(arguments, event_dims, strict=True)])
    orders = (), (batch, *range(batch)), (batch + 1, batch, *range(batch))
    logits, locs, value, *factors = [
        (t if t.ndim == batch + n else t[(None,) * (batch + n - t.ndim)]).permute(orders[n])
        for t, n in zip(arguments, event_dims, strict=True)
    ]
    return [logits, locs, value.unsqueeze(1), *factors]


def _as_argument(gradient: Tensor, argument: Tensor, event_dim: int) -> Tensor:
    """Channel-first gradient in the shape of the argument that it belongs to."""
    gradient = channels_last(gradient, event_dim)
    return gradient if gradient.shape == argument.shape else gradient.sum_to_size(argument.shape)


# Low rank


def gram_schmidt(columns: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Orthonormal columns of B stacked on I, for the columns ``(R, D, ...)`` of B, and what they are made from.

    By modified Gram-Schmidt, which never forms the squares: row i of I stands in column i alone, so that no norm is
    below 1 in floating point either, however dependent the columns.

    Returns:
        The columns, ``(D + R, ...)`` each, and the rows of the Cholesky factor of ``I + BᵀB``, with entries ``(...)``.
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
    """Cholesky factor of ``I + BᵀB``, shape ``(*batch, R, R)``, for a factor B ``(*batch, D, R)``."""
    _, rows = gram_schmidt(factor.movedim((-1, -2), (0, 1)))
    zero = torch.zeros_like(rows[0][0])
    return torch.stack([torch.stack([*row, *[zero] * (len(rows) - len(row))], -1) for row in rows], -2)


def low_rank_project(factor: Tensor, vector: Tensor) -> Tensor:
    """``Bᵀv``, shape ``(*batch, R)``, for B ``(*batch, D, R)`` and v ``(*batch, D)``."""
    return torch.stack([(column * vector).sum(-1) for column in factor.unbind(-1)], -1)
