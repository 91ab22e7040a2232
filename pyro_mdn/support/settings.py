r"""Groups of settings: frozen dataclasses whose fields functions take as keywords, one by one or as a whole."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy as np

from pyro_mdn.support.checks import shown
from pyro_mdn.support.registry import snake_case

__all__ = ["Group", "collected", "given_settings", "groups_of", "keyword_of", "names_of", "takes"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Group")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Base of all groups of settings.

    A subclass checks its own fields in ``__post_init__`` and then calls ``super().__post_init__()``, so that a class of
    several groups makes the checks of all of them.
    """

    def __post_init__(self) -> None:
        for name in names_of(*groups_of(type(self))):
            object.__setattr__(self, name, _plain(getattr(self, name)))


def groups_of(kind: type) -> list[type[Group]]:
    """List the groups that a class of settings consists of.

    >>> class Size(Group): ...
    >>> class Colour(Group): ...
    >>> class Picture(Colour, Size): ...
    >>> groups_of(Picture) == [Size, Colour]
    True
    """
    return [base for base in reversed(kind.__mro__) if Group in base.__bases__]


def names_of(*kinds: type) -> list[str]:
    """List the names of all fields of some classes of settings."""
    return [f.name for kind in kinds for f in dataclasses.fields(kind)]


def keyword_of(group: type[Group]) -> str:
    """Give the keyword by which a function takes a whole group.

    >>> class EarlyStopping(Group): ...
    >>> keyword_of(EarlyStopping)
    'early_stopping'
    """
    return snake_case(group.__name__)


def _plain(value: Any) -> Any:
    """Convert numbers of other libraries to those of Python, which files can hold."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def collected(kind: type[S], function: str, given: Mapping[str, Any]) -> S:
    """Collect settings from keywords, which may be single fields and whole groups.

    Args:
        kind: Class of the settings.
        function: What took the keywords, for errors.
        given: The keywords.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If a value is not usable, or if a field is given by itself and in its group.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Size(Group):
    ...     width: int = 1
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Picture(Size):
    ...     title: str = ""
    >>> collected(Picture, "draw", {"title": "x", "size": Size(width=3)}) == Picture(title="x", width=3)
    True
    >>> collected(Picture, "draw", {"size": Size(width=3), "width": 4})
    Traceback (most recent call last):
    ValueError: size, width: expected width in one of the two, got it in both
    """
    whole = {group: given.get(keyword_of(group)) for group in groups_of(kind)}
    own = {name: value for name, value in given.items() if name not in map(keyword_of, whole)}
    if unknown := [name for name in own if name not in names_of(kind)]:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    for group, settings in whole.items():
        if settings is not None:
            own |= _fields(group, settings, own)
    return kind(**own)


def _fields(group: type[Group], settings: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a group that was given as a whole, none of which may have been given by itself."""
    keyword = keyword_of(group)
    if not isinstance(settings, group):
        raise ValueError(f"{keyword}: expected {group.__name__}(...), got {shown(settings)}")
    if twice := [name for name in names_of(group) if name in own]:
        raise ValueError(f"{keyword}, {twice[0]}: expected {twice[0]} in one of the two, got it in both")
    return {name: getattr(settings, name) for name in names_of(group)}


def given_settings(function: Callable[..., Any], values: Mapping[str, Any], *kinds: type[Group]) -> dict[str, Any]:
    """Select settings of some groups that are not at the defaults of a function's signature, and groups themselves.

    A function that names its keywords cannot tell otherwise which of them were given.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    names = [name for name in (*names_of(*kinds), *map(keyword_of, kinds)) if name in defaults and name in values]
    return {name: values[name] for name in names if not _same(values[name], defaults[name])}


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, Real) and a == b)


# Signature and documentation of a function that takes settings


def takes(arguments: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function the signature of a class of settings, and the documentation of its fields.

    Type checkers and the editors that are built on them see the fields of the class as keywords of the function;
    ``inspect.signature``, ``help``, notebooks and the reference see them too. In the docstring of the function, the
    entry ``**settings`` is replaced by the entries of all groups.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        assert isinstance(arguments, type)
        own = arguments.__annotations__
        found = inspect.signature(arguments)
        ordered = sorted(found.parameters.values(), key=lambda p: (p.kind, p.name not in own))
        returned = inspect.signature(function).return_annotation
        vars(function)["__signature__"] = found.replace(parameters=ordered, return_annotation=returned)
        if function.__doc__:  # there is none under python -OO
            entries = "".join(_entries(group) for group in groups_of(arguments))
            documentation = inspect.cleandoc(function.__doc__)
            pattern = r"^    \*\*settings:.*\n(?:        .*\n)*"
            function.__doc__ = re.sub(pattern, lambda _: entries, documentation, flags=re.MULTILINE)
        return function

    return decorate


def _entries(group: type[Group]) -> str:
    """Documentation of the fields of a group, and of the group as a whole, as entries of a list of arguments."""
    found = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.cleandoc(group.__doc__ or ""), flags=re.MULTILINE)
    names = ", ".join(f"``{name}``" for name in names_of(group))
    whole = f"    {keyword_of(group)}: A whole :class:`{group.__name__}`, in place of {names}.\n"
    return (found[1].rstrip("\n") + "\n" if found else "") + whole
