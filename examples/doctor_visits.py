"""Counts with many zeros
=========================

Visits to a doctor in two weeks (Cameron & Trivedi, 1986): four people in five had none. Networks predict
probabilities of 0, 1, 2, ... by three families of counts, and held-out scores compare these with each other, and with
normal components.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pyro_mdn import MixtureDensityNetwork, Targets, ZeroInflated, decisions, fit, scores

DATA = Path(__file__).parents[1] / "benchmarks" / "data" / "counts" / "doctor_visits.npz"


def load():
    """Inputs and visits, with every fourth row held out."""
    with np.load(DATA) as arrays:
        x, visits = arrays["x"], arrays["y"][:, None]
    held_out = np.arange(len(x)) % 4 == 0
    return x[~held_out], visits[~held_out], x[held_out], visits[held_out]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    x, visits, x_test, visits_test = load()
    if args.smoke:
        x, visits = x[:300], visits[:300]
    settings = {"seed": 0, "progress": False} | ({"max_epochs": 2, "few_rows": False} if args.smoke else {})
    families = {"negative binomial": "negative_binomial", "zero-inflated": ZeroInflated("negative_binomial")}
    families["Poisson"] = "poisson"
    mixtures = {}
    for name, family in families.items():
        network = MixtureDensityNetwork(x.shape[1], 1, family=family, seed=0)
        fit(network, x, visits, **settings)
        mixtures[name] = network.predict(x_test).mixture
        print(f"{name}: log score {scores.log_score(mixtures[name], visits_test).mean():.4f} nats")
    # A density has a comparable score only as a probability: that between k - 1/2 and k + 1/2.
    density = MixtureDensityNetwork(x.shape[1], 1, seed=0)
    fit(density, x, Targets.cells(visits, 1.0), **settings)
    score = scores.log_score(density.predict(x_test).mixture, Targets.cells(visits_test, 1.0))
    print(f"normal components: log score {score.mean():.4f} nats")
    mixture = mixtures["negative binomial"]
    often = decisions.probability_between(mixture, 3, np.inf)[:, 0]
    print(f"three visits or more: {(visits_test >= 3).mean():.1%} observed, {often.mean():.1%} predicted")

    figure, (total, calibration) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    counts = np.arange(8)
    total.bar(counts, [(visits_test == k).sum() for k in counts], color="0.8", label="observed")
    for (name, prediction), marker in zip(mixtures.items(), "o+x", strict=True):
        probability = prediction.log_prob(counts[:, None, None].astype(np.float32)).exp()
        total.plot(counts, probability.sum(1), marker, label=name)
    total.set(yscale="log", xlabel="visits", ylabel="people", title="Held-out rows")
    total.legend()
    # Distribution functions are steps: transforms are drawn between the two sides of a step.
    pit = scores.pit(mixture, visits_test)[:, 0]
    calibration.hist(pit, 20, density=True, color="0.8")
    calibration.axhline(1, color="k", linestyle=":")
    calibration.set(xlabel="probability integral transform", ylabel="density", title="Calibration")
    figure.savefig(args.out / "doctor_visits.png")


if __name__ == "__main__":
    main()
