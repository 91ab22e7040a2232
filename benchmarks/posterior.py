"""How fast are many networks at once? Each pair is measured alternately in one run; a ratio is slow over fast.

* predictive mixtures for 1000 draws of the weights at 500 points, the draws included, against Pyro's ``Predictive``,
  which goes through one draw after another and draws one y from each mixture, for guides of each kind;
* the gradient of the ELBO with 8 particles in one pass, against 8 passes;
* training 10 ensemble members together, against one network (a cost) and against ten in a row (a gain): width 64,
  batches of 256.

    python benchmarks/posterior.py
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal

from pyro_mdn import (
    CollapseWarning,
    DeepEnsemble,
    MixtureDensityNetwork,
    NegativeElbo,
    bayesianize,
    fit,
    posterior_predictive,
)

HERE = Path(__file__).parent


def alternately(repeats, *functions):
    """Seconds of each function, in rounds; the first round does not count."""
    rounds = []
    for _ in range(repeats + 1):
        seconds = []
        for function in functions:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return rounds[1:]


def ratio(rounds, slow, fast):
    """Median and range over the rounds of one time over another."""
    ratios = sorted(seconds[slow] / seconds[fast] for seconds in rounds)
    return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def data(rows):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(rows, 1, generator=generator) - 2
    return x, torch.sin(3 * x) + 0.2 * torch.randn(rows, 1, generator=generator)


def predicting(guide, draws, points, repeats):
    network = bayesianize(MixtureDensityNetwork(1, 1))
    x, y = data(points)
    guide = guide(network.model)
    guide(x, y)
    sequential = Predictive(network.model, guide=guide, num_samples=draws)
    rounds = alternately(repeats, lambda: sequential(x), lambda: posterior_predictive(network, guide, x, draws))
    return ratio(rounds, 0, 1)


def particles(count, repeats):
    network = bayesianize(MixtureDensityNetwork(1, 1))
    x, y = data(256)
    guide = AutoNormal(network.model)
    guide(x, y)
    one, all_at_once = (NegativeElbo(network, guide, 256, num_particles=n) for n in (1, count))

    def one_by_one():
        torch.stack([one(x, y).mean() for _ in range(count)]).mean().backward()

    return ratio(alternately(repeats, one_by_one, lambda: all_at_once(x, y).mean().backward()), 0, 1)


def training(size, epochs, repeats):
    x, y = data(2560)
    settings = {"max_epochs": epochs, "patience": epochs, "batch_size": 256, "validation": 0.1, "progress": False}
    rounds = alternately(
        repeats,
        lambda: fit(DeepEnsemble(MixtureDensityNetwork(1, 1), size), x, y, **settings),
        lambda: fit(MixtureDensityNetwork(1, 1), x, y, **settings),
        lambda: [fit(MixtureDensityNetwork(1, 1), x, y, **settings) for _ in range(size)],
    )
    return ratio(rounds, 0, 1), ratio(rounds, 2, 0)


def measure(*, smoke):
    draws, points, repeats = (5, 10, 1) if smoke else (1000, 500, 7)
    kinds = AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal
    results = {}
    for guide in kinds:
        name = f"{draws} draws at {points} points, {guide.__name__}: Predictive over posterior_predictive"
        results[name] = predicting(guide, draws, points, repeats)
    results["ELBO of 8 particles: one by one over vectorised"] = particles(8, 3 if smoke else 200)
    cost, gain = training(2 if smoke else 10, 2 if smoke else 40, repeats)
    results["training 10 members together over one network"] = cost
    results["training ten networks in a row over 10 members together"] = gain
    return results


def table(results):
    """Markdown: one ratio a row."""
    lines = ["| ratio of times | median | range |", "|---|---|---|"]
    for name, r in results.items():
        lines.append(f"| {name} | {r['median']:.1f} | {r['least']:.1f} to {r['most']:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="always 1: two would disturb each other")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "posterior.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    warnings.simplefilter("ignore", CollapseWarning)
    torch.set_num_threads(args.threads)
    results = measure(smoke=args.smoke)
    about = {"torch": torch.__version__, "threads": args.threads, "cores": os.cpu_count()}
    args.out.write_text(json.dumps({"about": about, "ratios": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
