"""How good are the defaults of ``MDNRegressor``? The diabetes data that scikit-learn ships, beside three other ways.

442 patients, ten inputs, disease progression a year later; 5-fold cross-validation, repeated with four shufflings, all
methods at their defaults. On held-out rows: mean log-likelihood in nats (higher is better), CRPS in the units of y,
share of targets within 90 % intervals. In brackets: standard deviation of the log-likelihood over the shufflings.
Seconds are those of one fit.

- NGBoost (Duan et al., 2020), Normal: as it is, and with its own early stopping on a tenth of the training rows.
- Linear Gaussian: ``BayesianRidge``, whose variance includes that of the coefficients.
- Quantile boosting: ``GradientBoostingRegressor`` at 19 levels, 0.05 to 0.95, sorted. The cdf is linear between them,
  with exponential tails whose scale is such that they would go from level 0.05 to 0.25 over the distance of these
  quantiles. Quantiles may coincide, where the density would be infinite: the log-likelihood is that of the unit
  interval around the target. Targets are integers, and for the other methods, which are smooth, the two agree to three
  digits.

    python benchmarks/diabetes.py            # some 10 minutes on one core
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import KFold, train_test_split
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DiagonalCovariance, GaussianMixture, scores
from pyro_mdn.sklearn import MDNRegressor

HERE = Path(__file__).parent
METRICS = ["log-likelihood", "CRPS", "in 90 %"]
LEVELS = np.arange(1, 20) / 20


def of_mixture(mixture, y):
    y = torch.tensor(y).unsqueeze(-1)
    metrics = -scores.log_score(mixture, y), scores.crps(mixture, y), scores.coverage(mixture, y, 0.9)
    return [metric.mean().item() for metric in metrics]


def of_normal(mean, std, y):
    loc, scale = (torch.tensor(np.asarray(v, dtype=float)).reshape(-1, 1, 1) for v in (mean, std))
    return of_mixture(GaussianMixture(torch.zeros_like(loc[..., 0]), loc, DiagonalCovariance(scale)), y)


def of_quantiles(quantiles, y):
    """Metrics of quantiles ``(N, 19)`` in ascending order."""
    mass = [unit_mass(q, value) for q, value in zip(quantiles, y, strict=True)]
    points = np.stack([inverse_cdf(q, (np.arange(1000) + 0.5) / 1000) for q in quantiles])
    spread = (points * (np.arange(1000) - 499.5)).mean(1) / 500  # E|Y - Y'| / 2 of equally likely points in order
    crps = np.abs(points - y[:, None]).mean(1) - spread
    inside = (quantiles[:, 0] <= y) & (y <= quantiles[:, -1])
    return [float(np.mean(np.log(mass))), float(crps.mean()), float(inside.mean())]


def unit_mass(q, y):
    """Probability of the unit interval around y, in the lower tail, where differences are accurate."""
    q, y = (q, y) if y < q[9] else (-q[::-1], -y)
    return cdf(q, y + 0.5) - cdf(q, y - 0.5)


def cdf(q, y):
    if y < q[0]:
        return 0.05 * np.exp((y - q[0]) / tail_scale(q))
    return 1 - cdf(-q[::-1], -y) if y > q[-1] else np.interp(y, q, LEVELS)


def inverse_cdf(q, level):
    below = q[0] + tail_scale(q) * np.log(np.minimum(level / 0.05, 1))
    above = q[-1] - tail_scale(-q[::-1]) * np.log(np.minimum((1 - level) / 0.05, 1))
    return np.where(level < 0.05, below, np.where(level > 0.95, above, np.interp(level, LEVELS, q)))


def tail_scale(q):
    return (q[4] - q[0]) / np.log(5)


def mdn(train, test, seed, smoke, size=1):
    settings = {"max_epochs": 2} if smoke else {}
    model = MDNRegressor(ensemble_size=size, random_state=seed, **settings).fit(*train)
    return of_mixture(model.predict_distribution(test[0]), test[1])


def pool(train, test, seed, smoke):
    return mdn(train, test, seed, smoke, size=2 if smoke else 10)


def ngboost(train, test, seed, smoke, held_out=(None, None), **settings):
    from ngboost import NGBRegressor

    model = NGBRegressor(verbose=False, random_state=seed, **({"n_estimators": 5} if smoke else {}), **settings)
    with contextlib.redirect_stdout(None):  # it says that it uses the rows it was given
        model.fit(*train, *held_out)
    best = None if held_out[0] is None else model.best_val_loss_itr + 1
    normal = model.pred_dist(test[0], max_iter=best)
    return of_normal(normal.loc, normal.scale, test[1])


def ngboost_stopped(train, test, seed, smoke):
    X, X_held, y, y_held = train_test_split(*train, test_size=0.1, random_state=seed)
    return ngboost((X, y), test, seed, smoke, (X_held, y_held), early_stopping_rounds=20)


def linear(train, test, seed, smoke):
    return of_normal(*BayesianRidge().fit(*train).predict(test[0], return_std=True), test[1])


def quantile_boosting(train, test, seed, smoke):
    settings = {"loss": "quantile", "random_state": seed, **({"n_estimators": 5} if smoke else {})}
    models = [GradientBoostingRegressor(alpha=level, **settings).fit(*train) for level in LEVELS]
    return of_quantiles(np.sort(np.stack([model.predict(test[0]) for model in models], 1), 1), test[1])


# NGBoost is an extra of the benchmarks alone, and left out where it is not installed.
METHODS = {
    "**MDNRegressor, ensemble of ten**": pool,
    "**MDNRegressor**": mdn,
    "NGBoost": ngboost,
    "NGBoost, early stopped": ngboost_stopped,
    "linear Gaussian": linear,
    "quantile boosting": quantile_boosting,
}


def run(job):
    """Train one method on four folds, and score it on the fifth."""
    name, repeat, fold, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    X, y = load_diabetes(return_X_y=True)
    train, test = list(KFold(5, shuffle=True, random_state=repeat).split(X))[fold]
    start = time.perf_counter()
    metrics = METHODS[name]((X[train], y[train]), (X[test], y[test]), repeat, smoke)
    seconds = time.perf_counter() - start
    return {"method": name, "repeat": repeat, "fold": fold, **dict(zip(METRICS, metrics, strict=True)), "s": seconds}


def summarize(rows):
    """Means over folds and shufflings, and what the log-likelihood varies by from one shuffling to another."""
    summary = {}
    for name in METHODS:
        mine = [row for row in rows if row["method"] == name]
        if not mine:
            continue
        repeats = sorted({row["repeat"] for row in mine})
        by_repeat = [np.mean([r[METRICS[0]] for r in mine if r["repeat"] == repeat]) for repeat in repeats]
        summary[name] = {metric: float(np.mean([row[metric] for row in mine])) for metric in METRICS}
        summary[name] |= {"deviation": float(np.std(by_repeat)), "s": float(np.median([row["s"] for row in mine]))}
    return summary


def table(summary):
    """Markdown: one row for each method."""
    lines = [f"| | {' | '.join(METRICS)} | s |", "|---|" + "---|" * (len(METRICS) + 1)]
    for name, entry in summary.items():
        first = f"{entry[METRICS[0]]:.3f} ({entry['deviation']:.3f})"
        lines.append(f"| {name} | {first} | {entry['CRPS']:.2f} | {entry['in 90 %']:.3f} | {entry['s']:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="shufflings")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "diabetes.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    repeats, folds = (range(1), range(2)) if args.smoke else (range(args.repeats), range(5))
    names = [name for name in METHODS if "NGBoost" not in name or importlib.util.find_spec("ngboost")]
    jobs = [(name, repeat, fold, args.smoke) for repeat in repeats for fold in folds for name in names]
    with ProcessPoolExecutor(args.jobs) as executor:
        rows = list(tqdm(executor.map(run, jobs), total=len(jobs), desc="fits"))
    summary = summarize(rows)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    about = {"machine": platform.machine(), **versions, "repeats": len(repeats)}
    args.out.write_text(json.dumps({"about": about, "summary": summary, "fits": rows}, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
