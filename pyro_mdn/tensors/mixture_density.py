r"""Log-density of a mixture on raw tensors, with first derivatives by hand.

The responsibilities are the gradient of the log-sum-exp over components. A :class:`Kernel`, which a family of
components provides, pulls them back to locations and factors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, is_traced, is_transformed
from pyro_mdn.support.torch_compat import is_legacy_batched, log_softmax_gradient
from pyro_mdn.tensors.channels import channels_last
from pyro_mdn.tensors.numerics import constant, log_sum_exp, negligible

__all__ = [
    "Kernel",
    "density_backward",
    "density_by_autograd",
    "density_forward",
    "differentiable_gradients",
    "is_gradient_traced",
    "logits_gradient",
    "mixture_log_density",
]


class Kernel(ABC):
    """Log-densities of the components of one family with gradients by hand, on channel-first tensors.

    Residuals are locations minus points, ``(D, K, *batch)``. Factors are the other parameters of the components,
    ``(C, K, *batch)`` each; all components share a factor whose component axis is 1.
    """

    is_circular: ClassVar[bool] = False
    """Whether densities are periodic by themselves, in all outputs; those of other angles are sums over images."""

    @abstractmethod
    def log_density(self, residual: Tensor, *factors: Tensor) -> Tensor:
        """Compute log-densities ``(K, *batch)`` up to :meth:`constant`, in differentiable operations."""

    @abstractmethod
    def constant(self, dim: int) -> float:
        """Return the term that :meth:`log_density` leaves out because it is the same for all components."""

    @abstractmethod
    def forward(self, log_weights: Tensor, residual: Tensor, *factors: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute the sum of log-weights and :meth:`log_density`, and the tensors that :meth:`backward` takes.

        The residual may be overwritten, because touching new memory costs more than arithmetic.
        """

    @abstractmethod
    def backward(self, weight: Tensor, *kept: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        r"""Compute the gradients of :math:`\sum_k a_k \log p_k`.

        Args:
            weight: The coefficients :math:`a_k`, ``(K, *batch)``.
            kept: The tensors that :meth:`forward` kept.
            out: Tensors into which to write the gradients of the residual and of the first factor, if nothing was
                broadcast. The second may be the memory of the factor itself.

        Returns:
            The gradients with respect to the residual and each factor, not yet summed over broadcast dimensions.
        """

    def wrapped(self, output: int, period: Tensor) -> Kernel | None:
        """Return the kernel of sums over images of one output, an angle; ``None`` if there is none by hand.

        Args:
            output: Index of the output.
            period: Length of a turn in the units of residuals, which broadcasts with ``(*batch)``.
        """
        return None


def mixture_log_density(
    kernel: Kernel, logits: Tensor, locs: Tensor, value: Tensor, *factors: Tensor, normalize: bool = True
) -> Tensor:
    r"""Compute the log-density of a mixture in nats, shape ``(*batch,)``.

    .. math:: \log \sum_k w_k \, p_k(y), \qquad w_k \propto e^{l_k}

    First derivatives are by hand, in few passes over memory. Autograd computes derivatives of higher order, under
    transforms of ``torch.func`` and in compiled code.

    Args:
        kernel: Kernel of the components.
        logits: Log-weights :math:`l_k` up to a constant, ``(*batch, K)``.
        locs: Locations, ``(*batch, K, D)``.
        value: Points y, ``(*batch, D)``.
        factors: Factors of the kernel, ``(*batch, K, C)`` each. All tensors broadcast.
        normalize: Whether to normalise the weights; if not, :math:`w_k = e^{l_k}`.
    """
    if is_traced(logits, locs, value, *factors):
        return density_by_autograd(kernel, normalize, logits, locs, value, *factors)
    return _MixtureLogDensity.apply(kernel, normalize, logits, locs, value, *factors)


def density_by_autograd(kernel: Kernel, normalize: bool, *arguments: Tensor) -> Tensor:
    """Compute :func:`mixture_log_density` of logits, locations, values and factors in differentiable operations."""
    logits, locs, value, *factors = _channels(*arguments)
    log_weights = logits - log_sum_exp(logits) if normalize else logits
    joint = log_weights + kernel.log_density(locs - value, *factors)
    return log_sum_exp(joint) + kernel.constant(value.shape[0])


_EVENT_DIMS = (1, 2, 1, 2, 2, 2, 2)  # of logits, locations, values and factors


class _MixtureLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, normalize: bool, *arguments: Tensor) -> Tensor:
        log_density, sums, kept = density_forward(kernel, normalize, *_channels(*arguments))
        ctx.save_for_backward(*arguments, *sums, *kept)
        ctx.kernel, ctx.normalize, ctx.count = kernel, normalize, len(arguments)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        arguments, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        if is_gradient_traced(grad):
            again = density_by_autograd, (ctx.kernel, ctx.normalize), arguments
            return None, None, *differentiable_gradients(*again, needed, grad)
        weight, log_weights, grad_locs, *grads = density_backward(ctx.kernel, grad, *saved)
        grad_value = -grad_locs.sum(1) if needed[2] else None
        if ctx.normalize:
            weight = logits_gradient(weight.sum_to_size(log_weights.shape), log_weights.to(weight.dtype))
        gradients = [weight, grad_locs, grad_value, *grads]
        places = zip(needed, gradients, arguments, _EVENT_DIMS[: ctx.count], strict=True)
        return None, None, *[_as_argument(g, a, n) if needs and g is not None else None for needs, g, a, n in places]


# The next three functions take channel-first tensors.


def density_forward(
    kernel: Kernel, normalize: bool, logits: Tensor, locs: Tensor, value: Tensor, *factors: Tensor
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Compute the log-density, log-weights with responsibilities, and the tensors that the kernel keeps.

    :func:`density_backward` takes all but the log-density.
    """
    residual = locs - value.contiguous()  # contiguous, because a row of values is read once for each component
    log_weights = logits.log_softmax(0) if normalize else logits
    joint, kept = kernel.forward(log_weights, residual, *factors)
    if normalize:  # from here on, only the gradient of the logits reads the log-weights
        torch.threshold_(log_weights, math.log(negligible(joint.dtype)), -math.inf)
    share, top = joint.softmax(0), joint.amax(0)
    others = share.amax(0).log_().nan_to_num_()  # minus what the other terms add; NaN where all terms are -inf
    log_density = top.sub_(others)
    if left_out := kernel.constant(locs.shape[0]):
        log_density.add_(constant(left_out, top.dtype))
    torch.threshold_(share, negligible(share.dtype), 0.0)
    return log_density, (log_weights, share), kept


def density_backward(
    kernel: Kernel,
    grad: Tensor,
    log_weights: Tensor,
    share: Tensor,
    *kept: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return responsibilities times ``grad``, the log-weights, and the gradients of locations and factors."""
    weight = share * grad
    return weight, log_weights, *kernel.backward(weight, *kept, out=out)


def logits_gradient(weight: Tensor, log_weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the gradient of logits ``(K, ...)`` from that of their ``log_softmax``; ``out`` must be contiguous."""
    return log_softmax_gradient(weight, log_weights, 0, weight.dtype, out=out)


def is_gradient_traced(grad: Tensor) -> bool:
    """Check whether a backward pass must be differentiable: for second derivatives, or for many gradients at once.

    ``torch.autograd.grad(is_grads_batched=True)`` and ``torch.autograd.functional.jacobian(vectorize=True)`` map the
    backward pass over gradients. A tensor that the pass writes into lacks the dimension that is mapped.
    """
    if torch.is_grad_enabled() or is_recorded():  # compiled autograd cannot ask what kind of tensor a gradient is
        return torch.is_grad_enabled()
    return is_legacy_batched(grad) or is_transformed(grad)


def differentiable_gradients(
    function: Callable[..., Tensor],
    settings: Sequence[Any],
    arguments: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Compute gradients of the arguments that need one by autograd; they have a graph if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [a.view_as(a) for a in arguments]  # one each, because the same tensor may have been given twice
        wanted = [a for a, needs in zip(aliases, needed, strict=True) if needs]
        log_density = function(*settings, *aliases)
    gradients = torch.autograd.grad(log_density, wanted, grad, create_graph=create_graph, materialize_grads=True)
    gradients = iter(gradients)
    return [next(gradients) if needs else None for needs in needed]


def _channels(*arguments: Tensor) -> list[Tensor]:
    """View logits, locations, values and factors as channel-first, with equally many batch dimensions."""
    event_dims = _EVENT_DIMS[: len(arguments)]
    batch = max([t.ndim - n for t, n in zip(arguments, event_dims, strict=True)])
    orders = (), (batch, *range(batch)), (batch + 1, batch, *range(batch))
    logits, locs, value, *factors = [
        (t if t.ndim == batch + n else t[(None,) * (batch + n - t.ndim)]).permute(orders[n])
        for t, n in zip(arguments, event_dims, strict=True)
    ]
    return [logits, locs, value.unsqueeze(1), *factors]


def _as_argument(gradient: Tensor, argument: Tensor, event_dim: int) -> Tensor:
    """Bring a channel-first gradient to the shape of its argument, summing over broadcast dimensions."""
    whole = channels_last(gradient, event_dim)
    if whole.shape == argument.shape:
        return whole
    batch, event = argument.shape[: argument.ndim - event_dim], argument.shape[argument.ndim - event_dim :]
    shape = (*reversed(event), *(1,) * (gradient.ndim - argument.ndim), *batch)
    if gradient.shape != shape:  # sums over a view in another order of dimensions take many times as long
        gradient = gradient.sum_to_size(shape)
    return channels_last(gradient.reshape(*reversed(event), *batch), event_dim)
