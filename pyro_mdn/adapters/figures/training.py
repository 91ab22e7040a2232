r"""Training and validation loss by epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyro_mdn.adapters.figures.axes import COLORS, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_training"]


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
    ax = axes_of(ax)
    epochs = [row["epoch"] for row in result.history]
    training = [row["loss"] for row in result.history]
    ax.plot(epochs, training, color=COLORS[4], linestyle="--", label="training")
    held_out = [row["validation_loss"] for row in result.history]
    if not all(map(math.isnan, held_out)):
        ax.plot(epochs, held_out, color=COLORS[0], label="validation")
        ax.axvline(result.best_epoch, color="black", linestyle=":", label=f"best epoch, {result.best_epoch}")
    ax.set(xlabel="epoch", ylabel="mean loss of a row")
    ax.legend(frameon=False)
    return ax
