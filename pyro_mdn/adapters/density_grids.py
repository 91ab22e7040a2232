r"""Evaluate mixtures along one input, and densities over a grid of one output, as arrays for figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.components import not_closed
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.units.circular.circles import Circle
from pyro_mdn.distributions.units.circular.wrapped import WrappedComponents
from pyro_mdn.support.arrays import Array, as_array, columns_of, in_columns, to_numpy
from pyro_mdn.support.checks import shown

__all__ = [
    "ELEMENTS",
    "PIXELS",
    "along",
    "bands",
    "cell_density",
    "grid_of",
    "in_parts",
    "lines",
    "log_thresholds",
    "one_input",
    "pooled",
    "regions",
    "require_output",
    "targets_of",
]

PIXELS = 300
"""Points of a grid that is shown as colours: about as many as a figure has pixels."""

_MOST = 1000
"""Largest number of points of a grid that contours are computed on."""

_QUANTILES = 1000

ELEMENTS = 2**24
"""Numbers in the largest tensor at a time, unless a single point of the grid needs more."""


def require_output(output: Any, dim: int) -> None:
    """Raise a ``ValueError`` unless ``output`` is the index of one of ``dim`` outputs."""
    if not isinstance(output, Integral) or not 0 <= int(output) < dim:
        raise ValueError(f"output: expected one of {dim}, got {shown(output)}")


def along(mixture: Mixture, x: Any, output: int) -> tuple[Array, str, Mixture, Array]:
    """Sort mixtures by x: values of x, its label, the (averaged) mixtures of one output, and the order."""
    values, label = one_input(x)
    mixture = pooled(mixture)
    if mixture.batch_shape != values.shape:
        expected = f"batch shape ({len(values)},) or (S, {len(values)}) for x of shape {values.shape}"
        raise ValueError(f"mixture: expected {expected}, got {tuple(mixture.batch_shape)}")
    if len(np.unique(values)) < 2:
        raise ValueError(f"x: expected two different values at least, got {len(np.unique(values))}")
    require_output(output, mixture.dim)
    order = np.argsort(values, kind="stable")
    return values[order], label, mixture.marginal(output)[torch.from_numpy(order)], order


def one_input(x: Any) -> tuple[Array, str]:
    """Convert one input, numbers or times, to an array; also return its name for a label."""
    columns = columns_of(x)
    name = getattr(x, "name", None) if columns is None else next(iter(columns), None)
    values = to_numpy(x)
    values = values if values.dtype.kind == "M" else as_array(x, "x")
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1:
        raise ValueError(f"x: expected values of one input, (N,) or (N, 1), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("x: expected finite values, got NaN or Inf")
    return values, "x" if name is None else str(name)


def targets_of(y: Any, size: int | None = None, dim: int | None = None) -> Array:
    """Convert targets of any container to an array ``(N, D)``."""
    rows = in_columns(as_array(y, "y"))
    if rows.ndim != 2 or size not in (None, rows.shape[0]) or dim not in (None, rows.shape[1]):
        expected = f"({'N' if size is None else size}, {'D' if dim is None else dim})"
        raise ValueError(f"y: expected shape {expected}, got {rows.shape}")
    return rows


def pooled(mixture: Mixture) -> Mixture:
    """Average over draws of the weights, if the batch shape is ``(S, N)``."""
    return mixture.pool(0) if len(mixture.batch_shape) == 2 else mixture


def grid_of(mixture: Mixture, output: int = 0, *, most: int = _MOST) -> Tensor:
    """Choose points that cover 99.9 % of each distribution of one output, at most ``most``.

    There are two points for each standard deviation of the narrowest component that matters. Those of counts are
    counts.
    """
    single = mixture.marginal(output)
    low, high = float(single.icdf(0.0005).min()), float(single.icdf(0.9995).max())
    if mixture.support.is_discrete:
        step = max(1, math.ceil((high - low + 1) / most))
        return torch.arange(low, high + 1, step, device="cpu").to(mixture.locs)
    count = min(max(PIXELS, round(2 * (high - low) / float(_finest(mixture).min()))), most)
    margin, first, last = 0.05 * (high - low), float(single.icdf(0.0).min()), float(single.icdf(1.0).max())
    low, high = low - margin, high + margin
    if first > low or last < high:  # middles of cells are inside of the support, also where cells reach its ends
        low, high = max(low, first), min(high, last)
        half = 0.5 * (high - low) / count
        low, high = low + half, high - half
    return torch.linspace(low, high, count, device="cpu").to(mixture.locs)


def bands(mixture: Mixture, lower: Array, upper: Array) -> list[tuple[Array, Array]]:
    """Split arcs along x into bands within the period, which go on at its start beyond its end.

    Args:
        mixture: Mixtures of one output. If it is no angle, there is one band, of the ends that are given.
        lower: Lower ends in the order of x, ``(N,)``.
        upper: Upper ends, likewise.
    """
    if (circle := _circle_of(mixture)) is None:
        return [(lower, upper)]
    ends = circle.start, circle.end
    return [(np.clip(low, *ends), np.clip(high, *ends)) for low, high in _turns(circle, lower, upper)]


def lines(mixture: Mixture, values: Array) -> list[Array]:
    """Split a line of angles along x at the ends of the period, as :func:`bands` does."""
    if (circle := _circle_of(mixture)) is None:
        return [values]
    turns = [line for line, _ in _turns(circle, values, values)]
    return [np.where((line >= circle.start) & (line <= circle.end), line, np.nan) for line in turns]


def _circle_of(mixture: Mixture) -> Circle | None:
    components = mixture.components
    return components.circles.of_outputs[0] if isinstance(components, WrappedComponents) else None


def _turns(circle: Circle, lower: Array, upper: Array) -> list[tuple[Array, Array]]:
    """Copies of arcs at all turns that meet the period, without a jump where an end passes that of the period."""
    begun = np.unwrap(lower, period=circle.period)
    ended = begun + np.minimum(upper - lower, circle.period)
    first = math.ceil((circle.start - ended.max()) / circle.period)
    last = math.floor((circle.end - begun.min()) / circle.period)
    return [(begun + turn * circle.period, ended + turn * circle.period) for turn in range(first, last + 1)]


def _finest(mixture: Mixture) -> Tensor:
    """Find the smallest standard deviation of an output (given the other one of two) of components that matter."""
    conditional = mixture.components.narrowest()
    matter = mixture.logits.exp() > 0.05 / mixture.n_components
    return conditional.expand(mixture.logits.shape).masked_fill(~matter, math.inf).min(-1).values


def cell_density(mixture: Mixture, grid: Tensor) -> Tensor:
    """Compute the mean density within half a step of each point, ``(points, N)``, which sees the narrowest modes."""
    step = grid[1] - grid[0] if len(grid) > 1 else grid.new_ones(())
    ends = torch.cat([grid - step / 2, grid[-1:] + step / 2])
    return in_parts(mixture.cdf, ends[:, None, None], mixture).diff(dim=0).squeeze(-1) / step


def regions(mixture: Mixture, grid: Tensor, masses: list[float]) -> Iterator[Tensor]:
    """Yield, for each probability, ``(points, N)`` numbers that are positive inside the region of highest density.

    Where a mode is narrower than a step of the grid, the region consists of whole cells, so that no mode is lost
    between two points.
    """
    density, step = cell_density(mixture, grid), grid[1] - grid[0]
    coarse, narrow = density.clamp(min=torch.finfo(density.dtype).tiny).log(), _finest(mixture) < step
    shown = torch.where(narrow, coarse, in_parts(mixture.log_prob, grid[:, None, None], mixture))
    falling = coarse.sort(0, descending=True).values
    inside = falling.exp().cumsum(0) * step
    for mass, threshold in zip(masses, log_thresholds(mixture, masses), strict=True):
        last = (inside < mass).sum(0, keepdim=True).clamp(max=len(grid) - 1)
        of_cells = falling.gather(0, last).squeeze(0) - math.log(2)  # at the last cell itself the region is a point
        yield shown - torch.where(narrow, torch.minimum(threshold, of_cells), threshold)


def log_thresholds(mixture: Mixture, masses: list[float]) -> list[Tensor]:
    """Compute the log-density at the border of regions of highest density, ``(N,)`` for each probability.

    This is ``mixture.highest_density_threshold`` for one output, with equally likely quantiles of the components in
    place of random draws.
    """
    weights = mixture.logits.double().exp()
    reached = weights.cumsum(-1)
    level = (torch.arange(_QUANTILES, device=weights.device).to(weights) + 0.5) / _QUANTILES
    component = torch.searchsorted(reached, level.expand(len(weights), -1).contiguous()).clamp(
        max=weights.shape[-1] - 1
    )
    share = (level - (reached - weights).gather(-1, component)) / weights.gather(-1, component)
    inner, logits = mixture.components.inner, mixture.logits
    try:
        locs, scale, law = inner.univariate()
    except NotImplementedError:
        not_closed("kind='highest density'", mixture.components, "'shortest' is")

    def picked(tensor: Tensor) -> Tensor:
        return tensor.squeeze(-2).expand(logits.shape).gather(-1, component)

    standard = law.map(lambda t, n: picked(t)).two_sided_quantile(share.clamp(1e-6, 1 - 1e-6).to(locs))
    points = picked(locs) + picked(scale) * standard
    log_density = in_parts(mixture.log_prob, mixture.components.from_inner(points.mT.unsqueeze(-1)), mixture)
    ranks = [min(max(round((1 - mass) * _QUANTILES), 1), _QUANTILES) for mass in masses]
    return [log_density.kthvalue(rank, 0).values for rank in ranks]


def in_parts(
    function: Callable[[Tensor], Tensor], points: Tensor, mixture: Mixture, *, elements: int = ELEMENTS
) -> Tensor:
    """Evaluate a function of a mixture at ``(points, ...)``, in parts that bound the memory.

    Args:
        function: A method of the mixture, such as ``mixture.cdf``.
        points: Points ``(points, *batch, D)``; the function is evaluated at each of the first dimension.
        mixture: The mixture, whose batch shape and number of components say what one point needs.
        elements: Numbers in the largest tensor of a part, where one point does not need more.
    """
    one = torch.broadcast_shapes(points.shape[1:-1], mixture.batch_shape).numel() * mixture.n_components * mixture.dim
    return torch.cat([function(part) for part in points.split(max(1, elements // one))])
