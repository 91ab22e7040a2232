r"""Student-t components: heavier tails than the normal, so that outliers pull less."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.families.elliptical import Elliptical
from pyro_mdn.distributions.families.family import Block, Family
from pyro_mdn.distributions.families.kernels import EllipticalKernel, RadialLaw
from pyro_mdn.distributions.families.student_t_law import StudentTLaw, StudentTRadial
from pyro_mdn.support.checks import bounds, plain_number, shown
from pyro_mdn.tensors.mixture_density import Kernel
from pyro_mdn.tensors.numerics import positive
from pyro_mdn.tensors.tensor_batch import stored
from pyro_mdn.tensors.univariate import Law

__all__ = ["StudentT", "StudentTComponents"]


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


@dataclass(frozen=True)
class RawStudentTRadial(RadialLaw):
    """Student-t density with a raw channel as parameter: the degrees of freedom are its softplus plus ``min_df``."""

    min_df: float

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        return _RADIAL.log_density(square, dim, positive(parameters[0], self.min_df))

    def with_derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        (raw,) = parameters
        log_density, radial, slope = _RADIAL.with_derivatives(square, dim, positive(raw, self.min_df))
        return log_density, radial, slope * raw.sigmoid()


@dataclass(frozen=True)
class KnownStudentTRadial(RadialLaw):
    """Student-t density with known degrees of freedom, and no parameter."""

    df: float

    def log_density(self, square: Tensor, dim: int, *parameters: Tensor) -> Tensor:
        return _RADIAL.log_density(square, dim, square.new_tensor(self.df))

    def with_derivatives(self, square: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        return self.log_density(square, dim), (self.df + dim) / (self.df + square)


_RADIAL = StudentTRadial()
