r"""Trainees: what :func:`pyro_mdn.fit` does differently for a network and for the members of an ensemble."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor, missing
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.networks.starting_point import draw_anew_
from pyro_mdn.support.process_state import evaluating
from pyro_mdn.training.batches.members import MemberBatches, MemberRows, SharedBatches
from pyro_mdn.training.batches.preparation import Batches, prepare, prepare_members
from pyro_mdn.training.batches.target_grids import grid_spacing
from pyro_mdn.training.ensemble_loop import MemberLoop
from pyro_mdn.training.loop import Loop, copied
from pyro_mdn.training.objectives import Memberwise, NegativeElbo, NegativeLogLikelihood
from pyro_mdn.training.result import FitResult

__all__ = [
    "CollapseWarning",
    "EnsembleTrainee",
    "NetworkTrainee",
    "Trainee",
    "put_back_if_refused",
    "require_trainable",
    "trainee_of",
]

_DEAD = 1e-3

AnyBatches = Batches | MemberBatches | SharedBatches


class CollapseWarning(UserWarning):
    """Components of a trained mixture explain almost no rows: fewer would do, or the training went wrong."""


class Trainee(ABC):
    """Model that is trained, with the steps in which kinds of models differ.

    Attributes:
        loop: Class of the training loop.
        module: The model.
        network: Network that has the tensors of the model.
    """

    loop: type[Loop]
    module: nn.Module
    network: MixtureDensityNetwork

    @abstractmethod
    def prepare(self, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None) -> tuple[Any, Any]:
        """Prepare batches to train on, and rows or batches that are held out."""

    @abstractmethod
    def objective(self, given: nn.Module | None, cell: Tensor | None) -> nn.Module:
        """Return an objective with one loss per row: the given one, or the likelihood of targets in these cells."""

    @abstractmethod
    def targets(self, rows: Rows) -> TargetsOrTensor:
        """Return representative targets (those of member 0, for an ensemble)."""

    def cell(self, rows: Rows) -> Tensor:
        """Find the size of the cells of targets on a grid, ``(D,)``; 0 for outputs that are on no grid."""
        targets, head = self.targets(rows), self.network.head
        exact = targets.exact_points() if isinstance(targets, Targets) else targets

        def spacing(units: Units, y: Tensor) -> Tensor:
            return grid_spacing(y) if units.has_cells else y.new_zeros(y.shape[-1])

        return head.units.over_parts(spacing, exact).to(head.scale)

    @abstractmethod
    def draw_anew_(self) -> None:
        """Draw all weights anew except frozen ones; a ``ValueError`` if a layer cannot do that."""

    @abstractmethod
    def initialize_(self, rows: Rows, y: TargetsOrTensor) -> None:
        """Set scalers and components from inputs of rows and targets y."""

    @abstractmethod
    def units(self, rows: Rows) -> tuple[Units, Units]:
        """Return the units of x and those of y, in shapes that broadcast with rows."""

    @abstractmethod
    def summarize(self, result: FitResult, rows: Rows) -> None:
        """Add to a result which share of these rows each component explains."""


class NetworkTrainee(Trainee):
    """One network."""

    loop = Loop

    def __init__(self, network: MixtureDensityNetwork) -> None:
        self.module = self.network = network

    def prepare(self, x: Any, y: Any, weight: Any, validation: Any, batch_size: int | None) -> tuple[Any, Any]:
        return prepare(self.network, x, y, weight, validation, batch_size)

    def objective(self, given: nn.Module | None, cell: Tensor | None) -> nn.Module:
        return NegativeLogLikelihood(self.network, cell) if given is None else given

    def targets(self, rows: Rows) -> TargetsOrTensor:
        return rows.y

    def draw_anew_(self) -> None:
        draw_anew_(self.network)

    def initialize_(self, rows: Rows, y: TargetsOrTensor) -> None:
        self.network.initialize_(rows.x, y)

    def units(self, rows: Rows) -> tuple[Units, Units]:
        return self.network.input_units, self.network.head.units

    def summarize(self, result: FitResult, rows: Rows) -> None:
        result.component_weights = component_weights(self.network, rows)
        if dead := sum(share < _DEAD for share in result.component_weights):
            text = f"fit: {dead} of {self.network.n_components} components explain less than {_DEAD:.1%} of the rows"
            warnings.warn(f"{text} each; fewer would do", CollapseWarning, stacklevel=3)  # where fit was called


class EnsembleTrainee(Trainee):
    """The members of an ensemble, trained side by side, each with its own rows."""

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

    def targets(self, rows: Rows) -> TargetsOrTensor:
        return rows.y[0]

    def draw_anew_(self) -> None:
        self.ensemble.reset_parameters()

    def initialize_(self, rows: Rows, y: TargetsOrTensor) -> None:
        self.ensemble.initialize_(rows.x, y)

    def units(self, rows: Rows) -> tuple[Units, Units]:
        x_dims = rows.x.ndim - len(self.network.input_shape)
        return self.ensemble.input_units(x_dims), self.ensemble.units(rows.y.ndim - 1)

    def summarize(self, result: FitResult, rows: Rows) -> None:
        if isinstance(rows, MemberRows):
            for i, member in enumerate(result.members):
                member.component_weights = component_weights(self.ensemble.member(i), rows.member(i))


def trainee_of(model: MixtureDensityNetwork | DeepEnsemble) -> Trainee:
    """Choose the trainee of a model."""
    return EnsembleTrainee(model) if isinstance(model, DeepEnsemble) else NetworkTrainee(model)


@torch.no_grad()
def component_weights(network: MixtureDensityNetwork, rows: Rows) -> list[float]:
    """Compute the mean responsibility of each component for the rows that have an observed target."""
    with evaluating(network):
        shares = [network(part.x).responsibilities(part.y)[~missing(part.y).all(-1)] for part in rows.chunks(1024)]
    return torch.cat(shares).double().mean(0).tolist()


def require_trainable(network: nn.Module, objective: nn.Module | None, guide: Any) -> None:
    """Raise a ``ValueError`` unless network, objective and guide belong together and have something to train."""
    if not isinstance(network, MixtureDensityNetwork | DeepEnsemble):
        expected = "a MixtureDensityNetwork or a DeepEnsemble"
        raise ValueError(f"network: expected {expected}, got {type(network).__name__}")
    if objective is not None and guide is not None:
        raise ValueError("objective, guide: expected one of the two, got both")
    if isinstance(network, DeepEnsemble):
        if guide is not None:
            raise ValueError("guide: expected None for an ensemble, which has no latent weights")
        network = network.stacked
    if objective is not None and not (isinstance(objective, nn.Module) and network in objective.modules()):
        raise ValueError(f"objective: expected a module with the network in it, got {type(objective).__name__}")
    if guide is not None and not callable(guide):
        raise ValueError(f"guide: expected a guide of network.model, got {type(guide).__name__}")
    if objective is None and guide is None and isinstance(network, MixtureDensityNetwork) and network.latent:
        raise ValueError("guide: expected one for a network with latent weights, got none")
    trained = network if objective is None else objective
    unset = any(isinstance(part, NegativeElbo) for part in trained.modules())  # an AutoGuide makes parameters later
    if guide is None and not unset and not any(p.requires_grad for p in trained.parameters()):
        raise ValueError("network: expected parameters to train, got none that requires a gradient")


@contextmanager
def put_back_if_refused(modules: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Move modules to a device; after an error, restore their devices, their tensors and their training modes."""
    before = [(module, copied(module.state_dict()), _device(module)) for module in modules]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            if device is not None:
                module.to(device)
        yield
    except BaseException:
        for module, state, place in before:
            if place is not None:
                module.to(place)
            # Not strictly: an AutoGuide that was set up inside has more parameters than before.
            module.load_state_dict(state, strict=False)
        for part, training in modes:
            part.training = training
        raise


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)
