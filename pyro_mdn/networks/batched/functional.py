r"""Many networks in one pass: functions of weights, mapped by ``torch.vmap`` over an axis of draws or members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.networks.batched.passes import Cost, cost_of
from pyro_mdn.support.process_state import give_way, own_generators

__all__ = ["MixtureTensors", "OwnParameters", "in_parts", "in_passes", "over_draws"]


def over_draws(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    draws: Mapping[str, Tensor],
    module: nn.Module,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Apply a function of named tensors to each slice of them along their first axis, in one vectorised pass.

    Random numbers differ from draw to draw. :func:`torch.vmap` does not support the recurrent layers of torch: networks
    with these go one draw after another.

    Args:
        function: Takes tensors without the first axis; returns a tuple of tensors.
        draws: The tensors, ``(S, ...)`` each.
        module: What the function calls.
        chunk_size: Largest number of draws in one pass; by default all.

    Returns:
        The results, each ``(S, ...)``.

    Raises:
        ValueError: If vmap cannot handle a part of the module, which is named.
    """
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        size = len(next(iter(draws.values())))
        results = [function({name: tensor[i] for name, tensor in draws.items()}) for i in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    mapped = torch.vmap(function, randomness="different", chunk_size=chunk_size)
    with _FreshNoise():
        try:
            return mapped(dict(draws))
        except RuntimeError as error:
            if (part := _failing(lambda: mapped(dict(draws)), module)) is None:
                raise
            expected = "network: expected layers that torch.vmap supports"
            raise ValueError(f"{expected}, got {part}: {error}") from error


def in_passes(
    function: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]],
    draws: Mapping[str, Tensor],
    x: Tensor,
    module: nn.Module,
) -> tuple[Tensor, ...]:
    """Compute results ``(S, N, ...)`` of a function of named tensors and rows, in passes whose size is measured.

    Args:
        function: Takes tensors without the first axis, and rows; returns a tuple of tensors ``(N, ...)``.
        draws: The tensors, ``(S, ...)`` each.
        x: The rows, ``(N, ...)``.
        module: What the function calls.
    """
    size = len(next(iter(draws.values())))

    def run(draws: Mapping[str, Tensor], x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
        results = []
        for start in range(0, size, chunk_size):
            give_way()
            some = {name: value[start : start + chunk_size] for name, value in draws.items()}
            results.append(over_draws(lambda tensors: function(tensors, x), some, module))
        return results[0] if len(results) == 1 else tuple(torch.cat(same) for same in zip(*results, strict=True))

    first = {name: value[0] for name, value in draws.items()}
    with own_generators(), torch.no_grad():
        cost = cost_of(partial(function, first), x, size)
    return in_parts(run, cost, draws, x)


def in_parts(
    run: Callable[[Mapping[str, Tensor], Tensor, int], tuple[Tensor, ...]],
    cost: Cost,
    draws: Mapping[str, Tensor],
    x: Tensor,
) -> tuple[Tensor, ...]:
    """Compute results ``(S, N, ...)`` by some draws at a time; if a single draw exceeds one pass, by parts of the rows.

    Args:
        run: Takes all draws, some rows, and the number of draws in one pass.
        cost: Memory that one draw takes.
        draws: Named tensors, ``(S, ...)`` each.
        x: The rows, ``(N, ...)``.
    """
    parts = x.split(rows := cost.rows(len(x)))
    results = [run(draws, part, cost.units(rows)) for part in parts]
    return tuple(_joined(same, parts) for same in zip(*results, strict=True))


def _joined(results: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Join results ``(S, N, ...)`` of parts of the rows; results that do not depend on rows are those of any part."""
    by_row = all(result.shape[1] == len(part) for result, part in zip(results, parts, strict=True))
    return torch.cat([*results], 1) if by_row and len(results) > 1 else results[0]


class MixtureTensors:
    """Function that returns the tensors of a mixture, each with all batch dimensions, for ``torch.vmap``.

    Args:
        function: Function that returns the mixture.
    """

    def __init__(self, function: Callable[..., Mixture]) -> None:
        self.function = function
        self.kind: type[Mixture] = Mixture
        self.components: Any = None

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Return logits and the tensors that the components store."""
        mixture = self.function(*args)
        batch_shape = mixture.batch_shape
        self.kind = type(mixture)
        self.components = mixture.components.map(lambda t, n: t.expand(*batch_shape, *t.shape[t.ndim - n - 1 :]))
        return mixture.logits, *self.components.tensors()

    def mixture(self, logits: Tensor, *stored: Tensor) -> Mixture:
        """Build the mixture of such tensors, of any batch shape, with components like those of the last call."""
        return self.kind.of_components(logits, self.components.with_tensors(stored))


class OwnParameters(Messenger):
    """Make ``pyro.param`` return its initial tensor: under vmap, the parameter store cannot register new ones."""

    def _pyro_param(self, msg: Any) -> None:
        name, *initial = msg["args"]
        if initial and isinstance(initial[0], Tensor) and name not in pyro.get_param_store():
            msg["value"] = initial[0]


def _failing(call: Callable[[], Any], module: nn.Module) -> str | None:
    """Find the part of a module whose call fails; return its name and type, or ``None``."""
    entered: list[str] = []
    with ExitStack() as stack:
        for name, part in module.named_modules():
            begin = part.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
            end = part.register_forward_hook(lambda *_: entered.pop() and None)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        with suppress(RuntimeError):
            call()
    return f"{entered[-1]} ({type(module.get_submodule(entered[-1])).__name__})" if entered else None


class _FreshNoise(TorchFunctionMode):
    """Make distributions draw anew for each slice under vmap, although they fill a tensor that all slices share."""

    in_place = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.in_place:
            # A tensor that depends on a random number is one for each slice.
            separate = args[0].new_zeros(()) * torch.rand((), dtype=args[0].dtype, device=args[0].device)
            args = (torch.zeros_like(args[0]) + separate, *args[1:])
        return func(*args, **(kwargs or {}))
