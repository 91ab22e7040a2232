r"""Latent weights: priors on them, and predictive mixtures given draws from a posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_mdn.checks import require_counts, require_numbers
from pyro_mdn.dense import dense_raw, is_dense
from pyro_mdn.ensemble import DeepEnsemble
from pyro_mdn.guides import LaplaceGuide, draw_from, latent_sites, require_sites
from pyro_mdn.head import starting_value
from pyro_mdn.mixture import GaussianMixture
from pyro_mdn.network import MixtureDensityNetwork, evaluating
from pyro_mdn.vectorized import OwnParameters, isolated, over_draws

__all__ = ["bayesianize", "draw_weights", "fan_in_normal", "posterior_predictive", "starting_weights"]

Prior = Callable[[str, Tensor], Any]

_ELEMENTS = 2**22  # of intermediate results in one vectorised pass: beyond a cache it gets slower


def bayesianize(
    network: MixtureDensityNetwork,
    prior_scale: float = 1.0,
    *,
    layers: str | Sequence[str] = "all",
    prior: dist.Distribution | Prior | None = None,
) -> MixtureDensityNetwork:
    r"""Make parameters of a network latent: ``PyroSample`` sites of ``network.model``, in place.

    .. math:: W_{ij} \sim \mathcal{N}(0, s^2 / n_\text{in}), \quad b_i \sim \mathcal{N}(0, s^2)

    so that the prior over functions has a limit as layers get wider (Neal, 1996). The values that the parameters
    had stay as buffers ``weight_start`` and so on: inference starts from them.

    Args:
        network: The network. Train it first, and inference starts from there.
        prior_scale: Prior scale s.
        layers: ``"all"``, ``"head"``, or names of parameters or of modules, as ``network.named_parameters()`` has
            them.
        prior: In place of the normal: a distribution for each entry, or a function from a parameter's name and
            value to a distribution with its shape as event shape.

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
    with torch.random.fork_rng():
        for name, value in names.items():
            distribution = _of_pyro(make(name, value.detach()))
            shape, dtype = distribution.event_shape, distribution.sample().dtype
            if (shape, dtype) != (value.shape, value.dtype) or distribution.batch_shape:
                expected = f"event shape {tuple(value.shape)} and {value.dtype} for {name}"
                got = f"{tuple(shape)} and {dtype}, and batch shape {tuple(distribution.batch_shape)}"
                raise ValueError(f"prior: expected {expected}, got {got}")
    for part in sorted({name.split(".")[0] for name in names if "." in name}):
        # As a whole: parts that are put in again one by one change their order in nn.Sequential.
        to_pyro_module_(child := network.get_submodule(part))
        setattr(network, part, child)
    for name in names:
        _make_latent(network, name, make)
    return network


@dataclass(frozen=True)
class fan_in_normal:
    """Normal prior whose scale falls with the number of inputs; see :func:`bayesianize`.

    >>> fan_in_normal(2.0)("weight", torch.zeros(3, 16)).base_dist.stddev.unique()
    tensor([0.5000])
    """

    scale: float

    def __call__(self, name: str, value: Tensor) -> dist.TorchDistribution:
        """Prior of a parameter, given its name and value."""
        fan_in = value[0].numel() if value.ndim > 1 else 1
        return dist.Normal(torch.zeros_like(value), self.scale / math.sqrt(fan_in)).to_event(value.ndim)


def starting_weights(network: MixtureDensityNetwork) -> dict[str, Tensor]:
    """Values that the latent parameters had before they became so, by the name of their site.

    ``init_to_value(values=starting_weights(network))`` is an ``init_loc_fn`` for AutoGuides.
    """
    values = {}
    for path, part in network.named_modules():
        for leaf in getattr(part, "_pyro_samples", ()):  # a backbone may have buffers of such names of its own
            if (value := part._buffers.get(f"{leaf}_start")) is not None:
                values[f"{path}.{leaf}".removeprefix(".")] = value
    return values


def posterior_predictive(
    network: MixtureDensityNetwork,
    posterior: Any,
    x: Tensor,
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
            :class:`DeepEnsemble`.
        x: Inputs ``(*batch, dim_in)``.
        num_samples: Number of draws; by default 100 of a guide, and all of samples. Fewer of samples are spread
            evenly over them.
        linearize: Whether the raw outputs are linear in the weights, around the median of the guide. By default not,
            with a warning where they should be.
        chunk_size: Draws in one pass; by default as many as keep intermediate results at about 16 MB.

    Raises:
        ValueError: If the posterior is not one of this network's, there are not as many draws, it has no median to
            linearise around, or torch.vmap cannot handle a layer.

    Warns:
        UserWarning: If a guide by :func:`pyro_mdn.laplace` has weights of hidden layers, and ``linearize`` is not said.

    References:
        Immer, Korzepa & Bauer (2021), Improving predictions of Bayesian neural nets via local linearization.

    >>> from pyro.infer.autoguide import AutoNormal
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
            return posterior.members(x, _spread(posterior.size, num_samples))
    with evaluating(network):
        draws = draw_weights(network, posterior, x, num_samples)
        if linearize is None and isinstance(posterior, LaplaceGuide) and not all(n.startswith("head.") for n in draws):
            message = "Laplace's approximation of hidden layers predicts badly unless linearize=True"
            warnings.warn(f"posterior_predictive: {message}; linearize=False to go on", stacklevel=2)
        center = _median(posterior, draws) if linearize else None
        return _mixtures(network, draws, x, chunk_size, center)


@torch.no_grad()
def draw_weights(
    network: MixtureDensityNetwork, posterior: Any, x: Tensor, num_samples: int | None = None
) -> dict[str, Tensor]:
    """Draws of the latent weights from a posterior, ``(S, *shape)`` by site; see :func:`posterior_predictive`."""
    network.check_inputs(x)
    store = pyro.get_param_store().get_state()
    with isolated():
        if not network.latent:
            raise ValueError("network: expected latent weights, got none: see bayesianize")
        x = x if x.ndim > len(network.input_shape) else x.unsqueeze(0)
        row = x.new_zeros(1, *x.shape[1:])
        expected = _latent_values(network.model, row)
        predicted = expected.pop("y")
        if callable(posterior) and not isinstance(posterior, MCMC):
            if isinstance(posterior, AutoGuide) and posterior.prototype_trace is None:
                posterior(row, torch.zeros_like(predicted))  # it takes for latent what is not given
            # What is no PyroModule has its parameters in the store, where SVI put them.
            with pyro.get_param_store().scope(None if isinstance(posterior, PyroModule) else store):
                draws, _ = draw_from(posterior, num_samples or 100, x, density=False)
            _require_alike("guide", expected, draws)
            return draws
    samples = posterior.get_samples() if hasattr(posterior, "get_samples") else posterior
    if not isinstance(samples, Mapping):
        kinds = "a guide, samples by site, MCMC or a DeepEnsemble"
        raise ValueError(f"posterior: expected {kinds}, got {type(posterior).__name__}")
    return _from_samples(samples, expected, num_samples)


def _from_samples(
    samples: Mapping[str, Any], expected: Mapping[str, Tensor], num_samples: int | None
) -> dict[str, Tensor]:
    samples = {name: torch.as_tensor(value) for name, value in samples.items()}
    _require_alike("posterior", expected, samples)
    counts = {len(value) for value in samples.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"posterior: expected as many draws of each site, got {sorted(counts)}")
    _require_samples(num_samples, size := counts.pop())
    chosen = _spread(size, num_samples)
    return {name: value[chosen.to(value.device)].to(expected[name]) for name, value in samples.items()}


def _median(posterior: Any, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Median of a guide that was set up, by site."""
    try:
        with torch.no_grad():
            median = posterior.median()
            return {name: median[name].detach() for name in draws}
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
    if chunk_size is None:
        rows = x.numel() // math.prod(network.input_shape)
        weights = sum(value[0].numel() for value in draws.values())
        chunk_size = max(1, _ELEMENTS // (weights + rows * (2 * sum(network.hidden_dim) + 4 * sum(network.head.sizes))))
    with isolated(), torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        raw = _raw(network, draws, x, chunk_size, center)
    return network.head.mixture(raw, network.head.shift, network.head.scale)


def _raw(
    network: MixtureDensityNetwork,
    draws: Mapping[str, Tensor],
    x: Tensor,
    chunk_size: int,
    center: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw parameters of the mixtures, ``(S, *batch, ...)``."""
    if center is None and is_dense(network):
        same = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        tensors = {name: tensor.unsqueeze(0) for name, tensor in same.items()}
        return dense_raw(network, x.unsqueeze(0), {**tensors, **draws}, chunk_size=chunk_size)

    def raw(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with OwnParameters(), poutine.condition(data=weights):
            return network.raw(x)

    def linear(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        at = dict(center or {})
        values, changes, *_ = torch.func.jvp(raw, (at,), ({name: weights[name] - at[name] for name in at},))
        return tuple(value + change for value, change in zip(values, changes, strict=True))

    if center is None:
        logits, locs, noise = over_draws(raw, draws, network, chunk_size=chunk_size)
        return logits, locs, noise
    # Fused attention has no derivative in forward mode, at the first of which torch warns of what it uses itself.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)
        logits, locs, noise = over_draws(linear, draws, network, chunk_size=chunk_size)
    return logits, locs, noise


# Sites


def _latent_values(model: Callable[..., Any], x: Tensor) -> dict[str, Tensor]:
    """Values of the latent sites of a model, drawn from the prior, by name."""
    with torch.random.fork_rng():
        trace = poutine.trace(model).get_trace(x)
    return {name: site["value"] for name, site in latent_sites(trace).items()}


def _require_alike(name: str, expected: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` unless these are draws ``(S, *shape)`` at the same sites."""
    require_sites(name, expected, draws)
    for site, value in expected.items():
        if draws[site].shape[1:] != value.shape:
            wanted, got = tuple(value.shape), tuple(draws[site].shape[1:])
            raise ValueError(f"{name}: expected shape {wanted} at site {site}, got {got}")


def _require_samples(num_samples: int | None, available: int) -> None:
    if num_samples is not None and num_samples > available:
        raise ValueError(f"num_samples: expected at most the {available} draws that there are, got {num_samples}")


def _spread(size: int, num_samples: int | None) -> Tensor:
    """Positions of so many draws, spread evenly."""
    return torch.linspace(0, size - 1, num_samples or size).round().long()


# Priors


@dataclass(frozen=True)
class _OfModule:
    """Prior of one parameter, given the module that it belongs to, on whose device it is made."""

    make: Prior
    name: str

    def __call__(self, module: nn.Module) -> Any:
        return self.make(self.name, starting_value(module, self.name.rpartition(".")[2]))


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
    """Parameters of the layers with these names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if len({id(p) for p in parameters.values()}) != len(parameters):
        raise ValueError("network: expected parameters of their own in each layer, got some that layers share")
    chosen = {}
    for layer in layers:
        found = {n: p for n, p in parameters.items() if layer == "all" or n == layer or n.startswith(f"{layer}.")}
        if not found:
            raise ValueError(f"layers: expected 'all', 'head' or names among {sorted(parameters)}, got {layer!r}")
        chosen |= found
    return {name: p for name, p in parameters.items() if name in chosen}


def _make_latent(network: nn.Module, name: str, make: Prior) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    value = getattr(module, leaf).detach().clone()
    setattr(module, leaf, PyroSample(_OfModule(make, name)))
    module.register_buffer(f"{leaf}_start", value)
