r"""Training: objectives are modules, and one loop trains them all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_mdn.network import MixtureDensityNetwork, evaluating

__all__ = ["FitResult", "NegativeLogLikelihood", "fit"]


class NegativeLogLikelihood(nn.Module):
    r"""Objective :math:`-\log p(y \mid x)` in nats, one number per row.

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


@dataclass
class FitResult:
    """What a training run did.

    Attributes:
        history: One row per epoch: ``epoch``, ``loss``, ``validation_loss`` (of the averaged weights; NaN without
            validation) and ``lr``.
        best_epoch: Epoch whose averaged weights the network now has: the last one whose validation loss is not
            above the lowest by more than half a standard error; without validation, the last.
        best_loss: Their validation loss; without validation, the training loss.
        stopped_early: Whether the validation loss had stopped improving before the last epoch.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    stopped_early: bool = False


def fit(
    network: MixtureDensityNetwork,
    x: Any,
    y: Any,
    *,
    validation: float | Sequence[Any] = 0.1,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 5e-3,
    weight_decay: float | None = None,
    input_noise: float = 0.3,
    target_noise: float = 0.1,
    patience: int | None = None,
    max_grad_norm: float = 1.0,
    initialize: bool = True,
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Train a network on data by its negative log-likelihood; the network changes in place.

    AdamW with decay on weight matrices only, a warm-up and a cosine schedule, gradient clipping, and an exponential
    average of the weights. Inputs and targets get fresh noise every step, which smooths the density (Rothfuss et
    al., 2019). The noise fades to a tenth over the schedule, so that early stopping on held-out rows also finds how
    much smoothing the data need. The averaged weights of the best epoch are kept.

    Args:
        network: The network.
        x: Inputs ``(N, ..., dim_in)``: a tensor, NumPy array or pandas frame of floating-point numbers.
        y: Targets ``(N, ..., D)``, likewise. For D = 1, ``(N, ...)`` is read as ``(N, ..., 1)``.
        validation: Fraction of the rows to hold out, or a pair ``(x, y)``; 0 for none, and so no early stopping.
        max_epochs: Passes over the training rows at most; the schedule is spread over them. By default as many as
            make 3000 steps, but 100 at least.
        batch_size: Rows per step at most; by default 1/64 of the training rows, but 32 at least and 256 at most.
        lr: Largest learning rate.
        weight_decay: Decoupled decay of the weight matrices (Loshchilov & Hutter, 2019); by default 150 over the
            number of training rows (3 at most), since a prior on the weights matters less the more data there are.
        input_noise: Standard deviation of the noise on x at the start, in standardised units.
        target_noise: The same for y.
        patience: Epochs without improvement of the validation loss before training stops; by default a quarter of
            ``max_epochs``.
        max_grad_norm: Gradients are scaled down to this norm.
        initialize: Set scalers and components from the training rows first; ``False`` to train a network further.
        seed: Seed of split, start and batches; the global generator is left as it was. ``None``: use the latter.
        progress: Show a progress bar.

    Raises:
        ValueError: If the data or a setting are not usable; nothing is changed then.
        FloatingPointError: If the loss, its gradient or the validation loss is not finite, with epoch and batch; the
            network keeps its best weights so far.

    >>> x = torch.linspace(-1, 1, 100).unsqueeze(-1)
    >>> result = fit(MixtureDensityNetwork(1, 1), x, x**2, max_epochs=2, seed=0, progress=False)
    >>> len(result.history)
    2
    """
    _require_counts(max_epochs=max_epochs, batch_size=batch_size, patience=patience)
    _require_numbers(lr=lr, max_grad_norm=max_grad_norm)
    _require_numbers(least=0.0, weight_decay=weight_decay, input_noise=input_noise, target_noise=target_noise)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("network: expected parameters to train, got none that requires a gradient")
    with _isolated(network, seed):
        x, y = _as_data(network, x, y)
        train, held_out = _split(network, x, y, validation)
        if initialize:
            network.initialize_(*train)
        n_batches = math.ceil(len(train[0]) / (batch_size or min(256, max(32, len(train[0]) // 64))))
        max_epochs = max_epochs or max(100, math.ceil(3000 / n_batches))
        objective = NegativeLogLikelihood(network)
        weight_decay = min(3.0, 150 / len(train[0])) if weight_decay is None else weight_decay
        optimizer = _optimizer(objective, lr, weight_decay)
        loop = _Loop(
            objective,
            optimizer,
            _schedule(optimizer, max_epochs * n_batches),
            noise=(input_noise * network.x_scale, target_noise * network.head.scale),
            steps=max_epochs * n_batches,
            max_grad_norm=max_grad_norm,
        )
        return loop.run(train, held_out, n_batches, max_epochs, patience or math.ceil(max_epochs / 4), progress)


class _Loop:
    """The training loop: it knows an objective and batches, not what is being trained."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        noise: tuple[Tensor, Tensor],
        steps: int,
        max_grad_norm: float,
    ) -> None:
        self.objective, self.optimizer, self.schedule = objective, optimizer, schedule
        self.noise, self.max_grad_norm = noise, max_grad_norm
        self.step, self.steps = 0, steps
        self.parameters = list(objective.parameters())
        self.averaged = copy.deepcopy(objective).requires_grad_(False).eval()
        self.averages = list(self.averaged.parameters())
        self.best = copy.deepcopy(objective.state_dict())
        self.stopping = _Stopping()

    def run(
        self,
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor] | None,
        n_batches: int,
        max_epochs: int,
        patience: int,
        progress: bool,
    ) -> FitResult:
        result = FitResult()
        bar = tqdm(range(1, max_epochs + 1), desc="fit", unit="epoch", disable=not progress)
        try:
            for epoch in bar:
                loss = self._epoch(epoch, *train, n_batches)
                losses = None if held_out is None else self._evaluate(*held_out)
                monitored = math.nan if losses is None else float(losses.mean())
                if losses is not None and not math.isfinite(monitored):
                    raise FloatingPointError(f"fit: validation loss is {monitored} after epoch {epoch}")
                lr = float(self.schedule.get_last_lr()[0])
                result.history.append({"epoch": epoch, "loss": loss, "validation_loss": monitored, "lr": lr})
                if losses is None or self.stopping.is_good(losses):
                    result.best_epoch, result.best_loss = epoch, loss if losses is None else monitored
                    self._keep()
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{monitored:.3f}")
                if epoch - result.best_epoch >= patience:
                    result.stopped_early = True
                    break
        finally:
            self.objective.load_state_dict(self.best)
            self.optimizer.zero_grad()
        return result

    def _epoch(self, epoch: int, x: Tensor, y: Tensor, n_batches: int) -> float:
        """Mean loss over one pass; batches differ in size by one row at most, so that none is short."""
        self.objective.train()
        total = 0.0
        for batch, rows in enumerate(torch.randperm(len(x), device=x.device).tensor_split(n_batches), start=1):
            try:
                total += self._step(x[rows], y[rows]) * len(rows)
            except FloatingPointError as error:
                raise FloatingPointError(f"fit: {error} in epoch {epoch}, batch {batch} of {n_batches}") from error
        for average, buffer in zip(self.averaged.buffers(), self.objective.buffers(), strict=True):
            average.copy_(buffer)
        return total / len(x)

    def _step(self, x: Tensor, y: Tensor) -> float:
        fade = 0.1 + 0.9 * (1 - self.step / self.steps) ** 3
        x, y = (_blur(value, fade * scale) for value, scale in zip((x, y), self.noise, strict=True))
        self.optimizer.zero_grad()
        loss = self.objective(x, y).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()}")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(f"norm of the gradient is {norm.item()}")
        self.optimizer.step()
        self.schedule.step()
        self._average()
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential average over about the last tenth of all steps, 100 at most."""
        weight = max(0.01, 9 / (10 + self.step))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, weight)
        self.step += 1

    @torch.no_grad()
    def _evaluate(self, x: Tensor, y: Tensor, rows: int = 8192) -> Tensor:
        """Held-out loss of each row, of the averaged weights."""
        losses = [self.averaged(a, b) for a, b in zip(x.split(rows), y.split(rows), strict=True)]
        return torch.cat([loss.flatten() for loss in losses])

    def _keep(self) -> None:
        for name, tensor in self.averaged.state_dict().items():
            self.best[name].copy_(tensor)


def _blur(value: Tensor, scale: Tensor) -> Tensor:
    return value + scale * torch.randn(value.shape, dtype=scale.dtype, device=scale.device)


class _Stopping:
    """Judges epochs by held-out losses, row by row.

    An epoch is good if its mean loss is the lowest so far, or above the lowest by no more than half a standard
    error of the difference: one held-out row that gets worse as all others get better must not end the training.
    """

    def __init__(self, tolerance: float = 0.5) -> None:
        self.tolerance = tolerance
        self.lowest: Tensor | None = None

    def is_good(self, losses: Tensor) -> bool:
        if self.lowest is None or losses.mean() < self.lowest.mean():
            self.lowest = losses
            return True
        difference = losses - self.lowest
        error = difference.std() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return bool(difference.mean() <= self.tolerance * error)


def _optimizer(objective: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min(
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))),
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextmanager
def _isolated(network: nn.Module, seed: int | None) -> Iterator[None]:
    """Keep Pyro's parameter store, the mode of the network and, with a seed, the generators as they were."""
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        torch.random.fork_rng(range(torch.cuda.device_count()), enabled=seed is not None),
        evaluating(network),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _require_counts(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _require_numbers(*, least: float = math.ulp(0.0), **settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not least <= value < math.inf:
            kind = "not negative" if least == 0 else "positive"
            raise ValueError(f"{name}: expected a finite number that is {kind}, got {value!r}")


def _as_data(network: MixtureDensityNetwork, x: Any, y: Any, name: str = "") -> tuple[Tensor, Tensor]:
    x, y = _as_tensor(network, x, f"{name}x"), _as_tensor(network, y, f"{name}y")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"{name}x, {name}y: expected equally many rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    return x, network.check(x, y)


def _as_tensor(network: MixtureDensityNetwork, value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name}: expected floating-point numbers, got dtype {array.dtype}")
        value = torch.tensor(array)
    return value.detach().to(network.x_shift.device)


def _split(
    network: MixtureDensityNetwork, x: Tensor, y: Tensor, validation: float | Sequence[Any]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Training rows and held-out rows."""
    if isinstance(validation, Sequence) and len(validation) == 2:
        return (x, y), _as_data(network, validation[0], validation[1], "validation ")
    if not isinstance(validation, float | int) or not 0 <= validation < 1:
        raise ValueError(f"validation: expected a fraction in [0, 1) or a pair (x, y), got {validation!r}")
    if validation == 0:
        return (x, y), None
    held_out = max(1, round(validation * len(x)))
    if held_out >= len(x):
        raise ValueError(f"validation: expected to leave rows for training, got {len(x)} rows in all")
    rows = torch.randperm(len(x), device=x.device)
    return (x[rows[held_out:]], y[rows[held_out:]]), (x[rows[:held_out]], y[rows[:held_out]])
