"""A network inside a larger model
===============================

The network is the likelihood of a Pyro model with latent variables of its own: one offset for each of several sensors.

The weights are point estimates from the same readings. A network that is too large for them (``--large``) overfits:
its density gets too narrow, and so does the posterior of the offsets. Two components suffice here.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam

from pyro_mdn import MixtureDensityNetwork

N_SENSORS = 6


class Sensors(PyroModule):
    """Sensors that read the same bimodal quantity, each with an offset of its own."""

    def __init__(self, n_components, hidden_dim):
        super().__init__()
        self.network = MixtureDensityNetwork(1, 1, n_components, hidden_dim)

    def forward(self, x, sensor, y=None):
        with pyro.plate("sensors", N_SENSORS):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        offset = offset - offset.mean(-1, keepdim=True)  # the network models the common level
        quantity = self.network(x)  # a distribution in the units of y, for any Pyro statement
        with pyro.plate("readings", len(x)):
            reading = quantity.affine(shift=offset[..., sensor].unsqueeze(-1), scale=1.0)
            return pyro.sample("y", reading, obs=y)


def simulate(n, offset):
    """Each reading is a fork in x, shifted by the offset of a random sensor."""
    x, sensor = 2 * torch.rand(n, 1) - 1, torch.randint(N_SENSORS, (n,))
    sign = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return x, sensor, sign * (1 + x) + offset[sensor].unsqueeze(-1) + 0.1 * torch.randn(n, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="a network that overfits")
    steps = 20 if (args := parser.parse_args()).smoke else 2000
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    truth = torch.linspace(-0.5, 0.5, N_SENSORS)
    x, sensor, y = simulate(600, truth)

    model = Sensors(*(5, 64) if args.large else (2, 16))
    model.network.initialize_(x, y)
    guide = AutoNormal(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 1e-2, "lrd": 0.05 ** (1 / steps)}), loss=Trace_ELBO())
    for step in range(1, steps + 1):
        loss = svi.step(x, sensor, y)
        if step % 500 == 0 or step == steps:
            print(f"step {step:4d}   ELBO per reading {-loss / len(x):7.3f}")

    offsets = Predictive(model, guide=guide, num_samples=2000, return_sites=("offset",))(x[:1], sensor[:1])["offset"]
    offsets = (offsets - offsets.mean(-1, keepdim=True)).squeeze()
    print(f"{'sensor':>6}{'true':>8}{'mean':>8}{'sd':>8}")
    for i, (mean, sd) in enumerate(zip(offsets.mean(0), offsets.std(0), strict=True)):
        print(f"{i:6d}{truth[i]:8.2f}{mean:8.3f}{sd:8.3f}")
    error = offsets.mean(0) - truth
    distance = error @ torch.linalg.pinv(offsets.T.cov(), rtol=1e-3, hermitian=True) @ error
    print(f"chi-square with {N_SENSORS - 1} degrees of freedom if the posterior is right: {distance:.1f}")


if __name__ == "__main__":
    main()
