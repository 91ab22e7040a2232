"""A gap in the data
=================

Epistemic uncertainty where there are no data: readings of a sensor, one in five a glitch, none from -1.5 to 1.5. There
an ensemble, Laplace (linearised, Immer et al., 2021) and NUTS are uncertain; SVI may not be (Foong et al., 2020).
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal

from pyro_mdn import ConvergenceWarning, DeepEnsemble, MixtureDensityNetwork, bayesianize, fit, fit_mcmc, laplace
from pyro_mdn import posterior_predictive as predict
from pyro_mdn.uncertainty import epistemic_variance

GRID, GAP = (grid := torch.linspace(-4.5, 4.5, 181)), grid.abs() < 1.5
NAMES = ("ensemble", "Laplace", "NUTS", "Laplace, head", "SVI")


def simulate(n, seed):
    place, side, noise = torch.randn(3, n, 1, generator=(generator := torch.Generator().manual_seed(seed)))
    x = (1.5 + 3 * torch.special.ndtr(place)) * side.sign()
    return x, torch.sin(2 * x) + torch.where(torch.rand(n, 1, generator=generator) < 0.2, 0.6, 0.1) * noise


def infer(name, network, x, y, smoke, **settings):
    """A network and a posterior of its weights, given a trained network."""
    if name == "ensemble":
        fit(ensemble := DeepEnsemble(network, size=10), x, y, weight_decay=0.0, **settings)
        return network, ensemble
    network = bayesianize(copy.deepcopy(network), prior_scale=2.0, layers="head" if "head" in name else "all")
    if name == "SVI":
        return network, fit(network, x, y, guide=AutoNormal, **settings).guide
    if name == "NUTS":
        warnings.simplefilter("ignore", ConvergenceWarning)  # chains this short: see docs/uncertainty.md
        size = {"num_samples": 3 if smoke else 100, "warmup_steps": 3 if smoke else 200, "max_tree_depth": 5}
        return network, fit_mcmc(network, x, y, num_chains=2, seed=settings["seed"], progress=False, **size)
    return network, laplace(network, x, y, progress=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": args.seed, "progress": False} | ({"max_epochs": 2} if args.smoke else {})
    (x, y), (x_new, y_new) = simulate(400, args.seed), simulate(2000, args.seed + 99)
    torch.manual_seed(args.seed)
    fit(network := MixtureDensityNetwork(1, 1, n_components=2, hidden_dim=20), x, y, weight_decay=0.0, **settings)
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(2, len(NAMES), sharex=True, sharey="row", height_ratios=(3, 1))
    print("epistemic             gap      data     ratio       NLL   seconds")
    for name, (top, bottom) in zip(NAMES, axes.T, strict=True):
        start = time.perf_counter()
        posterior = infer(name, network, x, y, args.smoke, **settings)
        seconds = time.perf_counter() - start
        mixture, at_new = (predict(*posterior, z, linearize="Laplace" in name) for z in (GRID.unsqueeze(-1), x_new))
        deviation, nll = epistemic_variance(mixture).sqrt(), -at_new.pool(0).log_prob(y_new).mean()
        numbers = (inside := deviation[GAP].mean()), (outside := deviation[~GAP].mean()), inside / outside, nll, seconds
        print(f"{name:<15}" + "".join(f"{number:10.2f}" for number in numbers), flush=True)
        mean, half = (pool := mixture.pool(0)).mean, 2 * deviation
        for label, band in {"90 % interval": pool.interval(0.9), "± 2 epistemic": (mean - half, mean + half)}.items():
            top.fill_between(GRID, *(edge.squeeze(-1).detach() for edge in band), alpha=0.4, label=label)
        top.plot(x, y, ".", color="0.3", markersize=2)
        top.set(title=name, ylabel="y" if name == NAMES[0] else "")
        bottom.semilogy(GRID, deviation.detach())
        bottom.set(xlabel="x", ylabel="epistemic\nstd of y" if name == NAMES[0] else "", ylim=(0.01, 3))
    axes[0, 0].legend(frameon=False, loc="lower center")
    figure.savefig(args.out / "bayesian_weights.png", dpi=100)


if __name__ == "__main__":
    main()
