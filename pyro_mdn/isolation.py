r"""Temporarily change process-wide state, and restore it afterwards.

That is Pyro's parameter store and handlers, the validation of distributions, and the random generators of torch. A lock
lets one thread at a time change this state; others wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral, Real
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import nn

__all__ = [
    "KeepFrozen",
    "isolated",
    "own_generators",
    "own_store",
    "require_owned",
    "require_seed",
    "seeded",
    "unvalidated",
]

_PROCESS = threading.RLock()


@contextmanager
def isolated() -> Iterator[None]:
    """Have Pyro's parameter store empty, no handlers of the caller's and nothing validated inside."""
    with own_store(), unvalidated(), poutine.block() if am_i_wrapped() else nullcontext():
        yield


@contextmanager
def own_store() -> Iterator[None]:
    """Have Pyro's parameter store empty inside."""
    with _PROCESS, pyro.get_param_store().scope():
        yield


class KeepFrozen(Messenger):
    """Keep frozen parameters out of Pyro's parameter store, which makes all that it takes require a gradient."""

    def _pyro_param(self, msg: Any) -> None:
        _, *initial = msg["args"]
        if initial and isinstance(initial[0], nn.Parameter) and not initial[0].requires_grad:
            msg["value"], msg["stop"] = initial[0], True  # nor may a handler outside take it for one to train


def require_owned(module: nn.Module) -> None:
    """Raise a ``ValueError`` if the parameter store has parameters that are not the module's: nothing trains those."""
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
    got = repr(seed) if isinstance(seed, Real | str) else type(seed).__name__
    raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {got}")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Have torch's generators start from a seed inside; with ``None``, let them go on, also afterwards."""
    if seed is None:
        yield
        return
    with own_generators():
        torch.manual_seed(int(seed))
        yield


@contextmanager
def own_generators() -> Iterator[None]:
    """Have torch's generators go on inside, and as they were afterwards."""
    with _PROCESS, torch.random.fork_rng(range(torch.cuda.device_count())):
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """Have nothing validated inside: under vmap, a test of values would have to read data."""
    with _PROCESS:
        validates = torch.distributions.Distribution._validate_args
        try:
            with pyro.validation_enabled(False):
                yield
        finally:
            torch.distributions.Distribution.set_default_validate_args(validates)
