"""How good are predicted directions? Two data sets of winds by cross-validation, beside regression models of angles.

``data/angles/README.md`` describes them. Inputs are cosine and sine of an earlier direction. All methods have the same
folds: each day is left out in milwaukee, and a tenth of the days in wind. On held-out rows:

- NLL: mean negative log-density in nats a radian. Lower is better.
- CRPS: continuous ranked probability score on the circle (Grimit et al., 2006), of the distribution on a grid of one
  degree. Lower is better.

Networks are at their defaults with targets that are angles; the ensemble is the average of ten. Rivals:

- uniform: all directions are equally likely.
- von Mises regression by maximum likelihood: direction and logarithm of the concentration depend on the inputs, the
  direction as that of a vector whose two coordinates are linear in them (Sarma & Jammalamadaka, 1993).
- Gaussian network on cosine and sine: one normal component with full covariance, at the other defaults. Its density of
  the angle is that of a projected normal distribution (Wang & Gelfand, 2013).

What follows ± is the standard error over days.

    python benchmarks/angles.py
"""

import argparse
import json
import math
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import i0e, log_ndtr
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DeepEnsemble, MixtureDensityNetwork, fit

HERE = Path(__file__).parent
DATA = HERE / "data" / "angles"
FOLDS = {"milwaukee": 21, "wind": 10}
GRID = np.deg2rad(np.arange(-180, 180))


def load(name):
    """Earlier directions as inputs, directions, and days."""
    with np.load(DATA / f"{name}.npz") as arrays:
        before, y, days = arrays["before"].astype(float), arrays["y"].astype(float), arrays["group"]
    return np.concatenate([np.cos(before), np.sin(before)], 1), y, days


def network(x, y, seed, settings):
    """Log-density of a mixture of wrapped components."""
    return of_angles(MixtureDensityNetwork(2, 1, seed=seed, target_transform="angle"), x, y, seed, settings)


def ensemble(x, y, seed, settings):
    """The same of the average of ten."""
    model = MixtureDensityNetwork(2, 1, seed=seed, target_transform="angle")
    return of_angles(DeepEnsemble(model, 2 if settings else 10, seed=seed), x, y, seed, settings)


def of_angles(predictor, x, y, seed, settings):
    fit(predictor, x, y[:, None], seed=seed, progress=False, **settings)

    def log_density(x, y):
        mixture = predictor.predict(x).mixture.double()
        return mixture.log_prob(torch.from_numpy(y)[..., None]).numpy()

    return log_density


def gaussian(x, y, seed, settings):
    """Log-density of the direction of a normal vector."""
    model = MixtureDensityNetwork(2, 2, n_components=1, noise="full", seed=seed)
    fit(model, x, np.stack([np.cos(y), np.sin(y)], 1), seed=seed, progress=False, **settings)

    def log_density(x, y):
        mixture = model.predict(x).mixture.double()
        mean, covariance = mixture.locs[:, 0].numpy(), mixture.components.covariance_matrix()[:, 0].numpy()
        precision, (_, log_det) = np.linalg.inv(covariance), np.linalg.slogdet(covariance)
        way = np.stack([np.cos(y), np.sin(y)], -1)  # (..., N, 2)
        a, b, c = (
            np.einsum("...ni,nij,...nj->...n", u, precision, v) for u, v in ((way, way), (way, mean), (mean, mean))
        )
        d = b / np.sqrt(a)
        # 1 + d Φ(d) / φ(d), in logarithms where d is large
        ratio = np.exp(np.minimum(log_ndtr(d) + 0.5 * d**2 + 0.5 * math.log(2 * math.pi), 600))
        return -0.5 * c - math.log(2 * math.pi) - np.log(a) - 0.5 * log_det + np.log1p(d * ratio)

    return log_density


def von_mises(x, y, seed, settings):
    """Log-density of a von Mises regression."""

    def log_density(x, y, coefficients):
        z = np.concatenate([np.ones((len(x), 1)), x], 1)
        across, along, concentration = coefficients.reshape(3, -1) @ z.T
        kappa = np.exp(np.clip(concentration, -10, 10))
        gap = y - np.arctan2(across, along)
        return kappa * (np.cos(gap) - 1) - np.log(2 * np.pi * i0e(kappa))

    rng = np.random.default_rng(seed)
    starts = [0.5 * rng.standard_normal(9) for _ in range(1 if settings else 5)]
    found = [minimize(lambda c: -log_density(x, y, c).mean(), start, method="BFGS") for start in starts]
    best = min(found, key=lambda result: result.fun).x
    return lambda x, y: log_density(x, y, best)


def uniform(x, y, seed, settings):
    """Log-density of the uniform distribution."""
    return lambda x, y: np.full(y.shape, -math.log(2 * math.pi))


METHODS = {
    "network": network,
    "ensemble": ensemble,
    "von Mises regression": von_mises,
    "Gaussian network": gaussian,
    "uniform": uniform,
}


def crps(density, y):
    """Score on the circle of densities ``(360, N)`` on the grid: E|Y - y| - E|Y - Y'| / 2, with arcs as distances."""
    mass = density / density.sum(0)
    arc = np.abs(np.angle(np.exp(1j * (GRID[:, None] - GRID))))
    to_target = np.abs(np.angle(np.exp(1j * (GRID[:, None] - y))))
    return (mass * to_target).sum(0) - 0.5 * np.einsum("in,ij,jn->n", mass, arc, mass)


def run(job):
    """NLL and CRPS of the held-out rows of a fold."""
    name, method, fold, smoke = job
    warnings.simplefilter("ignore", CollapseWarning)
    torch.set_num_threads(1)
    x, y, days = load(name)
    order = np.random.default_rng(0).permutation(days.max() + 1)
    held_out = np.isin(days, order[fold :: FOLDS[name]])
    settings = {"max_epochs": 2} if smoke else {}
    log_density = METHODS[method](x[~held_out], y[~held_out], fold, settings)
    x, y = x[held_out], y[held_out]
    on_grid = np.exp(log_density(x, np.broadcast_to(GRID[:, None], (360, len(y)))))
    return {
        "rows": held_out.nonzero()[0].tolist(),
        "nll": (-log_density(x, y)).tolist(),
        "crps": crps(on_grid, y).tolist(),
    }


def summarize(name, parts):
    """Means, and standard errors over days."""
    _, _, days = load(name)
    rows = np.concatenate([part["rows"] for part in parts])
    summary = {}
    for score in ("nll", "crps"):
        values = np.concatenate([part[score] for part in parts])
        by_day = np.array([values[days[rows] == day].mean() for day in np.unique(days[rows])])
        summary[score] = [float(by_day.mean()), float(by_day.std(ddof=1) / math.sqrt(len(by_day)))]
    return summary


def table(summary):
    """Markdown: both scores of each method."""
    names = list(next(iter(summary.values())))
    lines = ["| method | " + " | ".join(f"{name} NLL | {name} CRPS" for name in names) + " |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for method, sets in summary.items():
        cells = [f"{mean:.3f} ± {error:.3f}" for name in names for mean, error in sets[name].values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "angles.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    sets = ["wind"] if args.smoke else list(FOLDS)
    folds = {name: range(2) if args.smoke else range(FOLDS[name]) for name in sets}
    jobs = [(name, method, fold, args.smoke) for name in sets for method in METHODS for fold in folds[name]]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="fits"))
    parts = {}
    for (name, method, *_), result in zip(jobs, results, strict=True):
        parts.setdefault((method, name), []).append(result)
    summary = {method: {name: summarize(name, parts[method, name]) for name in sets} for method in METHODS}
    args.out.write_text(json.dumps({"summary": summary}, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
