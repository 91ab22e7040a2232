"""Active learning
===============

Label next where the members of an ensemble disagree (BALD), not where the noise is large. A machine mostly idles, and
its signal jumps between two levels. Under load, in one row of ten, the signal follows the speed closely. Labels are
expensive, and all speeds matter. The question is not where the variance is large, but where labels can reduce it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from pyro_mdn import DeepEnsemble, MixtureDensityNetwork, fit
from pyro_mdn.uncertainty import mutual_information


def simulate(n, idle, generator):
    """Speeds in (-4, 4), of which those below -2 are idle and have that share, with their signals."""
    place, level, noise = torch.rand(n, 1, generator=generator), *torch.randn(2, n, 1, generator=generator)
    x = torch.where(torch.rand(n, 1, generator=generator) < idle, -4 + 2 * place, -2 + 6 * place)
    return x, torch.where(x < -2, 1.5 * level.sign() + 0.5 * noise, torch.sin(2 * x) + 0.1 * noise)


STRATEGIES = {
    "random": lambda members: torch.ones(members.batch_shape[1]),
    "variance": lambda members: members.pool(0).variance.squeeze(-1),
    "mutual information": lambda members: mutual_information(members, num_samples=500).value,
}


def learn(score, seed, rounds, n_rows=2000, step=20, **settings):
    """Held-out NLL of each fit. Rows are drawn for labels: the best ones are alike (Kirsch et al., 2023)."""
    generator = torch.Generator().manual_seed(seed)
    (x, y), held_out = simulate(n_rows, 0.9, generator), simulate(4000, 0.25, torch.Generator().manual_seed(10_000))
    labelled, nll = torch.randperm(n_rows, generator=generator) < 2 * step, []
    for _ in range(rounds):
        torch.manual_seed(seed)
        ensemble = DeepEnsemble(MixtureDensityNetwork(dim_in=1, dim_out=1), size=5)
        fit(ensemble, x[labelled], y[labelled], seed=seed, progress=False, **settings)
        with torch.no_grad():
            nll.append(-ensemble(held_out[0]).log_prob(held_out[1]).mean().item())
            chances = score(ensemble.members(x)).masked_fill(labelled, 0.0)
        labelled[torch.multinomial(chances, step, generator=generator)] = True
    return nll


def draw(labels, curves, path):
    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    looks = [{"ls": ":", "marker": "s", "mfc": "white"}, {"ls": "--", "marker": "^"}, {"ls": "-", "marker": "o"}]
    for (name, nll), look in zip(curves.items(), looks, strict=True):
        axis.errorbar(labels, nll.mean(0), nll.std(0, ddof=1) / len(nll) ** 0.5, capsize=2, label=name, **look)
    axis.set(xlabel="labels", ylabel="held-out NLL (nats)", title="Which rows to label next")
    axis.legend(frameon=False, title="chosen by")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rounds, seeds, epochs = (2, 2, 2) if args.smoke else (11, 6, 100)
    labels = 40 + 20 * np.arange(rounds)
    print(f"{'labels':<20}{'  '.join(f'{count:5d}' for count in labels)}")
    curves = {}
    for name, score in STRATEGIES.items():
        curves[name] = np.array([learn(score, seed, rounds, max_epochs=epochs) for seed in range(seeds)])
        print(f"{name:<20}{'  '.join(f'{nll:5.2f}' for nll in curves[name].mean(0))}")
    draw(labels, curves, args.out / "active_learning.png")
    goal = curves["random"].mean(0).min()
    needed = {k: next(iter(labels[nll.mean(0) <= goal]), "more") for k, nll in curves.items()}
    print(f"labels to reach NLL {goal:.2f}: {needed['mutual information']} instead of {needed['random']}")


if __name__ == "__main__":
    main()
