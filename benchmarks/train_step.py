"""What does a training step cost? One pass over eight batches, drawing them included, over what it takes by hand.

By hand is a torch script of the usual kind: two hidden layers, a mixture of five normals, log-sum-exp, Adam with its
defaults. This package runs the very loop of ``fit``: noise on the rows, clipping, schedules, averaged weights and all.

    python benchmarks/train_step.py
"""

import argparse
from functools import partial

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import DEVICE, machine, race, ratio, shown, threads_of, write
from torch import nn
from torch.nn.functional import softplus

from pyro_mdn import MixtureDensityNetwork, NegativeElbo, NegativeLogLikelihood, bayesianize
from pyro_mdn.data import InMemory, Rows
from pyro_mdn.loop import Loop, Settings

BATCHES, COMPONENTS = 8, 5
CASES = [(256, 64), (256, 256), (4096, 64), (4096, 256)]


def data(batch):
    x = 4 * torch.rand(BATCHES * batch, 1, device=DEVICE) - 2
    return x, torch.sin(3 * x) + 0.2 * torch.randn_like(x)


def by_hand(batch, width, *, fused=None):
    x, y = data(batch)
    network = nn.Sequential(
        nn.Linear(1, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3 * COMPONENTS)
    ).to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=fused)

    def step(x, y):
        optimizer.zero_grad()
        logits, locs, raw = network(x).chunk(3, -1)
        normal = torch.distributions.Normal(locs, softplus(raw) + 1e-3, validate_args=False)
        loss = -torch.logsumexp(torch.log_softmax(logits, -1) + normal.log_prob(y), -1).mean()
        loss.backward()
        optimizer.step()
        return loss

    return partial(one_pass, step, x, y, batch)


def one_pass(step, x, y, batch):
    for index in torch.randperm(len(x), device=x.device).split(batch):
        step(x[index], y[index])


def of_fit(batch, width, *, kind="likelihood", compiled=False):
    x, y = data(batch)
    pyro.clear_param_store()
    network = MixtureDensityNetwork(1, 1, COMPONENTS, width).to(DEVICE)
    network.initialize_(x, y)
    if kind == "likelihood":
        objective = NegativeLogLikelihood(network)
    else:
        objective = NegativeElbo(network, guide_of(kind, network, x, y), len(x))
    settings = Settings(
        max_epochs=10**9,
        patience=1,
        lr=1e-3,
        weight_decay=0.01,
        input_noise=0.1,
        target_noise=0.1,
        final_noise=0.03,
        max_grad_norm=10.0,
    )
    batches = InMemory(Rows(x, y), batch)
    loop = Loop(objective, batches, None, (network.x_scale, network.head.scale), settings, compiled=compiled)
    return lambda: loop._train(1)


def guide_of(kind, network, x, y):
    if kind == "empty guide":
        return nothing
    bayesianize(network)
    guide = AutoNormal(network.model)
    guide(x, y)
    return guide


def nothing(x, y=None, num_data=None):
    """A guide without latent variables."""


def of_pyro(batch, width, *, kind):
    """``SVI`` with its default settings."""
    x, y = data(batch)
    pyro.clear_param_store()
    network = MixtureDensityNetwork(1, 1, COMPONENTS, width).to(DEVICE)
    network.initialize_(x, y)
    guide = guide_of(kind, network, x, y)
    svi = SVI(network.model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return partial(one_pass, partial(svi.step, num_data=len(x)), x, y, batch)


CONTESTANTS = {
    "by hand": by_hand,
    "by hand, fused Adam": partial(by_hand, fused=True),
    "fit": of_fit,
    "fit, compiled": partial(of_fit, compiled=True),
    "fit, empty guide": partial(of_fit, kind="empty guide"),
    "SVI, empty guide": partial(of_pyro, kind="empty guide"),
    "fit, AutoNormal": partial(of_fit, kind="AutoNormal"),
    "SVI, AutoNormal": partial(of_pyro, kind="AutoNormal"),
}


def measure(threads, *, smoke):
    settings = {"rounds": 2, "block": 0} if smoke else {"rounds": 15, "block": 0.1}
    cases = [(8, 4)] if smoke else CASES
    chosen = {n: CONTESTANTS[n] for n in ("by hand", "fit", "fit, AutoNormal")} if smoke else CONTESTANTS
    rows = []
    for (batch, width), times in race(chosen, cases, threads, **settings).items():
        microseconds = sorted(times["by hand"])[len(times["by hand"]) // 2] * 1e6 / BATCHES
        ratios = {name: ratio(times, name, "by hand") for name in times if name != "by hand"}
        rows.append(
            {"batch": batch, "width": width, "threads": threads, "microseconds": microseconds, "ratios": ratios}
        )
    return rows


def table(rows):
    """Markdown: each step over one by hand."""
    names = [name for name in CONTESTANTS if name != "by hand"]
    lines = ["| batch | width | threads | by hand, µs | " + " | ".join(names) + " |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = [shown(row["ratios"][n]) if n in row["ratios"] else "" for n in names]
        sizes = f"| {row['batch']} | {row['width']} | {row['threads']} | {row['microseconds']:.0f} | "
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
