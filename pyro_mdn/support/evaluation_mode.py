r"""Evaluation mode of modules, also if several threads use one at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]

_MODES = threading.Lock()  # held for moments, never while other code runs
_evaluated: dict[int, tuple[nn.Module, bool, list[int]]] = {}  # by id: part, former mode, threads inside


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode, and restore each part's own mode once no thread is inside any more."""
    parts, thread = [*module.modules()], threading.get_ident()
    with _MODES:
        for part in parts:
            _evaluated.setdefault(id(part), (part, part.training, []))[2].append(thread)
    try:
        module.eval()
        yield
    finally:
        with _MODES:
            for part in parts:
                _leave(part, thread)


def _leave(part: nn.Module, thread: int) -> None:
    """Remove a thread from those inside a part; the last one restores the mode of the part."""
    _, training, inside = _evaluated[id(part)]
    inside.remove(thread)
    if not inside:
        part.training = training
        del _evaluated[id(part)]


def _leave_for_others() -> None:
    """Remove, in a forked process, the threads that do not exist there."""
    global _MODES
    _MODES = threading.Lock()  # one of them may have held it
    for part, _, inside in [*_evaluated.values()]:
        for thread in {*inside} - {threading.get_ident()}:
            for _ in range(inside.count(thread)):
                _leave(part, thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_for_others)
