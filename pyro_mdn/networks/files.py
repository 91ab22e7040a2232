r"""Whether a module has the tensors that a file of it is loaded into, and what gives them back where it has others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_mdn.support.torch_compat import own_modules, pre_hooks, pruned_name

__all__ = ["require_loadable", "shapes_of"]


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors by name; the state of a module may have other values, whose shape is empty."""
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def require_loadable(
    network: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[int, ...]],
    *,
    of_members: bool = False,
) -> None:
    """Raise a ``ValueError`` unless names and shapes of tensors are those that a file is loaded into.

    Args:
        network: What has the tensors. The error says how to make plain parameters of computed ones.
        expected: Shapes by name.
        got: Likewise.
        of_members: Whether the tensors are those of an ensemble, whose members can be changed one by one.
    """
    if expected == got:
        return
    names = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
    calls = "; ".join(call for path, part in network.named_modules(prefix="network") for call in _plain(path, part))
    where = " in each of networks = [ensemble.member(i) for i in range(ensemble.size)], and save DeepEnsemble(networks)"
    remedy = f": first call {calls}{where if of_members else ''}" if calls else ""
    raise ValueError(f"network: expected the tensors of a new network, to load them into one, got {names}{remedy}")


def _plain(path: str, part: nn.Module) -> Iterator[str]:
    """Calls that make plain parameters of computed ones, outside of a backbone, which users build themselves."""
    if path.startswith("network.backbone"):
        return
    if parametrize.is_parametrized(part):
        parametrizations: Any = own_modules(part)["parametrizations"]
        for name in parametrizations:
            yield f"torch.nn.utils.parametrize.remove_parametrizations({path}, {name!r})"
    for hook in pre_hooks(part):
        if isinstance(hook, prune.BasePruningMethod):
            yield f"torch.nn.utils.prune.remove({path}, {pruned_name(hook)!r})"
        if isinstance(hook, WeightNorm):
            yield f"torch.nn.utils.remove_weight_norm({path}, {hook.name!r})"
        if isinstance(hook, SpectralNorm):
            yield f"torch.nn.utils.remove_spectral_norm({path}, {hook.name!r})"
