"""A plain Pyro script
===================

Train a network by Pyro's SVI with minibatches, then draw from the posterior predictive.
"""

import argparse
import math

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import ClippedAdam

from pyro_mdn import MixtureDensityNetwork


def simulate(n):
    """A fork: y is +x² or -x², with noise."""
    x = 2 * torch.rand(n, 1) - 1
    sign = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return x, sign * x**2 + 0.05 * torch.randn(n, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    epochs = 2 if parser.parse_args().smoke else 60
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x, y = simulate(1000)
    x_test, y_test = simulate(500)

    network = MixtureDensityNetwork(dim_in=1, dim_out=1, n_components=3)
    network.initialize_(x, y)

    def guide(x, y=None, *, num_data=None):
        """Nothing is latent: the weights are parameters, so this is maximum likelihood."""

    steps = epochs * math.ceil(len(x) / 100)
    optimizer = ClippedAdam({"lr": 5e-3, "lrd": 0.1 ** (1 / steps)})
    svi = SVI(network.model, guide, optimizer, loss=Trace_ELBO())
    for epoch in range(1, epochs + 1):
        elbo = 0.0
        for rows in torch.randperm(len(x)).split(100):
            elbo -= svi.step(x[rows], y[rows], num_data=len(x)) * len(rows) / len(x)
        if epoch % 20 == 0 or epoch == epochs:
            print(f"epoch {epoch:3d}   ELBO per row {elbo / len(x):7.3f}")

    draws = Predictive(network.model, guide=guide, num_samples=200)(x_test)["y"]
    inside = (draws.quantile(0.05, 0) <= y_test) & (y_test <= draws.quantile(0.95, 0))
    print(f"draws: {tuple(draws.shape)}   held-out NLL: {network.loss(x_test, y_test).mean():.3f}")
    print(f"targets inside the central 90 % of their draws: {inside.float().mean():.1%}")


if __name__ == "__main__":
    main()
