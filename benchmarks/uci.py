"""How good are the densities? Five regression sets, 20 standard splits, default settings, beside published figures.

Mean test negative log-likelihood (NLL) in nats and the original units of y, RMSE and CRPS in those units, coverage of
90 % intervals: of single networks, the mean over ten, and of the deep ensemble that pools them. Seconds are those of
the ten together. The targets of wine are integers, where a density can grow without bound: there NLL is that of the
unit interval around the target.

    python benchmarks/uci.py                 # all splits: about 10 minutes on four cores
    python benchmarks/uci.py --splits 0-4    # a quick look
"""

import argparse
import csv
import json
import math
import os
import platform
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import ttest_rel
from tqdm import tqdm

from pyro_mdn import CollapseWarning, DeepEnsemble, MixtureDensityNetwork, fit, scores

HERE = Path(__file__).parent
DATA = HERE / "data" / "uci"
SETS = ["concrete", "energy", "kin8nm", "yacht", "wine-quality-red"]
METRICS = {"nll": "NLL", "rmse": "RMSE", "crps": "CRPS", "coverage": "90 %"}


def load(name, split):
    """Training and test rows of one split, in float32."""
    with np.load(DATA / f"{name}.npz") as arrays:
        test = arrays["test"][split]
        x, y = (torch.tensor(arrays[key], dtype=torch.float32) for key in "xy")
    return (x[~test], y[~test]), (x[test], y[test])


def evaluate(name, mixture, y):
    """Metrics of a predictive distribution on test rows."""
    nll = scores.interval_log_score(mixture, y, 1.0).squeeze(-1) if "wine" in name else scores.log_score(mixture, y)
    return {
        "nll": nll.mean().item(),
        "rmse": (mixture.mean - y).square().mean().sqrt().item(),
        "crps": scores.crps(mixture, y).mean().item(),
        "coverage": scores.coverage(mixture, y, 0.9).mean().item(),
    }


def run(job):
    """Train the ensemble of one split, and score its members one by one, and pooled."""
    name, split, members, settings = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    (x, y), (x_test, y_test) = load(name, split)
    torch.manual_seed(split)
    ensemble = DeepEnsemble(MixtureDensityNetwork(x.shape[1], 1), members)
    start = time.perf_counter()
    fit(ensemble, x, y, seed=split, progress=False, **settings)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        single = [evaluate(name, ensemble.member(i)(x_test), y_test) for i in range(members)]
        pooled = evaluate(name, ensemble(x_test), y_test)
    mean = {metric: float(np.mean([s[metric] for s in single])) for metric in METRICS}
    return {"set": name, "split": split, "single": mean, "pooled": pooled, "seconds": seconds}


def published():
    """NLL of other methods: ``{set: {method: {split: nll}}}``."""
    table = defaultdict(lambda: defaultdict(dict))
    with (DATA / "published_per_split_nll.csv").open() as file:
        for row in csv.DictReader(file):
            table[row["dataset"]][row["method"]][int(row["split"])] = float(row["nll"])
    return table


def summarize(rows):
    """Mean and standard error of each metric over the splits, and paired tests against published figures."""
    summary, others = {}, published()
    for name in SETS:
        mine = sorted((r for r in rows if r["set"] == name), key=lambda r: r["split"])
        if not mine:
            continue
        summary[name] = {
            kind: {metric: mean_and_error([r[kind][metric] for r in mine]) for metric in METRICS}
            for kind in ("single", "pooled")
        }
        summary[name]["seconds"] = float(np.median([r["seconds"] for r in mine]))
        if "wine" not in name and len(mine) > 1:
            summary[name]["published"] = {method: compare(mine, nll) for method, nll in sorted(others[name].items())}
    return summary


def compare(mine, theirs):
    """Published mean NLL on the same splits, mean difference of the pool to it, and its one-sided paired p-value."""
    a, b = np.array([r["pooled"]["nll"] for r in mine]), np.array([theirs[r["split"]] for r in mine])
    p = ttest_rel(a, b, alternative="less").pvalue
    return {"nll": float(b.mean()), "difference": float((a - b).mean()), "p_better": float(p)}


def mean_and_error(values):
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [float(np.mean(values)), float(error)]


def table(summary):
    """Markdown: one row for each set and kind, and one for each comparison."""
    lines = ["| set | | " + " | ".join(METRICS.values()) + " | s for ten |", "|---|---|" + "---|" * (len(METRICS) + 1)]
    for name, entry in summary.items():
        for kind in ("single", "pooled"):
            cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in entry[kind].values()]
            seconds = f"{entry['seconds']:.1f}" if kind == "pooled" else ""
            lines.append(f"| {name if kind == 'single' else ''} | {kind} | {' | '.join(cells)} | {seconds} |")
    compared = {name: entry["published"] for name, entry in summary.items() if "published" in entry}
    methods = sorted({method for entry in compared.values() for method in entry})
    lines += ["", "| NLL of | " + " | ".join(compared) + " |", "|---|" + "---|" * len(compared)]
    ours = [f"{summary[name]['pooled']['nll'][0]:.2f}" for name in compared]
    lines.append(f"| **pyro_mdn, pooled** | {' | '.join(ours)} |")
    for method in methods:
        cells = [f"{c[method]['nll']:.2f} (p = {c[method]['p_better']:.1g})" for c in compared.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_splits(text):
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=parse_splits, default=range(20), help="0-4, say")
    parser.add_argument("--members", type=int, default=10, help="networks to an ensemble")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="keep the results of others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "uci.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    if args.smoke:
        args.splits, args.members, args.sets = range(2), 2, ["yacht", "wine-quality-red"]
    settings = {"max_epochs": 2} if args.smoke else {}
    jobs = [(name, split, args.members, settings) for name in args.sets for split in args.splits]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="splits"))
    if args.out.exists():  # sets that were not run stay as they are
        rows += [row for row in json.loads(args.out.read_text())["splits"] if row["set"] not in args.sets]
    summary = summarize(rows)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    about = {"machine": platform.machine(), **versions, "members": args.members, "splits": len(args.splits)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "summary": summary, "splits": rows}, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
