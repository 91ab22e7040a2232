r"""The result of a training: losses by epoch, the best epoch, what the components explain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass
class FitResult:
    """Result of a training run.

    Attributes:
        history: One row per epoch: ``epoch``, ``loss``, ``validation_loss`` (of the averaged weights; NaN without
            validation) and ``lr``. Losses are weighted means over what was observed: over rows, or over the steps of
            sequences.
        best_epoch: Epoch whose averaged weights the network now has: the epoch with the lowest validation loss, or the
            last epoch without validation.
        best_loss: Validation loss of these weights; without validation, the training loss.
        stopped_early: Whether early stopping or a callback ended the training before the last epoch.
        interrupted: Whether Ctrl-C ended the training.
        unobserved: Number of missing targets, NaN or masked, of each output. It counts all data given except those of
            ``validation=(x, y)``; for a loader, what the last pass read.
        intervals: Number of targets of each output that are known to lie in an interval, such as censored ones; see
            :class:`pyro_mdn.Targets`. All others that are not unobserved are exact.
        skipped_batches: Number of batches that were left out because their loss or gradient was not finite.
        seconds: Wall-clock time in seconds, including that of earlier runs that this run resumed.
        component_weights: Share of the training rows that each of K components explains; see
            :attr:`effective_components`. Empty where the weights are latent.
        refit_history: History of the second training on all rows, after ``refit=True``.
        members: Result of each member of an ensemble: ``history``, ``best_epoch``, ``best_loss``, ``stopped_early`` and
            ``component_weights``. ``history`` and ``best_loss`` of the ensemble are means over the members, and its
            ``best_epoch`` is the latest of theirs.
        guide: The trained guide, if there is one.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    stopped_early: bool = False
    interrupted: bool = False
    unobserved: list[int] = field(default_factory=list)
    intervals: list[int] = field(default_factory=list)
    skipped_batches: int = 0
    seconds: float = 0.0
    component_weights: list[float] = field(default_factory=list)
    refit_history: list[dict[str, float]] = field(default_factory=list)
    members: list[FitResult] = field(default_factory=list)
    guide: Any = None

    @property
    def effective_components(self) -> float:
        r"""Effective number of components, :math:`\exp(-\sum_k w_k \log w_k)`; it is 1 if only one explains rows.

        >>> FitResult(component_weights=[0.5, 0.5, 0.0]).effective_components
        2.0
        """
        if not self.component_weights:
            return math.nan
        return math.exp(-sum(w * math.log(w) for w in self.component_weights if w > 0))

    def plot(self, ax: Any = None) -> Any:
        """Draw the losses by epoch and mark the best one; return the axes. See :func:`pyro_mdn.plots.plot_training`."""
        from pyro_mdn.plots import plot_training

        return plot_training(self, ax=ax)
