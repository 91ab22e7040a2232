r"""Figures; the only importer of matplotlib. Every function takes axes and returns them, and changes no style.

Mixtures of batch shape ``(S, N)``, by draws of the weights, are averaged. Colours are told apart by colour-blind
readers, and lines also by their style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pyro_mdn import uncertainty
from pyro_mdn.adapters.density_grids import (
    PIXELS,
    along,
    cell_density,
    grid_of,
    in_parts,
    one_input,
    pooled,
    regions,
    targets_of,
)
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.distributions.gaussian.mixture import GaussianMixture
from pyro_mdn.distributions.parameters import check_dims
from pyro_mdn.support.arrays import Array, as_array, to_numpy
from pyro_mdn.support.checks import shown
from pyro_mdn.support.process_state import seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_calibration",
    "plot_components",
    "plot_conditional_density",
    "plot_observed_vs_sampled",
    "plot_pit",
    "plot_predictive_intervals",
    "plot_training",
    "plot_uncertainty_split",
]

# Okabe & Ito (2008): distinguishable for all, in the order of their lightness as far as it goes.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_STYLES = ["-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2))]


# Densities


@torch.no_grad()
def plot_conditional_density(
    mixture: GaussianMixture,
    x: Any = None,
    y: Any = None,
    *,
    output: int | tuple[int, int] | None = None,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    output_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the density of one output along x, or the joint density of two at one x, with what was observed.

    Args:
        mixture: Predictive distributions ``(N,)`` at x; or one, of batch shape ``()``, for two outputs.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order. Without it there are contours of two outputs.
        y: Observed targets ``(N', D)`` to draw over it: at x, where there is one, and N' is N.
        output: Which output, or which two; by default the first ones.
        masses: Probabilities of the regions of highest density that the contours enclose.
        output_names: Names of all outputs; by default those of y.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or there is no such output.
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
    ax = _axes(ax)
    grid = grid_of(single, most=PIXELS)  # with more rows than pixels, narrow modes could be left out
    density = to_numpy(cell_density(single, grid))
    shown = ax.pcolormesh(x, to_numpy(grid), density, cmap="Blues", vmin=0, shading="gouraud", rasterized=True)
    ax.figure.colorbar(shown, ax=ax, label="density")
    if observed is not None:
        _scatter(ax, x, observed[order, output])
    ax.set(xlabel=label, ylabel=names[output])
    return ax


def _plot_joint_density(
    mixture: GaussianMixture,
    y: Any,
    output: int | tuple[int, int],
    masses: Sequence[float],
    names: Sequence[str] | None,
    ax: Axes | None,
) -> Axes:
    if mixture.batch_shape or isinstance(output, int) or len(output) != 2:
        expected = "one mixture, of batch shape (), and two outputs; or x"
        raise ValueError(f"mixture, output: expected {expected}, got {tuple(mixture.batch_shape)} and {output}")
    pair, masses = check_dims(output, mixture.dim), _decreasing(masses)
    observed = None if y is None else targets_of(y, dim=mixture.dim)
    names = names_of(y, names, mixture.dim)
    mixture = mixture.marginal(pair)
    ax = _axes(ax)
    first, second = grid_of(mixture, 0), grid_of(mixture, 1)
    points = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    log_density = to_numpy(in_parts(mixture.log_prob, points, mixture))
    with seeded(0):  # the thresholds are by Monte Carlo: a figure should stay the same
        levels = [float(mixture.highest_density_threshold(mass)) for mass in masses]
    for level, mass, color in zip(levels, masses, _shades(len(masses)), strict=True):
        ax.contourf(to_numpy(first), to_numpy(second), log_density, levels=[level, math.inf], colors=[color])
        ax.fill_between([], [], [], color=color, label=_percent(mass))
    if observed is not None:
        _scatter(ax, observed[:, pair[0]], observed[:, pair[1]])
    ax.set(xlabel=names[pair[0]], ylabel=names[pair[1]])
    _legend_above(ax, title="highest density")
    return ax


@torch.no_grad()
def plot_components(mixture: GaussianMixture, x: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Draw mean, standard deviation and weight of each component of one output along x.

    Bands are means ± one standard deviation, the more opaque the larger the weight. Where that is below a hundredth
    nothing is drawn.

    Args:
        mixture: Predictive distributions ``(N,)`` at x.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        output: Which output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, if mixtures are by several draws of the weights, whose components do not
            correspond, or there is no such output.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> plot_components(MixtureDensityNetwork(1, 1)(x), x).get_xlabel()
    'x'
    """
    if len(mixture.batch_shape) != 1:
        raise ValueError(f"mixture: expected batch shape (N,), got {tuple(mixture.batch_shape)}")
    names = names_of(None, None, mixture.dim)
    x, label, mixture, _ = along(mixture, x, output)
    ax = _axes(ax)
    weights, means = to_numpy(mixture.logits.exp()), to_numpy(mixture.locs[..., 0])
    scales = to_numpy(mixture.components.stddev().expand(mixture.locs.shape)[..., 0])
    for k, (weight, mean, scale) in enumerate(zip(weights.T, means.T, scales.T, strict=True)):
        color, shown = _COLORS[k % 7], np.where(weight < 0.01, np.nan, mean)
        legend = f"{k + 1}: weight {weight.min():.2f} to {weight.max():.2f}"
        ax.plot(x, shown, color=color, linestyle=_STYLES[k % 5], label=legend)
        _shade(ax, x, shown - scale, shown + scale, weight, color)
    _number(ax, x, means, weights)
    ax.set(xlabel=label, ylabel=f"{names[output]}: mean ± std of components")
    _legend_above(ax, fontsize="small", title="component")
    return ax


def _number(ax: Axes, x: Array, means: Array, weights: Array) -> None:
    """Write the number of each component on its mean, where its weight is large and no other number is near."""
    shown = weights.max(0) >= 0.01
    span = np.ptp(means[weights >= 0.01]) or 1.0
    places = np.stack(np.broadcast_arrays(np.linspace(0, 1, len(x))[:, None], means / span), -1)
    taken: list[Array] = []
    for k in np.flatnonzero(shown):
        room = [np.hypot(*(places[:, k] - place).T) for place in taken]
        free = np.minimum(np.min(room, 0), 0.1) if room else np.full(len(x), 0.1)
        allowed = weights[:, k] >= 0.5 * weights[:, k].max()
        best = np.lexsort((weights[:, k], np.where(allowed, free, -1.0)))[-1]
        taken.append(places[best, k])
        box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
        text = ax.annotate(str(k + 1), (x[best], means[best, k]), ha="center", va="center", weight="bold")
        text.set_bbox(box)


def _shade(ax: Axes, x: Array, lower: Array, upper: Array, weight: Array, color: str) -> None:
    """Fill between two lines, the more opaque the larger the weight."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    corners = np.stack([np.stack([ax.convert_xunits(x), ends], -1) for ends in (lower, upper)])
    pieces = np.stack([corners[0, :-1], corners[0, 1:], corners[1, 1:], corners[1, :-1]], 1)
    opacity = 0.7 * np.sqrt((weight[:-1] + weight[1:]) / 2)
    drawn = np.isfinite(pieces).all((1, 2))
    colors = [to_rgba(color, float(alpha)) for alpha in opacity[drawn]]
    ax.add_collection(PolyCollection(list(pieces[drawn]), facecolors=colors, linewidth=0, rasterized=True))
    ax.autoscale_view()


@torch.no_grad()
def plot_predictive_intervals(
    mixture: GaussianMixture,
    x: Any,
    y: Any = None,
    *,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    kind: Literal["central", "shortest", "highest density"] = "central",
    output: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw intervals of several probabilities for one output along x, with what was observed.

    Args:
        mixture: Predictive distributions ``(N,)`` at x.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        y: Observed targets ``(N, D)``.
        masses: Probabilities, in (0, 1).
        kind: ``"central"`` and ``"shortest"`` as in ``mixture.interval``, with the median; regions of ``"highest
            density"`` may have several parts.
        output: Which output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or there is no such output or kind.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> plot_predictive_intervals(MixtureDensityNetwork(1, 1)(x), x, kind="shortest").get_xlabel()
    'x'
    """
    if kind not in ("central", "shortest", "highest density"):
        raise ValueError(f"kind: expected 'central', 'shortest' or 'highest density', got {shown(kind)}")
    x, label, single, order = along(mixture, x, output)
    names, masses = names_of(y, None, mixture.dim), _decreasing(masses)
    observed = None if y is None else targets_of(y, len(x), mixture.dim)
    ax = _axes(ax)
    if kind == "highest density":
        _fill_regions(ax, x, single, masses)
    else:
        for mass, color in zip(masses, _shades(len(masses)), strict=True):
            lower, upper = (to_numpy(end[:, 0]) for end in single.interval(mass, kind=kind))
            ax.fill_between(x, lower, upper, color=color, linewidth=0, label=_percent(mass))
        ax.plot(x, to_numpy(single.icdf(0.5)[:, 0]), color="black", linewidth=1, label="median")
    if observed is not None:
        _scatter(ax, x, observed[order, output])
    ax.set(xlabel=label, ylabel=names[output])
    _legend_above(ax, title=kind)
    return ax


def _fill_regions(ax: Axes, x: Array, mixture: GaussianMixture, masses: list[float]) -> None:
    grid = grid_of(mixture)
    for mass, above, color in zip(masses, regions(mixture, grid, masses), _shades(len(masses)), strict=True):
        ax.contourf(x, to_numpy(grid), to_numpy(above), levels=[0.0, math.inf], colors=[color])
        ax.fill_between([], [], [], color=color, label=_percent(mass))


def plot_observed_vs_sampled(
    x: Any, y: Any, sampled: Any, *, output: int = 0, ax: Sequence[Axes] | None = None
) -> list[Axes]:
    """Draw observed and sampled targets side by side, on the same scales.

    Args:
        x: Values of one input, ``(N,)`` or ``(N, 1)``.
        y: Observed targets ``(N, D)``.
        sampled: One draw for each, ``(N, D)``, as from ``network.sample(x)``.
        output: Which output.
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
    if not len(values) or rows[0].shape != rows[1].shape or not 0 <= output < rows[0].shape[1]:
        shapes = f"{rows[0].shape} and {rows[1].shape}"
        raise ValueError(f"y, sampled: expected one shape, not empty, with an output {output}, got {shapes}")
    if ax is None:
        ax = _pyplot().subplots(1, 2, sharex=True, sharey=True)[1]
    axes = list(np.ravel(np.asarray(ax)))
    if len(axes) != 2:
        raise ValueError(f"ax: expected two axes, got {len(axes)}")
    for axis, part, title in zip(axes, rows, ["observed", "sampled"], strict=True):
        axis.scatter(values, part[:, output], s=8, color=_COLORS[0], alpha=0.6, linewidth=0)
        axis.set(title=title, xlabel=label)
    for limits in ("xlim", "ylim"):
        ends = [getattr(axis, f"get_{limits}")() for axis in axes]
        for axis in axes:
            axis.set(**{limits: (min(low for low, _ in ends), max(high for _, high in ends))})
    axes[0].set_ylabel(names_of(y, None, rows[0].shape[1])[output])
    return axes


# Calibration


def plot_pit(
    pit: Any, *, level: float = 0.95, output_names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    r"""Draw how far the distribution of transforms is from uniform, with a simultaneous band.

    .. math:: \hat F(u) - u

    A line inside the band everywhere is what independent uniform numbers show with probability ``level``. Too narrow
    predictions lie above it on the left and below it on the right; too wide ones the other way round.

    Args:
        pit: Transforms ``(N,)`` or ``(N, D)``, as by :func:`pyro_mdn.scores.pit`; NaN are left out.
        level: Probability of the band, which is that of the output with the fewest transforms.
        output_names: Names of the outputs.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If there are none, or some are outside [0, 1].
        ImportError: If matplotlib is not installed.

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison.

    >>> plot_pit(torch.rand(100)).get_xlabel()
    'probability integral transform u'
    """
    from pyro_mdn.calibration import ecdf_band

    rows = as_array(pit, "pit")
    rows = rows[:, None] if rows.ndim == 1 else rows
    observed = [column[~np.isnan(column)] for column in rows.T] if rows.ndim == 2 else []
    if rows.ndim != 2 or not all(len(u) and ((u >= 0) & (u <= 1)).all() for u in observed):
        raise ValueError(f"pit: expected numbers in [0, 1], (N,) or (N, D), got shape {np.shape(pit)}")
    names = names_of(pit, output_names, len(observed))
    ax = _axes(ax)
    points = np.linspace(0, 1, 101)[1:-1]
    lower, upper = ecdf_band(min(map(len, observed)), points, level)
    ends = np.concatenate([[0.0], points, [1.0]])
    band = (np.pad(lower - points, 1), np.pad(upper - points, 1))
    ax.fill_between(ends, *band, color="0.85", linewidth=0, label=f"{100 * level:g} % band")
    ax.axhline(0.0, color="0.5", linewidth=0.8)
    for i, (u, name) in enumerate(zip(observed, names, strict=True)):
        ecdf = (u[:, None] <= ends).mean(0)
        ax.plot(ends, ecdf - ends, color=_COLORS[i % 7], linestyle=_STYLES[i % 5], label=name)
    ax.set(xlabel="probability integral transform u", ylabel="empirical CDF − uniform CDF", xlim=(0, 1))
    ax.set_ylim(top=1.4 * ax.get_ylim()[1])  # room for the legend
    ax.legend(frameon=False, loc="upper right", ncols=2)
    return ax


@torch.no_grad()
def plot_calibration(
    mixture: GaussianMixture,
    y: Any,
    *,
    masses: Sequence[float] | None = None,
    level: float = 0.95,
    output_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many targets lie in central intervals against their probability, with a pointwise binomial band.

    Args:
        mixture: Predictive distributions ``(N,)``.
        y: Observed targets ``(N, D)``; NaN are left out.
        masses: Probabilities of the intervals; by default 0.05 to 0.95.
        level: Probability of the band at each point.
        output_names: Names of the outputs.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> plot_calibration(MixtureDensityNetwork(1, 1)(x), x**2).get_xlabel()
    'probability of the interval'
    """
    from scipy.stats import binom

    from pyro_mdn.calibration import coverage_table

    mixture = pooled(mixture)
    targets = torch.tensor(targets_of(y, mixture.batch_shape.numel(), mixture.dim), device="cpu").to(mixture.locs)
    nominal = np.linspace(0.05, 0.95, 19) if masses is None else np.sort(np.asarray(masses, dtype=float))
    if not 0 < level < 1:
        raise ValueError(f"level: expected a probability in (0, 1), got {shown(level)}")
    names = names_of(y, output_names, mixture.dim)
    table = coverage_table(mixture, targets, nominal.tolist())
    ax = _axes(ax)
    count = int((~targets.isnan()).sum(0).min())
    band = [end / count for end in binom.interval(level, count, nominal)]
    ax.fill_between(nominal, *band, color="0.85", linewidth=0, label=f"{100 * level:g} % band")
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    for i, name in enumerate(names):
        ax.plot(nominal, to_numpy(table.coverage[:, i]), color=_COLORS[i % 7], linestyle=_STYLES[i % 5], label=name)
    ax.set(xlabel="probability of the interval", ylabel="share of targets inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, loc="upper left")
    return ax


@torch.no_grad()
def plot_uncertainty_split(mixture: GaussianMixture, x: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Draw what is noise and what the data leave open along x, as standard deviations of one output.

    Args:
        mixture: Mixtures ``(S, N)`` by draws of the weights, or members of an ensemble, at x.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        output: Which output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, or there is no such output.
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
    ax = _axes(ax)
    # In double precision, where the squares of small and large units are in range.
    mixture = mixture.double()
    noise, doubt = uncertainty.aleatoric_variance(mixture), uncertainty.epistemic_variance(mixture)
    looks = [{"color": "0.75", "linewidth": 4}, {"color": _COLORS[0]}, {"color": _COLORS[1], "linestyle": "--"}]
    parts = {"total": noise + doubt, "aleatoric: noise": noise, "epistemic: open": doubt}
    for (name, variance), look in zip(parts.items(), looks, strict=True):
        ax.plot(values, to_numpy(variance.sqrt()[:, output])[order], label=name, **look)
    ax.set(xlabel=label, ylabel=f"standard deviation of {names[output]}")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


# Training


def plot_training(result: Any, *, ax: Axes | None = None) -> Axes:
    """Draw training and validation loss by epoch, and mark the epoch whose weights were kept.

    Args:
        result: What :func:`pyro_mdn.fit` returned.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If there is no epoch to draw.
        ImportError: If matplotlib is not installed.
    """
    if not result.history:
        raise ValueError("result: expected one epoch at least, got an empty history")
    ax = _axes(ax)
    epochs = [row["epoch"] for row in result.history]
    ax.plot(epochs, [row["loss"] for row in result.history], color="0.6", label="training")
    held_out = [row["validation_loss"] for row in result.history]
    if not all(map(math.isnan, held_out)):
        ax.plot(epochs, held_out, color="tab:blue", label="validation")
        ax.axvline(result.best_epoch, color="black", linestyle=":", label=f"best epoch, {result.best_epoch}")
    ax.set(xlabel="epoch", ylabel="mean loss of a row")
    ax.legend(frameon=False)
    return ax


# Axes and colours


def _decreasing(masses: Sequence[float]) -> list[float]:
    if not len(masses) or not all(0 < mass < 1 for mass in masses):
        raise ValueError(f"masses: expected probabilities in (0, 1), one at least, got {masses}")
    return sorted(masses, reverse=True)


def _percent(mass: float) -> str:
    return f"{100 * mass:g} %"


def _shades(count: int) -> list[tuple[float, float, float]]:
    """Blues, from light to dark."""
    return [(1 - s, 1 - 0.75 * s, 1 - 0.35 * s) for s in np.linspace(0.25, 0.75, count)]


def _scatter(ax: Axes, x: Any, y: Any) -> None:
    """Draw rows as points that cover a hundredth of the axes at most, so that what is behind them stays visible."""
    area = ax.get_window_extent().width * ax.get_window_extent().height * (72 / ax.figure.dpi) ** 2
    size = min(max(0.01 * area / max(len(x), 1), 2.0), 10.0)
    ax.scatter(x, y, s=size, color="black", edgecolor="white", linewidth=0.04 * size)


def _legend_above(ax: Axes, **settings: Any) -> None:
    """Put the legend above what it explains: of areas, matplotlib does not know whether they leave room for it."""
    first, box = ax.get_legend() is None, ax.get_window_extent()
    legend = ax.legend(loc="upper right", ncols=2, **settings)
    if legend.get_window_extent().width > box.width:
        legend = ax.legend(loc="upper right", **settings)
    if first:  # Data limits, not the limits of the axis: autoscaling goes on, and what is drawn later stays in sight.
        share = min(1.1 * legend.get_window_extent().height / box.height, 0.5)
        low, high = ax.dataLim.intervaly
        ax.update_datalim([(0.0, low + (high - low) / (1 - share))], updatex=False)
        ax.autoscale_view(scalex=False)


def _axes(ax: Axes | None) -> Axes:
    return _pyplot().subplots()[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: in a checkout pip install '.[plots]'") from error
    return plt
