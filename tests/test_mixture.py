import math
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from cases import BATCH_SHAPES, DIM, NOISE, dense, make_head, make_mixture
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from pyro_mdn import Diagonal, DiagonalCovariance, Full, FullCovariance, GaussianMixture, IsotropicCovariance

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
every_batch = pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)


def two_components(**kwargs):
    return GaussianMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), IsotropicCovariance(torch.ones(1)), **kwargs)


# Density


@every_noise
@every_batch
@pytest.mark.parametrize("sample_shape", [(), (7,)])
def test_log_prob_agrees_with_dense_torch(noise, batch_shape, sample_shape):
    mixture = make_mixture(noise, batch_shape)
    y = torch.randn(*sample_shape, *batch_shape, DIM, dtype=torch.float64)
    assert_close(mixture.log_prob(y), dense(mixture).log_prob(y), rtol=0, atol=1e-10)
    assert_close(mixture.component_log_prob(y), dense(mixture).component_distribution.log_prob(y.unsqueeze(-2)))


@every_noise
@every_batch
def test_own_parts_make_the_same_distribution(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    parts = dist.MixtureSameFamily(mixture.mixture_distribution, mixture.component_distribution)
    y = torch.randn(*batch_shape, DIM, dtype=torch.float64)
    assert isinstance(mixture, dist.MixtureSameFamily)
    assert (parts.batch_shape, parts.event_shape) == (mixture.batch_shape, mixture.event_shape)
    assert_close(mixture.log_prob(y), parts.log_prob(y), rtol=0, atol=1e-10)


@every_noise
def test_strides_do_not_matter(noise):
    mixture = make_mixture(noise)
    packed = GaussianMixture(
        mixture.logits.contiguous(),
        mixture.locs.contiguous(),
        mixture.covariance.map(lambda t, n: t.contiguous()),
    )
    y = torch.randn(5, DIM, dtype=torch.float64)
    assert_close(packed.log_prob(y), mixture.log_prob(y), rtol=0, atol=1e-12)


@every_noise
@pytest.mark.parametrize("dim", [1, 2])
def test_density_integrates_to_one(noise, dim):
    mixture = make_mixture(noise, (), dim)
    axis = torch.linspace(-1, 1, 801, dtype=torch.float64)
    widest = (mixture.locs - mixture.mean).abs().amax(0) + 9 * mixture.covariance.variance().sqrt().amax(0)
    axes = [mean + half * axis for mean, half in zip(mixture.mean, widest, strict=True)]
    density = mixture.log_prob(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).exp()
    for points in reversed(axes):
        density = torch.trapezoid(density, points)
    assert_close(density.item(), 1.0, rtol=0, atol=1e-8)


@every_noise
def test_responsibilities_follow_bayes_rule(noise):
    mixture = make_mixture(noise)
    y = torch.randn(5, DIM, dtype=torch.float64)
    joint = mixture.mixture_distribution.probs * mixture.component_log_prob(y).exp()
    assert_close(mixture.responsibilities(y), joint / joint.sum(-1, keepdim=True))


def test_responsibilities_are_no_subnormal_numbers():
    locs = torch.linspace(0, 16, 33).unsqueeze(-1).requires_grad_()
    mixture = GaussianMixture(torch.zeros(33), locs, DiagonalCovariance(torch.ones(33, 1)))
    share = mixture.responsibilities(torch.zeros(1))
    (gradient,) = torch.autograd.grad(share[0], locs)
    for numbers in (share, gradient):
        assert ((numbers == 0) | (numbers.abs() >= torch.finfo(torch.float32).tiny)).all()
    exact = (-0.5 * locs.detach().double().square()).exp().squeeze(-1)
    assert_close(share.detach().double(), exact / exact.sum(), rtol=1e-5, atol=1e-28)


@every_noise
@pytest.mark.parametrize("dim", [1, 3])
def test_gradients(noise, dim):
    head = make_head(noise, dim)
    y = torch.randn(4, dim, dtype=torch.float64, requires_grad=True)
    features = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(head.named_parameters())

    def log_prob(y, features, *values):
        return torch.func.functional_call(head, dict(zip(parameters, values, strict=True)), features).log_prob(y)

    assert torch.autograd.gradcheck(log_prob, (y, features, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(log_prob, (y, features, *parameters.values()), fast_mode=True)


@every_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_components", [1, 500])
@pytest.mark.parametrize("channels", ["ordinary", "logits of 1e4", "smallest scale", "largest scale"])
def test_extremes_are_finite(noise, dtype, n_components, channels):
    head = make_head(noise, DIM, n_components).to(dtype)
    bias = head.linear.bias.detach()
    noise_channels = bias[n_components * (1 + DIM) :] if head.raw_noise is None else head.raw_noise.detach()
    groups = len(noise_channels) // max(1, noise.num_params(DIM))
    scale_channels = noise_channels[: groups * DIM]
    if channels == "logits of 1e4":
        bias[:n_components] = 1e4 * torch.sign(torch.randn(n_components))
    elif channels == "smallest scale":
        scale_channels.fill_(-1e4)
    elif channels == "largest scale":
        noise_channels.zero_()  # else the matrices are singular to float32
        scale_channels.fill_(1e4)
    with torch.no_grad():
        mixture = head(torch.zeros(6, dtype=dtype))
        away = mixture.covariance.expand((n_components,)).colorize(torch.full((n_components, DIM), 1e6, dtype=dtype))
    steps = torch.tensor([[-1.0], [0.0], [1.0]], dtype=dtype)
    y = (mixture.locs[0] + away[0] * steps).requires_grad_()
    log_prob = head.log_prob(torch.randn(3, 6, dtype=dtype), y)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert y.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_weight_of_zero_has_finite_gradients():
    logits = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)
    locs = torch.randn(3, 2, requires_grad=True)
    mixture = GaussianMixture(logits, locs, IsotropicCovariance(torch.ones(3)))
    others = GaussianMixture(torch.zeros(2), locs[[0, 2]], IsotropicCovariance(torch.ones(2)))
    y = torch.randn(4, 2)
    assert_close(mixture.log_prob(y), others.log_prob(y))
    mixture.log_prob(y).sum().backward()
    assert logits.grad.isfinite().all()
    assert locs.grad.isfinite().all()


# Moments and samples


@every_noise
@every_batch
def test_moments_agree_with_dense_torch(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    assert_close(mixture.mean, dense(mixture).mean)
    assert_close(mixture.variance, dense(mixture).variance)
    assert_close(mixture.stddev, dense(mixture).variance.sqrt())
    assert_close(mixture.covariance_matrix.diagonal(dim1=-2, dim2=-1), mixture.variance)


def test_gradients_of_standard_deviations():
    logits, locs = torch.randn(2, 3).double().requires_grad_(), torch.randn(2, 3, 2).double().requires_grad_()
    scale = (torch.rand(2, 3, 2).double() + 0.5).requires_grad_()

    def stddev(logits, locs, scale):
        return GaussianMixture(logits, locs, DiagonalCovariance(scale)).stddev

    assert torch.autograd.gradcheck(stddev, (logits, locs, scale))
    absent = logits.detach().index_fill(1, torch.tensor([1]), -math.inf).requires_grad_()
    (gradient,) = torch.autograd.grad(stddev(absent, locs, scale).sum(), absent)
    (expected,) = torch.autograd.grad(stddev(logits[:, [0, 2]], locs[:, [0, 2]], scale[:, [0, 2]]).sum(), logits)
    assert_close(gradient, expected)


@every_noise
def test_samples_have_the_moments(noise):
    """Within 5 Monte Carlo standard errors, for first and all second moments."""
    mixture = make_mixture(noise)
    y = mixture.sample((20_000,))
    assert y.shape == (20_000, 5, DIM)
    centred = y - mixture.mean
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    for draws, expected in [(y, mixture.mean), (products, mixture.covariance_matrix)]:
        standard_error = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - expected).abs() < 5 * standard_error).all()


@every_noise
def test_samples_follow_the_density(noise):
    """By Gibbs' identity E[p(y)^-1 q(y)] = 1 for any density q, here a component of its own."""
    mixture = make_mixture(noise, ())
    y = mixture.sample((20_000,))
    weights = (mixture.component_log_prob(y) - mixture.log_prob(y).unsqueeze(-1)).exp()
    standard_error = weights.std(0) / math.sqrt(len(y))
    assert ((weights.mean(0) - 1).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n_components", [1, 4, 40])
@pytest.mark.parametrize(("sample_shape", "batch_shape"), [((60_000,), ()), ((300, 200), (2,)), ((20_000,), (3, 1))])
def test_components_are_drawn_by_their_weights(dtype, n_components, sample_shape, batch_shape):
    """Each as often as its weight says, within 5 standard errors; never one of weight zero, wherever it stands."""
    logits = torch.linspace(-7, 0, n_components).expand(*batch_shape, -1).clone()
    if n_components > 1:
        logits[..., [0, n_components // 2, -1]] = -math.inf
        logits[..., 1] = -5.0
    locs = torch.arange(float(n_components)).unsqueeze(-1)
    mixture = GaussianMixture(
        logits.to(dtype), locs.to(dtype), IsotropicCovariance(torch.full((1,), 1e-3, dtype=dtype))
    )
    y = mixture.sample(sample_shape)
    assert y.shape == (*sample_shape, *batch_shape, 1)
    chosen = y.float().round().reshape(-1, *batch_shape).long()
    frequency = torch.nn.functional.one_hot(chosen, n_components).double().mean(0)
    weights = mixture.logits.double().softmax(-1)
    assert not frequency[weights == 0].any()
    assert ((frequency - weights).abs() <= 5 * (weights * (1 - weights) / len(chosen)).sqrt() + 1e-12).all()


def test_sampling_needs_no_gradient_and_no_component_of_weight_zero():
    logits = torch.tensor([0.0, -math.inf], requires_grad=True)
    mixture = GaussianMixture(logits, torch.tensor([[0.0], [100.0]]), IsotropicCovariance(torch.ones(1)))
    y = mixture.sample((2, 500))
    assert not y.requires_grad
    assert y.shape == (2, 500, 1)
    assert y.max() < 50


@pytest.mark.parametrize("distance", [1e10, 1e18])
def test_weights_far_from_all_components_are_those_of_the_nearest(distance):
    """In single precision squares overflow there; the same parameters in double precision tell what is right."""
    scale, correlation = torch.tensor([1.0, 1.5, 0.7]), torch.eye(3)
    correlation[0, 1] = correlation[1, 0] = 1 - 1e-6
    covariance = FullCovariance.from_matrix(scale.square()[:, None, None] * correlation)
    single = GaussianMixture(torch.tensor([0.2, 0.3, 0.5]).log().requires_grad_(), torch.eye(3), covariance)
    double = GaussianMixture(single.logits.double(), single.locs.double(), covariance.map(lambda t, n: t.double()))
    y = distance * torch.tensor([1.0, -1.0, 0.5])
    missing = torch.tensor([[1.0, -1.0, math.nan], [math.nan, math.nan, math.nan]]) * distance
    pairs = [
        (single.condition(y[:2], [0, 1]).logits.exp(), double.condition(y[:2].double(), [0, 1]).logits.exp()),
        (single.responsibilities(y), double.responsibilities(y.double())),
        (single.responsibilities(missing), double.responsibilities(missing.double())),
        (single.rosenblatt(y), double.rosenblatt(y.double())),
    ]
    for got, expected in pairs:
        assert_close(got.double(), expected)
        (gradient,) = torch.autograd.grad(got.square().sum(), single.logits, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("noise", [Diagonal(), Full()], ids=str)
def test_product_of_mixtures_far_apart_has_weights(noise):
    left, right = make_mixture(noise), make_mixture(noise).affine(1e23, 1.3)
    single = [
        GaussianMixture(m.logits.float(), m.locs.float(), m.covariance.map(lambda t, n: t.float()))
        for m in (left, right)
    ]
    expected = left.product(right).mixture.logits.exp()
    assert_close(single[0].product(single[1]).mixture.logits.exp().double(), expected, rtol=1e-3, atol=1e-3)


# Closed forms


@every_noise
@pytest.mark.parametrize("given", [[0], [3, 1], [0, 1, 2], [2, 3, 0], [-1]])
def test_chain_rule(noise, given):
    mixture = make_mixture(noise)
    y, free = (
        torch.randn(5, DIM, dtype=torch.float64),
        [d for d in range(DIM) if d not in [g % DIM for g in given]],
    )
    evidence = mixture.marginal(given).log_prob(y[..., given])
    rest = mixture.condition(y[..., given], given).log_prob(y[..., free])
    assert_close(evidence + rest, mixture.log_prob(y), rtol=0, atol=1e-10)


@every_noise
@pytest.mark.parametrize("dims", [[0], [3, 1], [2, 0, 3, 1]])
def test_marginal_agrees_with_dense_torch(noise, dims):
    mixture = make_mixture(noise)
    y = torch.randn(5, len(dims), dtype=torch.float64)
    matrix = mixture.covariance.matrix().expand(5, 3, -1, -1)[..., dims, :][..., dims]
    components = torch.distributions.MultivariateNormal(mixture.locs[..., dims], matrix)
    expected = torch.distributions.MixtureSameFamily(mixture.mixture_distribution, components)
    assert_close(mixture.marginal(dims).log_prob(y), expected.log_prob(y), rtol=0, atol=1e-10)


def test_condition_on_many_values_at_once():
    mixture = make_mixture(Full())
    values = torch.randn(7, 5, 1, dtype=torch.float64)
    together = mixture.condition(values, 2)
    assert together.batch_shape == (7, 5)
    y = torch.randn(7, 5, 3, dtype=torch.float64)
    for i in range(7):
        assert_close(together.log_prob(y)[i], mixture.condition(values[i], 2).log_prob(y[i]))


@every_noise
@pytest.mark.parametrize("scale", [2.0, -0.5, [2.0, -1.0, 0.5, 3.0]], ids=str)
def test_affine_changes_variables(noise, scale):
    mixture = make_mixture(noise)
    scale = torch.tensor(scale, dtype=torch.float64)
    shift, y = torch.randn(5, DIM, dtype=torch.float64), torch.randn(5, DIM, dtype=torch.float64)
    log_jacobian = scale.abs().log().expand(DIM).sum()
    moved = mixture.affine(shift, scale)
    assert_close(moved.log_prob(shift + scale * y), mixture.log_prob(y) - log_jacobian, rtol=0, atol=1e-10)


@every_noise
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_density_is_the_mean_density(noise, dim, weighted):
    mixture = make_mixture(noise, (2, 3))
    size = mixture.batch_shape[dim]
    weights = torch.arange(1.0, size + 1, dtype=torch.float64) if weighted else None
    probs = torch.ones(size, dtype=torch.float64) / size if weights is None else weights / weights.sum()
    pooled = mixture.pool(dim, weights)
    y = torch.randn(*pooled.batch_shape, DIM, dtype=torch.float64)
    densities = mixture.log_prob(y.unsqueeze(dim % 2)).exp().movedim(dim, -1)
    assert pooled.n_components == size * mixture.n_components
    assert_close(pooled.log_prob(y), (densities * probs).sum(-1).log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pooling_has_gradients_at_weights_of_zero(dtype):
    r""":math:`\partial \log p(y) / \partial a_s = p_s(y) / p(y) - 1`, for weights that add up to 1."""
    locs = torch.tensor([[[0.0]], [[1.0]], [[2.0]]], dtype=dtype)
    mixture = GaussianMixture(torch.zeros(3, 1, dtype=dtype), locs, DiagonalCovariance(torch.ones(1, 1, dtype=dtype)))
    weights = torch.tensor([0.0, 0.5, 0.5], dtype=dtype, requires_grad=True)
    pooled, y = mixture.pool(0, weights), torch.tensor([0.3], dtype=dtype)
    densities = stats.norm.pdf(0.3, [0.0, 1.0, 2.0])
    expected = densities / densities[1:].mean() - 1  # 0.877, 0.537, -0.537
    (gradient,) = torch.autograd.grad(pooled.log_prob(y), weights, retain_graph=True)
    assert_close(gradient, torch.tensor(expected, dtype=dtype))
    (gradient,) = torch.autograd.grad(pooled.mean, weights)
    assert_close(gradient, torch.tensor([-1.5, -0.5, 0.5], dtype=dtype))
    assert mixture.pool(0, weights.detach()).logits[0] == -math.inf


@every_noise
def test_expand_repeats(noise):
    mixture = make_mixture(noise, (3,))
    expanded = mixture.expand((2, 3))
    y = torch.randn(2, 3, DIM, dtype=torch.float64)
    assert expanded.batch_shape == (2, 3)
    assert isinstance(expanded, GaussianMixture)
    assert_close(expanded.log_prob(y), torch.stack([mixture.log_prob(part) for part in y]))
    assert expanded.sample((4,)).shape == (4, 2, 3, DIM)


@every_noise
def test_temperature(noise):
    mixture = make_mixture(noise)
    tempered = mixture.temper(0.25)
    assert_close(tempered.mixture_distribution.probs, (4 * mixture.logits).softmax(-1))
    assert_close(tempered.covariance.matrix(), 0.25 * mixture.covariance.matrix())
    assert_close(tempered.locs, mixture.locs)


@pytest.mark.parametrize("temperature", [1e-39, 1e-60, 1e39])
def test_temperatures_out_of_range_of_single_precision(temperature):
    logits = torch.tensor([0.1, 0.7, -math.inf, 0.5], requires_grad=True)
    mixture = GaussianMixture(logits, torch.zeros(4, 1), IsotropicCovariance(torch.ones(1)))
    tempered = mixture.temper(temperature)
    expected = [0.0, 1.0, 0.0, 0.0] if temperature < 1 else [1 / 3, 1 / 3, 0.0, 1 / 3]
    assert_close(tempered.logits.exp(), torch.tensor(expected))
    assert_close(tempered.covariance.stddev(), torch.full((1, 1), math.sqrt(temperature)))
    assert torch.autograd.grad(tempered.logits[1], logits)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1e-100, 1e100])
def test_temperatures_without_a_root_are_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature: expected a number with a root in torch\.float32, got 1e"):
        two_components().temper(temperature)


@given(st.permutations(range(DIM)), st.integers(1, DIM - 1), st.integers(0, 2**31))
def test_chain_rule_in_any_order(order, cut, seed):
    mixture = make_mixture(Full(), ())
    torch.manual_seed(seed)
    y = 3 * torch.randn(DIM, dtype=torch.float64)
    given, free = order[:cut], sorted(order[cut:])
    total = mixture.marginal(given).log_prob(y[given]) + mixture.condition(y[given], given).log_prob(y[free])
    assert_close(total, mixture.log_prob(y), rtol=1e-10, atol=1e-10)


# Bad input


@pytest.mark.parametrize(
    ("logits", "locs", "covariance", "message"),
    [
        (
            torch.zeros(2),
            torch.zeros(3, 1),
            IsotropicCovariance(torch.ones(1)),
            "expected 2 components, got 3",
        ),
        (torch.zeros(2), torch.zeros(2), IsotropicCovariance(torch.ones(1)), "locs: expected shape"),
        (torch.zeros(0), torch.zeros(0, 1), IsotropicCovariance(torch.ones(1)), "logits: expected shape"),
        (torch.zeros(2), torch.zeros(2, 1), IsotropicCovariance(torch.ones(3)), "component axis of 1 or 2"),
        (
            torch.zeros(2),
            torch.zeros(2, 1),
            DiagonalCovariance(torch.ones(2, 3)),
            "expected one over 1 outputs, got 3",
        ),
        (
            torch.zeros(2, dtype=torch.long),
            torch.zeros(2, 1),
            IsotropicCovariance(torch.ones(1)),
            "floating point",
        ),
        (
            torch.tensor([0.0, math.nan]),
            torch.zeros(2, 1),
            IsotropicCovariance(torch.ones(1)),
            "logits: expected",
        ),
        (
            torch.full((2,), -math.inf),
            torch.zeros(2, 1),
            IsotropicCovariance(torch.ones(1)),
            "logits: expected",
        ),
        (
            torch.zeros(2),
            torch.full((2, 1), math.inf),
            IsotropicCovariance(torch.ones(1)),
            "locs: expected finite",
        ),
        (torch.zeros(2), torch.zeros(2, 1), IsotropicCovariance(torch.zeros(1)), "expected positive finite"),
        (
            torch.zeros(2),
            torch.zeros(2, 1),
            DiagonalCovariance(-torch.ones(2, 1)),
            "expected positive finite",
        ),
    ],
)
def test_bad_parameters_are_named(logits, locs, covariance, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(logits, locs, covariance)


def test_validation_can_be_switched_off_and_is_inherited():
    locs = torch.full((2, 1), math.nan)
    mixture = GaussianMixture(torch.zeros(2), locs, IsotropicCovariance(torch.ones(1)), validate_args=False)
    assert mixture.expand((3,))._validate_args is False
    assert two_components().marginal(0)._validate_args is True


def test_validation_outlives_a_compilation():
    """In a process of its own, since torch.compile ends the validation of torch's distributions for good."""
    code = """
import pyro, torch
from pyro_mdn import DiagonalCovariance, GaussianMixture

def density(x):
    covariance = DiagonalCovariance(x.exp().unsqueeze(-1))
    return GaussianMixture(x, x.unsqueeze(-1), covariance).affine(1.0, 2.0).log_prob(x[..., :1])

def is_refused():
    try:
        mixture = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), DiagonalCovariance(-torch.ones(1, 1)))
    except ValueError as error:
        return True
    return mixture._validate_args

x = torch.randn(2, 3)
compiled = torch.compile(density, backend="eager", fullgraph=True)(x)
print(torch.allclose(compiled, density(x)), torch.distributions.Distribution._validate_args, is_refused())
with pyro.validation_enabled(False):
    print(is_refused())
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "True False True\nFalse\n"


@every_noise
def test_mixtures_are_made_and_asked_under_transforms(noise):
    """Values cannot be looked at there, so they are not checked."""
    mixture = make_mixture(noise, (5,))
    covariance = mixture.covariance.expand((5, mixture.covariance.batch_shape[-1]))
    y, parameters = torch.randn(5, DIM, dtype=torch.float64), (mixture.logits, mixture.locs, *covariance.tensors())

    def density(y, logits, locs, *tensors):
        stored = iter(tensors)
        made = GaussianMixture(logits, locs, covariance.map(lambda t, n: next(stored)))
        return made.affine(0.5, 2.0).log_prob(y)

    expected = mixture.affine(0.5, 2.0).log_prob(y)
    assert_close(torch.vmap(density)(y, *parameters), expected)
    slope = torch.func.jacfwd(lambda row: mixture.expand((5,)).affine(0.5, 2.0).log_prob(row).sum())(y[0])
    row = y[0].clone().requires_grad_()
    assert_close(slope, *torch.autograd.grad(mixture.affine(0.5, 2.0).log_prob(row).sum(), row))


@pytest.mark.parametrize("dims", [[], [0, 0], [4], [-5], [0, -4]])
def test_bad_index_sets_are_refused(dims):
    with pytest.raises(ValueError, match="expected distinct indices of 4 outputs"):
        make_mixture(Diagonal()).marginal(dims)


def test_bad_arguments_are_refused():
    mixture = make_mixture(Diagonal())
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 4\)"):
        mixture.log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"batch shapes: expected some that broadcast, got \(3,\), \(5,\)"):
        mixture.log_prob(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="stay free"):
        mixture.condition(torch.zeros(5, 4), [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 2\)"):
        mixture.condition(torch.zeros(5, 3), [0, 1])
    with pytest.raises(ValueError, match="other than zero"):
        mixture.affine(0.0, 0.0)
    with pytest.raises(ValueError, match="last dimension of 1 or 4"):
        mixture.affine(torch.zeros(3), 1.0)
    for dims in ([True, False], [1.7], "01"):
        with pytest.raises(ValueError, match="dims: expected integers"):
            mixture.marginal(dims)
    with pytest.raises(ValueError, match="shift, scale: expected finite numbers"):
        mixture.affine(math.nan, 1.0)
    with pytest.raises(ValueError, match="expected one of 1 batch dimensions"):
        mixture.pool(1)
    with pytest.raises(ValueError, match="expected 5 finite numbers"):
        mixture.pool(0, torch.ones(4))
    with pytest.raises(ValueError, match="expected a positive number"):
        mixture.temper(0.0)
