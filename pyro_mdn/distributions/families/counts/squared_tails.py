r"""Sums of squared tail probabilities of counts, of which ranked probability scores are made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.tensors.univariate import GRID

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.counts.count_marginals import CountMarginals

__all__ = ["squared_tails"]

_REST, _NOTHING = 1e-3, 1e-9
"""Probabilities above the last count of sums, and above the last one of integrals."""

_MOST = 2048
"""Counts that are added up one by one."""


def _legendre(count: int) -> list[tuple[float, float]]:
    """Nodes and weights of an integral from 0 to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return list(zip((0.5 * (nodes + 1)).tolist(), (0.5 * weights).tolist(), strict=True))


_OF_TAIL, _OF_PANEL = _legendre(32), _legendre(16)


def squared_tails(marginals: CountMarginals, middle: Tensor) -> Tensor:
    r"""Compute :math:`\sum_{k < m} F(k)^2 + \sum_{k \ge m} (1 - F(k))^2` with an error below 1e-6, differentiable.

    The memory that this takes does not depend on the size of the counts. Few counts are added up until one that is
    exceeded with a probability of 1e-3 at most. Beyond, where terms are small and smooth, the sum is an integral.
    Where there are many counts, all are integrals over panels that follow every component.

    Args:
        marginals: The distributions.
        middle: Counts m near the medians, ``(*batch, D)``.
    """
    with torch.no_grad():
        size = 1 + int(_largest(marginals.upper_quantile(torch.full_like(middle, _REST))))
    if size > _MOST:
        return _by_panels(marginals, middle)
    column = (-1, *(1,) * middle.ndim)
    counts = torch.arange(size, dtype=middle.dtype, device=middle.device).reshape(column)
    cdf = marginals.probability(counts).cumsum(0)
    terms = torch.where(counts < middle, cdf, 1 - cdf).square()
    last = torch.maximum(middle, middle.new_full((), size))
    return terms.sum(0) + _beyond(marginals, last)


def _beyond(marginals: CountMarginals, first: Tensor) -> Tensor:
    """Sum the squares of the probabilities above k, for k from ``first`` on, by an integral over logarithms."""
    start = first - 0.5
    with torch.no_grad():
        reach = ((marginals.upper_quantile(torch.full_like(first, _NOTHING)) + 1) / start).clamp(min=1).log()
    total = torch.zeros_like(reach)
    for node, weight in _OF_TAIL:
        point = start * (node * reach).exp()
        total = total + weight * reach * point * marginals.continued(point)[1].square()
    return total


def _by_panels(marginals: CountMarginals, middle: Tensor) -> Tensor:
    """Sum over the panels between counts: those of few counts one by one, and others by integrals."""
    with torch.no_grad():
        edges = _edges(marginals, middle)
    start, end = edges[:-1], edges[1:]
    upper, number = start >= middle, end - start

    def height(point: Tensor) -> Tensor:
        cdf, sf = marginals.continued(point)
        return torch.where(upper, sf, cdf).square()

    few = number <= len(_OF_PANEL)
    total = torch.zeros_like(start)
    for i, (node, weight) in enumerate(_OF_PANEL):
        point = torch.where(few, start + i, start - 0.5 + node * number)
        total = total + torch.where(few, (i < number).to(number), weight * number) * height(point)
    # The sum is the integral from a half below the first count to a half above the last one, less 1/24 of the
    # difference of slopes there (Euler and Maclaurin).
    slopes = height(end) - height(end - 1) - height(start) + height((start - 1).clamp(min=0))
    return (total - torch.where(few, 0.0, slopes / 24)).sum(0)


def _edges(marginals: CountMarginals, middle: Tensor) -> Tensor:
    """Counts ``(P, *batch, D)`` in ascending order: around the bulk of each component, and powers of two."""
    reach = marginals.upper_quantile(torch.full_like(middle, _NOTHING)) + 1
    centre, width = marginals.law.bulk()
    steps = middle.new_tensor(GRID).reshape(-1, *(1,) * centre.ndim)
    bulk = (centre + steps * width).movedim(-2, 1).flatten(0, 1)
    powers = 2.0 ** torch.arange(2 + math.ceil(math.log2(_largest(reach))), dtype=middle.dtype, device=middle.device)
    powers = powers.reshape(-1, *(1,) * middle.ndim)
    ends = torch.zeros_like(middle), middle, reach
    parts = [bulk, powers, *(end.unsqueeze(0) for end in ends)]
    every = torch.cat([part.expand(len(part), *middle.shape) for part in parts]).floor()
    return torch.minimum(every.clamp(min=0), torch.maximum(reach, middle)).sort(0).values


def _largest(counts: Tensor) -> float:
    """Find the largest count, leaving out what is unknown; 1 at least."""
    return max([1.0, *counts.nan_to_num(0.0, 0.0).flatten().amax(0, keepdim=True).tolist()]) if counts.numel() else 1.0
