r"""Schedules over the steps of a training: warm-up and cosine of the learning rate, fading noise; default settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.distributions.units.circular.angles import AngleUnits
from pyro_mdn.distributions.units.units import Units

T = TypeVar("T", bound=TargetsOrTensor)

__all__ = [
    "Smoothing",
    "blur",
    "blur_inputs",
    "blur_targets",
    "default_input_noise",
    "default_smoothing",
    "default_weight_decay",
    "epochs_of_refit",
    "fading",
    "warmup_cosine",
    "weight_decay_at",
]

# The defaults of fit, chosen on held-out parts of training rows and on simulated data: benchmarks/ablation.py.
LEARNING_RATE = 0.02
INPUT_NOISE = 0.1
TARGET_NOISE = 0.1
FINAL_NOISE = 0.03
STEPS = 9000
FADING = 3.0
VALIDATION = 0.1
FEW_ROWS = 2000
LONGER = 0.25


@dataclass(frozen=True)
class Smoothing:
    """Defaults of ``fit`` that decide how smooth a density becomes.

    Attributes:
        noise: Standard deviation of the noise at the start, in standardised units.
        final_noise: Share of the noise that is left at the end.
        fading: Power of the schedule by which noise and weight decay fade.
        first_weight_decay: Weight decay at the start, if it fades.
        validation: Fraction of the rows that is held out for one network.
        refit: Whether one network is trained on all rows in the end.
    """

    noise: float = INPUT_NOISE
    final_noise: float = FINAL_NOISE
    fading: float = FADING
    first_weight_decay: float | None = None
    validation: float = VALIDATION
    refit: bool = False


def default_smoothing(rows: float, few: bool | None = None) -> Smoothing:
    """Choose defaults for a number of rows with targets.

    With few rows, training starts where the density is very smooth and goes from there to a sharp one, so that early
    stopping can choose from all degrees of smoothness. More rows are held out, or this choice would be chance.

    Args:
        rows: Number of rows.
        few: Whether these are few; by default if there are fewer than 2000.

    >>> default_smoothing(200).noise, default_smoothing(20_000).noise
    (0.3, 0.1)
    """
    if not (rows < FEW_ROWS if few is None else few):
        return Smoothing()
    decay = min(1.0, (200 / max(1.0, rows)) ** 2)
    return Smoothing(0.3, final_noise=0.001, fading=8.0, first_weight_decay=decay, validation=1 / 3, refit=True)


def default_weight_decay(rows: float) -> float:
    """Compute the default weight decay: a prior on the weights, which matters less the more rows there are.

    >>> default_weight_decay(1000), default_weight_decay(5)
    (0.02, 0.5)
    """
    return min(0.5, 20 / rows)


def epochs_of_refit(best: int, rows: int, in_all: int, last: int) -> int:
    """Compute how long to train on all rows, where ``best`` was the best epoch on some of them.

    More rows allow a sharper density, which comes later on the way from a smooth one: the epochs grow with the fourth
    root of the rows, up to the last epoch.

    >>> epochs_of_refit(100, 200, 300, 1000), epochs_of_refit(990, 200, 300, 1000)
    (111, 1000)
    """
    return min(last, round(best * (in_all / rows) ** LONGER))


def warmup_cosine(step: int, steps: int) -> float:
    """Compute the factor on the learning rate: a linear warm-up over the first twentieth of the steps, then a cosine.

    >>> [round(warmup_cosine(step, 100), 2) for step in (0, 4, 52, 100)]
    [0.2, 1.0, 0.51, 0.0]
    """
    warmup = max(1, steps // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return min((step + 1) / warmup, cosine)


def fading(step: int, steps: int, end: float, power: float = FADING) -> float:
    """Compute the factor on the regularising noise, which falls from 1 to ``end``, by a cubic or another power.

    >>> fading(0, 100, 0.1), fading(100, 100, 0.1)
    (1.0, 0.1)
    """
    return end + (1 - end) * (1 - min(step, steps) / steps) ** power


def weight_decay_at(step: int, steps: int, first: float | None, last: float, power: float) -> float:
    """Compute the weight decay of a step, which fades from the first to the last one, if there is a first.

    >>> [weight_decay_at(step, 100, 1.0, 0.5, 2.0) for step in (0, 50, 100)]
    [1.0, 0.625, 0.5]
    """
    return last if first is None else last + (first - last) * fading(step, steps, 0.0, power)


def blur(value: T, scale: Tensor, factor: float = 1.0, generator: torch.Generator | None = None) -> T:
    """Add normal noise with a standard deviation of ``factor`` times ``scale``; NaN stays NaN, and intervals shift."""
    noise = torch.randn(value.shape, dtype=scale.dtype, device=scale.device, generator=generator)

    def moved(tensor: Tensor) -> Tensor:
        return torch.addcmul(tensor, scale, noise, value=factor)

    result: Any = value.limits(moved) if isinstance(value, Targets) else moved(value)
    return result


def blur_inputs(
    x: Tensor, units: Units, scale: Tensor, factor: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Add normal noise to inputs on the real line that their units map them to; integers stay what they are.

    Args:
        x: Inputs ``(..., D)``.
        units: Units of the inputs.
        scale: Standard deviation of the noise on the line, up to the factor.
        factor: Factor on it.
        generator: Generator to draw from, by default torch's.
    """
    if not x.is_floating_point():
        return x
    if units.is_affine:
        return blur(x, scale, factor, generator)
    return units.from_line(blur(units.to_line(x), scale, factor, generator))


def default_input_noise(units: Units, noise: float = INPUT_NOISE) -> float:
    """Standard deviation of the noise on inputs in standardised units, if these say what is small."""
    return 0.0 if units.is_unscaled else noise


def blur_targets(
    y: T,
    units: Units,
    size: Tensor | float,
    *,
    least: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> T:
    """Add normal noise to targets on the real line that their units map them to; NaN and infinity stay what they are.

    Args:
        y: Targets ``(..., D)``.
        units: Units of the targets.
        size: Standard deviation of the noise on the line.
        least: Smallest standard deviation of the noise, in the units of y.
        generator: Generator to draw from, by default torch's.
    """

    def of_part(part: Units, own: T, *bound: Tensor) -> T:
        return _blurred(own, part, size, *bound, generator=generator)

    return units.over_parts(of_part, y, *(() if least is None else (least,)))


def _blurred(
    y: T, units: Units, size: Tensor | float, least: Tensor | None = None, *, generator: torch.Generator | None
) -> T:
    if units.keeps_targets:
        return y
    exact: Any = y.lower if isinstance(y, Targets) else y
    if least is None:
        scale, factor = units.unit, float(size)
    else:
        scale, factor = torch.maximum(size * units.unit, least * units.slope(exact)), 1.0
    if units.is_affine:
        return blur(y, scale, factor, generator)
    noise = torch.randn(y.shape, dtype=scale.dtype, device=scale.device, generator=generator)

    def moved(tensor: Tensor) -> Tensor:
        return units.from_line(torch.addcmul(units.to_line(tensor), scale, noise, value=factor))

    def moved_inside(limit: Tensor) -> Tensor:
        inside = units.inside(limit)
        return torch.where(inside, moved(torch.where(inside, limit, units.from_line(torch.zeros_like(limit)))), limit)

    if not isinstance(y, Targets):
        return _unless_at_an_end(moved(y), y, units)
    result: Any = y.limits(moved_inside)
    if isinstance(units, AngleUnits):
        return units.steady(result, y)
    return result


def _unless_at_an_end(moved: Tensor, y: Tensor, units: Units) -> Tensor:
    """Leave targets at the lower end of the support where they are, if that is allowed."""
    others: Any = units.above(y)
    return moved if others is y else torch.where(others.isnan(), y, moved)
