import pyro
import pytest
import torch
from cases import NOISE, make_mixture
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    DiagonalCovariance,
    Full,
    FullCovariance,
    GaussianMixture,
    kl_monte_carlo,
    kl_variational_approximation,
)

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
def test_exact_for_one_component(noise):
    p, q = make_mixture(noise, n_components=1), make_mixture(Full(), n_components=1).affine(0.2, 1.5)
    expected = kl_divergence(*(_dense(m) for m in (p, q)))
    assert_close(kl_divergence(p, q), expected)


def _dense(mixture):
    return MultivariateNormal(mixture.mean, mixture.covariance_matrix)


def _overlapping():
    """Mixtures whose divergence is 0.045, and its variational approximation -0.040."""
    locs, covariance = torch.tensor([[0.0], [1.0], [2.0]]).double(), DiagonalCovariance(torch.ones(1, 1).double())
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.6, 0.2]]).double()
    return [GaussianMixture(w.log(), locs, covariance) for w in weights]


def test_an_approximation_is_not_the_divergence():
    p, q = _overlapping()
    assert kl_variational_approximation(p, q) < 0
    with pytest.raises(NotImplementedError, match="expected mixtures of one component, got 3 and 3: kl_monte_carlo"):
        kl_divergence(p, q)
    with pytest.raises(NotImplementedError):
        kl_divergence(p, make_mixture(Diagonal(), (), dim=1, n_components=1))


def test_a_mean_field_elbo_of_mixtures_is_unbiased():
    """Guide and prior are mixtures: the loss is their divergence, here by quadrature."""
    guide, prior = _overlapping()
    z = torch.linspace(-12, 14, 20_001).double().unsqueeze(-1)
    log_q, log_p = guide.log_prob(z), prior.log_prob(z)
    expected = torch.trapezoid(log_q.exp() * (log_q - log_p), z.squeeze(-1))

    def loss(elbo):
        pyro.set_rng_seed(0)
        draw = elbo(num_particles=20_000, vectorize_particles=True)
        return draw.loss(lambda: pyro.sample("z", prior), lambda: pyro.sample("z", guide))

    assert abs(loss(TraceMeanField_ELBO) - expected) < 0.02
    assert loss(TraceMeanField_ELBO) == pytest.approx(loss(Trace_ELBO))


def _by_dense_matrices(p, q):
    """The approximation by its formula, from the divergences of all pairs of dense normals."""
    normals = [MultivariateNormal(m.locs, m.covariance.matrix().expand(*m.locs.shape, m.dim)) for m in (p, q)]
    first = MultivariateNormal(normals[0].loc.unsqueeze(-2), normals[0].covariance_matrix.unsqueeze(-3))
    own, other = (MultivariateNormal(n.loc.unsqueeze(-3), n.covariance_matrix.unsqueeze(-4)) for n in normals)
    numerator = (p.logits.unsqueeze(-2) - kl_divergence(first, own)).logsumexp(-1)
    denominator = (q.logits.unsqueeze(-2) - kl_divergence(first, other)).logsumexp(-1)
    return (p.logits.exp() * (numerator - denominator)).sum(-1)


@every_noise
@pytest.mark.parametrize("n_components", [2, 3])
def test_approximation_is_its_formula(noise, n_components):
    p, q = make_mixture(noise), make_mixture(Full(), n_components=n_components).affine(0.2, 1.5)
    assert_close(kl_variational_approximation(p, q), _by_dense_matrices(p, q))
    assert_close(kl_variational_approximation(q, p), _by_dense_matrices(q, p))


@every_noise
def test_zero_for_one_mixture_in_two_orders(noise):
    """Components in another order, and their covariances as dense matrices: only the divergence itself is zero."""
    mixture, order = make_mixture(noise), [2, 0, 1]
    matrix = mixture.covariance.matrix().expand(5, 3, 4, 4)[:, order]
    same = GaussianMixture(mixture.logits[:, order], mixture.locs[:, order], FullCovariance.from_matrix(matrix))
    zero = torch.zeros(5, dtype=torch.float64)
    assert_close(kl_variational_approximation(mixture, same), zero, rtol=0, atol=1e-6)
    assert_close(kl_monte_carlo(mixture, same, num_samples=100)[0], zero, rtol=0, atol=1e-6)
    assert (kl_variational_approximation(mixture, same.affine(0.5, 1.0)) > 0.01).all()


def test_far_components_make_the_approximation_exact():
    """Components that do not overlap: the divergence is the weighted sum of theirs and of the weights'."""
    p = make_mixture(Diagonal(), ())
    locs = p.locs + 1e3 * torch.arange(3.0).double().unsqueeze(-1)
    p = GaussianMixture(p.logits, locs, p.covariance)
    q = GaussianMixture(torch.zeros(3).double(), locs + 0.1, p.covariance)
    value, error = kl_monte_carlo(p, q, num_samples=50_000)
    assert (kl_variational_approximation(p, q) - value).abs() < 5 * error


@every_noise
@pytest.mark.parametrize("batch_shape", [(3,), (2, 3)])
def test_batches_broadcast(noise, batch_shape):
    single, batch = make_mixture(noise, (), dim=3), make_mixture(Full(), batch_shape, dim=3)
    divergence, expanded = kl_variational_approximation, single.expand(batch_shape)
    assert_close(divergence(single, batch), divergence(expanded, batch))
    assert_close(divergence(batch, single), divergence(batch, expanded))


@every_noise
def test_monte_carlo_agrees_with_the_exact_divergence(noise):
    p, q = make_mixture(noise, n_components=1), make_mixture(noise, n_components=1).affine(0.3, 1.2)
    value, error = kl_monte_carlo(p, q)
    assert ((value - kl_divergence(p, q)).abs() < 5 * error).all()


def test_bad_arguments_are_refused():
    p = make_mixture(Diagonal())
    with pytest.raises(ValueError, match="expected mixtures over equally many outputs, got 4 and 2"):
        kl_variational_approximation(p, make_mixture(Diagonal(), dim=2))
    with pytest.raises(ValueError, match="num_samples: expected 2 at least"):
        kl_monte_carlo(p, p, num_samples=1)
