r"""Proper scores and calibration: functions of a mixture and what was observed. Lower is better.

Scores of single outputs have shape ``(*sample, *batch, D)``, joint ones ``(*sample, *batch)``. What was not observed,
an entry of y that is NaN, has no score: it is NaN too, so that ``torch.nanmean`` and :func:`observed_mean` average over
what was observed. Of vectors of which a part is missing, :func:`log_score` takes the density of the rest.

All scores are differentiable, so that a network can be trained on any of them (to first order: :func:`crps` has no
second derivatives). :class:`pyro_mdn.Targets` of which some are censored have a :func:`log_score`, a
:func:`brier_score`, its integral over times, a :func:`concordance` and a :func:`pit`.
"""

from pyro_mdn.scores.proper import (
    Comparison,
    Estimate,
    compare,
    coverage,
    crps,
    dawid_sebastiani,
    energy_score,
    interval_log_score,
    interval_score,
    log_score,
    observed_mean,
    pinball,
)
from pyro_mdn.scores.survival import brier_score, concordance, integrated_brier
from pyro_mdn.scores.transforms import mean_pit, pit

__all__ = [
    "Comparison",
    "Estimate",
    "brier_score",
    "compare",
    "concordance",
    "coverage",
    "crps",
    "dawid_sebastiani",
    "energy_score",
    "integrated_brier",
    "interval_log_score",
    "interval_score",
    "log_score",
    "mean_pit",
    "observed_mean",
    "pinball",
    "pit",
]
