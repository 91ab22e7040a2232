"""How far from the truth is the default network where the truth is known? Excess nats a row on three kinds of targets.

Simulated targets: a mixture of two log-normal distributions, times to failure in two regimes of which some 40 % are
right-censored, and a sensor with a detection limit. Ten seeds, 2000 training rows and 4000 held-out rows each. The
excess is the held-out log score of the network minus that of the distribution that the targets were drawn from. Beside
it is that of a network of the same settings without a target transform.

    python benchmarks/known_truth.py
"""

import argparse
import json
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import lognorm, weibull_min
from tqdm import tqdm

from pyro_mdn import CollapseWarning, MixtureDensityNetwork, Targets, fit, scores

RESULTS = Path(__file__).parent / "results" / "known_truth.json"
ROWS, HELD_OUT = 2000, 4000


class LogNormals:
    """Two log-normal components, whose weights and medians depend on x."""

    name = "two log-normals"

    def parts(self, x):
        """Weights and distributions."""
        share = 1 / (1 + np.exp(-2 * x))
        return [(share, lognorm(0.3, scale=np.exp(1 + x))), (1 - share, lognorm(0.6, scale=np.exp(-1 + 0.5 * x)))]

    def limits(self, rng, x, y):
        """Lower and upper limits of what is observed."""
        return y, y


class Regimes(LogNormals):
    """Early failures and wear, with follow-up that ends at random."""

    name = "two regimes, 40 % right-censored"

    def parts(self, x):
        """Weights and distributions."""
        share = 1 / (1 + np.exp(-2 * x))
        return [
            (share, weibull_min(1.5, scale=3 * np.exp(-x))),
            (1 - share, weibull_min(4, scale=20 * np.exp(-0.5 * x))),
        ]

    def limits(self, rng, x, y):
        """Lower and upper limits of what is observed."""
        end = rng.uniform(2, 26, len(x))
        return np.minimum(y, end), np.where(y <= end, y, np.inf)


class Sensor(LogNormals):
    """Levels of which those below a limit are not measured."""

    name = "sensor with a detection limit"

    def parts(self, x):
        """Weights and distributions."""
        return [(np.ones_like(x), lognorm(0.5, scale=np.exp(np.sin(2 * x))))]

    def limits(self, rng, x, y):
        """Lower and upper limits of what is observed."""
        return np.where(y > 0.7, y, -np.inf), np.maximum(y, 0.7)


KINDS = {kind.name: kind() for kind in (LogNormals, Regimes, Sensor)}


def simulate(kind, rng, n):
    x = rng.uniform(-1, 1, n)
    parts = kind.parts(x)
    first = rng.random(n) < parts[0][0]
    y = np.where(first, parts[0][1].rvs(n, random_state=rng), parts[-1][1].rvs(n, random_state=rng))
    return x, *kind.limits(rng, x, y)


def log_likelihood(kind, x, lower, upper):
    """Of what was observed, under the truth."""
    density, mass = 0.0, 0.0
    for weight, part in kind.parts(x):
        density = density + weight * part.pdf(np.where(np.isinf(lower), 1.0, lower))
        mass = mass + weight * (part.cdf(upper) - part.cdf(np.maximum(lower, 0.0)))
    return np.log(np.where(lower == upper, density, mass))


def run(job):
    """Excess of the network, and of one without a transform."""
    name, seed, rows, smoke = job
    warnings.simplefilter("ignore", CollapseWarning)
    torch.set_num_threads(1)
    kind, rng = KINDS[name], np.random.default_rng(seed)
    x, lower, upper = simulate(kind, rng, rows)
    x_test, *test = simulate(kind, rng, HELD_OUT)
    truth = -log_likelihood(kind, x_test, *test).mean()
    excess = {}
    for label, settings in (("log", {"target_transform": "log"}), ("plain", {})):
        network = MixtureDensityNetwork(1, 1, seed=seed, **settings)
        targets = Targets.interval(lower[:, None], upper[:, None])
        fit(network, x[:, None], targets, seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
        mixture = network.predict(x_test[:, None]).mixture.double()
        score = scores.log_score(mixture, Targets.interval(*(limit[:, None] for limit in test)))
        excess[label] = float(score.mean()) - truth
    return {"kind": name, "seed": seed, **excess}


def table(rows):
    """Markdown: excess of both networks."""
    lines = [
        "| targets | excess, median | worst | seeds within 0.05 | without the transform |",
        "|---|---|---|---|---|",
    ]
    for name in KINDS:
        mine = [row for row in rows if row["kind"] == name]
        log = [row["log"] for row in mine]
        plain = statistics.median(row["plain"] for row in mine)
        close = f"{sum(value < 0.05 for value in log)} of {len(log)}"
        cells = f"{statistics.median(log):.3f} | {max(log):.3f} | {close} | {plain:.3f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    seeds, rows = (1, 200) if args.smoke else (args.seeds, ROWS)
    jobs = [(name, seed, rows, args.smoke) for name in KINDS for seed in range(seeds)]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="fits"))
    args.out.write_text(json.dumps({"rows": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
