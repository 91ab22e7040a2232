"""Target transforms: against scipy and scoringrules, by quadrature, and by what an increasing map cannot change."""

import dataclasses
import math
import warnings
from itertools import pairwise

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import scoringrules
import torch
from cases import BATCH_SHAPES, NOISE
from torch.distributions import TransformedDistribution, constraints
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform, SoftplusTransform
from torch.testing import assert_close

from pyro_mdn import (
    Asinh,
    Chain,
    DeepEnsemble,
    DiagonalCovariance,
    Full,
    GaussianMixture,
    Isotropic,
    Log,
    Logit,
    MixtureDensityNetwork,
    MixtureHead,
    PerOutput,
    Quantile,
    Softplus,
    Standardize,
    StudentT,
    Targets,
    TargetTransform,
    YeoJohnson,
    fit,
    scores,
)
from pyro_mdn.distributions.units.units import StandardUnits
from pyro_mdn.distributions.units.warped_units import WarpedUnits
from pyro_mdn.distributions.units.warps import LogWarp

TRANSFORMS = {
    "log": Log(),
    "shifted log": Log(shift=0.5),
    "softplus": Softplus(),
    "logit": Logit(),
    "percent": Logit(0.0, 100.0),
    "asinh": Asinh(),
    "yeo-johnson": YeoJohnson(),
    "quantile": Quantile(n_knots=9),
    "chain": Chain([Log(), YeoJohnson()]),
}
POWERS = torch.tensor([0.0, 0.3, 1.0, 1.6, 2.0], dtype=torch.float64)


def tensors_of(transform, dim):
    """Tensors of a warp that are not special."""
    generator = torch.Generator().manual_seed(2)
    values = {
        "centre": lambda t: torch.randn(t.shape, generator=generator),
        "knots": lambda t: (0.1 + torch.rand(t.shape, generator=generator)).cumsum(0) - 0.3 * len(t),
    }
    other = lambda t: 0.5 + torch.rand(t.shape, generator=generator)  # noqa: E731
    return {name: values.get(name.split("_")[0], other)(t).double() for name, t in transform.start(dim).items()}


def warp_of(transform, dim=1):
    return transform.warp({name: tensor.unsqueeze(0) for name, tensor in tensors_of(transform, dim).items()})


def make_head(transform, noise=None, dim=1, n_components=3, family=None):
    torch.manual_seed(1)
    if getattr(noise, "rank", 1) > dim:
        noise = dataclasses.replace(noise, rank=dim)
    head = MixtureHead(6, dim, n_components, noise=noise, family=family, target_transform=transform).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.shift.normal_()
    head.scale.uniform_(0.5, 1.0)
    for name, tensor in tensors_of(head.transform, dim).items():
        getattr(head, name).copy_(tensor)
    return head


def make_mixture(transform, batch_shape=(5,), **settings):
    with torch.no_grad():
        return make_head(transform, **settings)(torch.randn(*batch_shape, 6, dtype=torch.float64))


def log_normal(weights, locs, scales):
    """A mixture of log-normal distributions, one output."""
    line = GaussianMixture(
        torch.tensor(weights, dtype=torch.float64).log(),
        torch.tensor(locs, dtype=torch.float64).unsqueeze(-1),
        DiagonalCovariance(torch.tensor(scales, dtype=torch.float64).unsqueeze(-1)),
    )
    unit = torch.ones(1, dtype=torch.float64)
    return WarpedUnits(StandardUnits(0 * unit, unit), LogWarp()).push(line)


# Warps


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_warp_is_increasing_and_its_slope_is_its_derivative(name):
    warp = warp_of(TRANSFORMS[name])
    w = torch.linspace(-6, 6, 101, dtype=torch.float64).unsqueeze(-1)
    y = warp.inverse(w).requires_grad_()
    assert_close(warp.forward(y), w, rtol=1e-9, atol=1e-9)
    assert bool((y.diff(dim=0) > 0).all())
    (slope,) = torch.autograd.grad(warp.forward(y).sum(), y)
    assert_close(warp.log_slope(y), slope.log(), rtol=1e-9, atol=1e-9)
    assert bool(warp.contains(y).all())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_warp_has_derivatives_of_both_orders(name):
    warp = warp_of(TRANSFORMS[name])
    w = torch.tensor([[-2.0], [-0.3], [0.4], [1.7]], dtype=torch.float64, requires_grad=True)
    y = warp.inverse(w.detach()).requires_grad_()
    for function, value in ((warp.inverse, w), (warp.forward, y), (warp.log_slope, y)):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("log", ExpTransform()),
        ("logit", SigmoidTransform()),
        ("percent", torch.distributions.ComposeTransform([SigmoidTransform(), AffineTransform(0.0, 100.0)])),
    ],
)
def test_warps_are_the_inverses_of_transforms_of_torch(name, transform):
    warp, w = warp_of(TRANSFORMS[name]), torch.linspace(-5, 5, 11, dtype=torch.float64).unsqueeze(-1)
    y = transform(w)
    assert_close(warp.inverse(w), y)
    assert_close(warp.log_slope(y), -transform.log_abs_det_jacobian(w, y))


def test_softplus_is_that_of_torch_in_its_unit():
    warp, w = warp_of(Softplus()), torch.linspace(-20, 20, 41, dtype=torch.float64).unsqueeze(-1)
    assert_close(warp.inverse(w), warp.unit * SoftplusTransform()(w / warp.unit))


@pytest.mark.parametrize("power", POWERS.tolist())
def test_powers_are_those_of_scipy(power):
    y = torch.linspace(-4, 4, 33, dtype=torch.float64).unsqueeze(-1)
    one = torch.ones(1, 1, dtype=torch.float64)
    warp = YeoJohnson().warp({"centre": 0 * one, "unit": one, "power": power * one})
    expected = scipy.stats.yeojohnson(y.numpy(), power)
    assert_close(warp.forward(y).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert_close(warp.inverse(warp.forward(y)), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("near", [0.0, 2.0])
def test_powers_near_their_ends_lose_no_digits(near):
    y = torch.tensor([[-3.0], [0.1], [50.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    at, beside = (
        YeoJohnson().warp({"centre": 0 * one, "unit": one, "power": p * one}) for p in (near, abs(near - 1e-9))
    )
    assert_close(at.forward(y), beside.forward(y), rtol=1e-7, atol=0)
    assert_close(at.inverse(at.forward(y)), y)


# Densities, distribution functions and quantiles


def test_log_normal_mixtures_against_scipy():
    mixture = log_normal([0.3, 0.7], [-1.0, 2.0], [0.5, 1.2])
    parts = [
        (0.3, scipy.stats.lognorm(0.5, scale=math.exp(-1.0))),
        (0.7, scipy.stats.lognorm(1.2, scale=math.exp(2.0))),
    ]
    y = np.array([1e-3, 0.1, 0.5, 3.0, 40.0, 1e4])
    points = torch.tensor(y).unsqueeze(-1)

    def expected(name):
        return sum(w * getattr(part, name)(y) for w, part in parts)

    for got, name in (
        (mixture.log_prob(points).exp(), "pdf"),
        (mixture.cdf(points)[:, 0], "cdf"),
        (mixture.sf(points)[:, 0], "sf"),
    ):
        np.testing.assert_allclose(got.numpy(), expected(name), rtol=1e-10)
    log_cdf = np.where(expected("cdf") < 0.5, np.log(expected("cdf")), np.log1p(-expected("sf")))
    np.testing.assert_allclose(mixture.log_cdf(points)[:, 0].numpy(), log_cdf, rtol=1e-10)
    log_sf = np.where(expected("sf") < 0.5, np.log(expected("sf")), np.log1p(-expected("cdf")))
    np.testing.assert_allclose(mixture.log_sf(points)[:, 0].numpy(), log_sf, rtol=1e-10)
    means = sum(w * part.mean() for w, part in parts)
    np.testing.assert_allclose(mixture.mean.numpy(), means, rtol=1e-10)
    second = sum(w * (part.var() + part.mean() ** 2) for w, part in parts)
    np.testing.assert_allclose(mixture.variance.numpy(), second - means**2, rtol=1e-8)
    np.testing.assert_allclose(mixture.stddev.numpy(), np.sqrt(second - means**2), rtol=1e-8)


def test_asinh_of_a_normal_is_johnsons_distribution():
    mixture = make_mixture(Asinh(), n_components=1)
    line, warp = mixture.components.base, mixture.components.warp
    loc, scale = line.locs.squeeze(-2), line.covariance.stddev().squeeze(-2)
    johnson = scipy.stats.johnsonsu(-loc / scale, 1 / scale, warp.centre, warp.unit)
    y = torch.randn(5, 1, dtype=torch.float64) * 3
    np.testing.assert_allclose(mixture.log_prob(y).numpy(), johnson.logpdf(y.numpy())[:, 0], rtol=1e-10)
    np.testing.assert_allclose(mixture.cdf(y).numpy(), johnson.cdf(y.numpy()), rtol=1e-9)
    np.testing.assert_allclose(mixture.mean.numpy(), johnson.mean(), rtol=1e-8)


@pytest.mark.parametrize("shape", BATCH_SHAPES)
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_density_is_that_of_the_line_by_change_of_variables(name, noise, shape):
    mixture = make_mixture(TRANSFORMS[name], BATCH_SHAPES[shape], noise=NOISE[noise], dim=3)
    components = mixture.components
    line = GaussianMixture(mixture.logits, components.base.locs, components.base.covariance)
    y = mixture.sample((4,))
    w = components.warp.forward(y.unsqueeze(-2)).squeeze(-2).requires_grad_()
    image = components.from_inner(w)
    slopes = torch.autograd.grad(image.sum(), w)[0]
    assert_close(mixture.log_prob(y), line.log_prob(w).detach() - slopes.log().sum(-1))
    assert_close(mixture.responsibilities(y), line.responsibilities(w.detach()))
    assert_close(mixture.cdf(y), line.cdf(w.detach()))
    assert_close(mixture.rosenblatt(y), line.rosenblatt(w.detach()))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_density_integrates_to_one(name):
    mixture = make_mixture(TRANSFORMS[name], ())
    q = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1].unsqueeze(-1)
    edges = mixture.icdf(torch.cat([q.new_tensor([[1e-12]]), q, 1 - q.new_tensor([[1e-12]])]))[:, 0].tolist()

    def density(y):
        return mixture.log_prob(torch.tensor([y], dtype=torch.float64)).exp().item()

    total = sum(scipy.integrate.quad(density, a, b, epsrel=1e-10)[0] for a, b in pairwise(edges))
    assert total == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("family", [None, StudentT(df=12.0)], ids=["normal", "student_t"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_quantiles_invert_the_distribution_function(name, family):
    mixture = make_mixture(TRANSFORMS[name], dim=2, family=family)
    for q in (1e-3, 0.02, 0.9, 0.999, 0.5):
        level = torch.full((5, 2), q, dtype=torch.float64)
        points = mixture.icdf(level)
        assert_close(mixture.cdf(points), level, rtol=1e-7, atol=0)
        assert_close(mixture.sf(points), 1 - level, rtol=1e-7, atol=0)
    low, high = mixture.interval(0.8)
    assert_close(mixture.cdf(high) - mixture.cdf(low), torch.full((5, 2), 0.8, dtype=torch.float64))
    assert_close(mixture.inverse_rosenblatt(mixture.rosenblatt(points)), points, rtol=1e-6, atol=1e-9)


def test_quantiles_at_the_ends_are_the_ends_of_the_support():
    for transform, ends in ((Log(), (0.0, math.inf)), (Log(0.5), (-0.5, math.inf)), (Logit(2.0, 5.0), (2.0, 5.0))):
        mixture = make_mixture(transform)
        assert mixture.icdf(0.0).unique().tolist() == [ends[0]]
        assert mixture.icdf(1.0).unique().tolist() == [ends[1]]
        outside = torch.tensor([ends[0] - 1, ends[0]], dtype=torch.float64)[:, None, None].expand(2, 5, 1)
        assert mixture.cdf(outside).unique().tolist() == [0.0]
        assert mixture.sf(outside).unique().tolist() == [1.0]
        assert mixture.log_cdf(outside).unique().tolist() == [-math.inf]
        assert mixture.cdf(torch.full((5, 1), torch.nan, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("given", [[0], [2, 1]])
@pytest.mark.parametrize("family", [Full(), StudentT(Full())], ids=["normal", "student_t"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "per output"])
def test_chain_rule(name, family, given):
    transform = PerOutput([Log(), Standardize(), Logit()]) if name == "per output" else TRANSFORMS[name]
    settings = {"noise": family} if isinstance(family, Full) else {"family": family}
    mixture = make_mixture(transform, dim=3, **settings)
    y, free = mixture.sample((2,)), [d for d in range(3) if d not in given]
    evidence = mixture.marginal(given).log_prob(y[..., given])
    rest = mixture.condition(y[..., given], given)
    assert_close(evidence + rest.log_prob(y[..., free]), mixture.log_prob(y))
    partial = y.clone()
    partial[..., free] = torch.nan
    assert_close(mixture.log_prob(partial), evidence)


def test_other_units_of_a_positive_output():
    """Twice the amount in other units is the same event."""
    mixture = make_mixture(Log(), dim=2)
    y = mixture.sample((3,))
    rescaled = mixture.affine(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])).affine(0.0, 0.5)
    image = (y * torch.tensor([2.0, 3.0]) + torch.tensor([0.0, 1.0])) * 0.5
    assert_close(rescaled.log_prob(image), mixture.log_prob(y) - math.log(2 * 3 * 0.25))
    assert_close(rescaled.mean, (mixture.mean * torch.tensor([2.0, 3.0]) + torch.tensor([0.0, 1.0])) * 0.5)
    assert_close(rescaled.marginal(1).cdf(image[..., 1:]), mixture.cdf(y)[..., 1:])
    with pytest.raises(ValueError, match="scale: expected positive numbers for outputs with a warp"):
        mixture.affine(0.0, -1.0)


# Moments and scores


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param(name, None, id=f"{name}-normal") for name in ("softplus", "logit", "percent", "asinh", "yeo-johnson")]
    + [pytest.param(name, StudentT(df=8.0), id=f"{name}-student_t") for name in ("logit", "asinh")]
    # Quadrature of the same code takes seconds each.
    + [
        pytest.param(name, StudentT(df=8.0), id=f"{name}-student_t", marks=pytest.mark.slow)
        for name in ("softplus", "percent", "yeo-johnson")
    ],
)
def test_moments_are_those_of_the_density(name, family):
    mixture = make_mixture(TRANSFORMS[name], (2,), n_components=2, family=family)
    if name == "asinh":  # of a normal: see above
        assert mixture.mean.isfinite().all() == (family is None)  # Student's t has no exponential moments
        return
    for one in mixture:
        q = torch.linspace(0, 1, 21, dtype=torch.float64)[1:-1].unsqueeze(-1)
        ends = q.new_tensor([[1e-30]])
        edges = [*one.icdf(torch.cat([ends, q]))[:, 0].tolist(), one.univariate().upper_quantile(ends[0]).item()]

        def expected(function, one=one, edges=edges):
            def density(y):
                return function(y) * one.log_prob(torch.tensor([y], dtype=torch.float64)).exp().item()

            return sum(scipy.integrate.quad(density, a, b, epsrel=1e-10)[0] for a, b in pairwise(edges))

        with pyro.validation_enabled(False):  # numbers near an end of the support may be rounded to it
            mean = expected(lambda y: y)
            variance = expected(lambda y, mean=mean: (y - mean) ** 2)
        assert one.mean.item() == pytest.approx(mean, rel=1e-5, abs=1e-9)
        assert one.variance.item() == pytest.approx(variance, rel=1e-5)


def test_moments_that_do_not_exist_are_infinite():
    mixture = make_mixture(Log(), family=StudentT(df=3.0))
    assert mixture.mean.isinf().all()
    assert scores.crps(mixture, torch.ones(5, 1, dtype=torch.float64)).isinf().all()


def test_moments_beyond_all_numbers_are_infinite():
    mixture = log_normal([0.5, 0.5], [0.0, 800.0], [1.0, 1.0])
    assert mixture.mean.isinf().all()
    assert mixture.stddev.isinf().all()
    assert mixture.variance.isinf().all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_crps_of_a_log_normal_against_scoringrules(scale):
    mixture = log_normal([1.0], [0.7], [scale])
    y = torch.tensor([1e-6, 0.2, 1.9, 30.0, 1e6], dtype=torch.float64).unsqueeze(-1)
    expected = scoringrules.crps_lognormal(y[:, 0].numpy(), 0.7, scale)
    np.testing.assert_allclose(scores.crps(mixture, y)[:, 0].numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_crps_is_the_integral_of_its_definition(name):
    mixture = make_mixture(TRANSFORMS[name], (2,), dim=2)
    y = mixture.sample((3,))
    got = scores.crps(mixture, y)
    levels = torch.linspace(0, 1, 4001, dtype=torch.float64).mul(math.pi).cos().mul(-0.5).add(0.5)[1:-1]
    q = mixture.icdf(levels[:, None, None].expand(-1, 2, 2)).unsqueeze(1)
    u = levels[:, None, None, None]
    pinball = 2 * ((y < q).double() - u) * (q - y)
    expected = torch.trapezoid(pinball, levels, dim=0)
    assert_close(got, expected, rtol=2e-3, atol=1e-4)
    single = make_mixture(TRANSFORMS[name], (2,), dim=2)[0].marginal(1)
    assert_close(scores.crps(single, y[:, 0, 1:])[:, 0], got[:, 0, 1])


@pytest.mark.parametrize("name", ["log", "logit", "asinh"])
def test_crps_has_the_gradients_of_its_definition(name):
    features = torch.randn(2, 6, dtype=torch.float64)
    head = make_head(TRANSFORMS[name])
    y = head(features).sample()
    bias = head.linear.bias

    def score(value):
        head.linear.bias.data.copy_(value)
        return scores.crps(head(features), y).sum().item()

    scores.crps(head(features), y).sum().backward()
    start, step = bias.detach().clone(), 1e-6
    for i in range(len(bias)):
        moved = torch.zeros_like(start)
        moved[i] = step
        numeric = (score(start + moved) - score(start - moved)) / (2 * step)
        assert bias.grad[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("mass", [0.3, 0.9])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_shortest_intervals_are_the_shortest(name, mass):
    mixture = make_mixture(TRANSFORMS[name], (4,))
    low, high = mixture.interval(mass, kind="shortest")
    assert_close(mixture.cdf(high) - mixture.cdf(low), torch.full((4, 1), mass, dtype=torch.float64), rtol=1e-7, atol=0)
    levels = torch.linspace(0, 1 - mass, 2001, dtype=torch.float64)[1:-1, None, None].expand(-1, 4, 1)
    widths = mixture.icdf(levels + mass) - mixture.icdf(levels)
    assert bool((high - low <= widths.amin(0) * (1 + 1e-9)).all())
    assert bool((high - low >= widths.amin(0) * (1 - 1e-3)).all())


def test_shortest_intervals_have_the_derivatives_of_their_ends():
    features, head = torch.randn(2, 6, dtype=torch.float64), make_head(Log(), n_components=2)
    parameters = list(head.parameters())

    def ends(bias):
        return torch.stack(
            torch.func.functional_call(head, {"linear.bias": bias}, features).interval(0.6, kind="shortest")
        )

    assert len(parameters) == 2
    assert torch.autograd.gradcheck(
        ends, head.linear.bias.detach().requires_grad_(), eps=1e-5, atol=1e-3, rtol=1e-3, fast_mode=True
    )


def test_interval_log_scores_are_probabilities_of_cells():
    mixture = make_mixture(Log())
    y = torch.tensor([0.4, 1.0, 2.0, 5.0, 30.0], dtype=torch.float64).unsqueeze(-1)
    expected = -(mixture.cdf(y + 0.5) - mixture.cdf((y - 0.5).clamp(min=0))).log()
    assert_close(scores.interval_log_score(mixture, y, 1.0), expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_draws_follow_the_distribution_function(name):
    mixture = make_mixture(TRANSFORMS[name], ())
    torch.manual_seed(3)
    y = mixture.sample((20_000,))
    assert scipy.stats.kstest(mixture.cdf(y)[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert bool(mixture.support.check(y).all())


def test_pathwise_gradients_of_draws():
    """The mean of log y is that of the normal mixture below, whose gradients are known."""
    head, features = make_head(Log(), n_components=2), torch.randn(1, 6, dtype=torch.float64)
    torch.manual_seed(4)
    draws = head(features).rsample((40_000,)).log().mean((0, 1, 2))
    estimated = torch.autograd.grad(draws, head.linear.bias)[0]
    mixture = head(features)
    mean = (mixture.logits.exp() * mixture.components.base.locs.squeeze(-1)).sum()
    exact = torch.autograd.grad(mean, head.linear.bias, allow_unused=True)[0]
    assert_close(estimated[:4], exact[:4], rtol=0.05, atol=0.02)


# Observations


@pytest.mark.parametrize("noise", ["diagonal", "full"])
def test_censored_and_missing_entries_beside_exact_ones(noise):
    """Against the likelihood of the logarithms, of which intervals are the logarithms of intervals."""
    mixture = make_mixture(Log(), noise={"diagonal": None, "full": Full()}[noise], dim=3)
    line = GaussianMixture(mixture.logits, mixture.components.base.locs, mixture.components.base.covariance)
    y = mixture.sample()
    lower, upper = y.clone(), y.clone()
    lower[:, 1], upper[0, 1] = 0.5 * y[:, 1], math.inf
    lower[1, 1] = -1.0  # no limit at all, for a positive output
    lower[:, 2], upper[:, 2] = -math.inf, math.inf
    targets = Targets.interval(lower, upper)
    logs = Targets.interval(lower.clamp(min=0).log(), upper.log())
    assert_close(mixture.log_prob(targets), line.log_prob(logs) - y[:, 0].log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ["diagonal", "full"])
def test_intervals_beyond_the_support_of_positive_outputs(noise):
    """One over the whole support says nothing; one outside of it, like a value there, is impossible."""
    with pyro.validation_enabled(False):
        mixture = make_mixture(Log(), noise={"diagonal": None, "full": Full()}[noise], dim=2)
        y = mixture.sample()
        lower, upper = y.clone(), y.clone()
        lower[0, 1], upper[0, 1] = -1.0, math.inf
        lower[1, 1], upper[1, 1] = -2.0, -1.0
        lower[2], upper[2] = -1.0, -1.0
        lower[3], upper[3] = -1.0, math.inf
        for targets in (Targets.interval(lower, upper), Targets.interval(lower[:2], upper[:2])):
            rows = len(targets.lower)
            got = mixture[:rows].log_prob(targets)
            assert_close(got[0], mixture[0].marginal([0]).log_prob(y[0, :1]))
            assert got[1] == -math.inf
        assert got.shape == (2,)
        got = mixture.log_prob(Targets.interval(lower, upper))
        assert got[2] == -math.inf
        assert_close(got[3], torch.zeros((), dtype=torch.float64))
        assert_close(got[4], mixture[4].log_prob(y[4]))


@pytest.mark.parametrize("impossible", [(-2.0, -1.0), (-1.0, -1.0)])
def test_impossible_targets_are_named(impossible):
    mixture = make_mixture(Log(), dim=2)
    y = mixture.sample()
    lower, upper = y.clone(), y.clone()
    lower[3, 1], upper[3, 1] = impossible
    with pytest.raises(ValueError, match=r"value: expected numbers between 0 and inf, got -\d in row 3, column 1"):
        mixture.log_prob(Targets.interval(lower, upper))
    lower[3, 1], upper[3, 1] = -1.0, 2.0
    assert mixture.log_prob(Targets.interval(lower, upper)).isfinite().all()


def test_right_censored_times_count_with_their_survival():
    head, features = make_head(Log()), torch.randn(5, 6, dtype=torch.float64)
    times = head(features).sample()
    targets = Targets.censored(times, right=torch.tensor([[1.0], [0], [1], [0], [1]]))
    mixture = head(features)
    expected = torch.where(targets.upper.isinf(), mixture.log_sf(times), mixture.log_prob(times).unsqueeze(-1))[:, 0]
    assert_close(head.log_prob(features, targets), expected)
    assert_close(mixture.log_prob(targets), expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_head_computes_the_density_of_its_mixture(name):
    for noise in (None, Full(), Isotropic(homoscedastic=True)):
        head, features = make_head(TRANSFORMS[name], noise=noise, dim=2), torch.randn(5, 6, dtype=torch.float64)
        y = head(features).sample()
        expected = torch.autograd.grad(head(features).log_prob(y).sum(), list(head.parameters()))
        got = torch.autograd.grad(head.log_prob(features, y).sum(), list(head.parameters()))
        assert_close(head.log_prob(features, y), head(features).log_prob(y))
        assert_close(got, expected)
        y[1, 0] = torch.nan
        assert_close(head.log_prob(features, y), head(features).log_prob(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [Log(), Softplus(), Asinh(), Logit()], ids=str)
def test_densities_and_gradients_are_finite_at_extremes(transform, dtype):
    network = MixtureDensityNetwork(1, 1, target_transform=transform, seed=0).to(dtype)
    tiny = 1e-30
    values = [tiny, 1.0, 1e6 if isinstance(transform, Softplus) else 1e30]  # at 1e6 a softplus is linear
    values = [tiny, 1e-3, 0.5, 1 - torch.finfo(dtype).eps] if isinstance(transform, Logit) else values
    y = torch.tensor(values, dtype=dtype).unsqueeze(-1)
    loss = network.loss(torch.zeros_like(y), y)
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
    draws = network.sample(torch.zeros(1, 1, dtype=dtype), (1000,))
    assert bool(network(torch.zeros(1, 1, dtype=dtype)).log_prob(draws).isfinite().all())


# Training


def drawn_prices(rows):
    x = torch.randn(rows, 1)
    return x, (0.5 * x + 0.4 * torch.randn_like(x)).exp()


@pytest.fixture(scope="module")
def prices():
    torch.manual_seed(0)
    return drawn_prices(400)


def test_units_are_those_of_the_logarithms(prices):
    x, y = prices
    network = MixtureDensityNetwork(1, 1, target_transform="log", seed=0)
    assert not network.initialized
    network.initialize_(x, y)
    assert network.initialized
    assert_close(network.head.shift, y.log().mean(0), rtol=1e-5, atol=1e-6)
    assert_close(network.head.scale, y.log().std(0, correction=0), rtol=1e-5, atol=1e-6)


def test_training_of_positive_targets(prices, tmp_path):
    """A density of prices has no mass below 0, and is better than one on the whole line."""
    x, y = prices
    networks = {}
    for transform in (None, "log"):
        network = MixtureDensityNetwork(1, 1, n_components=2, target_transform=transform, seed=0)
        fit(network, x[:300], y[:300], max_epochs=60, seed=0, progress=False)
        networks[transform] = network
    torch.manual_seed(1)
    others, their_prices = drawn_prices(4000)  # of 100, outliers would decide
    held_out = {name: scores.log_score(network(others), their_prices).mean() for name, network in networks.items()}
    assert held_out["log"] < held_out[None]
    assert bool((networks["log"](x).icdf(1e-6) > 0).all())
    networks["log"].save(tmp_path / "log.safetensors")
    loaded = MixtureDensityNetwork.load(tmp_path / "log.safetensors")
    assert loaded.head.transform == Log()
    assert_close(loaded.loss(x, y), networks["log"].loss(x, y))


@pytest.mark.parametrize("name", [*TRANSFORMS, "per output"])
def test_files_and_ensembles_keep_the_transform(name, tmp_path):
    transform = PerOutput(["log", YeoJohnson()]) if name == "per output" else TRANSFORMS[name]
    torch.manual_seed(0)
    x, y = torch.randn(60, 1), torch.rand(60, 2) * 0.8 + 0.1
    ensemble = DeepEnsemble(MixtureDensityNetwork(1, 2, target_transform=transform, seed=0), 2)
    fit(ensemble, x, y, max_epochs=2, seed=0, progress=False)
    ensemble.save(tmp_path / "ensemble.safetensors")
    loaded = DeepEnsemble.load(tmp_path / "ensemble.safetensors")
    assert loaded.member(0).head.transform == transform
    assert_close(loaded(x).log_prob(y), ensemble(x).log_prob(y))
    members = torch.stack([ensemble.member(i)(x).log_prob(y) for i in range(2)])
    assert_close(ensemble.members(x).log_prob(y), members, rtol=1e-4, atol=1e-4)
    assert_close(ensemble(x).log_prob(y), members.logsumexp(0) - math.log(2), rtol=1e-4, atol=1e-4)
    assert TargetTransform.from_config(transform.to_config()) == transform


def test_rounded_positive_targets_stay_positive(prices):
    """The cell around a target may reach below 0, where its density is not defined."""
    x = prices[0]
    y = (prices[1] * 2).round().clamp(min=0.25)
    network = MixtureDensityNetwork(1, 1, target_transform="log", seed=0)
    result = fit(network, x, y, max_epochs=3, seed=0, progress=False)
    assert all(math.isfinite(row["loss"]) for row in result.history)


def test_noise_on_targets_stays_in_the_support(prices):
    x, y = prices
    for transform, values in ((Log(), y), (Logit(), 1e-3 + 0.998 * torch.rand_like(y).round())):
        network = MixtureDensityNetwork(1, 1, target_transform=transform, seed=0)
        result = fit(network, x, values, max_epochs=2, target_noise=3.0, seed=0, progress=False)
        assert math.isfinite(result.history[-1]["loss"])


def test_the_power_is_that_of_scipy():
    torch.manual_seed(0)
    y = torch.randn(500, 1, dtype=torch.float64).exp()
    tensors = YeoJohnson().fit_warp(y)
    t = ((y - tensors["centre"]) / tensors["unit"])[:, 0].numpy()
    assert tensors["power"].item() == pytest.approx(max(0.0, scipy.stats.yeojohnson_normmax(t)))
    assert YeoJohnson().fit_warp(torch.ones(5, 1, dtype=torch.float64))["power"].item() == 1


# Errors


@pytest.mark.parametrize(
    ("transform", "value", "ends"),
    [
        ("log", 0.0, "0 and inf"),
        ("log", -1.0, "0 and inf"),
        ("logit", 1.2, "0 and 1"),
        (Log(1.0), -1.0, "-1 and inf"),
        (["asinh", "log"], 0.0, "0 and inf"),
    ],
)
def test_values_outside_of_the_support_are_named(prices, transform, value, ends):
    x, y = prices[0], prices[1].clamp(0.05, 0.95)
    network = MixtureDensityNetwork(1, 2, target_transform=transform, seed=0)
    y = torch.cat([y, y], 1)
    network.initialize_(x, y)
    bad = y.clone()
    bad[17, 1] = value
    message = rf"y: expected numbers between {ends}, got {value:g} in row 17, column 1"
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for refused in (
        lambda: fit(network, x, bad, max_epochs=1, progress=False),
        lambda: network.initialize_(x, bad),
        lambda: network.loss(x, bad),
        lambda: fit(network, x, Targets.exact(bad), max_epochs=1, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    for mixture in (network(x), network(x)[:]):  # the first one has no parameters yet
        with pytest.raises(ValueError, match=message.replace("y:", "value:")):
            mixture.log_prob(bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_support_of_its_own_row_is_named():
    """Also where one point stands for several mixtures, with supports of their own."""
    mixture = MixtureDensityNetwork(1, 1, target_transform="log")(torch.zeros(3, 1))
    moved = mixture.affine(torch.tensor([[0.0], [2.0], [5.0]]), 1.0)
    with pytest.raises(
        ValueError, match="value: expected numbers between 2 and inf, got 1 in row 1, column 0, and 1 mo"
    ):
        moved.log_prob(torch.tensor([1.0]))


def test_settings_are_checked():
    for build, message in (
        (lambda: Log(-1.0), "shift: expected"),
        (lambda: Logit(1.0, 0.0), "low, high: expected finite ends in ascending order"),
        (lambda: Logit(0.0, math.inf), "low, high|high: expected"),
        (lambda: Chain([YeoJohnson(), Log()]), "expected a transform of any number after"),
        (lambda: PerOutput([]), "parts: expected a sequence"),
        (lambda: MixtureHead(3, 2, 1, target_transform=["log"]), "expected 2 transforms, one for each output, got 1"),
        (
            lambda: MixtureHead(3, 2, 1, target_transform="exp"),
            "target_transform: expected a TargetTransform or one of",
        ),
        (lambda: MixtureHead(3, 2, 1, target_transform=3), "target_transform: expected a TargetTransform or a name"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_what_is_not_closed_says_what_to_use():
    mixture = make_mixture(Log(), noise=Full(), dim=2)
    with pytest.raises(NotImplementedError, match=r"covariance_matrix: not closed .*estimate it from draws"):
        _ = mixture.covariance_matrix
    assert make_mixture(Log(), dim=2).covariance_matrix.shape == (5, 2, 2)


def test_supports():
    assert make_mixture(Log()).support.base_constraint.lower_bound == 0
    assert make_mixture(Asinh()).support.base_constraint is constraints.real
    both = make_mixture([Log(), Logit()], dim=2).support
    assert both.check(torch.tensor([2.0, 0.5])).all()
    assert not both.check(torch.tensor([0.5, 2.0])).all()
    rescaled = make_mixture(Log(), (2,)).affine(torch.tensor([[1.0], [3.0]], dtype=torch.float64), 2.0)
    assert_close(rescaled.support.base_constraint.lower_bound, torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    assert rescaled.support.check(torch.tensor([[2.0], [2.0]])).tolist() == [True, False]


def test_a_transform_of_torch_gives_the_same_distribution():
    mixture = make_mixture(Log(), (), n_components=1)
    base = torch.distributions.Normal(mixture.components.base.locs[0], mixture.components.base.covariance.stddev()[0])
    y = mixture.sample((10,))
    assert_close(mixture.log_prob(y), TransformedDistribution(base, [ExpTransform()]).log_prob(y)[..., 0])


TRANSFORMED = [{"target_transform": "log"}, {"target_transform": "angle"}, {"input_transform": "log"}]


@pytest.mark.parametrize("settings", TRANSFORMED, ids=str)
def test_compilers_do_not_warn_of_transforms(settings):
    network = MixtureDensityNetwork(1, 1, seed=0, **settings)
    x, y = torch.rand(8, 1) + 0.1, torch.rand(8, 1) + 0.1
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")
        assert_close(torch.compile(network.loss, backend="aot_eager")(x, y), network.loss(x, y))
