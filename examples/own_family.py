"""A family of your own
=====================

A family says which components a network predicts. This script adds Laplace components from outside the package, by the
law of one output. Training, files, ensembles, scikit-learn, ArviZ and figures take them like families of the package.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pyro_mdn import DeepEnsemble, LocationScale, MixtureDensityNetwork, SymmetricLaw, fit, plots, scores
from pyro_mdn.inference_data import to_inference_data
from pyro_mdn.sklearn import MDNRegressor


@dataclass(frozen=True, eq=False)
class LaplaceLaw(SymmetricLaw):
    """Law of one output at location 0 and scale 1; it is symmetric, so quantiles are asked for in the lower half."""

    def log_density(self, z):
        return -z.abs() - math.log(2)

    def cdf(self, z):
        return torch.where(z < 0, 0.5 * z.clamp(max=0).exp(), 1 - 0.5 * (-z.clamp(min=0)).exp())

    def quantile(self, q):
        return (2 * q).log()

    def mean_distance(self, z):
        return z.abs() + (-z.abs()).exp()

    def stddev(self):
        return math.sqrt(2)


@dataclass(frozen=True)
class Laplace(LocationScale):
    """Components with independent outputs of that law."""

    law = LaplaceLaw()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = 4 * torch.rand(3000, 1) - 2
    y = torch.sin(2 * x) + 0.2 * torch.distributions.Laplace(0.0, 1.0).sample(x.shape)
    rows, settings = (200 if args.smoke else 1000), {"seed": 0, "progress": False}
    for family in ("normal", Laplace()):
        network = MixtureDensityNetwork(1, 1, n_components=1, family=family, seed=0)
        fit(network, x[:rows], y[:rows], max_epochs=2 if args.smoke else 60, **settings)
        print(f"{family!s:<72}{scores.log_score(network(x[1000:]), y[1000:]).mean():7.3f} nats per held-out row")
    network.save(args.out / "laplace.safetensors")
    network = MixtureDensityNetwork.load(args.out / "laplace.safetensors")
    ensemble = DeepEnsemble(network, 2)
    fit(ensemble, x[:rows], y[:rows], max_epochs=2, **settings)
    print(f"average of an ensemble: {ensemble(x[:3])}")
    model = MDNRegressor(family=Laplace(), n_components=1, max_epochs=2, random_state=0).fit(x[:rows], y[:rows])
    print(f"90 % of y given x = 0: {model.predict_quantiles([[0.0]], [0.05, 0.95]).ravel().round(2)}")
    data = to_inference_data(network, x=x[:100], y=y[:100])
    print(f"groups for ArviZ: {list(data.groups())}")
    order = x[:300, 0].argsort()
    axes = plots.plot_conditional_density(network(x[:300][order]), x[:300][order], y=y[:300][order])
    axes.figure.savefig(args.out / "own_family.png")


if __name__ == "__main__":
    main()
