"""How far from the truth is the default network where the truth is known? Excess nats a row on five kinds of targets.

Simulated targets: a mixture of two log-normal distributions; times to failure in two regimes of which some 40 % are
right-censored; a sensor with a detection limit; angles around two directions; counts with more zeros than a negative
binomial distribution has. Ten seeds, 2000 training rows and 4000 held-out rows each. The excess is the held-out log
score of a method minus that of the distribution that the targets were drawn from. Methods:

- network: the default one, with the target transform or the family for that kind.
- plain: the default one without. For counts k, its scores are probabilities between k - 1/2 and k + 1/2.
- regression: by maximum likelihood, with a coefficient of x in each parameter that is named. Accelerated failure times
  by lifelines, the best of Weibull and log-normal for times, log-normal for the other two; zero-inflated negative
  binomial by statsmodels (mean, inflation); von Mises (direction by the arctangent link, concentration), by scipy.
- NGBoost: at its defaults, with a log-normal distribution; it takes right-censored times as well.

Methods whose package is not installed are left out; figures of theirs that are stored are kept.

    python benchmarks/known_truth.py
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import lognorm, nbinom, norm, vonmises, weibull_min
from tqdm import tqdm

from pyro_mdn import CollapseWarning, MixtureDensityNetwork, Targets, ZeroInflated, fit, scores

RESULTS = Path(__file__).parent / "results" / "known_truth.json"
ROWS, HELD_OUT = 2000, 4000
METHODS = ["network", "plain", "regression", "NGBoost"]


class LogNormals:
    """Two log-normal components, whose weights and medians depend on x."""

    name = "two log-normals"
    settings: ClassVar = {"target_transform": "log"}
    packages: ClassVar = {"regression": "lifelines", "NGBoost": "ngboost"}
    models: ClassVar = ["LogNormalAFTFitter"]

    def parts(self, x):
        """Weights and distributions."""
        share = 1 / (1 + np.exp(-2 * x))
        return [(share, lognorm(0.3, scale=np.exp(1 + x))), (1 - share, lognorm(0.6, scale=np.exp(-1 + 0.5 * x)))]

    def draw(self, rng, x):
        """Targets as they are."""
        parts = self.parts(x)
        first = rng.random(len(x)) < parts[0][0]
        draws = [part.rvs(len(x), random_state=rng) for _, part in parts]
        return np.where(first, draws[0], draws[-1])

    def limits(self, rng, x, y):
        """Lower and upper limits of what is observed."""
        return y, y

    def log_likelihood(self, x, lower, upper):
        """Of what was observed, under the truth."""
        return sum_of_parts(self.parts(x), lower, upper)

    def scored(self, lower, upper):
        """Limits of what the network without settings is fitted to and scored on."""
        return lower, upper

    def regression(self, train, test):
        """Mean held-out score of a regression model."""
        return min(failure_times(name, train, test) for name in self.models)


class Regimes(LogNormals):
    """Early failures and wear, with follow-up that ends at random."""

    name = "two regimes, 40 % right-censored"
    models: ClassVar = ["LogNormalAFTFitter", "WeibullAFTFitter"]

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
    packages: ClassVar = {"regression": "lifelines"}

    def parts(self, x):
        """Weights and distributions."""
        return [(np.ones_like(x), lognorm(0.5, scale=np.exp(np.sin(2 * x))))]

    def limits(self, rng, x, y):
        """Lower and upper limits of what is observed."""
        return np.where(y > 0.7, y, -np.inf), np.maximum(y, 0.7)


class Directions(LogNormals):
    """Angles around two directions, one of which moves across the end of the period."""

    name = "angles around two directions"
    settings: ClassVar = {"target_transform": "angle"}
    packages: ClassVar = {"regression": "scipy"}

    def parts(self, x):
        """Weights and distributions."""
        return [(1 / (1 + np.exp(-x)), norm(3 * np.pi / 4 + x, 0.4)), (1 / (1 + np.exp(x)), norm(-np.pi / 4, 0.3))]

    def draw(self, rng, x):
        """Targets as they are."""
        return np.angle(np.exp(1j * super().draw(rng, x)))

    def log_likelihood(self, x, lower, upper):
        """Of what was observed, under the truth."""
        turns = 2 * np.pi * np.arange(-2, 3)[:, None]
        return np.log(sum(weight * part.pdf(lower + turns).sum(0) for weight, part in self.parts(x)))

    def regression(self, train, test):
        """Mean held-out score of a regression model."""
        (x, y, _), (x_test, y_test, _) = train, test

        def score(coefficients, x, y):
            direction, turn, concentration, change = coefficients
            return -vonmises.logpdf(y, np.exp(concentration + change * x), direction + 2 * np.arctan(turn * x)).mean()

        starts = [[direction, 0.0, 0.0, 0.0] for direction in np.linspace(-np.pi, np.pi, 4, endpoint=False)]
        found = min((minimize(score, start, (x, y), method="Nelder-Mead") for start in starts), key=lambda r: r.fun)
        return score(found.x, x_test, y_test)


class Claims(LogNormals):
    """Counts, and zeros beside them."""

    name = "counts with excess zeros"
    settings: ClassVar = {"family": ZeroInflated("negative_binomial")}
    packages: ClassVar = {"regression": "statsmodels"}

    def parts(self, x):
        """Weights and distributions."""
        return [(1 / (1 + np.exp(1 + x)), nbinom(2, 2 / (2 + np.exp(1 + np.sin(2 * x)))))]

    def draw(self, rng, x):
        """Targets as they are."""
        ((share, counts),) = self.parts(x)
        return np.where(rng.random(len(x)) < share, 0, counts.rvs(len(x), random_state=rng)).astype(float)

    def log_likelihood(self, x, lower, upper):
        """Of what was observed, under the truth."""
        ((share, counts),) = self.parts(x)
        return np.log(share * (lower == 0) + (1 - share) * counts.pmf(lower))

    def scored(self, lower, upper):
        """Limits of what the network without settings is fitted to and scored on."""
        return lower - 0.5, upper + 0.5

    def regression(self, train, test):
        """Mean held-out score of a regression model."""
        from statsmodels.discrete.count_model import ZeroInflatedNegativeBinomialP

        (x, y, _), (x_test, y_test, _) = train, test
        x, x_test = (np.stack([np.ones_like(t), t], 1) for t in (x, x_test))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ZeroInflatedNegativeBinomialP(y, x, exog_infl=x).fit(method="bfgs", maxiter=500, disp=0)
        mass = found.predict(x_test, exog_infl=x_test, which="prob", y_values=np.arange(y_test.max() + 1))
        return -np.log(mass[np.arange(len(y_test)), y_test.astype(int)]).mean()


KINDS = {kind.name: kind() for kind in (LogNormals, Regimes, Sensor, Directions, Claims)}


def sum_of_parts(parts, lower, upper):
    """Log-likelihood of a mixture: density where the limits agree, and probability between them elsewhere."""
    density, mass = 0.0, 0.0
    for weight, part in parts:
        density = density + weight * part.pdf(np.where(np.isinf(lower), 1.0, lower))
        mass = mass + weight * (part.cdf(upper) - part.cdf(np.maximum(lower, 0.0)))
    return np.log(np.where(lower == upper, density, mass))


def failure_times(name, train, test):
    """Mean held-out score of a model of lifelines."""
    import lifelines
    import pandas as pd

    x, lower, upper = train
    frame = pd.DataFrame({"x": x, "lower": np.maximum(lower, 1e-9), "upper": upper})  # 0 has no gradient there
    fitter = getattr(lifelines, name)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitter.fit_interval_censoring(frame, "lower", "upper", ancillary=True)
        except lifelines.exceptions.ConvergenceError:
            return math.inf
    x, lower, upper = test
    place, scale = (
        params.get("x", 0.0) * x + params["Intercept"]
        for params in (fitter.params_[part] for part in fitter.params_.index.unique(0))
    )
    shape = np.exp(scale)
    law = (
        lognorm(shape, scale=np.exp(place)) if name.startswith("LogNormal") else weibull_min(shape, scale=np.exp(place))
    )
    return -sum_of_parts([(1.0, law)], lower, upper).mean()


def boosted(kind, train, test, seed):
    """Mean held-out score of NGBoost."""
    from ngboost import NGBRegressor, NGBSurvival
    from ngboost.distns import LogNormal

    x, lower, upper = train
    settings: ClassVar = {"Dist": LogNormal, "verbose": False, "random_state": seed}
    if (lower == upper).all():
        model = NGBRegressor(**settings).fit(x[:, None], lower)
    else:
        model = NGBSurvival(**settings).fit(x[:, None], lower, (lower == upper).astype(int))
    x, lower, upper = test
    params = model.pred_dist(x[:, None]).params
    return -sum_of_parts([(1.0, lognorm(params["s"], scale=params["scale"]))], lower, upper).mean()


def simulate(kind, rng, n):
    x = rng.uniform(-1, 1, n)
    return x, *kind.limits(rng, x, kind.draw(rng, x))


def network_score(settings, train, test, seed, smoke):
    """Mean held-out score of a network."""
    (x, *limits), (x_test, *test_limits) = train, test
    exact = all((lower == upper).all() for lower, upper in (limits, test_limits))

    def targets(lower, upper):
        return lower[:, None] if exact else Targets.interval(lower[:, None], upper[:, None])

    network = MixtureDensityNetwork(1, 1, seed=seed, **settings)
    fit(network, x[:, None], targets(*limits), seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
    mixture = network.predict(x_test[:, None]).mixture.double()
    return float(scores.log_score(mixture, targets(*test_limits)).mean())


def run(job):
    """Excess of each method whose fit converged."""
    name, seed, rows, methods, smoke = job
    warnings.simplefilter("ignore", CollapseWarning)
    torch.set_num_threads(1)
    kind, rng = KINDS[name], np.random.default_rng(seed)
    train, test = simulate(kind, rng, rows), simulate(kind, rng, HELD_OUT)
    truth = -kind.log_likelihood(*test).mean()
    score = {
        "network": lambda: network_score(kind.settings, train, test, seed, smoke),
        "plain": lambda: network_score({}, *((x, *kind.scored(*limits)) for x, *limits in (train, test)), seed, smoke),
        "regression": lambda: kind.regression(train, test),
        "NGBoost": lambda: boosted(kind, train, test, seed),
    }
    excess = {method: float(score[method]()) - truth for method in methods}
    return {"kind": name, "seed": seed, **{method: value for method, value in excess.items() if math.isfinite(value)}}


def installed(kind, methods):
    """Those of the methods that are for this kind, and whose package is installed."""
    needed = {"network": "torch", "plain": "torch"} | kind.packages
    return [m for m in methods if m in needed and importlib.util.find_spec(needed[m])]


def table(rows):
    """Markdown: excess of each method."""
    lines = ["| targets | network, median | worst | seeds within 0.05 | plain | regression | NGBoost |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in KINDS:
        mine = [row for row in rows if row["kind"] == name]
        if not mine:
            continue
        excess = [row["network"] for row in mine]
        others = [[row[method] for row in mine if method in row] for method in METHODS[1:]]
        medians = " | ".join(f"{statistics.median(values):.3f}" if values else "" for values in others)
        close = f"{sum(value < 0.05 for value in excess)} of {len(excess)}"
        lines.append(f"| {name} | {statistics.median(excess):.3f} | {max(excess):.3f} | {close} | {medians} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    seeds, rows = (1, 200) if args.smoke else (args.seeds, ROWS)
    jobs = [
        (name, seed, rows, installed(kind, args.methods), args.smoke)
        for name, kind in KINDS.items()
        if name in args.kinds
        for seed in range(seeds)
    ]
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    stored = {(row["kind"], row["seed"]): row for row in before}
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in tqdm(pool.map(run, jobs), total=len(jobs), desc="fits"):
            stored.setdefault((row["kind"], row["seed"]), {}).update(row)
            results = [stored[key] for key in sorted(stored, key=lambda key: (list(KINDS).index(key[0]), key[1]))]
            args.out.write_text(json.dumps({"rows": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
