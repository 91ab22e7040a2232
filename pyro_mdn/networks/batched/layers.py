r"""Many networks in one pass if their hidden layers are the usual ones: batched matrix products, faster than vmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_mdn.networks import inputs
from pyro_mdn.networks.batched.passes import Cost
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.raw_parameters import Raw
from pyro_mdn.networks.starting_point import FirstLinear
from pyro_mdn.support.checks import is_inherited, is_plain
from pyro_mdn.support.process_state import give_way
from pyro_mdn.support.torch_compat import own_modules

__all__ = ["aligned", "dense_cost", "dense_raw", "is_dense"]


def is_dense(network: MixtureDensityNetwork) -> bool:
    """Check that :func:`dense_raw` computes the same as a network, and finds its weights.

    The function multiplies by the weights of linear layers without calling these, so that they have to be plain ones,
    without hooks. It calls each activation once for all networks, whose hooks would see another shape.
    """
    head, backbone = network.head, network.backbone
    inherited = is_inherited(network, MixtureDensityNetwork, "raw", "features")
    inherited = inherited and is_inherited(head, MixtureHead, "raw", "channels")
    if not (inherited and len(network.input_shape) == 1 and is_plain(backbone, nn.Sequential)):
        return False
    names = {name.removesuffix("_start") for name, _ in [*network.named_parameters(), *network.named_buffers()]}
    layers: dict[str, Any] = {f"backbone.{name}": layer for name, layer in own_modules(backbone).items()}
    linear = {name: layer for name, layer in [*layers.items(), ("head.linear", head.linear)] if _is_linear(layer)}
    return (
        "head.linear" in linear
        and all(name in linear or is_plain(layer, nn.GELU) for name, layer in layers.items())
        and all({f"{name}.weight", f"{name}.bias"} <= names for name in linear)
    )


def _is_linear(layer: nn.Module) -> bool:
    return is_plain(layer, nn.Linear) or is_plain(layer, FirstLinear)


def dense_raw(
    network: MixtureDensityNetwork, x: Tensor, tensors: Mapping[str, Tensor], *, chunk_size: int | None = None
) -> Raw:
    """Compute raw parameters ``(S, *batch, ...)`` of the mixtures by S networks that differ in their tensors.

    Args:
        network: Network of the architecture, for which :func:`is_dense` holds.
        x: Inputs ``(S, *batch, dim_in)``, or ``(1, *batch, dim_in)`` if all networks share them.
        tensors: Parameters and buffers by name, ``(S, *shape)``, or ``(1, *shape)`` if all networks share them.
        chunk_size: Largest number of networks in one pass; by default all.
    """
    n, every = x.ndim - 1, max(len(x), *(len(tensor) for tensor in tensors.values()))
    # What else of a head differs, such as homoscedastic noise, does not enter its channels.
    size = max(len(x), *(len(t) for name, t in tensors.items() if not name.startswith("head.") or ".linear." in name))
    transform = network.input_transform
    units = {name: aligned(tensors[name], n) for name in inputs.buffers_of(transform).values()}
    scaled = inputs.scaled(transform, units, x, tensors["head.linear.weight"].dtype)
    scaled = scaled.reshape(len(scaled), x.shape[1:-1].numel(), x.shape[-1])
    step = chunk_size or size
    weight = tensors["head.linear.weight"]
    # Chunks write into one tensor. Autograd needs a tensor of each chunk instead, and autocast another dtype.
    apart = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    whole = None if apart else weight.new_empty(size, weight.shape[1], scaled.shape[1])
    parts = []
    for start in range(0, size, step):
        if step < size:  # a single pass may be a training step, or be compiled
            give_way()
        own = {name: _part(tensor, start, step) for name, tensor in tensors.items()}
        out = None if whole is None else whole[start : start + step]
        parts.append(_channels(network, _part(scaled, start, step), own, out))
    channels = (torch.cat(parts) if whole is None else whole).transpose(0, 1)
    raw_noise = tensors.get("head.raw_noise")
    channels = channels.reshape(channels.shape[0], size, *x.shape[1:-1])
    return network.head.split(
        channels.expand(-1, every, *channels.shape[2:]),
        None if raw_noise is None else raw_noise.T.reshape(-1, len(raw_noise), *(1,) * (n - 1)),
    )


def dense_cost(network: MixtureDensityNetwork, draws: Mapping[str, Tensor]) -> Cost:
    """Estimate the memory that :func:`dense_raw` takes for each network and row: outputs of layers, and the mixture."""
    layers = [layer for layer in own_modules(network.backbone).values() if isinstance(layer, nn.Linear)]
    widths = 2 * sum(layer.out_features for layer in layers) + 4 * sum(network.head.sizes)
    size = network.x_shift.itemsize
    return Cost(size * sum(value[0].numel() for value in draws.values()), size * widths, True)


def _channels(
    network: MixtureDensityNetwork, features: Tensor, tensors: Mapping[str, Tensor], out: Tensor | None
) -> Tensor:
    """Compute the channels of the head's linear layer, ``(S, C, N)``."""
    layers: dict[str, Any] = own_modules(network.backbone)
    for name, layer in layers.items():  # ``named_children`` has one that occurs twice only once
        if isinstance(layer, nn.Linear):
            bias, weight = (tensors[f"backbone.{name}.{kind}"] for kind in ("bias", "weight"))
            features = _linear(features, weight, bias)
        else:
            features = layer(features)
    if features.shape[-1] != network.head.in_features:
        expected = f"features (*batch, {network.head.in_features})"
        raise ValueError(f"backbone: expected {expected}, got width {features.shape[-1]}")
    bias, weight = (tensors[f"head.linear.{kind}"] for kind in ("bias", "weight"))
    return _product(bias.unsqueeze(-1), weight, features.mT, out)


def _linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute outputs ``(S, N, out)`` of S linear layers; if they share inputs, by one wider product."""
    if len(features) > 1 or len(weight) == 1:
        return _product(bias.unsqueeze(1), features, weight.mT)
    wide = torch.addmm(bias.expand(len(weight), -1).flatten(), features[0], weight.flatten(0, 1).mT)
    return wide.unflatten(1, weight.shape[:2]).transpose(0, 1)


def _product(bias: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    size = max(len(bias), len(left), len(right))
    return torch.baddbmm(*(t if len(t) == size else t.expand(size, -1, -1) for t in (bias, left, right)), out=out)


def _part(tensor: Tensor, start: int, step: int) -> Tensor:
    return tensor if len(tensor) == 1 else tensor[start : start + step]


def aligned(tensor: Tensor, batch_dim: int) -> Tensor:
    """Reshape ``(S, ..., D)`` so that it broadcasts with a batch ``(S, ...)``."""
    return tensor.reshape(len(tensor), *(1,) * (batch_dim - 1), *tensor.shape[1:])
