r"""Markov chain Monte Carlo (MCMC) over latent weights, by Pyro's no-U-turn sampler."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_median, init_to_value
from torch import Tensor
from torch.distributions import Distribution

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.posteriors.laplace import mode_and_scale
from pyro_mdn.posteriors.log_joint import (
    LogJoint,
    UnusualModelError,
    is_real,
    latent_priors,
    log_joint_of_model,
    reciprocal_variance,
    rows_of,
    supported_start,
    undisturbed,
)
from pyro_mdn.posteriors.posterior_samples import PosteriorSamples, warn_of_nonconvergence
from pyro_mdn.support.checks import require_counts, shown
from pyro_mdn.support.process_state import give_way, require_seed

__all__ = ["ModelJoint", "Target", "WhitenedJoint", "fit_mcmc", "sample_target", "target_of"]

_JITTER = 0.3  # of a standard deviation
_LIMIT = 2000  # weights that are whitened together
_MAX_ITER = 1000


def fit_mcmc(
    network: MixtureDensityNetwork,
    x: Any,
    y: Any,
    *,
    num_samples: int = 500,
    warmup_steps: int = 300,
    num_chains: int = 4,
    max_tree_depth: int = 8,
    target_accept_prob: float = 0.8,
    seed: int | None = None,
    progress: bool = True,
) -> PosteriorSamples:
    r"""Draw latent weights from their posterior by the no-U-turn sampler, one chain after another.

    .. math:: w_s \sim p(w \mid x, y) \propto p(w) \prod_n p(y_n \mid x_n, w)

    The draws are exact in the limit of many. The sampler suits hundreds of rows and, best, latent weights of the head
    alone, ``bayesianize(network, layers="head")``, because the backbone is evaluated only once then.

    Each chain starts at another place near the mode that :func:`pyro_mdn.laplace` finds, and moves in coordinates in
    which the Laplace approximation is a standard normal (whitening). If the support of a prior is not the real line, if
    a prior depends on other weights, or beyond 2000 weights, chains start near the starting weights and move in the
    weights themselves, which takes more steps. Starting weights outside the support of their prior are replaced by
    the median of the prior.

    Args:
        network: Network with latent weights.
        x: Inputs ``(N, ..., dim_in)``: all rows.
        y: Targets ``(N, ..., D)``. NaN marks missing entries.
        num_samples: Draws of each chain.
        warmup_steps: Warm-up steps before the draws, in which step size and mass matrix adapt.
        num_chains: Number of chains; with a single chain, R-hat compares its halves.
        max_tree_depth: Limit of :math:`2^\text{depth} - 1` evaluations of the gradient for a draw.
        target_accept_prob: Acceptance probability that the step size adapts to; closer to 1, divergences are fewer.
        seed: Seed. Without one, a seed is drawn from torch's global generator, which otherwise stays as it was.
        progress: Show Pyro's progress bars.

    Raises:
        ValueError: If there are no latent weights, or if the data or a setting are not usable.
        FloatingPointError: If the density of the starting weights is not finite, or a derivative at the mode.

    Warns:
        ConvergenceWarning: If steps diverged, or if R-hat of the joint density is above 1.05.

    References:
        Hoffman & Gelman (2014), The no-U-turn sampler.

    >>> from pyro_mdn import bayesianize, posterior_predictive
    >>> network = bayesianize(MixtureDensityNetwork(1, 1, n_components=1, hidden_dim=2), layers="head.linear.bias")
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> settings = {"num_samples": 3, "warmup_steps": 5, "max_tree_depth": 3, "seed": 0, "progress": False}
    >>> posterior = fit_mcmc(network, x, x**2, **settings)
    >>> posterior_predictive(network, posterior, x).batch_shape
    torch.Size([12, 20])
    """
    require_counts(num_samples=num_samples, num_chains=num_chains, max_tree_depth=max_tree_depth)
    _require_settings(warmup_steps, target_accept_prob, seed)
    started = time.perf_counter()
    root = int(torch.randint(2**62, (), device="cpu")) if seed is None else int(seed)
    with undisturbed(network):
        rows = rows_of(network, x, y)
        counts = {"num_samples": num_samples, "warmup_steps": int(warmup_steps), "num_chains": num_chains}
        kernel = {"max_tree_depth": max_tree_depth, "target_accept_prob": target_accept_prob}
        posterior = sample_target(target_of(network, rows), rows, **counts, seed=root, progress=progress, **kernel)
    posterior = replace(posterior, seconds=time.perf_counter() - started)
    warn_of_nonconvergence(posterior)
    return posterior


def sample_target(
    target: Target,
    rows: Rows,
    *,
    num_samples: int,
    warmup_steps: int,
    num_chains: int,
    seed: int,
    progress: bool = False,
    **kernel: Any,
) -> PosteriorSamples:
    """Draw from one target density by NUTS; see :func:`fit_mcmc`. Use it within ``undisturbed(network)``.

    Args:
        target: The density.
        rows: Checked data.
        num_samples: Draws of each chain.
        warmup_steps: Steps before them.
        num_chains: Number of chains.
        seed: Seed.
        progress: Show Pyro's progress bars.
        kernel: Settings of NUTS.
    """
    started = time.perf_counter()

    def chain(number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1)
        nuts, start = target.kernel(**kernel)
        found: dict[str, Any] = {}

        def hook(kernel: Any, _: Any, stage: str, __: int) -> None:
            give_way()
            found.update(kernel.diagnostics() if "Sample" in stage else {})

        shown = {"disable_progbar": not progress, "hook_fn": hook}
        mcmc = MCMC(nuts, num_samples, warmup_steps, initial_params=start, **shown)
        mcmc.run(rows.x, rows.y)
        return target.samples(mcmc.get_samples()), found

    chains, found = zip(*map(chain, range(num_chains)), strict=True)
    samples = {name: torch.stack([chain[name] for chain in chains]).detach() for name in chains[0]}
    return PosteriorSamples(
        samples,
        _log_joint(target, samples),
        diverging=torch.stack([_marked(diagnostics["divergences"], num_samples) for diagnostics in found]),
        acceptance=[diagnostics["acceptance rate"] for diagnostics in found],
        seconds=time.perf_counter() - started,
    )


# Targets


class Target(ABC):
    """Joint density of weights and data, as a target of NUTS."""

    @abstractmethod
    def kernel(self, **settings: Any) -> tuple[NUTS, dict[str, Tensor] | None]:
        """Kernel with these settings, and where a chain starts in its coordinates, unless the kernel chooses."""

    @abstractmethod
    def samples(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by site, from draws in the coordinates of the kernel."""

    @abstractmethod
    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log joint density of weights by site."""


class WhitenedJoint(Target):
    r"""Joint density of whitened weights, :math:`w = \hat w + L z`, for which NUTS needs far fewer steps.

    Mode and covariance :math:`L L^T` are those of the Laplace approximation. Beyond ``limit`` weights, where products
    with L would cost more than they save, they are the starting weights and the scales of the prior. The sampler
    works in float64, whatever the dtype of the network.

    Args:
        joint: The joint density.
        limit: Number of weights up to which their correlations are whitened, too.
    """

    def __init__(self, joint: LogJoint, limit: int = _LIMIT) -> None:
        self.joint = joint
        if joint.num_weights <= limit:
            self.loc, self.root = mode_and_scale(joint, _MAX_ITER, progress=False)
        else:
            scale = {
                name: reciprocal_variance(prior, joint.start[name]).rsqrt() for name, prior in joint.priors.items()
            }
            self.loc, self.root = joint.flatten(joint.start), joint.flatten(scale)

    def kernel(self, **settings: Any) -> tuple[NUTS, dict[str, Tensor] | None]:
        def potential(values: Mapping[str, Tensor]) -> Tensor:
            give_way()
            return -self.joint(self.joint.unflatten(self._weights(values["z"])))

        return NUTS(potential_fn=potential, **settings), {"z": _JITTER * torch.randn_like(self.loc)}

    def _weights(self, z: Tensor) -> Tensor:
        return self.loc + (z @ self.root.mT if self.root.ndim == 2 else z * self.root)

    def samples(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return torch.vmap(self.joint.unflatten)(self._weights(draws["z"]))

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.joint(weights)


class ModelJoint(Target):
    """Joint density of the Pyro model, with any latent sites."""

    def __init__(self, network: MixtureDensityNetwork, rows: Rows) -> None:
        self.network, self.rows = network, rows

    def kernel(self, **settings: Any) -> tuple[NUTS, dict[str, Tensor] | None]:
        values = _jittered(supported_start(self.network, self.rows), latent_priors(self.network, self.rows))
        strategy = init_to_value(values=values, fallback=init_to_median)
        return NUTS(self.network.model, init_strategy=strategy, **settings), None

    def samples(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(draws)

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return log_joint_of_model(self.network, self.rows, weights)


def target_of(network: MixtureDensityNetwork, rows: Rows) -> Target:
    """Choose the target of a network: whitened weights where their joint density is known, or else the model."""
    try:
        return WhitenedJoint(LogJoint(network, rows))
    except UnusualModelError:
        return ModelJoint(network, rows)


def _jittered(start: Mapping[str, Tensor], priors: Mapping[str, Distribution]) -> dict[str, Tensor]:
    """Move starting weights a little, so that chains start apart, if any real number is a value of the prior."""
    values = {}
    for name, value in start.items():
        scale = reciprocal_variance(priors[name], value).rsqrt().clamp(max=1.0).to(value)
        values[name] = value + _JITTER * scale * is_real(priors[name]) * torch.randn_like(value)
    return values


# Results


def _marked(positions: list[int], size: int) -> Tensor:
    """Make a mask that is true at these positions."""
    marks = torch.zeros(size, dtype=torch.bool, device="cpu")
    marks[positions] = True
    return marks


@torch.no_grad()
def _log_joint(target: Target, samples: Mapping[str, Tensor]) -> Tensor:
    chains, draws = next(iter(samples.values())).shape[:2]
    values = []
    for i, j in itertools.product(range(chains), range(draws)):
        give_way()
        values.append(target({name: value[i, j] for name, value in samples.items()}))
    return torch.stack(values).reshape(chains, draws)


def _require_settings(warmup_steps: Any, target_accept_prob: Any, seed: Any) -> None:
    if not isinstance(warmup_steps, Integral) or isinstance(warmup_steps, bool) or int(warmup_steps) < 0:
        raise ValueError(f"warmup_steps: expected an integer that is not negative, got {shown(warmup_steps)}")
    if not isinstance(target_accept_prob, float) or not 0 < target_accept_prob < 1:
        raise ValueError(f"target_accept_prob: expected a number in (0, 1), got {shown(target_accept_prob)}")
    require_seed(seed)
