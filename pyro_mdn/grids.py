r"""Grids: mixtures along one input and densities over one output, as arrays that a figure shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.labels import Array, to_numpy
from pyro_mdn.mixture import GaussianMixture

__all__ = ["above_threshold", "along", "grid_of", "one_input", "pooled", "targets_of"]

_RESOLUTION = 300


def along(mixture: GaussianMixture, x: Any, output: int) -> tuple[Array, str, GaussianMixture, Array]:
    """Sorted values of x, its label, the average mixtures of one output in that order, and the order."""
    values, label = one_input(x)
    mixture = pooled(mixture)
    if mixture.batch_shape != values.shape or not len(values):
        expected = f"batch shape ({len(values)},) or (S, {len(values)}) for x of shape {values.shape}"
        raise ValueError(f"mixture: expected {expected}, got {tuple(mixture.batch_shape)}")
    if not 0 <= output < mixture.dim:
        raise ValueError(f"output: expected one of {mixture.dim}, got {output}")
    order = np.argsort(values, kind="stable")
    sorted_ = mixture.marginal(output)._flat(mixture.batch_shape)._pick(torch.as_tensor(order))
    return values[order], label, sorted_, order


def one_input(x: Any) -> tuple[Array, str]:
    """Values of one input, and what to call it."""
    columns = getattr(x, "columns", None)
    name = getattr(x, "name", None) if columns is None else columns[0]
    values = to_numpy(x)
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1:
        raise ValueError(f"x: expected values of one input, (N,) or (N, 1), got {values.shape}")
    return values, "x" if name is None else str(name)


def targets_of(y: Any, size: int) -> Array:
    """Targets ``(N, D)`` of any kind."""
    rows = to_numpy(y)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != size:
        raise ValueError(f"y: expected shape ({size}, D), got {rows.shape}")
    return rows


def pooled(mixture: GaussianMixture) -> GaussianMixture:
    """Average over draws of the weights, if the batch shape is ``(S, N)``."""
    return mixture.pool(0) if len(mixture.batch_shape) == 2 else mixture


def grid_of(mixture: GaussianMixture, margin: float = 0.05) -> Tensor:
    """Points over all but a thousandth of each distribution of one output."""
    low, high = mixture.icdf(0.0005).min(), mixture.icdf(0.9995).max()
    margin = margin * float(high - low)
    return torch.linspace(float(low) - margin, float(high) + margin, _RESOLUTION).to(mixture.locs)


def above_threshold(mixture: GaussianMixture, grid: Tensor, mass: float) -> Tensor:
    """Log-density minus that at the border of the region of highest density with this probability, ``(points, N)``."""
    log_density = mixture.log_prob(grid[:, None, None])
    falling = log_density.sort(0, descending=True).values
    inside = falling.exp().cumsum(0) * (grid[1] - grid[0])
    last = (inside < mass).sum(0, keepdim=True).clamp(1, len(grid) - 1)
    (below, above), (high, low) = ((t.gather(0, last - 1), t.gather(0, last)) for t in (inside, falling))
    share = ((mass - below) / (above - below)).clamp(0, 1)
    return log_density - (high + share * (low - high))
