"""How good are networks that were trained on a hundred rows? Held-out NLL of the defaults, and beside other methods.

Simulated: three inputs, of which the first one matters, y = sin(2 x) plus noise of .3. Ten data sets of 100 rows, 2000
held-out rows each. With fewer than 2000 rows, ``fit`` starts with more noise and weight decay, which fade fast, holds
out more rows, and trains on all of them in the end; ``few_rows=False`` trains as on many rows. Ensembles have ten
networks. Beside them: the normal distribution of all targets, whatever x is; a Gaussian process (scikit-learn) with a
length scale for each input; and the distribution that the targets were drawn from.

    python benchmarks/few_rows.py
"""

import argparse
import json
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from tqdm import tqdm

from pyro_mdn import DeepEnsemble, MixtureDensityNetwork, fit

RESULTS = Path(__file__).parent / "results" / "few_rows.json"
ROWS, HELD_OUT, INPUTS, NOISE = 100, 2000, 3, 0.3
NETWORKS = {
    "network": (1, {}),
    "network, few_rows=False": (1, {"few_rows": False}),
    "ensemble": (10, {}),
    "ensemble, few_rows=False": (10, {"few_rows": False}),
}
NAMES = [*NETWORKS, "normal", "Gaussian process", "truth"]


def draw(seed, rows):
    """Inputs and targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, INPUTS)).astype(np.float32)
    return x, (np.sin(2 * x[:, :1]) + NOISE * rng.normal(size=(rows, 1))).astype(np.float32)


def network(members, settings, seed, train, test, smoke):
    """Mean NLL of a network or an ensemble over the held-out rows, in nats."""
    network = MixtureDensityNetwork(INPUTS, 1, seed=seed)
    model = network if members == 1 else DeepEnsemble(network, members, seed=seed)
    fit(model, *train, seed=seed, progress=False, **settings, **({"max_epochs": 2} if smoke else {}))
    x, y = map(torch.from_numpy, test)
    return -model.predict(x).mixture.log_prob(y).mean().item()


def process(train, test):
    """That of a Gaussian process with a length scale for each input."""
    kernel = ConstantKernel() * RBF(np.ones(INPUTS), (0.05, 1e3)) + WhiteKernel(0.1)
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=3, random_state=0)
    mean, deviation = model.fit(train[0], train[1][:, 0]).predict(test[0], return_std=True)
    return -norm(mean, deviation).logpdf(test[1][:, 0]).mean()


def run(job):
    """NLL of one method on one data set."""
    name, seed, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train, test = draw(seed, ROWS), draw(1000 + seed, HELD_OUT)
    if name in NETWORKS:
        return network(*NETWORKS[name], seed, train, test, smoke)
    if name == "Gaussian process":
        return float(process(train, test))
    known = norm(np.sin(2 * test[0][:, :1]), NOISE) if name == "truth" else norm(train[1].mean(), train[1].std())
    return float(-known.logpdf(test[1]).mean())


def table(results):
    """Markdown: mean and largest NLL of each method."""
    lines = ["| | NLL, mean | worst data set |", "|---|---|---|"]
    lines += [f"| {name} | {np.mean(values):.2f} | {max(values):.2f} |" for name, values in results.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    jobs = [(name, seed, args.smoke) for name in NAMES for seed in range(1 if args.smoke else 10)]
    with ProcessPoolExecutor(args.jobs) as pool:
        scores = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="data sets"))
    results = {name: [score for job, score in zip(jobs, scores, strict=True) if job[0] == name] for name in NAMES}
    args.out.write_text(json.dumps({"nll": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
