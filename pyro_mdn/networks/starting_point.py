r"""Where a training starts: components at clusters, hidden layers with their initial weights, weights drawn anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_mdn.support.pyro_compat import latent_parameters
from pyro_mdn.support.torch_compat import reset_of
from pyro_mdn.tensors.numerics import location_and_scale, winsorized

__all__ = ["FirstLinear", "clusters", "draw_anew_", "filled", "hidden_layers"]


class FirstLinear(nn.Linear):
    """Linear layer whose initial weights are three times those of torch, for standardised inputs.

    Its outputs have a variance of 3, so that the network starts with features that vary within the range of the data.
    From the smaller initial weights of torch, jumps between the levels of an input take far longer to learn.
    """

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(3.0)


def hidden_layers(widths: Sequence[int]) -> nn.Sequential:
    """Build hidden layers of these widths, that of the inputs first, each with a GELU."""
    layers = [(nn.Linear if i else FirstLinear)(a, b) for i, (a, b) in enumerate(pairwise(widths))]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.GELU())))


def draw_anew_(network: nn.Module) -> None:
    """Draw the weights of all layers of a network anew by their ``reset_parameters``, except for frozen parameters.

    Weights are drawn in the order of construction, so that a generator in the same state gives the same network again.
    Running statistics of batch normalisation are reset, too. Scalers stay.

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
    """List the functions that draw the weights of the layers. Heads come last, with the start of their components."""
    if latent := [name for name, part in network.named_modules() if latent_parameters(part)]:
        instead = "build a new network, and bayesianize that"
        raise ValueError(f"network: expected no latent weights to draw anew, got some in {latent[0]}: {instead}")
    heads: list[Any] = [part for part in network.modules() if hasattr(part, "start_anywhere")]
    linear = [head.linear for head in heads if hasattr(head.linear, "reset_parameters")]
    apart = {id(part) for part in (*heads, *linear)}
    resets = [_reset(name, part) for name, part in network.named_modules() if id(part) not in apart]
    starts = [h.reset_parameters if hasattr(h.linear, "reset_parameters") else h.start_anywhere for h in heads]
    return [*(reset for reset in resets if reset is not None), *starts]


def _reset(name: str, part: nn.Module) -> Callable[[], Any] | None:
    """Return the function that draws a module's own weights, without its parts; ``None`` if there are none to draw."""
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


def filled(y: Tensor) -> Tensor:
    """Put observed entries of the same column, drawn at random, in place of NaN."""
    columns = []
    for column in y.unbind(-1):
        observed = column[~column.isnan()]
        if len(observed) < len(column):
            column = torch.where(
                column.isnan(), observed[torch.randint(len(observed), column.shape, device="cpu")], column
            )
        columns.append(column)
    return torch.stack(columns, -1)


def clusters(
    y: Tensor, n_components: int, max_rows: int = 10_000, *, alike: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-proportions ``(K,)``, centres and spreads ``(K, D)`` of a k-means over standardised ``(N, D)``.

    Args:
        y: The targets.
        n_components: Number of clusters K.
        max_rows: Number of rows, drawn at random, that there are clusters of.
        alike: Whether all columns are standardised; if not, such as counts beside others, distances are made so.
    """
    from scipy.cluster.vq import kmeans2  # it takes longer to import than all of this package

    if not alike:
        shift, scale = location_and_scale(y)
        weights, centers, spread = clusters((y - shift) / scale, n_components, max_rows)
        return weights, shift + scale * centers, scale * spread

    rows = y[torch.randperm(len(y), device="cpu")[:max_rows]]
    near = winsorized(rows)  # of gross outliers, each end is one cluster at most
    distinct = near.unique(dim=0)
    if len(distinct) <= n_components:
        extra = torch.randint(len(distinct), (n_components - len(distinct),), device="cpu")
        centers = torch.cat([distinct, distinct[extra]])
    else:
        rng = np.random.default_rng(int(torch.randint(2**31, (), device="cpu")))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            centers = torch.from_numpy(kmeans2(near.numpy(), n_components, minit="++", rng=rng)[0])
    nearest = torch.cdist(near, centers).argmin(-1)
    member = one_hot(nearest, n_components).to(rows)
    # One pseudo-observation from the whole of the data keeps empty and single-point clusters alive.
    count = member.sum(0) + 1
    centers = centers + member.T @ (rows - near) / (count - 1).clamp(min=1)[:, None]
    spread = member.T @ (rows - centers[nearest]).square() + 1
    return (count / count.sum()).log(), centers, (spread / count[:, None]).sqrt()
