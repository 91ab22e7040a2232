import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    ContinuousRankedProbability,
    Fixed,
    Full,
    MixtureDensityNetwork,
    NegativeElbo,
    NegativeLogLikelihood,
    WeightedSum,
    bayesianize,
    fit,
    scores,
    starting_weights,
)

# Pyro's advice on the frozen head.
pytestmark = pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")


def linear_network(prior_scale=1.0, noise_scale=0.5):
    """Bayesian linear regression: a weight as backbone, and a head that passes it on with a known noise."""
    backbone = PyroModule[nn.Linear](1, 1, bias=False)
    backbone.weight = PyroSample(dist.Normal(0.0, prior_scale).expand([1, 1]).to_event(2))
    network = MixtureDensityNetwork(1, 1, 1, 1, noise=Fixed(noise_scale), backbone=backbone)
    with torch.no_grad():
        network.head.linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        network.head.linear.bias.zero_()
    network.head.requires_grad_(False)
    return network


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, generator=generator)
    return x, 0.7 * x + 0.5 * torch.randn(n, 1, generator=generator)


def exact_posterior(x, y, prior_scale=1.0, noise_scale=0.5):
    precision = prior_scale**-2 + (x.square().sum() / noise_scale**2)
    return ((x * y).sum() / noise_scale**2 / precision).item(), precision.item() ** -0.5


def exact_log_evidence(x, y):
    covariance = x @ x.T + 0.25 * torch.eye(len(x))
    return torch.distributions.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y.squeeze(-1)).item()


@pytest.mark.parametrize("batch", [40, 10])
def test_elbo_is_that_of_pyro(batch):
    x, y = (part[:batch] for part in data())
    with pyro.get_param_store().scope():
        network = linear_network()
        guide = AutoNormal(network.model)
        objective = NegativeElbo(network, guide, 40)
        objective(x, y)
        torch.manual_seed(0)
        ours = objective(x, y).mean() * 40
        torch.manual_seed(0)
        theirs = Trace_ELBO().differentiable_loss(network.model, guide, x, y, num_data=40)
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        parameters = list(guide.parameters())
        for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("backbone", ["mlp", "convolutional", "recurrent"])
@pytest.mark.parametrize("batch", [40, 10])
def test_vectorised_particles_are_those_of_pyro_one_by_one(guide, backbone, batch):
    """Value and gradients of the ELBO at the draws that were made, by Pyro's traces of model and guide."""
    x, y = (part[:batch].double() for part in data())
    torch.manual_seed(0)
    layers = {
        "mlp": None,
        "convolutional": nn.Sequential(nn.Unflatten(-1, (1, 1)), nn.Conv1d(1, 4, 1), nn.Tanh(), nn.Flatten()),
        "recurrent": Recurrent(),
    }
    network = bayesianize(MixtureDensityNetwork(1, 1, 3, 4, backbone=layers[backbone]).double())
    with pyro.get_param_store().scope():
        guide = guide(network.model)
        objective = NegativeElbo(network, guide, 40, num_particles=8)
        draws, log_q = objective.draw(x, y)
        losses, log_prior = objective.score(draws, x, y)
        ours = losses.mean(0).mean() * 40 + (log_q - log_prior).mean()
        theirs = [particle(network, guide, {n: v[i] for n, v in draws.items()}, x, y) for i in range(8)]
        theirs = torch.stack(theirs).mean()
        assert len(draws) == len(starting_weights(network))
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        parameters = list(guide.parameters())
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs)]
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, rtol=1e-7, atol=1e-7)
        torch.manual_seed(1)
        whole = objective(x, y).mean() * 40
        torch.manual_seed(1)
        draws, log_q = objective.draw(x, y)
        losses, log_prior = objective.score(draws, x, y)
        assert_close(whole, losses.mean() * 40 + (log_q - log_prior).mean())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0][:, -1]


def particle(network, guide, draw, x, y):
    """Minus the ELBO at one draw, by Pyro."""
    if isinstance(guide, AutoNormal):
        latent = {f"{name}_unconstrained": value for name, value in draw.items()}
    else:
        order = guide.prototype_trace.stochastic_nodes
        flat = torch.cat([draw[name].flatten() for name in order if name in draw])
        latent = {f"_{type(guide).__name__}_latent": flat}
    drawn = poutine.trace(poutine.condition(guide, data=latent)).get_trace(x, y, num_data=40)
    model = poutine.trace(poutine.replay(network.model, drawn)).get_trace(x, y, num_data=40)
    return drawn.log_prob_sum() - model.log_prob_sum()


def test_warm_up_of_the_divergence():
    x, y = data()
    network = linear_network()

    def guide(x, y=None, num_data=None):
        pyro.sample("backbone.weight", dist.Normal(0.7, 0.1).expand([1, 1]).to_event(2))

    objective = NegativeElbo(network, guide, 40, kl_warmup=4, num_particles=2)
    divergence = []
    for _ in range(6):
        torch.manual_seed(0)
        draws, log_q = objective.draw(x, y)
        losses, log_prior = objective.score(draws, x, y)
        torch.manual_seed(0)
        divergence.append(((objective(x, y) - losses.mean(0)) * 40 / (log_q - log_prior).mean()).mean())
    assert_close(torch.stack(divergence), torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0]), rtol=1e-3, atol=1e-3)


def test_an_elbo_calls_the_network_once_for_each_step():
    calls = []
    backbone = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.GELU())
    network = bayesianize(MixtureDensityNetwork(2, 1, 2, 8, backbone=backbone), layers="head")
    objective = NegativeElbo(network, AutoNormal(network.model), 40)
    x, y = torch.randn(40, 2), torch.randn(40, 1)
    objective.eval()(x, y)  # sets the guide up
    for _ in range(2):
        objective.train()(x, y)
    assert backbone[1].num_batches_tracked == 2
    backbone.register_forward_hook(lambda *_: calls.append(1))
    objective.train()(x, y)
    assert len(calls) == 1


def test_svi_recovers_the_exact_posterior():
    """Conjugate linear regression: mean and deviation of the weight within a tenth of a posterior deviation."""
    x, y = data()
    mean, deviation = exact_posterior(x, y)
    network = linear_network()
    guide = AutoMultivariateNormal(network.model)
    settings = {"num_particles": 4, "lr": 0.02, "batch_size": 40, "max_epochs": 600, "initialize": False}
    fit(network, x, y, guide=guide, seed=0, progress=False, **settings)
    assert not list(pyro.get_param_store())
    with pyro.get_param_store().scope():
        posterior = guide.get_posterior()
    assert_close(posterior.mean.item(), mean, rtol=0, atol=0.1 * deviation)
    assert_close(posterior.stddev.item(), deviation, rtol=0.1, atol=0)


def test_elbo_of_the_exact_posterior_is_the_evidence():
    """With no Monte Carlo error at all: every draw of the exact posterior gives the log evidence."""
    x, y = data()
    mean, deviation = exact_posterior(x, y)

    def guide(x, y=None, num_data=None):
        pyro.sample("backbone.weight", dist.Normal(mean, deviation).expand([1, 1]).to_event(2))

    for _ in range(3):
        loss = NegativeElbo(linear_network(), guide, 40)(x, y)
        assert_close(-loss.sum().item(), exact_log_evidence(x, y), rtol=1e-4, atol=1e-3)


def test_held_out_elbo_has_no_divergence():
    x, y = data()
    network = linear_network()

    def guide(x, y=None, num_data=None):
        pyro.sample("backbone.weight", dist.Delta(torch.full((1, 1), 0.7)).to_event(2))

    objective = NegativeElbo(network, guide, 40).eval()
    expected = -dist.Normal(0.7 * x, 0.5).log_prob(y).squeeze(-1)
    assert_close(objective(x, y), expected)


def test_guide_without_latent_weights_trains_by_likelihood():
    x, y = data(200)

    def guide(x, y=None, num_data=None):
        pass

    a, b = (MixtureDensityNetwork(1, 1, 2, 8) for _ in range(2))
    b.load_state_dict(a.state_dict())
    settings = {"max_epochs": 5, "seed": 0, "progress": False, "validation": 0}
    fit(a, x, y, guide=guide, **settings)
    fit(b, x, y, input_noise=0.0, target_noise=0.0, weight_decay=0.0, **settings)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("layers", ["head", "head.linear.bias"])
def test_an_elbo_has_a_store_of_its_own(layers, num_particles):
    """What another network and its guide left there under the same names is neither read nor written."""
    x, y = data()
    with pyro.get_param_store().scope():
        other = bayesianize(MixtureDensityNetwork(1, 1, 3, 8), layers=layers)
        left = AutoNormal(other.model)
        Trace_ELBO().differentiable_loss(other.model, left, x, y)
        before = {name: value.clone() for name, value in pyro.get_param_store().items()}
        network = bayesianize(MixtureDensityNetwork(1, 1, 2, 4), layers=layers)
        objective = NegativeElbo(network, AutoNormal(network.model), 40, num_particles=num_particles)
        for _ in range(2):
            assert objective(x, y).isfinite().all()
        assert_close(dict(pyro.get_param_store().items()), before, rtol=0, atol=0)
        assert {id(p) for p in objective.parameters()}.isdisjoint({id(p) for p in [*left.parameters()]})


@pytest.mark.parametrize("num_particles", [1, 3])
def test_guides_whose_parameters_would_not_be_trained_are_refused(num_particles):
    network = linear_network()

    def guide(x, y=None, num_data=None):
        loc = pyro.param("loc", torch.zeros(1, 1))
        pyro.sample("backbone.weight", dist.Normal(loc, 0.1).to_event(2))

    before = copy.deepcopy(network.state_dict())
    message = r"guide: expected a module that owns its parameters, got .*'loc'"
    with pytest.raises(ValueError, match=message):
        fit(network, *data(), guide=guide, num_particles=num_particles, progress=False)
    with pytest.raises(ValueError, match=message):
        NegativeElbo(network, guide, 40, num_particles=num_particles)(*data())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not list(pyro.get_param_store())


def test_guides_with_other_sites_are_refused():
    def guide(x, y=None, num_data=None):
        pyro.sample("backbone.weigth", dist.Normal(0.0, 0.1).expand([1, 1]).to_event(2))

    with pytest.raises(ValueError, match=r"expected the sites \['backbone.weight'\], got \['backbone.weigth'\]"):
        NegativeElbo(linear_network(), guide, 40)(*data())


def test_a_guide_can_be_refitted_on_all_rows():
    x, y = data()
    network = linear_network()
    guide = AutoNormal(network.model)
    settings = {"validation": 0.25, "max_epochs": 4, "initialize": False, "seed": 0, "progress": False}
    result = fit(network, x, y, guide=guide, refit=True, **settings)
    assert len(result.refit_history) == result.best_epoch
    assert math.isnan(result.effective_components)


def test_priors_need_no_pathwise_gradients():
    backbone = PyroModule[nn.Linear](1, 1, bias=False)
    spike_and_slab = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(1, 1, 2)), dist.Normal(torch.zeros(1, 1, 2), torch.tensor([0.1, 2.0]))
    )
    backbone.weight = PyroSample(spike_and_slab.to_event(2))
    network = MixtureDensityNetwork(1, 1, 1, 1, noise=Fixed(0.5), backbone=backbone)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x, y=None, num_data=None):
            pyro.sample("backbone.weight", dist.Normal(self.loc, 0.1).to_event(2))

    guide = Guide()
    fit(network, *data(), guide=guide, max_epochs=2, seed=0, progress=False)
    assert guide.loc.abs() > 0


def test_discrete_guides_are_refused():
    network = linear_network()

    def guide(x, y=None, num_data=None):
        pyro.sample("backbone.weight", dist.Poisson(1.0).expand([1, 1]).to_event(2))

    with pytest.raises(ValueError, match=r"guide: expected pathwise gradients at site 'backbone.weight'"):
        NegativeElbo(network, guide, 40)(*data())


@pytest.mark.parametrize(("num_data", "num_particles"), [(0, 1), (1, 0)])
def test_counts_of_an_elbo(num_data, num_particles):
    with pytest.raises(ValueError, match="num_data, num_particles: expected 1 at least"):
        NegativeElbo(MixtureDensityNetwork(1, 1), lambda x, y: None, num_data, num_particles=num_particles)


def test_crps_objective_is_the_score_in_standard_units():
    network = MixtureDensityNetwork(2, 2, 3, 8, noise=Full()).double()
    x, y = torch.randn(50, 2).double(), torch.tensor([10.0, 0.1]) * torch.randn(50, 2).double()
    network.initialize_(x, y)
    expected = scores.crps(network(x), y) / y.std(0, correction=0)
    assert_close(ContinuousRankedProbability(network)(x, y), expected.sum(-1))


def test_crps_objective_leaves_missing_targets_out():
    network = MixtureDensityNetwork(2, 2, 3, 8)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    expected = scores.crps(network(x), y)
    expected[:3, 0] = 0.0
    expected[2, 1] = 0.0
    y[:3, 0] = torch.nan
    y[2, 1] = torch.nan
    losses = ContinuousRankedProbability(network)(x, y)
    assert_close(losses, expected.sum(-1))
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_training_by_crps_lowers_it():
    torch.manual_seed(0)
    x = torch.randn(300, 1)
    y = x.sin() + 0.1 * torch.randn(300, 1)
    network = MixtureDensityNetwork(1, 1, 2, 16)
    fit(network, x, y, objective=ContinuousRankedProbability(network), max_epochs=30, seed=0, progress=False)
    # That of the exact N(sin x, 0.1²) is 0.1 / sqrt(pi) = 0.056; of the marginal normal distribution about 0.4.
    assert scores.crps(network(x), y).mean() < 0.08


def test_weighted_sum():
    network = MixtureDensityNetwork(1, 1, 3, 8)
    x, y = torch.randn(9, 1), torch.randn(9, 1)
    parts = [NegativeLogLikelihood(network), ContinuousRankedProbability(network)]
    assert_close(WeightedSum(parts, [0.5, 2.0])(x, y), 0.5 * parts[0](x, y) + 2.0 * parts[1](x, y))
    assert len(list(WeightedSum(parts, [1, 1]).parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.nan], []])
def test_bad_weights_of_a_sum(weights):
    network = MixtureDensityNetwork(1, 1)
    with pytest.raises(ValueError, match="weights: expected one for each of 2 objectives"):
        WeightedSum([NegativeLogLikelihood(network), ContinuousRankedProbability(network)], weights)


def test_objectives_of_other_networks_are_refused():
    network, other = MixtureDensityNetwork(1, 1), MixtureDensityNetwork(1, 1)
    x, y = data()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="objective: expected a module with the network in it"):
        fit(network, x, y, objective=NegativeLogLikelihood(other))
    with pytest.raises(ValueError, match="objective, guide: expected one of the two"):
        fit(network, x, y, objective=NegativeLogLikelihood(network), guide=lambda x, y: None)
    with pytest.raises(ValueError, match="guide: expected a guide"):
        fit(network, x, y, guide=3)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
