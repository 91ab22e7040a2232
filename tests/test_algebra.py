import math

import numpy as np
import pandas as pd
import pytest
import torch
from cases import BATCH_SHAPES, DIM, NOISE, make_mixture
from torch.testing import assert_close

from pyro_mdn import Diagonal, DiagonalCovariance, Full, FullCovariance, GaussianMixture, Isotropic, IsotropicCovariance
from pyro_mdn.distributions.gaussian import merging

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
NAN = math.nan


def riddled(*shape):
    """Standard normal numbers, a third of them missing, the first row entirely."""
    y = torch.randn(*shape, dtype=torch.float64)
    y[torch.rand(shape) < 1 / 3] = NAN
    y.reshape(-1, shape[-1])[0] = NAN
    return y


# Missing entries


@every_noise
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@pytest.mark.parametrize("sample_shape", [(), (6,)])
def test_missing_entries_are_marginalised(noise, batch_shape, sample_shape):
    mixture = make_mixture(noise, batch_shape)
    y = riddled(*sample_shape, *batch_shape, DIM)
    log_prob = mixture.log_prob(y)
    assert log_prob.shape == y.shape[:-1]
    wide = mixture.expand(y.shape[:-1])
    for index in [tuple(i) for i in torch.ones(y.shape[:-1]).nonzero().tolist()]:
        observed = (~y[index].isnan()).nonzero().squeeze(-1).tolist()
        expected = torch.zeros((), dtype=torch.float64)
        if observed:
            sub = wide.covariance.expand((*wide.batch_shape, 3)).map(lambda t, n, index=index: t[index])
            row = GaussianMixture(wide.logits[index], wide.locs[index], sub)
            expected = row.marginal(observed).log_prob(y[index][observed])
        assert_close(log_prob[index], expected, rtol=0, atol=1e-10)


@every_noise
def test_gradients_with_missing_entries(noise):
    mixture = make_mixture(noise, (4,), dim=3)
    y = riddled(4, 3)
    tensors = [t.clone().requires_grad_() for t in (mixture.logits, mixture.locs, *mixture.covariance.tensors())]

    def log_prob(logits, locs, *stored):
        values = iter(stored)
        return GaussianMixture(logits, locs, mixture.covariance.map(lambda t, n: next(values))).log_prob(y)

    assert torch.autograd.gradcheck(log_prob, tensors, fast_mode=True)
    y.requires_grad_()
    mixture.log_prob(y).sum().backward()
    assert y.grad.isfinite().all()
    assert (y.grad[y.isnan()] == 0).all()


def test_nothing_observed_says_nothing_about_the_component():
    mixture = make_mixture(Full())
    y = torch.full((5, DIM), NAN, dtype=torch.float64)
    assert_close(mixture.log_prob(y), torch.zeros(5, dtype=torch.float64))
    assert_close(mixture.responsibilities(y), mixture.logits.exp())


@every_noise
@pytest.mark.parametrize("dims", [[0, 1], [3, 0], [2]])
def test_conditioning_on_what_was_observed(noise, dims):
    mixture = make_mixture(noise, (6,))
    values = riddled(6, len(dims))
    free = [d for d in range(DIM) if d not in dims]
    given = mixture.condition(values, dims)
    y = torch.randn(6, len(free), dtype=torch.float64)
    # By the chain rule on the observed entries.
    joint = torch.full((6, DIM), NAN, dtype=torch.float64)
    joint[:, dims] = values
    evidence = mixture.log_prob(joint)
    joint[:, free] = y
    assert_close(given.log_prob(y), mixture.log_prob(joint) - evidence, rtol=0, atol=1e-10)
    assert type(given.covariance) is type(mixture.condition(values.nan_to_num(), dims).covariance)


# Maps and products


@every_noise
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_linear_map(noise, rows):
    mixture = make_mixture(noise)
    matrix, shift = torch.randn(rows, DIM, dtype=torch.float64), torch.randn(5, rows, dtype=torch.float64)
    moved = mixture.affine(shift, matrix=matrix)
    assert_close(moved.mean, shift + mixture.mean @ matrix.T)
    assert_close(moved.covariance_matrix, matrix @ mixture.covariance_matrix @ matrix.T)
    if rows == DIM:
        y = torch.randn(5, DIM, dtype=torch.float64)
        log_jacobian = torch.linalg.slogdet(matrix).logabsdet
        assert_close(moved.log_prob(shift + y @ matrix.T), mixture.log_prob(y) - log_jacobian, rtol=0, atol=1e-9)


def test_selecting_rows_is_the_marginal():
    mixture = make_mixture(Full())
    y = torch.randn(5, 2, dtype=torch.float64)
    chosen = mixture.affine(matrix=torch.eye(DIM, dtype=torch.float64)[[3, 1]])
    assert_close(chosen.log_prob(y), mixture.marginal([3, 1]).log_prob(y))


@every_noise
@pytest.mark.parametrize("other", ["full", "low_rank", "diagonal-tied", "isotropic"])
def test_product_is_the_product_of_densities(noise, other):
    left, right = make_mixture(noise), make_mixture(NOISE[other], n_components=2).affine(0.3, 1.2)
    product, log_normalizer = left.product(right)
    y = torch.randn(20, 5, DIM, dtype=torch.float64)
    assert product.n_components == 6
    assert_close(product.log_prob(y) + log_normalizer, left.log_prob(y) + right.log_prob(y), rtol=0, atol=1e-10)


def test_product_of_diagonals_is_diagonal_and_differentiable():
    left, right = make_mixture(Diagonal()), make_mixture(Diagonal(tied=True))
    assert isinstance(left.product(right).mixture.covariance, DiagonalCovariance)
    locs = left.locs.clone().requires_grad_()
    moved = GaussianMixture(left.logits, locs, left.covariance)
    moved.product(right).log_normalizer.sum().backward()
    assert locs.grad.abs().sum() > 0


# Fewer components


@every_noise
def test_prune_drops_small_weights(noise):
    mixture = make_mixture(noise, (), n_components=6)
    weights = mixture.logits.exp()
    threshold = weights.sort().values[2].item() + 1e-9
    pruned = mixture.prune(threshold)
    kept = weights >= threshold
    y = torch.randn(20, DIM, dtype=torch.float64)
    expected = (weights[kept] * mixture.component_log_prob(y).exp()[:, kept]).sum(-1) / weights[kept].sum()
    assert pruned.n_components == 3
    assert_close(pruned.log_prob(y), expected.log())
    with pytest.raises(ValueError, match="expected to leave components"):
        mixture.prune(0.99)


def test_prune_in_a_batch_keeps_what_one_row_needs():
    logits = torch.tensor([[0.5, 0.5, 1e-9], [1e-9, 1.0, 1e-9]]).log()
    pruned = GaussianMixture(logits, torch.randn(2, 3, 1), IsotropicCovariance(torch.ones(1))).prune(1e-3)
    assert pruned.n_components == 2
    assert_close(pruned.logits.exp(), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


@every_noise
@pytest.mark.parametrize("count", [1, 3, 6])
def test_reduction_keeps_mean_and_covariance(noise, count):
    mixture = make_mixture(noise, (2, 2), n_components=6)
    reduced = mixture.reduce(count)
    assert reduced.n_components == count
    assert_close(reduced.mean, mixture.mean)
    assert_close(reduced.covariance_matrix, mixture.covariance_matrix)


@pytest.mark.parametrize(("dim", "n_components"), [(1, 9), (2, 8), (5, 7)])
def test_reduction_follows_the_greedy_algorithm(dim, n_components):
    """Against the plain algorithm: all pairs, every time."""
    mixture = make_mixture(Full(), (), dim=dim, n_components=n_components)
    parts = list(zip(mixture.logits.exp(), mixture.locs, mixture.covariance.matrix(), strict=True))

    def merged(a, b):
        weight = a[0] + b[0]
        apart = (a[1] - b[1]).unsqueeze(-1)
        spread = a[0] * b[0] / weight**2 * apart @ apart.T
        return weight, (a[0] * a[1] + b[0] * b[1]) / weight, (a[0] * a[2] + b[0] * b[2]) / weight + spread

    def cost(a, b):
        both = merged(a, b)
        return 0.5 * (both[0] * both[2].logdet() - a[0] * a[2].logdet() - b[0] * b[2].logdet())

    while len(parts) > 3:
        i, j = min(((i, j) for i in range(len(parts)) for j in range(i)), key=lambda ij: cost(*(parts[k] for k in ij)))
        parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [merged(parts[i], parts[j])]
    expected = sorted(float(p[0]) for p in parts)
    assert_close(sorted(mixture.reduce(3).logits.exp().tolist()), expected)


def test_reduction_of_a_batch_is_that_of_each_row():
    """Also where there are more rows than are merged at once, and weights of zero."""
    mixture = make_mixture(Full(), (7, 300), dim=2, n_components=9)
    logits = mixture.logits.clone()
    logits[0, :, 2:4] = -math.inf
    mixture = GaussianMixture(logits, mixture.locs, mixture.covariance)
    reduced = mixture.reduce(4)
    for row in [(0, 0), (0, 5), (3, 17), (6, 299)]:
        alone = GaussianMixture(
            mixture.logits[row], mixture.locs[row], mixture.covariance.map(lambda t, n, row=row: t[row])
        ).reduce(4)
        assert_close(reduced.logits[row].exp(), alone.logits.exp())
        assert_close(reduced.locs[row], alone.locs)
        assert_close(reduced.covariance.matrix()[row], alone.covariance.matrix())


@pytest.mark.parametrize("far", [1.0, 30.0])
def test_components_singular_in_floating_point_are_merged_by_their_distance(far):
    """A Cholesky decomposition of their covariances fails; what it leaves then says nothing."""
    root = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 0.0, 0.0], [1 / 7, 1e-9, 1.0]]).double()
    matrices = (root @ root.T).expand(1, 4, 3, 3) * torch.tensor([1.0, 1.1, 1.0, 1.2]).double()[:, None, None]
    assert (torch.linalg.cholesky_ex(matrices).info != 0).any()
    locs = (
        torch.tensor([0.0, 1e-3, far, far + 1e-3]).double()[None, :, None] * torch.tensor([1.0, 1 / 3, 1 / 7]).double()
    )
    weights, kept, _ = merging.merge_components(torch.full((1, 4), 0.25).double(), locs, matrices, 2)
    assert_close(weights, torch.full((1, 2), 0.5).double())
    assert_close(kept[0, :, 0], torch.tensor([0.5e-3, far + 0.5e-3]).double())


def test_reduction_of_many_copies_is_nearly_exact():
    pooled = make_mixture(Full(), (), dim=2).expand((100,)).pool(0)
    reduced = pooled.reduce(3)
    y = pooled.sample((500,))
    assert_close(reduced.log_prob(y), pooled.log_prob(y), rtol=0, atol=1e-8)


# Shape of the density


def test_modes_of_separated_components_are_their_means():
    locs = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 80.0]], dtype=torch.float64)
    mixture = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]).double().log(), locs, IsotropicCovariance(torch.ones(1).double())
    )
    assert_close(mixture.modes(), locs)


def test_modes_are_stationary_maxima_and_merged_bumps_count_once():
    locs = torch.tensor([[0.0], [1.0], [10.0], [10.5]], dtype=torch.float64)
    mixture = GaussianMixture(torch.zeros(4).double(), locs, IsotropicCovariance(torch.ones(1).double()))
    modes = mixture.modes()
    assert modes.shape == (2, 1)
    modes.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(modes).sum(), modes)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    grid = torch.linspace(-5, 15, 20_001, dtype=torch.float64).unsqueeze(-1)
    assert mixture.log_prob(modes).max() >= mixture.log_prob(grid).max() - 1e-9


def test_a_flat_top_is_one_mode():
    """Means just less than two standard deviations apart: exactly one maximum, where the fixed point is slow."""
    mixture = GaussianMixture(
        torch.zeros(2).double(), torch.tensor([[-0.999], [0.999]]).double(), IsotropicCovariance(torch.ones(1).double())
    )
    assert_close(mixture.modes(), torch.zeros(1, 1).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_narrow_components_elsewhere_do_not_multiply_modes(dtype, shift):
    locs = shift + torch.tensor([[9.5], [10.5], [17.0]], dtype=dtype)
    scale = torch.tensor([1.0, 1.0, 1e-4], dtype=dtype)
    for last, count in [(-5.0, 2), (-math.inf, 1)]:
        logits = torch.tensor([0.0, 0.0, last], dtype=dtype)
        modes = GaussianMixture(logits, locs, IsotropicCovariance(scale)).modes()
        assert len(modes) == count
        assert_close(modes[-1], torch.tensor([shift + 10.0], dtype=dtype), rtol=1e-5, atol=1e-3)


def test_far_components_are_not_merged_before_near_ones():
    locs = torch.tensor([[-3e4, -3e4], [3e4, 3e4], [3e4 + 0.1, 3e4]])
    reduced = GaussianMixture(torch.zeros(3), locs, IsotropicCovariance(torch.ones(1))).reduce(2)
    assert_close(reduced.logits.exp().sort().values, torch.tensor([1 / 3, 2 / 3]))
    assert reduced.reduce(1).mean.isfinite().all()


def test_entropy_bounds_have_finite_gradients_at_weights_of_zero():
    logits = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    lower, upper = GaussianMixture(logits, torch.randn(3, 2), IsotropicCovariance(torch.ones(1))).entropy_bounds()
    (lower + upper).backward()
    assert logits.grad.isfinite().all()


def test_a_trough_is_no_mode():
    """Three means in a row, the middle one broad and light: there the density is lowest."""
    locs = torch.tensor([[-2.0], [0.0], [2.0]], dtype=torch.float64)
    weights, scale = torch.tensor([0.49, 0.02, 0.49]).double(), torch.tensor([0.5, 1.0, 0.5]).double()
    modes = GaussianMixture(weights.log(), locs, IsotropicCovariance(scale)).modes()
    assert_close(modes.flatten().sort().values, torch.tensor([-2.0, 2.0]).double(), rtol=0, atol=0.01)


def climbed(mixture, steps=20_000):
    """Where the fixed point leads from every mean of mixtures ``(N,)``, by differentiation alone: ``(K, N, D)``."""
    point = mixture.locs.movedim(-2, 0)
    precision = torch.linalg.inv(mixture.covariance.matrix())
    for _ in range(steps):
        with torch.enable_grad():
            point.requires_grad_()
            (slope,) = torch.autograd.grad(mixture.log_prob(point).sum(), point)
        mean = (mixture.responsibilities(point.detach())[..., None, None] * precision).sum(-3)
        new = point.detach() + torch.linalg.solve(mean, slope)
        if bool(((new - point).abs() < 1e-13).all()):
            break
        point = new
    return new


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_modes_are_where_the_fixed_point_leads_from_the_means(dim, spread):
    """Of more components than two, some of which wait long for the same mode."""
    mixture = make_mixture(Full(), (6,), dim=dim, n_components=12)
    mixture = GaussianMixture(mixture.logits, spread * mixture.locs, mixture.covariance)
    modes, ends = mixture.modes(), climbed(mixture)
    for row in range(6):
        kept = modes[row][modes[row].isfinite().all(-1)]
        apart = (ends[:, row].unsqueeze(1) - kept).norm(dim=-1)
        assert (apart.amin(0) < 1e-6).all()  # each is one of the ends
        top = mixture.log_prob(ends)[:, row]
        assert_close(mixture.log_prob(kept.unsqueeze(1))[:, row].amax(), top.max(), rtol=0, atol=1e-10)
        assert (apart.amin(1) < 1e-4).double().mean() > 0.99  # and the others but for a saddle


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_modes_of_one_output_are_the_maxima_on_a_grid(scale):
    locs = torch.linspace(-3, 3, 25).double().sin().cumsum(0).unsqueeze(-1)
    logits = torch.linspace(0, 9, 25).double().cos()
    mixture = GaussianMixture(logits, locs, IsotropicCovariance(torch.full((1,), scale).double()))
    grid = torch.linspace(-20, 20, 400_001).double()
    density = mixture.log_prob(grid.unsqueeze(-1))
    peaks = grid[1:-1][(density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])]
    assert_close(mixture.modes().flatten().sort().values, peaks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_modes_in_any_unit(unit):
    locs, scale = torch.tensor([[-1.0, 2.0], [1.0, 0.0], [1.2, 0.1]]), torch.tensor([[0.2, 0.5]])
    modes = GaussianMixture(torch.zeros(3), unit * locs, DiagonalCovariance(unit * scale)).modes() / unit
    assert_close(modes, GaussianMixture(torch.zeros(3), locs, DiagonalCovariance(scale)).modes())


def test_modes_of_a_row_do_not_depend_on_the_others():
    """Also where there are more rows than are climbed at once."""
    mixture = make_mixture(Diagonal(), (500,), n_components=20)
    modes = mixture.modes()
    for row in (0, 77, 499):
        alone = mixture[torch.tensor([row])].modes()[0]
        assert_close(modes[row, : len(alone)], alone)
        assert modes[row, len(alone) :].isnan().all()


@every_noise
def test_modes_in_a_batch(noise):
    mixture = make_mixture(noise, (2, 3))
    modes = mixture.modes()
    assert modes.shape[:2] == (2, 3)
    assert modes[:, :, 0].isfinite().all()
    best = mixture.log_prob(modes[:, :, 0])
    assert (best.unsqueeze(-1) >= mixture.log_prob(mixture.locs.movedim(-2, 0)).movedim(0, -1) - 1e-9).all()


@every_noise
def test_entropy_lies_between_its_bounds(noise):
    mixture = make_mixture(noise)
    lower, upper = mixture.entropy_bounds()
    surprise = -mixture.log_prob(mixture.sample((20_000,)))
    error = 5 * surprise.std(0) / math.sqrt(20_000)
    assert (lower <= surprise.mean(0) + error).all()
    assert (upper >= surprise.mean(0) - error).all()


def test_entropy_bounds_of_one_component():
    mixture = make_mixture(Full(), n_components=1)
    exact = mixture.component_distribution.entropy().squeeze(-1)
    lower, upper = mixture.entropy_bounds()
    assert_close(upper, exact)
    assert_close(lower, exact - 0.5 * DIM * (1 - math.log(2)))


@every_noise
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_total_variance_is_the_sum_of_its_parts(noise, dim):
    mixture = make_mixture(noise, (2, 3))
    aleatoric, epistemic = mixture.split_variance(dim)
    assert_close(aleatoric + epistemic, mixture.pool(dim).covariance_matrix)
    assert (torch.linalg.eigvalsh(epistemic) > -1e-12).all()


@pytest.mark.parametrize("unit", [1e-15, 1e10, 1e15])
@pytest.mark.parametrize("noise", [Diagonal(), Isotropic(), Full()], ids=str)
def test_products_in_any_unit(noise, unit):
    left, right = make_mixture(noise), make_mixture(Diagonal())
    scaled = [
        GaussianMixture(m.logits.float(), m.locs.float(), m.covariance.map(lambda t, n: t.float())).affine(0.0, unit)
        for m in (left, right)
    ]
    product, expected = scaled[0].product(scaled[1]), left.product(right)
    assert_close(product.mixture.locs.double() / unit, expected.mixture.locs, rtol=1e-4, atol=1e-4)
    stddev = product.mixture.covariance.stddev().double() / unit
    assert_close(stddev, expected.mixture.covariance.stddev(), rtol=1e-4, atol=0)
    normalizer = product.log_normalizer.double() + left.dim * math.log(unit)
    assert_close(normalizer, expected.log_normalizer, rtol=1e-4, atol=1e-4)


def test_ill_conditioned_covariances_in_single_precision():
    """The last output is all but a sum of the others."""
    torch.manual_seed(0)
    tril = torch.eye(4).expand(3, 4, 4).clone()
    tril[:, 3, :3], tril[:, 3, 3] = torch.randn(3, 3) * 10, 1e-3
    single = GaussianMixture(torch.zeros(3), torch.randn(3, 4), FullCovariance.from_scale_tril(tril))
    double = GaussianMixture(
        single.logits.double(), single.locs.double(), single.covariance.map(lambda t, n: t.double())
    )
    for got, expected in zip(single.entropy_bounds(), double.entropy_bounds(), strict=True):
        assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
    y = double.sample((50,))
    assert_close(single.reduce(3).log_prob(y.float()).double(), double.log_prob(y), rtol=1e-2, atol=1e-2)


@every_noise
def test_batches_without_rows(noise):
    mixture = make_mixture(noise, (0,))
    assert mixture.modes().shape == (0, 0, DIM)
    assert mixture.reduce(2).locs.shape == (0, 2, DIM)
    assert mixture.prune(0.1).batch_shape == (0,)
    assert mixture.highest_density_threshold(0.9).shape == (0,)
    assert mixture.expand((2, 0)).pool(0).batch_shape == (0,)
    with pytest.raises(ValueError, match="dim: expected mixtures along it, got none"):
        mixture.pool(0)


def test_bad_arguments_are_refused():
    mixture = make_mixture(Diagonal())
    with pytest.raises(ValueError, match="expected a Gaussian mixture over 4 outputs, got 2"):
        mixture.product(make_mixture(Diagonal(), dim=2))
    with pytest.raises(ValueError, match="n_components: expected 1 to 3, got 4"):
        mixture.reduce(4)
    with pytest.raises(ValueError, match="threshold: expected a number"):
        mixture.prune(-0.1)
    with pytest.raises(ValueError, match="expected a scale or a matrix, got both"):
        mixture.affine(0.0, 2.0, matrix=torch.eye(4))
    with pytest.raises(ValueError, match=r"matrix: expected shape \(\*batch, M, 4\)"):
        mixture.affine(matrix=torch.eye(5))
    with pytest.raises(ValueError, match="matrix: expected finite numbers and full rank"):
        mixture.affine(matrix=torch.full((2, 4), NAN))
    with pytest.raises(ValueError, match="expected one of 1 batch dimensions"):
        mixture.split_variance(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.reduce("a"), "n_components: expected 1 to 3, got 'a'"),
        (lambda m: m.reduce(1.5), "n_components: expected 1 to 3, got 1.5"),
        (lambda m: m.prune("a"), r"threshold: expected a number in \[0, 1\), got 'a'"),
        (lambda m: m.prune(np.ones(2)), r"threshold: .*, got ndarray float64 \(2,\)"),
        (lambda m: m.temper("a"), "temperature: expected a positive number, got 'a'"),
        (lambda m: m.temper(None), "temperature: expected a positive number, got None"),
        (lambda m: m.product("a"), "product: expected a Gaussian mixture over 4 outputs, got 'a'"),
        (lambda m: m.pool("a"), "dim: expected one of 1 batch dimensions, got 'a'"),
        (lambda m: m.split_variance(0.5), "dim: expected one of 1 batch dimensions, got 0.5"),
        (lambda m: m.pool(0, "abc"), "weights: expected numbers, got text"),
        (lambda m: m.pool(0, {"a": 1}), "weights: expected numbers, got dict of 1"),
        (lambda m: m.pool(0, [1.0]), "weights: expected 5 finite numbers, .*, got Tensor torch.float64"),
        (lambda m: m.pool(0, np.ma.masked_equal(range(5), 2)), "weights: expected 5 finite numbers"),
    ],
)
def test_settings_of_another_type_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_mixture(Diagonal(), (5,)))


@pytest.mark.parametrize("kind", ["series", "array", "objects", "integers"])
def test_weights_of_any_container(kind):
    mixture, weights = (
        make_mixture(Diagonal(), (2,)),
        {
            "series": pd.Series([1, 3], index=[5, 6]),
            "array": np.array([1.0, 3.0])[::-1][::-1],
            "objects": np.array([1, 3], object),
            "integers": torch.tensor([1, 3]),
        },
    )
    y = torch.randn(7, DIM)
    density = mixture.log_prob(y.unsqueeze(1)).exp() @ torch.tensor([0.25, 0.75]).to(mixture.locs)
    assert_close(mixture.pool(0, weights[kind]).log_prob(y).exp(), density)


def test_settings_may_be_scalars_of_numpy_and_torch():
    mixture = make_mixture(Diagonal())
    for value in (np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
        assert_close(mixture.temper(value).locs, mixture.temper(0.25).locs)
        assert_close(mixture.prune(value).logits, mixture.prune(0.25).logits)
