"""How good are predicted counts? Three data sets by 5-fold cross-validation, beside regression models of counts.

Visits to doctors (doctor_visits, rwm5yr), and days in hospital, which are never 0 (azpro). ``data/counts/README.md``
describes them. All methods have the same folds, and in rwm5yr all years of a patient are in one fold. On held-out rows:

- NLL: mean negative log-probability in nats a row. Lower is better. Where a probability is 0 or not a number, its
  logarithm is replaced by -700, and the number of such rows is printed.
- RPS: ranked probability score (Epstein, 1969), the sum over counts k of (F(k) - 1{y ≤ k})². Lower is better.

The networks are at their defaults, with five components of a family: Poisson, negative binomial (NB), zero-inflated
negative binomial (ZINB), and negative binomial with a hurdle. The ensemble is the average of ten networks.

Rivals are models with a coefficient for each covariate, fitted by maximum likelihood (statsmodels), and are left out
where that is not installed: Poisson, negative binomial with the variance μ + αμ² (NB2), both with zero inflation (ZIP,
ZINB), and both with a hurdle. The probability of zero depends on all covariates as well. Covariates are standardised.
Without zeros in the training rows, the likelihood of a hurdle is largest where it is certain to be passed: the rest is
the zero-truncated law.

What follows ± is the standard error over rows. It is computed from 40 random blocks of rows in each fold, so that the
years of a patient, who is in one block, may depend on each other. The last column has differences in NLL to the rival
that is best on the same held-out rows, row by row; they are positive where the network is better.

    python benchmarks/counts.py                        # all: see the column of seconds, which is for one fold
    python benchmarks/counts.py --methods "network NB" # that alone; stored figures of other methods are kept
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DeepEnsemble, Hurdle, MixtureDensityNetwork, ZeroInflated, fit, scores

HERE = Path(__file__).parent
DATA = HERE / "data" / "counts"
SETS = ["doctor_visits", "rwm5yr", "azpro"]
BLOCKS = 40  # of the held-out rows of a fold
LEAST = -700.0  # in place of a logarithm that is not finite


@dataclass
class Rows:
    """Covariates, counts, and the blocks for standard errors."""

    x: np.ndarray
    y: np.ndarray
    block: np.ndarray

    def __getitem__(self, index: np.ndarray | slice) -> "Rows":
        return Rows(self.x[index], self.y[index], self.block[index])


@dataclass
class Prediction:
    """Log-probability and ranked probability score of each held-out row, and whether the fit converged."""

    log_prob: np.ndarray
    rps: np.ndarray
    converged: bool = True


def split(name: str, fold: int, folds: int, smoke: bool) -> tuple[Rows, Rows]:
    """Load training and held-out rows. Rows of one patient stay together."""
    with np.load(DATA / f"{name}.npz") as arrays:
        x, y = arrays["x"].astype(float), arrays["y"].astype(float)
        unit = np.unique(arrays["group"], return_inverse=True)[1] if "group" in arrays else np.arange(len(y))
    place = np.random.default_rng(0).permutation(unit.max() + 1)[unit]
    rows, part = Rows(x, y, place // folds % BLOCKS), place % folds
    if smoke:
        rows, part = rows[::8], part[::8]
    return rows[part != fold], rows[part == fold]


# Methods: from training and held-out rows to scores of the latter


def network(family: Any, train: Rows, test: Rows, seed: int, smoke: bool, members: int = 1) -> Prediction:
    """Train a mixture density network, or an ensemble of networks."""
    model = MixtureDensityNetwork(train.x.shape[1], 1, family=family, seed=seed)
    model = model if members == 1 else DeepEnsemble(model, 2 if smoke else members, seed=seed)
    fit(model, train.x, train.y[:, None], seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
    log_prob, rps = [], []
    for rows in (test[i : i + 50] for i in range(0, len(test.y), 50)):  # a wide one makes the scores of all slow
        mixture, y = model.predict(rows.x).mixture.double(), torch.tensor(rows.y[:, None])
        log_prob.append(mixture.log_prob(y))
        rps.append(scores.crps(mixture, y).squeeze(-1))
    return Prediction(torch.cat(log_prob).numpy(), torch.cat(rps).numpy())


class Model(NamedTuple):
    """Regression of statsmodels, where its likelihood may be maximised from, and covariates to predict from."""

    model: Any
    starts: list[np.ndarray]
    held_out: dict[str, np.ndarray]


def regression(kind: str, train: Rows, test: Rows, seed: int, smoke: bool) -> Prediction:
    """Fit one of statsmodels' regressions of counts by maximum likelihood."""
    mean, scale = train.x.mean(0), train.x.std(0)
    x, x_test = (np.insert((rows.x - mean) / np.where(scale > 0, scale, 1), 0, 1, axis=1) for rows in (train, test))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        built = model_of(kind, train.y, x, x_test)
        result, converged = maximum(built)
        numbers = np.arange(10 * max(train.y.max(), test.y.max()) + 1)  # far more than any model expects
        log_prob, rps = [], []
        for i in range(0, len(test.y), 500):
            part, y = {key: value[i : i + 500] for key, value in built.held_out.items()}, test.y[i : i + 500]
            probabilities = result.predict(**part, which="prob", y_values=numbers)
            log_prob.append(np.log(probabilities[np.arange(len(y)), y.astype(int)]))
            rps.append(np.square(probabilities.cumsum(1) - (y[:, None] <= numbers)).sum(1))
    return Prediction(np.concatenate(log_prob), np.concatenate(rps), converged)


def model_of(kind: str, y: np.ndarray, x: np.ndarray, x_test: np.ndarray) -> Model:
    """Build a regression. It starts at one without dispersion, and that at a Poisson regression."""
    from statsmodels.discrete import count_model, discrete_model, truncated_model

    poisson = discrete_model.Poisson(y, x)
    rates = np.asarray(poisson.fit(method="newton", maxiter=200, disp=0).params)
    if kind == "Poisson":
        return Model(poisson, [rates], {"exog": x_test})
    if kind in ("NB2", "ZINB", "hurdle NB2"):
        plain = {"NB2": "Poisson", "ZINB": "ZIP", "hurdle NB2": "hurdle Poisson"}[kind]
        without = np.asarray(maximum(model_of(plain, y, x, x_test))[0].params)
        starts = [np.append(without, dispersion) for dispersion in (1.0, 0.2, 5.0)]
    else:
        rare, half = (np.append(logit, np.zeros(x.shape[1] - 1)) for logit in (-2.0, 0.0))
        starts = [np.append(share, rates) for share in (rare, half)]
    if kind == "NB2":
        return Model(discrete_model.NegativeBinomial(y, x), starts, {"exog": x_test})
    if kind.startswith("ZI"):
        inflated = {"ZIP": count_model.ZeroInflatedPoisson, "ZINB": count_model.ZeroInflatedNegativeBinomialP}[kind]
        return Model(inflated(y, x, exog_infl=x), starts, {"exog": x_test, "exog_infl": x_test})
    if y.min() > 0:
        dispersed = kind == "hurdle NB2"
        law = truncated_model.TruncatedLFNegativeBinomialP if dispersed else truncated_model.TruncatedLFPoisson
        return Model(law(y, x), starts if dispersed else [rates], {"exog": x_test})
    dist = "negbin" if kind == "hurdle NB2" else "poisson"
    return Model(truncated_model.HurdleCountModel(y, x, dist=dist), starts, {"exog": x_test})


def maximum(built: Model) -> tuple[Any, bool]:
    """Fit from statsmodels' own start and ours until two fits converge, and take the highest likelihood."""
    fits = []
    for method, start in itertools.product(("bfgs", "lbfgs", "nm"), (None, *built.starts)):
        if sum(converged for _, converged, _ in fits) == 2 or (fits and method == "nm"):
            break
        try:
            result = built.model.fit(start_params=start, method=method, maxiter=5000, disp=0)
        except (np.linalg.LinAlgError, ValueError, FloatingPointError):
            continue
        likelihood = built.model.loglike(np.asarray(result.params))
        if np.isfinite(likelihood):
            fits.append((round(likelihood, 3), bool(np.all(result.mle_retvals["converged"])), result))
    _, converged, result = max(fits, key=lambda candidate: candidate[:2])
    return result, converged


# Runs and tables

RIVALS = ["Poisson", "NB2", "ZIP", "ZINB", "hurdle Poisson", "hurdle NB2"]
METHODS: dict[str, Callable[..., Prediction]] = {
    "network Poisson": partial(network, "poisson"),
    "network NB": partial(network, "negative_binomial"),
    "network ZINB": partial(network, ZeroInflated()),
    "network hurdle": partial(network, Hurdle()),
    "ensemble NB": partial(network, "negative_binomial", members=10),
    **{kind: partial(regression, kind) for kind in RIVALS},
}


def run(job: tuple[str, str, int, int, bool]) -> dict[str, Any]:
    """Train one method on the training rows of one fold, and score it on the others."""
    name, method, fold, folds, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    train, test = split(name, fold, folds, smoke)
    start = time.perf_counter()
    prediction = METHODS[method](train, test, seed=fold, smoke=smoke)
    seconds = time.perf_counter() - start
    known = np.isfinite(prediction.log_prob)
    blocks = {
        "n": np.ones(len(test.y)),
        "NLL": -np.where(known, prediction.log_prob, LEAST),
        "RPS": prediction.rps,
    }
    sums = {key: np.bincount(test.block, values, minlength=BLOCKS).round(5).tolist() for key, values in blocks.items()}
    about = {"set": name, "method": method, "fold": fold, "converged": prediction.converged}
    return {**about, "floored": int((~known).sum()), **sums, "s": seconds}


def report(row: dict[str, Any]) -> dict[str, Any]:
    """Say what went wrong in a fit, if anything did."""
    place = f"{row['method']} on {row['set']}, fold {row['fold']}"
    if not row["converged"]:
        print(f"{place}: the fit did not converge", file=sys.stderr)
    if row["floored"]:
        print(f"{place}: {row['floored']} log-probabilities are not finite, and {LEAST:g} instead", file=sys.stderr)
    return row


def jobs_of(args: argparse.Namespace) -> Iterator[tuple[str, str, int, int, bool]]:
    for name in args.sets:
        for method in args.methods:
            for fold in range(args.folds):
                yield name, method, fold, args.folds, args.smoke


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute means and standard errors for each set and method, and differences to the best rival of the set."""
    summary: dict[str, Any] = {}
    for name in SETS:
        blocks = {}
        for method in METHODS:
            fits = sorted((r for r in rows if (r["set"], r["method"]) == (name, method)), key=lambda r: r["fold"])
            if fits:
                blocks[method] = {key: np.concatenate([r[key] for r in fits]) for key in ("n", "NLL", "RPS")}
                entry = {key: mean_and_error(blocks[method][key], blocks[method]["n"]) for key in ("NLL", "RPS")}
                entry["s"] = float(np.median([r["s"] for r in fits]))
                summary.setdefault(name, {})[method] = entry
        rivals = [method for method in blocks if method in RIVALS]
        best = min(rivals, key=lambda method: summary[name][method]["NLL"][0], default=None)
        for method in blocks.keys() - rivals if best else ():
            ahead = blocks[best]["NLL"] - blocks[method]["NLL"]
            summary[name][method] |= {"rival": best, "ahead": mean_and_error(ahead, blocks[method]["n"])}
    return summary


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """Compute the mean over rows from sums over independent blocks of rows, and its standard error."""
    mean, blocks = sums.sum() / counts.sum(), int((counts > 0).sum())
    error = math.sqrt(np.square(sums - mean * counts).sum() * blocks / (blocks - 1)) / counts.sum()
    return [float(mean), error]


def cell(entry: list[float]) -> str:
    return " ± ".join(f"{value:.4f}" for value in entry)


def table(summary: dict[str, Any]) -> str:
    """Write Markdown: one row for each set and method."""
    lines = ["| set | | NLL | RPS | ahead of the best rival | s |", "|---|---|---|---|---|---|"]
    for name, entries in summary.items():
        for i, (method, entry) in enumerate(entries.items()):
            ahead = f"{cell(entry['ahead'])} ({entry['rival']})" if "ahead" in entry else ""
            scored = f"{cell(entry['NLL'])} | {cell(entry['RPS'])} | {ahead}"
            lines.append(f"| {'' if i else name} | {method} | {scored} | {entry['s']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="keep the fits of others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "counts.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    if args.smoke:
        args.folds, args.sets = 2, ["doctor_visits"]
        args.methods = [method for method in args.methods if method not in ("ZINB", "hurdle NB2")]  # which take longest
    installed = importlib.util.find_spec("statsmodels") is not None
    if not installed and set(args.methods) & set(RIVALS):
        print("statsmodels is not installed: its models are left out", file=sys.stderr)
        args.methods = [method for method in args.methods if method not in RIVALS]
    jobs = list(jobs_of(args))
    done = {job[:2] for job in jobs}
    kept = json.loads(args.out.read_text())["fits"] if args.out.exists() else []
    rows = [row for row in kept if (row["set"], row["method"]) not in done]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows += [report(row) for row in tqdm(pool.map(run, jobs), total=len(jobs), desc="fits")]
    summary = summarize(rows)
    about = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    if installed:
        about["statsmodels"] = version("statsmodels")
    args.out.write_text(json.dumps({"about": about, "summary": summary, "fits": rows}, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
