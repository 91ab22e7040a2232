"""Targets on a grid: likelihoods of cells."""

import copy
import math

import pytest
import torch
from cases import NOISE
from torch.testing import assert_close

from pyro_mdn import (
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    WeightedSum,
    fit,
)
from pyro_mdn.support.process_state import unvalidated


def rows(n=7, dim=2):
    return torch.randn(n, 3, dtype=torch.float64), torch.randn(n, dim, dtype=torch.float64)


def network(noise=None, dim=2):
    net = MixtureDensityNetwork(3, dim, 3, 8, noise=noise or Diagonal()).double()
    torch.nn.init.normal_(net.head.linear.weight)
    net.head.scale.fill_(1.5)
    return net


@pytest.mark.parametrize("name", NOISE)
def test_density_is_the_mean_over_points_of_the_cell(name):
    net, (x, y) = network(NOISE[name]), rows()
    y[2, 1] = torch.nan
    cell = torch.tensor([0.8, 0.3], dtype=torch.float64)
    seen = []
    net.loss, loss = lambda x, y, **settings: seen.append(y) or loss(x, y, **settings), net.loss
    losses = NegativeLogLikelihood(net, cell, num_points=5)(x, y)
    (points,) = seen
    strata = ((points - y) / cell + 0.5) * 5
    expected = torch.arange(5.0, dtype=torch.float64).reshape(5, 1).expand(5, 13)
    assert_close(strata.permute(1, 2, 0)[~y.isnan()].floor().sort(1).values.T, expected)
    mixture = net(x)
    assert_close(losses, -torch.stack([mixture.log_prob(p) for p in points]).exp().mean(0).log())
    parameters = list(net.parameters())
    for gradient in torch.autograd.grad(losses.sum(), parameters):
        assert gradient.isfinite().all()


def test_many_points_give_the_probability_of_the_cell():
    net, (x, y) = network(), rows()
    cell = torch.tensor([0.8, 0.3], dtype=torch.float64)
    mixture = net(x)
    components = torch.distributions.Normal(mixture.locs, mixture.covariance.scale)
    ends = [components.cdf((y + sign * cell / 2).unsqueeze(-2)) for sign in (1, -1)]
    expected = -(mixture.logits.exp() * (ends[0] - ends[1]).prod(-1)).sum(-1).log() + cell.log().sum()
    assert_close(NegativeLogLikelihood(net, cell, 40_000)(x, y), expected, atol=0.01, rtol=0)
    few = NegativeLogLikelihood(net, cell, 2)
    draws = torch.stack([few(x, y) for _ in range(4000)]).detach()
    above = draws.mean(0) - expected
    assert (above > -4 * draws.std(0) / 4000**0.5).all()  # a bound, in the mean


def test_outputs_without_cells_keep_their_density():
    net, (x, y) = network(), rows()
    assert_close(NegativeLogLikelihood(net, torch.zeros(2))(x, y), net.loss(x, y))


def test_points_differ_in_training_and_stay_in_evaluation():
    net, (x, y) = network(), rows()
    objective = NegativeLogLikelihood(net, torch.ones(2))
    assert not torch.equal(objective(x, y), objective(x, y))
    objective.eval()
    state = torch.get_rng_state()
    assert torch.equal(objective(x, y), objective(x, y))
    assert torch.equal(state, torch.get_rng_state())


def test_members_of_an_ensemble_have_the_loss_of_networks():
    ensemble = DeepEnsemble([network(), network()])
    (x, y), cell = rows(), torch.tensor([1.0, 0.0])
    losses = NegativeLogLikelihood(ensemble, cell).eval()(torch.stack([x, x]), torch.stack([y, y]))
    for i, loss in enumerate(losses):
        assert_close(loss, NegativeLogLikelihood(ensemble.member(i), cell).eval()(x, y))


@pytest.mark.parametrize("cell", [torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.inf])])
def test_bad_cells(cell):
    with pytest.raises(ValueError, match="cell: expected 2 finite numbers, none negative, got"):
        NegativeLogLikelihood(network(), cell)


def test_bad_use_of_cells():
    with pytest.raises(ValueError, match="num_points: expected a positive integer, got 0"):
        NegativeLogLikelihood(network(), torch.ones(2), 0)
    objective = NegativeLogLikelihood(network(), torch.ones(2))
    with pytest.raises(ValueError, match=r"y: expected vectors of 2, as the cells are, got shape \(7, 1\)"):
        objective(rows()[0], rows()[1][:, :1])
    with pytest.raises(ValueError, match=r"cell: expected 2 finite numbers, .*, got Tensor torch.float32"):
        NegativeLogLikelihood(network(), torch.ones(3))
    one = NegativeLogLikelihood(network(dim=1), 1.0).eval()
    x, y = rows()[0], rows()[1][:, 0]
    assert_close(one(x, y), one(x, y.unsqueeze(-1)))


# Training


def counts():
    """Targets 0, 1, 2, of one probability for every x."""
    x = torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    return x, torch.randint(0, 3, (600, 1), generator=torch.Generator().manual_seed(1)).float()


def with_crps(net):
    return WeightedSum([NegativeLogLikelihood(net), ContinuousRankedProbability(net)], [1.0, 0.1])


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("objective", [None, with_crps], ids=["default", "another"])
def test_densities_do_not_spike_on_a_grid(size, objective):
    """Targets 0, 1, 2: the mass goes to their cells, and the density stays that of a scale of about a sixth."""
    x, y = counts()
    trained = MixtureDensityNetwork(1, 1, 3, 16)
    trained = trained if size is None else DeepEnsemble(trained, size)
    given = objective and objective(trained if size is None else trained.stacked)
    fit(trained, x, y, objective=given, seed=0, max_epochs=100, progress=False)
    mixture = trained(x)
    assert mixture.log_prob(y).exp().mean() < 1.2
    assert (mixture.cdf(y + 0.5) - mixture.cdf(y - 0.5)).log().mean() > math.log(1 / 3) - 0.1


def test_loss_of_a_fit_is_that_of_cells():
    """Three cells of one probability: no density over them can have a lower loss than the logarithm of three."""
    x, y = counts()
    result = fit(MixtureDensityNetwork(1, 1, 3, 16), x, y, seed=0, max_epochs=60, progress=False)
    assert math.log(3) - 0.03 < result.best_loss < math.log(3) + 0.1


def test_without_target_noise_densities_are_of_points():
    x, y = counts()
    result = fit(MixtureDensityNetwork(1, 1, 3, 16), x, y, target_noise=0.0, seed=0, max_epochs=60, progress=False)
    assert result.best_loss < 0


def test_compiled_likelihood_of_cells():
    """Points are drawn inside the graph, anew in each step."""
    torch.compiler.reset()
    net, (x, y) = network(), rows()
    objective = NegativeLogLikelihood(net, torch.ones(2), 5000)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    with unvalidated():
        first, second = compiled(x, y), compiled(x, y)
    assert not torch.equal(first, second)
    assert_close(first, objective.eval()(x, y), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [None, 2])
def test_an_objective_with_cells_of_its_own_is_trained_as_it_is(size):
    x, y = counts()
    start = MixtureDensityNetwork(1, 1, 3, 16)
    given = start if size is None else DeepEnsemble(start, size)
    default = copy.deepcopy(given)
    settings = {"seed": 0, "max_epochs": 3, "progress": False}
    fit(given, x, y, objective=NegativeLogLikelihood(given, torch.ones(1)), **settings)
    fit(default, x, y, **settings)
    for a, b in zip(given.parameters(), default.parameters(), strict=True):
        assert torch.equal(a, b)
