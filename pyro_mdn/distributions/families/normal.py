r"""Normal components: their family, and the standard normal law."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import erf, erfc, erfcx, ndtri

from pyro_mdn.distributions.families.as_pyro import normal_components
from pyro_mdn.distributions.families.elliptical import Elliptical
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.families.kernels import NormalKernel
from pyro_mdn.distributions.families.normal_spread import half_spread
from pyro_mdn.support.checks import is_differentiated, is_known, is_traced
from pyro_mdn.tensors.channels import sum_outputs
from pyro_mdn.tensors.mixture_density import Kernel
from pyro_mdn.tensors.numerics import exp
from pyro_mdn.tensors.univariate import GRID, Law, SymmetricLaw, TailAndDensity

__all__ = [
    "NORMAL",
    "Normal",
    "NormalComponents",
    "NormalLaw",
    "normal_cdf",
    "normal_log_cdf",
    "normal_log_density",
    "relative_log_density",
]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class NormalComponents(Elliptical):
    r"""Components :math:`\mathcal{N}(\mu_k, \Sigma_k)`.

    Args:
        locs: Means, shape ``(*batch, K, D)``.
        covariance: Covariances; a component axis of 1 ties them.
    """

    @property
    def has_independent_outputs(self) -> bool:
        return self.covariance.is_diagonal or self.dim == 1

    def radial_log_density(self, square: Tensor) -> Tensor:
        return -0.5 * square - _HALF_LOG_TWO_PI * self.dim

    def relative_log_prob(self, value: Tensor) -> Tensor:
        whitened = self.covariance.whiten(self.locs - value.unsqueeze(-2))
        return relative_log_density(whitened, self.covariance.half_log_det())

    def spread(self) -> Tensor | None:
        return None

    def law(self) -> Law:
        return NORMAL

    def kernel(self) -> tuple[Kernel, list[Tensor]] | None:
        whitening = self.covariance.whitening
        return None if whitening is None else (NormalKernel(whitening), self.covariance.factors())

    def given(self, square: Callable[[], Tensor], count: int) -> tuple[Tensor | None, Self]:
        return None, self

    def describe(self) -> str:
        return f"covariance={type(self.covariance).__name__}"

    def as_pyro(self) -> dist.TorchDistribution:
        return normal_components(self.covariance, self.locs)


@dataclass(frozen=True)
class Normal(Family):
    r"""Normal components, the default: :math:`\mathcal{N}(\mu_k, \Sigma_k)`.

    Args:
        noise: Noise model of the covariances.

    >>> Normal()
    Normal(noise=Diagonal(tied=False, homoscedastic=False, min_scale=0.001))
    """

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> NormalComponents:
        return NormalComponents(locs, self.noise.build(blocks[0], locs.shape[-1], unit))

    @property
    def kernel(self) -> Kernel | None:
        whitening = self.noise.whitening
        return None if whitening is None else NormalKernel(whitening)


def normal_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Compute Gaussian log-densities ``(*batch, K)`` from whitened residuals ``(*batch, K, D)`` and ½ log det Σ."""
    return -0.5 * sum_outputs(whitened.square()) - half_log_det - _HALF_LOG_TWO_PI * whitened.shape[-1]


def relative_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Compute :func:`normal_log_density` up to a constant that is common to all components.

    Far from all components, where squares overflow, the result is still finite for the nearest one.
    """
    # The unit is about the square root of the largest residual. It is a power of two of at least 1, so that nothing is
    # rounded.
    size = whitened.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1)
    unit = torch.exp2((0.5 * size.log2()).floor())
    squares = sum_outputs((whitened / unit).square())
    farther = squares - squares.detach().amin(-1, keepdim=True)
    return farther * (-0.5 * unit.squeeze(-1).square()) - half_log_det


# One output


@dataclass(frozen=True, eq=False)
class NormalLaw(SymmetricLaw):
    """Standard normal law."""

    def log_density(self, z: Tensor) -> Tensor:
        return -0.5 * z.square() - _HALF_LOG_TWO_PI

    def relative_log_density(self, z: Tensor, log_scale: Tensor) -> Tensor:
        return relative_log_density(z.unsqueeze(-1), log_scale)

    def cdf(self, z: Tensor) -> Tensor:
        return normal_cdf(z)

    def log_cdf(self, z: Tensor) -> Tensor:
        return normal_log_cdf(z)

    def quantile(self, q: Tensor) -> Tensor:
        return ndtri(q)

    def slope(self, z: Tensor) -> Tensor:
        return -z

    def mean_versine(self, rate: Tensor) -> Tensor:
        return -torch.expm1(-0.5 * rate.square())

    def mean_distance(self, z: Tensor) -> Tensor:
        return 2 * exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) + z * erf(math.sqrt(0.5) * z)

    def mean_below(self, z: Tensor) -> Tensor:
        # In the lower tail the density is taken out: what is left keeps its digits. At 0 this has the derivative 1.
        low = torch.where(z <= 0, z, -z)
        ratio = math.sqrt(math.pi / 2) * erfcx(-math.sqrt(0.5) * low)
        below = exp(-0.5 * low.square()) / math.sqrt(2 * math.pi) * (1 + low * ratio).clamp(min=0)
        return torch.where(z > 0, z, 0.0) + below

    def tail_and_density(self, weights: Tensor, locs: Tensor, scale: Tensor) -> TailAndDensity:
        precision, half_weight = math.sqrt(0.5) / scale, 0.5 * weights
        height = 2 / math.sqrt(math.pi) * precision * half_weight

        def function(point: Tensor) -> tuple[Tensor, Tensor]:
            z = (point.unsqueeze(-1) - locs) * precision
            return (half_weight * erfc(-z)).sum(-1), (height * exp(-z.square())).sum(-1)

        return function

    def outer_tail(self, z: Tensor) -> Tensor:
        return 0.5 * erfc(math.sqrt(0.5) * z.abs())

    def grid(self, like: Tensor) -> Tensor:
        return like.new_tensor(GRID)

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
        # In a unit of their size, which is a power of two, squares of scales neither over- nor underflow.
        unit = torch.exp2(scale.detach().amax(-1, keepdim=True).log2().round())
        return half_spread(weights, locs / unit, (scale / unit).square()) * unit.squeeze(-1)

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        return _log_mass(centre, half)


NORMAL = NormalLaw()


def normal_cdf(value: Tensor) -> Tensor:
    """Compute the standard normal cdf, accurate in the lower tail.

    There ``torch.special.ndtr`` rounds to multiples of eps.
    """
    return 0.5 * erfc(-math.sqrt(0.5) * value)


_FAR, _TERMS = 5.0, 18
"""From ``_FAR`` standard deviations on, ``_TERMS`` terms of a continued fraction are accurate in double precision."""


def normal_log_cdf(value: Tensor) -> Tensor:
    """Compute the logarithm of the standard normal cdf, accurate in both tails, as are its first two derivatives.

    The derivatives of ``torch.special.log_ndtr`` are wrong far out: in single precision from about -100 on.

    >>> normal_log_cdf(torch.tensor([-1e4, 0.0, 10.0]))
    tensor([-5.0000e+07, -6.9315e-01, -7.6199e-24])
    """
    if not is_traced(value):
        return _LogCdf.apply(value)
    known = _log_cdf(value)
    if not is_differentiated(value):
        return known
    # By the midpoint rule, which has the right first and second derivatives where both ends are the same point.
    finite = torch.where(value.isfinite(), value, 0.0)
    start = finite.detach()
    return known.detach() + (finite - start) * _density_ratio(0.5 * (finite + start))


@torch.no_grad()
def _log_cdf(value: Tensor) -> Tensor:
    low = value.clamp(max=0)
    lower = (0.5 * erfcx(-math.sqrt(0.5) * low)).log() - 0.5 * low.square()
    return torch.where(value < -1, lower, torch.log1p(-0.5 * erfc(math.sqrt(0.5) * value)))


class _LogCdf(torch.autograd.Function):
    """The logarithm of the cdf with its slope by hand, in a third of the operations of the midpoint rule."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(value)
        return _log_cdf(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        finite = torch.where(value.isfinite(), value, 0.0)
        slope = _density_ratio(finite) if torch.is_grad_enabled() else _slope_of_log_cdf(finite)
        return gradient * slope.masked_fill(~value.isfinite(), 0.0)


def _slope_of_log_cdf(value: Tensor) -> Tensor:
    """Compute :func:`_density_ratio` without a care for its derivatives."""
    lower = math.sqrt(2 / math.pi) / erfcx(-math.sqrt(0.5) * value.clamp(max=0))
    right = value.clamp(min=0)
    upper = torch.exp(-0.5 * right.square()) / math.sqrt(2 * math.pi) / (1 - 0.5 * erfc(math.sqrt(0.5) * right))
    return torch.where(value > 0, upper, lower)


def _density_ratio(value: Tensor) -> Tensor:
    """Compute the standard normal density over the cdf, the slope of :func:`normal_log_cdf`, differentiably."""
    right, left = value.clamp(min=0), (-value).clamp(min=_FAR)
    density = torch.exp(-0.5 * right.square()) / math.sqrt(2 * math.pi)
    # Not by clamp, whose derivative at its limits is 1 or 0, depending on the version of torch.
    between = torch.where((value >= -_FAR) & (value <= 0), value, -1.0)
    middle = math.sqrt(2 / math.pi) / erfcx(-math.sqrt(0.5) * between)
    ratio = middle
    if not (value.is_cpu and is_known(value)) or bool((value < -_FAR).any()):  # on a GPU to ask is to wait
        # By Laplace's continued fraction far out, where terms in the derivatives of erfcx would cancel.
        rest = 0.5 * (left + (left.square() + 4 * (_TERMS + 1)).sqrt())
        for k in range(_TERMS, 0, -1):
            rest = left + k / rest
        ratio = torch.where(value < -_FAR, rest, middle)
    return torch.where(value > 0, density / (1 - 0.5 * erfc(math.sqrt(0.5) * right)), ratio)


def _log_mass(centre: Tensor, half: Tensor) -> Tensor:
    """Compute the log-probability that a standard normal variable lies within ``half`` of ``centre``."""
    centre = centre.abs()
    narrow = half * (1 + centre) < torch.finfo(centre.dtype).eps ** 0.25
    aside = ~narrow & (half < centre)
    around = ~narrow & ~aside
    # In a narrow interval, differences would cancel: use the Taylor series of the density around its centre.
    small, at = half.masked_fill(~narrow, 1.0), centre.masked_fill(~narrow, 0.0)
    series = -0.5 * at.square() + small.log() + small.square() * (at.square() - 1) / 6 + 0.5 * math.log(2 / math.pi)
    # Around the mode: by symmetry, place the centre in the lower tail, where logarithms are accurate.
    wide, at = half.masked_fill(~around, 1.0), centre.masked_fill(~around, 0.0)
    upper, lower = normal_log_cdf(wide - at), normal_log_cdf(-wide - at)
    difference = upper + torch.log(-torch.expm1(lower - upper))
    # Beside the mode: take out the factor that both ends have in common, as their logarithms are huge and nearly equal.
    wide, at = half.masked_fill(~aside, 1.0), centre.masked_fill(~aside, 2.0)
    inner, outer = (erfcx(math.sqrt(0.5) * end) for end in (at - wide, at + wide))
    tail = -0.5 * (at - wide).square() + torch.log(0.5 * (inner - (-2 * at * wide).exp() * outer))
    return torch.where(narrow, series, torch.where(aside, tail, difference))
