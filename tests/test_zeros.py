"""Positive targets with zeros: against scipy, by quadrature, and in everything that takes a mixture."""

import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from cases import BATCH_SHAPES
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Full,
    Hurdle,
    Isotropic,
    Laplace,
    Log,
    Logit,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    Normal,
    Softplus,
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
from pyro_mdn.distributions.families.zeros.atom_components import AtomComponents
from pyro_mdn.sklearn import MDNRegressor

FAMILIES = {
    "normal": ZeroInflated("normal"),
    "homoscedastic": Hurdle(Normal(Isotropic(homoscedastic=True))),
    "laplace": ZeroInflated(Laplace()),
}
TRANSFORMS = {"log": Log(), "softplus": Softplus(), "logit": Logit(), "shifted": Log(0.5)}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def make_head(family=FAMILIES["normal"], transform="log", dim=1, n_components=3):
    torch.manual_seed(3)
    head = MixtureHead(4, dim, n_components, family=family, target_transform=transform).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head.scale.fill_(0.7)
    return head


def make_mixture(batch_shape=(5,), **settings):
    with torch.no_grad():
        return make_head(**settings)(torch.randn(*batch_shape, 4, dtype=torch.float64))


def parts(mixture):
    """Probability of the lower end, ``(*batch, D)``, and the mixture of what is above it, of one output."""
    zero = (mixture.logits.exp().unsqueeze(-1) * mixture.components.logit.sigmoid()).sum(-2)
    logits = mixture.logits + torch.nn.functional.logsigmoid(-mixture.components.logit[..., 0])
    return zero, mixture.of_any_family(mixture.components.base).reweighted(logits, mixture.components.base)


def test_density_and_distribution_function_of_a_log_normal_with_zeros():
    mixture = make_mixture(n_components=1)
    share = mixture.components.logit.sigmoid()[:, 0, 0].numpy()
    base = mixture.components.base.base
    part = scipy.stats.lognorm(base.covariance.stddev()[:, 0, 0].numpy(), scale=base.locs[:, 0, 0].exp().numpy())
    for y in (0.0, 1e-3, 0.7, 5.0):
        density = np.where(y == 0, np.log(share), np.log1p(-share) + part.logpdf(y or 1.0))
        assert_close(mixture.log_prob(torch.full((5, 1), y)).numpy(), density)
        assert_close(mixture.cdf(y)[:, 0].numpy(), share + (1 - share) * part.cdf(y))
        assert_close(mixture.sf(y)[:, 0].numpy(), (1 - share) * part.sf(y))
        assert_close(mixture.log_sf(y), mixture.sf(y).log())
        assert_close(mixture.log_cdf(y), mixture.cdf(y).log())
    assert (mixture.cdf(-0.1) == 0).all()
    assert (mixture.sf(-0.1) == 1).all()
    assert_close(mixture.mean[:, 0].numpy(), (1 - share) * part.mean())
    square = part.var() + part.mean() ** 2
    assert_close(mixture.variance[:, 0].numpy(), (1 - share) * square - ((1 - share) * part.mean()) ** 2)


@every_family
@every_transform
def test_functions_of_single_outputs_by_quadrature(family, transform):
    mixture = make_mixture((3,), family=family, transform=transform)
    zero, above = parts(mixture)
    low = transform.warp({"unit": torch.ones(1)}).limits(torch.zeros(1))[0].item()
    q = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)[:, None, None].expand(5, 3, 1)
    quantiles = mixture.icdf(q)
    at_end = quantiles == low
    assert_close(at_end, (q <= zero).expand(at_end.shape))
    assert_close(mixture.cdf(quantiles).where(~at_end, q), q)
    assert_close(mixture.univariate().upper_quantile(1 - q), quantiles, rtol=1e-6, atol=1e-9)
    for y in (torch.full((3, 1), low), above.icdf(0.3), above.icdf(0.9)):
        y = y.double()
        expected = zero * (y - low) + (1 - zero) * decisions.expected_below(above, y)
        assert_close(decisions.expected_below(mixture, y), expected)
        difference = decisions.expected_above(mixture, y) - decisions.expected_below(mixture, y)
        if mixture.mean.isfinite().all():
            assert_close(difference, mixture.mean - y, rtol=1e-5, atol=1e-6)
            assert_close(scores.crps(mixture, y), crps_by_quadrature(mixture, y, low), rtol=1e-5, atol=1e-7)
        else:
            assert isinstance(family.base, Laplace)
            infinite = decisions.expected_above(mixture, y).isinf()
            assert infinite.any()
            assert_close(scores.crps(mixture, y).isinf(), infinite)
            assert not scores.crps(mixture, y).isnan().any()
    lower, upper = mixture.univariate().steps(torch.full((3, 1), low, dtype=torch.float64))
    assert_close((lower, upper), (torch.zeros_like(zero), zero))


NODES, WEIGHTS = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(40))


def crps_by_quadrature(mixture, y, low):
    """Integral of the squared difference to the step at y, between quantiles and the step."""
    levels = torch.cat([torch.linspace(0.02, 0.98, 25).double(), 1 - torch.logspace(-2, -12, 21, dtype=torch.float64)])
    edges = [torch.full_like(y, low)[None], y[None], mixture.icdf(levels[:, None, None].expand(-1, *y.shape))]
    edges = torch.cat(edges).sort(0).values
    start, half = edges[:-1, None], 0.5 * edges.diff(dim=0)[:, None]
    points = start + half * (1 + NODES[:, None, None])
    squared = (mixture.cdf(points) - (y <= points).double()).square()
    return (half * WEIGHTS[:, None, None] * squared).sum((0, 1))


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.9])
@every_family
def test_shortest_intervals(family, mass):
    mixture = make_mixture((6,), family=family)
    low, high = mixture.interval(mass, kind="shortest")
    outside = 1 - mass
    starts = torch.linspace(0, outside, 4001, dtype=torch.float64)[:, None, None].expand(-1, 6, 1)
    begins, inside = mixture.icdf(starts), mixture.univariate().steps
    below = inside(begins)[0]  # an interval contains the lower end, if it begins there
    ends = mixture.univariate().upper_quantile((outside - below).clamp(min=0))
    best = (ends - begins).amin(0)
    assert_close(high - low, best, rtol=2e-3, atol=1e-6)
    assert bool((high - low <= best * (1 + 1e-9)).all())
    assert_close(
        inside(high)[1] - inside(low)[0], torch.full_like(low, mass).maximum(inside(low)[1]), rtol=1e-7, atol=1e-9
    )


@every_family
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_outputs_of_a_component_are_independent(family, batch_shape):
    mixture = make_mixture(batch_shape, family=family, dim=3)
    y = mixture.sample((4,))
    y[0, ..., 1] = 0.0
    single = [mixture.components.marginal([d]).log_prob(y[..., [d]]) for d in range(3)]
    expected = (mixture.logits + sum(single)).logsumexp(-1)
    assert_close(mixture.log_prob(y), expected)
    assert_close(
        mixture.marginal([2, 0]).log_prob(y[..., [2, 0]]), (mixture.logits + single[2] + single[0]).logsumexp(-1)
    )
    rest = mixture.condition(y[..., 1:2], 1)
    assert_close(mixture.marginal([1]).log_prob(y[..., 1:2]) + rest.log_prob(y[..., [0, 2]]), expected)
    gaps = y.clone()
    gaps[..., 2] = torch.nan
    assert_close(mixture.log_prob(gaps), mixture.marginal([0, 1]).log_prob(y[..., :2]))
    assert_close(mixture.expand((2, *batch_shape)).pool(0).log_prob(y), expected)
    assert_close(mixture.affine(0.0, 2.0).log_prob(2 * y), expected - math.log(2) * (y > 0).sum(-1))
    assert_close(mixture.float().log_prob(y.float()).double(), expected, rtol=1e-3, atol=1e-3)


def test_left_censored_targets_may_be_zero():
    mixture = make_mixture(dim=2)
    y = mixture.sample()
    below, above = y.clone(), y.clone()
    below[:, 0], above[:, 0] = 0.0, 0.8
    below[1, 0], above[2, 0] = 0.3, math.inf
    below[3, 0] = -1.0
    got = mixture.log_prob(Targets.interval(below, above))
    for i in range(5):
        mass = 0.0
        for k in range(3):
            component = mixture[i].reweighted(torch.zeros(1).double(), mixture[i].components.select(torch.tensor(k)))
            single, other = component.marginal([0]), component.marginal([1])
            end = single.sf(below[i, :1]) - single.sf(above[i, :1])
            end = end + single.cdf(0.0) * (below[i, 0] <= 0)
            density = other.log_prob(y[i, 1:]).exp()
            held = end - single.cdf(0.0) * (below[i, 0] < 0) if below[i, 0] < 0 else end
            mass = (
                mass + mixture.logits[i, k].exp() * (held if below[i, 0] >= 0 else single.cdf(above[i, :1])) * density
            )
        assert_close(got[i], mass.log()[0])


@pytest.mark.parametrize("lower", [-math.inf, -3.0, 0.0])
def test_targets_at_most_zero_are_zero(rain, lower):
    """Censored at the lower end itself, where nothing but the point mass is left."""
    mixture, y = make_mixture(), torch.zeros(5, 1, dtype=torch.float64)
    got = mixture.log_prob(Targets.interval(torch.full_like(y, lower), y))
    assert_close(got, mixture.log_cdf(y)[:, 0])
    if lower < 0:
        with pytest.raises(ValueError, match="value: expected numbers between 0 and inf"):
            mixture.log_prob(Targets.interval(torch.full_like(y, lower), y - 1))
    x, y, _ = rain
    seen = Targets.interval(np.where(y > 0, y, lower), y)
    network = MixtureDensityNetwork(1, 1, 1, 8, family=ZeroInflated("normal"), target_transform="log", seed=0)
    fit(network, x, seen, max_epochs=2, seed=0, progress=False)
    assert_close(network.predict(x).mixture.log_prob(seen), network.predict(x).mixture.log_prob(y))


@pytest.mark.parametrize("transform", ["log", "softplus"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_training_on_hardly_anything_but_zeros(ensemble, transform):
    x = np.random.default_rng(0).normal(size=(60, 1)).astype("float32")
    y = np.zeros((60, 2), dtype="float32")
    y[:20, 1] = 3 + x[:20, 0] ** 2
    network = MixtureDensityNetwork(1, 2, 2, 8, family=ZeroInflated("normal"), target_transform=transform, seed=0)
    network = DeepEnsemble(network, 2) if ensemble else network
    fit(network, x, y, max_epochs=5, seed=0, progress=False)
    mixture = network.predict(x).mixture
    assert bool(mixture.log_prob(y).isfinite().all())
    assert bool((mixture.mean[:, 0] < mixture.mean[:, 1]).all())


@pytest.mark.parametrize(
    ("settings", "lower"),
    [
        ({"target_transform": "log"}, -4.0),
        ({"target_transform": ["log"]}, -math.inf),
        ({"target_transform": "log", "family": ZeroInflated("normal")}, -4.0),
        ({"family": "poisson"}, 2.0),
    ],
)
def test_training_starts_inside_of_the_support(settings, lower):
    """Also where the middle of an interval is outside, or no count."""
    x = np.random.default_rng(0).normal(size=(60, 1)).astype("float32")
    y = np.full((60, 1), 3.0, dtype="float32")
    seen = Targets.interval(np.where(x > 0, lower, y), y)
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0, **settings)
    fit(network, x, seen, max_epochs=3, seed=0, progress=False)
    assert bool(network.predict(x).mixture.log_prob(seen).isfinite().all())
    fit(network, x, Targets.interval(np.full_like(y, lower), y), max_epochs=3, seed=0, progress=False)
    assert bool(network.predict(x).mixture.log_prob(seen).isfinite().all())


def test_draws_and_transforms():
    torch.manual_seed(0)
    mixture = make_mixture((4000,))
    y = mixture.sample()
    zero = parts(mixture)[0]
    assert abs(((y == 0).double() - zero).mean()) < 4 * 0.5 / math.sqrt(4000)
    assert scipy.stats.kstest(scores.pit(mixture, y).flatten().numpy(), "uniform").pvalue > 1e-3
    assert not mixture.has_rsample
    mean = mixture[0].sample((200_000,)).mean()
    assert mean.item() == pytest.approx(mixture[0].mean.item(), abs=4 * mixture[0].stddev.item() / math.sqrt(2e5))


@every_family
def test_gradients(family):
    head, features = make_head(family, dim=2, n_components=2), torch.randn(3, 4, dtype=torch.float64)
    y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)

    def quantities(bias):
        with torch.no_grad():
            c = torch.full((3, 2), 0.7, dtype=torch.float64)
        mixture = torch.func.functional_call(head, {"linear.bias": bias}, features)
        if isinstance(family.base, Laplace):  # exponentials of it may have no mean
            return mixture.log_prob(y), mixture.cdf(c)
        return mixture.log_prob(y), mixture.mean, mixture.cdf(c), scores.crps(mixture, c)

    assert torch.autograd.gradcheck(
        quantities, head.linear.bias.detach().requires_grad_(), rtol=1e-3, atol=1e-6, fast_mode=True
    )
    assert_close(head.log_prob(features, y), head(features).log_prob(y))


def test_quantiles_have_gradients():
    head, features = make_head(n_components=2), torch.randn(2, 4, dtype=torch.float64)
    q = torch.tensor([1e-3, 0.4, 0.9, 1 - 1e-6], dtype=torch.float64).reshape(4, 1, 1).expand(4, 2, 1)

    def quantiles(bias, q):
        mixture = torch.func.functional_call(head, {"linear.bias": bias}, features)
        return mixture.icdf(q), mixture.univariate().upper_quantile(q)

    bias = head.linear.bias.detach().requires_grad_()
    assert_close(quantiles(bias, q)[0][0], torch.zeros(2, 1, dtype=torch.float64))
    assert torch.autograd.gradcheck(quantiles, (bias, q.clone().requires_grad_()), eps=1e-8, rtol=1e-3, atol=1e-4)
    certain = bias.detach().clone()
    certain[-2:] = 800.0  # logits of zero, of which no other probability is left
    for quantile in quantiles(certain.requires_grad_(), q):
        assert not torch.autograd.grad(quantile.sum(), certain, retain_graph=True)[0].any()


def test_moments_of_hardly_anything_but_zeros():
    """The rest of a probability that rounds to 1."""
    base = make_mixture(family=None, dim=2).float().components
    logit = torch.full_like(base.locs, 20.0)
    single = AtomComponents(base, logit)
    double = single.map(lambda t, n: t.double())
    for moment in ("mean", "variance", "stddev"):
        assert_close(getattr(single, moment)().double(), getattr(double, moment)(), rtol=1e-4, atol=0)


# Networks


@pytest.fixture(scope="module")
def rain():
    """Days without rain, and log-normal amounts on the others; the log score of the truth on the last 300 rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 1))
    dry, loc = 1 / (1 + np.exp(-x)), 0.5 + 0.4 * x
    y = np.where(rng.random((900, 1)) < dry, 0, np.exp(loc + 0.6 * rng.normal(size=(900, 1))))
    wet = np.log1p(-dry) + scipy.stats.lognorm(0.6, scale=np.exp(loc)).logpdf(np.where(y > 0, y, 1))
    return x.astype("float32"), y.astype("float32"), -np.where(y > 0, wet, np.log(dry))[600:].mean()


def test_training(rain, tmp_path):
    x, y, truth = rain
    network = MixtureDensityNetwork(1, 1, 2, 16, family=ZeroInflated("normal"), target_transform="log", seed=0)
    fit(network, x[:600], y[:600], max_epochs=40, seed=0, progress=False)
    mixture = network.predict(x[600:]).mixture
    assert scores.log_score(mixture, y[600:]).mean().item() < truth + 0.06
    network.save(tmp_path / "network.safetensors")
    loaded = MixtureDensityNetwork.load(tmp_path / "network.safetensors")
    assert_close(loaded.predict(x[600:]).mixture.log_prob(y[600:]), mixture.log_prob(y[600:]))
    seen = Targets.censored(np.where(y[:600] < 0.5, 0.5, y[:600]), left=y[:600] < 0.5)
    fit(network, x[:600], seen, max_epochs=2, seed=0, progress=False)
    data = to_inference_data(network, x=x[600:], y=y[600:])
    assert (data["posterior_predictive"]["y"].values == 0).any()


def test_ensembles_posteriors_and_estimators(rain):
    x, y, truth = rain
    network = MixtureDensityNetwork(1, 1, 1, 8, family=ZeroInflated("normal"), target_transform="log", seed=0)
    ensemble = DeepEnsemble(network, 2)
    fit(ensemble, x[:600], y[:600], max_epochs=30, seed=0, progress=False)
    assert scores.log_score(ensemble.predict(x[600:]).mixture, y[600:]).mean().item() < truth + 0.15
    fit(network, x[:600], y[:600], max_epochs=5, seed=0, progress=False)
    bayesianize(network, layers="head")
    drawn = posterior_predictive(network, laplace(network, x[:200], y[:200]), x[:5], num_samples=7)
    assert drawn.log_prob(torch.from_numpy(y[:5])).shape == (7, 5)
    model = MDNRegressor(family=ZeroInflated("normal"), target_transform="log", max_epochs=3, random_state=0)
    assert np.isfinite(model.fit(x, y.ravel()).score(x, y.ravel()))


def test_rounding_of_the_other_targets_leaves_zeros_alone(rain):
    x, y, _ = rain
    rounded = np.ceil(2 * y) / 2
    network = MixtureDensityNetwork(1, 1, 1, 8, family=ZeroInflated("normal"), target_transform="log", seed=0)
    fit(network, x, rounded, max_epochs=10, seed=0, progress=False)
    share = network.predict(x).mixture.cdf(0.0).mean().item()
    assert share == pytest.approx((rounded == 0).mean(), abs=0.1)


# Errors


@pytest.mark.parametrize("bad", [-1.0, -1e-6])
def test_targets_below_the_lower_end_are_named(rain, bad):
    x, y = rain[0], rain[1].copy()
    y[7, 0] = bad
    network = MixtureDensityNetwork(1, 1, 1, 8, family=ZeroInflated("normal"), target_transform="log", seed=0)
    message = rf"y: expected numbers between 0 and inf, got {bad:g} in row 7, column 0"
    with pytest.raises(ValueError, match=message):
        fit(network, x, y, max_epochs=1, progress=False)
    with pytest.raises(ValueError, match=message):
        network.loss(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(ValueError, match=message.replace("y:", "value:")):
        network(torch.from_numpy(x)).log_prob(torch.from_numpy(y))
    with pyro.validation_enabled(False):
        assert network(torch.from_numpy(x)).log_prob(torch.from_numpy(y))[7] == -math.inf


def test_settings_are_checked():
    for settings, message in (
        ({"family": ZeroInflated("normal")}, "target_transform: expected one with a lower end, such as 'log'"),
        ({"family": ZeroInflated("normal"), "target_transform": ["log", "asinh"]}, "expected one with a lower end"),
        ({"family": ZeroInflated("normal"), "target_transform": ["log", "angle"]}, "expected one with a lower end"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureHead(3, 2, 1, **settings)
    with pytest.raises(ValueError, match="noise: expected a noise model without correlations"):
        ZeroInflated(Normal(Full()))
    with pytest.raises(NotImplementedError, match=r"rsample: not closed for AtomComponents .*without gradients"):
        make_head()(torch.zeros(2, 4, dtype=torch.float64)).rsample()
    dependent = MixtureHead(4, 2, 1, noise=Full()).double()(torch.zeros(4, dtype=torch.float64)).components
    with pytest.raises(ValueError, match="base: expected components with independent outputs"):
        Mixture(torch.zeros(1, dtype=torch.float64), AtomComponents(dependent, torch.zeros(1, 2, dtype=torch.float64)))
    with pytest.raises(NotImplementedError, match=r"transport: not closed for AtomComponents .*scores.pit"):
        make_mixture().rosenblatt(torch.ones(5, 1))
