r"""Draw whether predicted probabilities match observed frequencies: PIT values and coverage, with their bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import binom

from pyro_mdn.adapters.density_grids import pooled, targets_of
from pyro_mdn.adapters.figures.axes import COLORS, STYLES, axes_of
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.calibration import coverage_table, ecdf_band
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.support.arrays import as_array, in_columns, to_numpy
from pyro_mdn.support.checks import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_pit"]


def plot_pit(
    pit: Any, *, level: float = 0.95, output_names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    r"""Draw how far the distribution of probability integral transforms (PIT) is from uniform, with a band.

    .. math:: \hat F(u) - u

    The band is simultaneous: the line of independent uniform numbers stays inside everywhere with probability
    ``level``. If predictions are too narrow, the line is above the band on the left and below it on the right; if they
    are too wide, it is the other way round.

    Args:
        pit: Transforms ``(N,)`` or ``(N, D)``, as by :func:`pyro_mdn.scores.pit`; NaN are left out.
        level: Probability of the band. Its width is for the output with the fewest transforms.
        output_names: Names of the outputs.
        ax: Axes to draw on; by default new ones.

    Raises:
        ValueError: If there are no transforms, or if some are outside [0, 1].
        ImportError: If matplotlib is not installed.

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison.

    >>> plot_pit(torch.rand(100)).get_xlabel()
    'probability integral transform u'
    """
    rows = in_columns(as_array(pit, "pit"))
    observed = [column[~np.isnan(column)] for column in rows.T] if rows.ndim == 2 else []
    if rows.ndim != 2 or not all(len(u) and ((u >= 0) & (u <= 1)).all() for u in observed):
        raise ValueError(f"pit: expected numbers in [0, 1], (N,) or (N, D), got shape {np.shape(pit)}")
    names = names_of(pit, output_names, len(observed))
    ax = axes_of(ax)
    points = np.linspace(0, 1, 101)[1:-1]
    lower, upper = ecdf_band(min(map(len, observed)), points, level)
    ends = np.concatenate([[0.0], points, [1.0]])
    band = (np.pad(lower - points, 1), np.pad(upper - points, 1))
    ax.fill_between(ends, *band, color="0.85", linewidth=0, label=f"{100 * level:g} % band")
    ax.axhline(0.0, color="0.5", linewidth=0.8)
    for i, (u, name) in enumerate(zip(observed, names, strict=True)):
        ecdf = (u[:, None] <= ends).mean(0)
        ax.plot(ends, ecdf - ends, color=COLORS[i % 7], linestyle=STYLES[i % 5], label=name)
    ax.set(xlabel="probability integral transform u", ylabel="empirical CDF − uniform CDF", xlim=(0, 1))
    ax.set_ylim(top=1.4 * ax.get_ylim()[1])  # room for the legend
    ax.legend(frameon=False, loc="upper right", ncols=2)
    return ax


@torch.no_grad()
def plot_calibration(
    mixture: Mixture,
    y: Any,
    *,
    masses: Sequence[float] | None = None,
    level: float = 0.95,
    output_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the share of targets in central intervals against the intervals' probability, with a binomial band.

    The band is pointwise. Predictions are calibrated if the line follows the diagonal.

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
    mixture = pooled(mixture)
    targets = torch.tensor(targets_of(y, mixture.batch_shape.numel(), mixture.dim), device="cpu").to(mixture.locs)
    nominal = np.linspace(0.05, 0.95, 19) if masses is None else np.sort(np.asarray(masses, dtype=float))
    if not 0 < level < 1:
        raise ValueError(f"level: expected a probability in (0, 1), got {shown(level)}")
    names = names_of(y, output_names, mixture.dim)
    table = coverage_table(mixture, targets, nominal.tolist())
    ax = axes_of(ax)
    count = int((~targets.isnan()).sum(0).min())
    band = [end / count for end in binom.interval(level, count, nominal)]
    ax.fill_between(nominal, *band, color="0.85", linewidth=0, label=f"{100 * level:g} % band")
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    for i, name in enumerate(names):
        ax.plot(nominal, to_numpy(table.coverage[:, i]), color=COLORS[i % 7], linestyle=STYLES[i % 5], label=name)
    ax.set(xlabel="probability of the interval", ylabel="share of targets inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, loc="upper left")
    return ax
