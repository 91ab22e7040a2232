import math

import pytest
import torch
from cases import DIM, NOISE, make_head, make_mixture
from scipy import stats
from torch.autograd import forward_ad
from torch.testing import assert_close

from pyro_mdn import (
    DiagonalCovariance,
    Full,
    FullCovariance,
    GaussianMixture,
    IsotropicCovariance,
    LowRank,
    LowRankCovariance,
)

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_rosenblatt_is_the_chain_of_conditional_cdfs(noise, batch_shape):
    mixture = make_mixture(noise, batch_shape)
    y = mixture.sample((4,))
    u = mixture.rosenblatt(y)
    assert_close(u[..., 0], mixture.marginal(0).cdf(y[..., :1])[..., 0])
    for d in range(1, DIM):
        given = mixture.marginal([*range(d), d]).condition(y[..., :d], range(d))
        assert_close(u[..., d], given.cdf(y[..., d : d + 1])[..., 0])


@every_noise
def test_inverse_rosenblatt(noise):
    mixture = make_mixture(noise)
    u = torch.rand(7, 5, DIM, dtype=torch.float64)
    y = mixture.inverse_rosenblatt(u)
    assert_close(mixture.rosenblatt(y), u, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="expected probabilities"):
        mixture.inverse_rosenblatt(u + 1)


@every_noise
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_samples_are_uniform_after_transport(noise, dim):
    mixture = make_mixture(noise, (), dim)
    draws = mixture.sample((4000,))
    u = mixture.rosenblatt(draws)
    assert min(stats.kstest(column, "uniform").pvalue for column in u.T.numpy()) > 1e-3 / dim
    correlation = torch.corrcoef(u.T) if dim > 1 else torch.ones(1, 1)
    assert (correlation - torch.eye(dim)).abs().max() < 5 / math.sqrt(4000)


@every_noise
def test_jacobian_of_rosenblatt_is_the_density(noise):
    mixture = make_mixture(noise, ())
    y = mixture.sample()
    jacobian = torch.autograd.functional.jacobian(mixture.rosenblatt, y)
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, mixture.log_prob(y))
    assert_close(jacobian, jacobian.tril())


STRUCTURES = ["isotropic", "diagonal", "low_rank", "full"]


def build(structure, dim, logits, locs, raw):
    """Mixture of three overlapping components from free parameters, ``raw`` of shape (3, dim, dim + 1)."""
    scale = 0.6 + 0.3 * raw[..., 0].sigmoid()
    covariance = {
        "isotropic": lambda: IsotropicCovariance(scale[..., 0]),
        "diagonal": lambda: DiagonalCovariance(scale),
        "low_rank": lambda: LowRankCovariance(0.5 * raw[..., 1:2], scale),
        "full": lambda: FullCovariance.from_scale_tril(scale.diag_embed() + 0.3 * raw[..., 1:].tril(-1)),
    }[structure]()
    return GaussianMixture(logits, locs, covariance)


def parameters(dim):
    generator = torch.Generator().manual_seed(dim)
    shapes = [(3,), (3, dim), (3, dim, dim + 1)]
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [draws[0].mul(0.5).requires_grad_(), draws[1].mul(0.7).requires_grad_(), draws[2].requires_grad_()]


def oscillation(mixture, frequency):
    """E[cos(f·y)] in closed form, from the characteristic function."""
    matrix = mixture.covariance.matrix()
    damping = torch.exp(-0.5 * torch.einsum("i,kij,j->k", frequency, matrix, frequency))
    return (mixture.logits.exp() * damping * torch.cos(mixture.locs @ frequency)).sum(-1)


def polynomial(mixture, direction):
    """E[(a·y)³ + (a·y)²] in closed form."""
    mean = mixture.locs @ direction
    variance = torch.einsum("i,kij,j->k", direction, mixture.covariance.matrix(), direction)
    return (mixture.logits.exp() * (mean**3 + 3 * mean * variance + mean**2 + variance)).sum(-1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("function", ["polynomial", "oscillating"])
def test_pathwise_gradients_are_those_of_the_closed_form(structure, dim, function):
    """At 1e5 draws, in fifty batches, within 4 standard errors."""
    values = parameters(dim)
    a = torch.linspace(0.5, 1.0, dim, dtype=torch.float64) / math.sqrt(dim)
    closed, sampled = {
        "polynomial": (polynomial, lambda y: (y @ a) ** 3 + (y @ a) ** 2),
        "oscillating": (lambda mixture, a: oscillation(mixture, 2 * a), lambda y: torch.cos(2 * y @ a)),
    }[function]
    expected = torch.autograd.grad(closed(build(structure, dim, *values), a), values)
    batches, per_batch = 50, 2000
    # Every batch has parameters of its own, so that one backward pass gives all the batch gradients.
    repeated = [v.detach().expand(batches, *v.shape).clone().requires_grad_() for v in values]
    draws = build(structure, dim, *repeated).rsample((per_batch,))
    gradients = torch.autograd.grad(sampled(draws).mean(0).sum(), repeated)
    for gradient, target in zip(gradients, expected, strict=True):
        standard_error = gradient.std(0) / math.sqrt(batches)
        assert ((gradient.mean(0) - target).abs() <= 4 * standard_error + 1e-12).all()


def test_pathwise_gradients_vary_less_than_those_of_the_score_function():
    """Same problem, same draws: the mean variance ratio over locations and covariances is well above 1."""
    values = parameters(2)
    a = torch.tensor([0.5, 1.0], dtype=torch.float64) / math.sqrt(2)
    repeated = [v.detach().expand(5000, *v.shape).clone().requires_grad_() for v in values]
    mixture = build("full", 2, *repeated)
    draws = mixture.rsample()
    objective = (draws @ a) ** 3 + (draws @ a) ** 2
    pathwise = torch.autograd.grad(objective.sum(), repeated, retain_graph=True)
    score = torch.autograd.grad((mixture.log_prob(draws.detach()) * objective.detach()).sum(), repeated)
    ratios = [(s.var(0) / p.var(0))[p.var(0) > 0].mean() for s, p in zip(score[1:], pathwise[1:], strict=True)]
    assert min(ratios) > 3


@pytest.mark.parametrize("case", ["coincident", "one component", "weight near zero", "weight zero", "far modes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rsample_is_finite_where_it_is_delicate(case, dtype):
    logits, locs = torch.zeros(3, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    if case == "coincident":
        locs = torch.ones(3, 2, dtype=dtype)
    elif case == "one component":
        logits, locs = logits[:1], locs[:1]
    elif case == "weight near zero":
        logits[0] = -80.0
    elif case == "weight zero":
        logits[0] = -math.inf
    elif case == "far modes":
        locs[0] += 1e4
    scale_tril = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=dtype).expand(len(logits), 2, 2).clone()
    values = [v.requires_grad_() for v in (logits, locs, scale_tril)]
    mixture = GaussianMixture(logits, locs, FullCovariance.from_scale_tril(scale_tril))
    draws = mixture.rsample((1000,))
    (draws.square().sum(-1)).mean().backward()
    assert draws.isfinite().all()
    assert all(v.grad.isfinite().all() for v in values)


def test_one_component_is_the_usual_reparameterisation():
    """With K = 1 the derivative of a draw is that of loc + scale · noise."""
    loc = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    draws = GaussianMixture(torch.zeros(1).double(), loc, DiagonalCovariance(scale)).rsample((6,))
    gradients = torch.autograd.grad(draws.sum(), [loc, scale])
    assert_close(gradients[0], torch.full((1, 2), 6.0, dtype=torch.float64))
    assert_close(gradients[1], (draws / scale).sum(0, keepdim=True).detach())


@every_noise
def test_rsample_draws_what_sample_draws(noise):
    mixture = make_mixture(noise)
    torch.manual_seed(5)
    expected = mixture.sample((3,))
    torch.manual_seed(5)
    assert torch.equal(mixture.rsample((3,)), expected)
    mixture.locs.requires_grad_()
    torch.manual_seed(5)
    assert torch.equal(mixture.rsample((3,)).detach(), expected)
    assert mixture.has_rsample


@pytest.mark.parametrize("noise", [Full(), LowRank(1)], ids=str)
def test_rosenblatt_gradients(noise):
    mixture = make_mixture(noise, (2,), dim=3)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    tensors = [t.clone().requires_grad_() for t in (mixture.logits, mixture.locs, *mixture.covariance.tensors())]

    def rosenblatt(y, logits, locs, *stored):
        values = iter(stored)
        return GaussianMixture(logits, locs, mixture.covariance.map(lambda t, n: next(values))).rosenblatt(y)

    assert torch.autograd.gradcheck(rosenblatt, (y, *tensors), fast_mode=True)


@every_noise
def test_forward_mode_derivatives(noise):
    """Those of draws and quantiles are those of backward mode, and of a shift of all locations exactly 1."""
    mixture = make_mixture(noise, (2,))

    def at(locs, function):
        moved = GaussianMixture(mixture.logits, locs, mixture.covariance, validate_args=False)
        torch.manual_seed(0)
        return function(moved)

    direction = torch.randn_like(mixture.locs)
    for function in (GaussianMixture.rsample, lambda moved: moved.icdf(0.3)):
        _, forward = torch.func.jvp(lambda locs, f=function: at(locs, f), (mixture.locs,), (direction,))
        jacobian = torch.autograd.functional.jacobian(lambda locs, f=function: at(locs, f), mixture.locs)
        assert_close(forward, (jacobian * direction).flatten(2).sum(-1))
        with forward_ad.dual_level():
            shifted = forward_ad.make_dual(mixture.locs, torch.ones_like(mixture.locs))
            assert_close(forward_ad.unpack_dual(at(shifted, function)).tangent, torch.ones(2, DIM, dtype=torch.float64))


@every_noise
def test_forward_mode_derivatives_of_densities(noise):
    """Those along a shift of all locations or features are sums of those of backward mode."""
    head, mixture = make_head(noise), make_mixture(noise)
    y, features = mixture.sample(), torch.randn(5, 6, dtype=torch.float64)

    def of_locs(locs):
        return GaussianMixture(mixture.logits, locs, mixture.covariance, validate_args=False).log_prob(y)

    for function, point in [(of_locs, mixture.locs), (lambda features: head.log_prob(features, y), features)]:
        with forward_ad.dual_level():
            along = forward_ad.unpack_dual(function(forward_ad.make_dual(point, torch.ones_like(point)))).tangent
        gradient = torch.autograd.functional.jacobian(lambda p, f=function: f(p).sum(), point)
        assert_close(along, gradient.flatten(1).sum(-1))


@every_noise
def test_nothing_follows_an_infinite_output(noise):
    mixture = make_mixture(noise)
    u = torch.full((5, DIM), 0.5, dtype=torch.float64)
    u[0, 1], u[1, 1] = 0.0, 1.0
    y = mixture.inverse_rosenblatt(u)
    assert y[:2, 1].tolist() == [-math.inf, math.inf]
    assert y[:2, 2:].isnan().all()
    assert y[2:].isfinite().all()
    assert y[:, 0].isfinite().all()
