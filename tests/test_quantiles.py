import math

import mpmath
import numpy as np
import pytest
import torch
from cases import BATCH_SHAPES, DIM, NOISE, make_mixture
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch.testing import assert_close

from pyro_mdn import Diagonal, DiagonalCovariance, GaussianMixture, IsotropicCovariance
from pyro_mdn.distributions.families.normal import normal_log_cdf

NAN = math.nan

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


def univariate(weights, locs, scales, *, dtype=torch.float64):
    """One mixture over one output."""
    weights, locs, scales = (torch.tensor(values, dtype=dtype) for values in (weights, locs, scales))
    return GaussianMixture(weights.log(), locs.unsqueeze(-1), DiagonalCovariance(scales.unsqueeze(-1)))


def assert_straddles(mixture, y, q, tolerance):
    """The cdf passes q between the neighbours of y: where it is steep, no number gives q itself."""
    below, above = (mixture.cdf(y.nextafter(torch.full_like(y, sign * math.inf))) for sign in (-1, 1))
    assert below.item() - tolerance <= q <= above.item() + tolerance


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_cdf_agrees_with_scipy(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    y = mixture.sample((7,))
    weights = mixture.logits.exp().unsqueeze(-1).numpy()
    scale = mixture.covariance.variance().sqrt().expand(mixture.locs.shape).numpy()
    expected = (weights * stats.norm.cdf(y.unsqueeze(-2).numpy(), mixture.locs.numpy(), scale)).sum(-2)
    assert_close(mixture.cdf(y), torch.tensor(expected), rtol=0, atol=1e-10)


# Logarithms of tails


def exact_log_cdf(y, weights, locs, scales):
    """Logarithm of the cdf and its derivative, to 60 digits more than it needs."""
    with mpmath.workdps(60 + int(abs(y) ** 2 / 4)):
        parts = [(mpmath.mpf(w), (mpmath.mpf(y) - m) / s, s) for w, m, s in zip(weights, locs, scales, strict=True)]
        cdf = sum(w * mpmath.ncdf(z) for w, z, _ in parts) / sum(weights)
        density = sum(w * mpmath.npdf(z) / s for w, z, s in parts) / sum(weights)
        return float(mpmath.log(cdf)), float(density / cdf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("y", [-100.0, -40.0, -12.0, -5.0, -4.99, -1.0, 0.0, 0.3, 2.0, 5.0, 9.0, 12.0])
def test_log_cdf_and_log_sf_in_both_tails(y, dtype):
    weights, locs, scales = [0.25, 0.5, 0.25], [-1.0, 0.5, 0.75], [1.0, 0.5, 0.25]
    mixture = univariate(weights, locs, scales, dtype=dtype)
    mirrored = univariate(weights, [-m for m in locs], scales, dtype=dtype)
    point = torch.tensor([y], dtype=dtype, requires_grad=True)
    value, other = mixture.log_cdf(point), mirrored.log_sf(-point)
    (slope,) = torch.autograd.grad(value, point)
    expected, steepness = exact_log_cdf(point.item(), weights, locs, scales)
    rtol = 3e-6 if dtype == torch.float32 else 1e-12
    assert_close(value.item(), expected, rtol=rtol, atol=1e-42)
    assert_close(slope.item(), steepness, rtol=10 * rtol, atol=1e-42)
    assert_close(other, value)
    if y > -13:
        assert_close(mixture.cdf(point).log(), value, rtol=20 * rtol, atol=rtol)
        assert_close(mirrored.sf(-point), mixture.cdf(point))


@every_noise
def test_log_cdf_is_the_integral_of_the_density(noise):
    mixture = make_mixture(noise, ()).marginal(1)
    for y in (mixture.mean - 4 * mixture.stddev, mixture.mean):
        points = torch.linspace(y.item() - 30, y.item(), 100_001, dtype=torch.float64)
        tail = integrate.simpson(mixture.log_prob(points.unsqueeze(-1)).exp().numpy(), x=points.numpy())
        assert_close(mixture.log_cdf(y).item(), math.log(tail), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("z", [-1e20, -1e10, -1e6, -1e4, -300.0, -6.0, -4.0, -0.5, 0.0, 0.5, 3.0, 8.0, 1e4, 1e20])
def test_derivatives_of_the_logarithm_of_the_normal_cdf(z, dtype):
    """First and second; those of torch are wrong from -100 on in single precision."""
    point = torch.tensor(z, dtype=dtype, requires_grad=True)
    value = normal_log_cdf(point)
    (slope,) = torch.autograd.grad(value, point, create_graph=True)
    (bend,) = torch.autograd.grad(slope, point)
    z = point.item()
    if z < -1e3:  # Mills' ratio
        expected = -z - 1 / z, -1 + 1 / z**2
    else:
        with mpmath.workdps(60):
            ratio = mpmath.npdf(z) / mpmath.ncdf(z)
            expected = float(ratio), float(-ratio * (ratio + mpmath.mpf(z)))
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close((slope.item(), bend.item()), expected, rtol=rtol, atol=1e-35)


def log_tails(y, logits, locs, scale):
    mixture = GaussianMixture(logits, locs, DiagonalCovariance(scale), validate_args=False)
    return torch.stack([mixture.log_cdf(y), mixture.log_sf(y)])


def test_derivatives_of_log_cdf_by_differences_and_transforms():
    y = torch.tensor([[-9.0, 0.2], [0.4, 7.0], [-40.0, 30.0]]).double()
    parameters = torch.randn(3, 4).double(), torch.randn(3, 4, 2).double(), torch.rand(3, 4, 2).double() + 0.5
    leaves = [t.clone().requires_grad_() for t in (y, *parameters)]
    assert torch.autograd.gradcheck(log_tails, leaves, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(log_tails, leaves, rtol=1e-4, atol=1e-4, fast_mode=True)
    assert torch.autograd.gradcheck(
        log_tails, leaves, rtol=1e-4, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )
    reverse = torch.func.jacrev(lambda t: log_tails(t, *parameters))(y)
    assert_close(torch.func.jacfwd(lambda t: log_tails(t, *parameters))(y), reverse)
    rows = torch.func.vmap(torch.func.jacrev(log_tails))(y, *parameters)
    assert_close(rows, torch.stack([reverse[:, n, :, n] for n in range(3)]))


def test_log_cdf_where_there_is_no_number():
    """At infinite points the tail is empty, or all; a missing entry adds nothing to gradients."""
    locs = torch.zeros(2, 1, requires_grad=True)
    mixture = GaussianMixture(torch.tensor([0.0, -math.inf]), locs, IsotropicCovariance(torch.ones(1)))
    y = torch.tensor([[-math.inf], [math.inf], [NAN], [1.0], [-1e25]])
    log_cdf, log_sf = mixture.log_cdf(y), mixture.log_sf(y)
    assert_close(log_cdf[:3].flatten(), torch.tensor([-math.inf, 0.0, NAN]), equal_nan=True)
    assert_close(log_sf[:3].flatten(), torch.tensor([0.0, -math.inf, NAN]), equal_nan=True)
    (gradient,) = torch.autograd.grad(log_cdf.nanmean() + log_sf.nanmean(), locs)
    (expected,) = torch.autograd.grad((mixture.log_cdf(y[3:]) + mixture.log_sf(y[3:])).sum() / 4, locs)
    assert gradient.isfinite().all()
    assert_close(gradient, expected)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_log_cdf_in_any_unit(unit):
    mixture = univariate([0.3, 0.7], [-1.0, 1.0], [0.5, 2.0], dtype=torch.float32)
    y = torch.tensor([[-70.0], [0.0], [60.0]])
    assert_close(mixture.affine(0.0, unit).log_cdf(unit * y), mixture.log_cdf(y), rtol=1e-4, atol=0)
    assert_close(mixture.affine(0.0, unit).log_sf(unit * y), mixture.log_sf(y), rtol=1e-4, atol=0)


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_icdf_inverts_cdf(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    q = torch.rand(7, *batch_shape, DIM, dtype=torch.float64)
    assert_close(mixture.cdf(mixture.icdf(q)), q, rtol=0, atol=1e-12)
    assert mixture.icdf(0.5).shape == (*batch_shape, DIM)


@pytest.mark.parametrize("q", [1e-12, 0.01, 0.3, 0.5, 0.77, 0.999])
def test_icdf_agrees_with_a_scipy_root(q):
    weights, locs, scales = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.5, 4.0]), np.array([0.3, 1.0, 0.1])
    root = optimize.brentq(lambda y: weights @ stats.norm.cdf(y, locs, scales) - q, -20, 20, xtol=1e-14, rtol=1e-14)
    assert_close(univariate(weights, locs, scales).icdf(q).item(), root, rtol=1e-10, atol=1e-10)


@given(
    st.lists(
        st.tuples(st.floats(1e-12, 1), st.floats(-1e3, 1e3), st.floats(-6, 6)), min_size=1, max_size=6
    ),
    st.floats(1e-9, 1 - 1e-9),
)  # fmt: skip
def test_icdf_inverts_cdf_whatever_the_mixture(components, q):
    """Weights down to 1e-12, scales from 1e-6 to 1e6, modes up to 1e9 scales apart."""
    weights, locs, exponents = zip(*components, strict=True)
    mixture = univariate(weights, locs, [10**e for e in exponents])
    y = mixture.icdf(q)
    assert_straddles(mixture, y, q, 1e-10)


@given(st.floats(1e-6, 1e3), st.floats(1e-4, 1 - 1e-4))
def test_icdf_of_separated_modes_in_single_precision(separation, q):
    mixture = univariate([0.5, 0.5], [0.0, separation], [1.0, 1.0], dtype=torch.float32)
    assert_straddles(mixture, mixture.icdf(q), q, 1e-6)


def test_extreme_quantiles():
    mixture = univariate([1.0, 1.0], [0.0, 1.0], [1.0, 2.0])
    q = torch.tensor([[0.0], [1.0], [1e-300], [1e-15]], dtype=torch.float64)
    y = mixture.icdf(q)
    assert y[0] == -math.inf
    assert y[1] == math.inf
    assert_close(mixture.cdf(y[2:]), q[2:], rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_quantiles_take_the_steps_that_they_need():
    def quantile(locs, scale, q):
        return GaussianMixture(torch.zeros(2).double(), locs, DiagonalCovariance(scale), validate_args=False).icdf(q)

    easy = [[0.0], [1.0]], [[1.0], [1.0]], [0.5]
    traced = torch.jit.trace(quantile, tuple(torch.tensor(values, dtype=torch.float64) for values in easy))
    hard = [[0.0], [50.0]], [[1.0], [0.01]], [0.49999]
    y = traced(*(torch.tensor(values, dtype=torch.float64) for values in hard))
    assert_straddles(univariate([0.5, 0.5], [0.0, 50.0], [1.0, 0.01]), y, 0.49999, 1e-12)


def test_a_component_of_weight_zero_does_not_count():
    mixture = univariate([1.0, 0.0], [0.0, 1e9], [1.0, 1.0])
    assert_close(mixture.icdf(0.975).item(), stats.norm.ppf(0.975))


@pytest.mark.parametrize("n_components", [1, 3])
def test_icdf_gradients(n_components):
    logits = torch.randn(2, n_components, dtype=torch.float64, requires_grad=True)
    locs = torch.randn(2, n_components, 3, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(2, n_components, 3, dtype=torch.float64) + 0.5).requires_grad_()
    q = torch.rand(2, 3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()

    def icdf(logits, locs, scale, q):
        return GaussianMixture(logits, locs, DiagonalCovariance(scale)).icdf(q)

    assert torch.autograd.gradcheck(icdf, (logits, locs, scale, q), fast_mode=True)
    assert torch.autograd.gradgradcheck(icdf, (logits, locs, scale, q), fast_mode=True)


def test_icdf_gradients_are_finite_between_far_modes():
    locs = torch.tensor([[0.0], [1e6]], requires_grad=True)
    logits = torch.zeros(2, requires_grad=True)
    y = GaussianMixture(logits, locs, IsotropicCovariance(torch.ones(1))).icdf(0.3)
    y.sum().backward()
    assert locs.grad.isfinite().all()
    assert logits.grad.isfinite().all()


@every_noise
@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_intervals_hold_their_mass_and_the_shortest_is_shortest(noise, mass):
    mixture = make_mixture(noise)
    lower, upper = mixture.interval(mass)
    assert_close(mixture.cdf(lower), torch.full_like(lower, (1 - mass) / 2))
    assert_close(mixture.cdf(upper), torch.full_like(lower, (1 + mass) / 2))
    short_lower, short_upper = mixture.interval(mass, kind="shortest")
    assert_close(mixture.cdf(short_upper) - mixture.cdf(short_lower), torch.full_like(lower, mass))
    for left in torch.linspace(0, 1 - mass, 12)[1:-1].tolist():
        assert (mixture.icdf(left + mass) - mixture.icdf(left) >= short_upper - short_lower - 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("weights", "locs", "scales", "mass", "expected"),
    [
        ([0.0874, 0.1125, 0.8001], [-8.79, 5.31, 7.05], [0.24, 0.08, 0.12], 0.8, [6.5897, 7.5103]),
        ([12, 5, 1, 1, 6], [-3.0, -5.0, -5.0, -2.0, 3.0], [0.2, 0.5, 0.4, 0.8, 0.8], 0.5, [-3.5808, -1.9304]),
        ([1.0] * 49 + [0.52], [3.0 * i for i in range(49)] + [61.5], [0.3] * 49 + [0.01], 0.01, None),
        # A spike in a broad component, a mode beside a gap, and an interval over a gap.
        ([0.98, 0.02], [0.0, 1.0], [1.0, 0.01], 0.01, None),
        ([0.5, 0.3, 0.2], [0.0, 10.0, 1e4], [1.0, 0.1, 0.1], 0.29, None),
        ([0.5, 0.5], [0.0, 1e3], [1.0, 0.1], 0.6, None),
        ([0.3, 0.0, 0.7], [0.0, 5.0, 9.0], [1.0, 0.01, 2.0], 0.7, None),
    ],
)
def test_shortest_interval_among_many_local_minima(weights, locs, scales, mass, expected, dtype):
    mixture = univariate(weights, locs, scales, dtype=dtype)
    lower, upper = mixture.interval(mass, kind="shortest")
    exact = univariate(weights, locs, scales)
    assert_close(
        (upper - lower).item(), least_width(exact, mass), rtol=1e-8 if dtype == torch.float64 else 1e-4, atol=0
    )
    assert_close((exact.cdf(upper.double()) - exact.cdf(lower.double())).item(), mass, rtol=1e-4, atol=0)
    if expected:
        assert_close([lower.item(), upper.item()], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_components", [2, 5, 10, 50])
@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_shortest_interval_of_random_mixtures(n_components, mass):
    """Components of sizes that differ a thousandfold, some apart and some together."""
    spread = 10 ** torch.linspace(-1, 2, 3).double()[:, None, None]
    locs = spread * torch.randn(3, n_components, 1).double()
    scale = 10 ** (3 * torch.rand(3, n_components, 1).double() - 2.5)
    mixture = GaussianMixture(0.5 * torch.randn(3, n_components).double(), locs, DiagonalCovariance(scale))
    lower, upper = mixture.interval(mass, kind="shortest")
    for row in range(3):
        assert (upper - lower)[row].item() <= least_width(mixture[torch.tensor([row])], mass) * (1 + 1e-8)


def least_width(mixture, mass):
    """Width of the shortest interval of one mixture, from lower and upper ends all over every component."""
    steps = torch.linspace(-8.5, 8.5, 1000 // mixture.n_components + 60).double()
    points = (mixture.locs.reshape(-1, 1) + mixture.covariance.stddev().reshape(-1, 1) * steps).reshape(-1, 1)
    left = torch.cat([mixture.cdf(points), mixture.cdf(points) - mass])
    for _ in range(3):  # then between the neighbours of the best
        left = left[(left > 0) & (left < 1 - mass)].sort().values
        width = (mixture.icdf((left + mass).unsqueeze(-1)) - mixture.icdf(left.unsqueeze(-1))).flatten()
        best = int(width.argmin())
        ends = left[max(best - 2, 0)].item(), left[min(best + 2, len(left) - 1)].item()
        left = torch.linspace(*ends, 100).double()
    return width.min().item()


@pytest.mark.parametrize("mass", [0.01, 0.1])  # where weights rounded to single precision do not move the ends far
def test_ends_of_shortest_intervals_are_accurate_in_single_precision(mass):
    """Those of the same mixture in double precision, to a rounding of where they are."""
    locs, scale = 20 * torch.randn(300, 5, 1), 0.02 + 0.2 * torch.rand(300, 5, 1)
    mixture = GaussianMixture(torch.randn(300, 5), locs, DiagonalCovariance(scale))
    lower, upper = mixture.interval(mass, kind="shortest")
    exact = GaussianMixture(mixture.logits.double(), locs.double(), DiagonalCovariance(scale.double()))
    ends = exact.interval(mass, kind="shortest")
    rounding = 2 * torch.finfo(torch.float32).eps * locs.abs().amax(1).double()
    assert ((upper - lower).double() <= ends[1] - ends[0] + rounding).all()
    assert ((exact.cdf(upper.double()) - exact.cdf(lower.double()) - mass).abs() <= 30 * rounding).all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_shortest_intervals_of_any_batch(shape):
    mixture = make_mixture(Diagonal(), shape)
    lower, upper = mixture.interval(0.7, kind="shortest")
    assert lower.shape == upper.shape == (*mixture.batch_shape, DIM)


@pytest.mark.parametrize("kind", ["central", "shortest"])
@pytest.mark.parametrize("mass", [0.99999, 1 - 1e-8])
def test_intervals_of_nearly_all_mass_are_symmetric_in_single_precision(kind, mass):
    lower, upper = univariate([1.0, 1.0], [-1.0, 1.0], [1.0, 1.0], dtype=torch.float32).interval(mass, kind=kind)
    assert lower.isfinite().all()
    assert_close(-lower, upper, rtol=2e-3, atol=0)


def test_infinite_quantiles_leave_other_gradients_alone():
    locs = torch.zeros(1, 1, requires_grad=True)
    y = GaussianMixture(torch.zeros(1), locs, IsotropicCovariance(torch.ones(1))).icdf(torch.tensor([[0.0], [0.5]]))
    y[1].sum().backward()
    assert_close(locs.grad, torch.ones(1, 1))


def test_shortest_interval_of_a_normal_is_central():
    mixture = univariate([1.0], [3.0], [2.0])
    for central, shortest in zip(mixture.interval(0.8), mixture.interval(0.8, kind="shortest"), strict=True):
        assert_close(central, shortest, rtol=0, atol=1e-5)


def test_highest_density_region_of_a_normal_is_a_ball():
    """For a Gaussian the squared Mahalanobis distance is chi-squared: the threshold is known."""
    mixture = make_mixture(Diagonal(), (), dim=3, n_components=1)
    n = 200_000
    threshold = mixture.highest_density_threshold(0.9, num_samples=n)
    edge = stats.chi2(3).ppf(0.9)
    expected = mixture.log_prob(mixture.mean).item() - 0.5 * edge
    slope = 0.5 / stats.chi2(3).pdf(edge)
    assert abs(threshold.item() - expected) < 5 * slope * math.sqrt(0.9 * 0.1 / n)


@every_noise
def test_highest_density_region_holds_its_mass(noise):
    mixture = make_mixture(noise)
    inside = mixture.in_highest_density_region(mixture.sample((10_000,)), 0.7, num_samples=10_000)
    assert inside.shape == (10_000, 5)
    assert ((inside.double().mean(0) - 0.7).abs() < 5 * math.sqrt(2 * 0.21 / 10_000)).all()


def test_bad_arguments_are_refused():
    mixture = make_mixture(Diagonal())
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"value: expected probabilities in \[0, 1\]"):
            mixture.icdf(q)
    for mass in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"mass: expected a probability in \(0, 1\)"):
            mixture.interval(mass)
        with pytest.raises(ValueError, match=r"mass: expected a probability in \(0, 1\)"):
            mixture.highest_density_threshold(mass)
    with pytest.raises(ValueError, match="kind: expected 'central' or 'shortest', got 'widest'"):
        mixture.interval(0.5, kind="widest")
    with pytest.raises(ValueError, match=r"value: expected shape \(\*batch, 4\)"):
        mixture.cdf(torch.zeros(5, 3))
