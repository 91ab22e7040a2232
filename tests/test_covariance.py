import pytest
import torch
from cases import NOISE, make_mixture
from torch.testing import assert_close

from pyro_mdn import DiagonalCovariance, FullCovariance, GaussianMixture, IsotropicCovariance, LowRankCovariance

DIM = 4


def random_matrix(*batch, dim=DIM):
    root = torch.randn(*batch, dim, dim + 2, dtype=torch.float64)
    return root @ root.mT / dim


def operators():
    scale = torch.rand(5, 3, DIM, dtype=torch.float64) + 0.3
    factor = torch.randn(5, 3, DIM, 2, dtype=torch.float64)
    full = FullCovariance.from_matrix(random_matrix(5, 3))
    yield "isotropic", IsotropicCovariance(scale[..., 0], DIM)
    yield "diagonal", DiagonalCovariance(scale)
    yield "low_rank", LowRankCovariance(factor, scale)
    yield "full", full
    yield "full_tied", full.map(lambda t, n: t[:, :1])


@pytest.fixture(params=[name for name, _ in operators()])
def covariance(request):
    return dict(operators())[request.param]


def residual():
    return torch.randn(7, 5, 3, DIM, dtype=torch.float64)


def test_whiten_gives_the_quadratic_form(covariance):
    r = residual()
    expected = (r * torch.linalg.solve(covariance.matrix(), r.unsqueeze(-1)).squeeze(-1)).sum(-1)
    assert_close(covariance.whiten(r).square().sum(-1), expected)


def test_colorize_inverts_whiten(covariance):
    r = residual()
    assert_close(covariance.colorize(covariance.whiten(r)), r)


def test_colorized_basis_has_the_covariance(covariance):
    """The images of the unit vectors are the columns of a root of Σ."""
    basis = torch.eye(DIM, dtype=torch.float64).reshape(DIM, 1, 1, DIM)
    root = covariance.colorize(basis.expand(DIM, *covariance.batch_shape, DIM)).movedim(0, -1)
    assert_close(root @ root.mT, covariance.matrix())


def test_half_log_det(covariance):
    assert_close(covariance.half_log_det(), 0.5 * torch.logdet(covariance.matrix()))


def test_variance_is_the_diagonal(covariance):
    assert_close(covariance.variance(), covariance.matrix().diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("unit", [1e-170, 1.0, 1e170])
def test_stddev_in_any_unit(covariance, unit):
    scaled = covariance.affine(torch.tensor([unit], dtype=torch.float64))
    assert_close(scaled.stddev() / unit, covariance.matrix().diagonal(dim1=-2, dim2=-1).sqrt())


@pytest.mark.parametrize("dims", [[0], [3, 1], [2, 0, 1], [1, 3, 0, 2]])
def test_marginal_is_the_submatrix(covariance, dims):
    assert_close(covariance.marginal(dims).matrix(), covariance.matrix()[..., dims, :][..., dims])


@pytest.mark.parametrize(("given", "free"), [([0], [1, 2, 3]), ([3, 1], [0, 2]), ([2, 0, 1], [3]), ([3], [1])])
def test_condition_is_the_schur_complement(covariance, given, free):
    matrix, r = covariance.matrix(), residual()[..., given]
    cross = matrix[..., free, :][..., given]
    gain = torch.linalg.solve(matrix[..., given, :][..., given], cross.mT).mT
    shift, conditional = covariance.marginal([*given, *free]).condition(r)
    expected = (gain @ r.unsqueeze(-1)).squeeze(-1)
    assert_close(shift.expand_as(expected), expected)
    assert_close(conditional.matrix(), matrix[..., free, :][..., free] - gain @ cross.mT)


@pytest.mark.parametrize("scale", [[2.0], [2.0, -3.0, 0.5, -1.0]])
def test_affine_scales_both_sides(covariance, scale):
    scale = torch.tensor(scale, dtype=torch.float64)
    expected = scale.unsqueeze(-1) * covariance.matrix() * scale
    scaled = covariance.affine(scale)
    scaled.validate()
    assert_close(scaled.matrix(), expected)


def test_full_constructors_agree():
    matrix = random_matrix(5, 3)
    scale_tril = torch.linalg.cholesky(matrix)
    for operator in [
        FullCovariance.from_matrix(matrix),
        FullCovariance.from_scale_tril(scale_tril),
        FullCovariance.from_precision_tril(torch.linalg.inv(scale_tril)),
        FullCovariance.from_precision(torch.linalg.inv(matrix)),
    ]:
        assert operator.dim == DIM
        assert_close(operator.matrix(), matrix)
        assert_close(operator.scale_tril(), scale_tril)


def test_low_rank_whitening_survives_a_dominant_factor():
    """Factor 1e4 times the scale, in float32: the Woodbury identity would cancel to nothing."""
    covariance = LowRankCovariance(torch.full((1, 2, 1), 1e4), torch.ones(1, 2))
    along = covariance.whiten(torch.full((1, 2), 1e4))
    assert_close(along.square().sum(), torch.tensor(1.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", NOISE)
def test_components_picked_are_those_asked_for(name):
    covariance = make_mixture(NOISE[name]).covariance.expand((5, 3))
    component = torch.randint(3, (7, 5))
    picked = covariance.select(component).matrix().squeeze(-3)
    rows = torch.arange(5).expand(7, 5)
    assert_close(picked, covariance.matrix()[rows, component])


@pytest.mark.parametrize("constructor", ["from_matrix", "from_precision"])
def test_indefinite_matrices_are_refused(constructor):
    with pytest.raises(ValueError, match="expected positive-definite matrices, got 1"):
        getattr(FullCovariance, constructor)(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))


@pytest.mark.parametrize("constructor", ["from_matrix", "from_precision", "from_scale_tril", "from_precision_tril"])
def test_matrices_that_are_not_square_are_refused(constructor):
    with pytest.raises(ValueError, match="expected shape"):
        getattr(FullCovariance, constructor)(torch.ones(1, 2, 3))


def test_isotropic_without_outputs_says_so():
    with pytest.raises(ValueError, match="outputs=D"):
        IsotropicCovariance(torch.ones(1)).variance()


@pytest.mark.parametrize(("factor", "scale"), [((1, 2, 1), (3, 2)), ((3, 1, 1), (3, 2)), ((3, 2, 1), (5, 3, 2))])
def test_tensors_of_a_factor_must_agree(factor, scale):
    with pytest.raises(ValueError, match="factor, scale: expected shapes"):
        LowRankCovariance(torch.ones(factor), torch.ones(scale))


@pytest.mark.parametrize(("diagonal", "lower"), [((), ()), ((1, 3), (1, 2)), ((1, 2), (2, 1)), ((1, 2), (1,))])
def test_packed_triangles_must_be_complete(diagonal, lower):
    with pytest.raises(ValueError, match="diagonal, lower: expected shapes"):
        FullCovariance(torch.ones(diagonal), torch.ones(lower))


def test_pyro_distribution_of_an_ill_conditioned_factor():
    covariance = FullCovariance.from_scale_tril(torch.tensor([[[1.0, 0.0], [1e5, 1.0]]]))
    mixture = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), covariance)
    assert_close(
        mixture.component_distribution.log_prob(torch.zeros(2)), mixture.log_prob(torch.zeros(2)).unsqueeze(-1)
    )


@pytest.mark.parametrize("covariance_and_name", list(operators()), ids=lambda pair: pair[0])
def test_triangular_form(covariance_and_name):
    """The same matrices, whitened output by output: each conditional scale and shift is that of condition()."""
    _, covariance = covariance_and_name
    triangular, r = covariance.triangular(), residual()
    assert_close(triangular.matrix(), covariance.matrix())
    assert_close(covariance.precision_tril().mT @ covariance.precision_tril(), torch.linalg.inv(covariance.matrix()))
    assert_close(covariance.root() @ covariance.root().mT, covariance.matrix())
    for d in range(1, DIM):
        shift, scale = triangular.next_output([r[..., j] for j in range(d)])
        expected_shift, expected = covariance.marginal(range(d + 1)).condition(r[..., :d])
        assert_close(scale.expand(5, 3), expected.variance().sqrt().squeeze(-1).expand(5, 3))
        assert_close(triangular.conditional_scale()[..., d], scale)
        assert_close(shift.expand(7, 5, 3), expected_shift.squeeze(-1).expand(7, 5, 3))
