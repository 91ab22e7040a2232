r"""Probability integral transforms of what was observed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.density import as_observations, as_outcomes
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets, missing
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import shown

__all__ = ["levels_of", "mean_pit", "pit"]


@in_widest_precision
def pit(mixture: Mixture, y: Any, cell: Any = 0.0) -> Tensor:
    r"""Probability integral transform of each output, exact: uniform if the mixture is right; Dawid (1984).

    Targets on a grid (rounded numbers, or counts that components with a density predict) stand for their cells, as in
    :class:`pyro_mdn.NegativeLogLikelihood`. Without their size c the transform is never uniform. With it, it is drawn
    between the ends of the cell, from torch's generator; under a family of counts, between the ends of its steps:

    .. math:: F(y - c/2) + V \left( F(y + c/2) - F(y - c/2) \right), \qquad V \sim U(0, 1)

    :class:`pyro_mdn.Targets` of which some are censored, or intervals, are likewise drawn between the ends of what is
    known of them. This is uniform if the mixture is right and the censoring tells nothing of y but that.
    :func:`mean_pit` does without a draw.

    Args:
        mixture: Predictive distributions.
        y: What was observed, ``(*sample, *batch, D)``; NaN where it was not. Or :class:`pyro_mdn.Targets`.
        cell: Size of the cells in the units of y, one number or ``(D,)``; 0 for outputs that are on no grid, and for
            families of counts.

    Raises:
        ValueError: If the sizes are not finite, or negative, or not one for each output, or not 0 for
            :class:`pyro_mdn.Targets`.

    References:
        Smith (1985), Diagnostic checks of non-standard time series models.
        Dunn & Smyth (1996), Randomized quantile residuals.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> bool((pit(normal, torch.zeros(100, 1), cell=1.0) - 0.5).abs().max() < 0.1915)
    True
    """
    lower, upper = levels_of(mixture, y, cell)
    if lower is upper:
        return lower
    u = torch.lerp(lower, upper, torch.rand_like(lower))
    return torch.where(u > 1, u - 1, u)  # in a cell of angles that goes on at the start of the period


@in_widest_precision
def mean_pit(mixture: Mixture, y: Any, cell: Any = 0.0, points: Any = None) -> Tensor:
    r"""Distribution function of :func:`pit` at ``points``, its draws averaged out; the points themselves if uniform.

    .. math:: \bar F(u) = \frac1N \sum_n \min\left(1, \max\left(0,
              \frac{u - F_n(y_n - c/2)}{F_n(y_n + c/2) - F_n(y_n - c/2)} \right)\right)

    Args:
        mixture: Predictive distributions, ``batch_shape`` ``(N,)``.
        y: What was observed, ``(N, D)``, or :class:`pyro_mdn.Targets`; missing entries do not count.
        cell: As for :func:`pit`.
        points: Probabilities, ``(P,)``; by default 0.01, 0.02, ..., 0.99.

    Returns:
        Shape ``(P, D)``. Differences between neighbours are the heights of a histogram.

    References:
        Czado, Gneiting & Held (2009), Predictive model assessment for count data.
    """
    lower, upper = levels_of(mixture, y, cell)
    levels = [q / 100 for q in range(1, 100)] if points is None else points
    points = as_tensor(levels, "points", mixture.device).to(lower)
    tiny = torch.finfo(lower.dtype).tiny

    def share(u: Tensor | float) -> Tensor:
        return ((u - lower) / (upper - lower).clamp(min=tiny)).clamp(0, 1)

    # Cells of angles beyond the end of the period, where levels exceed 1, go on at its start.
    return torch.stack([(share(u) + share(1 + u) - share(1.0)).nanmean(0) for u in points])


def levels_of(mixture: Mixture, y: Any, cell: Any) -> tuple[Tensor, Tensor]:
    """Compute the distribution function at the ends of what is known of y; the same tensor twice if that are points.

    Arguments are those of :func:`pit`. Where a cell of an angle goes on from the end of the period at its start, the
    upper level is more than 1.
    """
    size = as_tensor(cell, "cell", mixture.device).to(mixture.components.like)
    if size.shape not in ((), (1,), (mixture.dim,)) or not bool((size.isfinite() & (size >= 0)).all()):
        raise ValueError(f"cell: expected a finite number, not negative, or {mixture.dim} of them, got {shown(cell)}")
    if isinstance(y, Targets):
        if bool(size.any()):
            raise ValueError(f"cell: expected 0 for Targets, whose intervals are known already, got {shown(cell)}")
        return _interval_ends(mixture, y)
    y = as_outcomes(mixture, y)
    if not bool(size.any()):
        return mixture.univariate().steps(y)
    return mixture.univariate().levels(y - 0.5 * size, y + 0.5 * size)


def _interval_ends(mixture: Mixture, y: Targets) -> tuple[Tensor, Tensor]:
    """Distribution function at the ends of what is known of targets, NaN for missing ones."""
    targets = as_observations(mixture, y, "y")
    assert isinstance(targets, Targets)
    if mixture.validates:
        mixture.components.require_inside(targets, "y")
    open_below, open_above = targets.lower.isinf(), targets.upper.isinf()
    # Infinite numbers would make gradients NaN, even where a result that depends on them is not used.
    finite = torch.where(open_below, torch.where(open_above, 0.0, targets.upper), targets.lower)
    lower, upper = mixture.univariate().levels(finite, torch.where(open_above, finite, targets.upper))
    lower, upper = lower.masked_fill(open_below, 0.0), upper.masked_fill(open_above, 1.0)
    unknown = missing(targets)
    return lower.masked_fill(unknown, torch.nan), upper.masked_fill(unknown, torch.nan)
