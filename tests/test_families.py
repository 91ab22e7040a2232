"""Families of components: Student-t against scipy and by identities, a user's own family, and what is not closed."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import DIM, NOISE, K
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Diagonal,
    Full,
    GaussianMixture,
    IsotropicCovariance,
    LowRank,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    Normal,
    StudentT,
    StudentTComponents,
    fit,
    scores,
)
from pyro_mdn.distributions.families.student_t_law import StudentTLaw

every_noise = pytest.mark.parametrize("name", [name for name in NOISE if name != "fixed"])
every_df = pytest.mark.parametrize("df", [1.0, 1.5, 2.0, 4.0, 30.0, 1e3, 1e6])


def student(noise, batch_shape=(5,), dim=DIM, df=None):
    """A float64 mixture whose components have different degrees of freedom."""
    torch.manual_seed(1)
    if getattr(noise, "rank", 1) > dim:
        noise = dataclasses.replace(noise, rank=dim)
    head = MixtureHead(6, dim, K, family=StudentT(noise, df=df)).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if head.raw_noise is not None and df is None:
        with torch.no_grad():
            head.raw_noise[-K:] = torch.tensor([0.5, 2.0, 6.0])
    head.shift.normal_()
    head.scale.uniform_(0.5, 2.0)
    with torch.no_grad():
        return head(torch.randn(*batch_shape, 6, dtype=torch.float64))


def univariate(df, n=4):
    torch.manual_seed(0)
    locs, scale = torch.randn(n, K, 1).double(), torch.rand(n, K).double() + 0.3
    components = StudentTComponents(locs, IsotropicCovariance(scale), torch.full((1,), df).double())
    return Mixture(torch.randn(n, K).double(), components)


@every_noise
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_density_is_that_of_scipy(name, batch_shape):
    mixture = student(NOISE[name], batch_shape)
    y = 3 * torch.randn(7, *batch_shape, DIM).double()
    got = mixture.component_log_prob(y).reshape(7, -1, K)
    whole = mixture.components.expand((*batch_shape, K))
    matrix, df = whole.covariance.matrix().reshape(-1, K, DIM, DIM), whole.df.reshape(-1, K)
    for row, k in np.ndindex(matrix.shape[0], K):
        loc = mixture.locs.reshape(-1, K, DIM)[row, k]
        expected = scipy.stats.multivariate_t(loc, matrix[row, k], df=df[row, k].item())
        assert_close(
            got[:, row, k], torch.as_tensor(expected.logpdf(y.reshape(7, -1, DIM)[:, row])), rtol=1e-10, atol=1e-10
        )
    assert_close(mixture.log_prob(y), (mixture.logits + mixture.component_log_prob(y)).logsumexp(-1))
    network = mixture.log_prob(y)[..., None]
    assert_close(mixture.responsibilities(y), (mixture.logits + mixture.component_log_prob(y) - network).exp())


@every_noise
@pytest.mark.parametrize("given", [[0], [3, 1], [0, 1, 2]])
def test_chain_rule(name, given):
    mixture = student(NOISE[name])
    y, free = torch.randn(5, DIM).double(), [d for d in range(DIM) if d not in given]
    evidence = mixture.marginal(given).log_prob(y[..., given])
    rest = mixture.condition(y[..., given], given).log_prob(y[..., free])
    assert_close(evidence + rest, mixture.log_prob(y))
    missing = y.clone()
    missing[..., free] = math.nan
    assert_close(mixture.log_prob(missing), evidence)


@every_noise
def test_rosenblatt_is_inverted_and_its_jacobian_is_the_density(name):
    mixture = student(NOISE[name])
    y = torch.randn(5, DIM).double()
    u = mixture.rosenblatt(y)
    assert_close(mixture.inverse_rosenblatt(u), y, rtol=1e-8, atol=1e-8)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: mixture[0].rosenblatt(y)))(y[:1])
    assert_close(jacobian.diagonal(dim1=-2, dim2=-1).log().sum(-1), mixture[0].log_prob(y[:1]), rtol=1e-8, atol=1e-8)


@every_df
def test_distribution_functions_are_those_of_scipy(df):
    law = StudentTLaw(torch.tensor([df]).double())
    z = torch.cat([-torch.logspace(-6, 3, 60), torch.zeros(1), torch.logspace(-6, 3, 60)]).double()
    expected = scipy.stats.t(df)
    assert_close(law.cdf(z), torch.as_tensor(expected.cdf(z)), rtol=1e-10, atol=0)
    finite = torch.as_tensor(expected.logcdf(z)).isfinite()
    assert_close(law.log_cdf(z)[finite], torch.as_tensor(expected.logcdf(z))[finite], rtol=1e-10, atol=1e-14)
    q = torch.logspace(-12, math.log10(0.499), 40).double()
    assert_close(law.quantile(q), torch.as_tensor(expected.ppf(q)), rtol=1e-10, atol=0)
    single = StudentTLaw(torch.tensor([df])).cdf(z.float())
    assert_close(single.double(), torch.as_tensor(expected.cdf(z)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", ["cdf", "log_cdf", "log_density", "mean_distance"])
def test_derivatives_of_the_law(function):
    df = torch.tensor([1.7, 4.0, 50.0]).double().requires_grad_()
    z = torch.tensor([[-3.0], [-0.2], [0.0], [1.5], [20.0]]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, df: getattr(StudentTLaw(df), function)(z), (z, df), fast_mode=True)


@pytest.mark.parametrize("df", [2.5, 4.0, 30.0])
def test_quantiles_and_intervals(df):
    mixture = univariate(df)
    q = torch.tensor([0.0, 1e-8, 0.05, 0.5, 0.9, 1 - 1e-8, 1.0]).double()[:, None, None]
    assert_close(mixture.cdf(mixture.icdf(q)), q.expand(-1, 4, 1), rtol=1e-9, atol=1e-12)
    (low, high), (left, right) = mixture.interval(0.9), mixture.interval(0.9, kind="shortest")
    for lower, upper in ((low, high), (left, right)):
        assert_close(mixture.cdf(upper) - mixture.cdf(lower), torch.full((4, 1), 0.9).double())
    assert (right - left <= high - low).all()
    tails = torch.linspace(0.001, 0.099, 400).double()[:, None, None]
    widths = mixture.icdf(tails + 0.9) - mixture.icdf(tails)
    assert (right - left <= widths.amin(0) * (1 + 1e-9)).all()


@pytest.mark.parametrize("df", [3.0, 8.0])
def test_moments(df):
    mixture = univariate(df)
    for row in range(len(mixture)):
        one = mixture[row]

        def density(y, one=one):
            return one.log_prob(torch.tensor([y]).double()).exp().item()

        first, second = (scipy.integrate.quad(lambda y, n=n: y**n * density(y), -np.inf, np.inf)[0] for n in (1, 2))
        assert one.mean.item() == pytest.approx(first, abs=1e-4)
        assert one.variance.item() == pytest.approx(second - first**2, rel=1e-3)
    assert univariate(1.5).variance.isinf().all()
    assert univariate(1.0).mean.isnan().all()


@every_noise
def test_draws_have_the_moments_and_are_uniform_after_transport(name):
    mixture = student(NOISE[name], (), df=6.0)
    torch.manual_seed(0)
    draws = mixture.sample((40_000,))
    error = (mixture.variance / len(draws)).sqrt()
    assert ((draws.mean(0) - mixture.mean).abs() < 5 * error).all()
    for u in mixture.rosenblatt(draws[:4000]).unbind(-1):
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(1)], ids=str)
def test_pathwise_gradients(noise):
    """Of E|y|² with respect to all parameters, degrees of freedom included, against the closed form."""
    mixture = student(noise, (), dim=2)
    components = mixture.components.map(lambda t, n: (t + 0.0).requires_grad_())
    df = torch.tensor([9.0, 12.0, 20.0]).double().requires_grad_()
    components = dataclasses.replace(components, df=df)
    logits = mixture.logits.clone().requires_grad_()
    tensors = [logits, *components.tensors()]
    exact = Mixture(logits, components)
    expected = torch.autograd.grad((exact.variance + exact.mean.square()).sum(), tensors)
    torch.manual_seed(0)
    estimates = []
    for _ in range(40):
        value = Mixture(logits, components).rsample((1000,)).square().sum(-1).mean()
        estimates.append([g.flatten() for g in torch.autograd.grad(value, tensors)])
    for exact, several in zip(expected, zip(*estimates, strict=True), strict=True):
        several = torch.stack(several)
        error = several.std(0) / math.sqrt(len(several))
        assert ((several.mean(0) - exact.flatten()).abs() < 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("df", [1.5, 2.0, 3.0, 10.0])
def test_crps_of_one_component_is_the_closed_form(df):
    scoringrules = pytest.importorskip("scoringrules")
    y = torch.linspace(-5, 5, 11).double()
    components = StudentTComponents(
        torch.tensor([[0.5]]).double(), IsotropicCovariance(torch.tensor([2.0]).double()), torch.tensor([df]).double()
    )
    got = scores.crps(Mixture(torch.zeros(1).double(), components), y.unsqueeze(-1)).squeeze(-1)
    expected = scoringrules.crps_t(y.numpy(), df, location=0.5, scale=2.0)
    assert_close(got, torch.as_tensor(expected))


@pytest.mark.parametrize("df", [2.5, 6.0])
def test_crps_of_mixtures_is_the_integral(df):
    mixture, y = univariate(df, 2), torch.tensor([[0.3], [4.0]]).double()
    got = scores.crps(mixture, y)
    for row in range(2):
        one = mixture[row]

        def squared(z, one=one, row=row):
            return (one.cdf(torch.tensor([z]).double()).item() - float(y[row].item() <= z)) ** 2

        at = y[row].item()
        expected = scipy.integrate.quad(squared, -np.inf, at)[0] + scipy.integrate.quad(squared, at, np.inf)[0]
        assert got[row].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(1)], ids=str)
def test_many_degrees_of_freedom_are_normal(noise):
    """Also in single precision, in which the gamma functions of the density have no digits left."""
    mixture = student(noise, df=1e6).float()
    normal = GaussianMixture(mixture.logits, mixture.locs, mixture.components.covariance)
    y = mixture.sample((20,))
    assert_close(mixture.log_prob(y), normal.log_prob(y), rtol=1e-5, atol=1e-5)
    assert_close(mixture.cdf(y), normal.cdf(y), rtol=1e-5, atol=1e-5)
    assert_close(scores.crps(mixture, y), scores.crps(normal, y), rtol=1e-4, atol=1e-4)


def test_operations_that_are_not_closed_say_what_to_use():
    mixture = student(Full())
    for call in (lambda: mixture.product(mixture), lambda: mixture.reduce(1), mixture.modes, mixture.entropy_bounds):
        with pytest.raises(NotImplementedError, match=r"not closed for StudentTComponents components; \w+"):
            call()


@pytest.mark.parametrize("settings", [{"df": 0.5}, {"df": math.inf}, {"df": "a"}, {"min_df": 0.0}, {"noise": "full"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
        StudentT(**settings)
    with pytest.raises(ValueError, match="df: expected finite degrees of freedom"):
        StudentTComponents(torch.zeros(1, 1), IsotropicCovariance(torch.ones(1), 1), torch.tensor([0.5])).validate()


@pytest.mark.parametrize("family", ["student_t", StudentT(Full(), df=4), StudentT(LowRank(1, tied=True))], ids=str)
def test_files_have_the_family(tmp_path, family):
    x = torch.randn(5, 2)
    network = MixtureDensityNetwork(2, 2, 2, [4], family=family)
    network.save(tmp_path / "network")
    loaded = MixtureDensityNetwork.load(tmp_path / "network")
    assert loaded.head.family == network.head.family
    assert torch.equal(loaded(x).log_prob(x), network(x).log_prob(x))
    ensemble = DeepEnsemble(network, 2)
    ensemble.save(tmp_path / "ensemble")
    assert torch.equal(DeepEnsemble.load(tmp_path / "ensemble")(x).log_prob(x), ensemble(x).log_prob(x))


def test_a_family_is_part_of_the_identity_of_a_run(tmp_path):
    x = torch.randn(50, 1)
    settings = {"max_epochs": 2, "progress": False, "seed": 0, "checkpoint": tmp_path / "run", "validation": 0}
    fit(MixtureDensityNetwork(1, 1, 2, [4], family=StudentT(df=4)), x, x, **settings)
    for other in (StudentT(df=5), Normal()):
        with pytest.raises(ValueError, match=r"expected a checkpoint of this run.*head\.family"):
            fit(MixtureDensityNetwork(1, 1, 2, [4], family=other), x, x, resume=True, **settings)


def test_outliers_pull_less():
    """5 % of gross outliers among 1000 rows: held out, Student-t components are better by a tenth of a nat at least."""
    torch.manual_seed(0)
    x = 4 * torch.rand(3000, 1) - 2
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
    y = torch.where(torch.rand_like(y) < 0.05, y + 20 * torch.randn_like(y), y)
    losses = {}
    for family in ("normal", "student_t"):
        network = MixtureDensityNetwork(1, 1, 1, family=family, seed=0)
        fit(network, x[:1000], y[:1000], progress=False, seed=0, max_epochs=60)
        losses[family] = network.loss(x[1000:], y[1000:]).mean().item()
    assert losses["student_t"] < losses["normal"] - 0.1


def test_a_family_of_the_users_own_goes_everywhere():
    """The example is one, by the law of a Lomax variable with a random sign."""
    example = Path(__file__).parents[1] / "examples" / "own_family.py"
    assert len(example.read_text().splitlines()) <= 80
    code = f"""
import runpy, torch
family = runpy.run_path({str(example)!r})["TwoSidedPareto"]()
law, z = family.law, torch.tensor(-3.0).double()
print(family)
print(*map(float, (law.log_density(z), law.cdf(z), law.quantile(law.cdf(z)), law.mean_distance(z), law.stddev())))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    name, numbers = shown.splitlines()
    assert name.startswith("TwoSidedPareto(noise=Diagonal(")
    size = scipy.stats.lomax(4)
    distance = 3 + 2 * scipy.integrate.quad(lambda z: 0.5 * size.sf(z), 3, np.inf)[0]
    truth = size.logpdf(3) - math.log(2), 0.5 * size.sf(3), -3, distance, math.sqrt(size.moment(2))
    assert [float(number) for number in numbers.split()] == pytest.approx(truth)
