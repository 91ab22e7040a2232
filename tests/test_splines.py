"""The target transform through quantiles: its spline, its fit to data of every shape, and what predictions say."""

import copy
import math
import sys

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.testing import assert_close

from pyro_mdn import (
    Chain,
    DeepEnsemble,
    DiagonalCovariance,
    Full,
    GaussianMixture,
    MixtureDensityNetwork,
    PerOutput,
    Quantile,
    Targets,
    bayesianize,
    fit,
    laplace,
    posterior_predictive,
    scores,
)
from pyro_mdn.distributions.units.splines.rational_quadratic import Piece
from pyro_mdn.sklearn import MDNRegressor

QUICK = {"max_epochs": 3, "progress": False, "seed": 0}


def drawn(name, size):
    rng = np.random.default_rng(0)
    return {
        "normal": lambda: rng.normal(size=size),
        "log-normal": lambda: rng.lognormal(size=size),
        "Cauchy": lambda: rng.standard_cauchy(size),
        "two modes": lambda: np.where(rng.random(size) < 0.5, -5, 5) + rng.normal(size=size),
        "zeros": lambda: np.where(rng.random(size) < 0.4, 0.0, rng.lognormal(size=size)),
        "counts": lambda: rng.poisson(2.0, size).astype(float),
        "two values": lambda: (np.arange(size) % 7 == 0).astype(float),
        "constant": lambda: np.full(size, 7.0),
        "far": lambda: 1e6 + rng.normal(size=size),
        "small": lambda: 1e-20 * rng.normal(size=size),
        "uniform": lambda: rng.random(size),
    }[name]()


SMOOTH = ["normal", "log-normal", "Cauchy", "uniform", "two modes"]
SHAPES = [*SMOOTH, "zeros", "counts", "two values", "constant", "far", "small"]


def fitted(y, transform=None, dtype=torch.float64):
    transform = Quantile() if transform is None else transform
    tensors = transform.fit_warp(torch.as_tensor(y, dtype=torch.float64).reshape(len(y), -1))
    return transform.warp({name: tensor.to(dtype) for name, tensor in tensors.items()})


@pytest.mark.parametrize("size", [1, 2, 3, 40, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_spline_increases_and_its_inverse_is_exact(name, size):
    y = torch.from_numpy(drawn(name, size)).unsqueeze(-1)
    warp = fitted(y)
    w = torch.linspace(-9, 9, 1001, dtype=torch.float64).unsqueeze(-1)
    points = warp.inverse(w)
    assert bool((points.diff(dim=0) > 0).all())
    offset = (warp.centre / warp.unit).abs().item()  # the digits that numbers far away have lost themselves
    assert_close(warp.forward(points), w, rtol=0, atol=1e-11 * (1 + offset))
    assert_close(warp.inverse(warp.forward(y)), y, rtol=1e-10, atol=1e-10 * warp.unit.item())
    assert_close(warp.log_slope(points), derivative(warp.forward, points).log(), rtol=1e-8, atol=1e-8)
    assert_close(-warp.log_slope(points), derivative(warp.inverse, w).log(), rtol=1e-7, atol=1e-7 * (1 + offset))


def derivative(function, at):
    at = at.detach().requires_grad_()
    return torch.autograd.grad(function(at).sum(), at)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_single_precision_and_extremes(name):
    y = torch.from_numpy(drawn(name, 1000)).unsqueeze(-1)
    exact, warp = fitted(y), fitted(y, dtype=torch.float32)
    inside = (exact.centre.abs() / exact.unit).item() < 1e3
    if inside:
        assert_close(warp.forward(y.float()).double(), exact.forward(y.float().double()), rtol=1e-3, atol=1e-3)
    far = torch.tensor([[-1e30], [1e30], [-math.inf], [math.inf], [math.nan]]).requires_grad_()
    image, slope = warp.forward(far), warp.log_slope(far)
    assert (image[:2].isfinite() | (image[:2].abs() > 1e30)).all()
    assert image[2:].flatten().tolist()[:2] == [-math.inf, math.inf]
    assert image[4].isnan()
    assert slope[:4].isfinite().all()
    assert warp.inverse(torch.tensor([[-math.inf], [math.inf]])).flatten().tolist() == [-math.inf, math.inf]
    w = torch.linspace(-40, 40, 801).unsqueeze(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(warp.log_slope(warp.inverse(w)).sum(), w)
    assert gradient.isfinite().all()


def test_a_piece_is_that_of_pyro():
    """On [-3, 3], where Pyro's spline has the same knots, of bins that are not too narrow for it."""
    torch.manual_seed(0)
    widths, heights = (torch.softmax(torch.randn(6).double(), -1) for _ in range(2))
    slopes = 0.3 + torch.rand(5).double()
    x = torch.linspace(-2.99, 2.99, 201, dtype=torch.float64)
    bins = [t.expand(201, -1) for t in (widths, heights, slopes)]
    least = dict.fromkeys(["min_bin_width", "min_bin_height", "min_derivative"], 0.0)
    spline = sys.modules["pyro.distributions.transforms.spline"]  # the package has a function of this name
    theirs, log_slope = spline._monotonic_rational_spline(x, *bins, bound=3.0, **least)
    starts, lows = (torch.cat([t.new_zeros(1), t.cumsum(0)]) * 6 - 3 for t in (widths, heights))
    every = torch.cat([slopes.new_ones(1), slopes, slopes.new_ones(1)])
    i = (torch.searchsorted(starts, x, right=True) - 1).clamp(0, 5)
    piece = Piece(*(t[i] for t in (starts, starts.diff(), lows, lows.diff(), every, every[1:])))
    assert_close(piece.value(x), theirs, rtol=1e-6, atol=1e-6)
    assert_close(piece.log_slope(x), log_slope, rtol=1e-5, atol=1e-5)


def test_derivatives():
    warp = fitted(drawn("log-normal", 500))
    y = torch.tensor([[0.03], [0.4], [1.7], [30.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[-4.0], [-0.7], [0.4], [3.3]], dtype=torch.float64, requires_grad=True)
    for function, value in ((warp.inverse, w), (warp.forward, y), (warp.log_slope, y)):
        assert torch.autograd.gradcheck(function, value, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, value, fast_mode=True)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("size", [200, 5000])
def test_targets_become_normal(name, size):
    """As close as the distance of an empirical distribution of so many numbers, and also numbers not fitted to."""
    values = drawn(name, 2 * size)
    warp = fitted(values[::2])
    for rows, level in ((values[::2], 1.0), (values[1::2], 2.0)):
        w = warp.forward(torch.from_numpy(rows).unsqueeze(-1)).flatten().numpy()
        gap = 0.06 if name == "two modes" else 0.0  # a gap between modes takes more than 25 knots
        assert scipy.stats.kstest(w, "norm").statistic < level * 1.2 / math.sqrt(size) + gap
        assert abs(w.std() - 1) < 3 * level / math.sqrt(size)


def test_knots_are_the_quantiles():
    y = drawn("log-normal", 20000)
    warp = fitted(y)
    levels = scipy.stats.norm.cdf(np.linspace(-3, 3, 25))
    expected = scipy.stats.mstats.mquantiles(y, levels, 0.5, 0.5)
    found = (warp.centre + warp.unit * warp.knots).flatten().numpy()
    assert_close(found, np.asarray(expected), rtol=1e-3, atol=0)


def test_equal_targets_have_the_middle_of_their_ranks():
    values = np.repeat([1.0, 2.0, 4.0], [30, 50, 20])
    w = fitted(values).forward(torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64))
    expected = torch.from_numpy(scipy.stats.norm.ppf([0.15, 0.55, 0.9])).unsqueeze(-1)
    assert_close(w, expected, rtol=0, atol=0.15)


def test_missing_targets_do_not_count():
    y = torch.from_numpy(np.stack([drawn("normal", 300), drawn("log-normal", 300)], 1))
    gaps = y.clone()
    gaps[::3, 0] = math.nan
    gaps[1::2, 1] = math.nan
    found = Quantile().fit_warp(gaps)
    for d, rows in ((0, y[torch.arange(300) % 3 != 0]), (1, y[::2])):
        own = Quantile().fit_warp(rows[:, [d]])
        assert_close({name: t[..., [d]] for name, t in found.items()}, own)


def mixture_of(y, locs, scales, weights=(0.3, 0.7)):
    transform = Quantile()
    units = transform.units(transform.fit(torch.as_tensor(y).reshape(-1, 1), common_unit=False))
    weights, locs, scales = (torch.tensor(values, dtype=torch.float64) for values in (weights, locs, scales))
    return units.push(
        GaussianMixture(weights.log(), locs.unsqueeze(-1), DiagonalCovariance(scales.unsqueeze(-1)))
    ), units


@pytest.mark.parametrize("name", ["log-normal", "two modes", "zeros", "uniform"])
def test_predictions_are_normal_ones_at_mapped_values(name):
    """Density, distribution function, quantiles and moments, by scipy and by quadrature between the knots."""
    y = drawn(name, 2000)
    mixture, units = mixture_of(y, [-0.5, 0.8], [0.3, 0.6])
    points = torch.linspace(y.min() - 1, y.max() + 1, 7, dtype=torch.float64).unsqueeze(-1)
    z = units.standardize(points).flatten().numpy()
    parts = [(0.3, -0.5, 0.3), (0.7, 0.8, 0.6)]
    cdf = sum(w * scipy.stats.norm.cdf(z, m, s) for w, m, s in parts)
    assert_close(mixture.cdf(points).flatten().numpy(), cdf, rtol=1e-9, atol=1e-12)
    assert_close(mixture.cdf(mixture.icdf(0.3)), torch.tensor([0.3]).double())
    scores_of_edges = torch.cat([torch.tensor([-12.0]), torch.linspace(-3, 3, 97), torch.tensor([12.0])]).double()
    edges = np.sort(np.append(units.from_line(scores_of_edges.unsqueeze(-1)).flatten().numpy(), y[3]))

    def integral(function):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        width = np.diff(edges)[:, None]
        at = edges[:-1, None] + 0.5 * width * (nodes + 1)
        values = function(torch.from_numpy(at.reshape(-1, 1))).reshape(at.shape).numpy()
        return (0.5 * width * values * weights).sum()

    density = lambda t: mixture.log_prob(t).exp()  # noqa: E731
    assert integral(density) == pytest.approx(1, abs=1e-6)
    mean = integral(lambda t: density(t) * t.flatten())
    assert mixture.mean.item() == pytest.approx(mean, rel=1e-5, abs=1e-5)
    variance = integral(lambda t: density(t) * (t.flatten() - mean) ** 2)
    assert mixture.variance.item() == pytest.approx(variance, rel=1e-4)
    score = integral(lambda t: (mixture.cdf(t).flatten() - (t.flatten() > y[3]).double()) ** 2)
    assert scores.crps(mixture, torch.tensor([y[3]]).double()).item() == pytest.approx(score, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize("name", ["quantile", "chain", "columns"])
def test_networks_with_quantiles(name, tmp_path):
    """Two correlated outputs: files, ensembles, conditionals, missing and censored targets, posteriors, sites."""
    transform = {"quantile": "quantile", "chain": Chain(["asinh", Quantile(9)]), "columns": ["quantile", "log"]}[name]
    torch.manual_seed(0)
    x = torch.randn(200, 1)
    y = torch.cat([(x + 0.5 * torch.randn(200, 1)).sinh(), (0.5 * x + torch.randn(200, 1)).exp()], 1)
    y[::5, 0] = math.nan
    network = MixtureDensityNetwork(1, 2, 2, 8, noise=Full(), target_transform=transform, seed=0)
    fit(network, x, y, **QUICK)
    mixture = network(x[:3])
    assert_close(
        mixture.marginal([0]).log_prob(y[1:4, [0]][:3]) + mixture.condition(y[1:4, [0]], [0]).log_prob(y[1:4, [1]]),
        mixture.log_prob(y[1:4]),
    )
    network.save(tmp_path / "network")
    loaded = MixtureDensityNetwork.load(tmp_path / "network")
    assert torch.equal(loaded.loss(x, y), network.loss(x, y))
    assert loaded.head.transform == network.head.transform
    ensemble = DeepEnsemble(network, 2, seed=0)
    fit(ensemble, x, y, **QUICK)
    for i in range(2):
        assert_close(ensemble.members(x)[i].log_prob(y), ensemble.member(i)(x).log_prob(y))
    assert ensemble(x).mean.isfinite().all()
    fit(network, x, Targets.censored(y.nan_to_num(0.5), right=torch.rand(200, 2) < 0.2), **QUICK)
    with pyro.plate("rows", 3):
        assert pyro.sample("y", network(x[:3])).shape == (3, 2)
    compiled = torch.compile(network.loss, backend="eager", fullgraph=True)
    assert_close(compiled(x[1:5], y[1:5]), network.loss(x[1:5], y[1:5]))
    bayesian = bayesianize(copy.deepcopy(network), layers="head")
    draws = posterior_predictive(bayesian, laplace(bayesian, x, y, progress=False), x[:3], num_samples=4)
    assert_close(draws.pool(0).cdf(draws.pool(0).icdf(0.3)), torch.full((3, 2), 0.3), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        sample = mixture.rsample((2000,))
    assert_close(mixture.cdf(sample).mean(0), torch.full((3, 2), 0.5), rtol=0, atol=4 * 0.29 / math.sqrt(2000))


def test_inputs_may_go_through_their_quantiles():
    torch.manual_seed(0)
    x = torch.randn(300, 2).exp()
    network = MixtureDensityNetwork(2, 1, 2, 4, input_transform="quantile")
    fit(network, x, torch.randn(300, 1), **QUICK)
    scaled = network.input_units.standardize(x)
    assert abs(scipy.stats.skew(scaled.numpy())).max() < 0.3 < abs(scipy.stats.skew(x.numpy())).min()
    assert network.x_knots.shape == (25, 2)
    ensemble = DeepEnsemble(network, 2, seed=0)
    fit(ensemble, x, torch.randn(300, 1), **QUICK)
    for i in range(2):
        assert_close(ensemble.members(x)[i].mean, ensemble.member(i)(x).mean)


def test_outputs_side_by_side_and_chains_have_all_kinks():
    y = torch.from_numpy(np.stack([drawn("two modes", 500), drawn("log-normal", 500)], 1))
    for transform, size in ((PerOutput([Quantile(5), "asinh"]), 17), (PerOutput([Quantile(5), Quantile(7)]), 25)):
        warp = fitted(y, transform)
        points = warp.kinks()
        assert points.shape == (size, 2)
        assert_close(points[:17, 0], torch.linspace(-3, 3, 17).double())
    chained = fitted(y[:, [1]], Chain([Quantile(5), Quantile(7)]))
    first, second = chained.parts
    expected = torch.cat([second.forward(first.kinks()), second.kinks()])
    assert_close(chained.kinks(), expected)


def test_the_estimator_of_scikit_learn_takes_the_name():
    x, y = drawn("normal", 200)[:, None], drawn("log-normal", 200)
    model = MDNRegressor(2, 4, max_epochs=2, random_state=0, target_transform="quantile", input_transform="quantile")
    lower, upper = model.fit(x, y).predict_interval(x)
    assert np.isfinite(model.predict(x)).all()
    assert (lower < upper).all()


@pytest.mark.parametrize("given", [2, 2.5, "many", None, True])
def test_numbers_of_knots_are_checked(given):
    with pytest.raises(ValueError, match="n_knots: expected an integer, 3 at least, got"):
        Quantile(n_knots=given)
