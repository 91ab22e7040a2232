"""Decisions: against scipy, by quadrature, and by what holds for every distribution."""

import functools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from test_units import TRANSFORMS, log_normal, make_head, make_mixture
from torch.testing import assert_close

from pyro_mdn import (
    DiagonalCovariance,
    GaussianMixture,
    Hurdle,
    Log,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    Standardize,
    StudentT,
    StudentTComponents,
    ZeroInflated,
    decisions,
)
from pyro_mdn.distributions.units.warped import WarpedComponents
from pyro_mdn.distributions.units.warps import LogWarp

FAMILIES = {
    "normal": None,
    "student_t": StudentT(df=5.0),
    "laplace": "laplace",
    "logistic": "logistic",
    "gumbel": "gumbel",
}
KINDS = {"plain": Standardize()} | TRANSFORMS


def normal(loc=0.0, scale=1.0):
    tensors = torch.tensor([[loc]], dtype=torch.float64), torch.tensor([[scale]], dtype=torch.float64)
    return GaussianMixture(torch.zeros(1, dtype=torch.float64), tensors[0], DiagonalCovariance(tensors[1]))


@pytest.mark.parametrize("c", [-30.0, -3.0, 0.2, 2.0, 30.0])
def test_partial_moments_of_a_normal_against_quadrature(c):
    """Also far out, where the closed form of textbooks has lost all digits."""

    def integral(sign):
        lower = scipy.integrate.quad(
            lambda t: math.exp(scipy.stats.norm.logcdf(sign * c - t) + shift), 0, np.inf, epsrel=1e-12
        )
        return lower[0] * math.exp(-shift)

    for sign, got in ((1, decisions.expected_below(normal(), c)), (-1, decisions.expected_above(normal(), c))):
        shift = min(-scipy.stats.norm.logcdf(sign * c), 600.0)
        assert got.item() == pytest.approx(integral(sign), rel=1e-8)


OTHER_LAWS = {
    "student_t": (StudentT(df=5.0), scipy.stats.t(5)),
    "laplace": ("laplace", scipy.stats.laplace()),
    "logistic": ("logistic", scipy.stats.logistic()),
    "gumbel": ("gumbel", scipy.stats.gumbel_r()),
}


@pytest.mark.parametrize("c", [-40.0, -25.0, -4.0, -2.0, -0.7, 0.0, 0.4, 3.0, 25.0, 40.0])
@pytest.mark.parametrize("name", OTHER_LAWS)
def test_partial_moments_of_other_laws_against_quadrature(name, c):
    """Far out, where a difference of larger numbers has lost all digits."""
    family, law = OTHER_LAWS[name]
    with torch.no_grad():
        mixture = MixtureHead(1, 1, 1, family=family).double()(torch.zeros(1, dtype=torch.float64))
        loc, scale, _ = (
            part.double() if isinstance(part, torch.Tensor) else part for part in mixture.components.univariate()
        )
    value, spread = loc[:, 0] + scale[:, 0] * c, scale.item()
    below, above = decisions.expected_below(mixture, value), decisions.expected_above(mixture, value)
    with np.errstate(over="ignore"):  # of scipy's Gumbel law far out, where its probabilities are 0
        lower = scipy.integrate.quad(lambda t: law.cdf(c - t), 0, np.inf, epsabs=0, epsrel=1e-10)[0]
        upper = scipy.integrate.quad(lambda t: law.sf(c + t), 0, np.inf, epsabs=0, epsrel=1e-10)[0]
    assert below.item() / spread == pytest.approx(lower, rel=1e-8, abs=1e-300)
    assert above.item() / spread == pytest.approx(upper, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("c", [0.05, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_partial_moments_of_a_log_normal_are_those_of_black_and_scholes(c, scale):
    mixture, part = log_normal([1.0], [0.5], [scale]), scipy.stats.lognorm(scale, scale=math.exp(0.5))
    d = (0.5 - math.log(c)) / scale
    above = part.mean() * scipy.stats.norm.cdf(d + scale) - c * scipy.stats.norm.cdf(d)
    assert decisions.expected_above(mixture, c).item() == pytest.approx(above, rel=1e-7, abs=1e-9)
    assert decisions.expected_below(mixture, c).item() == pytest.approx(above + c - part.mean(), rel=1e-7, abs=1e-8)
    restricted = scipy.integrate.quad(part.sf, 0, c, epsrel=1e-11)[0]
    assert decisions.restricted_mean(mixture, c).item() == pytest.approx(restricted, rel=1e-8)
    assert decisions.hazard(mixture, c).item() == pytest.approx(part.pdf(c) / part.sf(c), rel=1e-9)
    assert decisions.cumulative_hazard(mixture, c).item() == pytest.approx(-part.logsf(c), rel=1e-9)


@pytest.mark.parametrize("c", [0.05, 0.2, 0.5, 6.0, 8.0, 12.0])
def test_rare_partial_moments_of_a_log_normal_keep_their_digits(c):
    mixture, part = log_normal([1.0], [0.5], [0.3]), scipy.stats.lognorm(0.3, scale=math.exp(0.5))
    below = scipy.integrate.quad(part.cdf, 0, c, epsabs=0, epsrel=1e-10, points=[0.9 * c, 0.99 * c])[0]
    above = scipy.integrate.quad(lambda t: part.sf(c * math.exp(t)) * c * math.exp(t), 0, 5, epsabs=0, epsrel=1e-10)[0]
    # The grid ends at probabilities of about 1e-17.
    if below > 1e-15:
        assert decisions.expected_below(mixture, c).item() == pytest.approx(below, rel=1e-6)
    if above > 1e-15:
        assert decisions.expected_above(mixture, c).item() == pytest.approx(above, rel=1e-6)


def slow_unless(quick):
    """All kinds and families; those for which ``quick`` is false take seconds each by the same code."""
    pairs = [(name, family) for name in KINDS for family in FAMILIES]
    return [pytest.param(*pair, marks=() if quick(*pair) else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "family"), slow_unless(lambda name, family: family != "student_t" or name in ("plain", "log"))
)
def test_infinite_thresholds(name, family):
    mixture = make_mixture(KINDS[name], (3,), dim=2, family=FAMILIES[family])
    nothing, infinite = torch.zeros(3, 2, dtype=torch.float64), torch.full((3, 2), math.inf, dtype=torch.float64)
    for value in (math.inf, infinite):
        assert_close(decisions.expected_above(mixture, value), nothing)
        assert_close(decisions.expected_below(mixture, value), infinite)
        assert_close(decisions.restricted_mean(mixture, value), mixture.mean, equal_nan=True)
        assert_close(decisions.expected_below(mixture, -value), nothing)
        assert_close(decisions.expected_above(mixture, -value), infinite)
        assert_close(decisions.restricted_mean(mixture, -value), -infinite)
        assert_close(decisions.probability_between(mixture, -value, value), nothing + 1)


HARDLY_ANY_MOMENTS = ("log", "shifted log", "asinh", "chain")


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in KINDS for f in FAMILIES if f == "normal" or n not in HARDLY_ANY_MOMENTS]
)
def test_partial_moments_are_integrals_of_the_distribution_function(name, family):
    """The derivative of what falls short is the cdf, and the difference of the two moments is the mean minus c."""
    mixture = make_mixture(KINDS[name], (3,), dim=2, family=FAMILIES[family])
    c = mixture.icdf(
        torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)[:, None, None].expand(3, 3, 2)
    ).requires_grad_()
    below, above = decisions.expected_below(mixture, c), decisions.expected_above(mixture, c)
    atol = 5e-5 if name == "quantile" else 1e-5  # quadrature of tails behind a spline is coarser
    assert_close(above - below, (mixture.mean - c).detach() + 0 * above, rtol=1e-4, atol=atol)
    assert_close(torch.autograd.grad(below.sum(), c)[0], mixture.cdf(c).detach(), rtol=1e-5, atol=1e-6)
    above = decisions.expected_above(mixture, c)
    assert_close(torch.autograd.grad(above.sum(), c)[0], -mixture.sf(c).detach(), rtol=1e-5, atol=1e-6)
    numbers = [decisions.expected_below(mixture, c[1, 0, 0].item())[0, 0], below[1, 0, 0]]
    assert_close(numbers[0], numbers[1].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_at_a_location_are_probabilities(family):
    mixture = make_mixture(Standardize(), (3,), n_components=1, family=FAMILIES[family])
    centre = mixture.components.univariate()[0][..., 0].requires_grad_()
    below, above = decisions.expected_below(mixture, centre), decisions.expected_above(mixture, centre)
    assert_close(torch.autograd.grad(below.sum(), centre)[0], mixture.cdf(centre).detach())
    assert_close(torch.autograd.grad(above.sum(), centre)[0], -mixture.sf(centre).detach())


DECISIONS = {
    "probability_between": lambda m, y: decisions.probability_between(m, y, y + 0.5),
    "expected_below": decisions.expected_below,
    "expected_above": decisions.expected_above,
    "restricted_mean": decisions.restricted_mean,
    "expected_improvement": decisions.expected_improvement,
    "newsvendor_cost": lambda m, y: decisions.newsvendor_cost(m, y, under=2.0, over=1.0),
    "cumulative_hazard": decisions.cumulative_hazard,
    "hazard": decisions.hazard,
}


@pytest.mark.parametrize("transform", ["plain", "log", "chain"])
@pytest.mark.parametrize("name", DECISIONS)
def test_rows_have_their_own_decisions(name, transform):
    """Batches and samples in front of them, and single precision, against one row at a time in double precision."""
    mixture = make_mixture(KINDS[transform], (2, 3), dim=2)
    y = mixture.sample((4,))
    got = DECISIONS[name](mixture, y)
    single = DECISIONS[name](mixture.float(), y.float())
    assert single.dtype == torch.float32
    for sample, i, j in np.ndindex(4, 2, 3):
        row = DECISIONS[name](mixture[i, j], y[sample, i, j])
        assert_close(got[sample, i, j], row)
        assert_close(single[sample, i, j].double(), row, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "log", "logit"])
def test_gradients_of_parameters(name):
    head, features = make_head(KINDS[name], n_components=2), torch.randn(2, 6, dtype=torch.float64)
    c = head(features).icdf(0.7).detach()

    def moments(bias):
        mixture = torch.func.functional_call(head, {"linear.bias": bias}, features)
        return torch.stack([decisions.expected_below(mixture, c), decisions.expected_above(mixture, c)])

    assert torch.autograd.gradcheck(
        moments, head.linear.bias.detach().requires_grad_(), rtol=1e-4, atol=1e-6, fast_mode=True
    )


@functools.cache
def legendre():
    """Nodes and weights, which take seconds to compute."""
    return tuple(torch.tensor(t) for t in np.polynomial.legendre.leggauss(3000))


@pytest.mark.parametrize("name", ["plain", "log", "logit"])
@pytest.mark.parametrize("level", [0.1, 0.9])
def test_value_at_risk_is_the_mean_of_the_quantiles_beyond(name, level):
    mixture = make_mixture(KINDS[name], (3,))
    nodes, weights = legendre()
    for tail, start, width in (("upper", level, 1 - level), ("lower", 0.0, level)):
        u = start + 0.5 * width * (nodes + 1)
        quantiles = mixture.icdf(u[:, None, None].expand(-1, 3, 1))
        expected = (0.5 * weights[:, None, None] * quantiles).sum(0)
        got = decisions.conditional_value_at_risk(mixture, level, tail=tail)
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_best_order_is_a_quantile():
    mixture = make_mixture(Log(), (4,))
    best = mixture.icdf(3 / 4)
    cost = decisions.newsvendor_cost(mixture, best, under=3.0, over=1.0)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert bool((decisions.newsvendor_cost(mixture, factor * best, under=3.0, over=1.0) > cost).all())


def test_improvement_on_the_best_value():
    mixture = normal(1.0, 2.0)
    z = (0.3 - 1.0) / 2
    expected = 2 * (z * scipy.stats.norm.cdf(z) + scipy.stats.norm.pdf(z))
    assert decisions.expected_improvement(mixture, 0.3).item() == pytest.approx(expected)
    other = decisions.expected_improvement(mixture, 0.3, minimize=False).item()
    assert other == pytest.approx(expected + 1.0 - 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_ranges(dtype):
    mixture = normal().to(dtype)
    for low, high in ((-1.0, 2.0), (9.0, 10.0), (-10.0, -9.0), (-math.inf, 0.5), (1.0, math.inf)):
        below, above = scipy.stats.norm.cdf([low, high]), scipy.stats.norm.sf([low, high])
        expected = below[1] - below[0] if high < 0 else above[0] - above[1]
        assert decisions.probability_between(mixture, low, high).item() == pytest.approx(expected, rel=2e-5)
    prices = make_mixture(Log())
    assert_close(decisions.probability_between(prices, -5.0, 2.0), prices.cdf(2.0))


@pytest.mark.parametrize("name", [*KINDS, "angle"])
def test_ranges_of_one_point_and_unknown_ends(name):
    mixture = make_mixture(KINDS.get(name, "angle"), (3,), dim=2)
    y = mixture.sample()
    assert_close(decisions.probability_between(mixture, y, y), torch.zeros_like(y))
    known = decisions.probability_between(mixture, y, y + 0.1)
    y[1, 0] = torch.nan
    for got in (decisions.probability_between(mixture, y, y + 0.1), decisions.probability_between(mixture, y - 0.1, y)):
        assert_close(got.isnan(), y.isnan())
    got = decisions.probability_between(mixture, y, y + 0.1)
    assert_close(got[~y.isnan()], known[~y.isnan()])


def test_costs_of_nothing_are_zero():
    mixture = make_mixture(Log(), family=StudentT(df=3.0))
    assert decisions.newsvendor_cost(mixture, 2.0, under=1.0, over=0.0).isinf().all()
    got = decisions.newsvendor_cost(mixture, 2.0, under=0.0, over=2.0)
    assert_close(got, 2 * decisions.expected_below(mixture, 2.0))
    assert_close(decisions.newsvendor_cost(mixture, math.inf, under=1.0, over=0.0), torch.zeros_like(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_within_a_far_limit_keep_their_digits(dtype):
    mixture = normal(0.3, 0.01).to(dtype)
    for limit in (1e3, 1e9, 1e15):
        assert_close(decisions.restricted_mean(mixture, limit), torch.tensor([0.3], dtype=dtype))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KINDS)
def test_probabilities_of_narrow_ranges_are_densities(name, family):
    mixture = make_mixture(KINDS[name], (3,), dim=2, family=FAMILIES[family])
    y = mixture.icdf(torch.tensor([0.01, 0.4, 0.95], dtype=torch.float64)[:, None, None].expand(3, 3, 2))
    # A width of which the ends of the range have all digits: what is left is the rounding of their images.
    width = (y + 1e-6 * y.abs()) - y
    got = decisions.probability_between(mixture, y, y + width) / width
    assert_close(got, decisions.hazard(mixture, y + width / 2) * mixture.sf(y + width / 2), rtol=1e-7, atol=0)


def test_hazards_above_the_support_are_not_numbers():
    mixture = make_mixture(KINDS["logit"])
    assert decisions.hazard(mixture, 2.0).isnan().all()
    assert (decisions.hazard(mixture, -1.0) == 0).all()
    assert decisions.cumulative_hazard(mixture, 2.0).isinf().all()


def test_times_whose_mean_is_infinite_have_a_restricted_mean():
    mixture = make_mixture(Log(), family=StudentT(df=3.0))
    assert mixture.mean.isinf().all()
    assert decisions.expected_above(mixture, 2.0).isinf().all()
    restricted = decisions.restricted_mean(mixture, 2.0)
    for i in range(5):

        def survival(t, i=i):
            return mixture[i].sf(t).item()

        assert restricted[i].item() == pytest.approx(scipy.integrate.quad(survival, 0, 2, epsrel=1e-8)[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", ["log", "asinh"])
@pytest.mark.parametrize("family", [StudentT(df=1.5), "laplace", "gumbel"], ids=["student_t", "laplace", "gumbel"])
def test_infinite_means_leave_no_gradient_undefined(family, transform, dtype):
    x = torch.tensor([[0.3], [-2.0], [2.0]], dtype=dtype)
    network = MixtureDensityNetwork(1, 1, 2, 8, family=family, target_transform=transform, seed=0).to(dtype)
    for name in ("expected_below", "expected_above", "restricted_mean", "mean", "stddev"):
        network.zero_grad()
        mixture = network(x)
        values = getattr(decisions, name)(mixture, 1.5) if hasattr(decisions, name) else getattr(mixture, name)
        if (finite := values.isfinite()).any():
            values[finite].sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters()), name


def test_gradients_where_the_mean_is_infinite():
    parameters = [torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def mixture(locs, raw):
        components = StudentTComponents(locs, DiagonalCovariance(raw.exp()), locs.new_tensor([1.5, 3.0]))
        return Mixture(locs.new_zeros(2), WarpedComponents(components, LogWarp()))

    for function in (decisions.expected_below, decisions.restricted_mean):
        assert torch.autograd.gradcheck(lambda *given, f=function: f(mixture(*given), 1.5), parameters, fast_mode=True)


def test_cauchy_components_have_no_partial_moments():
    mixture = make_mixture(Standardize(), family=StudentT(df=1.0))
    assert isinstance(mixture, Mixture)
    assert decisions.expected_above(mixture, 0.0).isinf().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: decisions.probability_between(m, 1.0, 0.9), "low, high: expected ends in ascending order"),
        (lambda m: decisions.conditional_value_at_risk(m, 1.0), "level: expected a probability in"),
        (lambda m: decisions.conditional_value_at_risk(m, 0.5, tail="left"), "tail: expected 'upper' or 'lower'"),
        (lambda m: decisions.newsvendor_cost(m, 1.0, under=-1.0, over=1.0), "under, over: expected costs"),
        (lambda m: decisions.newsvendor_cost(m, 1.0, under=1.0, over=math.inf), "under, over: expected costs"),
        (lambda m: decisions.expected_below(m, torch.zeros(2, 3)), "value: expected shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_mixture(Log()))


# Counts, and targets that may be zero


COUNT_FAMILIES = {"poisson": "poisson", "inflated": ZeroInflated(), "hurdle": Hurdle("poisson")}


def with_point_mass():
    """Positive numbers that may be zero, and the probability that they are."""
    mixture = make_mixture(Log(), (3,), family=ZeroInflated("normal"))
    return mixture, mixture.log_prob(torch.zeros(3, 1, dtype=torch.float64)).exp().unsqueeze(-1)


@pytest.mark.parametrize("family", COUNT_FAMILIES)
def test_decisions_on_counts_are_sums(family):
    head = make_head(None, family=COUNT_FAMILIES[family])
    with torch.no_grad():
        head.scale.fill_(4.0)
        mixture = head(torch.randn(3, 6, dtype=torch.float64))
    k = torch.arange(3000, dtype=torch.float64).reshape(-1, 1, 1)
    p = mixture.univariate().log_prob(k.expand(-1, 3, 1)).exp()
    assert_close(p.sum(0), torch.ones(3, 1, dtype=torch.float64))
    for t in (0.0, 1.0, 4.0, 7.5):
        assert_close(decisions.probability_between(mixture, t, t + 3), (p * ((k >= t) & (k <= t + 3))).sum(0))
        assert_close(decisions.probability_between(mixture, t, t), (p * (k == t)).sum(0))
        below, above = ((t - k).clamp(min=0) * p).sum(0), ((k - t).clamp(min=0) * p).sum(0)
        assert_close(decisions.expected_below(mixture, t), below)
        assert_close(decisions.expected_above(mixture, t), above)
        assert_close(decisions.newsvendor_cost(mixture, t, under=3.0, over=0.5), 3 * above + 0.5 * below)
        assert_close(decisions.expected_improvement(mixture, t), below)
        assert_close(decisions.restricted_mean(mixture, t), (k.clamp(max=t) * p).sum(0))
        assert_close(decisions.cumulative_hazard(mixture, t), -(p * (k > t)).sum(0).log())
        assert_close(decisions.hazard(mixture, t), (p * (k == t)).sum(0) / (p * (k >= t)).sum(0))
    for level in (0.05, 0.5, 0.93):
        cdf = p.cumsum(0)
        # The part of the probability of each count that lies above the level.
        beyond = torch.minimum(p, (cdf - level).clamp(min=0))
        got = decisions.conditional_value_at_risk(mixture, level)
        assert_close(got, (k * beyond).sum(0) / (1 - level))
        got = decisions.conditional_value_at_risk(mixture, level, tail="lower")
        assert_close(got, (k * (p - beyond)).sum(0) / level, rtol=1e-6, atol=1e-9)
    # Survival is the product of what is left at each count.
    hazards = torch.stack([decisions.hazard(mixture, float(t)) for t in range(6)])
    assert_close((1 - hazards).log().sum(0), -decisions.cumulative_hazard(mixture, 5.0))


def test_decisions_beside_a_point_mass_are_averages():
    mixture, zero = with_point_mass()
    above = mixture.of_any_family(mixture.components.base)
    logits = mixture.logits + torch.nn.functional.logsigmoid(-mixture.components.logit[..., 0])
    above = above.reweighted(logits, mixture.components.base)
    for t in (0.0, 0.3, 2.0):
        inside = decisions.probability_between(above, 0.0, t)
        assert_close(decisions.probability_between(mixture, 0.0, t), zero + (1 - zero) * inside)
        for moment, own in (
            (decisions.expected_below, t),
            (decisions.expected_above, 0.0),
            (decisions.restricted_mean, 0.0),
            (decisions.expected_improvement, t),
        ):
            assert_close(moment(mixture, t), zero * own + (1 - zero) * moment(above, t))
        assert_close(decisions.cumulative_hazard(mixture, t), -(mixture.sf(t)).log())
    assert_close(decisions.hazard(mixture, 0.0), zero)
    assert_close(decisions.hazard(mixture, 2.0), decisions.hazard(above, 2.0))
    level = 0.5 * zero.amin().item()  # within the point mass
    got = decisions.conditional_value_at_risk(mixture, level)
    assert_close(got, mixture.mean / (1 - level), rtol=1e-5, atol=1e-6)
    lower = decisions.conditional_value_at_risk(mixture, level, tail="lower")
    assert_close(lower, torch.zeros_like(lower))
