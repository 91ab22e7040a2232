"""Laplace's approximation: exact where the posterior is normal, positive definite everywhere else."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import NOISE, Held, linear_regression
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn
from torch.testing import assert_close

from pyro_mdn import Diagonal, Full, LowRank, MixtureDensityNetwork, bayesianize, laplace, posterior_predictive
from pyro_mdn.posteriors.laplace import mode_and_scale, prior_precision
from pyro_mdn.posteriors.log_joint import LogJoint, log_joint_of_model, rows_of, undisturbed
from pyro_mdn.posteriors.predictive import draw_weights
from pyro_mdn.posteriors.priors import starting_weights


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.GRU(1, width, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0][:, -1]


class Steps(nn.Module):
    """Features at each step of a sequence."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(2, width)

    def forward(self, x):
        return self.layer(x).tanh()


def make(dim_out=1, rows=30, layers="all", **settings):
    torch.manual_seed(0)
    settings = {"n_components": 5, "hidden_dim": 4, **settings}
    network = MixtureDensityNetwork(3, dim_out, **settings).double()
    x, y = torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, dim_out, dtype=torch.float64)
    network.initialize_(x, y)
    return bayesianize(network, layers=layers), x, y


def joint_of(network, x, y):
    with undisturbed(network):
        return LogJoint(network, rows_of(network, x, y))


def precision_of(guide):
    return torch.linalg.inv(guide.get_posterior().covariance_matrix.detach())


def moments(guide):
    """Mean and covariance."""
    posterior = guide.get_posterior()
    return posterior.mean.detach(), posterior.covariance_matrix.detach()


# Exact


@pytest.mark.parametrize("dim_out", [1, 2])
def test_linear_regression_is_exact(dim_out):
    network, x, y, mean, covariance = linear_regression(dim_out)
    guide = laplace(network, x, y, progress=False)
    got_mean, got_covariance = moments(guide)
    assert_close(got_mean, mean, rtol=0, atol=1e-6)
    assert_close(got_covariance, covariance, rtol=0, atol=1e-9)
    median = guide.median()
    assert_close(median["head.linear.bias"], mean[: 1 + dim_out], rtol=0, atol=1e-6)
    assert_close(median["head.linear.weight"].flatten(), mean[1 + dim_out :], rtol=0, atol=1e-6)


def test_linear_regression_with_missing_targets():
    network, x, y, _, _ = linear_regression(2, rows=60)
    y[:20, 0] = math.nan
    y[15:30, 1] = math.nan  # some rows have none at all
    mean, covariance = moments(laplace(network, x, y, progress=False))
    features = torch.cat([torch.ones(60, 1), (x - network.x_shift) / network.x_scale], -1)
    prior = torch.tensor([1.0, 3.0, 3.0, 3.0]).double().diag() / 1.5**2
    for output in (0, 1):
        kept = ~y[:, output].isnan()
        precision = (network.head.scale / 0.3).square() * features[kept].T @ features[kept] + prior
        right = features[kept].T @ (y[kept, output] - network.head.shift[output]) * network.head.scale / 0.3**2
        which = [1 + output, *range(3 + 3 * (1 + output), 6 + 3 * (1 + output))]
        assert_close(mean[which], torch.linalg.solve(precision, right), rtol=0, atol=1e-6)
        assert_close(covariance[which][:, which], precision.inverse(), rtol=0, atol=1e-9)


def test_joint_is_that_of_the_model():
    for layers in ("all", "head", ["backbone.2", "head.linear.bias"]):
        network, x, y = make(2, layers=layers, noise=Full())
        y[3, 0] = y[5, 1] = math.nan
        joint = joint_of(network, x, y)
        with undisturbed(network):
            weights = joint.unflatten(joint.flatten(joint.start) + 0.1)
            model = log_joint_of_model(network, rows_of(network, x, y), weights)
            assert_close(joint(weights), model)
            value, gradient = joint.value_and_gradient(joint.flatten(weights))
            vector = joint.flatten(weights).requires_grad_()
            (expected,) = torch.autograd.grad(joint(joint.unflatten(vector)), vector)
        assert_close(value, model.item())
        assert_close(gradient, expected)


def test_curvature_is_the_hessian_where_that_is_convex():
    """One component, homoscedastic noise that is not latent: the loss is convex in the raw outputs of the head."""
    network, x, y = make(
        2, n_components=1, noise=Full(homoscedastic=True), layers=["head.linear.weight", "head.linear.bias"]
    )
    guide = laplace(network, x, y, progress=False)
    joint = joint_of(network, x, y)
    with undisturbed(network):
        loss = lambda vector: -joint(joint.unflatten(vector))  # noqa: E731
        hessian = torch.autograd.functional.hessian(loss, guide.loc.detach())
    assert_close(precision_of(guide), hessian, rtol=1e-7, atol=1e-7)


def test_curvature_by_brute_force():
    """Row by row, from Jacobians and Hessians of the model by torch.autograd.functional."""
    network, x, y = make(rows=8, n_components=2, hidden_dim=3)
    guide = laplace(network, x, y, max_iter=0, progress=False)
    joint, head = joint_of(network, x, y), network.head
    vector = guide.loc.detach()
    expected = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    with undisturbed(network):
        for row in range(len(x)):

            def outputs(vector, row=row):
                return torch.cat([part.flatten() for part in joint.raw(joint.unflatten(vector), x[row : row + 1])])

            def loss(raw, row=row):
                parts = raw[None, :2], raw[None, 2:4, None], raw[None, 4:, None]
                return -head.log_density(parts, y[row : row + 1], head.units).sum()

            jacobian = torch.autograd.functional.jacobian(outputs, vector)
            values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, outputs(vector)))
            assert values.min() < 0  # clipping matters
            expected += jacobian.T @ (vectors * values.clamp(min=0)) @ vectors.T @ jacobian
        for_prior = lambda vector: -joint.log_prior(joint.unflatten(vector))  # noqa: E731
        expected += torch.autograd.functional.hessian(for_prior, vector)
    assert_close(precision_of(guide), expected, rtol=1e-7, atol=1e-7)


def test_head_alone_is_a_block_of_all():
    network, x, y = make()
    other, _, _ = make(layers="head")
    whole, part = joint_of(network, x, y), joint_of(other, x, y)
    assert part.in_head
    assert not whole.in_head
    size = part.num_weights
    assert list(whole.start)[-2:] == list(part.start)
    everything = precision_of(laplace(network, x, y, max_iter=0, progress=False))
    assert_close(precision_of(laplace(other, x, y, max_iter=0, progress=False)), everything[-size:, -size:])


# Everywhere


@pytest.mark.parametrize("dim_out", [1, 2])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_positive_definite_and_not_below_the_prior(noise, dim_out):
    noise = LowRank(1, tied=noise.tied, homoscedastic=noise.homoscedastic) if isinstance(noise, LowRank) else noise
    network, x, y = make(dim_out, noise=noise, layers="head")
    guide = laplace(network, x, y, max_iter=20, progress=False)
    variance = moments(guide)[1].diagonal()
    prior = torch.cat([site["fn"].variance.flatten() for _, site in guide.prototype_trace.iter_stochastic_nodes()])
    assert bool((variance > 0).all())
    assert bool((variance <= prior * (1 + 1e-9)).all())
    assert torch.linalg.eigvalsh(precision_of(guide)).min() > 0


def test_mode_is_no_worse_than_the_start_and_stationary():
    network, x, y = make()
    joint = joint_of(network, x, y)
    with undisturbed(network):
        start, _ = joint.value_and_gradient(joint.flatten(joint.start))
        for max_iter in (1, 3, 2000):
            mode, _ = mode_and_scale(joint, max_iter, progress=False)
            value, gradient = joint.value_and_gradient(mode)
            assert value > start
            start = value
    assert gradient.abs().max() < 1e-2
    guide = laplace(network, x, y, max_iter=0, progress=False)
    assert_close(guide.median(), starting_weights(network))


def test_chunks_give_the_same(monkeypatch):
    network, x, y = make(2)
    y[0, 0] = math.nan
    with undisturbed(network):
        expected = mode_and_scale(joint_of(network, x, y), 3, progress=False)
        monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", 30_000)
        in_parts = joint_of(network, x, y)
        assert in_parts.size < len(x)
        assert_close(mode_and_scale(in_parts, 3, progress=False, block=7), expected)


@pytest.mark.parametrize("layers", ["backbone.0", "head.linear.bias"])
def test_memory_of_images(layers):
    layer = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(16 * 20**2, 2))
    network = bayesianize(MixtureDensityNetwork((1, 20, 20), 1, 1, 2, backbone=layer), layers=layers)
    x, y = torch.randn(800, 1, 20, 20), torch.randn(800, 1)
    with Held() as held:
        laplace(network, x, y, max_iter=1, progress=False)
    assert held.peak < 64 * 2**20


def test_outputs_without_curvature_are_left_out():
    """Of components that no row belongs to, all that is known is the prior; and it is in the precision of all."""
    network, x, y = make(layers="head.linear.bias", n_components=4)
    network.head.linear.bias_start[:4] = torch.tensor([0.0, 0.0, -90.0, -90.0])
    joint, precision = joint_of(network, x, y), precision_of(laplace(network, x, y, max_iter=0, progress=False))
    unused = [2, 3, 6, 7, 10, 11]
    assert_close(precision[unused][:, unused], torch.eye(6).double(), rtol=0, atol=1e-6)
    assert joint.num_weights == 12


def test_priors_that_are_not_normal():
    """Of a Laplace prior the second derivative is 0: its own precision stands in. A joint normal is exact."""
    network, x, y = make(layers=[])
    bayesianize(network, layers="head.linear.bias", prior=dist.Laplace(torch.tensor(0.0).double(), 0.5))
    guide = laplace(network, x, y, max_iter=0, progress=False)
    assert moments(guide)[1].diagonal().max() <= 0.5 + 1e-9
    network, _, _ = make(layers=[])
    root = torch.randn(15, 15).double().tril() + 4 * torch.eye(15)
    bayesianize(
        network,
        layers="head.linear.bias",
        prior=lambda name, value: dist.MultivariateNormal(torch.zeros_like(value), precision_matrix=root @ root.T),
    )
    y = torch.full_like(y, math.nan)
    y[0] = 0.0
    got = precision_of(laplace(network, x, y, max_iter=0, progress=False)) - root @ root.T
    assert torch.linalg.matrix_rank(got, atol=1e-6) <= 15
    assert torch.linalg.eigvalsh(got).min() > -1e-8


def test_correlated_prior_is_exact():
    covariance = 0.9 + 0.1 * torch.eye(5).double()
    prior, value = dist.MultivariateNormal(torch.zeros(5).double(), covariance), torch.randn(5).double()
    assert_close(prior_precision(prior, value), prior.precision_matrix)


@pytest.mark.parametrize("layers", ["head", "all"])
def test_recurrent_backbones(layers):
    network, x, y = make(backbone=Recurrent(4), layers=layers)
    guide = laplace(network, x, y, max_iter=0, progress=False)
    torch.manual_seed(3)
    mixture = posterior_predictive(network, guide, x, 4, linearize=False)
    torch.manual_seed(3)
    draws = draw_weights(network, guide, x, 4)
    for i in range(4):
        with poutine.condition(data={name: value[i] for name, value in draws.items()}):
            assert_close(mixture[i].log_prob(y), network(x).log_prob(y))


def test_sequences():
    torch.manual_seed(0)
    network = MixtureDensityNetwork(2, 1, 2, hidden_dim=3, backbone=Steps(3)).double()
    bayesianize(network)
    x, y = torch.randn(6, 5, 2).double(), torch.randn(6, 5, 1).double()
    guide = laplace(network, x, y, max_iter=0, progress=False)
    assert posterior_predictive(network, guide, x, 4, linearize=False).batch_shape == (4, 6, 5)
    # Steps are rows here: the backbone takes each alone.
    steps = laplace(network, x.flatten(0, 1), y.flatten(0, 1), max_iter=0, progress=False)
    assert_close(moments(guide), moments(steps))


# A guide as any other


@pytest.mark.parametrize("layers", ["head", "all"])
def test_predictives_equal_one_after_another(layers):
    network, x, y = make(2, noise=Full(), layers=layers)
    guide = laplace(network, x, y, max_iter=20, progress=False)
    torch.manual_seed(3)
    mixture = posterior_predictive(network, guide, x, 5, linearize=False)
    torch.manual_seed(3)
    draws = draw_weights(network, guide, x, 5)
    rows = []
    for i in range(5):
        model = poutine.condition(network.model, data={name: value[i] for name, value in draws.items()})
        rows.append(poutine.trace(model).get_trace(x).nodes["y"]["fn"].log_prob(y))
    assert_close(mixture.log_prob(y), torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_hidden_layers_without_linear_outputs_warn():
    network, x, y = make()
    guide = laplace(network, x, y, max_iter=0, progress=False)
    with pytest.warns(UserWarning, match="predicts badly unless linearize=True"):
        posterior_predictive(network, guide, x, 2)
    posterior_predictive(network, guide, x, 2, linearize=True)
    network, x, y = make(layers="head")
    posterior_predictive(network, laplace(network, x, y, max_iter=0, progress=False), x, 2)


def test_draws_follow_the_posterior():
    network, x, y, mean, covariance = linear_regression()
    guide = laplace(network, x, y, progress=False)
    draws = draw_weights(network, guide, x, 20_000)
    flat = torch.cat([draws["head.linear.bias"], draws["head.linear.weight"].flatten(1)], -1)
    assert ((flat.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 5 / math.sqrt(20_000)
    assert (flat.var(0) / covariance.diagonal() - 1).abs().max() < 5 * math.sqrt(2 / 20_000)


def test_works_with_pyro_and_files(tmp_path):
    network, x, y = make()
    guide = laplace(network, x, y, max_iter=5, progress=False)
    assert isinstance(guide, AutoMultivariateNormal)
    assert Predictive(network.model, guide=guide, num_samples=3)(x)["y"].shape == (3, 30, 1)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    other = AutoMultivariateNormal(network.model)
    other(x, y)
    other.load_state_dict(torch.load(tmp_path / "guide.pt"))
    assert_close(moments(other), moments(guide), rtol=0, atol=0)


def test_single_precision():
    network, x, y = make()
    expected = moments(laplace(network, x, y, max_iter=0, progress=False))
    guide = laplace(network.float(), x.float(), y.float(), max_iter=0, progress=False)
    assert guide.loc.dtype == torch.float32
    assert_close(moments(guide), expected, rtol=1e-2, atol=1e-3, check_dtype=False)


def test_leaves_everything_as_it_was(capfd):
    pyro.clear_param_store()
    network, x, y = make()
    network.train()
    state, tensors = torch.get_rng_state(), {n: t.clone() for n, t in network.state_dict().items()}
    with torch.no_grad():
        first = laplace(network, x, y, max_iter=5, progress=False)
    torch.randn(3)
    second = laplace(network, x.numpy(), y.squeeze(-1).numpy(), max_iter=np.int64(5), progress=False)
    assert_close(moments(first), moments(second), rtol=0, atol=0)
    assert network.training
    assert network.latent
    assert not list(pyro.get_param_store())
    assert_close(dict(network.state_dict()), tensors, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")
    torch.set_rng_state(state)
    laplace(network, x, y, max_iter=5, progress=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert "laplace" in capfd.readouterr().err


# Refusals


def test_bad_input():
    network, x, y = make()
    for arguments, message in [
        ((make(layers=[])[0], x, y), "network: expected latent weights"),
        ((network, x[:3], y), "x, y: expected equally many rows"),
        ((network, x[:, :2], y), "x: expected shape"),
        ((network, x, torch.cat([y, y], -1)), "y: expected shape"),
        ((network, x, y / 0), "y: expected finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            laplace(*arguments, progress=False)
    for max_iter in (-1, 1.5, True):
        with pytest.raises(ValueError, match="max_iter"):
            laplace(network, x, y, max_iter=max_iter)


def test_too_many_weights():
    network, x, y = make(hidden_dim=100)
    with pytest.raises(ValueError, match=r"at most 10000 latent weights, such as .* got 12015"):
        laplace(network, x, y, progress=False)


def test_priors_that_are_refused():
    network, x, y = make(layers=[])
    bayesianize(network, layers="head.linear.bias", prior=dist.HalfNormal(torch.tensor(1.0).double()))
    with pytest.raises(ValueError, match=r"prior over real numbers at head\.linear\.bias, got"):
        laplace(network, x, y, progress=False)
    network, _, _ = make(layers="head.linear.bias")
    network.width = pyro.nn.PyroSample(dist.Normal(torch.zeros(()).double(), 1.0))
    network.head.linear.bias = pyro.nn.PyroSample(
        lambda module: dist.Normal(network.width, 1.0).expand([15]).to_event(1)
    )
    with pytest.raises(ValueError, match=r"latent sites .* got .*'width'"):
        laplace(network, x, y, progress=False)
    network, _, _ = make(layers="head")
    network.head.linear.weight = pyro.nn.PyroSample(
        lambda module: dist.Normal(module.bias.mean(), 1.0).expand([15, 4]).to_event(2)
    )
    with pytest.raises(ValueError, match="depends on no other weight"):
        laplace(network, x, y, progress=False)


def test_a_density_that_is_not_finite():
    network, x, y = make(noise=Diagonal())
    network.head.linear.bias_start.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="finite joint density"):
        laplace(network, x, y, progress=False)


class Rooted(nn.Module):
    """Its derivatives at weights of 0 are NaN."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x).square().sqrt()


def test_derivatives_that_are_not_finite():
    network = bayesianize(MixtureDensityNetwork(3, 1, 1, hidden_dim=4, backbone=Rooted()).double())
    x = torch.randn(10, 3).double()
    with pytest.raises(FloatingPointError, match="expected finite derivatives at the mode"):
        laplace(network, x, x[:, :1], max_iter=0, progress=False)
