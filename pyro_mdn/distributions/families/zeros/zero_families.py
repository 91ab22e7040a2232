r"""Families with a probability of zero that a network predicts, beside counts or positive numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import NoiseModel
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.families.counts.count_components import CountComponents
from pyro_mdn.distributions.families.counts.count_families import CountFamily, NegativeBinomial
from pyro_mdn.distributions.families.family import Block, Family, require_uncorrelated
from pyro_mdn.distributions.families.location_scale import LocationScale
from pyro_mdn.distributions.families.normal import Normal
from pyro_mdn.distributions.families.zeros.atom_components import AtomComponents
from pyro_mdn.distributions.families.zeros.zero_laws import HurdleLaw, InflatedLaw, ZeroLaw
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.support.checks import shown

__all__ = ["Hurdle", "ZeroInflated"]

_START = -2.0
"""Logit of the probability of zero at the start."""


@dataclass(frozen=True)
class _WithZeros(Family):
    """Base of families with a probability of zero that the network predicts for each component and output."""

    noise: NoiseModel = field(init=False, repr=False)
    family: Family | str = NegativeBinomial()

    _law: ClassVar[type[ZeroLaw]]

    def __post_init__(self) -> None:
        given = self.family
        base = Family.named(given)() if isinstance(given, str) else given
        if not isinstance(base, CountFamily | Normal | LocationScale):
            expected = "a family of counts, or one with independent outputs such as 'normal'"
            raise ValueError(f"family: expected {expected}, got {shown(given)}")
        require_uncorrelated(base.noise)
        object.__setattr__(self, "family", base)
        object.__setattr__(self, "noise", base.noise)

    @classmethod
    def with_noise(cls, noise: NoiseModel) -> Self:
        return cls(NegativeBinomial(noise))

    @property
    def base(self) -> Family:
        """The family of what is not zero."""
        family: Any = self.family
        return family

    @property
    def target_transform(self) -> TargetTransform | None:
        return self.base.target_transform

    @property
    def has_atom(self) -> bool:
        return not isinstance(self.base, CountFamily)

    def blocks(self, dim: int) -> list[Block]:
        return [*self.base.blocks(dim), Block(dim, tied=False, homoscedastic=False)]

    def start(self, scale: Tensor) -> list[Tensor]:
        return [*self.base.start(scale), torch.full_like(scale, _START)]

    def start_locs(self, centres: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Tensor:
        return self.base.start_locs(centres, blocks[:-1], unit)

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Components:
        *rest, logit = blocks
        components = self.base.build(locs, rest, unit)
        if isinstance(components, CountComponents):
            return CountComponents(self._law(components.law, logit))
        return AtomComponents(components, logit)

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "family": Family.from_config(settings.get("family"))}


@dataclass(frozen=True)
class ZeroInflated(_WithZeros):
    r"""Targets that may be zero for a reason of its own: claims of people who are not insured, days without rain.

    .. math:: p_k(0) = \pi_k + (1 - \pi_k) \, q_k(0), \qquad p_k(y) = (1 - \pi_k) \, q_k(y) \; \text{for} \; y > 0

    The network predicts the probability π for each component and output. With a family of counts, q gives
    probabilities. With another one, q is a density behind a target transform with a lower end, such as ``"log"``; it
    gives no probability to that end, where the zeros are. The density of a zero is then a probability.

    Args:
        family: Family q, or its name: of counts, or with independent outputs.

    Raises:
        ValueError: If it is none of these.

    References:
        Lambert (1992), Zero-inflated Poisson regression.
    """

    _law: ClassVar[type[ZeroLaw]] = InflatedLaw


@dataclass(frozen=True)
class Hurdle(_WithZeros):
    r"""Targets of which zero has its own probability, larger or smaller than that of a law of counts.

    .. math:: P_k(0) = \pi_k, \qquad P_k(y) = \frac{1 - \pi_k}{1 - q_k(0)} \, q_k(y) \; \text{for} \; y > 0

    The network predicts the probability π for each component and output. With a family that is none of counts, q(0) is
    0: this is then the same as :class:`ZeroInflated`, and needs a target transform with a lower end.

    Args:
        family: Family q, or its name: of counts, or with independent outputs.

    Raises:
        ValueError: If it is none of these.

    References:
        Mullahy (1986), Specification and testing of some modified count data models.
    """

    _law: ClassVar[type[ZeroLaw]] = HurdleLaw
