r"""Objectives: modules that a training loop minimises, one loss per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call

from pyro_mdn import scores
from pyro_mdn.checks import require_numbers
from pyro_mdn.ensemble import DeepEnsemble
from pyro_mdn.guides import draw_from, latent_sites, require_sites
from pyro_mdn.network import MixtureDensityNetwork
from pyro_mdn.vectorized import OwnParameters, isolated, over_draws, unvalidated

__all__ = [
    "ContinuousRankedProbability",
    "Memberwise",
    "MemberwiseLogLikelihood",
    "NegativeElbo",
    "NegativeLogLikelihood",
    "WeightedSum",
]


class NegativeLogLikelihood(nn.Module):
    r"""Objective :math:`-\log p(y \mid x)` in nats, one number per row.

    A target that is NaN was not observed: the row's loss is that of its other targets.

    >>> network = MixtureDensityNetwork(1, 1)
    >>> NegativeLogLikelihood(network)(torch.randn(8, 1), torch.randn(8, 1)).shape
    torch.Size([8])
    """

    def __init__(self, network: MixtureDensityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N, ...)``."""
        return self.network.loss(x, y)


class ContinuousRankedProbability(nn.Module):
    r"""Objective CRPS, summed over the outputs, each in its standardised unit; one number per row.

    .. math:: \sum_d \mathrm{CRPS}(F_d(\cdot \mid x), y_d) / s_d

    Bounded where a log-density is not, so that no single row dominates. A target that is NaN adds nothing.

    References:
        Gneiting & Raftery (2007), Strictly proper scoring rules, prediction, and estimation.

    >>> network = MixtureDensityNetwork(1, 1)
    >>> ContinuousRankedProbability(network)(torch.randn(8, 1), torch.randn(8, 1)).shape
    torch.Size([8])
    """

    def __init__(self, network: MixtureDensityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N, ...)``."""
        mixture = self.network(x)
        y = self.network.targets(y, mixture.batch_shape)
        missing = y.isnan()
        score = scores.crps(mixture, torch.where(missing, mixture.mean.detach(), y)) / self.network.head.scale
        return score.masked_fill(missing, 0.0).sum(-1)


class NegativeElbo(nn.Module):
    r"""Objective −ELBO of ``network.model`` and a guide, in nats per row.

    .. math:: E_{q(w)}\left[-\log p(y_n \mid x_n, w)\right] + \frac{\beta}{N} \, \mathrm{KL}(q(w) \,\|\, p(w))

    by Monte Carlo with pathwise gradients; its mean over rows times N is minus the ELBO of a minibatch. In evaluation
    mode it is the first term alone, the score of held-out rows under draws from the guide.

    Args:
        network: Network with latent weights. One without has no second term.
        guide: Guide of ``network.model``; an AutoGuide is set up by the first call.
        num_data: Rows in the whole of the data, N.
        num_particles: Draws of the weights for each estimate.
        kl_weight: :math:`\beta`; 1 is the ELBO.
        kl_warmup: Steps over which :math:`\beta` grows from 0 to that (Bowman et al., 2016).

    Raises:
        ValueError: If a count is not positive or, when called, if the guide has other sites than the model or draws
            from a distribution without pathwise gradients.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes.
    """

    step: Tensor

    def __init__(
        self,
        network: MixtureDensityNetwork,
        guide: Callable[..., Any],
        num_data: int,
        *,
        num_particles: int = 1,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
    ) -> None:
        super().__init__()
        if num_data < 1 or num_particles < 1:
            raise ValueError(f"num_data, num_particles: expected 1 at least, got {num_data} and {num_particles}")
        require_numbers(least=0.0, kl_weight=kl_weight, kl_warmup=kl_warmup)
        self.network, self.guide = network, guide
        self.num_data, self.num_particles = num_data, num_particles
        self.kl_weight, self.kl_warmup = kl_weight, kl_warmup
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Describe the estimate in a module's printout."""
        guide = "" if isinstance(self.guide, nn.Module) else f", guide={getattr(self.guide, '__name__', self.guide)}"
        kl = f"kl_weight={self.kl_weight}, kl_warmup={self.kl_warmup}"
        return f"num_data={self.num_data}, num_particles={self.num_particles}, {kl}{guide}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N,)``."""
        draws, log_q = self.draw(x, y)
        losses, log_prior = self.score(draws, x, y)
        if not self.training:
            return losses.mean(0)
        self.step += 1
        beta = self.kl_weight * min(1.0, self.step.item() / max(1, self.kl_warmup))
        return losses.mean(0) + beta * (log_q - log_prior).mean() / self.num_data

    def draw(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Draws at all sites of the guide, ``(S, ...)`` by name, and their log-density, ``(S,)``."""
        return draw_from(self.guide, self.num_particles, x, y, num_data=self.num_data, pathwise=True)

    def score(self, draws: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``(S, N)`` of the rows given draws, and the log-density ``(S,)`` of the draws under the prior."""

        def score(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
            model = poutine.condition(self.network.model, data=draw)
            trace = poutine.trace(model).get_trace(x, y, num_data=self.num_data)
            require_sites("guide", expected=latent_sites(trace, draw).keys() - {"y"}, got=draw.keys())
            likelihood: dict[str, Any] = dict(trace.nodes["y"])
            log_prior = torch.as_tensor(trace.log_prob_sum(lambda name, _: name in draw))
            return -likelihood["fn"].log_prob(likelihood["value"]), log_prior

        if not draws and not self.network.latent and type(self.network).model is MixtureDensityNetwork.model:
            return self.network.loss(x, y).unsqueeze(0), y.new_zeros(1)  # nothing is latent: no need to trace the model
        if self.num_particles == 1 or not draws:
            losses, log_prior = score({name: value[0] for name, value in draws.items()})
            return losses.unsqueeze(0), log_prior.unsqueeze(0)
        with unvalidated(), OwnParameters():
            losses, log_prior = over_draws(score, draws, self.network)
        return losses, log_prior


class MemberwiseLogLikelihood(nn.Module):
    r"""Objective :math:`-\log p_m(y \mid x)` in nats for each member of an ensemble and each of its rows, ``(M, N)``.

    >>> ensemble = DeepEnsemble(MixtureDensityNetwork(1, 1), size=3)
    >>> MemberwiseLogLikelihood(ensemble)(torch.randn(3, 8, 1), torch.randn(3, 8, 1)).shape
    torch.Size([3, 8])
    """

    def __init__(self, ensemble: DeepEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each member's rows, shape ``(M, N, ...)``."""
        return self.ensemble.loss(x, y)


class Memberwise(nn.Module):
    r"""Any objective over ``ensemble.stacked``, for each member of the ensemble and each of its rows, ``(M, N)``.

    Args:
        objective: Objective whose tensors all have a leading axis of members, as those of ``ensemble.stacked`` do.
        size: Number of members.

    Raises:
        ValueError: If a tensor of the objective has no such axis.

    >>> ensemble = DeepEnsemble(MixtureDensityNetwork(1, 1), size=3)
    >>> crps = Memberwise(ContinuousRankedProbability(ensemble.stacked), 3)
    >>> crps(torch.randn(3, 8, 1), torch.randn(3, 8, 1)).shape
    torch.Size([3, 8])
    """

    def __init__(self, objective: nn.Module, size: int) -> None:
        super().__init__()
        self.objective = objective
        for name, tensor in self._tensors().items():
            if tensor.shape[:1] != (size,):
                raise ValueError(
                    f"objective: expected a first axis of {size} members, got {name} {tuple(tensor.shape)}"
                )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each member's rows, shape ``(M, N, ...)``."""

        def call(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
            rows = draw.pop("x"), draw.pop("y")
            return (functional_call(self.objective, draw, rows),)

        with isolated():
            return over_draws(call, {**self._tensors(), "x": x, "y": y}, self.objective)[0]

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.objective.named_parameters()), **dict(self.objective.named_buffers())}


class WeightedSum(nn.Module):
    r"""Objective :math:`\sum_i a_i \, \ell_i(x, y)`.

    Args:
        objectives: Objectives.
        weights: Their weights, finite and not negative.

    Raises:
        ValueError: If there is not one weight to each objective or a weight is not usable.

    >>> network = MixtureDensityNetwork(1, 1)
    >>> both = WeightedSum([NegativeLogLikelihood(network), ContinuousRankedProbability(network)], [1.0, 0.5])
    >>> both(torch.randn(8, 1), torch.randn(8, 1)).shape
    torch.Size([8])
    """

    def __init__(self, objectives: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if not objectives or len(objectives) != len(weights) or not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"weights: expected one for each of {len(objectives)} objectives, got {list(weights)}")
        self.objectives, self.weights = nn.ModuleList(objectives), [float(w) for w in weights]

    def extra_repr(self) -> str:
        """Describe the weights in a module's printout."""
        return f"weights={self.weights}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N, ...)``."""
        losses = [w * objective(x, y) for w, objective in zip(self.weights, self.objectives, strict=True)]
        return torch.stack(losses).sum(0)
