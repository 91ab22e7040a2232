r"""Latent weights of Bayesian networks: which parameters are latent, and their priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroSample
from torch import Tensor, nn

from pyro_mdn.networks.head import starting_value
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.support.checks import require_numbers, shown
from pyro_mdn.support.process_state import own_generators, own_store
from pyro_mdn.support.pyro_compat import latent_parameters, name_in_store, to_pyro_module_

__all__ = ["bayesianize", "fan_in_normal", "latent_names", "site_name", "starting_weights"]

Prior = Callable[[str, Tensor], Any]


def bayesianize(
    network: MixtureDensityNetwork,
    prior_scale: float = 1.0,
    *,
    layers: str | Sequence[str] = "all",
    prior: dist.Distribution | Prior | None = None,
) -> MixtureDensityNetwork:
    r"""Make a network Bayesian in place: its parameters become latent ``PyroSample`` sites of ``network.model``.

    .. math:: W_{ij} \sim \mathcal{N}(0, s^2 / n_\text{in}), \quad b_i \sim \mathcal{N}(0, s^2)

    With these scales, the prior over functions has a limit as layers get wider (Neal, 1996). The former values of the
    parameters stay as buffers such as ``weight_start``, from which inference starts.

    Args:
        network: The network. Inference starts from its weights, so that it helps to train the network first.
        prior_scale: Prior scale s.
        layers: ``"all"``, ``"head"``, or names of parameters or modules as in ``network.named_parameters()``.
        prior: Prior in place of the normal: a distribution of each entry, or a function of a parameter's name and value
            that returns a distribution whose event shape is that of the parameter.

    Returns:
        The network.

    Raises:
        ValueError: If the scale is not positive, a name matches no parameter, or the prior has another shape.

    References:
        Neal (1996), Bayesian learning for neural networks.

    >>> network = bayesianize(MixtureDensityNetwork(1, 1), layers="head")
    >>> sorted(starting_weights(network))
    ['head.linear.bias', 'head.linear.weight']
    """
    require_numbers(prior_scale=prior_scale)
    names = _matching(network, [layers] if isinstance(layers, str) else list(layers))
    make = _prior(prior, float(prior_scale))
    with own_generators():
        for name, value in names.items():
            distribution = _of_pyro(make(name, value.detach()))
            shape, dtype = distribution.event_shape, distribution.sample().dtype
            if (shape, dtype) != (value.shape, value.dtype) or distribution.batch_shape:
                expected = f"event shape {tuple(value.shape)} and {value.dtype} for {name}"
                got = f"{tuple(shape)} and {dtype}, and batch shape {tuple(distribution.batch_shape)}"
                raise ValueError(f"prior: expected {expected}, got {got}")
    with own_store():  # when a part is set again, Pyro would take parameters of the same names from the store
        for part in sorted({name.split(".")[0] for name in names if "." in name}):
            # Set a whole part: parts of nn.Sequential that are set one by one change their order.
            to_pyro_module_(child := network.get_submodule(part))
            setattr(network, part, child)
        for name in names:
            _make_latent(network, name, make)
    return network


@dataclass(frozen=True)
class fan_in_normal:
    """Normal prior whose scale decreases with the number of inputs of a layer; see :func:`bayesianize`.

    >>> fan_in_normal(2.0)("weight", torch.zeros(3, 16)).base_dist.stddev.unique()
    tensor([0.5000])
    """

    scale: float

    def __call__(self, name: str, value: Tensor) -> dist.TorchDistribution:
        """Return the prior of a parameter with this name and value."""
        fan_in = value[0].numel() if value.ndim > 1 else 1
        return dist.Normal(torch.zeros_like(value), self.scale / math.sqrt(fan_in)).to_event(value.ndim)


def starting_weights(network: MixtureDensityNetwork) -> dict[str, Tensor]:
    """Return the values that parameters had before they became latent, by the name of their site.

    ``init_to_value(values=starting_weights(network))`` is an ``init_loc_fn`` for AutoGuides. The values are copies,
    because some guides train the tensors that they start from: call this function anew for each guide.
    """
    buffers = dict(network.named_buffers())
    names = latent_names(network).items()
    return {site: buffers[f"{name}_start"].clone() for site, name in names if f"{name}_start" in buffers}


def latent_names(network: MixtureDensityNetwork) -> dict[str, str]:
    """Map sites to the names of latent parameters in the network; in a larger module, sites have longer names.

    >>> from pyro.nn import PyroModule
    >>> model = PyroModule()
    >>> model.network = bayesianize(MixtureDensityNetwork(1, 1), layers="head.linear.bias")
    >>> latent_names(model.network)
    {'network.head.linear.bias': 'head.linear.bias'}
    """
    names = [f"{path}.{leaf}" for path, part in network.named_modules() for leaf in latent_parameters(part)]
    return {site_name(network, name): name for name in (name.removeprefix(".") for name in names)}


def site_name(network: MixtureDensityNetwork, name: str) -> str:
    """Name the site of a latent parameter, given its name within the network."""
    return name_in_store(network, name)


# Priors


@dataclass(frozen=True)
class _OfModule:
    """Function that makes the prior of one parameter on the device of the module that the parameter belongs to."""

    make: Prior
    name: str

    def __call__(self, module: nn.Module) -> Any:
        # A copy: guides may train the tensors of a prior that they start from.
        return self.make(self.name, starting_value(module, self.name.rpartition(".")[2]).detach().clone())


@dataclass(frozen=True)
class _OfEachEntry:
    """The same distribution for all entries of a parameter."""

    distribution: Any

    def __call__(self, name: str, value: Tensor) -> Any:
        return self.distribution.expand(value.shape).to_event(value.ndim)


def _prior(prior: Any, scale: float) -> Prior:
    if prior is None:
        return fan_in_normal(scale)
    if isinstance(prior, torch.distributions.Distribution):
        if _of_pyro(prior).event_shape or prior.batch_shape:
            shapes = tuple(prior.batch_shape), tuple(prior.event_shape)
            raise ValueError(f"prior: expected the distribution of one number, got batch and event shape {shapes}")
        return _OfEachEntry(prior)
    if not callable(prior):
        raise ValueError(f"prior: expected a distribution or a function that makes one, got {type(prior).__name__}")
    return prior


def _of_pyro(prior: Any) -> TorchDistributionMixin:
    if not isinstance(prior, TorchDistributionMixin):
        kind = type(prior)
        raise ValueError(f"prior: expected one of pyro.distributions, got {kind.__module__}.{kind.__qualname__}")
    return prior


def _matching(network: MixtureDensityNetwork, layers: Sequence[str]) -> dict[str, nn.Parameter]:
    """Select the parameters of the layers with these names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if len({id(p) for p in parameters.values()}) != len(parameters):
        raise ValueError("network: expected parameters of their own in each layer, got some that layers share")
    chosen = {}
    for layer in layers:
        found = {n: p for n, p in parameters.items() if layer == "all" or n == layer or n.startswith(f"{layer}.")}
        if not found:
            raise ValueError(f"layers: expected 'all', 'head' or names among {sorted(parameters)}, got {shown(layer)}")
        chosen |= found
    return {name: p for name, p in parameters.items() if name in chosen}


def _make_latent(network: nn.Module, name: str, make: Prior) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    value = getattr(module, leaf).detach().clone()
    setattr(module, leaf, PyroSample(_OfModule(make, name)))
    module.register_buffer(f"{leaf}_start", value)
