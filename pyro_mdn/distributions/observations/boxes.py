r"""Probability of a box, a product of intervals, under the components of a mixture.

It is exact if the outputs of a component are independent, or if there is one output. Otherwise it is an integral over
all outputs but the last, by the method of Genz: outputs go in order, each within its interval given those before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_mdn.support.checks import is_known
from pyro_mdn.tensors.roots import follow_root
from pyro_mdn.tensors.univariate import Law

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components

__all__ = ["log_box_probability", "log_interval_probability", "quantile_within"]

_NUM_POINTS = 128
"""Quasi-random points of the integral, a power of two."""


def log_box_probability(components: Components, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Log-probability :math:`\log P_k(l \le y \le u)` of each component, ``(*batch, K)``, differentiable.

    For dependent outputs, it is the mean over 128 points of a Sobol sequence, the same ones in each call. The outputs
    go in ascending order of the probability of their intervals, by row and component: the other way round, few of the
    points would matter.

    Args:
        components: Components with D outputs, for a batch ``(*batch, K)``.
        lower: Lower limits ``(*batch, D)``; -inf where there is none.
        upper: Upper limits, likewise; not equal to the lower ones.

    References:
        Genz (1992), Numerical computation of multivariate normal probabilities.
        Genz & Bretz (1999), Numerical computation of multivariate t-probabilities.
    """
    one_by_one = components.output_log_interval(lower, upper)
    if components.has_independent_outputs:
        return one_by_one.sum(-2)
    order = one_by_one.detach().mT.argsort(-1)
    limits = (limit.unsqueeze(-2).expand(order.shape).gather(-1, order) for limit in (lower, upper))
    return _in_order(components.reordered(order), *limits)


def log_interval_probability(law: Law, lower: Tensor, upper: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Log-probability of intervals, of which one end may be infinite, under laws with a location and a scale."""
    return _log_probability(law, _standardized(lower, upper, locs, scale))


def quantile_within(law: Law, lower: Tensor, upper: Tensor, level: Tensor) -> Tensor:
    """Quantile of Z given that it lies in an interval, of which one end may be infinite, at levels in (0, 1)."""
    return _quantile_within(law, _standardized(lower, upper, lower.new_zeros(()), lower.new_ones(())), level)


def _in_order(components: Components, lower: Tensor, upper: Tensor) -> Tensor:
    """Average over quasi-random points the product of conditional probabilities, for limits ``(*batch, K, D)``."""
    in_order, dim = components.in_order(), components.dim
    levels = torch.from_numpy(_levels(_NUM_POINTS, dim - 1)).to(lower)
    total = lower.new_zeros(())
    for d in range(dim):
        locs, scale, law = in_order.next_output()
        interval = _standardized(lower[..., d], upper[..., d], locs, scale)
        total = total + _log_probability(law, interval)
        if d < dim - 1:
            level = levels[:, d].reshape(-1, *(1,) * (lower.ndim - 1))
            in_order.observe(locs + scale * _quantile_within(law, interval, level))
    return total.logsumexp(0) - math.log(_NUM_POINTS)


@functools.cache
def _levels(count: int, dim: int) -> NDArray[np.float64]:
    """Points of a Sobol sequence in the open unit cube, ``(count, dim)``."""
    from scipy.stats.qmc import Sobol  # it takes longer to import than all of this package

    return Sobol(dim, scramble=False).random(count) + 0.5 / count


class _Interval(NamedTuple):
    """Intervals of a standardised variable; one end may be open, and has the number of the other end then.

    Attributes:
        low: Lower ends.
        high: Upper ends.
        below: Whether the lower end is open, that is at minus infinity.
        above: Whether the upper end is open.
        half: Half of the width, which the difference of the ends has too few digits for; 1 where an end is open.
    """

    low: Tensor
    high: Tensor
    below: Tensor
    above: Tensor
    half: Tensor

    def near(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mirror the intervals that are for the most part above 0: probabilities are accurate in the lower tail.

        Returns:
            Lower and upper ends, whether the lower end is open (the upper one never is), and which were mirrored.
        """
        flips = self.above | (~self.below & (self.low + self.high > 0))
        start, end = torch.where(flips, -self.high, self.low), torch.where(flips, -self.low, self.high)
        return start, end, self.below | self.above, flips


def _standardized(lower: Tensor, upper: Tensor, locs: Tensor, scale: Tensor) -> _Interval:
    below, above = lower.isinf(), upper.isinf()
    # Infinite numbers would make gradients NaN, even where a result that depends on them is not used.
    lower, upper = torch.where(below, upper, lower), torch.where(above, lower, upper)
    half = torch.where(below | above, 1.0, (0.5 * upper - 0.5 * lower) / scale)
    return _Interval((lower - locs) / scale, (upper - locs) / scale, below, above, half)


_WIDE = 10.0
"""Half widths beyond this many times one plus the nearer end would cancel with the middle of the interval."""


def _log_probability(law: Law, interval: _Interval) -> Tensor:
    start, end, is_open, flips = interval.near()
    narrow = ~is_open & (interval.half < _WIDE * (1 + end.detach().abs()))
    result = torch.zeros_like(end)
    if _any(narrow):
        middle = torch.where(narrow, interval.low + interval.half, 0.0)
        result = torch.where(narrow, law.log_mass(middle, torch.where(narrow, interval.half, 1.0)), result)
    if _any(~narrow):
        parts = start, end, is_open, narrow
        result = torch.where(narrow, result, _by_law(law, flips, lambda one: _log_lower_probability(one, *parts)))
    return result


def _log_lower_probability(law: Law, start: Tensor, end: Tensor, is_open: Tensor, skipped: Tensor) -> Tensor:
    """Log-probability from ``start``, or minus infinity where the interval is open, to ``end``, unless skipped."""
    until = law.log_cdf(torch.where(skipped, 0.0, end))
    closed = ~is_open & ~skipped
    if not _any(closed):
        return until
    below = law.log_cdf(torch.where(closed, start, 0.0))
    share = torch.where(closed, below - until, -1.0).exp()
    return until + torch.where(closed, torch.log1p(-share), 0.0)


def _any(mask: Tensor) -> bool:
    """Whether an entry is true, or may be, where that is not known before the computation is over."""
    return not is_known(mask) or bool(mask.any())


def _by_law(law: Law, flips: Tensor, function: Callable[[Law], Tensor]) -> Tensor:
    """Apply a function to the law and, where intervals were mirrored, to the mirrored law."""
    mirrored = law.mirrored()
    return function(law) if mirrored is law else torch.where(flips, function(mirrored), function(law))


def _quantile_within(law: Law, interval: _Interval, level: Tensor) -> Tensor:
    """Quantile at ``level`` of Z given that it lies in an interval, with gradients to its ends and to the law."""
    start, end, is_open, flips = interval.near()
    level = torch.where(flips, 1 - level, level)
    point = _by_law(law, flips, lambda one: _lower_quantile_within(one, start, end, is_open, level))
    return torch.where(flips, -point, point)


def _lower_quantile_within(law: Law, start: Tensor, end: Tensor, is_open: Tensor, level: Tensor) -> Tensor:
    """Quantile between ``start``, or minus infinity where the interval is open, and ``end``; in logarithms."""
    below, until = law.log_cdf(torch.where(is_open, end, start)), law.log_cdf(end)
    share = torch.where(is_open, 0.0, (below - until).exp())  # of what lies below the end, that below the start
    target = until + torch.log(share + level * (1 - share))

    def equation(point: Tensor) -> tuple[Tensor, Tensor]:
        log_cdf = law.log_cdf(point)
        return log_cdf - target, (law.log_density(point) - log_cdf).exp()

    with torch.no_grad():
        root = law.two_sided_quantile(target.exp())
        # Where a probability underflows, the tail is all but exponential.
        hazard = equation(end)[1]
        root = torch.where(root.isfinite(), root, end + (target - until) / hazard)
        for _ in range(_STEPS):
            excess, slope = equation(root)
            root = torch.minimum(root - excess / slope.clamp(min=torch.finfo(slope.dtype).tiny), end)
            root = torch.where(is_open, root, torch.maximum(root, start))
    return follow_root(root, equation)


_STEPS = 3
"""Steps of Newton's method, which leave nothing of the error of quantiles and of the exponential tail."""
