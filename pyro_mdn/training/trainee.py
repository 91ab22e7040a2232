r"""What :func:`pyro_mdn.fit` trains: a network, or the members of an ensemble side by side."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.networks.starting_point import draw_anew_
from pyro_mdn.support.evaluation_mode import evaluating
from pyro_mdn.training.batches.members import MemberBatches, MemberRows, SharedBatches, prepare_members
from pyro_mdn.training.batches.sources import Batches, grid_spacing, prepare
from pyro_mdn.training.ensemble_loop import MemberLoop
from pyro_mdn.training.loop import FitResult, Loop
from pyro_mdn.training.objectives import Memberwise, NegativeLogLikelihood

__all__ = ["CollapseWarning", "EnsembleTrainee", "NetworkTrainee", "Trainee"]

_DEAD = 1e-3

AnyBatches = Batches | MemberBatches | SharedBatches


class CollapseWarning(UserWarning):
    """Components of a trained mixture are idle: fewer would do, or the training went wrong."""


class Trainee(ABC):
    """What there is to know of a model for training it.

    Attributes:
        loop: The kind of loop that trains it.
        module: The model.
        network: Network that has its tensors.
    """

    loop: type[Loop]
    module: nn.Module
    network: MixtureDensityNetwork

    @abstractmethod
    def prepare(self, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None) -> tuple[Any, Any]:
        """Batches to train on, and rows or batches held out."""

    @abstractmethod
    def objective(self, given: nn.Module | None, cell: Tensor | None) -> nn.Module:
        """Objective with a loss for each row: one that was given, or that for targets on a grid of these cells."""

    @abstractmethod
    def targets(self, rows: Rows) -> Tensor:
        """Representative targets (the rows of member 0, for an ensemble)."""

    def cell(self, rows: Rows) -> Tensor:
        """Size of the cells of targets on a grid, ``(D,)``; 0 for outputs that are on none."""
        return grid_spacing(self.targets(rows)).to(self.network.head.scale)

    @abstractmethod
    def draw_anew_(self) -> None:
        """Draw the weights anew, but for frozen ones; a ``ValueError`` if a layer cannot do that."""

    @abstractmethod
    def initialize_(self, rows: Rows, y: Tensor) -> None:
        """Set scalers and components from inputs of rows and targets y."""

    @abstractmethod
    def units(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Size of a standardised unit of x and of y, which broadcast with rows."""

    @abstractmethod
    def summarize(self, result: FitResult, rows: Rows) -> None:
        """Add to a result what the components do for these rows."""


class NetworkTrainee(Trainee):
    """One network."""

    loop = Loop

    def __init__(self, network: MixtureDensityNetwork) -> None:
        self.module = self.network = network

    def prepare(self, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None) -> tuple[Any, Any]:
        return prepare(self.network, x, y, weight, validation, batch_size)

    def objective(self, given: nn.Module | None, cell: Tensor | None) -> nn.Module:
        return NegativeLogLikelihood(self.network, cell) if given is None else given

    def targets(self, rows: Rows) -> Tensor:
        return rows.y

    def draw_anew_(self) -> None:
        draw_anew_(self.network)

    def initialize_(self, rows: Rows, y: Tensor) -> None:
        self.network.initialize_(rows.x, y)

    def units(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.network.x_scale, self.network.head.scale

    def summarize(self, result: FitResult, rows: Rows) -> None:
        result.component_weights = component_weights(self.network, rows)
        if dead := sum(share < _DEAD for share in result.component_weights):
            text = f"fit: {dead} of {self.network.n_components} components explain less than {_DEAD:.1%} of the rows"
            warnings.warn(f"{text} each; fewer would do", CollapseWarning, stacklevel=3)  # of the caller of fit


class EnsembleTrainee(Trainee):
    """The members of an ensemble, each with rows of its own."""

    loop = MemberLoop

    def __init__(self, ensemble: DeepEnsemble) -> None:
        self.module = self.ensemble = ensemble
        self.network = ensemble.stacked

    def prepare(self, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None) -> tuple[Any, Any]:
        member, bootstrap = self.ensemble.member(0), self.ensemble.bootstrap
        return prepare_members(member, self.ensemble.size, x, y, weight, validation, batch_size, bootstrap=bootstrap)

    def objective(self, given: nn.Module | None, cell: Tensor | None) -> nn.Module:
        if given is None:
            return NegativeLogLikelihood(self.ensemble, cell)
        return given if self.ensemble in given.modules() else Memberwise(given, self.ensemble.size)

    def targets(self, rows: Rows) -> Tensor:
        return rows.y[0]

    def draw_anew_(self) -> None:
        self.ensemble.reset_parameters()

    def initialize_(self, rows: Rows, y: Tensor) -> None:
        self.ensemble.initialize_(rows.x, y)

    def units(self, rows: Rows) -> tuple[Tensor, Tensor]:
        def aligned(unit: Tensor, value: Tensor) -> Tensor:
            return unit.reshape(len(unit), *(1,) * (value.ndim - unit.ndim), *unit.shape[1:])

        return aligned(self.network.x_scale, rows.x), aligned(self.network.head.scale, rows.y)

    def summarize(self, result: FitResult, rows: Rows) -> None:
        if isinstance(rows, MemberRows):
            for i, member in enumerate(result.members):
                member.component_weights = component_weights(self.ensemble.member(i), rows.member(i))


@torch.no_grad()
def component_weights(network: MixtureDensityNetwork, rows: Rows) -> list[float]:
    """Mean responsibility of each component for what was observed of the rows."""
    with evaluating(network):
        shares = [network(part.x).responsibilities(part.y)[~part.y.isnan().all(-1)] for part in rows.chunks(1024)]
    return torch.cat(shares).double().mean(0).tolist()
