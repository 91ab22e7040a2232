r"""Expected distance of two draws from a univariate Gaussian mixture, with gradients by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import erf

from pyro_mdn.support.checks import is_subclassed
from pyro_mdn.tensors.numerics import exp

__all__ = ["half_spread"]


def half_spread(weights: Tensor, locs: Tensor, variance: Tensor) -> Tensor:
    """Compute half of E|Y - Y'|, ``(*batch)``, from parameters ``(*batch, K)``; the result is differentiable once."""
    if is_subclassed(weights, locs, variance):  # subclasses of tensors do not see inside an autograd function
        distances = [_against_all(k, weights, locs, variance)[0] for k in range(locs.shape[-1])]
        return 0.5 * (weights * torch.stack(distances, -1)).sum(-1)
    return _HalfSpread.apply(weights, locs, variance)[0]


class _HalfSpread(torch.autograd.Function):
    """Half of E|Y - Y'|, computed for one component against all at a time, so that memory stays O(N·K).

    The gradients with respect to weights, locations and variances are sums over the same pairs. They are computed in
    the same pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, locs: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Allocated first: small tensors kept between large temporary ones would fragment the memory.
        distance, slope, density = (torch.empty_like(locs) for _ in range(3))
        for k in range(locs.shape[-1]):
            distance[..., k], slope[..., k], density[..., k] = _against_all(k, weights, locs, variance)
        return 0.5 * (weights * distance).sum(-1), distance, weights * slope, weights * density

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(grads[0].unsqueeze(-1) * gradient for gradient in ctx.saved_tensors)


def _against_all(k: int, weights: Tensor, locs: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute weighted sums over all components l of E|Y_k - Y_l| and of its derivatives, ``(*batch)`` each."""
    apart, scale = locs[..., k, None] - locs, (variance[..., k, None] + variance).sqrt()
    ratio = apart / scale
    density = exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    slope = erf(math.sqrt(0.5) * ratio)
    distance = 2 * scale * density + apart * slope
    return (weights * distance).sum(-1), (weights * slope).sum(-1), (weights * density / scale).sum(-1)
