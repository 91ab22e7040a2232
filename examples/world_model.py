"""A world model
=============

An LSTM with a mixture watches a game of chance, then dreams it: its draws become its inputs (Ha & Schmidhuber, 2018).
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyro_mdn import Full, GaussianMixture, IsotropicCovariance, MixtureDensityNetwork, fit

SPEED, BLUR, SEEN, AHEAD = 0.1, 0.01, 6, 30  # box widths per step, box widths, steps, steps
CHANCES = torch.tensor([0.9, 0.05, 0.05])  # straight on, kicked to the left, kicked to the right
TURNS = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0]]])


def play(position, direction, steps):
    """Balls in a box of width 1, seen as blurred positions (N, T, 2), and the exact density of what is seen next."""
    velocity, seen, following = SPEED * direction / direction.norm(dim=-1, keepdim=True), [], []
    for _ in range(steps):
        seen.append(position + BLUR * torch.randn(position.shape))
        turned = torch.einsum("kij,nj->nki", TURNS, velocity)
        ahead = position.unsqueeze(-2) + turned
        following.append(1 - (1 - ahead % 2).abs())  # reflected by the walls
        drawn = torch.arange(len(position)), torch.multinomial(CHANCES, len(position), replacement=True)
        position, velocity = following[-1][drawn], torch.where((ahead - 0.5).abs() > 0.5, -turned, turned)[drawn]
    logits, blur = CHANCES.log().expand(len(position), steps, 3), torch.full((1,), BLUR)
    return torch.stack(seen, 1), GaussianMixture(logits, torch.stack(following, 1), IsotropicCovariance(blur))


class Memory(torch.nn.LSTM):
    """One position does not show the velocity: the state of an LSTM remembers it."""

    def forward(self, x):
        return torch.cat([super().forward(x)[0], x], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    n, epochs = (100, 2) if args.smoke else (1000, 140)
    torch.manual_seed(0)
    (games, _), (test, exact) = (play(torch.rand(n, 2), torch.randn(n, 2), steps=50) for _ in range(2))
    print(f"held-out NLL (nats)\nexact, velocity known   {-exact.log_prob(test.roll(-1, 1))[:, SEEN:-1].mean():7.2f}")
    for name, k, memory in [("no memory", 5, False), ("LSTM, one Gaussian", 1, True), ("LSTM, mixture", 5, True)]:
        backbone = Memory(2, 64, batch_first=True) if memory else None
        network = MixtureDensityNetwork(2, 2, k, 66, noise=Full(), backbone=backbone)
        fit(network, games[:, :-1], games[:, 1:], max_epochs=epochs, seed=0, progress=False)
        print(f"{name:<24}{network.loss(test[:, :-1], test[:, 1:])[:, SEEN:].mean().item():7.2f}")
    last, direction = (torch.tensor([pair]).expand(n, 2) for pair in ([0.6, 0.45], [0.96, 0.28]))
    past = last[:, None] + SPEED * direction[:, None] * torch.arange(1 - SEEN, 1)[:, None] + BLUR * torch.randn(SEEN, 2)
    runs = {"simulator": torch.cat([past, play(last, direction, AHEAD + 1)[0][:, 1:]], 1)}
    for temperature in (0.1, 0.5, 1.0, 1.5):
        paths = past
        for _ in range(AHEAD):  # each draw becomes the next thing seen
            paths = torch.cat([paths, network.sample(paths, temperature=temperature)[:, -1:]], 1)
        runs[f"dream, temperature {temperature}"] = paths
    print(f"\n{'':<24}{'spread after 10 steps':>24}{'turns in 10 steps':>20}{'% outside':>12}")
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(runs), sharex=True, sharey=True)
    for axis, (name, paths) in zip(axes, runs.items(), strict=True):
        turns = 10 * (paths[:, SEEN - 1 :].diff(n=2, dim=1).norm(dim=-1) > SPEED).float().mean()
        outside = 100 * ((paths[:, SEEN:] - 0.5).abs() > 0.5 + 3 * BLUR).any(-1).float().mean()
        print(f"{name:<24}{paths[:, SEEN + 9].var(0).sum().sqrt():24.2f}{turns:20.2f}{outside:12.2f}")
        axis.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="black", linewidth=1)
        axis.scatter(*paths[:300, SEEN + 9].T, s=5, color="tab:blue", label="10 steps later, with eight of the paths")
        axis.plot(*paths[:8, SEEN - 1 : SEEN + 10].permute(2, 1, 0), color="tab:orange", linewidth=0.8)
        axis.plot(*paths[0, :SEEN].T, "o-", color="black", markersize=3, label="seen before")
        axis.set(title=name, xlabel="x (box widths)", ylabel="y (box widths)", aspect="equal")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(args.out / "world_model.png", dpi=150)


if __name__ == "__main__":
    main()
