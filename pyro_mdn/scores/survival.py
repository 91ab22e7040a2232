r"""Scores of predicted times to an event, of which some are right-censored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.density import as_observations
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import EXACT, MISSING, TargetsOrTensor, as_targets
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor, refuse
from pyro_mdn.support.checks import plain_number, shown

__all__ = ["brier_score", "concordance", "integrated_brier"]

_NO_TIME = "an angle comes round again and is no time to an event; crps is a score of angles"
_PAIRS = 2**22
"""Pairs of rows that are compared at once."""


@in_widest_precision
def brier_score(mixture: Mixture, y: Any, times: Any, train: Any = None) -> Tensor:
    r"""Brier score of predicted survival at given times, of which the mean over rows is free of the censoring.

    .. math:: \frac{S(t)^2 \, 1\{y \le t, \, y \text{ is exact}\}}{G(y^-)} + \frac{(1 - S(t))^2 \, 1\{y > t\}}{G(t)}

    Here S is the predicted probability of no event until t, and G that of not being censored until then, by the
    Kaplan-Meier estimator for each output. A row that was censored before t has the score 0, and others count for it.
    Censoring must not depend on x. Where an event and a censoring happen at the same time, the event comes first:
    its weight has the limit of G from below, and scikit-survival's the value after the censoring.

    Args:
        mixture: Predictive distributions of the times, ``batch_shape`` ``(*batch)``.
        y: Observed times ``(*sample, *batch, D)``: a tensor, or :class:`pyro_mdn.Targets` that are exact,
            right-censored or missing.
        times: Times t, one number, or several ``(T,)``, of all outputs.
        train: Targets ``(M, D)`` whose censoring is estimated, such as those of the training rows; by default y.

    Returns:
        Shape ``(*sample, *batch, D)``, with a first dimension T for several times; NaN for missing entries.

    Raises:
        ValueError: If an entry is left-censored or an interval, the shapes do not fit, or a time is not finite, or so
            late that all rows of ``train`` are censored before.
        NotImplementedError: If an output is an angle.

    References:
        Graf, Schmoor, Sauerbrei & Schumacher (1999), Assessment and comparison of prognostic classification schemes
        for survival data.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance, Targets
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> y = Targets.censored([[-1.0], [-0.5], [0.2], [2.0]], right=[[False], [True], [False], [False]])
    >>> brier_score(normal, y, 0.0).flatten()
    tensor([0.2500, 0.0000, 0.3750, 0.3750])
    """
    points = _times(mixture, times)
    terms = torch.stack(list(_terms(mixture, y, points.reshape(-1), train)))
    return terms if points.ndim else terms[0]


@in_widest_precision
def integrated_brier(mixture: Mixture, y: Any, times: Any, train: Any = None) -> Tensor:
    r"""Average of :func:`brier_score` over a range of times, by the trapezoidal rule, ``(*sample, *batch, D)``.

    .. math:: \frac{1}{t_T - t_1} \int_{t_1}^{t_T} \mathrm{BS}(t) \, dt

    Its mean over rows is the integrated Brier score. Arguments and errors are those of :func:`brier_score`.

    Args:
        mixture: Predictive distributions of the times.
        y: Observed times.
        times: Times ``(T,)`` in ascending order, two at least.
        train: Targets whose censoring is estimated; by default y.

    Raises:
        ValueError: Also if the times are not in ascending order.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> integrated_brier(normal, torch.zeros(1, 1), torch.linspace(-4, 4, 801)) * 8  # close to the CRPS
    tensor([[0.2337]])
    """
    points = _times(mixture, times)
    if points.ndim != 1 or len(points) < 2 or not bool((points.diff() > 0).all()):
        raise ValueError(f"times: expected two at least, in ascending order, got {shown(times)}")
    steps = torch.nn.functional.pad(points.diff(), (1, 1))
    weights = 0.5 * (steps[:-1] + steps[1:]) / (points[-1] - points[0])
    # One time after the other, so that no more than the scores of one are in memory.
    terms = zip(weights, _terms(mixture, y, points, train), strict=True)
    return sum((weight * term for weight, term in terms), start=points.new_zeros(()))


@torch.no_grad()
def concordance(mixture: Mixture, y: Any, train: Any = None, *, horizon: float | None = None) -> Tensor:
    r"""Share of the comparable pairs of rows whose predicted medians are in the order of their times, shape ``(D,)``.

    Higher is better, and 1/2 is chance. Two rows are comparable if the earlier time is that of an event. Pairs with
    equal medians count a half. This is Harrell's C. It depends on the censoring; with ``train`` the pairs have the
    weight :math:`1 / G(y_i^-)^2` of the earlier row, which Uno's C has, and it does not. It says how well rows
    are ranked, and nothing of calibration: no proper score.

    Args:
        mixture: Predictive distributions of the times, ``batch_shape`` ``(N,)``.
        y: Observed times ``(N, D)``, as for :func:`brier_score`.
        train: Targets ``(M, D)`` whose censoring is estimated, for Uno's C.
        horizon: Only pairs whose earlier time is before this one count.

    Raises:
        ValueError: As by :func:`brier_score`, or if the horizon is no number, or no pair of an output is comparable.
        NotImplementedError: If an output is an angle.

    References:
        Harrell, Califf, Pryor, Lee & Rosati (1982), Evaluating the yield of medical tests.
        Uno, Cai, Pencina, D'Agostino & Wei (2011), On the C-statistics for evaluating overall adequacy of risk
        prediction procedures with censored survival data.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance, Targets
    >>> scales = IsotropicCovariance(torch.ones(4, 1))
    >>> normal = GaussianMixture(torch.zeros(4, 1), torch.tensor([1.0, 3.0, 2.0, 4.0]).reshape(4, 1, 1), scales)
    >>> y = Targets.censored([[1.0], [2.0], [2.5], [3.0]], right=[[False], [False], [True], [False]])
    >>> concordance(normal, y)  # four of the five pairs that are comparable
    tensor([0.8000])
    """
    mixture.components.require_line("concordance", _NO_TIME)
    y = as_observations(mixture, y, "y")
    if len(mixture.batch_shape) != 1 or y.shape != (*mixture.batch_shape, mixture.dim):
        expected, got = "batch shape (N,) and y (N, D)", f"{tuple(mixture.batch_shape)} and {tuple(y.shape)}"
        raise ValueError(f"mixture, y: expected {expected}, got {got}")
    time, event = _times_and_events(y, "y")
    first = event if horizon is None else event & (time < _as_horizon(horizon))
    weight = torch.ones_like(time)
    if train is not None:
        left = _uncensored(_training(train, y), time, before=True)
        if bool((late := first & (left == 0)).any()):
            refuse(time, late, "y", "events while rows of train are not all censored, or a horizon before")
        weight = torch.where(first, left, 1.0).square().reciprocal()
    columns = zip(mixture.icdf(0.5).to(time).T, time.T, event.T, first.T, weight.T, strict=True)
    agreeing, total = torch.stack([_pairs(*column) for column in columns], -1)
    if bool((none := total == 0).any()):
        before = "" if horizon is None else f" before the horizon {horizon}"
        found = f"got none in column {int(none.nonzero()[0])}"
        raise ValueError(f"y: expected a pair of rows of which the earlier one has an event{before}, {found}")
    return (agreeing / total).to(mixture.dtype)


def _as_horizon(horizon: Any) -> float:
    number = plain_number(horizon)
    if math.isnan(number):
        raise ValueError(f"horizon: expected a time, got {shown(horizon)}")
    return number


def _pairs(median: Tensor, time: Tensor, event: Tensor, first: Tensor, weight: Tensor) -> Tensor:
    """Weights of the pairs in the right order, and of all comparable ones, ``(2,)``, of one output's rows ``(N,)``."""
    total = agreeing = weight.new_zeros((), dtype=torch.float64)
    tolerance, largest = 16 * torch.finfo(median.dtype).eps, torch.finfo(median.dtype).max
    for rows in first.nonzero().squeeze(-1).split(max(1, _PAIRS // max(1, len(time)))):
        at, own = time[rows, None], median[rows, None]
        later = (time > at) | ((time == at) & ~event)
        tied = (median == own) | ((median - own).abs() <= tolerance * own.abs().clamp(max=largest))
        agrees = torch.where(tied, 0.5, (median > own).to(weight))
        total = total + weight[rows].double() @ later.double().sum(1)
        agreeing = agreeing + weight[rows].double() @ torch.where(later, agrees, 0.0).double().sum(1)
    return torch.stack([agreeing, total])


def _times(mixture: Mixture, times: Any) -> Tensor:
    """Convert times to a tensor, ``()`` or ``(T,)``."""
    mixture.components.require_line("brier_score", _NO_TIME)
    points = as_tensor(times, "times", mixture.device).to(mixture.components.like)
    if points.ndim > 1 or not points.numel() or not bool(points.isfinite().all()):
        raise ValueError(f"times: expected finite numbers, one or (T,), got {shown(times)}")
    return points


def _terms(mixture: Mixture, y: Any, times: Tensor, train: Any) -> Iterator[Tensor]:
    """Compute the Brier scores at each of the times ``(T,)``."""
    y = as_observations(mixture, y, "y")
    time, event = _times_and_events(y, "y")
    censoring = _training(y if train is None else train, y)
    at_time = _uncensored(censoring, times.unsqueeze(-1).expand(-1, mixture.dim))
    if bool((late := at_time == 0).any()):
        refuse(times.unsqueeze(-1).expand(late.shape), late, "times", "times before all rows of train are censored")
    before_event = _uncensored(censoring, time, before=True)
    missing, marginals = time.isnan(), mixture.univariate()
    for t, left in zip(times, at_time, strict=True):
        alive = marginals.sf(t.expand(mixture.dim))
        happened = event & (time <= t)
        of_events = happened / torch.where(happened, before_event, 1.0)
        score = of_events * alive.square() + (time > t) / left * (1 - alive).square()
        yield score.masked_fill(missing, torch.nan)


def _times_and_events(y: TargetsOrTensor, name: str) -> tuple[Tensor, Tensor]:
    """Times, NaN where they are missing, and whether each is that of the event; a ``ValueError`` for other kinds."""
    if isinstance(y, Tensor):
        return y, ~y.isnan()
    kinds = y.kinds()
    exact, missing = kinds == EXACT, kinds == MISSING
    if bool((other := ~exact & ~y.upper.isposinf()).any()):
        refuse(y.upper, other, name, "times that are exact or right-censored", None)
    return y.lower.masked_fill(missing, torch.nan), exact


def _training(train: Any, y: TargetsOrTensor) -> tuple[Tensor, Tensor]:
    """Times and events ``(M, D)`` of the rows whose censoring is estimated, in the precision of y."""
    rows = as_targets(train, "train", y.device).to(y.dtype)
    rows = rows.unsqueeze(-1) if rows.ndim == 1 and y.shape[-1] == 1 else rows
    if rows.shape[-1:] != y.shape[-1:]:
        raise ValueError(f"train: expected shape (M, {y.shape[-1]}), got {tuple(rows.shape)}")
    time, event = _times_and_events(rows, "train")
    return time.reshape(-1, time.shape[-1]), event.reshape(-1, event.shape[-1])


def _uncensored(train: tuple[Tensor, Tensor], points: Tensor, *, before: bool = False) -> Tensor:
    """Estimate the probability of not being censored until points ``(..., D)``, or before them (Kaplan-Meier)."""
    columns = zip(train[0].T, train[1].T, points.unbind(-1), strict=True)
    return torch.stack([_kaplan_meier(time, ~event, point, before) for time, event, point in columns], -1)


def _kaplan_meier(time: Tensor, censored: Tensor, points: Tensor, before: bool) -> Tensor:
    """Estimate of one output at points: what ends it is the censoring, and events at the same time come first."""
    known = ~time.isnan()
    distinct, which = time[known].unique(return_inverse=True)
    at_once = torch.zeros((2, len(distinct)), dtype=points.dtype, device=points.device)
    at_once = at_once.index_put((censored[known].long(), which), points.new_ones(()), accumulate=True)
    at_risk = at_once.sum(0).flip(0).cumsum(0).flip(0) - at_once[0]
    survival = torch.cumprod(1 - at_once[1] / at_risk.clamp(min=1), 0)
    passed = torch.searchsorted(distinct, points.contiguous(), right=not before)
    return torch.cat([survival.new_ones(1), survival])[passed]
