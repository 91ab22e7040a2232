r"""Likelihood of targets that were observed in part, or as intervals: one path for all kinds of observations.

Rows are grouped by which of their outputs are exact, intervals or missing. The missing ones are integrated out, the
exact ones count by their density, and the intervals by their probability given the exact ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.boxes import log_box_probability
from pyro_mdn.distributions.observations.targets import EXACT, INTERVAL, MISSING, Targets, TargetsOrTensor
from pyro_mdn.support.checks import indices, is_mapped, is_recorded
from pyro_mdn.tensors.numerics import log_sum_exp

if TYPE_CHECKING:
    from pyro_mdn.distributions.families.components import Components
    from pyro_mdn.distributions.mixture import Mixture

M = TypeVar("M", bound="Mixture")

__all__ = [
    "Pattern",
    "by_pattern",
    "component_log_likelihood",
    "independent_log_likelihood",
    "log_likelihood",
    "relative_log_likelihood",
]


_BASE = 1 + max(EXACT, INTERVAL, MISSING)
_MOST_DIGITS = 39  # of a number to that base in 64 bits


class Pattern(NamedTuple):
    """Rows of which the same outputs were observed in the same way.

    Attributes:
        values: Targets of these rows, ``(P, D)``: a tensor if none is an interval, and :class:`Targets` otherwise.
        exact: Outputs that were observed exactly.
        intervals: Outputs that are known to lie in an interval.
    """

    values: TargetsOrTensor
    exact: list[int]
    intervals: list[int]

    @property
    def points(self) -> Tensor:
        """Values of the exact outputs, ``(P, len(exact))``."""
        values = self.values if isinstance(self.values, Tensor) else self.values.lower
        return values[:, self.exact]

    def box(self) -> tuple[Tensor, Tensor]:
        """Lower and upper limits of the intervals, ``(P, len(intervals))``."""
        assert isinstance(self.values, Targets)
        return self.values.lower[:, self.intervals], self.values.upper[:, self.intervals]


def by_pattern(
    mixture: M, value: TargetsOrTensor, function: Callable[[M, Pattern], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Apply ``function(mixture, pattern)`` to the rows of each pattern of observations.

    The tensors that it returns, one row for each row, come back in the batch shape. NaN and infinity never enter a
    computation, so that gradients stay finite.

    Raises:
        ValueError: If targets are intervals, and an operation is compiled or mapped: control flow would depend on data.
    """
    batch = torch.broadcast_shapes(value.shape[:-1], mixture.batch_shape)
    if isinstance(value, Targets):
        _require_known(value)
    rows, flat = value.expand(*batch, value.shape[-1]).reshape(-1, value.shape[-1]), mixture.flatten(batch)
    kinds = rows.kinds() if isinstance(rows, Targets) else MISSING * rows.isnan().to(torch.int8)
    patterns, which = _distinct(kinds)
    members = [(which == i).nonzero().squeeze(-1) for i in range(len(patterns))]
    pieces = [
        function(flat[member], Pattern(rows[member], *(_columns(pattern == kind) for kind in (EXACT, INTERVAL))))
        for member, pattern in zip(members, patterns, strict=True)
    ]
    order = torch.cat(members).argsort()
    results = (torch.cat(parts)[order] for parts in zip(*pieces, strict=True))
    return [result.reshape((*batch, *result.shape[1:])) for result in results]


def _distinct(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Find the distinct rows of ``(N, D)``, and which of them each row is."""
    if not len(kinds):
        return kinds.new_zeros((1, kinds.shape[1])), kinds.new_zeros(0)
    if kinds.shape[1] > _MOST_DIGITS:
        return kinds.unique(dim=0, return_inverse=True)
    # As numbers to the base of three, of which torch finds the distinct ones in a twentieth of the time.
    digits = _BASE ** torch.arange(kinds.shape[1], device=kinds.device)
    numbers, which = (kinds * digits).sum(1).unique(return_inverse=True)
    return numbers.unsqueeze(1) // digits % _BASE, which


def _columns(marked: Tensor) -> list[int]:
    return indices(marked.nonzero().squeeze(-1))


def _require_known(value: Targets) -> None:
    mapped = is_mapped(value.lower, value.upper)
    if mapped or is_recorded():
        by = "torch.vmap" if mapped else "torch.compile or torch.jit"
        raise ValueError(f"value: expected a tensor of complete points under {by}, got Targets, whose kinds vary")


def log_likelihood(mixture: Mixture, pattern: Pattern) -> tuple[Tensor]:
    """Log-density of exact outputs plus log-probability of the intervals given these, ``(P,)``."""
    if not (pattern.exact or pattern.intervals):
        return (0 * mixture.logits.logsumexp(-1),)  # not a constant, so that the result keeps a graph
    if not pattern.intervals:
        return (mixture.marginal(pattern.exact).log_prob(pattern.points),)
    joint = mixture.logits + component_log_likelihood(mixture, pattern)[0]
    return (log_sum_exp(joint.movedim(-1, 0)),)


def independent_log_likelihood(mixture: Mixture, targets: Targets) -> Tensor:
    """Log-likelihood of :class:`Targets` if outputs of a component are independent: entry by entry, ``(*batch)``.

    Nothing has to be grouped then, which takes several times as long for small batches.
    """
    components, kinds = mixture.components, targets.kinds()
    exact, interval = kinds == EXACT, kinds == INTERVAL
    # NaN and infinity must not enter a computation whose result is not used, so that gradients stay finite.
    density = components.output_log_prob(torch.where(exact, targets.lower, 0.0))
    known = torch.where(exact.unsqueeze(-1), density, 0.0)
    if bool(interval.any()):
        lower = torch.where(interval, targets.lower, -torch.inf)
        upper = torch.where(interval, targets.upper, 0.0)
        known = torch.where(interval.unsqueeze(-1), components.output_log_interval(lower, upper), known)
    return log_sum_exp((mixture.logits + known.sum(-2)).movedim(-1, 0))


def component_log_likelihood(mixture: Mixture, pattern: Pattern) -> tuple[Tensor]:
    """Compute :func:`log_likelihood` of each component, ``(P, K)``."""
    return (_of_components(mixture.components, pattern, lambda part, points: part.log_prob(points)),)


def relative_log_likelihood(mixture: Mixture, pattern: Pattern) -> tuple[Tensor]:
    """Compute :func:`component_log_likelihood` up to a constant for all components, ``(P, K)``."""
    return (_of_components(mixture.components, pattern, lambda part, points: part.relative_log_prob(points)),)


def _of_components(components: Components, pattern: Pattern, density: Callable[[Components, Tensor], Tensor]) -> Tensor:
    total = torch.zeros_like(components.locs[..., 0])
    if pattern.exact:
        total = total + density(components.marginal(pattern.exact), pattern.points)
    if pattern.intervals:
        rest = components.marginal([*pattern.exact, *pattern.intervals])
        rest = rest.condition(pattern.points) if pattern.exact else rest
        total = total + log_box_probability(rest, *pattern.box())
    return total
