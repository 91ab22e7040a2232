"""SVI through the one training loop: exact posteriors, guides of every kind, and fits that do not see each other."""

import hashlib
import math
import os
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_mean,
    init_to_value,
)
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    Fixed,
    MixtureDensityNetwork,
    NegativeElbo,
    bayesianize,
    fit,
    posterior_predictive,
    scores,
    starting_weights,
    to_inference_data,
)
from pyro_mdn.posteriors.predictive import draw_weights

NOISE, PRIOR = 0.3, 1.5


def regression(rows=40):
    """A linear network of one component with a known noise, and data for it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[0.5], [-1.0]]).double() + 0.3 + NOISE * torch.randn(rows, 1, generator=generator)
    network = MixtureDensityNetwork(2, 1, 1, hidden_dim=2, noise=Fixed(NOISE), backbone=nn.Identity()).double()
    return bayesianize(network, PRIOR), x, y


def exact_posterior(x, y):
    """Mean and covariance of the weights and the bias of the mean."""
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    prior = torch.diag(torch.tensor([PRIOR**-2 * 2, PRIOR**-2 * 2, PRIOR**-2]).double())
    covariance = torch.linalg.inv(design.T @ design / NOISE**2 + prior)
    return covariance @ design.T @ y.squeeze(-1) / NOISE**2, covariance


def coefficients(draws):
    """Weights and bias of the mean, ``(S, 3)``; row 0 is the logit's."""
    return torch.cat([draws["head.linear.weight"][:, 1], draws["head.linear.bias"][:, 1:]], 1)


def test_a_full_covariance_guide_recovers_the_exact_posterior():
    network, x, y = regression()
    mean, covariance = exact_posterior(x, y)
    settings = {"num_particles": 16, "max_epochs": 1000, "batch_size": 40, "lr": 0.02, "initialize": False}
    guide = fit(network, x, y, guide=AutoMultivariateNormal, seed=0, progress=False, **settings).guide
    draws = coefficients(draw_weights(network, guide, x, 20_000))
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() / deviation).max() < 0.1
    ratio = draws.T.cov() / torch.outer(deviation, deviation)
    assert_close(ratio, covariance / torch.outer(deviation, deviation), rtol=0, atol=0.1)
    logit = draw_weights(network, guide, x, 20_000)["head.linear.bias"][:, 0]
    assert_close(logit.std().item(), PRIOR, rtol=0.1, atol=0), "nothing is learned of it: that is the prior"


def test_minibatches_are_scaled_to_all_rows():
    network, x, y = regression(200)
    mean, covariance = exact_posterior(x, y)
    settings = {"num_particles": 8, "max_epochs": 200, "batch_size": 40, "lr": 0.02, "initialize": False}
    guide = fit(network, x, y, guide=AutoMultivariateNormal, seed=0, progress=False, **settings).guide
    draws = coefficients(draw_weights(network, guide, x, 20_000))
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() / deviation).max() < 0.3
    assert_close(draws.std(0), deviation, rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta]
)
def test_classes_of_guides_start_from_the_trained_network(guide):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, generator=generator)
    y = torch.sin(6 * x) + 0.1 * torch.randn(200, 1, generator=generator)
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 1, 2, 8)
    fit(network, x, y, seed=0, progress=False, max_epochs=60)
    trained = scores.log_score(network(x), y).mean()
    bayesianize(network)
    start = {name: value.clone() for name, value in starting_weights(network).items()}
    result = fit(network, x, y, guide=guide, seed=0, progress=False, max_epochs=60, num_particles=2)
    assert not list(pyro.get_param_store())
    pooled = posterior_predictive(network, result.guide, x, 50).pool(0)
    assert scores.log_score(pooled, y).mean() < trained + 0.3
    medians = draw_weights(network, result.guide, x, 200)["backbone.0.weight"].mean(0)
    assert torch.corrcoef(torch.stack([medians.flatten(), start["backbone.0.weight"].flatten()]))[0, 1] > 0.8


def sharing(*modules):
    """Names of tensors that have memory in common with those of another of these modules."""
    named = [(i, n, t) for i, m in enumerate(modules) for n, t in [*m.named_parameters(), *m.named_buffers()]]
    owners = {}
    for i, name, tensor in named:
        owners.setdefault(tensor.untyped_storage().data_ptr(), []).append((i, name))
    return [names for names in owners.values() if len({i for i, _ in names}) > 1]


def structured(model, **settings):
    return AutoStructured(model, conditionals="delta", dependencies={}, **settings)


def around(name, value):
    return dist.Normal(value, 1.0).to_event(value.ndim)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, structured])
@pytest.mark.parametrize("start", ["starting weights", "mean of the prior"])
def test_no_guide_trains_the_network_or_another_guide(guide, start):
    network = bayesianize(MixtureDensityNetwork(2, 1, 2, 4), prior=around)
    x, y = torch.randn(30, 2), torch.randn(30, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    guides = []
    for _ in range(2):
        with pyro.get_param_store().scope():
            init = init_to_mean if start != "starting weights" else init_to_value(values=starting_weights(network))
            guides.append(guide(network.model, init_loc_fn=init))
            svi = SVI(network.model, guides[-1], pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
            svi.step(x, y)
            svi.step(x, y)
    assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert not sharing(network, *guides)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_a_second_training_is_the_first_again(guide):
    network = bayesianize(MixtureDensityNetwork(2, 1, 2, 4))
    x, y = torch.randn(30, 2), torch.randn(30, 1)
    settings = {"guide": guide, "initialize": False, "max_epochs": 3, "seed": 0, "progress": False}
    first = fit(network, x, y, **settings).guide
    learned = {name: value.clone() for name, value in first.state_dict().items()}
    second = fit(network, x, y, **settings).guide
    assert_close(dict(second.state_dict()), learned, rtol=0, atol=0)
    assert_close(dict(first.state_dict()), learned, rtol=0, atol=0)
    assert not sharing(network, first, second)


def test_draws_for_arviz_stay_where_the_guide_goes_on():
    network = bayesianize(MixtureDensityNetwork(2, 1, 2, 4), layers="head.linear.bias")
    x, y = torch.randn(30, 2), torch.randn(30, 1)
    guide = fit(network, x, y, guide=AutoDelta, max_epochs=1, progress=False).guide
    bias = guide.median()["head.linear.bias"].clone()
    drawn = to_inference_data(network, x=x, y=y, posterior=guide, num_samples=3)["posterior"]["head.linear.bias"]
    with torch.no_grad():
        guide.head.linear.bias += 1
    assert_close(torch.tensor(drawn.values), bias.double().expand(1, 3, -1))


def test_an_untrained_network_is_initialized_first():
    network = bayesianize(MixtureDensityNetwork(1, 1, 2, 8))
    x = torch.linspace(100, 200, 50).unsqueeze(-1)
    result = fit(network, x, 5 + x, guide=AutoNormal, seed=0, progress=False, max_epochs=3)
    assert network.x_shift.item() == pytest.approx(150)
    assert result.guide is not None
    assert math.isfinite(result.best_loss)


@pytest.mark.parametrize("layers", ["all", "backbone"])
def test_what_a_network_learned_stays_unless_asked(layers):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 1, 2, 8)
    x = torch.linspace(100, 200, 50).unsqueeze(-1)
    fit(network, x, 5 + x, seed=0, progress=False, max_epochs=30)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    fit(bayesianize(network, layers=layers), x + 1, x, guide=AutoNormal, lr=1e-12, seed=0, progress=False, max_epochs=1)
    after = network.state_dict()
    for name, value in state.items():
        assert_close(after.get(f"{name}_start", after.get(name)), value, rtol=1e-6, atol=1e-6)
    fit(network, x + 1, x, guide=AutoNormal, initialize=True, seed=0, progress=False, max_epochs=1)
    assert network.x_shift.item() == pytest.approx(151)


def test_other_classes_are_refused():
    network, x, y = regression()
    with pytest.raises(ValueError, match="guide: expected a guide, or a class of AutoGuides, got Linear"):
        fit(network, x, y, guide=nn.Linear, progress=False)


CODE = """
import hashlib, sys, torch
from pyro.infer.autoguide import AutoNormal
from pyro_mdn import MixtureDensityNetwork, bayesianize, fit
from pyro_mdn.posteriors.predictive import draw_weights

def run(name):
    generator = torch.Generator().manual_seed(ord(name))
    x, y = torch.randn(60, 2, generator=generator), torch.randn(60, 1, generator=generator)
    torch.manual_seed(ord(name))
    network = bayesianize(MixtureDensityNetwork(2, 1, 3, 8 if name == "B" else 6))
    guide = AutoNormal(network.model)
    fit(network, x, y, guide=guide, seed=1, max_epochs=3, num_particles=2, progress=False)
    torch.manual_seed(5)
    draws = draw_weights(network, guide, x, 3)
    parts = [*guide.state_dict().values(), *network.state_dict().values(), *draws.values()]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parts)).hexdigest()

print(*[run(name) for name in sys.argv[1]])
"""


def digests(names):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CODE), names]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in shown.split())
    return shown.split()


def test_fits_in_one_process_never_see_each_other():
    a, b, again = digests("ABA")
    assert a == again
    assert [a] == digests("A")
    assert [b] == digests("B")
    assert a != b


def test_guide_starts_within_the_support_of_a_prior():
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 1, 2, hidden_dim=4)
    x = torch.randn(50, 1)
    network.initialize_(x, x)
    bayesianize(network, layers="head.linear.bias", prior=dist.HalfNormal(1.0))  # some starting values are negative
    assert network.head.linear.bias_start.min() < 0
    result = fit(network, x, x, guide=AutoNormal, max_epochs=2, seed=0, progress=False)
    assert draw_weights(network, result.guide, x, 100)["head.linear.bias"].min() > 0
    assert all(math.isfinite(row["loss"]) for row in result.history)


@pytest.mark.parametrize("particles", [1, 2])
def test_more_rows_may_be_held_out_than_trained_on(particles):
    x, y = torch.randn(80, 1), torch.randn(80, 1)
    network = bayesianize(MixtureDensityNetwork(1, 1, 2, 4))
    settings = {"max_epochs": 2, "progress": False, "seed": 0, "num_particles": particles}
    result = fit(network, x[:20], y[:20], guide=AutoNormal, validation=(x[20:], y[20:]), **settings)
    assert all(math.isfinite(row["validation_loss"]) for row in result.history)


def test_an_elbo_as_the_objective():
    x, y = torch.randn(40, 1), torch.randn(40, 1)
    network = bayesianize(MixtureDensityNetwork(1, 1, 2, 4))
    objective = NegativeElbo(network, AutoNormal(network.model), 40, kl_weight=0.5)
    result = fit(network, x, y, objective=objective, max_epochs=5, validation=0, progress=False, seed=0)
    assert result.history[-1]["loss"] != result.history[0]["loss"]


@pytest.mark.parametrize("layers", ["head", "all"])
def test_latent_weights_need_a_guide(layers):
    network = bayesianize(MixtureDensityNetwork(1, 1, 2, 4), layers=layers)
    with pytest.raises(ValueError, match="guide: expected one for a network with latent weights, got none"):
        fit(network, torch.randn(40, 1), torch.randn(40, 1), progress=False)
