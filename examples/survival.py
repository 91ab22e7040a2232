"""Times to an event
=================

Some machines fail early, others wear out, and a study ends before most have failed: their times are right-censored. A
network of log-times learns from all rows, and predicts a survival curve, a median and its own calibration.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pyro_mdn import MixtureDensityNetwork, Targets, fit, scores


def simulate(rng, n):
    """Weibull times in two regimes, whose share and pace depend on the load x; follow-up ends at random."""
    x = rng.uniform(-1, 1, n)
    early = rng.random(n) < share_of_early(x)
    time = np.where(early, 3 * np.exp(-x) * rng.weibull(1.5, n), 20 * np.exp(-0.5 * x) * rng.weibull(4, n))
    end = rng.uniform(5, 30, n)
    return x[:, None], np.minimum(time, end)[:, None], (time <= end)[:, None]


def share_of_early(x):
    return 1 / (1 + np.exp(-2 * x))


def true_survival(x, t):
    early, late = np.exp(-((t / (3 * np.exp(-x))) ** 1.5)), np.exp(-((t / (20 * np.exp(-0.5 * x))) ** 4))
    return share_of_early(x) * early + (1 - share_of_early(x)) * late


def kaplan_meier(time, event):
    """Share that survives each time, of censored times (Kaplan & Meier, 1958)."""
    order = np.argsort(time)
    at_risk = np.arange(len(time), 0, -1)
    return time[order], np.cumprod(1 - event[order] / at_risk)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, time, event = simulate(rng, 300 if args.smoke else 2000)
    network = MixtureDensityNetwork(1, 1, target_transform="log", seed=0)
    targets = Targets.censored(time, right=~event)
    fit(network, x, targets, max_epochs=2 if args.smoke else None, seed=0, progress=False)

    x_test, time_test, event_test = simulate(rng, 1000)
    held_out = Targets.censored(time_test, right=~event_test)
    mixture = network.predict(x_test).mixture
    print(f"{1 - event.mean():.0%} of the training rows are censored")
    print(f"censored log score of held-out rows: {scores.log_score(mixture, held_out).mean():.3f} nats")
    print(f"median time at x = -1, 0, 1: {network.predict([[-1.0], [0.0], [1.0]]).quantiles(0.5).ravel().round(1)}")

    figure, (curves, calibration) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    t = np.linspace(0.01, 30, 300)
    for place, colour in ((-0.8, "C0"), (0.0, "C1"), (0.8, "C2")):
        survival = network.predict([[place]]).mixture.sf(t[:, None, None])[:, 0, 0]
        curves.plot(t, survival, colour, label=f"x = {place}")
        curves.plot(t, true_survival(place, t), colour, linestyle=":")
    curves.set(xlabel="time", ylabel="probability of no failure until then", title="Predicted, and true (dotted)")
    curves.legend()
    # Survival probabilities of the observed times are uniform, and censored where the times are.
    passed, share = kaplan_meier(mixture.cdf(time_test)[:, 0].numpy(), event_test[:, 0])
    calibration.step(passed, 1 - share, where="post", label="held-out rows")
    calibration.plot([0, 1], [0, 1], "k:", label="calibrated")
    calibration.set(xlabel="predicted probability of failure", ylabel="share that failed", title="Calibration")
    calibration.legend()
    figure.savefig(args.out / "survival.png")


if __name__ == "__main__":
    main()
