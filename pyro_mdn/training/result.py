r"""What a training run did, epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass
class FitResult:
    """What a training run did.

    Attributes:
        history: One row per epoch: ``epoch``, ``loss``, ``validation_loss`` (of the averaged weights; NaN without
            validation) and ``lr``. Losses are weighted means over what was observed: of rows, or of steps.
        best_epoch: Epoch whose averaged weights the network now has: that of the lowest validation loss; without
            validation, the last.
        best_loss: Their validation loss; without validation, the training loss.
        stopped_early: Whether the validation loss had stopped improving, or a callback had enough, before the
            last epoch.
        interrupted: Whether Ctrl-C ended the training.
        unobserved: Entries of y that were not observed, NaN or masked, by output: of all data given but those of
            ``validation=(x, y)``, or of what the last pass over a loader read.
        skipped_batches: Batches whose loss or gradient was not finite, where these are skipped.
        seconds: Wall-clock time, with that of earlier runs that this one resumed.
        component_weights: Share of the training rows that each component explains, ``K`` numbers; see
            :attr:`effective_components`. Empty where the weights are latent.
        refit_history: The same as ``history``, of a second training on all rows.
        members: What it did for each member of an ensemble: ``history``, ``best_epoch``, ``best_loss``,
            ``stopped_early`` and ``component_weights``. The history of the ensemble is their mean, its ``best_loss``
            too; its ``best_epoch`` is the latest of theirs.
        guide: The guide that was trained, if one was.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    stopped_early: bool = False
    interrupted: bool = False
    unobserved: list[int] = field(default_factory=list)
    skipped_batches: int = 0
    seconds: float = 0.0
    component_weights: list[float] = field(default_factory=list)
    refit_history: list[dict[str, float]] = field(default_factory=list)
    members: list[FitResult] = field(default_factory=list)
    guide: Any = None

    @property
    def effective_components(self) -> float:
        r"""Effective number of components, :math:`\exp(-\sum_k w_k \log w_k)`; 1 if all but one are idle.

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
