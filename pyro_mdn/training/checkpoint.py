r"""Checkpoints: the whole state of a training run in one file, from which a run goes on as if it had never stopped."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_mdn.networks.rows import Rows
from pyro_mdn.support import tensor_files
from pyro_mdn.support.fingerprint import FORMS, differing, incomparable
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.loop import Loop, copied
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import epochs_of_refit

__all__ = ["Checkpoint", "CheckpointedTraining"]

logger = logging.getLogger("pyro_mdn")


class Checkpoint:
    """File to which a training run writes its state every few epochs, and from which it resumes.

    If a write fails, for example on a full disk, the error is logged and the last good file stays in place.

    Args:
        path: Path of the file. With ``None`` there is no file, and no method does anything.
        every: Epochs from one write to the next.
        resume: Read the file, if there is one. Nothing in it is executed.

    Raises:
        ValueError: If the file is damaged or not a checkpoint, if it could not be written, or if there is no path to
            resume from.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int, *, resume: bool) -> None:
        if resume and path is None:
            raise ValueError("resume: expected checkpoint= with the file to go on from")
        self.path, self.every, self.resume = None if path is None else Path(path), every, resume
        if self.path is not None and (self.path.is_dir() or not os.access(self.path.parent, os.W_OK)):
            raise ValueError(f"checkpoint: expected a file in a directory that can be written to, got {path}")
        self.run: dict[str, Any] = {}
        self._modules: dict[str, str] = {}  # descriptions of the modules at the start of the run
        self._changing: set[str] = set()  # names of descriptions that training changes
        self._describe: Callable[[int], dict[str, str]] = lambda _: {}
        self._progress: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        if resume and self.path is not None and self.path.exists():
            config, self._tensors = tensor_files.read_tensors(self.path)
            if config.get("kind") != "checkpoint":
                raise ValueError(f"{path}: expected a checkpoint, got another file of this library")
            self.run, self._progress = config["run"], config["progress"]
            self._modules, self._changing = config.get("described", {}), {*config.get("changing", ())}

    def require(self, run: Mapping[str, Any], describe: Callable[[int], dict[str, str]]) -> None:
        """Say which run this is, and check that the file is of the same run.

        Args:
            run: Plain values that tell runs apart.
            describe: Function that describes the modules that are trained, in one of ``FORMS``. What training changes
                in the modules, such as a counter, does not tell runs apart. Such changes are found by describing the
                modules again when the file is written.

        Raises:
            ValueError: If the file is of another run; the error says what differs.

        Warns:
            UserWarning: If a part cannot be compared.
        """
        modules = describe(0)
        self._take_over(modules, describe)
        here, there = ({**run, **modules}, {**self.run, **self._modules})
        names = [name for name in run if self.run and run[name] != self.run.get(name)]
        names += [name for name in differing(modules, self._modules or modules) if name not in self._changing]
        if names:
            here, there = ({name: r.get(name) for name in names} for r in (here, there))
            raise ValueError(f"{self.path}: expected a checkpoint of this run, {here}, got one of another, {there}")
        if self.run:
            self._warn_if_unsure(modules)
        self.run, self._modules, self._describe = dict(run), self._modules or modules, describe

    def _take_over(self, modules: Mapping[str, str], describe: Callable[[int], dict[str, str]]) -> None:
        """Translate descriptions that an earlier version wrote into those of this version."""
        for form in FORMS[1:] if self._modules and differing(modules, self._modules) else ():
            earlier = describe(form)
            # What neither the file nor a description of that time names was not there yet.
            same = [name for name in modules if self._modules.get(name) == earlier.get(name)]
            self._modules |= {name: modules[name] for name in same}

    def _warn_if_unsure(self, modules: Mapping[str, str]) -> None:
        unsure = (
            incomparable(modules)
            if self._modules
            else ["network and objective: the file does not describe them in a way known here"]
        )
        if unsure:
            warnings.warn(f"{self.path}: cannot tell whether this is the same as in that run: {unsure}", stacklevel=4)

    @property
    def second_path(self) -> Path | None:
        """Path beside this one, for the second training of a refit."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.refit")

    def second(self) -> Checkpoint:
        """Open the checkpoint of the second training of a refit."""
        second = Checkpoint(self.second_path, self.every, resume=self.resume)
        second._changing |= self._changing
        second.require({**self.run, "part": "refit"}, lambda form: self._describe(form) if form else self._modules)
        return second

    def forget_second(self) -> None:
        """Delete the second file that an earlier run has left, unless this run goes on from its own checkpoint."""
        if self.second_path is not None and not self._tensors:
            self.second_path.unlink(missing_ok=True)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return the tensors that were written beside the state under names ``group.…``."""
        prefix = f"{group}."
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}

    def restore(self, loop: Loop) -> None:
        """Give a training loop the state in the file, if the file was read."""
        if self._tensors:
            loop.restore(self._progress, self._tensors)

    def write(self, loop: Loop, beside: Mapping[str, Tensor], epoch: int | None = None) -> None:
        """Write the state of a training loop, and tensors beside it, if a write is due after this epoch."""
        if self.path is None or (epoch is not None and epoch % self.every):
            return
        progress, tensors = loop.state()
        self._changing |= {*differing(self._modules, self._describe(0))}
        modules = {"described": self._modules, "changing": sorted(self._changing)}
        config = {"kind": "checkpoint", "run": self.run, **modules, "progress": progress}
        try:
            tensor_files.write_tensors(self.path, config, {**tensors, **beside})
        except OSError as error:
            logger.error("fit: the checkpoint was not written, the last one stays: %s", error)


@dataclass(frozen=True)
class CheckpointedTraining:
    """Train, and write the state of the training loop to a checkpoint every few epochs and at the end."""

    checkpoint: Checkpoint
    callbacks: Sequence[Callable[[FitResult], object]]
    progress: bool

    def run(self, loop: Loop, *, epochs: int | None = None, beside: Mapping[str, Tensor] | None = None) -> FitResult:
        """Train up to an epoch, or to the end; the tensors ``beside`` are written with the state."""
        before = len(loop.result.history)

        def save(epoch: int | None = None) -> None:
            self.checkpoint.write(loop, beside or {}, epoch)

        result = loop.run(epochs=epochs, callbacks=self.callbacks, save=save, progress=self.progress)
        if len(result.history) > before and not result.interrupted:
            save()
        return result

    def refit(self, loop: Loop, start: Mapping[str, Tensor], begin: Callable[[InMemory], Loop]) -> FitResult:
        """Search for the best epoch by early stopping, then start again and train on all rows a little longer.

        Args:
            loop: The search.
            start: State of the objective that both trainings start from.
            begin: Function that starts the second training on the rows it is given.
        """
        self.checkpoint.forget_second()
        result = self.run(loop, beside={f"start.{name}": tensor for name, tensor in start.items()})
        batches, held_out, objective = loop.batches, loop.held_out, loop.objective
        if result.interrupted or not isinstance(held_out, Rows) or not isinstance(batches, InMemory):
            return result
        best = copied(objective.state_dict())
        try:
            objective.load_state_dict(start)
            everything = InMemory(Rows.joined([batches.rows, held_out]), math.ceil(batches.num_rows / len(batches)))
            second = replace(self, checkpoint=self.checkpoint.second())
            again = begin(everything)
            second.checkpoint.restore(again)
            rows, last = (batches.num_rows, everything.num_rows), loop.settings.max_epochs
            refitted = second.run(again, epochs=epochs_of_refit(result.best_epoch, *rows, last))
        except BaseException:
            objective.load_state_dict(best)
            raise
        if refitted.interrupted:
            objective.load_state_dict(best)
        return replace(
            result,
            interrupted=refitted.interrupted,
            skipped_batches=result.skipped_batches + refitted.skipped_batches,
            seconds=result.seconds + refitted.seconds,
            refit_history=refitted.history,
        )
