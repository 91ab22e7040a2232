"""Markov chains: the exact posterior where it is known, reproducible draws, honest diagnostics."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import linear_regression
from pyro import poutine
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_mdn import (
    ConvergenceWarning,
    MixtureDensityNetwork,
    PosteriorSamples,
    bayesianize,
    fit_mcmc,
    laplace,
    posterior_predictive,
)
from pyro_mdn.posteriors.log_joint import LogJoint, log_joint_of_model, rows_of, undisturbed
from pyro_mdn.posteriors.mcmc import ModelJoint, WhitenedJoint, sample_target, target_of
from pyro_mdn.posteriors.posterior_samples import warn_of_nonconvergence
from pyro_mdn.posteriors.priors import starting_weights

QUICK = {"num_samples": 6, "warmup_steps": 6, "num_chains": 2, "max_tree_depth": 3, "seed": 0, "progress": False}


def make(dim_out=1, rows=20, layers="head", **settings):
    torch.manual_seed(0)
    settings = {"n_components": 2, "hidden_dim": 3, **settings}
    network = MixtureDensityNetwork(2, dim_out, **settings).double()
    x, y = torch.randn(rows, 2, dtype=torch.float64), torch.randn(rows, dim_out, dtype=torch.float64)
    network.initialize_(x, y)
    return bayesianize(network, layers=layers), x, y


def quick(network, x, y, **settings):
    """A few draws, from chains that need not have converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit_mcmc(network, x, y, **{**QUICK, **settings})


def flat(posterior):
    samples = posterior.samples
    return torch.cat([samples[name].flatten(2) for name in ("head.linear.bias", "head.linear.weight")], -1)


def require_moments(posterior, mean, covariance):
    """Means and variances within five of their standard errors."""
    draws, size = flat(posterior), flat_size(posterior)
    deviation = draws.mean((0, 1)) - mean
    assert (deviation / (covariance.diagonal() / size).sqrt()).abs().max() < 5
    ratio = (draws - mean).square().mean((0, 1)) / covariance.diagonal()
    # Squares have a shorter memory than the draws themselves, unless these alternate.
    assert ((ratio - 1) / (2 / size.clamp(max=draws.shape[0] * draws.shape[1] / 4)).sqrt()).abs().max() < 5


def flat_size(posterior):
    sizes = posterior.effective_sample_size
    return torch.cat([sizes[name].flatten() for name in ("head.linear.bias", "head.linear.weight")])


# Exact


def test_linear_regression():
    network, x, y, mean, covariance = linear_regression()
    posterior = fit_mcmc(network, x, y, num_samples=250, warmup_steps=100, num_chains=2, seed=0, progress=False)
    require_moments(posterior, mean, covariance)
    assert max(float(value.max()) for value in posterior.r_hat.values()) < 1.05
    assert posterior.divergences == [0, 0]


TARGETS = {
    "scaled": lambda network, rows: WhitenedJoint(LogJoint(network, rows), limit=3),
    "model": ModelJoint,
}


@pytest.mark.parametrize(("name", "num_samples"), [("scaled", 150), ("model", 100)])
def test_linear_regression_by_other_targets(name, num_samples):
    network, x, y, mean, covariance = linear_regression(rows=8, prior_scale=0.2)
    with undisturbed(network):
        rows = rows_of(network, x, y)
        target = TARGETS[name](network, rows)
        counts = {"num_samples": num_samples, "warmup_steps": 50, "num_chains": 2}
        posterior = sample_target(target, rows, **counts, seed=0, max_tree_depth=8, target_accept_prob=0.8)
    require_moments(posterior, mean, covariance)
    assert name == "model" or target.root.ndim == 1, "scales alone, beyond the limit"


def test_log_joint_is_that_of_the_model():
    for layers in ("head", "all"):
        network, x, y = make(2, layers=layers)
        y[0, 1] = y[3, 0] = math.nan
        posterior = quick(network, x, y, num_samples=4)
        with undisturbed(network):
            rows = rows_of(network, x, y)
            values = {name: value[1, 2] for name, value in posterior.samples.items()}
            assert_close(posterior.log_joint[1, 2], log_joint_of_model(network, rows, values).detach())


def test_constrained_and_hierarchical_priors_go_by_the_model():
    network, x, y = make(layers="head.linear.bias")
    network.width = pyro.nn.PyroSample(dist.HalfNormal(torch.ones((), dtype=torch.float64)))
    network.head.linear.bias = pyro.nn.PyroSample(
        lambda module: dist.Normal(0.0, network.width).expand([6]).to_event(1)
    )
    with undisturbed(network):
        assert isinstance(target_of(network, rows_of(network, x, y)), ModelJoint)
    posterior = quick(network, x, y)
    assert posterior.samples["width"].shape == (2, 6)
    assert bool((posterior.samples["width"] > 0).all())
    assert posterior_predictive(network, posterior, x).batch_shape == (12, 20)
    network, x, y = make()
    with undisturbed(network):
        assert isinstance(target_of(network, rows_of(network, x, y)), WhitenedJoint)


# What comes back


class Warmer(MixtureDensityNetwork):
    def forward(self, x):
        return super().forward(x).temper(2.0)


class Shifted(MixtureDensityNetwork):
    def model(self, x, y=None, *, num_data=None):
        return super().model(x, None if y is None else y + 1, num_data=num_data)


@pytest.mark.parametrize("change", ["forward", "model", "hook", "hook of the head"])
def test_networks_that_are_overridden_go_by_the_model(change):
    torch.manual_seed(0)
    kind = {"forward": Warmer, "model": Shifted}.get(change, MixtureDensityNetwork)
    network = bayesianize(kind(2, 1, n_components=2, hidden_dim=3).double(), layers="head")
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    if "hook" in change:
        part = network if change == "hook" else network.head
        part.register_forward_hook(lambda _, inputs, mixture: mixture.temper(2.0))
    with undisturbed(network):
        rows, weights = rows_of(network, x, y), starting_weights(network)
        target = target_of(network, rows)
        assert isinstance(target, ModelJoint)
        model = poutine.condition(network.model, data=weights)
        assert_close(target(weights), poutine.trace(model).get_trace(x, y).log_prob_sum())
    with pytest.raises(ValueError, match="expected model and forward of MixtureDensityNetwork"):
        laplace(network, x, y, progress=False)


def test_starting_weights_outside_the_support():
    network, x, y = make(layers=[])
    half = dist.HalfNormal(torch.ones((), dtype=torch.float64))
    bayesianize(network, layers="head.linear.bias", prior=half)
    assert starting_weights(network)["head.linear.bias"].min() < 0
    assert quick(network, x, y).get_samples()["head.linear.bias"].min() > 0


def test_samples_are_those_of_mcmc():
    network, x, y = make()
    posterior = quick(network, x, y)
    assert isinstance(posterior, PosteriorSamples)
    assert {n: tuple(v.shape) for n, v in posterior.samples.items()} == {
        "head.linear.weight": (2, 6, 6, 3),
        "head.linear.bias": (2, 6, 6),
    }
    grouped, pooled = posterior.get_samples(group_by_chain=True), posterior.get_samples()
    assert_close(grouped, dict(posterior.samples))
    assert_close(pooled["head.linear.bias"][6:], grouped["head.linear.bias"][1])
    assert posterior.get_samples(3)["head.linear.bias"].shape == (3, 6)
    mixture = posterior_predictive(network, posterior, x)
    assert_close(mixture.locs, posterior_predictive(network, pooled, x).locs)
    assert Predictive(network.model, posterior_samples=pooled)(x)["y"].shape == (12, 20, 1)
    assert posterior.log_joint.shape == (2, 6)
    assert len(posterior.divergences) == len(posterior.acceptance) == 2
    assert posterior.seconds > 0
    assert repr(posterior).startswith("PosteriorSamples(chains=2, draws=6, divergences=")


def test_chains_differ_and_repeat():
    network, x, y = make()
    first, again, fewer = quick(network, x, y), quick(network, x, y), quick(network, x, y, num_chains=1)
    other = quick(network, x, y, seed=1)
    assert_close(first.samples, again.samples, rtol=0, atol=0)
    assert_close(fewer.samples["head.linear.bias"][0], first.samples["head.linear.bias"][0], rtol=0, atol=0)
    for bias in (first.samples["head.linear.bias"][1], other.samples["head.linear.bias"][0]):
        assert not torch.equal(bias, first.samples["head.linear.bias"][0])
    torch.manual_seed(5)
    by_generator, next_one = quick(network, x, y, seed=None), quick(network, x, y, seed=None)
    assert not torch.equal(next_one.samples["head.linear.bias"], by_generator.samples["head.linear.bias"])
    torch.manual_seed(5)
    assert_close(quick(network, x, y, seed=None).samples, by_generator.samples, rtol=0, atol=0)


def test_dtypes():
    network, x, y = make()
    posterior = quick(network.float(), x.float(), y.float(), num_samples=2)
    assert {value.dtype for value in posterior.samples.values()} == {torch.float32}
    assert posterior.log_joint.dtype == torch.float64


def test_leaves_everything_as_it_was(capfd, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # Pyro shows no bars there
        monkeypatch.delenv(name, raising=False)
    pyro.clear_param_store()
    network, x, y = make()
    network.train()
    state, tensors = torch.get_rng_state(), {n: t.clone() for n, t in network.state_dict().items()}
    validates = torch.distributions.Distribution._validate_args
    with torch.no_grad():
        quick(network, x.numpy(), y.squeeze(-1).numpy())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.distributions.Distribution._validate_args is validates
    assert network.training
    assert not list(pyro.get_param_store())
    assert_close(dict(network.state_dict()), tensors, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")
    quick(network, x, y, progress=True)
    assert "Sample" in capfd.readouterr().err


def test_features_are_computed_once():
    network, x, y = make()
    calls = []
    network.backbone[0].register_forward_hook(lambda *_: calls.append(1))
    with undisturbed(network):
        joint = LogJoint(network, rows_of(network, x, y))
        before = len(calls)
        for _ in range(3):
            joint.value_and_gradient(joint.flatten(joint.start))
    assert len(calls) == before


# Diagnostics


def chains(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    never = torch.zeros_like(values, dtype=torch.bool)
    return PosteriorSamples({"w": values.unsqueeze(-1)}, values, never, [1.0] * len(values), 0.0)


def test_diagnostics_tell_chains_apart():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    good, apart = chains(noise), chains(noise + torch.arange(4.0).unsqueeze(-1))
    assert abs(float(good.r_hat["w"]) - 1) < 0.01
    assert apart.r_hat["log_joint"] > 1.5
    assert 1000 < good.effective_sample_size["w"] < 2000 * math.log10(2000) + 1
    assert apart.effective_sample_size["w"] < 50
    alternating = chains(torch.tensor([[1.0, -1.0] * 50] * 2) + 0.01 * noise[:2, :100])
    assert alternating.effective_sample_size["w"] > 0
    assert chains(noise[:, :3]).r_hat["w"].isnan()
    stuck = chains(torch.ones(2, 50))
    assert stuck.r_hat["w"].isnan()
    assert stuck.effective_sample_size["w"].isnan()
    with pytest.warns(ConvergenceWarning, match="is nan"):
        warn_of_nonconvergence(stuck)


def test_warnings():
    network, x, y = make(layers="all")
    with pytest.warns(ConvergenceWarning, match="R-hat of the log joint density is"):
        fit_mcmc(network, x, y, **{**QUICK, "warmup_steps": 0, "max_tree_depth": 1, "num_samples": 8})


# Refusals


def test_bad_input():
    network, x, y = make()
    for arguments, message in [
        ((make(layers=[])[0], x, y), "network: expected latent weights"),
        ((network, x[:3], y), "x, y: expected equally many rows"),
        ((network, x[:, :1], y), "x: expected shape"),
        ((network, x, torch.cat([y, y], -1)), "y: expected shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_mcmc(*arguments, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 0},
        {"num_chains": 0},
        {"max_tree_depth": 0},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
        {"target_accept_prob": 1.0},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"seed": 2**63},
    ],
)
def test_bad_settings(settings):
    network, x, y = make()
    with pytest.raises(ValueError, match=next(iter(settings))):
        fit_mcmc(network, x, y, **settings)


def test_a_density_that_is_not_finite():
    network, x, y = make()
    network.head.linear.bias_start.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="finite joint density"):
        fit_mcmc(network, x, y, progress=False)
