r"""Predictive mixtures given draws of the weights from a posterior of any kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.networks.batched.functional import MixtureTensors, OwnParameters, in_parts, in_passes, over_draws
from pyro_mdn.networks.batched.layers import dense_cost, dense_raw, is_dense
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork, evaluating
from pyro_mdn.posteriors.guide_draws import LaplaceGuide, draw_from, latent_sites, require_sites
from pyro_mdn.posteriors.priors import latent_names, site_name
from pyro_mdn.support.checks import require_counts
from pyro_mdn.support.process_state import KeepFrozen, isolated, own_generators
from pyro_mdn.support.pyro_compat import has_lost_model, names_of_parameters

__all__ = ["draw_weights", "posterior_predictive", "warn_if_nonlinear"]


def posterior_predictive(
    network: MixtureDensityNetwork,
    posterior: Any,
    x: Any,
    num_samples: int | None = None,
    *,
    linearize: bool | None = None,
    chunk_size: int | None = None,
) -> GaussianMixture:
    r"""Mixture over y for each draw of the weights, ``batch_shape`` ``(S, *batch)``, in the units of y.

    .. math:: p(y \mid x, w_s), \quad w_s \sim p(w \mid \text{data})

    ``.pool(0)`` is the predictive distribution :math:`\frac1S \sum_s p(y \mid x, w_s)`, exactly a mixture of S·K
    components. All draws go through the network in one vectorised pass.

    :func:`pyro_mdn.laplace` takes the raw outputs f of the head to be linear in the weights. Draws of weights in
    hidden layers go so far that they are not, and predict badly; ``linearize=True`` has the outputs that the
    approximation is about, in place of those of the network:

    .. math:: f(x, \hat w) + \nabla_w f(x, \hat w)^\top (w_s - \hat w), \quad \hat w \text{ the guide's median}

    For weights of the head alone the two are the same.

    Args:
        network: The network that the posterior is of.
        posterior: A guide of ``network.model``, as SVI or :func:`pyro_mdn.laplace` gives it; samples as
            :func:`pyro_mdn.fit_mcmc`, ``MCMC`` or ``MCMC.get_samples()`` give them, ``(S, *shape)`` by site; or a
            :class:`DeepEnsemble`. Of a larger model that the network is part of, its own sites count. Of a
            reparametrised one (``poutine.reparam``), an AutoGuide or ``MCMC`` has the model that computes the weights.
        x: Inputs ``(*batch, dim_in)``.
        num_samples: Number of draws; by default 100 of a guide, and all of samples. Fewer of samples are spread
            evenly over them.
        linearize: Whether the raw outputs are linear in the weights, around the median of the guide. By default not,
            with a warning where they should be.
        chunk_size: Draws in one pass; by default as many as keep intermediate results at about 16 MB, which is measured
            on two rows, and where one draw takes more, parts of the rows one after another. A backbone that mixes rows
            has all of them at once, and with gradients to ``x`` the results of all passes are kept. Members of an
            ensemble go at once where there are gradients to their weights: use ``torch.no_grad()`` otherwise.

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
    if linearize and not hasattr(posterior, "median"):
        raise _no_median(posterior)
    if isinstance(posterior, DeepEnsemble):
        _require_samples(num_samples, posterior.size)
        with evaluating(posterior):
            return posterior.members(x, _spread(posterior.size, num_samples), chunk_size=chunk_size)
    with evaluating(network):
        x = network.inputs(x)
        draws = draw_weights(network, posterior, x, num_samples)
        if linearize is None:
            warn_if_nonlinear(network, posterior)
        center = _median(network, posterior, draws, x) if linearize else None
        return _mixtures(network, draws, x, chunk_size, center)


def warn_if_nonlinear(network: MixtureDensityNetwork, posterior: Any) -> None:
    """Warn if weights of hidden layers are latent, and the posterior takes outputs to be linear in them."""
    if isinstance(posterior, LaplaceGuide) and not all(n.startswith("head.") for n in latent_names(network).values()):
        message = "Laplace's approximation of hidden layers predicts badly unless linearize=True"
        warnings.warn(f"posterior_predictive: {message}; linearize=False to go on", stacklevel=3)


@torch.no_grad()
def draw_weights(
    network: MixtureDensityNetwork, posterior: Any, x: Any, num_samples: int | None = None
) -> dict[str, Tensor]:
    """Draws of the latent weights from a posterior, ``(S, *shape)`` by site; see :func:`posterior_predictive`."""
    x = network.inputs(x)
    learned = _learned_elsewhere(posterior)
    with isolated():
        if not network.latent:
            raise ValueError("network: expected latent weights, got none: see bayesianize")
        x = x if x.ndim > len(network.input_shape) else x.unsqueeze(0)
        row = x.new_zeros(1, *x.shape[1:])
        expected = _latent_values(network.model, row)
        predicted = expected.pop("y")
        if callable(posterior) and not isinstance(posterior, MCMC):
            if isinstance(posterior, AutoGuide) and posterior.prototype_trace is None:
                with KeepFrozen():
                    posterior(row, torch.zeros_like(predicted))  # it takes for latent what is not given
            with pyro.get_param_store().scope(learned):
                draws, _ = draw_from(posterior, num_samples or 100, x, density=False)
                if "y" in draws:  # the guide was set up without targets, and takes them for latent
                    require_sites("guide", expected, draws)
                draws = _at_own_sites(network, posterior, draws, expected, row)
            return _of_network("guide", network, expected, draws)
    samples = posterior.get_samples() if hasattr(posterior, "get_samples") else posterior
    if not isinstance(samples, Mapping):
        kinds = "a guide, samples by site, MCMC or a DeepEnsemble"
        raise ValueError(f"posterior: expected {kinds}, got {type(posterior).__name__}")
    samples = {name: _as_draws(value) for name, value in samples.items()}
    if isinstance(posterior, MCMC):
        with isolated(), pyro.get_param_store().scope(learned):
            samples = _at_own_sites(network, posterior.kernel, samples, expected, row)
    others = sorted(n for n in samples.keys() - expected.keys() if n.startswith(tuple(f"{name}_" for name in expected)))
    if others and not samples.keys() >= expected.keys():
        wanted = f"draws of the weights, as Predictive(model, samples, return_sites={sorted(expected)}) gives them"
        raise ValueError(f"posterior: expected {wanted}, got those of a reparametrised model: {others}")
    return _chosen(_of_network("posterior", network, expected, samples), expected, num_samples)


def _at_own_sites(
    network: MixtureDensityNetwork, owner: Any, draws: Mapping[str, Tensor], wanted: Iterable[str], x: Tensor
) -> dict[str, Tensor]:
    """Draws with those at sites of the network besides that a reparametrised model computes from them.

    Args:
        network: The network.
        owner: What has the model that the draws are of, as AutoGuides and kernels of MCMC do.
        draws: Draws ``(S, *shape)`` by site.
        wanted: Sites of the network.
        x: What to call the model with; weights do not depend on it.
    """
    missing = {*wanted} - draws.keys()
    # A guide that was pickled has lost its model.
    model = getattr(owner, "model", None) if missing and not has_lost_model(owner) else None
    if not callable(model):
        return dict(draws)
    names: list[str] = []

    def compute(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with KeepFrozen(), OwnParameters(), _WithoutStart():
            sites: dict[str, Any] = dict(poutine.trace(poutine.condition(model, data=given)).get_trace(x).nodes)
        # What is drawn is not observed: the posterior says nothing of it.
        names[:] = (name for name in sorted(missing) if name in sites and sites[name]["is_observed"])
        return tuple(sites[name]["value"] for name in names)

    # The first draw comes twice: what differs then is drawn behind ``poutine.block``, and no draw from the posterior.
    given = {name: torch.cat([value, value[:1]]).to(x.device) for name, value in draws.items()}
    with evaluating(network):
        computed = dict(zip(names, over_draws(compute, given, network), strict=True))
    same = {name: value[:-1] for name, value in computed.items() if torch.allclose(value[0], value[-1])}
    return {**draws, **same}


class _WithoutStart(Messenger):
    """Have weights computed from their draws: the model of an AutoGuide has those that the guide starts from first."""

    def _pyro_get_init_messengers(self, msg: Any) -> None:
        msg["value"] = []


def _learned_elsewhere(guide: Any) -> Any:
    """State of Pyro's parameter store, where SVI puts what ``pyro.param`` made, but for a module's own parameters.

    Another module may have left values of the same names.
    """
    parts = [part for part in guide.modules() if isinstance(part, PyroModule)] if isinstance(guide, nn.Module) else []
    own = {name for part in parts for name in names_of_parameters(part)}
    state: dict[str, Any] = dict(pyro.get_param_store().get_state())
    return {kind: {name: value for name, value in held.items() if name not in own} for kind, held in state.items()}


def _chosen(
    samples: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_samples: int | None
) -> dict[str, Tensor]:
    counts = {len(value) for value in samples.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"posterior: expected as many draws of each site, got {sorted(counts)}")
    _require_samples(num_samples, size := counts.pop())
    if num_samples in (None, size):
        return {name: value.to(expected[name]) for name, value in samples.items()}
    chosen = _spread(size, num_samples)
    return {name: value[chosen.to(value.device)].to(expected[name]) for name, value in samples.items()}


def _median(
    network: MixtureDensityNetwork, posterior: Any, draws: Mapping[str, Tensor], x: Tensor
) -> dict[str, Tensor]:
    """Median of a guide that was set up, by site of the network."""
    learned = _learned_elsewhere(posterior)
    try:
        with torch.no_grad(), isolated(), pyro.get_param_store().scope(learned):
            given = {name: value.unsqueeze(0) for name, value in posterior.median().items()}
            median = _at_own_sites(network, posterior, given, draws, x.new_zeros(1, *network.input_shape))
            return {name: median[name][0].detach() for name in draws}
    except NotImplementedError as error:
        raise _no_median(posterior) from error


def _no_median(posterior: Any) -> ValueError:
    expected = "a guide with a median, such as laplace gives, to linearize around"
    return ValueError(f"posterior: expected {expected}, got {type(posterior).__name__}")


def _mixtures(
    network: MixtureDensityNetwork,
    draws: Mapping[str, Tensor],
    x: Tensor,
    chunk_size: int | None,
    center: Mapping[str, Tensor] | None = None,
) -> GaussianMixture:
    """Mixtures given weights, ``(S, *batch)``; with a center, by outputs that are linear in the weights around it."""
    whole = chunk_size is not None or x.ndim == len(network.input_shape)

    def passes(function: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if whole:
            return over_draws(lambda weights: function(weights, x), draws, network, chunk_size=chunk_size)
        return in_passes(function, draws, x, network)

    with isolated(), torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        if center is None and not network.is_described_by_raw:

            def call(weights: dict[str, Tensor], rows: Tensor) -> GaussianMixture:
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
    logits, locs, noise = raw
    return network.head.mixture((logits, locs, noise), network.head.shift, network.head.scale)


# Raw parameters of the mixtures, ``(*batch, ...)`` given weights, ``(S, *batch, ...)`` given draws


def _raw(network: MixtureDensityNetwork, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    with OwnParameters(), poutine.condition(data=weights):
        return network.raw(x)


def _linear(
    network: MixtureDensityNetwork, center: Mapping[str, Tensor], weights: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, ...]:
    at = dict(center)
    changes = {name: weights[name] - at[name] for name in at}
    # Fused attention has no derivative in forward mode, at the first of which torch warns of what it uses itself.
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


# Sites


def _latent_values(model: Callable[..., Any], x: Tensor) -> dict[str, Tensor]:
    """Values of the latent sites of a model, drawn from the prior, by name."""
    with own_generators():
        trace = poutine.trace(model).get_trace(x)
    return {name: site["value"] for name, site in latent_sites(trace).items()}


def _of_network(
    name: str, network: MixtureDensityNetwork, expected: Mapping[str, Tensor], draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Draws ``(S, *shape)`` at the sites of a network; a larger model that it is part of may have further ones.

    Raises:
        ValueError: If one is missing, of another shape, or of what is not latent in the network.
    """
    # As Predictive gives them: observations are among them, and there are dimensions of 1 for the plates of the model.
    draws = {site: _without_plates(value, expected.get(site)) for site, value in draws.items() if site != "y"}
    given = {*(site_name(network, parameter) for parameter, _ in network.named_parameters())}
    if not draws.keys() >= expected.keys() or not given.isdisjoint(draws):
        require_sites(name, expected, draws)
    for site, value in expected.items():
        if draws[site].shape[1:] != value.shape:
            wanted, got = tuple(value.shape), tuple(draws[site].shape[1:])
            raise ValueError(f"{name}: expected shape {wanted} at site {site}, got {got}")
    return {site: draws[site] for site in expected}


def _without_plates(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None or value.shape[1:] == like.shape:
        return value
    plates, shape = value.shape[1 : value.ndim - like.ndim], value.shape[value.ndim - like.ndim :]
    return value.reshape(len(value), *like.shape) if set(plates) == {1} and shape == like.shape else value


def _as_draws(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _require_samples(num_samples: int | None, available: int) -> None:
    if num_samples is not None and num_samples > available:
        raise ValueError(f"num_samples: expected at most the {available} draws that there are, got {num_samples}")


def _spread(size: int, num_samples: int | None) -> Tensor:
    """Positions of so many draws, spread evenly."""
    return torch.linspace(0, size - 1, num_samples or size, device="cpu").round().long()
