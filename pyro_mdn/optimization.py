r"""Optimiser, schedules, averaged weights and noise: pure pieces that training loops are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["AveragedWeights", "adamw", "blur", "default_weight_decay", "fading", "warmup_cosine"]

# Chosen on held-out parts of training rows and on simulated data: benchmarks/ablation.py.
LEARNING_RATE = 0.02
INPUT_NOISE = 0.1
TARGET_NOISE = 0.1
FINAL_NOISE = 0.03
STEPS = 9000


def default_weight_decay(rows: int) -> float:
    """Pull of a fixed prior on the weights, which matters less the more rows there are: 20 over their number.

    >>> default_weight_decay(1000), default_weight_decay(5)
    (0.02, 0.5)
    """
    return min(0.5, 20 / rows)


def adamw(
    objective: nn.Module, lr: float, weight_decay: float, matrix_dim: int = 2, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW whose decoupled decay acts on weight matrices alone (Loshchilov & Hutter, 2019)."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= matrix_dim], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < matrix_dim], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first twentieth of the steps, then a cosine down to zero.

    >>> [round(warmup_cosine(step, 100), 2) for step in (0, 4, 52, 100)]
    [0.2, 1.0, 0.51, 0.0]
    """
    warmup = max(1, steps // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return min((step + 1) / warmup, cosine)


def fading(step: int, steps: int, end: float) -> float:
    """Factor on the regularising noise: from 1 by a cubic down to ``end``.

    >>> fading(0, 100, 0.1), fading(100, 100, 0.1)
    (1.0, 0.1)
    """
    return end + (1 - end) * (1 - min(step, steps) / steps) ** 3


def blur(value: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Add normal noise of this scale; a NaN stays one."""
    return value + scale * torch.randn(value.shape, dtype=scale.dtype, device=scale.device, generator=generator)


class AveragedWeights:
    """Exponential average of weights over about the last tenth of all steps, 100 at most (Polyak & Juditsky, 1992)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step number ``step``, from 0, into the average."""
        weight = max(0.01, 9 / (10 + step))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Have the averages in place of the weights."""
        current = [p.detach().clone() for p in self.parameters]
        _assign(self.parameters, self.averages)
        try:
            yield
        finally:
            _assign(self.parameters, current)


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
