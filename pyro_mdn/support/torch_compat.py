r"""The names of torch that are private, or public but undocumented, each with what it gives: nobody else uses any.

A new release of torch may change them without notice. ``tests/test_private_names.py`` has a test of what each means;
all pass with torch 2.8, the lowest that is allowed, and with 2.13. Functions of torch are taken as they are, not
wrapped, so that compilers know them and no call costs more.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.distributions import Distribution
from torch.nn.modules import module as _module
from torch.nn.utils import prune
from torch.optim import adam as _adam
from torch.utils import _python_dispatch, _pytree

__all__ = [
    "FORWARD_LEVEL",
    "HOOKS",
    "OF_COMPILERS",
    "REGISTERED",
    "TorchDispatchMode",
    "adam",
    "assert_async",
    "cached",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_norm",
    "functional_assert_async",
    "inner_tensor",
    "is_batched",
    "is_compiler_wrapper",
    "is_flat_weight",
    "is_hooked",
    "is_legacy_batched",
    "is_wrapped",
    "log_softmax_gradient",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "pre_hooks",
    "pruned_name",
    "reset_of",
    "storage_id",
    "tracing_state",
    "transforms_active",
    "transient_buffers",
    "tree_leaves",
    "validates_by_default",
    "version_of",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Transforms, traces and modes

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of ``torch.func`` runs. There is no public question."""

is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
"""Whether this is a tensor of which ``torch.vmap`` maps a dimension. ``torch.func`` does not say."""

is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a transform of ``torch.func`` has wrapped this tensor. ``torch.func`` does not say."""

inner_tensor: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
"""Give what the outermost transform wraps, dimensions that are mapped included."""

is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
"""Whether ``torch.autograd.grad(is_grads_batched=True)`` maps this tensor, by the older kind of vmap.

That kind is not a transform of ``torch.func``, and there is no public question for it.
"""

tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""What ``torch.jit`` records into, or ``None``; ``torch.jit.is_tracing``, which is deprecated, asks for it too."""

FORWARD_LEVEL = "_current_level"
"""Attribute of ``torch.autograd.forward_ad`` that is negative outside of ``dual_level``.

The public functions enter and leave a level, but do not say whether there is one. Densities ask by ``getattr``, which
costs them no call.
"""

version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""Count how often a tensor was written to, as autograd does. Documented only in notes on autograd."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""See each operation with the tensors that it makes. Documented only in notes for extensions."""

tree_leaves = _pytree.tree_leaves
"""All values within nested containers, as a ``TorchDispatchMode`` is given them. Nothing public lists them."""

# Operations

assert_async: Any = torch.ops.aten._assert_async.msg
"""Raise a ``RuntimeError`` with a message where a tensor is false, when compiled code runs.

``torch._assert_async``, which is no more public, is not taken into a graph with its message.
"""

functional_assert_async: Any = torch.ops.aten._functional_assert_async.msg
"""The same, which returns its last argument: a trace of ``torch.jit`` keeps what a result depends on."""

log_softmax_gradient: Any = torch._log_softmax_backward_data
"""Gradient ``(grad, log_softmax, dim, dtype)`` of ``log_softmax``, in one pass over memory.

In public operations it takes three passes.
"""

foreach_mul_: Any = torch._foreach_mul_
"""Multiply each of many tensors in place, in one call. Documented, underscore and all."""

foreach_norm: Any = torch._foreach_norm
"""Norm of each of many tensors, in one call. Documented, underscore and all."""

foreach_lerp_: Any = torch._foreach_lerp_
"""Interpolate many tensors in place, in one call. Documented, underscore and all."""

adam = _adam.adam
"""One step of Adam for many tensors and their moments, in place.

``torch.optim.Adam`` computes the same after work that takes longer than a step of a small network.
"""


def storage_id(tensor: Tensor) -> int:
    """Number that tensors share if and only if they share their memory.

    ``untyped_storage().data_ptr()`` is 0 for all tensors without numbers, as on a meta device.
    """
    return tensor.untyped_storage()._cdata


# Modules

REGISTERED = ("_modules", "_parameters", "_buffers")
"""Attributes in which a module keeps its parts and tensors."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes in which a module keeps its hooks, in the order of their call; public access only adds."""

OF_COMPILERS = frozenset(("_compiled_call_impl", "_is_torch_compile"))
"""Attributes that ``nn.Module.compile`` leaves at a module. They do not change what it computes."""


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Parts of a module itself by name, in the order of their call in a ``Sequential``.

    ``named_children`` leaves out empty ones and those that occur again, and takes longer.
    """
    return module._modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Parameters of a module itself by name, in a dictionary that may be changed.

    ``named_parameters`` leaves out empty ones; an attribute, of a module of Pyro, may be a draw, and takes longer.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Buffers of a module itself by name, in a dictionary that may be changed; public access is as for parameters."""
    return module._buffers


def transient_buffers(module: nn.Module) -> Set[str]:
    """Names of the buffers that are no part of a ``state_dict``; nothing public tells them."""
    return module._non_persistent_buffers_set


def pre_hooks(module: nn.Module) -> list[Any]:
    """Hooks that run before the ``forward`` of a module: pruning and old norms of weights are such."""
    return [*module._forward_pre_hooks.values()]


def pruned_name(hook: prune.BasePruningMethod) -> str:
    """Name of the parameter that a hook prunes: what ``torch.nn.utils.prune.remove`` is given."""
    return hook._tensor_name


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module runs hooks, its own or those of all modules; torch itself asks so.

    >>> layer = nn.Linear(1, 1)
    >>> hook = layer.register_forward_hook(lambda *_: None)
    >>> is_hooked(layer), is_hooked(nn.Linear(1, 1))
    (True, False)
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_flat_weight(module: nn.Module, name: str) -> bool:
    """Whether an attribute is one of those in which a recurrent layer lists its own parameters again."""
    return isinstance(module, nn.RNNBase) and name.startswith("_flat_weight")


def is_compiler_wrapper(kind: type) -> bool:
    """Whether this class wraps a module that ``torch.compile`` has compiled."""
    return kind.__module__.startswith("torch._dynamo")


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """Function that draws the weights of a module anew, or ``None``.

    That of ``nn.MultiheadAttention`` and ``nn.Transformer`` is private, unlike ``reset_parameters`` of all others.
    """
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def cached(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function keep its results, which compiled code computes anew: a compiler warns of caches that it passes by.

    >>> cached(int)("7")
    7
    """
    keeping: Callable[Arguments, Result] = lru_cache(function)  # pyright: ignore[reportAssignmentType]

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else keeping(*args, **kwargs)

    return call


# Distributions


def validates_by_default() -> bool:
    """Whether distributions check their arguments unless told otherwise. Public access only sets it."""
    return Distribution._validate_args
