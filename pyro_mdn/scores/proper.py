r"""Proper scores: functions of a mixture and what was observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.density import as_observations, as_outcomes
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import as_targets, missing
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.tensors.numerics import norm

__all__ = [
    "Comparison",
    "Estimate",
    "compare",
    "coverage",
    "crps",
    "dawid_sebastiani",
    "energy_score",
    "interval_log_score",
    "interval_score",
    "log_score",
    "observed_mean",
    "pinball",
]


class Estimate(NamedTuple):
    """Monte Carlo estimate with its standard error."""

    value: Tensor
    standard_error: Tensor


def observed_mean(values: Tensor) -> Estimate:
    """Mean over the rows of ``(N, ...)`` that are not NaN, and its standard error if they are independent.

    Raises:
        ValueError: If there is none in a column.
    """
    observed = ~values.isnan()
    count = observed.sum(0)
    if not bool((count > 0).all()):
        raise ValueError("y: expected an observed entry in each column, got none in one")
    mean = values.nanmean(0)
    deviation = (values - mean).masked_fill(~observed, 0.0)
    return Estimate(mean, norm(deviation.movedim(0, -1)) / ((count - 1) * count).to(values.dtype).sqrt())


@in_widest_precision
def log_score(mixture: Mixture, y: Any) -> Tensor:
    r"""Negative log-density :math:`-\log p(y)` in nats, shape ``(*sample, *batch)``; Good (1952).

    Entries of y that are NaN were not observed: the density is that of the others, and the score NaN if there are none.
    :class:`pyro_mdn.Targets` may have intervals, which count with minus the logarithm of their probability.
    """
    y = as_observations(mixture, y, "y")
    return -mixture.log_prob(y).masked_fill(missing(y).all(-1), torch.nan)


class Comparison(NamedTuple):
    """Mean log score of a prediction in nats, and how far it is behind the best one, with their standard errors."""

    log_score: float
    standard_error: float
    behind: float
    behind_standard_error: float


@torch.no_grad()
def compare(predictions: Mapping[str, Mixture], y: Any) -> dict[str, Comparison]:
    """Compare predictions of held-out targets by their log scores, row by row; the best comes first.

    For single networks and small ensembles, where leave-one-out cross-validation by importance sampling has no
    meaning; of rows that they were trained on, the scores say nothing.

    Args:
        predictions: Predictive distributions by name, ``batch_shape`` ``(N,)``, or ``(S, N)``, which are averaged.
        y: Held-out targets ``(N, D)``, or :class:`pyro_mdn.Targets`. Entries that are NaN were not observed; rows
            without any do not count.

    Raises:
        ValueError: If there is no prediction, or if shapes do not agree.

    References:
        Diebold & Mariano (1995), Comparing predictive accuracy.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> def normal(scale):
    ...     covariance = IsotropicCovariance(torch.full((4, 1), scale))
    ...     return GaussianMixture(torch.zeros(4, 1), torch.zeros(4, 1, 1), covariance)
    >>> result = compare({"wide": normal(2.0), "narrow": normal(1.0)}, torch.tensor([[0.5], [-0.5], [1.0], [-1.0]]))
    >>> list(result), round(result["wide"].behind, 2)
    (['narrow', 'wide'], 0.46)
    """
    if not predictions:
        raise ValueError("predictions: expected one at least, got none")
    losses, y = {}, as_targets(y, "y")
    y = y.unsqueeze(-1) if y.ndim == 1 else y
    for name, mixture in predictions.items():
        pooled = mixture.pool(0) if len(mixture.batch_shape) == 2 else mixture
        if y.ndim != 2 or pooled.batch_shape != y.shape[:1] or pooled.dim != y.shape[1]:
            expected = f"batch shape ({', '.join(map(str, y.shape[:1]))},) or (S, N) for y of shape {tuple(y.shape)}"
            raise ValueError(f"predictions[{name!r}]: expected {expected}, got {tuple(mixture.batch_shape)}")
        losses[name] = log_score(pooled, y).double()
    order = sorted(losses, key=lambda name: observed_mean(losses[name]).value.item())
    best = losses[order[0]]
    numbers = {name: (*observed_mean(losses[name]), *observed_mean(losses[name] - best)) for name in order}
    return {name: Comparison(*(number.item() for number in row)) for name, row in numbers.items()}


@in_widest_precision
def crps(mixture: Mixture, y: Any) -> Tensor:
    r"""Continuous ranked probability score of each output, in its units, in closed form.

    .. math:: \mathrm{CRPS}(F, y) = E|Y - y| - \tfrac12 E|Y - Y'|
              = \sum_k w_k A(y - \mu_k, \sigma_k)
              - \tfrac12 \sum_{kl} w_k w_l A(\mu_k - \mu_l, \sqrt{\sigma_k^2 + \sigma_l^2})

    with :math:`A(m, s) = E|m + s Z| = 2 s \varphi(m / s) + m (2 \Phi(m / s) - 1)`. Distances of angles are angular
    ones, the shorter way round, and their score is computed by quadrature.

    References:
        Grimit, Gneiting, Berrocal & Johnson (2006), The continuous ranked probability score for circular variables.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> crps(normal, torch.zeros(1))
    tensor([0.2337])
    """
    y, marginals = as_outcomes(mixture, y), mixture.univariate()
    return marginals.crps(y)


@in_widest_precision
def energy_score(mixture: Mixture, y: Any, *, num_samples: int = 1000) -> Estimate:
    r"""Energy score of all outputs jointly, in their units: the multivariate CRPS.

    .. math:: \mathrm{ES}(F, y) = E\lVert Y - y \rVert - \tfrac12 E\lVert Y - Y' \rVert

    In closed form, with standard error 0, for one output; otherwise from ``num_samples`` pairs of draws, with
    pathwise gradients.

    References:
        Gneiting & Raftery (2007), Strictly proper scoring rules, prediction, and estimation.
    """
    if mixture.dim == 1:
        value = crps(mixture, y).squeeze(-1)
        return Estimate(value, torch.zeros_like(value))
    mixture.components.require_line("energy_score", "crps is a score of each output")
    y = as_outcomes(mixture, y)
    if num_samples < 2:
        raise ValueError(f"num_samples: expected 2 at least, got {num_samples}")
    sample_shape = (num_samples, *(1,) * max(0, y.ndim - 1 - len(mixture.batch_shape)))
    first, second = mixture.rsample(sample_shape), mixture.rsample(sample_shape)
    to_target = 0.5 * (norm(first - y) + norm(second - y))
    scores = to_target - 0.5 * norm(first - second)
    deviation = (scores - scores.mean(0)).movedim(0, -1)
    return Estimate(scores.mean(0), norm(deviation) / math.sqrt(num_samples * (num_samples - 1)))


@in_widest_precision
def pinball(mixture: Mixture, y: Any, q: float) -> Tensor:
    r"""Quantile loss of each output at probability ``q``; Koenker & Bassett (1978).

    .. math:: (y - F^{-1}(q)) \, (q - 1\{y < F^{-1}(q)\})
    """
    if not 0 < q < 1:
        raise ValueError(f"q: expected a probability in (0, 1), got {q}")
    mixture.components.require_line("pinball", "crps is a score of angles")
    y = as_outcomes(mixture, y)
    error = y - mixture.icdf(q)
    return torch.maximum(q * error, (q - 1) * error)


@in_widest_precision
def interval_score(
    mixture: Mixture, y: Any, mass: float, *, kind: Literal["central", "shortest"] = "central"
) -> Tensor:
    r"""Width of each output's interval, plus a penalty for missing it; Winkler (1972).

    .. math:: (u - l) + \tfrac{2}{\alpha} (l - y)_+ + \tfrac{2}{\alpha} (y - u)_+, \qquad \alpha = 1 - \text{mass}
    """
    y = as_outcomes(mixture, y)
    lower, upper = mixture.interval(mass, kind=kind)
    missed = mixture.univariate().missed(y, lower, upper)
    return upper - lower + 2 / (1 - mass) * missed


@in_widest_precision
def coverage(mixture: Mixture, y: Any, mass: float, *, kind: Literal["central", "shortest"] = "central") -> Tensor:
    """Whether each output lies in its interval of probability ``mass``: 1 or 0, to be averaged; NaN if missing."""
    y = as_outcomes(mixture, y)
    lower, upper = mixture.interval(mass, kind=kind)
    inside = mixture.univariate().missed(y, lower, upper) <= 0
    return inside.to(mixture.dtype).masked_fill(y.isnan(), torch.nan)


@in_widest_precision
def interval_log_score(mixture: Mixture, y: Any, width: float) -> Tensor:
    r"""Negative log-probability, in nats, of the interval of that ``width`` around each output; never negative.

    .. math:: -\log\left( F(y + h/2) - F(y - h/2) \right)

    For targets on a grid of spacing h, where a density could grow without bound.

    Raises:
        ValueError: If the width is not positive.
    """
    if not width > 0:
        raise ValueError(f"width: expected a positive number, got {width}")
    y = as_outcomes(mixture, y)
    return -mixture.univariate().log_mass(y, 0.5 * width)


@in_widest_precision
def dawid_sebastiani(mixture: Mixture, y: Any) -> Tensor:
    r"""Score of mean and covariance alone, shape ``(*sample, *batch)``; Dawid & Sebastiani (1999).

    .. math:: \log\det\Sigma + (y - \mu)^\top \Sigma^{-1} (y - \mu)
    """
    y = as_outcomes(mixture, y)
    gaussian = mixture.as_gaussian()
    whitened = gaussian.whiten((y - mixture.mean).unsqueeze(-2))
    return (2 * gaussian.half_log_det() + whitened.square().sum(-1)).squeeze(-1)
