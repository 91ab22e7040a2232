import pytest
import torch
from cases import NOISE, make_mixture
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_mdn import Diagonal, Full, kl_monte_carlo, kl_variational_approximation

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
def test_exact_for_one_component(noise):
    p, q = make_mixture(noise, n_components=1), make_mixture(Full(), n_components=1).affine(0.2, 1.5)
    expected = kl_divergence(*(_dense(m) for m in (p, q)))
    assert_close(kl_divergence(p, q), expected)


def _dense(mixture):
    return torch.distributions.MultivariateNormal(mixture.mean, mixture.covariance_matrix)


@every_noise
def test_zero_for_equal_mixtures(noise):
    mixture = make_mixture(noise)
    assert_close(kl_variational_approximation(mixture, mixture), torch.zeros(5, dtype=torch.float64))


def test_far_components_make_the_approximation_exact():
    """Components that do not overlap: the divergence is the weighted sum of theirs and of the weights'."""
    p = make_mixture(Diagonal(), ())
    locs = p.locs + 1e3 * torch.arange(3.0).double().unsqueeze(-1)
    p = p._new(p.logits, locs, p.covariance)
    q = p._new(torch.zeros(3).double(), locs + 0.1, p.covariance)
    value, error = kl_monte_carlo(p, q, num_samples=50_000)
    assert (kl_variational_approximation(p, q) - value).abs() < 5 * error


@every_noise
@pytest.mark.parametrize("batch_shape", [(3,), (2, 3)])
def test_batches_broadcast(noise, batch_shape):
    single, batch = make_mixture(noise, (), dim=3), make_mixture(Full(), batch_shape, dim=3)
    assert_close(kl_divergence(single, batch), kl_divergence(single.expand(batch_shape), batch))
    assert_close(kl_divergence(batch, single), kl_divergence(batch, single.expand(batch_shape)))


@every_noise
def test_monte_carlo_agrees_with_the_exact_divergence(noise):
    p, q = make_mixture(noise, n_components=1), make_mixture(noise, n_components=1).affine(0.3, 1.2)
    value, error = kl_monte_carlo(p, q)
    assert ((value - kl_divergence(p, q)).abs() < 5 * error).all()


def test_bad_arguments_are_refused():
    p = make_mixture(Diagonal())
    with pytest.raises(ValueError, match="expected mixtures over equally many outputs, got 4 and 2"):
        kl_divergence(p, make_mixture(Diagonal(), dim=2))
    with pytest.raises(ValueError, match="num_samples: expected 2 at least"):
        kl_monte_carlo(p, p, num_samples=1)
