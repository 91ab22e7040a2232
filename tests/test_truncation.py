"""Mixtures given that their outputs lie in intervals: against scipy, and by what holds for every distribution."""

import math

import pyro
import pytest
import torch
from scipy import stats
from test_units import TRANSFORMS, make_mixture
from torch.testing import assert_close

from pyro_mdn import (
    DiagonalCovariance,
    Full,
    GaussianMixture,
    Mixture,
    MixtureDensityNetwork,
    Normal,
    Product,
    StudentT,
    Targets,
    ZeroInflated,
    decisions,
    scores,
)

FAMILIES = {
    "normal": None,
    "student_t": StudentT(df=4.0),
    "laplace": "laplace",
    "logistic": "logistic",
    "gumbel": "gumbel",
}
RANGES = [(0.5, 3.0), (-math.inf, 1.5), (2.0, math.inf)]
every_range = pytest.mark.parametrize(("low", "high"), RANGES, ids=["both", "below", "above"])


def normal(locs, scales, dtype=torch.float64):
    locs, scales = (torch.tensor(values, dtype=dtype).unsqueeze(-1) for values in (locs, scales))
    return GaussianMixture(torch.zeros(len(locs), dtype=dtype), locs, DiagonalCovariance(scales))


def probability(mixture, low, high):
    return decisions.probability_between(mixture, low, high)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.5), (3.0, math.inf), (-math.inf, -12.0), (20.0, 21.0)])
def test_one_normal_component_is_that_of_scipy(low, high):
    mixture = normal([0.3], [1.5]).truncated(low, high)
    truth = stats.truncnorm((low - 0.3) / 1.5, (high - 0.3) / 1.5, 0.3, 1.5)
    levels = torch.linspace(0.01, 0.99, 9, dtype=torch.float64).unsqueeze(-1)
    y = mixture.icdf(levels)
    assert_close(y, torch.tensor(truth.ppf(levels)), rtol=1e-8, atol=0)
    assert_close(mixture.cdf(y), levels, rtol=1e-10, atol=0)
    assert_close(mixture.sf(y), 1 - levels, rtol=1e-10, atol=0)
    assert_close(mixture.log_prob(y), torch.tensor(truth.logpdf(y)).squeeze(-1), rtol=1e-8, atol=1e-8)
    assert mixture.mean.item() == pytest.approx(truth.mean(), rel=1e-8)
    assert mixture.stddev.item() == pytest.approx(truth.std(), rel=1e-5)  # where scipy subtracts squares
    assert_close(mixture.interval(0.8)[1], torch.tensor([truth.ppf(0.9)]), rtol=1e-8, atol=0)
    far = min(max(low, -100.0), 100.0) - 1, max(min(high, 100.0), -100.0) + 1
    assert mixture.log_prob(torch.tensor([[far[0]], [far[1]]], dtype=torch.float64)).max() < (0 if low == -12 else 1e9)


@pytest.mark.parametrize(
    ("family", "transform", "low", "high"),
    [
        *((family, "plain", *RANGES[0]) for family in FAMILIES),
        ("normal", "plain", *RANGES[1]),
        ("normal", "log", *RANGES[2]),
        ("student_t", "softplus", *RANGES[2]),
        ("gumbel", "log", *RANGES[1]),
        ("gumbel", "plain", *RANGES[2]),
    ],
)
def test_probabilities_are_those_given_the_range(family, transform, low, high):
    x = torch.randn(3, 1, dtype=torch.float64)
    settings = {"family": FAMILIES[family], "target_transform": None if transform == "plain" else transform}
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0, **settings).double()
    whole = network(x).detach()
    inside = whole.truncated(low, high)
    total = probability(whole, low, high)
    y = inside.icdf(torch.tensor([0.0, 1e-6, 0.2, 0.5, 0.9, 1 - 1e-6, 1.0], dtype=torch.float64).reshape(-1, 1, 1))
    assert ((y >= low - 1e-12) & (y <= high + 1e-12)).all()
    middle = y[1:-1]
    below, above = (torch.full_like(middle, end) for end in (low, high))
    assert_close(inside.log_prob(middle), whole.log_prob(middle) - total.log().squeeze(-1), rtol=1e-9, atol=1e-9)
    assert_close(inside.cdf(middle), probability(whole, below, middle) / total, rtol=1e-8, atol=0)
    assert_close(inside.sf(middle), probability(whole, middle, above) / total, rtol=1e-8, atol=0)
    assert_close(inside.log_cdf(middle).exp(), inside.cdf(middle), rtol=1e-9, atol=0)
    assert_close(inside.log_sf(middle).exp(), inside.sf(middle), rtol=1e-9, atol=0)
    levels = torch.tensor([0.2, 0.5], dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 3, 1)
    assert_close(inside.cdf(middle[1:3]), levels, rtol=1e-10, atol=0)
    ends = torch.tensor([max(low, 0.2) - 0.1, min(high, 9.0) + 0.1], dtype=torch.float64).reshape(-1, 1, 1)
    for end, is_outside, level in zip(ends, (low > 0, high < math.inf), (0.0, 1.0), strict=True):
        if is_outside:
            assert (inside.log_prob(end.expand(3, 1)) == -math.inf).all()
            assert_close(inside.cdf(end.expand(3, 1)), torch.full((3, 1), level, dtype=torch.float64))
            assert (inside.log_cdf(end) if level == 0 else inside.log_sf(end)).isneginf().all()
    draws = inside.sample((400,))
    assert stats.kstest(inside.cdf(draws).flatten(), "uniform").pvalue > 1e-3
    error = draws.std(0) / math.sqrt(400)
    finite = inside.stddev.isfinite()
    assert ((draws.mean(0) - inside.mean).abs() < 5 * error)[finite].all()


@every_range
@pytest.mark.parametrize("transform", ["plain", "log"])
def test_scores_and_moments_are_integrals(transform, low, high):
    whole = make_mixture(TRANSFORMS["log"]) if transform == "log" else normal([-1.0, 0.5, 3.0], [0.4, 1.0, 2.0])
    whole = whole[0] if whole.batch_shape else whole
    whole = whole.marginal(0)
    inside = whole.truncated(low, high)
    score = torch.linspace(-8, 8, 4001, dtype=torch.float64).unsqueeze(-1)
    u, weight = torch.special.ndtr(score), 0.004 * (-0.5 * score.square()).exp() / math.sqrt(2 * math.pi)
    points = torch.where(score < 0, inside.icdf(u), inside.univariate().upper_quantile(torch.special.ndtr(-score)))
    value = inside.icdf(0.3)

    def expected(values):
        return (weight * values).sum(0)

    mean = expected(points)
    assert_close(inside.mean, mean, rtol=1e-6, atol=1e-9)
    assert_close(inside.stddev, expected((points - mean).square()).sqrt(), rtol=1e-5, atol=1e-9)
    for name, distance in (("below", value - points), ("above", points - value)):
        moment = getattr(decisions, f"expected_{name}")(inside, value)
        assert_close(moment, expected(distance.clamp(min=0)), rtol=1e-4, atol=1e-6)
    spread = expected(points * (2 * u - 1))  # half the mean difference of two draws
    assert_close(scores.crps(inside, value), expected((points - value).abs()) - spread, rtol=1e-4, atol=1e-6)
    lower, upper = inside.interval(0.8, kind="shortest")
    tails = torch.linspace(0, 0.2, 401, dtype=torch.float64).unsqueeze(-1)
    widths = inside.icdf(tails + 0.8) - inside.icdf(tails)
    assert (upper - lower).item() == pytest.approx(widths.nan_to_num(math.inf).min().item(), rel=1e-4)
    assert inside.cdf(upper) - inside.cdf(lower) == pytest.approx(0.8, abs=1e-8)


@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 4)])
@pytest.mark.parametrize("components", [1, 3])
def test_two_outputs(batch_shape, components):
    """Each in a range of its own; what is again a mixture stays truncated."""
    locs = torch.randn(*batch_shape, components, 2, dtype=torch.float64)
    tied = DiagonalCovariance(torch.rand(*batch_shape, 1, 2, dtype=torch.float64) + 0.5)
    whole = GaussianMixture(torch.randn(*batch_shape, components, dtype=torch.float64), locs, tied)
    low = torch.tensor([-0.5, -math.inf]).double()
    inside = whole.truncated(low, 1.0)
    assert (inside.batch_shape, type(inside)) == (torch.Size(batch_shape), Mixture)
    draws = inside.sample((5,))
    box = whole.log_prob(Targets(torch.full_like(draws[0], -math.inf).maximum(low), torch.full_like(draws[0], 1.0)))
    assert_close(inside.log_prob(draws), whole.log_prob(draws) - box)
    y = draws[0]
    joint = inside.marginal(1).log_prob(y[..., 1:]) + inside.condition(y[..., 1:], 1).log_prob(y[..., :1])
    assert_close(joint, inside.log_prob(y))
    assert_close(inside.inverse_rosenblatt(inside.rosenblatt(y)), y)
    missing = y.clone()
    missing[..., 0] = math.nan
    assert_close(inside.log_prob(missing), inside.marginal(1).log_prob(y[..., 1:]))
    assert_close(inside.log_prob(Targets.censored(y, right=torch.ones_like(y))).exp(), _above(inside, y))
    turned = inside.affine(1.0, -2.0)
    assert_close(turned.log_prob(1 - 2 * y), inside.log_prob(y) - 2 * math.log(2))
    assert turned.support.check(1 - 2 * draws).all()
    assert not turned.support.check(1 - 2 * draws + 9)[..., 0].any()
    again = inside.truncated(0.0, 2.0)
    assert_close(again.log_prob(y.abs() / 9), whole.truncated(0.0, 1.0).log_prob(y.abs() / 9))
    if batch_shape:
        pooled = inside.pool(0)
        assert_close(pooled.log_prob(y[0]).exp(), inside.expand((*batch_shape,)).log_prob(y[0]).exp().mean(0))
        assert_close(inside[1].log_prob(y[1]), inside.log_prob(y)[1])


def _above(mixture, y):
    """Probability that both outputs exceed y, by components, whose outputs are independent."""
    locs, scale, law = mixture.components.univariate()
    above = law.mirrored().cdf(-(y.unsqueeze(-1) - locs) / scale).prod(-2)
    return (mixture.logits.exp() * above).sum(-1)


def test_ranges_of_rows():
    """Left truncation: each row given that its event comes after its entry."""
    network = MixtureDensityNetwork(1, 1, 2, 8, target_transform="log", seed=0).double()
    mixture, entry = network(torch.randn(5, 1).double()), torch.rand(5, 1).double() + 0.2
    y = entry + 0.5
    given = mixture.truncated(low=entry)
    assert_close(given.log_prob(y), mixture.log_prob(y) - mixture.log_sf(entry).squeeze(-1))
    assert given.truncated(low=torch.rand(3, 1, 1).double()).batch_shape == (3, 5)
    assert (scores.pit(given, y) < scores.pit(mixture, y)).all()
    with pyro.plate("rows", 5):
        assert (pyro.sample("y", given) >= entry).all()


def test_gradients():
    locs, raw = (torch.randn(2, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    low = torch.tensor([[0.4], [0.6]], dtype=torch.float64, requires_grad=True)

    def inside(locs, raw, low, high):
        mixture = GaussianMixture(locs.new_zeros(2, 2), locs, DiagonalCovariance(0.5 + raw.sigmoid()))
        return mixture.truncated(low, high)

    y = torch.tensor([[0.9], [1.3]], dtype=torch.float64)
    right = Targets.censored(y, right=[[True], [False]])

    def everything(*parameters):
        results = []
        for high in (1.5, math.inf):
            m = inside(*parameters, high)
            results += [m.log_prob(y), m.cdf(y), m.icdf(0.3), m.icdf(0.8), m.log_prob(right)]
        m = inside(*parameters, 1.5)
        results += [m.mean, scores.crps(m, y)]
        return torch.cat([result.flatten() for result in results])

    assert torch.autograd.gradcheck(everything, (locs, raw, low), fast_mode=True, check_undefined_grad=False)
    torch.manual_seed(0)
    draws = inside(locs, raw, low, math.inf).rsample((4000,))
    (gradient,) = torch.autograd.grad(draws.mean(0).sum(), locs, retain_graph=True)
    (truth,) = torch.autograd.grad(inside(locs, raw, low, math.inf).mean.sum(), locs)
    assert_close(gradient, truth, rtol=0.1, atol=0.02)
    outside = inside(locs, raw, low, math.inf).log_prob(torch.zeros(2, 1, dtype=torch.float64))
    assert (outside == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_and_narrow_ranges_stay_finite(dtype):
    mixture = normal([0.0, 1.0], [0.1, 2.0], dtype)
    for low, high in [(30.0, math.inf), (-math.inf, -50.0), (1e3, 1e3 + 1), (0.5, 0.5001)]:
        inside = mixture.truncated(low, high)
        y = inside.icdf(torch.tensor([[0.1], [0.9]], dtype=dtype))
        for value in (y, inside.log_prob(y), inside.mean, inside.stddev, scores.crps(inside, y), inside.sample((9,))):
            assert value.isfinite().all(), (low, high)
        assert ((inside.sample((99,)) >= low) & (inside.sample((99,)) <= high)).all()
        assert (inside.mean >= low - 1e-3 * abs(low)).all()
    half = normal([0.0], [1.0]).to(torch.bfloat16).truncated(0.0)
    assert half.dtype == torch.bfloat16
    assert mixture.truncated(0.0).double().dtype == torch.float64


def test_errors():
    mixture = normal([0.0], [1.0])
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="low, high: expected ends in ascending order"):
            mixture.truncated(low, high)
    x = torch.randn(3, 1)
    with pytest.raises(ValueError, match="low, high: expected a range within the support"):
        MixtureDensityNetwork(1, 1, target_transform="log")(x).truncated(-2.0, -1.0)
    refused = [
        MixtureDensityNetwork(1, 2, noise=Full()),
        MixtureDensityNetwork(1, 1, family="poisson"),
        MixtureDensityNetwork(1, 1, family=ZeroInflated("normal"), target_transform="log"),
        MixtureDensityNetwork(1, 1, target_transform="angle"),
    ]
    for network in refused:
        with pytest.raises(NotImplementedError, match="truncated"):
            network(x).truncated(0.5)
    assert MixtureDensityNetwork(1, 2, noise=Full())(x).marginal(0).truncated(0.5).batch_shape == (3,)


def test_impossible_conditions_are_refused():
    mixture = MixtureDensityNetwork(1, 3, 2, 4, seed=0)(torch.zeros(3, 1)).truncated(low=[0.0, 0.0, 0.0], high=2.0)
    known = torch.ones(3, 2)
    for missing in (1.0, math.nan):
        known[0, 0], known[1, 1] = missing, -1.0
        with pytest.raises(ValueError, match="values: expected values of positive density, got -1 in row 1, column 1"):
            mixture.condition(known, [0, 2])


def test_outputs_beside_others_without_an_interval():
    """Those without may be counts, angles or dependent on each other."""
    family = Product(("normal", "poisson", "laplace", Normal(Full())), sizes=(1, 1, 1, 2))
    transforms = ["log", None, "standardize", "angle", "standardize"]
    network = MixtureDensityNetwork(1, 5, 3, 4, family=family, target_transform=transforms, seed=0).double()
    mixture = network(torch.randn(3, 1, dtype=torch.float64)).detach()
    low = torch.tensor([0.8, -math.inf, -math.inf, -math.inf, -math.inf], dtype=torch.float64)
    high = torch.tensor([2.0, math.inf, 0.5, math.inf, math.inf], dtype=torch.float64)
    given = mixture.truncated(low, high)
    torch.manual_seed(0)
    y = given.sample((200,))
    assert bool(((y >= low) & (y <= high)).all())
    assert bool(given.support.check(y).all())
    inside = mixture.log_prob(Targets.interval(low.expand(3, 5), high.expand(3, 5)))
    assert_close(given.log_prob(y), mixture.log_prob(y) - inside)
    draws = mixture[0].sample((100_000,))
    kept = draws[(draws[:, 0] > low[0]) & (draws[:, 0] < high[0]) & (draws[:, 2] < high[2])]
    error = kept.std(0) / len(kept) ** 0.5
    plain = [0, 1, 2, 4]  # the mean of angles is a direction
    assert bool(((kept.mean(0) - given[0].mean) / error)[plain].abs().max() < 4)
    rest = given.condition(y[..., :2], [0, 1]).log_prob(y[..., 2:])
    assert_close(rest + given.marginal([0, 1]).log_prob(y[..., :2]), given.log_prob(y))
    with pytest.raises(NotImplementedError, match="truncated: not closed for CountComponents"):
        mixture.truncated(0.5)
    with pytest.raises(NotImplementedError, match="truncated"):
        mixture.truncated([-math.inf, -math.inf, -math.inf, 0.0, -math.inf])
