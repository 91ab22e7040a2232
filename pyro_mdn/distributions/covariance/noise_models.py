r"""Noise models: structure, sharing and source of the component covariances.

A noise model defines how many raw channels a covariance needs, how they are constrained and which covariance operator
they give.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance, Whitening
from pyro_mdn.distributions.covariance.diagonal import DiagonalCovariance, IsotropicCovariance, RawDiagonalWhitening
from pyro_mdn.distributions.covariance.full import FullCovariance, RawFullWhitening
from pyro_mdn.distributions.covariance.low_rank import LowRankCovariance, RawLowRankWhitening
from pyro_mdn.support.checks import is_count, plain_number, shown
from pyro_mdn.support.registry import Specification
from pyro_mdn.tensors.channels import split_channels
from pyro_mdn.tensors.numerics import positive

__all__ = [
    "Diagonal",
    "Fixed",
    "Full",
    "Isotropic",
    "LowRank",
    "NoiseModel",
    "as_noise_model",
]

_FLAGS = ("tied", "homoscedastic")


@dataclass(frozen=True)
class NoiseModel(Specification, ABC):
    """Specification of how the raw outputs of a network become component covariances.

    Attributes:
        tied: Whether all components share one covariance.
        homoscedastic: Whether the covariance is the same for every input.
        common_unit: Whether all outputs have one standardised unit, so that an isotropic covariance stays isotropic in
            the units of y. That unit is the root mean square of the standard deviations of the outputs that are not
            constant in the data.
    """

    kind: ClassVar[str] = "noise"
    known: ClassVar[dict[str, type[NoiseModel]]] = {}

    tied: bool
    homoscedastic: bool
    common_unit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in _FLAGS:
            self._hold(name, _flag(getattr(self, name), name))

    def _hold(self, name: str, value: Any) -> None:
        """Store a setting as a Python type; a value that has this type, such as a default of the class, stays there."""
        if type(getattr(self, name)) is not type(value):
            object.__setattr__(self, name, value)

    def _fingerprinted(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the state for fingerprints, and after it the states of the same model in files of earlier versions.

        Those files have numbers as they were given, and also the flags of ``Fixed``.
        """
        flags = {f.name: f.default for f in fields(self) if f.name in _FLAGS and not f.init}
        flags = {name: flag for name, flag in flags.items() if flag is getattr(self, name)}
        reals = {f.name for f in fields(self) if f.type == "float" and isinstance(state.get(f.name), Real)}
        plain = {name: float(v) if name in reals else v for name, v in state.items() if name not in flags}
        whole = {name: int(v) if name in reals and v.is_integer() else v for name, v in plain.items()}
        of_numpy = {name: np.float64(v) if name in reals else v for name, v in plain.items()}
        return [plain, whole, of_numpy, {**plain, **flags}]

    @abstractmethod
    def num_params(self, dim_out: int) -> int:
        """Return the number of raw channels per covariance; raise a ``ValueError`` if ``dim_out`` does not fit."""

    @abstractmethod
    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        """Build the covariance in standardised units from raw channels ``(*batch, K, num_params)``.

        ``unit`` is the size of one standardised unit in the units of y, shape ``(D,)`` or ``(1,)``.
        """

    @property
    def whitening(self) -> Whitening | None:
        """Whitening from raw channels, equal to that of the covariance of :meth:`build`; ``None`` if there is none."""
        return None

    @abstractmethod
    def start(self, scale: Tensor) -> Tensor:
        """Compute raw channels ``(K, num_params)`` that give standard deviations ``(K, D)``, at least ``min_scale``."""


@dataclass(frozen=True, kw_only=True)
class _Learned(NoiseModel):
    tied: bool = False
    homoscedastic: bool = False
    min_scale: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold("min_scale", _as_positive(self.min_scale, "min_scale"))

    def _positive(self, raw: Tensor) -> Tensor:
        return positive(raw, self.min_scale)

    def _unconstrained(self, scale: Tensor) -> Tensor:
        excess = (scale - self.min_scale).clamp(min=0.1 * self.min_scale)
        return excess + torch.log(-torch.expm1(-excess))


@dataclass(frozen=True, kw_only=True)
class Diagonal(_Learned):
    r"""Independent outputs within a component: :math:`\Sigma_k = \mathrm{diag}(\sigma_k^2)`.

    Args:
        tied: Whether all components share one covariance.
        homoscedastic: Whether the covariance, though learned, is the same for every input.
        min_scale: Smallest standard deviation, in standardised units; it bounds the density.

    >>> Diagonal(tied=True)
    Diagonal(tied=True, homoscedastic=False, min_scale=0.001)
    """

    def num_params(self, dim_out: int) -> int:
        return dim_out

    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        return DiagonalCovariance(self._positive(raw))

    @property
    def whitening(self) -> Whitening:
        return RawDiagonalWhitening(self.min_scale)

    def start(self, scale: Tensor) -> Tensor:
        return self._unconstrained(scale)


@dataclass(frozen=True, kw_only=True)
class Isotropic(_Learned):
    r"""One standard deviation for all outputs: :math:`\Sigma_k = \sigma_k^2 I`, in the units of y.

    All outputs have one standardised unit: the root mean square of the standard deviations of those that are not
    constant in the data. A constant output has the same :math:`\sigma_k` as the others.

    Args:
        tied: Whether all components share one covariance.
        homoscedastic: Whether the covariance, though learned, is the same for every input.
        min_scale: Smallest standard deviation, in standardised units; it bounds the density.
    """

    common_unit: ClassVar[bool] = True

    def num_params(self, dim_out: int) -> int:
        return 1

    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        return IsotropicCovariance(self._positive(raw).squeeze(-1), dim_out)

    @property
    def whitening(self) -> Whitening:
        return RawDiagonalWhitening(self.min_scale)

    def start(self, scale: Tensor) -> Tensor:
        return self._unconstrained(scale.square().mean(-1, keepdim=True).sqrt())


@dataclass(frozen=True, kw_only=True)
class Full(_Learned):
    r"""Unrestricted :math:`\Sigma_k`, parameterised by the inverse of its Cholesky factor.

    Args:
        tied: Whether all components share one covariance.
        homoscedastic: Whether the covariance, though learned, is the same for every input.
        min_scale: Smallest standard deviation of an output *given those before it*, in standardised units; it
            bounds the density.

    References:
        Williams (1996), Using neural networks to model conditional multivariate densities.
    """

    def num_params(self, dim_out: int) -> int:
        return dim_out * (dim_out + 1) // 2

    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        diagonal, lower = split_channels(raw, [dim_out, raw.shape[-1] - dim_out])
        return FullCovariance(self._positive(diagonal).reciprocal(), lower)

    @property
    def whitening(self) -> Whitening:
        return RawFullWhitening(self.min_scale)

    def start(self, scale: Tensor) -> Tensor:
        dim_out = scale.shape[-1]
        lower = scale.new_zeros(*scale.shape[:-1], self.num_params(dim_out) - dim_out)
        return torch.cat([self._unconstrained(scale), lower], -1)


@dataclass(frozen=True, kw_only=True)
class LowRank(_Learned):
    r"""Low rank plus diagonal: :math:`\Sigma_k = F_k F_k^\top + \mathrm{diag}(\sigma_k^2)`.

    Args:
        rank: Number of columns of F, at most the number of outputs.
        tied: Whether all components share one covariance.
        homoscedastic: Whether the covariance, though learned, is the same for every input.
        min_scale: Smallest standard deviation of the diagonal part, in standardised units; it bounds the density.
    """

    rank: int = field(default=2, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.rank):
            raise ValueError(f"rank: expected a positive integer, got {shown(self.rank)}")
        self._hold("rank", int(self.rank))

    def num_params(self, dim_out: int) -> int:
        if self.rank > dim_out:
            raise ValueError(f"rank: expected at most dim_out={dim_out}, got {self.rank}")
        return dim_out * (self.rank + 1)

    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        diagonal, factor = split_channels(raw, [dim_out, dim_out * self.rank])
        return LowRankCovariance(factor.unflatten(-1, (dim_out, self.rank)), self._positive(diagonal))

    @property
    def whitening(self) -> Whitening:
        return RawLowRankWhitening(self.min_scale)

    def start(self, scale: Tensor) -> Tensor:
        # A factor of zero would be a saddle point, at which its gradient vanishes.
        factor = 0.1 * scale.unsqueeze(-1) * torch.randn(*scale.shape, self.rank).to(scale)
        return torch.cat([self._unconstrained(scale), factor.flatten(-2)], -1)


@dataclass(frozen=True)
class Fixed(NoiseModel):
    r"""Known noise, which is not learned: :math:`\Sigma_k = \sigma^2 I`, in the units of y.

    Args:
        scale: Standard deviation :math:`\sigma`, in the units of y.
    """

    scale: float
    tied: bool = field(default=True, init=False, repr=False)
    homoscedastic: bool = field(default=True, init=False, repr=False)
    common_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold("scale", _as_positive(self.scale, "scale"))

    def num_params(self, dim_out: int) -> int:
        return 0

    def build(self, raw: Tensor, dim_out: int, unit: Tensor) -> Covariance:
        return IsotropicCovariance((self.scale / unit).to(raw), dim_out)

    def start(self, scale: Tensor) -> Tensor:
        return scale[..., :0]


def as_noise_model(
    value: NoiseModel | str | None, dim_out: int, *, rank: int | None = None, scale: float | None = None
) -> NoiseModel:
    """Return the noise model that a name stands for, with its default settings.

    Args:
        value: Name of a noise model. A noise model is returned as it is, and ``None`` gives ``Diagonal()``.
        dim_out: Number of outputs, which limits the default rank.
        rank: Rank of ``"low_rank"``; by default 2, but 1 for a single output.
        scale: Standard deviation of ``"fixed"``, which needs it.

    Raises:
        ValueError: If no noise model has this name, or if ``"fixed"`` comes without a scale.

    >>> as_noise_model("low_rank", 1).rank, as_noise_model(None, 1) == Diagonal()
    (1, True)
    """
    if value is None or isinstance(value, NoiseModel):
        return Diagonal() if value is None else value
    kind: Any = NoiseModel.named(value)
    if value == "fixed":
        if scale is None:
            raise ValueError("noise: expected Fixed(scale) for a known scale, got 'fixed' without")
        return Fixed(scale)
    if value == "low_rank":
        return LowRank(min(2, dim_out) if rank is None else rank)
    return kind()


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def _as_positive(value: Any, name: str) -> float:
    """Convert a number of Python or NumPy, or a tensor without dimensions, to a positive ``float``."""
    number = float(plain_number(value))
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {shown(value)}")
    return number
