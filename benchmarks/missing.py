"""What do missing targets cost? 30 % of the entries are deleted at random, or every row that lacks one is.

Held-out NLL in nats of networks with full covariance and default settings, mean over the seeds with its standard error:
Old Faithful (two outputs, 238 training rows), and a simulated spiral (two outputs, 1000 rows). The differences are
paired by seed. Held-out rows are complete.

    python benchmarks/missing.py
"""

import argparse
import json
import math
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from pyro_mdn import CollapseWarning, Full, MixtureDensityNetwork, fit

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from geyser import load_pairs

HERE = Path(__file__).parent
SHARE = 0.3
KINDS = ["complete", "30 % missing", "incomplete rows dropped"]


def spiral(n, seed):
    """Two correlated outputs around one of two arms of a spiral."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(n, 1, generator=generator)
    arm = torch.where(torch.rand(n, 1, generator=generator) < 0.5, 0.0, math.pi)
    center = x * torch.cat([(2 * x + arm).cos(), (2 * x + arm).sin()], 1)
    noise = torch.randn(n, 2, generator=generator) @ torch.tensor([[0.2, 0.15], [0.0, 0.1]])
    return x, center + noise


def data(name, seed):
    if name == "spiral":
        return spiral(1000, seed), spiral(5000, 10_000)
    x, y = load_pairs()
    return (x[0], y[0]), (x[1], y[1])


def run(job):
    name, kind, seed, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    (x, y), (held_x, held_y) = data(name, seed)
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < SHARE
    if kind == "30 % missing":
        y = y.masked_fill(missing, math.nan)
    elif kind == "incomplete rows dropped":
        x, y = x[~missing.any(-1)], y[~missing.any(-1)]
    torch.manual_seed(seed)
    network = MixtureDensityNetwork(x.shape[1], 2, noise=Full())
    fit(network, x, y, seed=seed, progress=False, **({"max_epochs": 2} if smoke else {}))
    return network.loss(held_x, held_y).mean().item()


def table(results):
    """Markdown: complete data, and the paired changes from there."""
    lines = [f"| | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for name, values in results.items():
        complete = np.array(values[KINDS[0]])
        changes = [np.array(values[kind]) - complete for kind in KINDS[1:]]
        cells = [f"{c.mean():+.3f} ± {c.std(ddof=1) / math.sqrt(len(c)):.3f}" for c in changes]
        lines.append(f"| {name} | {complete.mean():.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "missing.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    seeds = range(2 if args.smoke else args.seeds)
    jobs = [(name, kind, seed, args.smoke) for name in ("Old Faithful", "spiral") for kind in KINDS for seed in seeds]
    results = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for (name, kind, *_), loss in zip(jobs, pool.map(run, jobs), strict=True):
            results.setdefault(name, {}).setdefault(kind, []).append(loss)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
