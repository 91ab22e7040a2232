r"""First weights of a network, drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.support.pyro_compat import latent_parameters
from pyro_mdn.support.torch_compat import reset_of

__all__ = ["draw_anew_"]


def draw_anew_(network: nn.Module) -> None:
    """Draw the weights of all layers of a network anew, by their ``reset_parameters``, but for frozen ones.

    Weights come in the order of construction, so that a generator in the same state gives the same network again.
    Running statistics, as of batch norm, start again too. Scalers stay.

    Raises:
        ValueError: If weights are latent, or in a layer without ``reset_parameters``; nothing is changed then.
    """
    resets = _resets(network)
    frozen = [(p, p.detach().clone()) for p in network.parameters() if not p.requires_grad]
    for reset in resets:
        reset()
    with torch.no_grad():
        for parameter, value in frozen:  # a layer may have some of both
            parameter.copy_(value)


def _resets(network: nn.Module) -> list[Callable[[], Any]]:
    """Functions that draw the weights of the layers; those of a head come last, its start with them."""
    if latent := [name for name, part in network.named_modules() if latent_parameters(part)]:
        instead = "build a new network, and bayesianize that"
        raise ValueError(f"network: expected no latent weights to draw anew, got some in {latent[0]}: {instead}")
    heads = [part for part in network.modules() if isinstance(part, MixtureHead)]
    linear = [head.linear for head in heads if hasattr(head.linear, "reset_parameters")]
    apart = {id(part) for part in (*heads, *linear)}
    resets = [_reset(name, part) for name, part in network.named_modules() if id(part) not in apart]
    starts = [h.reset_parameters if hasattr(h.linear, "reset_parameters") else h.start_anywhere for h in heads]
    return [*(reset for reset in resets if reset is not None), *starts]


def _reset(name: str, part: nn.Module) -> Callable[[], Any] | None:
    """Function that draws the weights of one module, not those of its parts; ``None`` if there is nothing to draw."""
    own = list(part.parameters(recurse=False))
    if not own:
        return getattr(part, "reset_running_stats", None)
    if not any(p.requires_grad for p in own):
        return None
    reset = reset_of(part)
    if reset is None:
        kind = f"{name} ({type(part).__name__})"
        instead = "build a new network instead, or for an ensemble a sequence of them"
        raise ValueError(f"network: expected layers with reset_parameters, got {kind} without: {instead}")
    return reset
