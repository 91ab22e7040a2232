r"""Tail probabilities of Poisson and negative binomial laws, by the incomplete gamma and beta functions of scipy.

Those of torch lose up to seven digits in double precision, and there is no incomplete beta function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["beta_tail", "gamma_tail"]

Array = NDArray[np.float64]


def gamma_tail(n: Tensor, rate: Tensor, *, upper: bool) -> Tensor:
    """Probability that a Poisson variable is less than n, or at least n, differentiable once in the rate.

    Args:
        n: Integers; at 0 and below, nothing is less.
        rate: Rates.
        upper: Whether to compute the probability of less than n, the upper tail of a gamma distribution.
    """
    result: Any = _GammaTail.apply(n, rate, upper)
    return result


def beta_tail(n: Tensor, shape: Tensor, rate: Tensor, *, upper: bool) -> Tensor:
    """Probability that a negative binomial variable is less than n, or at least n, differentiable once.

    Derivatives with respect to the shape are central differences, of which about 10 digits are right.

    Args:
        n: Integers; at 0 and below, nothing is less.
        shape: Shapes r.
        rate: Means.
        upper: Whether to compute the probability of less than n, the upper tail of a beta distribution.
    """
    result: Any = _BetaTail.apply(n, shape, rate, upper)
    return result


class _GammaTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: Tensor, rate: Tensor, upper: bool) -> Tensor:
        ctx.save_for_backward(n, rate)
        ctx.upper = upper
        return _computed(lambda n, rate: _poisson(n, rate, upper=upper), n, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, rate = ctx.saved_tensors
        density = _computed(lambda n, rate: _poisson(n, rate, upper=True) - _poisson(n - 1, rate, upper=True), n, rate)
        slope = -density if ctx.upper else density
        return None, (grads[0] * slope).sum_to_size(rate.shape), None


class _BetaTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: Tensor, shape: Tensor, rate: Tensor, upper: bool) -> Tensor:
        ctx.save_for_backward(n, shape, rate)
        ctx.upper = upper
        return _computed(lambda n, shape, rate: _negative_binomial(n, shape, rate, upper=upper), n, shape, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, shape, rate = ctx.saved_tensors
        sign = -1.0 if ctx.upper else 1.0
        by_rate = _computed(_slope_of_beta, n, shape, rate)
        by_shape = _computed(_difference_of_beta, n, shape, rate)
        of_shape, of_rate = (grads[0] * slope * sign for slope in (by_shape, by_rate))
        return None, of_shape.sum_to_size(shape.shape), of_rate.sum_to_size(rate.shape), None


def _computed(function: Callable[..., Array], *tensors: Tensor) -> Tensor:
    """Apply a function of arrays in double precision, on the CPU."""
    arrays = [tensor.detach().double().cpu().numpy() for tensor in tensors]
    with np.errstate(all="ignore"):
        result = np.asarray(function(*arrays))
    return torch.from_numpy(result).to(tensors[-1])


def _poisson(n: Array, rate: Array, *, upper: bool) -> Array:
    from scipy import special

    function = special.gammaincc if upper else special.gammainc
    return np.where(n > 0, function(np.maximum(n, 1), rate), 0.0 if upper else 1.0)


def _negative_binomial(n: Array, shape: Array, rate: Array, *, upper: bool) -> Array:
    from scipy import special

    function = special.betaincc if upper else special.betainc
    return np.where(n > 0, function(np.maximum(n, 1), shape, rate / (shape + rate)), 0.0 if upper else 1.0)


def _slope_of_beta(n: Array, shape: Array, rate: Array) -> Array:
    """Derivative of the probability of at least n by the mean."""
    from scipy import special

    m = np.maximum(n, 1)
    share = rate / (shape + rate)
    log_density = special.xlogy(m - 1, share) - (shape + 1) * np.log1p(rate / shape) - special.betaln(m, shape)
    return np.where(n > 0, np.exp(log_density) / shape, 0.0)


_STEP = 1e-5


def _difference_of_beta(n: Array, shape: Array, rate: Array) -> Array:
    """Derivative of the probability of at least n by the shape."""
    ends = [_negative_binomial(n, shape * (1 + step), rate, upper=False) for step in (_STEP, -_STEP)]
    return (ends[0] - ends[1]) / (2 * _STEP * shape)
