"""Von Mises components: against mpmath and scipy, by quadrature and by draws, and in everything that takes a family.

What all angles have in common is tested in ``test_angles.py``, also for these components.
"""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from cases import BATCH_SHAPES
from torch.testing import assert_close

from pyro_mdn import (
    Angle,
    DeepEnsemble,
    Diagonal,
    Fixed,
    Isotropic,
    Mixture,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeLogLikelihood,
    Targets,
    VonMises,
    bayesianize,
    fit,
    laplace,
    posterior_predictive,
    scores,
)
from pyro_mdn.distributions.families.circular.concentrations import log_scaled_bessel, lost_resultant
from pyro_mdn.distributions.families.circular.von_mises_components import VonMisesComponents
from pyro_mdn.distributions.families.circular.von_mises_law import VonMisesLaw
from pyro_mdn.distributions.units.circular.circles import Circle, Circles
from pyro_mdn.distributions.units.circular.wrapped import wrapped_components
from pyro_mdn.sklearn import MDNRegressor

TURN = 2 * math.pi
CONCENTRATIONS = [0.0, 1e-8, 1e-3, 0.7, 5.0, 19.99, 20.01, 60.0, 1e4, 1e8]
RADIANS = Circle(TURN, -math.pi)
NOISE = [
    Diagonal(),
    Diagonal(tied=True),
    Diagonal(homoscedastic=True),
    Diagonal(tied=True, homoscedastic=True),
    Isotropic(),
    Fixed(0.4),
]


def law_of(*concentrations, dtype=torch.float64):
    return VonMisesLaw(torch.tensor(concentrations, dtype=dtype).unsqueeze(-1))


def mixture_of(weights, locs, concentrations, circle=RADIANS, dtype=torch.float64):
    weights, locs, concentrations = (torch.tensor(t, dtype=dtype) for t in (weights, locs, concentrations))
    radian = torch.full_like(locs, circle.period / TURN).unsqueeze(-1)
    base = VonMisesComponents(locs.unsqueeze(-1), radian, VonMisesLaw(concentrations.unsqueeze(-1)))
    return Mixture(weights.log(), wrapped_components(base, Circles((circle,))))


def exact_density(concentration, angle):
    k, z = mpmath.mpf(concentration), mpmath.mpf(angle)
    return mpmath.exp(k * (mpmath.cos(z) - 1)) / (2 * mpmath.pi * mpmath.exp(-k) * mpmath.besseli(0, k))


def exact_probability(concentration, low, high):
    """Integral over parts that are no longer than the density is wide."""
    with mpmath.workdps(30):
        width = min(1.0, 2 / math.sqrt(max(concentration, 1.0)))
        peaks = [n * TURN + x * width for n in (-1, 0, 1) for x in (-8, -4, -2, -1, 0, 1, 2, 4, 8)]
        points = sorted({low, high, *(p for p in peaks if low < p < high)})
        return mpmath.quad(lambda t: exact_density(concentration, t), points)


# The law of one angle


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
def test_functions_of_concentrations(dtype, rtol):
    k = torch.tensor(CONCENTRATIONS, dtype=dtype, requires_grad=True)
    with mpmath.workdps(40):
        exact = [mpmath.mpf(value) for value in k.tolist()]
        logs = [float(mpmath.log(mpmath.besseli(0, x)) - x) for x in exact]
        lost = [float(1 - mpmath.besseli(1, x) / mpmath.besseli(0, x)) for x in exact]
    for function, expected in ((log_scaled_bessel, logs), (lost_resultant, lost)):
        assert_close(function(k), torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol)
    assert_close(lost_resultant(k), torch.tensor(lost, dtype=dtype), rtol=rtol, atol=0)
    (slope,) = torch.autograd.grad(log_scaled_bessel(k).sum(), k, create_graph=True)
    assert_close(slope, -lost_resultant(k), rtol=rtol, atol=0)
    (bend,) = torch.autograd.grad(slope.sum(), k)
    # A'(k) = 1 - A(k) / k - A(k)^2
    resultant = 1 - np.array(lost)[3:6]
    expected = 1 - resultant / np.array(CONCENTRATIONS)[3:6] - resultant**2
    assert_close(bend[3:6].double().numpy(), expected, rtol=100 * rtol, atol=0)
    assert bool(bend.isfinite().all())


@pytest.mark.parametrize("concentration", CONCENTRATIONS)
def test_law_against_mpmath(concentration):
    law, width = law_of(concentration), min(1.0, 1 / math.sqrt(max(concentration, 1e-9)))
    z = torch.tensor([-3.0, -0.5, 0.0, 0.3, 2.0, 8.0], dtype=torch.float64) * width
    z = torch.cat([z.clamp(-3.1, 3.1), torch.tensor([-3.1, 3.0], dtype=torch.float64)])
    with mpmath.workdps(30):
        expected = [float(mpmath.log(exact_density(concentration, x))) for x in z.tolist()]
    assert_close(law.log_density(z)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    near = z[: -2 if concentration > 100 else None]
    below = [float(exact_probability(concentration, -math.pi, x)) for x in near.tolist()]
    below = torch.tensor(below, dtype=torch.float64)
    assert_close(law.cdf(near)[0], below, rtol=1e-10, atol=0)
    assert_close(law.cdf(near + 3 * TURN)[0], below + 3, rtol=1e-11, atol=0)
    for centre, half in ((0.1, 0.2), (-2.0, 1e-9), (1.5, 2.0), (3.0, 1.5), (-3.1, 3.14), (0.0, 1e-3)):
        centre, half = centre * width, half * width
        got = law.log_mass(*(torch.tensor([t], dtype=torch.float64) for t in (centre, half))).item()
        if half > 1e-6 * width:
            exact = exact_probability(concentration, centre - half, centre + half)
        else:  # mpmath's points of the quadrature would need more digits
            exact = 2 * half * exact_density(concentration, centre)
        assert got == pytest.approx(float(mpmath.log(exact)), rel=1e-9, abs=1e-9)


def test_quantiles_of_the_law():
    law = law_of(*CONCENTRATIONS)
    q = torch.tensor([1e-9, 1e-3, 0.1, 0.4, 0.5], dtype=torch.float64)
    z = law.quantile(q)
    assert bool(((z >= -math.pi) & (z <= 0)).all())
    assert_close(law.cdf(z), q.expand_as(z), rtol=1e-6, atol=1e-14)
    assert_close(law.two_sided_quantile(1 - q[1:]), -z[:, 1:], rtol=1e-9, atol=1e-12)
    assert_close(law.quantile(torch.zeros(1).double()), torch.full((len(CONCENTRATIONS), 1), -math.pi).double())


def test_single_precision():
    """Density and moments keep their digits, at any concentration; torch's own density does not."""
    z = torch.linspace(-6, 6, 50).double()
    for concentration in (0.0, 0.3, 20.0, 1e4, 1e6):
        angles = (z / math.sqrt(max(concentration, 4.0))).float()
        got = law_of(concentration, dtype=torch.float32).log_density(angles)
        exact = law_of(concentration).log_density(angles.double())
        assert_close(got.double(), exact, rtol=3e-6, atol=3e-6)
        single, double = (
            mixture_of([0.5, 0.5], [3.1, -3.1], [concentration] * 2, dtype=t) for t in (torch.float32, torch.float64)
        )
        assert_close(single.stddev.double(), double.stddev, rtol=2e-5 if concentration else 1, atol=0)
        assert math.isfinite(single.stddev.item())
        if concentration:
            assert_close(single.mean.abs().double(), torch.tensor([math.pi]).double(), rtol=1e-5, atol=0)


def test_derivatives():
    k = torch.tensor([[0.5], [15.0], [400.0]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[-2.0, -0.1, 3.0], [-1.0, 0.2, 1.1], [-0.1, 0.02, 0.15]], dtype=torch.float64, requires_grad=True)
    for function in (
        lambda k, z: VonMisesLaw(k).cdf(z),
        lambda k, z: VonMisesLaw(k).log_mass(z, 0.3 * z.abs() + 0.01),
        lambda k, z: VonMisesLaw(k).log_density(z),
    ):
        assert torch.autograd.gradcheck(function, (k, z), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (k, z), fast_mode=True)
    law = VonMisesLaw(k.detach())
    (slope,) = torch.autograd.grad(law.log_density(z).sum(), z)
    assert_close(law.slope(z), slope)
    (density,) = torch.autograd.grad(law.cdf(z).sum(), z)
    assert_close(density, law.log_density(z).exp(), rtol=1e-8, atol=1e-10)


# Mixtures


def make_head(transform=None, dim=1, n_components=3, **settings):
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # so that a radian has all digits
    head = MixtureHead(4, dim, n_components, target_transform=transform, **settings)
    torch.set_default_dtype(before)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


@pytest.mark.parametrize("shape", BATCH_SHAPES.values(), ids=BATCH_SHAPES)
@pytest.mark.parametrize(("dim", "n_components"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("noise", NOISE, ids=str)
def test_densities_against_scipy(shape, dim, n_components, noise):
    transform = Angle(24.0, -3.0)
    head = make_head(transform, dim, n_components, family=VonMises(noise))
    features = torch.randn(*shape, 4, dtype=torch.float64)
    mixture = head(features)
    y = mixture.sample((3,))
    rate, components = TURN / 24.0, mixture.components.inner
    concentration = components.standard.concentration.expand(components.locs.shape).detach().numpy()
    angles = rate * (y.unsqueeze(-2) - components.locs.detach()).numpy()
    each = scipy.stats.vonmises(concentration).logpdf(angles).sum(-1) + dim * math.log(rate)
    expected = torch.logsumexp(mixture.logits.detach() + torch.from_numpy(each), -1)
    assert_close(mixture.log_prob(y).detach(), expected, rtol=1e-8, atol=1e-8)
    assert_close(head.log_prob(features, y).detach(), expected, rtol=1e-8, atol=1e-8)
    assert_close(mixture.component_log_prob(y).detach(), torch.from_numpy(each), rtol=1e-8, atol=1e-8)


def test_moments_are_closed_forms():
    for concentration in (0.0, 1e-6, 0.5, 3.0, 1e4, 1e8):
        mixture = mixture_of([1.0], [2.0], [concentration])
        with mpmath.workdps(40):
            k = mpmath.mpf(concentration)
            resultant = mpmath.besseli(1, k) / mpmath.besseli(0, k)
            expected = float(mpmath.sqrt(-2 * mpmath.log(resultant))) if concentration else math.inf
        if concentration > 1e-8:
            assert mixture.mean.item() == pytest.approx(2.0, rel=1e-9)
            assert mixture.stddev.item() == pytest.approx(expected, rel=1e-9)
        assert 0 < mixture.stddev.item() < math.inf
        assert_close(mixture.components.stddev()[0], mixture.stddev)


@pytest.mark.parametrize("concentration", [0.0, 1e-5, 0.8, 30.0, 1e7])
def test_draws(concentration):
    torch.manual_seed(0)
    circle = Circle(360.0, 0.0)
    mixture = mixture_of([0.3, 0.7], [355.0, 20.0], [concentration] * 2, circle)
    y = mixture.sample((4000,))
    assert bool(((y >= 0) & (y < 360)).all())
    assert scipy.stats.kstest(mixture.cdf(y)[:, 0].numpy(), "uniform").pvalue > 1e-3


def test_conditionals_marginals_pools_and_missing_entries():
    head = make_head(["angle", Angle(360.0, 0.0)], 2, family="von_mises")
    mixture = head(torch.randn(2, 3, 4, dtype=torch.float64)).detach()
    y = mixture.sample()
    first, second = y[..., :1], y[..., 1:]
    evidence = mixture.marginal(0).log_prob(first)
    assert_close(evidence + mixture.condition(first, 0).log_prob(second), mixture.log_prob(y))
    partial = y.clone()
    partial[..., 1] = torch.nan
    assert_close(mixture.log_prob(partial), evidence)
    assert_close(mixture.pool(0).log_prob(y[0]).exp(), mixture.log_prob(y[0].expand(2, 3, 2)).exp().mean(0))
    tempered = mixture.temper(4.0).components.inner.standard.concentration
    assert_close(tempered, mixture.components.inner.standard.concentration / 4)
    arcs = Targets.interval(torch.tensor([[-1.0, 350.0]]).double(), torch.tensor([[2.0, 375.0]]).double())
    logs = [mixture.marginal(d).log_prob(Targets.interval(arcs.lower[:, [d]], arcs.upper[:, [d]])) for d in (0, 1)]
    assert_close(logs[0].exp(), (mixture.cdf(arcs.upper) - mixture.cdf(arcs.lower))[..., 0])
    assert_close(logs[1].exp(), mixture.sf(arcs.lower)[..., 1] + mixture.marginal(1).cdf(15.0)[..., 0])
    parts = mixture[0], mixture[1]
    assert_close(Mixture.stack(parts).log_prob(y), mixture.log_prob(y))
    assert_close(mixture.float().log_prob(y.float()).double(), mixture.log_prob(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", NOISE[:5], ids=str)
def test_gradients(noise):
    head, features = make_head("angle", 2, 2, family=VonMises(noise)), torch.randn(3, 4, dtype=torch.float64)
    y = head(features).sample()
    parameters = {name: p.detach().requires_grad_() for name, p in head.named_parameters()}

    def loss(*values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(head, named, features).log_prob(y)

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, tuple(parameters.values()), fast_mode=True)


# Networks


def simulated(count=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 1))
    return x, np.remainder(math.pi + x + rng.vonmises(0, 3.0, (count, 1)), TURN) - math.pi


def test_network_comes_close_to_the_truth():
    x, y = simulated(2000)
    network = MixtureDensityNetwork(1, 1, n_components=2, family="von_mises", hidden_dim=(16,), seed=0)
    fit(network, x, y, max_epochs=20, seed=0, progress=False)
    x, y = simulated(2000, 1)
    truth = (3 * np.cos(y - x)).mean() - math.log(TURN * scipy.special.i0(3.0))
    assert network.predict(x).log_prob(y).mean() == pytest.approx(truth, abs=0.03)
    degrees = MixtureDensityNetwork(1, 1, family="von_mises", target_transform=Angle(360.0, low=0.0))
    with pytest.raises(ValueError, match="expected numbers between 0 and 360, got -"):
        fit(degrees, x, np.degrees(y), progress=False)


def test_files_ensembles_and_posteriors(tmp_path):
    x, y = simulated(60)
    new, rows = torch.from_numpy(x[:4]).float(), torch.from_numpy(y[:4]).float()
    network = MixtureDensityNetwork(1, 1, n_components=2, family=VonMises(Diagonal(tied=True)), hidden_dim=(4,), seed=0)
    fit(network, x, Targets.cells(y, 0.01), max_epochs=2, progress=False)
    network.save(tmp_path / "angles.safetensors")
    loaded = MixtureDensityNetwork.load(tmp_path / "angles.safetensors")
    assert loaded.head.family == network.head.family
    assert_close(loaded(new).log_prob(rows), network(new).log_prob(rows))
    ensemble = DeepEnsemble(network, size=3)
    fit(ensemble, x, y, max_epochs=1, progress=False)
    expected = torch.stack([ensemble.member(i)(new).log_prob(rows) for i in range(3)])
    assert_close(ensemble.members(new).log_prob(rows), expected, rtol=1e-4, atol=1e-5)
    bayesian = bayesianize(network)
    drawn = posterior_predictive(bayesian, laplace(bayesian, x, y, progress=False), new, num_samples=5, linearize=True)
    assert drawn.batch_shape == (5, 4)
    assert bool(scores.crps(drawn.pool(0), rows).isfinite().all())
    model = MDNRegressor(family="von_mises", hidden_dim=(4,), max_epochs=1, random_state=0).fit(x, y)
    assert np.abs(model.predict(x)).max() <= math.pi


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_and_mapped():
    torch.compiler.reset()
    network = MixtureDensityNetwork(1, 2, 2, (8,), family="von_mises")
    objective, x = NegativeLogLikelihood(network), torch.randn(16, 1)
    y = network.sample(x)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    losses = objective(x, y), compiled(x, y)
    assert_close(*losses)
    gradients = [torch.autograd.grad(loss.sum(), list(network.parameters())) for loss in losses]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
    one_by_one = torch.vmap(lambda x, y: network(x).cdf(y))(x, y)
    assert_close(one_by_one, network(x).cdf(y), rtol=1e-4, atol=1e-5)


def test_bad_input():
    expected = "target_transform: expected angles for all outputs, such as 'angle' or Angle.360, low=0., beside Von"
    for dim, transform in ((1, "log"), (1, "standardize"), (2, ["angle", "log"])):
        with pytest.raises(ValueError, match=expected):
            MixtureDensityNetwork(1, dim, family="von_mises", target_transform=transform)
    with pytest.raises(ValueError, match="noise: expected a noise model without correlations"):
        MixtureDensityNetwork(1, 2, family="von_mises", noise="full")
    with pytest.raises(ValueError, match="expected one period for all outputs"):
        MixtureDensityNetwork(1, 2, family=VonMises(Isotropic()), target_transform=["angle", Angle(360.0)])
    with pytest.raises(ValueError, match="expected 2 angles at most, got 3"):
        MixtureDensityNetwork(1, 3, family="von_mises")
    with pytest.raises(ValueError, match="concentration: expected finite numbers, none negative"):
        mixture_of([1.0], [0.0], [-1.0])
    mixture = mixture_of([1.0], [0.0], [1.0])
    for function in (lambda: mixture.affine(1.0), lambda: mixture.rosenblatt(torch.zeros(1))):
        with pytest.raises(NotImplementedError, match="not closed for WrappedComponents"):
            function()
