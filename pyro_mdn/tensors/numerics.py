r"""Elementary functions that neither over- nor underflow, and constants of each precision."""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_mdn.support.checks import bounds, is_traced

__all__ = [
    "as_before",
    "constant",
    "exp",
    "in_double",
    "location_and_scale",
    "log_sum_exp",
    "moderate",
    "negligible",
    "norm",
    "positive",
    "shares",
    "single_at_least",
    "sum_logs",
    "winsorized",
]


def sum_logs(factors: Tensor) -> Tensor:
    """Sum logarithms over the first dimension.

    If all products of two factors are in range, it takes the logarithms of the products, which are half as many.
    """
    half = factors.shape[0] // 2
    # For small tensors, checking the range costs as much as the logarithms. On GPUs and under tracing we cannot branch
    # on values.
    if half > 1 and factors.numel() > 8192 and factors.is_cpu and not is_traced(factors):
        pairs = factors[:half] * factors[half : 2 * half]
        (low, high), limits = bounds(pairs), torch.finfo(pairs.dtype)
        if limits.tiny <= low.item() and high.item() <= limits.max:
            logs = pairs.log_().sum(0)
            return logs if factors.shape[0] == 2 * half else logs + factors[-1].log()
    return factors[0].log() if factors.shape[0] == 1 else factors.log().sum(0)


@functools.cache
def moderate(dtype: torch.dtype) -> float:
    """Return the number whose square is the largest one; numbers below it and above its reciprocal leave some room."""
    return torch.finfo(dtype).max ** 0.5


@functools.cache
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor, which torch adds in half the time of a Python number."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def norm(rows: Tensor) -> Tensor:
    """Compute the Euclidean norm along the last axis; no square over- or underflows, and the gradient at 0 is 0."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    unit = largest.masked_fill((largest == 0) | (largest == math.inf), 1.0)
    return unit.squeeze(-1) * (rows / unit).norm(dim=-1)


def in_double(tensor: Tensor) -> Tensor:
    """Convert to double precision, on the CPU where a device has none; :func:`as_before` converts back."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def as_before(tensor: Tensor, like: Tensor) -> Tensor:
    """Convert to the precision and the device of another tensor, first the precision."""
    return tensor.to(like.dtype).to(like.device)


def location_and_scale(rows: Tensor, *, common_unit: bool = False) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation, in float64, of the columns of ``(N, ...)``, gross outliers moved near.

    NaN are left out. A constant column has a scale of 1. Outliers do not decide the scale (see :func:`winsorized`),
    unless the standard deviation with them is 1e8 times as large, since their squares have to be numbers.

    Args:
        rows: The data.
        common_unit: Whether all columns have one scale, of shape ``(1,)``: the root mean square of the standard
            deviations of the columns that are not constant, or 1 if all columns are constant.
    """
    near = winsorized(rows).double()
    location, scale = _moments(near)
    varies = scale > 4 * torch.finfo(rows.dtype).eps * near.nan_to_num().abs().amax(0)
    scale = torch.maximum(scale, 1e-8 * _moments(rows.double())[1])
    if common_unit:
        varying = scale[varies]
        scale, varies = varying.square().mean().sqrt().reshape(1), varies.any()
    return location, torch.where(varies, scale, 1.0)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    location = rows.nanmean(0)
    return location, (rows - location).square().nanmean(0).sqrt()


# Multiples of the distance between the lowest and the highest decile: 26 standard deviations of a normal distribution,
# and where of Student-t draws with three degrees of freedom one in 160 000 lies.
_REACH = 10.0


def winsorized(rows: Tensor) -> Tensor:
    """Move gross outliers in the columns of ``(N, ...)`` to the nearest limit (Tukey, 1962); NaN stays NaN.

    The limits are ten times the distance between the lowest and the highest decile away from the median. In columns
    where these deciles are equal up to rounding, nothing is moved.

    >>> winsorized(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10_000]))
    tensor([ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 85.])
    """
    ordered, last = rows.sort(0).values, (~rows.isnan()).sum(0, keepdim=True) - 1  # NaN come last
    low, median, high = (in_double(ordered.gather(0, (q * last.clamp(min=0)).long())[0]) for q in (0.1, 0.5, 0.9))
    differ = high - low > 4 * torch.finfo(rows.dtype).eps * torch.maximum(low.abs(), high.abs())
    reach = torch.where(differ, _REACH * (high - low), math.inf)
    return as_before(in_double(rows).clamp(median - reach, median + reach), rows)


# A share of a sum that is too small to show in any result counts as 0. Otherwise its products with gradients become
# subnormal numbers, for which a CPU may take ten times as long.
_NEGLIGIBLE = {
    dtype: min(torch.finfo(dtype).tiny ** 0.75, torch.finfo(dtype).eps ** 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def negligible(dtype: torch.dtype) -> float:
    """Return the largest share of a sum that counts as 0: 4e-29 in single precision.

    >>> round(math.log10(negligible(torch.float32)), 1)
    -28.4
    """
    return _NEGLIGIBLE[dtype]


def exp(exponent: Tensor) -> Tensor:
    """Compute the exponential; a result that would underflow becomes about the smallest normal number.

    A CPU may take thirty times as long for results that underflow.

    >>> exp(torch.tensor([0.0, -1e6]))
    tensor([1.0000e+00, 3.1953e-38])
    """
    return exponent.clamp(min=math.log(torch.finfo(exponent.dtype).tiny) + 1).exp()


def log_sum_exp(terms: Tensor) -> Tensor:
    """Compute the log-sum-exp over the first dimension; its gradient is exactly 0 at :func:`negligible` terms."""
    return _raised(terms).logsumexp(0)


def shares(terms: Tensor) -> Tensor:
    """Compute the softmax over the first dimension; :func:`negligible` shares and their gradients are exactly 0."""
    # Twice the limit, because rounding may leave a raised share slightly above it.
    return torch.threshold(_raised(terms).softmax(0), 2 * negligible(terms.dtype), 0.0)


def _raised(terms: Tensor) -> Tensor:
    """Raise terms of negligible share to the largest such term; raised terms have no gradient."""
    top = terms.detach().amax(0, keepdim=True)
    return terms.clamp(min=top + math.log(negligible(terms.dtype)))


def single_at_least(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to which these promote, or single precision if that is wider.

    >>> single_at_least(torch.bfloat16), single_at_least(torch.float16, torch.float64)
    (torch.float32, torch.float64)
    """
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def positive(raw: Tensor, least: float) -> Tensor:
    """Compute the softplus of ``raw`` plus ``least``."""
    scale = softplus(raw)
    if is_traced(raw):
        return scale + least  # a traced tensor that is differentiated must not change in place
    return scale.add_(constant(least, scale.dtype))
