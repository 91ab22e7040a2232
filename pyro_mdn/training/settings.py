r"""Settings of a training, in groups that ``fit``, Lightning and scikit-learn share.

A group is a frozen dataclass that documents its fields and checks their values. A class that inherits from several
groups has the fields of all of them: the training loop reads :class:`LoopSettings`, and the arguments of ``fit`` are
another such class. A new setting is therefore one field of one group, with a line in the docstring of the group.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.support.checks import require_counts, require_numbers, shown
from pyro_mdn.support.process_state import require_seed
from pyro_mdn.support.settings import Group, names_of
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import FADING, LEARNING_RATE, VALIDATION, default_smoothing

__all__ = [
    "Checkpointing",
    "EarlyStopping",
    "FitArguments",
    "Initialization",
    "LoopSettings",
    "NoiseSchedule",
    "Optimization",
    "TrainingLoop",
    "VariationalInference",
]

# Metadata of a field whose value a checkpoint knows in another form, or that does not change what is learned.
_ELSEWHERE = {"in_checkpoints": False}
# Settings that every checkpoint has, whatever their values.
_AT_FIRST = [
    *("lr", "weight_decay", "input_noise", "target_noise", "final_noise", "max_epochs", "patience"),
    *("max_grad_norm", "skip_bad_batches", "autocast"),
]


@dataclass(frozen=True, kw_only=True)
class Optimization(Group):
    r"""Learning rate and weight decay of AdamW, the optimiser (Loshchilov & Hutter, 2019).

    Args:
        lr: Largest learning rate. The learning rate grows linearly over the first twentieth of the steps (warm-up) and
            then falls to 0 along a cosine.
        weight_decay: Decoupled weight decay of the weight matrices; biases do not decay. By default 20 over the number
            of training rows, 0.5 at most, because a prior on the weights matters less the more data there are. The
            steps of a sequence count as rows, unless their target is missing.
        first_weight_decay: Weight decay at the start of training, from where it fades to ``weight_decay`` as the noise
            does. By default (200 / rows)², but 1 at most and ``weight_decay`` at least, for fewer than 2000 rows if
            ``weight_decay`` is left to its default too. Otherwise weight decay is the same in all steps.

    >>> Optimization(lr=0.0)
    Traceback (most recent call last):
    ValueError: lr: expected a finite number that is positive, got 0.0
    """

    lr: float = LEARNING_RATE
    weight_decay: float | None = None
    first_weight_decay: float | None = None

    def __post_init__(self) -> None:
        require_numbers(lr=self.lr)
        require_numbers(least=0.0, weight_decay=self.weight_decay, first_weight_decay=self.first_weight_decay)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainingLoop(Group):
    """How the training loop goes over the data. Under Lightning, the ``Trainer`` decides all of this.

    Args:
        max_epochs: Passes over the training rows at most; the schedules are spread over all of them. By default as many
            as make 9000 steps, but at least 100.
        batch_size: Rows in a batch at most. By default 1/64 of the training rows, but at least 32 and at most 256.
        max_grad_norm: Gradient clipping: gradients whose joint norm is larger are scaled down to this norm.
        skip_bad_batches: Leave out a batch whose loss or gradient is not finite, and count it, instead of stopping.
        autocast: ``torch.bfloat16`` computes matrix products in this precision (mixed precision).
        compile: Compile the objective by ``torch.compile``. Compilation takes from half a minute to some minutes and
            makes steps up to a fifth quicker, so that it pays for tens of thousands of steps or for long ones. Targets
            must be complete.
        evaluation_rows: Held-out rows that are evaluated at once. A smaller number needs less memory.
    """

    max_epochs: int | None = None
    batch_size: int | None = field(default=None, metadata=_ELSEWHERE)
    max_grad_norm: float = 1.0
    skip_bad_batches: bool = False
    autocast: torch.dtype | None = None
    compile: bool = field(default=False, metadata=_ELSEWHERE)
    evaluation_rows: int = 8192

    def __post_init__(self) -> None:
        require_counts(max_epochs=self.max_epochs, batch_size=self.batch_size, evaluation_rows=self.evaluation_rows)
        require_numbers(max_grad_norm=self.max_grad_norm)
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast: expected None or torch.bfloat16, got {shown(self.autocast)}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(Group):
    """Noise that training adds to inputs and targets, drawn anew in every step: it smooths the density.

    Noise regularises conditional densities (Rothfuss et al., 2019). The noise fades over the steps, so that early
    stopping also finds how much smoothing the data need.

    Args:
        input_noise: Standard deviation of the noise on x at the start, in standardised units. By default 0.1, and 0.3
            for fewer than 2000 rows, but 0 for variational inference, where the prior regularises, and for inputs that
            are left as they are (:class:`pyro_mdn.Identity`). Integers get none.
        target_noise: Standard deviation of the noise on y at the start, in standardised units; the default is that of
            ``input_noise``. Unless this is 0, targets on a grid, such as counts or rounded numbers (each value in five
            rows or more), stand for the cells around them, because a density could grow there without bound. The
            default objective takes the mean density over a cell. Other objectives get dequantisation by normal noise of
            a sixth of the spacing, which does not fade and which held-out targets have too.
        final_noise: Share of the noise that is left at the end of the schedule. By default 0.03, and 0.001 for fewer
            than 2000 rows.
        fading: Power by which noise fades: of the part that is not to be left, :math:`(1 - t)^p` is there after a share
            t of the steps. By default 3, and 8 for fewer than 2000 rows.
    """

    input_noise: float | None = None
    target_noise: float | None = None
    final_noise: float | None = None
    fading: float | None = None

    def __post_init__(self) -> None:
        require_numbers(least=0.0, input_noise=self.input_noise, target_noise=self.target_noise)
        require_numbers(least=0.0, final_noise=self.final_noise)
        require_numbers(fading=self.fading)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Group):
    """Early stopping: training ends when the loss of held-out rows stops improving, and the best epoch is kept.

    Args:
        validation: Rows to hold out: a fraction of the rows, a pair ``(x, y)``, a triple ``(x, y, weight)`` or a
            loader. With 0 no rows are held out, and training does not stop early. By default 0.1, and for one network
            and arrays a third of fewer than 2000 rows, but 0 for a loader or a guide. Where many rows of
            arrays are copies of others, a fraction of the rows keeps copies together.
        patience: Epochs without improvement of the validation loss before training stops. By default a quarter of
            ``max_epochs``.
        refit: Once the best epoch is known, start again and train on all rows, those held out included. The epochs grow
            with the fourth root of the rows: by a tenth, where a third was held out. By default, this is done for one
            network and arrays of fewer than 2000 rows, if ``validation`` is left to its default too.
    """

    validation: float | Sequence[Any] | DataLoader | None = field(default=None, metadata=_ELSEWHERE, repr=False)
    patience: int | None = None
    refit: bool | None = field(default=None, metadata=_ELSEWHERE)

    def __post_init__(self) -> None:
        require_counts(patience=self.patience)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Initialization(Group):
    """What a network starts from.

    Args:
        initialize: Set scalers and components from the training rows first; ``False`` trains a network further. By
            default they are set, but not for the guide of a network that has them already. Hidden layers stay as they
            are: the constructor has drawn their weights, or an earlier ``fit`` has trained them.
        reinitialize: Draw all weights of the network anew from the seed first, except frozen ones, by
            ``reset_parameters`` of its layers. What is learned then depends on data, settings and seed alone. Latent
            weights cannot be drawn anew.
        rows_to_start: Rows of a data set or loader that are read once, before training starts, and stay in memory.
            They give scalers, starting components and mean weight, and what each component explains at the end.
    """

    initialize: bool | None = field(default=None, metadata=_ELSEWHERE)
    reinitialize: bool = field(default=False, metadata=_ELSEWHERE)
    rows_to_start: int = 10_000

    def __post_init__(self) -> None:
        require_counts(rows_to_start=self.rows_to_start)
        if self.reinitialize and self.initialize is False:
            raise ValueError("initialize, reinitialize: expected one of the two to be set, got False and True")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class VariationalInference(Group):
    """How the evidence lower bound (ELBO) is estimated where a guide is trained.

    Args:
        num_particles: Draws from the guide in each step, evaluated in one vectorised pass.
        kl_warmup: Share of the steps over which the divergence from the prior grows from 0 to its weight in the ELBO
            (KL annealing; Bowman et al., 2016).
    """

    num_particles: int = field(default=1, metadata=_ELSEWHERE)
    kl_warmup: float = field(default=0.2, metadata=_ELSEWHERE)

    def __post_init__(self) -> None:
        require_counts(num_particles=self.num_particles)
        require_numbers(least=0.0, kl_warmup=self.kl_warmup)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Checkpointing(Group):
    """File that has the whole state of a training run, from which the run can go on.

    Args:
        checkpoint: Path of the file. The state is written every ``checkpoint_every`` epochs, and at the end.
        checkpoint_every: Epochs from one checkpoint to the next.
        resume: Go on from the checkpoint if there is one, bit for bit as if the run had not stopped. Network,
            objective, data and settings must be those of that run; types, attributes and hooks of all parts count.
    """

    checkpoint: str | os.PathLike[str] | None = field(default=None, metadata=_ELSEWHERE)
    checkpoint_every: int = field(default=10, metadata=_ELSEWHERE)
    resume: bool = field(default=False, metadata=_ELSEWHERE)

    def __post_init__(self) -> None:
        require_counts(checkpoint_every=self.checkpoint_every)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Initialization, EarlyStopping, NoiseSchedule, TrainingLoop, Optimization):
    """Settings of the groups that a training loop reads, with a number wherever the data decide the default."""

    max_epochs: int = field()
    patience: int = field()
    weight_decay: float = field()
    input_noise: float = field()
    target_noise: float = field()
    final_noise: float = field()
    fading: float = FADING

    @classmethod
    def resolved(cls, settings: Group, **defaults: float | None) -> LoopSettings:
        """Take settings of the same names, and these defaults in place of ``None``."""
        values = {name: getattr(settings, name) for name in names_of(cls)}
        known: dict[str, Any] = {n: defaults.get(n) if value is None else value for n, value in values.items()}
        return cls(**known)

    def in_checkpoints(self) -> dict[str, Any]:
        """Tell runs apart by plain values.

        A setting that came after the first release is left out where it has its default, so that runs go on which
        earlier versions began.
        """
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("in_checkpoints", True)]
        values = {f.name: getattr(self, f.name) for f in fields}
        named = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in values.items()}
        return {f.name: named[f.name] for f in fields if f.name in _AT_FIRST or values[f.name] != f.default}


@dataclass(frozen=True, kw_only=True)
class FitArguments(
    Checkpointing, VariationalInference, Initialization, EarlyStopping, NoiseSchedule, TrainingLoop, Optimization
):
    """Arguments of :func:`pyro_mdn.fit`: its own, the fields of all groups of settings, and these groups as a whole."""

    network: MixtureDensityNetwork | DeepEnsemble = field(kw_only=False)
    x: Any = field(kw_only=False, repr=False)
    y: Any = field(default=None, kw_only=False, repr=False)
    objective: nn.Module | None = None
    guide: Callable[..., Any] | None = None
    sample_weight: Any = None
    few_rows: bool | None = None
    device: torch.device | str | None = None
    callbacks: Sequence[Callable[[FitResult], object]] = ()
    seed: int | None = None
    progress: bool = True
    optimization: Optimization | None = None
    training_loop: TrainingLoop | None = None
    noise_schedule: NoiseSchedule | None = None
    early_stopping: EarlyStopping | None = None
    initialization: Initialization | None = None
    variational_inference: VariationalInference | None = None
    checkpointing: Checkpointing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self.seed)
        callbacks = [*self.callbacks] if isinstance(self.callbacks, Iterable) else [self.callbacks]
        if strangers := [callback for callback in callbacks if not callable(callback)]:
            raise ValueError(f"callbacks: expected functions of a FitResult, got {type(strangers[0]).__name__}")
        object.__setattr__(self, "callbacks", callbacks)
        if not (self.few_rows is None or isinstance(self.few_rows, bool | np.bool_)):
            raise ValueError(f"few_rows: expected True, False or None, got {shown(self.few_rows)}")
        if self.reinitialize and self.guide is not None:
            raise ValueError("reinitialize: expected False beside a guide: build a new network, and bayesianize that")

    @property
    def held_out(self) -> Any:
        """What ``validation`` says, or its default; ``None`` leaves it to the number of rows."""
        if self.validation is not None:
            return self.validation
        if self.guide is not None or isinstance(self.x, DataLoader):
            return 0.0
        if isinstance(self.network, DeepEnsemble):
            return VALIDATION
        return None if self.few_rows is None else default_smoothing(0, self.few_rows).validation

    @property
    def starts_anew(self) -> bool:
        """What ``initialize`` says, or its default."""
        if self.initialize is not None:
            return bool(self.initialize)
        return self.guide is None or not (isinstance(self.network, MixtureDensityNetwork) and self.network.initialized)
