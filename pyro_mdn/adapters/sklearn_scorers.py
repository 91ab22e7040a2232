r"""Score fitted scikit-learn estimators: ``scorer(estimator, X, y) -> float``, higher is better.

The functions are for ``scoring=`` of ``cross_val_score``, ``GridSearchCV`` and similar tools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_mdn import scores
from pyro_mdn.adapters.sklearn_targets import as_targets, as_weight, interval_targets
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import TargetsOrTensor

try:
    from sklearn.base import BaseEstimator
    from sklearn.metrics import r2_score
    from sklearn.pipeline import Pipeline
    from sklearn.utils.metadata_routing import UNUSED
except ImportError as error:
    raise ImportError("pyro_mdn.sklearn needs scikit-learn: in a checkout pip install '.[sklearn]'") from error

__all__ = [
    "Scorer",
    "concordance",
    "mean_r2",
    "neg_crps",
    "neg_integrated_brier",
    "neg_interval_score",
    "neg_log_score",
    "predictive_distribution",
]


def predictive_distribution(estimator: Any, X: Any) -> Mixture:
    """Return the predictive distribution of a fitted estimator, also inside of a pipeline or a search.

    A pipeline has ``predict`` of its last step, but not ``predict_distribution``. This function passes X through the
    steps before the last one. For a search it returns the distribution of the best estimator.

    Args:
        estimator: An estimator with ``predict_distribution``, a ``Pipeline`` that ends in one, or a search such as
            ``GridSearchCV`` over one.
        X: Inputs ``(N, n_features)``.

    Raises:
        ValueError: If the estimator has no distribution: a ``TransformedTargetRegressor``, for example, only predicts.
    """
    if hasattr(estimator, "best_estimator_"):
        return predictive_distribution(estimator.best_estimator_, X)
    if isinstance(estimator, Pipeline):
        before = estimator[:-1] if len(estimator) > 1 else None
        return predictive_distribution(estimator[-1], X if before is None else before.transform(X))
    if not hasattr(estimator, "predict_distribution"):
        raise ValueError(f"estimator: expected predict_distribution, got {type(estimator).__name__} without")
    return estimator.predict_distribution(X)


def neg_log_score(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    r"""Compute the mean log-likelihood :math:`\log p(y \mid x)` in nats: the log score with its sign changed.

    An entry of y that is NaN was not observed: its row counts with the density of its other entries, and a row
    without any observed entry does not count. Entries that are censored, or known to lie in an interval, count with
    their probability.

    Args:
        estimator: An estimator that :func:`predictive_distribution` takes.
        X: Inputs ``(N, n_features)``.
        y: Targets ``(N,)`` or ``(N, D)``, or what :func:`interval_targets` takes.
        sample_weight: Weights of the rows, ``(N,)``.

    Raises:
        ValueError: If there is no distribution, or if the targets or weights are not usable.
    """
    return -_mean(scores.log_score(*_known(estimator, X, y)), sample_weight)


def neg_crps(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Compute minus the CRPS (continuous ranked probability score), in the units of y.

    This is the mean over the observed rows, then over the outputs. Arguments and errors are those of
    :func:`neg_log_score`.
    """
    return -_mean(scores.crps(*_observed(estimator, X, y)), sample_weight)


def neg_interval_score(
    estimator: Any,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    mass: float = 0.9,
    kind: Literal["central", "shortest"] = "central",
) -> float:
    """Compute minus the interval score (Winkler, 1972), in the units of y.

    This is the mean over the observed rows, then over the outputs. Errors are those of :func:`neg_log_score`. Use
    ``functools.partial`` to set ``mass`` and ``kind``.

    Args:
        estimator: An estimator that :func:`predictive_distribution` takes.
        X: Inputs ``(N, n_features)``.
        y: Targets ``(N,)`` or ``(N, D)``.
        sample_weight: Weights of the rows, ``(N,)``.
        mass: Probability inside the interval.
        kind: ``"central"`` or ``"shortest"``.
    """
    return -_mean(scores.interval_score(*_observed(estimator, X, y), mass, kind=kind), sample_weight)


def neg_integrated_brier(
    estimator: Any, X: Any, y: Any, sample_weight: Any = None, *, times: Any, train: Any = None
) -> float:
    """Compute minus the integrated Brier score of times to an event that may be censored (Graf et al., 1999).

    This is the mean over the rows, then over the outputs. Errors are those of :func:`neg_log_score` and of
    :func:`pyro_mdn.scores.integrated_brier`. Use ``functools.partial`` to set ``times``.

    Args:
        estimator: An estimator that :func:`predictive_distribution` takes.
        X: Inputs ``(N, n_features)``.
        y: Times, as :func:`interval_targets` takes them.
        sample_weight: Weights of the rows, ``(N,)``.
        times: Times ``(T,)`` in ascending order, over which the score is averaged.
        train: Times whose censoring is estimated, likewise; by default y.
    """
    mixture, targets = _known(estimator, X, y)
    rows = interval_targets(train)
    rows = as_targets(train) if rows is None and train is not None else rows
    return -_mean(scores.integrated_brier(mixture, targets, times, rows), sample_weight)


def concordance(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Compute Harrell's C of times to an event that may be censored: the share of pairs in the right order.

    This is the mean over the outputs of :func:`pyro_mdn.scores.concordance`, whose errors it has, too.

    Args:
        estimator: An estimator that :func:`predictive_distribution` takes.
        X: Inputs ``(N, n_features)``.
        y: Times, as :func:`interval_targets` takes them.
        sample_weight: Not supported: pairs of rows have no weights.

    Raises:
        ValueError: If there are weights.
    """
    if sample_weight is not None:
        raise ValueError("sample_weight: expected none, because pairs of rows have no weights, got some")
    return scores.concordance(*_known(estimator, X, y)).mean().item()


class Scorer(BaseEstimator):
    """Wrap a scorer so that it takes part in metadata routing, like the results of ``make_scorer``.

    scikit-learn does not pass sample weights to a plain function, and gives no warning.

    Args:
        scorer: A function of an estimator, X, y and ``sample_weight``, such as :func:`neg_crps`.

    >>> Scorer(neg_crps).set_score_request(sample_weight=True)  # where routing is enabled
    Traceback (most recent call last):
    RuntimeError: This method is only available when metadata routing is enabled. ...
    """

    __metadata_request__score: ClassVar[dict[str, str]] = {"estimator": UNUSED}

    def __init__(self, scorer: Callable[..., float]) -> None:
        self.scorer = scorer

    def score(self, estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Score an estimator; higher is better."""
        return self.scorer(estimator, X, y, sample_weight)

    __call__ = score


def _known(estimator: Any, X: Any, y: Any) -> tuple[Mixture, TargetsOrTensor]:
    """Return predictive distributions and targets ``(N, D)``, of which some may be censored."""
    mixture, intervals = predictive_distribution(estimator, X), interval_targets(y)
    size = mixture.batch_shape[0], mixture.dim
    if intervals is not None and intervals.shape != size:
        raise ValueError(f"y: expected shape {size} as the prediction has it, got {tuple(intervals.shape)}")
    return mixture, as_targets(y, *size) if intervals is None else intervals


def _observed(estimator: Any, X: Any, y: Any) -> tuple[Mixture, Tensor]:
    mixture = predictive_distribution(estimator, X)
    return mixture, as_targets(y, mixture.batch_shape[0], mixture.dim)


def _mean(losses: Tensor, sample_weight: Any) -> float:
    """Compute the weighted mean over the rows of ``(N, ...)`` that are not NaN, then over all other dimensions."""
    losses = losses.reshape(len(losses), -1)
    weight = as_weight(sample_weight, len(losses)).unsqueeze(-1) * ~losses.isnan()
    total = weight.sum(0)
    if not bool((total > 0).all()):
        raise ValueError("y: expected an observed target of positive weight in each column, got none in one")
    return ((losses.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) * weight).sum(0) / total).mean().item()


def mean_r2(y: Tensor, mean: Tensor, weight: Tensor | None) -> float:
    """Compute R² of predicted means ``(N, D)`` over the observed rows, as the mean over outputs."""
    values = []
    for column, predicted in zip(y.T, mean.T, strict=True):
        seen = ~column.isnan()
        given = None if weight is None else weight[seen].numpy()
        values.append(r2_score(column[seen].numpy(), predicted[seen].numpy(), sample_weight=given))
    return float(np.mean(values))
