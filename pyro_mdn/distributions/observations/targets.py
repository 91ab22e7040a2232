r"""Targets as intervals: exact, missing, rounded and censored observations as one type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pyro_mdn.support.arrays import as_tensor, refuse
from pyro_mdn.support.checks import is_known, is_recorded, shown

__all__ = [
    "EXACT",
    "INTERVAL",
    "MISSING",
    "Targets",
    "TargetsOrTensor",
    "as_targets",
    "is_complete",
    "joined",
    "missing",
    "require_exact",
]

EXACT, INTERVAL, MISSING = range(3)
"""Kinds of observations of one output."""


@dataclass(frozen=True, eq=False)
class Targets:
    r"""Targets of which each entry is known to lie in an interval :math:`[l, u]`.

    An entry whose limits are equal is exact. One with the limits :math:`-\infty` and :math:`\infty` is missing. One
    with a single finite limit is censored. Everything that takes targets ``y`` and computes a likelihood takes these
    in their place: ``mixture.log_prob``, ``network.loss`` and :func:`pyro_mdn.fit`. The likelihood of a row is the
    density of its exact entries times the probability of its intervals given these.

    Use :meth:`exact`, :meth:`cells`, :meth:`censored` or :meth:`interval` to make them from tensors, arrays, data
    frames or lists.

    Args:
        lower: Lower limits, ``(*batch, D)``.
        upper: Upper limits, ``(*batch, D)``.

    Raises:
        ValueError: If the shapes differ. The methods that make targets also check the numbers, and name row and column.

    >>> times = Targets.censored([[2.0], [5.0], [float("nan")]], right=[[False], [True], [False]])
    >>> times.lower.flatten(), times.upper.flatten()
    (tensor([2., 5., -inf], dtype=torch.float64), tensor([2., inf, inf], dtype=torch.float64))
    >>> times.kinds().flatten() == torch.tensor([EXACT, INTERVAL, MISSING])
    tensor([True, True, True])
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if not is_recorded() and self.lower.shape != self.upper.shape:
            got = f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            raise ValueError(f"lower, upper: expected limits of one shape, got {got}")

    # Ways to make them

    @classmethod
    def exact(cls, y: Any) -> Self:
        """Make targets that were observed exactly, except for entries that are NaN, which are missing.

        Args:
            y: Targets, ``(*batch, D)``.
        """
        y = _finite_or_missing(y, "y")
        return cls.between(y, y)

    @classmethod
    def cells(cls, y: Any, width: Any) -> Self:
        r"""Make targets that were rounded, or are counts: each lies within half a width of its value.

        .. math:: y - c/2 \le \text{target} \le y + c/2

        Args:
            y: Centres of the cells, ``(*batch, D)``; NaN marks missing entries.
            width: Widths c, one number or ``(D,)``; 0 for outputs that are exact.

        Raises:
            ValueError: If a width is negative or not finite.
        """
        y = _finite_or_missing(y, "y")
        size = as_tensor(width, "width", y.device).to(y)
        if size.shape not in ((), y.shape[-1:]) or not bool((size.isfinite() & (size >= 0)).all()):
            expected = f"a finite number that is not negative, or {y.shape[-1]} of them"
            raise ValueError(f"width: expected {expected}, got {shown(width)}")
        return cls.between(y - 0.5 * size, y + 0.5 * size)

    @classmethod
    def censored(cls, y: Any, *, left: Any = None, right: Any = None) -> Self:
        r"""Make targets of which some are known only to lie below or above a limit.

        Args:
            y: Observed values, and limits where an entry is censored, ``(*batch, D)``; NaN marks missing entries.
            left: Where the target lies below y, such as below a detection limit: booleans in the shape of y.
            right: Where the target lies above y, such as a time to an event that was not seen until then.

        Raises:
            ValueError: If masks have another shape, hold anything but 0 and 1, or an entry is censored on both sides.
        """
        y = _finite_or_missing(y, "y")
        below, above = _mask(left, "left", y), _mask(right, "right", y)
        if bool((both := below & above).any()):
            refuse(y, both, "left, right", "an entry to be censored on one side")
        return cls.between(y.masked_fill(below, -math.inf), y.masked_fill(above, math.inf))

    @classmethod
    def interval(cls, lower: Any, upper: Any) -> Self:
        """Make targets from the limits of their intervals.

        Args:
            lower: Lower limits, ``(*batch, D)``; -inf where there is none.
            upper: Upper limits, likewise; inf where there is none. Equal limits make an exact target.

        Raises:
            ValueError: If a limit is NaN, or a lower limit exceeds its upper limit.
        """
        low = as_tensor(lower, "lower")
        high = as_tensor(upper, "upper", low.device)
        dtype = torch.promote_types(low.dtype, high.dtype)
        targets = cls(low.to(dtype), high.to(dtype))
        for limit, name, given in ((targets.lower, "lower", lower), (targets.upper, "upper", upper)):
            if bool((bad := limit.isnan()).any()):
                refuse(limit, bad, name, "limits, infinite where there are none", given)
        empty = (targets.lower > targets.upper) | ((targets.lower == targets.upper) & targets.lower.isinf())
        if bool(empty.any()):
            refuse(targets.lower, empty, "lower", "limits below the upper ones, or equal and finite", lower)
        return targets

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> Self:
        """Make targets from limits that are NaN where a target is missing, without a check."""
        return cls(lower.nan_to_num(-math.inf, math.inf, -math.inf), upper.nan_to_num(math.inf, math.inf, -math.inf))

    # As a tensor of targets

    @property
    def shape(self) -> torch.Size:
        """Shape of each limit, ``(*batch, D)``."""
        return self.lower.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of each limit."""
        return self.lower.ndim

    @property
    def device(self) -> torch.device:
        """Device of the limits."""
        return self.lower.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the limits."""
        return self.lower.dtype

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, index: Any) -> Self:
        return self.limits(lambda t: t[index])

    def __repr__(self) -> str:
        counts = [int((self.kinds() == kind).sum()) for kind in (EXACT, INTERVAL, MISSING)]
        return f"Targets(shape={tuple(self.shape)}, {counts[0]} exact, {counts[1]} intervals, {counts[2]} missing)"

    def limits(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function, which may change the shape, to both limits."""
        return type(self)(function(self.lower), function(self.upper))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert or move both limits; arguments are those of ``torch.Tensor.to``."""
        return self.limits(lambda t: t.to(*args, **kwargs))

    def double(self) -> Self:
        """Convert both limits to double precision."""
        return self.limits(Tensor.double)

    def detach(self) -> Self:
        """Return the same targets without a graph."""
        return self.limits(Tensor.detach)

    def reshape(self, *shape: int) -> Self:
        """Reshape both limits."""
        return self.limits(lambda t: t.reshape(*shape))

    def split(self, size: int) -> list[Self]:
        """Split the rows, ``size`` at a time."""
        return [self[start : start + size] for start in range(0, max(1, len(self)), size)]

    def expand(self, *shape: int) -> Self:
        """Expand both limits to a shape; views."""
        return self.limits(lambda t: t.expand(*shape))

    def unsqueeze(self, dim: int) -> Self:
        """Insert a dimension into both limits."""
        return self.limits(lambda t: t.unsqueeze(dim))

    def kinds(self) -> Tensor:
        """Return the kind of each entry, ``EXACT``, ``INTERVAL`` or ``MISSING``, as integers ``(*batch, D)``."""
        unknown = self.lower.isinf() & self.upper.isinf()
        return (self.lower != self.upper).to(torch.int8) + unknown.to(torch.int8)

    def points(self) -> Tensor:
        """Return one number for each entry: its value, the middle of its interval, its only limit, or NaN."""
        middle = self.lower + 0.5 * (self.upper - self.lower)
        one = torch.where(self.lower.isinf(), self.upper, self.lower)
        open_ended = self.lower.isinf() | self.upper.isinf()
        return torch.where(open_ended, one.masked_fill(one.isinf(), math.nan), middle)

    def exact_points(self) -> Tensor:
        """Return the values of exact entries, and NaN for all others."""
        return self.lower.masked_fill(self.kinds() != EXACT, math.nan)


TargetsOrTensor = Targets | Tensor


def as_targets(y: Any, name: str, device: torch.device | None = None) -> TargetsOrTensor:
    """Convert targets of any container to a tensor; :class:`Targets` come back as they are.

    Raises:
        ValueError: If a value is not a number.
    """
    return y if isinstance(y, Targets) else as_tensor(y, name, device)


def missing(y: TargetsOrTensor) -> Tensor:
    """Mark the entries that were not observed at all."""
    return y.kinds() == MISSING if isinstance(y, Targets) else y.isnan()


def is_complete(y: TargetsOrTensor) -> bool:
    """Check whether all entries are exact."""
    return isinstance(y, Tensor) and not bool(y.isnan().any())


def require_exact(y: TargetsOrTensor, user: str) -> Tensor:
    """Return a tensor of exact targets, NaN where they are missing; a ``ValueError`` if there are intervals.

    Args:
        y: Targets.
        user: What needs exact targets, for the message.
    """
    if isinstance(y, Tensor):
        return y
    if count := int((y.kinds() == INTERVAL).sum()):
        raise ValueError(f"y: expected exact targets for {user}, got {count} intervals; the likelihood takes these")
    return y.exact_points()


def joined(parts: Sequence[TargetsOrTensor]) -> TargetsOrTensor:
    """Join rows of several parts; tensors beside :class:`Targets` are exact."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    targets = [part if isinstance(part, Targets) else Targets.exact(part) for part in parts]
    return Targets(torch.cat([part.lower for part in targets]), torch.cat([part.upper for part in targets]))


def _finite_or_missing(y: Any, name: str) -> Tensor:
    values = as_tensor(y, name)
    if is_known(values) and bool((infinite := values.isinf()).any()):
        refuse(values, infinite, name, "finite numbers, or NaN for missing ones", y)
    return values


def _mask(given: Any, name: str, y: Tensor) -> Tensor:
    """Convert a mask to booleans in the shape of y; ``None`` is no."""
    if given is None:
        return torch.zeros_like(y, dtype=torch.bool)
    values = as_tensor(given, name, y.device)
    if values.shape != y.shape:
        raise ValueError(f"{name}: expected a mask in the shape of y, {tuple(y.shape)}, got {tuple(values.shape)}")
    if bool((bad := (values != 0) & (values != 1)).any()):
        refuse(values, bad, name, "booleans", given)
    return values.bool()
