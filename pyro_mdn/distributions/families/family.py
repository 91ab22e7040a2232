r"""Families: the meaning of the raw outputs of a network, and the components that are built from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal, NoiseModel, as_noise_model
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.units.circular.angles import Angle
from pyro_mdn.distributions.units.compound_transforms import as_transform
from pyro_mdn.distributions.units.count_units import Counts
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.support.checks import shown
from pyro_mdn.support.registry import Specification
from pyro_mdn.tensors.channels import Layout
from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["Block", "Family", "as_family", "is_uncorrelated", "layout_of", "require_uncorrelated", "transform_for"]


class Block(NamedTuple):
    """Raw channels of one parameter of the components.

    Attributes:
        width: Channels for one component.
        tied: Whether all components share them.
        homoscedastic: Whether they are the same for every input. They are then parameters of the head, not outputs.
    """

    width: int
    tied: bool
    homoscedastic: bool


@dataclass(frozen=True)
class Family(Specification, ABC):
    """Specification of a family of components: which raw channels a network provides, and what is built from them.

    The raw channels are K log-weights, D·K locations and :meth:`blocks`. The first block is that of the noise model.

    Args:
        noise: Noise model of the scales.
    """

    kind: ClassVar[str] = "family"
    known: ClassVar[dict[str, type[Family]]] = {}

    is_circular: ClassVar[bool] = False
    """Whether all outputs are angles, with densities that are periodic by themselves."""

    noise: NoiseModel = Diagonal()

    def __post_init__(self) -> None:
        if not isinstance(self.noise, NoiseModel):
            raise ValueError(f"noise: expected a NoiseModel, got {shown(self.noise)}")

    @classmethod
    def with_noise(cls, noise: NoiseModel) -> Self:
        """Build the family with this noise model and default settings."""
        return cls(noise)

    @abstractmethod
    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Components:
        """Build components in standardised units.

        Args:
            locs: Locations, ``(*batch, K, D)``.
            blocks: Raw channels of each block, ``(*batch, K | 1, width)``.
            unit: Size of one standardised unit in the units of y, ``(D,)`` or ``(1,)``.
        """

    def blocks(self, dim: int) -> list[Block]:
        """Return the blocks of raw channels; raise a ``ValueError`` if the family does not fit ``dim`` outputs."""
        return [Block(self.noise.num_params(dim), self.noise.tied, self.noise.homoscedastic)]

    def start(self, scale: Tensor) -> list[Tensor]:
        """Compute raw channels ``(K | 1, width)`` of each block that give scales (standard deviations) ``(K, D)``."""
        return [self.noise.start(scale.square().mean(0, keepdim=True).sqrt() if self.noise.tied else scale)]

    def start_locs(self, centres: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Tensor:
        """Compute locations ``(K, D)`` of components with means at ``centres``; where there is no mean, the centres.

        Args:
            centres: Means in standardised units, ``(K, D)``.
            blocks: Raw channels of each block, as :meth:`start` has them.
            unit: Size of one standardised unit in the units of y, ``(D,)`` or ``(1,)``.
        """
        mean = self.build(centres, blocks, unit).mean()
        return torch.where(mean.isfinite(), 2 * centres - mean, centres)

    @property
    def target_transform(self) -> TargetTransform | None:
        """The one target transform that fits this family; ``None`` if every one for real numbers does."""
        return None

    @property
    def has_atom(self) -> bool:
        """Whether components have a point mass at the lower end of the support."""
        return False

    @property
    def kernel(self) -> Kernel | None:
        """Kernel for log-densities from raw channels with gradients by hand; ``None`` leaves gradients to autograd."""
        return None

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "noise": NoiseModel.from_config(settings.get("noise"))}


def layout_of(family: Family, dim: int, n_components: int) -> Layout:
    """Return the layout of the channels that depend on the inputs."""
    predicted = [block for block in family.blocks(dim) if not block.homoscedastic]
    return Layout(n_components, dim, tuple((b.width, 1 if b.tied else n_components) for b in predicted))


def is_uncorrelated(noise: NoiseModel) -> bool:
    """Check that a noise model does not correlate outputs."""
    dim = 2  # with which a correlation shows
    return noise.build(torch.zeros(1, noise.num_params(dim)), dim, torch.ones(1)).is_diagonal


def require_uncorrelated(noise: NoiseModel) -> None:
    """Raise a ``ValueError`` if a noise model correlates outputs."""
    if not is_uncorrelated(noise):
        expected = "a noise model without correlations, such as Diagonal or Isotropic"
        raise ValueError(f"noise: expected {expected}, for outputs that are independent, got {noise}")


def as_family(
    family: Family | str | None, noise: NoiseModel | str | None, dim_out: int, default: type[Family]
) -> Family:
    """Return the family that the arguments ``family`` and ``noise`` of a constructor stand for.

    Raises:
        ValueError: If no family or noise model has the name given, or if a noise model is given beside a ``Family``,
            which has its own.
    """
    if isinstance(family, Family):
        if noise is not None:
            raise ValueError(f"noise: expected None beside {family}, which has its noise model, got {shown(noise)}")
        return family
    kind = default if family is None else Family.named(family)
    return kind.with_noise(as_noise_model(noise, dim_out))


def transform_for(
    family: Family, given: TargetTransform | str | Sequence[TargetTransform | str] | None, dim: int
) -> TargetTransform:
    """Return the transform that the argument ``target_transform`` of a constructor stands for beside a family.

    Raises:
        ValueError: If no transform has the name given, or if it does not fit the family.
    """
    if family.is_circular:
        return _of_angles(family, given, dim)
    own, transform = family.target_transform, as_transform(given)
    if own is None:
        if isinstance(transform, Counts):
            raise ValueError(f"target_transform: expected one for real numbers beside {family}, got {transform}")
        low = torch.full((1, dim), -1e30, device="cpu")
        if family.has_atom and (transform.circles(dim) is not None or bool(transform.inside(low).any())):
            expected = f"one with a lower end, such as 'log', for each output beside {family}"
            raise ValueError(f"target_transform: expected {expected}, got {transform}")
        return transform
    if given is not None and transform != own:
        raise ValueError(f"target_transform: expected None beside {family}, which has {own}, got {shown(given)}")
    return own


def _of_angles(
    family: Family, given: TargetTransform | str | Sequence[TargetTransform | str] | None, dim: int
) -> TargetTransform:
    transform = Angle() if given is None else as_transform(given)
    circles = transform.circles(dim)
    if circles is None or len(circles.angles) < dim:
        expected = "angles for all outputs, such as 'angle' or Angle(360, low=0),"
        raise ValueError(f"target_transform: expected {expected} beside {family}, got {transform}")
    if family.noise.common_unit and len({circle.period for circle in circles.of_outputs if circle is not None}) > 1:
        raise ValueError(f"target_transform: expected one period for all outputs beside {family}, got {transform}")
    return transform
