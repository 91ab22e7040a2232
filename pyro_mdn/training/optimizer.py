r"""AdamW, gradient clipping and averaged weights: the parts of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_mdn.support.torch_compat import adam, foreach_lerp_, foreach_mul_, foreach_norm
from pyro_mdn.tensors.numerics import negligible, single_at_least

__all__ = ["AveragedWeights", "FusedAdamW", "adamw", "clip_", "joint_norm"]


def adamw(objective: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Build torch's AdamW, with decoupled weight decay of weight matrices alone (Loshchilov & Hutter, 2019)."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


class FusedAdamW:
    """AdamW of all parameters in one call, with decoupled weight decay of weight matrices (Loshchilov & Hutter, 2019).

    It computes what the optimiser of :func:`adamw` computes. For small networks, a step in the optimisers of torch
    takes as long as the network itself.

    Args:
        parameters: Parameters to train.
        matrix_dim: Number of dimensions of a weight matrix.
    """

    def __init__(self, parameters: Sequence[Tensor], matrix_dim: int = 2) -> None:
        self.parameters = list(parameters)
        self.matrices = [p for p in self.parameters if p.ndim >= matrix_dim]
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """Change all parameters that have a gradient; weight matrices shrink by ``lr * weight_decay`` of themselves."""
        if weight_decay and (matrices := [p for p in self.matrices if p.grad is not None]):
            foreach_mul_(matrices, 1 - lr * weight_decay)
        state = zip(self.parameters, self.means, self.squares, self.steps, strict=True)
        used = [(p, p.grad, *moments) for p, *moments in state if p.grad is not None]
        parameters, gradients, means, squares, steps = map(list, zip(*used, strict=True))
        settings: dict[str, Any] = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        adam(parameters, gradients, means, squares, [], steps, fused=True, lr=lr, maximize=False, **settings)

    @torch.no_grad()
    def flush(self) -> None:
        """Set negligible moments to 0 before they decay to subnormal numbers, which are slow."""
        for moment in (*self.means, *self.squares):
            torch.hardshrink(moment, negligible(moment.dtype), out=moment)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Collect everything that the next step depends on, by name."""
        named = {"mean": self.means, "square": self.squares, "step": self.steps}
        return {f"{name}.{i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the joint norm of all gradients."""
    return torch.stack(foreach_norm(gradients)).norm()


def clip_(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Clip gradients of this joint norm: scale them down if it is larger than ``max_norm``."""
    if norm > max_norm:
        foreach_mul_(gradients, max_norm / norm)


class AveragedWeights:
    """Exponential moving average of weights over about the last tenth of all steps, 100 at most.

    Averaged weights often generalise better than the last ones, as in stochastic weight averaging. The averages are in
    single precision at least, because steps of a hundredth would be lost in bfloat16.

    References:
        Polyak & Juditsky (1992), Acceleration of stochastic approximation by averaging.
        Izmailov et al. (2018), Averaging weights leads to wider optima and better generalization.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().to(single_at_least(p.dtype), copy=True) for p in self.parameters]
        self.widened = any(p.dtype != average.dtype for p, average in zip(self.parameters, self.averages, strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step number ``step``, counted from 0, to the average."""
        weight = max(0.01, 9 / (10 + step))
        pairs = zip(self.parameters, self.averages, strict=True)
        current = [p.to(average.dtype) for p, average in pairs] if self.widened else self.parameters
        foreach_lerp_(self.averages, current, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the weights by their averages inside this context."""
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
