"""Old Faithful
============

Predict the next eruption from the last one: two correlated outputs, several modes, five noise models, an ensemble.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.distributions import MultivariateNormal

from pyro_mdn import DeepEnsemble, Diagonal, Full, Isotropic, LowRank, MixtureDensityNetwork, fit, plots, scores
from pyro_mdn.inference_data import to_inference_data

DATA, NAMES = Path(__file__).parent / "data" / "geyser.csv", ["waiting", "duration"]
NOISE = {"diagonal (default)": Diagonal(), "full": Full(), "full, tied": Full(tied=True)}
NOISE |= {"low rank": LowRank(rank=1), "isotropic": Isotropic()}
MODELS = {name: (noise, 1) for name, noise in NOISE.items()} | {"ensemble of 10": (Diagonal(), 10)}


def load_pairs():
    """(waiting, duration) of each eruption and of the one after it: 238 pairs to train on, then 60 held out."""
    eruptions = torch.tensor(np.loadtxt(DATA, delimiter=",", skiprows=1)).float()
    return eruptions[:-1].split([238, 60]), eruptions[1:].split([238, 60])


def train(noise, x, y, seed, members=1, **settings):
    """Train a network or an ensemble, and return it with its mean negative log-density on the held-out pairs."""
    torch.manual_seed(seed)
    network = MixtureDensityNetwork(dim_in=2, dim_out=2, noise=noise)
    model = network if members == 1 else DeepEnsemble(network, members)
    fit(model, x[0], y[0], seed=seed, **settings)
    return model, -model.predict(x[1]).log_prob(y[1]).mean()


def draw(network, x, y, path):
    """Density after a short and after a long eruption, with held-out ones that followed such; calibration of both."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, last, alike in zip(axes[0], [[85.0, 2.0], [75.0, 4.5]], [x[:, 1] < 3, x[:, 1] >= 3], strict=True):
        plots.plot_conditional_density(network(torch.tensor(last)), y=y[alike], ax=axis)
        axis.set(title=f"after {last[0]:.0f} min of waiting, {last[1]:.1f} of eruption")
        axis.set(xlabel="next waiting (min)", ylabel="next duration (min)", xlim=(38, 112), ylim=(0.5, 7.2))
    plots.plot_pit(scores.pit(network(x), y), output_names=NAMES, ax=axes[1, 0])
    plots.plot_calibration(network(x), y, output_names=NAMES, ax=axes[1, 1])
    figure.suptitle("Old Faithful: the next eruption, and 60 that were held out")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each model; docs/quality.md has 5")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    settings = {"max_epochs": 3, "progress": False} if args.smoke else {}
    print(f"{len(MODELS) * args.seeds} trainings, {args.seeds} to {2 * args.seeds} minutes in all", flush=True)
    x, y = load_pairs()
    print(f"{'held-out NLL (nats)':<22}{'mean':>8}   each seed")
    marginal = MultivariateNormal(y[0].mean(0), y[0].T.cov())  # one Gaussian, which ignores the last eruption
    print(f"{'marginal Gaussian':<22}{-marginal.log_prob(y[1]).mean().item():8.2f}")
    runs = {}
    for name, (noise, members) in MODELS.items():
        runs[name] = [train(noise, x, y, seed, members, **settings) for seed in range(args.seeds)]
        nll = [value for _, value in runs[name]]
        print(f"{name:<22}{np.mean(nll):8.2f}   {'  '.join(f'{v:.2f}' for v in nll)}", flush=True)
    full = runs["full"][0][0]
    draw(full, x[1], y[1], args.out / "geyser.png")
    full.save(args.out / "geyser.safetensors")
    to_inference_data(full, x=x[1], y=y[1], output_names=NAMES, seed=0).to_netcdf(str(args.out / "geyser.nc"))
    print(f"saved geyser.png, geyser.safetensors and, for ArviZ, geyser.nc in {args.out}")


if __name__ == "__main__":
    main()
