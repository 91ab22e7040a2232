r"""Families: what the raw outputs of a network mean, and which components they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal, NoiseModel, as_noise_model
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.support.checks import shown
from pyro_mdn.support.registry import Specification
from pyro_mdn.tensors.channels import Layout
from pyro_mdn.tensors.mixture_density import Kernel

__all__ = ["Block", "Family", "as_family", "layout_of"]


class Block(NamedTuple):
    """Raw channels of one parameter of the components.

    Attributes:
        width: Channels for one component.
        tied: Whether all components share them.
        homoscedastic: Whether they are the same for every input: parameters of the head instead of outputs.
    """

    width: int
    tied: bool
    homoscedastic: bool


@dataclass(frozen=True)
class Family(Specification, ABC):
    """What a family of components needs from a network, and how it is built from that.

    Raw channels are K log-weights, D·K locations and :meth:`blocks`, the first of which are those of the noise model.

    Args:
        noise: Noise model of the scales.
    """

    kind: ClassVar[str] = "family"
    known: ClassVar[dict[str, type[Family]]] = {}

    noise: NoiseModel = Diagonal()

    def __post_init__(self) -> None:
        if not isinstance(self.noise, NoiseModel):
            raise ValueError(f"noise: expected a NoiseModel, got {shown(self.noise)}")

    @abstractmethod
    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Components:
        """Components in standardised units.

        Args:
            locs: Locations, ``(*batch, K, D)``.
            blocks: Raw channels of each block, ``(*batch, K | 1, width)``.
            unit: Size of one standardised unit in the units of y, ``(D,)`` or ``(1,)``.
        """

    def blocks(self, dim: int) -> list[Block]:
        """Blocks of raw channels; a ``ValueError`` if the family does not fit ``dim`` outputs."""
        return [Block(self.noise.num_params(dim), self.noise.tied, self.noise.homoscedastic)]

    def start(self, scale: Tensor) -> list[Tensor]:
        """Raw channels ``(K | 1, width)`` of each block that give standard deviations ``(K, D)``."""
        return [self.noise.start(scale.square().mean(0, keepdim=True).sqrt() if self.noise.tied else scale)]

    @property
    def kernel(self) -> Kernel | None:
        """Log-density from raw channels with gradients by hand; ``None`` leaves gradients to autograd."""
        return None

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "noise": NoiseModel.from_config(settings.get("noise"))}


def layout_of(family: Family, dim: int, n_components: int) -> Layout:
    """Layout of the channels that depend on the inputs."""
    predicted = [block for block in family.blocks(dim) if not block.homoscedastic]
    return Layout(n_components, dim, tuple((b.width, 1 if b.tied else n_components) for b in predicted))


def as_family(
    family: Family | str | None, noise: NoiseModel | str | None, dim_out: int, default: type[Family]
) -> Family:
    """Family that constructors mean by ``family`` and ``noise``.

    Raises:
        ValueError: If there is no such family or noise model, or if a family that has one comes with another.
    """
    if isinstance(family, Family):
        if noise is not None:
            raise ValueError(f"noise: expected None beside {family}, which has its noise model, got {shown(noise)}")
        return family
    kind = default if family is None else Family.named(family)
    return kind(as_noise_model(noise, dim_out))
