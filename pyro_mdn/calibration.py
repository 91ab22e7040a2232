r"""Calibration: whether predicted probabilities match observed frequencies, and how sharp predictions are.

The probability integral transforms :math:`u = F(y)` (:func:`pyro_mdn.scores.pit`) are uniformly distributed if the
predictive distribution F is the true one. ``mixture.rosenblatt`` has the transforms of all outputs jointly. Targets on
a grid (counts, rounded numbers) have uniform transforms only if ``pit`` knows the size of their cells; ``rosenblatt``
has no such argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import binom, chi2
from torch import Tensor

from pyro_mdn.distributions.density import as_observations, as_outcomes
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import missing
from pyro_mdn.scores import mean_pit, observed_mean
from pyro_mdn.support.arrays import as_tensor, in_columns
from pyro_mdn.support.checks import require_counts, shown

__all__ = ["CoverageTable", "coverage_table", "d_calibration", "ecdf_band", "uniformity_p_value"]

Array = NDArray[np.float64]

_POINTS = np.linspace(0, 1, 101)[1:-1]
_LEAST = 1e-12  # p-values below this are upper bounds
_MANY = 5000  # for larger samples the pointwise level hardly depends on the size


class CoverageTable(NamedTuple):
    """Coverage (calibration) and width (sharpness) of intervals of several probabilities.

    Attributes:
        mass: Nominal probabilities, ``(M,)``.
        coverage: Share of the observed targets inside, ``(M, D)``.
        standard_error: Standard error of the coverage, if the rows are independent, ``(M, D)``.
        width: Mean width of the intervals in the units of y, ``(M, D)``.
    """

    mass: Tensor
    coverage: Tensor
    standard_error: Tensor
    width: Tensor


@torch.no_grad()
def coverage_table(
    mixture: Mixture,
    y: Any,
    masses: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    *,
    kind: Literal["central", "shortest"] = "central",
) -> CoverageTable:
    """Compute coverage and width of predictive intervals; targets that are NaN are left out.

    Args:
        mixture: Predictive distributions, ``batch_shape`` ``(N,)``.
        y: Observed targets, ``(N, D)``.
        masses: Probabilities of the intervals, in (0, 1).
        kind: As for ``mixture.interval``.

    Raises:
        ValueError: If shapes do not agree, a probability is not in (0, 1), or an output has no observed target.

    References:
        Gneiting, Balabdaoui & Raftery (2007), Probabilistic forecasts, calibration and sharpness.

    >>> from pyro_mdn import DiagonalCovariance, GaussianMixture
    >>> normal = GaussianMixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), DiagonalCovariance(torch.ones(1, 1, 1)))
    >>> table = coverage_table(normal.expand((3,)), torch.tensor([[0.0], [1.0], [2.0]]), [0.9])
    >>> table.coverage, table.width
    (tensor([[0.6667]]), tensor([[3.2897]]))
    """
    if not len(masses):
        raise ValueError("masses: expected one probability at least, got none")
    y = _as_rows(mixture, y)
    rows = []
    for mass in masses:
        lower, upper = mixture.interval(mass, kind=kind)
        inside = (mixture.univariate().missed(y, lower, upper) <= 0).to(lower).masked_fill(y.isnan(), torch.nan)
        rows.append((*observed_mean(inside), (upper - lower).mean(0)))
    coverage, error, width = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return CoverageTable(coverage.new_tensor(masses), coverage, error, width)


def ecdf_band(size: int, points: ArrayLike | None = None, level: float = 0.95) -> tuple[Array, Array]:
    r"""Compute a simultaneous band of the empirical distribution function of a uniform sample, two ends ``(P,)``.

    .. math:: P\left(l_i \le \hat F_N(z_i) \le u_i \text{ for all } i\right) \ge \text{level}

    The band consists of equal-tailed binomial intervals that have the same pointwise level at all points. This level is
    computed from the exact probability that a sample stays inside, because counts at increasing points are a Markov
    chain. For samples of more than 5000 it is the level of 5000.

    Args:
        size: Size of the sample N.
        points: Points :math:`z_i` in (0, 1), increasing; by default 0.01, 0.02, ..., 0.99.
        level: Probability that the whole function stays inside.

    Raises:
        ValueError: If the size is not positive, or points or level are not in (0, 1).

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison.

    >>> lower, upper = ecdf_band(100, [0.5])
    >>> lower.tolist(), upper.tolist()
    ([0.4], [0.6])
    """
    require_counts(size=size)
    z = _check_points(points)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a probability in (0, 1), got {shown(level)}")
    tail = _tail(min(int(size), _MANY), tuple(z.tolist()), float(level))
    lower = binom.ppf(tail, size, z)
    return lower / size, (size - binom.ppf(tail, size, 1 - z)) / size


def uniformity_p_value(pit: Any, *, points: ArrayLike | None = None) -> float:
    r"""Compute the p-value of the hypothesis that transforms are independent and uniform.

    The statistic is the smallest pointwise binomial tail probability of the empirical distribution function. Its
    distribution is exact up to 5000 transforms; for more transforms it is that of 5000. If the p-value is below
    1 − level, the function leaves the band of :func:`ecdf_band`. Below 1e-12 it is an upper bound.

    Args:
        pit: Numbers in [0, 1], of any shape; NaN are left out. The transforms of several outputs are independent if
            they are by ``mixture.rosenblatt``. Those by :func:`pyro_mdn.scores.pit` are not: test each output
            separately. For targets on a grid use ``scores.pit(mixture, y, cell)``, and test each output separately.
        points: Points at which the function is evaluated, as for :func:`ecdf_band`.

    Raises:
        ValueError: If there is no number, or one outside [0, 1].

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison.

    >>> uniformity_p_value(torch.linspace(0, 1, 200)) > 0.99, uniformity_p_value(torch.linspace(0, 0.8, 200)) < 1e-6
    (True, True)
    """
    u = as_tensor(pit, "pit").detach().cpu().double().flatten().numpy()
    u = u[~np.isnan(u)]
    if not len(u):
        raise ValueError("pit: expected numbers in [0, 1], one at least that is not NaN, got none")
    outside = u[~((u >= 0) & (u <= 1))]
    if len(outside):
        raise ValueError(f"pit: expected numbers in [0, 1], got {len(outside)} outside, such as {outside[0]:.6g}")
    z = _check_points(points)
    counts = (u[:, None] <= z).sum(0)
    tail = np.minimum(binom.cdf(counts, len(u), z), binom.sf(counts - 1, len(u), z)).min()
    # The probability of either tail at any point is no larger than this. Where it is that small, the difference from 1
    # would be rounding alone, take long, and be of a band without ends once the tail is rounded to 0.
    if (bound := 2 * len(z) * tail) < _LEAST:
        return float(bound)
    # The factor makes sure that samples as extreme as this one count as outside.
    return float(np.clip(1 - _inside(min(len(u), _MANY), z, tail * (1 + 1e-9)), 0.0, 1.0))


@torch.no_grad()
def d_calibration(mixture: Mixture, y: Any, *, bins: int = 10) -> Tensor:
    r"""Compute p-values of D-calibration, one for each output, ``(D,)``: a test for times that may be censored.

    .. math:: \sum_{b=1}^B \frac{(N_b - N / B)^2}{N / B} \sim \chi^2_{B-1}

    The statistic compares the numbers of probability integral transforms in bins of equal width. An entry that was
    censored counts in parts, in each bin by the probability of that bin given what is known of it
    (:func:`pyro_mdn.scores.mean_pit`). Such counts vary less than whole ones: with many censored entries the p-value is
    too large. ``uniformity_p_value(scores.pit(mixture, y))`` draws the transforms of these, and its p-value is exact.

    Args:
        mixture: Predictive distributions, ``batch_shape`` ``(N,)``.
        y: Observed targets ``(N, D)``, or :class:`pyro_mdn.Targets`; missing ones do not count.
        bins: Number of bins B.

    Raises:
        ValueError: If there are fewer than two bins, the shapes do not agree, or an output has no observed target.

    References:
        Haider, Hoehn, Davis & Greiner (2020), Effective ways to build and evaluate individual survival distributions.

    >>> from pyro_mdn import DiagonalCovariance, GaussianMixture, Targets
    >>> normal = GaussianMixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), DiagonalCovariance(torch.ones(1, 1, 1)))
    >>> y = torch.special.ndtri(torch.linspace(0.01, 0.99, 50)).unsqueeze(-1)
    >>> censored = Targets.censored(y.clamp(max=0.5), right=y > 0.5)
    >>> d_calibration(normal.expand((50,)), censored) > 0.9, d_calibration(normal.expand((50,)), 2 * y) < 0.05
    (tensor([True]), tensor([True]))
    """
    require_counts(bins=bins)
    if bins < 2:
        raise ValueError(f"bins: expected 2 at least, got {bins}")
    y = as_observations(mixture, y, "y")
    _require_rows(mixture, y.shape)
    count = (~missing(y)).sum(0)
    if bool((count == 0).any()):
        raise ValueError("y: expected an observed entry in each column, got none in one")
    levels = mean_pit(mixture, y, points=np.linspace(0, 1, bins + 1)[1:-1]).double()
    shares = torch.cat([levels, torch.ones_like(levels[:1])]).diff(dim=0, prepend=torch.zeros_like(levels[:1]))
    statistic = bins * count * (shares - 1 / bins).square().sum(0)
    return shares.new_tensor(chi2.sf(statistic.cpu().numpy(), bins - 1))


@lru_cache(maxsize=64)
def _tail(size: int, points: tuple[float, ...], level: float) -> float:
    """Find the largest pointwise tail probability for which a sample stays inside everywhere with this level."""
    z, low, high = np.asarray(points), 0.0, (1 - level) / 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(size, z, middle) >= level else (low, middle)
    return low


def _inside(size: int, points: Array, tail: float) -> float:
    """Compute the probability that counts of a uniform sample have no tail smaller than this at any point."""
    first = binom.ppf(tail, size, points).astype(int)
    last = size - binom.ppf(tail, size, 1 - points).astype(int)
    if (first > last).any():
        return 0.0
    log_factorial = gammaln(np.arange(size + 2) + 1.0)
    counts, weights, before = np.zeros(1, dtype=int), np.ones(1), 0.0
    for point, lower, upper in zip(points, first, last, strict=True):
        reached = np.arange(lower, upper + 1)
        share, left, new = (point - before) / (1 - before), size - counts, reached - counts[:, None]
        stay = size - reached
        log_step = log_factorial[left][:, None] - log_factorial[np.maximum(new, 0)] - log_factorial[stay]
        log_step += new * np.log(share) + stay * np.log1p(-share)
        weights = weights @ np.where(new < 0, 0.0, np.exp(np.minimum(log_step, 0.0)))
        counts, before = reached, point
    return float(weights.sum())


def _check_points(points: ArrayLike | None) -> Array:
    z = _POINTS if points is None else np.asarray(points, dtype=np.float64)
    if z.ndim != 1 or not len(z) or not ((z > 0) & (z < 1)).all() or (np.diff(z) <= 0).any():
        raise ValueError(f"points: expected increasing numbers in (0, 1), got {shown(points)}")
    return z


def _as_rows(mixture: Mixture, y: Any) -> Tensor:
    y = in_columns(as_tensor(y, "y", mixture.locs.device))
    _require_rows(mixture, y.shape)
    return as_outcomes(mixture, y)


def _require_rows(mixture: Mixture, shape: Sequence[int]) -> None:
    if len(mixture.batch_shape) != 1 or tuple(shape) != (*mixture.batch_shape, mixture.dim):
        expected = "a mixture of batch shape (N,) and y of shape (N, D)"
        raise ValueError(f"mixture, y: expected {expected}, got {tuple(mixture.batch_shape)} and {tuple(shape)}")
