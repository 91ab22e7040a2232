r"""Single outputs of truncated mixtures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mdn.distributions.marginals import LocationScaleMarginals
from pyro_mdn.distributions.truncation.truncated_law import TruncatedLaw, standardized
from pyro_mdn.distributions.units.warped_marginals import WarpedMarginals
from pyro_mdn.distributions.units.warps import IdentityWarp
from pyro_mdn.tensors.numerics import log_sum_exp
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["TruncatedMarginals"]

_IMPOSSIBLE = -0.2
"""Share of the largest number below which a logarithm stands for that of 0."""


class TruncatedMarginals(LocationScaleMarginals):
    """Marginals that are mixtures of truncated laws.

    Partial moments and scores are integrals over the mixture, by the same quadrature as behind a warp.

    Args:
        mixture: The mixtures, with parameters ``(*batch, D, K)``.
        law: Their law.
        low: Lower ends of the outputs, ``(*batch, D)``.
        high: Upper ends, likewise.
    """

    def __init__(self, mixture: UnivariateMixture, law: TruncatedLaw, low: Tensor, high: Tensor) -> None:
        super().__init__(mixture)
        self.law, self.low, self.high = law, low, high
        self.integrals = WarpedMarginals(LocationScaleMarginals(mixture), IdentityWarp())

    def is_differentiated(self) -> bool:
        return False  # an end of an interval may be that of the support

    def log_cdf(self, value: Tensor) -> Tensor:
        return _without_impossible(super().log_cdf(value))

    def log_sf(self, value: Tensor) -> Tensor:
        return _without_impossible(super().log_sf(value))

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self.log_between(centre - half, centre + half)

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        logits, locs, scale, _ = self.mixture
        ends = (standardized(end.unsqueeze(-1), locs, scale) for end in (lower, upper))
        return log_sum_exp((logits + self.law.log_between(*ends)).movedim(-1, 0))

    def quantile(self, q: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(super().quantile(q), self.high), self.low)

    def upper_quantile(self, q: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(super().upper_quantile(q), self.high), self.low)

    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.integrals.shortest(outside)

    def expected_below(self, value: Tensor) -> Tensor:
        return self.integrals.expected_below(value)

    def expected_above(self, value: Tensor) -> Tensor:
        return self.integrals.expected_above(value)

    def crps(self, value: Tensor) -> Tensor:
        return self.integrals.crps(value)


def _without_impossible(level: Tensor) -> Tensor:
    return level.masked_fill(level < _IMPOSSIBLE * torch.finfo(level.dtype).max, -math.inf)
