r"""Objectives: modules that a training loop minimises, with one loss per row (likelihood, CRPS, ELBO, their sums)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call

from pyro_mdn import scores
from pyro_mdn.distributions.observations.targets import as_targets, require_exact
from pyro_mdn.networks.batched.functional import OwnParameters, over_draws
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.posteriors.guide_draws import draw_from, latent_sites, log_density_at, require_sites
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import require_counts, require_numbers, shown
from pyro_mdn.support.process_state import (
    KeepFrozen,
    evaluating,
    isolated,
    own_generators,
    own_store,
    require_owned,
    unvalidated,
)
from pyro_mdn.training.batches.target_grids import kept_inside, points_in_cells

__all__ = [
    "ContinuousRankedProbability",
    "Memberwise",
    "NegativeElbo",
    "NegativeLogLikelihood",
    "WeightedSum",
]


class NegativeLogLikelihood(nn.Module):
    r"""Negative log-likelihood :math:`-\log p(y \mid x)` in nats: one per row, or per member and row of an ensemble.

    A target that is NaN is missing: the loss of its row is that of its other targets. :class:`Targets` may be censored,
    or known to lie in an interval: such entries count with their probability.

    A target on a grid, such as a count or a rounded number, stands for the cell around it (dequantisation): its density
    is the mean density

    .. math:: \frac1S \sum_{s=1}^S p(y + u_s \odot c \mid x)

    over a Latin hypercube :math:`u_s` of :math:`[-\tfrac12, \tfrac12]^D`, which each call in training mode draws anew.
    Without cells, the density could grow without bound at the values of the targets. On average this loss is no less
    than minus the logarithm of the probability of the cell over its volume (Burda, Grosse & Salakhutdinov, 2016).

    Args:
        network: Network, or an ensemble.
        cell: Size c of the cells in the units of y, ``(D,)``; 0 for outputs that are on no grid.
        num_points: Number S of points in each cell.

    Raises:
        ValueError: If the sizes of the cells are not D finite numbers, or if ``num_points`` is not positive.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders.
        McKay, Beckman & Conover (1979), A comparison of three methods for selecting values of input variables.
        Theis, van den Oord & Bethge (2016), A note on the evaluation of generative models.

    >>> network = MixtureDensityNetwork(1, 1)
    >>> NegativeLogLikelihood(network)(torch.randn(8, 1), torch.randn(8, 1)).shape
    torch.Size([8])
    >>> counts = NegativeLogLikelihood(network, cell=torch.ones(1))
    >>> counts(torch.randn(8, 1), torch.arange(8.0).unsqueeze(1)).shape
    torch.Size([8])
    >>> ensemble = DeepEnsemble(network, size=3)
    >>> NegativeLogLikelihood(ensemble)(torch.randn(3, 8, 1), torch.randn(3, 8, 1)).shape
    torch.Size([3, 8])
    """

    cell: Tensor | None
    num_points: int

    def __init__(
        self,
        network: MixtureDensityNetwork | DeepEnsemble,
        cell: Any = None,
        num_points: int = 8,
    ) -> None:
        super().__init__()
        require_counts(num_points=num_points)
        cell = None if cell is None else _as_cells(cell, network.dim_out)
        self.network, self.num_points = network, int(num_points)
        self.register_buffer("cell", cell, persistent=False)

    def extra_repr(self) -> str:
        """Describe the cells in a module's printout."""
        return "" if self.cell is None else f"cell={self.cell.tolist()}, num_points={self.num_points}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N, ...)``, or ``(M, N, ...)`` for an ensemble."""
        if self.cell is None:
            return self.network.loss(x, y)
        targets = as_targets(y, "y", self.cell.device)
        targets = targets.unsqueeze(-1) if len(self.cell) == 1 and targets.shape[-1:] != (1,) else targets
        if targets.shape[-1:] != self.cell.shape:
            got = tuple(targets.shape)
            raise ValueError(f"y: expected vectors of {len(self.cell)}, as the cells are, got shape {got}")
        cell = self.cell.to(targets.device, targets.dtype)
        points = points_in_cells(targets, cell, self.num_points, anew=self.training)
        points = kept_inside(points, targets, self.network.architecture.head.transform)
        losses = self.network.loss(x, points, replicated=True)
        return math.log(self.num_points) - losses.neg().logsumexp(0)


def _as_cells(cell: Any, dim: int) -> Tensor:
    """Convert sizes of cells, one for each output or one for all, to a tensor ``(D,)``."""
    sizes = as_tensor(cell, "cell")
    if sizes.shape not in ((), (dim,)) or not bool((sizes.isfinite() & (sizes >= 0)).all()):
        raise ValueError(f"cell: expected {dim} finite numbers, none negative, got {shown(cell)}")
    return sizes.expand(dim).contiguous()


class ContinuousRankedProbability(nn.Module):
    r"""Continuous ranked probability score (CRPS), summed over the outputs in standardised units: one loss per row.

    .. math:: \sum_d \mathrm{CRPS}(F_d(\cdot \mid x), y_d) / s_d

    The CRPS grows linearly with the distance of an outlier, more slowly than a log-density, so that no single row
    dominates. A target that is NaN adds nothing.

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
        y = require_exact(self.network.targets(y, mixture.batch_shape), "the CRPS")
        missing = y.isnan()
        score = scores.crps(mixture, torch.where(missing, mixture.mean.detach(), y)) / self.network.head.scale
        return score.masked_fill(missing, 0.0).sum(-1)


class NegativeElbo(nn.Module):
    r"""Negative evidence lower bound (ELBO) of ``network.model`` and a guide, in nats per row.

    .. math:: E_{q(w)}\left[-\log p(y_n \mid x_n, w)\right] + \frac{\beta}{N} \, \mathrm{KL}(q(w) \,\|\, p(w))

    The estimate is by Monte Carlo with pathwise gradients; its mean over the rows, times N, is minus the ELBO of a
    minibatch. In evaluation mode the loss is the first term alone: the score of held-out rows under draws from the
    guide.

    Only parameters of this module are trained; Pyro's parameter store stays as it was.

    Args:
        network: Network with latent weights. Without latent weights there is no second term.
        guide: Guide of ``network.model``; the first call sets an AutoGuide up.
        num_data: Number N of rows in the whole of the data.
        num_particles: Draws of the weights for each estimate.
        kl_weight: :math:`\beta`; 1 is the ELBO.
        kl_warmup: Steps over which :math:`\beta` grows from 0 to ``kl_weight`` (KL annealing; Bowman et al., 2016).

    Raises:
        ValueError: If a count is not positive. When called: if the guide has other sites than the model, draws from a
            distribution without pathwise gradients, or has parameters in Pyro's parameter store alone.

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
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._is_owned = False

    def extra_repr(self) -> str:
        """Describe the estimate in a module's printout."""
        guide = "" if isinstance(self.guide, nn.Module) else f", guide={getattr(self.guide, '__name__', self.guide)}"
        kl = f"kl_weight={self.kl_weight}, kl_warmup={self.kl_warmup}"
        return f"num_data={self.num_data}, num_particles={self.num_particles}, {kl}{guide}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N,)``."""
        with own_store():
            draws, log_q = self.draw(x, y)
            losses, log_prior = self.score(draws, x, y)
            if not self._is_owned:
                self._require_owned(x, y)
        if not self.training or not draws:
            return losses.mean(0)
        self.step += 1
        beta = self.kl_weight * min(1.0, self.step.item() / max(1, self.kl_warmup))
        return losses.mean(0) + beta * (log_q - log_prior).mean() / self.num_data

    def draw(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Draw S values at all sites of the guide, ``(S, ...)`` by name, and compute their log-density, ``(S,)``."""
        return draw_from(self.guide, self.num_particles, x, y, num_data=self._num_data(x), pathwise=True)

    @torch.no_grad()
    def _require_owned(self, x: Tensor, y: Tensor) -> None:
        """Raise a ``ValueError`` if a parameter would not be trained.

        Traces without vmap show it, because under vmap no parameter gets into Pyro's parameter store.
        """
        with own_generators(), KeepFrozen(), evaluating(self):  # else batch norm would count these rows twice
            for part in (self.guide, self.network.model):
                poutine.trace(part).get_trace(x, y, num_data=self._num_data(x))
        require_owned(self)
        self._is_owned = True

    def _num_data(self, x: Tensor) -> int:
        """Return the number of rows in the whole of the data, which held-out rows may exceed."""
        return self.num_data if self.training else max(self.num_data, len(x))

    def score(self, draws: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses ``(S, N)`` of the rows given draws, and the prior log-density ``(S,)`` of the draws."""

        def score(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
            model = poutine.condition(self.network.model, data=draw)
            trace = poutine.trace(model).get_trace(x, y, num_data=self._num_data(x))
            require_sites("guide", expected=latent_sites(trace, draw).keys() - {"y"}, got=draw.keys())
            likelihood: dict[str, Any] = dict(trace.nodes["y"])
            log_prior = log_density_at(draw, trace)
            return -likelihood["fn"].log_prob(likelihood["value"]), log_prior

        if not draws and not self.network.latent and type(self.network).model is MixtureDensityNetwork.model:
            return self.network.loss(x, y).unsqueeze(0), y.new_zeros(1)  # nothing is latent: no need to trace the model
        if self.num_particles == 1 or not draws:
            losses, log_prior = score({name: value[0] for name, value in draws.items()})
            return losses.unsqueeze(0), log_prior.unsqueeze(0)
        with unvalidated(), OwnParameters():
            losses, log_prior = over_draws(score, draws, self.network)
        return losses, log_prior


class Memberwise(nn.Module):
    r"""Objective over ``ensemble.stacked``, evaluated for each member of the ensemble and each of its rows, ``(M, N)``.

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
        y = require_exact(y, "an objective that is mapped over members")

        def call(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
            rows = draw.pop("x"), draw.pop("y")
            return (functional_call(self.objective, draw, rows, tie_weights=False),)

        with isolated():
            return over_draws(call, {**self._tensors(), "x": x, "y": y}, self.objective)[0]

    def _tensors(self) -> dict[str, Tensor]:
        """Collect tensors by name; a module that has several names counts once.

        Otherwise ``functional_call`` would leave a tensor behind that it has put into a module twice.
        """
        parts = [(name and f"{name}.", part) for name, part in self.objective.named_modules()]
        return {
            prefix + name: tensor
            for prefix, part in parts
            for named in (part.named_parameters, part.named_buffers)
            for name, tensor in named(recurse=False)
        }


class WeightedSum(nn.Module):
    r"""Weighted sum of objectives :math:`\sum_i a_i \, \ell_i(x, y)`.

    Args:
        objectives: Objectives :math:`\ell_i`.
        weights: Weights :math:`a_i`, finite and not negative.

    Raises:
        ValueError: If there is not one weight for each objective, or if a weight is negative or not finite.

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
        return torch.stack([w * o(x, y) for w, o in zip(self.weights, self.objectives, strict=True)]).sum(0)
