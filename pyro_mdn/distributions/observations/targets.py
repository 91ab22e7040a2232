r"""Targets as intervals: exact, missing, rounded and censored observations as one type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pyro_mdn.support.arrays import as_tensor, refuse, require_no_infinity, to_numpy
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
    "without_intervals",
]

EXACT, INTERVAL, MISSING = range(3)
"""Kinds of observations of one output."""


@dataclass(frozen=True, eq=False)
class Targets:
    r"""Targets of which each entry is known to lie in an interval :math:`[l, u]`.

    An entry whose limits are equal is exact. One with the limits :math:`-\infty` and :math:`\infty` is missing. One
    with a single finite limit is censored. ``mixture.log_prob``, ``network.loss``, :func:`pyro_mdn.fit`, posteriors and
    ``scores.log_score`` take these in the place of y. The likelihood of a row is the density of its exact entries times
    the probability of its intervals given these.

    Use :meth:`exact`, :meth:`cells`, :meth:`censored` or :meth:`interval` to make them from tensors, arrays, data
    frames or lists.

    Args:
        lower: Lower limits, ``(*batch, D)``.
        upper: Upper limits, ``(*batch, D)``.

    Raises:
        ValueError: If the shapes differ, or limits are not floating point. The methods that make targets also check the
            numbers, and name row and column.

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
        if not (self.lower.is_floating_point() and self.upper.is_floating_point()):
            got = f"{self.lower.dtype} and {self.upper.dtype}"
            raise ValueError(f"lower, upper: expected floating point, got {got}; Targets.interval converts them")

    # Ways to make them

    @classmethod
    def exact(cls, y: Any) -> Self:
        """Make targets that were observed exactly, except for entries that are NaN, which are missing.

        Args:
            y: Targets, ``(*batch, D)``.
        """
        y = _finite_or_missing(y, "y")
        return cls._of_limits(y, y)

    @classmethod
    def cells(cls, y: Any, width: Any) -> Self:
        r"""Make targets that were rounded, or are counts: each lies within half a width of its value.

        .. math:: y - c/2 \le \text{target} \le y + c/2

        Args:
            y: Centres of the cells, ``(*batch, D)``; NaN marks missing entries.
            width: Widths c, one number or ``(D,)``; 0 for outputs that are exact.

        Raises:
            ValueError: If a width is negative or not finite, or so small that y has to be given in double precision.
        """
        given, y = y, _finite_or_missing(y, "y")
        size, dim = as_tensor(width, "width", y.device).to(y), y.shape[-1] if y.ndim > 1 else 1
        if size.shape not in ((), (dim,)) or not bool((size.isfinite() & (size >= 0)).all()):
            raise ValueError(f"width: expected {dim} finite numbers, none negative, or one, got {shown(width)}")
        targets = cls._of_limits(y - 0.5 * size, y + 0.5 * size)
        if is_known(y) and bool((vanished := (size > 0) & (targets.lower == targets.upper)).any()):
            refuse(y, vanished, "y", f"numbers that {y.dtype} tells apart from the ends of their cells", given)
        return targets

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
        return cls._of_limits(y.masked_fill(below, -math.inf), y.masked_fill(above, math.inf))

    @classmethod
    def interval(cls, lower: Any, upper: Any) -> Self:
        """Make targets from the limits of their intervals.

        Intervals of angles are arcs. One across the end of the period has an upper limit beyond it, such as 350 to 370
        degrees.

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
    def _of_limits(cls, lower: Tensor, upper: Tensor) -> Self:
        """Make targets from limits that are NaN where a target is missing."""
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

    def split(self, size: int | list[int]) -> list[Self]:
        """Split the rows, ``size`` at a time, or into parts of these sizes."""
        parts = zip(self.lower.split(size), self.upper.split(size), strict=True)
        return [type(self)(lower, upper) for lower, upper in parts]

    def expand(self, *shape: int) -> Self:
        """Expand both limits to a shape; views."""
        return self.limits(lambda t: t.expand(*shape))

    def unsqueeze(self, dim: int) -> Self:
        """Insert a dimension into both limits."""
        return self.limits(lambda t: t.unsqueeze(dim))

    def kinds(self) -> Tensor:
        """Return the kind of each entry, ``EXACT``, ``INTERVAL`` or ``MISSING``, as integers ``(*batch, D)``."""
        unequal = self.lower != self.upper
        unknown = unequal & self.lower.isinf() & self.upper.isinf()
        return torch.where(unknown, MISSING, torch.where(unequal, INTERVAL, EXACT)).to(torch.int8)

    def has_cells(self) -> bool:
        """Check whether an interval has two finite ends."""
        return bool(((self.lower != self.upper) & self.lower.isfinite() & self.upper.isfinite()).any())

    def points(self) -> Tensor:
        """Return one number for each entry, which training starts from; NaN for missing ones.

        That of an exact entry is its value. That of an interval is its middle if it is narrower than the range of the
        exact entries of its output, and otherwise the number in it that is nearest to their median. Where no entry is
        exact, the finite limits stand in for exact ones.
        """
        kinds, centre, span = self.kinds(), *self._centre_and_range()
        nearest = torch.maximum(torch.minimum(centre, self.upper), self.lower)
        half = 0.5 * self.upper - 0.5 * self.lower  # the difference itself may overflow
        middle = torch.where(half.isfinite(), self.lower, 0.0) + torch.where(half.isfinite(), half, 0.0)
        return torch.where(2 * half <= span, middle, nearest).masked_fill(kinds == MISSING, math.nan)

    def _centre_and_range(self) -> tuple[Tensor, Tensor]:
        """Compute median and range ``(D,)`` of the exact entries, or of all finite limits of an output without any."""
        lower, upper, kinds = (t.reshape(-1, self.shape[-1]) for t in (self.lower, self.upper, self.kinds()))
        counts = (kinds == EXACT) | ~(kinds == EXACT).any(0)
        numbers = torch.cat([lower, upper]).masked_fill(~torch.cat([counts, counts]), math.nan)
        numbers = numbers.masked_fill(numbers.isinf(), math.nan)
        span = numbers.nan_to_num(-math.inf).amax(0) - numbers.nan_to_num(math.inf).amin(0)
        return numbers.nanmedian(0).values, span

    def exact_points(self) -> Tensor:
        """Return the values of exact entries, and NaN for all others."""
        return self.lower.masked_fill(self.kinds() != EXACT, math.nan)

    def as_exact(self, name: str, user: str = "an operation without a likelihood") -> Tensor:
        """Return the values as a tensor, NaN where they are missing; a ``ValueError`` if there are intervals.

        Args:
            name: Name of the argument, for the message.
            user: What needs exact targets.
        """
        if bool((self.kinds() == INTERVAL).any()):
            takes = "log_prob, network.loss, fit, scores.log_score and scores.pit take these"
            raise ValueError(f"{name}: expected exact targets for {user}, got intervals; {takes}")
        return self.exact_points()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        array = to_numpy(self.as_exact("y"))
        return array if dtype is None else array.astype(dtype)

    # What Pyro's handlers ask of an observed value

    def dim(self) -> int:
        """Return the number of dimensions of each limit."""
        return self.ndim

    @property
    def data(self) -> Self:
        """The same targets without a graph."""
        return self.detach()


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


def without_intervals(y: TargetsOrTensor) -> TargetsOrTensor:
    """Return a tensor, which is quicker, in the place of :class:`Targets` that have no intervals."""
    if isinstance(y, Tensor) or bool((y.kinds() == INTERVAL).any()):
        return y
    return y.exact_points()


def is_complete(y: TargetsOrTensor) -> bool:
    """Check whether all entries are exact."""
    return not bool(((y.kinds() != EXACT) if isinstance(y, Targets) else y.isnan()).any())


def require_exact(y: TargetsOrTensor, user: str) -> Tensor:
    """Return a tensor of exact targets, NaN where they are missing; a ``ValueError`` if there are intervals.

    Args:
        y: Targets.
        user: What needs exact targets, for the message.
    """
    return y if isinstance(y, Tensor) else y.as_exact("y", user)


def joined(parts: Sequence[TargetsOrTensor]) -> TargetsOrTensor:
    """Join rows of several parts; tensors beside :class:`Targets` are exact."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    targets = [part if isinstance(part, Targets) else Targets.exact(part) for part in parts]
    return Targets(torch.cat([part.lower for part in targets]), torch.cat([part.upper for part in targets]))


def _finite_or_missing(y: Any, name: str) -> Tensor:
    values = as_tensor(y, name)
    if is_known(values):
        require_no_infinity(values, name, y)
    return values


def _mask(given: Any, name: str, y: Tensor) -> Tensor:
    """Convert a mask to booleans in the shape of y; ``None`` is no."""
    if given is None:
        return torch.zeros_like(y, dtype=torch.bool)
    values = as_tensor(given, name, y.device)
    if values.shape != y.shape:
        raise ValueError(f"{name}: expected a mask in the shape of y, {tuple(y.shape)}, got {tuple(values.shape)}")
    values = values.masked_fill(values.isnan() & y.isnan(), 0.0)  # of what is masked in both
    if bool((bad := (values != 0) & (values != 1)).any()):
        refuse(values, bad, name, "booleans", given)
    return values.bool()
