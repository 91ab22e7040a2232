r"""Sources: mixtures, draws of the weights behind them and how they came about, from what users have of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.posteriors.guide_draws import LaplaceGuide
from pyro_mdn.posteriors.mcmc import PosteriorSamples
from pyro_mdn.posteriors.predictive import draw_weights, posterior_predictive, warn_if_nonlinear
from pyro_mdn.support.arrays import Array, as_tensor, to_numpy
from pyro_mdn.support.evaluation_mode import evaluating

__all__ = ["ENSEMBLE", "POINT", "Source", "predict"]

POINT, ENSEMBLE = "point estimate", "ensemble"


class Source(NamedTuple):
    """Mixtures ``(S, N)``, draws by site ``(chains, S / chains, *shape)``, and what is known about them."""

    mixture: GaussianMixture
    chains: int
    method: str
    sites: Mapping[str, Array]
    stats: Mapping[str, Array]
    scaling: Mapping[str, Any]
    network: Any
    posterior: Any

    @classmethod
    def of(cls, predictive: Any, x: Any, posterior: Any, num_samples: int | None, method: str | None) -> Source:
        """From the arguments of :func:`pyro_mdn.to_inference_data`."""
        network = None if isinstance(predictive, GaussianMixture) else predictive
        used = posterior if network is None else _drawn(network, x, posterior, num_samples)
        sites, stats = _posterior_sites(used)
        mixture = predictive if network is None else predict(network, x, used)
        given = _method(network, mixture, posterior) if method is None else str(method)
        drawn = used is not None or isinstance(network, DeepEnsemble)
        if len(mixture.batch_shape) not in ((1, 2) if network is None else (1 + drawn,)):
            expected = "(N,) or (S, N)" if network is None else "(N,) for each draw of the weights"
            shape = tuple(mixture.batch_shape[network is not None and drawn :])
            raise ValueError(f"predictive: expected mixtures of batch shape {expected}, got {shape}")
        mixture = mixture.expand((1, *mixture.batch_shape)) if len(mixture.batch_shape) == 1 else mixture
        counts = {value.shape[:2] for value in sites.values()} or {(1, mixture.batch_shape[0])}
        if len(counts) > 1 or math.prod(shape := next(iter(counts))) != mixture.batch_shape[0]:
            raise ValueError(f"posterior: expected {mixture.batch_shape[0]} draws, as many as mixtures, got {counts}")
        scaling = _scaling(network.stacked if isinstance(network, DeepEnsemble) else network)
        return cls(mixture, shape[0], given, sites, stats, scaling, network, used)

    @property
    def is_posterior(self) -> bool:
        """Whether the mixtures are by draws from a posterior, so that each stands for one."""
        return self.method not in (POINT, ENSEMBLE) and self.mixture.batch_shape[0] > 1


def predict(network: Any, x: Any, posterior: Any) -> GaussianMixture:
    """Mixtures ``(N,)``, or ``(S, N)`` by draws of the weights or by members, at inputs of any kind."""
    inputs = _inputs(network, x)
    with torch.no_grad(), evaluating(network):
        if isinstance(network, DeepEnsemble):
            return network.members(inputs)
        if posterior is not None:
            return posterior_predictive(network, posterior, inputs)
        if network.latent:
            raise ValueError("posterior: expected one for a network with latent weights, got none")
        return network(inputs)


def _inputs(network: Any, x: Any) -> Tensor:
    if not isinstance(network, MixtureDensityNetwork | DeepEnsemble):
        expected = "a GaussianMixture, a network or an ensemble"
        raise ValueError(f"predictive: expected {expected}, got {type(network).__name__}")
    if x is None:
        raise ValueError("x: expected the inputs that the network predicts from, got none")
    return as_tensor(x, "x", next(network.buffers()).device)


def _drawn(network: Any, x: Any, posterior: Any, num_samples: int | None) -> Any:
    """Draws from a guide, so that the same weights predict everywhere; any other posterior as it is.

    Draws by site may come from ``Predictive``, with dimensions for plates and with observations, which are not draws of
    a posterior. Sites of a larger model stay.
    """
    if isinstance(posterior, Mapping) and isinstance(network, MixtureDensityNetwork):
        with evaluating(network):
            weights = draw_weights(network, posterior, _inputs(network, x))
        return {**{name: value for name, value in posterior.items() if name != "y"}, **weights}
    if posterior is None or isinstance(posterior, MCMC) or not callable(posterior):
        return posterior
    inputs = _inputs(network, x)
    with evaluating(network):
        draws = draw_weights(network, posterior, inputs, num_samples or 1000)
    warn_if_nonlinear(network, posterior)
    return {name: value.clone() for name, value in draws.items()}  # those of AutoDelta are its parameters


def _method(network: Any, mixture: GaussianMixture, posterior: Any) -> str:
    if isinstance(network, DeepEnsemble):
        return ENSEMBLE
    if isinstance(posterior, PosteriorSamples | MCMC):
        return "MCMC"
    if isinstance(posterior, LaplaceGuide):
        return "Laplace"
    if isinstance(posterior, AutoGuide):
        return f"SVI with {type(posterior).__name__}"
    return POINT if len(mixture.batch_shape) == 1 else "draws from a posterior"


def _posterior_sites(posterior: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws ``(chains, draws, *shape)`` by site, and statistics of the sampler."""
    if isinstance(posterior, PosteriorSamples):
        stats = {"lp": posterior.log_joint, "diverging": posterior.diverging}
        return _arrays(posterior.samples), _arrays(stats)
    if isinstance(posterior, MCMC):
        sites = _arrays(posterior.get_samples(group_by_chain=True))
        shape = next(iter(sites.values())).shape[:2]
        diverging = np.zeros(shape, dtype=bool)
        found = posterior.diagnostics().get("divergences", {})
        for chain, positions in enumerate(found.values()):
            diverging[chain, list(positions)] = True
        return sites, {"diverging": diverging}
    if isinstance(posterior, Mapping):
        return {name: value[None] for name, value in _arrays(posterior).items()}, {}
    if posterior is None or callable(posterior):
        return {}, {}
    expected = "a guide, draws by site, PosteriorSamples or MCMC"
    raise ValueError(f"posterior: expected {expected}, got {type(posterior).__name__}")


def _scaling(network: Any) -> dict[str, Any]:
    """How the network standardises inputs and targets; of an ensemble, for its first member."""
    if network is None:
        return {}
    buffers = {
        "x_shift": network.x_shift,
        "x_scale": network.x_scale,
        "y_shift": network.head.shift,
        "y_scale": network.head.scale,
    }
    stacked = network.head.shift.ndim > 1
    return {name: to_numpy(value[0] if stacked else value).ravel().tolist() for name, value in buffers.items()}


def _arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    return {str(name): to_numpy(value) for name, value in values.items()}
