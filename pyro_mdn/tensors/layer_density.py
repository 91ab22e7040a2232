r"""Log-densities of mixtures straight from a linear layer, or from its channels: what a training step goes through.

As :func:`pyro_mdn.tensors.kernels.mixture_log_density`, with gradients that are written where they belong in one
buffer, from which the layer has its own in the order that is quickest.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, is_traced
from pyro_mdn.support.torch_compat import transforms_active
from pyro_mdn.tensors.kernels import (
    Whitening,
    channels_first,
    channels_last,
    density_backward,
    density_by_autograd,
    density_forward,
    differentiable_gradients,
    is_gradient_traced,
    logits_gradient,
    negligible,
)

__all__ = ["channel_log_density", "layer_channels", "layer_log_density"]

_MANY_ROWS = 512  # with fewer, autograd is as quick


def channel_log_density(whitening: Whitening, n_components: int, width: int, channels: Tensor, value: Tensor) -> Tensor:
    """Log-density of a Gaussian mixture from the channels of a layer, shape ``(*batch,)``.

    Args:
        whitening: Structure of the covariances, of one factor.
        n_components: Number of components K.
        width: Channels of the factor of one component.
        channels: K log-weights, D·K locations, and the factors, channel-first, ``(C, *batch)``.
        value: Points y, ``(*batch, D)``.
    """
    if torch.compiler.is_compiling() and not transforms_active():
        return _compilable(whitening, n_components, width, channels, value)
    if is_traced(channels, value):
        return _channels_by_autograd(whitening, n_components, width, channels, value)
    return _ChannelLogDensity.apply(whitening, n_components, width, channels, value)


def layer_channels(bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    """What a linear layer ``(C,)``, ``(C, H)`` makes of features ``(N, H)``, channel-first, ``(C, N)``."""
    if is_traced(bias, weight, features):  # first, since what is traced may be for any number of rows
        return _product(bias, weight, features)
    many = len(features) >= _MANY_ROWS and weight.shape[0] > weight.shape[-1]
    if many and not torch.is_autocast_enabled(weight.device.type):
        return _LayerChannels.apply(bias, weight, features)
    return _product(bias, weight, features)


def layer_log_density(
    whitening: Whitening, n_components: int, width: int, weight: Tensor, bias: Tensor, features: Tensor, value: Tensor
) -> Tensor:
    """Log-density of the Gaussian mixture whose channels a linear layer gives, shape ``(N,)``.

    Args:
        whitening: Structure of the covariances, of one factor.
        n_components: Number of components K.
        width: Channels of the factor of one component.
        weight: Weight of the layer, ``(C, H)``.
        bias: Its bias, ``(C,)``.
        features: What it is given, ``(N, H)``, of the same dtype.
        value: Points y, ``(N, D)``, likewise.
    """
    if is_traced(weight, bias, features, value):
        return channel_log_density(whitening, n_components, width, layer_channels(bias, weight, features), value)
    return _LayerLogDensity.apply(whitening, n_components, width, weight, bias, features, value)


def _compilable(whitening: Whitening, n_components: int, width: int, channels: Tensor, value: Tensor) -> Tensor:
    if width > value.shape[-1] or value.requires_grad:  # bands of a factor, of different lengths, do not fuse
        return _channels_by_autograd(whitening, n_components, width, channels, value)
    return _LogDensityWithGradient.apply(whitening, n_components, width, channels, value)


def _channels_by_autograd(
    whitening: Whitening, n_components: int, width: int, channels: Tensor, value: Tensor
) -> Tensor:
    logits, locs, factor = _parts(n_components, width, value.shape[-1], channels)
    arguments = channels_last(logits, 1), channels_last(locs, 2), value, channels_last(factor, 2)
    return density_by_autograd(whitening, True, *arguments)


def _layer_by_autograd(
    whitening: Whitening, n_components: int, width: int, weight: Tensor, bias: Tensor, features: Tensor, value: Tensor
) -> Tensor:
    return _channels_by_autograd(whitening, n_components, width, layer_channels(bias, weight, features), value)


def _product(bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    bias = bias.unsqueeze(-1)
    if is_recorded():  # what torch.jit makes of a product cannot broadcast its first argument
        bias = bias.expand(-1, features.shape[0])  # ``len`` would be a constant of what is traced
    return torch.addmm(bias, weight, features.T)


class _LayerChannels(torch.autograd.Function):
    """The product above: with many rows and channels, autograd takes a third longer over the features' gradient."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(weight, features)
        return _product(bias, weight, features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, features = ctx.saved_tensors
        return _layer_gradients(grad_outputs[0], weight, features, ctx.needs_input_grad)


def _layer_gradients(
    gradient: Tensor, weight: Tensor, features: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to the bias, the weight and the features, from that with respect to the channels."""
    for_bias, for_weight, for_features = needed
    return (
        gradient.sum(1) if for_bias else None,
        gradient @ features if for_weight else None,
        (weight.T @ gradient).T if for_features else None,  # quicker than gradient.T @ weight
    )


class _ChannelLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, whitening: Whitening, n_components: int, width: int, channels: Tensor, value: Tensor
    ) -> Tensor:
        ctx.settings = whitening, n_components, width
        log_density, saved = _forward(ctx.settings, channels, _points(value))
        ctx.save_for_backward(channels, value, *saved)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        channels, value, *saved = ctx.saved_tensors
        if is_gradient_traced(grad):
            again = _channels_by_autograd, ctx.settings, (channels, value)
            return None, None, None, *differentiable_gradients(*again, ctx.needs_input_grad[3:], grad)
        gradient = channels.new_empty(channels.shape)
        grad_locs = _backward(ctx.settings, value.shape[-1], grad, saved, gradient)
        grad_value = channels_last(-grad_locs.sum(1), 1) if ctx.needs_input_grad[4] else None
        return None, None, None, gradient, grad_value


class _LogDensityWithGradient(torch.autograd.Function):
    """The gradient is made beside the density, in one pass: a compiler would compute each exponential anew for it.

    It fuses these sums, but not the softmax of :func:`density_forward` with what is around it.
    """

    @staticmethod
    def forward(
        ctx: Any, whitening: Whitening, n_components: int, width: int, channels: Tensor, value: Tensor
    ) -> Tensor:
        logits, locs, factor = _parts(n_components, width, value.shape[-1], channels)
        log_weights = logits.log_softmax(0)
        whitened, half_log_det, kept = whitening.whiten(locs - _points(value), factor)
        joint = log_weights - 0.5 * whitened.square().sum(0) - half_log_det
        top = joint.amax(0).clamp(min=torch.finfo(joint.dtype).min)
        least = math.log(negligible(joint.dtype))
        share = torch.threshold(joint - top, least, -math.inf).exp()
        total, prior = share.sum(0), torch.threshold(log_weights, least, -math.inf).exp()
        weight = share / total
        grad_locs, grad_factor = whitening.pull_back(weight, whitened, *kept)
        for_factor = grad_factor.sum_to_size(factor.shape).flatten(0, 1)
        ctx.save_for_backward(torch.cat([weight - prior, grad_locs.flatten(0, 1), for_factor]))
        return total.log() + top - 0.5 * math.log(2 * math.pi) * len(locs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (gradient,) = grad_outputs, ctx.saved_tensors
        return None, None, None, gradient * grad, None


class _LayerLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        whitening: Whitening,
        n_components: int,
        width: int,
        weight: Tensor,
        bias: Tensor,
        features: Tensor,
        value: Tensor,
    ) -> Tensor:
        ctx.settings = whitening, n_components, width
        ctx.save_for_backward(weight, bias, features, value)
        log_density, ctx.once = _layer_forward(ctx.settings, weight, bias, features, value)
        return log_density

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        weight, bias, features, value = ctx.saved_tensors
        if is_gradient_traced(grad):
            again = _layer_by_autograd, ctx.settings, (weight, bias, features, value)
            return None, None, None, *differentiable_gradients(*again, ctx.needs_input_grad[3:], grad)
        for_weight, for_bias, for_features, for_value = ctx.needs_input_grad[3:]
        needed = for_bias, for_weight, for_features
        # The gradient takes the memory of the channels, so that another backward pass needs these anew.
        gradient, saved = ctx.once or _layer_forward(ctx.settings, weight, bias, features, value)[1]
        ctx.once = None
        grad_locs = _backward(ctx.settings, value.shape[-1], grad, saved, gradient)
        grad_bias, grad_weight, grad_features = _layer_gradients(gradient, weight, features, needed)
        grad_value = channels_last(-grad_locs.sum(1), 1) if for_value else None
        return None, None, None, grad_weight, grad_bias, grad_features, grad_value


_Settings = tuple[Whitening, int, int]


def _parts(n_components: int, width: int, dim: int, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights ``(K, *batch)``, locations ``(D, K, *batch)`` and factors ``(width, K, *batch)``."""
    batch, n = channels.shape[1:], n_components * dim
    logits, locs, factor = channels.split_with_sizes([n_components, n, channels.shape[0] - n_components - n])
    return logits, locs.view(dim, n_components, *batch), factor.view(width, factor.shape[0] // width, *batch)


def _points(value: Tensor) -> Tensor:
    return channels_first(value, 1).unsqueeze(1)


def _forward(settings: _Settings, channels: Tensor, points: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Log-density, and what :func:`_backward` takes."""
    whitening, n_components, width = settings
    logits, locs, factor = _parts(n_components, width, len(points), channels)
    log_density, sums, kept = density_forward(whitening, True, logits, locs, points, factor)
    return log_density, [*sums, *kept]


def _layer_forward(
    settings: _Settings, weight: Tensor, bias: Tensor, features: Tensor, value: Tensor
) -> tuple[Tensor, tuple[Tensor, Sequence[Tensor]]]:
    """Log-density; channels, and what :func:`_backward` takes beside them."""
    channels = _product(bias, weight, features)
    log_density, saved = _forward(settings, channels, _points(value))
    return log_density, (channels, saved)


def _backward(settings: _Settings, dim: int, grad: Tensor, saved: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Write the gradient with respect to the channels, in their place too; return that for the locations."""
    whitening, n_components, width = settings
    for_logits, for_locs, for_factor = _parts(n_components, width, dim, gradient)
    out = (for_locs, for_factor) if for_factor.shape[1] == n_components else None
    weight, log_weights, grad_locs, grad_factor = density_backward(whitening, grad, *saved, out=out)
    logits_gradient(weight, log_weights, out=for_logits)
    if grad_locs is not for_locs:
        for_locs.copy_(grad_locs)
    if grad_factor is not for_factor:
        for_factor.copy_(grad_factor.sum_to_size(for_factor.shape))
    return grad_locs
