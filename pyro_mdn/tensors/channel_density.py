r"""Log-density of a mixture, computed directly from the channels of a linear layer, as every training step does.

The result is that of :func:`pyro_mdn.tensors.mixture_density.mixture_log_density` for views of one tensor of channels.
All gradients are written into one buffer of the size of the channels. A density from the layer itself writes them in
place of the channels, because the system clears each fresh buffer of megabytes, which takes as long as filling it.
``benchmarks/channels.py`` measures what a whole training step gains by that: a third with 8 outputs, 10 full
covariances and 2048 rows, and little with fewer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, is_traced
from pyro_mdn.support.torch_compat import transforms_active
from pyro_mdn.tensors.channels import BlockLayout, Layout, channels_first, channels_last
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

__all__ = ["GivenChannels", "channel_log_density", "layer_channels", "layer_log_density"]


def channel_log_density(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor, *own: Tensor) -> Tensor:
    """Compute the log-density of a mixture from the channels of a layer, shape ``(*batch,)``.

    Args:
        kernel: Kernel of the components, whose factors are raw channels.
        layout: Positions of the parameters among the channels.
        channels: Log-weights, locations and the blocks of the family, channel-first, ``(C, *batch)``.
        value: Points y, ``(*batch, D)``.
        own: The tensor of the blocks that do not depend on the inputs, ``(C', *batch)``, if there are some.
    """
    if torch.compiler.is_compiling() and not transforms_active():
        return _compilable(kernel, layout, channels, value, *own)
    if is_traced(channels, value, *own):
        return _by_autograd(kernel, layout, channels, value, *own)
    return _ChannelLogDensity.apply(kernel, layout, channels, value, *own)


def layer_log_density(
    kernel: Kernel,
    layout: Layout,
    bias: Tensor,
    weight: Tensor,
    features: Tensor,
    value: Tensor,
    *own: Tensor,
    given: GivenChannels | None = None,
) -> Tensor:
    """Compute the log-density of a mixture whose channels a linear layer gives, shape ``(N,)``.

    Args:
        kernel: Kernel of the components, whose factors are raw channels.
        layout: Positions of the parameters among the channels.
        bias: Bias of the layer, ``(C,)``.
        weight: Weight of the layer, ``(C, H)``.
        features: What the layer is applied to, ``(N, H)``; all three of the same dtype.
        value: Points y, ``(N, D)``.
        own: The tensor of the blocks that do not depend on the inputs, ``(C',)``, if there are some.
        given: What the layer gave before, if that is known.
    """
    if is_traced(bias, weight, features, value, *own):
        layer = bias, weight, features
        channels = layer_channels(*layer) if given is None else given.recorded(*layer)
        return channel_log_density(kernel, layout, channels, value, *own)
    return _LayerLogDensity.apply(kernel, layout, given, bias, weight, features, value, *own)


def layer_channels(bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    """Apply a linear layer, bias ``(C,)`` and weight ``(C, H)``, to features ``(N, H)``; return channels ``(C, N)``."""
    bias = bias.unsqueeze(-1)
    if is_recorded():  # the operation that torch.jit records for a product cannot broadcast its first argument
        bias = bias.expand(-1, features.shape[0])  # ``len`` would be recorded as a constant
    return torch.addmm(bias, weight, features.T)


class GivenChannels:
    """Channels that a layer gave, computed without a graph, whose memory is free for others once this object is gone.

    Attributes:
        channels: The channels, ``(C, N)``.
    """

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels

    def recorded(self, bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Return the channels with a graph to the layer that gave them."""
        return _Recorded.apply(self.channels, bias, weight, features)


class _Recorded(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(channels: Tensor, bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        return channels.clone()  # because a gradient may take the memory

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, weight, features = inputs
        ctx.save_for_backward(weight, features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, features) = grad_outputs, ctx.saved_tensors
        return None, *_layer_gradients(gradient, weight, features, ctx.needs_input_grad[1:])


def _by_autograd(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor, *own: Tensor) -> Tensor:
    logits, locs, factors = layout.split(channels, *own)
    arguments = channels_last(logits, 1), channels_last(locs, 2), value, *(channels_last(f, 2) for f in factors)
    return density_by_autograd(kernel, True, *arguments)


def _compilable(kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor, *own: Tensor) -> Tensor:
    # A compiler does not fuse the bands of a triangle, because their lengths differ.
    banded = any(block.width > layout.dim for block in layout.blocks)
    if banded or own or value.requires_grad:
        return _by_autograd(kernel, layout, channels, value, *own)
    return _LogDensityWithGradient.apply(kernel, layout, channels, value)


def _layer_by_autograd(
    kernel: Kernel, layout: Layout, bias: Tensor, weight: Tensor, features: Tensor, value: Tensor, *own: Tensor
) -> Tensor:
    return _by_autograd(kernel, layout, layer_channels(bias, weight, features), value, *own)


class _LayerLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, layout: Layout, given: GivenChannels | None, *arguments: Tensor) -> Tensor:
        ctx.settings = kernel, layout
        ctx.given = None if given is None else weakref.ref(given)
        ctx.save_for_backward(*arguments)
        log_density, ctx.once = _layer_forward(kernel, layout, given, *arguments)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        _, weight, features, _, *own = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if is_gradient_traced(grad):
            again = _layer_by_autograd, ctx.settings, ctx.saved_tensors
            return None, None, None, *differentiable_gradients(*again, needed, grad)
        kernel, layout = ctx.settings
        gradient, saved = ctx.once or _layer_forward(kernel, layout, None, *ctx.saved_tensors)[1]
        if ctx.once and ctx.given and ctx.given():  # somebody else has the channels
            gradient = torch.empty_like(gradient)
        # Gradients take the memory of the channels, which another backward pass then has to compute anew.
        ctx.once = None
        grad_locs, others = _write_gradients(kernel, layout, grad, saved, gradient)
        return (
            None,
            None,
            None,
            *_layer_gradients(gradient, weight, features, needed),
            channels_last(-grad_locs.sum(1), 1) if needed[3] else None,
            *[_joined(others, tensor) if needed[4] else None for tensor in own],
        )


def _layer_forward(
    kernel: Kernel, layout: Layout, given: GivenChannels | None, *arguments: Tensor
) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
    """Compute the log-density; and the channels, with what :func:`_write_gradients` takes beside them."""
    bias, weight, features, value, *own = arguments
    channels = layer_channels(bias, weight, features) if given is None else given.channels
    logits, locs, factors = layout.split(channels, *own)
    log_density, sums, kept = density_forward(kernel, True, logits, locs, _points(value), *factors)
    return log_density, (channels, [*sums, *kept])


def _layer_gradients(
    gradient: Tensor, weight: Tensor, features: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of bias, weight and features that are needed from that of the channels, ``(C, N)``."""
    for_features = None
    if needed[2]:
        # ``weight.T @ gradient`` is the quicker product, but a gradient that is transposed slows down the layer before.
        many = weight.shape[0] > 4 * weight.shape[1]
        for_features = (weight.T @ gradient).T if many else gradient.T @ weight
    return gradient.sum(1) if needed[0] else None, gradient @ features if needed[1] else None, for_features


class _ChannelLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, layout: Layout, channels: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        ctx.settings = kernel, layout
        logits, locs, factors = layout.split(channels, *own)
        log_density, sums, kept = density_forward(kernel, True, logits, locs, _points(value), *factors)
        ctx.save_for_backward(channels, value, *own, *sums, *kept)
        ctx.count = 2 + len(own)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        arguments, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if is_gradient_traced(grad):
            again = _by_autograd, ctx.settings, arguments
            return None, None, *differentiable_gradients(*again, ctx.needs_input_grad[2:], grad)
        channels, _, *own = arguments
        gradient = channels.new_empty(channels.shape)
        needed, (kernel, layout) = ctx.needs_input_grad[2:], ctx.settings
        grad_locs, others = _write_gradients(kernel, layout, grad, saved, gradient)
        grad_value = channels_last(-grad_locs.sum(1), 1) if needed[1] else None
        return None, None, gradient, grad_value, *[_joined(others, tensor) if needed[2] else None for tensor in own]


def _write_gradients(
    kernel: Kernel, layout: Layout, grad: Tensor, saved: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor, list[tuple[BlockLayout, Tensor]]]:
    """Write the gradient with respect to the channels, also in their place.

    Returns:
        The gradient with respect to the locations; and those with respect to blocks that are not among the channels.
    """
    for_logits, for_locs, for_factors = layout.split(gradient)
    whole = layout.blocks[:1] == layout.predicted[:1] != () and layout.blocks[0].groups == layout.n_components
    out = (for_locs, for_factors[0]) if whole else None
    weight, log_weights, grad_locs, *grad_factors = density_backward(kernel, grad, *saved, out=out)
    logits_gradient(weight, log_weights, out=for_logits)
    found = list(zip(layout.blocks, grad_factors, strict=True))
    predicted = [factor for block, factor in found if not block.is_own]
    for place, value in zip([for_locs, *for_factors], [grad_locs, *predicted], strict=True):
        if value is not place:
            place.copy_(value.sum_to_size(place.shape))
    return grad_locs, [pair for pair in found if pair[0].is_own]


def _joined(found: Sequence[tuple[BlockLayout, Tensor]], own: Tensor) -> Tensor:
    """Join the gradients with respect to blocks of the tensor ``own``, summed over what was broadcast."""
    batch = own.shape[1:]
    summed = []
    for block, gradient in found:
        size = block.width, block.groups, *batch, *(1,) * (gradient.ndim - 1 - own.ndim)
        summed.append(gradient.sum_to_size(size).reshape(-1, *batch))
    return torch.cat(summed)


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
        return total.log() + top + kernel.constant(locs.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (gradient,) = grad_outputs, ctx.saved_tensors
        return None, None, gradient * grad, None


def _points(value: Tensor) -> Tensor:
    return channels_first(value, 1).unsqueeze(1)
