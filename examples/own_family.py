"""A family of your own
=====================

A family says which components a network predicts. This script adds, from outside the package, components with a sharp
peak and polynomial tails, by the law of one output. Training, files, ensembles, scikit-learn, ArviZ and figures take
them like families of the package.
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
class ParetoLaw(SymmetricLaw):
    """Law of one output at location 0 and scale 1; it is symmetric, so quantiles are asked for in the lower half."""

    a: float = 4.0  # the tails fall like this power

    def log_density(self, z):
        return math.log(self.a / 2) - (self.a + 1) * z.abs().log1p()

    def cdf(self, z):
        tail = 0.5 * (1 + z.abs()) ** -self.a
        return torch.where(z < 0, tail, 1 - tail)

    def quantile(self, q):
        return 1 - (2 * q) ** (-1 / self.a)

    def mean_distance(self, z):
        return z.abs() + (1 + z.abs()) ** (1 - self.a) / (self.a - 1)

    def stddev(self):
        return math.sqrt(2 / ((self.a - 1) * (self.a - 2)))


@dataclass(frozen=True)
class TwoSidedPareto(LocationScale):
    """Components with independent outputs of that law."""

    law = ParetoLaw()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = 4 * torch.rand(3000, 1) - 2
    y = torch.sin(2 * x) + 0.2 * ParetoLaw().two_sided_quantile(torch.rand(x.shape).clamp(min=1e-7))
    rows, settings = (200 if args.smoke else 1000), {"seed": 0, "progress": False}
    for family in ("normal", "laplace", TwoSidedPareto()):
        network = MixtureDensityNetwork(1, 1, n_components=1, family=family, seed=0)
        fit(network, x[:rows], y[:rows], max_epochs=2 if args.smoke else 60, **settings)
        print(f"{family!s:<82}{scores.log_score(network(x[1000:]), y[1000:]).mean():7.3f} nats per held-out row")
    network.save(args.out / "two_sided_pareto.safetensors")
    network = MixtureDensityNetwork.load(args.out / "two_sided_pareto.safetensors")
    ensemble = DeepEnsemble(network, 2)
    fit(ensemble, x[:rows], y[:rows], max_epochs=2, **settings)
    print(f"average of an ensemble: {ensemble(x[:3])}")
    model = MDNRegressor(family=TwoSidedPareto(), n_components=1, max_epochs=2, random_state=0).fit(x[:rows], y[:rows])
    print(f"90 % of y given x = 0: {model.predict_quantiles([[0.0]], [0.05, 0.95]).ravel().round(2)}")
    data = to_inference_data(network, x=x[:100], y=y[:100])
    print(f"groups for ArviZ: {list(data.groups())}")
    order = x[:300, 0].argsort()
    axes = plots.plot_conditional_density(network(x[:300][order]), x[:300][order], y=y[:300][order])
    axes.figure.savefig(args.out / "own_family.png")


if __name__ == "__main__":
    main()
