"""How long until a network is good, and how good is it in the end?

The wall-clock time of training until the held-out NLL, of whatever the training has at that moment, first reaches a
target; the time of looking does not count. Training goes on from there, and the NLL at its end is noted as well: who
passes the target may leave it again.

* this package: ``fit`` with its defaults, looked at after each epoch;
* by hand: a torch script of the usual kind on standardised data, Adam at 0.005 with a cosine, 2000 full-batch steps,
  looked at after each ten;
* zuko: its GMM on standardised data, Adam at 0.001, batches of 256, looked at after each epoch; it has no training of
  its own, so the end is the time limit;
* sbi: its MDN by its own training with its defaults, looked at after each epoch.

All have two hidden layers of 64 and 5 components, on one thread. The targets are 0.05 nats above the lowest NLL that
any of them came to with seed 0 and a time limit of 60 s. Not everybody gets there with every seed, so that what counts
is the expected running time of one who tries again until it is reached (Auger and Hansen, 2005, Performance evaluation
of an advanced local search evolutionary algorithm): all seconds spent, those in vain too, over the number of successes.

    python benchmarks/time_to_quality.py
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from timing import machine, write
from torch import nn
from torch.nn.functional import softplus

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))
TARGETS = {"inverse sine": -1.14, "kin8nm": -1.23, "Old Faithful": 3.86}
WIDTH, COMPONENTS = 64, 5


def load(problem, seed):
    """Training and held-out pairs, in float32."""
    if problem == "inverse sine":
        from inverse_sine import simulate

        pairs = [simulate(n, torch.Generator().manual_seed(s)) for n, s in ((512, seed), (10_000, 10_000))]
        return [tuple(t.float() for t in pair) for pair in pairs]
    if problem == "kin8nm":
        with np.load(HERE / "data" / "uci" / "kin8nm.npz") as arrays:
            test = arrays["test"][seed]
            x, y = (torch.tensor(arrays[key], dtype=torch.float32) for key in "xy")
        return [(x[~test], y[~test]), (x[test], y[test])]
    from geyser import load_pairs

    x, y = load_pairs()
    return [(x[0], y[0]), (x[1], y[1])]


class Stopwatch:
    """Stands still while the held-out NLL is computed; true once time is up."""

    def __init__(self, x, y, target, limit):
        self.x, self.y, self.target, self.limit = x, y, target, limit
        self.best, self.last, self.seconds, self.looking = math.inf, math.nan, None, 0.0
        self.start = time.perf_counter()

    def __call__(self, log_prob):
        """Look, and say whether to stop."""
        now = time.perf_counter()
        with torch.no_grad():
            self.last = -log_prob(self.x, self.y).mean().item()
        self.best = min(self.best, self.last)
        elapsed = now - self.start - self.looking
        self.looking += time.perf_counter() - now
        if self.best <= self.target and self.seconds is None:
            self.seconds = elapsed
        return elapsed > self.limit

    def result(self):
        """Seconds, whether the target was reached, the lowest NLL and the last."""
        spent = time.perf_counter() - self.start - self.looking
        return {
            "seconds": spent if self.seconds is None else self.seconds,
            "reached": self.seconds is not None,
            "lowest": self.best,
            "end": self.last,
        }


def by_fit(x, y, seed, watch, **settings):
    from pyro_mdn import MixtureDensityNetwork, fit

    network = MixtureDensityNetwork(x.shape[1], y.shape[1], COMPONENTS, WIDTH)
    fit(
        network,
        x,
        y,
        seed=seed,
        callbacks=[lambda _: watch(lambda x, y: -network.loss(x, y))],
        progress=False,
        **settings,
    )
    watch(lambda x, y: -network.loss(x, y))  # the weights that it has chosen


def standardized(x, y):
    """Standardised data, and a density in their units as one in the units of y."""
    (x_shift, x_scale), (y_shift, y_scale) = ((t.mean(0), t.std(0)) for t in (x, y))

    def in_units(log_prob):
        log_unit = y_scale.log().sum()
        return lambda x, y: log_prob((x - x_shift) / x_scale, (y - y_shift) / y_scale) - log_unit

    return (x - x_shift) / x_scale, (y - y_shift) / y_scale, in_units


def by_hand(x, y, seed, watch, steps=2000):
    x, y, in_units = standardized(x, y)
    dim = y.shape[1]
    network = nn.Sequential(
        nn.Linear(x.shape[1], WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, COMPONENTS * (1 + 2 * dim)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def log_prob(x, y):
        logits, locs, raw = network(x).split([COMPONENTS, COMPONENTS * dim, COMPONENTS * dim], -1)
        locs, scale = (t.unflatten(-1, (COMPONENTS, dim)) for t in (locs, softplus(raw) + 1e-3))
        normal = torch.distributions.Normal(locs, scale, validate_args=False)
        return torch.logsumexp(torch.log_softmax(logits, -1) + normal.log_prob(y.unsqueeze(-2)).sum(-1), -1)

    for step in range(steps):
        optimizer.zero_grad()
        (-log_prob(x, y).mean()).backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 and watch(in_units(log_prob)):
            return


def by_zuko(x, y, seed, watch, epochs=100_000):
    from zuko.mixtures import GMM

    x, y, in_units = standardized(x, y)
    model = GMM(y.shape[1], x.shape[1], COMPONENTS, hidden_features=(WIDTH, WIDTH))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            (-model(x[index]).log_prob(y[index]).mean()).backward()
            optimizer.step()
        if watch(in_units(lambda x, y: model(x).log_prob(y))):
            return


def by_sbi(x, y, seed, watch, epochs=100_000):
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    estimator = posterior_nn("mdn", hidden_features=WIDTH, num_components=COMPONENTS)
    trainer = NPE(density_estimator=estimator, show_progress_bars=False).append_simulations(y, x)
    trained = 0
    for epoch in range(1, epochs):
        with contextlib.redirect_stdout(io.StringIO()):
            network = trainer.train(max_num_epochs=epoch, resume_training=epoch > 1)
        density = network.log_prob
        if watch(lambda x, y, density=density: density(y.unsqueeze(0), x).squeeze(0)):
            return
        if trainer.epoch == trained:  # it has stopped, by its own judgement
            return
        trained = trainer.epoch


CONTESTANTS = {"fit": by_fit, "by hand": by_hand, "zuko": by_zuko, "sbi": by_sbi}


def run(name, problem, seed, limit):
    (x, y), held_out = load(problem, seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = Stopwatch(*held_out, TARGETS[problem], limit)
        CONTESTANTS[name](x, y, seed, watch)
    return watch.result()


def available(name):
    try:
        __import__({"zuko": "zuko", "sbi": "sbi.inference"}.get(name, "torch"))
    except ImportError:
        print(f"{name} is not installed", file=sys.stderr)
        return False
    return True


def measure(seeds, limit):
    torch.set_num_threads(1)
    names = [name for name in CONTESTANTS if available(name)]
    rows = []
    for problem in TARGETS:
        runs = {name: [] for name in names}
        for seed in range(seeds):  # everybody in turn
            for name in names:
                runs[name].append(run(name, problem, seed, limit))
        rows.append({"problem": problem, "target": TARGETS[problem], "runs": runs})
    return rows


def expected_seconds(runs):
    """Seconds of training for each time that the target was reached: what it takes on average to try until it is."""
    reached = sum(r["reached"] for r in runs)
    return sum(r["seconds"] for r in runs) / reached if reached else math.inf


def table(rows):
    """Markdown: expected seconds, how many seeds got there, and the median NLL at the end of training."""
    names = list(rows[0]["runs"])
    lines = ["| problem | target NLL | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            runs = row["runs"][name]
            seconds, reached = expected_seconds(runs), sum(r["reached"] for r in runs)
            time_to_target = f"{seconds:.1f} s ({reached} of {len(runs)})" if reached else f"never ({len(runs)} tries)"
            cells.append(f"{time_to_target}, {statistics.median(r['end'] for r in runs):.2f}")
        lines.append(f"| {row['problem']} | {row['target']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of training at most")
    parser.add_argument("--out", default="time_to_quality", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    rows = measure(1, 0.1) if args.smoke else measure(args.seeds, args.limit)
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
