"""A Bayesian workflow
===================

Old Faithful, from prior predictive and calibration to a leave-one-out comparison. Each model is a network with latent
weights in its head, with Laplace's approximation of their posterior. At night durations were noted as short, medium or
long, coded 2, 3 and 4 min. Such targets are missing here; otherwise the model with the narrowest spike would win.
"""

import argparse
import warnings
from pathlib import Path

import torch
from geyser import NAMES, load_pairs
from matplotlib.figure import Figure
from pyro.infer import Predictive

from pyro_mdn import Diagonal, Full, MixtureDensityNetwork, bayesianize, fit, laplace, plots, scores, to_inference_data
from pyro_mdn.calibration import uniformity_p_value
from pyro_mdn.inference_data import compare, loo_pit
from pyro_mdn.posteriors.predictive import posterior_predictive

MODELS = {f"{type(noise).__name__}, K = {k}": (noise, k) for noise in (Diagonal(), Full()) for k in (1, 2, 5)}


def train(noise, n_components, x, y, draws, **settings):
    """Network, its posterior, and all of it for ArviZ."""
    torch.manual_seed(0)
    network = MixtureDensityNetwork(2, 2, n_components, hidden_dim=16, noise=noise)
    fit(network, x, y, seed=0, progress=False, **settings)
    prior = Predictive(bayesianize(network, layers="head").model, num_samples=100)(x)["y"]
    posterior = laplace(network, x, y, progress=False)
    given = {"posterior": posterior, "prior": prior, "num_samples": draws, "output_names": NAMES}
    return network, posterior, to_inference_data(network, x=x, y=y, **given, seed=0)


def draw(mixture, y, transforms, data, path):
    """What the prior and the posterior think of the outputs, and whether the latter is calibrated."""
    axes = (figure := Figure(figsize=(9, 7), layout="constrained")).subplots(2, 2)
    for axis, name, observed in zip(axes[0], NAMES, (t[~t.isnan()] for t in y.T), strict=True):
        span = [float(observed.mean() + side * 3 * observed.std()) for side in (-1, 1)]
        for group, color in [("prior_predictive", "0.8"), ("posterior_predictive", "#0072B2")]:
            drawn, label = data[group][name].values.ravel(), group.replace("_", " ")
            axis.hist(drawn, bins=60, range=span, density=True, color=color, alpha=0.7, label=label)
        axis.hist(observed, bins=30, density=True, histtype="step", color="black", label="observed")
        axis.set(xlabel=f"{name} (min)", ylabel="density")
    axes[0, 0].legend(frameon=False)
    plots.plot_pit(transforms, output_names=NAMES, ax=axes[1, 0])
    plots.plot_calibration(mixture, y, output_names=NAMES, ax=axes[1, 1])
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    settings, draws = ({"max_epochs": 2}, 60) if args.smoke else ({}, 1000)
    warnings.filterwarnings("ignore", "(loo|compare).*: expected Pareto's k")  # held-out rows decide
    (x, x_new), (y, y_new) = load_pairs()
    # The waiting before a coded duration was measured, so it counts. As an input, a code may stay: 4 means long.
    y, y_new = (torch.where(torch.isin(t, torch.tensor([2.0, 3.0, 4.0])), torch.nan, t) for t in (y, y_new))
    models = {name: train(*model, x, y, draws, **settings) for name, model in MODELS.items()}
    table = compare({name: data for name, (_, _, data) in models.items()})
    held_out = scores.compare({n: posterior_predictive(m, p, x_new, draws) for n, (m, p, _) in models.items()}, y_new)
    print(f"{'nats a row behind the best (se)':<20}{'leave-one-out':>20}{'held-out rows':>20}")
    for name, row in table.iterrows():
        behind, error, new = -row["elpd_diff"] / len(y), row["dse"] / len(y), held_out[name]
        print(f"{name:<31}{behind:12.3f} ({error:.3f}){new.behind:12.3f} ({new.behind_standard_error:.3f})")
    network, posterior, data = models[best := table.index[0]]
    mixture = posterior_predictive(network, posterior, x, draws)
    transforms = loo_pit(mixture, y).pit
    p_values = [round(uniformity_p_value(u[~u.isnan()]), 2) for u in transforms.T]
    print(f"{best} it is; p-values of its calibration: {p_values}")
    draw(mixture.pool(0), y, transforms, data, args.out / "arviz_workflow.png")
    data.to_netcdf(str(args.out / "arviz_workflow.nc"))


if __name__ == "__main__":
    main()
