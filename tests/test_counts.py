"""Counts: against scipy and mpmath, by sums over all counts, and in everything that takes a mixture."""

import math

import mpmath
import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from cases import BATCH_SHAPES
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Diagonal,
    Full,
    Hurdle,
    Isotropic,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeBinomial,
    Poisson,
    Targets,
    ZeroInflated,
    bayesianize,
    decisions,
    fit,
    laplace,
    posterior_predictive,
    scores,
)
from pyro_mdn.distributions.families.counts.count_components import CountComponents
from pyro_mdn.distributions.families.counts.count_law import NegativeBinomialLaw, PoissonLaw, smallest_count
from pyro_mdn.distributions.families.counts.count_marginals import log_between
from pyro_mdn.distributions.families.zeros.zero_laws import HurdleLaw, InflatedLaw
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.sklearn import MDNRegressor

FAMILIES = {
    "poisson": Poisson(),
    "negative_binomial": NegativeBinomial(),
    "tied": NegativeBinomial(Diagonal(tied=True)),
    "homoscedastic": NegativeBinomial(Isotropic(homoscedastic=True)),
    "inflated_poisson": ZeroInflated("poisson"),
    "inflated": ZeroInflated(),
    "hurdle": Hurdle(),
    "hurdle_poisson": Hurdle(Poisson()),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
RATES = [1e-6, 0.3, 4.0, 77.0, 1e4, 1e6]
SHAPES = [0.01, 1.0, 7.5, 1e3, 1e6]
COUNTS = torch.arange(1500, dtype=torch.float64)


def make_head(family, dim=1, n_components=3):
    torch.manual_seed(3)
    head = MixtureHead(4, dim, n_components, family=family).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.scale.fill_(2.0)
    return head


def make_mixture(family, batch_shape=(5,), dim=1, n_components=3):
    with torch.no_grad():
        return make_head(family, dim, n_components)(torch.randn(*batch_shape, 4, dtype=torch.float64))


def table(mixture, counts=COUNTS):
    """Probabilities of all counts, ``(counts, *batch, D)``, from the probabilities of the components."""
    terms = mixture.components.law.log_prob(counts.reshape(-1, *(1,) * (len(mixture.batch_shape) + 2)))
    return (mixture.logits.exp().unsqueeze(-1) * terms.exp()).sum(-2)


def some_counts(rate):
    root = math.sqrt(rate)
    numbers = [0, 1, 2, 9, 10, 11, rate - 3 * root, rate, rate + 3 * root, 3 * rate]
    return torch.tensor(sorted({max(0.0, math.floor(n)) for n in numbers}), dtype=torch.float64)


# Laws


def exact_log_prob(k, rate, shape):
    k, rate, shape = mpmath.mpf(k), mpmath.mpf(rate), mpmath.mpf(shape)
    log_prob = k * mpmath.log(rate / (shape + rate)) - shape * mpmath.log(1 + rate / shape) - mpmath.loggamma(k + 1)
    return float(log_prob + mpmath.loggamma(k + shape) - mpmath.loggamma(shape))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 4e-6)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", RATES)
def test_negative_binomial_against_many_digits(rate, shape, dtype, tolerance):
    """Where a difference of logarithms of gamma functions has lost most digits."""
    tensors = [torch.tensor(number, dtype=dtype) for number in (rate, shape)]
    with mpmath.workdps(50):
        for k in some_counts(rate).to(dtype):
            expected = exact_log_prob(k.item(), *(t.item() for t in tensors))
            got = NegativeBinomialLaw(*tensors).log_prob(k).item()
            assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("rate", RATES)
def test_poisson_against_scipy(rate):
    law, part, k = PoissonLaw(torch.tensor(rate, dtype=torch.float64)), scipy.stats.poisson(rate), some_counts(rate)
    tolerance = 1e-9  # scipy's own at rates of a million
    assert_close(law.log_prob(k), torch.from_numpy(part.logpmf(k)), rtol=tolerance, atol=tolerance)
    assert_close(law.cdf(k), torch.from_numpy(part.cdf(k)), rtol=tolerance, atol=1e-300)
    assert_close(law.sf(k), torch.from_numpy(part.sf(k)), rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("shape", [0.01, 1.0, 7.5, 1e3])
@pytest.mark.parametrize("rate", [0.3, 4.0, 77.0, 1e4])
def test_negative_binomial_against_scipy(rate, shape):
    law = NegativeBinomialLaw(*(torch.tensor(number, dtype=torch.float64) for number in (rate, shape)))
    part, k = scipy.stats.nbinom(shape, shape / (shape + rate)), some_counts(rate)
    assert_close(law.cdf(k), torch.from_numpy(part.cdf(k)), rtol=1e-9, atol=1e-300)
    assert_close(law.sf(k), torch.from_numpy(part.sf(k)), rtol=1e-9, atol=1e-300)
    assert law.variance().item() == pytest.approx(part.var())
    assert law.cdf(torch.tensor(-1.0, dtype=torch.float64)).item() == 0
    assert law.sf(torch.tensor(-1.0, dtype=torch.float64)).item() == 1


LAWS = {
    "poisson": lambda a, b, c: PoissonLaw(a),
    "negative_binomial": lambda a, b, c: NegativeBinomialLaw(a, b),
    "inflated": lambda a, b, c: InflatedLaw(NegativeBinomialLaw(a, b), c),
    "hurdle": lambda a, b, c: HurdleLaw(NegativeBinomialLaw(a, b), c),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("function", ["log_prob", "cdf", "sf", "mean_up_to", "mean_beyond"])
def test_derivatives(name, function):
    parameters = [torch.tensor(t, dtype=torch.float64) for t in ([0.5, 3.0, 40.0], [0.7, 3.0, 9.0], [-1.0, 0.3, 2.0])]
    parameters = [t.requires_grad_() for t in parameters]
    for k in ([0.0, 0.0, 0.0], [1.0, 2.0, 30.0]):
        k = torch.tensor(k, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda *p, k=k: getattr(LAWS[name](*p), function)(k), parameters, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(
            lambda *p, k=k: getattr(LAWS[name](*p), function)(k), parameters, fast_mode=True
        )


@pytest.mark.parametrize("function", ["cdf", "sf"])
def test_derivatives_of_small_probabilities_keep_their_digits(function):
    """Relative to the probability, a sum over the few counts that matter."""
    shape = torch.tensor([2000.0, 3000.0], dtype=torch.float64, requires_grad=True)
    rate, k = torch.tensor([90.0, 90.0], dtype=torch.float64), 15.0 if function == "cdf" else 240.0
    law = NegativeBinomialLaw(rate, shape)
    got = torch.autograd.grad(getattr(law, function)(torch.full((2,), k, dtype=torch.float64)).log().sum(), shape)[0]
    counts = torch.arange(k + 1) if function == "cdf" else torch.arange(k + 1, k + 300)
    terms = law.log_prob(counts.double().unsqueeze(-1)).logsumexp(0)
    assert_close(got, torch.autograd.grad(terms.sum(), shape)[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("function", ["cdf", "sf", "log_prob", "log_cdf", "log_sf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transforms_of_torch_func(function, dtype):
    """Rows that ``torch.vmap`` maps, and their gradients, are those of a batch; the target may be shared by all."""
    rate, shape = torch.rand(2, 4, 3, 1, dtype=torch.float64).add(0.5).to(dtype)
    logits, y = torch.zeros(3, dtype=dtype), torch.tensor([2.0], dtype=dtype)

    def row(rate, shape):
        mixture = Mixture(logits, CountComponents(NegativeBinomialLaw(rate, shape)), validate_args=False)
        return getattr(mixture, function)(y).sum()

    together = [t.clone().requires_grad_() for t in (rate, shape)]
    rows = torch.stack([row(*pair) for pair in zip(*together, strict=True)])
    assert_close(torch.vmap(row)(rate, shape), rows.detach())
    expected = torch.autograd.grad(rows.sum(), together)
    assert_close(torch.vmap(torch.func.grad(row, (0, 1)))(rate, shape), expected)
    _, along = torch.func.jvp(torch.vmap(row), (rate, shape), (rate, shape))
    assert_close(along, sum((t * g).sum((1, 2)) for t, g in zip((rate, shape), expected, strict=True)))


@pytest.mark.parametrize("name", LAWS)
def test_sums_over_all_counts(name):
    law = LAWS[name](
        *(torch.tensor(t, dtype=torch.float64) for t in ([0.2, 3.0, 17.0], [0.7, 3.0, 90.0], [-1.0, 0.3, 2.0]))
    )
    k = torch.arange(3000, dtype=torch.float64).unsqueeze(-1)
    p = law.log_prob(k).exp()
    assert_close(p.sum(0), torch.ones(3, dtype=torch.float64))
    assert_close((k * p).sum(0), law.mean())
    assert_close((k.square() * p).sum(0) - law.mean().square(), law.variance())
    assert_close(p.cumsum(0), law.cdf(k), rtol=1e-9, atol=1e-12)
    assert_close(1 - p.cumsum(0), law.sf(k), rtol=1e-6, atol=1e-12)
    assert_close((k * p).cumsum(0), law.mean_up_to(k), rtol=1e-9, atol=1e-12)
    assert_close(law.mean() - (k * p).cumsum(0), law.mean_beyond(k), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_draws(name):
    torch.manual_seed(0)
    parameters = [torch.tensor(t, dtype=torch.float64).unsqueeze(-1) for t in ([0.2, 3.0], [0.7, 3.0], [-1.0, 0.3])]
    law = LAWS[name](*(t.expand(2, 20_000).contiguous() for t in parameters))
    draws, k = law.draw(), torch.arange(5.0, dtype=torch.float64)
    share = (draws.unsqueeze(-1) == k).double().mean(1)
    expected = LAWS[name](*parameters).log_prob(k).exp()
    assert bool(((share - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all())


def test_hurdles_with_hardly_a_positive_count():
    rate = torch.full((1000,), 1e-4)
    law = HurdleLaw(PoissonLaw(rate), torch.full_like(rate, -20.0))
    assert bool((law.draw() == 1).all())
    assert_close(law.log_prob(torch.ones(())).exp(), torch.ones(1000), rtol=1e-4, atol=0)


def test_smallest_count():
    limits = torch.tensor([0.0, 1, 2, 7, 1000, 12345, 2.0**60, 1e300, math.inf], dtype=torch.float64)
    for guess in (0.0, 3.0, 1e5, 1e299):
        assert torch.equal(smallest_count(lambda k: k >= limits, torch.full_like(limits, guess)), limits)
    assert smallest_count(lambda k: k < 0, torch.tensor([math.nan, 3.0]))[1].isinf()


def test_quantiles_of_rates_beyond_all_integers_of_double_precision():
    rate = torch.tensor([1e17, 1e25], dtype=torch.float64).reshape(2, 1, 1)
    mixture = Mixture(torch.zeros(2, 1, dtype=torch.float64), CountComponents(PoissonLaw(rate)))
    assert_close(mixture.icdf(0.5), rate[..., 0])
    unknown = Mixture(torch.zeros(1), CountComponents(PoissonLaw(torch.tensor([[math.nan]]))), validate_args=False)
    assert not unknown.icdf(0.5).isfinite()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_at_extremes(family, dtype):
    head = MixtureHead(2, 1, 2, family=family).to(dtype)
    head.scale.fill_(100.0)
    for size in (0.0, 3.0, 40.0, -40.0):
        with torch.no_grad():
            head.linear.bias.fill_(size)
        y = torch.tensor([[0.0], [1.0], [1e6]], dtype=dtype)
        log_prob = head.log_prob(torch.zeros(3, 2, dtype=dtype), y)
        grads = torch.autograd.grad(log_prob.sum(), list(head.parameters()))
        assert bool(log_prob.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in grads)


# Mixtures


@every_family
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_functions_of_mixtures_are_sums(family, batch_shape):
    mixture = make_mixture(family, batch_shape, dim=2)
    p = table(mixture)
    cdf, y = p.cumsum(0), mixture.sample((4,))
    k = COUNTS.reshape(-1, *(1,) * (len(batch_shape) + 1))
    at = y.long()
    assert_close(mixture.cdf(y), cdf.gather(0, at))
    assert_close(mixture.sf(y), 1 - cdf.gather(0, at), rtol=1e-6, atol=1e-12)
    assert_close(mixture.cdf(y + 0.7), mixture.cdf(y))
    assert_close(mixture.log_cdf(y), mixture.cdf(y).log())
    assert_close(mixture.log_sf(y), mixture.sf(y).log())
    assert_close(mixture.mean, (k * p).sum(0))
    assert_close(mixture.variance, (k.square() * p).sum(0) - mixture.mean.square())
    for value in (y, y + 0.25, y - 3):
        assert_close(scores.crps(mixture, value), crps_by_integral(cdf, value), rtol=1e-6, atol=1e-6)
    distance = (value := y + 0.5).unsqueeze(0) - k.unsqueeze(1)
    assert_close(decisions.expected_below(mixture, value), (distance.clamp(min=0) * p.unsqueeze(1)).sum(0))
    assert_close(
        decisions.expected_above(mixture, value),
        ((-distance).clamp(min=0) * p.unsqueeze(1)).sum(0),
        rtol=1e-6,
        atol=1e-9,
    )
    joint = (mixture.logits + mixture.components.log_prob(y)).logsumexp(-1)
    assert_close(mixture.log_prob(y), joint)
    assert_close(mixture.marginal(1).log_prob(y[..., 1:]), p[..., 1].gather(0, at[..., 1]).log())


def crps_by_integral(cdf, value):
    """Integral of the squared difference of step functions, piece by piece, ``(*sample, *batch, D)``."""
    k = COUNTS.reshape(-1, *(1,) * value.ndim)
    below = (value - k).clamp(0, 1)
    cdf = cdf.unsqueeze(1)
    return (below * cdf.square() + (1 - below) * (1 - cdf).square()).sum(0) + (-value).clamp(min=0)


@every_family
def test_quantiles_are_the_smallest_counts(family):
    mixture = make_mixture(family, (6,))
    cdf = table(mixture).cumsum(0)
    for q in (1e-9, 0.1, 0.5, 0.9, 0.9999):
        assert_close(mixture.icdf(q), (cdf < q * (1 - 1e-12)).sum(0).double())
    k = torch.tensor([[0.0], [1.0], [2.0], [3.0], [5.0], [8.0]], dtype=torch.float64)
    assert_close(mixture.icdf(mixture.cdf(k)), k)  # also where a count is reached exactly
    assert mixture.icdf(1.0).isinf().all()
    assert (mixture.icdf(0.0) == 0).all()
    assert_close(mixture.float().icdf(0.5).double(), mixture.icdf(0.5))
    pairs = torch.rand(3, 6, 1, dtype=torch.float64)
    assert_close(mixture.icdf(pairs)[1], mixture.icdf(pairs[1]))


@every_family
@pytest.mark.parametrize("mass", [0.3, 0.8, 0.95])
def test_intervals(family, mass):
    mixture = make_mixture(family, (6,))
    p = table(mixture)
    low, high = mixture.interval(mass)
    assert_close((low, high), (mixture.icdf((1 - mass) / 2), mixture.icdf((1 + mass) / 2)))
    low, high = mixture.interval(mass, kind="shortest")
    for i in range(6):
        row = p[:, i, 0].numpy()
        cdf = np.concatenate([[0], row.cumsum()])
        widths = [
            (b - a, -(cdf[b + 1] - cdf[a]))
            for a in range(60)
            for b in range(a, 200)
            if cdf[b + 1] - cdf[a] >= mass - 1e-12
        ]
        width, held = min(widths)
        a, b = int(low[i]), int(high[i])
        assert b - a == width
        assert cdf[b + 1] - cdf[a] == pytest.approx(-held)


def test_shortest_intervals_of_large_counts():
    law = PoissonLaw(torch.tensor([[[5000.0]], [[40_000.0]]], dtype=torch.float64))
    mixture = Mixture(torch.zeros(2, 1, dtype=torch.float64), CountComponents(law))
    for i, rate in enumerate((5000.0, 40_000.0)):
        low, high = (end[i].item() for end in mixture.interval(0.9, kind="shortest"))
        part = scipy.stats.poisson(rate)
        starts = np.arange(int(part.ppf(0.1)) + 1)
        ends = part.ppf(np.minimum(0.9 + part.cdf(starts - 1), 1 - 1e-15))
        assert high - low == (ends - starts).min()
        assert part.cdf(high) - part.cdf(low - 1) >= 0.9


@pytest.mark.parametrize("mass", [0.1, 0.35, 0.6])
def test_shortest_intervals_of_many_modes(mass):
    """Narrow modes between others, also in single precision, against all intervals."""
    rates = torch.tensor([[3.0, 400.0, 2000.0, 5000.0], [50.0, 4000.0, 4200.0, 9000.0]], dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.2, 0.1, 0.4], [0.12, 0.4, 0.13, 0.35]], dtype=torch.float64)
    law = NegativeBinomialLaw(rates.unsqueeze(-1), torch.tensor([2.0, 1e4, 1e6, 9.0]).double().expand(2, 4)[..., None])
    mixture = Mixture(weights.log(), CountComponents(law))
    low, high = mixture.interval(mass, kind="shortest")
    k = torch.arange(60_000.0, dtype=torch.float64)
    p = table(mixture, k)[..., 0].numpy()
    for i in range(2):
        cdf = np.concatenate([[0], p[:, i].cumsum()])
        ends = np.searchsorted(cdf, cdf[:20_000] + mass * (1 - 1e-12)) - 1
        starts = np.arange(20_000)[ends < 59_999]
        width = (ends[starts] - starts).min()
        assert high[i] - low[i] == width
        held = cdf[ends[starts] + 1] - cdf[starts]
        assert cdf[int(high[i]) + 1] - cdf[int(low[i])] == pytest.approx(held[ends[starts] - starts == width].max())
    assert_close(mixture.float().interval(mass, kind="shortest")[1].double(), high)


@pytest.mark.parametrize("family", [*FAMILIES.values(), ZeroInflated("normal")], ids=str)
def test_empty_batches(family):
    transform = "log" if family.has_atom else None
    head = MixtureHead(4, 2, 3, family=family, target_transform=transform)
    mixture, y = head(torch.zeros(0, 4)), torch.zeros(0, 2)
    ends = mixture.interval(0.8), mixture.interval(0.8, kind="shortest")
    functions = mixture.cdf, mixture.log_sf, lambda y: scores.crps(mixture, y), lambda y: scores.pit(mixture, y)
    for result in (*(end for pair in ends for end in pair), *(function(y) for function in functions)):
        assert result.shape == (0, 2)
    assert mixture.log_prob(y).shape == mixture.log_prob(Targets.interval(y, y + 1)).shape == (0,)
    assert mixture.icdf(0.5).shape == mixture.mean.shape == mixture.sample().shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAWS)
def test_rare_intervals_have_logarithms(name, dtype):
    """Far below and above the mean, where probabilities underflow, against sums over the counts."""
    parameters = [torch.tensor(t, dtype=torch.float64) for t in (3000.0, 4000.0, -1500.0)]
    exact = LAWS[name](*parameters)
    law = LAWS[name](*(t.to(dtype).requires_grad_() for t in parameters))
    for first, last in ((0, 0), (0, 1), (0, 3), (0, 40), (2, 9), (5, 5), (20_000, math.inf), (20_000, 20_003)):
        counts = torch.arange(first, min(last, 30_000) + 1, dtype=torch.float64)
        expected = exact.log_prob(counts).logsumexp(0)
        assert expected < -700
        got = log_between(law, torch.tensor(float(first), dtype=dtype), torch.tensor(float(last), dtype=dtype))
        assert_close(got.double(), expected, rtol=1e-4, atol=0)
        slopes = torch.autograd.grad(got, law.tensors())
        assert all(bool(slope.isfinite()) for slope in slopes)
        assert any(bool(slope != 0) for slope in slopes)
        twice = torch.autograd.grad(log_between(law, counts[:1].to(dtype), counts[-1:].to(dtype)), law.tensors())
        assert all(bool(slope.isfinite()) for slope in twice)


def test_probabilities_of_no_events_are_exact():
    """A sum of one term."""
    mixture = Mixture(torch.zeros(1), CountComponents(PoissonLaw(torch.tensor([[300.0]]))))
    assert_close(mixture.log_cdf(0.0), torch.tensor([-300.0]))
    assert_close(mixture.log_cdf(1.0), torch.tensor([-300.0 + math.log(301)]))


def test_networks_learn_from_counts_below_a_limit_far_from_their_start():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1)).astype(np.float32)
    y = rng.poisson(np.where(x < 0, 800, 20)).astype(np.float32)
    seen = Targets.censored(np.maximum(y, 30), left=y < 30)
    network = MixtureDensityNetwork(1, 1, 1, 8, family="poisson", seed=0)
    fit(network, x, seen, max_epochs=30, seed=0, progress=False)
    assert network.predict(x).mixture.log_prob(seen).mean() > -30


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 3.0, 200.0])
def test_distribution_functions_of_hurdles_keep_their_digits(rate):
    k = torch.tensor([0.0, 1.0, 2.0, 150.0])
    single = HurdleLaw(PoissonLaw(torch.tensor(rate)), torch.tensor(-40.0))
    double = single.map(lambda t, n: t.double())
    expected = double.log_prob(torch.arange(151.0).double()).exp().cumsum(0)[k.long()]
    assert_close(single.cdf(k).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["negative_binomial", "hurdle"])
def test_rare_counts_have_logarithms(family):
    mixture = make_mixture(FAMILIES[family], (2,)).float()
    y = torch.full((2, 1), 3000.0)
    assert (mixture.sf(y) == 0).all()
    exact = mixture.double().components.law
    terms = exact.log_prob(torch.arange(3001.0, 9000, dtype=torch.float64).reshape(-1, 1, 1, 1))
    expected = (mixture.double().logits.unsqueeze(-1) + terms).logsumexp((0, 2))
    assert_close(mixture.log_sf(y).double(), expected, rtol=1e-3, atol=0)


def test_crps_of_hardly_any_mass_far_out():
    """A component of weight 1e-3 reaches counts of 1e5; its sum over all of them is the answer."""
    rate = torch.tensor([8.0, 2.0], dtype=torch.float64).reshape(1, 2, 1)
    shape = torch.tensor([5.0, 1e-4], dtype=torch.float64).reshape(1, 2, 1)
    weights = torch.tensor([[1 - 1e-3, 1e-3]], dtype=torch.float64)
    mixture = Mixture(weights.log(), CountComponents(NegativeBinomialLaw(rate, shape)))
    k = np.arange(400_000)
    parts = [scipy.stats.nbinom(r, r / (r + m)) for m, r in ((8.0, 5.0), (2.0, 1e-4))]
    cdf = sum(w * part.cdf(k) for w, part in zip((1 - 1e-3, 1e-3), parts, strict=True))
    for y in (0.0, 9.0, 3000.0):
        got = scores.crps(mixture, torch.tensor([[y]], dtype=torch.float64)).item()
        assert got == pytest.approx(((cdf - (y <= k)) ** 2).sum(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAWS)
def test_crps_of_large_counts(name, dtype):
    """Against sums over all counts, of components of very different sizes, and with a memory of few numbers."""
    parameters = [torch.tensor(t, dtype=dtype) for t in ([2.0, 300.0, 4e4], [0.5, 900.0, 40.0], [-1.0, 0.3, 2.0])]
    logits = torch.tensor([0.3, 0.3, 0.4], dtype=dtype).log()
    parameters = [t.unsqueeze(-1).requires_grad_() for t in parameters]
    mixture = Mixture(logits, CountComponents(LAWS[name](*parameters)))
    k, y = torch.arange(150_000.0, dtype=torch.float64), torch.tensor([0.0, 7.5, 310.0, 9000.0, 39_990.0, 1e5])
    exact = Mixture(logits.double(), CountComponents(LAWS[name](*(t.detach().double() for t in parameters))))
    cdf = table(exact, k).cumsum(0)
    squared = torch.cat([torch.zeros(1), cdf[:, 0].square().cumsum(0)])
    rest = torch.cat([(1 - cdf[:, 0]).square().flip(0).cumsum(0).flip(0), torch.zeros(1)])
    whole = y.floor().long()
    expected = squared[whole] + rest[whole + 1] + (y - y.floor()) * cdf[whole, 0].square()
    expected = expected + (1 - y + y.floor()) * (1 - cdf[whole, 0]).square()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        got = scores.crps(mixture, y.to(dtype).unsqueeze(-1))
    assert_close(got[:, 0].double(), expected, rtol=1e-6 if dtype == torch.float64 else 1e-4, atol=0)
    assert max(sizes) < 5000
    assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(got.sum(), mixture.components.law.tensors()))


def test_crps_of_missing_counts_has_no_gradients():
    rate = torch.tensor([[[3.0]], [[5.0]]], requires_grad=True)
    mixture = Mixture(torch.zeros(2, 1), CountComponents(PoissonLaw(rate)))
    got = scores.crps(mixture, torch.tensor([[torch.nan], [2.0]]))
    assert_close(got[0], torch.tensor([torch.nan]), equal_nan=True)
    slope = torch.autograd.grad(got[1].sum(), rate)[0].flatten()
    assert slope[0] == 0
    assert slope[1] > 0


@pytest.mark.parametrize("large", [False, True])
@every_family
def test_crps_has_derivatives(family, large):
    head, features = make_head(family), torch.randn(2, 4, dtype=torch.float64)
    y = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    if large:
        head.scale.fill_(3000.0)
        y = 1000 * y

    def score(bias):
        return scores.crps(torch.func.functional_call(head, {"linear.bias": bias}, features), y)

    assert torch.autograd.gradcheck(score, head.linear.bias.detach().requires_grad_(), rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("crps", lambda mixture, y: scores.crps(mixture, y)),
        ("icdf", lambda mixture, y: mixture.icdf(0.5)),
        ("interval", lambda mixture, y: mixture.interval(0.5, kind="shortest")),
        ("sample", lambda mixture, y: mixture.sample()),
    ],
)
def test_searches_under_vmap_say_where_to_call_them(name, function):
    def row(rate, y):
        return function(Mixture(torch.zeros(1), CountComponents(HurdleLaw(PoissonLaw(rate), rate))), y)

    with pytest.raises(ValueError, match=rf"{name}: expected numbers to look at, got those of torch.vmap"):
        torch.vmap(row, randomness="different")(torch.ones(4, 1, 1), torch.ones(4, 1))


@pytest.mark.parametrize("family", ["poisson", "hurdle"])
def test_operations_without_a_closed_form_say_what_to_use(family):
    mixture = make_mixture(FAMILIES[family])
    for operation, message in (
        (lambda: mixture.affine(1.0, 2.0), "affine: not closed for CountComponents"),
        (lambda: mixture.temper(2.0), "temper: not closed"),
        (lambda: mixture.rosenblatt(mixture.sample()), "transport: not closed .*scores.pit"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            operation()
    assert not mixture.has_rsample
    with pytest.raises(
        NotImplementedError, match=r"rsample: not closed for CountComponents .*draws are without gradients"
    ):
        make_head(FAMILIES[family])(torch.zeros(2, 4, dtype=torch.float64)).rsample()
    draws = mixture.rsample((3,))  # without parameters that need gradients
    assert_close(draws, draws.floor())


# Observations


@every_family
def test_missing_and_censored_entries(family):
    mixture = make_mixture(family, (6,), dim=3)
    y = mixture.sample()
    gaps = y.clone()
    gaps[0, 1], gaps[1] = torch.nan, torch.nan
    assert_close(mixture.log_prob(gaps)[0], mixture.marginal([0, 2])[0].log_prob(y[0, [0, 2]]))
    assert mixture.log_prob(gaps)[1] == 0
    lower, upper = y.clone(), y.clone()
    lower[2, 0], upper[2, 0] = 2.0, math.inf
    lower[3, 0], upper[3, 0] = -math.inf, 3.0
    lower[4, 0], upper[4, 0] = 1.0, 4.0
    lower[5, 0], upper[5, 0] = y[5, 0] - 0.5, y[5, 0] + 0.5  # a cell
    for rows, (a, b) in {2: (2, 1500), 3: (0, 4), 4: (1, 5)}.items():
        terms = mixture.components.law.log_prob(COUNTS.reshape(-1, 1, 1, 1))[:, rows].exp()
        rest = mixture.components.law.log_prob(y.unsqueeze(-2))[rows, :, 1:].sum(-1)
        expected = (mixture.logits[rows] + terms[a:b, :, 0].sum(0).log() + rest).logsumexp(-1)
        assert_close(mixture.log_prob(Targets.interval(lower, upper))[rows], expected)
    assert_close(mixture.log_prob(Targets.interval(lower, upper))[5], mixture.log_prob(y)[5])


@pytest.mark.parametrize("family", ["poisson", "negative_binomial", "tied", "inflated"])
def test_components_are_distributions_of_pyro(family):
    mixture = make_mixture(FAMILIES[family], (5,), dim=2)
    y = mixture.sample()
    got = (mixture.logits + mixture.component_distribution.log_prob(y.unsqueeze(-2))).logsumexp(-1)
    assert_close(got, mixture.log_prob(y), rtol=1e-6, atol=1e-6)  # Pyro's gate is rounded to the precision of logits


def test_hurdles_are_none_of_pyro():
    with pytest.raises(
        NotImplementedError, match="component_distribution: no Pyro distribution is known for HurdleLaw"
    ):
        _ = make_mixture(Hurdle()).component_distribution


def test_figures(claims):
    pytest.importorskip("matplotlib")
    from pyro_mdn import plots

    mixture, x = make_mixture(NegativeBinomial(), (40,)), claims[0][:40, 0]
    y = mixture.sample()
    for ax in (
        plots.plot_components(mixture, x),
        plots.plot_predictive_intervals(mixture, x, y),
        plots.plot_calibration(mixture, y),
        plots.plot_pit(scores.pit(mixture, y)),
        plots.plot_conditional_density(make_mixture(Poisson(), (), dim=2)),
    ):
        ax.figure.canvas.draw()
    ax = plots.plot_conditional_density(mixture, x, y)
    (mesh,) = [part for part in ax.collections if type(part).__name__ == "QuadMesh"]
    heights = mesh.get_coordinates()[:, 0, 1]
    assert_close(torch.from_numpy(np.diff(heights)), torch.ones(len(heights) - 1, dtype=torch.float64))  # a row a count
    assert mesh.get_array().max() <= 1


def test_counts_are_integers_in_arviz(claims):
    pytest.importorskip("arviz")
    from pyro_mdn import to_inference_data

    mixture, x = make_mixture(NegativeBinomial(), (2, 30)), claims[0][:30]
    y = mixture.sample()[0]
    data = to_inference_data(mixture, x=x, y=y, prior=mixture.expand((2, 30)))
    for group in ("posterior_predictive", "prior_predictive", "observed_data"):
        assert data[group]["y"].dtype == np.int64
    assert_close(torch.from_numpy(data["log_likelihood"]["y"].values[0]), mixture.log_prob(y))


@every_family
def test_conditionals(family):
    mixture = make_mixture(family, (5,), dim=3)
    y = mixture.sample()
    first = mixture.marginal([1])
    rest = mixture.condition(y[:, 1:2], 1)
    assert_close(first.log_prob(y[:, 1:2]) + rest.log_prob(y[:, [0, 2]]), mixture.log_prob(y))
    assert_close(mixture.expand((2, 5)).pool(0).log_prob(y), mixture.log_prob(y))
    assert_close(mixture.responsibilities(y).sum(-1), torch.ones(5, dtype=torch.float64))
    several = y[:, 1:2].expand(4, 5, 1)
    assert_close(mixture.condition(several, 1).log_prob(y[:, [0, 2]])[2], rest.log_prob(y[:, [0, 2]]))


def test_randomised_transforms_are_uniform():
    torch.manual_seed(0)
    mixture = make_mixture(FAMILIES["inflated"], (4000,))
    u = scores.pit(mixture, mixture.sample()).flatten()
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


# Networks


@pytest.fixture(scope="module")
def claims():
    """Zero-inflated counts, whose rate and probability of zero depend on x, and the truth's log score."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1200, 2))
    rate, never = np.exp(0.8 + 0.6 * x[:, 0]), 1 / (1 + np.exp(1 - x[:, 1]))
    y = np.where(rng.random(1200) < never, 0, rng.poisson(rate * rng.gamma(2, 0.5, 1200))).astype(np.float32)
    part = scipy.stats.nbinom(2, 2 / (2 + rate[800:]))
    chance = (1 - never[800:]) * part.pmf(y[800:]) + never[800:] * (y[800:] == 0)
    return x.astype(np.float32), y[:, None], -np.log(chance).mean()


@every_family
def test_training(claims, family, tmp_path):
    x, y, truth = claims
    network = MixtureDensityNetwork(2, 1, 2, family=family, hidden_dim=16, seed=0)
    fit(network, x[:800], y[:800], max_epochs=40, seed=0, progress=False)
    mixture = network.predict(x[800:]).mixture
    score = scores.log_score(mixture, y[800:]).mean().item()
    assert score < truth + 0.12
    network.save(tmp_path / "network.safetensors")
    loaded = MixtureDensityNetwork.load(tmp_path / "network.safetensors")
    assert_close(loaded.predict(x[800:]).mixture.log_prob(y[800:]), mixture.log_prob(y[800:]))


def test_ensembles_posteriors_and_estimators(claims):
    x, y, truth = claims
    network = MixtureDensityNetwork(2, 1, 2, family="negative_binomial", hidden_dim=8, seed=0)
    ensemble = DeepEnsemble(network, 3)
    fit(ensemble, x[:800], y[:800], max_epochs=10, seed=0, progress=False)
    pooled = ensemble.predict(x[800:]).mixture
    assert scores.log_score(pooled, y[800:]).mean().item() < truth + 0.15
    fit(network, x[:800], y[:800], max_epochs=10, seed=0, progress=False)
    bayesianize(network, layers="head")
    posterior = laplace(network, x[:200], y[:200])
    drawn = posterior_predictive(network, posterior, torch.from_numpy(x[:5]), num_samples=7)
    assert drawn.batch_shape == (7, 5)
    assert not drawn.sample().frac().any()
    model = MDNRegressor(n_components=2, family="poisson", max_epochs=5, random_state=0).fit(x, y.ravel())
    assert model.predict(x[:3]).shape == (3,)
    assert (model.predict(x[:3]) > 0).all()


def test_a_network_stands_in_a_model(claims):
    x, y = torch.from_numpy(claims[0][:50]), torch.from_numpy(claims[1][:50])
    network = MixtureDensityNetwork(2, 1, 2, family="poisson", hidden_dim=4, seed=0)

    def model(x, y=None):
        mixture = network(x)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", mixture, obs=y)

    trace = pyro.poutine.trace(model).get_trace(x, y)
    assert_close(trace.log_prob_sum(), network(x).log_prob(y).sum())
    assert model(x).shape == (50, 1)


# Errors


@pytest.mark.parametrize("bad", [-1.0, 2.5, 1e-3])
def test_numbers_that_are_no_counts_are_named(claims, bad):
    x, y = claims[0], claims[1].copy()
    y[7, 0] = bad
    network = MixtureDensityNetwork(2, 1, 2, family="poisson", seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    message = rf"y: expected counts 0, 1, 2, ..., got {bad:g} in row 7, column 0"
    with pytest.raises(ValueError, match=message):
        fit(network, x, y, max_epochs=1, progress=False)
    with pytest.raises(ValueError, match=message):
        network.loss(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(ValueError, match=message.replace("y:", "value:")):
        network(torch.from_numpy(x)).log_prob(torch.from_numpy(y))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pyro.validation_enabled(False):
        assert network(torch.from_numpy(x)).log_prob(torch.from_numpy(y))[7] == -math.inf
        assert network(torch.from_numpy(x)).log_prob(Targets.exact(torch.from_numpy(y)))[7] == -math.inf


def test_settings_are_checked():
    for build, message in (
        (lambda: MixtureHead(3, 1, 1, family="poisson", noise="full"), "noise: expected none for Poisson"),
        (lambda: MixtureHead(3, 1, 1, family=NegativeBinomial(Full())), "noise: expected a noise model without corr"),
        (lambda: MixtureHead(3, 1, 1, family="poisson", target_transform="log"), "target_transform: expected None"),
        (lambda: MixtureHead(3, 1, 1, target_transform="counts"), "target_transform: expected one for real numbers"),
        (lambda: ZeroInflated("student_t"), "family: expected a family of counts"),
        (lambda: ZeroInflated(ZeroInflated()), "family: expected a family of counts"),
        (lambda: Mixture(torch.zeros(1), CountComponents(PoissonLaw(torch.zeros(1, 1)))), "law: expected positive"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
