r"""Target transforms: what becomes of targets, perhaps positive or bounded ones, before components see them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.circles import Circles
from pyro_mdn.distributions.units.units import StandardUnits, Units, UnscaledUnits
from pyro_mdn.distributions.units.warped_units import WarpedUnits
from pyro_mdn.distributions.units.warps import (
    AsinhWarp,
    IdentityWarp,
    LogitWarp,
    LogWarp,
    PowerWarp,
    SoftplusWarp,
    Warp,
)
from pyro_mdn.support.checks import require_numbers
from pyro_mdn.support.registry import Specification
from pyro_mdn.support.torch_compat import cached
from pyro_mdn.tensors.numerics import location_and_scale

__all__ = [
    "Asinh",
    "Identity",
    "Log",
    "Logit",
    "Softplus",
    "Standardize",
    "TargetTransform",
    "YeoJohnson",
    "centre_and_unit",
]


@dataclass(frozen=True)
class TargetTransform(Specification):
    """Specification of a map between the units of y and standardised units, and of its fit to targets.

    Targets go through a warp, an increasing elementwise map from their support to the whole real line, and are
    standardised there. A subclass says which :meth:`warp`; one whose warp depends on the training targets also says
    :meth:`start` and :meth:`fit_warp`. A transform holds no tensors: these are buffers of a head.
    """

    kind: ClassVar[str] = "target_transform"
    known: ClassVar[dict[str, type[TargetTransform]]] = {}

    of_family: ClassVar[bool] = False
    """Whether it is that of one family, which is asked for instead."""

    @abstractmethod
    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        """Build the warp that these tensors ``(*batch, D)`` define."""

    def start(self, dim: int) -> dict[str, Tensor]:
        """Return the tensors ``(D,)`` of the warp, by name, before there are data."""
        return {}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        """Compute the tensors of the warp from targets ``(N, D)``, of which those that are NaN are left out."""
        return {}

    def identity(self, dim: int, *, common_unit: bool) -> dict[str, Tensor]:
        """Return the tensors of the map, by name, before there are data.

        Args:
            dim: Number of outputs D.
            common_unit: Whether all outputs have one unit, as isotropic noise requires.
        """
        return {"shift": torch.zeros(dim), "scale": torch.ones(1 if common_unit else dim), **self.start(dim)}

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute the tensors, by name, from targets ``(N, D)``; NaN are left out.

        Args:
            y: Targets.
            common_unit: Whether all outputs have one unit.
            warp: Tensors of the warp, by default those of :meth:`fit_warp`.
        """
        tensors = self.fit_warp(y.double()) if warp is None else dict(warp)
        shift, scale = location_and_scale(self.warp(tensors).forward(y.double()), common_unit=common_unit)
        return {"shift": shift, "scale": scale, **tensors}

    def units(self, tensors: Mapping[str, Any]) -> Units:
        """Build the map that these tensors define; they may have leading batch dimensions."""
        warp = self.warp({name: tensors[name] for name in _names(self)})
        return WarpedUnits(StandardUnits(tensors["shift"], tensors["scale"]), warp)

    @property
    def takes_any_number(self) -> bool:
        """Whether the support is the whole real line."""
        return _takes_any_number(self)

    def inside(self, y: Tensor) -> Tensor:
        """Check which targets ``(..., D)`` lie inside of the support, which no tensor of the transform decides."""
        return self.warp({name: tensor.to(y) for name, tensor in self.start(y.shape[-1]).items()}).contains(y)

    def inward(self, moved: Tensor, y: Tensor) -> Tensor:
        """Mirror points that have left the support at the targets, inside of it, from which they were moved."""
        return torch.where(self.inside(moved), moved, 2 * y - moved)

    def circles(self, dim: int) -> Circles | None:
        """Circles of ``dim`` outputs of which some are angles; ``None`` if none is."""
        return None


@cached
def _takes_any_number(transform: TargetTransform) -> bool:
    """Look for an end of the support; each training step on targets on a grid asks."""
    return bool(transform.inside(torch.tensor([[-1e30], [1e30]], device="cpu")).all())


@dataclass(frozen=True)
class Standardize(TargetTransform):
    """Subtract the mean and divide by the standard deviation of each output, the default.

    Gross outliers count as if they were nearer: as ten times the distance between the lowest and the highest decile
    away from the median (winsorised; Tukey, 1962). Otherwise they would decide the unit of all other targets.

    >>> y = torch.cat([torch.arange(100.0), torch.tensor([1e6])]).unsqueeze(-1)
    >>> (y.std().item() > 9e4, Standardize().fit(y, common_unit=False)["scale"].item() < 100)
    (True, True)
    """

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return IdentityWarp()

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        shift, scale = location_and_scale(y, common_unit=common_unit)
        return {"shift": shift, "scale": scale}

    def units(self, tensors: Mapping[str, Any]) -> StandardUnits:
        return StandardUnits(tensors["shift"], tensors["scale"])

    @property
    def takes_any_number(self) -> bool:
        return True


@dataclass(frozen=True)
class Identity(Standardize):
    """Leave numbers as they are. Above all, this is for inputs: ``input_transform="identity"``.

    Inputs go to the backbone in the precision of its weights. A ``backbone`` of your own gets integers as integers,
    such as the codes that an embedding looks up. Training adds no noise to integers, and by default none to other
    inputs that are left as they are.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> layers = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Flatten(-2))
    >>> network = MixtureDensityNetwork(2, 1, hidden_dim=16, backbone=layers, input_transform="identity")
    >>> network(torch.tensor([[3, 9], [0, 1]])).batch_shape
    torch.Size([2])
    """

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        shift = torch.zeros_like(y[0], dtype=torch.float64)
        return {"shift": shift, "scale": shift.new_ones(1) if common_unit else torch.ones_like(shift)}

    def units(self, tensors: Mapping[str, Any]) -> StandardUnits:
        return UnscaledUnits(tensors["shift"], tensors["scale"])


@cached
def _names(transform: TargetTransform) -> tuple[str, ...]:
    """Names of the tensors of the warp; heads ask for them in each call."""
    return tuple(transform.start(1))


@dataclass(frozen=True)
class Log(TargetTransform):
    r"""Positive targets, such as prices, durations and concentrations: :math:`\log(y + s)` is standardised.

    With normal components, y is a mixture of (shifted) log-normal distributions.

    Args:
        shift: Shift s ≥ 0, in the units of y. With a positive shift, targets may be as low as 0 and, in theory, -s.

    Raises:
        ValueError: If the shift is negative or not finite.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, target_transform=Log())
    >>> bool((network.sample(torch.zeros(100, 1)) > 0).all())
    True
    """

    shift: float = 0.0

    def __post_init__(self) -> None:
        require_numbers(least=0.0, shift=self.shift)

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return LogWarp(float(self.shift))


@dataclass(frozen=True)
class Logit(TargetTransform):
    r"""Targets between two ends, such as shares and percentages: :math:`\log\frac{y - l}{h - y}` is standardised.

    Args:
        low: Lower end l. Targets lie above it.
        high: Upper end h. Targets lie below it.

    Raises:
        ValueError: If the ends are not finite or not in ascending order.

    References:
        Atchison & Shen (1980), Logistic-normal distributions.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require_numbers(least=-np.inf, low=self.low, high=self.high)
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low, high: expected finite ends in ascending order, got {self.low} and {self.high}")

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return LogitWarp(float(self.low), float(self.high))


@dataclass(frozen=True)
class Softplus(TargetTransform):
    r"""Positive targets whose noise does not grow with their size: :math:`u \log(e^{y/u} - 1)` is standardised.

    The map is logarithmic far below the unit u, which is the median of the training targets, and linear far above it.
    """

    def start(self, dim: int) -> dict[str, Tensor]:
        return {"unit": torch.ones(dim)}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        return {"unit": y.nanmedian(0).values}

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return SoftplusWarp(**tensors)


@dataclass(frozen=True)
class Asinh(TargetTransform):
    r"""Targets of either sign with heavy tails, such as returns.

    What is standardised is :math:`\operatorname{asinh}((y - m) / u)`, which is linear near m and logarithmic far out.
    The centre m is the median of the training targets, and the unit u their median absolute deviation from it.

    References:
        Johnson (1949), Systems of frequency curves generated by methods of translation.
    """

    def start(self, dim: int) -> dict[str, Tensor]:
        return {"centre": torch.zeros(dim), "unit": torch.ones(dim)}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        return centre_and_unit(y)

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return AsinhWarp(**tensors)


@dataclass(frozen=True)
class YeoJohnson(TargetTransform):
    r"""Skewed targets of either sign: a power of :math:`1 + |y - m| / u` is standardised.

    The power λ in [0, 2] is the most likely one for training targets that are normal afterwards. The centre m and the
    unit u are their median and their median absolute deviation from it.

    References:
        Yeo & Johnson (2000), A new family of power transformations to improve normality or symmetry.
    """

    def start(self, dim: int) -> dict[str, Tensor]:
        return {"centre": torch.zeros(dim), "unit": torch.ones(dim), "power": torch.ones(dim)}

    def fit_warp(self, y: Tensor) -> dict[str, Tensor]:
        tensors = centre_and_unit(y)
        columns = ((y - tensors["centre"]) / tensors["unit"]).unbind(-1)
        return {**tensors, "power": y.new_tensor([_power(column[~column.isnan()]) for column in columns])}

    def warp(self, tensors: Mapping[str, Any]) -> Warp:
        return PowerWarp(**tensors)


def _power(values: Tensor) -> float:
    """Find the most likely power of Yeo and Johnson in [0, 2]; 1, which changes nothing, of a constant column."""
    from scipy.stats import yeojohnson_normmax  # it takes longer to import than all of this package

    if len(values.unique()) < 3:
        return 1.0
    return float(np.clip(yeojohnson_normmax(values.numpy()), 0.0, 2.0))


def centre_and_unit(y: Tensor) -> dict[str, Tensor]:
    """Median and median absolute deviation of the columns; the standard deviation, or 1, where the latter is 0."""
    centre = y.nanmedian(0).values
    unit = (y - centre).abs().nanmedian(0).values
    return {"centre": centre, "unit": torch.where(unit > 0, unit, location_and_scale(y)[1])}
