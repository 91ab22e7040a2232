r"""Decisions under a predictive distribution: probabilities of ranges, expected costs, tail risk, survival.

Functions of a mixture, of shape ``(*sample, *batch, D)``: of each output by itself, in its units, and differentiable.
They take every family and every target transform. A number in the place of a tensor stands for all outputs and rows.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.distributions.quantiles import thresholds
from pyro_mdn.support.checks import is_known, plain_number, shown

__all__ = [
    "conditional_value_at_risk",
    "cumulative_hazard",
    "expected_above",
    "expected_below",
    "expected_improvement",
    "hazard",
    "newsvendor_cost",
    "probability_between",
    "restricted_mean",
]

_NO_TIME = "an angle comes round again and is no time to an event; probability_between is of arcs"


@in_widest_precision
def probability_between(mixture: Mixture, low: Any, high: Any) -> Tensor:
    r"""Compute :math:`P(a \le y \le b)`, accurate also where it is small or the range narrow; NaN where an end is.

    Ranges of angles are arcs of one turn at most, which may go on beyond an end of the period.

    Args:
        mixture: The mixture.
        low: Lower end a; minus infinity for none.
        high: Upper end b, not below the lower one; infinity for none.

    Raises:
        ValueError: If a lower end is above its upper end, the shapes do not fit, or the range of an angle is more
            than a turn, or farther than a turn from the period.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> probability_between(normal, -1.0, 1.0)
    tensor([0.6827])
    """
    start, end = thresholds(mixture, low), thresholds(mixture, high)
    start, end = torch.broadcast_tensors(start, end)
    if is_known(start, end) and bool((start > end).any()):
        raise ValueError(f"low, high: expected ends in ascending order, got {shown(low)} and {shown(high)}")
    missing = start.isnan() | end.isnan()
    start, end = start.masked_fill(missing, -math.inf), end.masked_fill(missing, math.inf)
    if mixture.validates:
        mixture.components.require_inside(Targets(start, end), "low, high")
    return torch.where(missing, math.nan, mixture.univariate().log_between(start, end).exp())


@in_widest_precision
def expected_below(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute :math:`E[(c - y)^+]`, the expected shortfall of y from a threshold c: a lower partial moment.

    Args:
        mixture: The mixture.
        value: Threshold c.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Fishburn (1977), Mean-risk analysis with risk associated with below-target returns.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> expected_below(normal, 0.0)
    tensor([0.3989])
    """
    c = thresholds(mixture, value)
    finite = c.isfinite()
    moment = mixture.univariate().expected_below(torch.where(finite, c, 0.0))
    return torch.where(finite, moment, c.clamp(min=0))


@in_widest_precision
def expected_above(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute :math:`E[(y - c)^+]`, the expected excess of y over a threshold c: an upper partial moment.

    Arguments and errors are those of :func:`expected_below`. The result is infinite where there is no mean.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> expected_above(normal, 1.0)
    tensor([0.0833])
    """
    c = thresholds(mixture, value)
    finite = c.isfinite()
    moment = mixture.univariate().expected_above(torch.where(finite, c, 0.0))
    return torch.where(finite, moment, (-c).clamp(min=0))


@in_widest_precision
def restricted_mean(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute :math:`E[\min(y, c)]`, such as the mean time to an event within a horizon c.

    It is finite for positive outputs, also where the mean is not.

    Args:
        mixture: The mixture.
        value: Limit c; infinity for the mean.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Royston & Parmar (2013), Restricted mean survival time.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> restricted_mean(normal, 0.0)
    tensor([-0.3989])
    """
    c, mean = thresholds(mixture, value), mixture.mean
    above = expected_above(mixture, c)
    # For a large c, the difference of c and what falls short of it has no digits left.
    large = (c == math.inf) | (mean.abs() + above < c.abs())
    return torch.where(large, mean - above, c - expected_below(mixture, c))


def expected_improvement(mixture: Mixture, value: Any, *, minimize: bool = True) -> Tensor:
    r"""Compute by how much y is expected to improve on the best value so far: :math:`E[(b - y)^+]`.

    Args:
        mixture: The mixture.
        value: Best value b so far.
        minimize: Whether lower values are better; otherwise the improvement is :math:`E[(y - b)^+]`.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Jones, Schonlau & Welch (1998), Efficient global optimization of expensive black-box functions.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> expected_improvement(normal, -1.0)
    tensor([0.0833])
    """
    return expected_below(mixture, value) if minimize else expected_above(mixture, value)


def newsvendor_cost(mixture: Mixture, value: Any, *, under: float, over: float) -> Tensor:
    r"""Compute the expected cost of an order q for a demand y.

    .. math:: u \, E[(y - q)^+] + o \, E[(q - y)^+]

    The best order is the quantile ``mixture.icdf(under / (under + over))``.

    Args:
        mixture: Distribution of the demand.
        value: Order q.
        under: Cost u of a missing unit.
        over: Cost o of a unit that is left.

    Raises:
        ValueError: If a cost is negative or infinite, or the shape does not fit.

    References:
        Arrow, Harris & Marschak (1951), Optimal inventory policy.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> newsvendor_cost(normal, normal.icdf(0.75), under=3.0, over=1.0)
    tensor([1.2711])
    """
    costs = plain_number(under), plain_number(over)
    if not all(0 <= cost < math.inf for cost in costs):
        expected = "expected costs that are finite and not negative"
        raise ValueError(f"under, over: {expected}, got {shown(under)} and {shown(over)}")
    moments = expected_above(mixture, value), expected_below(mixture, value)
    # What costs nothing does not count, also where there is no limit to it.
    parts = [cost * moment if cost else torch.zeros_like(moment) for cost, moment in zip(costs, moments, strict=True)]
    return parts[0] + parts[1]


def conditional_value_at_risk(mixture: Mixture, level: float, *, tail: Literal["upper", "lower"] = "upper") -> Tensor:
    r"""Compute the mean of the quantiles of y beyond one, also called expected shortfall, of shape ``(*batch, D)``.

    .. math:: \frac{1}{1 - p} \int_p^1 F^{-1}(u) \, du = F^{-1}(p) + \frac{E[(y - F^{-1}(p))^+]}{1 - p}

    This is :math:`E[y \mid y \ge F^{-1}(p)]` if y has a density. A single value with a probability, such as a count or
    zero, may be the quantile of several levels: only the part of its probability that lies beyond p is in the mean.

    Args:
        mixture: The mixture.
        level: Probability p in (0, 1).
        tail: ``"upper"``, or ``"lower"`` for the mean of the quantiles below p.

    Raises:
        ValueError: If the level is not in (0, 1), or the tail is unknown.

    References:
        Rockafellar & Uryasev (2002), Conditional value-at-risk for general loss distributions.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> conditional_value_at_risk(normal, 0.95)
    tensor([2.0627])
    """
    if not 0 < plain_number(level) < 1:
        raise ValueError(f"level: expected a probability in (0, 1), got {shown(level)}")
    if tail not in ("upper", "lower"):
        raise ValueError(f"tail: expected 'upper' or 'lower', got {shown(tail)}")
    quantile = mixture.icdf(level)
    if tail == "upper":
        return quantile + expected_above(mixture, quantile) / (1 - level)
    return quantile - expected_below(mixture, quantile) / level


def cumulative_hazard(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute the cumulative hazard :math:`-\log P(y > t)` of a time to an event.

    Args:
        mixture: The mixture.
        value: Times t.

    Raises:
        ValueError: If the shape does not fit.
        NotImplementedError: If an output is an angle.

    References:
        Nelson (1972), Theory and applications of hazard plotting for censored failure data.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> cumulative_hazard(normal, 0.0)
    tensor([0.6931])
    """
    mixture.components.require_line("cumulative_hazard", _NO_TIME)
    return -mixture.log_sf(value)


@in_widest_precision
def hazard(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute the hazard, the rate of the event at a time t given that it has not happened before.

    .. math:: h(t) = \frac{p(t)}{P(y \ge t)}

    For counts, and at a point mass, p is a probability, and the hazard :math:`P(y = t \mid y \ge t)` one as well. It
    is NaN where survival is impossible, at the upper end of a bounded support and above it.

    Args:
        mixture: The mixture.
        value: Times t.

    Raises:
        ValueError: If the shape does not fit.
        NotImplementedError: If an output is an angle.

    References:
        Cox (1972), Regression models and life-tables.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> hazard(normal, torch.tensor([0.0]))
    tensor([0.7979])
    """
    mixture.components.require_line("hazard", _NO_TIME)
    t, marginals = thresholds(mixture, value), mixture.univariate()
    return (marginals.log_prob(t) - marginals.log_sf_from(t)).exp()
