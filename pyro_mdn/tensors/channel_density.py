r"""Log-density of a mixture, computed directly from the channels of a linear layer, as every training step does.

The result is that of :func:`pyro_mdn.tensors.mixture_density.mixture_log_density` for views of one tensor of channels.
All gradients are written into one buffer of the size of the channels. A density from the layer itself writes them in
place of the channels, because the system clears each fresh buffer of megabytes, which takes as long as filling it.
``benchmarks/channels.py`` measures what a whole training step gains by that: a third with 8 outputs, 10 full
covariances and 2048 rows, and little with fewer.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, is_traced
from pyro_mdn.support.torch_compat import transforms_active
from pyro_mdn.tensors.channels import Layout, channels_first, channels_last
from pyro_mdn.tensors.mixture_density import (
    Kernel,
    density_backward,
    density_by_autograd,
    density_forward,
    differentiable_gradients,
    is_gradient_traced,
    logits_gradient,
)
from pyro_mdn.tensors.numerics import negligible

__all__ = ["channel_log_density", "layer_channels", "layer_log_density"]


def channel_log_density(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor) -> Tensor:
    """Compute the log-density of a mixture from the channels of a layer, shape ``(*batch,)``.

    Args:
        kernel: Kernel of the components, whose factors are raw channels.
        layout: Positions of the parameters among the channels.
        channels: Log-weights, locations and the blocks of the family, channel-first, ``(C, *batch)``.
        value: Points y, ``(*batch, D)``.
    """
    if torch.compiler.is_compiling() and not transforms_active():
        return _compilable(kernel, layout, channels, value)
    if is_traced(channels, value):
        return _by_autograd(kernel, layout, channels, value)
    return _ChannelLogDensity.apply(kernel, layout, channels, value)


def layer_log_density(
    kernel: Kernel, layout: Layout, bias: Tensor, weight: Tensor, features: Tensor, value: Tensor
) -> Tensor:
    """Compute the log-density of a mixture whose channels a linear layer gives, shape ``(N,)``.

    Args:
        kernel: Kernel of the components, whose factors are raw channels.
        layout: Positions of the parameters among the channels.
        bias: Bias of the layer, ``(C,)``.
        weight: Weight of the layer, ``(C, H)``.
        features: What the layer is applied to, ``(N, H)``; all three of the same dtype.
        value: Points y, ``(N, D)``.
    """
    if torch.compiler.is_compiling() or is_traced(bias, weight, features, value):
        return channel_log_density(kernel, layout, layer_channels(bias, weight, features), value)
    return _LayerLogDensity.apply(kernel, layout, bias, weight, features, value)


def layer_channels(bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    """Apply a linear layer, bias ``(C,)`` and weight ``(C, H)``, to features ``(N, H)``; return channels ``(C, N)``."""
    bias = bias.unsqueeze(-1)
    if is_recorded():  # the operation that torch.jit records for a product cannot broadcast its first argument
        bias = bias.expand(-1, features.shape[0])  # ``len`` would be recorded as a constant
    return torch.addmm(bias, weight, features.T)


def _by_autograd(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor) -> Tensor:
    logits, locs, factors = layout.split(channels)
    arguments = channels_last(logits, 1), channels_last(locs, 2), value, *(channels_last(f, 2) for f in factors)
    return density_by_autograd(kernel, True, *arguments)


def _compilable(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor) -> Tensor:
    # A compiler does not fuse the bands of a triangle, because their lengths differ.
    banded = any(width > layout.dim for width, _ in layout.blocks)
    if banded or value.requires_grad:
        return _by_autograd(kernel, layout, channels, value)
    return _LogDensityWithGradient.apply(kernel, layout, channels, value)


def _layer_by_autograd(
    kernel: Kernel, layout: Layout, bias: Tensor, weight: Tensor, features: Tensor, value: Tensor
) -> Tensor:
    return _by_autograd(kernel, layout, layer_channels(bias, weight, features), value)


class _LayerLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, layout: Layout, bias: Tensor, weight: Tensor, features: Tensor, value: Tensor
    ) -> Tensor:
        ctx.settings = kernel, layout
        ctx.save_for_backward(bias, weight, features, value)
        log_density, ctx.once = _layer_forward(kernel, layout, bias, weight, features, value)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        bias, weight, features, value = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if is_gradient_traced(grad):
            again = _layer_by_autograd, ctx.settings, (bias, weight, features, value)
            return None, None, *differentiable_gradients(*again, needed, grad)
        kernel, layout = ctx.settings
        # Gradients take the memory of the channels, which another backward pass then has to compute anew.
        gradient, saved = ctx.once or _layer_forward(kernel, layout, bias, weight, features, value)[1]
        ctx.once = None
        grad_locs = _write_gradients(kernel, layout, grad, saved, gradient)
        return (
            None,
            None,
            gradient.sum(1) if needed[0] else None,
            gradient @ features if needed[1] else None,
            gradient.T @ weight if needed[2] else None,
            channels_last(-grad_locs.sum(1), 1) if needed[3] else None,
        )


def _layer_forward(
    kernel: Kernel, layout: Layout, bias: Tensor, weight: Tensor, features: Tensor, value: Tensor
) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
    """Compute the log-density; and the channels, with what :func:`_write_gradients` takes beside them."""
    channels = layer_channels(bias, weight, features)
    logits, locs, factors = layout.split(channels)
    log_density, sums, kept = density_forward(kernel, True, logits, locs, _points(value), *factors)
    return log_density, (channels, [*sums, *kept])


class _ChannelLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor) -> Tensor:
        ctx.settings = kernel, layout
        logits, locs, factors = layout.split(channels)
        log_density, sums, kept = density_forward(kernel, True, logits, locs, _points(value), *factors)
        ctx.save_for_backward(channels, value, *sums, *kept)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        channels, value, *saved = ctx.saved_tensors
        if is_gradient_traced(grad):
            again = _by_autograd, ctx.settings, (channels, value)
            return None, None, *differentiable_gradients(*again, ctx.needs_input_grad[2:], grad)
        gradient = channels.new_empty(channels.shape)
        kernel, layout = ctx.settings
        grad_locs = _write_gradients(kernel, layout, grad, saved, gradient)
        grad_value = channels_last(-grad_locs.sum(1), 1) if ctx.needs_input_grad[3] else None
        return None, None, gradient, grad_value


def _write_gradients(kernel: Kernel, layout: Layout, grad: Tensor, saved: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Write the gradient with respect to the channels, also in their place; return that with respect to locations."""
    for_logits, for_locs, for_factors = layout.split(gradient)
    whole = bool(for_factors) and for_factors[0].shape[1] == layout.n_components
    out = (for_locs, for_factors[0]) if whole else None
    weight, log_weights, grad_locs, *grad_factors = density_backward(kernel, grad, *saved, out=out)
    logits_gradient(weight, log_weights, out=for_logits)
    for place, found in zip([for_locs, *for_factors], [grad_locs, *grad_factors], strict=True):
        if found is not place:
            place.copy_(found.sum_to_size(place.shape))
    return grad_locs


class _LogDensityWithGradient(torch.autograd.Function):
    """Density and gradient computed together, because a compiler would compute each exponential anew for a gradient.

    The softmax is written as sums: a compiler fuses these with the operations around them, but not the softmax of
    :func:`density_forward`.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor) -> Tensor:
        logits, locs, factors = layout.split(channels)
        log_weights = logits.log_softmax(0)
        joint, kept = kernel.forward(log_weights, locs - _points(value), *factors)
        top = joint.amax(0).clamp(min=torch.finfo(joint.dtype).min)
        least = math.log(negligible(joint.dtype))
        share = torch.threshold(joint - top, least, -math.inf).exp()
        total, prior = share.sum(0), torch.threshold(log_weights, least, -math.inf).exp()
        weight = share / total
        grad_locs, *grad_factors = kernel.backward(weight, *kept)
        parts = [g.sum_to_size(f.shape).flatten(0, 1) for g, f in zip(grad_factors, factors, strict=True)]
        ctx.save_for_backward(torch.cat([weight - prior, grad_locs.flatten(0, 1), *parts]))
        return total.log() + top + kernel.constant(len(locs))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (gradient,) = grad_outputs, ctx.saved_tensors
        return None, None, gradient * grad, None


def _points(value: Tensor) -> Tensor:
    return channels_first(value, 1).unsqueeze(1)
