r"""Axes, colours, line styles and legends that all figures share; matplotlib is imported when axes are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "STYLES", "axes_of", "decreasing", "legend_above", "percent", "pyplot", "scatter", "shades"]

# Okabe & Ito (2008): distinguishable for all, in the order of their lightness as far as it goes.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2))]


def axes_of(ax: Axes | None) -> Axes:
    """Return the caller's axes, or new ones."""
    return pyplot().subplots()[1] if ax is None else ax


def pyplot() -> Any:
    """Import ``matplotlib.pyplot``, or raise an ``ImportError`` that says what to install."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib: in a checkout pip install '.[plots]'") from error
    return plt


def scatter(ax: Axes, x: Any, y: Any) -> None:
    """Draw rows as points that cover a hundredth of the axes at most, so that what is behind them stays visible."""
    area = ax.get_window_extent().width * ax.get_window_extent().height * (72 / ax.figure.dpi) ** 2
    size = min(max(0.01 * area / max(len(x), 1), 2.0), 10.0)
    ax.scatter(x, y, s=size, color="black", edgecolor="white", linewidth=0.04 * size)


def legend_above(ax: Axes, **settings: Any) -> None:
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


def shades(count: int) -> list[tuple[float, float, float]]:
    """Return blues, from light to dark."""
    return [(1 - s, 1 - 0.75 * s, 1 - 0.35 * s) for s in np.linspace(0.25, 0.75, count)]


def decreasing(masses: Sequence[float]) -> list[float]:
    """Sort probabilities so that the widest region is drawn first; a ``ValueError`` unless they are in (0, 1)."""
    if not len(masses) or not all(0 < mass < 1 for mass in masses):
        raise ValueError(f"masses: expected probabilities in (0, 1), one at least, got {masses}")
    return sorted(masses, reverse=True)


def percent(mass: float) -> str:
    """Show a probability in per cent, as in a legend."""
    return f"{100 * mass:g} %"
