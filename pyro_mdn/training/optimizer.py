r"""Optimiser, schedules, averaged weights and noise: pure pieces that training loops are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_mdn.support.torch_compat import adam, foreach_lerp_, foreach_mul_, foreach_norm
from pyro_mdn.tensors.kernels import negligible

__all__ = [
    "AveragedWeights",
    "FusedAdamW",
    "adamw",
    "blur",
    "clip_",
    "default_weight_decay",
    "fading",
    "joint_norm",
    "warmup_cosine",
]

# Chosen on held-out parts of training rows and on simulated data: benchmarks/ablation.py.
LEARNING_RATE = 0.02
INPUT_NOISE = 0.1
TARGET_NOISE = 0.1
FINAL_NOISE = 0.03
STEPS = 9000


def default_weight_decay(rows: float) -> float:
    """Pull of a fixed prior on the weights, which matters less the more rows there are: 20 over their number.

    >>> default_weight_decay(1000), default_weight_decay(5)
    (0.02, 0.5)
    """
    return min(0.5, 20 / rows)


def adamw(objective: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW whose decoupled decay acts on weight matrices alone (Loshchilov & Hutter, 2019)."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


class FusedAdamW:
    """Adam of all parameters in one call, and the decoupled decay of weight matrices (Loshchilov & Hutter, 2019).

    What :func:`adamw` computes; a step of small networks takes as long in the optimisers of torch as in the network.

    Args:
        parameters: What to change, by their gradients.
        weight_decay: Share of the learning rate by which matrices shrink in each step.
        matrix_dim: Dimensions of a matrix.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float, matrix_dim: int = 2) -> None:
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.matrices = [p for p in self.parameters if p.ndim >= matrix_dim]
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Change all parameters that have a gradient."""
        if self.weight_decay and (matrices := [p for p in self.matrices if p.grad is not None]):
            foreach_mul_(matrices, 1 - lr * self.weight_decay)
        state = zip(self.parameters, self.means, self.squares, self.steps, strict=True)
        used = [(p, p.grad, *moments) for p, *moments in state if p.grad is not None]
        parameters, gradients, means, squares, steps = map(list, zip(*used, strict=True))
        settings: dict[str, Any] = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        adam(parameters, gradients, means, squares, [], steps, fused=True, lr=lr, maximize=False, **settings)

    @torch.no_grad()
    def flush(self) -> None:
        """Set moments to 0 where they have decayed too far to matter, before they become subnormal numbers."""
        for moment in (*self.means, *self.squares):
            torch.hardshrink(moment, negligible(moment.dtype), out=moment)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        named = {"mean": self.means, "square": self.squares, "step": self.steps}
        return {f"{name}.{i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}


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


def blur(value: Tensor, scale: Tensor, factor: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Add normal noise of ``factor`` times this scale; a NaN stays one."""
    noise = torch.randn(value.shape, dtype=scale.dtype, device=scale.device, generator=generator)
    return torch.addcmul(value, scale, noise, value=factor)


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all of these together."""
    return torch.stack(foreach_norm(gradients)).norm()


def clip_(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of this joint norm down to one of ``max_norm``, if it is larger."""
    if norm > max_norm:
        foreach_mul_(gradients, max_norm / norm)


class AveragedWeights:
    """Exponential average of weights over about the last tenth of all steps, 100 at most (Polyak & Juditsky, 1992).

    In single precision at least: steps of a hundredth would be lost in bfloat16.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.parameters]
        self.widened = any(p.dtype != average.dtype for p, average in zip(self.parameters, self.averages, strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step number ``step``, from 0, into the average."""
        weight = max(0.01, 9 / (10 + step))
        pairs = zip(self.parameters, self.averages, strict=True)
        current = [p.to(average.dtype) for p, average in pairs] if self.widened else self.parameters
        foreach_lerp_(self.averages, current, weight)

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
