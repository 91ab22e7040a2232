r"""Probability of a box, a product of intervals, under the components of a mixture.

It is exact if the outputs of a component are independent, or if there is one output. Otherwise it is an integral over
all outputs but the last, by the method of Genz: outputs go in order, each within its interval given those before it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_mdn.tensors.roots import follow_root
from pyro_mdn.tensors.univariate import Law

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components

__all__ = ["NUM_POINTS", "log_box_probability"]

NUM_POINTS = 128
"""Quasi-random points of the integral, a power of two."""


def log_box_probability(components: Components, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Log-probability :math:`\log P_k(l \le y \le u)` of each component, ``(*batch, K)``, differentiable.

    For dependent outputs, it is the mean over 128 points of a Sobol sequence, the same ones in each call.

    Args:
        components: Components with D outputs, for a batch ``(*batch, K)``.
        lower: Lower limits ``(*batch, D)``; -inf where there is none.
        upper: Upper limits, likewise; not equal to the lower ones.

    References:
        Genz (1992), Numerical computation of multivariate normal probabilities.
        Genz & Bretz (1999), Numerical computation of multivariate t-probabilities.
    """
    if not components.has_independent_outputs:
        return _in_order(components, lower, upper)
    locs, scale, law = components.univariate()
    return _log_probability(law, _standardized(lower.unsqueeze(-1), upper.unsqueeze(-1), locs, scale)).sum(-2)


def _in_order(components: Components, lower: Tensor, upper: Tensor) -> Tensor:
    """Average over quasi-random points the product of conditional probabilities."""
    in_order, dim = components.in_order(), components.dim
    levels = _levels(NUM_POINTS, dim - 1).to(lower)
    total = lower.new_zeros(())
    for d in range(dim):
        locs, scale, law = in_order.next_output()
        interval = _standardized(lower[..., d, None], upper[..., d, None], locs, scale)
        total = total + _log_probability(law, interval)
        if d < dim - 1:
            level = levels[:, d].reshape(-1, *(1,) * lower.ndim)
            in_order.observe(locs + scale * _quantile_within(law, interval, level))
    return total.logsumexp(0) - math.log(NUM_POINTS)


@functools.cache
def _levels(count: int, dim: int) -> Tensor:
    """Points of a Sobol sequence in the open unit cube, ``(count, dim)``."""
    with torch.inference_mode(False):
        return SobolEngine(dim).draw(count, dtype=torch.float64) + 0.5 / count


class _Interval(NamedTuple):
    """Intervals of a standardised variable; one end may be open, and has the number of the other end then.

    Attributes:
        low: Lower ends.
        high: Upper ends.
        half: Half of the width; 1 where an end is open.
        below: Whether the lower end is open, that is at minus infinity.
        above: Whether the upper end is open.
    """

    low: Tensor
    high: Tensor
    half: Tensor
    below: Tensor
    above: Tensor


def _standardized(lower: Tensor, upper: Tensor, locs: Tensor, scale: Tensor) -> _Interval:
    below, above = lower.isinf(), upper.isinf()
    # Infinite numbers would make gradients NaN, even where a result that depends on them is not used.
    lower, upper = torch.where(below, upper, lower), torch.where(above, lower, upper)
    half = torch.where(below | above, 1.0, 0.5 * (upper - lower) / scale)
    return _Interval((lower - locs) / scale, (upper - locs) / scale, half, below, above)


def _log_probability(law: Law, interval: _Interval) -> Tensor:
    low, high, half, below, above = interval
    log_probability = torch.zeros_like(low)
    if bool(below.any()):
        log_probability = torch.where(below, law.log_cdf(torch.where(below, high, 0.0)), log_probability)
    if bool(above.any()):
        log_probability = torch.where(above, law.mirrored().log_cdf(torch.where(above, -low, 0.0)), log_probability)
    if bool((closed := ~(below | above)).any()):
        within = law.log_mass(torch.where(closed, low + half, 0.0), half)
        log_probability = torch.where(closed, within, log_probability)
    return log_probability


def _quantile_within(law: Law, interval: _Interval, level: Tensor) -> Tensor:
    """Quantile at ``level`` of Z given that it lies in an interval, with gradients to its ends and to the law."""
    low, high, _, below, above = interval
    # Where most of the interval is in the upper tail, in the mirrored law: probabilities are accurate in the lower one.
    flips = above | (~below & (low + high > 0))
    start, end = torch.where(flips, -high, low), torch.where(flips, -low, high)
    level, is_open = torch.where(flips, 1 - level, level), below | above
    mirrored = law.mirrored()
    if mirrored is law:
        point = _lower_quantile_within(law, start, end, is_open, level)
    else:
        by_law = [_lower_quantile_within(one, start, end, is_open, level) for one in (mirrored, law)]
        point = torch.where(flips, *by_law)
    return torch.where(flips, -point, point)


def _lower_quantile_within(law: Law, start: Tensor, end: Tensor, is_open: Tensor, level: Tensor) -> Tensor:
    """Quantile between ``start``, or minus infinity where the interval is open, and ``end``."""
    below, until = torch.where(is_open, 0.0, law.cdf(start)), law.cdf(end)
    probability = below + level * (until - below)
    # Where the probability underflows, all of it lies at the end that is nearer to the location.
    known = probability.detach() > torch.finfo(probability.dtype).tiny
    with torch.no_grad():
        root = torch.minimum(law.two_sided_quantile(torch.where(known, probability, 0.5)), end)
        root = torch.where(known, torch.where(is_open, root, torch.maximum(root, start)), 0.0)
    followed = follow_root(root, lambda point: (law.cdf(point) - probability, law.log_density(point).exp()))
    return torch.where(known, followed, end)
