"""An inverse problem
==================

The classic x = 7 sin(5y) + y/2 + ε: one x has up to four y. Observed and sampled targets are drawn side by side.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch

from pyro_mdn import MixtureDensityNetwork, fit, plots

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.5


def simulate(n, generator):
    """Draw x given y, for n values of y spread evenly over (-1, 1)."""
    y = torch.linspace(-1, 1, n, dtype=torch.float64).unsqueeze(-1)
    x = 7 * torch.sin(5 * y) + y / 2 + NOISE * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x, y


def exact_nll(x, y, points=4001):
    """Mean of -log p(y | x) under the true density, by Bayes' rule and quadrature over y."""

    def log_likelihood(x, y):
        residual = (x - 7 * torch.sin(5 * y) - y / 2) / NOISE
        return -0.5 * residual**2 - math.log(NOISE * math.sqrt(2 * math.pi))

    grid = torch.linspace(-1, 1, points, dtype=torch.float64)
    evidence = torch.trapezoid(log_likelihood(x, grid).exp(), grid)
    return (evidence.log() - log_likelihood(x, y).squeeze(-1)).mean().item()


def draw(network, x, y, path):
    """Observed pairs beside as many sampled ones, the density that they come from, and its regions."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), sharex=True, sharey=True, layout="constrained")
    plots.plot_observed_vs_sampled(x, y, network.sample(x), ax=axes[0])
    grid = torch.linspace(-8, 8, 300).unsqueeze(-1)
    plots.plot_conditional_density(network(grid), grid, ax=axes[1, 0])
    regions = plots.plot_predictive_intervals(network(grid), grid, kind="highest density", ax=axes[1, 1])
    regions.get_legend().remove()  # it would lie on a branch
    handles = regions.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower right", ncols=3, title="regions of highest density")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    settings, seeds = ({"max_epochs": 3}, 1) if args.smoke else ({}, args.seeds)
    held_out = simulate(10_000, torch.Generator().manual_seed(10_000))
    nll = []
    for seed in range(seeds):
        x, y = simulate(512, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        network = MixtureDensityNetwork(dim_in=1, dim_out=1, n_components=8)  # up to four branches, each of them skewed
        fit(network, x, y, seed=seed, progress=False, **settings)
        nll.append(network.loss(*held_out).mean().item())
    draw(network, x.float(), y.float(), args.out / "inverse_sine.png")
    print(f"held-out NLL (nats)\n{'exact':<10}{exact_nll(*held_out):8.3f}")
    for seed, value in enumerate(nll):
        print(f"{f'seed {seed}':<10}{value:8.3f}")
    print(f"{'worst':<10}{max(nll):8.3f}\n{'mean':<10}{np.mean(nll):8.3f}")


if __name__ == "__main__":
    main()
