r"""Posteriors of latent weights, whichever inference they come from, behind one interface."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.posteriors.guide_draws import LaplaceGuide, draw_from, require_sites
from pyro_mdn.posteriors.network_sites import NetworkSites
from pyro_mdn.posteriors.priors import latent_names
from pyro_mdn.support.process_state import KeepFrozen, isolated
from pyro_mdn.support.pyro_compat import names_of_parameters

__all__ = [
    "DRAWS",
    "Posterior",
    "as_posterior",
    "draws_from_samples",
    "require_available",
    "spread",
    "warn_if_nonlinear",
]

DRAWS = "draws from a posterior"


class Posterior(ABC):
    """Posterior distribution of the latent weights of a network.

    Predictions and groups for ArviZ rely on the methods of this class, and never ask for the kind of inference.
    :func:`as_posterior` converts guides, samplers and samples.
    """

    @property
    def method(self) -> str:
        """Name of the inference."""
        return DRAWS

    @property
    def linear(self) -> bool:
        """Whether the inference assumes that the outputs of the network are linear in the weights."""
        return False

    @property
    def chains(self) -> int:
        """Number of Markov chains that the draws come from, one after another."""
        return 1

    @abstractmethod
    def draws(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None = None) -> dict[str, Tensor]:
        """Draw the latent weights of a network, ``(S, *shape)`` by site.

        Args:
            network: The network that the posterior is of.
            x: Inputs, which a guide may depend on.
            num_samples: Number of draws; by default 100 draws from a guide, or all samples.

        Raises:
            ValueError: If the posterior is not one of this network's, or if there are not as many draws.
        """

    def fixed(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None) -> Posterior:
        """Return a posterior whose draws are always the same, so that the same weights predict everywhere."""
        return self

    def sites(self) -> dict[str, Any]:
        """Return the samples by site, ``(chains, S / chains, *shape)``; a guide has none."""
        return {}

    def statistics(self) -> dict[str, Any]:
        """Return statistics of the sampler for each draw, ``(chains, S / chains)`` by name."""
        return {}

    def median(self, network: MixtureDensityNetwork, draws: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """Return the median of each weight, by the sites of some draws.

        Raises:
            NotImplementedError: If the posterior has no median.
        """
        raise NotImplementedError


def as_posterior(value: Any) -> Posterior:
    """Convert a guide, draws by site, ``MCMC`` or a :class:`Posterior` to a posterior.

    Raises:
        ValueError: If it is none of these.
    """
    for kind, adapter in _ADAPTERS:
        if isinstance(value, kind):
            return adapter(value)
    if hasattr(value, "get_samples"):
        return SamplesPosterior(value.get_samples())
    expected = "a guide, draws by site, PosteriorSamples, MCMC or a DeepEnsemble"
    raise ValueError(f"posterior: expected {expected}, got {type(value).__name__}")


def warn_if_nonlinear(network: MixtureDensityNetwork, posterior: Posterior) -> None:
    """Warn if weights of hidden layers are latent, and the posterior assumes outputs that are linear in these."""
    if posterior.linear and not all(name.startswith("head.") for name in latent_names(network).values()):
        message = "Laplace's approximation of hidden layers predicts badly unless linearize=True"
        warnings.warn(f"posterior_predictive: {message}; linearize=False to go on", stacklevel=3)


# Samples


class SamplesPosterior(Posterior):
    """Draws ``(S, *shape)`` by site, as ``MCMC.get_samples()`` and ``Predictive`` give them.

    Args:
        samples: The draws. Of ``Predictive``, they may have dimensions for plates, and observations among them.
        method: Name of the inference.
    """

    def __init__(self, samples: Mapping[str, Any], method: str = DRAWS) -> None:
        self.samples, self._method = samples, method

    @property
    def method(self) -> str:
        return self._method

    def draws(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None = None) -> dict[str, Tensor]:
        return draws_from_samples(network, self.samples, x, num_samples)

    def fixed(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None) -> Posterior:
        # Observations are not draws of a posterior. Sites of a larger model stay.
        others = {name: value for name, value in self.samples.items() if name != "y"}
        return SamplesPosterior({**others, **self.draws(network, x)}, self.method)

    def sites(self) -> dict[str, Any]:
        return {name: _as_draws(value).unsqueeze(0) for name, value in self.samples.items()}


class McmcPosterior(Posterior):
    """Chains of ``pyro.infer.MCMC`` that have run."""

    def __init__(self, mcmc: MCMC) -> None:
        self.mcmc = mcmc

    @property
    def method(self) -> str:
        return "MCMC"

    @property
    def chains(self) -> int:
        return len(next(iter(self.sites().values())))

    def draws(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None = None) -> dict[str, Tensor]:
        return draws_from_samples(network, self.mcmc.get_samples(), x, num_samples, owner=self.mcmc.kernel)

    def sites(self) -> dict[str, Any]:
        return self.mcmc.get_samples(group_by_chain=True)

    def statistics(self) -> dict[str, Any]:
        shape = next(iter(self.sites().values())).shape[:2]
        diverging = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for chain, positions in enumerate(self.mcmc.diagnostics().get("divergences", {}).values()):
            diverging[chain, list(positions)] = True
        return {"diverging": diverging}


@torch.no_grad()
def draws_from_samples(
    network: MixtureDensityNetwork,
    samples: Mapping[str, Any],
    x: Any,
    num_samples: int | None = None,
    *,
    owner: Any = None,
) -> dict[str, Tensor]:
    """Select draws at the sites of a network from samples ``(S, *shape)`` by site; fewer are spread evenly over all.

    Args:
        network: The network.
        samples: The samples.
        x: Inputs, for their shape.
        num_samples: Number of draws; by default all.
        owner: Kernel or guide whose model may be a reparametrised one, from which the weights are computed.
    """
    x = _with_rows(network, x)
    learned = _learned_elsewhere()
    with isolated():
        sites = NetworkSites.of(network, x)
    tensors = {name: _as_draws(value) for name, value in samples.items()}
    if owner is not None:
        with isolated(), pyro.get_param_store().scope(learned):
            tensors = sites.computed(owner, tensors)
    sites.require_weights(tensors)
    own = sites.own("posterior", tensors)
    counts = {len(value) for value in own.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"posterior: expected as many draws of each site, got {sorted(counts)}")
    require_available(num_samples, size := counts.pop())
    if num_samples in (None, size):
        return {name: value.to(sites.expected[name]) for name, value in own.items()}
    chosen = spread(size, num_samples)
    return {name: value[chosen.to(value.device)].to(sites.expected[name]) for name, value in own.items()}


def require_available(num_samples: int | None, available: int) -> None:
    """Raise a ``ValueError`` if more draws are wanted than there are."""
    if num_samples is not None and num_samples > available:
        raise ValueError(f"num_samples: expected at most the {available} draws that there are, got {num_samples}")


def spread(size: int, num_samples: int | None) -> Tensor:
    """Choose positions of some of ``size`` draws, spread evenly."""
    return torch.linspace(0, size - 1, num_samples or size, device="cpu").round().long()


def _as_draws(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


# Guides


class GuidePosterior(Posterior):
    """A guide of ``network.model``, or of a larger model that the network is part of.

    Args:
        guide: The guide, a function or a module.
    """

    def __init__(self, guide: Callable[..., Any]) -> None:
        self.guide = guide

    @torch.no_grad()
    def draws(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None = None) -> dict[str, Tensor]:
        x = _with_rows(network, x)
        learned = _learned_elsewhere(self.guide)
        with isolated():
            sites = NetworkSites.of(network, x)
            self._set_up(sites)
            with pyro.get_param_store().scope(learned):
                draws, _ = draw_from(self.guide, num_samples or 100, x, density=False)
                if "y" in draws:  # the guide was set up without targets, and takes them for latent
                    require_sites("guide", sites.expected, draws)
                draws = sites.computed(self.guide, draws)
            return sites.own("guide", draws)

    def _set_up(self, sites: NetworkSites) -> None:
        """Have a guide make its parameters, which depend on the model."""

    def fixed(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None) -> Posterior:
        draws = self.draws(network, x, num_samples or 1000)
        warn_if_nonlinear(network, self)
        # The draws of AutoDelta are its parameters.
        return SamplesPosterior({name: value.clone() for name, value in draws.items()}, self.method)

    def median(self, network: MixtureDensityNetwork, draws: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        guide: Any = self.guide
        if not hasattr(guide, "median"):
            raise NotImplementedError
        learned = _learned_elsewhere(guide)
        with torch.no_grad(), isolated(), pyro.get_param_store().scope(learned):
            given = {name: value.unsqueeze(0) for name, value in guide.median().items()}
            row = x.new_zeros(1, *network.input_shape)
            median = NetworkSites(network, row, draws, row).computed(guide, given)
            return {name: median[name][0].detach() for name in draws}


class AutoGuidePosterior(GuidePosterior):
    """A guide that Pyro makes from a model."""

    guide: AutoGuide

    @property
    def method(self) -> str:
        return f"SVI with {type(self.guide).__name__}"

    def _set_up(self, sites: NetworkSites) -> None:
        if self.guide.prototype_trace is None:
            with KeepFrozen():
                self.guide(sites.row, torch.zeros_like(sites.target))  # without targets, it would take y for latent


class LaplacePosterior(AutoGuidePosterior):
    """A normal around a mode, by :func:`pyro_mdn.laplace`."""

    @property
    def method(self) -> str:
        return "Laplace"

    @property
    def linear(self) -> bool:
        return True


_ADAPTERS: list[tuple[type, Callable[[Any], Posterior]]] = [
    (Posterior, lambda posterior: posterior),
    (MCMC, McmcPosterior),
    (LaplaceGuide, LaplacePosterior),
    (AutoGuide, AutoGuidePosterior),
    (Callable, GuidePosterior),  # pyright: ignore[reportAssignmentType]
    (Mapping, SamplesPosterior),
]


def _with_rows(network: MixtureDensityNetwork, x: Any) -> Tensor:
    x = network.inputs(x)
    return x if x.ndim > len(network.input_shape) else x.unsqueeze(0)


def _learned_elsewhere(guide: Any = None) -> Any:
    """Return the state of Pyro's parameter store, where SVI keeps values of ``pyro.param``.

    Names of a guide's own parameters are left out: another module may have registered values under the same names.
    """
    parts = [part for part in guide.modules() if isinstance(part, PyroModule)] if isinstance(guide, nn.Module) else []
    own = {name for part in parts for name in names_of_parameters(part)}
    state: dict[str, Any] = dict(pyro.get_param_store().get_state())
    return {kind: {name: value for name, value in held.items() if name not in own} for kind, held in state.items()}
