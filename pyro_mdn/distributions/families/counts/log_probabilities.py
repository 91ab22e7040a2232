r"""Log-probabilities of Poisson and negative binomial laws, accurate from rates of 1e-6 to 1e6.

They are computed as deviances from their largest values, in which no large numbers cancel.

References:
    Loader (2000), Fast and accurate computation of binomial probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log_negative_binomial", "log_poisson", "stirling_error"]


def log_poisson(k: Tensor, rate: Tensor) -> Tensor:
    """Log-probability that a Poisson variable is k."""
    some = k > 0
    n = torch.where(some, k, 1.0)
    log_prob = -stirling_error(n) - 0.5 * (2 * math.pi * n).log() - _deviance(n, rate)
    return torch.where(some, log_prob, -rate)


def log_negative_binomial(k: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """Log-probability that a negative binomial variable is k."""
    some = k > 0
    n = torch.where(some, k, 1.0)
    total = n + shape
    # n and the shape against their expectations among n + shape.
    share = total / (shape + rate)
    deviances = _deviance(n, share * rate) + _deviance(shape, share * shape)
    errors = stirling_error(total) - stirling_error(n) - stirling_error(shape)
    log_prob = errors - deviances + 0.5 * (shape / total / n).log() - 0.5 * math.log(2 * math.pi)
    return torch.where(some, log_prob, -shape * torch.log1p(rate / shape))


_FEW = 10.0
"""Numbers from which on the asymptotic series of Stirling's error is used."""

_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def stirling_error(n: Tensor) -> Tensor:
    r"""Compute :math:`\log \Gamma(n + 1) - (n + \tfrac12) \log n + n - \tfrac12 \log 2 \pi` for n > 0."""
    few = n < _FEW
    small, large = torch.where(few, n, 1.0), torch.where(few, _FEW, n)
    exact = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small - 0.5 * math.log(2 * math.pi)
    inverse, square = 1 / large, (1 / large).square()
    total = torch.zeros_like(large)
    for coefficient in reversed(_SERIES):
        total = total * square + coefficient
    return torch.where(few, exact, total * inverse)


def _deviance(n: Tensor, expected: Tensor) -> Tensor:
    r"""Compute :math:`n \log(n / m) + m - n`, of which the terms cancel for n near m."""
    t = (n - expected) / expected
    near = t.abs() < 0.1
    close, far = torch.where(near, t, 0.0), torch.where(near, 2 * expected, n)
    # (1 + t) log(1 + t) - t is the sum of (-t)^j / (j (j - 1)) from j = 2.
    series = torch.zeros_like(close)
    for j in range(18, 1, -1):
        series = series * -close + 1 / (j * (j - 1))
    return torch.where(near, expected * close.square() * series, far * (far.log() - expected.log()) + expected - far)
