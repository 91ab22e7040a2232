import math

import pytest
import torch
from cases import BATCH_SHAPES, NOISE, make_mixture, peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from pyro_mdn import Diagonal, DiagonalCovariance, Full, GaussianMixture, Isotropic
from pyro_mdn.uncertainty import (
    aleatoric_variance,
    epistemic_variance,
    mutual_information,
    mutual_information_bounds,
)

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


def by_draws(noise, n_draws=3, n_components=3, spread=1.0, dim=2, batch_shape=(4,)):
    """Mixtures whose draws also lie ``spread`` times a random step apart."""
    mixture = make_mixture(noise, (n_draws, *batch_shape), dim, n_components)
    step = torch.randn(n_draws, *(1,) * len(batch_shape), dim, dtype=torch.float64)
    return mixture.affine(spread * step, 1.0)


def allowance(error, n_draws, num_samples):
    """Five standard errors, and five draws of the greatest value that were too rare to be seen."""
    return 5 * error + 5 * math.log(n_draws) / num_samples + 1e-9


def by_quadrature(mixture, points=4001):
    """Mutual information with one output: the mean divergence of a draw from the pool, on a grid for each row."""
    scale = mixture.covariance.variance().sqrt()
    low, high = (mixture.locs - 12 * scale).amin((0, 2)), (mixture.locs + 12 * scale).amax((0, 2))
    grid = low + (high - low) * torch.linspace(0, 1, points, dtype=torch.float64).reshape(-1, 1, 1)
    log_prob, log_pool = mixture.log_prob(grid.unsqueeze(1)), mixture.pool(0).log_prob(grid).unsqueeze(1)
    integrand = (log_prob.exp() * (log_prob - log_pool)).mean(1)
    return torch.trapezoid(integrand, grid.squeeze(-1), dim=0)


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_variances_add_up(noise, batch_shape):
    mixture = by_draws(noise, batch_shape=batch_shape)
    aleatoric, epistemic = aleatoric_variance(mixture), epistemic_variance(mixture)
    assert_close(aleatoric + epistemic, mixture.pool(0).variance)
    for ours, matrix in zip((aleatoric, epistemic), mixture.split_variance(0), strict=True):
        assert_close(ours, matrix.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("noise", [Diagonal(), Full(), Isotropic(tied=True)], ids=str)
@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 5))
def test_estimate_agrees_with_quadrature(noise, n_draws, n_components, spread):
    mixture = by_draws(noise, n_draws, n_components, spread, dim=1)
    value, error = mutual_information(mixture, num_samples=5000)
    distance = (value - by_quadrature(mixture, 20_001)).abs()
    assert (distance <= allowance(error, n_draws, 5000)).all()


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_standard_error_is_the_spread_of_estimates(spread):
    single = by_draws(Full(), spread=spread, dim=1, batch_shape=(1,))
    value, error = mutual_information(single.expand((3, 2000)), num_samples=90)
    assert 0.92 < value.std() / error.square().mean().sqrt() < 1.08
    assert (value.mean() - by_quadrature(single)).abs() < 5 * value.std() / math.sqrt(2000)


@every_noise
@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 10))
def test_bounds_contain_the_quadrature(noise, n_draws, n_components, spread):
    mixture = by_draws(noise, n_draws, n_components, spread, dim=1)
    lower, upper = mutual_information_bounds(mixture)
    exact = by_quadrature(mixture)
    assert ((lower >= 0) & (lower <= exact + 1e-7)).all()
    assert ((exact - 1e-7 <= upper) & (upper <= math.log(n_draws))).all()


@every_noise
@settings(max_examples=5)
@given(st.integers(2, 4), st.integers(1, 3), st.floats(0, 4))
def test_bounds_contain_the_estimate(noise, n_draws, n_components, spread):
    mixture = by_draws(noise, n_draws, n_components, spread)
    lower, upper = mutual_information_bounds(mixture)
    value, error = mutual_information(mixture, num_samples=3000)
    error = allowance(error, n_draws, 3000)
    assert ((lower - error <= value) & (value <= upper + error)).all()


@every_noise
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_bounds_of_single_gaussians(noise, spread):
    """Against the formulas on dense matrices."""
    mixture = by_draws(noise, n_components=1, spread=spread)
    matrix = mixture.covariance_matrix
    normal = MultivariateNormal(mixture.mean, matrix)
    divergence = kl_divergence(normal.expand((3, 3, 4)), MultivariateNormal(mixture.mean[:, None], matrix[:, None]))
    apart, between = mixture.mean - mixture.mean[:, None], (matrix + matrix[:, None]) / 2
    quadratic = (apart * torch.linalg.solve(between, apart)).sum(-1)
    volumes = (matrix.det() * matrix[:, None].det()).sqrt()
    distance = quadratic / 8 + 0.5 * (between.det() / volumes).log()

    def information(distance):
        return -(-distance).exp().mean(0).log().mean(0)

    gaussian = 0.5 * (mixture.pool(0).covariance_matrix.logdet() - matrix.logdet().mean(0))
    lower, upper = mutual_information_bounds(mixture)
    assert_close(lower, information(distance))
    assert_close(upper, torch.minimum(information(divergence), gaussian).clamp(max=math.log(3)))


def test_bounds_are_tighter_than_those_of_the_entropies():
    mixture = by_draws(Full())
    pool, draws = mixture.pool(0).entropy_bounds(), [bound.mean(0) for bound in mixture.entropy_bounds()]
    lower, upper = mutual_information_bounds(mixture)
    assert (lower > pool[0] - draws[1]).all()
    assert (upper < pool[1] - draws[0]).all()


def test_upper_bound_is_exact_for_draws_that_hardly_differ():
    """One component: half the logarithm of total over aleatoric variance, to first order."""
    locs = 1e-3 * torch.randn(5, 1, 1, dtype=torch.float64)
    mixture = GaussianMixture(torch.zeros(1).double(), locs, DiagonalCovariance(torch.ones(1, 1).double()))
    expected = 0.5 * torch.log1p(epistemic_variance(mixture) / aleatoric_variance(mixture)).squeeze()
    assert_close(mutual_information_bounds(mixture)[1], expected, rtol=1e-4, atol=0)
    assert_close(by_quadrature(GaussianMixture(mixture.logits, locs.unsqueeze(1), mixture.covariance))[0], expected)


@every_noise
def test_equal_draws_tell_nothing(noise):
    mixture = make_mixture(noise).expand((4, 5))
    value, error = mutual_information(mixture, num_samples=100)
    for zero in (value, error, epistemic_variance(mixture), *mutual_information_bounds(mixture)):
        assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-12)


@every_noise
def test_draws_far_apart_are_told_from_each_other(noise):
    mixture = by_draws(noise, 4, spread=1e4)
    value, error = mutual_information(mixture, num_samples=100)
    for result in (value, *mutual_information_bounds(mixture)):
        assert_close(result, torch.full_like(result, math.log(4)))
    assert_close(error, torch.zeros_like(error))


@every_noise
def test_invariant_under_affine_maps(noise):
    mixture = by_draws(noise)
    mapped = mixture.affine(torch.tensor([3.0, -1.0]).double(), torch.tensor([-0.1, 20.0]).double())
    matrix = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    for other in (mapped, mixture.affine(-2.0, matrix=matrix)):
        assert_close(mutual_information_bounds(other), mutual_information_bounds(mixture))
    estimates = []
    for same in (mixture, mixture.affine(5.0, 3.0)):
        torch.manual_seed(3)
        estimates.append(mutual_information(same, num_samples=100))
    assert_close(*estimates)


def test_nested_batches_and_none():
    mixture = by_draws(Full(), batch_shape=(2, 3))
    bounds, (value, error) = mutual_information_bounds(mixture), mutual_information(mixture)
    for i in range(2):
        row = mixture[:, i]
        assert_close(mutual_information_bounds(row), tuple(bound[i] for bound in bounds))
        other, other_error = mutual_information(row)
        assert ((other - value[i]).abs() < 5 * (other_error.square() + error[i].square()).sqrt()).all()
    for batch_shape in [(), (0,), (2, 0)]:
        empty = by_draws(Full(), batch_shape=batch_shape)
        for result in (*mutual_information(empty), *mutual_information_bounds(empty)):
            assert result.shape == batch_shape


def test_more_rows_than_fit_at_once_are_the_same():
    """Twice as many rows as fit into one pass; each has the information that it has alone, in its place."""
    pair = by_draws(Full(), 4, dim=1, batch_shape=(2,))
    rows = torch.arange(50_000) * 2 // 50_000  # the first mixture in the first half, the second one in the second
    many = pair[:, rows]
    for bound, alone in zip(mutual_information_bounds(many), mutual_information_bounds(pair), strict=True):
        assert_close(bound, alone[rows])
    value, error = mutual_information(many, num_samples=8)
    exact = by_quadrature(pair)
    for i in range(2):
        mean = value[rows == i].mean()
        assert (mean - exact[i]).abs() < 5 * error[rows == i].square().mean().sqrt() / math.sqrt(25_000)
    assert (exact[0] - exact[1]).abs() > 0.01


def test_components_of_weight_zero_do_not_count():
    mixture = by_draws(Full(), n_components=2, batch_shape=())
    logits = torch.cat([mixture.logits, torch.full((3, 2), -math.inf).double()], -1)
    logits[0, 2] = 0.1
    locs = torch.cat([mixture.locs, mixture.locs + 1], -2)
    covariance = mixture.covariance.map(lambda t, n: torch.cat([t, t], -2))
    padded = GaussianMixture(logits, locs, covariance)
    lower, upper = mutual_information_bounds(padded)
    value, error = mutual_information(padded)
    assert lower - 5 * error < value < upper + 5 * error


@pytest.mark.parametrize("logit", [-200.0, -math.inf])
def test_bounds_have_gradients_where_weights_vanish(logit):
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, logit]).expand(4, 5, 3).clone().requires_grad_()
    locs = torch.randn(4, 5, 3, 2, requires_grad=True)
    mixture = GaussianMixture(logits, locs, DiagonalCovariance(torch.ones(3, 2)))
    without = GaussianMixture(logits[..., :2], locs[..., :2, :], DiagonalCovariance(torch.ones(2, 2)))
    for bound, expected in zip(*map(mutual_information_bounds, (mixture, without)), strict=True):
        gradients, others = (torch.autograd.grad(b.sum(), [logits, locs], retain_graph=True) for b in (bound, expected))
        for gradient, other in zip(gradients, others, strict=True):
            assert_close(gradient, other)


def test_bounds_have_gradients():
    values = [torch.randn(3, 2), torch.randn(3, 2, 2), torch.rand(3, 2, 2) + 0.5]
    values = [v.double().requires_grad_() for v in values]

    def function(logits, locs, scale):
        return mutual_information_bounds(GaussianMixture(logits, locs, DiagonalCovariance(scale)))

    assert torch.autograd.gradcheck(function, values)
    assert not mutual_information(GaussianMixture(*values[:2], DiagonalCovariance(values[2]))).value.requires_grad


def test_single_precision():
    mixture = by_draws(Full(), spread=1e3)
    tensors = mixture.covariance.map(lambda t, n: t.float())
    single = GaussianMixture(mixture.logits.float(), mixture.locs.float(), tensors)
    for ours, exact in zip(mutual_information_bounds(single), mutual_information_bounds(mixture), strict=True):
        assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_hundred_draws_for_many_rows_need_little_memory():
    """All pairs at once would take 1."""
    code = """
from pyro_mdn import DiagonalCovariance, GaussianMixture, uncertainty
covariance = DiagonalCovariance(torch.ones(100, 100, 5, 1))
mixture = GaussianMixture(torch.zeros(100, 100, 5), torch.randn(100, 100, 5, 1), covariance)
uncertainty.mutual_information(mixture, num_samples=200), uncertainty.mutual_information_bounds(mixture)
"""
    assert peak_memory(code) < 0.3


@pytest.mark.parametrize(
    "function", [aleatoric_variance, epistemic_variance, mutual_information, mutual_information_bounds]
)
def test_a_mixture_without_draws_is_refused(function):
    with pytest.raises(ValueError, match=r"mixture: expected batch_shape \(S, \*batch\) with S > 0"):
        function(make_mixture(Diagonal(), ()))
    with pytest.raises(ValueError, match=r"draws of the weights, got \(0, 5\)"):
        function(make_mixture(Diagonal(), (0, 5)))


@pytest.mark.parametrize("num_samples", [0, -1, 1.5])
def test_bad_numbers_of_samples_are_refused(num_samples):
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        mutual_information(make_mixture(Diagonal()), num_samples=num_samples)
