r"""Memory layout: public tensors are batch-first, ``(*batch, K, D)``, and channel-first in memory, ``(D, K, *batch)``.

Elementwise work then streams over a contiguous batch, and sums over components and outputs are outer reductions.
:func:`channels_first` and :func:`channels_last` convert between the two views without copying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BlockLayout",
    "Layout",
    "cat_channels",
    "channels_first",
    "channels_last",
    "normalize_logits",
    "split_channels",
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
    """Apply a function of channel-first tensors to batch-first tensors ``(*batch, K, C)``, which broadcast."""
    ndim = max(t.ndim for t in tensors)
    return channels_last(function(*(channels_first(t[(None,) * (ndim - t.ndim)], 2) for t in tensors)), 2)


def cat_channels(*tensors: Tensor) -> Tensor:
    """Concatenate ``(*batch, K, C_i)`` along the last dimension, in channel-first memory."""
    return channels_last(torch.cat([channels_first(t, 2) for t in tensors]), 2)


def split_channels(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split ``(*batch, K, C)`` along the last dimension; the gradient is channel-first in memory too."""
    return [channels_last(part, 2) for part in channels_first(tensor, 2).split(list(sizes))]


def sum_outputs(tensor: Tensor) -> Tensor:
    """Sum ``(*batch, K, D)`` over D; the result ``(*batch, K)`` is channel-first in memory."""
    if tensor.shape[-1] == 1:
        return tensor.squeeze(-1)
    return channels_last(channels_first(tensor, 2).sum(0), 1)


def normalize_logits(logits: Tensor) -> Tensor:
    """Normalise log-weights so that the weights sum to one; unlike a plain ``log_softmax``, this keeps the strides."""
    return channels_last(channels_first(logits, 1).log_softmax(0), 1)


class BlockLayout(NamedTuple):
    """Place of one block of a family.

    Attributes:
        width: Number of channels of each group.
        groups: Number of groups: K, or 1 if the components share the block.
        is_own: Whether it is in a tensor of its own, because it does not depend on the inputs.
    """

    width: int
    groups: int
    is_own: bool


class Layout(NamedTuple):
    """Positions of the parameters of a mixture among the channels ``(C, *batch)`` of a linear layer.

    First come K log-weights, then D·K locations, then the blocks of the family that depend on the inputs. The others
    are in a tensor of their own, ``(C', *batch)`` (broadcast); missing dimensions of the batch are added.

    Attributes:
        n_components: Number of components K.
        dim: Number of outputs D.
        blocks: Places of the blocks.
        predicted: Places of those that depend on the inputs.
        sizes: Numbers of channels of the log-weights, of the locations and of each block that depends on the inputs.
    """

    n_components: int
    dim: int
    blocks: tuple[BlockLayout, ...]
    predicted: tuple[BlockLayout, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, n_components: int, dim: int, blocks: Iterable[BlockLayout]) -> Layout:
        """Lay out blocks."""
        blocks = tuple(blocks)
        predicted = tuple([block for block in blocks if not block.is_own])
        widths = [width * groups for width, groups, _ in predicted]
        return cls(n_components, dim, blocks, predicted, (n_components, n_components * dim, *widths))

    @property
    def has_own(self) -> bool:
        """Whether there is a tensor of blocks that do not depend on the inputs."""
        return len(self.predicted) < len(self.blocks)

    def split(self, channels: Tensor, *own: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """View log-weights ``(K, *batch)``, locations ``(D, K, *batch)`` and blocks ``(width, groups, *batch)``.

        Args:
            channels: The channels.
            own: The other tensor; without it, there are only the blocks that depend on the inputs.
        """
        logits, locs, *parts = channels.split_with_sizes(self.sizes)
        batch, blocks = channels.shape[1:], self.predicted
        locs = locs.view(self.dim, self.n_components, *batch)
        if own:
            (rest,), blocks = own, self.blocks
            rest = rest.reshape(*rest.shape, *(1,) * (channels.ndim - rest.ndim))
            others = rest.split_with_sizes([width * groups for width, groups, is_own in blocks if is_own])
            sources = {False: iter(parts), True: iter(others)}
            parts = [next(sources[is_own]) for _, _, is_own in blocks]
        shaped = [part.view(w, groups, *part.shape[1:]) for part, (w, groups, _) in zip(parts, blocks, strict=True)]
        return logits, locs, shaped
