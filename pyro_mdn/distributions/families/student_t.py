r"""Student-t components: heavier tails than the normal, so that outliers pull less."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import ndtri

from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.families.elliptical import Elliptical
from pyro_mdn.distributions.families.family import Block, Family
from pyro_mdn.distributions.families.kernels import EllipticalKernel, RadialLaw
from pyro_mdn.support.checks import bounds, is_recorded, plain_number, shown
from pyro_mdn.tensors.mixture_density import Kernel
from pyro_mdn.tensors.numerics import positive
from pyro_mdn.tensors.tensor_batch import stored
from pyro_mdn.tensors.univariate import Law, SymmetricLaw

__all__ = ["StudentT", "StudentTComponents", "StudentTLaw", "StudentTRadial"]


@dataclass(frozen=True, eq=False)
class StudentTComponents(Elliptical):
    r"""Multivariate Student-t components with :math:`\nu_k` degrees of freedom.

    .. math:: p_k(y) \propto \left(1 + \tfrac{1}{\nu_k} (y - \mu_k)^\top \Sigma_k^{-1} (y - \mu_k)
              \right)^{-(\nu_k + D) / 2}

    Marginals and conditionals are again Student-t. The mean exists for :math:`\nu > 1`, and the covariance
    :math:`\nu / (\nu - 2) \, \Sigma` for :math:`\nu > 2`.

    Args:
        locs: Locations, shape ``(*batch, K, D)``.
        covariance: Operator of the scale matrices :math:`\Sigma_k`; a component axis of 1 ties them.
        df: Degrees of freedom, 1 at least, shape ``(*batch, K)``; a component axis of 1 ties them.

    References:
        Kotz & Nadarajah (2004), Multivariate t Distributions and Their Applications.
    """

    df: Tensor = stored(0)

    def radial_log_density(self, square: Tensor) -> Tensor:
        return _RADIAL.log_density(square, self.dim, self.df)

    def spread(self) -> Tensor | None:
        excess = (self.df - 2).clamp(min=0)
        return torch.where(excess > 0, (self.df / excess.masked_fill(excess == 0, 1.0)).sqrt(), math.inf)

    def mean(self) -> Tensor:
        return torch.where(self.df.unsqueeze(-1) > 1, self.locs, math.nan)

    def law(self) -> Law:
        return StudentTLaw(self.df)

    def kernel(self) -> tuple[Kernel, list[Tensor]] | None:
        whitening = self.covariance.whitening
        if whitening is None:
            return None
        return EllipticalKernel(whitening, _RADIAL, 1), [*self.covariance.factors(), self.df.unsqueeze(-1)]

    def given(self, square: Callable[[], Tensor], count: int) -> tuple[Tensor | None, Self]:
        df = self.df + count
        return ((self.df + square()) / df).sqrt(), replace(self, df=df)

    def draw(self) -> Tensor:
        df = self.df.expand(self.locs.shape[:-1])
        chi = torch.distributions.Gamma(0.5 * df, 1.0, validate_args=False).sample().mul(2)
        return self.locs + self.covariance.colorize(torch.randn_like(self.locs)) * (df / chi).sqrt().unsqueeze(-1)

    def as_pyro(self) -> dist.TorchDistribution:
        shape = self.locs.shape[:-1]
        scale_tril = FullCovariance.from_root(self.covariance.root()).scale_tril().expand(*shape, -1, -1)
        return dist.MultivariateStudentT(self.df.expand(shape), self.locs, scale_tril, validate_args=False)

    def validate(self) -> None:
        super().validate()
        low, high = bounds(self.df)
        if not bool((low >= 1) & high.isfinite()):
            got = f"{low.item():.3g} to {high.item():.3g}"
            raise ValueError(f"df: expected finite degrees of freedom, 1 at least, got {got}")


@dataclass(frozen=True)
class StudentT(Family):
    r"""Student-t components, for robust regression: outliers pull the locations and scales less.

    Args:
        noise: Noise model of the scale matrices.
        df: Degrees of freedom, 1 at least. By default they are learned for each component, the same for every input.
        min_df: Limit above which learned degrees of freedom stay; from 2 on, all variances exist.

    Raises:
        ValueError: If a number is out of range.

    References:
        Lange, Little & Taylor (1989), Robust statistical modeling using the t distribution.

    >>> StudentT(df=4).df
    4.0
    """

    df: float | None = None
    min_df: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("df", "min_df"):
            value = getattr(self, name)
            if value is None and name == "df":
                continue
            number = float(plain_number(value))
            if not 1 <= number < math.inf:
                raise ValueError(f"{name}: expected finite degrees of freedom, 1 at least, got {shown(value)}")
            object.__setattr__(self, name, number)

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> StudentTComponents:
        covariance = self.noise.build(blocks[0], locs.shape[-1], unit)
        if self.df is not None:
            return StudentTComponents(locs, covariance, locs.new_full((1,), self.df))
        return StudentTComponents(locs, covariance, positive(blocks[1].squeeze(-1), self.min_df))

    def blocks(self, dim: int) -> list[Block]:
        learned = [] if self.df is not None else [Block(1, tied=False, homoscedastic=True)]
        return [*super().blocks(dim), *learned]

    def start(self, scale: Tensor) -> list[Tensor]:
        learned = [] if self.df is not None else [scale.new_full((len(scale), 1), _START)]
        return [*super().start(scale), *learned]

    @property
    def kernel(self) -> Kernel | None:
        whitening = self.noise.whitening
        if whitening is None:
            return None
        if self.df is None:
            return EllipticalKernel(whitening, RawStudentTRadial(self.min_df), 1)
        return EllipticalKernel(whitening, KnownStudentTRadial(self.df), 0)


_START = 6.0
"""Raw channel at the start: by default about eight degrees of freedom, with a density not far from the normal one."""


class StudentTRadial(RadialLaw):
    r"""Student-t density at a squared distance q, with one parameter, the degrees of freedom :math:`\nu`.

    .. math:: g(q) = \log\frac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2)} - \tfrac{D}{2} \log(\pi \nu)
              - \tfrac{\nu + D}{2} \log(1 + q / \nu)
    """

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        (df,) = parameters
        return _log_normalizer(df, dim) - 0.5 * (df + dim) * torch.log1p(square / df)

    def derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        (df,) = parameters
        radial = (df + dim) / (df + square)
        slope = 0.5 * (radial * square / df - torch.log1p(square / df))
        return radial, slope + _normalizer_slope(df, dim)


@dataclass(frozen=True)
class RawStudentTRadial(RadialLaw):
    """Student-t density with a raw channel as parameter: the degrees of freedom are its softplus plus ``min_df``."""

    min_df: float

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        return _RADIAL.log_density(square, dim, positive(parameters[0], self.min_df))

    def derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        radial, slope = _RADIAL.derivatives(square, dim, positive(parameters[0], self.min_df))
        return radial, slope * parameters[0].sigmoid()


@dataclass(frozen=True)
class KnownStudentTRadial(RadialLaw):
    """Student-t density with known degrees of freedom, and no parameter."""

    df: float

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        return _RADIAL.log_density(square, dim, square.new_tensor(self.df))

    def derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        return ((self.df + dim) / (self.df + square),)


_RADIAL = StudentTRadial()

# For many degrees of freedom, the gamma functions of the density are huge and cancel. The normaliser is therefore
# computed relative to that of the normal density.

_SHIFT = 12
"""Number of recursions of the gamma function after which a few terms of its asymptotic series are accurate."""

_SERIES = (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432)
"""Coefficients of :math:`\\log(\\Gamma(x + 1/2) / \\Gamma(x)) - \\tfrac12 \\log x` in odd powers of 1/x."""


def _log_normalizer(df: Tensor, dim: int) -> Tensor:
    r"""Compute the log of :math:`\Gamma((\nu + D) / 2) / \Gamma(\nu / 2) \, (\pi \nu)^{-D/2}` without cancellation."""
    half = 0.5 * df
    first = 0.5 * (dim % 2)
    total = -0.5 * dim * math.log(2 * math.pi) * torch.ones_like(half)
    for i in range(dim // 2):
        total = total + torch.log1p((first + i) / half)
    if dim % 2 == 0:
        return total
    total = total - torch.log1p(0.5 / (half.unsqueeze(-1) + _steps(half))).sum(-1)
    shifted = half + _SHIFT
    total = total + 0.5 * torch.log1p(_SHIFT / half)
    return total + sum(c / shifted ** (2 * i + 1) for i, c in enumerate(_SERIES))


def _steps(like: Tensor) -> Tensor:
    return torch.arange(_SHIFT, dtype=like.dtype, device=like.device)


def _relation(df: Tensor) -> Tensor:
    r"""Compute the log of :math:`\Gamma((\nu + 1) / 2) / \Gamma(\nu / 2) \, (\nu / 2)^{-1/2}`, whose limit is 0."""
    return _log_normalizer(df, 1) + 0.5 * math.log(2 * math.pi)


def _normalizer_slope(df: Tensor, dim: int) -> Tensor:
    """Compute the derivative of :func:`_log_normalizer` with respect to the degrees of freedom."""
    half = 0.5 * df
    first = 0.5 * (dim % 2)
    total = torch.zeros_like(half)
    for i in range(dim // 2):
        total = total - (first + i) / (half * (half + first + i))
    if dim % 2:
        steps = half.unsqueeze(-1) + _steps(half)
        total = total + (0.5 / (steps * (steps + 0.5))).sum(-1)
        shifted = half + _SHIFT
        total = total - 0.5 * _SHIFT / (half * shifted)
        total = total - sum((2 * i + 1) * c / shifted ** (2 * i + 2) for i, c in enumerate(_SERIES))
    return 0.5 * total


@dataclass(frozen=True, eq=False)
class StudentTLaw(SymmetricLaw):
    r"""Student-t law with ``df`` degrees of freedom.

    Its tail probabilities are integrals of a nearly normal function, where :math:`w^2 = \nu \log(1 + z^2 / \nu)`:

    .. math:: P(Z > z) = c_\nu \int_w^\infty e^{-s^2 / 2} \, k(s^2 / \nu) \, ds, \qquad
              k(v) = \sqrt{v / (1 - e^{-v})}

    Gauss-Legendre quadrature computes them to rounding error for all z and all degrees of freedom from 1 on, with
    derivatives with respect to both.
    """

    df: Tensor = stored(0)

    def log_density(self, z: Tensor) -> Tensor:
        return _RADIAL.log_density(z.square(), 1, self.df)

    def slope(self, z: Tensor) -> Tensor:
        return -(self.df + 1) * z / (self.df + z.square())

    def cdf(self, z: Tensor) -> Tensor:
        lower = z <= 0
        tail = self._log_tail(torch.where(lower, -z, z)).exp()
        return torch.where(lower, tail, 1 - tail)

    def log_cdf(self, z: Tensor) -> Tensor:
        lower = z <= 0
        log_tail = self._log_tail(torch.where(lower, -z, z))
        return torch.where(lower, log_tail, torch.log1p(-torch.where(lower, -1.0, log_tail).exp()))

    def quantile(self, q: Tensor) -> Tensor:
        with torch.no_grad():
            log_q, w = q.log(), -ndtri(q)
            for _ in range(_NEWTON_STEPS):
                log_tail = self._log_integral(w)
                log_slope = _log_normalizer(self.df, 1) - 0.5 * w.square() + _log_bend(w.square() / self.df)
                w = (w + (log_tail - log_q) * (log_tail - log_slope).exp()).clamp(min=0).nan_to_num(math.inf)
            v = w.square() / self.df
            z = self.df.sqrt() * (0.5 * v).exp() * (-torch.expm1(-v)).sqrt()
            return -torch.where(q > 0, z, math.inf)

    def mean_distance(self, z: Tensor) -> Tensor:
        lower = z <= 0
        inside = 1 - 2 * self._log_tail(torch.where(lower, -z, z)).exp()
        density = self.log_density(z).exp()
        distance = z.abs() * inside + 2 * (self.df + z.square()) / (self.df - 1) * density
        return torch.where(self.df > 1, distance, math.inf)

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        if locs.shape[-1] > 1:
            return None
        log_beta = 0.5 * math.log(math.pi) - 0.5 * (self.df - 0.5).log() - _relation(2 * self.df - 1)
        log_square = math.log(math.pi) - (0.5 * self.df).log() - 2 * _relation(self.df)
        half = 2 * self.df.sqrt() / (self.df - 1) * (log_beta - log_square).exp()
        return torch.where(self.df > 1, half * scale, math.inf).squeeze(-1)

    def _log_tail(self, z: Tensor) -> Tensor:
        """Compute the logarithm of the probability above points that are not negative."""
        ratio = torch.where(z == math.inf, 1.0, z) / self.df.sqrt()
        small, far = ratio < _SMALL, ratio > _LARGE
        middle = torch.where(small | far, 1.0, ratio).square().log1p()
        outer = 2 * torch.where(far, ratio, _LARGE).log()  # the square of such a ratio may overflow
        length = torch.where(far, outer, middle).sqrt()
        inner = torch.where(small, ratio, 0.0)  # the root has no derivative at 0
        series = inner * (1 - 0.25 * inner.square() + 13 / 96 * inner.square().square())
        log_tail = self._log_integral(torch.where(small, series, length) * self.df.sqrt())
        return torch.where(z == math.inf, -math.inf, log_tail)

    def _log_integral(self, w: Tensor) -> Tensor:
        log_eps = math.log(torch.finfo(w.dtype).eps)
        nodes, weights = _NODES[w.dtype]
        reach = -2 * log_eps / ((w.square() - 2 * log_eps).sqrt() + w)
        if is_recorded() or w.numel() < _FEW:  # one operation for all nodes: few launches, and a small graph
            total = w.new_tensor(weights) * self._integrand(w.unsqueeze(-1), reach.unsqueeze(-1), w.new_tensor(nodes))
            total = total.sum(-1)
        else:  # one node at a time, so that memory does not grow with their number
            pairs = zip(nodes, weights, strict=True)
            total = sum((weight * self._integrand(w, reach, node) for node, weight in pairs), torch.zeros_like(w))
        return _log_normalizer(self.df, 1) - 0.5 * w.square() + (total * reach).log()

    def _integrand(self, w: Tensor, reach: Tensor, node: Tensor | float) -> Tensor:
        step, df = node * reach, self.df if isinstance(node, float) else self.df.unsqueeze(-1)
        return (_log_bend((w + step).square() / df) - step * (w + 0.5 * step)).exp()


_NEWTON_STEPS = 6
_FEW = 2**14
_SMALL, _LARGE = 1e-2, 1e4


def _log_bend(v: Tensor) -> Tensor:
    r"""Compute the logarithm of :math:`\sqrt{v / (1 - e^{-v})}`, which is 0 at v = 0."""
    v = v.clamp(min=torch.finfo(v.dtype).tiny)
    return 0.5 * (v / -torch.expm1(-v)).log()


# Nodes and weights of Gauss-Legendre quadrature on [0, 1].
_LEGENDRE = {dtype: np.polynomial.legendre.leggauss(n) for dtype, n in ((torch.float64, 48), (torch.float32, 22))}
_NODES = {dtype: ((0.5 * (x + 1)).tolist(), (0.5 * w).tolist()) for dtype, (x, w) in _LEGENDRE.items()}
