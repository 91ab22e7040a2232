import pyro
import pytest
import torch
from cases import NOISE, make_mixture
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_mdn import Diagonal, DiagonalCovariance, Full, GaussianMixture, kl_monte_carlo, kl_variational_approximation

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
def test_exact_for_one_component(noise):
    p, q = make_mixture(noise, n_components=1), make_mixture(Full(), n_components=1).affine(0.2, 1.5)
    expected = kl_divergence(*(_dense(m) for m in (p, q)))
    assert_close(kl_divergence(p, q), expected)


def _dense(mixture):
    return torch.distributions.MultivariateNormal(mixture.mean, mixture.covariance_matrix)


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


@every_noise
def test_zero_for_equal_mixtures(noise):
    mixture = make_mixture(noise)
    assert_close(kl_variational_approximation(mixture, mixture), torch.zeros(5, dtype=torch.float64))


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
