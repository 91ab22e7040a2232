r"""Roots of increasing functions, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mdn.support.checks import is_recorded, unwrapped

__all__ = ["follow_root", "solve_tail"]


def follow_root(root: Tensor, equation: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Give a known root the derivatives of the implicit function, up to the second.

    ``equation(point)`` returns residual and slope. Two Newton steps from the root move it by nothing, and their
    derivatives are the root's.
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
    """Solve cdf(point) = tail, for tails up to a half: Newton on the logarithm, bisection where that does not help.

    Args:
        tail: Probabilities.
        low: Points at or below the root.
        high: Points at or above it; every step keeps the root between the two.
        tail_and_density: Cumulative distribution, accurate where it is small, and density at points.
        max_steps: Steps at most.
    """
    eps = torch.finfo(low.dtype).eps
    point, last = low + (high - low) / 2, high - low
    tolerance = eps * (4 - 2 * tail.log())  # what rounding leaves of a cdf that low
    for _ in range(max_steps):
        cdf, density = tail_and_density(point)
        excess = (cdf / tail).log()
        too_high = excess >= 0
        low, high = torch.where(too_high, low, point), torch.where(too_high, point, high)
        width, newton = high - low, point - excess * cdf / density  # NaN, which does not help, where a cdf underflows
        found = (excess.abs() <= tolerance) | ~(width > eps * torch.maximum(low.abs(), high.abs()))
        helps = (newton > low) & (newton < high) & (found | ((newton - point).abs() < last / 2))
        proposal = torch.where(helps, newton, torch.where(found, point, low + width / 2))
        if not is_recorded() and bool(unwrapped(found).all()):
            return proposal
        point, last = proposal, (proposal - point).abs()
    return point
