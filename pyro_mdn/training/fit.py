r"""Training: one call from data to a trained network."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.infer.autoguide import AutoGuide, init_to_value
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.posteriors.log_joint import supported_start
from pyro_mdn.support.checks import require_counts, require_numbers, shown
from pyro_mdn.support.fingerprint import described
from pyro_mdn.support.process_state import isolated, require_owned, require_seed, seeded
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.batches.missing_targets import MissingTargetsWarning, few_missing
from pyro_mdn.training.batches.preparation import Batches
from pyro_mdn.training.batches.streams import Streamed
from pyro_mdn.training.checkpoint import Checkpoint
from pyro_mdn.training.loop import Loop, Settings, copied
from pyro_mdn.training.objectives import NegativeElbo, NegativeLogLikelihood
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import (
    FINAL_NOISE,
    INPUT_NOISE,
    LEARNING_RATE,
    STEPS,
    TARGET_NOISE,
    blur,
    default_weight_decay,
)
from pyro_mdn.training.trainee import CollapseWarning, EnsembleTrainee, NetworkTrainee, Trainee

__all__ = ["CollapseWarning", "MissingTargetsWarning", "fit"]

_ROWS_TO_START = 10_000
_STEPS_TO_COMPILE = 10_000  # of 10 ms, in which the fifth that compiling may save comes to what compiling takes


def fit(
    network: MixtureDensityNetwork | DeepEnsemble,
    x: Any,
    y: Any = None,
    *,
    objective: nn.Module | None = None,
    guide: Callable[..., Any] | None = None,
    num_particles: int = 1,
    kl_warmup: float = 0.2,
    sample_weight: Any = None,
    validation: float | Sequence[Any] | DataLoader | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = LEARNING_RATE,
    weight_decay: float | None = None,
    input_noise: float | None = None,
    target_noise: float | None = None,
    final_noise: float = FINAL_NOISE,
    patience: int | None = None,
    max_grad_norm: float = 1.0,
    initialize: bool | None = None,
    reinitialize: bool = False,
    refit: bool = False,
    skip_bad_batches: bool = False,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    callbacks: Sequence[Callable[[FitResult], object]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Train a network on data by its negative log-likelihood, or another objective; the network changes in place.

    AdamW with decay on weight matrices only, a warm-up and a cosine schedule, gradient clipping, and an exponential
    average of the weights. Inputs and targets get fresh noise every step, which smooths the density (Rothfuss et
    al., 2019). The noise fades over the schedule, so that early stopping on held-out rows also finds how much
    smoothing the data need. The averaged weights of the best epoch are kept.

    Dropout is on and batch norm learns while training, whatever mode the network was in. Afterwards the network, its
    objective and guide are in evaluation mode, so that predictions are the same each time; a training loop of your
    own starts by ``network.train()``.

    Ctrl-C ends the training as early stopping would: the network has the best weights so far, the result says
    ``interrupted``, and a checkpoint stays as it was last written.

    Args:
        network: The network. Or a :class:`DeepEnsemble`: its members are trained in one vectorised pass, each with
            its own split, order, noise, early stopping and best epoch, on the default loss or one that the objective
            says for each member; without ``guide`` and ``refit``. ``FitResult.members`` has the result of each.
        x: Inputs ``(N, ..., dim_in)``: numbers in a tensor, NumPy array, data frame or nested lists. Or a
            ``torch.utils.data.Dataset`` or ``DataLoader`` of ``(x, y)`` or ``(x, y, weight)``, without ``y``; scalers,
            start and mean weight are those of its first 10 000 rows, which are read once and stay in memory.
        y: Targets ``(N, ..., D)``, likewise. For D = 1, ``(N, ...)`` is read as ``(N, ..., 1)``. An entry that is NaN
            or masked was not observed: its row counts with the density of its other entries. (Neither x nor weights
            may be masked.)
        objective: Module called as ``objective(x, y)`` that gives one loss per row, of which the network is a part;
            by default :class:`NegativeLogLikelihood`, over cells where targets are on a grid. Losses may also be of
            steps or outputs, in the shape of the targets ``(N, ..., D)`` up to some dimension: those count that have
            an observed target in their place.
        guide: Guide of ``network.model``, for SVI: the objective is :class:`NegativeElbo`. An AutoGuide, or a module
            that owns its parameters; or a class of AutoGuides, such as ``AutoNormal``, of which one is made that
            starts from the weights that the network had. It comes back in the result. By default there is no
            validation, noise or weight decay then: the prior is what regularises.
        num_particles: Draws from the guide for each step, in one vectorised pass.
        kl_warmup: Share of the steps over which the divergence from the prior grows to its weight in the ELBO
            (Bowman et al., 2016).
        sample_weight: Weights of the rows, ``(N,)``; only their ratios matter. Rows of weight 0 are left out, as are
            rows without a target; scalers and start count the others equally.
        validation: Fraction of the rows to hold out, a pair ``(x, y)``, a triple ``(x, y, weight)``, or a loader; 0
            for none, and so no early stopping. By default 0.1, but 0 for a loader or a guide.
        max_epochs: Passes over the training rows at most; the schedule is spread over them. By default as many as
            make 9000 steps, but 100 at least.
        batch_size: Rows per step at most; by default 1/64 of the training rows, but 32 at least and 256 at most.
        lr: Largest learning rate; by default 0.02.
        weight_decay: Decoupled decay of the weight matrices (Loshchilov & Hutter, 2019); by default 20 over the
            number of training rows (0.5 at most; all steps of a sequence count), since a prior on the weights
            matters less the more data there are. Steps without a target do not count.
        input_noise: Standard deviation of the noise on x at the start, in standardised units; by default 0.1.
        target_noise: The same for y; by default 0.1. Unless it is 0, targets on a grid (values of five rows or more
            each) stand for their cells, since a density could grow there without bound: by the default objective,
            or by noise of a sixth of the spacing that stays, and that held-out targets have too.
        final_noise: Share of the noise that is left at the end of the schedule; by default 0.03.
        patience: Epochs without improvement of the validation loss before training stops; by default a quarter of
            ``max_epochs``.
        max_grad_norm: Gradients are scaled down to this norm.
        initialize: Set scalers and components from the training rows first; ``False`` to train a network further. By
            default they are set, but not for a guide of a network that has them already. Hidden layers stay as they
            are: the constructor has drawn them, or an earlier ``fit`` has trained them.
        reinitialize: Draw all weights of the network anew from the seed first, but for frozen ones, by
            ``reset_parameters`` of its layers: what is learned then depends on data, settings and seed alone. Not for
            latent weights.
        refit: Once the best epoch is known, start again and train on all rows up to it.
        skip_bad_batches: Leave out a batch whose loss or gradient is not finite, and count it, instead of stopping.
        device: Where to train; the network is moved there and stays.
        autocast: ``torch.bfloat16`` for matrix products of that precision.
        compile: Compile the objective by ``torch.compile``; targets must be complete then. That takes half a minute to
            some minutes, and makes steps up to a fifth quicker: it pays for tens of thousands of steps, or long ones.
        callbacks: Each is called after every epoch with the :class:`FitResult` so far, with the generators and settings
            of the process as the caller has them; training stops if one returns True. The network then has its
            current weights, not the averages that the history is about.
        checkpoint: File to write the whole state to, every ``checkpoint_every`` epochs and at the end.
        checkpoint_every: Epochs from one checkpoint to the next.
        resume: Go on from the checkpoint, if there is one, bit for bit as if the run had not stopped. Network,
            objective, data and settings must be those of that run; types, attributes and hooks of all parts count.
        seed: Seed of split, start, batches and noise; by default one is drawn from torch's generator. Apart from
            that the generators stay as they were. It does not decide the first weights of the hidden layers:
            ``MixtureDensityNetwork(..., seed=)`` does, or ``reinitialize``.
        progress: Show a progress bar.

    Raises:
        ValueError: If the data, a setting or the checkpoint are not usable; nothing is changed then.
        FloatingPointError: If the loss, its gradient or the validation loss is not finite, with epoch and batch; the
            network keeps its best weights so far.

    Warns:
        CollapseWarning: If components died: they explain less than a thousandth of the rows each.
        UserWarning: If the checkpoint does not tell whether some part is the same; it is named.
        UserWarning: If there are fewer than 10 000 steps to compile for.
        MissingTargetsWarning: If so few entries of an output are NaN, less than one in twenty, that an operation may
            have made them. Padding of sequences does not count, nor do targets that came with a mask, of ``numpy.ma``
            or ``torch.masked`` (as batches of a loader may, of the latter). ``FitResult.unobserved`` has the
            numbers in any case.

    >>> x = torch.linspace(-1, 1, 100).unsqueeze(-1)
    >>> result = fit(MixtureDensityNetwork(1, 1), x, x**2, max_epochs=2, seed=0, progress=False)
    >>> len(result.history)
    2
    """
    require_counts(max_epochs=max_epochs, batch_size=batch_size, patience=patience)
    require_counts(num_particles=num_particles, checkpoint_every=checkpoint_every)
    require_numbers(lr=lr, max_grad_norm=max_grad_norm)
    require_numbers(least=0.0, weight_decay=weight_decay, input_noise=input_noise, target_noise=target_noise)
    require_numbers(least=0.0, final_noise=final_noise, kl_warmup=kl_warmup)
    _require_modules(network, objective, guide)
    callbacks = [*callbacks] if isinstance(callbacks, Iterable) else [callbacks]
    if strangers := [callback for callback in callbacks if not callable(callback)]:
        raise ValueError(f"callbacks: expected functions of a FitResult, got {type(strangers[0]).__name__}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast: expected None or torch.bfloat16, got {shown(autocast)}")
    require_seed(seed)
    if reinitialize and initialize is False:
        raise ValueError("initialize, reinitialize: expected one of the two to be set, got False and True")
    if reinitialize and guide is not None:
        raise ValueError("reinitialize: expected False beside a guide: build a new network, and bayesianize that")
    saved = Checkpoint(checkpoint, checkpoint_every, resume=resume)
    root = _seed(saved) if seed is None else int(seed)
    if validation is None:
        validation = 0.0 if guide is not None or isinstance(x, DataLoader) else 0.1
    if initialize is None:
        initialize = guide is None or not (isinstance(network, MixtureDensityNetwork) and network.initialized)
    trainee = EnsembleTrainee(network) if isinstance(network, DeepEnsemble) else NetworkTrainee(network)
    modules: list[nn.Module] = [module for module in (network, objective, guide) if isinstance(module, nn.Module)]
    with _isolated(root):
        with _put_back_if_refused(modules, device):
            batches, held_out = trainee.prepare(x, y, sample_weight, validation, batch_size)
            _require_data(batches, held_out, compile=compile, refit=refit)
            if reinitialize:
                with seeded(root):  # of its own: all else is drawn as for a network just built
                    trainee.draw_anew_()
            rows = batches.head(_ROWS_TO_START)
            max_epochs = int(max_epochs or max(100, math.ceil(STEPS / len(batches))))
            if guide is not None and isinstance(network, MixtureDensityNetwork):
                if isinstance(guide, type):
                    guide = _started(guide, network, rows, initialize=initialize)
                    initialize = False
                counts = {"num_particles": num_particles, "kl_warmup": math.ceil(kl_warmup * max_epochs * len(batches))}
                objective = NegativeElbo(network, guide, batches.num_rows, **counts)
            cell = trainee.cell(rows) * (target_noise != 0)
            objective = trainee.objective(objective, cell if bool(cell.any()) else None)
            targets = batches.num_rows * rows.targets_per_row()
            regularized = not any(isinstance(part, NegativeElbo) for part in objective.modules())
            settings = Settings(
                max_epochs=max_epochs,
                patience=int(patience or math.ceil(max_epochs / 4)),
                lr=float(lr),
                weight_decay=_default(weight_decay, regularized * default_weight_decay(targets)),
                input_noise=_default(input_noise, regularized * INPUT_NOISE),
                target_noise=_default(target_noise, regularized * TARGET_NOISE),
                final_noise=float(final_noise),
                max_grad_norm=float(max_grad_norm),
                skip_bad_batches=bool(skip_bad_batches),
                autocast=autocast,
            )
            started = "anew" if reinitialize else initialize
            plan = _Plan(trainee, objective, settings, root, cell, started, compile, counts_rows=guide is not None)
            losses = plan.set_up(rows)
            if checkpoint is not None:
                saved.require(plan.describe(batches, held_out, refit=refit), plan.described)
            start = saved.tensors("start") or copied(objective.state_dict())
            loop = plan.loop(batches, held_out, losses, rows)
            saved.restore(loop)
        if few := few_missing(batches.gaps):
            meant = "mask them by numpy.ma" if isinstance(batches, InMemory) else "filter this warning"
            text = f"fit: of y, {few} are NaN and count as not observed; {meant} if that is meant"
            warnings.warn(text, MissingTargetsWarning, stacklevel=2)
        if compile and loop.steps < _STEPS_TO_COMPILE:
            text = f"fit: compiling takes longer than it saves in {loop.steps} steps, unless each takes long"
            warnings.warn(f"{text}; compile=False is quicker", stacklevel=2)
        run = _Run(plan, callbacks, progress)
        try:
            result = run.twice(loop, losses, saved, start) if refit else run(loop, saved)
        finally:
            for module in (objective, *modules):
                module.eval()
        result.guide = guide
        if regularized:
            trainee.summarize(result, rows)
        return result


def _started(guide: type, network: MixtureDensityNetwork, rows: Rows, *, initialize: bool) -> Callable[..., Any]:
    """Guide of a class that begins at the weights that the network had."""
    if not issubclass(guide, AutoGuide):
        raise ValueError(f"guide: expected a guide, or a class of AutoGuides, got {guide.__name__}")
    if initialize:
        network.initialize_(rows.x, rows.y)
    settings: dict[str, Any] = {"init_loc_fn": init_to_value(values=supported_start(network, rows))}
    if "init_scale" in inspect.signature(guide).parameters:
        settings["init_scale"] = 0.01  # what was learned would drown in Pyro's 0.1
    return guide(network.model, **settings)


@dataclass(frozen=True)
class _Plan:
    """What is trained, and how."""

    trainee: Trainee
    objective: nn.Module
    settings: Settings
    seed: int
    cell: Tensor  # of targets on a grid, 0 for outputs that are on none
    initialize: bool | Literal["anew"]  # as ``fit`` was told; in place of True, "anew" says ``reinitialize=True``
    compiled: bool
    counts_rows: bool  # whether the objective is an ELBO that has to know their number

    def describe(self, batches: Batches, held_out: Rows | Streamed | None, *, refit: bool) -> dict[str, Any]:
        """Tell runs apart, in plain values."""
        settings = dataclasses.asdict(self.settings)
        return {
            "seed": self.seed,
            "settings": {**settings, "autocast": settings["autocast"] and str(settings["autocast"])},
            "initialize": self.initialize,
            "compile": self.compiled,
            "refit": bool(refit),
            "batches": len(batches),
            "data": batches.digest(),
            "validation": held_out.digest() if held_out is not None else None,
        }

    def described(self, form: int = 0) -> dict[str, str]:
        """Describe what the modules compute that are trained, in one of ``FORMS``."""
        return described(network=self.trainee.module, objective=self.objective, values=False, form=form)

    def set_up(self, rows: Rows) -> Tensor:
        """Call the objective once: an AutoGuide makes its parameters then; a ``ValueError`` if it cannot be trained.

        Gives the losses of some rows.
        """
        rows = rows[:2]
        with torch.no_grad():
            losses = self.objective.eval()(rows.x, rows.y)
        if losses.shape[: rows.leading] != rows.x.shape[: rows.leading]:
            raise ValueError(f"objective: expected one loss for each of {len(rows)} rows, got {tuple(losses.shape)}")
        require_owned(self.objective)
        return losses

    def loop(self, batches: Batches, held_out: Rows | Streamed | None, losses: Tensor, rows: Rows) -> Loop:
        """Loop at its start, scalers and components set from rows of the data."""
        trainee = self.trainee
        least = self.cell / 6 * (self.settings.target_noise > 0)  # 99.7 % of that noise stays within the cell
        over_cells = any(isinstance(o, NegativeLogLikelihood) and o.cell is not None for o in self.objective.modules())
        if self.initialize:
            trainee.initialize_(rows, blur(rows.y, least))
        if self.counts_rows and isinstance(self.objective, NegativeElbo):
            self.objective.num_data = batches.num_rows
        more = {"row_weight": rows.row_weight(losses), "compiled": self.compiled}
        loop = trainee.loop(self.objective, batches, held_out, trainee.units(rows), self.settings, **more)
        loop.least_noise = least if bool(least.any()) and not over_cells else None
        return loop


@dataclass(frozen=True)
class _Run:
    """A training, whose state goes to a checkpoint."""

    plan: _Plan
    callbacks: Sequence[Callable[[FitResult], object]]
    progress: bool

    def __call__(
        self,
        loop: Loop,
        checkpoint: Checkpoint,
        *,
        epochs: int | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> FitResult:
        """Train, and write the state with the tensors ``beside`` it every few epochs and at the end."""
        before = len(loop.result.history)

        def save(epoch: int | None = None) -> None:
            checkpoint.write(loop, beside or {}, epoch)

        result = loop.run(epochs=epochs, callbacks=self.callbacks, save=save, progress=self.progress)
        if len(result.history) > before and not result.interrupted:
            save()
        return result

    def twice(self, loop: Loop, losses: Tensor, checkpoint: Checkpoint, start: Mapping[str, Tensor]) -> FitResult:
        """Search for the best epoch, then start again and train on all rows up to it."""
        checkpoint.forget_second()
        result = self(loop, checkpoint, beside={f"start.{name}": tensor for name, tensor in start.items()})
        batches, held_out, objective = loop.batches, loop.held_out, self.plan.objective
        if result.interrupted or not isinstance(held_out, Rows) or not isinstance(batches, InMemory):
            return result
        best = copied(objective.state_dict())
        torch.manual_seed(self.plan.seed)
        try:
            objective.load_state_dict(start)
            everything = InMemory(Rows.joined([batches.rows, held_out]), math.ceil(batches.num_rows / len(batches)))
            second = checkpoint.second()
            again = self.plan.loop(everything, None, losses, everything.head(_ROWS_TO_START))
            second.restore(again)
            refitted = self(again, second, epochs=result.best_epoch)
        except BaseException:
            objective.load_state_dict(best)
            raise
        if refitted.interrupted:
            objective.load_state_dict(best)
        return dataclasses.replace(
            result,
            interrupted=refitted.interrupted,
            skipped_batches=result.skipped_batches + refitted.skipped_batches,
            seconds=result.seconds + refitted.seconds,
            refit_history=refitted.history,
        )


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Keep Pyro's parameter store, what validates and the generators as they were."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(isolated())
        stack.enter_context(seeded(seed))
        yield


@contextmanager
def _put_back_if_refused(modules: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Move modules to a device; after an error, have them where, as, and in the modes that they were."""
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
            # A guide that was set up meanwhile has more than it had.
            module.load_state_dict(state, strict=False)
        for part, training in modes:
            part.training = training
        raise


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _seed(saved: Checkpoint) -> int:
    """Seed of the run that a checkpoint is of, or one drawn."""
    return saved.run["seed"] if saved.run else int(torch.randint(2**62, (), device="cpu"))


def _default(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _require_modules(network: nn.Module, objective: nn.Module | None, guide: Any) -> None:
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
    unset = any(isinstance(part, NegativeElbo) for part in trained.modules())  # an AutoGuide may have none yet
    if guide is None and not unset and not any(p.requires_grad for p in trained.parameters()):
        raise ValueError("network: expected parameters to train, got none that requires a gradient")


def _require_data(batches: Batches, held_out: Any, *, compile: bool, refit: bool) -> None:
    if refit and not (type(batches) is InMemory and isinstance(held_out, Rows)):
        raise ValueError("refit: expected one network, and arrays with some rows held out")
    if compile and isinstance(batches, InMemory) and bool(batches.rows.y.isnan().any()):
        raise ValueError("compile: expected complete targets, got NaN for missing ones")
