r"""Specifications that have a name: in files, as strings to constructors, and in the estimator of scikit-learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

from pyro_mdn.support.checks import shown

__all__ = ["Specification", "snake_case"]


class Specification:
    """Base of frozen dataclasses of settings. A subclass is known by its name as soon as it is defined.

    The root of a kind, such as all noise models, says ``known = {}`` and what the ``kind`` is called in errors. Names
    that begin with an underscore are not registered. ``by_name=False`` beside the bases of a class keeps its name from
    constructors: it is itself a base, or has no default settings.
    """

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Any]]]
    by_name: ClassVar[bool]
    """Whether the name is enough for a constructor."""

    def __init_subclass__(cls, *, by_name: bool = True, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        name, cls.by_name = cls.__name__, by_name
        if "known" in vars(cls) or name.startswith("_"):
            return
        other = cls.known.get(name)
        if other is not None and _is_ours(other) and not _is_ours(cls):
            raise ValueError(f"{cls.kind}: expected another name than {name}, which this library has")
        cls.known[name] = cls

    @classmethod
    def names(cls) -> list[str]:
        """Names for constructors, such as ``"low_rank"`` for ``LowRank``."""
        return sorted(snake_case(name) for name, known in cls.known.items() if known.by_name)

    @classmethod
    def named(cls, value: Any) -> type[Self]:
        """Class that a name for constructors stands for; a ``ValueError`` if there is none."""
        found = {snake_case(name): known for name, known in cls.known.items() if known.by_name}
        if not isinstance(value, str) or value not in found:
            expected = f"{_article(cls.__name__)} or one of {cls.names()}"
            raise ValueError(f"{cls.kind}: expected {expected}, got {shown(value)}")
        return found[value]

    def to_config(self) -> dict[str, Any]:
        """Name and settings in plain values.

        Raises:
            ValueError: If the class is not the one that is known by its name.
        """
        name = type(self).__name__
        if self.known.get(name) is not type(self):
            raise ValueError(f"{self.kind}: expected one of {sorted(self.known)} to save, got {name}")
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # pyright: ignore[reportArgumentType]
        return {"name": name, **{key: _plain(value) for key, value in settings.items()}}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build what :meth:`to_config` described; a ``ValueError`` if that is not known."""
        if not isinstance(config, Mapping):
            raise ValueError(f"{cls.kind}: expected a name and settings, got {shown(config)}")
        settings = dict(config)
        name = settings.pop("name", None)
        if not isinstance(name, str) or name not in cls.known:
            expected = f"one of {sorted(cls.known)}, or one whose module is imported"
            raise ValueError(f"{cls.kind}: expected {expected}, got {shown(name)}")
        try:
            return cls.known[name](**cls.known[name]._built(settings))
        except TypeError as error:
            raise ValueError(f"{cls.kind}: expected the settings of {name}, got {settings}") from error

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings with specifications in the place of their configurations."""
        return settings


def _plain(value: Any) -> Any:
    """Configurations in the place of specifications, also of several."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_config() if isinstance(value, Specification) else value


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def snake_case(name: str) -> str:
    """Name of a class as a keyword.

    >>> snake_case("LowRank")
    'low_rank'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
