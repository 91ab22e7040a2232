r"""Draws by Markov chain Monte Carlo, and convergence diagnostics that tell whether to trust them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.posteriors.posterior import Posterior, draws_from_samples
from pyro_mdn.support.pyro_compat import select_samples

__all__ = ["ConvergenceWarning", "PosteriorSamples", "warn_of_nonconvergence"]

_R_HAT = 1.05


class ConvergenceWarning(UserWarning):
    """Markov chains had divergent steps, or do not agree on the joint density: they have not converged."""


@dataclass(frozen=True)
class PosteriorSamples(Posterior):
    r"""Draws of latent weights by Markov chain Monte Carlo.

    The weights of a mixture network are not identified (identifiability): components and hidden units can change
    places, so that chains may agree on all predictions while :attr:`r_hat` of a weight is large. Look at the
    diagnostics of ``log_joint``, which stand beside those of the sites, and at predictions.

    Attributes:
        samples: Draws by site, ``(num_chains, num_samples, *shape)``.
        log_joint: Log joint density of each draw and the data, ``(num_chains, num_samples)``, in float64.
        diverging: Whether the step to a draw diverged, ``(num_chains, num_samples)``.
        acceptance: Share of accepted steps, for each chain.
        seconds: Wall-clock time.
    """

    samples: Mapping[str, Tensor]
    log_joint: Tensor
    diverging: Tensor
    acceptance: list[float]
    seconds: float

    @property
    def method(self) -> str:
        """Name of the inference."""
        return "MCMC"

    @property
    def chains(self) -> int:
        """Number of chains."""
        return len(self.log_joint)

    def draws(self, network: MixtureDensityNetwork, x: Any, num_samples: int | None = None) -> dict[str, Tensor]:
        """Draws at the sites of a network, ``(S, *shape)``; fewer than there are come spread evenly over the chains."""
        return draws_from_samples(network, self.get_samples(), x, num_samples)

    def sites(self) -> dict[str, Tensor]:
        """Draws by site, ``(num_chains, num_samples, *shape)``."""
        return dict(self.samples)

    def statistics(self) -> dict[str, Tensor]:
        """Log joint density of each draw, and whether the step to it diverged, ``(num_chains, num_samples)``."""
        return {"lp": self.log_joint, "diverging": self.diverging}

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Return draws by site, ``(num_chains · num_samples, *shape)``, like ``pyro.infer.MCMC``.

        Args:
            num_samples: Number of draws, chosen with replacement; by default all draws.
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
        """Effective sample size by site, and of ``"log_joint"``: the equivalent number of independent draws.

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


def _effective_sample_size(chains: Tensor) -> Tensor:
    """Bound Pyro's estimate by N log10 N: if draws alternate, the estimate may be larger, or negative."""
    total, size = chains.shape[0] * chains.shape[1], effective_sample_size(chains)
    most = total * math.log10(total)
    return torch.where((size <= 0) | (size > most), most, size)


def warn_of_nonconvergence(posterior: PosteriorSamples) -> None:
    """Warn of divergent steps, and of chains that do not agree on the joint density."""
    r_hat = float(posterior.r_hat["log_joint"])
    troubles = []
    if divergences := sum(posterior.divergences):
        troubles.append(f"{divergences} divergent steps: target_accept_prob closer to 1 helps")
    if r_hat > _R_HAT or (math.isnan(r_hat) and posterior.log_joint.shape[1] >= 4):  # NaN: none moved
        troubles.append(f"R-hat of the log joint density is {r_hat:.2f}: more warmup_steps and num_samples help")
    if troubles:
        warnings.warn(f"fit_mcmc: {'; '.join(troubles)}", ConvergenceWarning, stacklevel=3)
