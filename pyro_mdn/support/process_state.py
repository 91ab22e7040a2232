r"""Temporarily change process-wide state, and restore it afterwards.

Process-wide state is Pyro's parameter store and handlers, the validation of distributions, and the random generators of
torch. A lock lets one thread at a time change this state; others wait. Code that holds the lock for long, such as a
training loop, must call :func:`give_way` between its steps. If another thread waits, the state of the process is
restored, the other thread has its turn, and then the first thread goes on with the state that it had. If no thread
waits, the call only looks at a set.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro import distributions, infer, poutine
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import Distribution

from pyro_mdn.support.checks import shown
from pyro_mdn.support.pyro_compat import handlers

__all__ = [
    "KeepFrozen",
    "evaluating",
    "give_way",
    "has_process",
    "isolated",
    "num_waiting",
    "own_generators",
    "own_store",
    "released",
    "require_owned",
    "require_seed",
    "seeded",
    "unvalidated",
]

_PROCESS = threading.RLock()
_TURN = threading.Condition(_PROCESS)  # notified by each thread that releases the lock or gives way
_PATIENCE = 0.01  # seconds that a thread waits for another to take its turn, when it gives way
_waiting: set[object] = set()  # a ticket for each thread that waits for the lock
_holder = [0]  # the thread that holds the lock
_active: list[_Own] = []  # the pieces of state that this thread has changed, in order; empty while they are restored


# Taking turns


class _Own:
    """A piece of process-wide state for which a thread has a value of its own; ``kept`` is the value to restore."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.get, self.put, self.kept = get, put, get()

    def swap(self) -> None:
        """Exchange the current value and the kept one."""
        kept, self.kept = self.kept, self.get()
        self.put(kept)


@contextmanager
def _own(get: Callable[[], Any], put: Callable[[Any], None], first: Any = None) -> Iterator[None]:
    """Acquire the lock, and give a piece of process-wide state a value of its own inside."""
    ticket = object()
    _waiting.add(ticket)
    try:
        with _PROCESS:
            _waiting.discard(ticket)
            _holder[0] = threading.get_ident()
            own = _Own(get, put)
            try:
                if first is not None:
                    put(first)
                _active.append(own)
                yield
            finally:
                if own in _active:  # not if ``put`` refused the first value
                    _active.remove(own)
                put(own.kept)
                if _waiting:
                    _TURN.notify_all()
    finally:
        _waiting.discard(ticket)


def give_way() -> None:
    """Let threads that wait for the lock have a turn, with the process-wide state as it was before this thread."""
    if _waiting and has_process():
        with _put_back(), _ticket():  # with a ticket, so that the other thread may give way to this one again
            _TURN.wait(_PATIENCE)


@contextmanager
def released() -> Iterator[None]:
    """Restore the process-wide state and release the lock inside, to run code of others, such as a callback."""
    if not has_process():
        yield
        return
    with _put_back():
        depth = _let_go()
        try:
            yield
        finally:
            with _ticket():  # not before: other threads would give way to this one in vain, and lose time
                for _ in range(depth):
                    _PROCESS.acquire()


def num_waiting() -> int:
    """Count the threads that wait for the lock."""
    return len(_waiting)


def has_process() -> bool:
    """Whether this thread holds the lock and has changed process-wide state."""
    return bool(_active) and _holder[0] == threading.get_ident()


@contextmanager
def _put_back() -> Iterator[None]:
    """Restore the process-wide state inside, and afterwards set again what this thread has changed."""
    mine = _active[:]
    _active.clear()
    for own in reversed(mine):
        own.swap()
    _TURN.notify_all()
    try:
        yield
    finally:
        _holder[0] = threading.get_ident()
        for own in mine:
            own.swap()
        _active.extend(mine)


@contextmanager
def _ticket() -> Iterator[None]:
    """Count as a thread that waits for the lock inside."""
    ticket = object()
    _waiting.add(ticket)
    try:
        yield
    finally:
        _waiting.discard(ticket)


def _let_go() -> int:
    """Release the lock as often as this thread has acquired it, and return the number of times."""
    depth = 0
    while True:
        try:
            _PROCESS.release()
        except RuntimeError:  # this thread does not hold it any more
            return depth
        depth += 1


def _begin_anew() -> None:
    """Reset the lock in a forked process, unless the thread that forked holds it.

    Other threads do not exist in the new process. State that one of them had changed is restored, except for that of
    the generators: the thread may have held their own lock, which nothing can release any more.
    """
    global _PROCESS, _TURN
    _waiting.clear()
    if _active and not has_process():
        for own in reversed(_active):
            if own.put is not _put_generators:
                own.put(own.kept)
        _active.clear()
    if not _active:
        _PROCESS = threading.RLock()
    _TURN = threading.Condition(_PROCESS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


# Pieces of state


@contextmanager
def isolated() -> Iterator[None]:
    """Run with an empty parameter store, without handlers of the caller, and without validation."""
    with own_store(), unvalidated(), _own(handlers.copy, _put_handlers, []):
        yield


def _put_handlers(others: list[Any]) -> None:
    handlers[:] = others


def own_store() -> AbstractContextManager[None]:
    """Run with an empty parameter store, and restore the store of the caller."""
    return _own(pyro.get_param_store().get_state, _put_store, {"params": {}, "constraints": {}})


def _put_store(state: Any) -> None:
    store = pyro.get_param_store()
    store.get_state()  # removes references from the parameters, which then can be copied
    store.clear()
    store.set_state(state)


def own_generators() -> AbstractContextManager[None]:
    """Run with the generators of torch as they are, and restore their states afterwards."""
    return _own(_generators, _put_generators)


def _generators() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, range(torch.cuda.device_count()))]


def _put_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with generators that start from a seed, and restore their states; with ``None``, change nothing."""
    if seed is None:
        yield
        return
    with own_generators():
        torch.manual_seed(int(seed))
        yield


def unvalidated() -> AbstractContextManager[None]:
    """Run without validation: under vmap, checks cannot read the values."""
    return _own(_validation, _put_validation, (False,) * 4)


def _validation() -> tuple[bool, bool, bool, bool]:
    pyros = distributions.is_validation_enabled(), infer.is_validation_enabled(), poutine.is_validation_enabled()
    return *pyros, Distribution._validate_args


def _put_validation(values: tuple[bool, bool, bool, bool]) -> None:
    distributions.enable_validation(values[0])  # that of torch as well
    infer.enable_validation(values[1])
    poutine.enable_validation(values[2])
    if values[3] != values[0]:
        Distribution.set_default_validate_args(values[3])


# Checks


class KeepFrozen(Messenger):
    """Keep frozen parameters out of Pyro's parameter store, which makes all its parameters require a gradient."""

    def _pyro_param(self, msg: Any) -> None:
        _, *initial = msg["args"]
        if initial and isinstance(initial[0], nn.Parameter) and not initial[0].requires_grad:
            msg["value"], msg["stop"] = initial[0], True  # nor may a handler outside take it for one to train


def require_owned(module: nn.Module) -> None:
    """Raise a ``ValueError`` if the store has parameters that are not the module's: the optimiser has none of these."""
    if store := pyro.get_param_store():
        owned = {id(parameter) for parameter in module.parameters()}
        if strangers := [name for name, p in store.named_parameters() if id(p) not in owned]:
            raise ValueError(f"guide: expected a module that owns its parameters, got pyro.param for {strangers}")


def require_seed(seed: Any) -> None:
    """Raise a ``ValueError`` unless this is a seed of torch's generators, or ``None``.

    >>> require_seed(-1)
    Traceback (most recent call last):
    ValueError: seed: expected an integer from 0 to 2**63 - 1, got -1
    """
    if seed is None or (isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) < 2**63):
        return
    raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {shown(seed)}")


# Evaluation mode of modules, which several threads may use at once

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
