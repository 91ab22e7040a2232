"""Conditioning
============

The joint density of the next waiting and duration of Old Faithful, then the duration given the waiting.

More information does not always give a better score on 60 rows. The waiting adds little to what the last eruption says
about the duration: a small gain on most rows, which a few rows outweigh, above all one between the two modes. Its
3.0 min are a code for "medium", noted at night; exactly 2 and 4 min are codes for "short" and "long".
The example prints the paired difference and its standard error. They are about equal: no evidence either way.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from pyro_mdn import Full, MixtureDensityNetwork, fit
from pyro_mdn.scores import coverage, crps, interval_score, log_score

DATA = Path(__file__).parent / "data" / "geyser.csv"
WAITING, DURATION = 0, 1


def load_pairs():
    """Give (waiting, duration) of each eruption and of the next: 238 pairs to train on, then 60 held out."""
    eruptions = torch.tensor(np.loadtxt(DATA, delimiter=",", skiprows=1)).float()
    return eruptions[:-1].split([238, 60]), eruptions[1:].split([238, 60])


def report(name, mixture, duration):
    """Print scores of a predictive distribution of the duration."""
    cells = [log_score(mixture, duration), crps(mixture, duration), interval_score(mixture, duration, 0.9)]
    cells += [coverage(mixture, duration, mass) for mass in (0.5, 0.9)]
    cells += [coverage(mixture, duration, 0.9, kind="shortest")]
    print(f"{name:<34}" + "".join(f"{cell.mean().item():10.2f}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    settings = {"max_epochs": 3} if parser.parse_args().smoke else {}
    x, y = load_pairs()
    torch.manual_seed(0)
    network = MixtureDensityNetwork(dim_in=2, dim_out=2, noise=Full())
    fit(network, x[0], y[0], seed=0, progress=False, **settings)

    with torch.no_grad():
        joint = network(x[1])
        waiting, duration = y[1][:, [WAITING]], y[1][:, [DURATION]]
        header = ["NLL", "CRPS", "Winkler", "in 50 %", "in 90 %", "shortest"]
        print(f"{'duration (min), 60 held out':<34}" + "".join(f"{title:>10}" for title in header))
        before, given = joint.marginal(DURATION), joint.condition(waiting, WAITING)
        report("before the waiting is known", before, duration)
        report("given the waiting", given, duration)
        missing = waiting.masked_fill(torch.arange(60).unsqueeze(-1) % 2 == 0, torch.nan)
        report("given the waiting, half not seen", joint.condition(missing, WAITING), duration)

        change = log_score(given, duration) - log_score(before, duration)
        error, row = change.std() / len(change) ** 0.5, int(change.argmax())
        print(
            f"\nchange of the NLL by the waiting: {change.mean():+.2f} (standard error {error:.2f}); median row "
            f"{change.median():+.2f}; the row that lasted {duration[row].item():.1f} min {change[row].item():+.2f}"
        )

        print("\nafter an eruption of 4.5 minutes, once the waiting was …")
        single = network(torch.tensor([[75.0, 4.5]]).expand(4, 2))
        seen = torch.tensor([[65.0], [75.0], [85.0], [95.0]])
        given = single.condition(seen, WAITING)
        lower, upper = given.interval(0.9)
        for i, minutes in enumerate(seen.flatten()):
            short = given.cdf(torch.tensor([3.0]))[i].item()
            print(f"{minutes:4.0f} min: 90 % of durations in [{lower[i].item():.1f}, {upper[i].item():.1f}] min, "
                  f"shorter than 3 min with probability {short:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
