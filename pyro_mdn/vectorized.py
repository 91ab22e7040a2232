r"""Many networks at once: functions of weights, mapped over a leading axis of draws or members."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["OwnParameters", "isolated", "over_draws"]


def over_draws(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    draws: Mapping[str, Tensor],
    module: nn.Module,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Apply a function of named tensors to each slice of them along their first axis, in one vectorised pass.

    Random numbers inside differ from draw to draw. Recurrent layers of torch, which :func:`torch.vmap` does not
    support, go one draw after another.

    Args:
        function: Takes tensors without the first axis; returns a tuple of tensors.
        draws: The tensors, ``(S, ...)`` each.
        module: What the function calls.
        chunk_size: Draws in one pass at most; by default all.

    Returns:
        The results, each ``(S, ...)``.

    Raises:
        ValueError: If vmap cannot handle a part of the module, which is named.
    """
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        size = len(next(iter(draws.values())))
        results = [function({name: tensor[i] for name, tensor in draws.items()}) for i in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    entered: list[str] = []
    try:
        with _FreshNoise(), _recorded(module, entered):
            return torch.vmap(function, randomness="different", chunk_size=chunk_size)(dict(draws))
    except RuntimeError as error:
        if not entered:
            raise
        part = f"{entered[-1] or 'the network'} ({type(module.get_submodule(entered[-1])).__name__})"
        raise ValueError(f"network: expected layers that torch.vmap supports, got {part}: {error}") from error


@contextmanager
def isolated() -> Iterator[None]:
    """Have Pyro's parameter store empty and nothing validated inside, and both as they were afterwards.

    A test of values under vmap would have to read data.
    """
    validates = torch.distributions.Distribution._validate_args
    with ExitStack() as stack:
        stack.enter_context(pyro.get_param_store().scope())
        stack.callback(torch.distributions.Distribution.set_default_validate_args, validates)
        stack.enter_context(pyro.validation_enabled(False))
        yield


class OwnParameters(Messenger):
    """Have ``pyro.param`` give what it is given: under vmap the parameter store cannot take new ones."""

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) > 1 and isinstance(msg["args"][1], Tensor):
            msg["value"] = msg["args"][1]


@contextmanager
def _recorded(module: nn.Module, entered: list[str]) -> Iterator[None]:
    """Keep the names of the parts whose call has begun but not ended."""

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: entered.append(name)

    def end(*_: Any) -> None:
        entered.pop()

    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(begin(name)).remove)
            stack.callback(part.register_forward_hook(end).remove)
        yield


class _FreshNoise(TorchFunctionMode):
    """Have distributions draw anew for each slice under vmap, where they fill a tensor that is the same for all."""

    in_place = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.in_place:
            # A tensor that depends on a random number is one for each slice.
            separate = torch.zeros((), dtype=args[0].dtype, device=args[0].device) * torch.rand(()).to(args[0])
            args = (torch.zeros_like(args[0]) + separate, *args[1:])
        return func(*args, **(kwargs or {}))
