"""What does another kind of target, or another family, cost in training? Steps over those of normal components.

Whole training steps of ``fit``, as ``train_step.py`` has them, on positive targets of one output, or angles: noise on
the rows, loss, backward pass, clipping, optimiser and averaged weights. Weights are trained for some hundred steps
before.

    python benchmarks/families.py
"""

import argparse
import math
from functools import partial

import torch
from timing import DEVICE, SMOKE, machine, race, ratio, shown, threads_of, write

BATCHES, INPUTS, STEPS = 8, 6, 400
CASES = [(256, 5), (2048, 5)]
FAMILIES = ("student_t", "laplace", "logistic", "gumbel", "von_mises", "beta")
ANGLES = ("angle", "von_mises")
TRANSFORMED = ("log", "log, censored", "quantile", *ANGLES)


def one_pass(kind, batch, k):
    """One pass over some batches."""
    from pyro_mdn import MixtureDensityNetwork, NegativeLogLikelihood, Targets
    from pyro_mdn.networks.rows import Rows
    from pyro_mdn.training.batches.in_memory import InMemory
    from pyro_mdn.training.loop import Loop
    from pyro_mdn.training.settings import LoopSettings

    torch.manual_seed(0)
    x = torch.randn(BATCHES * batch, INPUTS, device=DEVICE)
    y = (x[:, :1] + 0.5 * torch.randn(len(x), 1, device=DEVICE)).exp()
    if kind in ANGLES:
        y = torch.remainder(x[:, :1] + 0.5 * torch.randn(len(x), 1, device=DEVICE) + math.pi, 2 * math.pi) - math.pi
    if kind == "beta":
        y = y / (1 + y)
    if kind.endswith("censored"):
        y = Targets.censored(y, right=torch.rand(y.shape, device=DEVICE) < 0.3)
    settings = {"family": kind} if kind in FAMILIES else {}
    settings |= {"target_transform": "angle" if kind in ANGLES else kind.split(",")[0]} if kind in TRANSFORMED else {}
    network = MixtureDensityNetwork(INPUTS, 1, k, seed=0, **settings).to(DEVICE)
    network.initialize_(x, y)
    noise = {"input_noise": 0.1, "target_noise": 0.1, "final_noise": 0.03}
    rest = {"weight_decay": 0.01, "max_grad_norm": 10.0, "compile": False}
    settings = LoopSettings(max_epochs=10**9, patience=1, lr=1e-3, **noise, **rest)
    batches, units = InMemory(Rows(x, y), batch), (network.input_units, network.head.units)
    loop = Loop(NegativeLogLikelihood(network), batches, None, units, settings)
    for _ in range(STEPS // BATCHES if batch > 8 else 1):
        loop.train_epoch(1)
    return lambda: loop.train_epoch(1)


KINDS = ["normal", "log", "quantile", "censored", "log, censored", *FAMILIES, "angle"]
CONTESTANTS = {kind: partial(one_pass, kind) for kind in KINDS}


def table(rows):
    """Markdown: steps over those of normal components."""
    others = list(rows[0]["ratios"])
    lines = [f"| rows | threads | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for row in rows:
        cells = [shown(row["ratios"][kind]) for kind in others]
        lines.append(f"| {row['case'][0]} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="families", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds beside normal; by default all of them")
    args = parser.parse_args()
    settings = SMOKE if args.smoke else {"rounds": 7, "block": 0.2, "restarts": 3}
    kinds = args.kinds or (["log, censored"] if args.smoke else KINDS[1:])
    chosen = {kind: CONTESTANTS[kind] for kind in ("normal", *kinds)}
    rows = []
    for threads in args.threads:
        for case, times in race(chosen, [(8, 2)] if args.smoke else CASES, threads, **settings).items():
            ratios = {kind: ratio(times, kind, "normal") for kind in chosen if kind != "normal"}
            rows.append({"case": list(case), "threads": threads, "ratios": ratios})
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
