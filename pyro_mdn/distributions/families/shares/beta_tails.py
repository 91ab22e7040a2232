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

_POLISHED = 2


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
    arrays = [in_double(tensor.detach()).cpu().numpy() for tensor in (q, location, concentration)]
    with np.errstate(all="ignore"):
        result = np.asarray(_quantile(*arrays))
    return as_before(torch.from_numpy(result), location)


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


def _shapes(location: Array, concentration: Array) -> tuple[Array, Array, Array]:
    """Both shapes of beta distributions, and the logarithm of the beta function of the two."""
    from scipy import special

    a, b = concentration * special.expit(location), concentration * special.expit(-location)
    return a, b, special.betaln(a, b)


def _log_cdf(z: Array, location: Array, concentration: Array, *, upper: bool) -> Array:
    from scipy import special

    a, b, log_beta = _shapes(location, concentration)
    w = location + z
    share, rest = special.expit(w), special.expit(-w)
    # From the end that is nearer, whose distance has all digits.
    mass = np.where(w < 0, special.betainc(a, b, share), special.betaincc(b, a, rest))
    result = np.where(mass < _LEAST, _deep(z, location, concentration), np.log(np.maximum(mass, _LEAST)))
    # Next to an end probabilities are powers of the distance.
    result = np.where(w < -_FAR, a * w - np.log(a) - log_beta, result)
    result = np.where(w > _FAR, np.log1p(-np.exp(np.minimum(-b * w - np.log(b) - log_beta, 0.0))), result)
    return np.where(np.isnan(mass), np.nan, np.minimum(result, 0.0))


def _deep(z: Array, location: Array, concentration: Array) -> Array:
    """Log-probability far below the mean, to second order: the density falls as an exponential that bends."""
    from scipy import special

    share = special.expit(location + z)
    slope = np.maximum(concentration * (special.expit(location) - share), _LEAST)
    bend = concentration * share * (1 - share)
    return _log_density(z, location, concentration) - np.log(slope) - np.log1p(bend / slope**2)


def _quantile(q: Array, location: Array, concentration: Array) -> Array:
    """Logit of the quantile by scipy, polished by two steps of Newton's method on logarithms where these help."""
    from scipy import special

    a, b, log_beta = _shapes(location, concentration)
    share, rest = special.betaincinv(a, b, q), special.betainccinv(b, a, q)
    w = np.where(share < 0.5, special.logit(share), -special.logit(rest))
    low, high = (np.log(q) + np.log(a) + log_beta) / a, -(np.log1p(-q) + np.log(b) + log_beta) / b
    z = np.where(low < -_FAR, low, np.where(high > _FAR, high, w)) - location
    for _ in range(_POLISHED):
        z = _nearer(z, np.log(q), location, concentration)
    return z


def _nearer(z: Array, target: Array, location: Array, concentration: Array) -> Array:
    level = _log_cdf(z, location, concentration, upper=False)
    step = (target - level) * np.exp(level - _log_density(z, location, concentration))
    after = _log_cdf(z + step, location, concentration, upper=False)
    return np.where(np.abs(after - target) < np.abs(level - target), z + step, z)


def _log_density(*arrays: Array) -> Array:
    return log_beta_density(*(torch.from_numpy(np.asarray(array)) for array in arrays)).numpy()
