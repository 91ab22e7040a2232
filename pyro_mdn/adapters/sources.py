r"""Sources of inference data: mixtures, the draws of the weights behind them, and the inference they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.networks.predictor import ENSEMBLE, POINT, Predictor
from pyro_mdn.posteriors.posterior import DRAWS, Posterior, as_posterior
from pyro_mdn.posteriors.predictive import posterior_predictive
from pyro_mdn.support.arrays import Array, require_columns, to_numpy
from pyro_mdn.support.process_state import evaluating

__all__ = ["ENSEMBLE", "POINT", "Source", "predict"]


class Source(NamedTuple):
    """Mixtures ``(S, N)``, draws of the weights by site ``(chains, S / chains, *shape)``, and their inference."""

    mixture: Mixture
    chains: int
    method: str
    sites: Mapping[str, Array]
    stats: Mapping[str, Array]
    scaling: Mapping[str, Any]
    network: Predictor | None
    posterior: Posterior | None

    @classmethod
    def of(cls, predictive: Any, x: Any, posterior: Any, num_samples: int | None, method: str | None) -> Source:
        """Make a source of the arguments of :func:`pyro_mdn.to_inference_data`."""
        used = None if posterior is None else as_posterior(posterior)
        if isinstance(predictive, Mixture):
            mixture, predictor, told = _by_draws(predictive), None, _method(predictive, used)
        else:
            predictor = _require_predictor(predictive)
            if used is not None:
                used = _fixed(predictor, x, used, num_samples)
            mixture = predict(predictor, x, used)
            told = predictor.inference_method if used is None else used.method
            if len(mixture.batch_shape) != 2:
                expected, shape = "(N,) for each draw of the weights", tuple(mixture.batch_shape[1:])
                raise ValueError(f"predictive: expected mixtures of batch shape {expected}, got {shape}")
        chains, sites, stats = (1, {}, {}) if used is None else (used.chains, used.sites(), used.statistics())
        draws = mixture.batch_shape[0]
        counts = {tuple(value.shape[:2]) for value in sites.values()}
        if counts - {(chains, draws // chains)} or draws % chains:
            raise ValueError(f"posterior: expected {draws} draws, as many as mixtures, got {counts}")
        given = told if method is None else str(method)
        return cls(mixture, chains, given, _arrays(sites), _arrays(stats), _scaling(predictor), predictor, used)

    @property
    def is_posterior(self) -> bool:
        """Whether each mixture belongs to one draw from a posterior."""
        return self.method not in (POINT, ENSEMBLE) and self.mixture.batch_shape[0] > 1


def predict(predictor: Predictor, x: Any, posterior: Posterior | None) -> Mixture:
    """Predict mixtures ``(S, N)`` by draws of the weights or by members; a network alone predicts one for each row."""
    inputs = _inputs(predictor, x)
    with torch.no_grad(), evaluating(predictor):
        if posterior is not None:
            return posterior_predictive(predictor.architecture, posterior, inputs)
        if predictor.latent:
            raise ValueError("posterior: expected one for a network with latent weights, got none")
        return predictor.members(inputs)


def _require_predictor(value: Any) -> Predictor:
    if not isinstance(value, Predictor):
        expected = "a Mixture, a network or an ensemble"
        raise ValueError(f"predictive: expected {expected}, got {type(value).__name__}")
    return value


def _inputs(predictor: Predictor, x: Any) -> Tensor:
    if x is None:
        raise ValueError("x: expected the inputs that the network predicts from, got none")
    require_columns(predictor.architecture.input_names, x, "x")
    return predictor.architecture.as_numbers(x, device=next(predictor.buffers()).device)


def _fixed(predictor: Predictor, x: Any, posterior: Posterior, num_samples: int | None) -> Posterior:
    """Fix the draws of a posterior, so that the same weights predict everywhere."""
    network = predictor.architecture
    if network is not predictor:
        raise ValueError(f"posterior: expected none for several members, got {posterior.method}")
    inputs = _inputs(network, x)
    with evaluating(network):
        return posterior.fixed(network, inputs, num_samples)


def _by_draws(mixture: Mixture) -> Mixture:
    """Give mixtures ``(N,)`` an axis of draws, of size 1."""
    if len(mixture.batch_shape) not in (1, 2):
        shape = tuple(mixture.batch_shape)
        raise ValueError(f"predictive: expected mixtures of batch shape (N,) or (S, N), got {shape}")
    return mixture if len(mixture.batch_shape) == 2 else mixture.expand((1, *mixture.batch_shape))


def _method(mixture: Mixture, posterior: Posterior | None) -> str:
    """Name the inference that mixtures come from."""
    if posterior is not None and posterior.method != DRAWS:
        return posterior.method
    return POINT if len(mixture.batch_shape) == 1 else DRAWS


def _scaling(predictor: Predictor | None) -> dict[str, Any]:
    """Describe how a network, or the first of several members, standardises inputs and targets."""
    if predictor is None:
        return {}
    network = predictor.architecture
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
