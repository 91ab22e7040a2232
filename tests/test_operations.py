"""Every operation of a mixture: under transforms, in half precision, with arguments of another precision."""

import inspect

import pytest
import torch
from cases import DIM, NOISE, make_mixture
from pyro.distributions import MixtureSameFamily
from torch.testing import assert_close

from pyro_mdn import GaussianMixture, kl_monte_carlo, kl_variational_approximation
from pyro_mdn.covariance import Covariance

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)

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
    "product": lambda m, y, u: m.product(m.affine(0.3)),
    "prune": lambda m, y, u: m.prune(1e-3),
    "cdf": lambda m, y, u: m.cdf(y),
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
ELSEWHERE = {"cat", "stack", "to", "cpu", "double", "float", "deferred", "dtype", "device"}  # test_indexing.py
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


@every_noise
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_under_vmap(noise, operation):
    build, parameters = rebuilt(make_mixture(noise, (4,)))
    y, u = arguments(4)

    def result(y, u, *parameters):
        return numbers(operation(build(*parameters), y, u))

    rows = [result(y[i], u[i], *(p[i] for p in parameters)) for i in range(4)]
    expected = [torch.stack(row) for row in zip(*rows, strict=True)]
    assert_close(torch.vmap(result)(y, u, *parameters), expected, rtol=0, atol=1e-9)


@every_noise
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
