r"""Tail probabilities and quantiles of beta distributions in terms of logits, by scipy, with all derivatives.

Logits keep the digits of shares that are next to an end, and go on where these underflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_mdn.distributions.families.counts.tail_probabilities import TailProbability
from pyro_mdn.distributions.families.shares.beta_density import log_beta_density
from pyro_mdn.tensors.numerics import as_before, in_double

__all__ = ["log_beta_cdf", "lower_beta_quantile"]

Array = NDArray[np.float64]

_FAR = 690.0
"""Logit beyond which the distance from an end underflows, or nearly."""

_LEAST = 1e-290
"""Probability below which scipy's has too few digits, or none."""

_STEP = 1e-3
"""Step of differences for derivatives by the logit of the mean, and by the logarithm of the concentration."""

_EXACT, _STEPS = 1e-11, 40
"""Error of the logarithms of quantiles' probabilities, and most steps to reach it."""


def log_beta_cdf(z: Tensor, location: Tensor, concentration: Tensor) -> Tensor:
    """Log-probability that the logit of a share is at most the logit of its mean plus z, differentiable.

    Derivatives with respect to the parameters are differences over a small step, of which about 9 digits are right.
    Where the probability is below 1e-290, its logarithm has a relative error of up to 1e-8.

    Args:
        z: Logits of shares, less those of the means.
        location: Logits of the means.
        concentration: Concentrations.
    """
    result: Any = TailProbability.apply(_log_cdf, _slopes, False, z, location, concentration)
    return result


def lower_beta_quantile(q: Tensor, location: Tensor, concentration: Tensor) -> Tensor:
    """Logits of quantiles at probabilities q, less those of the means; without gradients."""
    parameters = [tensor.detach() for tensor in (q, location, concentration)]
    result: Any = TailProbability.apply(_quantile, _no_slopes, False, *parameters)
    return result


def _no_slopes(*tensors: Tensor, upper: bool) -> list[Tensor | None]:
    return [torch.zeros_like(tensor) for tensor in tensors]


def _slopes(z: Tensor, location: Tensor, concentration: Tensor, *, upper: bool) -> list[Tensor | None]:
    """Derivatives of :func:`log_beta_cdf`."""
    at, loc, log_size = in_double(z), in_double(location), in_double(concentration).log()
    level = log_beta_cdf(at, loc, log_size.exp())
    by_z = (log_beta_density(at, loc, log_size.exp()) - level).exp()
    by_location = _difference(lambda step: log_beta_cdf(at, loc + step, log_size.exp()))
    by_log_size = _difference(lambda step: log_beta_cdf(at, loc, (log_size + step).exp()))
    by_size = by_log_size * (-log_size).exp()
    return [as_before(slope.nan_to_num(0.0), z) for slope in (by_z, by_location, by_size)]


def _difference(function: Callable[[float], Tensor]) -> Tensor:
    ends = 8 * (function(_STEP) - function(-_STEP)) - (function(2 * _STEP) - function(-2 * _STEP))
    return ends / (12 * _STEP)


def _shapes(location: Array, concentration: Array) -> tuple[Array, Array]:
    """Both shapes of beta distributions."""
    from scipy import special

    return concentration * special.expit(location), concentration * special.expit(-location)


def _log_power(w: Array, a: Array, b: Array) -> Array:
    """Log-probability next to the lower end, a power of the distance from it, whose logarithm is w."""
    from scipy import special

    return a * w - np.log(a) - special.betaln(a, b)


def _log_cdf(z: Array, location: Array, concentration: Array, *, upper: bool = False) -> Array:
    from scipy import special

    shape = np.broadcast_shapes(z.shape, location.shape, concentration.shape)
    z, location, concentration = np.broadcast_arrays(np.atleast_1d(z), location, concentration)
    w, (a, b) = location + z, _shapes(location, concentration)
    # From the end that is nearer, whose distance has all digits.
    mass, share, near = np.full(w.shape, np.nan), special.expit(-np.abs(w)), w < 0
    special.betainc(a, b, share, out=mass, where=near)
    special.betaincc(b, a, share, out=mass, where=w >= 0)
    result = np.log(np.maximum(mass, _LEAST))
    for chosen, function in (
        (mass < _LEAST, lambda i: _deep(z[i], location[i], concentration[i])),
        (w < -_FAR, lambda i: _log_power(w[i], a[i], b[i])),
        (w > _FAR, lambda i: np.log1p(-np.exp(np.minimum(_log_power(-w[i], b[i], a[i]), 0.0)))),
    ):
        if chosen.any():
            result[chosen] = function(chosen)
    return np.minimum(result, 0.0).reshape(shape)


def _deep(z: Array, location: Array, concentration: Array) -> Array:
    """Log-probability far below the mean, to second order: the density falls as an exponential that bends."""
    from scipy import special

    share = special.expit(location + z)
    slope = np.maximum(concentration * (special.expit(location) - share), _LEAST)
    bend = concentration * share * (1 - share)
    return _log_density(z, location, concentration) - np.log(slope) - np.log1p(bend / slope**2)


def _quantile(q: Array, location: Array, concentration: Array, *, upper: bool) -> Array:
    """Logit of the quantile, less the location: scipy's, and where that is NaN or inexact, by Newton's method."""
    from scipy import special

    shape = np.broadcast_shapes(q.shape, location.shape, concentration.shape)
    q, location, concentration = np.broadcast_arrays(np.atleast_1d(q), location, concentration)
    a, b = _shapes(location, concentration)
    share = special.betaincinv(a, b, q)
    w, above = special.logit(share), share > 0.5
    w[above] = -special.logit(special.betainccinv(b[above], a[above], q[above]))
    # Next to an end the distance from it is a power of a probability.
    low, high = -_log_power(-np.log(q) / a, a, b) / a, _log_power(-np.log1p(-q) / b, b, a) / b
    w = np.where(low < -_FAR, low, np.where(high > _FAR, high, w))
    z = np.where(np.isfinite(w), w, low) - location
    return _refined(z, np.log(q), location, concentration).reshape(shape)


def _refined(z: Array, target: Array, *parameters: Array) -> Array:
    """Solve for a log-probability by Newton's method, which cannot diverge, since that is a concave function of z."""
    error = np.abs(_log_cdf(z, *parameters) - target)
    for _ in range(_STEPS):
        i = np.nonzero(error > _EXACT)
        if not len(i[0]):
            break
        own = [parameter[i] for parameter in parameters]
        level = _log_cdf(z[i], *own)
        z[i] = z[i] + (target[i] - level) * np.exp(level - _log_density(z[i], *own))
        error[i] = np.abs(_log_cdf(z[i], *own) - target[i])
    return z


def _log_density(*arrays: Array) -> Array:
    return log_beta_density(*(torch.from_numpy(np.asarray(array)) for array in arrays)).numpy()
