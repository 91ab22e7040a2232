"""Is this build slower than another one anywhere? Times of a base over those of this build.

Both packages are loaded into one process and take turns there, so that memory and the state of the machine are the same
for both. Times are those of the processor, with one thread, gradients included: above 1, this build is quicker. Cases:

- loss: ``network.loss`` of a batch.
- head: the same from the features on, without the layers before.
- asked: ``network(x).log_prob(y)``, with validation as Pyro has it.
- built: a ``GaussianMixture`` of tensors that require gradients, and its density.
- fit: a whole ``fit`` of 4000 rows, 100 epochs without early stopping (only if it is named; three rounds are enough).

Weights are random, or trained by 300 steps of Adam on measurements of wines, the same steps in both builds.

    git worktree add --detach /tmp/base COMMIT
    python benchmarks/against.py /tmp/base
"""

import argparse
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from log_prob import wines
from timing import machine
from tqdm import tqdm

CASES = ["loss", "head", "asked", "built", "fit"]
SIZES = [(256, 5, 1), (256, 5, 2), (256, 10, 8), (1024, 10, 4), (2048, 10, 8)]  # rows, components, outputs
OWN = Path(__file__).parent.parent


class Build:
    """A package as it lies in a folder, which is the one that ``import`` finds while it is used."""

    def __init__(self, root):
        self.modules = {}
        with self:
            sys.path.insert(0, str(root))
            self.package = importlib.import_module("pyro_mdn")
            sys.path.remove(str(root))
        assert Path(self.package.__file__).is_relative_to(Path(root).resolve()), self.package.__file__

    def __enter__(self):
        self.others = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "pyro_mdn"}
        sys.modules.update(self.modules)

    def __exit__(self, *_):
        self.modules = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "pyro_mdn"}
        sys.modules.update(self.others)


def network_of(package, noise, rows, k, d, trained):
    """A network with one hidden layer, its features and targets."""
    torch.manual_seed(0)
    x, y = wines(rows, d)
    noise = {"diagonal": package.Diagonal, "full": package.Full}[noise]()
    network = package.MixtureDensityNetwork(x.shape[1], d, k, [64], noise=noise)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(300 * trained):
        optimizer.zero_grad()
        network.loss(x, y).mean().backward()
        optimizer.step()
    return network, x, y


def case_of(package, name, noise, rows, k, d, trained):
    """Function without arguments that is to be timed."""
    network, x, y = network_of(package, noise, rows, k, d, trained)
    weights = [*network.parameters()]
    if name == "fit":
        x, y = wines(4000, d)
        return lambda: package.fit(network, x, y, max_epochs=100, patience=100, initialize=True, seed=0, progress=False)
    if name == "loss":
        return lambda: torch.autograd.grad(network.loss(x, y).mean(), weights)
    if name == "head":
        features = network.features(x).detach().requires_grad_()
        leaves = [*network.head.parameters(), features]
        return lambda: torch.autograd.grad(-network.head.log_prob(features, y).mean(), leaves)
    if name == "asked":
        return lambda: torch.autograd.grad(-network(x).log_prob(y).mean(), weights)
    mixture = network(x)
    parameters, structure = (mixture.logits, mixture.locs, *mixture.covariance.tensors()), type(mixture.covariance)
    leaves = [t.detach().clone().requires_grad_() for t in parameters]

    def built():
        logits, locs, *rest = leaves
        mixture = package.GaussianMixture(logits, locs, structure(*rest))
        return torch.autograd.grad(-mixture.log_prob(y).mean(), leaves)

    return built


def compare(builds, case, rounds, block):
    """Ratio of each round of turns: seconds of the first build over seconds of the second."""
    functions = []
    for build in builds:
        with build:
            functions.append(case_of(build.package, *case))
            start, calls = time.process_time(), 0
            while not calls or (calls < 3 and time.process_time() - start < block):
                functions[-1]()
                calls += 1
            seconds = (time.process_time() - start) / calls
    count, ratios = max(1, round(block / seconds)), []
    for turn in range(rounds):
        spent = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            with builds[which]:
                start = time.process_time()
                for _ in range(count):
                    functions[which]()
                spent[which] = time.process_time() - start
        ratios.append(spent[0] / spent[1])
    return ratios


def table(results):
    """Markdown: median and quartiles of the ratios on trained and on random weights."""
    weights = list(dict.fromkeys(row["weights"] for row in results))
    lines = [f"| case | noise | rows, components, outputs | {' | '.join(weights)} |", "|---" * (3 + len(weights)) + "|"]
    cells = {}
    for row in results:
        low, median, high = statistics.quantiles(row["ratios"], n=4)
        place = cells.setdefault((row["case"], row["noise"], ", ".join(map(str, row["size"]))), {})
        place[row["weights"]] = f"{median:.3f} ({low:.3f}-{high:.3f})"
    lines += [f"| {' | '.join([*names, *(cell[w] for w in weights)])} |" for names, cell in cells.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of the other build")
    parser.add_argument("--cases", nargs="+", default=CASES[:-1], choices=CASES)
    parser.add_argument("--noise", nargs="+", default=["diagonal", "full"])
    parser.add_argument("--weights", nargs="+", default=["trained", "random"], choices=["trained", "random"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=float, default=0.1, help="seconds a turn")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    if args.smoke:
        args.weights, args.sizes, args.rounds, args.block = ["random"], [(16, 2, 2)], 2, 0.0
    torch.set_num_threads(1)
    builds, results = [Build(args.base), Build(OWN)], []
    jobs = itertools.product(args.cases, args.noise, args.sizes, args.weights)
    jobs = [job for job in jobs if job[1] == "diagonal" or job[2][2] > 1]  # one output has no correlations
    for case, noise, size, weights in tqdm(jobs, desc="cases"):
        ratios = compare(builds, (case, noise, *size, weights == "trained"), args.rounds, args.block)
        results.append({"case": case, "noise": noise, "size": size, "weights": weights, "ratios": ratios})
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "rows": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
