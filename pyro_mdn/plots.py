r"""Figures of predictions, calibration and training.

Every function takes axes and returns them, and changes no style. Mixtures of batch shape ``(S, N)``, by draws of the
weights, are averaged. Colours are told apart by colour-blind readers, and lines also by their style.
"""

from pyro_mdn.adapters.figures.calibration import plot_calibration, plot_pit
from pyro_mdn.adapters.figures.components import plot_components
from pyro_mdn.adapters.figures.densities import plot_conditional_density
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
    "plot_observed_vs_sampled",
    "plot_pit",
    "plot_predictive_intervals",
    "plot_training",
    "plot_uncertainty_split",
]
