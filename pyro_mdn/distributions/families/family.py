r"""Families: the meaning of the raw outputs of a network, and the components that are built from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal, NoiseModel
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.units.compound_transforms import PerOutput, as_transform
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.support.checks import shown
from pyro_mdn.support.registry import Specification
from pyro_mdn.tensors.channels import BlockLayout, Layout
from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["Block", "Family", "is_uncorrelated", "layout_of", "require_uncorrelated"]


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

    def transform_for(
        self, given: TargetTransform | str | Sequence[TargetTransform | str | None] | None, dim: int
    ) -> TargetTransform:
        """Return the transform of ``dim`` outputs that the argument ``target_transform`` of a constructor stands for.

        Raises:
            ValueError: If no transform has the name given, or if it does not fit the family.
        """
        own, transform = self.target_transform, as_transform(given)
        if own is None:
            each = transform.transforms if isinstance(transform, PerOutput) else (transform,)
            if any(part.of_family for part in each):
                raise ValueError(f"target_transform: expected one for real numbers beside {self}, got {transform}")
            low = torch.full((1, dim), -1e30, device="cpu")
            if self.has_atom and (transform.circles(dim) is not None or bool(transform.inside(low).any())):
                expected = f"one with a lower end, such as 'log', for each output beside {self}"
                raise ValueError(f"target_transform: expected {expected}, got {transform}")
            return transform
        if given is not None and transform != own:
            raise ValueError(f"target_transform: expected None beside {self}, which has {own}, got {shown(given)}")
        return own

    is_product: ClassVar[bool] = False
    """Whether outputs are of several families."""

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
    """Return the layout of the channels; homoscedastic blocks are in a tensor of their own, if they have channels."""

    def place(block: Block) -> BlockLayout:
        groups = 1 if block.tied else n_components
        return BlockLayout(block.width, groups, is_own=block.homoscedastic and block.width > 0)

    return Layout.of(n_components, dim, map(place, family.blocks(dim)))


def is_uncorrelated(noise: NoiseModel) -> bool:
    """Check that a noise model does not correlate outputs."""
    dim = 2  # with which a correlation shows
    return noise.build(torch.zeros(1, noise.num_params(dim)), dim, torch.ones(1)).is_diagonal


def require_uncorrelated(noise: NoiseModel) -> None:
    """Raise a ``ValueError`` if a noise model correlates outputs."""
    if not is_uncorrelated(noise):
        expected = "a noise model without correlations, such as Diagonal or Isotropic"
        raise ValueError(f"noise: expected {expected}, for outputs that are independent, got {noise}")
