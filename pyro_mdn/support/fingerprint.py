r"""Fingerprints of modules: what they compute, apart from their weights, as text by name."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import inspect
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from pyro_mdn.support.pyro_compat import LEARNED_OR_DRAWN, MARK
from pyro_mdn.support.torch_compat import (
    HOOKS,
    OF_COMPILERS,
    is_compiler_wrapper,
    is_flat_weight,
    own_buffers,
    own_modules,
    own_parameters,
    transient_buffers,
)

__all__ = ["FORMS", "described", "differing", "incomparable"]

FORMS = range(5)  # today's form of a description, and those of earlier versions


def described(
    *,
    hooks: bool = True,
    buffers: bool = True,
    code: bool = True,
    values: bool = True,
    form: int = 0,
    **modules: nn.Module,
) -> dict[str, str]:
    """Describe what modules compute, apart from their weights, in words that are the same in every process.

    There is an entry for each submodule, with its type and the order of its parts, and for each attribute, tensor and
    hook. A function or a class counts by its name, or by its code and what it closes over where the name does not lead
    to it for certain: in ``__main__``, or where it is local. Of the global variables that code reads, functions and
    classes count, and no other values. A tensor that is neither parameter nor buffer counts by
    its values. Left out are weights, modes, devices, states of generators, and caches: cached properties, and
    attributes with ``cache`` in their name. Of a class that declares its ``_settings``, what was attached besides is
    left out too. A counter, or another state, does not count where it is a buffer.

    Args:
        hooks: Whether hooks count.
        buffers: Whether the values of buffers that are not persistent count.
        code: Whether modules and code of functions and classes count, or their qualified names alone. These are the
            same for a program that defines a class and another that imports it.
        values: Whether the values of attributes are written as they are, or as digests, for a file: an attribute may
            be a secret. Numbers and names that torch and this library declare as settings of their modules are
            written in either case.
        form: One of ``FORMS``: 0, or another for what earlier versions wrote into files for the same modules. An object
            whose state was another then tells all of these in ``_fingerprinted(state)``, today's first.
        modules: Modules by name. Where one contains another, or shares a tensor with it, the text says so.

    >>> described(layer=nn.LeakyReLU(0.1))["layer.negative_slope"]
    '0.1'
    >>> differing(described(f=nn.GELU()), described(f=nn.GELU(approximate="tanh")))
    ['f.approximate']
    """
    places: dict[int, str] = {}
    for name, module in modules.items():
        for path, part in module.named_modules(prefix=name):
            places.setdefault(id(part), path)
            for leaf, tensor in _tensors(part):
                places.setdefault(id(tensor), f"{path}.{leaf}")
    writer = _Writer(places, hooks, buffers, code, values, form)
    return {entry: text for name, module in modules.items() for entry, text in writer.entries(name, module)}


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Sorted names of the entries that are not the same in two descriptions."""
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def incomparable(description: Mapping[str, str]) -> list[str]:
    """Sorted names of the entries with an object whose settings cannot be read, such as a lock or an open file."""
    return sorted(name for name, text in description.items() if _OPAQUE in text)


_OPAQUE = "object that cannot be compared"
_LONGEST = 200
_DEEPEST = 50  # the same in every process, while the stack of Python may be used up sooner or later


_WRAPPED = property | staticmethod | classmethod


_PACKAGE = __name__.partition(".")[0]
# Earlier versions wrote the module, too.
_FORMER_MODULES = {
    name: module
    for module, names in {
        "ensemble": "DeepEnsemble _Raw",
        "guides": "LaplaceGuide",
        "head": "MixtureHead",
        "latent": "_OfEachEntry _OfModule fan_in_normal",
        "network": "FirstLinear MixtureDensityNetwork",
        "network_model": "NetworkModel",
        "noise": "Diagonal Fixed Full Isotropic LowRank",
        "objectives": "ContinuousRankedProbability Memberwise NegativeElbo NegativeLogLikelihood WeightedSum",
    }.items()
    for name in names.split()
}


class _Used(NamedTuple):
    """What code finds among the global variables."""

    value: Any


class _Writer:
    """Turns values into text. It keeps what it has seen, so that shared and circular references come to an end."""

    def __init__(
        self, places: Mapping[int, str], hooks: bool, buffers: bool, code: bool, values: bool, form: int
    ) -> None:
        self.places, self.buffers, self.code, self.values, self.form = places, buffers, code, values, form
        self.hooks = HOOKS if hooks else ()
        self.active: list[int] = []
        self.texts: dict[int, tuple[Any, str]] = {}  # with the object, so that no other gets its id

    # Modules

    def entries(self, name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        """Names and texts for a module and its parts."""
        if (place := self.places.get(id(module), name)) != name:
            yield name, f"the same as {place}"
            return
        yield name, f"{self.text(type(module))}({', '.join(own_modules(module))})"
        for leaf, tensor in _tensors(module):
            yield f"{name}.{leaf}", self._registered(f"{name}.{leaf}", tensor, module, leaf)
        for leaf, value in _attributes(module):
            plain = type(value) in _PLAIN | _CONTAINERS and _is_setting(type(module), leaf)
            yield f"{name}.{leaf}", self._value(value, in_words=self.values or plain)
        if self.code:
            yield from self._definitions(name, type(module))
        for kind in self.hooks:
            if hooks := module.__dict__.get(kind):
                texts = [self._value(hook, in_words=self.values) for hook in hooks.values()]
                yield f"{name}.{kind}", _short(f"[{', '.join(texts)}]")
        for leaf, part in own_modules(module).items():
            yield from [(f"{name}.{leaf}", "None")] if part is None else self.entries(f"{name}.{leaf}", part)

    def _definitions(self, name: str, kind: type) -> Iterator[tuple[str, str]]:
        """Each member of classes that count by their code, so that the one that differs has a name."""
        for base in kind.__mro__:
            if not _leads_to(base) and base.__flags__ & _ON_HEAP and not base.__module__.startswith(_MADE_BY):
                for leaf, member in _members(base):
                    yield f"{name}: {base.__name__}.{leaf}", _sealed(self.text(member))

    def _value(self, value: Any, *, in_words: bool) -> str:
        """An attribute; in place of one that is nested too deep, that it cannot be compared."""
        try:
            text = self.text(value)
        except RecursionError:
            self.active.clear()
            text = _OPAQUE
        return _short(text) if in_words or _is_code(value) else f"{type(value).__qualname__} {_sealed(text)}"

    def _registered(self, name: str, tensor: Tensor | None, module: nn.Module, leaf: str) -> str:
        if tensor is None:
            return "None"
        if (place := self.places.get(id(tensor), name)) != name:
            return f"the same as {place}"
        if isinstance(tensor, nn.Parameter) and id(tensor) in self.places:
            return "parameter"
        transient = leaf in transient_buffers(module) and self.buffers
        return _numbers(tensor) if transient or id(tensor) not in self.places else "buffer"

    def _module(self, module: nn.Module) -> str:
        """A module that is no registered part, and whose weights therefore are not trained either."""
        return self._pairs(self.entries("", module))

    # Values

    def text(self, value: Any) -> str:
        """Text for any value."""
        if isinstance(value, _Used):
            return self._used(value.value)
        if type(value) in _PLAIN:
            return repr(value)
        if (place := self.places.get(id(value))) is not None:
            return f"the same as {place}"
        if id(value) in self.active:
            return f"what is {len(self.active) - self.active.index(id(value))} above"
        if len(self.active) == _DEEPEST:
            return _OPAQUE
        if id(value) not in self.texts:
            self.active.append(id(value))
            write = next((write for kind, write in _WRITERS if isinstance(value, kind)), _Writer._object)
            self.texts[id(value)] = value, write(self, value)
            self.active.pop()
        return self.texts[id(value)][1]

    def _listed(self, values: Iterable[Any]) -> str:
        return f"[{', '.join(self.text(value) for value in values)}]"

    def _pairs(self, pairs: Iterable[tuple[str, str]]) -> str:
        return f"({', '.join(f'{name}={text}' for name, text in pairs)})"

    def _container(self, value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.text(k)}: {self.text(v)}' for k, v in value.items())}}}"
        if isinstance(value, set | frozenset):
            return f"set{sorted(self.text(v) for v in value)}"
        return f"{type(value).__name__}{self._listed(value)}"

    def _object(self, value: Any) -> str:
        """An object by its type and what a copy of it would be made from."""
        if type(value) in _CONTAINERS:
            return self._container(value)
        name = self.text(type(value))
        try:
            copy = copyreg.dispatch_table.get(type(value))
            reduced: Any = value.__reduce_ex__(4) if copy is None else copy(value)
        except Exception:  # whatever the object's own code raises
            return f"{name}: {_OPAQUE}"
        if isinstance(reduced, str):
            return f"{name} {reduced}"
        make, args, state, items, pairs = [*reduced, None, None, None][:5]
        usual = getattr(make, "__name__", None) == "__newobj__" and args == (type(value),)
        states = state if isinstance(state, tuple) else (state,)
        parts = [] if usual else [self._listed([make, *args])]
        parts += [self._state(type(value), self._formed(value, part)) for part in states if part is not None]
        parts += [self._listed(items or ()), self._listed(map(list, pairs or ()))] if items or pairs else []
        return f"{name}{''.join(parts)}"

    def _formed(self, value: Any, state: Any) -> Any:
        """State of an object in the form that is asked for, where the object knows others."""
        if not isinstance(state, dict) or not hasattr(type(value), "_fingerprinted"):
            return state
        states = value._fingerprinted(state)
        return states[min(max(self.form - 1, 0), len(states) - 1)]

    def _state(self, kind: type, state: Any) -> str:
        if not isinstance(state, dict):
            return self.text(state)
        return self._pairs((str(name), self.text(v)) for name, v in state.items() if not _is_cache(kind, str(name)))

    # Code

    def _type(self, kind: type) -> str:
        if (plain := _plain_class(kind)) is not kind:  # which parameters are latent is an attribute
            return self.text(plain)
        if kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}":
            return f"Parametrized[{self.text(kind.__bases__[0])}]"  # by its parts; torch makes a class for each module
        if not self.code:
            return kind.__qualname__
        if _leads_to(kind) or not kind.__flags__ & _ON_HEAP:
            return f"{self._home(kind)}.{kind.__qualname__}"
        code = self._pairs((name, self.text(member)) for name, member in _members(kind))
        return f"{kind.__name__}{self._listed(kind.__bases__)} {_sealed(code)}"

    def _function(self, function: types.FunctionType) -> str:
        if not self.code:
            return function.__qualname__
        if _leads_to(function):
            return f"{self._home(function)}.{function.__qualname__}"
        cells = [_content(cell) for cell in function.__closure__ or ()]
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells, _used(function)]
        return f"{function.__name__} {_sealed(self._listed(parts))}"

    def _home(self, value: Any) -> str:
        """Module of a class or function; what is ours belongs to the package, whichever of its modules it stands in."""
        module = value.__module__
        if module.split(".")[0] != _PACKAGE:
            return module
        return (
            f"{_PACKAGE}.{_FORMER_MODULES[value.__name__]}"
            if self.form and value.__name__ in _FORMER_MODULES
            else _PACKAGE
        )

    def _used(self, value: Any) -> str:
        """A function or class that code finds among the global variables: of a class, only what it can do."""
        if not isinstance(value, type) or _leads_to(value) or id(value) in self.active:
            return self.text(value)
        self.active.append(id(value))
        members = [(name, m) for name, m in _members(value) if isinstance(m, types.FunctionType | _WRAPPED)]
        bases, code = map(_Used, value.__bases__), self._pairs((name, self.text(m)) for name, m in members)
        text = f"{value.__name__}{self._listed(bases)} {_sealed(code)}"
        self.active.pop()
        return text

    def _code(self, code: types.CodeType) -> str:
        parts = [code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_argcount, code.co_flags]
        return self._listed(parts)

    def _method(self, method: Any) -> str:
        owner = method.__self__
        module = getattr(method, "__module__", None)
        of = owner.__name__ if isinstance(owner, types.ModuleType) else module if owner is None else self.text(owner)
        return f"{of}.{method.__name__}"

    def _wrapped(self, value: Any) -> str:
        return self._listed([value.fget, value.fset] if isinstance(value, property) else [value.__func__])


_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), torch.dtype, torch.Size)
)
_CONTAINERS = frozenset((dict, list, tuple, set, frozenset))
_WITHOUT_SETTINGS = (  # their state changes by use, or says where something is
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
_WRITERS: list[tuple[Any, Callable[[_Writer, Any], str]]] = [
    (_WITHOUT_SETTINGS, lambda writer, value: writer.text(type(value))),
    (nn.Module, _Writer._module),
    (Tensor, lambda _, value: _numbers(value)),
    (
        np.ndarray | np.generic,
        lambda writer, value: (
            writer._listed([value.tolist()])
            if value.dtype.hasobject
            else f"{value.dtype} {value.shape} {_digest(np.ascontiguousarray(value).tobytes())}"
        ),
    ),
    (type, _Writer._type),
    (types.FunctionType, _Writer._function),
    (types.MethodType | types.BuiltinFunctionType, _Writer._method),
    (types.CodeType, _Writer._code),
    (_WRAPPED, _Writer._wrapped),
    (types.ModuleType, lambda _, value: value.__name__),
]
_MADE_BY = ("pyro.nn.", parametrize.__name__)  # classes that these make of others
_ON_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made
_OF_CLASSES = {*vars(type("", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"}
_OF_MODULES = {*vars(PyroModule()), *OF_COMPILERS} - LEARNED_OR_DRAWN
_OF_GUIDES = {"create_plates", "init_loc_fn", "master", "plates", "prototype_trace"}


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Parameters and buffers of a module itself, without a look at latent ones, which would be draws."""
    return [*own_parameters(module).items(), *own_buffers(module).items()]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module that decide what it computes."""
    kind = type(module)
    if is_compiler_wrapper(kind):
        return
    for name, value in vars(module).items():
        of_torch = name in _OF_MODULES or is_flat_weight(module, name)
        of_pyro = name in LEARNED_OR_DRAWN and not value
        of_guide = isinstance(module, AutoGuide) and (name in _OF_GUIDES or name.startswith("_"))
        derived = isinstance(value, Tensor) and _is_derived(module, name, value)
        if not (_is_attached(kind, name) or of_torch or of_pyro or of_guide or derived or _is_cache(kind, name)):
            yield name, value


def _plain_class(kind: type) -> type:
    """The class that ``PyroModule[...]`` made another of, or the class itself."""
    is_made = issubclass(kind, PyroModule) and kind is not PyroModule and kind is PyroModule[kind.__bases__[0]]
    return kind.__bases__[0] if is_made else kind


def _is_setting(kind: type, name: str) -> bool:
    """Whether the class itself, of torch or of this library, declares an attribute as one of its settings."""
    constants = [
        vars(base).get("__constants__", ()) for base in kind.__mro__ if base.__module__.startswith("torch.nn.")
    ]
    return name in vars(_plain_class(kind)).get("_settings", ()) or any(name in names for names in constants)


def _is_attached(kind: type, name: str) -> bool:
    """Whether a user attached something to a module of a class that reads its own settings alone."""
    read = _is_setting(kind, name) or name.startswith(MARK) or hasattr(kind, name)  # a method that was replaced
    return "_settings" in vars(_plain_class(kind)) and not read


def _is_derived(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a tensor was computed from parameters: old-style weight norm, spectral norm and pruning keep such."""
    return tensor.grad_fn is not None or not own_parameters(module).keys().isdisjoint({f"{name}_orig", f"{name}_g"})


def _is_cache(kind: type, name: str) -> bool:
    """Whether an attribute can be computed again: a cached property of any sort, or one that is called a cache."""
    if "cache" in name.lower() or name == "_validate_args":
        return True
    attribute = inspect.getattr_static(kind, name, None)
    is_code = isinstance(attribute, types.FunctionType | types.MethodDescriptorType | staticmethod | classmethod | type)
    return hasattr(attribute, "__get__") and not hasattr(attribute, "__set__") and not is_code


def _leads_to(value: Any) -> bool:
    """Whether module and qualified name lead to this very class or function; in a notebook they may not tomorrow."""
    found: Any = None if value.__module__ == "__main__" else sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _globals(code: types.CodeType) -> list[str]:
    """Names of the global variables that code reads, sorted."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _globals(const)]
    return sorted({*inner, *(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")})


def _used(function: types.FunctionType) -> list[_Used]:
    """Functions and classes among the global variables that a function reads.

    Other values belong to the program, such as its arguments or its data; what a module takes of them is in its
    attributes.
    """
    found = [function.__globals__.get(name) for name in _globals(function.__code__)]
    return [_Used(value) for value in found if _is_code(value)]


def _is_code(value: Any) -> bool:
    """Whether a value is a function or a class, and no method of an object."""
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    unbound = owner is None or isinstance(owner, types.ModuleType | type)
    return isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and unbound


def _members(kind: type) -> list[tuple[str, Any]]:
    """What a class itself defines."""
    return [(k, v) for k, v in vars(kind).items() if k not in _OF_CLASSES and not k.startswith("_abc_")]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _numbers(tensor: Tensor) -> str:
    """Dtype, shape and digest of the entries, wherever these are."""
    if is_lazy(tensor) or tensor.is_meta:
        return f"{tensor.dtype} without values"
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{tensor.dtype} {tuple(tensor.shape)} {_digest(flat.view(torch.uint8).numpy().tobytes())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sealed(text: str) -> str:
    """Digest of a text, in which objects that cannot be compared are still named."""
    return f"{_digest(text.encode())}{f' with an {_OPAQUE}' if _OPAQUE in text else ''}"


def _short(text: str) -> str:
    """The text, or its beginning and a digest of the whole."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… {_sealed(text)}"
