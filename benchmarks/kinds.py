"""Do the defaults of fit hold on kinds of data that nobody tuned them on? Excess nats a row over the truth.

Simulated data of eighteen kinds, whose distribution given x is known. The excess is the mean held-out log score of a
default network, or an ensemble of ten, minus that of the truth, for 4000 held-out rows. ``--methods`` also takes each
change of one default that ``ablation.py`` has, for one network. The sizes of the kinds were fixed before any network
was trained on them; no default was chosen by this table.

    python benchmarks/kinds.py                              # network and ensemble: forty minutes on two cores
    python benchmarks/kinds.py --methods "no noise" "refit"  # changes of defaults
"""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from ablation import VARIANTS, trained
from scipy.special import expit, logsumexp
from scipy.stats import norm, t
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DeepEnsemble, MixtureDensityNetwork, TargetHint, fit, scores

RESULTS = Path(__file__).parent / "results" / "kinds.json"
HELD_OUT = 4000
METHODS = ["network", "ensemble"]
CHANGES = [variant for variant in VARIANTS if variant != "defaults"]


class Mixed:
    """Mixture of distributions whose shares depend on the row."""

    def __init__(self, shares, parts):
        self.shares, self.parts = np.stack(np.broadcast_arrays(*shares)), parts

    def rvs(self, random_state):
        """One draw a row."""
        draws = np.stack([part.rvs(random_state=random_state) for part in self.parts])
        which = (random_state.random(draws.shape[1]) > np.cumsum(self.shares, 0)[:-1]).sum(0)
        return draws[which, np.arange(draws.shape[1])]

    def logpdf(self, y):
        """Log-density."""
        return logsumexp([np.log(s) + p.logpdf(y) for s, p in zip(self.shares, self.parts, strict=True)], 0)


def few(rng, world, n):
    """A smooth function of the first of three columns, 100 rows."""
    x = rng.normal(size=(n, 3))
    return x, norm(np.sin(2 * x[:, 0]), 0.3)


def collinear(rng, world, n):
    """Nearly a function of three hidden variables, of which a dozen columns are sums."""
    z = rng.normal(size=(n, 3))
    return z @ world.normal(size=(3, 12)), norm(np.sin(z[:, 0]) + z[:, 1] * z[:, 2] / 2 + z[:, 2], 0.02)


def kinks(rng, world, n):
    """Nearly a function with kinks."""
    x = rng.uniform(-1, 1, (n, 4))
    return x, norm(np.abs(x[:, 0]) + 2 * np.maximum(x[:, 1], 0) - np.abs(x[:, 2] - x[:, 3]), 0.02)


def heavy_tails(rng, world, n):
    """Student-t noise with two degrees of freedom."""
    x = rng.normal(size=(n, 3))
    return x, t(2, np.sin(2 * x[:, 0]) + x[:, 1] / 2, 0.3)


def wide(rng, world, n):
    """A linear function of five of fifty columns, 200 rows."""
    x = rng.normal(size=(n, 50))
    return x, norm(x[:, :5] @ np.array([1.0, -1.0, 0.5, 0.5, -0.5]), 0.5)


def irrelevant(rng, world, n):
    """Thirty columns that say nothing beside two that do."""
    x = rng.normal(size=(n, 32))
    return x, norm(np.sin(2 * x[:, 0]) + x[:, 1] ** 2 / 2, 0.3)


def one_hot(rng, world, n):
    """Twenty categories as columns, each with a level and a slope of its own."""
    level, slope = world.normal(size=(2, 20))
    category, u = rng.integers(20, size=n), rng.normal(size=(n, 2))
    return np.hstack([np.eye(20)[category], u]), norm(level[category] + slope[category] * u[:, 0], 0.3)


def integers(rng, world, n):
    """Columns of integers, one of them skewed."""
    small, large = rng.integers(0, 10, (n, 3)), rng.geometric(0.02, (n, 1))
    return np.hstack([small, large]), norm(small[:, 0] * small[:, 1] / 20 + np.log(large[:, 0]) / 2, 0.3)


def steps(rng, world, n):
    """A sum of steps in two columns each, as a tree has them."""
    x = rng.uniform(-1, 1, (n, 5))
    edges, heights = world.uniform(-0.6, 0.6, 5), np.array([1.0, -1.5, 2.0, 0.7])
    return x, norm(((x[:, :4] > edges[:4]) & (x[:, 1:] > edges[1:])) @ heights, 0.3)


def periodic(rng, world, n):
    """Thirteen periods."""
    x = rng.uniform(-1, 1, (n, 2))
    return x, norm(np.sin(40 * x[:, 0]) + x[:, 1], 0.3)


def interactions(rng, world, n):
    """A product of three of six columns."""
    x = rng.uniform(-1.7, 1.7, (n, 6))
    return x, norm(x[:, 0] * x[:, 1] * x[:, 2], 0.3)


def spread(rng, world, n):
    """Noise whose scale changes by four orders of magnitude."""
    x = rng.uniform(-1, 1, (n, 2))
    return x, norm(np.sin(2 * x[:, 1]), 10 ** (2 * x[:, 0] - 2))


def outliers(rng, world, n):
    """One target in twenty far away."""
    x = rng.normal(size=(n, 3))
    return x, Mixed([0.95, 0.05 + 0 * x[:, 0]], [norm(np.sin(2 * x[:, 0]), 0.3), norm(0 * x[:, 0], 100)])


def gap(rng, world, n):
    """Two branches without targets between them."""
    x = rng.uniform(-1, 1, (n, 2))
    share, place = expit(2 * x[:, 1]), 1 + x[:, 0] / 2
    return x, Mixed([share, 1 - share], [norm(place, 0.1), norm(-place, 0.1)])


def many(rng, world, n):
    """100 000 rows of twenty columns, ten of which matter, and noise that grows with one of them."""
    x = rng.uniform(-1, 1, (n, 20))
    mean = np.sin(np.pi * x[:, 0] * x[:, 1]) + x[:, 2] ** 2 + x[:, 3:7].sum(1) / 2
    return x, norm(mean, np.exp(x[:, 7:10].sum(1) / 2 - 1.5))


def drift(rng, world, n):
    """Rows in order of time, one of the columns, in which level, shape and noise change."""
    time = np.sort(rng.uniform(0, 1, n))
    x = rng.normal(size=(n, 2))
    return np.hstack([time[:, None], x]), norm(np.sin(2 * x[:, 0] + 4 * time) + 2 * time, 0.2 + 0.2 * time)


class Kind(NamedTuple):
    """Function that draws columns and distributions, number of rows, of copies of each, and spacing of targets."""

    law: Callable
    rows: int = 1000
    copies: int = 1
    rounded: float | None = None


KINDS = {
    "nearly deterministic, collinear": Kind(collinear),
    "the same, targets rounded": Kind(collinear, rounded=0.15),
    "kinks": Kind(kinks),
    "heavy tails": Kind(heavy_tails),
    "100 smooth rows": Kind(few, rows=100),
    "200 rows of 50 columns": Kind(wide, rows=200),
    "30 irrelevant columns": Kind(irrelevant),
    "one-hot columns": Kind(one_hot),
    "integer columns": Kind(integers),
    "steps": Kind(steps),
    "high frequency": Kind(periodic),
    "interactions of order 3": Kind(interactions),
    "scales of four orders": Kind(spread),
    "5 % gross outliers": Kind(outliers),
    "each row five times": Kind(few, copies=5),
    "two branches": Kind(gap),
    "100 000 rows of 20 columns": Kind(many, rows=100_000),
    "drift in time": Kind(drift),
}


def simulate(name, seed, rows, stream):
    """Columns ``(n, D)`` and targets ``(n, 1)`` in single precision, and the mean log score of the truth."""
    law, _, copies, rounded = KINDS[name]
    rng = np.random.default_rng([seed, stream])
    x, truth = law(rng, np.random.default_rng(seed), rows // copies)
    y = truth.rvs(random_state=rng)
    if rounded:
        y = np.round(y / rounded) * rounded
        log_score = -np.log(truth.cdf(y + rounded / 2) - truth.cdf(y - rounded / 2))
    else:
        log_score = -truth.logpdf(y)
    x, y = (torch.from_numpy(np.repeat(a, copies, 0)).float() for a in (x, y[:, None]))
    return x, y, log_score.mean()


def run(job):
    """Excess of one method on one data set."""
    name, method, seed, smoke = job
    torch.set_num_threads(1)
    for category in (CollapseWarning, TargetHint):
        warnings.simplefilter("ignore", category)
    _, rows, copies, rounded = KINDS[name]
    x, y, _ = simulate(name, seed, min(rows, 60) if smoke else rows, 0)
    held_x, held_y, truth = simulate(name, seed, HELD_OUT * copies, 1)
    if method == "ensemble":
        model = DeepEnsemble(MixtureDensityNetwork(x.shape[1], 1, seed=seed), seed=seed)
        fit(model, x, y, seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
    else:
        model = trained("defaults" if method == "network" else method, x, y, seed, smoke)
    mixture, held_y = model.predict(held_x).mixture.double(), held_y.double()
    score = scores.interval_log_score(mixture, held_y, rounded) if rounded else scores.log_score(mixture, held_y)
    return {"kind": name, "method": method, "seed": seed, "excess": score.mean().item() - truth}


def table(rows):
    """Markdown: mean excess of a network and an ensemble, and the change of one default that helps a network most."""
    found = {}
    for row in rows:
        found.setdefault(row["kind"], {}).setdefault(row["method"], {})[row["seed"]] = row["excess"]
    changed = any(row["method"] in CHANGES for row in rows)
    titles = ["kind", *METHODS, *(["best change of one default, for a network", "gain"] if changed else [])]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, own in found.items():
        cells = [f"{statistics.mean(own[method].values()):.2f}" if method in own else "" for method in METHODS]
        if changed:
            network = own.get("network", {})
            both = {m: [network[s] - e for s, e in own[m].items() if s in network] for m in own if m in CHANGES}
            gains = {change: statistics.mean(values) for change, values in both.items() if values}
            best = max(gains, key=gains.get, default="")
            cells += [best, f"{gains[best]:.2f}" if best else ""]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *CHANGES], default=METHODS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results of other kinds and methods there are kept")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    kinds, seeds = (args.kinds, args.seeds) if not args.smoke else (args.kinds[:3], 1)
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    stored = {(row["kind"], row["method"], row["seed"]): row for row in before}
    jobs = [(name, method, seed, args.smoke) for name in kinds for method in args.methods for seed in range(seeds)]
    order = {kind: i for i, kind in enumerate(KINDS)}
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in tqdm(pool.map(run, jobs), total=len(jobs), desc="fits"):
            stored[row["kind"], row["method"], row["seed"]] = row
            rows = sorted(stored.values(), key=lambda row: order[row["kind"]])
            args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
