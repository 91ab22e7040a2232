"""Answers are the same on a GPU, if there is one, and whatever the default device.

Without a GPU the default device is one without numbers: a tensor that was made without a device shows at once.
"""

import contextlib

import pytest
import torch
from cases import DIM, NOISE, K, make_head, make_mixture
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    Full,
    GaussianMixture,
    LowRank,
    MixtureDensityNetwork,
    NegativeElbo,
    NegativeLogLikelihood,
    WeightedSum,
    bayesianize,
    fit,
    fit_mcmc,
    kl_variational_approximation,
    laplace,
    posterior_predictive,
    scores,
    to_inference_data,
    uncertainty,
)
from pyro_mdn.distributions.families.kernels import NormalKernel
from pyro_mdn.tensors.mixture_density import mixture_log_density

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
elsewhere = pytest.mark.parametrize("where", ["default", *["cuda"] * GPU])
every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


def device_of(where):
    return "cpu" if where == "default" else where


def default_device(where):
    return torch.device("meta") if where == "default" else contextlib.nullcontext()


def moved(mixture, device):
    covariance = mixture.covariance.map(lambda t, _: t.to(device))
    return GaussianMixture(mixture.logits.to(device), mixture.locs.to(device), covariance)


def parts(answer):
    """Tensors of an answer, in an order."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    if isinstance(answer, GaussianMixture):
        return [answer.logits, answer.locs, answer.covariance.matrix()]
    values = vars(answer).values() if hasattr(answer, "__dataclass_fields__") else answer
    return [part for value in values for part in parts(value)]


def gradients(mixture, y):
    """Of the log-density, and of the squares of its own gradient."""
    stored = [t.clone().requires_grad_() for t in (mixture.logits, mixture.locs, *mixture.covariance.tensors())]
    values = iter(stored[2:])
    same = GaussianMixture(*stored[:2], mixture.covariance.map(lambda t, _: next(values)))
    first = torch.autograd.grad(same.log_prob(y).sum(), stored, create_graph=True, materialize_grads=True)
    squares = sum(g.square().sum() for g in first)
    return *first, *torch.autograd.grad(squares, stored, materialize_grads=True)


def with_missing(y):
    y = y.clone()
    y[0, 1] = torch.nan
    return y


def _widths(lower, upper):
    """Of intervals that are as short as can be: their ends are less precise."""
    return [upper - lower]


MIXTURE_FUNCTIONS = {
    "log_prob": lambda m, y: m.log_prob(y),
    "log_prob, missing": lambda m, y: m.log_prob(with_missing(y)),
    "gradients": gradients,
    "responsibilities": lambda m, y: m.responsibilities(y),
    "moments": lambda m, y: [m.mean, m.variance, m.covariance_matrix, m.as_gaussian().matrix()],
    "cdf": lambda m, y: [m.cdf(y), m.sf(y)],
    "log_cdf": lambda m, y: [m.log_cdf(y), m.log_sf(y)],
    "icdf": lambda m, y: m.icdf(0.3),
    "interval": lambda m, y: [*m.interval(0.8), *_widths(*m.interval(0.8, kind="shortest"))],
    "rosenblatt": lambda m, y: [m.rosenblatt(y), m.inverse_rosenblatt(y.sigmoid())],
    "modes": lambda m, y: m.modes(),
    "entropy_bounds": lambda m, y: m.entropy_bounds(),
    "marginal": lambda m, y: m.marginal([2, 0]),
    "condition": lambda m, y: [m.condition(y[:, [1]], [1]), m.condition(y[:, [3, 0]], [3, 0])],
    "affine": lambda m, y: [m.affine(0.5, 2.0), m.affine(matrix=y[:2])],
    "temper": lambda m, y: m.temper(0.5),
    "pool": lambda m, y: m.pool(0),
    "product": lambda m, y: list(m.product(m)),
    "prune": lambda m, y: m.pool(0).prune(0.03),
    "reduce": lambda m, y: m.reduce(2),
    "split_variance": lambda m, y: list(m.split_variance(0)),
    "log_score": scores.log_score,
    "crps": scores.crps,
    "pinball": lambda m, y: scores.pinball(m, y, 0.2),
    "interval_score": lambda m, y: scores.interval_score(m, y, 0.9),
    "pit": scores.pit,
    "pit, in cells": lambda m, y: scores.pit(m, y, 1e-12),
    "mean_pit": lambda m, y: scores.mean_pit(m, y, 0.5),
    "interval_log_score": lambda m, y: scores.interval_log_score(m, y, 0.1),
    "dawid_sebastiani": scores.dawid_sebastiani,
    "kl_variational_approximation": lambda m, y: kl_variational_approximation(m, m.affine(0.1)),
    "aleatoric_variance": lambda m, y: uncertainty.aleatoric_variance(m),
    "mutual_information_bounds": lambda m, y: list(uncertainty.mutual_information_bounds(m)),
}


@elsewhere
@every_noise
def test_functions_of_mixtures(noise, where):
    mixture, y = make_mixture(noise), torch.randn(5, DIM, dtype=torch.float64)
    device = device_of(where)
    there = moved(mixture, device), y.to(device)
    for name, function in MIXTURE_FUNCTIONS.items():
        expected = parts(function(mixture, y))
        with default_device(where):
            got = parts(function(*there))
        for a, b in zip(got, expected, strict=True):
            assert a.device.type == device, name
            assert_close(a.cpu(), b, rtol=1e-8, atol=1e-8, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


DRAWS = {
    "sample": lambda m, y: m.sample((3,)),
    "rsample": lambda m, y: m.rsample((3,)),
    "energy_score": lambda m, y: scores.energy_score(m, y, num_samples=20).value,
    "highest_density": lambda m, y: m.highest_density_threshold(0.5, num_samples=20),
    "mutual_information": lambda m, y: uncertainty.mutual_information(m, num_samples=20).value,
}


@elsewhere
@every_noise
def test_draws_of_mixtures(noise, where):
    device = device_of(where)
    mixture, y = moved(make_mixture(noise), device), torch.randn(5, DIM, dtype=torch.float64, device=device)
    for name, function in DRAWS.items():
        with default_device(where):
            (got,) = parts(function(mixture, y))
        assert got.device.type == device, name
        assert got.isfinite().all(), name


@elsewhere
@every_noise
def test_heads(noise, where):
    head, y = make_head(noise), torch.randn(7, DIM, dtype=torch.float64)
    features = torch.randn(7, 6, dtype=torch.float64)
    device = device_of(where)

    def answers(head, features, y):
        features = features.clone().requires_grad_()
        log_prob = head.log_prob(features, y)
        first = torch.autograd.grad(log_prob.sum(), [*head.parameters(), features], create_graph=True)
        squares = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(squares, [*head.parameters(), features], materialize_grads=True)
        return [log_prob, head.log_prob(features, with_missing(y)), *first, *second]

    expected = answers(head, features, y)
    arguments = head.to(device), features.to(device), y.to(device)
    with default_device(where):
        got = answers(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert_close(a.cpu(), b, rtol=1e-8, atol=1e-8)


def no_latents(x, y=None, num_data=None):
    """A guide without latent variables."""


OBJECTIVES = {
    "likelihood": NegativeLogLikelihood,
    "cells": lambda n: NegativeLogLikelihood(n, cell=torch.tensor([0.1, 0.0])),
    "crps": ContinuousRankedProbability,
    "sum": lambda n: WeightedSum([NegativeLogLikelihood(n), ContinuousRankedProbability(n)], [1.0, 2.0]),
    "elbo": lambda n: NegativeElbo(n, AutoNormal(bayesianize(n).model), 5),
    "elbo, two particles": lambda n: NegativeElbo(n, AutoNormal(bayesianize(n).model), 5, num_particles=2),
    "elbo, no latents": lambda n: NegativeElbo(n, no_latents, 5),
    "elbo, no latents, two particles": lambda n: NegativeElbo(n, no_latents, 5, num_particles=2),
}


@elsewhere
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(objective, where):
    device = device_of(where)
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    objective = objective(MixtureDensityNetwork(3, 2, 2, hidden_dim=4).to(device)).to(device)
    expected = objective.eval()(x, y)  # also sets guides up
    objective.to(device).train()
    with default_device(where):
        losses = objective(x, y)
    assert losses.device.type == expected.device.type == device
    assert losses.shape == expected.shape == (5,)
    losses.mean().backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in objective.parameters())


# Training


def data(where, rows=300, dim_out=1):
    x = torch.linspace(-1, 1, rows, device=device_of(where)).unsqueeze(-1)
    noise = 0.1 * torch.randn(rows, dim_out, device=x.device)
    return x, torch.sin(3 * x) * torch.randn(dim_out, device=x.device).sign() + noise


def small_network(where, n_components=3):
    return MixtureDensityNetwork(1, 1, n_components=n_components, hidden_dim=16).to(device_of(where))


quick = {"seed": 0, "progress": False}
FITS = {
    "defaults": {},
    "compiled": {"compile": True},
    "autocast": {"autocast": torch.bfloat16},
    "crps": {"objective": ContinuousRankedProbability},
    "noise, refit": {"batch_size": 64, "target_noise": 0.1, "validation": 0.2, "refit": True},
}


@elsewhere
@pytest.mark.parametrize("source", ["numpy", "cpu", *["cuda"] * GPU])
@pytest.mark.parametrize("settings", FITS.values(), ids=FITS)
def test_fit(settings, source, where):
    torch.manual_seed(0)
    if where == "default" and "compile" in settings:
        pytest.skip("the compiler takes devices without numbers for what they are")
    x, y = data("cuda" if source == "cuda" else "default")
    x, y = (x.numpy(), y.numpy()) if source == "numpy" else (x, y)
    network = small_network("default")
    if "objective" in settings:
        settings = settings | {"objective": settings["objective"](network)}
    with default_device(where):
        result = fit(network, x, y, max_epochs=60, device=device_of(where), **quick, **settings)
    assert next(network.parameters()).device.type == device_of(where)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]


@elsewhere
def test_targets_on_a_grid_and_gaps(where):
    x, y = data(where, dim_out=2)
    y[:, 0] = (5 * y[:, 0]).round() / 5
    y[::3, 1] = torch.nan
    network = MixtureDensityNetwork(1, 2, n_components=2, hidden_dim=16).to(device_of(where))
    with default_device(where):
        result = fit(network, x, y, sample_weight=torch.rand(300, device=x.device), max_epochs=20, **quick)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@elsewhere
def test_full_covariances_learn(where):
    torch.manual_seed(0)
    x, y = data(where, dim_out=3)
    network = MixtureDensityNetwork(1, 3, n_components=3, hidden_dim=16, noise=Full()).to(device_of(where))
    with default_device(where):
        fit(network, x, y, max_epochs=200, **quick)
    assert network.loss(x, y).mean() < -1.5  # of the noise: 3 (log 0.1 + 1.42) = -2.65


@elsewhere
def test_resumed_training_is_the_same(where, tmp_path):
    x, y = data(where)

    def network():
        torch.manual_seed(1)
        return small_network(where)

    def interrupt(result):
        if len(result.history) == 4:
            raise KeyboardInterrupt

    settings = {"max_epochs": 8, "batch_size": 64, **quick}
    checkpoints = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    whole, stopped, parted = network(), network(), network()
    with default_device(where):
        fit(whole, x, y, **settings)
        assert fit(stopped, x, y, callbacks=[interrupt], **settings, **checkpoints).interrupted
        fit(parted, x, y, resume=True, **settings, **checkpoints)
    for a, b in zip(whole.state_dict().values(), parted.state_dict().values(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


@elsewhere
def test_ensemble(where):
    torch.manual_seed(0)
    x, y = data(where)
    ensemble = DeepEnsemble(small_network(where), 4)
    with default_device(where):
        fit(ensemble, x, y, max_epochs=150, **quick)
        mixture = ensemble(x)
    assert mixture.locs.device == x.device
    assert mixture.log_prob(y).mean() > 0.3


@elsewhere
@pytest.mark.filterwarnings("ignore::pyro_mdn.ConvergenceWarning")
@pytest.mark.parametrize("method", ["laplace", "svi", "mcmc"])
def test_bayesian_weights(method, where):
    torch.manual_seed(0)
    x, y = data(where, 60)
    network = small_network(where, 2)
    fit(network, x, y, max_epochs=60, **quick)
    bayesianize(network, layers="head.linear.bias")
    guide = AutoNormal(network.model)
    guide(x, y)
    with default_device(where):
        if method == "laplace":
            guide = laplace(network, x, y, progress=False)
        elif method == "svi":
            fit(network, x, y, guide=guide, num_particles=2, max_epochs=20, **quick)
        else:
            guide = fit_mcmc(network, x, y, num_samples=20, warmup_steps=10, num_chains=2, **quick)
        predictive = posterior_predictive(network, guide, x, num_samples=10)
    assert predictive.locs.device == x.device
    assert predictive.batch_shape == (10, 60)
    assert predictive.pool(0).log_prob(y).mean() > -0.5


@elsewhere
def test_arviz_and_figures(where):
    pytest.importorskip("arviz")
    from pyro_mdn import plots

    x, y = data(where, 40)
    network = small_network(where, 2)
    network.initialize_(x, y)
    with default_device(where):
        inference_data = to_inference_data(network, x=x, y=y, num_samples=5)
        plots.plot_conditional_density(network(x), x, y)
        plots.plot_calibration(network(x), y)
        plots.plot_predictive_intervals(network(x), x, y)
    assert inference_data.posterior_predictive["y"].shape == (1, 5, 40)


# On a GPU alone


@on_gpu
@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(2), Full(tied=True)], ids=repr)
@pytest.mark.parametrize("dim", [6, 12])
@pytest.mark.parametrize("rows", [64, 5000])
def test_single_precision(noise, dim, rows):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(3, dim, 4, hidden_dim=16, noise=noise)
    x, y = torch.randn(rows, 3), torch.randn(rows, dim)
    exact = [t.double() for t in _loss_and_gradients(network.double(), x.double(), y.double())]
    got = _loss_and_gradients(network.float().cuda(), x.cuda(), y.cuda())
    for a, b in zip(got, exact, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-5 * max(1.0, b.abs().max())


def _loss_and_gradients(network, x, y):
    loss = network.loss(x, y)
    return [loss, *torch.autograd.grad(loss.mean(), list(network.parameters()))]


@on_gpu
@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(2)], ids=repr)
def test_compiled_density(noise):
    head = make_head(noise, n_components=K).cuda()
    features, y = torch.randn(50, 6).double().cuda(), torch.randn(50, DIM).double().cuda()
    compiled = torch.compile(head.log_prob, fullgraph=True)
    got, expected = compiled(features, y), head.log_prob(features, y)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)
    parameters = list(head.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(2)], ids=repr)
def test_autocast(noise, dtype):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(3, 6, 4, hidden_dim=16, noise=noise).cuda()
    x, y = torch.randn(100, 3).cuda(), torch.randn(100, 6).cuda()
    expected = network.loss(x, y)
    with torch.autocast("cuda", dtype):
        loss = network.loss(x, y)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.05, atol=0.1)
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@on_gpu
def test_transforms():
    noise = Full()
    mixture, y = moved(make_mixture(noise), "cuda"), torch.randn(5, DIM).double().cuda()
    logits, locs, covariance = mixture.logits, mixture.locs, mixture.covariance

    def row(logits, locs, diagonal, lower, y):
        return mixture_log_density(NormalKernel(covariance.whitening), logits, locs, y, diagonal, lower)

    got = torch.func.vmap(row)(logits, locs, covariance.diagonal, covariance.lower, y)
    assert_close(got, mixture.log_prob(y))


@on_gpu
def test_files(tmp_path):
    x, y = data("cuda")
    network = small_network("cuda")
    network.initialize_(x, y)
    network.save(tmp_path / "network")
    loaded = MixtureDensityNetwork.load(tmp_path / "network")
    assert not next(loaded.parameters()).is_cuda
    assert_close(loaded(x.cpu()).log_prob(y.cpu()), network(x).log_prob(y).cpu(), rtol=1e-4, atol=1e-4)


@on_gpu
def test_devices_that_do_not_agree():
    network = MixtureDensityNetwork(1, 1, n_components=3).cuda()
    with pytest.raises(ValueError, match="x: expected device cuda:0, got cpu"):
        network(torch.zeros(3, 1))


@on_gpu
def test_sklearn():
    pytest.importorskip("sklearn")
    from pyro_mdn.sklearn import MDNRegressor

    x, y = data("cuda")
    regressor = MDNRegressor(max_epochs=30, device="cuda").fit(x.cpu().numpy(), y.cpu().numpy()[:, 0])
    assert regressor.score(x.cpu().numpy(), y.cpu().numpy()[:, 0]) > 0.5


@on_gpu
def test_backbone_of_convolutions():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(8))
    x = torch.randn(100, 1, 8, 8)
    backbone(x)
    network = MixtureDensityNetwork((1, 8, 8), 2, n_components=2, hidden_dim=8, backbone=backbone)
    fit(network, x, torch.randn(100, 2), max_epochs=3, device="cuda", seed=0, progress=False)
    assert next(network.parameters()).is_cuda
