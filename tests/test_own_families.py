"""Families from the law of one output, symmetric or not: against scipy, by quadrature, and by their draws."""

import copy
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import LaplaceLaw
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    Full,
    IndependentComponents,
    Isotropic,
    Law,
    LocationScale,
    LowRank,
    Mixture,
    MixtureDensityNetwork,
    StudentTComponents,
    scores,
)
from pyro_mdn.distributions.covariance.diagonal import IsotropicCovariance

EULER = 0.5772156649015329


@dataclass(frozen=True, eq=False)
class GumbelLaw(Law):
    """Largest or, mirrored, smallest extreme values: not symmetric."""

    sign: float = 1.0

    def log_density(self, z):
        z = self.sign * z
        return -z - (-z).exp()

    def cdf(self, z):
        lower = (-(-self.sign * z).exp()).exp()
        return lower if self.sign > 0 else -torch.expm1(-(z.exp()))

    def quantile(self, q):
        return -(-q.log()).log() if self.sign > 0 else (-torch.log1p(-q)).log()

    def mean_distance(self, z):
        # E|Z - z| = z - m + 2 ∫_z^∞ (1 - F), which is the exponential integral.
        z = self.sign * z
        rest = torch.from_numpy(scipy.special.exp1(np.exp(-z.detach().numpy())))
        above = EULER - z + rest  # E (Z - z)_+
        return 2 * above - (EULER - z)

    def mirrored(self):
        return GumbelLaw(-self.sign)

    def mean(self):
        return self.sign * EULER

    def stddev(self):
        return math.pi / math.sqrt(6)


LAWS = {"laplace": (LaplaceLaw(), scipy.stats.laplace), "gumbel": (GumbelLaw(), scipy.stats.gumbel_r)}
LAWS["mirrored gumbel"] = GumbelLaw(-1.0), scipy.stats.gumbel_l
every_law = pytest.mark.parametrize("name", LAWS)


def mixture_of(law, batch=4, n_components=3, dim=2):
    torch.manual_seed(0)
    shape = batch, n_components, dim
    components = IndependentComponents(torch.randn(shape).double(), torch.rand(shape).double() + 0.3, law)
    return Mixture(torch.randn(batch, n_components).double(), components)


def reference(mixture, row, output):
    """Weights and frozen distributions of scipy of one output."""
    weights = mixture.logits[row].exp().numpy()
    parts = zip(mixture.locs[row, :, output], mixture.components.scale[row, :, output], strict=True)
    return weights, [(loc.item(), scale.item()) for loc, scale in parts]


@every_law
def test_one_output_is_that_of_scipy(name):
    law, expected = LAWS[name]
    mixture, y = mixture_of(law), torch.linspace(-4, 4, 7).double().reshape(7, 1, 1).expand(7, 4, 2)
    cdf, sf, density = mixture.cdf(y), mixture.sf(y), mixture.marginal(1).log_prob(y[..., 1:])
    for row in range(4):
        for output in range(2):
            weights, parts = reference(mixture, row, output)
            at = y[:, row, output].numpy()
            for got, function in ((cdf, "cdf"), (sf, "sf")):
                values = sum(w * getattr(expected(*p), function)(at) for w, p in zip(weights, parts, strict=True))
                assert_close(got[:, row, output], torch.as_tensor(values))
        weights, parts = reference(mixture, row, 1)
        values = sum(w * expected(*p).pdf(y[:, row, 1].numpy()) for w, p in zip(weights, parts, strict=True))
        assert_close(density[:, row].exp(), torch.as_tensor(values))
    assert_close(mixture.log_cdf(y).exp(), cdf)
    assert_close(mixture.log_sf(y).exp(), sf)


@every_law
def test_quantiles_and_intervals(name):
    mixture = mixture_of(LAWS[name][0])
    q = torch.tensor([1e-6, 0.05, 0.5, 0.51, 0.95, 1 - 1e-6]).double()[:, None, None]
    assert_close(mixture.cdf(mixture.icdf(q)), q.expand(-1, 4, 2), rtol=1e-9, atol=1e-12)
    low, high = mixture.interval(0.8, kind="shortest")
    assert_close(mixture.cdf(high) - mixture.cdf(low), torch.full((4, 2), 0.8).double())
    tails = torch.linspace(0.001, 0.199, 500).double()[:, None, None]
    assert (high - low <= (mixture.icdf(tails + 0.8) - mixture.icdf(tails)).amin(0) * (1 + 1e-6)).all()


@every_law
def test_moments_and_draws(name):
    mixture = mixture_of(LAWS[name][0])
    for row in range(4):
        weights, parts = reference(mixture, row, 0)
        several = [LAWS[name][1](*p) for p in parts]
        mean = sum(w * s.mean() for w, s in zip(weights, several, strict=True))
        square = sum(w * (s.var() + s.mean() ** 2) for w, s in zip(weights, several, strict=True))
        assert mixture.mean[row, 0].item() == pytest.approx(mean)
        assert mixture.variance[row, 0].item() == pytest.approx(square - mean**2)
    torch.manual_seed(0)
    draws = mixture.sample((4000,))
    for u in mixture.rosenblatt(draws).flatten(1).unbind(-1):
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


@every_law
def test_chain_rule_and_transport(name):
    mixture, y = mixture_of(LAWS[name][0]), torch.randn(4, 2).double()
    given = mixture.condition(y[:, 1:], [1])
    assert_close(given.log_prob(y[:, :1]) + mixture.marginal(1).log_prob(y[:, 1:]), mixture.log_prob(y))
    missing = y.clone()
    missing[:, 0] = math.nan
    assert_close(mixture.log_prob(missing), mixture.marginal(1).log_prob(y[:, 1:]))
    assert_close(mixture.inverse_rosenblatt(mixture.rosenblatt(y)), y, rtol=1e-8, atol=1e-8)
    moved = mixture.affine(torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5]).double())
    at = torch.tensor([1.0, -2.0]).double() + torch.tensor([3.0, 0.5]).double() * y
    assert_close(moved.log_prob(at), mixture.log_prob(y) - math.log(1.5))


@every_law
def test_crps_is_the_integral(name):
    mixture, y = mixture_of(LAWS[name][0], batch=2, dim=1), torch.tensor([[0.3], [3.0]]).double()
    got = scores.crps(mixture, y)
    for row in range(2):
        one, at = mixture[row], y[row].item()

        def squared(z, one=one, at=at):
            return (one.cdf(torch.tensor([z]).double()).item() - float(at <= z)) ** 2

        expected = scipy.integrate.quad(squared, -50, at)[0] + scipy.integrate.quad(squared, at, 50)[0]
        assert got[row].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("width", [1e-9, 1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("at", [-6.0, 0.7, 6.0])
def test_mass_of_cells(width, at):
    """Of Student-t and Laplace laws, in both tails and for narrow cells: against quadrature of scipy's density."""
    df = torch.tensor([3.0]).double()
    student = StudentTComponents(torch.zeros(1, 1).double(), IsotropicCovariance(torch.ones(1).double()), df)
    laplace = IndependentComponents(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), LaplaceLaw())
    for components, expected in ((student, scipy.stats.t(3)), (laplace, scipy.stats.laplace)):
        mixture = Mixture(torch.zeros(1).double(), components)
        got = scores.interval_log_score(mixture, torch.tensor([at], dtype=torch.float64), width).item()
        nodes, weights = np.polynomial.legendre.leggauss(30)
        mass = 0.5 * width * (weights * expected.pdf(at + 0.5 * width * nodes)).sum()
        assert got == pytest.approx(-math.log(mass), abs=1e-8)


def test_negative_scales_of_a_law_that_is_not_symmetric_are_refused():
    with pytest.raises(ValueError, match="scale: expected positive numbers"):
        mixture_of(GumbelLaw()).affine(0.0, -1.0)
    mixture, y = mixture_of(LaplaceLaw()), torch.randn(4, 2).double()
    assert_close(mixture.affine(0.0, -1.0).log_prob(-y), mixture.log_prob(y))


@pytest.mark.parametrize("noise", [Full(), LowRank(1)])
def test_noise_that_correlates_outputs_is_refused(noise):
    class OwnLaplace(LocationScale):
        law = LaplaceLaw()

    with pytest.raises(ValueError, match="noise: expected a noise model without correlations"):
        OwnLaplace(noise)
    with pytest.raises(TypeError, match="Nameless: expected a class attribute law"):
        type("Nameless", (LocationScale,), {})


@pytest.mark.parametrize("noise", [Diagonal(), Diagonal(tied=True), Isotropic(), Diagonal(homoscedastic=True)], ids=str)
def test_networks_give_the_density_of_their_mixtures(noise):
    class OwnLaplace(LocationScale):
        law = LaplaceLaw()

    torch.manual_seed(0)
    network, x, y = MixtureDensityNetwork(2, 2, 3, [4], family=OwnLaplace(noise)), torch.randn(5, 2), torch.randn(5, 2)
    network.initialize_(x, 3 * y)
    assert_close(network.loss(x, y), -network(x).log_prob(y))
    network.loss(x, y).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


KINDS = {
    "laplace": lambda: mixture_of(LaplaceLaw()),
    "student": lambda: Mixture(
        torch.randn(4, 3).double(),
        StudentTComponents(
            torch.randn(4, 3, 2).double(),
            IsotropicCovariance(torch.rand(4, 3).double() + 0.3, 2),
            torch.tensor([4.0]).double(),
        ),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_mixtures_of_any_family_are_arrays(kind):
    torch.manual_seed(0)
    mixture, y = KINDS[kind](), torch.randn(4, 2).double()
    whole = mixture.log_prob(y)
    assert_close(mixture[1:3].log_prob(y[1:3]), whole[1:3])
    assert_close(mixture[torch.tensor([3, 0])].log_prob(y[[3, 0]]), whole[[3, 0]])
    assert_close(Mixture.cat([mixture[:1], mixture[1:]]).log_prob(y), whole)
    assert_close(Mixture.stack([mixture, mixture]).pool(0).log_prob(y), whole)
    assert_close(copy.deepcopy(mixture).log_prob(y), whole)
    assert_close(pickle.loads(pickle.dumps(mixture)).log_prob(y), whole)
    assert_close(mixture.expand((5, 4)).log_prob(y), whole.expand(5, 4))
    assert_close(mixture.prune(0.0).log_prob(y), whole)
    assert mixture.to_event(1).log_prob(y).item() == pytest.approx(whole.sum().item())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operations_in_less_precision(kind, dtype):
    torch.manual_seed(0)
    exact, y = KINDS[kind](), torch.randn(4, 2).double()
    mixture = exact.to(dtype)
    rounded = mixture.double()
    for call in (
        lambda m: m.log_prob(y),
        lambda m: m.cdf(y),
        lambda m: m.icdf(0.3),
        lambda m: m.interval(0.9)[0],
        lambda m: m.mean,
        lambda m: m.rosenblatt(y),
        lambda m: scores.crps(m, y),
    ):
        got = call(mixture)
        assert got.dtype == dtype
        assert_close(
            got.double(),
            call(rounded).double(),
            rtol=4 * torch.finfo(dtype).eps + 1e-5,
            atol=1e-2 if dtype != torch.float32 else 1e-5,
        )


@every_kind
def test_operations_are_mapped(kind):
    torch.manual_seed(0)
    mixture, y = KINDS[kind](), torch.randn(6, 4, 2).double()
    for call in (mixture.log_prob, mixture.cdf, mixture.rosenblatt):
        assert_close(torch.func.vmap(call)(y), call(y))
