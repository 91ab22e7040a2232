r"""Markov chain Monte Carlo over latent weights: Pyro's NUTS, and what tells whether to trust it."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_median, init_to_value
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
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
from pyro_mdn.support.checks import require_counts, shown
from pyro_mdn.support.process_state import give_way, require_seed
from pyro_mdn.support.pyro_compat import select_samples

__all__ = ["ConvergenceWarning", "PosteriorSamples", "fit_mcmc"]

_R_HAT = 1.05
_JITTER = 0.3  # of a standard deviation
_LIMIT = 2000  # weights that are whitened together
_MAX_ITER = 1000


class ConvergenceWarning(UserWarning):
    """Chains that had divergent steps, or that do not agree on the joint density."""


@dataclass(frozen=True)
class PosteriorSamples:
    r"""Draws of latent weights by Markov chain Monte Carlo.

    The weights of a mixture network are not identified: components and hidden units can change places, so that
    chains may agree on all predictions while :attr:`r_hat` of a weight is large. Look at ``log_joint``, whose
    diagnostics stand beside those of the sites, and at predictions.

    Attributes:
        samples: Draws by site, ``(num_chains, num_samples, *shape)``.
        log_joint: Log joint density of each draw and the data, ``(num_chains, num_samples)``, in float64.
        diverging: Whether the step to a draw diverged, ``(num_chains, num_samples)``.
        acceptance: Share of steps that moved, for each chain.
        seconds: Wall-clock time.
    """

    samples: Mapping[str, Tensor]
    log_joint: Tensor
    diverging: Tensor
    acceptance: list[float]
    seconds: float

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws by site, ``(num_chains · num_samples, *shape)``; as ``pyro.infer.MCMC`` has it.

        Args:
            num_samples: So many of them, drawn with replacement.
            group_by_chain: Keep the chains apart, ``(num_chains, num_samples, *shape)``.
        """
        return select_samples(dict(self.samples), num_samples, group_by_chain)

    @property
    def divergences(self) -> list[int]:
        """Number of divergent steps after the warm-up, for each chain."""
        return self.diverging.sum(-1).tolist()

    @property
    def r_hat(self) -> dict[str, Tensor]:
        """Split R-hat by site, and of ``"log_joint"``: 1 where chains and their halves agree.

        NaN where all draws are equal, and below 4 draws.

        References:
            Gelman et al. (2013), Bayesian data analysis, chapter 11.
        """
        return self._of_each(split_gelman_rubin)

    @property
    def effective_sample_size(self) -> dict[str, Tensor]:
        """Number of independent draws that a mean over all chains is worth, by site, and of ``"log_joint"``.

        NaN where all draws are equal, and below 4 draws.
        """
        return self._of_each(_effective_sample_size)

    def _of_each(self, statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        chains = {**self.samples, "log_joint": self.log_joint}
        if self.log_joint.shape[1] < 4:
            return {name: chain.new_full(chain.shape[2:], torch.nan) for name, chain in chains.items()}
        return {name: statistic(chain.double()) for name, chain in chains.items()}

    def __repr__(self) -> str:
        chains, draws = self.log_joint.shape
        return f"{type(self).__name__}(chains={chains}, draws={draws}, divergences={sum(self.divergences)})"


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

    Exact in the limit of many draws, for hundreds of rows and, best, for weights of the head alone,
    ``bayesianize(network, layers="head")``: the backbone is evaluated once then.

    Chains start near the mode that :func:`pyro_mdn.laplace` finds from ``starting_weights(network)``, each at another
    place, and move in coordinates in which its approximation is a standard normal. If the prior of a weight is not
    over the real numbers or depends on others, or beyond 2000 weights, they start near the starting weights, and go
    by the weights themselves; that takes more steps. Starting weights outside the support of their prior are replaced
    by its median.

    Args:
        network: Network with latent weights.
        x: Inputs ``(N, ..., dim_in)``: all rows.
        y: Targets ``(N, ..., D)``. An entry that is NaN was not observed.
        num_samples: Draws of each chain.
        warmup_steps: Steps before them, in which step size and mass matrix adapt.
        num_chains: Number of chains; with one, R-hat compares its halves.
        max_tree_depth: At most :math:`2^\text{depth} - 1` evaluations of the gradient for a draw.
        target_accept_prob: Acceptance that the step size adapts to; closer to 1 there are fewer divergences.
        seed: Seed; by default one is drawn from torch's generator. Apart from that the generators stay as they were.
        progress: Show Pyro's progress bars.

    Raises:
        ValueError: If there are no latent weights, or if the data or a setting are not usable.
        FloatingPointError: If the density of the starting weights is not finite, or a derivative at the mode.

    Warns:
        ConvergenceWarning: If there were divergences, or if R-hat of the joint density is above 1.05.

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
        target = _target(network, rows)

        def chain(number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
            found: dict[str, Any] = {}
            torch.manual_seed(int(np.random.SeedSequence([root, number]).generate_state(1, np.uint64)[0]) >> 1)
            kernel, start = target.kernel(max_tree_depth=max_tree_depth, target_accept_prob=target_accept_prob)

            def hook(kernel: Any, _: Any, stage: str, __: int) -> None:
                give_way()
                found.update(kernel.diagnostics() if "Sample" in stage else {})

            mcmc = MCMC(
                kernel,
                num_samples,
                int(warmup_steps),
                initial_params=start,
                disable_progbar=not progress,
                hook_fn=hook,
            )
            mcmc.run(rows.x, rows.y)
            return target.samples(mcmc.get_samples()), found

        chains, found = zip(*map(chain, range(num_chains)), strict=True)
        samples = {name: torch.stack([chain[name] for chain in chains]).detach() for name in chains[0]}
        log_joint = _log_joint(target, samples)
    posterior = PosteriorSamples(
        samples,
        log_joint,
        diverging=torch.stack([_marked(diagnostics["divergences"], num_samples) for diagnostics in found]),
        acceptance=[diagnostics["acceptance rate"] for diagnostics in found],
        seconds=time.perf_counter() - started,
    )
    _warn(posterior)
    return posterior


# Targets


class _Joint:
    r"""The joint density of whitened weights, :math:`w = \hat w + L z`, which NUTS needs far fewer steps for.

    Mode and covariance :math:`L L^T` are those of Laplace's approximation. Beyond some thousand weights, where the
    products would cost more than they save, they are the starting weights and the scale of the prior. The sampler
    works in float64, whatever the network's dtype.
    """

    def __init__(self, joint: LogJoint) -> None:
        self.joint = joint
        if joint.num_weights <= _LIMIT:
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


class _Model:
    """The Pyro model, whatever its sites are."""

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


def _target(network: MixtureDensityNetwork, rows: Rows) -> _Joint | _Model:
    try:
        return _Joint(LogJoint(network, rows))
    except UnusualModelError:
        return _Model(network, rows)


def _jittered(start: Mapping[str, Tensor], priors: Mapping[str, Distribution]) -> dict[str, Tensor]:
    """Weights a little apart from the starting ones, where any real number will do."""
    values = {}
    for name, value in start.items():
        scale = reciprocal_variance(priors[name], value).rsqrt().clamp(max=1.0).to(value)
        values[name] = value + _JITTER * scale * is_real(priors[name]) * torch.randn_like(value)
    return values


# Results


def _effective_sample_size(chains: Tensor) -> Tensor:
    """Pyro's, at most N log10 N: where draws alternate, the estimate may exceed that, or be negative."""
    total, size = chains.shape[0] * chains.shape[1], effective_sample_size(chains)
    most = total * math.log10(total)
    return torch.where((size <= 0) | (size > most), most, size)


def _marked(positions: list[int], size: int) -> Tensor:
    """True at these positions."""
    marks = torch.zeros(size, dtype=torch.bool, device="cpu")
    marks[positions] = True
    return marks


@torch.no_grad()
def _log_joint(target: _Joint | _Model, samples: Mapping[str, Tensor]) -> Tensor:
    chains, draws = next(iter(samples.values())).shape[:2]
    values = []
    for i, j in itertools.product(range(chains), range(draws)):
        give_way()
        values.append(target({name: value[i, j] for name, value in samples.items()}))
    return torch.stack(values).reshape(chains, draws)


def _warn(posterior: PosteriorSamples) -> None:
    r_hat = float(posterior.r_hat["log_joint"])
    troubles = []
    if divergences := sum(posterior.divergences):
        troubles.append(f"{divergences} divergent steps: target_accept_prob closer to 1 helps")
    if r_hat > _R_HAT or (math.isnan(r_hat) and posterior.log_joint.shape[1] >= 4):  # NaN: none moved
        troubles.append(f"R-hat of the log joint density is {r_hat:.2f}: more warmup_steps and num_samples help")
    if troubles:
        warnings.warn(f"fit_mcmc: {'; '.join(troubles)}", ConvergenceWarning, stacklevel=3)


def _require_settings(warmup_steps: Any, target_accept_prob: Any, seed: Any) -> None:
    if not isinstance(warmup_steps, Integral) or isinstance(warmup_steps, bool) or int(warmup_steps) < 0:
        raise ValueError(f"warmup_steps: expected an integer that is not negative, got {shown(warmup_steps)}")
    if not isinstance(target_accept_prob, float) or not 0 < target_accept_prob < 1:
        raise ValueError(f"target_accept_prob: expected a number in (0, 1), got {shown(target_accept_prob)}")
    require_seed(seed)
