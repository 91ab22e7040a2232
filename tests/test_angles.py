"""Angles: against sums over many images, by quadrature and on grids, and in everything that takes a mixture."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import BATCH_SHAPES
from torch.testing import assert_close

from pyro_mdn import (
    Angle,
    Chain,
    ContinuousRankedProbability,
    DeepEnsemble,
    DiagonalCovariance,
    Full,
    Isotropic,
    Laplace,
    LowRank,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeLogLikelihood,
    Normal,
    NormalComponents,
    PerOutput,
    Prediction,
    StudentT,
    Targets,
    VonMises,
    bayesianize,
    decisions,
    fit,
    posterior_predictive,
    scores,
    uncertainty,
)
from pyro_mdn.calibration import coverage_table
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.units.circular.circles import Circle, Circles
from pyro_mdn.distributions.units.circular.wrapped import WrappedComponents, wrapped_components
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.training.batches.target_grids import kept_inside, points_in_cells
from pyro_mdn.training.schedules import blur_targets

TURN = 2 * math.pi
FAMILIES = {"normal": Normal(), "student_t": StudentT(df=30.0), "laplace": Laplace()}
TRANSFORMS = {"radians": Angle(), "degrees": Angle(360.0, 0.0), "hours": Angle(24.0, -3.0)}
CASES = {
    "radians": (Angle(), Normal()),
    "degrees": (Angle(360.0, 0.0), Normal()),
    "hours": (Angle(24.0, -3.0), Normal()),
    "student_t": (Angle(), StudentT(df=30.0)),
    "laplace": (Angle(24.0, 0.0), Laplace()),
    "von_mises": (Angle(360.0, 0.0), VonMises()),
}
every_case = pytest.mark.parametrize(("transform", "family"), CASES.values(), ids=CASES)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_circle = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def make_head(transform="angle", dim=1, n_components=3, std=0.4, turns=0, **settings):
    torch.manual_seed(3)
    head = MixtureHead(4, dim, n_components, target_transform=transform, **settings).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        head.linear.bias[n_components : n_components * (1 + dim)] += 7.0 * turns  # locations are any number
    return head


def make_mixture(transform="angle", batch_shape=(5,), **settings):
    with torch.no_grad():
        return make_head(transform, **settings)(torch.randn(*batch_shape, 4, dtype=torch.float64))


RADIANS = Circle(TURN, -math.pi)


def normal(weights, locs, scales, circle=RADIANS):
    """A mixture of wrapped normals, of one output."""
    weights, locs, scales = (torch.tensor(t, dtype=torch.float64) for t in (weights, locs, scales))
    base = NormalComponents(locs[:, None], DiagonalCovariance(scales[:, None]))
    return Mixture(weights.log(), wrapped_components(base, Circles((circle,))))


def grid(mixture, count=4001):
    """Angles over the period, ``(count, *batch, 1)``, and trapezoidal weights, which are all but exact for them."""
    circle = mixture.components.circles.of_outputs[0]
    y = circle.start + circle.period * torch.arange(count, dtype=torch.float64) / count
    return y.reshape(-1, *(1,) * len(mixture.batch_shape), 1).expand(-1, *mixture.batch_shape, 1), circle.period / count


def by_images(mixture, y, reach=20):
    """Density of one angle, from 41 images and the parameters on the line by scipy."""
    locs, scale, _ = mixture.components.base.univariate()
    period = mixture.components.circles.of_outputs[0].period
    turns = np.arange(-reach, reach + 1.0)
    z = (y + period * torch.from_numpy(turns).reshape(-1, *(1,) * y.ndim)).unsqueeze(-1).numpy()
    weights = mixture.logits.exp().unsqueeze(-2).numpy()
    return (weights * scipy.stats.norm(locs.numpy(), scale.numpy()).pdf(z)).sum((0, -1)).squeeze(-1)


def built(mixture):
    """The same mixture from its parameters, which does not know the outputs of a head that they came from."""
    return mixture.with_components(mixture.components)


def random_angles(transform, *shape):
    circle = transform.circles(1).of_outputs[0]
    return circle.start + circle.period * torch.rand(*shape, dtype=torch.float64)


# Density


@every_circle
@pytest.mark.parametrize("shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
def test_density_is_a_sum_of_images(transform, shape):
    mixture = make_mixture(transform, shape, turns=3)
    y = random_angles(transform, 7, *shape, 1)
    np.testing.assert_allclose(mixture.log_prob(y).exp().numpy(), by_images(mixture, y), rtol=1e-9, atol=1e-10)
    assert_close(mixture.log_prob(y), (mixture.logits + mixture.component_log_prob(y)).logsumexp(-1))
    assert_close(mixture.responsibilities(y), (mixture.logits + mixture.component_log_prob(y)).softmax(-1))


def test_density_is_accurate_up_to_scales_of_three_radians():
    for scale in (0.01, 1.0, 2.0, 3.0):
        mixture = normal([0.5, 0.5], [-3.1, 3.0], [scale, scale])
        y, _ = grid(mixture)
        assert np.abs(mixture.log_prob(y).exp().numpy() - by_images(mixture, y)).max() < 1e-9
    uniform = 1 / TURN
    assert bool(((mixture.log_prob(y).exp() - uniform).abs() < 0.023 * uniform).all())


@every_case
def test_density_integrates_to_one_and_closes(transform, family):
    mixture = make_mixture(transform, (4,), family=family)
    y, step = grid(mixture, 20_001)
    total = step * mixture.log_prob(y).exp().sum(0)
    assert_close(total, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-5)  # Laplace's density has a kink
    circle = transform.circles(1).of_outputs[0]
    ends = [torch.full((4, 1), end, dtype=torch.float64) for end in (circle.start, circle.end)]
    assert_close(mixture.log_prob(ends[0]), mixture.log_prob(ends[1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("transform", ["angle", ["angle", "standardize"], [Angle(360.0), "angle"]], ids=str)
def test_wide_components_integrate_to_one(transform):
    """Scales of more than three radians, which tempering gives, have images at more turns."""
    dim = 1 if transform == "angle" else 2
    mixture = make_mixture(transform, (), dim=dim, n_components=2, noise=Full()).temper(60.0)
    locs, scale, _ = mixture.components.inner.univariate()
    periods = mixture.components.circles.periods(locs)
    assert (scale.mT * TURN / periods)[..., 0].max() > 5
    if dim == 1:
        y, step = grid(mixture)
        np.testing.assert_allclose(mixture.log_prob(y).exp().numpy(), by_images(mixture, y, 60), rtol=1e-8)
    else:
        second = (-math.pi, math.pi, 30) if transform[1] == "angle" else (-150.0, 150.0, 400)
        ends = [(-0.5 * periods[0].item(), 0.5 * periods[0].item(), 30), second]
        axes = [low + (high - low) * torch.arange(n, dtype=torch.float64) / n for low, high, n in ends]
        y, step = torch.cartesian_prod(*axes), math.prod((high - low) / n for low, high, n in ends)
    assert (step * mixture.log_prob(y).exp().sum(0)).item() == pytest.approx(1, abs=1e-8)
    assert_close(mixture.univariate().log_prob(y[:5])[..., 0], mixture.marginal(0).log_prob(y[:5, :1]))
    with pytest.raises(ValueError, match="temper: expected scales of angles up to 30 radians, got "):
        mixture.temper(1e4)
    wide = mixture.with_components(replace(mixture.components, base=mixture.components.base.widen(torch.tensor(20.0))))
    assert_close(wide.temper(1.0).stddev, wide.stddev)  # as every draw of a network asks for


@every_family
@pytest.mark.parametrize("dim", [1, 2])
def test_a_head_has_the_density_of_its_mixture(family, dim):
    transform = ["angle", "log"][:dim] if dim > 1 else "angle"
    head, features = make_head(transform, dim, family=family), torch.randn(5, 4, dtype=torch.float64)
    head.shift[0] = 2.5
    y = head(features).sample((3,))
    assert_close(head.log_prob(features, y), built(head(features)).log_prob(y), rtol=1e-7, atol=1e-7)
    y[0, 1] = torch.nan
    y[1, 2, 0] = torch.nan
    expected = torch.stack(
        [torch.stack([m.log_prob(v) for m, v in zip(head(features), row, strict=True)]) for row in y]
    )
    assert_close(head.log_prob(features, y), expected, rtol=1e-7, atol=1e-7)
    assert_close(expected[0, 1].item(), 0.0)


@pytest.mark.parametrize("noise", [Full(), LowRank(1), Isotropic(), None], ids=str)
def test_gradients(noise):
    head, features = make_head(["angle", "log"], 2, 2, noise=noise), torch.randn(3, 4, dtype=torch.float64)
    y = head(features).sample().requires_grad_()
    bias = head.linear.bias.detach().requires_grad_()

    def log_prob(bias, y):
        with pyro.validation_enabled(False):
            return built(torch.func.functional_call(head, {"linear.bias": bias}, features)).log_prob(y)

    def by_head(bias, y):
        head.linear.bias.data = bias
        channels = head.channels(features) - head.linear.bias.detach().unsqueeze(-1) + bias.unsqueeze(-1)
        return head.log_density(head.split(channels, None), y, head.units)

    assert torch.autograd.gradcheck(by_head, (bias, y), fast_mode=True)
    assert torch.autograd.gradcheck(log_prob, (bias, y), fast_mode=True)
    assert_close(log_prob(bias, y), by_head(bias, y), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("transform", [["angle", "standardize", "angle"], ["standardize", "angle"]], ids=str)
@pytest.mark.parametrize("noise", [Full(), LowRank(1)], ids=str)
def test_values_of_other_outputs_far_out_move_the_images(transform, noise):
    """Far out, where an angle is expected given the other output is many turns away."""
    dim, angles = len(transform), [d for d, name in enumerate(transform) if name == "angle"]
    head, features = make_head(transform, dim, 2, noise=noise), torch.randn(3, 4, dtype=torch.float64)
    mixture = built(head(features))
    y = torch.stack([torch.tensor([-3.0, 1.0, 2.0] if d in angles else [40.0, -60.0, 90.0]) for d in range(dim)], -1)
    y = y.double().requires_grad_()

    def by_many_images(mixture, y):
        inner, circles = mixture.components.inner, mixture.components.circles
        far = Circles(tuple(circle and circle._replace(turns=30 if dim > 2 else 200) for circle in circles.of_outputs))
        return (mixture.logits + inner.log_prob(far.images(y))).logsumexp((0, -1))

    expected = by_many_images(mixture, y)
    slopes = torch.autograd.grad(expected.sum(), (y, head.linear.bias), retain_graph=True)
    for function in (lambda y: head.log_prob(features, y), mixture.log_prob):
        assert_close(function(y), expected, rtol=1e-6, atol=0)
        assert_close(torch.autograd.grad(function(y).sum(), (y, head.linear.bias)), slopes, rtol=1e-5, atol=1e-5)
    assert_close((mixture.logits + mixture.component_log_prob(y)).logsumexp(-1), expected, rtol=1e-6, atol=0)
    assert_close(mixture.log_prob(y.expand(7, 3, dim)), expected.expand(7, 3), rtol=1e-6, atol=0)
    given = mixture.condition(y[:, :2], [0, 1]).log_prob(y[:, 2:]) if dim > 2 else 0
    assert_close(mixture.marginal([0, 1]).log_prob(y[:, :2]) + given, expected, rtol=1e-6, atol=0)
    partial = torch.cat([y[:, :-1], torch.full_like(y[:, :1], torch.nan)], -1)
    if dim > 2:
        known = by_many_images(mixture.marginal(range(dim - 1)), y[:, :-1])
        assert_close(mixture.log_prob(partial), known, rtol=1e-6, atol=0)
        assert_close(head.log_prob(features, partial), known, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3, 7])  # as many mixtures as there are images, too
@pytest.mark.parametrize("noise", [Full(), None], ids=["full", "diagonal"])
def test_points_of_fewer_dimensions_than_the_batch(size, noise):
    """Points ``(N, D)`` stand for all S mixtures of a batch ``(S, N)``: the images are no dimension of the batch."""
    head, features = make_head(["angle", "log"], 2, noise=noise), torch.randn(size, 4, 4, dtype=torch.float64)
    mixture = head(features)
    y = mixture.sample()[0]
    partial = y.clone()
    partial[0, 0], partial[1, 1] = torch.nan, torch.nan
    intervals = Targets.censored(y, left=y == y[2], right=y == y[3])
    for value in (y, partial, intervals, y[0], partial[0]):
        whole = value.expand(*mixture.batch_shape, 2)
        for function in (
            mixture.log_prob,
            mixture.component_log_prob,
            mixture.responsibilities,
            lambda v: head.log_density(head.split(head.channels(features), None), v, head.units),
        ):
            assert_close(function(value), function(whole))
    for dims in ([0], [1]):
        for values in (y[:, dims], partial[:, dims], y[0, dims]):
            short, whole = (mixture.condition(v, dims) for v in (values, values.expand(*mixture.batch_shape, 1)))
            rest = y[:, [1 - dims[0]]]
            assert_close(short.log_prob(rest), whole.log_prob(rest.expand(*mixture.batch_shape, 1)))


@pytest.mark.parametrize("size", [3, 7])
def test_members_have_the_density_of_their_networks(size):
    """The units of members have a dimension more than those of one network."""
    x, y, _ = simulated(50)
    x, rows = torch.from_numpy(x).float(), torch.from_numpy(np.concatenate([y, np.exp(x)], 1)).float()
    ensemble = DeepEnsemble(MixtureDensityNetwork(1, 2, n_components=2, target_transform=["angle", "log"]), size=size)
    fit(ensemble, x, rows, max_epochs=1, progress=False)
    expected = torch.stack([ensemble.member(i)(x).log_prob(rows) for i in range(size)])
    assert_close(ensemble.members(x).log_prob(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("transform", ["angle", ["log", "angle"]], ids=["alone", "beside"])
def test_compiled_likelihood_is_one_graph(transform):
    torch.compiler.reset()
    dim = 1 if transform == "angle" else 2
    network = MixtureDensityNetwork(1, dim, 2, (8,), target_transform=transform, noise=Full())
    objective, x = NegativeLogLikelihood(network), torch.randn(16, 1)
    y = network.sample(x)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    losses = objective(x, y), compiled(x, y)
    assert_close(*losses)
    gradients = [torch.autograd.grad(loss.sum(), list(network.parameters())) for loss in losses]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


# Several outputs


def brute_force(mixture, angles, rest, reach=6):
    """Joint density of angles and other outputs on the line, from scipy's normal distribution and many images."""
    base = mixture.components.base
    base = getattr(base, "base", base)
    weights, locs = mixture.logits.exp().numpy(), base.locs.numpy()
    matrices = base.covariance_matrix().expand(*locs.shape, locs.shape[-1]).numpy()
    periods = [circle.period for circle in mixture.components.circles.of_outputs if circle is not None]
    total = 0.0
    for turns in itertools.product(range(-reach, reach + 1), repeat=len(periods)):
        point = np.concatenate([angles + np.array(turns) * periods, rest])
        parts = [scipy.stats.multivariate_normal(m, c).pdf(point) for m, c in zip(locs, matrices, strict=True)]
        total += (weights * parts).sum()
    return total


def test_angle_and_length_against_scipy():
    for mixture in make_mixture(["angle", "log"], (3,), dim=2, noise=Full()):
        for y in mixture.sample((2,)):
            angle, length = y.numpy()
            expected = brute_force(mixture, [angle], [math.log(length)]) / length
            assert mixture.log_prob(y).exp().item() == pytest.approx(expected, rel=1e-8)


def test_two_angles_against_scipy():
    transform = [Angle(), Angle(360.0)]
    for mixture in make_mixture(transform, (2,), dim=2, n_components=2, noise=Full()):
        y = mixture.sample()
        assert mixture.log_prob(y).exp().item() == pytest.approx(brute_force(mixture, y.numpy(), []), rel=1e-8)


@pytest.mark.parametrize("noise", [Full(), None], ids=["full", "diagonal"])
@pytest.mark.parametrize("given", [[0], [1], [2, 0], [1, 2]], ids=str)
@pytest.mark.parametrize("family", ["normal", "student_t"])
def test_chain_rule(noise, given, family):
    settings = {"family": StudentT(noise or Full(), df=30.0)} if family == "student_t" else {"noise": noise}
    mixture = make_mixture(["angle", "log", "standardize"], (2, 3), dim=3, **settings)
    y, free = mixture.sample((2,)), [d for d in range(3) if d not in given]
    evidence, rest = mixture.marginal(given), mixture.condition(y[..., given], given)
    assert_close(
        evidence.log_prob(y[..., given]) + rest.log_prob(y[..., free]), mixture.log_prob(y), rtol=1e-6, atol=1e-6
    )
    assert isinstance(rest.components, WrappedComponents) == (0 in free)
    partial = y.clone()
    partial[..., free] = torch.nan
    assert_close(mixture.log_prob(partial), evidence.log_prob(y[..., given]))


def test_marginals_are_integrals():
    mixture = make_mixture(["angle", "standardize"], (), dim=2, noise=Full())
    y = mixture.sample()
    angle, step = grid(mixture.marginal(0))
    rows = torch.cat([angle, y[1].expand(len(angle), 1)], 1)
    assert_close(step * mixture.log_prob(rows).exp().sum(), mixture.marginal([1]).log_prob(y[1:]).exp())
    line = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(1)
    rows = torch.cat([y[0].expand(len(line), 1), line], 1)
    total = torch.trapezoid(mixture.log_prob(rows).exp(), line[:, 0])
    assert_close(total, mixture.marginal([0]).log_prob(y[:1]).exp())


def test_conditioning_on_what_was_observed():
    """Rows whose angle was not observed have as many components as the others."""
    mixture = make_mixture(["angle", "log", "standardize"], (4,), dim=3, noise=Full())
    y = mixture.sample()
    values = y[:, :2].clone()
    values[0, 0], values[1, 1], values[2] = torch.nan, torch.nan, torch.nan
    given = mixture.condition(values, [0, 1])
    expected = [
        mixture[0].condition(y[0, 1:2], 1).marginal(1),
        mixture[1].condition(y[1, :1], 0).marginal(1),
        mixture[2].marginal(2),
        mixture[3].condition(y[3, :2], [0, 1]),
    ]
    for i, one in enumerate(expected):
        assert_close(given[i].log_prob(y[i, 2:]), one.log_prob(y[i, 2:]))
    assert given.n_components == 21


def test_an_angle_given_the_other_one():
    mixture = make_mixture(["angle", "angle"], (3,), dim=2, noise=Full())
    y = mixture.sample()
    rest = mixture.condition(y[:, :1], 0)
    assert_close(mixture.marginal(0).log_prob(y[:, :1]) + rest.log_prob(y[:, 1:]), mixture.log_prob(y))
    angles, step = grid(rest)
    assert_close(step * rest.log_prob(angles).exp().sum(0), torch.ones(3, dtype=torch.float64))


# Distribution functions


@every_case
def test_distribution_functions_are_integrals(transform, family):
    mixture = make_mixture(transform, (2,), family=family)
    circle, y = transform.circles(1).of_outputs[0], random_angles(transform, 3, 2, 1)
    locs = mixture.components.locs
    for i, one in enumerate(mixture):
        for point, got in zip(y[:, i, 0].tolist(), mixture.cdf(y)[:, i, 0].tolist(), strict=True):

            def density(angle, one=one):
                return one.log_prob(torch.tensor([angle], dtype=torch.float64)).exp().item()

            kinks = [k for k in locs[i, :, 0].tolist() if circle.start < k < point]
            expected = scipy.integrate.quad(density, circle.start, point, epsrel=1e-10, points=kinks or None)[0]
            assert got == pytest.approx(expected, abs=1e-5 if family != Normal() else 1e-9)
    assert_close(mixture.cdf(y) + mixture.sf(y), torch.ones_like(y))
    assert_close(mixture.log_cdf(y).exp(), mixture.cdf(y))
    assert_close(mixture.log_sf(y).exp(), mixture.sf(y))
    for q in (1e-6, 0.1, 0.5, 0.9, 0.999):
        points = mixture.icdf(q)
        assert_close(mixture.cdf(points), torch.full((2, 1), q, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    assert_close(mixture.icdf(mixture.cdf(y)), y, rtol=1e-9, atol=1e-9 * circle.period)
    assert mixture.icdf(0.0).unique().tolist() == [circle.start]
    assert mixture.icdf(1.0).unique().tolist() == [circle.end]
    assert mixture.cdf(circle.start).unique().tolist() == [0.0]
    assert mixture.cdf(circle.end).unique().tolist() == [1.0]


def test_narrow_components_have_accurate_tails():
    mixture = normal([0.3, 0.7], [3.1, 0.5], [1e-3, 0.2])
    below = 0.7 * scipy.stats.norm(0.5, 0.2).cdf(-1.3) + 0.0
    assert mixture.cdf(-1.3).item() == pytest.approx(below, rel=1e-9)
    assert mixture.log_cdf(-1.3).item() == pytest.approx(math.log(below), rel=1e-9)
    assert mixture.icdf(0.85).item() == pytest.approx(3.1, abs=1e-9)


@pytest.mark.parametrize("dims", [1, 2])
def test_quantiles_have_derivatives(dims):
    head, features = make_head(["angle", "log"][:dims], dims, 2), torch.randn(3 - dims, 4, dtype=torch.float64)
    q = (
        torch.tensor([0.2, 0.9], dtype=torch.float64)
        .reshape(-1, 1)[: 3 - dims]
        .expand(-1, dims)
        .clone()
        .requires_grad_()
    )
    bias = head.linear.bias.detach().requires_grad_()

    def mixture(bias):
        return torch.func.functional_call(head, {"linear.bias": bias}, features)

    assert torch.autograd.gradcheck(lambda b, q: mixture(b).icdf(q), (bias, q), fast_mode=True)
    assert torch.autograd.gradcheck(lambda b: mixture(b).interval(0.8), bias, fast_mode=True)
    assert torch.autograd.gradcheck(lambda b: (mixture(b).mean, mixture(b).stddev), bias, fast_mode=True)


@every_case
def test_draws_follow_the_distribution_function(transform, family):
    mixture = make_mixture(transform, (), family=family)
    torch.manual_seed(3)
    y = mixture.sample((10_000,))
    circle = transform.circles(1).of_outputs[0]
    assert bool(((y >= circle.start) & (y < circle.end)).all())
    assert bool(mixture.support.check(y).all())
    u = scores.pit(mixture, y)[:, 0].numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    assert scipy.stats.spearmanr(u, y[:, 0].numpy()).statistic == pytest.approx(1)


@every_circle
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_transforms_of_cells_are_uniform_at_the_cut(transform, offset):
    """Angles rounded to a sixth of a turn, of which a cell goes on from the end of the period at its start."""
    circle = transform.circles(1).of_outputs[0]
    rate = circle.period / TURN
    mixture = normal([1.0], [circle.start + 0.2 * rate], [0.5 * rate], circle)
    torch.manual_seed(0)
    y, cell = mixture.sample((4000,)), circle.period / 6
    rounded = circle.start + cell * (((y - circle.start) / cell - offset).round() + offset)
    rounded = circle.start + (rounded - circle.start) % circle.period
    u = scores.pit(mixture, rounded, cell)[:, 0].numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    points = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    got = scores.mean_pit(mixture.expand((4000,)), rounded, cell, points)
    assert_close(got[:, 0], points, rtol=0, atol=0.03)
    drawn = torch.tensor([(u <= point).mean() for point in points.tolist()], dtype=torch.float64)
    assert_close(got[:, 0], drawn, rtol=0, atol=0.03)


def test_arcs_any_number_of_turns_away():
    mixture = make_mixture("angle", (3,))
    marginals = mixture.univariate()
    lower, upper = torch.full((3, 1), 2.0, dtype=torch.float64), torch.full((3, 1), 4.5, dtype=torch.float64)
    expected = marginals.log_between(lower, upper)
    for turns in (-40, -5, 4, 40):
        moved = (end + turns * TURN for end in (lower, upper))
        assert_close(marginals.log_between(*moved), expected)
    assert_close(
        scores.interval_log_score(mixture, torch.full((3, 1), 3.0).double(), 0.5).exp().reciprocal(),
        decisions.probability_between(mixture, 2.75, 3.25),
    )


@every_case
def test_derivatives_at_the_ends_of_the_period(transform, family):
    """They are those of points beside the ends: the ends are the same angle, at which nothing special happens."""
    mixture, circle = make_mixture(transform, (2,), family=family), transform.circles(1).of_outputs[0]
    ends = torch.tensor([circle.start, circle.end], dtype=torch.float64).reshape(2, 1, 1).expand(2, 2, 1)
    density = mixture.log_prob(ends).exp().unsqueeze(-1)

    def slope(function, at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(function(at).sum(), at)[0]

    assert_close(slope(mixture.cdf, ends), density, rtol=1e-4, atol=1e-6)
    assert_close(slope(mixture.sf, ends), -density, rtol=1e-4, atol=1e-6)
    assert_close(slope(mixture.log_cdf, ends)[1], density[1], rtol=1e-4, atol=1e-6)
    assert_close(slope(mixture.log_sf, ends)[0], -density[0], rtol=1e-4, atol=1e-6)
    levels = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1).expand(2, 2, 1)
    assert_close(slope(mixture.icdf, levels), 1 / density, rtol=1e-4, atol=1e-6)
    step = 1e-6 * circle.period
    beside = torch.stack([ends[0] + step, ends[1] - step])
    for score in (scores.crps, scores.log_score):
        values = slope(lambda y, score=score: score(mixture, y), ends)
        assert_close(values, slope(lambda y, score=score: score(mixture, y), beside), rtol=1e-3, atol=1e-3)


# Moments and arcs


@every_case
def test_directions_are_those_of_the_density(transform, family):
    mixture = make_mixture(transform, (2, 3), family=family)
    y, step = grid(mixture, 20_001)
    rate = TURN / mixture.components.circles.of_outputs[0].period
    moment = step * (torch.exp(1j * rate * y) * mixture.log_prob(y).exp().unsqueeze(-1)).sum(0)
    assert_close(torch.exp(1j * rate * mixture.mean), moment / moment.abs(), rtol=1e-5, atol=1e-5)
    assert_close(mixture.stddev, (-2 * moment.abs().log()).sqrt() / rate, rtol=1e-5, atol=1e-5)
    assert_close(mixture.variance, mixture.stddev.square())
    assert bool(mixture.support.check(mixture.mean).all())
    single = mixture.with_components(mixture.components).reweighted(
        torch.tensor([0.0, -math.inf, -math.inf]).double().expand(2, 3, 3), mixture.components
    )
    assert_close(mixture.components.mean()[..., 0, :], single.mean)
    assert_close(mixture.components.stddev()[..., 0, :], single.stddev)


def test_directions_of_narrow_components_keep_their_digits():
    mixture = normal([0.5, 0.5], [math.pi - 1e-8, -math.pi + 1e-8], [1e-9, 1e-9])
    assert mixture.stddev.item() == pytest.approx(math.sqrt(1e-16 + 1e-18), rel=1e-6)
    assert abs(mixture.mean.item()) == pytest.approx(math.pi, abs=1e-12)
    beside = make_mixture(["angle", "log"], (3,), dim=2, noise=Full())
    assert_close(beside.mean[:, :1], beside.marginal(0).mean)
    assert_close(beside.mean[:, 1:], beside.marginal(1).mean)
    assert_close(beside.stddev[:, 1:], beside.marginal(1).stddev)


def arcs_on_a_grid(mixture, mass, count=20_000):
    """Width of the shortest arc of one angle, between points of a grid."""
    y, step = grid(mixture, count)
    below = np.concatenate([[0], (step * mixture.log_prob(y).exp().numpy()).cumsum()])
    below = np.concatenate([below, below[1:] + below[-1]])
    ends = np.searchsorted(below, below[:count] + mass)
    return (ends - np.arange(count)).min() * step


@pytest.mark.parametrize("mass", [0.3, 0.9])
@every_circle
def test_shortest_arcs(transform, mass):
    mixture = make_mixture(transform, (4,), std=0.8)
    lower, upper = mixture.interval(mass, kind="shortest")
    circle = transform.circles(1).of_outputs[0]
    assert bool(((lower >= circle.start) & (lower < circle.end) & (upper > lower)).all())
    assert_close(decisions.probability_between(mixture, lower, upper), torch.full((4, 1), mass, dtype=torch.float64))
    for i, one in enumerate(mixture):
        width = (upper - lower)[i].item()
        assert width == pytest.approx(arcs_on_a_grid(one, mass), abs=3 * circle.period / 20_000)


def test_arcs_go_across_the_cut():
    mixture = normal([0.6, 0.4], [3.1, -3.0], [0.1, 0.2])
    for kind in ("central", "shortest"):
        lower, upper = (end.item() for end in mixture.interval(0.9, kind=kind))
        assert 2.5 < lower < math.pi < upper < 4.0
        inside = torch.tensor([[3.0], [-3.1], [math.pi], [-math.pi]], dtype=torch.float64)
        assert scores.coverage(mixture, inside, 0.9, kind=kind).tolist() == [[1.0]] * 4
        outside = torch.tensor([[0.0], [upper - TURN + 0.1], [lower - 0.2]], dtype=torch.float64)
        assert scores.coverage(mixture, outside, 0.9, kind=kind).tolist() == [[0.0]] * 3
        missed = (scores.interval_score(mixture, outside, 0.9, kind=kind) - (upper - lower)) / 20
        expected = torch.tensor([[min(lower, TURN - upper)], [0.1], [0.2]], dtype=torch.float64)
        assert_close(missed, expected)
        covered = scores.coverage(mixture, mixture.sample((20_000,)), 0.9, kind=kind).mean().item()
        assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 20_000))
    lower, upper = mixture.interval(0.9)
    opposite = lower - (lower - mixture.mean - math.pi) % TURN
    for ends in ((opposite, lower), (upper, opposite + TURN)):
        assert_close(decisions.probability_between(mixture, *ends).item(), 0.05)


def test_quantiles_of_predictions_do_not_depend_on_the_cut():
    """Quantiles that people read are counted from the angle opposite to the mean; those of lengths are the usual."""
    mixture = make_mixture(["angle", "log"], (6,), dim=2, noise=Full())
    locs = mixture.components.base.base.locs
    turned = replace(mixture.components.base.base, locs=locs + torch.tensor([3.0, 0.0]).double())
    base = replace(mixture.components.base, base=turned)
    shifted = mixture.with_components(wrapped_components(base, mixture.components.circles))
    levels = [0.05, 0.5, 0.95]
    points, others = (Prediction(m).quantiles(levels) for m in (mixture, shifted))
    assert_close(np.exp(1j * (points[..., 0] + 3.0)), np.exp(1j * others[..., 0]), rtol=0, atol=1e-8)
    assert_close(points[..., 1], np.stack([mixture.icdf(q)[:, 1].numpy() for q in levels], 1))
    assert np.abs(points[..., 0]).max() <= math.pi
    lower, upper = (end.numpy() for end in mixture.interval(0.9))
    assert_close(np.exp(1j * points[:, [0, 2], 0]), np.exp(1j * np.stack([lower[:, 0], upper[:, 0]], 1)))
    half = torch.from_numpy(points[:, 1, :1])
    opposite = mixture.mean[:, :1] - math.pi
    to_median = decisions.probability_between(mixture.marginal(0), opposite, opposite + (half - opposite) % TURN)
    assert_close(to_median, torch.full_like(half, 0.5))
    frame = Prediction(mixture).to_frame(levels)
    np.testing.assert_array_equal(frame["y0", "0.5"], points[:, 1, 0])


def test_regressor_of_directions():
    x, y, _ = simulated(200)
    model = MDNRegressor(hidden_dim=(8,), target_transform="angle", max_epochs=5, random_state=0).fit(x, y)
    mixture = model.predict_distribution(x)
    assert_close(model.predict_quantiles(x, [0.1, 0.5]), Prediction(mixture).quantiles([0.1, 0.5]))
    assert math.isfinite(model.score(x, y))
    with pytest.raises(NotImplementedError, match="r2_score: not closed for WrappedComponents components; score"):
        model.r2_score(x, y)


def test_shortest_arcs_have_derivatives():
    head, features = make_head("angle", 1, 2), torch.randn(2, 4, dtype=torch.float64)

    def ends(bias):
        mixture = torch.func.functional_call(head, {"linear.bias": bias}, features)
        return torch.stack(mixture.interval(0.6, kind="shortest"))

    bias = head.linear.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(ends, bias, eps=1e-5, atol=1e-3, rtol=1e-3, fast_mode=True)


# Scores


def angular(a, b, period):
    distance = (a - b).abs() % period
    return torch.minimum(distance, period - distance)


@every_case
def test_crps_is_the_expected_angular_distance(transform, family):
    mixture = make_mixture(transform, (2,), family=family)
    period, value = transform.period, random_angles(transform, 5, 2, 1)
    y, step = grid(mixture, 1500)
    weight = step * mixture.log_prob(y).exp().unsqueeze(-1)
    to_value = (weight.unsqueeze(1) * angular(y.unsqueeze(1), value, period)).sum(0)
    between = [(w * w.mT * angular(p, p.mT, period)).sum() for w, p in zip(weight.unbind(1), y.unbind(1), strict=True)]
    expected = to_value - 0.5 * torch.stack(between).unsqueeze(-1)
    assert_close(scores.crps(mixture, value), expected, rtol=1e-5, atol=4e-6 * period)
    value[0] = torch.nan
    assert scores.crps(mixture, value)[0].isnan().all()


def test_crps_of_narrow_components_by_draws():
    mixture = normal([0.3, 0.7], [3.14159, -1.0], [1e-4, 0.02])
    torch.manual_seed(0)
    first, second = (mixture.sample((200_000,)) for _ in range(2))
    for value in (-3.1, 0.3, 3.1416, -1.01):
        value = torch.tensor([min(value, math.pi)], dtype=torch.float64)
        terms = angular(first, value, TURN) - 0.5 * angular(first, second, TURN)
        error = terms.std().item() / math.sqrt(len(terms))
        assert abs(scores.crps(mixture, value).item() - terms.mean().item()) < 4 * error


def test_crps_gradients():
    head, features = make_head("angle", 1, 2), torch.randn(2, 4, dtype=torch.float64)
    y, bias = torch.tensor([[-3.0], [1.0]], dtype=torch.float64), head.linear.bias.detach().requires_grad_()

    def score(bias, y):
        return scores.crps(torch.func.functional_call(head, {"linear.bias": bias}, features), y)

    assert torch.autograd.gradcheck(score, (bias, y.requires_grad_()), atol=1e-4, rtol=1e-3, fast_mode=True)
    x, y, _ = simulated(600)
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 1, n_components=2, hidden_dim=(16,), target_transform="angle")
    rows = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    loss, unit = ContinuousRankedProbability(network), network.head.scale
    assert_close(loss(*rows), scores.crps(network(rows[0]), rows[1]).squeeze(-1) / unit)
    fit(network, x, y, objective=loss, max_epochs=20, seed=0, progress=False)
    x, y, _ = simulated(1000, 1)
    score = scores.crps(network.predict(x).mixture, y).mean().item()
    x = torch.from_numpy(x)
    locs = torch.stack([math.pi - 0.2 + 0.5 * x, math.pi + 1.0 - 0.3 * x], 1)
    base = NormalComponents(locs, DiagonalCovariance(torch.tensor([[0.15], [0.3]], dtype=torch.float64).unsqueeze(0)))
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64).expand(1000, 2)
    truth = Mixture(weights.log(), wrapped_components(base, Circles((RADIANS,))))
    least = scores.crps(truth, y).mean().item()
    assert 0.98 * least < score < 1.15 * least


# Observations


@pytest.mark.parametrize("noise", [Full(), None], ids=["full", "diagonal"])
def test_intervals_of_angles(noise):
    mixture = make_mixture(["angle", "log"], (4,), dim=2, noise=noise)
    y = mixture.sample()
    lower, upper = y.clone(), y.clone()
    lower[0, 0], upper[0, 0] = -1.0, 0.5
    lower[1, 0], upper[1, 0] = -math.inf, 0.5
    lower[2, 0], upper[2, 0] = -1.0, math.inf
    lower[3, 0], upper[3, 0] = -math.inf, math.inf
    got = mixture.log_prob(Targets.interval(lower, upper))
    given = mixture.condition(y[:, 1:], 1)
    expected = [given.cdf(0.5)[0] - given.cdf(-1.0)[0], given.cdf(0.5)[1], given.sf(-1.0)[2], torch.ones(1).double()]
    assert_close(got, mixture.marginal(1).log_prob(y[:, 1:]) + torch.cat(expected).log())
    for low, high, shown in ((2.0, 10.0, "10"), (-math.inf, 4.0, "4"), (4.0, math.inf, "4"), (-3.0, 3.5, "3.5")):
        lower, upper = y.clone(), y.clone()
        lower[1, 0], upper[1, 0] = low, high
        arcs = "arcs of one turn at most, not farther than a turn from there"
        expected = f"value: expected numbers between -3.14159 and 3.14159, or {arcs}, got {shown} in row 1, column 0"
        with pytest.raises(ValueError, match=expected):
            mixture.log_prob(Targets.interval(lower, upper))


@pytest.mark.parametrize("noise", [Full(), None], ids=["full", "diagonal"])
def test_arcs_across_the_cut_as_targets(noise):
    """Arcs that go on beyond an end of the period are those to the end and from the start."""
    transform = [Angle(360.0, 0.0), "log"]
    head, features = make_head(transform, 2, noise=noise), torch.randn(3, 4, dtype=torch.float64)
    mixture = head(features)
    y = mixture.sample()

    def probability(low, high):
        lower, upper = y.clone(), y.clone()
        lower[:, 0], upper[:, 0] = low, high
        targets = Targets.interval(lower, upper)
        result = mixture.log_prob(targets)
        assert_close(head.log_prob(features, targets), result)
        return (result - mixture.marginal(1).log_prob(y[:, 1:])).exp()

    across = probability(300.0, 360.0) + probability(0.0, 25.0)
    assert_close(probability(300.0, 385.0), across)
    assert_close(probability(-60.0, 25.0), across)
    assert_close(probability(60.0, 385.0), 1 - probability(25.0, 60.0))
    assert_close(probability(100.0, 460.0), torch.ones(3, dtype=torch.float64))
    cells = Targets.cells(torch.tensor([[358.0], [1.0], [180.0]], dtype=torch.float64), 10.0)
    got = mixture.marginal(0).log_prob(cells).exp()
    ends = [(353.0, 363.0), (-4.0, 6.0), (175.0, 185.0)]
    pairs = zip(mixture.marginal(0), ends, strict=True)
    assert_close(got, torch.cat([decisions.probability_between(one, *pair) for one, pair in pairs]))


def test_boxes_across_outputs():
    """The probability of a box is that of its images, for dependent outputs too."""
    mixture = make_mixture(["angle", "standardize"], (2,), dim=2, noise=Full())
    ends = torch.tensor([[-1.0, -0.5], [2.0, 1.0]], dtype=torch.float64)
    got = mixture.log_prob(Targets.interval(ends[0].expand(2, 2), ends[1].expand(2, 2))).exp()
    torch.manual_seed(0)
    draws = mixture.sample((100_000,))
    share = ((draws >= ends[0]) & (draws <= ends[1])).all(-1).double().mean(0)
    assert bool(((got - share).abs() < 5 * (share * (1 - share) / 100_000).sqrt()).all())


@pytest.mark.parametrize(
    ("values", "named"),
    [([[10.0], [350.0]], r"got 10 in row 0, column 0, and 1 more"), ([[0.1], [-3.2]], r"got -3.2 in row 1, column 0")],
)
def test_degrees_for_radians_are_refused(values, named):
    y, x = torch.tensor(values, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    network = MixtureDensityNetwork(1, 1, target_transform="angle").double()
    expected = "expected numbers between -3.14159 and 3.14159, " + named
    with pytest.raises(ValueError, match="y: " + expected):
        fit(network, x, y, progress=False)
    with pytest.raises(ValueError, match="y: " + expected):
        network.loss(x, y)
    with pytest.raises(ValueError, match="value: " + expected):
        network(x)[:2].log_prob(y)
    two = MixtureDensityNetwork(1, 2, target_transform=["log", "angle"]).double()
    with pytest.raises(ValueError, match="y: " + expected.replace("column 0", "column 1")):
        fit(two, x, torch.cat([torch.ones_like(y), y], 1), progress=False)
    with pyro.validation_enabled(False):
        assert network(x)[:2].log_prob(y).isinf().any()


@pytest.mark.parametrize(
    "function",
    [
        scores.crps,
        scores.pit,
        lambda m, y: scores.pit(m, y, 0.1),
        lambda m, y: scores.mean_pit(m, y, 0.1),
        lambda m, y: scores.coverage(m, y, 0.9),
        lambda m, y: scores.interval_score(m, y, 0.9),
        lambda m, y: scores.interval_log_score(m, y, 0.1),
        lambda m, y: coverage_table(m, y, [0.9]),
    ],
)
@pytest.mark.parametrize("transform", ["angle", ["log", "angle"]], ids=["alone", "beside"])
def test_scores_refuse_degrees_for_radians(function, transform):
    dims = 1 if transform == "angle" else 2
    mixture = make_mixture(transform, (3,), dim=dims)
    y = mixture.sample()
    y[1, -1] = 350.0
    expected = f"y: expected numbers between -3.14159 and 3.14159, got 350 in row 1, column {dims - 1}"
    with pytest.raises(ValueError, match=expected):
        function(mixture, y)


@pytest.mark.parametrize("ends", [(350.0, 351.0), (-1.0, 10.0), (-3.0, 3.5), (-math.inf, 4.0)])
def test_ranges_beyond_a_turn_are_refused(ends):
    with pytest.raises(ValueError, match=r"low, high: expected numbers between .* or arcs of one turn at most"):
        decisions.probability_between(make_mixture("angle", (3,)), *ends)


def test_both_ends_are_angles_in_any_precision():
    for dtype in (torch.float32, torch.float64):
        network = MixtureDensityNetwork(1, 1, target_transform="angle").to(dtype)
        ends = torch.tensor([[-math.pi], [math.pi]], dtype=torch.float32)
        for y in (ends, ends.double(), torch.tensor([[-math.pi], [math.pi]], dtype=torch.float64)):
            one, other = network(torch.zeros(2, 1, dtype=dtype)).log_prob(y.to(dtype)).tolist()
            assert one == pytest.approx(other, rel=1e-4)
        assert network.sample(torch.zeros(20_000, 1, dtype=dtype)).abs().max() <= ends[1, 0]
    mixture = make_mixture("angle", (2,))
    single = ends.double()  # the angle π in single precision is more than π
    assert bool(mixture.support.check(single).all())
    assert_close(mixture.univariate().log_prob(single).squeeze(-1), mixture.log_prob(single))


def test_single_precision_is_close_to_double():
    head, features = make_head(["angle", "log"], 2, noise=Full()), torch.randn(50, 4, dtype=torch.float64)
    y = head(features).sample()
    double, single = head(features), head.float()(features.float())
    assert_close(single.log_prob(y.float()), double.log_prob(y).float(), rtol=1e-4, atol=1e-4)
    assert_close(head.log_prob(features.float(), y.float()), double.log_prob(y).float(), rtol=1e-4, atol=1e-4)
    for function in (
        lambda m: m.cdf(y.to(m.dtype)),
        lambda m: m.icdf(0.3),
        lambda m: m.mean,
        lambda m: m.stddev[:, 0],
        lambda m: scores.crps(m, y.to(m.dtype)),
        lambda m: m.interval(0.8)[1],
    ):
        assert_close(function(single), function(double).float(), rtol=1e-3, atol=1e-3)
    lower, upper = single.interval(0.8, kind="shortest")
    widths = double.interval(0.8, kind="shortest")
    assert_close(upper - lower, (widths[1] - widths[0]).float(), rtol=1e-3, atol=1e-3)


# Networks


def simulated(n, seed=0):
    """A direction near the cut with two modes of different width, and its density."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 1))
    modes = [(0.6, math.pi - 0.2 + 0.5 * x, 0.15), (0.4, math.pi + 1.0 - 0.3 * x, 0.3)]
    first = rng.random((n, 1)) < modes[0][0]
    z = np.where(
        first, modes[0][1] + modes[0][2] * rng.normal(size=(n, 1)), modes[1][1] + modes[1][2] * rng.normal(size=(n, 1))
    )
    y = (z + math.pi) % TURN - math.pi
    density = sum(w * scipy.stats.norm(m + t * TURN, s).pdf(y) for w, m, s in modes for t in (-2, -1, 0, 1, 2))
    return x, y, np.log(density)


def test_training_reaches_the_truth_across_the_cut():
    x, y, _ = simulated(1500)
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 1, n_components=3, hidden_dim=(16,), target_transform="angle")
    fit(network, x, y, max_epochs=25, seed=0, progress=False)
    x, y, truth = simulated(3000, 1)
    got = network.predict(x).log_prob(y)
    assert truth.mean() - got.mean() < 0.1
    assert abs(abs(network.head.shift.item()) - math.pi) < 0.8  # the cut is far from the data
    prediction = network.predict(x)
    assert prediction.mean.shape == prediction.std.shape == (3000, 1)
    lower, upper = prediction.interval(0.8)
    assert (lower >= -math.pi).all()
    assert (upper > math.pi).any()
    covered = scores.coverage(prediction.mixture, y, 0.8).mean().item()
    assert covered == pytest.approx(0.8, abs=0.05)


def test_units_are_those_of_the_circle():
    rng = np.random.default_rng(0)
    degrees = torch.tensor((350 + 40 * rng.normal(size=(400, 1))) % 360)
    head = MixtureHead(2, 1, 2, target_transform=Angle(360.0, 0.0))
    head.initialize_(torch.cat([degrees, torch.full((1, 1), torch.nan).double()]))
    expected = scipy.stats.circmean(degrees.numpy(), high=360)
    assert head.shift.item() == pytest.approx(expected, rel=1e-5)
    assert head.scale.item() == pytest.approx(180 / math.pi)
    assert head.units.standardize(degrees).abs().max() <= math.pi
    rows = torch.cat([degrees, degrees.exp().clamp(max=9) + 1], 1)
    for noise, scale in ((None, [180 / math.pi, rows[:, 1].log().std(correction=0).item()]), (Isotropic(), None)):
        head = MixtureHead(2, 2, 2, noise=noise, target_transform=[Angle(360.0, 0.0), "log"])
        head.initialize_(rows)
        assert head.shift[0].item() == pytest.approx(expected, rel=1e-5)
        assert scale is None or head.scale.tolist() == pytest.approx(scale, rel=1e-5)
        assert head.log_prob(torch.zeros(401, 2)[:400], rows.float()).isfinite().all()


def test_noise_and_cells_keep_targets_valid():
    """Noise and points in cells go around the circle, across the cut; missing entries and intervals stay."""
    transform = Angle(360.0, 0.0)
    units = MixtureHead(1, 1, 2, target_transform=transform).double().units
    y = (
        torch.tensor([0.0, 1.0, 359.0, 360.0, 180.0, math.nan], dtype=torch.float64)
        .reshape(-1, 1, 1)
        .repeat(1, 2000, 1)
    )
    torch.manual_seed(0)
    moved = blur_targets(y, units, 0.2)
    cells = points_in_cells(y, torch.full((1,), 10.0), 8, anew=True)
    points = kept_inside(cells, y, transform)
    for values in (moved, points):
        assert_close(values.isnan(), y.isnan().expand_as(values))
        observed = values[..., :-1, :, :]
        assert bool(((observed >= 0) & (observed < 360)).all())
    distance = (moved - y + 180) % 360 - 180
    size = 0.2 * 180 / math.pi
    assert_close(distance[:-1].std(1), torch.full((5, 1), size, dtype=torch.float64), rtol=0.06, atol=0)
    assert distance[:-1].mean(1).abs().max() < 4 * size / math.sqrt(2000)
    distance = (points - y + 180) % 360 - 180
    assert distance[..., :-1, :, :].abs().max() <= 5 + 1e-9
    assert_close(distance[..., :-1, :, :].mean((0, 2, 3)), torch.zeros(5, dtype=torch.float64), rtol=0, atol=0.1)
    targets = Targets.interval(torch.tensor([[350.0], [20.0], [359.0]]), torch.tensor([[370.0], [30.0], [359.0]]))
    blurred = blur_targets(targets, units, 0.2)
    assert_close((blurred.lower[:2], blurred.upper[:2]), (targets.lower[:2].double(), targets.upper[:2].double()))
    assert blurred.lower[2].item() == blurred.upper[2].item() != 359.0


def test_training_on_rounded_directions():
    """Of uniform directions, also rounded, in arcs or missing, the density is all but that of the uniform one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1)).astype(np.float32)
    y = (np.round(36 * rng.random((300, 1))) * 10).astype(np.float32) % 360
    y[3], y[:60:2] = 360.0, np.nan
    lower, upper = y - 5, y + 5
    lower[:100], upper[:100] = y[:100], y[:100]
    lower[np.isnan(y)], upper[np.isnan(y)] = -np.inf, np.inf
    angles = torch.arange(0.0, 360.0, 5.0).reshape(-1, 1, 1)
    for targets in (y, Targets.interval(lower, upper)):
        torch.manual_seed(0)
        network = MixtureDensityNetwork(1, 1, n_components=2, hidden_dim=(8,), target_transform=Angle(360.0, 0.0))
        fit(network, x, targets, max_epochs=30, seed=0, progress=False)
        with torch.no_grad():
            density = 360 * network(torch.from_numpy(x)).log_prob(angles).exp()
        assert density.mean().item() == pytest.approx(1, abs=1e-3)
        assert 0.5 < density.mean(1).min() < density.mean(1).max() < 2


def test_files_ensembles_and_batches(tmp_path):
    x, y, _ = simulated(200)
    rows = np.concatenate([y, np.exp(x)], 1)
    network = MixtureDensityNetwork(1, 2, n_components=2, noise=Full(), target_transform=[Angle(TURN, -math.pi), "log"])
    ensemble = DeepEnsemble(network, size=2)
    fit(ensemble, x, rows, max_epochs=2, progress=False)
    mixture = ensemble(torch.from_numpy(x[:5]).float())
    assert mixture.n_components == 4
    members = [ensemble.member(i)(torch.from_numpy(x[:5]).float()).log_prob(rows[:5]) for i in range(2)]
    assert_close(mixture.log_prob(rows[:5]), torch.stack(members).logsumexp(0) - math.log(2))
    ensemble.save(tmp_path / "angles.safetensors")
    again = DeepEnsemble.load(tmp_path / "angles.safetensors")
    assert again.architecture.head.transform == PerOutput([Angle(TURN, -math.pi), "log"])
    assert_close(again.predict(x).log_prob(rows), ensemble.predict(x).log_prob(rows))
    assert_close(mixture[2].log_prob(rows[2]), mixture.log_prob(rows[:5])[2])
    assert_close(Mixture.cat([mixture[:2], mixture[2:]]).log_prob(rows[:5]), mixture.log_prob(rows[:5]))
    assert mixture.expand((3, 5)).cdf(rows[:5]).shape == (3, 5, 2)
    assert mixture.prune(0.01).log_prob(rows[:5]).isfinite().all()
    assert (mixture.temper(0.5).stddev < mixture.stddev)[:, 0].all()
    other = make_mixture(Angle(360.0), (5,))
    with pytest.raises(ValueError, match="cat: expected equal structures"):
        Mixture.cat([other, make_mixture(Angle(), (5,))])


def test_latent_weights():
    x, y, _ = simulated(100)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    network = bayesianize(MixtureDensityNetwork(1, 1, n_components=2, hidden_dim=(8,), target_transform="angle"))
    guide = pyro.infer.autoguide.AutoDiagonalNormal(network.model)
    fit(network, x, y, guide=guide, max_epochs=2, progress=False)
    mixture = posterior_predictive(network, guide, x, num_samples=3)
    assert mixture.pool(0).log_prob(y).isfinite().all()
    assert not mixture.has_rsample


# What is refused


def test_settings_are_checked():
    for settings in ({"period": 0.0}, {"period": math.inf}, {"low": math.inf}, {"low": "east"}, {"period": None}):
        with pytest.raises(ValueError, match=r"period|low"):
            Angle(**settings)
    with pytest.raises(ValueError, match="expected 2 angles at most, got 3"):
        MixtureHead(1, 3, 2, target_transform="angle")
    with pytest.raises(ValueError, match="expected 2 angles at most, got 3"):
        MixtureHead(1, 4, 2, target_transform=["angle", "log", "angle", "angle"])
    with pytest.raises(ValueError, match="Chain: expected transforms of numbers that are no angles"):
        Chain([Angle(), "standardize"])


@pytest.mark.parametrize(
    "operation",
    [
        lambda m, y: m.rosenblatt(y),
        lambda m, y: m.inverse_rosenblatt(torch.full_like(y, 0.5)),
        lambda m, y: m.affine(1.0, 2.0),
        lambda m, y: m.as_gaussian(),
        lambda m, y: m.covariance_matrix,
        lambda m, y: m.split_variance(),
        lambda m, y: uncertainty.aleatoric_variance(m),
        lambda m, y: uncertainty.epistemic_variance(m),
        lambda m, y: scores.energy_score(m, y),
        lambda m, y: scores.pinball(m, y, 0.3),
        lambda m, y: scores.dawid_sebastiani(m, y),
        lambda m, y: decisions.expected_below(m, 0.0),
        lambda m, y: decisions.expected_above(m, 0.0),
        lambda m, y: decisions.conditional_value_at_risk(m, 0.9),
        lambda m, y: decisions.restricted_mean(m, 1.0),
        lambda m, y: decisions.hazard(m, 1.0),
        lambda m, y: decisions.cumulative_hazard(m, 1.0),
        lambda m, y: m.modes(),
        lambda m, y: m.product(m),
    ],
)
def test_what_has_no_meaning_for_angles(operation):
    mixture = make_mixture(["angle", "log"], (3,), dim=2, noise=Full())
    with pytest.raises(NotImplementedError, match="; "):
        operation(mixture, mixture.sample())


def test_draws_have_no_gradients():
    head, features = make_head("angle"), torch.randn(3, 4, dtype=torch.float64)
    assert not head(features).has_rsample
    with pytest.raises(NotImplementedError, match=r"rsample: .*draws are without gradients"):
        head(features).rsample()
    assert head(features).detach().rsample().shape == (3, 1)
