r"""Pareto-smoothed importance sampling: weights of draws that leave each row out, and their reliability."""

from __future__ import annotations

import math
import warnings

import numpy as np

from pyro_mdn.support.arrays import Array

__all__ = ["good_k", "log_mean_exp", "log_sum_exp", "smoothed_weights", "varies", "warn_if_unreliable"]

_FEWEST_TAIL = 5
_ROUNDING = 1e-5


def smoothed_weights(log_likelihood: Array, reff: float = 1.0) -> tuple[Array, Array]:
    r"""Compute normalised log-weights :math:`w_{sn} \propto 1 / p(y_n \mid \theta_s)`, and Pareto's k of each row.

    The largest weights of a row are replaced by quantiles of a generalised Pareto distribution fitted to them. A row
    that has the same density under all draws, up to rounding, weights the draws equally; this is exact, and k is 0. If
    no distribution fits, the weights are not changed and k is infinite. This is so if a quarter of the largest weights
    or more are equal to the largest of the others (a chain that is stuck), or too small for floating point.

    Args:
        log_likelihood: Log-likelihood of N rows under S draws, ``(N, S)``.
        reff: Effective share of independent draws among the S draws.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling.

    >>> log_weights, k = smoothed_weights(np.zeros((1, 100)))
    >>> float(np.exp(log_weights).sum().round(6)), float(k[0])
    (1.0, 0.0)
    """
    log_ratios = -np.asarray(log_likelihood, dtype=np.float64)
    log_ratios = log_ratios - log_ratios.max(-1, keepdims=True)
    draws = log_ratios.shape[-1]
    size = math.ceil(min(draws / 5, 3 * math.sqrt(draws / reff)))
    rows, changing = [_smoothed(row, size) for row in log_ratios], varies(log_likelihood)
    weights = np.where(changing[:, None], np.stack([row for row, _ in rows]), 0.0)
    return weights - log_sum_exp(weights)[:, None], np.where(changing, [k for _, k in rows], 0.0)


def varies(log_likelihood: Array) -> Array:
    """Check, for each of N rows of ``(N, S)``, whether its density depends on the draw by more than rounding."""
    values = np.asarray(log_likelihood, dtype=np.float64)
    return np.ptp(values, axis=-1) > _ROUNDING * (1 + abs(values).max(-1))


def good_k(draws: int) -> float:
    """Compute the largest Pareto's k for which a mean over this many draws is reliable."""
    return min(1 - 1 / math.log10(draws), 0.7)


def warn_if_unreliable(name: str, pareto_k: Array, draws: int, *, stacklevel: int = 3) -> bool:
    """Warn about rows whose Pareto's k is too large; return whether there are any."""
    bad = int((pareto_k > (limit := good_k(draws))).sum())
    if bad:
        got = f"{bad} of {len(pareto_k)} above it, at most {pareto_k.max():.2f}"
        why = "the draws are too far from a posterior without these rows, and what is estimated for them is unreliable"
        warnings.warn(
            f"{name}: expected Pareto's k up to {limit:.2f}, got {got}: {why}", UserWarning, stacklevel=stacklevel
        )
    return bad > 0


def log_sum_exp(values: Array) -> Array:
    """Compute the logarithm of the sum of exponentials along the last axis."""
    largest = values.max(-1, keepdims=True)
    return np.log(np.exp(values - largest).sum(-1)) + largest[..., 0]


def log_mean_exp(values: Array) -> Array:
    """Compute the logarithm of the mean of exponentials along the last axis."""
    return log_sum_exp(values) - math.log(values.shape[-1])


def _smoothed(log_ratios: Array, size: int) -> tuple[Array, float]:
    """Smooth the ``size`` largest of log-weights ``(S,)``, whose maximum is 0; also return Pareto's k."""
    order = np.argsort(log_ratios, kind="stable")
    tail, cutoff = order[-size:], math.exp(log_ratios[order[-size - 1]])
    k, scale = _generalized_pareto(np.exp(log_ratios[tail]) - cutoff)
    if not (math.isfinite(k) and math.isfinite(scale) and scale > 0):
        return log_ratios, math.inf
    unit = -np.log1p(-(np.arange(size) + 0.5) / size)  # quantiles of an exponential distribution
    excess = scale * (unit if abs(k) < 1e-12 else np.expm1(k * unit) / k)
    result = log_ratios.copy()
    result[tail] = np.minimum(np.log(cutoff + excess), 0.0)
    return result, k


def _generalized_pareto(excess: Array) -> tuple[float, float]:
    """Fit shape and scale to ascending numbers, by the empirical Bayes estimate of Zhang & Stephens (2009).

    The shape is shrunk towards 0.5, as if by ten additional numbers.
    """
    size = len(excess)
    quartile = excess[max(int(size / 4 + 0.5) - 1, 0)]
    if size < _FEWEST_TAIL or not quartile > 0:
        return math.inf, math.nan
    count = 30 + int(math.sqrt(size))
    with np.errstate(all="ignore"):  # results that are not finite mean that no distribution fits
        theta = 1 / excess[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quartile)
        shapes = np.log1p(-theta[:, None] * excess).mean(-1)
        profile = size * (np.log(-theta / shapes) - shapes - 1)
        mean = float(np.exp(profile - log_sum_exp(profile)) @ theta)
        shape = float(np.log1p(-mean * excess).mean())
        scale = -shape / mean
    return (size * shape + 5) / (size + 10), scale
