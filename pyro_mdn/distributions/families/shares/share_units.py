r"""Units of shares, of which components see the logits, and their target transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyro_mdn.distributions.families.shares.beta_components import BetaComponents
from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.distributions.units.target_transforms import Logit
from pyro_mdn.distributions.units.units import UnscaledUnits
from pyro_mdn.distributions.units.warped import require_inside
from pyro_mdn.distributions.units.warped_units import WarpedUnits

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["ShareUnits", "Shares"]

_INSTEAD = (
    " (rounded ones are Targets.cells(y, width); "
    'zeros of their own are ZeroInflated("normal") with target_transform="logit")'
)


class ShareUnits(WarpedUnits):
    """Units of shares with beta distributions: their logits, which are not standardised."""

    __slots__ = ()
    keeps_targets: ClassVar[bool] = True

    def push(self, mixture: Mixture) -> Mixture:
        warp = self.warp.of_components()
        components: Any = mixture.components
        return mixture.of_any_family(BetaComponents(components, warp))

    def require_inside(self, y: TargetsOrTensor, name: str, given: Any = None) -> None:
        require_inside(self.warp, y, name, given, _INSTEAD)


@dataclass(frozen=True)
class Shares(Logit, by_name=False):
    """Take the logits of shares, without standardising them; beta components have this transform.

    Args:
        low: Lower end.
        high: Upper end.
    """

    of_family: ClassVar[bool] = True

    def fit(self, y: Tensor, *, common_unit: bool, warp: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        shift = torch.zeros_like(y[0], dtype=torch.float64)
        return {"shift": shift, "scale": shift.new_ones(1) if common_unit else torch.ones_like(shift)}

    def units(self, tensors: Mapping[str, Any]) -> ShareUnits:
        return ShareUnits(UnscaledUnits(tensors["shift"], tensors["scale"]), self.warp({}))
