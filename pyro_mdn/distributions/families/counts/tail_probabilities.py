r"""Tail probabilities of Poisson and negative binomial laws, by the incomplete gamma and beta functions of scipy.

Those of torch lose up to seven digits in double precision, and there is no incomplete beta function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_mdn.distributions.families.counts.log_probabilities import log_negative_binomial, log_poisson
from pyro_mdn.tensors.numerics import as_before, in_double

__all__ = ["TailProbability", "beta_tail", "gamma_tail"]

Array = NDArray[np.float64]


def gamma_tail(n: Tensor, rate: Tensor, *, upper: bool) -> Tensor:
    """Probability that a Poisson variable is less than n, or at least n, differentiable in the rate.

    Args:
        n: Integers; at 0 and below, nothing is less.
        rate: Rates.
        upper: Whether to compute the probability of less than n, the upper tail of a gamma distribution.
    """
    result: Any = TailProbability.apply(_poisson, _slopes_of_poisson, upper, n, rate)
    return result


def beta_tail(n: Tensor, shape: Tensor, rate: Tensor, *, upper: bool) -> Tensor:
    """Probability that a negative binomial variable is less than n, or at least n, differentiable.

    Derivatives with respect to the shape are differences over a small step, of which about 11 digits are right, and of
    second derivatives 7.

    Args:
        n: Integers; at 0 and below, nothing is less.
        shape: Shapes r.
        rate: Means.
        upper: Whether to compute the probability of less than n, the upper tail of a beta distribution.
    """
    result: Any = TailProbability.apply(_negative_binomial, _slopes_of_negative_binomial, upper, n, shape, rate)
    return result


class TailProbability(torch.autograd.Function):
    """An elementwise function of arrays, in double precision, with derivatives in torch, for all of its transforms.

    It is called with a function of arrays, a function of tensors that gives the derivatives by each, ``None`` for none,
    what both take as ``upper``, and the tensors.
    """

    @staticmethod
    def forward(function: Any, slopes: Any, upper: bool, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        arrays = [tensor.detach().cpu().double().numpy() for tensor in tensors]
        with np.errstate(all="ignore"):
            result = np.asarray(function(*arrays, upper=upper))
        return as_before(torch.from_numpy(result), tensors[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.slopes, ctx.upper, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes, tensors = ctx.slopes(*ctx.saved_tensors, upper=ctx.upper), ctx.saved_tensors
        pairs = zip(slopes, tensors, strict=True)
        return None, None, None, *(None if s is None else (grads[0] * s).sum_to_size(t.shape) for s, t in pairs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes = ctx.slopes(*ctx.saved_tensors, upper=ctx.upper)
        pairs = zip(slopes, tangents[3:], strict=True)
        total: Any = sum(s * t for s, t in pairs if s is not None and t is not None)
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *given: Any) -> tuple[Any, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(given[3:], in_dims[3:], strict=True)]
        mapped = [dim is not None for dim in in_dims[3:]]
        # The mapped dimension stays in front where a tensor has fewer dimensions than others.
        ndim = max(t.ndim + (not first) for t, first in zip(tensors, mapped, strict=True))
        aligned = [
            t.reshape(len(t), *(1,) * (ndim - t.ndim), *t.shape[1:]) if first else t
            for t, first in zip(tensors, mapped, strict=True)
        ]
        return TailProbability.apply(*given[:3], *aligned), 0


def _slopes_of_poisson(n: Tensor, rate: Tensor, *, upper: bool) -> list[Tensor | None]:
    """Derivative of :func:`gamma_tail` by the rate."""
    slope = torch.where(n > 0, log_poisson(n - 1, rate).exp(), 0.0)
    return [None, -slope if upper else slope]


_STEP = 1e-4


def _slopes_of_negative_binomial(n: Tensor, shape: Tensor, rate: Tensor, *, upper: bool) -> list[Tensor | None]:
    """Derivatives of :func:`beta_tail` by the shape and the mean."""
    # Counts that are weighted by the rate of which they were drawn are negative binomial again.
    by_rate = torch.where(n > 0, log_negative_binomial(n - 1, shape + 1, rate * (1 + 1 / shape)).exp(), 0.0)
    wide = [in_double(tensor) for tensor in (n, shape, rate)]
    total = torch.zeros_like(wide[1])
    for steps, coefficient in ((1, 8.0), (2, -1.0)):
        for sign in (1, -1):
            end = beta_tail(wide[0], wide[1] * (1 + sign * steps * _STEP), wide[2], upper=upper)
            total = total + sign * coefficient * end
    return [None, as_before(total / (12 * _STEP * wide[1]), shape), -by_rate if upper else by_rate]


def _poisson(n: Array, rate: Array, *, upper: bool) -> Array:
    from scipy import special

    function = special.gammaincc if upper else special.gammainc
    return np.where(n > 0, function(np.maximum(n, 1), rate), 0.0 if upper else 1.0)


def _negative_binomial(n: Array, shape: Array, rate: Array, *, upper: bool) -> Array:
    from scipy import special

    function = special.betaincc if upper else special.betainc
    return np.where(n > 0, function(np.maximum(n, 1), shape, rate / (shape + rate)), 0.0 if upper else 1.0)
