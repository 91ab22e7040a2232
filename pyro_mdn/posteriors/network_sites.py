r"""Sites of the latent weights of a network, and draws at these sites from draws of a larger or other model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_mdn.networks.batched.functional import OwnParameters, over_draws
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.posteriors.guide_draws import latent_sites, require_sites
from pyro_mdn.posteriors.priors import site_name
from pyro_mdn.support.process_state import KeepFrozen, evaluating, own_generators
from pyro_mdn.support.pyro_compat import has_lost_model

__all__ = ["NetworkSites"]


@dataclass(frozen=True)
class NetworkSites:
    """Latent sites of ``network.model``.

    Attributes:
        network: The network.
        row: One row of inputs to call the model with; weights do not depend on it.
        expected: Values of the latent sites, drawn from the prior, by name.
        target: A value of y for the row.
    """

    network: MixtureDensityNetwork
    row: Tensor
    expected: Mapping[str, Tensor]
    target: Tensor

    @classmethod
    def of(cls, network: MixtureDensityNetwork, x: Tensor) -> NetworkSites:
        """Run the model once, on a row like those of inputs ``(N, ...)``.

        Raises:
            ValueError: If there are no latent weights.
        """
        if not network.latent:
            raise ValueError("network: expected latent weights, got none: see bayesianize")
        row = x.new_zeros(1, *x.shape[1:])
        with own_generators():
            trace = poutine.trace(network.model).get_trace(row)
        values = {name: site["value"] for name, site in latent_sites(trace).items()}
        return cls(network, row, values, values.pop("y"))

    def computed(self, owner: Any, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add to draws the values at sites of the network that a reparametrised model computes from them.

        Args:
            owner: AutoGuide or kernel of MCMC, whose ``model`` the draws belong to.
            draws: Draws ``(S, *shape)`` by site.
        """
        missing = {*self.expected} - draws.keys()
        model = getattr(owner, "model", None) if missing and not has_lost_model(owner) else None
        if not callable(model):
            return dict(draws)
        # The first draw comes twice: what differs then is drawn anew behind ``poutine.block``, not from the posterior.
        twice = {name: torch.cat([value, value[:1]]).to(self.row.device) for name, value in draws.items()}
        values = self._run(model, twice, missing)
        same = {name: value[:-1] for name, value in values.items() if torch.allclose(value[0], value[-1])}
        return {**draws, **same}

    def _run(self, model: Callable[..., Any], draws: Mapping[str, Tensor], missing: set[str]) -> dict[str, Tensor]:
        """Values that a model computes at missing sites, given draws at others."""
        names: list[str] = []

        def compute(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with KeepFrozen(), OwnParameters(), _WithoutStart():
                trace = poutine.trace(poutine.condition(model, data=given)).get_trace(self.row)
            sites: dict[str, Any] = dict(trace.nodes)
            # What is drawn is not observed: the posterior says nothing of it.
            names[:] = (name for name in sorted(missing) if name in sites and sites[name]["is_observed"])
            return tuple(sites[name]["value"] for name in names)

        with evaluating(self.network):
            values = over_draws(compute, draws, self.network)
        return dict(zip(names, values, strict=True))

    def own(self, name: str, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select the draws ``(S, *shape)`` at the sites of the network; a larger model may have further sites.

        Args:
            name: Name of the posterior in errors.
            draws: Draws by site, perhaps as ``Predictive`` gives them: observations are among them, and there are
                dimensions of 1 for the plates of the model.

        Raises:
            ValueError: If a site is missing, has another shape, or is not latent in the network.
        """
        expected, network = self.expected, self.network
        draws = {site: _without_plates(value, expected.get(site)) for site, value in draws.items() if site != "y"}
        given = {*(site_name(network, parameter) for parameter, _ in network.named_parameters())}
        if not draws.keys() >= expected.keys() or not given.isdisjoint(draws):
            require_sites(name, expected, draws)
        for site, value in expected.items():
            if draws[site].shape[1:] != value.shape:
                wanted, got = tuple(value.shape), tuple(draws[site].shape[1:])
                raise ValueError(f"{name}: expected shape {wanted} at site {site}, got {got}")
        return {site: draws[site] for site in expected}

    def require_weights(self, samples: Mapping[str, Tensor]) -> None:
        """Raise a ``ValueError`` if samples are those of a reparametrised model instead of the weights."""
        names, roots = samples.keys() - self.expected.keys(), tuple(f"{name}_" for name in self.expected)
        others = sorted(name for name in names if name.startswith(roots))
        if others and not samples.keys() >= self.expected.keys():
            sites = sorted(self.expected)
            wanted = f"draws of the weights, as Predictive(model, samples, return_sites={sites}) gives them"
            raise ValueError(f"posterior: expected {wanted}, got those of a reparametrised model: {others}")


class _WithoutStart(Messenger):
    """Make an AutoGuide's model compute weights from draws; it would return the values that the guide starts from."""

    def _pyro_get_init_messengers(self, msg: Any) -> None:
        msg["value"] = []


def _without_plates(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None or value.shape[1:] == like.shape:
        return value
    plates, shape = value.shape[1 : value.ndim - like.ndim], value.shape[value.ndim - like.ndim :]
    return value.reshape(len(value), *like.shape) if set(plates) == {1} and shape == like.shape else value
