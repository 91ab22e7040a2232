"""Noise models
============

A noise model chooses the covariance of a component: its structure, whether all components share it, and whether it
depends on x (heteroscedastic) or not (homoscedastic). All see the same data: two correlated outputs around two centres,
with more spread around the left one, and with four times as much spread at x = 1 as at x = -1.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch.distributions import MultivariateNormal

from pyro_mdn import Diagonal, Fixed, Full, Isotropic, LowRank, MixtureDensityNetwork, fit, plots

MODELS = {
    "Full()": Full(),
    "Diagonal()": Diagonal(),
    "Isotropic()": Isotropic(),
    "Full(tied=True)": Full(tied=True),
    "Diagonal(tied=True)": Diagonal(tied=True),
    "Isotropic(tied=True)": Isotropic(tied=True),
    "Full(homoscedastic=True)": Full(homoscedastic=True),
    "LowRank(1)": LowRank(1),
    "Fixed(0.3)": Fixed(0.3),
}


def simulate(n):
    """Pairs of outputs around (-2, 0) and (2, 0), where they vary half as much; the first varies twice the second."""
    x, side = 2 * torch.rand(n, 1) - 1, torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    covariance = torch.tensor([[1.0, 0.45], [0.45, 0.25]])
    noise = MultivariateNormal(torch.zeros(2), covariance).sample((n,))
    return x, (0.5 + 0.3 * x) * (1.5 - 0.5 * side) * noise + side * torch.tensor([2.0, 0.0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (x, y), held_out = simulate(1000), simulate(5000)
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(0.4, 10.1))
    panels = below.subfigures(3, 3)
    print(f"{'noise model':<28}{'numbers per component':>22}{'held-out NLL (nats)':>22}")
    for (name, noise), panel in zip(MODELS.items(), panels.flat, strict=True):
        network = MixtureDensityNetwork(dim_in=1, dim_out=2, n_components=2, noise=noise)
        fit(network, x, y, seed=0, progress=False, max_epochs=2 if args.smoke else 60)
        nll = network.loss(*held_out).mean().item()
        print(f"{name:<28}{noise.num_params(2):22d}{nll:22.2f}")
        panel.suptitle(f"{name}   NLL {nll:.2f}", fontsize="medium", family="monospace")
        for axis, at in zip(panel.subplots(2, 1, sharex=True), (-1.0, 1.0), strict=True):
            near = (x[:, 0] - at).abs() < 0.15
            plots.plot_conditional_density(network(torch.tensor([at])), y=y[near][:30], ax=axis)
            handles, labels = axis.get_legend_handles_labels()
            axis.get_legend().remove()
            axis.set(xlim=(-6.4, 6.4), ylim=(-2.8, 2.8), xlabel="", ylabel="second output", aspect="equal")
            axis.text(0.02, 0.95, f"at x = {at:+.0f}", transform=axis.transAxes, va="top", fontsize="small")
        axis.set_xlabel("first output")
    regions = [f"{label} region" for label in labels]
    dots = Line2D([], [], color="black", marker=".", markersize=3, linestyle="", label="30 training rows near")
    above.legend([*handles, dots], [*regions, dots.get_label()], ncols=4, loc="center", frameon=False)
    figure.savefig(args.out / "noise_models.png", dpi=120)


if __name__ == "__main__":
    main()
