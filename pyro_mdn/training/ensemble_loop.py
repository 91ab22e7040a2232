r"""The training loop of an ensemble: all members take their steps together, and each stops early by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mdn.training.loop import Loop
from pyro_mdn.training.result import FitResult

__all__ = ["MemberLoop"]


class MemberLoop(Loop):
    """Train the members of an ensemble side by side, each as if it were alone.

    The objective gives losses ``(M, N, ...)``, and every tensor that is trained has a leading axis of M members.
    Gradient clipping, the choice of the best epoch and early stopping go member by member: a member that has stopped
    keeps its best weights, and training ends with the last member.
    """

    matrix_dim = 3

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients]).sum(0).sqrt()

    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        factor = (self.settings.max_grad_norm / norm).clamp(max=1.0).to(gradients[0])
        for g in gradients:
            g.mul_(factor.reshape(-1, *(1,) * (g.ndim - 1)))

    def _sound(self, value: Tensor) -> bool:
        return not bool(self._broken(value).any())

    def _broken(self, value: Tensor) -> Tensor:
        """Find the members with a value that is not finite, except members that have stopped already."""
        stopped = [member.stopped_early for member in self.result.members] or [False] * len(value)
        return ~value.isfinite() & ~torch.tensor(stopped, device=value.device)

    def _shown(self, value: Tensor) -> str:
        which = int(self._broken(value).nonzero()[0])
        return f"{value[which].item()} in member {which} of {len(value)}"

    def _judge(self, epoch: int, loss: Tensor, monitored: Tensor, lr: float) -> None:
        members = self.result.members or [FitResult() for _ in loss]
        losses = zip(members, loss.tolist(), monitored.expand(len(loss)).tolist(), strict=True)
        after = [self._judged(member, epoch, own, held_out, lr) for member, own, held_out in losses]
        improved = [new.best_epoch == epoch for new in after]
        with self.average.swapped_in():
            state = self.objective.state_dict()
            best = {name: _chosen(improved, state[name], kept) for name, kept in self.best.items()}
        # One statement, so that Ctrl-C cannot come between the weights and their epochs.
        self.best, self.result.members = best, after
        self.result.best_epoch = max(member.best_epoch for member in after)
        self.result.best_loss = sum(member.best_loss for member in after) / len(after)
        self.result.stopped_early = all(member.stopped_early for member in after)

    def _judged(self, member: FitResult, epoch: int, loss: float, monitored: float, lr: float) -> FitResult:
        """Return the result of one member after another epoch."""
        if member.stopped_early:
            return member
        row = {"epoch": epoch, "loss": loss, "validation_loss": monitored, "lr": lr}
        judged = loss if self.held_out is None else monitored
        best = (epoch, judged) if self.held_out is None or judged < member.best_loss else None
        best_epoch, best_loss = best or (member.best_epoch, member.best_loss)
        return FitResult(
            history=[*member.history, row],
            best_epoch=best_epoch,
            best_loss=best_loss,
            stopped_early=epoch - best_epoch >= self.settings.patience,
        )


def _chosen(improved: list[bool], new: Tensor, kept: Tensor) -> Tensor:
    """Take the new values for members that improved, and the kept values for the others."""
    which = torch.tensor(improved, device=new.device).reshape(-1, *(1,) * (new.ndim - 1))
    return torch.where(which, new, kept)
