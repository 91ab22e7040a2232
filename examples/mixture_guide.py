"""A mixture as a guide
====================

A mixture is the guide of a variational inference: pathwise gradients recover a posterior with two modes.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch.distributions import constraints

from pyro_mdn import DiagonalCovariance, GaussianMixture

OBSERVED, NOISE = 1.0, 0.6


def model():
    """The square of a latent number is observed with noise: the number itself may be positive or negative."""
    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.5).to_event(1))
    pyro.sample("y", dist.Normal(z.square() - 0.3 * z, NOISE).to_event(1), obs=torch.tensor([OBSERVED]))


def posterior():
    """A mixture of four components; every parameter gets gradients through the draws, the weights too."""
    logits = pyro.param("logits", torch.zeros(4))
    locs = pyro.param("locs", torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]))
    scale = pyro.param("scale", torch.full((4, 1), 0.5), constraint=constraints.positive)
    return GaussianMixture(logits, locs, DiagonalCovariance(scale))


def guide():
    """Draw from the mixture."""
    pyro.sample("z", posterior())


def exact_log_posterior(z):
    """Log-posterior on a grid, normalised by quadrature."""
    prior = dist.Normal(0.0, 1.5).log_prob(z)
    joint = prior + dist.Normal(z.square() - 0.3 * z, NOISE).log_prob(torch.tensor(OBSERVED))
    return joint - torch.trapezoid(joint.exp(), z).log()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    steps = 20 if parser.parse_args().smoke else 2000
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=256, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / steps)}), elbo)
    for step in range(1, steps + 1):
        loss = svi.step()
        if step % 500 == 0 or step == steps:
            print(f"step {step:4d}   ELBO {-loss:7.3f}")

    z = torch.linspace(-6, 6, 4001)
    log_q, log_p = posterior().log_prob(z.unsqueeze(-1)).detach(), exact_log_posterior(z)
    divergence = torch.trapezoid(log_q.exp() * (log_q - log_p), z)
    negative = [torch.trapezoid(density.exp() * (z < 0), z) for density in (log_q, log_p)]
    print(f"{'':<22}{'guide':>8}{'exact':>8}")
    print(f"{'P(z < 0)':<22}{negative[0]:8.3f}{negative[1]:8.3f}")
    print(f"KL(guide, posterior) = {divergence:.4f} nats")


if __name__ == "__main__":
    main()
