r"""Posterior predictive distributions: mixtures for draws of the weights from a posterior of any kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.networks.batched.functional import MixtureTensors, OwnParameters, in_parts, in_passes, over_draws
from pyro_mdn.networks.batched.layers import dense_cost, dense_raw, is_dense
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.predictor import Predictor
from pyro_mdn.posteriors.posterior import as_posterior, require_available, spread, warn_if_nonlinear
from pyro_mdn.posteriors.priors import latent_names
from pyro_mdn.support.checks import require_counts
from pyro_mdn.support.process_state import evaluating, isolated

__all__ = ["draw_weights", "posterior_predictive"]


def posterior_predictive(
    network: MixtureDensityNetwork,
    posterior: Any,
    x: Any,
    num_samples: int | None = None,
    *,
    linearize: bool | None = None,
    chunk_size: int | None = None,
) -> Mixture:
    r"""Predict the mixture over y for each draw of the weights, ``batch_shape`` ``(S, *batch)``, in the units of y.

    .. math:: p(y \mid x, w_s), \quad w_s \sim p(w \mid \text{data})

    ``.pool(0)`` is the posterior predictive distribution :math:`\frac1S \sum_s p(y \mid x, w_s)`, exactly a mixture of
    S·K components. All draws go through the network in one vectorised pass.

    :func:`pyro_mdn.laplace` assumes that the raw outputs f of the head are linear in the weights. Draws of weights in
    hidden layers are so far from the mode that the outputs are not linear there, and predictions are bad.
    ``linearize=True`` replaces the outputs of the network by those that the approximation assumes:

    .. math:: f(x, \hat w) + \nabla_w f(x, \hat w)^\top (w_s - \hat w), \quad \hat w \text{ the guide's median}

    For weights of the head alone, both are the same.

    Args:
        network: The network that the posterior is of.
        posterior: A guide of ``network.model``, as SVI or :func:`pyro_mdn.laplace` gives it; samples as
            :func:`pyro_mdn.fit_mcmc`, ``MCMC`` or ``MCMC.get_samples()`` give them, ``(S, *shape)`` by site; or a
            :class:`DeepEnsemble`. If the network is part of a larger model, its own sites count. If a model is
            reparametrised (``poutine.reparam``), an AutoGuide or ``MCMC`` has the model that computes the weights.
        x: Inputs ``(*batch, dim_in)``.
        num_samples: Number of draws; by default 100 draws from a guide, and all samples. Fewer samples are spread
            evenly over all.
        linearize: Whether to linearise the raw outputs in the weights, around the median of the guide. By default not,
            with a warning if the posterior assumes it.
        chunk_size: Number of draws in one pass; by default as many as keep intermediate results at about 16 MB, as
            measured on two rows. If one draw takes more, the rows go in parts, unless the backbone mixes rows. With
            gradients to ``x``, the results of all passes are kept. Members of an ensemble go in one pass if gradients
            to their weights are recorded: use ``torch.no_grad()`` otherwise.

    Raises:
        ValueError: If the posterior is not one of this network's, there are not as many draws, it has no median to
            linearise around, or torch.vmap cannot handle a layer.

    Warns:
        UserWarning: If a guide by :func:`pyro_mdn.laplace` has weights of hidden layers, and ``linearize`` is not said.

    References:
        Immer, Korzepa & Bauer (2021), Improving predictions of Bayesian neural nets via local linearization.

    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_mdn import bayesianize
    >>> network = bayesianize(MixtureDensityNetwork(1, 1, n_components=3))
    >>> posterior_predictive(network, AutoNormal(network.model), torch.randn(5, 1), num_samples=10).pool(0)
    GaussianMixture(batch_shape=(5,), n_components=30, dim=1, covariance=DiagonalCovariance)
    """
    require_counts(num_samples=num_samples, chunk_size=chunk_size)
    if isinstance(posterior, Predictor) and posterior.architecture is not posterior:
        if linearize:
            raise _no_median(posterior)
        require_available(num_samples, posterior.num_members)
        with evaluating(posterior):
            return posterior.members(x, spread(posterior.num_members, num_samples), chunk_size=chunk_size)
    used = as_posterior(posterior)
    with evaluating(network):
        x = network.inputs(x)
        draws = used.draws(network, x, num_samples)
        if linearize is None:
            warn_if_nonlinear(network, used)
        try:
            center = used.median(network, draws, x) if linearize else None
        except NotImplementedError as error:
            raise _no_median(posterior) from error
        return _mixtures(network, draws, x, chunk_size, center)


def _no_median(posterior: Any) -> ValueError:
    expected = "a guide with a median, such as laplace gives, to linearize around"
    return ValueError(f"posterior: expected {expected}, got {type(posterior).__name__}")


def draw_weights(
    network: MixtureDensityNetwork, posterior: Any, x: Any, num_samples: int | None = None
) -> dict[str, Tensor]:
    """Draw latent weights from a posterior, ``(S, *shape)`` by site; see :func:`posterior_predictive`."""
    return as_posterior(posterior).draws(network, x, num_samples)


def _mixtures(
    network: MixtureDensityNetwork,
    draws: Mapping[str, Tensor],
    x: Tensor,
    chunk_size: int | None,
    center: Mapping[str, Tensor] | None = None,
) -> Mixture:
    """Compute mixtures for draws of the weights, ``(S, *batch)``; with a center, by outputs linearised around it."""
    whole = chunk_size is not None or x.ndim == len(network.input_shape)

    def passes(function: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if whole:
            return over_draws(lambda weights: function(weights, x), draws, network, chunk_size=chunk_size)
        return in_passes(function, draws, x, network)

    with isolated(), torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        if center is None and not network.is_described_by_raw:

            def call(weights: dict[str, Tensor], rows: Tensor) -> Mixture:
                with OwnParameters(), poutine.condition(data=weights):
                    return network(rows)

            called = MixtureTensors(call)
            return called.mixture(*passes(called))
        if center is not None:
            raw = passes(partial(_linear, network, center))
        elif is_dense(network):
            dense, cost = partial(_dense, network), dense_cost(network, draws)
            raw = dense(draws, x, chunk_size) if whole else in_parts(dense, cost, draws, x)
        else:
            raw = passes(partial(_raw, network))
    return network.head.mixture(raw, network.head.units)


# Raw parameters of the mixtures, ``(*batch, ...)`` given weights, ``(S, *batch, ...)`` given draws


def _raw(network: MixtureDensityNetwork, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    with OwnParameters(), poutine.condition(data=weights):
        return network.raw(x)


def _linear(
    network: MixtureDensityNetwork, center: Mapping[str, Tensor], weights: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, ...]:
    at = dict(center)
    changes = {name: weights[name] - at[name] for name in at}
    # Fused attention has no derivative in forward mode. On the first such derivative, torch warns of its own functions.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", ".*torch.jit.script")  # of another category from torch 2.14 on
        values, slopes, *_ = torch.func.jvp(lambda point: _raw(network, point, x), (at,), (changes,))
    return tuple(value + slope for value, slope in zip(values, slopes, strict=True))


def _dense(
    network: MixtureDensityNetwork, draws: Mapping[str, Tensor], x: Tensor, chunk_size: int | None
) -> tuple[Tensor, ...]:
    same = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: tensor.unsqueeze(0) for name, tensor in same.items()}
    latent = {name: draws[site] for site, name in latent_names(network).items()}
    return dense_raw(network, x.unsqueeze(0), {**tensors, **latent}, chunk_size=chunk_size)
