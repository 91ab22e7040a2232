r"""Networks of one architecture as one network, whose tensors have a leading axis of members."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.support.fingerprint import described, differing, incomparable
from pyro_mdn.support.torch_compat import REGISTERED, own_buffers, own_parameters

__all__ = ["copied", "set_tensors", "stack", "warn_if_unsure"]

M = TypeVar("M", bound=nn.Module | None)
_OF_CLASSES = ("__dict__", "__weakref__")  # what each class makes for itself


def stack(members: Sequence[MixtureDensityNetwork]) -> MixtureDensityNetwork:
    """Build a network with the tensors of all members along a new first axis.

    Raises:
        ValueError: If networks have latent weights, differ in more than the values of their tensors, or share tensors.
    """
    for member in members:
        if not isinstance(member, MixtureDensityNetwork):
            raise ValueError(f"network: expected MixtureDensityNetwork, got {type(member).__name__}")
        if member.latent:
            raise ValueError("network: expected no latent weights: see posterior_predictive for these")
        _require_alike(members[0], member)
        every = [*member.named_parameters(remove_duplicate=False), *member.named_buffers(remove_duplicate=False)]
        if len({id(tensor) for _, tensor in every}) != len(every):
            raise ValueError("network: expected tensors of their own in each layer, got some that layers share")
    stacked = copied(members[0])
    states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in members]
    set_tensors(stacked, {name: torch.stack([state[name].detach() for state in states]) for name in states[0]})
    return stacked


def warn_if_unsure(members: Sequence[MixtureDensityNetwork]) -> None:
    """Warn if different networks have attributes that cannot be compared."""
    names = incomparable(described(network=members[0], buffers=False))
    if names and any(member is not members[0] for member in members):
        text = f"network: cannot tell whether these agree in all networks, and use those of the first: {names}"
        warnings.warn(text, stacklevel=3)


def copied(network: M) -> M:
    """Copy a module; attributes that cannot be copied, such as a lock, are shared with the copy."""
    copied = _deeplycopied(network)
    for part in [] if copied is None else copied.modules():
        kind = type(part)
        # torch makes a class for each parametrised module, and copies share that class: to remove the parametrization
        # of one copy would remove the weights of all.
        if parametrize.is_parametrized(part) and kind.__module__ == parametrize.__name__:
            members = {name: member for name, member in vars(kind).items() if name not in _OF_CLASSES}
            alike: Any = type(kind.__name__, kind.__bases__, members)
            part.__class__ = alike
    return copied


def _deeplycopied(network: M) -> M:
    try:
        return copy.deepcopy(network)
    except Exception:  # whatever an attribute's own code raises
        modules = [] if network is None else network.modules()
        values = [value for part in modules for name, value in vars(part).items() if name not in REGISTERED]
        return copy.deepcopy(network, {id(value): value for value in values if not _can_becopied(value)})


def _can_becopied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever its own code raises
        return False
    return True


def _require_alike(first: MixtureDensityNetwork, member: MixtureDensityNetwork) -> None:
    """Raise a ``ValueError`` if two networks differ in more than the values of their tensors."""
    # Values of buffers may differ: they are stacked, so that each member has its own.
    a, b = (described(network=network, buffers=False) for network in (first, member))
    if names := differing(a, b):
        got = f"{a.get(names[0])} and {b.get(names[0])} for {names[0]}"
        others = f", and others for {names[1:]}" if names[1:] else ""
        raise ValueError(f"network: expected networks of one architecture, got {got}{others}")
    if names := sorted({name for name, *_ in _tensors(member) ^ _tensors(first)}):
        kinds = "one shape, dtype and requires_grad"
        raise ValueError(f"network: expected tensors of {kinds} in all networks, got others for {names}")


def _tensors(network: nn.Module) -> set[tuple[str, torch.Size, torch.dtype, bool]]:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


def set_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace parameters and buffers by tensors of any shape."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        part = network.get_submodule(path)
        if leaf in own_buffers(part):
            own_buffers(part)[leaf] = tensor.detach().clone()
        else:
            trained = own_parameters(part)[leaf]
            own_parameters(part)[leaf] = nn.Parameter(
                tensor.detach().clone(), requires_grad=trained is not None and trained.requires_grad
            )
