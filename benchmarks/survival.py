"""How good are predicted times to an event when many are censored? Four data sets, beside three kinds of other methods.

Breast cancer, trained on Rotterdam and tested on GBSG with ten seeds; support2, flchain and WHAS500 by 5-fold
cross-validation with four shufflings. ``data/survival/README.md`` describes them. All methods are at their defaults,
and a missing covariate is the median of the training rows. On test rows:

- NLL: censored negative log-likelihood in nats a patient, of times in days: minus the logarithm of the density at an
  event, and of the survival function at the end of a censored follow-up. Lower is better.
- IBS: integrated Brier score with inverse-probability-of-censoring weights (Graf et al., 1999), from the 5 % to the
  90 % quantile of the observed times. The censoring distribution is that of the test rows. Lower is better.
- C: Harrell's concordance index of the predicted medians. Where these may not exist, it is that of the hazard ratio
  (Cox), whose order is the same, or of scikit-survival's risk (forest). Higher is better.
- D-calibration (Haider et al., 2020): share of the runs in which a chi-square test, in ten bins, that survival
  probabilities are uniform has p > 0.05. A censored row is spread over the bins that it may end up in, which makes the
  test lenient where many rows are censored.
- hazards: the same share for a stricter test (Akritas, 1988) that compares, in the same bins, the number of events with
  the cumulative hazard of the rows while they were at risk. The last bins are joined until they expect five events.

The network has five normal components of log-times; the ensemble is the average density of ten networks. Rivals, which
are left out where they are not installed:

- Cox with its Breslow baseline (lifelines), and a random survival forest (scikit-survival). Their survival functions
  are steps and have no density. Therefore Weibull hazards interpolate the cumulative hazard between quantiles of the
  times of training events, half as many as the square root of their number; more are no better. One per cent of the
  Kaplan-Meier estimate is mixed into the forest, whose density is 0 where none of its leaves has an event.
- Models of accelerated failure time (AFT), log-normal and Weibull (lifelines).

What follows ± is the standard error over runs: seeds, or folds. The second table has differences in pairs of the same
fold, positive where the network is better.

    python benchmarks/survival.py                    # all: two hours on one core
    python benchmarks/survival.py --methods network  # that alone; stored figures of other methods are kept
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import chi2, gumbel_l, norm
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DeepEnsemble, MixtureDensityNetwork, Targets, fit

HERE = Path(__file__).parent
DATA = HERE / "data" / "survival"
SETS = ["gbsg", "support2", "flchain", "whas500"]
AHEAD = {"NLL": 1, "IBS": 1, "C": -1}  # which of them are better if lower
SHARES = ["D-calibration", "hazards"]
BINS = np.arange(11) / 10


@dataclass
class Rows:
    """Covariates, times in days, and whether each time is that of the event."""

    x: np.ndarray
    time: np.ndarray | None = None
    event: np.ndarray | None = None

    def __getitem__(self, index):
        return Rows(self.x[index], self.time[index], self.event[index])

    def labels(self):
        """The structured array that scikit-survival takes."""
        return np.array(list(zip(self.event, self.time, strict=True)), dtype=[("event", bool), ("time", float)])

    def frame(self):
        """The data frame that lifelines takes."""
        import pandas as pd

        columns = pd.DataFrame(self.x).add_prefix("x")
        return columns if self.time is None else columns.assign(time=self.time, event=self.event)


@dataclass
class Prediction:
    """Predictions for the test rows. Times are of shape ``(N,)``, or ``(T, 1)`` for all rows."""

    risk: np.ndarray
    log_density: Callable
    log_survival: Callable


def load(name):
    with np.load(DATA / f"{name}.npz") as arrays:
        return Rows(*(arrays[key].astype(float) for key in ("x", "time")), arrays["event"])


def split(name, repeat, fold, folds):
    """Training and test rows, missing covariates imputed."""
    if name == "gbsg":
        train, test = load("rotterdam"), load("gbsg")
    else:
        rows = load(name)
        part = np.random.default_rng(repeat).permutation(len(rows.time)) % folds
        train, test = rows[part != fold], rows[part == fold]
    median = np.nanmedian(train.x, 0)
    for rows in (train, test):
        rows.x = np.where(np.isnan(rows.x), median, rows.x)
    return train, test


# Methods: from training rows and covariates of test rows to predictions


def network(train, x, seed, smoke, members=1):
    """A mixture density network of positive times, or the average density of several."""
    model = MixtureDensityNetwork(x.shape[1], 1, target_transform="log", seed=seed)
    model = model if members == 1 else DeepEnsemble(model, members, seed=seed)
    targets = Targets.censored(train.time[:, None], right=~train.event[:, None])
    fit(model, train.x, targets, seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
    mixture = model.predict(x, chunk_size=len(x)).mixture.double()

    def at(function, times):
        values = torch.tensor(np.broadcast_to(times, np.broadcast_shapes(np.shape(times), (len(x),))).copy())
        return function(values.unsqueeze(-1)).reshape(values.shape).numpy()

    median = mixture.icdf(0.5).squeeze(-1).numpy()
    return Prediction(-median, lambda t: at(mixture.log_prob, t), lambda t: at(mixture.log_sf, t))


def aft(kind, train, x, seed, smoke):
    """The logarithm of the time is linear in x, plus noise of constant scale."""
    import lifelines

    fitter = {"log-normal": lifelines.LogNormalAFTFitter, "Weibull": lifelines.WeibullAFTFitter}[kind]
    table = fitter().fit(train.frame(), "time", "event").params_
    location, shape, noise = ("mu_", "sigma_", norm) if kind == "log-normal" else ("lambda_", "rho_", gumbel_l)
    slopes = table[location].drop("Intercept")  # in another order than the columns
    loc = table[location, "Intercept"] + (Rows(x).frame() @ slopes).to_numpy()
    scale = math.exp(table[shape, "Intercept"] if kind == "log-normal" else -table[shape, "Intercept"])
    return Prediction(
        -loc,
        lambda t: noise.logpdf(np.log(t), loc, scale) - np.log(t),
        lambda t: noise.logsf(np.log(t), loc, scale),
    )


def cox(train, x, seed, smoke):
    from lifelines import CoxPHFitter

    # On flchain the default step of 0.95 diverges, and the fit ends at a far lower likelihood.
    options = {"step_size": 0.5, "max_steps": 1000}
    model = CoxPHFitter().fit(train.frame(), "time", "event", fit_options=options)
    ratio = model.predict_partial_hazard(Rows(x).frame()).to_numpy()
    baseline = model.baseline_cumulative_hazard_.iloc[:, 0]
    knots = quantiles_of_events(train)
    return interpolated(ratio, knots, ratio[:, None] * step(baseline.index, baseline, knots))


def forest(train, x, seed, smoke):
    from sksurv.ensemble import RandomSurvivalForest
    from sksurv.nonparametric import kaplan_meier_estimator

    model = RandomSurvivalForest(random_state=seed, **({"n_estimators": 5} if smoke else {}))
    model.fit(train.x, train.labels())
    knots = quantiles_of_events(train)
    survival = step(model.unique_times_, model.predict_survival_function(x, return_array=True), knots, before=1.0)
    overall = step(*kaplan_meier_estimator(train.event, train.time), knots, before=1.0)
    return interpolated(model.predict(x), knots, -np.log(0.99 * survival + 0.01 * overall))


def quantiles_of_events(rows):
    times = rows.time[rows.event]
    levels = np.linspace(0, 1, 2 + round(math.sqrt(len(times)) / 2))[1:-1]
    return np.unique(np.quantile(times, levels, method="higher"))


def step(times, values, points, before=0.0):
    """Values ``(..., P)`` at points of a step function that is continuous from the right."""
    values = np.insert(np.asarray(values), 0, before, axis=-1)
    return values[..., np.searchsorted(times, points, side="right")]


def interpolated(risk, knots, cumulative):
    """Predictions with hazards of Weibull form between knots, from cumulative hazards ``(N, K)`` at these."""
    log_cumulative, log_knots, rows = np.log(cumulative), np.log(knots), np.arange(len(cumulative))
    slopes = np.diff(log_cumulative) / np.diff(log_knots)

    def at(times):
        piece = np.clip(np.searchsorted(knots, times) - 1, 0, len(knots) - 2)
        slope = slopes[rows, piece]
        return np.exp(log_cumulative[rows, piece] + slope * (np.log(times) - log_knots[piece])), slope

    def log_density(times):
        hazard, slope = at(times)
        return np.log(hazard * slope / times) - hazard

    return Prediction(risk, log_density, lambda times: -at(times)[0])


# Scores


def evaluate(prediction, rows):
    log_survival = prediction.log_survival(rows.time)
    nll = -np.where(rows.event, prediction.log_density(rows.time), log_survival).mean()
    scores = {"NLL": float(nll), **brier_and_concordance(prediction, rows)}
    return scores | {"D-calibration": d_calibration(log_survival, rows), "hazards": hazards(log_survival, rows)}


def brier_and_concordance(prediction, rows):
    if not importlib.util.find_spec("sksurv"):
        return {}
    from sksurv.metrics import concordance_index_censored, integrated_brier_score

    times, labels = np.linspace(*np.quantile(rows.time, [0.05, 0.9]), 100), rows.labels()
    brier = integrated_brier_score(labels, labels, np.exp(prediction.log_survival(times[:, None])).T, times)
    concordance = concordance_index_censored(rows.event, rows.time, prediction.risk)[0]
    return {"IBS": float(brier), "C": float(concordance)}


def d_calibration(log_survival, rows):
    """p-value of the counts of survival probabilities in bins."""
    s = np.maximum(np.exp(log_survival), 1e-300)[:, None]
    share = np.where(rows.event[:, None], (BINS[:-1] < s) & (s <= BINS[1:]), np.clip(s - BINS[:-1], 0, 0.1) / s)
    expected = len(s) / 10
    return float(chi2.sf(((share.sum(0) - expected) ** 2 / expected).sum(), 9))


def hazards(log_survival, rows):
    """p-value of the counts of events in bins, which are nearly Poisson: increments of a martingale."""
    cumulative, edges = -log_survival[:, None], np.append(-np.log1p(-BINS[:-1]), np.inf)
    expected = np.clip(np.minimum(cumulative, edges[1:]) - edges[:-1], 0, None).sum(0)
    observed = (rows.event[:, None] & (edges[:-1] < cumulative) & (cumulative <= edges[1:])).sum(0)
    first = max(1, int((expected[::-1].cumsum() >= 5)[::-1].sum()))  # of bins that expect five events with those after
    starts = np.arange(first)
    observed, expected = np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), first))


# Runs and tables

METHODS = {
    "network": network,
    "ensemble": partial(network, members=10),
    "Cox": cox,
    "log-normal AFT": partial(aft, "log-normal"),
    "Weibull AFT": partial(aft, "Weibull"),
    "random survival forest": forest,
}
PACKAGES = dict.fromkeys(METHODS, "lifelines") | {"network": None, "ensemble": None, "random survival forest": "sksurv"}


def run(job):
    """Train one method on the training rows of one split, and score it on its test rows."""
    name, method, repeat, fold, folds, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    train, test = split(name, repeat, fold, folds)
    start = time.perf_counter()
    prediction = METHODS[method](train, test.x, repeat, smoke)
    seconds = time.perf_counter() - start
    about = {"set": name, "method": method, "repeat": repeat, "fold": fold}
    return {**about, **evaluate(prediction, test), "s": seconds}


def jobs_of(args):
    for name in args.sets:
        for method in args.methods:
            once = name == "gbsg" and PACKAGES[method] == "lifelines"  # which draw nothing
            for repeat in range(1 if once else args.seeds if name == "gbsg" else args.repeats):
                for fold in range(1 if name == "gbsg" else args.folds):
                    yield name, method, repeat, fold, args.folds, args.smoke


def summarize(rows):
    """Means and standard errors for each set and method, and paired differences to the network."""
    summary = {}
    for name in SETS:
        fits = {m: {(r["repeat"], r["fold"]): r for r in rows if (r["set"], r["method"]) == (name, m)} for m in METHODS}
        for method, mine in ((m, runs) for m, runs in fits.items() if runs):
            entry = {m: mean_and_error([r[m] for r in mine.values()]) for m in AHEAD if m in mine[0, 0]}
            if method != "network" and fits["network"]:
                pairs = [(mine.get(key, mine[0, 0]), r) for key, r in fits["network"].items()]
                entry["behind"] = {m: mean_and_error([AHEAD[m] * (a[m] - b[m]) for a, b in pairs]) for m in entry}
            entry |= {m: float(np.mean([r[m] > 0.05 for r in mine.values()])) for m in SHARES}
            summary.setdefault(name, {})[method] = entry | {"s": float(np.median([r["s"] for r in mine.values()]))}
    return summary


def mean_and_error(values):
    """Mean and its standard error, which is ``None`` of a single value."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return [float(np.mean(values)), error]


def cell(entry, digits=3):
    return " ± ".join(f"{value:.{digits}f}" for value in entry or () if value is not None) or "–"


def table(summary):
    """Markdown: one row for each set and method, and one for each comparison."""
    lines = [f"| set | | {' | '.join([*AHEAD, *SHARES])} | s |", "|---|---|" + "---|" * 6]
    behind = [f"| set | the network is ahead of | {' | '.join(AHEAD)} |", "|---|---|" + "---|" * len(AHEAD)]
    for name, entries in summary.items():
        for i, (method, entry) in enumerate(entries.items()):
            scores = [cell(entry.get(m)) for m in AHEAD] + [f"{entry[m]:.2f}" for m in SHARES]
            lines.append(f"| {'' if i else name} | {method} | {' | '.join(scores)} | {entry['s']:.1f} |")
            if "behind" in entry:
                differences = [cell(entry["behind"].get(m), 4) for m in AHEAD]
                behind.append(f"| {name} | {method} | {' | '.join(differences)} |")
    return "\n".join([*lines, "", *behind])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of Rotterdam and GBSG")
    parser.add_argument("--repeats", type=int, default=4, help="shufflings of the other sets")
    parser.add_argument("--folds", type=int, default=5, help="folds of the other sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="keep the fits of others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "survival.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.repeats, args.folds, args.sets = 2, 1, 2, ["gbsg", "whas500"]
    for method in [m for m in args.methods if PACKAGES[m] and not importlib.util.find_spec(PACKAGES[m])]:
        print(f"{method} is left out: {PACKAGES[method]} is not installed", file=sys.stderr)
        args.methods.remove(method)
    jobs = list(jobs_of(args))
    done = {job[:2] for job in jobs}
    kept = json.loads(args.out.read_text())["fits"] if args.out.exists() else []
    rows = [row for row in kept if (row["set"], row["method"]) not in done]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows += tqdm(pool.map(run, jobs), total=len(jobs), desc="fits")
    summary = summarize(rows)
    rivals = {"lifelines": "lifelines", "sksurv": "scikit-survival"}
    versions = {name: version(name) for module, name in rivals.items() if importlib.util.find_spec(module)}
    about = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, **versions}
    args.out.write_text(json.dumps({"about": about, "summary": summary, "fits": rows}, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
