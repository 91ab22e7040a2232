r"""Training by Lightning: processes, devices, precision, loggers and checkpoints are its own; its only importer."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.process_state import own_store, require_owned
from pyro_mdn.support.settings import collected, given_settings
from pyro_mdn.training.optimizer import adamw
from pyro_mdn.training.schedules import (
    FINAL_NOISE,
    INPUT_NOISE,
    LEARNING_RATE,
    TARGET_NOISE,
    blur,
    default_weight_decay,
    fading,
    warmup_cosine,
)
from pyro_mdn.training.settings import NoiseSchedule, Optimization

try:
    from lightning.pytorch import LightningModule
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("pyro_mdn.lightning needs Lightning: in a checkout pip install '.[lightning]'") from error

__all__ = ["LightningObjective"]

_FAR = 10.0  # times smaller or larger than 1, the scale of data that were standardised before


@dataclass(frozen=True, kw_only=True)
class LightningSettings(NoiseSchedule, Optimization):
    """Settings of training that are not those of a Lightning ``Trainer``."""

    def resolved(self) -> LightningSettings:
        """Put numbers in place of the defaults that do not depend on the data."""
        defaults = {"input_noise": INPUT_NOISE, "target_noise": TARGET_NOISE}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


class LightningObjective(LightningModule):
    r"""Lightning module that minimises an objective, with the optimiser, schedule and fading noise of ``fit``.

    The network has its scalers from ``network.initialize_(x, y)``, called before. Batches are ``(x, y)`` or
    ``(x, y, weight)``. ``loss`` and ``validation_loss`` are logged once per epoch, as weighted means over what was
    observed of the rows of all processes; so are gradients, also where processes have unequally many rows. Only the
    ratios of weights matter: they are divided by the mean weight of all rows trained on so far, which is part of a
    Lightning checkpoint. Each process draws noise of its own.

    Clipping, early stopping, averaged weights and checkpoints are settings and callbacks of the ``Trainer``;
    ``gradient_clip_val=1.0`` is what ``fit`` has. Targets on a grid get no noise of their own here. A Lightning
    checkpoint holds the settings and all tensors, but not the network as an object:
    ``LightningObjective.load_from_checkpoint(path, objective=...)`` takes one. Pyro's parameter store stays as it was.
    A network that is in evaluation mode as a whole, as from ``load`` or ``fit``, trains in training mode; otherwise the
    modes of its parts are as you set them. Lightning leaves them so: ``network.eval()`` before predictions.
    With ``precision="bf16-true"`` weights are in bfloat16; scalers, targets and densities stay in single precision.

    Args:
        objective: Module called as ``objective(x, y)`` that gives one loss per row, with one network in it. Where
            there is a guide in it, call the objective once before: that sets the guide up.
        lr: Largest learning rate.
        weight_decay: Decoupled decay of the weight matrices; by default that of ``fit`` for the number of rows of
            the training loader's data set; of sequences, say it, since their steps are not counted.
        input_noise: Standard deviation of the noise on x at the start, in standardised units.
        target_noise: The same for y.
        final_noise: Share of the noise that is left at the end of the schedule.
        optimization: A whole :class:`pyro_mdn.Optimization`, in place of ``lr`` and ``weight_decay``.
        noise_schedule: A whole :class:`pyro_mdn.NoiseSchedule`, in place of the settings of noise.
        **further: Fields of these two groups that have no keyword above.

    Raises:
        ValueError: If a setting is not usable; when training starts, if the Trainer has neither ``max_epochs`` nor
            ``max_steps``, or there is no ``weight_decay`` and no data set of known length to take one from.
        ImportError: If Lightning is not installed.

    Warns:
        UserWarning: At the first step, if the network has no scalers, and columns of the batch are ten times larger or
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

    def __init__(
        self,
        objective: nn.Module,
        *,
        lr: float = LEARNING_RATE,
        weight_decay: float | None = None,
        input_noise: float = INPUT_NOISE,
        target_noise: float = TARGET_NOISE,
        final_noise: float = FINAL_NOISE,
        optimization: Optimization | None = None,
        noise_schedule: NoiseSchedule | None = None,
        **further: Any,
    ) -> None:
        super().__init__()
        given = given_settings(LightningObjective.__init__, locals(), Optimization, NoiseSchedule)
        self.settings = collected(LightningSettings, "LightningObjective", {**given, **further}).resolved()
        _require_objective(objective)
        self.save_hyperparameters(ignore=["objective", "optimization", "noise_schedule"])
        self.save_hyperparameters(asdict(self.settings))
        self.objective, self.steps = objective, 1
        self.noise = (torch.zeros(()), torch.zeros(()))
        self.generator: torch.Generator | None = None
        self.means = nn.ModuleDict({name: _Mean() for name in ("loss", "validation_loss")})
        self.trained = torch.zeros(2, device="cpu")  # rows so far, and the sum of the weights of their losses

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
        """Take batches as they are where the Trainer would round them; the network rounds what it has standardised."""
        plugin = self.trainer.precision_plugin
        if plugin.convert_input(torch.zeros((), dtype=torch.float32)).dtype.itemsize < 4:
            vars(plugin)["convert_input"] = _as_it_is

    def teardown(self, stage: str) -> None:
        """Have the Trainer round batches again."""
        vars(self.trainer.precision_plugin).pop("convert_input", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the mean weight comes from."""
        checkpoint["trained"] = self.trained.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over."""
        self.trained = checkpoint.get("trained", self.trained)

    def on_fit_start(self) -> None:
        """Train a network that was loaded, or is from ``fit``: these are in evaluation mode, which Lightning keeps."""
        if not self.network.training:
            self.objective.train()

    def on_train_start(self) -> None:
        """Take the noise into the units of the data; each process draws its own, also where all were seeded alike."""
        network = self.network
        settings: Any = self.settings
        self.noise = (settings.input_noise * network.x_scale, settings.target_noise * network.head.scale)
        seed = int(torch.randint(2**62, (), device="cpu")) + self.global_rank
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch with noise on it, so scaled that the mean over processes is that over all rows.

        What was not observed counts neither in the mean nor as a row.
        """
        rows = _as_rows(batch)
        if self.trainer.global_step == 0:
            _warn_if_unscaled(self.network, rows)
        fade = fading(self.trainer.global_step, self.steps, self.settings.final_noise)
        x, y = (blur(v, scale, fade, self.generator) for v, scale in zip((rows.x, rows.y), self.noise, strict=True))
        total, weight = self._log_mean("loss", rows, self(x, y))
        counts = torch.stack([rows.num_counted().to(weight), weight])
        counts = self.trainer.strategy.reduce(counts, reduce_op="mean")
        self.trained = self.trained.to(counts) + counts
        trained, weights = self.trained
        expected = counts[0] * weights / trained.clamp(min=1)
        return total / expected.masked_fill(expected == 0, 1.0)  # nothing was observed

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean loss of a held-out batch."""
        rows = _as_rows(batch)
        self._log_mean("validation_loss", rows, self(rows.x, rows.y))

    def _log_mean(self, name: str, rows: Rows, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses and of their weights, whose ratio over an epoch is logged."""
        total, weight = rows.totals(losses)
        mean: Any = self.means[name]
        mean.update(total.detach(), weight)
        self.log(name, mean, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(rows))
        return total, weight

    def configure_optimizers(self) -> Any:
        """AdamW with decay on weight matrices alone; a warm-up and a cosine over all steps of the Trainer."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            raise ValueError(f"Trainer: expected max_epochs or max_steps for the schedule, got {steps} steps")
        self.steps = steps = int(steps)
        decay = self._decay_for_data() if self.settings.weight_decay is None else self.settings.weight_decay
        optimizer = adamw(self.objective, self.settings.lr, decay)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _decay_for_data(self) -> float:
        """Pull of a fixed prior on the rows of the training data."""
        self.trainer.fit_loop.setup_data()  # does nothing if they are there
        try:
            return default_weight_decay(len(self.trainer.train_dataloader.dataset))  # pyright: ignore[reportOptionalMemberAccess]
        except (AttributeError, TypeError) as error:
            raise ValueError("weight_decay: expected a number, since the number of training rows is unknown") from error


def _as_it_is(batch: Any) -> Any:
    return batch


class _Mean(Metric):
    """Weighted mean over the batches of an epoch, and over processes; NaN stays NaN."""

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
    if not isinstance(batch, list | tuple) or len(batch) not in (2, 3) or not all(isinstance(b, Tensor) for b in batch):
        raise ValueError(f"batch: expected (x, y) or (x, y, weight) of tensors, got {type(batch).__name__}")
    x, _, *weight = batch
    if any(w.shape != (len(x),) for w in weight):
        raise ValueError(f"weight: expected shape ({len(x)},), got {tuple(weight[0].shape)}")
    return Rows(*batch).masked()


@torch.no_grad()
def _warn_if_unscaled(network: MixtureDensityNetwork, rows: Rows) -> None:
    """Warn if a network has no scalers, and these rows need some: their columns are far from a unit scale."""
    if network.initialized:
        return
    columns = {"x": rows.x.reshape(len(rows), -1), "y": rows.y.reshape(-1, rows.y.shape[-1])}
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
