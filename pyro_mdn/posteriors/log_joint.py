r"""Joint density of latent weights and data, as a function of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.networks.batched.functional import OwnParameters
from pyro_mdn.networks.batched.passes import cost_of
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.raw_parameters import Raw
from pyro_mdn.networks.rows import Rows, as_rows
from pyro_mdn.posteriors.guide_draws import log_density_at
from pyro_mdn.posteriors.priors import latent_names, starting_weights
from pyro_mdn.support.arrays import require_columns
from pyro_mdn.support.checks import is_inherited
from pyro_mdn.support.process_state import evaluating, give_way, isolated, own_generators
from pyro_mdn.support.pyro_compat import site_is_subsample

__all__ = [
    "LogJoint",
    "UnusualModelError",
    "is_real",
    "latent_priors",
    "log_joint_of_model",
    "reciprocal_variance",
    "rows_of",
    "supported_start",
    "undisturbed",
]

Weights = Mapping[str, Tensor]


class UnusualModelError(ValueError):
    """A model whose latent sites are not all real, independent weights, or that overrides that of the library."""


class LogJoint:
    r"""Joint log-density of the latent weights of a network and the data.

    .. math:: \log p(w) + \sum_n \log p(y_n \mid x_n, w)

    It equals the density of ``network.model``, but needs no trace. Sums are in float64, the network keeps its dtype. If
    only weights of the head are latent, the backbone is evaluated once. Use it within :func:`undisturbed`.

    Args:
        network: Network with latent weights.
        rows: Checked data.

    Raises:
        UnusualModelError: If there are other latent sites, if the support of a prior is not the whole real line, if a
            prior depends on another weight, or if the network overrides ``model`` or ``forward`` or has hooks.
        FloatingPointError: If the density of the starting weights is not finite.
    """

    def __init__(self, network: MixtureDensityNetwork, rows: Rows) -> None:
        if not (network.is_described_by_raw and is_inherited(network, MixtureDensityNetwork, "model", "raw")):
            raise UnusualModelError("network: expected model and forward of MixtureDensityNetwork, without hooks on it")
        self.network, self.y = network, rows.y
        self.priors = _independent_priors(network, rows)
        values = starting_weights(network)
        self.start = {name: values[name] for name in self.priors}
        names = latent_names(network)
        self.in_head = all(names[site].startswith("head.") for site in self.start)
        self.inputs = self._features(rows.x) if self.in_head else rows.x
        with torch.no_grad():
            self.size = self.rows(lambda part: (self._densities(self.start, part, self.y[: len(part)]),))
            chunks = [self.log_likelihood(self.start, inputs, y) for inputs, y in self.chunks(self.size)]
            density = float(self.log_prior(self.start) + sum(chunks))
        if not math.isfinite(density):
            raise FloatingPointError(f"network: expected a finite joint density of the starting weights, got {density}")

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        network = self.network

        def features(part: Tensor) -> tuple[Tensor]:
            with OwnParameters(), poutine.condition(data=self.start), network.calling():
                return (network.features(part),)

        return torch.cat([features(part)[0] for part in x.split(_rows_in_pass(features, x))])

    @property
    def num_weights(self) -> int:
        """Number of latent weights P."""
        return sum(value.numel() for value in self.start.values())

    def __call__(self, weights: Weights) -> Tensor:
        """Compute the joint log-density of weights by site, in float64."""
        return self.log_prior(weights) + self.log_likelihood(weights, self.inputs, self.y)

    def log_prior(self, weights: Weights) -> Tensor:
        """Compute the log-density of weights under their prior."""
        return torch.stack([prior.log_prob(weights[n]).double().sum() for n, prior in self.priors.items()]).sum()

    def log_likelihood(self, weights: Weights, inputs: Tensor, y: TargetsOrTensor) -> Tensor:
        """Compute the summed log-density of rows given weights."""
        return self._densities(weights, inputs, y).double().sum()

    def _densities(self, weights: Weights, inputs: Tensor, y: TargetsOrTensor) -> Tensor:
        head = self.network.head
        return head.log_density(self.raw(weights, inputs), y, head.units)

    def raw(self, weights: Weights, inputs: Tensor) -> Raw:
        """Compute the raw outputs of the head given weights, for some of ``inputs``."""
        with OwnParameters(), poutine.condition(data=dict(weights)), self.network.calling():
            return self.network.head.raw(inputs) if self.in_head else self.network.raw(inputs)

    # As a function of one vector, in the order of the sites in the model, which is that of AutoGuides

    def flatten(self, weights: Weights) -> Tensor:
        """Flatten weights to one vector ``(P,)``, in float64."""
        return torch.cat([weights[name].reshape(-1).double() for name in self.start])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Restore weights by site, in the dtype of the network, from a vector ``(P,)``."""
        parts = vector.split([value.numel() for value in self.start.values()])
        return {n: part.reshape(v.shape).to(v) for part, (n, v) in zip(parts, self.start.items(), strict=True)}

    def chunks(self, size: int) -> Iterator[tuple[Tensor, TargetsOrTensor]]:
        """Iterate over successive inputs and targets, ``size`` rows at a time."""
        return zip(self.inputs.split(size), self.y.split(size), strict=True)

    def rows(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> int:
        """Measure how many rows of ``inputs`` a function takes in one pass."""
        return _rows_in_pass(function, self.inputs)

    def value_and_gradient(self, vector: Tensor) -> tuple[float, Tensor]:
        """Compute the density and its gradient ``(P,)``, one chunk of rows after another."""
        vector = vector.detach().requires_grad_()
        value = self.log_prior(self.unflatten(vector))
        (gradient,) = torch.autograd.grad(value, vector)
        total = value.item()
        for inputs, y in self.chunks(self.size):
            give_way()
            value = self.log_likelihood(self.unflatten(vector), inputs, y)
            gradient = gradient + torch.autograd.grad(value, vector)[0]
            total += value.item()
        return total, gradient


def rows_of(network: MixtureDensityNetwork, x: Any, y: Any) -> Rows:
    """Check a network with latent weights, and its data; leave out rows without an observed target.

    Raises:
        ValueError: If there are no latent weights or the data are not usable.
    """
    if not isinstance(network, MixtureDensityNetwork):
        raise ValueError(f"network: expected a MixtureDensityNetwork, got {type(network).__name__}")
    if not network.latent:
        raise ValueError("network: expected latent weights, got none: see bayesianize")
    require_columns(network.input_names, x, "x")
    return as_rows(network, x, y).informative()


@contextmanager
def undisturbed(network: MixtureDensityNetwork) -> Iterator[None]:
    """Run in evaluation mode, with gradients and an empty parameter store; restore these and the generators."""
    with ExitStack() as stack:
        stack.enter_context(own_generators())
        stack.enter_context(isolated())
        stack.enter_context(evaluating(network))
        stack.enter_context(torch.enable_grad())
        yield


def log_joint_of_model(network: MixtureDensityNetwork, rows: Rows, values: Weights) -> Tensor:
    """Compute the joint log-density of ``network.model`` at values of all its latent sites."""
    trace = poutine.trace(poutine.condition(network.model, data=dict(values))).get_trace(rows.x, rows.y)
    return log_density_at(trace.nodes, trace).double()


def latent_priors(network: MixtureDensityNetwork, rows: Rows) -> dict[str, Distribution]:
    """Return the prior of each latent site given the starting weights, in the order of the model."""
    return {name: site["fn"] for name, site in _latent_sites(network, rows, starting_weights(network)).items()}


def supported_start(network: MixtureDensityNetwork, rows: Rows) -> dict[str, Tensor]:
    """Return starting weights by site, without those outside the support of their prior."""
    priors = latent_priors(network, rows)
    inside = {name: biject_to(priors[name].support).inv for name in priors}
    return {name: v for name, v in starting_weights(network).items() if bool(inside[name](v).isfinite().all())}


def is_real(prior: Distribution) -> bool:
    """Whether the support of a prior is the whole real line, for each entry."""
    support: Any = prior.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def reciprocal_variance(prior: Distribution, value: Tensor) -> Tensor:
    """Compute the precision of each entry under a prior; 1e-6 if the variance is infinite or unknown."""
    try:
        variance = prior.variance.detach().double().expand(value.shape)
    except NotImplementedError:
        variance = torch.full(value.shape, torch.nan, dtype=torch.float64, device=value.device)
    return variance.reciprocal().nan_to_num(0.0, posinf=0.0).clamp(min=1e-6)


def _latent_sites(network: MixtureDensityNetwork, rows: Rows, weights: Weights) -> dict[str, Any]:
    model = poutine.condition(network.model, data=dict(weights))
    nodes: dict[str, Any] = dict(poutine.trace(model).get_trace(rows.x[:1], rows.y[:1]).nodes)
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and n != "y" and not site_is_subsample(s)}


def _independent_priors(network: MixtureDensityNetwork, rows: Rows) -> dict[str, Distribution]:
    """Return the prior of each weight in the order of the model, or raise an :class:`UnusualModelError`."""
    start = {name: value.requires_grad_() for name, value in starting_weights(network).items()}
    sites = _latent_sites(network, rows, start)
    if sites.keys() != start.keys():
        raise UnusualModelError(f"network: expected the latent sites {sorted(start)}, got {sorted(sites)}")
    for name, site in sites.items():
        prior = site["fn"]
        if not is_real(prior):
            raise UnusualModelError(f"network: expected a prior over real numbers at {name}, got {prior.support}")
        density = prior.log_prob(start[name].detach()).sum()
        used = torch.autograd.grad(density, [*start.values()], allow_unused=True) if density.requires_grad else ()
        if any(gradient is not None for gradient in used):
            raise UnusualModelError(f"network: expected a prior that depends on no other weight, got one at {name}")
    return {name: site["fn"] for name, site in sites.items()}


def _rows_in_pass(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> int:
    with own_generators():
        cost = cost_of(function, x)
    return cost._replace(separable=True).rows(len(x))  # data are rows, whatever a backbone takes a batch for
