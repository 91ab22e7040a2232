"""How does the cost of a log-density and its gradients grow with rows, components and outputs?

Exponents are slopes of log time over log size, by least squares over the larger sizes, where overhead no longer counts.

    python benchmarks/scaling.py
"""

import argparse
import statistics
from pathlib import Path

import log_prob
import numpy as np
from timing import RESULTS, SMOKE, machine, race, write

SIZES = {
    "N": [100, 300, 1000, 3000, 10_000, 30_000, 100_000],
    "K": [1, 3, 10, 30, 100, 300, 1000],
    "D": [1, 2, 4, 8, 16, 32, 64, 128],
}
BASE = {"N": 1000, "K": 5, "D": 3}
# Where the kernels work on 10⁵ numbers at least.
LARGE = {("diagonal", "N"): 10_000, ("diagonal", "K"): 30, ("diagonal", "D"): 16}
LARGE |= {("full", "N"): 3000, ("full", "K"): 30, ("full", "D"): 16}
IDEAL = {("diagonal", "D"): 1, ("full", "D"): 2}


def cases(kind, axis, *, smoke):
    sizes = SIZES[axis][:2] if smoke else SIZES[axis]
    return [(kind, *(size if name == axis else BASE[name] for name in "NKD")) for size in sizes]


def measure(*, smoke):
    curves = []
    settings = SMOKE if smoke else {"rounds": 9, "block": 0.05}
    for kind in ("full",) if smoke else ("diagonal", "full"):
        for axis in "N" if smoke else SIZES:
            races = race({"kernel": log_prob.kernel}, cases(kind, axis, smoke=smoke), **settings)
            seconds = [statistics.median(times["kernel"]) for times in races.values()]
            curve = {"kind": kind, "axis": axis, "sizes": SIZES[axis][: len(seconds)], "seconds": seconds}
            curves.append(curve | {"exponent": exponent(curve)})
    return curves


def exponent(curve):
    large = LARGE[curve["kind"], curve["axis"]]
    points = [(s, t) for s, t in zip(curve["sizes"], curve["seconds"], strict=True) if s >= large] or None
    if points is None:
        return None
    sizes, seconds = np.log(points).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def table(curves):
    """Markdown: fitted exponents and those of the arithmetic."""
    lines = ["| covariance | grows with | from | exponent | of the arithmetic |", "|---|---|---|---|---|"]
    for curve in curves:
        key = curve["kind"], curve["axis"]
        found = "" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
        lines.append(f"| {key[0]} | {key[1]} | {LARGE[key]} | {found} | {IDEAL.get(key, 1)} |")
    return "\n".join(lines)


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, ax in zip(SIZES, axes, strict=True):
        for curve in (c for c in curves if c["axis"] == axis):
            label = f"{curve['kind']}: {curve['exponent']:.2f}"
            ax.loglog(curve["sizes"], [1e3 * s for s in curve["seconds"]], "o-", label=label)
        others = ", ".join(f"{name} = {BASE[name]}" for name in "NKD" if name != axis)
        ax.set(xlabel=axis, title=others)
        ax.legend(title="fitted exponent")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("log-density and gradients (ms)")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling", help="name of the results, or a path")
    parser.add_argument("--figure", type=Path, help="draw the results of an earlier run into this file, and stop")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    if args.figure:
        import json

        draw(json.loads((RESULTS / "scaling.json").read_text())["rows"], args.figure)
        return
    rows = measure(smoke=args.smoke)
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
