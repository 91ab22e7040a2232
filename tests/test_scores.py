import math

import mpmath
import pytest
import scoringrules
import torch
from cases import BATCH_SHAPES, DIM, NOISE, make_mixture, peak_memory
from scipy import integrate, stats
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    DiagonalCovariance,
    Full,
    GaussianMixture,
    IsotropicCovariance,
    Mixture,
    StudentTComponents,
)
from pyro_mdn.scores import (
    coverage,
    crps,
    dawid_sebastiani,
    energy_score,
    interval_log_score,
    interval_score,
    log_score,
    observed_mean,
    pinball,
    pit,
)

EVERY = {
    "coverage": lambda m, y: coverage(m, y, 0.9),
    "crps": crps,
    "dawid_sebastiani": dawid_sebastiani,
    "energy": lambda m, y: energy_score(m, y, num_samples=20_000).value,
    "interval": lambda m, y: interval_score(m, y, 0.9),
    "interval_log": lambda m, y: interval_log_score(m, y, 0.1),
    "log": log_score,
    "pinball": lambda m, y: pinball(m, y, 0.3),
    "pit": pit,
    "pit, in cells": lambda m, y: pit(m, y, 1e-9),  # so narrow that the draw does not matter
}
every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


def observed(mixture):
    torch.manual_seed(7)
    return mixture.mean + 2 * torch.randn(*mixture.batch_shape, mixture.dim, dtype=torch.float64)


def standard_normal():
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    return GaussianMixture(zeros[0], zeros, IsotropicCovariance(torch.ones_like(zeros[0])))


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_crps_agrees_with_scoringrules(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    y = observed(mixture)
    locs = mixture.locs.movedim(-2, -1).numpy()
    scale = mixture.covariance.variance().sqrt().expand(mixture.locs.shape).movedim(-2, -1).numpy()
    weights = mixture.logits.exp().unsqueeze(-2).expand(locs.shape).numpy()
    expected = scoringrules.crps_mixnorm(y.numpy(), locs, scale, weights)
    assert_close(crps(mixture, y), torch.as_tensor(expected), rtol=0, atol=1e-8)


def test_crps_agrees_with_its_definition_by_draws():
    mixture = make_mixture(Full())
    y, first, second = observed(mixture), mixture.sample((100_000,)), mixture.sample((100_000,))
    draws = (first - y).abs() - 0.5 * (first - second).abs()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - crps(mixture, y)).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("score", [crps, lambda m, y: interval_log_score(m, y, 0.3), dawid_sebastiani])
def test_score_gradients(score):
    values = [torch.randn(2, 3), torch.randn(2, 3, 2), torch.rand(2, 3, 2) + 0.5, torch.randn(2, 2)]
    values = [v.double().requires_grad_() for v in values]

    def function(logits, locs, scale, y):
        return score(GaussianMixture(logits, locs, DiagonalCovariance(scale)), y)

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize(
    ("rows", "limit"), [(400, 0.1), pytest.param(10_000, 1.7, marks=pytest.mark.slow)], ids=["400", "10000"]
)
def test_crps_of_500_components_needs_little_memory(rows, limit):
    """Forward and backward; pairs alone would take 0.4 or 10."""
    code = f"""
from pyro_mdn import GaussianMixture, DiagonalCovariance
from pyro_mdn.scores import crps
locs = torch.randn({rows}, 500, 1, requires_grad=True)
mixture = GaussianMixture(torch.zeros({rows}, 500), locs, DiagonalCovariance(torch.ones({rows}, 500, 1)))
crps(mixture, torch.zeros({rows}, 1)).sum().backward()
"""
    assert peak_memory(code) < limit


@pytest.mark.parametrize("noise", [Full(), Diagonal(tied=True)], ids=str)
def test_energy_score(noise):
    """Against the closed form for one output, and against independent draws for more."""
    single = make_mixture(noise, dim=1)
    value, error = energy_score(single, observed(single))
    assert_close(value, crps(single, observed(single)).squeeze(-1))
    assert (error == 0).all()
    mixture = make_mixture(noise)
    y, first, second = observed(mixture), mixture.sample((50_000,)), mixture.sample((50_000,))
    draws = (first - y).norm(dim=-1) - 0.5 * (first - second).norm(dim=-1)
    value, error = energy_score(mixture, y, num_samples=5000)
    total = (error.square() + draws.var(0) / len(draws)).sqrt()
    assert ((value - draws.mean(0)).abs() < 5 * total).all()


def test_energy_score_of_many_targets_at_once():
    mixture = make_mixture(Full())
    y = torch.stack([observed(mixture), observed(mixture) + 1])
    value, _ = energy_score(mixture, y, num_samples=4000)
    assert value.shape == (2, 5)
    assert (value[0] != value[1]).all()


@pytest.mark.parametrize("score", EVERY.values(), ids=EVERY)
def test_what_was_not_observed_has_no_score(score):
    """So that a mean over padded sequences is that over the steps that were observed."""
    logits, locs, scale = torch.randn(2, 4, 3), torch.randn(2, 4, 3, 2), torch.rand(2, 4, 3, 2) + 0.5
    y, seen = torch.randn(2, 4, 2), torch.tensor([[True, True, True, False], [True, False, False, False]])
    padded = y.masked_fill(~seen.unsqueeze(-1), torch.nan)
    values = score(GaussianMixture(logits, locs, DiagonalCovariance(scale)), padded)
    expected = score(GaussianMixture(logits[seen], locs[seen], DiagonalCovariance(scale[seen])), y[seen])
    assert values[~seen].isnan().all()
    assert_close(values.nanmean(), expected.mean(), rtol=0.2 if score is EVERY["energy"] else 1e-5, atol=1e-6)
    assert_close(values[seen], expected, rtol=0.2 if score is EVERY["energy"] else 1e-5, atol=1e-6)


def test_gradients_of_a_mean_over_what_was_observed():
    locs = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    mixture = GaussianMixture(torch.zeros(5, 3).double(), locs, DiagonalCovariance(torch.ones(5, 3, 2).double()))
    y = torch.randn(5, 2, dtype=torch.float64)
    y[1], y[2, 0] = torch.nan, torch.nan
    (gradient,) = torch.autograd.grad(log_score(mixture, y).nanmean(), locs)
    (expected,) = torch.autograd.grad(-mixture.log_prob(y).sum() / 4, locs)
    assert_close(gradient, expected)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_pinball_is_least_at_its_quantile(q):
    mixture = make_mixture(Full())
    draws = mixture.sample((20_000,))
    mean = pinball(mixture, draws, q).mean(0)
    for wrong in (q - 0.07, q + 0.07):
        error = draws - mixture.icdf(wrong)
        assert (mean <= torch.maximum(q * error, (q - 1) * error).mean(0)).all()


def test_interval_score_of_a_normal():
    """E of the Winkler score: width, plus the expected overshoot on both sides."""
    mixture = GaussianMixture(
        torch.zeros(1).double(), torch.zeros(1, 1).double(), IsotropicCovariance(torch.ones(1).double())
    )
    draws = torch.linspace(0.5 / 100_000, 1 - 0.5 / 100_000, 100_000, dtype=torch.float64)
    y = torch.special.ndtri(draws).unsqueeze(-1)
    z = stats.norm.ppf(0.95)
    overshoot = stats.norm.pdf(z) - z * 0.05
    expected = 2 * z + 2 / 0.1 * 2 * overshoot
    assert_close(interval_score(mixture, y, 0.9).mean().item(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["central", "shortest"])
def test_coverage(kind):
    mixture = make_mixture(Full())
    inside = coverage(mixture, mixture.sample((4000,)), 0.8, kind=kind)
    assert ((inside.mean(0) - 0.8).abs() < 5 * math.sqrt(0.16 / 4000)).all()


def test_coverage_of_missing_targets_is_missing():
    mixture = make_mixture(Diagonal())
    y = mixture.locs[:, 0].index_fill(1, torch.tensor([2]), math.nan)
    inside = coverage(mixture, y, 0.9)
    assert inside[:, 2].isnan().all()
    assert torch.isin(inside[:, [0, 1, 3]], torch.tensor([0.0, 1.0]).double()).all()


@every_noise
def test_pit_is_uniform(noise):
    mixture = make_mixture(noise, ())
    u = pit(mixture, mixture.sample((3000,)))
    assert min(stats.kstest(column, "uniform").pvalue for column in u.T.numpy()) > 1e-4


@every_noise
def test_interval_log_score_is_the_integral_of_the_density(noise):
    mixture = make_mixture(noise, ())
    y = observed(mixture)
    for d in range(DIM):
        single = mixture.marginal(d)

        def density(t, single=single):
            return single.log_prob(torch.tensor([t], dtype=torch.float64)).exp().item()

        mass = integrate.quad(density, y[d] - 0.2, y[d] + 0.2, epsabs=1e-13)[0]
        assert_close(interval_log_score(mixture, y, 0.4)[d].item(), -math.log(mass), rtol=1e-9, atol=1e-9)


def test_interval_log_score_is_accurate_far_out_and_never_negative():
    mixture = GaussianMixture(
        torch.zeros(1).double(), torch.zeros(1, 1).double(), IsotropicCovariance(torch.ones(1).double())
    )
    y = torch.tensor([[-37.0], [37.0], [0.0]], dtype=torch.float64)
    score = interval_log_score(mixture, y, 1.0)
    expected = -(stats.norm.logcdf(-36.5) + math.log(-math.expm1(stats.norm.logcdf(-37.5) - stats.norm.logcdf(-36.5))))
    assert_close(score[:2].flatten(), torch.full((2,), expected, dtype=torch.float64))
    assert (interval_log_score(mixture, y, 200.0) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1e-15, 1e-7, 1e-4, 1e-2])
@pytest.mark.parametrize("y", [0.0, 3.0, 5.0])
def test_narrow_intervals_do_not_cancel(dtype, width, y):
    """There the score is that of the density times the width, and so is its gradient."""
    scale = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    mixture = GaussianMixture(torch.zeros(1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), DiagonalCovariance(scale))
    score = interval_log_score(mixture, torch.tensor([y], dtype=dtype), width)
    (gradient,) = torch.autograd.grad(score.sum(), scale)
    assert_close(score.item(), -stats.norm.logpdf(y) - math.log(width), rtol=1e-4, atol=1e-4)
    assert_close(gradient.item(), 1 - y**2, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("width", [1e-6, 1e-4, 0.02, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("y", [-30.0, 1e3, 1e4, 1e6])
def test_intervals_far_out_in_single_precision(y, width):
    """Values and slopes against 60 digits."""
    loc = torch.zeros(1, 1, requires_grad=True)
    mixture = GaussianMixture(torch.zeros(1), loc, IsotropicCovariance(torch.ones(1)))
    score = interval_log_score(mixture, torch.tensor([y]), width)
    (slope,) = torch.autograd.grad(score.sum(), loc)
    with mpmath.workdps(60):
        low, high = ((abs(mpmath.mpf(y)) + sign * mpmath.mpf(width) / 2) for sign in (-1, 1))
        mass = (mpmath.erfc(low / mpmath.sqrt(2)) - mpmath.erfc(high / mpmath.sqrt(2))) / 2
        expected, steepness = -mpmath.log(mass), (mpmath.npdf(low) - mpmath.npdf(high)) / mass
    assert score.item() == pytest.approx(float(expected), rel=1e-6)
    assert slope.item() == pytest.approx(-math.copysign(float(steepness), y), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("y", "width"), [(1e3, 2.02e3), (1e4, 2.0002e4), (1e6, 3e6), (1e12, 2.1e12), (1e15, 2e15)])
def test_intervals_that_reach_far_beyond_the_mode(y, width, dtype):
    """From below the mode to far above: the probability is that below the near end, and so is its slope."""
    loc = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    mixture = GaussianMixture(torch.zeros(1, dtype=dtype), loc, IsotropicCovariance(torch.ones(1, dtype=dtype)))
    score = interval_log_score(mixture, torch.tensor([y], dtype=dtype), width)
    (slope,) = torch.autograd.grad(score.sum(), loc)
    end = 0.5 * width - y
    assert_close(score.item(), -stats.norm.logcdf(end), rtol=1e-3, atol=1e-30)
    assert_close(slope.item(), -math.exp(stats.norm.logpdf(end) - stats.norm.logcdf(end)), rtol=2e-3, atol=1e-30)


@every_noise
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_scores_and_quantiles_in_any_unit(noise, unit):
    """In single precision, where squares of such scales over- and underflow."""
    mixture = make_mixture(noise)
    single = GaussianMixture(
        mixture.logits.float(), mixture.locs.float(), mixture.covariance.map(lambda t, n: t.float())
    )
    scaled, y = single.affine(0.0, unit), observed(mixture).float()
    for function, tolerance in [
        (crps, 2e-4),
        (lambda m, y: interval_score(m, y, 0.9), 2e-4),
        (lambda m, y: interval_score(m, y, 0.9, kind="shortest"), 0.03),  # near its least the width hardly changes
        (lambda m, y: m.icdf(0.3), 2e-4),
    ]:
        value = function(scaled, y * unit)
        assert_close(value.double() / unit, function(mixture, y.double()), rtol=tolerance, atol=tolerance)
    assert_close(scaled.cdf(y * unit).double(), mixture.cdf(y.double()), rtol=1e-4, atol=1e-6)
    assert_close(scaled.stddev.double() / unit, mixture.stddev, rtol=1e-4, atol=0)
    got = interval_log_score(scaled, y * unit, 0.1 * unit).double()
    assert_close(got, interval_log_score(mixture, y.double(), 0.1), rtol=1e-4, atol=1e-4)


@every_noise
@pytest.mark.parametrize("unit", [2.0**-80, 2.0**64])
def test_energy_scores_in_any_unit(noise, unit):
    """In single precision, where squares over- and underflow; powers of two leave the same draws."""
    mixture = make_mixture(noise)
    single = GaussianMixture(
        mixture.logits.float(), mixture.locs.float(), mixture.covariance.map(lambda t, n: t.float())
    )
    y, got = observed(mixture).float(), []
    for scale in (1.0, unit):
        torch.manual_seed(0)
        locs = single.locs.clone().requires_grad_()
        value, error = energy_score(
            GaussianMixture(single.logits, locs, single.covariance).affine(0.0, scale), y * scale
        )
        (gradient,) = torch.autograd.grad(value.sum() / scale, locs)
        got.append((value / scale, error / scale, gradient))
    for one, other in zip(*got, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_standard_errors_in_small_units():
    values = torch.randn(50, 2)
    assert_close(observed_mean(values * 1e-25).standard_error * 1e25, observed_mean(values).standard_error)


@pytest.mark.parametrize("y", [-4.0, 0.5, 3.0])
def test_gradients_of_shortest_intervals(y):
    locs, scale = torch.tensor([[-0.5], [0.6]]).double(), torch.tensor([[0.5], [0.9]]).double()
    logits = torch.tensor([0.3, -0.2]).double()

    def score(logits, locs, log_scale):
        mixture = GaussianMixture(logits, locs, DiagonalCovariance(log_scale.exp()))
        return interval_score(mixture, torch.tensor([y]).double(), 0.8, kind="shortest")

    inputs = [t.requires_grad_() for t in (logits, locs, scale.log())]
    assert torch.autograd.gradcheck(score, inputs, eps=1e-3, atol=2e-3)


def test_dawid_sebastiani_of_components_far_apart_in_single_precision():
    locs = torch.tensor([[-1e4, -1e4], [1e4, 1e4], [1e4 + 0.1, 1e4 - 0.3]])
    parameters = torch.zeros(3), locs, IsotropicCovariance(torch.ones(1))
    double = [p.double() for p in parameters[:2]]
    exact = GaussianMixture(*double, IsotropicCovariance(torch.ones(1).double()))
    mixture = GaussianMixture(*parameters)
    y = torch.tensor([1e4, 1e4 + 1])
    assert_close(dawid_sebastiani(mixture, y).double(), dawid_sebastiani(exact, y.double()), rtol=1e-2, atol=1e-2)
    lower, upper = mixture.entropy_bounds()
    assert lower <= upper


@every_noise
def test_log_score_and_dawid_sebastiani_agree_for_a_gaussian(noise):
    mixture = make_mixture(noise, n_components=1)
    y = observed(mixture)
    assert_close(dawid_sebastiani(mixture, y), 2 * log_score(mixture, y) - DIM * math.log(2 * math.pi))


@every_noise
def test_scores_are_proper(noise):
    """On draws of the mixture itself no score is better, on average, for a shifted or widened one."""
    mixture = make_mixture(noise)
    y = mixture.sample((20_000,))
    wrong = [mixture.affine(0.3 * mixture.stddev, 1.0), mixture.affine(-0.3 * mixture.mean, 1.3)]
    for score in (log_score, crps, dawid_sebastiani):
        for other in wrong:
            difference = (score(other, y) - score(mixture, y)).reshape(20_000, -1)
            assert (difference.mean(0) > -4 * difference.std(0) / math.sqrt(20_000)).all()


def test_bad_arguments_are_refused():
    mixture = make_mixture(Diagonal())
    y = torch.zeros(5, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="q: expected a probability"):
        pinball(mixture, y, 1.0)
    with pytest.raises(ValueError, match="width: expected a positive number"):
        interval_log_score(mixture, y, 0.0)
    with pytest.raises(ValueError, match="num_samples: expected 2 at least"):
        energy_score(mixture, y, num_samples=1)
    for score in (crps, log_score, pit, dawid_sebastiani, energy_score):
        with pytest.raises(ValueError, match=r"y: expected shape"):
            score(mixture, torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crps_of_student_t_mixtures_is_the_integral_of_its_definition(dtype):
    """Over steps that widen with the distance from y; the components have different scales and tails."""
    scales = torch.tensor([[0.1], [1.0], [2.0]], dtype=dtype)
    components = StudentTComponents(
        torch.tensor([[-2.0], [0.0], [3.0]], dtype=dtype),
        DiagonalCovariance(scales),
        torch.tensor([3.0, 4.0, 8.0], dtype=dtype),
    )
    mixture = Mixture(torch.tensor([0.1, 0.5, -0.2], dtype=dtype), components)
    y = torch.tensor([0.7], dtype=dtype)
    steps = torch.linspace(-12, 12, 200_000, dtype=torch.float64)
    points = (0.7 + steps.sinh()).unsqueeze(-1)
    loss = (mixture.double().cdf(points) - (steps > 0).double().unsqueeze(-1)).square().squeeze(-1)
    expected = torch.trapezoid(loss * steps.cosh(), steps).item()
    assert crps(mixture, y).item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-5)
    assert mixture.univariate().mixture.law.grid(y).isfinite().all()
