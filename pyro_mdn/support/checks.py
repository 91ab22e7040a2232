r"""Checks of settings and tensors; their errors say what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Number, Real
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.masked import is_masked_tensor

from pyro_mdn.support.torch_compat import (
    FORWARD_LEVEL,
    inner_tensor,
    is_batched,
    is_hooked,
    is_wrapped,
    tracing_state,
    transforms_active,
)

__all__ = [
    "all_finite",
    "as_sizes",
    "bounds",
    "describe",
    "indices",
    "is_count",
    "is_differentiated",
    "is_inherited",
    "is_known",
    "is_mapped",
    "is_plain",
    "is_recorded",
    "is_subclassed",
    "is_traced",
    "is_transformed",
    "plain_number",
    "require_counts",
    "require_numbers",
    "require_range",
    "require_unmapped",
    "sample_shape_of",
    "shown",
    "unmasked",
    "unwrapped",
]

_FEW = 8  # lists of at most this many entries are shown in errors


def describe(values: Any) -> str:
    """Describe a value by its type, dtype and shape, without printing its contents.

    >>> describe(np.zeros((3, 2))), describe("text"), describe([1] * 20)
    ('ndarray float64 (3, 2)', 'str', 'list of 20')
    """
    kind, shape = type(values).__name__, getattr(values, "shape", None)
    if shape is not None and isinstance(shape, Sequence):
        dtype = getattr(values, "dtype", None)
        return " ".join([kind, *([] if dtype is None else [str(dtype)]), str(tuple(shape))])
    return f"{kind} of {len(values)}" if isinstance(values, list | tuple | dict | set) else kind


def shown(value: Any) -> str:
    """Show a setting in an error: numbers, text and dtypes as they are, other values by type, dtype and shape.

    >>> shown(3), shown("full"), shown([0.5, 2]), shown(torch.zeros(3)), shown(np.float32(0.5))
    ('3', "'full'", '[0.5, 2]', 'Tensor torch.float32 (3,)', '0.5')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str) and len(value) > 80:
        return repr(value[:80] + "...")
    if isinstance(value, list | tuple) and len(value) <= _FEW and all(map(_is_scalar, value)):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value.item() if isinstance(value, np.generic) else value) if _is_scalar(value) else describe(value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | Number | str | np.generic | torch.dtype)


def plain_number(value: Any) -> float:
    """Give back a number as it is, that of an array or tensor without dimensions, NaN of anything else.

    >>> plain_number(np.float32(0.5)), plain_number("0.5")
    (0.5, nan)
    """
    if isinstance(value, float | int) and not isinstance(value, bool):  # which compilers know how to trace
        return value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def is_count(value: Any) -> bool:
    """Check for a positive integer, of Python or NumPy.

    >>> is_count(3), is_count(3.0), is_count(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def as_sizes(value: Any, name: str) -> tuple[int, ...]:
    """Convert a positive integer, or a sequence of them, to a tuple."""
    sizes = [value] if isinstance(value, Integral) else value
    if not isinstance(sizes, Iterable) or not (sizes := [*sizes]) or not all(map(is_count, sizes)):
        raise ValueError(f"{name}: expected a positive integer or a sequence of them, got {shown(value)}")
    return tuple(map(int, sizes))


def require_counts(**settings: Any) -> None:
    """Raise a ``ValueError`` unless each setting is a positive integer, or ``None``.

    >>> require_counts(size=0)
    Traceback (most recent call last):
    ValueError: size: expected a positive integer, got 0
    """
    for name, value in settings.items():
        if value is not None and not is_count(value):
            raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")


def require_numbers(*, least: float = math.ulp(0.0), **settings: Any) -> None:
    """Raise a ``ValueError`` unless each setting is finite and at least ``least``, or ``None``.

    >>> require_numbers(lr=0.0)
    Traceback (most recent call last):
    ValueError: lr: expected a finite number that is positive, got 0.0
    """
    for name, value in settings.items():
        if value is not None and (not isinstance(value, Real) or not least <= float(value) < math.inf):
            kind = "not negative" if least == 0 else "positive"
            raise ValueError(f"{name}: expected a finite number that is {kind}, got {shown(value)}")


def sample_shape_of(value: Any) -> tuple[int, ...]:
    """Convert a number of draws, or a shape, to a shape; raise a ``ValueError`` if it is neither.

    >>> sample_shape_of(3), sample_shape_of([2, 3]), sample_shape_of(())
    ((3,), (2, 3), ())
    """
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(size, int | np.integer | torch.SymInt) and size >= 0 for size in sizes):
        raise ValueError(f"sample_shape: expected a number of draws, or a shape of them, got {shown(value)}")
    return sizes


def bounds(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Find the least and greatest entry in a single pass; both are NaN if any entry is, and 1 for no entries."""
    if tensor.numel() == 0:
        return tensor.new_ones(()), tensor.new_ones(())
    low, high = torch.aminmax(tensor.detach())
    return low, high


def all_finite(tensor: Tensor) -> bool:
    """Check that no entry is infinite or NaN.

    >>> all_finite(torch.tensor([1.0, math.nan]))
    False
    """
    if math.isfinite(tensor.detach().sum().item()):  # faster than the extremes, and nearly always sufficient
        return True
    low, high = bounds(tensor)
    return bool(low.isfinite() & high.isfinite())


def is_recorded() -> bool:
    """Check whether a compiler or ``torch.jit`` records operations, to run them later on other numbers."""
    return torch.compiler.is_compiling() or tracing_state() is not None


def require_range(columns: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise a ``ValueError`` unless ``dtype`` can represent the range of each column of numbers ``(N, ...)``.

    A range below the smallest number of ``dtype`` would underflow to zero, so that the column would look constant.
    Numbers that are in ``dtype`` already, or in a coarser type, lose nothing. Variances are computed in float64, whose
    range is a limit too. Entries that are NaN are left out.

    >>> require_range(torch.tensor([[1e-60], [2e-60]], dtype=torch.float64), "y", torch.float32)
    Traceback (most recent call last):
    ValueError: y: expected columns whose range is within that of torch.float32, got one of 1e-60
    """
    low, high = _column_bounds(columns)
    span = high.double() - low.double()
    own, squared = torch.finfo(dtype), torch.finfo(torch.float64)
    narrowed = torch.finfo(columns.dtype).tiny < own.tiny
    least, most = max(narrowed * own.tiny, squared.tiny**0.5), min(own.max, squared.max**0.5)
    beyond = span[(span > 0) & (span < least) | (span > most)]
    if len(beyond):
        raise ValueError(f"{name}: expected columns whose range is within that of {dtype}, got one of {beyond[0]:.3g}")


def _column_bounds(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Find the least and greatest number of each column ``(N, ...)``, leaving out NaN."""
    low, high = columns.detach().aminmax(dim=0)
    if not bool(low.isnan().any()):  # nearly always, and then a single pass is enough
        return low, high
    missing = columns.isnan()
    return columns.masked_fill(missing, math.inf).amin(0), columns.masked_fill(missing, -math.inf).amax(0)


def unmasked(values: Any) -> Any:
    """Replace masked entries by NaN, because conversions drop masks; return values without a mask as they are.

    Masks are those of NumPy and of ``torch.masked``.

    >>> unmasked(np.ma.masked_equal([1, -999], -999)), unmasked([1, -999])
    (array([ 1., nan]), [1, -999])
    """
    if is_masked_tensor(values):
        floating: Any = values if values.is_floating_point() else values.double()
        return floating.to_tensor(math.nan)
    if isinstance(values, list | tuple) and any(isinstance(row, np.ma.MaskedArray) for row in values):
        values = np.ma.array(values)
    if not isinstance(values, np.ma.MaskedArray):
        return values
    if not np.ma.is_masked(values):
        return values.data
    if values.dtype.kind == "M":
        return values.filled(np.datetime64("NaT"))
    return np.ma.filled(values.astype(np.float64) if values.dtype.kind in "biu" else values, np.nan)


def is_traced(*tensors: Tensor) -> bool:
    """Check for compilers, ``torch.jit``, transforms of ``torch.func``, forward mode and subclasses of tensors.

    Under these, no branch may depend on values, and derivatives must come from differentiable operations. Subclasses of
    tensors count too: Pyro has one to track which sites a value depends on, torch one for tensors distributed over
    devices. Neither sees inside a ``torch.autograd.Function``, nor additions in place.

    >>> from pyro.ops.provenance import ProvenanceTensor
    >>> is_traced(torch.ones(1)), is_traced(torch.ones(1), ProvenanceTensor(torch.ones(1), frozenset("z")))
    (False, True)
    """
    return is_recorded() or is_transformed(*tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Check for transforms of ``torch.func``, forward mode and subclasses of tensors."""
    return (
        transforms_active()
        or getattr(forward_ad, FORWARD_LEVEL) >= 0  # inside ``dual_level``
        or is_subclassed(*tensors)
    )


def is_known(*tensors: Tensor) -> bool:
    """Check that a branch may depend on these values: nothing records operations, and ``torch.vmap`` maps none of them.

    Otherwise checks of values are skipped. Transforms that only differentiate do not hide values.

    >>> is_known(torch.ones(1)), torch.vmap(lambda row: row + is_known(row))(torch.zeros(1))
    (True, tensor([0.]))
    """
    return not is_recorded() and not is_mapped(*tensors)


def is_mapped(*tensors: Tensor) -> bool:
    """Check whether ``torch.vmap`` maps one of these tensors."""
    if not transforms_active():
        return False
    return any(is_batched(layer) for tensor in tensors for layer in _layers(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside all transforms of ``torch.func``, with the dimensions that are mapped.

    >>> torch.vmap(lambda row: row + unwrapped(row).ndim)(torch.zeros(1))
    tensor([1.])
    """
    *_, innermost = _layers(tensor)
    return innermost


def indices(tensor: Tensor) -> list[int]:
    """Convert integers ``(N,)`` to a list, also within transforms, where torch 2.8 refuses ``tolist``.

    >>> indices(torch.tensor([False, True, True]).nonzero().squeeze(-1))
    [1, 2]
    """
    return [int(index.item()) for index in tensor]


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor
    while is_wrapped(tensor):
        tensor = inner_tensor(tensor)
        yield tensor


def require_unmapped(name: str, *tensors: Tensor) -> None:
    """Raise a ``ValueError`` if ``torch.vmap`` maps one of these: the sizes of results depend on their values."""
    if is_mapped(*tensors):
        raise ValueError(f"{name}: expected numbers to look at, got those of torch.vmap: call it outside, on a batch")


def is_subclassed(*tensors: Tensor) -> bool:
    """Check whether one of these tensors is of a subclass, other than ``nn.Parameter``."""
    for tensor in tensors:  # called before every density, and a generator would take four times as long
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            return True
    return False


def is_differentiated(*tensors: Tensor) -> bool:
    """Check whether derivatives with respect to these may be needed: in backward or forward mode, or compiled."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if is_traced():
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Check that a call of this module computes what the class ``kind`` defines, and nothing else.

    Only then may a caller compute the operation in another way, from the tensors of the module. A subclass may compute
    something else (``PyroModule[kind]`` does not), and so may a module with hooks or with its own ``forward``.

    >>> layer = nn.Linear(2, 2)
    >>> is_plain(layer, nn.Linear), is_plain(layer, nn.Module)
    (True, False)
    >>> hook = layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    >>> is_plain(layer, nn.Linear)
    False
    """
    known = type(module) is kind or type(module) is PyroModule[kind]
    return known and "forward" not in module.__dict__ and not is_hooked(module)


def is_inherited(module: nn.Module, kind: type[nn.Module], *names: str) -> bool:
    """Check that a module inherits these methods from a class, neither overridden nor replaced."""
    return all(getattr(type(module), n) is getattr(kind, n) and n not in module.__dict__ for n in names)
