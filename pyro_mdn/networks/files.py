r"""Files of networks: their configuration, and whether a network has the tensors that its file is loaded into."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_mdn.distributions.covariance.noise_models import NoiseModel
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.families.normal import Normal
from pyro_mdn.distributions.units.target_transforms import Standardize, TargetTransform
from pyro_mdn.networks import inputs
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.networks.starting_point import hidden_layers
from pyro_mdn.support.fingerprint import FORMS, described, differing
from pyro_mdn.support.process_state import own_generators
from pyro_mdn.support.torch_compat import own_modules, pre_hooks, pruned_name

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork
    from pyro_mdn.networks.predictor import Predictor

__all__ = [
    "network_config",
    "network_from_config",
    "require_loadable",
    "warn_if_unlike",
]

N = TypeVar("N", bound="MixtureDensityNetwork")
Shapes = dict[str, tuple[int, ...]]


def _shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; a value of a state that is no tensor has an empty shape."""
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def require_loadable(predictor: Predictor, config: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless the tensors of a predictor are those that a file of it is loaded into.

    The error says how to make plain parameters of computed ones.

    Args:
        predictor: A network, or what has several members.
        config: Its configuration.
    """
    network, of_members = predictor.architecture, predictor.architecture is not predictor
    expected, got = _shapes_outside_backbone(network)
    if of_members:
        expected = {name: (predictor.num_members, *shape) for name, shape in expected.items()}
    if expected == got or (not of_members and _builds(network, config)):
        return
    names = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
    calls = "; ".join(call for path, part in network.named_modules(prefix="network") for call in _plain(path, part))
    where = " in each of networks = [ensemble.member(i) for i in range(ensemble.size)], and save DeepEnsemble(networks)"
    remedy = f": first call {calls}{where if of_members else ''}" if calls else ""
    raise ValueError(f"network: expected the tensors of a new network, to load them into one, got {names}{remedy}")


def _plain(path: str, part: nn.Module) -> Iterator[str]:
    """List calls that make plain parameters of computed ones. Users build a backbone themselves, so it is left out."""
    if path.startswith("network.backbone"):
        return
    if parametrize.is_parametrized(part):
        computed: Any = own_modules(part)["parametrizations"]
        for name in computed:
            yield f"torch.nn.utils.parametrize.remove_parametrizations({path}, {name!r})"
    for hook in pre_hooks(part):
        if isinstance(hook, prune.BasePruningMethod):
            yield f"torch.nn.utils.prune.remove({path}, {pruned_name(hook)!r})"
        if isinstance(hook, WeightNorm):
            yield f"torch.nn.utils.remove_weight_norm({path}, {hook.name!r})"
        if isinstance(hook, SpectralNorm):
            yield f"torch.nn.utils.remove_spectral_norm({path}, {hook.name!r})"


def _shapes_outside_backbone(network: MixtureDensityNetwork) -> tuple[Shapes, Shapes]:
    """Return shapes by name of the tensors of a new network with these settings, and of those of this network."""
    with torch.device("meta"):
        settings = {"family": network.head.family, "target_transform": network.head.transform}
        head = MixtureHead(network.hidden_dim[-1], network.dim_out, network.n_components, **settings)
    expected = _shapes_of({f"head.{name}": tensor for name, tensor in head.state_dict().items()})
    got = _shapes_of(network.state_dict())
    units = _shapes_of(inputs.new(network.input_transform, network.input_shape))
    return {**expected, **units}, {name: shape for name, shape in got.items() if not name.startswith("backbone.")}


def _builds(network: MixtureDensityNetwork, config: Mapping[str, Any]) -> bool:
    """Whether the class of a network, perhaps a subclass, builds one with the same tensors from a configuration."""
    try:
        backbone = copy.deepcopy(network.backbone) if config["custom_backbone"] else None
        built = type(network).from_config(config, "", backbone=backbone)
    except Exception:  # whatever its own code raises
        return False
    return _shapes_of(built.state_dict()) == _shapes_of(network.state_dict())


def warn_if_unlike(network: MixtureDensityNetwork, config: Mapping[str, Any], source: str) -> None:
    """Warn if a network is built differently from the network that a configuration describes.

    Entries that the fingerprint has gained since do not count. Files of the earliest versions have no fingerprint.
    """
    # Earlier versions wrote values in other forms or in words, and named the classes that Pyro derives from others.
    forms = [(values, form) for form in FORMS for values in (False, True)]
    known = [described(network=network, buffers=False, code=False, values=values, form=form) for values, form in forms]
    then = {name: re.sub(r"^PyroModule\[(.+?)\]", r"\1", text) for name, text in config.get("structure", {}).items()}
    lost = [(name, text) for name, text in then.items() if all(text != k.get(name) for k in known)]
    if lost:
        told = "; ".join(f"{name}: {text}, now {known[0].get(name)}" for name, text in lost)
        warnings.warn(f"{source}: expected a network built like the one saved; {told}", stacklevel=3)


def _require_backbone(source: str, custom: Any, backbone: nn.Module | None, structure: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` if a file needs a backbone and there is none, or the other way round."""
    if custom is True and backbone is None:
        parts = [f"{name}: {text}" for name, text in structure.items() if name.startswith("network.backbone")]
        shown = "; ".join(part for part in parts if not part.endswith((": parameter", ": buffer")))
        like = f" that is built like this: {shown}" if shown else ""
        raise ValueError(f"{source}: expected backbone= with a module in place of the usual hidden layers{like}")
    if custom is not (backbone is not None):
        raise ValueError(f"{source}: expected no backbone=, since the file has the usual hidden layers, got one")


def _is_custom(backbone: nn.Module, widths: Sequence[int]) -> bool:
    """Whether a backbone differs from the usual hidden layers of these widths, apart from weights and hooks."""
    with torch.device("meta"):
        usual = hidden_layers(widths)
    structures = (described(backbone=module, hooks=False, buffers=False) for module in (backbone, usual))
    return bool(differing(*structures))


def _family_to_config(family: Family) -> dict[str, Any]:
    """Describe normal components by their noise model alone, as earlier versions did, and other families in full."""
    return {"noise": family.noise.to_config()} if type(family) is Normal else {"family": family.to_config()}


def _transforms_to_config(network: MixtureDensityNetwork) -> dict[str, Any]:
    """Describe transforms other than the default, of which earlier versions did not write anything."""
    transforms = {"target_transform": network.head.transform, "input_transform": network.input_transform}
    return {name: own.to_config() for name, own in transforms.items() if type(own) is not Standardize}


def _family_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Take the argument out of a configuration that says which family it is."""
    if "family" in config:
        return {"family": Family.from_config(config.pop("family"))}
    return {"noise": NoiseModel.from_config(config.pop("noise"))}


def network_config(network: MixtureDensityNetwork) -> dict[str, Any]:
    """Describe a network by plain values; see :meth:`MixtureDensityNetwork.config`."""
    if network.latent:
        raise ValueError("network: expected no latent weights: save it before bayesianize, and the posterior apart")
    names: dict[str, Any] = {} if network.input_names is None else {"input_names": network.input_names}
    names |= _transforms_to_config(network)
    return {
        **names,
        "dim_in": list(network.input_shape),
        "dim_out": network.dim_out,
        "n_components": network.n_components,
        "hidden_dim": list(network.hidden_dim),
        **_family_to_config(network.head.family),
        "custom_backbone": _is_custom(network.backbone, [*network.input_shape, *network.hidden_dim]),
        "structure": described(network=network, buffers=False, code=False, values=False),
    }


def network_from_config(
    kind: Callable[..., N], config: Mapping[str, Any], source: str, backbone: nn.Module | None
) -> N:
    """Build the network that a configuration describes; see :meth:`MixtureDensityNetwork.from_config`."""
    config = dict(config)
    if "custom_backbone" not in config:
        got = "an ensemble" if "ensemble" in config else "another file of this library"
        raise ValueError(f"{source}: expected a network, got {got}")
    structure, names = config.pop("structure", {}), config.pop("input_names", None)
    _require_backbone(source, config.pop("custom_backbone"), backbone, structure)
    try:
        family = _family_from_config(config)
        for name in {"target_transform", "input_transform"} & {*config}:
            config[name] = TargetTransform.from_config(config[name])
        with own_generators():  # the initial weights are overwritten
            network = kind(**config, **family, backbone=backbone)
        network.input_names = names
        return network
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: expected the configuration of a network, got {config}") from error
