"""Why are the defaults of fit what they are? Each is changed alone, and the held-out NLL is compared.

No test row is used: of the training rows of each split of the regression sets a tenth is held out; the inverse sine is
simulated anew. Mean NLL of single networks, in nats, and in the last column its mean change over the sets.

    python benchmarks/ablation.py               # about 20 minutes on four cores
    python benchmarks/ablation.py --splits 0-0  # a quick look
"""

import argparse
import json
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tqdm import tqdm
from uci import HERE, SETS, load, parse_splits

from pyro_mdn import CollapseWarning, MixtureDensityNetwork, NegativeLogLikelihood, fit, scores
from pyro_mdn.training.schedules import LEARNING_RATE, STEPS, default_smoothing, default_weight_decay

sys.path.append(str(HERE.parent / "examples"))
from inverse_sine import simulate

NAMES = [*SETS, "inverse sine"]
VARIANTS = {
    "defaults": {},
    "few rows like many": {"few_rows": False},
    "many rows like few": {"few_rows": True},
    "no noise": {"input_noise": 0.0, "target_noise": 0.0},
    "no noise on x": {"input_noise": 0.0},
    "no noise on y": {"target_noise": 0.0},
    "noise on x three times": {"noise on x": 3.0},
    "noise that does not fade": {"final_noise": 1.0},
    "no weight decay": {"weight_decay": 0.0},
    "ten times the decay": {"decay": 10.0},
    "a quarter of the learning rate": {"lr": LEARNING_RATE / 4},
    "a third of the steps": {"steps": 1 / 3},
    "twice the steps": {"steps": 2.0},
    "first layer as torch has it": {"first": 1 / 3},
    "no early stopping": {"validation": 0.0},
    "no clipping": {"max_grad_norm": 1e12},
    "refit": {"refit": True},
    "no refit": {"refit": False},
    "noise on grids, not cells": {"cells": False},
}


def data(name, split):
    """Rows to train on, and rows to compare by."""
    if name == "inverse sine":
        training, held_out = (torch.Generator().manual_seed(seed) for seed in (1000 + split, 999))
        pairs = simulate(512, training), simulate(10_000, held_out)
        return [tuple(part.float() for part in pair) for pair in pairs]
    (x, y), _ = load(name, split)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    held_out, rest = order[: len(x) // 10], order[len(x) // 10 :]
    return [(x[rest], y[rest]), (x[held_out], y[held_out])]


def settings_for(variant, rows):
    """Arguments of fit; those that are relative to the defaults become absolute."""
    settings = dict(VARIANTS[variant])
    smoothing = default_smoothing(rows)
    rows = round((1 - smoothing.validation) * rows)  # that are left for training
    if noise := settings.pop("noise on x", None):
        settings["input_noise"] = noise * smoothing.noise
    if decay := settings.pop("decay", None):
        settings["weight_decay"] = decay * default_weight_decay(rows)
        if smoothing.first_weight_decay is not None:
            settings["first_weight_decay"] = decay * smoothing.first_weight_decay
    if share := settings.pop("steps", None):
        batches = -(-rows // min(256, max(32, rows // 64)))
        settings["max_epochs"] = round(share * max(100, -(-STEPS // batches)))
    return settings


def trained(variant, x, y, seed, smoke):
    """Network trained on these rows with one default changed."""
    settings = settings_for(variant, len(x)) | ({"max_epochs": 2} if smoke else {})
    network = MixtureDensityNetwork(x.shape[1], 1, seed=seed)
    with torch.no_grad():
        network.backbone[0].weight.mul_(settings.pop("first", 1.0))
    if not settings.pop("cells", True):
        settings["objective"] = NegativeLogLikelihood(network)
    fit(network, x, y, seed=seed, progress=False, **settings)
    return network


def run(job):
    variant, name, split, smoke = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CollapseWarning)
    train, (x, y) = data(name, split)
    mixture = trained(variant, *train, split, smoke).predict(x).mixture
    if "wine" in name:
        return scores.interval_log_score(mixture, y, 1.0).mean().item()
    return scores.log_score(mixture, y).mean().item()


def table(means):
    """Markdown."""
    names = list(means["defaults"])
    lines = [f"| | {' | '.join(names)} | mean change |", "|---|" + "---|" * (len(names) + 1)]
    for variant, values in means.items():
        change = np.mean([values[name] - means["defaults"][name] for name in names])
        cells = " | ".join(f"{values[name]:.2f}" for name in names)
        lines.append(f"| {variant} | {cells} | {'' if variant == 'defaults' else f'{change:+.2f}'} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=parse_splits, default=range(2))
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ablation.json")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    names, splits = (args.sets, args.splits) if not args.smoke else (["yacht", "inverse sine"], [0])
    jobs = [(variant, name, split, args.smoke) for variant in args.variants for name in names for split in splits]
    with ProcessPoolExecutor(args.jobs) as pool:
        done = tqdm(pool.map(run, jobs), total=len(jobs), desc="networks")
        losses = {job[:3]: loss for job, loss in zip(jobs, done, strict=True)}
    means = {v: {n: float(np.mean([losses[v, n, s] for s in splits])) for n in names} for v in args.variants}
    if (args.sets, args.variants) != (NAMES, list(VARIANTS)):  # a part of the table: the rest stays
        kept = json.loads(args.out.read_text())["nll"]
        means = {v: kept.get(v, {}) | means.get(v, {}) for v in VARIANTS}
    args.out.write_text(json.dumps({"splits": len(splits), "nll": means}, indent=1) + "\n")
    print(table(means))


if __name__ == "__main__":
    main()
