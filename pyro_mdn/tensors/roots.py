r"""Roots of increasing functions, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, unwrapped

__all__ = ["follow_root", "solve_tail"]


def follow_root(root: Tensor, equation: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Give a known root its first and second derivatives, as the implicit function theorem defines them.

    ``equation(point)`` returns the residual and its slope. Two Newton steps from the root leave its value as it is, and
    their derivatives are those of the root.
    """
    point = root
    for _ in range(2):
        residual, slope = equation(point)
        step = (residual - residual.detach()) / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        point = point - step
    return point


def solve_tail(
    tail: Tensor,
    low: Tensor,
    high: Tensor,
    tail_and_density: Callable[[Tensor], tuple[Tensor, Tensor]],
    max_steps: int = 200,
) -> Tensor:
    """Solve cdf(point) = tail by Newton's method on the logarithm, and by bisection where Newton's step does not help.

    Args:
        tail: Probabilities up to a half.
        low: Points at or below the root.
        high: Points at or above the root. Every step keeps the root between ``low`` and ``high``.
        tail_and_density: Function of points that gives their cumulative distribution, accurate where it is small, and
            their density.
        max_steps: Largest number of steps.
    """
    eps = torch.finfo(low.dtype).eps
    point, last = low + (high - low) / 2, high - low
    tolerance = eps * (4 - 2 * tail.log())  # relative rounding error of a cdf that small
    for _ in range(max_steps):
        cdf, density = tail_and_density(point)
        excess = (cdf / tail).log()
        too_high = excess >= 0
        low, high = torch.where(too_high, low, point), torch.where(too_high, point, high)
        width, newton = high - low, point - excess * cdf / density  # NaN where the cdf underflows: bisection follows
        found = (excess.abs() <= tolerance) | ~(width > eps * torch.maximum(low.abs(), high.abs()))
        helps = (newton > low) & (newton < high) & (found | ((newton - point).abs() < last / 2))
        proposal = torch.where(helps, newton, torch.where(found, point, low + width / 2))
        if not is_recorded() and bool(unwrapped(found).all()):
            return proposal
        point, last = proposal, (proposal - point).abs()
    return point
