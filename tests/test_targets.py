"""Targets that were observed in part, or as intervals: their likelihood, and training on them."""

import copy
import itertools
import math
import warnings

import lightning
import numpy as np
import pandas
import pyro
import pytest
import torch
from cases import BATCH_SHAPES, NOISE, LaplaceLaw, make_head, make_mixture
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats
from torch.testing import assert_close
from torch.utils.data import DataLoader

from pyro_mdn import (
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    Full,
    FullCovariance,
    GaussianMixture,
    IndependentComponents,
    Isotropic,
    IsotropicCovariance,
    MissingTargetsWarning,
    Mixture,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    StudentT,
    StudentTComponents,
    Targets,
    WeightedSum,
    bayesianize,
    calibration,
    fit,
    fit_mcmc,
    laplace,
    posterior_predictive,
    scores,
)
from pyro_mdn.distributions.observations import boxes
from pyro_mdn.distributions.observations.targets import EXACT, INTERVAL, MISSING
from pyro_mdn.lightning import LightningObjective
from pyro_mdn.networks.rows import Rows
from pyro_mdn.posteriors.log_joint import LogJoint, rows_of, undisturbed
from pyro_mdn.support.process_state import unvalidated

QUICK = {"seed": 0, "max_epochs": 3, "progress": False}


def kinds_of(shape, intervals=4):
    """Kinds of entries that vary from row to row, with ``intervals`` of them at most in a row."""
    kinds = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(3))
    extra = (kinds == INTERVAL).cumsum(-1) > intervals
    return torch.where(extra, torch.full_like(kinds, EXACT), kinds)


def observed(y, kinds):
    """Targets of these kinds around points: intervals with two ends, or one, by turns."""
    turn = torch.arange(kinds.numel()).reshape(kinds.shape) % 3
    lower, upper = y - 0.4, y + 0.9
    lower = torch.where(turn == 1, torch.full_like(y, -math.inf), lower)
    upper = torch.where(turn == 2, torch.full_like(y, math.inf), upper)
    lower = torch.where(kinds == EXACT, y, torch.where(kinds == MISSING, torch.full_like(y, -math.inf), lower))
    upper = torch.where(kinds == EXACT, y, torch.where(kinds == MISSING, torch.full_like(y, math.inf), upper))
    return Targets.interval(lower, upper)


def reference(loc, shape, lower, upper, kinds, df=None):
    """Density of exact outputs times the probability of intervals given these, of one component, by scipy alone."""
    e, i = np.flatnonzero(kinds == EXACT), np.flatnonzero(kinds == INTERVAL)

    mean, matrix = loc[e], shape[np.ix_(e, e)]
    if len(e) == 0:
        density = 1.0
    elif df is None:
        density = stats.multivariate_normal.pdf(lower[e], mean, matrix)
    else:
        density = stats.multivariate_t.pdf(lower[e], mean, matrix, df)
    if len(i) == 0:
        return density
    gain = shape[np.ix_(i, e)] @ np.linalg.inv(shape[np.ix_(e, e)]) if len(e) else np.zeros((len(i), 0))
    residual = lower[e] - loc[e]
    given, scale = loc[i] + gain @ residual, shape[np.ix_(i, i)] - gain @ shape[np.ix_(e, i)]
    if df is not None and len(e):
        square = residual @ np.linalg.inv(shape[np.ix_(e, e)]) @ residual
        scale, df = scale * (df + square) / (df + len(e)), df + len(e)
    if len(i) == 1:
        one = stats.norm(given[0], scale[0, 0] ** 0.5) if df is None else stats.t(df, given[0], scale[0, 0] ** 0.5)
        mirrored = one.sf(lower[i[0]]) - one.sf(upper[i[0]])
        return density * max(one.cdf(upper[i[0]]) - one.cdf(lower[i[0]]), mirrored)
    if df is None:
        accurate = {"abseps": 1e-9, "releps": 1e-9, "maxpts": 400_000}
        return density * stats.multivariate_normal.cdf(upper[i], given, scale, lower_limit=lower[i], **accurate)
    return density * stats.multivariate_t(given, scale, df).cdf(upper[i], lower_limit=lower[i], random_state=0)


def expected(mixture, targets, df=None):
    """Log-likelihood of each row, ``(*batch)``, by :func:`reference`."""
    shape = (*mixture.batch_shape, mixture.n_components)
    matrices = mixture.components.covariance.matrix().expand(*shape, mixture.dim, mixture.dim)
    result = torch.zeros(mixture.batch_shape, dtype=torch.float64)
    for row in np.ndindex(*mixture.batch_shape):
        rows = [t[row].numpy() for t in (targets.lower, targets.upper, targets.kinds())]
        values = [
            reference(mixture.locs[row][k].numpy(), matrices[row][k].numpy(), *rows, df)
            for k in range(mixture.n_components)
        ]
        result[row] = torch.log((mixture.logits[row].exp() * torch.tensor(values)).sum())
    return result


# Likelihood


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@pytest.mark.parametrize("name", NOISE)
def test_one_interval_in_a_row_is_exact(name, batch_shape):
    mixture = make_mixture(NOISE[name], batch_shape)
    y = mixture.sample()
    targets = observed(y, kinds_of(y.shape, intervals=1))
    assert_close(mixture.log_prob(targets), expected(mixture, targets), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NOISE)
def test_boxes(name):
    """Several intervals in a row: exact for independent outputs, and otherwise by 128 points."""
    mixture = make_mixture(NOISE[name], (8,))
    targets = observed(mixture.sample(), kinds_of((8, 4)))
    assert ((targets.kinds() == INTERVAL).sum(-1) > 1).any()
    tolerance = 1e-5 if mixture.covariance.is_diagonal else 0.01  # scipy's own error is about a millionth
    assert_close(mixture.log_prob(targets), expected(mixture, targets), rtol=0, atol=tolerance)


@pytest.mark.parametrize("noise", [Diagonal(), Full()], ids=["diagonal", "full"])
def test_boxes_of_student_components(noise):
    """Outputs are dependent for a diagonal scale too: conditioning widens the others."""
    torch.manual_seed(1)
    network = MixtureDensityNetwork(2, 3, 2, 8, family=StudentT(noise, df=4.0)).double()
    with torch.no_grad():
        mixture = network(torch.randn(6, 2, dtype=torch.float64))
    kinds = torch.tensor([[0, 1, 2], [1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 2, 1], [0, 0, 0]])
    targets = observed(mixture.sample(), kinds)
    one = (kinds == INTERVAL).sum(-1) <= 1
    result, truth = mixture.log_prob(targets), expected(mixture, targets, df=4.0)
    assert_close(result[one], truth[one], rtol=1e-8, atol=1e-8)
    assert_close(result, truth, rtol=0, atol=0.01)  # scipy's integral is by as few digits


def correlated(rho, dtype=torch.float64, dim=2):
    """One normal component of unit variances."""
    matrix = torch.full((dim, dim), rho, dtype=torch.float64).fill_diagonal_(1.0)
    root = torch.linalg.cholesky(matrix)[None, None].to(dtype)
    locs = torch.zeros(1, 1, dim, dtype=dtype)
    return GaussianMixture(torch.zeros(1, 1, dtype=dtype), locs, FullCovariance.from_root(root))


def above(*limits, dtype=torch.float64):
    """All outputs above limits."""
    return Targets.interval(torch.tensor([limits], dtype=dtype), torch.full((1, len(limits)), math.inf, dtype=dtype))


def both_above(rho, a, b):
    """Logarithm of that probability for two outputs, by quadrature over the one with the rarer interval."""
    a, b = max(a, b), min(a, b)

    def integrand(t):  # relative to the density at the limit, which may underflow
        return math.exp(-0.5 * t * (2 * a + t)) * stats.norm.sf((b - rho * (a + t)) / math.sqrt(1 - rho**2))

    return math.log(integrate.quad(integrand, 0, 12, epsrel=1e-11, points=[0.1, 1.0])[0]) + stats.norm.logpdf(a)


@pytest.mark.parametrize("limits", [(0, 3), (0, 4), (-1, 5), (0, 8), (3, 3), (6, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("rho", [-0.5, 0.5, 0.9, 0.99])
def test_rare_intervals_in_any_order(rho, limits):
    """An outlier in one of two dependent outputs: the order of the outputs does not matter, nor does the precision."""
    truth = both_above(rho, *limits)
    for order in (limits, limits[::-1]):
        for dtype in (torch.float64, torch.float32):
            result = correlated(rho, dtype).log_prob(above(*order, dtype=dtype)).double().item()
            assert result == pytest.approx(truth, abs=0.05 if limits[0] > 0 else 0.01, rel=1e-5)


def test_order_of_outputs_does_not_matter():
    mixture, limits = correlated(0.8, dim=3), (-1.0, 0.0, 3.0)
    matrix, accurate = 0.8 + 0.2 * np.eye(3), {"abseps": 1e-9, "releps": 1e-9}
    truth = math.log(stats.multivariate_normal.cdf([1.0, 0.0, -3.0], np.zeros(3), matrix, **accurate))
    for order in itertools.permutations(limits):
        assert mixture.log_prob(above(*order)).item() == pytest.approx(truth, abs=0.01)


@pytest.mark.parametrize("df", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_limit_is_as_good_as_none(df, dtype):
    """Nor does it matter on which side of the mode the interval lies."""
    scale, locs = IsotropicCovariance(torch.ones(1, 1)), torch.zeros(1, 1, 1)
    components = StudentTComponents(locs, scale, torch.tensor([[df or 1.0]]))
    mixture = GaussianMixture(torch.zeros(1, 1), locs, scale) if df is None else Mixture(torch.zeros(1, 1), components)
    mixture = mixture.to(dtype)
    for near in (3.0, -1.0, 0.0):
        truth = (stats.norm if df is None else stats.t(df)).logsf(near)
        for far in (1e9, 1e17, 1e30, math.inf):
            right = Targets.interval([[near]], [[far]]).to(dtype)
            left = Targets.interval([[-far]], [[-near]]).to(dtype)
            for targets in (right, left):
                assert mixture.log_prob(targets).item() == pytest.approx(
                    truth, rel=1e-5 if dtype == torch.float32 else 1e-9
                )


@pytest.mark.parametrize(("centre", "width"), [(100, 1e-4), (128, 2**-13), (1024, 2**-10), (8192, 2**-9), (0.5, 1e-3)])
def test_narrow_cells_far_out_in_heavy_tails(centre, width):
    """A density and its width, where a difference of probabilities has no digits."""
    components = StudentTComponents(torch.zeros(1, 1, 1), IsotropicCovariance(torch.ones(1, 1)), torch.tensor([[4.0]]))
    mixture = Mixture(torch.zeros(1, 1), components)
    low, high = (torch.tensor([[centre + sign * width / 2]], dtype=torch.float32) for sign in (-1, 1))
    truth = stats.t(4).logpdf(centre) + math.log((high - low).item())
    assert mixture.log_prob(Targets.interval(low, high)).item() == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 200.0), (torch.float64, 800.0)])
def test_far_intervals_of_a_law_of_ones_own(dtype, far):
    """Where its cdf underflows, the density and its slope say what is left, with a gradient."""
    locs = torch.zeros(1, 1, 1, dtype=dtype, requires_grad=True)
    components = IndependentComponents(locs, torch.ones(1, 1, 1, dtype=dtype), LaplaceLaw())
    mixture = Mixture(torch.zeros(1, 1, dtype=dtype), components)
    for low, high, truth in ((far, math.inf, -far), (far, far + 1, -far + math.log1p(-math.exp(-1)))):
        result = mixture.log_prob(Targets.interval([[low]], [[high]]).to(dtype))
        assert result.item() == pytest.approx(truth - math.log(2), rel=1e-5)
        assert torch.autograd.grad(result.sum(), locs)[0].item() == pytest.approx(1.0, rel=1e-3)


TRANSFORMS = {
    "vmap": torch.vmap,
    "jvp": lambda f: lambda z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[0],
    "vjp": lambda f: lambda z: torch.func.vjp(f, z)[0],
    "compile": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_far_tails_of_a_law_of_ones_own_are_transformed(transform):
    law, z = LaplaceLaw(), torch.tensor([-200.0, -3.0, 1.0])
    torch.compiler.reset()
    expected = torch.tensor([-200 - math.log(2), -3 - math.log(2), math.log1p(-0.5 * math.exp(-1))])
    assert_close(TRANSFORMS[transform](law.log_cdf)(z), expected)

    def log_mass(at):
        return law.log_mass(at, torch.full_like(at, 0.5))

    assert_close(TRANSFORMS[transform](log_mass)(z), log_mass(z))
    slopes = torch.vmap(torch.func.grad(law.log_cdf))(z)
    hazard = (law.log_density(z) - expected).exp()
    assert_close(slopes, hazard)


@pytest.mark.parametrize("name", ["full", "low_rank", "diagonal-tied"])
def test_intervals_add_up(name):
    """Left of a cut and right of it are everything; what lies between two cuts is a difference."""
    mixture = make_mixture(NOISE[name], (5,))
    y = mixture.sample()
    kinds = kinds_of(y.shape, intervals=0)
    kinds[:, 2] = INTERVAL

    def likelihood(low, high):
        lower = torch.where(kinds == EXACT, y, torch.full_like(y, -math.inf))
        upper = torch.where(kinds == EXACT, y, torch.full_like(y, math.inf))
        lower[:, 2], upper[:, 2] = low, high
        return mixture.log_prob(Targets.interval(lower, upper)).exp()

    below, above = y[:, 2] - 0.5, y[:, 2] + 0.8
    kinds[:, 2] = MISSING
    whole = likelihood(-math.inf, math.inf)
    kinds[:, 2] = INTERVAL
    parts = likelihood(-math.inf, below), likelihood(below, above), likelihood(above, math.inf)
    assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    assert_close(parts[0] + parts[1], likelihood(-math.inf, above), rtol=1e-12, atol=0)


def test_exact_and_missing_targets_are_those_of_tensors():
    mixture = make_mixture(Full())
    y = mixture.sample()
    y[1, 2], y[3] = math.nan, math.nan
    for function in ("log_prob", "component_log_prob", "responsibilities"):
        assert_close(getattr(mixture, function)(Targets.exact(y)), getattr(mixture, function)(y), rtol=0, atol=0)
    assert_close(scores.log_score(mixture, Targets.exact(y))[:3], scores.log_score(mixture, y)[:3], rtol=0, atol=0)


def test_comparisons_of_predictions():
    """By the likelihood of intervals, row by row."""
    near, far = make_mixture(Full(), (6,)), make_mixture(Diagonal(), (6,))
    targets = observed(near.sample(), kinds_of((6, 4)))
    result = scores.compare({"near": near, "far": far}, targets)
    for name, mixture in (("near", near), ("far", far)):
        assert result[name].log_score == pytest.approx(-mixture.log_prob(targets).mean().item())


@pytest.mark.parametrize("name", NOISE)
def test_narrow_cells_have_the_probability_of_their_density(name):
    mixture = make_mixture(NOISE[name])
    y, width = mixture.sample(), 1e-5
    cells = mixture.log_prob(Targets.cells(y, width))
    assert_close(cells, mixture.log_prob(y) + 4 * math.log(width), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NOISE)
def test_responsibilities_given_intervals(name):
    """Bayes' rule, by the likelihood of each component alone."""
    mixture = make_mixture(NOISE[name])
    targets = observed(mixture.sample(), kinds_of((5, 4)))
    joint = mixture.logits + mixture.component_log_prob(targets)
    assert_close(mixture.responsibilities(targets), joint.softmax(-1))
    assert_close(mixture.log_prob(targets), joint.logsumexp(-1))


@pytest.mark.parametrize("family", [Full(), Diagonal(), StudentT(Full(), df=3.0)], ids=["full", "diagonal", "student"])
def test_gradients(family):
    """To everything, first and second, of rows of all kinds."""
    kinds = torch.tensor([[1, 1, 0], [0, 1, 2], [1, 1, 1], [2, 2, 2]])
    settings = {"family": family} if isinstance(family, StudentT) else {"noise": family}
    network = MixtureDensityNetwork(2, 3, 2, 4, seed=0, **settings).double()
    y = network(torch.randn(4, 2, dtype=torch.float64)).sample()
    targets = observed(y, kinds)

    def function(features):
        return network.head.log_prob(features, targets)

    features = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, features, fast_mode=True)
    if not isinstance(family, StudentT):
        assert torch.autograd.gradgradcheck(function, features, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("noise", [Diagonal(), Full()], ids=["diagonal", "full"])
def test_far_from_all_components(noise):
    """Limits and values up to a million deviations away: finite, the same in both precisions, and so are gradients."""
    network = MixtureDensityNetwork(2, 2, 3, 8, noise=noise, seed=0)
    far = torch.tensor([1e1, -1e2, 1e3, -1e4, 1e5, -1e6, 30.0]).unsqueeze(-1).expand(-1, 2)
    x = torch.randn(7, 2)
    columns = [Targets.censored(far, right=torch.ones_like(far)), Targets.censored(far, left=torch.ones_like(far))]
    columns += [Targets.cells(far, 0.5), Targets.censored(far, right=torch.tensor([[True, False]] * 7))]
    for targets in columns:
        network.zero_grad()
        losses = network.loss(x, targets)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert_close(losses.double(), copy.deepcopy(network).double().loss(x.double(), targets), rtol=1e-4, atol=1e-3)
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_widest_precision():
    """Limits in double precision are compared with a mixture in single precision without being rounded first."""
    covariance = IsotropicCovariance(torch.full((1, 1), 1e-3))
    mixture = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), 1000.0), covariance)
    cell = Targets.cells(torch.tensor([[1000.0001]], dtype=torch.float64), 1e-4)
    truth = math.log(stats.norm.cdf(0.15) - stats.norm.cdf(0.05))
    result = mixture.log_prob(cell)
    assert result.dtype == torch.float32
    assert_close(result.item(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [1e-2, 1e-4, 1e-5])
def test_cells_that_single_precision_cannot_tell_from_points(width):
    """A network in single precision compares limits in double precision, in its own units too."""
    network, x = MixtureDensityNetwork(1, 1, 1, 4, seed=0), torch.randn(100, 1)
    y = 1000 * torch.randn(100, 1, dtype=torch.float64)
    network.initialize_(x, y)
    targets = Targets.cells(y, width)
    with torch.no_grad():
        assert_close(network.loss(x, targets).double(), -network(x).double().log_prob(targets), rtol=0, atol=1e-4)


def test_infinite_targets_do_not_pass_for_intervals():
    """Beside a missing entry, and without validation: log(0) is no certainty."""
    network, x, y = MixtureDensityNetwork(1, 2, 2, 8, seed=0), torch.randn(6, 1), torch.randn(6, 2)
    y[0, 0], y[1, 1] = math.nan, -math.inf
    with unvalidated():
        assert network.loss(x, y).isfinite().tolist() == [True, False, True, True, True, True]
        assert network(x).log_prob(y)[1] == -math.inf


# Networks


@pytest.mark.parametrize("noise", [Full(), Isotropic(), Diagonal(homoscedastic=True)], ids=str)
def test_loss_of_a_network(noise):
    """In its units, from the raw outputs of the head, as that of the mixture: densities have units, but not masses."""
    network = MixtureDensityNetwork(2, 3, 2, 8, noise=noise, seed=0).double()
    x = torch.randn(9, 2, dtype=torch.float64)
    network.initialize_(x, 50 + 7 * torch.randn(9, 3, dtype=torch.float64))
    with torch.no_grad():
        targets = observed(network(x).sample(), kinds_of((9, 3)))
        mixture = network(x)
        mixture.logits  # noqa: B018 (built, so that the density is that of the mixture)
        assert_close(network.loss(x, targets), -mixture.log_prob(targets), rtol=1e-9, atol=1e-9)
        handle = network.register_forward_hook(lambda *args: None)
        assert_close(network.loss(x, targets), -mixture.log_prob(targets), rtol=1e-9, atol=1e-9)
        handle.remove()


def test_loss_of_an_ensemble():
    ensemble = DeepEnsemble(MixtureDensityNetwork(2, 2, 2, 8, noise=Full(), seed=0), size=2)
    x = torch.randn(2, 6, 2)
    targets = observed(torch.randn(2, 6, 2), kinds_of((2, 6, 2)))
    losses = ensemble.loss(x, targets)
    for i in range(2):
        assert_close(losses[i], ensemble.member(i).loss(x[i], targets[i]))


def test_one_output_without_an_axis():
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0)
    x, y = torch.randn(5, 1), torch.randn(5)
    targets = Targets.censored(y, right=y > 0)
    assert_close(network.loss(x, targets), network.loss(x, targets.unsqueeze(-1)))
    assert_close(network(x).log_prob(targets), -network.loss(x, targets), rtol=1e-5, atol=1e-5)


def regimes(rows=800):
    """Two regimes of log-times, of which the later ones are censored, as lines in x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 1, generator=generator) * 2 - 1
    slow = torch.rand(rows, 1, generator=generator) < 0.5
    time = torch.where(slow, 2 + 0.5 * x, -x) + 0.2 * torch.randn(rows, 1, generator=generator)
    limit = 1 + torch.rand(rows, 1, generator=generator) * 1.5
    return x, time, Targets.censored(torch.minimum(time, limit), right=limit < time)


def test_censored_targets_are_learned_from():
    """The share and the place of the late regime, which values cut at their limits would lose."""
    x, _, targets = regimes()
    settings = {"seed": 0, "max_epochs": 60, "few_rows": False, "progress": False}
    network, naive = (MixtureDensityNetwork(1, 1, 3, 16, seed=0) for _ in range(2))
    result = fit(network, x, targets, **settings)
    fit(naive, x, targets.points(), **settings)
    held, held_time, _ = regimes(4000)
    with torch.no_grad():
        nll, cut = (net.loss(held, held_time).mean() for net in (network, naive))
        true = [0.5 * stats.norm.pdf(held_time, loc, 0.2) for loc in (2 + 0.5 * held, -held)]
        assert nll < -np.log(sum(true)).mean() + 0.15 < cut - 0.3
    count = int((targets.kinds() == INTERVAL).sum())
    assert count > 100
    assert result.intervals == [count]
    assert result.unobserved == [0]


def test_counts_of_a_fit():
    x, y = torch.randn(60, 2), torch.randn(60, 3)
    kinds = kinds_of((60, 3))
    kinds[:5] = MISSING
    few = observed(y, kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingTargetsWarning)  # what is missing there is so on purpose
        result = fit(MixtureDensityNetwork(2, 3, 2, 8, seed=0), x, few, validation=0.0, **QUICK)
        lone = Targets.exact(y.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)))
        fit(MixtureDensityNetwork(2, 3, 2, 8, seed=0), x, lone, **QUICK)
    assert result.intervals == (kinds == INTERVAL).sum(0).tolist()
    assert result.unobserved == (kinds == MISSING).sum(0).tolist()
    assert fit(MixtureDensityNetwork(2, 3, 2, 8, seed=0), x, y, **QUICK).intervals == [0, 0, 0]


@pytest.mark.parametrize("size", [None, 2])
def test_exact_targets_train_as_tensors(size):
    """Bit for bit, also with weights, gaps and held-out rows of their own."""
    x, y, weight = torch.randn(80, 2), torch.randn(80, 2).mul(100).round(), torch.rand(80)
    y[::7, 1] = math.nan
    networks = [MixtureDensityNetwork(2, 2, 2, 8, seed=0) for _ in range(2)]
    if size is not None:
        networks = [DeepEnsemble(networks[0], size)]
        networks.append(copy.deepcopy(networks[0]))
    held_out = x[:9], y[:9]
    fit(networks[0], x, y, sample_weight=weight, validation=held_out, **QUICK)
    held_out = x[:9], Targets.exact(y[:9])
    fit(networks[1], x, Targets.exact(y), sample_weight=weight, validation=held_out, **QUICK)
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_runs_are_of_the_same_targets(tmp_path):
    x, _, targets = regimes(100)
    settings = {"seed": 0, "progress": False, "max_epochs": 6}
    path = tmp_path / "run.safetensors"
    whole, first, second = (MixtureDensityNetwork(1, 1, 2, 8, seed=0) for _ in range(3))
    fit(whole, x, targets, **settings)

    def interrupt(result):
        if len(result.history) == 4:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fit(first, x, targets, checkpoint=path, checkpoint_every=1, callbacks=[interrupt], **settings)
    other = Targets(targets.lower, torch.where(targets.upper.isinf(), targets.upper, targets.upper + 0.1))
    with pytest.raises(ValueError, match="data"):
        fit(second, x, other, checkpoint=path, resume=True, **settings)
    fit(second, x, targets, checkpoint=path, resume=True, **settings)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("far", [math.inf, 1e2, 1e6, 3e38])
def test_where_training_starts(far):
    """Limits that say nothing do not stretch the scalers."""
    x, y = torch.randn(400, 1), torch.randn(400, 1)
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0)
    network.initialize_(x, Targets.interval(y, torch.where(y > 0.5, torch.full_like(y, far), y)))
    assert 0.5 < network.head.scale.item() < 1.2
    assert_close(Targets.cells(y, 0.5).points(), y)
    assert Targets.interval([[0.0]] * 3, [[1.0], [0.0], [math.inf]]).points().flatten().tolist() == [0.0, 0.0, 0.0]
    assert Targets.interval([[-math.inf], [2.0]], [[1.0], [math.inf]]).points().flatten().tolist() == [1.0, 2.0]


def test_grids_beside_intervals():
    """Exact targets on a grid are spread over their cells; the ends of intervals stay where they are."""
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0).double()
    x, y = torch.randn(6, 1, dtype=torch.float64), torch.tensor([[0.0], [1], [2], [0], [1], [2]], dtype=torch.float64)
    right = torch.tensor([[True]] * 2 + [[False]] * 4)
    objective = NegativeLogLikelihood(network, 1.0).eval()
    losses = objective(x, Targets.censored(y, right=right))
    assert_close(losses[2:], objective(x, y)[2:])
    survival = network(x).log_sf(y).squeeze(-1)
    assert_close(losses[:2], -survival[:2], rtol=1e-6, atol=1e-6)


def collate(rows):
    """Sequences of several lengths, the last entries of which are censored."""
    xs, ys = zip(*rows, strict=True)
    y = torch.nn.utils.rnn.pad_sequence(ys, batch_first=True, padding_value=math.nan)
    return torch.nn.utils.rnn.pad_sequence(xs, batch_first=True), Targets.censored(y, right=y > 1)


def test_loaders_and_padded_sequences():
    """Steps that a batch is padded by were not observed: neither losses nor counts change."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 5, 4, 5, 1, 5]
    rows = [tuple(torch.randn(n, width, generator=generator) for width in (2, 1)) for n in lengths]
    whole = collate(rows)
    network, other = (MixtureDensityNetwork(2, 1, 2, 8, seed=0) for _ in range(2))
    result = fit(network, DataLoader(rows, batch_size=4, collate_fn=collate), validation=0.0, **QUICK)
    assert result.intervals == [sum(int((y > 1).sum()) for _, y in rows)]
    fit(other, DataLoader(rows, batch_size=4, collate_fn=collate), validation=whole, **QUICK)
    parts = [Rows(*collate(rows[:1])), Rows(*collate(rows[1:]))]
    joint = Rows.joined(parts)
    assert joint.y.kinds().flatten().tolist() == whole[1].kinds().flatten().tolist()
    losses = network.loss(joint.x, joint.y)
    alone = [network.loss(x, collate([(x, y)])[1][0]) for x, y in rows]
    for loss, expected, n in zip(losses, alone, lengths, strict=True):
        assert_close(loss[:n], expected, rtol=1e-4, atol=1e-5)
        assert_close(loss[n:], torch.zeros(5 - n), rtol=0, atol=1e-6)


def test_lightning(tmp_path):
    """Batches of Targets: the logged loss of held-out rows is their likelihood."""
    x, _, targets = regimes(64)
    network = MixtureDensityNetwork(1, 1, 2, 8, seed=0)
    network.initialize_(x, targets)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False, **settings)

    def batches():
        positions = [list(range(start, start + 16)) for start in range(0, 64, 16)]
        return DataLoader(range(64), batch_sampler=positions, collate_fn=lambda at: (x[at], targets[at]))

    module = LightningObjective(NegativeLogLikelihood(network))
    trainer.fit(module, batches(), batches())
    logged = trainer.callback_metrics["validation_loss"]
    assert_close(logged, network.loss(x, targets).mean().detach(), rtol=1e-4, atol=1e-5)


# Pyro and posteriors


def test_a_site_of_a_pyro_model():
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 2, 2, 8, noise=Full(), seed=0)
    x = torch.randn(7, 1)
    targets = observed(torch.randn(7, 2), kinds_of((7, 2)))
    trace = pyro.poutine.trace(network.model).get_trace(x, targets)
    assert_close(trace.log_prob_sum(), -network.loss(x, targets).sum())

    def model():
        with pyro.plate("rows", 7):
            pyro.sample("y", network(x), obs=targets)

    svi = SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    assert_close(svi.evaluate_loss(), network.loss(x, targets).sum().item())


def test_posteriors():
    """The joint density that they go by is that of the model; each of them runs."""
    x, _, targets = regimes(60)
    network = bayesianize(MixtureDensityNetwork(1, 1, 2, 8, seed=0), layers="head")
    network.initialize_(x, targets)
    with undisturbed(network):
        joint = LogJoint(network, rows_of(network, x, targets))
        conditioned = pyro.poutine.condition(network.model, data=dict(joint.start))
        expected = pyro.poutine.trace(conditioned).get_trace(x, targets).log_prob_sum()
        assert_close(joint(joint.start).float(), expected.detach(), rtol=1e-4, atol=1e-3)
    for posterior in (
        laplace(network, x, targets, max_iter=5, progress=False),
        fit_mcmc(network, x, targets, num_samples=3, warmup_steps=3, num_chains=1, progress=False),
        fit(network, x, targets, guide=AutoNormal, num_particles=2, **QUICK).guide,
    ):
        mixture = posterior_predictive(network, posterior, x[:4], num_samples=3)
        each = torch.stack([mixture[i].log_prob(targets[:4]) for i in range(3)])
        assert_close(mixture.log_prob(targets[:4]), each)
    kernel = NUTS(network.model)
    MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True).run(x, targets)


# What makes them


def test_what_they_say():
    y = [[1.0, 2.0], [3.0, None], [5.0, 6.0]]
    targets = Targets.censored(y, left=[[1, 0], [0, 0], [0, 0]], right=[[0, 0], [0, 0], [0, 1]])
    assert targets.kinds().tolist() == [[INTERVAL, EXACT], [EXACT, MISSING], [EXACT, INTERVAL]]
    assert repr(targets) == "Targets(shape=(3, 2), 3 exact, 2 intervals, 1 missing)"
    assert_close(targets.points(), torch.tensor([*y[:1], [3.0, math.nan], *y[2:]]).double(), equal_nan=True)
    assert targets[1:].shape == (2, 2)
    cells = Targets.cells(pandas.DataFrame({"a": [1, 2], "b": [None, 4.5]}), [1.0, 0.0])
    assert cells.lower.tolist() == [[0.5, -math.inf], [1.5, 4.5]]
    assert cells.upper.tolist() == [[1.5, math.inf], [2.5, 4.5]]
    assert Targets.cells(torch.ones(3, 1), 0.0).kinds().unique().item() == EXACT
    assert [part.shape[0] for part in targets.split(2)] == [2, 1]


ONE = [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Targets.interval([[1.0], [3.0]], [[2.0], [2.0]]),
            "lower: expected limits below the upper.* row 1",
        ),
        (lambda: Targets.interval(ONE, [[2.0], [math.nan]]), "upper: expected limits, .*got nan in row 1, column 0"),
        (lambda: Targets.interval([[math.inf]], [[math.inf]]), "lower: expected limits below the upper ones, or equal"),
        (lambda: Targets.interval(ONE, [[2.0, 3.0]]), r"expected limits of one shape, got \(2, 1\) and \(1, 2\)"),
        (
            lambda: Targets.censored(ONE, left=[[1], [0]], right=[[1], [0]]),
            "left, right: expected an entry .*row 0",
        ),
        (lambda: Targets.censored(ONE, left=[True, False]), r"left: expected a mask in the shape of y, \(2, 1\)"),
        (lambda: Targets.censored(ONE, right=[[0.5], [0]]), "right: expected booleans, got 0.5 in row 0"),
        (lambda: Targets.censored([[1.0], [math.inf]]), "y: expected finite numbers, or NaN .*got inf in row 1"),
        (lambda: Targets.cells(ONE, -1.0), "width: expected 1 finite numbers, none negative, or one, got -1.0"),
        (lambda: Targets.cells(ONE, [1.0, 2.0]), "width: expected 1 finite numbers, none negative, or one"),
        (lambda: Targets.cells(torch.tensor([[3.0], [1e5]]), 1e-3), "y: expected numbers that torch.float32 .*row 1"),
        (lambda: Targets(torch.tensor([1]), torch.tensor([2])), "expected floating point, got torch.int64"),
        (lambda: Targets.exact([["a"]]), "y: expected numbers, got text"),
    ],
)
def test_what_cannot_be_targets(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_where_intervals_cannot_go():
    network, x = MixtureDensityNetwork(1, 1, 2, 8, seed=0), torch.randn(20, 1)
    targets = Targets.censored(x, right=x > 0.5)
    with pytest.raises(ValueError, match="y: expected exact targets for the CRPS, got intervals; log_prob"):
        ContinuousRankedProbability(network)(x, targets)
    exact = ContinuousRankedProbability(network)(x, Targets.exact(x))
    assert_close(exact, ContinuousRankedProbability(network)(x, x))
    with pytest.raises(ValueError, match=r"y: expected shape \(20, 1\) as x has it, got \(19, 1\)"):
        network.loss(x, targets[1:])
    with pytest.raises(ValueError, match="compile: expected exact and complete targets"):
        fit(network, x, targets, compile=True, **QUICK)
    message = "expected exact targets for an operation without a likelihood, got intervals"
    mixture = network(x)
    for refuses in (
        lambda: scores.crps(mixture, targets),
        lambda: mixture.cdf(targets),
        lambda: mixture.in_highest_density_region(targets, 0.5),
        lambda: calibration.coverage_table(mixture, targets),
    ):
        with pytest.raises(ValueError, match=message):
            refuses()
    assert_close(scores.crps(mixture, Targets.exact(x)), scores.crps(mixture, x))
    assert_close(
        network.predict(x).log_prob(targets), network.loss(x, targets).neg().detach().numpy(), atol=1e-5, rtol=1e-4
    )
    huge = Targets.censored(torch.tensor([[1e300]] * 20, dtype=torch.float64), right=[[True]] * 20)
    with pytest.raises(ValueError, match=r"y: expected finite numbers.*got 1e\+300"):
        fit(network, x, huge, **QUICK)
    ensemble = DeepEnsemble(network, 2)
    objective = WeightedSum([ContinuousRankedProbability(ensemble.stacked)], [1.0])
    with pytest.raises(ValueError, match="y: expected exact targets for an objective that is mapped over members"):
        fit(ensemble, x, targets, objective=objective, **QUICK)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_no_transform_hides_the_kinds():
    """Whatever is compiled or mapped cannot look at the kinds of entries: an error says so."""
    network, x = MixtureDensityNetwork(1, 1, 2, 8, seed=0), torch.randn(20, 1)
    with pytest.raises(ValueError, match=r"expected a tensor of complete points under torch\.vmap"):
        torch.vmap(lambda row, y: network(row).log_prob(Targets(y, y + 1)))(x, x)
    with torch.no_grad():
        mixture: Mixture = network(x)
    with pytest.raises(ValueError, match=r"complete points under torch\.compile or torch\.jit"):
        torch.jit.trace(lambda y: mixture.log_prob(Targets(y, y + 1)), x, check_trace=False)


def test_transforms_that_only_differentiate():
    """Also where the points of the integral were not needed before."""
    boxes._levels.cache_clear()
    network, x = MixtureDensityNetwork(2, 2, 2, 8, noise=Full(), seed=0), torch.randn(6, 2)
    targets = Targets.cells(torch.randn(6, 2), 0.5)
    gradient = torch.func.grad(lambda inputs: network.loss(inputs, targets).sum())(x)
    x.requires_grad_()
    assert_close(gradient, torch.autograd.grad(network.loss(x, targets).sum(), x)[0])


def test_no_rows():
    network, targets = MixtureDensityNetwork(1, 2, 2, 8, seed=0), Targets.cells(torch.randn(3, 2), 0.5)
    assert network.loss(torch.zeros(0, 1), targets[:0]).shape == (0,)
    assert network(torch.zeros(0, 1)).responsibilities(targets[:0]).shape == (0, 2)


def test_heads_take_them():
    head = make_head(Full(), dim=2)
    features = torch.randn(4, 6, dtype=torch.float64)
    targets = observed(torch.randn(4, 2, dtype=torch.float64), kinds_of((4, 2)))
    assert_close(head.log_prob(features, targets), head(features).log_prob(targets), rtol=1e-9, atol=1e-9)
