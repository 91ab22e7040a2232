r"""Univariate mixtures on raw tensors: parameters ``(*batch, K)``, values ``(*batch)``."""

from __future__ import annotations  # torch 2.6 does not compile those of inner functions

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import erfc, erfcx, ndtri

from pyro_mdn.support.checks import is_differentiated, is_recorded, unwrapped
from pyro_mdn.tensors.kernels import exp, log_sum_exp

__all__ = [
    "follow_root",
    "log_density_by_level",
    "mixture_cdf",
    "mixture_log_cdf",
    "mixture_log_density",
    "mixture_quantile",
    "normal_cdf",
    "normal_log_cdf",
]


_FAR, _TERMS = 5.0, 18
"""Standard deviations from which on so many terms of a continued fraction are accurate in double precision."""


def normal_cdf(value: Tensor) -> Tensor:
    """Standard normal cdf, accurate in the lower tail, where ``torch.special.ndtr`` rounds to multiples of eps."""
    return 0.5 * erfc(-math.sqrt(0.5) * value)


def normal_log_cdf(value: Tensor) -> Tensor:
    """Logarithm of the standard normal cdf, with its derivatives up to the second, accurate in both tails.

    Those of ``torch.special.log_ndtr`` are wrong far out: in single precision from about -100 on.

    >>> normal_log_cdf(torch.tensor([-1e4, 0.0, 10.0]))
    tensor([-5.0000e+07, -6.9315e-01, -7.6199e-24])
    """
    with torch.no_grad():
        low = value.clamp(max=0)
        lower = (0.5 * erfcx(-math.sqrt(0.5) * low)).log() - 0.5 * low.square()
        known = torch.where(value < -1, lower, torch.log1p(-0.5 * erfc(math.sqrt(0.5) * value)))
    if not is_differentiated(value):
        return known
    # By the midpoint rule, whose first and second derivatives are right where both ends are the same point.
    finite = torch.where(value.isfinite(), value, 0.0)
    start = finite.detach()
    return known.detach() + (finite - start) * _density_ratio(0.5 * (finite + start))


def _density_ratio(value: Tensor) -> Tensor:
    """Standard normal density over cdf, the slope of :func:`normal_log_cdf`, in terms that autograd differentiates."""
    right, left = value.clamp(min=0), (-value).clamp(min=_FAR)
    density = torch.exp(-0.5 * right.square()) / math.sqrt(2 * math.pi)
    # Not by clamp, whose derivative at its ends is 1 or 0, depending on the version of torch.
    between = torch.where((value >= -_FAR) & (value <= 0), value, -1.0)
    middle = math.sqrt(2 / math.pi) / erfcx(-math.sqrt(0.5) * between)
    # Laplace's continued fraction, where the derivatives of erfcx would cancel.
    rest = 0.5 * (left + (left.square() + 4 * (_TERMS + 1)).sqrt())
    for k in range(_TERMS, 0, -1):
        rest = left + k / rest
    ratio = torch.where(value < -_FAR, rest, middle)
    return torch.where(value > 0, density / (1 - 0.5 * erfc(math.sqrt(0.5) * right)), ratio)


def mixture_log_density(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a univariate mixture."""
    standardized = (value.unsqueeze(-1) - locs) / scale
    constant = 0.5 * math.log(2 * math.pi)
    return log_sum_exp((logits - 0.5 * standardized.square() - scale.log() - constant).movedim(-1, 0))


def log_density_by_level(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of a univariate mixture, and its derivative with respect to the cdf."""
    standardized = (value.unsqueeze(-1) - locs) / scale
    joint = logits - 0.5 * standardized.square() - scale.log()
    total = joint.logsumexp(-1)
    log_density = total - 0.5 * math.log(2 * math.pi)
    share = exp(joint - total.unsqueeze(-1))  # quicker than a softmax over few components
    slope = -(share * standardized / scale).sum(-1)
    return log_density, slope * (-log_density).exp()


def mixture_cdf(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Cumulative distribution of a univariate mixture; relative accuracy in the lower tail."""
    return (logits.exp() * normal_cdf((value.unsqueeze(-1) - locs) / scale)).sum(-1).clamp(max=1)


def mixture_log_cdf(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Logarithm of the cumulative distribution of a univariate mixture, accurate in both tails."""
    inside = value.isfinite()
    standardized = (torch.where(inside, value, 0.0).unsqueeze(-1) - locs) / scale
    terms = logits + normal_log_cdf(standardized).clamp(min=-0.25 * torch.finfo(locs.dtype).max)
    lower = log_sum_exp(terms.movedim(-1, 0))
    # Above the median the logarithm of a number near 1 has no digits: that of what is missing to 1 has them.
    above = (logits.exp() * normal_cdf(-standardized)).sum(-1)
    upper = torch.log1p(-torch.where(above < 0.5, above, 0.0))
    ends = torch.where(value.isnan(), value, torch.where(value < 0, -math.inf, 0.0))
    return torch.where(inside, torch.where(above < 0.5, upper, lower), ends.to(lower))


def mixture_quantile(q: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Quantile of a univariate mixture, with gradients by the implicit function theorem.

    Quantiles above a half are those of the mirrored mixture at 1 - q, so that both tails are lower tails.
    """
    sign = torch.where(q > 0.5, -1.0, 1.0).to(q)
    tail = torch.where(q > 0.5, 1 - q, q)
    mirrored = sign.unsqueeze(-1) * locs
    with torch.no_grad():
        root = _solve_lower_tail(tail, logits, mirrored, scale).detach()  # in forward mode that is not one thing
    if not is_differentiated(q, logits, locs, scale):
        return sign * root

    def equation(point: Tensor) -> tuple[Tensor, Tensor]:
        slope = mixture_log_density(point, logits, mirrored, scale).exp()
        return mixture_cdf(point, logits, mirrored, scale) - tail, slope

    # Where the quantile is infinite, any finite point keeps NaN out of the gradients.
    finite = torch.where(tail > 0, root, mirrored[..., 0].detach())
    return sign * torch.where(tail > 0, follow_root(finite, equation), root)


def follow_root(root: Tensor, equation: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Give a known root the derivatives of the implicit function, up to the second.

    ``equation(point)`` returns residual and slope. Two Newton steps from the root move it by nothing, and their
    derivatives are the root's.
    """
    point = root
    for _ in range(2):
        residual, slope = equation(point)
        step = (residual - residual.detach()) / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        point = point - step
    return point


def _solve_lower_tail(tail: Tensor, logits: Tensor, locs: Tensor, scale: Tensor, max_steps: int = 200) -> Tensor:
    """Solve cdf(point) = tail, for tails up to a half: Newton on the logarithm, bisection where that does not help.

    The root lies between the smallest and the largest quantile of the components, and every step keeps it bracketed.
    """
    eps = torch.finfo(locs.dtype).eps
    ends = locs + scale * ndtri(tail).unsqueeze(-1)
    absent = logits == -math.inf
    low = ends.masked_fill(absent, math.inf).amin(-1)
    high = ends.masked_fill(absent, -math.inf).amax(-1)
    point, last = low + (high - low) / 2, high - low
    precision, half_weight = math.sqrt(0.5) / scale, 0.5 * logits.exp()
    height = 2 / math.sqrt(math.pi) * precision * half_weight
    tolerance = eps * (4 - 2 * tail.log())  # what rounding leaves of a cdf that low
    for _ in range(max_steps):
        standardized = (point.unsqueeze(-1) - locs) * precision
        cdf, density = (half_weight * erfc(-standardized)).sum(-1), (height * exp(-standardized.square())).sum(-1)
        excess = (cdf / tail).log()
        too_high = excess >= 0
        low, high = torch.where(too_high, low, point), torch.where(too_high, point, high)
        width, newton = high - low, point - excess * cdf / density  # NaN, which does not help, where a cdf underflows
        found = (excess.abs() <= tolerance) | ~(width > eps * torch.maximum(low.abs(), high.abs()))
        helps = (newton > low) & (newton < high) & (found | ((newton - point).abs() < last / 2))
        proposal = torch.where(helps, newton, torch.where(found, point, low + width / 2))
        if not is_recorded() and bool(unwrapped(found).all()):
            point = proposal
            break
        point, last = proposal, (proposal - point).abs()
    return torch.where(tail > 0, point, -math.inf).masked_fill(logits.isnan().any(-1), math.nan)
