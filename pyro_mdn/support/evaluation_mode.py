r"""Evaluation mode of modules that several threads may use at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]

_MODES = threading.Lock()  # held for moments, never while code of others runs
_evaluated: dict[int, tuple[nn.Module, bool, list[int]]] = {}  # parts by id, with the mode they had, and who is inside


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part's own mode again once nobody is inside, in whatever thread."""
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
    """Count a thread out of the evaluation of a module; the last gives it the mode it had."""
    _, training, inside = _evaluated[id(part)]
    inside.remove(thread)
    if not inside:
        part.training = training
        del _evaluated[id(part)]


def _leave_for_others() -> None:
    """Count out, in a process that was forked, the threads that are not there any more."""
    global _MODES
    _MODES = threading.Lock()  # one of them may have held it
    for part, _, inside in [*_evaluated.values()]:
        for thread in {*inside} - {threading.get_ident()}:
            for _ in range(inside.count(thread)):
                _leave(part, thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_for_others)
