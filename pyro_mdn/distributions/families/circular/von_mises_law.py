r"""The von Mises law of one angle: density, distribution function, and probabilities of arcs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.circular.concentrations import log_scaled_bessel, lost_resultant
from pyro_mdn.tensors.roots import solve_tail
from pyro_mdn.tensors.tensor_batch import stored
from pyro_mdn.tensors.univariate import SymmetricLaw

__all__ = ["VonMisesLaw"]

_LOG_TURN = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class VonMisesLaw(SymmetricLaw):
    r"""Von Mises law of an angle of any number of turns, in radians.

    .. math:: p(z) = \frac{e^{\kappa (\cos z - 1)}}{2\pi \, e^{-\kappa} I_0(\kappa)}

    The density is periodic. The distribution function is that on :math:`(-\pi, \pi)`, and grows by 1 with each turn, so
    that its differences are the probabilities of arcs of at most a turn.

    Args:
        concentration: Concentrations κ ≥ 0, ``(*batch, K, D)``.

    References:
        Mardia & Jupp (2000), Directional statistics.
    """

    concentration: Tensor = stored(1)

    def log_density(self, z: Tensor) -> Tensor:
        # As a square of a sine, because a difference of cosines would cancel.
        versine = 2 * (0.5 * z).sin().square()
        return -(self.concentration * versine + log_scaled_bessel(self.concentration)) - _LOG_TURN

    def slope(self, z: Tensor) -> Tensor:
        return (-self.concentration * z.sin()).detach()

    def cdf(self, z: Tensor) -> Tensor:
        turns = ((z.detach() + math.pi) / (2 * math.pi)).floor()
        angle = z - 2 * math.pi * turns
        distance = angle.abs().clamp(max=math.pi)
        tail = self._log_probability(distance, math.pi - distance).exp()
        return turns + torch.where(angle < 0, tail, 1 - tail)

    def log_cdf(self, z: Tensor) -> Tensor:
        return self.cdf(z).clamp(min=torch.finfo(z.dtype).tiny).log()

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        centre = (centre - 2 * math.pi * (centre.detach() / (2 * math.pi)).round()).abs()
        half = half.clamp(max=math.pi)
        low, high = centre - half, centre + half
        first = low.clamp(min=0)
        inside = (low >= 0) & (high <= math.pi)
        parts = [
            (first, torch.where(inside, 2 * half, high.clamp(max=math.pi) - first)),
            (torch.zeros_like(low), (-low).clamp(min=0)),
            ((2 * math.pi - high).clamp(max=math.pi), (high - math.pi).clamp(min=0)),
        ]
        return torch.stack([self._log_probability(*part) for part in parts]).logsumexp(0)

    def quantile(self, q: Tensor) -> Tensor:
        with torch.no_grad():
            known = torch.where(q > 0, q, 0.25)
            # In terms of sin(z / 2), quantiles are close to those of a normal law.
            reach = (1 - 1.5 * torch.special.ndtri(known)) / (2 * self.concentration.sqrt())
            low = -2 * reach.clamp(max=1).asin()
            known = known.expand(low.shape)
            point = solve_tail(known, low, torch.zeros_like(low), lambda z: (self.cdf(z), self.log_density(z).exp()))
            return torch.where(q > 0, point, -math.pi)

    def mean_distance(self, z: Tensor) -> Tensor:
        raise NotImplementedError("mean_distance: an angle is neither more nor less than another; use scores.crps")

    def mean_versine(self, rate: Tensor) -> Tensor:
        return lost_resultant(self.concentration)

    def stddev(self) -> Tensor:
        lost = lost_resultant(self.concentration)
        return (-2 * torch.log1p(-lost.clamp(max=1 - torch.finfo(lost.dtype).eps))).sqrt()

    def _log_probability(self, start: Tensor, length: Tensor) -> Tensor:
        r"""Log-probability of an arc from ``start`` on, with both ends in :math:`[0, \pi]`; accurate however small.

        The density falls along the arc. It is integrated, by a Gauss-Legendre rule, up to where it is negligible.
        """
        depth, nodes = _RULES.get(start.dtype, _SINGLE)
        concentration = self.concentration
        with torch.no_grad():
            end = (0.5 * start).sin().square() + 0.5 * depth / concentration
            reach = (2 * end.clamp(max=1).sqrt().asin() - start).clamp(min=0)
        empty = length <= 0
        length = torch.where(empty, 1.0, torch.where(reach < length, reach, length))
        total, slope = torch.zeros_like(length), -2 * concentration
        for node, weight in nodes:
            step = (0.5 * node) * length
            total = torch.add(total, (slope * step.sin() * (start + step).sin()).exp(), alpha=weight)
        height = -2 * concentration * (0.5 * start).sin().square() - log_scaled_bessel(concentration) - _LOG_TURN
        return (height + (length * total).log()).masked_fill(empty, -math.inf)


def _rule(depth: float, count: int) -> tuple[float, list[tuple[float, float]]]:
    """Logarithm of what is negligible, and the nodes in (0, 1) with their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return depth, list(zip((0.5 * (nodes + 1)).tolist(), (0.5 * weights).tolist(), strict=True))


_RULES = {torch.float64: _rule(38.0, 24)}
_SINGLE = _rule(17.0, 10)
