r"""Structural fingerprints of modules: types, attributes, hooks and code, apart from the weights, as text by name."""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_mdn.support.introspection import (
    WITHOUT_SETTINGS,
    attributes,
    cell_content,
    digest,
    is_cache,
    is_code,
    is_local,
    is_setting,
    leads_to,
    members,
    module_tensors,
    numbers,
    plain_class,
    used_globals,
)
from pyro_mdn.support.torch_compat import HOOKS, own_modules, transient_buffers

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

    The description has an entry for each submodule, with its type and the order of its parts, and for each attribute,
    tensor and hook. Objects count by their state, never by their ``repr``. A function or a class counts by its name. If
    the name may not lead to it again, because it is local or in ``__main__``, its code and closure count instead; of
    the global variables that this code reads, only functions and classes count. A tensor that is neither parameter nor
    buffer counts by its values.

    Not part of a fingerprint are weights, modes, devices, states of generators, and caches: cached properties, and
    attributes with ``cache`` in their name. Nor are buffers, such as a counter, nor attributes that users attached to a
    class which declares its ``_settings``.

    Args:
        hooks: Whether hooks count.
        buffers: Whether the values of buffers that are not persistent count.
        code: Whether the modules and the code of functions and classes count, or only their qualified names, which are
            the same in a program that defines a class and in another that imports it.
        values: Whether to write values of attributes in words. A file gets digests instead, because an attribute may be
            a secret. Numbers and names that torch and this library declare as settings are in words in either case.
        form: One of ``FORMS``: 0 for today's, or another for what an earlier version wrote for the same modules. An
            object whose state has changed between versions lists all its forms in ``_fingerprinted(state)``.
        modules: Modules by name. If one contains another, or shares a tensor with it, the text says so.

    >>> described(layer=nn.LeakyReLU(0.1))["layer.negative_slope"]
    '0.1'
    >>> differing(described(f=nn.GELU()), described(f=nn.GELU(approximate="tanh")))
    ['f.approximate']
    """
    places: dict[int, str] = {}
    for name, module in modules.items():
        for path, part in module.named_modules(prefix=name):
            places.setdefault(id(part), path)
            for leaf, tensor in module_tensors(part):
                places.setdefault(id(tensor), f"{path}.{leaf}")
    writer = _Writer(places, hooks, buffers, code, values, form)
    return {entry: text for name, module in modules.items() for entry, text in writer.entries(name, module)}


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """List the names of the entries that differ between two descriptions, sorted."""
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def incomparable(description: Mapping[str, str]) -> list[str]:
    """List the names of the entries with an object whose state cannot be read, such as a lock or an open file."""
    return sorted(name for name, text in description.items() if _OPAQUE in text)


_OPAQUE = "object that cannot be compared"
_LONGEST = 200
_DEEPEST = 50  # a limit of our own: how soon Python's stack overflows depends on the process


_WRAPPED = property | staticmethod | classmethod


_PACKAGE = __name__.partition(".")[0]
# Earlier versions wrote the modules in which these classes stood then.
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
    """Value of a global variable that code reads."""

    value: Any


class _Writer:
    """Writer that turns values into text. It remembers the objects it has seen, so that circular references end."""

    def __init__(
        self, places: Mapping[int, str], hooks: bool, buffers: bool, code: bool, values: bool, form: int
    ) -> None:
        self.places, self.buffers, self.code, self.values, self.form = places, buffers, code, values, form
        self.hooks = HOOKS if hooks else ()
        self.active: list[int] = []
        self.texts: dict[int, tuple[Any, str]] = {}  # the object is kept, so that no other one gets its id

    # Modules

    def entries(self, name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        """Write a module and its parts, as pairs of name and text."""
        if (place := self.places.get(id(module), name)) != name:
            yield name, f"the same as {place}"
            return
        yield name, f"{self.text(type(module))}({', '.join(own_modules(module))})"
        for leaf, tensor in module_tensors(module):
            yield f"{name}.{leaf}", self._registered(f"{name}.{leaf}", tensor, module, leaf)
        unnamed = getattr(module, "_unnamed_before", frozenset()) if self.form else ()
        for leaf, value in attributes(module):
            if leaf in unnamed:
                continue
            plain = type(value) in _PLAIN | _CONTAINERS and is_setting(type(module), leaf)
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
        """Write each member of classes that count by their code, so that a difference has a name."""
        for base in kind.__mro__:
            if is_local(base) and not base.__module__.startswith(_MADE_BY):
                for leaf, member in members(base):
                    yield f"{name}: {base.__name__}.{leaf}", _sealed(self.text(member))

    def _value(self, value: Any, *, in_words: bool) -> str:
        """Write an attribute, or that it cannot be compared if it is nested too deep."""
        try:
            text = self.text(value)
        except RecursionError:
            self.active.clear()
            text = _OPAQUE
        return _short(text) if in_words or is_code(value) else f"{type(value).__qualname__} {_sealed(text)}"

    def _registered(self, name: str, tensor: Tensor | None, module: nn.Module, leaf: str) -> str:
        if tensor is None:
            return "None"
        if (place := self.places.get(id(tensor), name)) != name:
            return f"the same as {place}"
        if isinstance(tensor, nn.Parameter) and id(tensor) in self.places:
            return "parameter"
        transient = leaf in transient_buffers(module) and self.buffers
        return numbers(tensor) if transient or id(tensor) not in self.places else "buffer"

    def _module(self, module: nn.Module) -> str:
        """Write a module that is an attribute but no registered part, so that nothing trains its weights."""
        return self._pairs(self.entries("", module))

    # Values

    def text(self, value: Any) -> str:
        """Write any value."""
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
        """Write an object by its type and its pickled state."""
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
        """Return the state of an object in the form that was asked for, if the object knows several."""
        if not isinstance(state, dict) or not hasattr(type(value), "_fingerprinted"):
            return state
        states = value._fingerprinted(state)
        return states[min(max(self.form - 1, 0), len(states) - 1)]

    def _state(self, kind: type, state: Any) -> str:
        if not isinstance(state, dict):
            return self.text(state)
        return self._pairs((str(name), self.text(v)) for name, v in state.items() if not is_cache(kind, str(name)))

    # Code

    def _type(self, kind: type) -> str:
        if (plain := plain_class(kind)) is not kind:  # which parameters are latent is an attribute
            return self.text(plain)
        if kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}":
            return f"Parametrized[{self.text(kind.__bases__[0])}]"  # by its parts; torch makes a class for each module
        if not self.code:
            return kind.__qualname__
        if not is_local(kind):
            return f"{self._home(kind)}.{kind.__qualname__}"
        code = self._pairs((name, self.text(member)) for name, member in members(kind))
        return f"{kind.__name__}{self._listed(kind.__bases__)} {_sealed(code)}"

    def _function(self, function: types.FunctionType) -> str:
        if not self.code:
            return function.__qualname__
        if leads_to(function):
            return f"{self._home(function)}.{function.__qualname__}"
        cells = [cell_content(cell) for cell in function.__closure__ or ()]
        used = [_Used(value) for value in used_globals(function)]
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells, used]
        return f"{function.__name__} {_sealed(self._listed(parts))}"

    def _home(self, value: Any) -> str:
        """Name the module of a class or function. Ours belong to the package, so that they may move within it."""
        module = value.__module__
        if module.split(".")[0] != _PACKAGE:
            return module
        return (
            f"{_PACKAGE}.{_FORMER_MODULES[value.__name__]}"
            if self.form and value.__name__ in _FORMER_MODULES
            else _PACKAGE
        )

    def _used(self, value: Any) -> str:
        """Write a function or class that code reads as a global variable; of a class, only its methods."""
        if not isinstance(value, type) or leads_to(value) or id(value) in self.active:
            return self.text(value)
        self.active.append(id(value))
        able = [(name, m) for name, m in members(value) if isinstance(m, types.FunctionType | _WRAPPED)]
        bases, code = map(_Used, value.__bases__), self._pairs((name, self.text(m)) for name, m in able)
        text = f"{value.__name__}{self._listed(bases)} {_sealed(code)}"
        self.active.pop()
        return text

    def _code(self, code: types.CodeType) -> str:
        parts = [code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_argcount, code.co_flags]
        return self._listed(parts)

    def _array(self, value: np.ndarray | np.generic) -> str:
        if value.dtype.hasobject:
            return self._listed([value.tolist()])
        return f"{value.dtype} {value.shape} {digest(np.ascontiguousarray(value).tobytes())}"

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
_WRITERS: list[tuple[Any, Callable[[_Writer, Any], str]]] = [
    (WITHOUT_SETTINGS, lambda writer, value: writer.text(type(value))),
    (nn.Module, _Writer._module),
    (Tensor, lambda _, value: numbers(value)),
    (np.ndarray | np.generic, _Writer._array),
    (type, _Writer._type),
    (types.FunctionType, _Writer._function),
    (types.MethodType | types.BuiltinFunctionType, _Writer._method),
    (types.CodeType, _Writer._code),
    (_WRAPPED, _Writer._wrapped),
    (types.ModuleType, lambda _, value: value.__name__),
]
_MADE_BY = ("pyro.nn.", parametrize.__name__)  # classes that these make of others


def _sealed(text: str) -> str:
    """Compute the digest of a text; the result still says whether there is an object that cannot be compared."""
    return f"{digest(text.encode())}{f' with an {_OPAQUE}' if _OPAQUE in text else ''}"


def _short(text: str) -> str:
    """Shorten a long text to its beginning and a digest of the whole."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… {_sealed(text)}"
