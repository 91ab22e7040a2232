"""What does it gain to compute a density and its gradient together with the layer before it?

Whole training steps of a network of two hidden layers on trained weights: features, density, backward pass, clipping
and Adam. Rivals compute the same density from the channels that the layer gives, with one buffer for all gradients, or
from views of these channels, so that autograd adds up their gradients. Ratios are rival over ours.

    python benchmarks/channels.py
"""

import argparse
from functools import partial

import torch
from timing import DEVICE, SMOKE, machine, race, ratio, shown, threads_of, write
from torch import nn

CASES = [("diagonal", 256, 5, 1), ("full", 256, 10, 8), ("diagonal", 2048, 10, 8), ("full", 2048, 10, 8)]
WIDTH, INPUTS, STEPS = 64, 6, 100


def from_views(head, features, y):
    """Log-density of y, from parameters that are views of the channels."""
    from pyro_mdn.networks.raw_parameters import RawParameters

    return RawParameters(head.family, head.raw(features), head.units).log_prob(y)


def from_channels(head, features, y):
    """The same from one tensor of channels."""
    from pyro_mdn.networks.raw_parameters import ChannelParameters

    channels = head.channels(features)
    return ChannelParameters(head.family, head.layout, channels, head.units).log_prob(y)


def from_layer(head, features, y):
    """The same by the path that ``network.loss`` takes."""
    return head.log_prob(features, y)


def step_of(density, kind, n, k, d):
    """A training step at weights that have been trained; its learning rate is 0, so that they stay."""
    from pyro_mdn import MixtureDensityNetwork

    torch.manual_seed(0)
    network = MixtureDensityNetwork(INPUTS, d, k, WIDTH, noise=kind, seed=0).to(DEVICE)
    x = torch.randn(n, INPUTS, device=DEVICE)
    y = torch.stack([torch.sin(x[:, i % INPUTS]) for i in range(d)], 1) + 0.3 * torch.randn(n, d, device=DEVICE)
    network.initialize_(x, y)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)

    def step():
        optimizer.zero_grad()
        (-density(network.head, network.features(x), y).mean()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    for _ in range(STEPS):
        step()
    optimizer.param_groups[0]["lr"] = 0.0
    return step


DENSITIES = {"layer": from_layer, "channels": from_channels, "views": from_views}
CONTESTANTS = {name: partial(step_of, density) for name, density in DENSITIES.items()}


def table(rows):
    """Markdown: a step from views, or from channels, over one from the layer."""
    lines = ["| covariance | rows | K | D | threads | views | channels |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        kind, n, k, d = row["case"]
        lines.append(
            f"| {kind} | {n} | {k} | {d} | {row['threads']} | {shown(row['views'])} | {shown(row['channels'])} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="channels", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    settings = SMOKE if args.smoke else {"rounds": 15, "block": 0.2}
    rows = []
    for threads in args.threads:
        for case, times in race(CONTESTANTS, [("full", 8, 2, 2)] if args.smoke else CASES, threads, **settings).items():
            ratios = {rival: ratio(times, rival, "layer") for rival in ("views", "channels")}
            rows.append({"case": list(case), "threads": threads, **ratios})
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
