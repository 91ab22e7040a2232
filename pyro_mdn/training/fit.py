r"""Training: one call from data to a trained network."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from pyro.infer.autoguide import AutoGuide, init_to_value
from torch import Tensor, nn

from pyro_mdn.distributions.observations.targets import Targets, is_complete
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.posteriors.log_joint import supported_start
from pyro_mdn.support.arrays import names_of_columns
from pyro_mdn.support.fingerprint import described
from pyro_mdn.support.process_state import isolated, require_owned, seeded
from pyro_mdn.support.settings import collected, takes
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.batches.kinds_of_targets import TargetHint, warn_of_kinds
from pyro_mdn.training.batches.missing_targets import MissingTargetsWarning, few_missing
from pyro_mdn.training.batches.preparation import Batches
from pyro_mdn.training.batches.streams import Streamed
from pyro_mdn.training.batches.target_grids import kept_inside
from pyro_mdn.training.checkpoint import Checkpoint, CheckpointedTraining
from pyro_mdn.training.loop import Loop, copied
from pyro_mdn.training.objectives import NegativeElbo, NegativeLogLikelihood
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import (
    STEPS,
    VALIDATION,
    Smoothing,
    blur,
    default_input_noise,
    default_smoothing,
    default_weight_decay,
)
from pyro_mdn.training.settings import FitArguments, LoopSettings
from pyro_mdn.training.trainee import CollapseWarning, Trainee, put_back_if_refused, require_trainable, trainee_of

__all__ = ["CollapseWarning", "MissingTargetsWarning", "TargetHint", "fit", "warn_if_compiling_is_slow"]

# Of 10 ms each: the fifth of them that compiling may save comes to what compiling takes.
_STEPS_TO_COMPILE = 10_000


@takes(FitArguments)
def fit(network: MixtureDensityNetwork | DeepEnsemble, x: Any, y: Any = None, **settings: Any) -> FitResult:
    r"""Train a network on data by maximum likelihood, or by another objective; the network changes in place.

    Training minimises the negative log-likelihood by AdamW, with gradient clipping, a warm-up and a cosine schedule of
    the learning rate, and keeps an exponential moving average of the weights. Noise on inputs and targets smooths the
    density and fades. Early stopping compares the averaged weights of all epochs on held-out rows; the network then has
    those of the best epoch.

    During training, dropout is on and batch norm learns, whatever mode the network was in. Afterwards the network, its
    objective and its guide are in evaluation mode, so that predictions are the same each time. A training loop of your
    own starts with ``network.train()``.

    Ctrl-C ends the training as early stopping would: the network has the best weights so far, the result says
    ``interrupted``, and the checkpoint stays as it was last written.

    Args:
        network: The network to train. The members of a :class:`DeepEnsemble` are trained in one vectorised pass, each
            with its own split, order, noise, early stopping and best epoch; ``FitResult.members`` has the result of
            each. An ensemble takes the default loss or an objective that has a loss for each member, but neither
            ``guide`` nor ``refit``.
        x: Inputs ``(N, ..., dim_in)``: numbers in a tensor, NumPy array, data frame or nested lists. A
            ``torch.utils.data.Dataset`` or ``DataLoader`` of ``(x, y)`` or ``(x, y, weight)`` stands for both x and y.
            The network remembers the names of a data frame's columns, and then refuses other columns, or another order.
        y: Targets ``(N, ..., D)``, likewise. For D = 1, ``(N, ...)`` is read as ``(N, ..., 1)``. An entry that is NaN
            or masked is a missing target: its row counts with the density of its other entries. Neither x nor weights
            may be masked. :class:`Targets` stand for entries that are censored, or known to lie in an interval: these
            count with their probability. The components then start at the middles or the only limits of the intervals.
        objective: Module that contains the network and is called as ``objective(x, y)``; it gives one loss for each
            row. By default :class:`NegativeLogLikelihood`, over cells where targets are on a grid. Losses may also be
            of steps or outputs, in the shape of the targets ``(N, ..., D)`` up to some dimension: those count that have
            an observed target in their place.
        guide: Guide of ``network.model``, for stochastic variational inference (SVI): the objective is then
            :class:`NegativeElbo`, and by default there is no validation, noise or weight decay, because the prior
            regularises. Give an AutoGuide, a module that owns its parameters, or a class of AutoGuides such as
            ``AutoNormal``, from which ``fit`` makes a guide that starts at the weights that the network has. The result
            has the guide.
        sample_weight: Weights of the rows, ``(N,)``; only their ratios matter. Rows of weight 0 are left out, as are
            rows without a target. Scalers and starting components count all other rows equally.
        few_rows: Whether smoothing starts strong and fades fast, as is right for few rows: this sets the defaults of
            ``input_noise``, ``target_noise``, ``final_noise``, ``fading``, ``first_weight_decay``, ``validation`` and
            ``refit``. By default it does for fewer than 2000 rows with a target (steps of sequences count as rows).
        device: Device to train on; the network is moved there and stays.
        callbacks: Functions that are called after every epoch, also of a refit, with the :class:`FitResult` so far, and
            with the generators and settings of the process as the caller has them. Training stops when a callback
            returns True. During a callback the network has its current weights, not the averaged weights that the
            history is about.
        seed: Seed of split, starting components, batches and noise; by default it is drawn from torch's generator.
            Apart from that the generators stay as they were. The seed does not decide the first weights of the hidden
            layers: ``MixtureDensityNetwork(..., seed=)`` does, or ``reinitialize``.
        progress: Show a progress bar.
        **settings: Fields of :class:`Optimization`, :class:`TrainingLoop`, :class:`NoiseSchedule`,
            :class:`EarlyStopping`, :class:`Initialization`, :class:`VariationalInference` and :class:`Checkpointing`,
            such as ``lr=0.01``, or whole groups, such as ``optimization=Optimization(lr=0.01)``.

    Raises:
        ValueError: If the data, a setting or the checkpoint are not usable; nothing is changed then.
        FloatingPointError: If the loss, its gradient or the validation loss is not finite, with epoch and batch; the
            network keeps its best weights so far.

    Warns:
        CollapseWarning: If components died: they explain less than a thousandth of the rows each.
        UserWarning: If the checkpoint does not tell whether some part is the same; the warning names the part.
        UserWarning: If there are fewer than 10 000 steps to compile for.
        TargetHint: If all targets are small counts, or positive and skewed, or positive or zero, or within (0, 1), or
            some lie far from all others, and neither a family nor a target transform was chosen. Nothing is changed.
        MissingTargetsWarning: If so few entries of an output are NaN, less than one in twenty, that an operation may
            have made them by accident. Padding of sequences does not count, nor do targets that came with a mask, of
            ``numpy.ma`` or ``torch.masked`` (as batches of a loader may, of the latter). ``FitResult.unobserved`` has
            the numbers in any case.

    >>> x = torch.linspace(-1, 1, 100).unsqueeze(-1)
    >>> result = fit(MixtureDensityNetwork(1, 1), x, x**2, max_epochs=2, seed=0, progress=False)
    >>> len(result.history)
    2
    """
    given = collected(FitArguments, "fit", {"network": network, "x": x, "y": y, **settings})
    require_trainable(network, given.objective, given.guide)
    checkpoint = Checkpoint(given.checkpoint, given.checkpoint_every, resume=given.resume)
    seed = _seed(given.seed, checkpoint)
    trainee = trainee_of(network)
    modules = [part for part in (network, given.objective, given.guide) if isinstance(part, nn.Module)]
    with _isolated(seed):
        with put_back_if_refused(modules, given.device):
            validation = VALIDATION if given.held_out is None and _has_prior(given.objective) else given.held_out
            batches, held_out = trainee.prepare(x, y, given.sample_weight, validation, given.batch_size)
            _require_fitting(given, batches, held_out)
            if given.reinitialize:
                with seeded(seed):  # of its own: everything else is drawn as for a network just built
                    trainee.draw_anew_()
            rows = batches.head(given.rows_to_start)
            plan = _planned(given, trainee, batches, held_out, rows, seed)
            losses = plan.set_up(rows)
            if checkpoint.path is not None:
                checkpoint.require(plan.describe(batches, held_out), plan.describe_modules)
            start = checkpoint.tensors("start") or copied(plan.objective.state_dict())
            loop = plan.loop(batches, held_out, rows, losses)
            checkpoint.restore(loop)
        trainee.network.input_names = names_of_columns(x)
        _warn_of_missing_targets(batches)
        targets = trainee.targets(rows)
        warn_of_kinds(targets.exact_points() if isinstance(targets, Targets) else targets, trainee.network.head)
        if given.compile:
            warn_if_compiling_is_slow(loop.steps)
        training = CheckpointedTraining(checkpoint, given.callbacks, progress=given.progress)
        try:
            refit = plan.settings.refit
            result = training.refit(loop, start, plan.again(losses)) if refit else training.run(loop)
        finally:
            for module in (plan.objective, *modules):
                module.eval()
        result.guide = plan.guide
        if not _has_prior(plan.objective):
            trainee.summarize(result, rows)
        return result


@dataclass(frozen=True)
class _Plan:
    """What is trained, and how."""

    trainee: Trainee
    objective: nn.Module
    guide: Any
    settings: LoopSettings
    seed: int
    cell: Tensor  # of targets on a grid, 0 for outputs that are on none
    initialize: bool | Literal["anew"]  # as ``fit`` was told; in place of True, "anew" says ``reinitialize=True``

    def describe(self, batches: Batches, held_out: Rows | Streamed | None) -> dict[str, Any]:
        """Tell runs apart by plain values."""
        return {
            "seed": self.seed,
            "settings": self.settings.in_checkpoints(),
            "initialize": self.initialize,
            "compile": self.settings.compile,
            "refit": self.settings.refit,
            "batches": len(batches),
            "data": batches.digest(),
            "validation": held_out.digest() if held_out is not None else None,
        }

    def describe_modules(self, form: int = 0) -> dict[str, str]:
        """Describe what the modules compute that are trained, in one of ``FORMS``."""
        return described(network=self.trainee.module, objective=self.objective, values=False, form=form)

    def set_up(self, rows: Rows) -> Tensor:
        """Call the objective on some rows and return their losses; an AutoGuide makes its parameters in this call.

        Raises:
            ValueError: If the objective cannot be trained.
        """
        rows = rows[:2]
        with torch.no_grad():
            losses = self.objective.eval()(rows.x, rows.y)
        if losses.shape[: rows.leading] != rows.x.shape[: rows.leading]:
            raise ValueError(f"objective: expected one loss for each of {len(rows)} rows, got {tuple(losses.shape)}")
        require_owned(self.objective)
        return losses

    def loop(self, batches: Batches, held_out: Rows | Streamed | None, rows: Rows, losses: Tensor) -> Loop:
        """Build a training loop, with scalers and components set from rows of the data."""
        trainee = self.trainee
        least = self.cell / 6 * (self.settings.target_noise > 0)  # 99.7 % of that noise stays within the cell
        over_cells = any(isinstance(o, NegativeLogLikelihood) and o.cell is not None for o in self.objective.modules())
        if self.initialize:
            trainee.initialize_(rows, kept_inside(blur(rows.y, least), rows.y, trainee.network.head.transform))
        if self.guide is not None and isinstance(self.objective, NegativeElbo):
            self.objective.num_data = batches.num_rows
        bound = least if bool(least.any()) and not over_cells else None
        more = {"row_weight": rows.row_weight(losses), "least_noise": bound}
        return trainee.loop(self.objective, batches, held_out, trainee.units(rows), self.settings, **more)

    def again(self, losses: Tensor) -> Callable[[InMemory], Loop]:
        """Build a function that starts the same training again on other rows, none of which are held out."""

        def begin(batches: InMemory) -> Loop:
            torch.manual_seed(self.seed)
            return self.loop(batches, None, batches.head(self.settings.rows_to_start), losses)

        return begin


def _planned(
    given: FitArguments, trainee: Trainee, batches: Batches, held_out: Rows | Streamed | None, rows: Rows, seed: int
) -> _Plan:
    """Plan a training: its objective, and the settings that depend on the data."""
    max_epochs = given.max_epochs or max(100, math.ceil(STEPS / len(batches)))
    initialize, guide, objective = given.starts_anew, given.guide, given.objective
    if isinstance(guide, type):
        guide = _started(guide, trainee.network, rows, initialize=initialize)
        initialize = False
    if guide is not None:
        warmup = math.ceil(given.kl_warmup * max_epochs * len(batches))
        counts = {"num_particles": given.num_particles, "kl_warmup": warmup}
        objective = NegativeElbo(trainee.network, guide, batches.num_rows, **counts)
    cell = trainee.cell(rows) * (given.target_noise != 0)
    objective = trainee.objective(objective, cell if bool(cell.any()) else None)
    targets = batches.num_rows * rows.targets_per_row()
    smoothing = default_smoothing(_targets_in_all(given, batches, held_out, targets), given.few_rows)
    if not _may_refit(batches, held_out) or given.validation is not None:
        smoothing = replace(smoothing, refit=False)
    settings = _resolved(given, objective, max_epochs, targets, smoothing, trainee.network.input_units)
    return _Plan(trainee, objective, guide, settings, seed, cell, "anew" if given.reinitialize else initialize)


def _has_prior(objective: nn.Module | None) -> bool:
    """Check whether the prior in an ELBO regularises, so that noise and weight decay need not."""
    return objective is not None and any(isinstance(part, NegativeElbo) for part in objective.modules())


def _targets_in_all(given: FitArguments, batches: Batches, held_out: Any, trained: float) -> float:
    """Count the targets of all rows, also of those split off, as the split did; those of a stream are estimated."""
    if not isinstance(batches, InMemory):
        return trained
    apart = type(batches) is InMemory and (given.validation is None or isinstance(given.validation, Real))
    return batches.rows.targets() + (held_out.targets() if apart and held_out is not None else 0)


def _resolved(
    given: FitArguments, objective: nn.Module, max_epochs: int, targets: float, smoothing: Smoothing, units: Units
) -> LoopSettings:
    """Put numbers in place of the defaults that depend on the data."""
    regularized = not _has_prior(objective)
    smoothing = smoothing if regularized else Smoothing()
    weight_decay = regularized * default_weight_decay(targets)
    first = None if smoothing.first_weight_decay is None else max(smoothing.first_weight_decay, weight_decay)
    return LoopSettings.resolved(
        given,
        max_epochs=max_epochs,
        patience=math.ceil(max_epochs / 4),
        weight_decay=weight_decay,
        first_weight_decay=first if given.weight_decay is None else None,
        input_noise=regularized * default_input_noise(units, smoothing.noise),
        target_noise=regularized * smoothing.noise,
        final_noise=smoothing.final_noise,
        fading=smoothing.fading,
        refit=smoothing.refit,
    )


def _started(guide: type, network: MixtureDensityNetwork, rows: Rows, *, initialize: bool) -> Callable[..., Any]:
    """Build a guide of this class that starts at the weights that the network has."""
    if not issubclass(guide, AutoGuide):
        raise ValueError(f"guide: expected a guide, or a class of AutoGuides, got {guide.__name__}")
    if initialize:
        network.initialize_(rows.x, rows.y)
    settings: dict[str, Any] = {"init_loc_fn": init_to_value(values=supported_start(network, rows))}
    if "init_scale" in inspect.signature(guide).parameters:
        settings["init_scale"] = 0.01  # Pyro's 0.1 would drown what the network has learned
    return guide(network.model, **settings)


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Train with gradients, generators from a seed and an empty parameter store of Pyro's; restore all of it after."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(isolated())
        stack.enter_context(seeded(seed))
        yield


def _seed(given: int | None, checkpoint: Checkpoint) -> int:
    """Return the seed that was given, that of the run that goes on, or a new one."""
    if given is not None:
        return int(given)
    return checkpoint.run["seed"] if checkpoint.run else int(torch.randint(2**62, (), device="cpu"))


def _require_fitting(given: FitArguments, batches: Batches, held_out: Any) -> None:
    """Raise a ``ValueError`` if the data do not allow a refit or compilation that was asked for."""
    if given.refit and not _may_refit(batches, held_out):
        raise ValueError("refit: expected one network, and arrays with some rows held out")
    if given.compile and isinstance(batches, InMemory) and not is_complete(batches.rows.y):
        raise ValueError("compile: expected exact and complete targets, got missing ones or intervals")


def _may_refit(batches: Batches, held_out: Any) -> bool:
    return type(batches) is InMemory and isinstance(held_out, Rows)


def _warn_of_missing_targets(batches: Batches) -> None:
    if few := few_missing(batches.gaps):
        meant = "mask them by numpy.ma" if isinstance(batches, InMemory) else "filter this warning"
        text = f"fit: of y, {few} are NaN and count as not observed; {meant} if that is meant"
        warnings.warn(text, MissingTargetsWarning, stacklevel=3)  # of the caller of fit


def warn_if_compiling_is_slow(steps: int) -> None:
    """Warn if compiling an objective takes longer than it saves in so many steps."""
    if steps < _STEPS_TO_COMPILE:
        text = f"fit: compiling takes longer than it saves in {steps} steps, unless each takes long"
        warnings.warn(f"{text}; compile=False is quicker", stacklevel=3)
