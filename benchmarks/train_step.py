"""What does a training step cost? One pass over eight batches, drawing them included, over what it takes by hand.

By hand is a torch script of the usual kind: two hidden layers, a mixture of five normals, log-sum-exp, Adam with its
defaults. This package runs the very loop of ``fit``: noise on the rows, clipping, schedules, averaged weights and all.

Weights are those of the start, on simulated data of one output; or trained, on real data: eight measurements of wines
given the others, with ten full covariances, everybody after as many steps of its own.

    python benchmarks/train_step.py
"""

import argparse
from functools import partial

import pyro
import torch
from log_prob import mixture_of, wine_table
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import DEVICE, SMOKE, machine, race, ratio, shown, threads_of, write
from torch import nn
from torch.nn.functional import softplus

from pyro_mdn import Full, MixtureDensityNetwork, NegativeElbo, NegativeLogLikelihood, bayesianize
from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.loop import Loop
from pyro_mdn.training.settings import LoopSettings

BATCHES = 8
STEPS = {"": 0, "trained": 400, "briefly trained": BATCHES}  # the last for smoke runs
CASES = [(256, 64, ""), (256, 256, ""), (4096, 64, ""), (4096, 256, ""), (256, 64, "trained"), (2048, 64, "trained")]


def data(batch, weights):
    if not weights:
        x = 4 * torch.rand(BATCHES * batch, 1, device=DEVICE) - 2
        return x, torch.sin(3 * x) + 0.2 * torch.randn_like(x)
    table = wine_table().to(DEVICE)
    rows = table[torch.randint(len(table), (BATCHES * batch,), device=DEVICE)]
    return rows[:, 8:], rows[:, :8]


def trained(weights, one_pass):
    """The same pass, after as many steps as it takes for trained weights."""
    for _ in range(STEPS[weights] // BATCHES):
        one_pass()
    return one_pass


def network_for(x, y, width):
    settings = {"n_components": 5} if y.shape[1] == 1 else {"n_components": 10, "noise": Full()}
    network = MixtureDensityNetwork(x.shape[1], y.shape[1], hidden_dim=width, **settings).to(DEVICE)
    network.initialize_(x, y)
    return network


def by_hand(batch, width, weights, *, fused=None):
    x, y = data(batch, weights)
    density, channels = (normals, 15) if y.shape[1] == 1 else (correlated_normals, 10 * (1 + 8 + 36))
    network = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, channels)
    ).to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=fused)

    def step(x, y):
        optimizer.zero_grad()
        loss = -density(network(x), y).mean()
        loss.backward()
        optimizer.step()
        return loss

    return trained(weights, partial(one_pass, step, x, y, batch))


def normals(channels, y):
    logits, locs, raw = channels.chunk(3, -1)
    normal = torch.distributions.Normal(locs, softplus(raw) + 1e-3, validate_args=False)
    return torch.logsumexp(torch.log_softmax(logits, -1) + normal.log_prob(y), -1)


def correlated_normals(channels, y):
    logits, locs, factor = channels.split([10, 80, 360], -1)
    parts = logits, locs.unflatten(-1, (10, 8)), factor.unflatten(-1, (10, 36))
    return mixture_of(torch.distributions, "full", *parts).log_prob(y)


def one_pass(step, x, y, batch):
    for index in torch.randperm(len(x), device=x.device).split(batch):
        step(x[index], y[index])


def of_fit(batch, width, weights, *, kind="likelihood", compiled=False):
    x, y = data(batch, weights)
    pyro.clear_param_store()
    network = network_for(x, y, width)
    if kind == "likelihood":
        objective = NegativeLogLikelihood(network)
    else:
        objective = NegativeElbo(network, guide_of(kind, network, x, y), len(x))
    settings = LoopSettings(
        max_epochs=10**9,
        patience=1,
        lr=1e-3,
        weight_decay=0.01,
        input_noise=0.1,
        target_noise=0.1,
        final_noise=0.03,
        max_grad_norm=10.0,
        compile=compiled,
    )
    batches = InMemory(Rows(x, y), batch)
    loop = Loop(objective, batches, None, (network.input_units, network.head.units), settings)
    return trained(weights, lambda: loop.train_epoch(1))


def guide_of(kind, network, x, y):
    if kind == "empty guide":
        return nothing
    bayesianize(network)
    guide = AutoNormal(network.model)
    guide(x, y)
    return guide


def nothing(x, y=None, num_data=None):
    """A guide without latent variables."""


def of_pyro(batch, width, weights, *, kind, of_user=False):
    """``SVI`` with its default settings."""
    x, y = data(batch, weights)
    pyro.clear_param_store()
    network = network_for(x, y, width)
    guide = guide_of(kind, network, x, y)

    def my_model(x, y=None, num_data=None):  # as README has it
        mixture = network(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", mixture, obs=y)

    model = my_model if of_user else network.model
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return trained(weights, partial(one_pass, partial(svi.step, num_data=len(x)), x, y, batch))


CONTESTANTS = {
    "by hand": by_hand,
    "by hand, fused Adam": partial(by_hand, fused=True),
    "fit": of_fit,
    "fit, compiled": partial(of_fit, compiled=True),
    "fit, empty guide": partial(of_fit, kind="empty guide"),
    "SVI, empty guide": partial(of_pyro, kind="empty guide"),
    "SVI, model of a user": partial(of_pyro, kind="empty guide", of_user=True),
    "fit, AutoNormal": partial(of_fit, kind="AutoNormal"),
    "SVI, AutoNormal": partial(of_pyro, kind="AutoNormal"),
}


def measure(threads, *, smoke):
    settings = SMOKE if smoke else {"rounds": 15, "block": 0.1}
    cases = [(8, 4, ""), (8, 4, "briefly trained")] if smoke else CASES
    chosen = {n: CONTESTANTS[n] for n in ("by hand", "fit", "fit, AutoNormal")} if smoke else CONTESTANTS
    rows = []
    for (batch, width, weights), times in race(chosen, cases, threads, **settings).items():
        microseconds = sorted(times["by hand"])[len(times["by hand"]) // 2] * 1e6 / BATCHES
        ratios = {name: ratio(times, name, "by hand") for name in times if name != "by hand"}
        row = {"batch": batch, "width": width, "weights": weights, "threads": threads, "microseconds": microseconds}
        row["ratios"] = ratios
        if (users := "SVI, model of a user") in times:
            row["user's model over ours"] = ratio(times, users, "SVI, empty guide")
        rows.append(row)
    return rows


def table(rows):
    """Markdown: each step over one by hand."""
    names = [name for name in CONTESTANTS if name != "by hand"]
    lines = ["| batch | width | threads | by hand, µs | " + " | ".join(names) + " |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = [shown(row["ratios"][n]) if n in row["ratios"] else "" for n in names]
        batch = f"{row['batch']}{', trained' * bool(row.get('weights'))}"
        sizes = f"| {batch} | {row['width']} | {row['threads']} | {row['microseconds']:.0f} | "
        lines.append(sizes + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="train_step", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    rows = [row for threads in args.threads for row in measure(threads, smoke=args.smoke)]
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
