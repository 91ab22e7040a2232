"""Direction and speed of the wind
==================================

A sea breeze by day and a breeze from the land at night: two directions, of which one lies across north, where angles
jump from 360 to 0 degrees. Speed is positive, and depends on the direction. One network predicts both, with full
covariances of the angle and the logarithm of the speed; conditionals either way are exact.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from pyro_mdn import Angle, Full, MixtureDensityNetwork, fit, scores


def simulate(rng, n):
    """Direction in degrees and speed in m/s at an hour of the day."""
    hour = rng.uniform(0, 24, n)
    day = rng.random(n) < 1 / (1 + np.exp(-3 * np.sin(2 * np.pi * (hour - 8) / 24)))
    turn = 20 * rng.normal(size=n)
    direction = np.where(day, 200 + turn, 5 + 1.5 * turn) % 360
    speed = np.exp(np.where(day, 1.6 - 0.02 * turn, 0.7 + 0.01 * turn) + 0.2 * rng.normal(size=n))
    return np.stack([np.cos(2 * np.pi * hour / 24), np.sin(2 * np.pi * hour / 24)], 1), np.stack([direction, speed], 1)


def inputs(hour):
    """Inputs of one row."""
    return [[np.cos(2 * np.pi * hour / 24), np.sin(2 * np.pi * hour / 24)]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, wind = simulate(rng, 300 if args.smoke else 2000)
    transform = [Angle(360, low=0), "log"]
    network = MixtureDensityNetwork(2, 2, noise=Full(), target_transform=transform, seed=0)
    fit(network, x, wind, max_epochs=2 if args.smoke else None, seed=0, progress=False)

    x_test, wind_test = simulate(rng, 1000)
    prediction = network.predict(x_test)
    direction, speed = scores.crps(prediction.mixture, wind_test).mean(0).tolist()
    print(f"CRPS of held-out rows: {direction:.1f} degrees, {speed:.2f} m/s")
    print(f"log score of held-out rows: {scores.log_score(prediction.mixture, wind_test).mean():.2f} nats")
    low, high = network.predict(inputs(20)).mixture.marginal([0]).interval(0.8, kind="shortest")
    print(f"80 % of directions at 20:00 within an arc from {float(low):.0f} to {float(high):.0f} degrees")

    figure = plt.figure(figsize=(9, 4), layout="constrained")
    rose, given = figure.add_subplot(1, 2, 1, projection="polar"), figure.add_subplot(1, 2, 2)
    angles = torch.arange(0.0, 361.0)
    for hour, colour in ((2, "C0"), (8, "C1"), (14, "C2")):
        mixture = network.predict(inputs(hour)).mixture.marginal([0])
        rose.plot(torch.deg2rad(angles), mixture.log_prob(angles[:, None, None]).exp(), colour, label=f"{hour}:00")
    rose.set(theta_zero_location="N", theta_direction=-1, yticklabels=[], title="Where the wind comes from")
    rose.legend(loc="lower left", bbox_to_anchor=(-0.35, -0.1))
    at_noon = network.predict(inputs(12)).mixture
    speeds = torch.linspace(0.1, 12, 300)
    for degrees, colour in ((5, "C0"), (170, "C1"), (230, "C2")):
        mixture = at_noon.condition([[float(degrees)]], [0])
        given.plot(speeds, mixture.log_prob(speeds[:, None, None]).exp(), colour, label=f"from {degrees} degrees")
    given.set(xlabel="speed in m/s", ylabel="density", title="Speed at noon, given the direction")
    given.legend()
    figure.savefig(args.out / "wind.png")


if __name__ == "__main__":
    main()
