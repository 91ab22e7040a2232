"""Every operation of a mixture: under transforms, in half precision, with arguments of another precision."""

import inspect

import numpy as np
import pytest
import torch
from cases import DIM, NOISE, make_mixture
from pyro.distributions import MixtureSameFamily
from torch.testing import assert_close

from pyro_mdn import (
    DiagonalCovariance,
    FullCovariance,
    GaussianMixture,
    LowRankCovariance,
    kl_monte_carlo,
    kl_variational_approximation,
)
from pyro_mdn.distributions.covariance.base import Covariance

NAMES = ("full", "low_rank-homoscedastic", "diagonal-tied", "isotropic", "full-tied-homoscedastic", "fixed")
every_structure = pytest.mark.parametrize("noise", [NOISE[name] for name in NAMES], ids=NAMES)

# Functions of a mixture, points ``(*batch, D)`` and levels of that shape in (0, 1), by name of the method.
OPERATIONS = {
    "log_prob": lambda m, y, u: m.log_prob(y),
    "component_log_prob": lambda m, y, u: m.component_log_prob(y),
    "responsibilities": lambda m, y, u: m.responsibilities(y),
    "mean": lambda m, y, u: m.mean,
    "variance": lambda m, y, u: m.variance,
    "stddev": lambda m, y, u: m.stddev,
    "covariance_matrix": lambda m, y, u: m.covariance_matrix,
    "as_gaussian": lambda m, y, u: m.as_gaussian(),
    "marginal": lambda m, y, u: m.marginal([2, 0]),
    "condition": lambda m, y, u: m.condition(y[..., :2], [3, 1]),
    "affine": lambda m, y, u: m.affine(y, u + 0.5),
    "affine by a matrix": lambda m, y, u: m.affine(y[..., :2], matrix=u[..., None, :] + torch.eye(2, DIM, out=y.new())),
    "temper": lambda m, y, u: m.temper(0.5),
    "truncated": lambda m, y, u: m.marginal(1).truncated(y[..., :1] - 2, y[..., :1] + 1).cdf(y[..., :1]),
    "truncated quantile": lambda m, y, u: m.marginal(1).truncated(low=y[..., :1]).icdf(0.3),
    "product": lambda m, y, u: m.product(m.affine(0.3)),
    "prune": lambda m, y, u: m.prune(1e-3),
    "cdf": lambda m, y, u: m.cdf(y),
    "sf": lambda m, y, u: m.sf(y),
    "log_cdf": lambda m, y, u: m.log_cdf(y),
    "log_sf": lambda m, y, u: m.log_sf(y),
    "icdf": lambda m, y, u: m.icdf(u),
    "icdf of one level": lambda m, y, u: m.icdf(0.3),
    "interval": lambda m, y, u: m.interval(0.8),
    "rosenblatt": lambda m, y, u: m.rosenblatt(y),
    "inverse_rosenblatt": lambda m, y, u: m.inverse_rosenblatt(u),
    "entropy_bounds": lambda m, y, u: m.entropy_bounds(),
    "expand": lambda m, y, u: m.expand((2, *m.batch_shape)),
    "pool": lambda m, y, u: m.expand((2, *m.batch_shape)).pool(0),
    "split_variance": lambda m, y, u: m.expand((2, *m.batch_shape)).split_variance(),
    "detach": lambda m, y, u: m.detach(),
    "kl_variational_approximation": lambda m, y, u: kl_variational_approximation(m, m.affine(0.3)),
}
# The sizes of their results depend on numbers.
OF_NUMBERS = {
    "interval, shortest": lambda m, y, u: m.interval(0.8, kind="shortest"),
    "modes": lambda m, y, u: m.modes(),
    "reduce": lambda m, y, u: m.reduce(2),
}
# Draws, and what is estimated from them.
RANDOM = {
    "sample": lambda m, y, u: m.sample((500,)),
    "rsample": lambda m, y, u: m.rsample((500,)),
    "highest_density_threshold": lambda m, y, u: m.highest_density_threshold(0.5, num_samples=2000),
    "in_highest_density_region": lambda m, y, u: m.in_highest_density_region(y, 0.5),
    "kl_monte_carlo": lambda m, y, u: kl_monte_carlo(m, m.affine(0.3)),
}
ELSEWHERE = {
    "as_points",
    "cat",
    "stack",
    "to",
    "cpu",
    "double",
    "float",
    "deferred",
    # How operations build mixtures, and what these are asked for.
    "components",
    "derived",
    "device",
    "flatten",
    "has_rsample",
    "of_any_family",
    "of_components",
    "origin_for",
    "relative_joint_log_prob",
    "reweighted",
    "univariate",
    "validates",
    "with_components",
    "dtype",
}  # test_indexing.py
PARAMETERS = {"logits", "locs", "covariance", "n_components", "dim", "mixture_distribution", "component_distribution"}


def numbers(result):
    """All tensors of a result; of a mixture those of its parameters that do not depend on the structure."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, MixtureSameFamily):
        return [result.logits.exp(), result.locs, *numbers(result.covariance)]
    return [result.matrix()] if isinstance(result, Covariance) else [t for part in result for t in numbers(part)]


def test_no_operation_is_forgotten():
    own = {
        name
        for kind in GaussianMixture.__mro__[: GaussianMixture.__mro__.index(MixtureSameFamily)]
        for name, member in vars(kind).items()
        if not name.startswith("_") and (callable(inspect.unwrap(member)) or hasattr(member, "__get__"))
    }
    tested = {name.split(",")[0].split(" ")[0] for name in {**OPERATIONS, **OF_NUMBERS, **RANDOM}}
    assert own - tested - ELSEWHERE - PARAMETERS == {"arg_constraints", "support"} & own


# Under transforms


def rebuilt(mixture):
    """Function of parameters that builds the mixture, and its parameters, all of its batch shape."""
    covariance = mixture.covariance.expand((*mixture.batch_shape, mixture.covariance.batch_shape[-1]))

    def build(logits, locs, *tensors):
        stored = iter(tensors)
        return GaussianMixture(logits, locs, covariance.map(lambda t, n: next(stored)))

    return build, (mixture.logits, mixture.locs, *covariance.tensors())


def arguments(*batch):
    return torch.randn(*batch, DIM, dtype=torch.float64), torch.rand(*batch, DIM, dtype=torch.float64)


@every_structure
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_under_vmap(noise, operation):
    build, parameters = rebuilt(make_mixture(noise, (4,)))
    y, u = arguments(4)

    def result(y, u, *parameters):
        return numbers(operation(build(*parameters), y, u))

    rows = [result(y[i], u[i], *(p[i] for p in parameters)) for i in range(4)]
    expected = [torch.stack(row) for row in zip(*rows, strict=True)]
    assert_close(torch.vmap(result)(y, u, *parameters), expected, rtol=0, atol=1e-9)


@every_structure
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_derivatives_by_transforms(noise, operation):
    """In both modes, and for each row of a batch, they are those of autograd."""
    build, parameters = rebuilt(make_mixture(noise, (2,)))
    y, u = arguments(2)

    def result(locs, i=0):
        mixture = build(parameters[0][i], locs, *(p[i] for p in parameters[2:]))
        return torch.cat([part.flatten() for part in numbers(operation(mixture, y[i], u[i]))])

    locs = parameters[1]
    expected = torch.stack([torch.autograd.functional.jacobian(lambda m, i=i: result(m, i), locs[i]) for i in (0, 1)])
    assert_close(torch.func.jacrev(result)(locs[0]), expected[0], rtol=1e-6, atol=1e-8)
    if operation is not OPERATIONS["detach"]:  # in forward mode the outer derivatives pass through detach
        assert_close(torch.func.jacfwd(result)(locs[0]), expected[0], rtol=1e-6, atol=1e-8)
    assert_close(torch.vmap(torch.func.jacrev(result))(locs)[0], expected[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("operation", OF_NUMBERS.values(), ids=OF_NUMBERS)
def test_operations_on_numbers_are_refused_under_vmap(operation):
    build, parameters = rebuilt(make_mixture(NOISE["full"], (4,)))
    y, u = arguments()
    with pytest.raises(ValueError, match=r"expected numbers to look at, got those of torch\.vmap"):
        torch.vmap(lambda *p: numbers(operation(build(*p), y, u))[0])(*parameters)


def test_values_are_checked_outside_of_vmap_alone():
    mixture = make_mixture(NOISE["full"], (4,))
    for function in (mixture.icdf, mixture.inverse_rosenblatt):
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
            function(torch.full((4, DIM), 1.5, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"expected .* broadcast.*, got \(3"):
            function(torch.full((3, DIM), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"value: expected a shape that broadcasts with \(4, 4\), got \(3,\)"):
        mixture.icdf(torch.full((3,), 0.5))
    levels = torch.rand(7, 4, DIM, dtype=torch.float64)
    assert_close(torch.vmap(mixture.icdf)(levels), mixture.icdf(levels))
    weights = torch.rand(7, 4, dtype=torch.float64)
    pooled = torch.vmap(lambda w: mixture.pool(0, w).mean)(weights)
    assert_close(pooled, torch.stack([mixture.pool(0, w).mean for w in weights]))


# In other precisions

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
CLOSED_FORMS = {**OPERATIONS, **OF_NUMBERS}
EVERY = {**CLOSED_FORMS, **{name: RANDOM[name] for name in ("sample", "rsample", "kl_monte_carlo")}}
OF_COVARIANCES = {
    "whiten": lambda c, r: c.whiten(r),
    "colorize": lambda c, r: c.colorize(r),
    "half_log_det": lambda c, r: c.half_log_det(),
    "variance": lambda c, r: c.variance(),
    "stddev": lambda c, r: c.stddev(),
    "matrix": lambda c, r: c.matrix(),
    "root": lambda c, r: c.root() @ c.root().mT,
    "precision_tril": lambda c, r: c.precision_tril(),
    "triangular": lambda c, r: c.triangular().matrix(),
    "conditional_scale": lambda c, r: c.triangular().conditional_scale(),
    "next_output": lambda c, r: c.triangular().next_output([r[..., 0]])[1],
    "marginal": lambda c, r: c.marginal([3, 1]).matrix(),
    "condition": lambda c, r: c.condition(r[..., :2])[0],
    "condition, covariance": lambda c, r: c.condition(r[..., :2])[1].matrix(),
    "affine": lambda c, r: c.affine(r).matrix(),
}
BUILDERS = (
    "from_precision_tril",
    "from_scale_tril",
    "from_root",
    "from_precision_root",
    "from_matrix",
    "from_precision",
)


def rounded(mixture, dtype):
    return GaussianMixture(
        mixture.logits.to(dtype), mixture.locs.to(dtype), mixture.covariance.map(lambda t, n: t.to(dtype))
    )


def assert_close_within(results, expected, dtype, factor):
    """Within some units of the last place of the largest number in each tensor."""
    for result, right in zip(results, expected, strict=True):
        assert result.dtype in (dtype, torch.bool)
        size = right.nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp(min=1).item()
        tolerance = factor * torch.finfo(dtype).eps * size
        assert_close(result.to(right.dtype), right, rtol=0, atol=tolerance, equal_nan=True)


@HALVES
@every_structure
@pytest.mark.parametrize("operation", EVERY.values(), ids=EVERY)
def test_half_precision(noise, operation, dtype):
    """Parameters of half precision make what the same numbers make in single precision, but for its rounding."""
    half = rounded(make_mixture(noise), dtype)
    single = half.float()
    y, u = half.sample(), 0.05 + 0.9 * torch.rand(5, DIM).to(dtype)
    assert y.dtype == half.dtype == dtype
    torch.manual_seed(0)
    results = numbers(operation(half, y, u))
    torch.manual_seed(0)
    assert_close_within(results, numbers(operation(single, y.float(), u.float())), dtype, 16)


@HALVES
@every_structure
@pytest.mark.parametrize("operation", OF_COVARIANCES.values(), ids=OF_COVARIANCES)
def test_half_precision_of_covariances(noise, operation, dtype):
    half = rounded(make_mixture(noise), dtype).covariance
    residual = torch.randn(5, 3, DIM).to(dtype)
    expected = operation(half.map(lambda t, n: t.float()), residual.float())
    assert_close_within([operation(half, residual)], [expected], dtype, 64)


@HALVES
@pytest.mark.parametrize("builder", BUILDERS)
def test_covariances_built_in_half_precision(builder, dtype):
    root = torch.randn(5, 3, DIM, DIM) + 3 * torch.eye(DIM)
    root = (root @ root.mT if builder in BUILDERS[-2:] else root.tril() if "tril" in builder else root).to(dtype)
    results = getattr(FullCovariance, builder)(root).tensors()
    expected = getattr(FullCovariance, builder)(root.float()).tensors()
    assert_close_within(results, expected, dtype, 16)


def test_numbers_that_half_precision_cannot_square():
    """Squares of 300 are beyond it, and its own results are not."""
    factor, scale = torch.full((1, 2, 1), 300.0), torch.ones(1, 2)
    low_rank = LowRankCovariance(factor.half(), scale.half())
    mixture = GaussianMixture(torch.zeros(1).half(), torch.zeros(1, 2).half(), low_rank)
    right = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), LowRankCovariance(factor, scale))
    y = torch.tensor([[20.0, 19.0]])
    assert_close(mixture.log_prob(y.half()).float(), right.log_prob(y), rtol=2e-3, atol=0)
    assert_close(mixture.stddev.float(), right.stddev, rtol=2e-3, atol=0)
    assert_close(low_rank.half_log_det().float(), right.covariance.half_log_det(), rtol=2e-3, atol=0)
    assert_close(low_rank.whiten(y.half()).float(), right.covariance.whiten(y), rtol=2e-2, atol=2e-2)


@every_structure
@pytest.mark.parametrize("operation", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_arguments_in_double_precision(noise, operation):
    """Results are in the precision of the mixture, and rounded once."""
    single = rounded(make_mixture(noise), torch.float32)
    y, u = arguments(5)
    results, expected = (numbers(operation(mixture, y, u)) for mixture in (single, single.double()))
    assert_close_within(results, expected, torch.float32, 32)


def test_digits_of_the_arguments_count():
    """In single precision these levels would be 1, and this point its neighbour."""
    mixture = make_mixture(NOISE["full"]).float()
    levels = torch.full((5, DIM), 1 - 1e-12, dtype=torch.float64)
    assert_close(mixture.icdf(levels).double(), mixture.double().icdf(levels), rtol=1e-6, atol=0)
    narrow = GaussianMixture(torch.zeros(1), torch.full((1, 1), 2.0**20), DiagonalCovariance(torch.full((1, 1), 1e-3)))
    point = torch.tensor([2.0**20 + 1e-3], dtype=torch.float64)
    for density in (narrow.log_prob(point), narrow.component_log_prob(point).squeeze(-1)):
        assert_close(density, torch.tensor(1000.0).log() - 0.5 - 0.5 * torch.tensor(2 * torch.pi).log())


def test_other_mixtures_and_arrays_of_another_precision():
    mixture = make_mixture(NOISE["full"]).float()
    product, log_normalizer = mixture.product(mixture.double())
    assert product.dtype == log_normalizer.dtype == kl_variational_approximation(mixture, mixture.double()).dtype
    assert_close(product.mean, mixture.product(mixture).mixture.mean, rtol=1e-4, atol=1e-5)
    matrix = np.eye(2, DIM) + 0.5
    assert_close(mixture.affine(np.ones(DIM), matrix=None).mean, mixture.mean + 1)
    assert_close(mixture.affine(np.ones(2), matrix=matrix).mean, 1 + mixture.mean @ torch.from_numpy(matrix.T).float())
    weights = [1.0, 2.0, 3.0, 0.0, 2.0]
    for given in (weights, np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        assert_close(mixture.pool(0, given).mean, torch.tensor(weights) @ mixture.mean / 8)


@pytest.mark.parametrize(
    "dims",
    [
        np.array([2, 0]),
        range(2, -1, -2),
        torch.tensor([2, 0]),
        (np.int64(2), 0),
        [torch.tensor(2), 0],
        (-2, np.array(0)),
    ],
)
def test_outputs_by_any_integers(dims):
    mixture, y = make_mixture(NOISE["full"]), torch.randn(5, DIM, dtype=torch.float64)
    assert_close(mixture.marginal(dims).log_prob(y[:, [2, 0]]), mixture.marginal([2, 0]).log_prob(y[:, [2, 0]]))
    given, expected = mixture.condition(y[:, :2], dims), mixture.condition(y[:, :2], [2, 0])
    assert_close(given.log_prob(y[:, 2:]), expected.log_prob(y[:, 2:]))
    for one in (2, np.int64(2), torch.tensor(2), np.array(2), torch.tensor([2]).to(torch.uint8)):
        assert_close(mixture.marginal(one).mean, mixture.mean[:, 2:3])


@pytest.mark.parametrize(
    ("dims", "got"),
    [
        ([True, False], "list of bool"),
        ([1.7, 0], "list of float, int"),
        ("01", "str of str"),
        (None, "NoneType of NoneType"),
        (1.0, "float of float"),
        (np.array([0.0]), r"ndarray of float64 and shape \(1,\)"),
        (np.array([True, False]), r"ndarray of bool and shape \(2,\)"),
        (torch.tensor([1.0]), r"Tensor of torch.float32 and shape \(1,\)"),
        (torch.tensor([True]), r"Tensor of torch.bool and shape \(1,\)"),
        (torch.tensor([[0, 1]]), r"Tensor of torch.int64 and shape \(1, 2\)"),
        ([torch.tensor([0, 1])], "list of Tensor"),
        ([np.True_], "list of bool"),
    ],
)
def test_what_is_no_output_is_named(dims, got):
    mixture, y = make_mixture(NOISE["full"]), torch.randn(5, 2, dtype=torch.float64)
    for function in (mixture.marginal, lambda dims: mixture.condition(y, dims)):
        with pytest.raises(ValueError, match=f"dims: expected integers, got {got}$"):
            function(dims)
