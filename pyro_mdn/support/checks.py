r"""Checks of settings and tensors, for errors that say what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Number, Real
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.masked import is_masked_tensor

from pyro_mdn.support.torch_compat import (
    forward_mode_active,
    inner_tensor,
    is_batched,
    is_hooked,
    is_wrapped,
    tracing_state,
    transforms_active,
)

__all__ = [
    "all_finite",
    "bounds",
    "describe",
    "is_count",
    "is_differentiated",
    "is_hooked",
    "is_inherited",
    "is_known",
    "is_mapped",
    "is_plain",
    "is_recorded",
    "is_subclassed",
    "is_traced",
    "is_transformed",
    "require_counts",
    "require_numbers",
    "require_range",
    "require_unmapped",
    "sample_shape_of",
    "shown",
    "unmasked",
    "unwrapped",
]

_FEW = 8  # so many entries of a list are shown


def describe(values: Any) -> str:
    """Say what a value is, by its type, dtype and shape, without printing what is in it.

    >>> describe(np.zeros((3, 2))), describe("text"), describe([1] * 20)
    ('ndarray float64 (3, 2)', 'str', 'list of 20')
    """
    kind, shape = type(values).__name__, getattr(values, "shape", None)
    if shape is not None and isinstance(shape, Sequence):
        dtype = getattr(values, "dtype", None)
        return " ".join([kind, *([] if dtype is None else [str(dtype)]), str(tuple(shape))])
    return f"{kind} of {len(values)}" if isinstance(values, list | tuple | dict | set) else kind


def shown(value: Any) -> str:
    """Show a setting in an error: numbers, text and dtypes as they are, all else by its type, dtype and shape.

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


def is_count(value: Any) -> bool:
    """Whether this is a positive integer, of Python or NumPy.

    >>> is_count(3), is_count(3.0), is_count(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def require_counts(**settings: Any) -> None:
    """Raise a ``ValueError`` unless each is a positive integer, or ``None``.

    >>> require_counts(size=0)
    Traceback (most recent call last):
    ValueError: size: expected a positive integer, got 0
    """
    for name, value in settings.items():
        if value is not None and not is_count(value):
            raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")


def require_numbers(*, least: float = math.ulp(0.0), **settings: Any) -> None:
    """Raise a ``ValueError`` unless each is finite and at least ``least``, or ``None``.

    >>> require_numbers(lr=0.0)
    Traceback (most recent call last):
    ValueError: lr: expected a finite number that is positive, got 0.0
    """
    for name, value in settings.items():
        if value is not None and (not isinstance(value, Real) or not least <= float(value) < math.inf):
            kind = "not negative" if least == 0 else "positive"
            raise ValueError(f"{name}: expected a finite number that is {kind}, got {shown(value)}")


def sample_shape_of(value: Any) -> tuple[int, ...]:
    """Shape of independent draws, of which a number is one dimension; a ``ValueError`` if it is none.

    >>> sample_shape_of(3), sample_shape_of([2, 3]), sample_shape_of(())
    ((3,), (2, 3), ())
    """
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(size, int | np.integer | torch.SymInt) and size >= 0 for size in sizes):
        raise ValueError(f"sample_shape: expected a number of draws, or a shape of them, got {shown(value)}")
    return sizes


def bounds(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest entry, both NaN if there is one, in a single pass; 1 and 1 of none."""
    if tensor.numel() == 0:
        return tensor.new_ones(()), tensor.new_ones(())
    low, high = torch.aminmax(tensor.detach())
    return low, high


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or NaN.

    >>> all_finite(torch.tensor([1.0, math.nan]))
    False
    """
    if math.isfinite(tensor.detach().sum().item()):  # the quicker question, which all but always answers it
        return True
    low, high = bounds(tensor)
    return bool(low.isfinite() & high.isfinite())


def is_recorded() -> bool:
    """Whether a compiler or ``torch.jit`` records operations, to run them on other numbers without this code."""
    return torch.compiler.is_compiling() or tracing_state() is not None


def require_range(columns: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise a ``ValueError`` unless ``dtype`` can hold how far apart the numbers of each column ``(N, ...)`` are.

    Below its range they would all become zero, and pass for a constant; numbers that come in ``dtype``, or a coarser
    one, lose nothing more by it. Variances are computed in float64, which sets limits of its own. Entries that are NaN
    are left out.

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
    """Least and greatest number of each column ``(N, ...)``, whatever else is NaN."""
    low, high = columns.detach().aminmax(dim=0)
    if not bool(low.isnan().any()):  # all but always, and in a single pass
        return low, high
    missing = columns.isnan()
    return columns.masked_fill(missing, math.inf).amin(0), columns.masked_fill(missing, -math.inf).amax(0)


def unmasked(values: Any) -> Any:
    """NaN in place of what a mask hides, and a conversion would bring to light; what has no mask comes as it is.

    Masks are those of NumPy, and of ``torch.masked``.

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
    """Whether a compiler, ``torch.jit``, a transform of ``torch.func`` or forward mode looks on.

    No branch may depend on numbers then, and derivatives are those of the operations. So it is with tensors of a class
    of their own: Pyro follows what a value depends on by one, torch has one for tensors that are spread over devices,
    and neither sees into a ``torch.autograd.Function``, nor what is added in place.

    >>> from pyro.ops.provenance import ProvenanceTensor
    >>> is_traced(torch.ones(1)), is_traced(torch.ones(1), ProvenanceTensor(torch.ones(1), frozenset("z")))
    (False, True)
    """
    return is_recorded() or is_transformed(*tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of ``torch.func``, forward mode, or a class of the tensors' own looks on."""
    return transforms_active() or forward_mode_active() or is_subclassed(*tensors)


def is_known(*tensors: Tensor) -> bool:
    """Whether a branch may depend on these numbers: nothing records operations, and ``torch.vmap`` maps none of them.

    Checks of values are left out otherwise. Transforms that only differentiate do not hide numbers.

    >>> is_known(torch.ones(1)), torch.vmap(lambda row: row + is_known(row))(torch.zeros(1))
    (True, tensor([0.]))
    """
    return not is_recorded() and not is_mapped(*tensors)


def is_mapped(*tensors: Tensor) -> bool:
    """Whether ``torch.vmap`` maps one of these."""
    if not transforms_active():
        return False
    return any(is_batched(layer) for tensor in tensors for layer in _layers(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """All the numbers that transforms of ``torch.func`` wrap, dimensions that are mapped included.

    >>> torch.vmap(lambda row: row + unwrapped(row).ndim)(torch.zeros(1))
    tensor([1.])
    """
    *_, innermost = _layers(tensor)
    return innermost


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor
    while is_wrapped(tensor):
        tensor = inner_tensor(tensor)
        yield tensor


def require_unmapped(name: str, *tensors: Tensor) -> None:
    """Raise a ``ValueError`` if ``torch.vmap`` maps one of these: the sizes of results depend on their numbers."""
    if is_mapped(*tensors):
        raise ValueError(f"{name}: expected numbers to look at, got those of torch.vmap: call it outside, on a batch")


def is_subclassed(*tensors: Tensor) -> bool:
    """Whether one of these has a class of its own."""
    for tensor in tensors:  # looked at before every density: a generator would take four times as long
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            return True
    return False


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether somebody may want derivatives with respect to these: in backward or forward mode, or compiled."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if is_traced():
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Check that a call of this module computes what the class ``kind`` defines, and nothing else.

    Only then may its operation be computed in another way, from its tensors. A subclass may compute something else
    (``PyroModule[kind]`` does not), and so does a module with a hook, or with a ``forward`` of its own.

    >>> layer = nn.Linear(2, 2)
    >>> is_plain(layer, nn.Linear), is_plain(layer, nn.Module)
    (True, False)
    >>> hook = layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    >>> is_plain(layer, nn.Linear)
    False
    """
    return type(module) in (kind, PyroModule[kind]) and "forward" not in module.__dict__ and not is_hooked(module)


def is_inherited(module: nn.Module, kind: type[nn.Module], *names: str) -> bool:
    """Whether a module has these methods from a class, neither overridden nor replaced."""
    return all(getattr(type(module), n) is getattr(kind, n) and n not in module.__dict__ for n in names)
