r"""The training loop: it minimises an objective over batches and does not know what the objective trains."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks.rows import Rows
from pyro_mdn.support.process_state import give_way, released, unvalidated
from pyro_mdn.training.batches.preparation import Batches
from pyro_mdn.training.batches.streams import Streamed
from pyro_mdn.training.optimizer import AveragedWeights, FusedAdamW, clip_, joint_norm
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import blur_inputs, blur_targets, fading, warmup_cosine, weight_decay_at
from pyro_mdn.training.settings import LoopSettings

__all__ = ["Loop", "copied"]

logger = logging.getLogger("pyro_mdn")

_STEPS_TO_FLUSH = 100  # in so many steps, the moments of the optimiser decay by five orders of magnitude


class Loop:
    """Train an objective on batches, epoch by epoch.

    Between epochs, :meth:`state` takes the whole state of the loop. :meth:`restore` gives it to another loop that was
    built in the same way, which then goes on as this one would have.

    Args:
        objective: Objective to minimise; all its parameters that require a gradient are trained.
        batches: Batches to train on.
        held_out: Held-out rows whose validation loss decides which epoch is the best, if there are any.
        units: Size of a standardised unit of x, and the units of y.
        settings: Settings of the run.
        row_weight: Mean over the rows of the sum of the weights of a row's losses. Losses are divided by it, so that
            their mean is over what was observed and only the ratios of weights matter.
        least_noise: Standard deviation, in the units of y, below which the noise on targets does not fade, if there is
            such a bound; held-out targets have as much.

    Attributes:
        matrix_dim: Dimensions of a weight matrix, to which weight decay applies.
    """

    matrix_dim = 2

    def __init__(
        self,
        objective: nn.Module,
        batches: Batches,
        held_out: Rows | Streamed | None,
        units: tuple[Units, Units],
        settings: LoopSettings,
        *,
        row_weight: Tensor | float = 1.0,
        least_noise: Tensor | None = None,
    ) -> None:
        self.objective, self.batches, self.held_out, self.settings = objective, batches, held_out, settings
        with unvalidated():  # torch.compile would switch the validation of distributions off, for good
            self.losses = torch.compile(objective, dynamic=True) if settings.compile else objective
        self.row_weight, self.least_noise = row_weight, least_noise
        self.input_units, self.units = units
        self.input_noise = settings.input_noise * self.input_units.unit
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = FusedAdamW(self.parameters, self.matrix_dim)
        self.average = AveragedWeights(self.parameters)
        self.best = copied(objective.state_dict())
        self.step, self.steps = 0, settings.max_epochs * len(batches)
        self.result = FitResult()

    def run(
        self,
        *,
        epochs: int | None = None,
        callbacks: Sequence[Callable[[FitResult], object]] = (),
        save: Callable[[int], object] | None = None,
        progress: bool = False,
    ) -> FitResult:
        """Train until the last epoch, or until early stopping, a callback or Ctrl-C ends the training.

        Args:
            epochs: Last epoch, if it is not that of the settings.
            callbacks: Functions that are called after each epoch with the result so far.
            save: Function that is called after the callbacks with the number of the epoch.
            progress: Show a progress bar.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite; the objective keeps its best weights.
        """
        result, start = self.result, time.perf_counter() - self.result.seconds
        last = epochs or self.settings.max_epochs
        bar = tqdm(total=last, initial=len(result.history), desc="fit", unit="epoch", disable=not progress)
        try:
            while len(result.history) < last and not result.stopped_early:
                self._epoch(len(result.history) + 1)
                result.seconds = time.perf_counter() - start
                row = result.history[-1]
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", validation=f"{row['validation_loss']:.3f}")
                logger.debug("epoch %(epoch)d: loss %(loss).4f, validation %(validation_loss).4f", row)
                self.objective.eval()
                for callback in callbacks:
                    with released():
                        answer = callback(result)
                    result.stopped_early |= isinstance(answer, bool | np.bool_) and bool(answer)
                if save is not None:
                    save(len(result.history))
        except KeyboardInterrupt:
            result.interrupted = True
            logger.warning("fit: interrupted after epoch %d; the weights of the best one are kept", len(result.history))
        finally:
            bar.close()
            self.objective.load_state_dict(self.best)
            self.optimizer.zero_grad()
        return result

    def _epoch(self, epoch: int) -> None:
        loss = self.train_epoch(epoch)
        gaps = self.batches.gaps
        self.result.unobserved, self.result.intervals = gaps.missing.tolist(), gaps.intervals.tolist()
        if epoch == 1 and any(self.result.unobserved + self.result.intervals):
            text = "fit: %s entries of y, by output, were not observed, and %s are intervals"
            logger.info(text, self.result.unobserved, self.result.intervals)
        monitored = self._evaluate()
        if self.held_out is not None and not self._sound(monitored):
            raise FloatingPointError(f"fit: validation loss is {self._shown(monitored)} after epoch {epoch}")
        lr = self.settings.lr * warmup_cosine(self.step - 1, self.steps)
        self._judge(epoch, loss, monitored, lr)
        losses = {"loss": loss.nanmean().item(), "validation_loss": monitored.nanmean().item()}
        self.result.history.append({"epoch": epoch, **losses, "lr": lr})

    def _judge(self, epoch: int, loss: Tensor, monitored: Tensor, lr: float) -> None:
        """Keep the averaged weights if this epoch is the best so far."""
        result = self.result
        if self.held_out is None or monitored.item() < result.best_loss:
            with self.average.swapped_in():
                best = copied(self.objective.state_dict())
            # One statement, so that Ctrl-C cannot come between the weights and their epoch.
            self.best, result.best_epoch = best, epoch
            result.best_loss = (loss if self.held_out is None else monitored).item()
        result.stopped_early = epoch - result.best_epoch >= self.settings.patience

    # Steps

    def train_epoch(self, epoch: int) -> Tensor:
        """Train for one pass over the batches, and return the mean loss of what was observed."""
        self.objective.train()
        with unvalidated():  # faults of the data show in the losses
            return self._pass(epoch)

    def _pass(self, epoch: int) -> Tensor:
        sums: list[Tensor] = []
        for number, batch in enumerate(self.batches, start=1):
            buffers = [b.clone() for b in self.objective.buffers()] if self.settings.skip_bad_batches else []
            give_way()
            try:
                sums.append(self._step(batch))
            except FloatingPointError as error:
                where = f"{error} in epoch {epoch}, batch {number} of {len(self.batches)}"
                if not self.settings.skip_bad_batches:
                    raise FloatingPointError(f"fit: {where}") from error
                logger.warning("fit: %s; skipped", where)
                for buffer, before in zip(self.objective.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                self.result.skipped_batches += 1
        if not sums:
            raise FloatingPointError(f"fit: no batch of epoch {epoch} has a finite loss and gradient")
        total, weight = torch.stack(sums).sum(0)
        return total / weight

    def _step(self, batch: Rows) -> Tensor:
        """Change the weights by one step; return the sum of the losses and the sum of their weights."""
        step, self.step = self.step, self.step + 1
        fade = fading(step, self.steps, self.settings.final_noise, self.settings.fading)
        x = blur_inputs(batch.x, self.input_units, self.input_noise, fade)
        y = blur_targets(batch.y, self.units, fade * self.settings.target_noise, least=self.least_noise)
        self.optimizer.zero_grad()
        total, weight = batch.totals(self._losses(x, y))
        loss = total / (len(batch) * self.row_weight)
        (loss if loss.ndim == 0 else loss.sum()).backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # One transfer for all numbers: each transfer waits for the device.
        looked_at = total.detach(), weight, loss.detach(), self._norm(gradients)
        numbers = torch.stack(looked_at).cpu().double()
        loss, norm = numbers[2], numbers[3]
        if not self._sound(loss):
            raise FloatingPointError(f"loss is {self._shown(loss)}")
        if not self._sound(norm):
            raise FloatingPointError(f"norm of the gradient is {self._shown(norm)}")
        self._clip(gradients, norm)
        decay = self.settings.first_weight_decay, self.settings.weight_decay
        weight_decay = weight_decay_at(step, self.steps, *decay, self.settings.fading)
        self.optimizer.step(self.settings.lr * warmup_cosine(step, self.steps), weight_decay)
        if step % _STEPS_TO_FLUSH == 0:
            self.optimizer.flush()
        self.average.update(step)
        return numbers[:2]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Compute the joint norm of the gradients, or one norm for each model that is trained side by side."""
        return joint_norm(gradients)

    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Clip gradients of this joint norm to the largest norm that is allowed."""
        clip_(gradients, norm.item(), self.settings.max_grad_norm)

    def _sound(self, value: Tensor) -> bool:
        """Check whether a loss or a norm is finite."""
        return math.isfinite(value.item())

    def _shown(self, value: Tensor) -> str:
        return str(value.item())

    def _losses(self, x: Tensor, y: TargetsOrTensor) -> Tensor:
        dtype = self.settings.autocast
        with nullcontext() if dtype is None else torch.autocast(x.device.type, dtype=dtype):
            return self.losses(x, y)

    # Validation

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """Compute the mean validation loss of the averaged weights; NaN if nothing is held out."""
        if self.held_out is None:
            return torch.tensor(math.nan, device="cpu")
        self.objective.eval()
        batches = (
            self.held_out.chunks(self.settings.evaluation_rows) if isinstance(self.held_out, Rows) else self.held_out
        )
        with self.average.swapped_in(), unvalidated():
            total = weight = torch.zeros((), dtype=torch.float64, device="cpu")
            for batch in batches:
                give_way()
                losses = self.objective(*self._off_grid(batch))
                sums = torch.stack(batch.totals(losses.double())).cpu()
                total, weight = total + sums[0], weight + sums[1]
        return total / weight

    def _off_grid(self, batch: Rows) -> tuple[Tensor, TargetsOrTensor]:
        """Dequantise held-out targets on a grid, with the same noise in every epoch."""
        if self.least_noise is None:
            return batch.x, batch.y
        generator = torch.Generator(batch.y.device).manual_seed(len(batch))
        return batch.x, blur_targets(batch.y, self.units, 0.0, least=self.least_noise, generator=generator)

    # State

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Collect everything that the next epoch depends on, except the data, as plain values and as tensors."""
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"average.{i}": tensor for i, tensor in enumerate(self.average.averages)}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors["generator"] = torch.get_rng_state()
        for i, generator in enumerate(self._generators()):
            tensors[f"generator.loader.{i}"] = generator.get_state()
        if (device := self.input_noise.device).type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(device)
        return {"step": self.step, "result": dataclasses.asdict(self.result)}, tensors

    def _generators(self) -> list[torch.Generator]:
        """List the random generators that loaders have of their own."""
        return [*self.batches.generators(), *getattr(self.held_out, "generators", list)()]

    def restore(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take over the state of another loop.

        Raises:
            ValueError: If it is the state of another kind of loop; nothing is changed then.
        """
        groups: dict[str, dict[str, Tensor]] = {"objective": {}, "best": {}, "average": {}, "optimizer": {}}
        rest: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            group, _, key = name.partition(".")
            groups.get(group, rest)[key if group in groups else name] = tensor
        _require_alike(self.objective.state_dict(), groups["objective"])
        _require_alike(self.best, groups["best"])
        _require_alike({str(i): t for i, t in enumerate(self.average.averages)}, groups["average"])
        _require_alike(self.optimizer.state(), groups["optimizer"])
        self.objective.load_state_dict(groups["objective"])
        for name, tensor in groups["best"].items():
            self.best[name].copy_(tensor)
        for i, average in enumerate(self.average.averages):
            average.copy_(groups["average"][str(i)])
        for name, tensor in self.optimizer.state().items():
            tensor.copy_(groups["optimizer"][name])
        device = self.input_noise.device
        self.step, self.result = config["step"], FitResult(**config["result"])
        self.result.members = [FitResult(**member) for member in config["result"]["members"]]
        torch.set_rng_state(rest["generator"])
        for i, generator in enumerate(self._generators()):
            generator.set_state(rest[f"generator.loader.{i}"])
        if "generator.cuda" in rest:
            torch.cuda.set_rng_state(rest["generator.cuda"], device)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors of a state."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _require_alike(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    a = {(name, tuple(t.shape), t.dtype) for name, t in expected.items()}
    b = {(name, tuple(t.shape), t.dtype) for name, t in got.items()}
    if a != b:
        raise ValueError(f"checkpoint: expected tensors of this model, got others for {sorted({n for n, *_ in a ^ b})}")
