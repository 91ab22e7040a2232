r"""Figures of predictions, calibration and training.

Every function takes axes and returns them, and does not change the style. Mixtures of batch shape ``(S, N)``, for S
draws of the weights, are averaged. Colours are safe for colour-blind readers, and lines also differ in their style.
"""

from pyro_mdn.adapters.figures.calibration import plot_calibration, plot_pit
from pyro_mdn.adapters.figures.components import plot_components
from pyro_mdn.adapters.figures.densities import plot_conditional_density
from pyro_mdn.adapters.figures.directions import plot_directions
from pyro_mdn.adapters.figures.predictions import (
    plot_observed_vs_sampled,
    plot_predictive_intervals,
    plot_uncertainty_split,
)
from pyro_mdn.adapters.figures.training import plot_training

__all__ = [
    "plot_calibration",
    "plot_components",
    "plot_conditional_density",
    "plot_directions",
    "plot_observed_vs_sampled",
    "plot_pit",
    "plot_predictive_intervals",
    "plot_training",
    "plot_uncertainty_split",
]
