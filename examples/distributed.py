"""Two processes
=============

Two processes train one network with Lightning. Their gradients, and so their result, equal those of one process.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_mdn import MixtureDensityNetwork, NegativeLogLikelihood
from pyro_mdn.lightning import LightningObjective

BATCH = 256  # rows of a step, over all processes
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
warnings.filterwarnings("ignore", module="lightning")  # hints: more workers, a validation loader
logging.disable(logging.WARNING)


def simulate(n):
    """A fork: y is +x² or -x², with noise."""
    x, sign = 2 * torch.rand(n, 1) - 1, torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return x, sign * x**2 + 0.05 * torch.randn(n, 1)


class FirstGradients(Callback):
    """Keeps the gradients of the first step, as the optimiser is about to get them."""

    gradients = None

    def on_after_backward(self, trainer, module):
        self.gradients = self.gradients or [p.grad.clone() for p in module.parameters()]


def train(x, y, processes, epochs):
    """Train on so many processes, each with its share of every batch, and return network and first gradients."""
    torch.manual_seed(0)
    (network := MixtureDensityNetwork(dim_in=1, dim_out=1, n_components=3)).initialize_(x, y)
    # Each process draws its own noise. Without noise a step is the same for any number of processes.
    module = LightningObjective(NegativeLogLikelihood(network), input_noise=0.0, target_noise=0.0)
    rows = TensorDataset(x, y)
    # With several processes Lightning replaces shuffling by such a sampler, so the order of the rows is the same.
    order = DistributedSampler(rows, num_replicas=1, rank=0) if processes == 1 else None
    loader = DataLoader(rows, BATCH // processes, shuffle=order is None, sampler=order)
    settings = {"max_epochs": epochs, "gradient_clip_val": 1.0, "callbacks": [first := FirstGradients()], **QUIET}
    strategy = "ddp" if processes > 1 else "auto"  # on CPUs the processes communicate by gloo
    Trainer(accelerator="cpu", devices=processes, strategy=strategy, **settings).fit(module, loader)
    return network, first.gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    epochs = 2 if args.smoke else 40
    torch.manual_seed(1)
    (x, y), held_out = simulate(16 * BATCH), simulate(2000)
    # Lightning starts the second process, which runs this script again; only the first process does the following.
    alone = rank_zero_only(train)(x, y, 1, epochs)
    shared = train(x, y, 2, epochs)
    if alone is None:
        return
    differences = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(alone[1], shared[1], strict=True)]
    shared[0].save(args.out / "distributed.safetensors")
    nll = [network.loss(*held_out).mean().item() for network, _ in (alone, shared)]
    print(f"{'':<14}{'held-out NLL (nats)':>20}{'epochs':>9}{'rows of a step':>17}")
    for name, value, share in zip(["one process", "two processes"], nll, [BATCH, f"2 x {BATCH // 2}"], strict=True):
        print(f"{name:<14}{value:20.4f}{epochs:9d}{share:>17}")
    print(f"gradients of the first step: largest relative difference {max(differences):.1e}")


if __name__ == "__main__":
    main()
