"""Outputs of different families: against scipy, by sums and quadrature, by draws, and in everything that takes them."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import BATCH_SHAPES
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_mdn import (
    Angle,
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    Laplace,
    Log,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeBinomial,
    Normal,
    PerOutput,
    Poisson,
    Product,
    Standardize,
    StudentT,
    Targets,
    ZeroInflated,
    bayesianize,
    decisions,
    fit,
    laplace,
    posterior_predictive,
    scores,
    to_inference_data,
)
from pyro_mdn.distributions.families.counts.count_components import CountComponents
from pyro_mdn.distributions.families.products.columns import Columns
from pyro_mdn.distributions.families.products.product_components import ProductComponents
from pyro_mdn.distributions.units.count_units import Counts
from pyro_mdn.networks.rows import Rows
from pyro_mdn.networks.starting_point import clusters
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.training.schedules import blur_targets
from pyro_mdn.training.trainee import NetworkTrainee

NAN = math.nan
# Two dependent numbers of which one is positive, a count, an amount that may be zero, and a number with outliers.
FAMILIES = {
    "different": Product((Normal(Full()), "negative_binomial", ZeroInflated("normal"), StudentT(df=4)), (2, 1, 1, 1)),
    "shared": Product(
        (
            Normal(Full(tied=True)),
            NegativeBinomial(Diagonal(homoscedastic=True)),
            ZeroInflated(Laplace(Isotropic(tied=True, homoscedastic=True))),
            StudentT(Fixed(0.7)),
        ),
        (2, 1, 1, 1),
    ),
}
TRANSFORMS = ["log", "yeo_johnson", None, "log", "standardize"]
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def make_head(family=FAMILIES["different"], transforms=TRANSFORMS, n_components=3):
    torch.manual_seed(3)
    dim = len(transforms)
    head = MixtureHead(4, dim, n_components, family=family, target_transform=transforms).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head.scale.uniform_(0.7, 1.5)
    return head


def make_mixture(batch_shape=(5,), **settings):
    with torch.no_grad():
        return make_head(**settings)(torch.randn(*batch_shape, 4, dtype=torch.float64))


def splits(dim):
    """Outputs that are known, in some order, and the others."""
    for count in range(1, dim):
        for known in itertools.combinations(range(dim), count):
            yield list(known[::-1]), [d for d in range(dim) if d not in known]


def require_chain_rule(mixture, y):
    whole = mixture.log_prob(y)
    for known, free in splits(mixture.dim):
        evidence = mixture.marginal(known).log_prob(y[..., known])
        rest = mixture.condition(y[..., known], known).log_prob(y[..., free])
        assert_close(evidence + rest, whole, msg=lambda text, known=known: f"{known}: {text}")


def within(estimate, expected, number, spread):
    """Whether a mean of draws is within four standard errors."""
    assert abs(float(estimate) - float(expected)) < 4 * float(spread) / math.sqrt(number) + 1e-12


# The density


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@every_family
def test_chain_rule_for_every_split(family, batch_shape, n_components):
    mixture = make_mixture(batch_shape, family=family, n_components=n_components)
    require_chain_rule(mixture, mixture.sample())
    y = mixture.sample((2,))
    given = mixture.condition(y[..., [2, 0]], [2, 0])
    assert given.batch_shape == (2, *batch_shape)
    evidence = mixture.marginal([2, 0]).log_prob(y[..., [2, 0]])
    assert_close(evidence + given.log_prob(y[..., [1, 3, 4]]), mixture.log_prob(y))


def price_and_count(transform="log"):
    """Log-normal prices beside negative binomial counts, as a mixture, and by scipy for one row."""
    mixture = make_mixture((4,), family=["normal", "negative_binomial"], transforms=[transform, None])
    weights = mixture.logits.exp().numpy()
    prices, counts = mixture.components.parts
    locs, scales = prices.base.locs[..., 0].numpy(), prices.base.covariance.stddev()[..., 0].numpy()
    rates, shapes = counts.law.rate[..., 0].numpy(), counts.law.shape[..., 0].numpy()
    price = [scipy.stats.lognorm(s, scale=np.exp(m)) for m, s in zip(locs[0], scales[0], strict=True)]
    count = [scipy.stats.nbinom(r, r / (r + m)) for m, r in zip(rates[0], shapes[0], strict=True)]
    return mixture, weights[0], price, count


def test_against_scipy():
    mixture, weights, price, count = price_and_count()
    grid = [(y, k) for y in (0.05, 1.0, 7.0) for k in (0, 1, 9)]
    points = torch.tensor(grid, dtype=torch.float64).unsqueeze(1).expand(-1, 4, -1)
    laws = list(zip(weights, price, count, strict=True))
    joint = np.array([[w * p.pdf(y) * c.pmf(k) for w, p, c in laws] for y, k in grid])
    assert_close(mixture.log_prob(points)[:, 0].exp().numpy(), joint.sum(1))
    assert_close(mixture.responsibilities(points)[:, 0].numpy(), joint / joint.sum(1, keepdims=True))
    expected = [sum(w * c.cdf(k) for w, c in zip(weights, count, strict=True)) for _, k in grid]
    assert_close(mixture.cdf(points)[:, 0, 1].numpy(), np.array(expected))
    expected = [sum(w * p.cdf(y) for w, p in zip(weights, price, strict=True)) for y, _ in grid]
    assert_close(mixture.cdf(points)[:, 0, 0].numpy(), np.array(expected))
    means = np.array([[p.mean() for p in price], [c.mean() for c in count]])
    spreads = np.array([[p.var() for p in price], [c.var() for c in count]])
    centred = means - (means @ weights)[:, None]
    covariance = (weights * centred) @ centred.T + np.diag(spreads @ weights)
    assert_close(mixture.mean[0].numpy(), means @ weights)
    assert_close(mixture.covariance_matrix[0].numpy(), covariance)
    assert_close(mixture.as_gaussian().matrix()[0, 0].numpy(), covariance)
    assert_close(mixture.stddev[0].square().numpy(), covariance.diagonal().copy())
    # Given the price, the weights of the counts change.
    given = mixture.condition([[7.0]] * 4, [0])
    changed = np.array([w * p.pdf(7.0) for w, p in zip(weights, price, strict=True)])
    expected = [(changed * [c.pmf(k) for c in count]).sum() / changed.sum() for k in range(5)]
    counts = torch.arange(5.0).double().reshape(-1, 1, 1).expand(-1, 4, -1)
    assert_close(given.log_prob(counts)[:, 0].exp().numpy(), np.array(expected))
    assert isinstance(given.components, CountComponents)


def test_the_density_sums_and_integrates_to_one():
    mixture, *_ = price_and_count()
    row = mixture[0]

    def of_price(y):
        counts = torch.arange(400.0).double()
        return row.log_prob(torch.stack([torch.full_like(counts, y), counts], -1)).exp().sum().item()

    edges = row.icdf(torch.linspace(0, 1, 12).double()[1:-1, None])[:, 0].tolist()
    total = sum(scipy.integrate.quad(of_price, *ends)[0] for ends in pairwise([1e-9, *edges, 10 * edges[-1], 1e4]))
    assert abs(total - row.cdf(1e4)[0]) < 1e-7


@every_family
def test_what_each_output_is_by_itself(family):
    """All functions of single outputs are those of the marginals, which other tests compare with scipy."""
    mixture = make_mixture((6,), family=family)
    y = mixture.sample()
    together = mixture.univariate()
    for d in range(5):
        own, alone, column = mixture.marginal(d), mixture.marginal(d).univariate(), y[:, [d]]
        for name in ("log_prob", "cdf", "sf", "log_cdf", "log_sf", "log_sf_from", "expected_below", "expected_above"):
            assert_close(getattr(together, name)(y)[:, [d]], getattr(alone, name)(column))
        assert_close(together.steps(y)[0][:, [d]], alone.steps(column)[0])
        assert_close(mixture.icdf(0.7)[:, [d]], own.icdf(0.7))
        assert_close(mixture.mean[:, [d]], own.mean)
        assert_close(mixture.variance[:, [d]], own.variance)
        assert_close(scores.crps(mixture, y)[:, [d]], scores.crps(own, column))
        for kind in ("central", "shortest"):
            both = zip(mixture.interval(0.8, kind=kind), own.interval(0.8, kind=kind), strict=True)
            assert all(torch.equal(a[:, [d]], b) for a, b in both)
        assert_close(decisions.hazard(mixture, y)[:, [d]], decisions.hazard(own, column))
    assert bool((together.steps(y)[0] < together.steps(y)[1])[:, 2].all())  # counts have steps
    assert torch.equal(together.steps(y)[0][:, 4], together.steps(y)[1][:, 4])


def test_uniform_transforms_are_uniform():
    mixture = make_mixture(())
    levels = scores.pit(mixture, mixture.sample((2000,)))
    for column in levels.T:
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


# Draws, conditionals, and what is known in part


def test_draws_and_conditionals_by_monte_carlo():
    mixture = make_mixture(())
    draws = mixture.sample((200_000,))
    for d in (1, 2, 4):
        within(draws[:, d].mean(), mixture.mean[d], len(draws), draws[:, d].std())
    zeros = (draws[:, 3] == 0).double()
    within(zeros.mean(), mixture.cdf(0.0)[3], len(draws), zeros.std())
    for count, others in ((0.0, [0, 1, 3, 4]), (2.0, [0, 1, 3, 4])):
        chosen = draws[draws[:, 2] == count][:, others]
        assert len(chosen) > 2000
        given = mixture.condition([count], [2])
        for level in (0.1, 0.5, 0.9):
            points = given.icdf(level)
            below = (chosen <= points).double()
            for share, exact in zip(below.T, given.cdf(points), strict=True):
                within(share.mean(), exact, len(share), share.std())
    chosen = draws[(draws[:, 3] == 0) & (draws[:, 2] == 1)]
    given = mixture.condition([0.0, 1.0], [3, 2])
    below = (chosen[:, 4] <= given.icdf(0.3)[2]).double()
    within(below.mean(), 0.3, len(below), below.std())


@every_family
def test_missing_and_censored_entries_in_one_row(family):
    """The likelihood is that of the exact entries times the probability of the rest given these, by draws."""
    mixture = make_mixture((), family=family)
    price, number = mixture.icdf(0.6)[0].item(), mixture.icdf(0.4)[4].item()
    exact = mixture.marginal([0, 4]).log_prob([price, number])
    given = mixture.condition([price, number], [0, 4])  # of outputs 1, 2 and 3
    least, most = 1 + given.icdf(0.5)[1].item(), given.icdf(0.7)[2].item()
    lower = torch.tensor([price, -math.inf, least, -math.inf, number], dtype=torch.float64)
    upper = torch.tensor([price, math.inf, math.inf, most, number], dtype=torch.float64)
    draws = given.sample((100_000,))
    hits = ((draws[:, 1] >= least) & (draws[:, 2] <= most)).double()
    share = (mixture.log_prob(Targets(lower, upper)) - exact).exp()
    assert 0.05 < share < 0.95
    within(hits.mean(), share, len(hits), hits.std())
    # The same by the sum of probabilities that are exact.
    joint = given.logits.exp() * given.components.parts[1].law.sf(torch.tensor([[least - 1]]))[:, 0]
    amounts = given.components.parts[2].output_log_interval(torch.tensor([-math.inf]), torch.tensor([most]))
    assert_close((joint * amounts[0].exp()).sum(), share)


@every_family
def test_dependent_entries_that_are_censored_within_a_part(family):
    mixture = make_mixture((), family=family)
    low = mixture.icdf(0.5)[:2]
    lower = torch.tensor([low[0], low[1], 1.0, 0.0, -math.inf], dtype=torch.float64)
    upper = torch.tensor([math.inf, math.inf, 1.0, 0.0, math.inf], dtype=torch.float64)
    draws = mixture.condition([1.0, 0.0], [2, 3]).sample((100_000,))
    hits = ((draws[:, 0] >= low[0]) & (draws[:, 1] >= low[1])).double()
    share = (mixture.log_prob(Targets(lower, upper)) - mixture.marginal([2, 3]).log_prob(lower[[2, 3]])).exp()
    # The probability of a box of dependent outputs has the error of its integral, about 1e-3.
    assert abs(float(hits.mean() - share)) < 4 * float(hits.std()) / math.sqrt(len(hits)) + 2e-3


@every_family
def test_missing_entries(family):
    mixture = make_mixture((6,), family=family)
    y = mixture.sample()
    for row, pair in enumerate([[0, 2], [1, 3], [2, 2], [0, 1], [3, 4]]):
        y[row, pair] = NAN
    y[5] = NAN
    expected = [mixture[i].marginal(seen).log_prob(y[i, seen]) for i in range(5) if (seen := observed(y[i]))]
    assert_close(mixture.log_prob(y), torch.stack([*expected, torch.zeros(()).double()]))
    assert_close(mixture.log_prob(Targets.exact(y)), mixture.log_prob(y))
    assert_close(mixture.component_log_prob(y).logsumexp(-1).shape, torch.Size([6]))
    given = mixture.condition(y[:, [2, 0]], [2, 0])
    for i in range(6):
        known = [d for d in (2, 0) if not y[i, d].isnan()]
        row = mixture[i].condition(y[i, known], known) if known else mixture[i]
        columns = [[d for d in range(5) if d not in known].index(d) for d in (1, 3, 4)]
        assert_close(given[i].cdf(1.0), row.marginal(columns).cdf(1.0))


def observed(row):
    return [d for d in range(len(row)) if not row[d].isnan()]


# Angles


ANGLES = Product((Normal(Full()), "negative_binomial", "laplace"), sizes=(2, 1, 1))
TURNS = ["angle", "yeo_johnson", None, Angle(360, low=0)]


@pytest.mark.parametrize("n_components", [1, 3])
def test_angles_beside_counts(n_components):
    mixture = make_mixture((4,), family=ANGLES, transforms=TURNS, n_components=n_components)
    y = mixture.sample()
    require_chain_rule(mixture, y)
    for d, moments in enumerate(zip(mixture.mean.T, mixture.stddev.T, strict=True)):
        assert_close(moments, (mixture.marginal(d).mean[:, 0], mixture.marginal(d).stddev[:, 0]))
    assert_close(mixture.mean[:, 2], (mixture.logits.exp() * mixture.components.parts[1].law.rate[..., 0]).sum(-1))
    y[0, 0] = y[1, 2] = y[2, 3] = NAN
    given = mixture.condition(y[:, [2, 0]], [2, 0])
    assert given.n_components == 7 * n_components
    assert_close(given[3].log_prob(y[3, [1, 3]]), mixture[3].condition(y[3, [2, 0]], [2, 0]).log_prob(y[3, [1, 3]]))
    pair = mixture.marginal([0, 1])  # no product, whose other output has a warp with tensors
    alone = pair[3].condition(y[3, [0]], [0])
    assert_close(pair.condition(y[:, [0]], [0])[3].log_prob(y[3, [1]]), alone.log_prob(y[3, [1]]))
    in_part = mixture[0].marginal([1, 2, 3]).condition(y[0, [2]], [1])
    assert_close(given[0].log_prob(y[0, [1, 3]]), in_part.log_prob(y[0, [1, 3]]))
    for refused in (lambda: mixture.covariance_matrix, lambda: scores.energy_score(mixture, y), mixture.as_gaussian):
        with pytest.raises(NotImplementedError, match="WrappedComponents"):
            refused()
    with pytest.raises(ValueError, match=r"numbers between 0 and 360, got 400 in row 1, column 3"):
        mixture.log_prob(torch.tensor([[1.0, 1.0, 1.0, 30.0], [1.0, 1.0, 1.0, 400.0]]).double()[[0, 1, 0, 0]])


def test_censored_angles_beside_counts():
    head = make_head(ANGLES, TURNS)
    features = torch.randn(1, 4).double()
    with torch.no_grad():
        mixture = head(features)
        lower = torch.tensor([[-1.0, 0.3, 1.0, 90.0]], dtype=torch.float64)
        upper = torch.tensor([[1.0, 0.3, math.inf, 300.0]], dtype=torch.float64)
        arcs = Targets(lower, upper)
        share = (mixture.log_prob(arcs) - mixture.marginal([1]).log_prob(lower[:, [1]])).exp()
        draws = mixture.condition(lower[:, [1]], [1]).sample((100_000,))[:, 0]
        hits = (draws[:, 0].abs() <= 1) & (draws[:, 1] >= 1) & (draws[:, 2] >= 90) & (draws[:, 2] <= 300)
        within(hits.double().mean(), share, len(hits), hits.double().std())
        assert_close(head.log_prob(features, arcs), mixture.log_prob(arcs))


# From raw channels to mixtures


@pytest.mark.parametrize("transforms", [TRANSFORMS, ["angle", "log", None, "log", "asinh"]], ids=["line", "angle"])
@every_family
def test_heads_have_the_density_of_their_mixtures(family, transforms):
    head = make_head(family, transforms)
    features = torch.randn(6, 4).double()
    with torch.no_grad():
        y = head(features).sample()
    partial = torch.where(torch.rand(6, 5) < 0.3, NAN, y)
    censored = Targets(y, torch.where(torch.rand(6, 5) < 0.3, math.inf, y))
    for targets in (y, partial, censored):
        assert_close(head.log_prob(features, targets), head(features).log_prob(targets))


@pytest.mark.parametrize("missing", [False, True])
@every_family
def test_gradients(family, missing):
    head = make_head(family)
    features = torch.randn(3, 4).double()
    with torch.no_grad():
        y = head(features).sample()
    y[0, 3], y[1, 2] = 0.0, 0.0
    y[2, [0, 2, 3]] = NAN if missing else 1.0
    raw = [part.detach().requires_grad_() for part in head.raw(features)]
    units = head.units
    assert torch.autograd.gradcheck(lambda *raw: head.log_density(raw, y, units), raw, fast_mode=True)


def test_extremes_are_finite_in_single_precision():
    head = MixtureHead(1, 5, 3, family=FAMILIES["different"], target_transform=TRANSFORMS)
    y = torch.tensor([[1e-20, -1e6, 0.0, 0.0, 1e6], [1e20, 1e6, 1e6, 1e20, -1e6], [1.0, 0.0, 3.0, 1e-20, 0.0]])
    for size in (0.0, 30.0, 1e4):
        loss = -head.log_prob(torch.full((3, 1), size), y).sum()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in head.parameters())


def test_each_part_has_its_own_noise_and_units():
    families = Normal(Isotropic(tied=True)), StudentT(Fixed(0.7), df=4), NegativeBinomial(Isotropic())
    family = Product(families, sizes=(2, 1, 2))
    head = MixtureHead(2, 5, 3, family=family, target_transform=[None, None, "standardize", None, None])
    widths = [(block.width, block.tied, block.homoscedastic) for block in family.blocks(5)]
    assert widths == [(1, True, False), (0, True, True), (1, False, False)]
    y = torch.randn(200, 5).mul(torch.tensor([1.0, 10.0, 5.0, 1.0, 1.0])).add(3.0)
    y[:, 3:] = torch.poisson(torch.tensor([2.0, 20.0]).expand(200, 2))
    head.initialize_(y)
    assert head.scale[0] == head.scale[1]  # isotropic noise in the units of y
    assert_close(head.scale[0], y[:, :2].std(0, correction=0).square().mean().sqrt())
    assert_close(head.scale[2], y[:, 2].std(correction=0))
    assert_close(head.scale[3:], y[:, 3:].mean().expand(2))
    mixture = head(torch.zeros(4, 2))
    assert_close(mixture.components.parts[1].covariance.stddev().unique(), torch.tensor([0.7]))
    spread = mixture.components.parts[0].covariance.stddev()
    assert_close(spread, spread[:1, :1, :1].expand(spread.shape))


def test_counts_start_at_clusters_whatever_their_size():
    torch.manual_seed(0)
    group = (torch.arange(300) % 2).double()
    y = torch.stack([3 * group + 0.1 * torch.randn(300), torch.poisson(1 + 8 * group)], 1)
    middles = torch.tensor([[0.0, 1.0], [3.0, 9.0]], dtype=torch.float64)
    for factor in (1.0, 1000.0):
        torch.manual_seed(1)
        units = torch.tensor([1.0, factor], dtype=torch.float64)
        weights, centres, _ = clusters(y * units, 2, alike=False)
        assert_close(centres.sort(0).values / units, middles, rtol=0.1, atol=0.1)
        assert_close(weights.exp(), torch.tensor([0.5, 0.5]).double(), rtol=0.05, atol=0.0)
    head = MixtureHead(2, 2, 2, family=["normal", "poisson"])
    head.initialize_(y.float())
    with torch.no_grad():
        mixture = head(torch.zeros(1, 2))
    assert_close(mixture.locs[0].sort(0).values, middles.float(), rtol=0.2, atol=0.2)


def test_noise_on_targets_leaves_counts_and_zeros():
    head = MixtureHead(2, 5, 2, family=FAMILIES["different"], target_transform=TRANSFORMS)
    y = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0], [2.0, -1.0, 0.0, 2.0, NAN]])
    moved = blur_targets(y, head.units, 0.3)
    same = (moved == y) | (moved.isnan() & y.isnan())
    assert torch.equal(same, torch.tensor([[False, False, True, True, False], [False, False, True, False, True]]))
    some = blur_targets(Targets.exact(y), head.units, 0.3, least=torch.tensor([0.1, 0.1, 0.0, 0.0, 0.1]))
    assert torch.equal(some.lower[:, 2], y[:, 2])
    assert (some.lower[0, [0, 1, 4]] != y[0, [0, 1, 4]]).all()


# Operations


def test_indexing_joining_and_precision():
    mixture = make_mixture((4,))
    y = mixture.sample()
    density = mixture.log_prob(y)
    assert_close(Mixture.cat([mixture[:1], mixture[1:]]).log_prob(y), density)
    assert_close(Mixture.stack(list(mixture)).log_prob(y), density)
    assert_close(mixture[2].log_prob(y[2]), density[2])
    assert_close(mixture.expand((2, 4)).log_prob(y), density.expand(2, 4))
    assert_close(mixture.float().log_prob(y.float()), density.float(), rtol=1e-3, atol=1e-3)
    assert mixture.float().double().dtype == torch.float64
    backwards = mixture.detach().marginal([4, 2, 0]).log_prob(y[:, [4, 2, 0]])
    assert_close(backwards, mixture.marginal([0, 2, 4]).log_prob(y[:, [0, 2, 4]]))
    assert_close(mixture.prune(0.0).log_prob(y), density)
    with pytest.raises(ValueError, match="expected equal structures"):
        Mixture.cat([mixture, make_mixture((4,), family=FAMILIES["shared"])])


def test_pools_are_averages():
    mixture = make_mixture((3, 4))
    y = mixture.sample()[0]
    expected = mixture.log_prob(y).logsumexp(0) - math.log(3)
    assert_close(mixture.pool(0).log_prob(y), expected)
    assert mixture.pool(0).n_components == 9


def test_transport_of_outputs_with_densities():
    family = Product((Normal(Full()), StudentT(df=5), Laplace()), sizes=(2, 1, 1))
    mixture = make_mixture((3,), family=family, transforms=["log", None, None, "asinh"]).marginal([3, 1, 0, 2])
    y = mixture.sample()
    levels = mixture.rosenblatt(y)
    assert_close(mixture.inverse_rosenblatt(levels), y)
    known = [mixture.marginal(range(d + 1)).condition(y[:, :d], range(d)) for d in range(1, 4)]
    expected = [mixture.marginal(0).cdf(y[:, :1]), *(one.cdf(y[:, [d]]) for d, one in enumerate(known, 1))]
    assert_close(levels, torch.cat(expected, 1))
    shifted = mixture.affine(1.0, torch.tensor([2.0, 1.0, 3.0, 1.0]).double())
    assert_close(shifted.log_prob(1 + y * torch.tensor([2.0, 1.0, 3.0, 1.0])), mixture.log_prob(y) - math.log(6))
    head = make_head(family, ["log", None, None, "asinh"])
    assert head(torch.randn(3, 4).double()).rsample((2,)).requires_grad


def test_what_counts_do_not_have_is_refused():
    mixture = make_mixture((2,))
    for refused in (
        lambda: mixture.rosenblatt(mixture.mean),
        lambda: mixture.affine(1.0, 2.0),
        lambda: mixture.temper(2.0),
    ):
        with pytest.raises(NotImplementedError, match="Count"):
            refused()
    with pytest.raises(NotImplementedError, match="rsample"):
        make_head()(torch.randn(2, 4).double()).rsample()


def test_support_and_sites():
    mixture = make_mixture((3,))
    y = pyro.poutine.trace(lambda: pyro.sample("y", mixture)).get_trace().nodes["y"]["value"]
    assert mixture.support.check(y).all()
    assert mixture.support.event_dim == 1
    for column, outside in ((0, 0.0), (2, 1.5), (2, -1.0), (3, -0.1)):
        wrong = y.clone()
        wrong[1, column] = outside
        assert torch.equal(mixture.support.check(wrong), torch.tensor([True, False, True]))


def test_columns():
    columns = Columns.of_sizes([2, 3, 1])
    value = torch.arange(12.0).reshape(2, 6)
    chosen, other = columns.marginal([5, 3, 0, 2])
    assert chosen == [[0], [1, 0], [0]]
    parts = [part[:, own] for part, own in zip(columns.split(value), chosen, strict=True)]
    assert torch.equal(other.join(parts), value[:, [5, 3, 0, 2]])
    components = make_mixture((2,)).components
    assert isinstance(components, ProductComponents)
    with pytest.raises(ValueError, match=r"columns: expected \[2, 1, 1, 1\] outputs"):
        Mixture(torch.zeros(2, 3).double(), ProductComponents(components.parts, Columns.of_sizes([1, 2, 1, 1])))


# Networks


@pytest.fixture(scope="module")
def rows():
    """A price and a count, which depend on each other through what is not seen, and the density by scipy."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1200, 1))
    busy = rng.random((1200, 1)) < 1 / (1 + np.exp(-2 * x))
    price = np.exp(np.where(busy, 1.5, 0.0) + 0.3 * rng.normal(size=(1200, 1)))
    return torch.from_numpy(x).float(), torch.from_numpy(np.c_[price, rng.poisson(np.where(busy, 8.0, 1.0))]).float()


@pytest.fixture(scope="module")
def trained(rows):
    x, y = rows
    network = MixtureDensityNetwork(
        1, 2, 3, 16, family=["normal", "negative_binomial"], target_transform=["log", None], seed=0
    )
    fit(network, x[:600], y[:600], max_epochs=25, progress=False, seed=0)
    return network


def test_dependent_outputs_are_better_predicted_together(rows, trained):
    x, y = rows
    together = scores.log_score(trained(x[600:]), y[600:]).mean().item()
    apart = 0.0
    for d, settings in enumerate(({"target_transform": "log"}, {"family": "negative_binomial"})):
        network = MixtureDensityNetwork(1, 1, 3, 16, seed=0, **settings)
        fit(network, x[:600], y[:600, [d]], max_epochs=25, progress=False, seed=0)
        apart += scores.log_score(network(x[600:]), y[600:, [d]]).mean().item()
    assert together < apart - 0.3
    busy = torch.sigmoid(2 * x[600:, 0]).double().numpy()
    price, count = y[600:].double().numpy().T
    density = sum(
        w * scipy.stats.lognorm(0.3, scale=np.exp(m)).pdf(price) * scipy.stats.poisson(r).pmf(count)
        for w, m, r in ((busy, 1.5, 8.0), (1 - busy, 0.0, 1.0))
    )
    assert together < -np.log(density).mean() + 0.15
    given = trained(x[:1]).condition([[5.0]], [0])
    assert given.mean > 1.5 * trained(x[:1]).condition([[0.8]], [0]).mean


def test_files(tmp_path, rows):
    x, y = rows
    family = Product((Normal(Full(tied=True)), ZeroInflated(Poisson())), sizes=(2, 1))
    network = MixtureDensityNetwork(1, 3, 2, 4, family=family, target_transform=["log", "yeo_johnson", None])
    y = torch.cat([y[:50, :1], x[:50], y[:50, 1:]], 1)
    fit(network, x[:50], y, max_epochs=1, progress=False)
    network.save(tmp_path / "one")
    loaded = MixtureDensityNetwork.load(tmp_path / "one")
    assert loaded.head.family == family
    assert loaded.head.transform == network.head.transform
    assert torch.equal(loaded(x[:50]).log_prob(y), network(x[:50]).log_prob(y))
    assert Product.from_config(family.to_config()) == family


def test_ensembles(tmp_path, rows):
    x, y = rows[0][:60], rows[1][:60].clone()
    y[::7, 0] = NAN
    network = MixtureDensityNetwork(1, 2, 2, 4, family=["normal", "poisson"], target_transform=["yeo_johnson", None])
    ensemble = DeepEnsemble(network, 3)
    censored = Targets.censored(y, right=np.c_[np.zeros(60), np.arange(60) % 5 == 0])
    fit(ensemble, x, censored, max_epochs=2, progress=False)
    pooled, members = ensemble(x), [ensemble.member(i)(x).log_prob(y) for i in range(3)]
    assert_close(pooled.log_prob(y), torch.stack(members).logsumexp(0) - math.log(3))
    ensemble.save(tmp_path / "several")
    assert_close(DeepEnsemble.load(tmp_path / "several")(x).log_prob(y), pooled.log_prob(y))


def test_posteriors(rows):
    x, y = rows[0][:40], rows[1][:40]
    settings = {"family": ["normal", "negative_binomial"], "target_transform": ["log", None]}
    network = MixtureDensityNetwork(1, 2, 2, 4, **settings)
    fit(network, x, y, max_epochs=2, progress=False)
    bayesianize(network)
    guide = laplace(network, x, y, progress=False)
    draws = posterior_predictive(network, guide, x, num_samples=4, linearize=True)
    assert draws.batch_shape == (4, 40)
    assert_close(draws.pool(0).log_prob(y), draws.log_prob(y).logsumexp(0) - math.log(4))
    data = to_inference_data(draws, x=x, y=y, output_names=["price", "count"])
    kinds = {name: values.dtype.kind for name, values in data["posterior_predictive"].items()}
    assert kinds == {"price": "f", "count": "i"}
    assert data["observed_data"]["count"].dtype.kind == "i"
    assert (data["observed_data"]["price"] == y[:, 0].numpy()).all()
    assert set(data["log_likelihood"]) == {"joint", "price", "count"}
    variational = MixtureDensityNetwork(1, 2, 2, 4, **settings)
    bayesianize(variational)
    result = fit(variational, x, y, guide=AutoNormal, max_epochs=2, progress=False)
    assert np.isfinite(result.history[-1]["loss"])


def test_scores_as_objectives(rows):
    x, y = rows[0][:40], rows[1][:40]
    network = MixtureDensityNetwork(1, 2, 2, 4, family=["normal", "poisson"], target_transform=["log", None])
    fit(network, x, y, objective=ContinuousRankedProbability(network), max_epochs=2, progress=False)
    assert scores.crps(network(x), y).isfinite().all()


def test_numbers_on_a_grid_beside_counts(rows):
    x, y = rows[0][:200], rows[1][:200].clone()
    y[:, 0] = (2 * y[:, 0]).round().clamp(min=1) / 2
    settings = {"family": ["normal", ZeroInflated("poisson")], "target_transform": ["log", None]}
    network = MixtureDensityNetwork(1, 2, 2, 4, **settings)
    trainee = NetworkTrainee(network)
    assert torch.equal(trainee.cell(Rows(x, y)), torch.tensor([0.5, 0.0]))
    result = fit(network, x, y, max_epochs=3, progress=False)
    assert np.isfinite(result.history[-1]["loss"])


def test_default_devices_do_not_matter(rows):
    """Nothing is made without a device: on this one, a tensor has no numbers."""
    x, y = rows[0][:30], rows[1][:30].clone()
    network = MixtureDensityNetwork(1, 2, 2, 4, family=["normal", "poisson"], target_transform=["log", None])
    with torch.device("meta"):
        fit(network, x, y, max_epochs=1, progress=False)
        mixture = network(x)
        y[3, 1] = NAN
        results = [mixture.log_prob(y), mixture.condition(y[:, [1]], [1]).mean, mixture.marginal([1, 0]).icdf(0.4)]
        results += [mixture.sample(), mixture.covariance_matrix, scores.pit(mixture, y)]
    assert all(result.device.type == "cpu" for result in results)


def test_regressor(rows):
    x, y = (values[:80].double().numpy() for values in rows)
    settings = {"family": ["normal", "poisson"], "target_transform": ["log", None]}
    model = MDNRegressor(2, 4, max_epochs=2, random_state=0, **settings).fit(x, y)
    assert model.predict(x).shape == (80, 2)
    counts = model.predict_quantiles(x, 0.5)[:, 1]
    assert np.array_equal(counts, np.round(counts))
    assert np.isclose(model.score(x, y), model.predict_distribution(x).log_prob(torch.from_numpy(y)).mean())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_and_mapped(rows, trained):
    x, y = rows[0][:20], rows[1][:20]
    expected = trained.loss(x, y)
    compiled = torch.compile(lambda x, y: trained.loss(x, y), backend="eager")
    assert_close(compiled(x, y), expected)
    raw, units = trained.head.raw(trained.features(x)), trained.head.units
    mapped = torch.vmap(lambda raw, y: trained.head.log_density(raw, y, units))(raw, y)
    assert_close(-mapped, expected)
    mixture = trained(x).detach()
    likelihood = torch.compile(lambda y: mixture.log_prob(y), backend="eager")
    with pytest.raises(ValueError, match=r"value: expected a tensor of complete points under torch.compile"):
        likelihood(Targets.exact(y))


# Arguments


def test_transforms_of_parts():
    family = Product((Normal(), Poisson(), ZeroInflated("normal")), sizes=(2, 1, 1))
    for given in (["log", "log", None, "log"], "log", PerOutput(["log", "log", "standardize", "log"]), Log()):
        transform = MixtureHead(1, 4, 1, family=family, target_transform=given).transform
        assert transform.transforms == (Log(), Counts(), Log())
        assert MixtureHead(1, 4, 1, family=family, target_transform=transform).transform == transform
    head = MixtureHead(1, 2, 1, family=["normal", "poisson"])
    assert head.transform.transforms == (Standardize(), Counts())
    assert head.family == Product((Normal(), Poisson()))
    head = MixtureHead(1, 2, 1, family=["von_mises", "normal"], target_transform=[None, "log"])
    assert head.transform.transforms == (Angle(), Log())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": []}, "families: expected a sequence"),
        ({"family": ["normal", 3]}, "families: expected families that are no products, or names, got 3"),
        ({"family": [Product(("normal",)), "poisson"]}, "no products"),
        ({"family": ["normal", "poison"]}, "got 'poison'"),
        ({"family": ["normal"]}, "expected 1 outputs.*got dim_out=2"),
        ({"family": ["normal", "poisson"], "noise": "full"}, "noise: expected None beside Product"),
        ({"target_transform": ["log"]}, "expected 2 transforms, one for each output, or a single one, got 1"),
        ({"target_transform": ["log", "log"]}, "expected None beside Poisson.*got Log"),
        ({"target_transform": ["counts", None]}, "expected one for real numbers beside Normal"),
        ({"family": "normal", "target_transform": ["counts", "log"]}, "expected one for real numbers beside Normal"),
        ({"target_transform": "nonsense"}, "got 'nonsense'"),
        ({"family": [ZeroInflated("normal"), "poisson"]}, "expected one with a lower end"),
    ],
)
def test_arguments_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureHead(1, 2, 1, **{"family": ["normal", "poisson"], **settings})


@pytest.mark.parametrize("sizes", [(1,), (1, 0), (1, 1.5), "11"])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="sizes: expected 2 positive integers, one for each family"):
        Product(("normal", "poisson"), sizes)


def test_targets_outside_of_their_support(rows, trained):
    x, y = rows[0][:8], rows[1][:8].clone()
    before = trained.state_dict()["head.scale"].clone()
    for column, value, expected in ((1, 1.5, "counts 0, 1, 2, ..."), (0, -1.0, "numbers between 0 and inf")):
        wrong = y.clone()
        wrong[3, column] = value
        message = rf"{expected}, got {value:g} in row 3, column {column}"
        for refused in (
            lambda y: fit(trained, x, y, max_epochs=1, progress=False),
            lambda y: trained.loss(x, y),
            lambda y: trained(x).log_prob(y),
            lambda y: trained(x).log_prob(Targets.exact(y)),
        ):
            with pytest.raises(ValueError, match=message):
                refused(wrong)
        with pytest.raises(ValueError, match=rf"{expected}, got {value:g} in row 3, column 0"):
            trained(x).condition(wrong[:, [column]], [column])
    assert torch.equal(trained.head.scale, before)


def test_errors_name_rows_and_columns_of_conditions_that_are_known_in_part():
    families, transforms = ["normal", "poisson", "laplace"], ["log", None, "log"]
    mixture = MixtureDensityNetwork(1, 3, 2, 4, family=families, target_transform=transforms)(torch.randn(4, 1))
    known = torch.ones(4, 2)
    known[0, 0] = known[3, 0] = math.nan
    for dims, wrong in (([0, 1], 1.5), ([1, 2], -1.0)):
        known[3, 1] = wrong
        with pytest.raises(ValueError, match=f"got {wrong:g} in row 3, column 1"):
            mixture.condition(known, dims)
