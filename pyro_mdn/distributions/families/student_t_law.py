r"""Student-t law: its density at a distance in any number of dimensions, and all of one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtri

from pyro_mdn.distributions.families.kernels import RadialLaw
from pyro_mdn.support.checks import is_recorded
from pyro_mdn.tensors.tensor_batch import stored
from pyro_mdn.tensors.univariate import SymmetricLaw

__all__ = ["StudentTLaw", "StudentTRadial"]


class StudentTRadial(RadialLaw):
    r"""Student-t density at a squared distance q, with one parameter, the degrees of freedom :math:`\nu`.

    .. math:: g(q) = \log\frac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2)} - \tfrac{D}{2} \log(\pi \nu)
              - \tfrac{\nu + D}{2} \log(1 + q / \nu)
    """

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        (df,) = parameters
        return _log_normalizer(df, dim) - 0.5 * (df + dim) * torch.log1p(square / df)

    def with_derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        (df,) = parameters
        ratio, count = square / df, df + dim
        log = ratio.log1p()
        log_density = torch.addcmul(_log_normalizer(df, dim), count, log, value=-0.5)
        radial = count / (df + square)
        slope = torch.addcmul(_normalizer_slope(df, dim) - 0.5 * log, radial, ratio, value=0.5)
        return log_density, radial, slope


_RADIAL = StudentTRadial()

# For many degrees of freedom, the gamma functions of the density are huge and cancel. The normaliser is therefore
# computed relative to that of the normal density.

_SHIFT = 12
"""Number of recursions of the gamma function after which a few terms of its asymptotic series are accurate."""

_SERIES = (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432)
"""Coefficients of :math:`\\log(\\Gamma(x + 1/2) / \\Gamma(x)) - \\tfrac12 \\log x` in odd powers of 1/x."""

_SERIES_SLOPE = [(2 * i + 1) * coefficient for i, coefficient in enumerate(_SERIES)]
"""Coefficients of minus its derivative, in even powers."""


def _log_normalizer(df: Tensor, dim: int) -> Tensor:
    r"""Compute the log of :math:`\Gamma((\nu + D) / 2) / \Gamma(\nu / 2) \, (\pi \nu)^{-D/2}` without cancellation."""
    half, odd = 0.5 * df, dim % 2
    factors = half.unsqueeze(-1)
    total = torch.full_like(half, -0.5 * dim * math.log(2 * math.pi))
    if dim > 1:
        total = total + torch.log1p(_numbers(df, 0.5 * odd, dim // 2) / factors).sum(-1)
    if not odd:
        return total
    total = total - torch.log1p(0.5 / (factors + _numbers(df, 0.0, _SHIFT))).sum(-1)
    return total + 0.5 * torch.log1p(_SHIFT / half) + _power_series(half + _SHIFT, 1, _SERIES)


def _numbers(like: Tensor, first: float, count: int) -> Tensor:
    """List ``count`` numbers from ``first`` on, each by one more than the one before."""
    return torch.arange(count, dtype=like.dtype, device=like.device) + first


def _power_series(value: Tensor, first: int, coefficients: Sequence[float]) -> Tensor:
    """Sum coefficients times negative powers ``first``, ``first + 2``, and so on, of values."""
    square = value.square().reciprocal()
    total = torch.full_like(value, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    return total / value if first == 1 else total * square


def _relation(df: Tensor) -> Tensor:
    r"""Compute the log of :math:`\Gamma((\nu + 1) / 2) / \Gamma(\nu / 2) \, (\nu / 2)^{-1/2}`, whose limit is 0."""
    return _log_normalizer(df, 1) + 0.5 * math.log(2 * math.pi)


def _normalizer_slope(df: Tensor, dim: int) -> Tensor:
    """Compute the derivative of :func:`_log_normalizer` with respect to the degrees of freedom."""
    half, odd = 0.5 * df, dim % 2
    factors = half.unsqueeze(-1)
    total = torch.zeros_like(half)
    if dim > 1:
        steps = _numbers(df, 0.5 * odd, dim // 2)
        total = total - (steps / (factors * (factors + steps))).sum(-1)
    if odd:
        steps = factors + _numbers(df, 0.0, _SHIFT)
        shifted = half + _SHIFT
        total = total + (0.5 / (steps * (steps + 0.5))).sum(-1) - 0.5 * _SHIFT / (half * shifted)
        total = total - _power_series(shifted, 2, _SERIES_SLOPE)
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
        tail = self._log_tail(z).exp()
        return torch.where(z <= 0, tail, 1 - tail)

    def log_cdf(self, z: Tensor) -> Tensor:
        lower, log_tail = z <= 0, self._log_tail(z)
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
        return _size(z) + 2 * self._mean_beyond(z)

    def mean_below(self, z: Tensor) -> Tensor:
        return z.relu() + self._mean_beyond(z)

    def _mean_beyond(self, z: Tensor) -> Tensor:
        r"""Expected distance beyond :math:`|z|` of variables there, and 0 of others, on one side."""
        beyond = (self.df + z.square()) / (self.df - 1) * self.log_density(z).exp() - _size(z) * self._log_tail(z).exp()
        return torch.where(self.df > 1, beyond, math.inf)

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        if locs.shape[-1] > 1:
            return None
        log_beta = 0.5 * math.log(math.pi) - 0.5 * (self.df - 0.5).log() - _relation(2 * self.df - 1)
        log_square = math.log(math.pi) - (0.5 * self.df).log() - 2 * _relation(self.df)
        half = 2 * self.df.sqrt() / (self.df - 1) * (log_beta - log_square).exp()
        return torch.where(self.df > 1, half * scale, math.inf).squeeze(-1)

    def _log_tail(self, z: Tensor) -> Tensor:
        r"""Compute the logarithm of the probability above :math:`|z|`."""
        z = _size(z)
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


def _size(z: Tensor) -> Tensor:
    """Compute the absolute value, of which the derivative at 0 is that from below."""
    return torch.where(z <= 0, -z, z)


def _log_bend(v: Tensor) -> Tensor:
    r"""Compute the logarithm of :math:`\sqrt{v / (1 - e^{-v})}`, which is 0 at v = 0."""
    v = v.clamp(min=torch.finfo(v.dtype).tiny)
    return 0.5 * (v / -torch.expm1(-v)).log()


# Nodes and weights of Gauss-Legendre quadrature on [0, 1].
_LEGENDRE = {dtype: np.polynomial.legendre.leggauss(n) for dtype, n in ((torch.float64, 48), (torch.float32, 22))}
_NODES = {dtype: ((0.5 * (x + 1)).tolist(), (0.5 * w).tolist()) for dtype, (x, w) in _LEGENDRE.items()}
