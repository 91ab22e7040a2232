"""Kill a training process at random moments and resume it: as a program of its own, so that it may fork.

Prints one line per kill: the variant, the share of the run that had passed, and whether the weights are the same bits.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_mdn import Full, MixtureDensityNetwork, fit

SETTINGS = {"max_epochs": 30, "batch_size": 32, "checkpoint_every": 2, "seed": 3, "progress": False}


def dropout():
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2))


def bayesian():
    layer = PyroModule[nn.Linear](2, 16)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([16, 2]).to_event(2))
    return PyroModule[nn.Sequential](layer, PyroModule[nn.Tanh]())


def train(variant, path):
    """Train from the checkpoint, if there is one, and write the weights."""
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    y = x.flip(1) * x + 0.1 * torch.randn(300, 2)
    backbone = {"dropout": dropout, "guide": bayesian}.get(variant)
    network = MixtureDensityNetwork(2, 2, 3, 16, noise=Full(), backbone=None if backbone is None else backbone())
    guide = AutoNormal(network.model) if variant == "guide" else None
    more = {"refit": variant == "refit", "guide": guide, "validation": 0.2, "patience": 20}
    if variant == "missing":
        y[::3, 0] = torch.nan
        more |= {"sample_weight": torch.rand(300)}
    result = fit(network, x, y, checkpoint=path / "run", resume=True, **more, **SETTINGS)
    state = {**network.state_dict(), **({} if guide is None else guide.state_dict())}
    numbers = {"history": result.history, "refit": result.refit_history, "best": result.best_epoch}
    torch.save({"state": state, **numbers}, path / "weights")


def forked(variant, path, seconds=None):
    """Train in a process of its own, which is killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            path.mkdir(exist_ok=True)
            train(variant, path)
        except BaseException as error:
            print(f"error {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def same(a, b):
    a, b = torch.load(a / "weights"), torch.load(b / "weights")
    weights = all(torch.equal(t, b["state"][name]) for name, t in a.pop("state").items())
    return weights and repr(a) == repr({name: value for name, value in b.items() if name != "state"})


def main():
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    x = torch.randn(40, 1)
    fit(MixtureDensityNetwork(1, 1), x, x, max_epochs=1, progress=False)  # imports what children would, each anew
    moments = random.Random(0)
    durations = {}
    for i in range(kills):
        variant = ["plain", "dropout", "refit", "guide", "missing"][i % 5]
        reference, path = folder / variant, folder / f"{variant}{i}"
        if variant not in durations:
            start = time.perf_counter()
            assert forked(variant, reference)
            durations[variant] = time.perf_counter() - start
        share = moments.random()
        ended = forked(variant, path, share * durations[variant])
        resumed = ended or (path / "run").exists()
        assert forked(variant, path)
        print(
            variant, f"{share:.2f}", "resumed" if resumed else "anew", "same" if same(reference, path) else "different"
        )


if __name__ == "__main__":
    main()
