"""How much memory do a log-density with its gradients, a training step and a prediction by many draws take at most?

Each in a process of its own; only a smoke run has one for all.

On a CPU it is what the process held at most beyond what it held with all inputs in place; on a GPU, what torch had
allocated at most.

    python benchmarks/memory.py
"""

import argparse
import multiprocessing
from pathlib import Path

import log_prob
import torch
from timing import DEVICE, GPU, machine, write
from torch import nn

from pyro_mdn import Full, MixtureDensityNetwork, bayesianize, posterior_predictive, starting_weights

CASES = [("full", 2048, 10, 8), ("full", 1024, 10, 16), ("diagonal", 65536, 5, 1), ("low rank", 1024, 5, 32)]
STEP = (2048, 10, 8)
WIDTH = 64
DRAWS = (100, 100)  # images and draws
SIDE = 28


def density(who, case):
    return {"ours": log_prob.kernel, "GaussianMixture": log_prob.ours, "torch": log_prob.in_torch}[who](*case)


def step(who, case):
    """A training step of a network with full covariances."""
    n, k, d = case
    x, y = torch.randn(n, 4, device=DEVICE), torch.randn(n, d, device=DEVICE)
    if who == "torch":
        body = nn.Sequential(nn.Linear(4, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()).to(DEVICE)
        layer = nn.Linear(WIDTH, k * (1 + d + d * (d + 1) // 2)).to(DEVICE)
        parameters = [*body.parameters(), *layer.parameters()]

        def loss():
            logits, locs, factor = layer(body(x)).split([k, k * d, k * d * (d + 1) // 2], -1)
            locs = locs.unflatten(-1, (k, d))
            components = log_prob.components("full", torch.distributions, locs, factor.unflatten(-1, (k, -1)))
            weights = torch.distributions.Categorical(logits=logits, validate_args=False)
            mixture = torch.distributions.MixtureSameFamily(weights, components, validate_args=False)
            return -mixture.log_prob(y).mean()
    else:
        network = MixtureDensityNetwork(4, d, k, WIDTH, noise=Full()).to(DEVICE)
        parameters = list(network.parameters())

        def loss():
            return network.loss(x, y).mean()

    optimizer = torch.optim.Adam(parameters, fused=True)

    def run():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def predictive(_, case):
    """Mixtures for images by draws of all weights of a small convolutional network."""
    images, draws = case
    convolutions = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Flatten())
    backbone = nn.Sequential(convolutions, nn.Linear(16 * SIDE**2, 4))
    network = MixtureDensityNetwork((1, SIDE, SIDE), 1, 2, 4, backbone=backbone)
    weights = starting_weights(bayesianize(network).to(DEVICE))
    weights = {
        name: value.expand(draws, *value.shape) * torch.randn(draws, *[1] * value.ndim, device=DEVICE)
        for name, value in weights.items()
    }
    x = torch.randn(images, 1, SIDE, SIDE, device=DEVICE)
    return lambda: posterior_predictive(network, weights, x)


def peak(pipe, build, who, small, case):
    """MiB beyond what is there before; a small case first, so that libraries are loaded."""
    torch.set_num_threads(1)
    build(who, small)()
    function = build(who, case)
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        pipe.send((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    function()
    pipe.send(held("VmHWM") - before)


def held(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def peaks(pipe, jobs):
    for job in jobs:
        peak(pipe, *job)


def in_a_process(jobs):
    """Peaks of the jobs, one after another in one process."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=peaks, args=(far, jobs))
    process.start()
    far.close()  # so that the end of a process that fails is seen here
    found = [near.recv() for _ in jobs]
    process.join()
    return found


def measured(job, tries):
    return sorted(in_a_process([job])[0] for _ in range(tries))[tries // 2]


def jobs_of(*, smoke):
    """What each peak is of, by the name of its row and who it is."""
    jobs = {}
    for case in CASES[:1] if smoke else CASES:
        small = (case[0], 4, 2, case[3])
        for who in ("ours", "GaussianMixture", "torch"):
            jobs[f"log-density, {case[0]} {case[1:]}", who] = density, who, small, small if smoke else case
    small = (4, 2, 8)
    for who in ("ours", "torch"):
        jobs[f"training step, full {STEP}", who] = step, who, small, small if smoke else STEP
    what = f"posterior_predictive, CNN, {DRAWS[0]} images, {DRAWS[1]} draws"
    jobs[what, "ours"] = predictive, "ours", (2, 2), (2, 2) if smoke else DRAWS
    return jobs


def measure(*, smoke):
    jobs, rows = jobs_of(smoke=smoke), {}
    alone = (measured(job, 1 if GPU else 5) for job in jobs.values())
    for (what, who), mib in zip(jobs, in_a_process([*jobs.values()]) if smoke else alone, strict=True):
        rows.setdefault(what, {})[who] = mib
    return [{"what": what, "MiB": mib} for what, mib in rows.items()]


def table(rows):
    """Markdown: MiB at most, and ours over torch's."""
    lines = ["| | raw channels, MiB | GaussianMixture | MixtureSameFamily | ours over it |", "|---|---|---|---|---|"]
    for row in rows:
        mib = row["MiB"]
        own = f"{mib['GaussianMixture']:.1f}" if "GaussianMixture" in mib else ""
        share = f"{mib['ours'] / mib['torch']:.2f}" if mib.get("torch") else ""
        torchs = f"{mib['torch']:.1f}" if "torch" in mib else ""
        lines.append(f"| {row['what']} | {mib['ours']:.1f} | {own} | {torchs} | {share} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="memory", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    rows = measure(smoke=args.smoke)
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
