r"""Training by Lightning, which looks after processes, devices, precision, loggers and checkpoints.

This is the only module that imports Lightning.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.process_state import own_store, require_owned
from pyro_mdn.support.settings import collected, given_settings
from pyro_mdn.training.optimizer import adamw
from pyro_mdn.training.schedules import (
    FADING,
    FINAL_NOISE,
    INPUT_NOISE,
    LEARNING_RATE,
    TARGET_NOISE,
    Smoothing,
    blur_inputs,
    blur_targets,
    default_input_noise,
    default_weight_decay,
    fading,
    warmup_cosine,
    weight_decay_at,
)
from pyro_mdn.training.settings import NoiseSchedule, Optimization

try:
    from lightning.pytorch import LightningModule
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("pyro_mdn.lightning needs Lightning: in a checkout pip install '.[lightning]'") from error

__all__ = ["LightningObjective"]

_FAR = 10.0  # Data whose scale is this many times smaller or larger than 1 have not been standardised.


@dataclass(frozen=True, kw_only=True)
class LightningSettings(NoiseSchedule, Optimization):
    """Settings of training that are not those of a Lightning ``Trainer``."""

    def resolved(self, units: Units) -> LightningSettings:
        """Put numbers in place of the defaults that do not depend on the data, for these units of the inputs."""
        usual = Smoothing()
        defaults = {"input_noise": default_input_noise(units), "target_noise": usual.noise}
        defaults |= {"final_noise": usual.final_noise, "fading": usual.fading}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


class LightningObjective(LightningModule):
    r"""Lightning module that minimises an objective, with the optimiser, schedules and fading noise of ``fit``.

    Call ``network.initialize_(x, y)`` first, which sets the scalers of the network. Batches are ``(x, y)`` or
    ``(x, y, weight)``. ``loss`` and ``validation_loss`` are logged once per epoch, as weighted means over what was
    observed in the rows of all processes. Gradients are such means too, also where processes have unequally many rows.
    Only the ratios of weights matter: weights are divided by the mean weight of all rows trained on so far, which is
    part of a Lightning checkpoint. Each process draws its own noise.

    Gradient clipping, early stopping, averaged weights and checkpoints are settings and callbacks of the ``Trainer``;
    ``gradient_clip_val=1.0`` is the default of ``fit``. Defaults are those of ``fit`` for many rows; there is no
    ``few_rows`` here, because nothing is held out or trained on again. Targets on a grid are not dequantised. Pyro's
    parameter store stays as it was. With ``precision="bf16-true"`` weights are in bfloat16; scalers, targets and
    densities stay in single precision.

    A Lightning checkpoint has the settings and all tensors, but not the network as an object: give one to
    ``LightningObjective.load_from_checkpoint(path, objective=...)``.

    A network that is in evaluation mode as a whole, as it comes from ``load`` or ``fit``, is trained in training mode;
    otherwise its parts stay in the modes that you have set. After training, call ``network.eval()`` before predictions:
    Lightning does not.

    Args:
        objective: Module with one network in it, which is called as ``objective(x, y)`` and gives one loss per row. If
            there is a guide in it, call the objective once before, which sets the guide up.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay of the weight matrices. By default that of ``fit`` for the number of rows
            in the data set of the training loader. Give a number for sequences, because their steps are not counted.
        input_noise: Standard deviation of the noise on x at the start, in standardised units; 0 by default for inputs
            that are left as they are (:class:`pyro_mdn.Identity`).
        target_noise: Standard deviation of the noise on y at the start, in standardised units.
        final_noise: Share of the noise that is left at the end of the schedule.
        fading: Power by which noise fades.
        first_weight_decay: Weight decay at the start, from where it fades as the noise does; by default it does not.
        optimization: A whole :class:`pyro_mdn.Optimization`, in place of ``lr`` and ``weight_decay``.
        noise_schedule: A whole :class:`pyro_mdn.NoiseSchedule`, in place of the settings of noise.
        **further: Fields of these two groups that have no keyword above.

    Raises:
        ValueError: If a setting is not usable; when training starts, if the Trainer has neither ``max_epochs`` nor
            ``max_steps``, or there is no ``weight_decay`` and no data set of known length to take one from.
        ImportError: If Lightning is not installed.

    Warns:
        UserWarning: At the first step, if the network has no scalers and columns of the batch are ten times larger or
            smaller than standardised ones.

    >>> from lightning.pytorch import Trainer
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from pyro_mdn import NegativeLogLikelihood
    >>> x, y = torch.randn(64, 1), torch.randn(64, 1)
    >>> network = MixtureDensityNetwork(1, 1)
    >>> network.initialize_(x, y)
    >>> module = LightningObjective(NegativeLogLikelihood(network))
    >>> loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    >>> quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    >>> trainer = Trainer(accelerator="cpu", max_epochs=2, gradient_clip_val=1.0, log_every_n_steps=1, **quiet)
    >>> trainer.fit(module, loader, DataLoader(TensorDataset(x, y), batch_size=64))
    >>> trainer.global_step, sorted(trainer.callback_metrics)
    (4, ['loss', 'validation_loss'])
    """

    lr: float
    weight_decay: float | None
    input_noise: float
    target_noise: float
    final_noise: float
    fading: float
    first_weight_decay: float | None

    def __init__(
        self,
        objective: nn.Module,
        *,
        lr: float = LEARNING_RATE,
        weight_decay: float | None = None,
        input_noise: float = INPUT_NOISE,
        target_noise: float = TARGET_NOISE,
        final_noise: float = FINAL_NOISE,
        fading: float = FADING,
        first_weight_decay: float | None = None,
        optimization: Optimization | None = None,
        noise_schedule: NoiseSchedule | None = None,
        **further: Any,
    ) -> None:
        super().__init__()
        given = given_settings(LightningObjective.__init__, locals(), Optimization, NoiseSchedule)
        _require_objective(objective)
        settings = collected(LightningSettings, "LightningObjective", {**given, **further})
        settings = settings.resolved(_networks(objective)[0].input_units)
        self.save_hyperparameters(ignore=["objective", "optimization", "noise_schedule"])
        self.save_hyperparameters(asdict(settings))
        for name, value in asdict(settings).items():  # attributes, which the Tuner of Lightning may change
            setattr(self, name, value)
        self.objective, self.steps, self.last_weight_decay = objective, 1, 0.0
        self.noise = torch.zeros(())
        self.generator: torch.Generator | None = None
        self.means = nn.ModuleDict({name: _Mean() for name in ("loss", "validation_loss")})
        self.trained = torch.zeros(2, device="cpu")  # number of rows so far, and sum of the weights of their losses

    @property
    def network(self) -> MixtureDensityNetwork:
        """The network in the objective."""
        return _networks(self.objective)[0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(N, ...)``."""
        with own_store():
            losses = self.objective(x, y)
            require_owned(self.objective)
        return losses

    def setup(self, stage: str) -> None:
        """Stop the Trainer from rounding batches to half precision: the network rounds what it has standardised."""
        plugin = self.trainer.precision_plugin
        if plugin.convert_input(torch.zeros((), dtype=torch.float32)).dtype.itemsize < 4:
            vars(plugin)["convert_input"] = _as_it_is

    def teardown(self, stage: str) -> None:
        """Let the Trainer round batches again."""
        vars(self.trainer.precision_plugin).pop("convert_input", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums that the mean weight is computed from."""
        checkpoint["trained"] = self.trained.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the sums that the mean weight is computed from."""
        self.trained = checkpoint.get("trained", self.trained)

    def on_fit_start(self) -> None:
        """Switch a network from ``load`` or ``fit`` to training mode, because Lightning would keep evaluation mode."""
        if not self.network.training:
            self.objective.train()

    def on_train_start(self) -> None:
        """Convert the noise to the units of the data, and give each process its own generator, whatever the seed."""
        network = self.network
        self.noise = self.input_noise * network.input_units.unit
        seed = int(torch.randint(2**62, (), device="cpu")) + self.global_rank
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let weight decay fade, if there is a first one."""
        if self.first_weight_decay is None:
            return
        decay = self.first_weight_decay, self.last_weight_decay
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        matrices, _ = optimizer.param_groups
        matrices["weight_decay"] = weight_decay_at(self.trainer.global_step, self.steps, *decay, self.fading)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the mean loss of a noisy batch, scaled so that the mean over processes is the mean over all rows.

        Missing targets do not count.
        """
        rows = _as_rows(batch)
        if self.trainer.global_step == 0:
            _warn_if_unscaled(self.network, rows)
        fade = fading(self.trainer.global_step, self.steps, self.final_noise, self.fading)
        x = blur_inputs(rows.x, self.network.input_units, self.noise, fade, self.generator)
        size = fade * self.target_noise
        y = blur_targets(rows.y, self.network.head.units, size, generator=self.generator)
        total, weight = self._log_mean("loss", rows, self(x, y))
        counts = torch.stack([rows.num_counted().to(weight), weight])
        counts = self.trainer.strategy.reduce(counts, reduce_op="mean")
        self.trained = self.trained.to(counts) + counts
        trained, weights = self.trained
        expected = counts[0] * weights / trained.clamp(min=1)
        return total / expected.masked_fill(expected == 0, 1.0)  # where all targets are missing

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean loss of a held-out batch."""
        rows = _as_rows(batch)
        self._log_mean("validation_loss", rows, self(rows.x, rows.y))

    def _log_mean(self, name: str, rows: Rows, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Log the mean loss over an epoch; return the sum of the losses of this batch, and of their weights."""
        total, weight = rows.totals(losses)
        mean: Any = self.means[name]
        mean.update(total.detach(), weight)
        self.log(name, mean, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(rows))
        return total, weight

    def configure_optimizers(self) -> Any:
        """Set up AdamW with weight decay of weight matrices alone, and a warm-up and cosine over all steps."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            raise ValueError(f"Trainer: expected max_epochs or max_steps for the schedule, got {steps} steps")
        self.steps = steps = int(steps)
        decay = self._decay_for_data() if self.weight_decay is None else self.weight_decay
        self.last_weight_decay = decay
        optimizer = adamw(self.objective, self.lr, decay)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _decay_for_data(self) -> float:
        """Compute the default weight decay for the number of training rows."""
        self.trainer.fit_loop.setup_data()  # does nothing if the data are set up already
        try:
            return default_weight_decay(len(self.trainer.train_dataloader.dataset))  # pyright: ignore[reportOptionalMemberAccess]
        except (AttributeError, TypeError) as error:
            raise ValueError("weight_decay: expected a number, since the number of training rows is unknown") from error


def _as_it_is(batch: Any) -> Any:
    return batch


class _Mean(Metric):
    """Weighted mean over the batches of an epoch and over processes; NaN stays NaN."""

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), device="cpu"), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: Tensor) -> None:
        self.total += total
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


def _networks(objective: nn.Module) -> list[MixtureDensityNetwork]:
    return [part for part in objective.modules() if isinstance(part, MixtureDensityNetwork)]


def _as_rows(batch: Any) -> Rows:
    if (
        not isinstance(batch, list | tuple)
        or len(batch) not in (2, 3)
        or not all(isinstance(b, Tensor | Targets) for b in batch)
    ):
        raise ValueError(f"batch: expected (x, y) or (x, y, weight) of tensors, got {type(batch).__name__}")
    x, _, *weight = batch
    if any(w.shape != (len(x),) for w in weight):
        raise ValueError(f"weight: expected shape ({len(x)},), got {tuple(weight[0].shape)}")
    return Rows(*batch).masked()


@torch.no_grad()
def _warn_if_unscaled(network: MixtureDensityNetwork, rows: Rows) -> None:
    """Warn if a network has no scalers although the columns of these rows are far from a unit scale."""
    if network.initialized:
        return
    y = rows.y.points() if isinstance(rows.y, Targets) else rows.y
    columns = {"x": rows.x.reshape(len(rows), -1), "y": y.reshape(-1, y.shape[-1])}
    sizes = {name: v.double().square().nanmean(0).sqrt() for name, v in columns.items()}
    far = {name: size for name, size in sizes.items() if bool(((size > _FAR) | ((size > 0) & (size < 1 / _FAR))).any())}
    if far:
        seen = ", ".join(f"{name} of up to {size.max():.3g}" for name, size in far.items())
        text = f"network: expected scalers from network.initialize_(x, y) before training, got none for {seen}"
        warnings.warn(f"{text} (root mean square of a column); or standardise the data", stacklevel=2)


def _require_objective(objective: nn.Module) -> None:
    if not isinstance(objective, nn.Module) or len(_networks(objective)) != 1:
        raise ValueError(f"objective: expected a module with one network in it, got {type(objective).__name__}")
    if not any(p.requires_grad for p in objective.parameters()):
        raise ValueError("objective: expected parameters to train, got none that requires a gradient")
