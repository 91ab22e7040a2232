r"""Mean, standard deviation and weight of each component along x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_mdn.adapters.density_grids import along, bands, lines
from pyro_mdn.adapters.figures.axes import COLORS, STYLES, axes_of, legend_above
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.support.arrays import Array, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_components"]


@torch.no_grad()
def plot_components(mixture: Mixture, x: Any, *, output: int = 0, ax: Axes | None = None) -> Axes:
    """Draw mean, standard deviation and weight of each component of one output along x.

    Bands are means ± one standard deviation; the larger the weight, the more opaque is the band. Components are not
    drawn where their weight is below 0.01.

    Args:
        mixture: Predictive distributions ``(N,)`` at x.
        x: Values of one input, ``(N,)`` or ``(N, 1)``, in any order.
        output: Index of the output.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, if mixtures are by several draws of the weights, whose components do not
            correspond, or if there is no such output.
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
    ax = axes_of(ax)
    weights, components = to_numpy(mixture.logits.exp()), mixture.components
    means, scales = (to_numpy(t.expand(mixture.locs.shape)[..., 0]) for t in (components.mean(), components.stddev()))
    for k, (weight, mean, scale) in enumerate(zip(weights.T, means.T, scales.T, strict=True)):
        color, drawn = COLORS[k % 7], np.where(weight < 0.01, np.nan, 0.0)
        legend = f"{k + 1}: weight {weight.min():.2f} to {weight.max():.2f}"
        for i, line in enumerate(lines(mixture, mean)):
            ax.plot(x, line + drawn, color=color, linestyle=STYLES[k % 5], label="" if i else legend)
        for lower, upper in bands(mixture, mean - scale, mean + scale):
            _shade(ax, x, lower + drawn, upper + drawn, weight, color)
    _number(ax, x, means, weights)
    ax.set(xlabel=label, ylabel=f"{names[output]}: mean ± std of components")
    legend_above(ax, fontsize="small", title="component")
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
