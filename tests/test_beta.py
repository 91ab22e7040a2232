"""Beta components: against mpmath, scipy and scoringrules, by draws, and in everything that takes a family."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import scoringrules
import torch
from cases import BATCH_SHAPES
from torch.testing import assert_close

from pyro_mdn import (
    Beta,
    DeepEnsemble,
    Diagonal,
    Fixed,
    Isotropic,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeLogLikelihood,
    Normal,
    Product,
    Targets,
    bayesianize,
    fit,
    laplace,
    posterior_predictive,
    scores,
)
from pyro_mdn.distributions.families.shares.beta_components import BetaComponents, BetaLogitComponents
from pyro_mdn.distributions.families.shares.beta_law import BetaLogitLaw
from pyro_mdn.distributions.families.shares.beta_tails import log_beta_cdf
from pyro_mdn.distributions.units.warps import LogitWarp
from pyro_mdn.sklearn import MDNRegressor

NOISE = [
    Diagonal(),
    Diagonal(tied=True),
    Diagonal(homoscedastic=True),
    Isotropic(tied=True, homoscedastic=True),
    Fixed(0.4),
]
MEANS_AND_SIZES = [(0.3, 7.0), (0.5, 1.0), (0.02, 1.0), (0.9, 0.3), (0.001, 0.5), (0.4, 1e3), (0.5, 0.02)]


def law_of(location, concentration, dtype=torch.float64):
    return BetaLogitLaw(torch.tensor(location, dtype=dtype), torch.tensor(concentration, dtype=dtype))


def mixture_of(weights, means, sizes, low=0.0, high=1.0):
    weights, means, sizes = (torch.tensor(t, dtype=torch.float64) for t in (weights, means, sizes))
    locs = means.logit().unsqueeze(-1)
    base = BetaLogitComponents(locs, torch.ones_like(locs), BetaLogitLaw(locs, sizes.unsqueeze(-1)))
    return Mixture(weights.log(), BetaComponents(base, LogitWarp(low, high)))


def make_head(dim, n_components, family):
    torch.manual_seed(0)
    head = MixtureHead(4, dim, n_components, family=family).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return head


# The law of one logit


def shapes(location, concentration):
    mean = 1 / (1 + mpmath.exp(-mpmath.mpf(location)))
    return mean * concentration, (1 - mean) * concentration


def exact_density(z, location, concentration):
    """Log-density of a logit, less that of the mean."""
    with mpmath.workdps(40):
        a, b = shapes(location, concentration)
        log_beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        w = mpmath.mpf(location) + mpmath.mpf(z)
        return float(-a * mpmath.log1p(mpmath.exp(-w)) - b * mpmath.log1p(mpmath.exp(w)) - log_beta)


def exact_log_cdf(z, location, concentration):
    with mpmath.workdps(60):
        a, b = shapes(location, concentration)
        y = 1 / (1 + mpmath.exp(-mpmath.mpf(location) - mpmath.mpf(z)))
        return float(mpmath.log(mpmath.betainc(a, b, 0, y, regularized=True)))


@pytest.mark.parametrize("location", [-30.0, -8.0, -1.0, 0.0, 2.0, 15.0])
@pytest.mark.parametrize("concentration", [0.01, 0.3, 4.0, 1e3, 1e6])
def test_density_against_mpmath(location, concentration):
    width = min(5.0, sum(t.rsqrt().item() for t in law_of(location, concentration).shapes()))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4 if concentration > 1e4 else 3e-6)):
        law = law_of(location, concentration, dtype)
        z = torch.tensor([-8.0, -1.0, -0.1, 0.0, 0.5, 3.0, 100.0], dtype=dtype) * width
        expected = torch.tensor([exact_density(t, location, concentration) for t in z.tolist()], dtype=dtype)
        assert_close(law.log_density(z), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("z", "location", "concentration", "rtol"),
    [
        (-800.0, 0.0, 0.01, 1e-13),  # the share underflows, its probability does not
        (-800.0, 0.0, 2.0, 1e-13),
        (-3.0, 0.0, 2e3, 1e-8),  # the probability underflows
        (-2.0, -1.0, 1e4, 1e-8),
        (-0.1, 2.0, 1e5, 1e-12),
        (-500.0, 3.0, 4.0, 1e-8),
        (1.0, 0.0, 0.3, 1e-13),
        (40.0, 1.0, 0.02, 1e-13),
    ],
)
def test_probabilities_against_mpmath(z, location, concentration, rtol):
    got = law_of(location, concentration).log_cdf(torch.tensor(z, dtype=torch.float64)).item()
    assert got == pytest.approx(exact_log_cdf(z, location, concentration), rel=rtol)


@pytest.mark.parametrize("concentration", [0.01, 0.3, 4.0, 1e3, 1e6])
def test_quantiles(concentration):
    location = torch.tensor([-30.0, -8.0, -1.0, 0.0, 2.0, 12.0], dtype=torch.float64).unsqueeze(-1)
    law = BetaLogitLaw(location, torch.tensor(concentration, dtype=torch.float64))
    # scipy's inverse is NaN for some of these.
    q = torch.tensor([1e-300, 1e-205, 1e-100, 1e-17, 1e-5, 0.1, 0.3, 0.5], dtype=torch.float64)
    assert_close(law.log_cdf(law.quantile(q)), q.log().expand(6, -1), rtol=1e-9, atol=1e-9)
    ends = law.quantile(torch.tensor([0.0, math.nan], dtype=torch.float64))
    assert bool((ends[:, 0] == -math.inf).all())
    assert bool(ends[:, 1].isnan().all())


def test_derivatives():
    values = ([-0.3, 0.2, -2.0, 1.0], [0.3, -2.0, 1.0, 4.0], [5.0, 30.0, 0.4, 0.2])
    arguments = tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values)
    assert torch.autograd.gradcheck(log_beta_cdf, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(log_beta_cdf, arguments, fast_mode=True, atol=1e-5)
    slopes = torch.autograd.grad(log_beta_cdf(*arguments).sum(), arguments)
    mapped = torch.vmap(torch.func.grad(log_beta_cdf, argnums=(0, 1, 2)))(*arguments)
    assert_close(mapped, slopes)
    law = BetaLogitLaw(*arguments[1:])
    (slope,) = torch.autograd.grad(law.log_density(arguments[0]).sum(), arguments[0])
    assert_close(law.slope(arguments[0]), slope)


# Mixtures


@pytest.mark.parametrize(("mean", "size"), MEANS_AND_SIZES)
def test_single_components_against_scipy_and_scoringrules(mean, size):
    mixture = mixture_of([1.0], [mean], [size])
    truth, points = scipy.stats.beta(mean * size, (1 - mean) * size), np.array([1e-6, 0.01, 0.3, 0.42, 0.77, 0.999])
    y = torch.from_numpy(points).unsqueeze(-1)
    pairs = [
        (mixture.log_prob(y), truth.logpdf(points)),
        (mixture.cdf(y), truth.cdf(points)),
        (mixture.sf(y), truth.sf(points)),
        (mixture.mean, truth.mean()),
        (mixture.stddev, truth.std()),
    ]
    if size < 100:  # B(2a, 2b) underflows in scoringrules 0.10
        crps = scoringrules.crps_beta(points, mean * size, (1 - mean) * size)
        pairs.append((scores.crps(mixture, y), crps))
    for got, expected in pairs:
        assert_close(got.flatten().numpy(), np.atleast_1d(expected), rtol=1e-9, atol=1e-12)
    levels = np.array([0.1, 0.5, 0.9])
    quantiles = mixture.icdf(torch.from_numpy(levels).unsqueeze(-1))[:, 0].numpy()
    assert_close(quantiles, truth.ppf(levels), rtol=1e-9, atol=1e-300)  # scipy gives the least number for smaller ones
    torch.manual_seed(0)
    draws = mixture.sample((4000,))[:, 0].numpy()
    inside = (draws > 1e-300) & (draws < 1 - 1e-15)  # draws at an end are rounded
    levels = np.where(inside, truth.cdf(draws), 0.5)[inside]
    if inside.all():
        assert scipy.stats.kstest(levels, "uniform").pvalue > 1e-3
    assert abs(draws.mean() - mean) < 4 * truth.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_crps_of_narrow_components(size):
    a, b, y = 0.4 * size, 0.6 * size, np.array([0.1, 0.4 + 1 / math.sqrt(size), 0.9])
    half = math.exp(scipy.special.betaln(2 * a, 2 * b) - 2 * scipy.special.betaln(a, b)) / a
    upper = 1 - 2 * scipy.special.betainc(a + 1, b, y)
    expected = y * (2 * scipy.special.betainc(a, b, y) - 1) + 0.4 * (upper - 2 * half)
    got = scores.crps(mixture_of([1.0], [0.4], [size]), torch.from_numpy(y).unsqueeze(-1))
    assert_close(got[:, 0].numpy(), expected, rtol=1e-9, atol=1e-10)


def test_crps_of_a_mixture_by_draws():
    mixture = mixture_of([0.3, 0.7], [0.2, 0.8], [0.5, 40.0])
    torch.manual_seed(0)
    first, second, y = mixture.sample((40_000,)), mixture.sample((40_000,)), torch.tensor([0.35], dtype=torch.float64)
    terms = (first - y).abs() - 0.5 * (first - second).abs()
    score = scores.crps(mixture, y).item()
    assert abs(score - terms.mean().item()) < 4 * terms.std().item() / 200
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1].unsqueeze(-1)
    brier = (mixture.cdf(grid) - (grid >= y).double()).square().sum().item() / 20_000
    assert score == pytest.approx(brier, rel=1e-3)


def test_shortest_intervals():
    unimodal = mixture_of([1.0], [0.3], [7.0])
    low, high = unimodal.interval(0.8, kind="shortest")
    ends = torch.stack([low, high])
    assert_close(unimodal.cdf(high) - unimodal.cdf(low), torch.full_like(low, 0.8))
    assert_close(unimodal.log_prob(ends)[0], unimodal.log_prob(ends)[1], rtol=0, atol=1e-3)
    to_an_end = mixture_of([1.0], [0.2], [2.0], high=100.0)  # the density is infinite at 0
    low, high = to_an_end.interval(0.8, kind="shortest")
    assert low.item() == 0
    assert_close(high, to_an_end.icdf(0.8))


@pytest.mark.parametrize("shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@pytest.mark.parametrize(("dim", "n_components"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("noise", NOISE, ids=str)
def test_densities_against_scipy(shape, dim, n_components, noise):
    head = make_head(dim, n_components, Beta(noise, low=-1.0, high=3.0))
    features = torch.randn(*shape, 4, dtype=torch.float64)
    mixture = head(features)
    y = mixture.sample((3,)).clamp(-0.999, 2.999)
    a, b = (t.detach().numpy() for t in mixture.components.inner.standard.shapes())
    each = scipy.stats.beta(a, b, -1, 4).logpdf(y.unsqueeze(-2).numpy()).sum(-1)
    expected = torch.logsumexp(mixture.logits.detach() + torch.from_numpy(each), -1)
    assert_close(mixture.log_prob(y).detach(), expected, rtol=1e-9, atol=1e-9)
    assert_close(head.log_prob(features, y).detach(), expected, rtol=1e-9, atol=1e-9)
    mean = (mixture.logits.exp().unsqueeze(-1) * torch.from_numpy(scipy.stats.beta(a, b, -1, 4).mean())).sum(-2)
    assert_close(mixture.mean, mean)


def test_what_is_again_a_mixture():
    mixture = make_head(2, 3, Beta(high=100.0))(torch.randn(2, 3, 4, dtype=torch.float64)).detach()
    y = mixture.sample().clamp(1e-3, 99.9)
    first, second = y[..., :1], y[..., 1:]
    evidence = mixture.marginal(0).log_prob(first)
    assert_close(evidence + mixture.condition(first, 0).log_prob(second), mixture.log_prob(y))
    partial = y.clone()
    partial[..., 1] = torch.nan
    assert_close(mixture.log_prob(partial), evidence)
    assert_close(mixture.pool(0).log_prob(y[0]).exp(), mixture.log_prob(y[0].expand(2, 3, 2)).exp().mean(0))
    tempered = mixture.temper(4.0).components
    assert_close(tempered.inner.standard.concentration, mixture.components.inner.standard.concentration / 4)
    assert_close(tempered.mean(), mixture.components.mean())
    share = mixture.affine(torch.zeros(1), torch.tensor([0.01]))
    assert_close(share.mean, 0.01 * mixture.mean)
    assert_close(share.stddev, 0.01 * mixture.stddev)
    assert_close(share.cdf(0.01 * y), mixture.cdf(y))
    assert_close(mixture.inverse_rosenblatt(mixture.rosenblatt(y)), y, rtol=1e-6, atol=1e-8)
    assert_close(Mixture.stack((mixture[0], mixture[1])).log_prob(y), mixture.log_prob(y))
    assert_close(mixture.float().log_prob(y.float()).double(), mixture.log_prob(y), rtol=1e-4, atol=1e-4)
    ends = torch.zeros_like(y), torch.full_like(y, 0.5)  # a rounded zero
    logs = mixture.marginal(0).log_prob(Targets.interval(-ends[1][..., :1], ends[1][..., :1]))
    assert_close(logs, mixture.cdf(ends[1])[..., 0].log())
    censored = mixture.marginal(1).log_prob(Targets.censored(second, right=torch.ones_like(second, dtype=torch.bool)))
    assert_close(censored, mixture.sf(y)[..., 1].log())


def test_truncated():
    whole = mixture_of([0.4, 0.6], [0.2, 0.7], [3.0, 10.0])
    part, y = whole.truncated(0.2, 0.6), torch.tensor([0.3], dtype=torch.float64)
    total = (whole.cdf(0.6) - whole.cdf(0.2)).log().squeeze()
    assert_close(part.log_prob(y), whole.log_prob(y) - total)
    grid = torch.linspace(0.2, 0.6, 2001, dtype=torch.float64)
    density = part.log_prob(grid.unsqueeze(-1)).exp()
    assert_close(part.mean[0], torch.trapezoid(grid * density, grid), rtol=1e-5, atol=0)


def test_component_distribution_of_pyro():
    mixture = mixture_of([0.4, 0.6], [0.2, 0.7], [3.0, 10.0])
    y = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
    assert_close(mixture.component_distribution.log_prob(y.unsqueeze(-2)), mixture.component_log_prob(y))
    assert isinstance(mixture.component_distribution.base_dist, dist.Beta)
    with pytest.raises(NotImplementedError, match="no Pyro distribution is known"):
        _ = mixture_of([1.0], [0.2], [3.0], high=100.0).component_distribution


@pytest.mark.parametrize("noise", NOISE[:4], ids=str)
def test_gradients(noise):
    head, features = make_head(2, 2, Beta(noise)), torch.randn(3, 4, dtype=torch.float64)
    y = head(features).sample().clamp(1e-3, 0.999)
    parameters = {name: p.detach().requires_grad_() for name, p in head.named_parameters()}

    def loss(*values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(head, named, features).log_prob(y)

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, tuple(parameters.values()), fast_mode=True)


def test_gradients_of_quantiles_and_draws():
    means = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3.0, 10.0], dtype=torch.float64, requires_grad=True)

    def mixture(means, sizes):
        locs = means.logit().unsqueeze(-1)
        base = BetaLogitComponents(locs, torch.ones_like(locs), BetaLogitLaw(locs, sizes.unsqueeze(-1)))
        return Mixture(torch.zeros(2, dtype=torch.float64), BetaComponents(base, LogitWarp()))

    assert torch.autograd.gradcheck(lambda *p: mixture(*p).icdf(0.3), (means, sizes), fast_mode=True)
    torch.manual_seed(0)
    draws = mixture(means, sizes).rsample((2000,))
    (slope,) = torch.autograd.grad(draws.mean(), means)  # of the mean of both
    assert_close(slope, torch.full_like(slope, 0.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 1e30])
def test_extreme_channels(size):
    network = MixtureDensityNetwork(1, 1, 3, (4,), family="beta", seed=0)
    with torch.no_grad():
        network.head.linear.bias.copy_(size * torch.randn(network.head.linear.bias.shape))
    y = torch.tensor([[1e-30], [1e-6], [0.5], [1 - 1e-6]])
    losses = network.loss(torch.zeros(4, 1), y)
    assert bool(losses.isfinite().all())
    gradients = torch.autograd.grad(losses.sum(), list(network.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    mixture = network(torch.zeros(4, 1))
    for values in (mixture.mean, mixture.stddev, mixture.cdf(y), mixture.icdf(0.3), mixture.sample()):
        assert bool(((values >= 0) & (values <= 1)).all())


# Networks


def simulated(count=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 1))
    mean = 1 / (1 + np.exp(-x))
    return x, rng.beta(6 * mean, 6 * (1 - mean)).clip(1e-6, 1 - 1e-6), mean


def test_network_comes_close_to_the_truth():
    x, y, _ = simulated(2000)
    network = MixtureDensityNetwork(1, 1, n_components=2, family=Beta(high=100.0), hidden_dim=(16,), seed=0)
    fit(network, x, 100 * y, max_epochs=20, seed=0, progress=False)
    x, y, mean = simulated(2000, 1)
    truth = scipy.stats.beta(6 * mean, 6 * (1 - mean), 0, 100).logpdf(100 * y).mean()
    assert network.predict(x).log_prob(100 * y).mean() == pytest.approx(truth, abs=0.03)


def test_files_ensembles_and_posteriors(tmp_path):
    x, y, _ = simulated(60)
    new, rows = torch.from_numpy(x[:4]).float(), torch.from_numpy(y[:4]).float()
    network = MixtureDensityNetwork(1, 1, 2, (4,), family=Beta(Diagonal(tied=True)), seed=0)
    rounded = np.round(y, 1)
    rounded[0] = 0.0
    fit(network, x, Targets.cells(rounded, 0.1), max_epochs=2, progress=False)
    network.save(tmp_path / "shares.safetensors")
    loaded = MixtureDensityNetwork.load(tmp_path / "shares.safetensors")
    assert loaded.head.family == network.head.family
    assert_close(loaded(new).log_prob(rows), network(new).log_prob(rows))
    ensemble = DeepEnsemble(network, size=3)
    fit(ensemble, x, y, max_epochs=1, progress=False)
    expected = torch.stack([ensemble.member(i)(new).log_prob(rows) for i in range(3)])
    assert_close(ensemble.members(new).log_prob(rows), expected, rtol=1e-4, atol=1e-5)
    bayesian = bayesianize(network)
    drawn = posterior_predictive(bayesian, laplace(bayesian, x, y, progress=False), new, num_samples=5, linearize=True)
    assert drawn.batch_shape == (5, 4)
    assert bool(scores.crps(drawn.pool(0), rows).isfinite().all())
    model = MDNRegressor(family="beta", hidden_dim=(4,), max_epochs=1, random_state=0).fit(x, y)
    assert 0 < model.predict(x).min() < model.predict(x).max() < 1


def test_beside_another_family():
    x, y, _ = simulated(60)
    both = np.concatenate([y, x], 1)
    network = MixtureDensityNetwork(1, 2, 2, (4,), family=["beta", "normal"], seed=0)
    fit(network, x, both, max_epochs=2, progress=False)
    mixture, rows = network(torch.from_numpy(x[:4]).float()), torch.from_numpy(both[:4]).float()
    evidence, rest = (
        mixture.marginal(0).log_prob(rows[:, :1]),
        mixture.condition(rows[:, :1], [0]).log_prob(rows[:, 1:]),
    )
    assert_close(evidence + rest, mixture.log_prob(rows), rtol=1e-4, atol=1e-5)
    assert bool(((mixture.mean[:, 0] > 0) & (mixture.mean[:, 0] < 1)).all())
    several = Product((Beta(high=100.0), Normal()), sizes=(2, 1))
    network = MixtureDensityNetwork(1, 3, 2, (4,), family=several, target_transform=[None, None, "log"])
    assert bool((network.sample(torch.zeros(50, 1))[:, :2] < 100).all())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_and_mapped():
    torch.compiler.reset()
    network = MixtureDensityNetwork(1, 2, 2, (8,), family="beta")
    objective, x = NegativeLogLikelihood(network), torch.randn(16, 1)
    y = network.sample(x).clamp(1e-3, 0.999)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    losses = objective(x, y), compiled(x, y)
    assert_close(*losses, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), list(network.parameters())) for loss in losses]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
    for function in (lambda m, y: m.cdf(y), lambda m, y: m.icdf(0.2 + 0.6 * y)):
        one_by_one = torch.vmap(lambda x, y, f=function: f(network(x), y))(x, y)
        assert_close(one_by_one, function(network(x), y), rtol=1e-4, atol=1e-5)


def test_bad_input():
    x, y, _ = simulated(60)
    network = MixtureDensityNetwork(1, 1, family="beta")
    for end in (0.0, 1.0):
        y[17] = end
        expected = f'y: expected numbers between 0 and 1 .*Targets.cells.*"logit".*, got {end:g} in row 17, column 0'
        with pytest.raises(ValueError, match=expected):
            fit(network, x, y, progress=False)
    with pytest.raises(ValueError, match="value: expected numbers between 0 and 1, got 2"):
        network(torch.zeros(1, 1)).log_prob(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="low, high: expected finite ends in ascending order, got 1 and 0"):
        Beta(low=1, high=0)
    with pytest.raises(ValueError, match="noise: expected a noise model without correlations"):
        MixtureDensityNetwork(1, 2, family="beta", noise="full")
    with pytest.raises(ValueError, match="target_transform: expected None beside Beta"):
        MixtureDensityNetwork(1, 1, family="beta", target_transform="log")
    with pytest.raises(ValueError, match="target_transform: expected one for real numbers beside Normal"):
        MixtureDensityNetwork(1, 1, target_transform=Beta().target_transform)
    with pytest.raises(ValueError, match="location, concentration: expected finite numbers, and positive"):
        mixture_of([1.0], [0.2], [-1.0])
    law = law_of([[0.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"location: expected 2 outputs, got \(1, 1\)"):
        BetaLogitComponents(torch.zeros(1, 2), torch.ones(1, 2), law).of_dim(2)
    with pytest.raises(NotImplementedError, match="entropy_bounds"):
        mixture_of([1.0], [0.2], [1.0]).entropy_bounds()
