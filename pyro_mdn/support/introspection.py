r"""Parts that decide what a module computes: which attributes, which code of classes and functions, which numbers."""

from __future__ import annotations

import dis
import hashlib
import inspect
import random
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pyro_mdn.support.pyro_compat import LEARNED_OR_DRAWN, MARK
from pyro_mdn.support.torch_compat import OF_COMPILERS, is_compiler_wrapper, is_flat_weight, own_buffers, own_parameters

__all__ = [
    "WITHOUT_SETTINGS",
    "attributes",
    "cell_content",
    "digest",
    "is_cache",
    "is_code",
    "is_local",
    "is_setting",
    "leads_to",
    "members",
    "module_tensors",
    "numbers",
    "plain_class",
    "used_globals",
]

WITHOUT_SETTINGS = (  # their state changes by use, or says where something is
    RemovableHandle,
    Trace,
    np.random.BitGenerator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
    torch.Generator,
    torch.device,
    weakref.ReferenceType,
)
_ON_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made
_OF_CLASSES = {*vars(type("", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}
_OF_CLASSES |= {"__dataclass_fields__", "__dataclass_params__"}  # what they say is in the methods that they make
_OF_CLASSES |= {"__slotnames__"}  # a cache of whoever copies or pickles an object
_OF_MODULES = {*vars(PyroModule()), *OF_COMPILERS} - LEARNED_OR_DRAWN
_OF_GUIDES = {"create_plates", "init_loc_fn", "master", "plates", "prototype_trace"}


def module_tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """List the parameters and buffers of a module itself. Latent weights are not read, which would draw them."""
    return [*own_parameters(module).items(), *own_buffers(module).items()]


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the attributes of a module that decide what it computes."""
    kind = type(module)
    if is_compiler_wrapper(kind):
        return
    for name, value in vars(module).items():
        of_torch = name in _OF_MODULES or is_flat_weight(module, name)
        of_pyro = name in LEARNED_OR_DRAWN and not value
        of_guide = isinstance(module, AutoGuide) and (name in _OF_GUIDES or name.startswith("_"))
        derived = isinstance(value, Tensor) and _is_derived(module, name, value)
        if not (_is_attached(kind, name) or of_torch or of_pyro or of_guide or derived or is_cache(kind, name)):
            yield name, value


def plain_class(kind: type) -> type:
    """Return the class that ``PyroModule[...]`` derived another from, or the class itself."""
    is_made = issubclass(kind, PyroModule) and kind is not PyroModule and kind is PyroModule[kind.__bases__[0]]
    return kind.__bases__[0] if is_made else kind


def is_setting(kind: type, name: str) -> bool:
    """Whether a class of torch or of this library declares an attribute as one of its settings."""
    constants = [
        vars(base).get("__constants__", ()) for base in kind.__mro__ if base.__module__.startswith("torch.nn.")
    ]
    return name in vars(plain_class(kind)).get("_settings", ()) or any(name in names for names in constants)


def _is_attached(kind: type, name: str) -> bool:
    """Whether a user attached an attribute to a module whose class reads only its declared settings."""
    read = is_setting(kind, name) or name.startswith(MARK) or hasattr(kind, name)  # a method that was replaced
    return "_settings" in vars(plain_class(kind)) and not read


def _is_derived(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a tensor was computed from parameters, as older weight norm, spectral norm and pruning do."""
    return tensor.grad_fn is not None or not own_parameters(module).keys().isdisjoint({f"{name}_orig", f"{name}_g"})


def is_cache(kind: type, name: str) -> bool:
    """Whether an attribute is a cache, which can be computed again: a cached property, or ``cache`` in its name."""
    if "cache" in name.lower() or name == "_validate_args":
        return True
    attribute = inspect.getattr_static(kind, name, None)
    is_code = isinstance(attribute, types.FunctionType | types.MethodDescriptorType | staticmethod | classmethod | type)
    return hasattr(attribute, "__get__") and not hasattr(attribute, "__set__") and not is_code


def leads_to(value: Any) -> bool:
    """Whether module and qualified name lead to this very class or function, also in another process."""
    found: Any = None if value.__module__ == "__main__" else sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _global_names(code: types.CodeType) -> list[str]:
    """List the names of the global variables that code reads, sorted."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _global_names(const)]
    return sorted({*inner, *(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")})


def is_local(kind: type) -> bool:
    """Whether Python code made a class that its name does not lead to for certain, so that its code has to count."""
    return bool(kind.__flags__ & _ON_HEAP) and not leads_to(kind)


def used_globals(function: types.FunctionType) -> list[Any]:
    """List functions and classes among the global variables that a function reads.

    Other global variables belong to the program, such as its arguments or its data; a module keeps the values that it
    needs of these in attributes.
    """
    found = [function.__globals__.get(name) for name in _global_names(function.__code__)]
    return [value for value in found if is_code(value)]


def is_code(value: Any) -> bool:
    """Whether a value is a function or a class, but no bound method."""
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    unbound = owner is None or isinstance(owner, types.ModuleType | type)
    return isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and unbound


def members(kind: type) -> list[tuple[str, Any]]:
    """List the members that a class itself defines."""
    return [(k, v) for k, v in vars(kind).items() if k not in _OF_CLASSES and not k.startswith("_abc_")]


def cell_content(cell: types.CellType) -> Any:
    """Return the value that a function closes over; ``None`` for an empty cell."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def numbers(tensor: Tensor) -> str:
    """Write dtype, shape and digest of the entries of a tensor on any device."""
    if is_lazy(tensor) or tensor.is_meta:
        return f"{tensor.dtype} without values"
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest(flat.view(torch.uint8).numpy().tobytes())}"


def digest(content: bytes) -> str:
    """Compute the first 16 digits of a SHA-256 checksum."""
    return hashlib.sha256(content).hexdigest()[:16]
