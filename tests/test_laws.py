"""Laplace, logistic and Gumbel components: against scipy, mpmath and scoringrules, by identities and by draws."""

import itertools
import math
import re
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import BATCH_SHAPES, NOISE
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Family,
    Fixed,
    Full,
    Gumbel,
    IndependentComponents,
    Isotropic,
    Laplace,
    Law,
    LocationScale,
    Logistic,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    Normal,
    StudentT,
    SymmetricLaw,
    Targets,
    ZeroInflated,
    fit,
    scores,
)
from pyro_mdn.distributions.families.laws.gumbel import GumbelLaw
from pyro_mdn.distributions.families.laws.laplace import LaplaceLaw
from pyro_mdn.tensors.expected_distances import mean_difference_by_quadrature
from pyro_mdn.tensors.tensor_batch import stored

FAMILIES = {
    "laplace": (Laplace, scipy.stats.laplace),
    "logistic": (Logistic, scipy.stats.logistic),
    "gumbel": (Gumbel, scipy.stats.gumbel_r),
}
LAWS = {name: (family.law, expected) for name, (family, expected) in FAMILIES.items()}
LAWS["mirrored gumbel"] = Gumbel.law.mirrored(), scipy.stats.gumbel_l
every_family = pytest.mark.parametrize("name", FAMILIES)
every_law = pytest.mark.parametrize("name", LAWS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
INDEPENDENT = {name: noise for name, noise in NOISE.items() if not name.startswith(("full", "low_rank"))}
every_noise = pytest.mark.parametrize("noise", INDEPENDENT.values(), ids=INDEPENDENT)

# As far out as scipy's functions are finite: in one tail of a Gumbel law, densities fall doubly exponentially.
POINTS = torch.cat([-torch.logspace(-6, 2.4, 80), torch.zeros(1), torch.logspace(-6, 2.4, 80)]).double()


def mixture_of(name, batch=(4,), n_components=3, dim=2):
    torch.manual_seed(0)
    shape = *batch, n_components, dim
    components = IndependentComponents(torch.randn(shape).double(), torch.rand(shape).double() + 0.3, LAWS[name][0])
    return Mixture(torch.randn(*batch, n_components).double(), components)


def expected_by_output(name, mixture, function, y):
    """Function of scipy of each output of a mixture, summed over components, at points ``(*sample, *batch, D)``."""
    of_one = getattr(LAWS[name][1], function)
    scale = mixture.components.scale.expand(mixture.locs.shape)
    values = torch.as_tensor(of_one(y.unsqueeze(-2).numpy(), mixture.locs.numpy(), scale.numpy()))
    return (mixture.logits.exp().unsqueeze(-1) * values).sum(-2)


# Laws


@every_law
@pytest.mark.parametrize("function", ["log_density", "cdf", "log_cdf"])
def test_functions_are_those_of_scipy(name, function):
    law, expected = LAWS[name]
    of_scipy = {"log_density": "logpdf", "cdf": "cdf", "log_cdf": "logcdf"}[function]
    with np.errstate(all="ignore"):
        truth = torch.as_tensor(getattr(expected, of_scipy)(POINTS.numpy()))
    assert_close(getattr(law, function)(POINTS), truth, rtol=1e-12, atol=0)
    single = getattr(law, function)(POINTS[POINTS.abs() < 20].float()).double()
    assert_close(single, truth[POINTS.abs() < 20], rtol=1e-4, atol=1e-6)


@every_law
def test_quantiles_are_those_of_scipy(name):
    law, expected = LAWS[name]
    q = torch.cat([torch.logspace(-307.6, -1, 200).double(), torch.linspace(0.1, 0.5, 100).double()])
    assert_close(law.quantile(q), torch.as_tensor(expected.ppf(q)), rtol=1e-12, atol=0)
    assert_close(law.cdf(law.quantile(q)), q, rtol=1e-12, atol=0)
    least = torch.tensor(torch.finfo(torch.float32).tiny)
    assert law.quantile(least).item() == pytest.approx(expected.ppf(least.item()), rel=1e-6)
    assert law.quantile(torch.zeros(1)).item() == -math.inf


@every_law
@every_dtype
def test_far_tails(name, dtype):
    """Logarithms are right and gradients finite at any distance, where a density is anything but a number."""
    law, z = LAWS[name][0], torch.tensor([-1e30, -1e4, 1e4, 1e30], dtype=dtype, requires_grad=True)
    log_cdf = law.log_cdf(z)
    if name == "gumbel":  # the logarithm of a logarithm is -z: below any number, but not where a number will do
        assert (log_cdf[:2] < -1e15).all()
    else:
        assert_close(log_cdf[:2], z[:2] - math.log(2) * (name == "laplace"))
    assert_close(log_cdf[2:], torch.zeros(2, dtype=dtype), rtol=0, atol=0)
    for function in (law.log_density, law.log_cdf, law.cdf, law.mean_distance):
        first = torch.autograd.grad(function(z).sum(), z, create_graph=True)[0]
        assert first.isfinite().all()
        if first.requires_grad:
            assert torch.autograd.grad(first.sum(), z)[0].isfinite().all()
    assert (law.slope(z)[:2] > 0).all()
    assert (law.slope(z)[2:] < 0).all()
    infinite = torch.tensor([-math.inf, math.inf], dtype=dtype)
    assert (law.log_density(infinite) == -math.inf).all()
    assert_close(law.cdf(infinite), torch.tensor([0.0, 1.0], dtype=dtype))


@every_law
@pytest.mark.parametrize("function", ["log_density", "cdf", "log_cdf", "mean_distance"])
def test_derivatives_of_the_law(name, function):
    z = torch.tensor([-8.0, -3.0, -0.2, 0.1, 1.5, 20.0]).double().requires_grad_()
    function = getattr(LAWS[name][0], function)
    assert torch.autograd.gradcheck(function, z)
    assert torch.autograd.gradgradcheck(function, z, atol=1e-6)


def test_derivatives_of_laplace_functions_at_the_kink():
    """Of the log-density a subgradient; the cdf, and distances, have the derivatives that they have beside it."""
    law, zero = LaplaceLaw(), torch.zeros(1).double()
    derivatives = [torch.func.grad(lambda z, f=f: f(z).sum()) for f in (law.log_density, law.cdf, law.mean_distance)]
    assert [f(zero).item() for f in derivatives] == [0.0, 0.5, 0.0]
    assert torch.func.grad(lambda z: derivatives[2](z).sum())(zero).item() == 1.0
    assert torch.func.grad(lambda z: law.log_cdf(z).sum())(zero).item() == 1.0


@every_law
def test_slope_is_the_derivative(name):
    z = torch.linspace(-9, 30, 100).double()
    assert_close(LAWS[name][0].slope(z), Law.slope(LAWS[name][0], z))


TRANSFORMS = {
    "vmap": torch.vmap,
    "jvp": lambda f: lambda z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[0],
    "vjp": lambda f: lambda z: torch.func.vjp(f, z)[0],
    "compile": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
    "mapped gradient": lambda f: lambda z: torch.vmap(torch.func.grad_and_value(f))(z)[1],
}


@every_law
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functions_are_transformed(name, transform):
    law, z = LAWS[name][0], torch.tensor([-200.0, -3.0, 1.0, 50.0])
    torch.compiler.reset()
    for function in (law.log_density, law.cdf, law.log_cdf, law.mean_distance, lambda z: law.log_mass(z, z * 0 + 0.5)):
        assert_close(TRANSFORMS[transform](function)(z), function(z))


# Monotone functions whose differences are probabilities, with 400 digits in all tails.
ANTIDERIVATIVES = {
    "laplace": lambda z: mpmath.exp(z) / 2 if z < 0 else 1 - mpmath.exp(-z) / 2,
    "logistic": lambda z: 1 / (1 + mpmath.exp(-z)),
    "gumbel": lambda z: mpmath.exp(-mpmath.exp(-z)),
    "mirrored gumbel": lambda z: -mpmath.exp(-mpmath.exp(z)),
}


@every_law
@pytest.mark.parametrize("half", [1e-9, 1e-5, 1e-2, 1.0, 8.0, 60.0])
def test_probability_of_intervals(name, half):
    """In both tails, around the mode and in narrow cells, against a difference of 400 digits."""
    law, function = LAWS[name][0], ANTIDERIVATIVES[name]
    for centre in (-30.0, -2.0, 0.0, 0.7, 6.0, 25.0):
        with mpmath.workdps(400):
            low, high = (mpmath.mpf(centre) + sign * mpmath.mpf(half) for sign in (-1, 1))
            truth = float(mpmath.log(function(high) - function(low)))
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            got = law.log_mass(torch.tensor(centre, dtype=dtype), torch.tensor(half, dtype=dtype)).item()
            assert got == pytest.approx(truth, rel=tolerance, abs=tolerance)


@every_law
def test_derivatives_of_the_probability_of_intervals(name):
    centre = torch.tensor([-4.0, -0.3, 0.5, 3.0]).double().requires_grad_()
    half = torch.tensor([0.2, 0.7, 1e-2, 5.0]).double().requires_grad_()
    assert torch.autograd.gradcheck(LAWS[name][0].log_mass, (centre, half))
    assert torch.autograd.gradgradcheck(LAWS[name][0].log_mass, (centre, half), atol=1e-5)


@every_law
def test_mean_distance_is_the_integral(name):
    law, expected = LAWS[name]
    for z in (-7.0, -1.0, 0.0, 0.4, 2.0, 12.0):
        parts = ((expected.cdf, -60.0, z), (expected.sf, z, 60.0))
        truth = sum(scipy.integrate.quad(*part, epsabs=1e-13, epsrel=1e-13)[0] for part in parts)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
            assert law.mean_distance(torch.tensor(z, dtype=dtype)).item() == pytest.approx(truth, rel=tolerance)


@every_law
def test_moments_and_difference_of_one_component(name):
    law, expected = LAWS[name]
    assert law.mean() == pytest.approx(expected.mean(), abs=1e-15)
    assert law.stddev() == pytest.approx(expected.std(), rel=1e-14)
    one, scale = torch.ones(1).double(), torch.tensor([3.0]).double()
    closed = law.half_mean_difference(one, one, scale)
    integral = scipy.integrate.quad(lambda z: expected.cdf(z) * expected.sf(z), -60.0, 60.0, epsabs=1e-12)[0]
    assert closed.item() == pytest.approx(3 * integral, rel=1e-9)


# Mixtures


@every_law
def test_mixtures_are_those_of_scipy(name):
    mixture = mixture_of(name)
    y = torch.linspace(-4, 4, 9).double().reshape(9, 1, 1).expand(9, 4, 2)
    for function in ("cdf", "sf"):
        truth = expected_by_output(name, mixture, function, y)
        assert_close(getattr(mixture, function)(y), truth, rtol=1e-10, atol=0)
        assert_close(getattr(mixture, f"log_{function}")(y), truth.log(), rtol=1e-10, atol=1e-14)
    density = expected_by_output(name, mixture, "pdf", y)
    for d in range(2):
        assert_close(mixture.marginal(d).log_prob(y[..., d : d + 1]).exp(), density[..., d], rtol=1e-10, atol=0)


@every_law
def test_moments(name):
    mixture, expected = mixture_of(name), LAWS[name][1]
    weights, means = mixture.logits.exp().unsqueeze(-1), mixture.locs + mixture.components.scale * expected.mean()
    squares = (mixture.components.scale * expected.std()).square() + means.square()
    assert_close(mixture.mean, (weights * means).sum(-2))
    assert_close(mixture.variance, (weights * squares).sum(-2) - mixture.mean.square())


@every_law
def test_density_is_that_of_the_cdf(name):
    """It integrates to one, and over each interval to the difference of the cdf."""
    one = mixture_of(name, batch=(), dim=1)

    def density(y):
        return one.log_prob(torch.tensor([y]).double()).exp().item()

    assert scipy.integrate.quad(density, -60, 60, points=one.locs.flatten().tolist(), limit=200)[0] == pytest.approx(1)
    y = torch.linspace(-3, 5, 20).double().unsqueeze(-1).requires_grad_()
    assert_close(torch.autograd.grad(one.cdf(y).sum(), y)[0].squeeze(-1), one.log_prob(y).exp())


@every_law
def test_round_trips(name):
    mixture = mixture_of(name)
    q = torch.tensor([1e-300, 1e-8, 0.05, 0.5, 0.9, 1 - 1e-8]).double()[:, None, None].expand(-1, 4, 2)
    assert_close(mixture.cdf(mixture.icdf(q)), q, rtol=1e-10, atol=1e-14)
    y = mixture.sample((9,))
    assert_close(mixture.icdf(mixture.cdf(y)), y, rtol=1e-8, atol=1e-8)
    assert_close(mixture.inverse_rosenblatt(mixture.rosenblatt(y)), y, rtol=1e-8, atol=1e-8)
    low, high = mixture.interval(0.8, kind="shortest")
    assert_close(mixture.cdf(high) - mixture.cdf(low), torch.full((4, 2), 0.8).double())
    tails = torch.linspace(0.001, 0.199, 500).double()[:, None, None]
    assert (high - low <= (mixture.icdf(tails + 0.8) - mixture.icdf(tails)).amin(0) * (1 + 1e-6)).all()


@every_law
def test_draws_are_of_the_distribution(name):
    mixture = mixture_of(name)
    torch.manual_seed(0)
    draws = mixture.sample((5000,))
    for row in range(4):
        for d in range(2):
            u = expected_by_output(name, mixture, "cdf", draws)[:, row, d]
            assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    for u in mixture.rosenblatt(draws).flatten(1).unbind(-1):
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


@every_law
def test_draws_in_single_precision_have_no_impossible_outliers(name, monkeypatch):
    """A uniform number that is 0, one in 16 million, stands for the numbers below the next one."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    components = IndependentComponents(torch.zeros(1, 1), torch.ones(1, 1), LAWS[name][0])
    assert LAWS[name][1].cdf(components.draw().item()) == pytest.approx(2**-25, rel=1e-3)


@every_law
def test_pathwise_gradients(name):
    """Of E y², with respect to locations, scales and log-weights, against the closed form."""
    fixed = mixture_of(name, batch=(), dim=1)
    parameters = [t.clone().requires_grad_() for t in (fixed.logits, *fixed.components.tensors())]

    def built():
        return Mixture(parameters[0], IndependentComponents(*parameters[1:], LAWS[name][0]))

    mixture = built()
    truth = torch.autograd.grad((mixture.variance + mixture.mean.square()).sum(), parameters)
    torch.manual_seed(0)
    estimates = []
    for _ in range(40):
        value = built().rsample((500,)).square().mean()
        estimates.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
    several = torch.stack(estimates)
    error = several.std(0) / math.sqrt(len(several))
    assert ((several.mean(0) - torch.cat([g.flatten() for g in truth])).abs() < 4.5 * error + 1e-9).all()


# Scores


@pytest.mark.parametrize("name", LAWS)
def test_crps_of_one_component_is_that_of_scoringrules(name):
    scoringrules = pytest.importorskip("scoringrules")
    components = IndependentComponents(*(torch.tensor([[v]]).double() for v in (0.5, 2.0)), LAWS[name][0])
    y = torch.linspace(-6, 9, 16).double()
    got = scores.crps(Mixture(torch.zeros(1).double(), components), y.unsqueeze(-1)).squeeze(-1)
    truth = {
        "laplace": lambda y: scoringrules.crps_laplace(y, 0.5, 2.0),
        "logistic": lambda y: scoringrules.crps_logistic(y, 0.5, 2.0),
        "gumbel": lambda y: scoringrules.crps_gev(y, 0.0, 0.5, 2.0),
        "mirrored gumbel": lambda y: scoringrules.crps_gev(-y, 0.0, -0.5, 2.0),
    }[name](y.numpy())
    assert_close(got, torch.as_tensor(truth), rtol=1e-10, atol=1e-12)


@every_law
def test_crps_of_mixtures_is_the_integral(name):
    mixture, y = mixture_of(name, batch=(2,), dim=1), torch.tensor([[0.3], [3.0]]).double()
    got = scores.crps(mixture, y)
    for row in range(2):
        one, at = mixture[row], y[row].item()

        def squared(z, one=one, at=at):
            return (one.cdf(torch.tensor([z]).double()).item() - float(at <= z)) ** 2

        kinks = sorted({*one.locs.flatten().tolist(), at})
        ends = itertools.pairwise([-40.0, *kinks, 60.0])
        parts = [scipy.integrate.quad(squared, low, high, epsabs=1e-9)[0] for low, high in ends]
        assert got[row].item() == pytest.approx(sum(parts), rel=1e-8 if name == "laplace" else 1e-4)


SCALES = {
    "apart": (0.5, 1.0, 3.0),
    "equal": (1.3, 1.3, 1.3),
    "nearly": (1.0, 1.0 + 1e-9, 0.95),
    "far": (1e-3, 1.0, 1e4),
}


@pytest.mark.parametrize("kind", SCALES)
def test_differences_of_laplace_components(kind):
    """The closed form against quadrature, and its derivatives also where scales and locations are equal."""
    torch.manual_seed(0)
    weights, locs = torch.rand(5, 3).double(), torch.randn(5, 3).double()
    locs[0] = 0.2
    scale = torch.tensor(SCALES[kind]).double().expand(5, 3)
    law = LaplaceLaw()
    closed = law.half_mean_difference(weights, locs, scale)
    assert_close(closed, mean_difference_by_quadrature(law, weights, locs, scale), rtol=1e-4, atol=0)
    arguments = [t.clone().requires_grad_() for t in (weights, locs, scale)]
    if kind != "far":
        assert torch.autograd.gradcheck(law.half_mean_difference, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(law.half_mean_difference, arguments, atol=1e-5, fast_mode=True)
    single = law.half_mean_difference(weights.float(), locs.float(), scale.float())
    assert_close(single.double(), closed, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("scales", "distance"), [((1.0, 1.0), 0.7), ((1.0, 1.05), 0.0), ((0.3, 2.0), 1.5), ((2.0, 1.79), 4.0)]
)
def test_difference_of_two_laplace_draws(scales, distance):
    """E|X - Y| against an integral over both densities, by scipy."""
    first, second = (scipy.stats.laplace(loc, s) for loc, s in zip((distance, 0.0), scales, strict=True))

    def outside(z):
        return first.cdf(z) * second.sf(z) + second.cdf(z) * first.sf(z)

    ends = [-80.0, 0.0, distance, 80.0] if distance else [-80.0, 0.0, 80.0]
    parts = [
        scipy.integrate.quad(outside, low, high, epsabs=1e-13, epsrel=1e-13)[0]
        for low, high in itertools.pairwise(ends)
    ]
    weights, locs, scale = (torch.tensor(v, dtype=torch.float64) for v in ((1, 1), (distance, 0), scales))
    total = LaplaceLaw().half_mean_difference(weights, locs, scale).item()
    assert total - 0.75 * sum(scales) == pytest.approx(sum(parts), rel=1e-11)


# Families


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@every_family
def test_networks_have_the_density_of_scipy(name, batch_shape, noise):
    family, expected = FAMILIES[name]
    torch.manual_seed(1)
    head = MixtureHead(6, 4, 3, family=family(noise)).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.shift.normal_()
    head.scale.uniform_(0.5, 2.0)
    features = torch.randn(*batch_shape, 6, dtype=torch.float64)
    y = 2 * torch.randn(7, *batch_shape, 4).double()
    mixture = head(features)
    locs, scale = mixture.locs.detach(), mixture.components.scale.detach().expand(mixture.locs.shape)
    each = torch.as_tensor(expected.logpdf(y.unsqueeze(-2).numpy(), locs.numpy(), scale.numpy()))
    truth = (mixture.logits + each.sum(-1)).logsumexp(-1)
    assert_close(mixture.log_prob(y), truth, rtol=1e-10, atol=1e-10)
    assert_close(head.log_prob(features, y), truth, rtol=1e-10, atol=1e-10)
    missing = y.clone()
    missing[..., 1::2] = math.nan
    assert_close(mixture.log_prob(missing), (mixture.logits + each[..., ::2].sum(-1)).logsumexp(-1))
    given = mixture.condition(y[..., 1::2], [1, 3]).log_prob(y[..., ::2])
    assert_close(given + mixture.marginal([1, 3]).log_prob(y[..., 1::2]), truth)
    gradients = torch.autograd.grad(head.log_prob(features, y).sum(), list(head.parameters()))
    assert all(bool(g.isfinite().all() and g.abs().sum() > 0) for g in gradients)


@every_noise
@every_family
def test_training_starts_at_the_clusters(name, noise):
    """Components have the means and the standard deviations of the clusters, as normal components do."""
    torch.manual_seed(0)
    y = torch.randn(300, 2).double() * torch.tensor([1.0, 5.0]).double() + 20 * torch.randint(0, 2, (300, 1))
    starts = []
    for family in (FAMILIES[name][0](noise), Normal(noise)):
        head = MixtureHead(3, 2, 2, family=family).double()
        torch.manual_seed(1)
        head.initialize_(y)
        starts.append(head(torch.zeros(3).double()).components)
    ours, normal = starts
    assert_close(ours.mean(), normal.mean())
    if isinstance(noise, Fixed):  # its scale is known, and not asked for
        assert_close(ours.stddev() / normal.stddev(), torch.full((1, 2), FAMILIES[name][0].law.stddev()).double())
    else:
        assert_close(ours.stddev().expand(2, 2), normal.stddev().expand(2, 2), rtol=1e-6, atol=0)


class Silent(SymmetricLaw):
    """A law without a standard deviation that is known."""

    def log_density(self, z):
        return -z.abs() - math.log(2)

    cdf = quantile = mean_distance = log_density


class Heavy(Silent):
    """A law without a finite standard deviation."""

    def stddev(self):
        return math.inf


@dataclass(frozen=True, eq=False)
class Several(Silent):
    """A law of two components, which differ."""

    spread: torch.Tensor = stored(0)  # noqa: RUF009

    def stddev(self):
        return self.spread


@pytest.mark.parametrize(
    ("law", "spread"),
    [(Silent(), 1.0), (Heavy(), 1.0), (Several(torch.tensor([2.0, math.inf])), [[2.0], [1.0]])],
    ids=["not known", "infinite", "of each component"],
)
def test_scales_start_as_they_are_where_there_is_no_standard_deviation(law, spread):
    kind = type(f"Of{type(law).__name__}", (LocationScale,), {"law": law})
    raw = kind().start(torch.full((2, 3), 0.8))[0]
    built = kind().build(torch.zeros(2, 3), [raw], torch.ones(3))
    assert_close(built.scale * torch.tensor(spread), torch.full((2, 3), 0.8))


def test_starts_of_components_that_are_symmetric_are_the_centres():
    torch.manual_seed(0)
    centres = torch.randn(3, 2)
    for family in (Normal(), Normal(Full()), StudentT(), StudentT(df=1.0), Laplace()):
        blocks = family.start(torch.ones(3, 2))
        assert torch.equal(family.start_locs(centres, blocks, torch.ones(2)), centres)


@every_family
def test_noise_that_correlates_outputs_is_refused(name):
    with pytest.raises(ValueError, match="noise: expected a noise model without correlations"):
        FAMILIES[name][0](Full())


@every_family
def test_files_have_the_family(tmp_path, name):
    x = torch.randn(5, 2)
    for family in (name, FAMILIES[name][0](Isotropic(tied=True))):
        network = MixtureDensityNetwork(2, 2, 2, [4], family=family)
        assert isinstance(network.head.family, FAMILIES[name][0])
        network.save(tmp_path / "network")
        loaded = MixtureDensityNetwork.load(tmp_path / "network")
        assert loaded.head.family == network.head.family
        assert torch.equal(loaded(x).log_prob(x), network(x).log_prob(x))
        ensemble = DeepEnsemble(network, 2)
        ensemble.save(tmp_path / "ensemble")
        assert torch.equal(DeepEnsemble.load(tmp_path / "ensemble")(x).log_prob(x), ensemble(x).log_prob(x))


@pytest.mark.parametrize("noise", [None, "isotropic"])
def test_every_name_that_errors_list_can_be_given(noise):
    with pytest.raises(ValueError, match="family: expected a Family or one of") as refused:
        MixtureHead(2, 1, 1, family="binomial")
    names = re.findall(r"'(\w+)'", str(refused.value).split(", got")[0])
    assert {"zero_inflated", "hurdle", "poisson", "normal"} <= set(names)
    for name in names:
        kind = Family.known["".join(word.title() for word in name.split("_"))]
        if kind.__module__.startswith("pyro_mdn") and (noise is None or name != "poisson"):
            head = MixtureHead(2, 1, 1, family=name, noise=noise)
            assert type(head.family) is kind
            assert noise is None or head.noise == Isotropic()
    assert ZeroInflated() == MixtureHead(2, 1, 1, family="zero_inflated").family
    with pytest.raises(ValueError, match="target_transform: expected a TargetTransform or one of") as refused:
        MixtureHead(2, 1, 1, target_transform="cube")
    for name in re.findall(r"'(\w+)'", str(refused.value).split(", got")[0]):
        MixtureHead(2, 1, 1, target_transform=name, family="poisson" if name == "counts" else None)


def test_names_of_this_library_are_taken():
    with pytest.raises(ValueError, match="family: expected another name than Gumbel, which this library has"):
        type("Gumbel", (LocationScale,), {"law": GumbelLaw(), "__module__": "elsewhere"})


@every_family
def test_losses_are_compiled(name):
    torch.compiler.reset()
    network = MixtureDensityNetwork(2, 2, 3, [4], family=name, seed=0)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    # The plain "aot_eager" of torch 2.13 is wrong about the strides of softplus_backward, which this one decomposes.
    backend = "aot_eager_decomp_partition"
    loss = torch.compile(lambda x, y: network.loss(x, y).sum(), backend=backend, fullgraph=True)
    assert_close(loss(x, y), network.loss(x, y).sum())
    parameters = list(network.parameters())
    expected = torch.autograd.grad(network.loss(x, y).sum(), parameters)
    for got, truth in zip(torch.autograd.grad(loss(x, y), parameters), expected, strict=True):
        assert_close(got, truth)


@every_law
def test_mixtures_are_mapped(name):
    mixture, y = mixture_of(name), torch.randn(6, 4, 2).double()
    crps = lambda y: scores.crps(mixture, y)  # noqa: E731
    for call in (mixture.log_prob, mixture.cdf, mixture.log_sf, mixture.rosenblatt, crps):
        assert_close(torch.func.vmap(call)(y), call(y))


# Targets that are intervals


@every_law
def test_likelihood_of_intervals_is_that_of_scipy(name):
    """Exact, censored, missing entries and cells of several outputs, which are independent within a component."""
    mixture, expected = mixture_of(name, batch=(6,)), LAWS[name][1]
    lower = torch.tensor([[0.3, -math.inf], [-math.inf, 1.0], [2.0, -0.5], [-1.0, 0.4], [0.0, 0.0], [-math.inf] * 2])
    upper = torch.tensor([[0.3, 1.2], [math.inf, math.inf], [math.inf, 0.5], [0.0, 0.4], [0.0, 0.0], [math.inf] * 2])
    targets = Targets.interval(lower.double(), upper.double())
    truth = torch.zeros(6).double()
    for row in range(6):
        each = torch.ones(3, 2).double()
        for k in range(3):
            for d in range(2):
                one = expected(mixture.locs[row, k, d].item(), mixture.components.scale[row, k, d].item())
                low, high = lower[row, d].item(), upper[row, d].item()
                each[k, d] = one.pdf(low) if low == high else one.cdf(high) - one.cdf(low)
        truth[row] = (mixture.logits[row].exp() * each.prod(-1)).sum().log()
    assert_close(mixture.log_prob(targets), truth, rtol=1e-10, atol=1e-10)


@every_law
@every_dtype
def test_intervals_far_out_have_finite_gradients(name, dtype):
    """A limit hundreds of scales away, where probabilities underflow."""
    locs = torch.zeros(1, 1, 1, dtype=dtype, requires_grad=True)
    mixture = Mixture(torch.zeros(1, 1, dtype=dtype), IndependentComponents(locs, torch.ones_like(locs), LAWS[name][0]))
    far = 200.0 if dtype == torch.float32 else 900.0
    above, below = Targets.interval([[far]], [[math.inf]]), Targets.interval([[-math.inf]], [[-far]])
    for targets, tail in ((above, LAWS[name][0].mirrored()), (below, LAWS[name][0])):
        value = mixture.log_prob(targets.to(dtype))
        assert_close(value, tail.log_cdf(torch.tensor([-far], dtype=dtype)))
        assert torch.autograd.grad(value.sum(), locs)[0].isfinite().all()
        assert value.item() < -0.99 * far


# Training


@every_family
def test_noise_of_the_family_is_learned_better_by_it(name):
    """Of 1000 rows: held out, its components are better than normal ones, and nearly as good as the truth."""
    expected = FAMILIES[name][1]
    torch.manual_seed(0)
    x = 4 * torch.rand(4000, 1) - 2
    noise = torch.as_tensor(expected.rvs(size=(4000, 1), random_state=0)).float()
    y = torch.sin(2 * x) + 0.2 * noise
    losses = {}
    for kind in ("normal", name):
        network = MixtureDensityNetwork(1, 1, 1, family=kind, seed=0)
        fit(network, x[:1000], y[:1000], progress=False, seed=0, max_epochs=60)
        losses[kind] = network.loss(x[1000:], y[1000:]).mean().item()
    truth = -expected.logpdf(noise[1000:].numpy()).mean() + math.log(0.2)
    assert losses[name] < losses["normal"] - {"laplace": 0.03, "logistic": 0.005, "gumbel": 0.03}[name]
    assert losses[name] < truth + 0.05


@every_family
def test_outliers_on_both_sides_are_survived(name):
    """Also on that side of a Gumbel component on which densities fall doubly exponentially."""
    torch.manual_seed(0)
    x, y = torch.rand(200, 1), 0.1 * torch.randn(200, 1)
    y[:2] = torch.tensor([[-300.0], [300.0]])
    network = MixtureDensityNetwork(1, 1, 1, [8], family=name, seed=0)
    fit(network, x, y, progress=False, seed=0, max_epochs=40, validation=0.0)
    assert network.loss(x, y).isfinite().all()
    worse = MixtureDensityNetwork(1, 1, 1, [8], family=name, seed=0)
    worse.initialize_(x, y)
    assert network.loss(x, y).mean() < worse.loss(x, y).mean()


@every_family
def test_ensembles_and_the_crps_train_it(name):
    torch.manual_seed(0)
    x, y = torch.rand(60, 1), torch.randn(60, 1)
    ensemble = DeepEnsemble(MixtureDensityNetwork(1, 1, 2, [4], family=name, seed=0), 2)
    fit(ensemble, x, y, progress=False, seed=0, max_epochs=2)
    assert ensemble(x).log_prob(y).isfinite().all()
    network = MixtureDensityNetwork(1, 1, 2, [4], family=name, seed=0)
    network.initialize_(x, y)
    scores.crps(network(x), y).sum().backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and bool(g.isfinite().all() and g.abs().sum() > 0) for g in gradients)
