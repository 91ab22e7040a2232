r"""Conditional density of one output along x, and joint density of two outputs at one x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_mdn.adapters.density_grids import PIXELS, along, cell_density, grid_of, in_parts, targets_of
from pyro_mdn.adapters.figures.axes import axes_of, decreasing, legend_above, percent, scatter, shades
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.parameters import check_dims
from pyro_mdn.support.arrays import to_numpy
from pyro_mdn.support.process_state import seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_conditional_density"]


@torch.no_grad()
def plot_conditional_density(
    mixture: Mixture,
    x: Any = None,
    y: Any = None,
    *,
    output: int | tuple[int, int] | None = None,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    output_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the density of one output along x, or the joint density of two outputs at one x, with observed targets.

    Args:
        mixture: Predictive distributions ``(N,)`` at x; or one distribution, of batch shape ``()``, for two outputs.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order. Without x, the figure has contours of two outputs.
        y: Observed targets ``(N', D)`` to draw as points; with x, they are at x, and N' has to be N.
        output: Index of the output, or of the two outputs; by default the first ones.
        masses: Probabilities of the regions of highest density that the contours enclose.
        output_names: Names of all outputs; by default those of y.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or if there is no such output.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> plot_conditional_density(MixtureDensityNetwork(1, 1)(x), x).get_ylabel()
    'y'
    """
    if x is None:
        return _plot_joint_density(mixture, y, (0, 1) if output is None else output, masses, output_names, ax)
    output = 0 if output is None else output
    if isinstance(output, tuple):
        raise ValueError(f"output: expected one output along x, got {output}")
    x, label, single, order = along(mixture, x, output)
    names = names_of(y, output_names, mixture.dim)
    observed = None if y is None else targets_of(y, len(x), mixture.dim)
    ax = axes_of(ax)
    grid = grid_of(single, most=PIXELS)  # with more rows than pixels, narrow modes could be left out
    density = to_numpy(cell_density(single, grid))
    counts = single.support.is_discrete
    shading = "nearest" if counts else "gouraud"
    shown = ax.pcolormesh(x, to_numpy(grid), density, cmap="Blues", vmin=0, shading=shading, rasterized=True)
    ax.figure.colorbar(shown, ax=ax, label="probability" if counts else "density")
    if observed is not None:
        scatter(ax, x, observed[order, output])
    ax.set(xlabel=label, ylabel=names[output])
    return ax


def _plot_joint_density(
    mixture: Mixture,
    y: Any,
    output: int | tuple[int, int],
    masses: Sequence[float],
    names: Sequence[str] | None,
    ax: Axes | None,
) -> Axes:
    if mixture.batch_shape or np.shape(output) != (2,):
        expected = "one mixture, of batch shape (), and two outputs; or x"
        raise ValueError(f"mixture, output: expected {expected}, got {tuple(mixture.batch_shape)} and {output}")
    pair, masses = check_dims(output, mixture.dim), decreasing(masses)
    observed = None if y is None else targets_of(y, dim=mixture.dim)
    names = names_of(y, names, mixture.dim)
    mixture = mixture.marginal(pair)
    ax = axes_of(ax)
    first, second = grid_of(mixture, 0), grid_of(mixture, 1)
    points = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    log_density = to_numpy(in_parts(mixture.log_prob, points, mixture))
    with seeded(0):  # the thresholds are by Monte Carlo: a figure should stay the same
        levels = [float(mixture.highest_density_threshold(mass)) for mass in masses]
    for level, mass, color in zip(levels, masses, shades(len(masses)), strict=True):
        ax.contourf(to_numpy(first), to_numpy(second), log_density, levels=[level, math.inf], colors=[color])
        ax.fill_between([], [], [], color=color, label=percent(mass))
    if observed is not None:
        scatter(ax, observed[:, pair[0]], observed[:, pair[1]])
    ax.set(xlabel=names[pair[0]], ylabel=names[pair[1]])
    legend_above(ax, title="highest density")
    return ax
