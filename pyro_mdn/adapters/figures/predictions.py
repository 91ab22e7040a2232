r"""Draw predictions along x: intervals, draws beside observed targets, aleatoric and epistemic uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pyro_mdn import uncertainty
from pyro_mdn.adapters.density_grids import along, bands, grid_of, lines, one_input, regions, require_output, targets_of
from pyro_mdn.adapters.figures.axes import COLORS, axes_of, decreasing, legend_above, percent, pyplot, scatter, shades
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.quantiles import central_quantile
from pyro_mdn.support.arrays import Array, to_numpy
from pyro_mdn.support.checks import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_observed_vs_sampled", "plot_predictive_intervals", "plot_uncertainty_split"]


@torch.no_grad()
def plot_predictive_intervals(
    mixture: Mixture,
    x: Any,
    y: Any = None,
    *,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    kind: Literal["central", "shortest", "highest density"] = "central",
    output: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw intervals of several probabilities for one output along x, with observed targets.

    Arcs of angles that reach the end of the period go on at its start.

    Args:
        mixture: Predictive distributions ``(N,)`` at x.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        y: Observed targets ``(N, D)``.
        masses: Probabilities, in (0, 1).
        kind: ``"central"`` or ``"shortest"`` as in ``mixture.interval``, with the median; or ``"highest density"``,
            whose regions may have several parts.
        output: Index of the output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or if there is no such output or kind.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> plot_predictive_intervals(MixtureDensityNetwork(1, 1)(x), x, kind="shortest").get_xlabel()
    'x'
    """
    if kind not in ("central", "shortest", "highest density"):
        raise ValueError(f"kind: expected 'central', 'shortest' or 'highest density', got {shown(kind)}")
    x, label, single, order = along(mixture, x, output)
    names, masses = names_of(y, None, mixture.dim), decreasing(masses)
    observed = None if y is None else targets_of(y, len(x), mixture.dim)
    ax = axes_of(ax)
    if kind == "highest density":
        _fill_regions(ax, x, single, masses)
    else:
        for mass, color in zip(masses, shades(len(masses)), strict=True):
            lower, upper = (to_numpy(end[:, 0]) for end in single.interval(mass, kind=kind))
            for i, band in enumerate(bands(single, lower, upper)):
                ax.fill_between(x, *band, color=color, linewidth=0, label="" if i else percent(mass))
        for i, line in enumerate(lines(single, to_numpy(central_quantile(single, 0.5)[:, 0]))):
            ax.plot(x, line, color="black", linewidth=1, label="" if i else "median")
    if observed is not None:
        scatter(ax, x, observed[order, output])
    ax.set(xlabel=label, ylabel=names[output])
    legend_above(ax, title=kind)
    return ax


def _fill_regions(ax: Axes, x: Array, mixture: Mixture, masses: list[float]) -> None:
    grid = grid_of(mixture)
    for mass, above, color in zip(masses, regions(mixture, grid, masses), shades(len(masses)), strict=True):
        ax.contourf(x, to_numpy(grid), to_numpy(above), levels=[0.0, math.inf], colors=[color])
        ax.fill_between([], [], [], color=color, label=percent(mass))


def plot_observed_vs_sampled(
    x: Any, y: Any, sampled: Any, *, output: int = 0, ax: Sequence[Axes] | None = None
) -> list[Axes]:
    """Draw observed and sampled targets side by side, on the same scales.

    Args:
        x: Values of one input, ``(N,)`` or ``(N, 1)``.
        y: Observed targets ``(N, D)``.
        sampled: One draw for each row, ``(N, D)``, such as ``network.sample(x)``.
        output: Index of the output.
        ax: Two axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or there are not two axes.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> axes = plot_observed_vs_sampled(x, x**2, MixtureDensityNetwork(1, 1).sample(x))
    >>> [ax.get_title() for ax in axes]
    ['observed', 'sampled']
    """
    values, label = one_input(x)
    rows = [targets_of(part, len(values)) for part in (y, sampled)]
    if not len(values) or rows[0].shape != rows[1].shape:
        raise ValueError(f"y, sampled: expected one shape, not empty, got {rows[0].shape} and {rows[1].shape}")
    require_output(output, rows[0].shape[1])
    if ax is None:
        ax = pyplot().subplots(1, 2, sharex=True, sharey=True)[1]
    axes = list(np.ravel(np.asarray(ax)))
    if len(axes) != 2:
        raise ValueError(f"ax: expected two axes, got {len(axes)}")
    for axis, part, title in zip(axes, rows, ["observed", "sampled"], strict=True):
        axis.scatter(values, part[:, output], s=8, color=COLORS[0], alpha=0.6, linewidth=0)
        axis.set(title=title, xlabel=label)
    for limits in ("xlim", "ylim"):
        ends = [getattr(axis, f"get_{limits}")() for axis in axes]
        for axis in axes:
            axis.set(**{limits: (min(low for low, _ in ends), max(high for _, high in ends))})
    axes[0].set_ylabel(names_of(y, None, rows[0].shape[1])[output])
    return axes


@torch.no_grad()
def plot_uncertainty_split(mixture: Mixture, x: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Draw aleatoric (noise) and epistemic uncertainty (what the data leave open) of one output along x.

    Both are shown as standard deviations.

    Args:
        mixture: Mixtures ``(S, N)`` at x, for S draws of the weights or S members of an ensemble.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        output: Index of the output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or if there is no such output.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import DeepEnsemble, MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> ensemble = DeepEnsemble(MixtureDensityNetwork(1, 1), size=3)
    >>> plot_uncertainty_split(ensemble.members(x), x).get_ylabel()
    'standard deviation of y'
    """
    if len(mixture.batch_shape) != 2:
        raise ValueError(f"mixture: expected batch shape (S, N), got {tuple(mixture.batch_shape)}")
    names = names_of(None, None, mixture.dim)
    values, label, _, order = along(mixture, x, output)
    ax = axes_of(ax)
    mixture = mixture.double()  # in which the squares of small and large units are in range
    noise, doubt = uncertainty.aleatoric_variance(mixture), uncertainty.epistemic_variance(mixture)
    looks = [{"color": "0.75", "linewidth": 4}, {"color": COLORS[0]}, {"color": COLORS[1], "linestyle": "--"}]
    parts = {"total": noise + doubt, "aleatoric: noise": noise, "epistemic: open": doubt}
    for (name, variance), look in zip(parts.items(), looks, strict=True):
        ax.plot(values, to_numpy(variance.sqrt()[:, output])[order], label=name, **look)
    ax.set(xlabel=label, ylabel=f"standard deviation of {names[output]}")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax
