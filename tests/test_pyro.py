"""The network and its mixtures inside Pyro: models of ours and of the user's own, under every kind of inference."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import NOISE, make_head
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    DiagonalCovariance,
    Fixed,
    Full,
    GaussianMixture,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    NetworkModel,
    bayesianize,
    posterior_predictive,
    scores,
)

N = 12


def data():
    return torch.randn(N, 2), torch.randn(N, 2)


def empty_guide(*args, **kwargs):
    pass


@pytest.fixture(params=[Full(), LowRank(1), Diagonal(tied=True), Isotropic(homoscedastic=True), Fixed(0.5)], ids=str)
def network(request):
    return MixtureDensityNetwork(2, 2, 3, 8, noise=request.param)


def frozen(network):
    return network.eval().requires_grad_(False)


class Offset(PyroModule):
    """A user's model: the network is the likelihood, and a latent offset moves all of it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y=None):
        offset = pyro.sample("offset", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mixture = self.network(x).affine(offset.unsqueeze(-2), 1.0)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", mixture, obs=y)


def test_trace_scores_the_loss(network):
    x, y = data()
    trace = poutine.trace(network.model).get_trace(x, y)
    assert_close(trace.log_prob_sum(), -network.loss(x, y).sum())
    assert "y" in trace.observation_nodes
    assert "data" in trace.format_shapes()


@pytest.mark.parametrize("num_data", [None, N, 7 * N])
def test_num_data_scales_the_likelihood(network, num_data):
    x, y = data()
    expected = network.loss(x, y).sum() * (num_data or N) / N
    assert_close(Trace_ELBO().differentiable_loss(network.model, empty_guide, x, y, num_data=num_data), expected)


def test_svi_with_an_empty_guide_trains_the_weights(network):
    x, y = data()
    before = network.loss(x, y).sum().item()
    svi = SVI(network.model, empty_guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(100)]
    assert_close(losses[0], before, rtol=1e-5, atol=1e-4)
    assert network.loss(x, y).sum() < before - 1


def test_svi_with_autonormal_on_a_users_model(network):
    """The posterior mean of the offset moves to where the data are, the network staying as it is."""
    x, y = data()
    model = Offset(frozen(network))
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=4))
    losses = [svi.step(x, y) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    draws = Predictive(model, guide=guide, num_samples=5)(x)
    assert draws["y"].shape == (5, N, 2)
    assert draws["offset"].reshape(5, 2).std(0).min() > 0


def test_autonormal_on_our_model_where_nothing_is_latent(network):
    x, y = data()
    svi = SVI(network.model, AutoNormal(network.model), Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(50)]
    assert losses[-1] < losses[0]


def test_autonormal_on_our_model_with_bayesian_weights():
    network = MixtureDensityNetwork(2, 2, 3, 8)
    pyro.nn.module.to_pyro_module_(network)
    for layer in (network.backbone[0], network.head.linear):
        for name, value in list(layer.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.ndim)
            setattr(layer, name, pyro.nn.PyroSample(prior))
    x, y = data()
    guide = AutoNormal(network.model, init_scale=0.01)
    svi = SVI(network.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x, y, num_data=N) for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])
    draws = Predictive(network.model, guide=guide, num_samples=4)(x)
    assert draws["y"].shape == (4, N, 2)
    assert draws["head.linear.weight"].squeeze(1).shape == (4, 15, 8)


def test_nuts_on_a_users_model(network):
    x, y = data()
    network.initialize_(x, y)
    mcmc = MCMC(NUTS(Offset(frozen(network))), num_samples=20, warmup_steps=60, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()["offset"]
    assert draws.shape == (20, 2)
    assert draws.std(0).min() > 0
    assert Predictive(Offset(network), mcmc.get_samples())(x)["y"].shape == (20, N, 2)


def test_nuts_finds_a_known_posterior():
    """One component of known noise, a Gaussian prior on an offset: the posterior is Gaussian, in closed form."""
    network = MixtureDensityNetwork(2, 2, n_components=1, noise=Fixed(0.5)).eval().requires_grad_(False)
    x, y = data()
    precision = 1 + N / 0.25
    mean = (y - network(x).mean).sum(0) / 0.25 / precision
    mcmc = MCMC(NUTS(Offset(network)), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()["offset"]
    assert_close(draws.mean(0), mean, rtol=0, atol=5 * precision**-0.5 / 400**0.5 * 2)
    assert_close(draws.std(0), torch.full((2,), precision**-0.5), rtol=0.2, atol=0)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(network, parallel):
    x, _ = data()
    draws = Predictive(network.model, guide=empty_guide, num_samples=2000, parallel=parallel)(x)["y"]
    assert draws.shape == (2000, N, 2)
    mixture = network(x)
    standard_error = mixture.stddev / 2000**0.5
    assert ((draws.mean(0) - mixture.mean).abs() < 5 * standard_error).all()


def test_condition_observes_the_site(network):
    x, y = data()
    conditioned = poutine.trace(poutine.condition(network.model, data={"y": y})).get_trace(x)
    assert conditioned.nodes["y"]["is_observed"]
    assert_close(conditioned.log_prob_sum(), -network.loss(x, y).sum())


def test_outer_plate_broadcasts(network):
    """Two replicas of the targets under a plate to the left of ours."""
    x, y = data()

    def replicated(x, y):
        with pyro.plate("replicas", 2, dim=-2):
            return network.model(x, y)

    pair = torch.stack([y, y + 1])
    trace = poutine.trace(replicated).get_trace(x, pair)
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (2, N)
    assert_close(trace.log_prob_sum(), -(network.loss(x, y) + network.loss(x, y + 1)).sum())
    assert poutine.trace(replicated).get_trace(x, None).nodes["y"]["value"].shape == (2, N, 2)


def test_enumerated_model_sums_out_a_discrete_latent(network):
    """Each row comes from the network or from its mirror image: TraceEnum_ELBO gives the exact evidence."""
    x, y = data()

    @config_enumerate
    def mirrored(x, y):
        mixture = network(x)
        with pyro.plate("rows", N):
            side = pyro.sample("side", dist.Bernoulli(0.3))
            pyro.sample("y", mixture.affine(0.0, 1 - 2 * side.unsqueeze(-1)), obs=y)

    elbo = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mirrored, empty_guide, x, y)
    mixture = network(x)
    evidence = torch.logaddexp(
        mixture.log_prob(y) + torch.tensor(0.7).log(), mixture.log_prob(-y) + torch.tensor(0.3).log()
    )
    assert_close(elbo, -evidence.sum())


def test_sequences_belong_to_the_event():
    network = MixtureDensityNetwork(2, 2, 3, 8)
    x, y = torch.randn(N, 7, 2), torch.randn(N, 7, 2)
    site = poutine.trace(network.model).get_trace(x, y).nodes["y"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((N,), (7, 2))
    assert_close(site["fn"].log_prob(y), -network.loss(x, y).sum(-1))


# What depends on a draw without a pathwise gradient, TraceGraph_ELBO follows by a class of tensors.

TRACKED = {
    "log_prob": lambda mixture, y: mixture.log_prob(y),
    "incomplete": lambda mixture, y: mixture.log_prob(torch.where(torch.arange(4) == 1, math.nan, y)),
    "component_log_prob": lambda mixture, y: mixture.component_log_prob(y),
    "responsibilities": lambda mixture, y: mixture.responsibilities(y),
    "affine": lambda mixture, y: mixture.affine(1.0, 2.0).log_prob(y),
    "matrix": lambda mixture, y: mixture.affine(matrix=torch.eye(4).double() + 0.1).log_prob(y),
    "marginal": lambda mixture, y: mixture.marginal([2, 0]).log_prob(y[:, :2]),
    "condition": lambda mixture, y: mixture.condition(y[:, :2], [0, 3]).log_prob(y[:, 2:]),
    "pool": lambda mixture, y: mixture.pool(0).log_prob(y[0]),
    "product": lambda mixture, y: mixture.product(mixture).log_normalizer,
    "temper": lambda mixture, y: mixture.temper(2.0).log_prob(y),
    "moments": lambda mixture, y: mixture.mean + mixture.stddev + mixture.covariance_matrix.sum(-1),
    "cdf": lambda mixture, y: mixture.cdf(y),
    "log_cdf": lambda mixture, y: mixture.log_cdf(y) + mixture.log_sf(y),
    "icdf": lambda mixture, y: mixture.icdf(0.3),
    "interval": lambda mixture, y: mixture.interval(0.8)[0],
    "shortest": lambda mixture, y: mixture.interval(0.8, kind="shortest")[1],
    "rsample": lambda mixture, y: mixture.rsample(),
    "rosenblatt": lambda mixture, y: mixture.rosenblatt(y),
    "modes": lambda mixture, y: mixture.modes(),
    "crps": scores.crps,
    "energy_score": lambda mixture, y: scores.energy_score(mixture, y, num_samples=5).value,
    "interval_log_score": lambda mixture, y: scores.interval_log_score(mixture, y, 0.5),
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("operation", TRACKED)
def test_what_pyro_tracks_is_kept_with_its_gradients(operation, noise):
    head, results = make_head(NOISE[noise]), []
    features, y = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    for tracked in (False, True):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(0)
        given = ProvenanceTensor(1 * leaf, frozenset("z")) if tracked else 1 * leaf
        result = TRACKED[operation](head(given), y)
        assert get_provenance(result) == frozenset("z" * tracked)
        result = detach_provenance(result)
        weights = [leaf, *head.parameters()]
        gradients = torch.autograd.grad(result.sum(), weights, allow_unused=True) if result.requires_grad else ()
        results.append((result, [g for g in gradients if g is not None]))
    assert_close(results[1], results[0], rtol=1e-8, atol=1e-10, equal_nan=True)


ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "RenyiELBO": RenyiELBO,
    "ReweightedWakeSleep": functools.partial(ReweightedWakeSleep, vectorize_particles=False),
    "JitTraceGraph_ELBO": functools.partial(JitTraceGraph_ELBO, ignore_jit_warnings=True),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*no sample sites configured for enumeration:UserWarning")
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("of", ["input", "affine", "loss", "crps"])
def test_gradients_below_a_draw_without_a_pathwise_gradient(network, elbo, of):
    x, y = torch.randn(N, 2), torch.randn(N, 2)
    even, always = dist.Bernoulli(torch.tensor(0.5)), dist.Bernoulli(torch.tensor(1.0))

    def density(z):
        if of == "loss":
            return -network.loss(x + z, y)
        if of == "crps":
            return -scores.crps(network(x + z), y)
        return (network(x + z) if of == "input" else network(x).affine(z, 1.0)).log_prob(y)

    def model():
        z = pyro.sample("z", even)
        if of in ("loss", "crps"):
            pyro.factor("score", density(z).sum())
            return
        with pyro.plate("rows", N):
            pyro.sample("y", network(x + z) if of == "input" else network(x).affine(z, 1.0), obs=y)

    def guide():
        pyro.sample("z", always)  # it is 1, so that there is one right gradient

    weights = [p for p in network.parameters() if p.requires_grad]
    expected = torch.autograd.grad(-density(1.0).sum(), weights, allow_unused=True)
    ELBOS[elbo]().loss_and_grads(model, guide)
    for weight, gradient in zip(weights, expected, strict=True):
        assert_close(torch.zeros_like(weight) if weight.grad is None else weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_mixture_as_a_guide_recovers_a_bimodal_posterior():
    """Pathwise gradients alone, from a start with equal weights; the divergence is by quadrature."""
    locs = torch.tensor([[-1.5], [2.0]])
    target = GaussianMixture(torch.tensor([0.3, 0.7]).log(), locs, DiagonalCovariance(torch.tensor([[0.5], [0.8]])))

    def posterior():
        logits = pyro.param("logits", torch.zeros(3))
        guess = pyro.param("locs", torch.tensor([[-2.0], [0.0], [1.0]]))
        scale = pyro.param("scale", torch.ones(3, 1), constraint=dist.constraints.positive)
        return GaussianMixture(logits, guess, DiagonalCovariance(scale))

    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / 800)})
    svi = SVI(lambda: pyro.sample("z", target), lambda: pyro.sample("z", posterior()), optimizer, elbo)
    for _ in range(800):
        svi.step()
    z = torch.linspace(-8, 8, 4001).unsqueeze(-1)
    log_q, log_p = posterior().log_prob(z).detach(), target.log_prob(z)
    assert torch.trapezoid(log_q.exp() * (log_q - log_p), z[:, 0]) < 0.01


def test_mask_and_expand_by(network):
    x, y = data()
    mask = torch.arange(N) % 2 == 0
    assert_close(network(x).mask(mask).log_prob(y), -network.loss(x, y) * mask)
    assert network(x).expand_by((3,)).batch_shape == (3, N)


def test_network_may_be_called_before_it_joins_a_model(network):
    x, y = data()
    network(x)
    model = Offset(network)
    assert "network.head$$$linear.weight" in poutine.trace(model).get_trace(x, y).param_nodes


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("noise", [Diagonal(), Diagonal(tied=True), Full(), LowRank(1)], ids=str)
def test_steps_compiled_by_pyro_are_those_that_are_not(noise):
    x, y = data()
    losses = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(MixtureDensityNetwork(2, 2, 3, 8, noise=noise).model, empty_guide, Adam({"lr": 0.01}), elbo)
        losses.append([svi.step(x, y) for _ in range(4)])
    assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert losses[0][3] < losses[0][0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO])
@pytest.mark.parametrize("of_user", [False, True])
def test_missing_targets_are_not_compiled_by_pyro(elbo, of_user):
    """Which entries are missing would be what it was in the first step."""
    x, y = data()
    missing = y.masked_fill(torch.eye(N, 2, dtype=torch.bool), math.nan)
    network = MixtureDensityNetwork(2, 2, 3, 8)
    model = Offset(network) if of_user else network.model
    guide = AutoNormal(model) if of_user else empty_guide

    def steps():
        return SVI(model, guide, Adam({"lr": 0.01}), elbo(ignore_jit_warnings=True))

    message = r"expected complete points under torch\.jit, got NaN for missing ones"
    with pytest.raises(ValueError, match=message):
        steps().step(x, missing)
    svi = steps()
    svi.step(x, y)
    with pytest.raises((RuntimeError, ValueError), match=message):
        svi.step(x, missing)
    assert math.isfinite(svi.step(x, y))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_missing_targets_of_traced_losses_are_refused():
    x, y = data()
    missing = y.masked_fill(torch.eye(N, 2, dtype=torch.bool), math.nan)
    network = frozen(MixtureDensityNetwork(2, 2, 3, 8))
    for function in (lambda x, y: network.loss(x, y), lambda x, y: network(x).log_prob(y)):
        traced = torch.jit.trace(function, (x, y))
        assert_close(traced(x, y + 1), function(x, y + 1))
        with pytest.raises(RuntimeError, match=r"expected complete points under torch\.jit"):
            traced(x, missing)
    functions = [
        lambda y: network.loss(x, y),
        lambda y: network(x).component_log_prob(y),
        lambda y: network(x).condition(y[:, 1:], [1]).mean,
    ]
    for function in functions:
        with pytest.raises(ValueError, match=r"expected complete points under torch\.jit"):
            torch.jit.trace(function, (missing,))


class Moved(Offset):
    """The latent offset is one of the inputs."""

    def forward(self, x, y=None):
        offset = pyro.sample("offset", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", self.network(x + offset), obs=y)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_nuts_compiled_by_pyro_draws_as_it_does_otherwise(network):
    x, y = data()
    model = Moved(frozen(network))
    draws = []
    for compiled in (False, True):
        torch.manual_seed(0)
        settings = {"jit_compile": compiled, "ignore_jit_warnings": True, "max_tree_depth": 2}
        mcmc = MCMC(NUTS(model, step_size=0.1, adapt_step_size=False, **settings), 4, 4, disable_progbar=True)
        mcmc.run(x, y)
        draws.append(mcmc.get_samples()["offset"])
    assert_close(draws[1], draws[0], rtol=1e-3, atol=1e-3)
    assert draws[0].std(0).min() > 0


@pytest.mark.parametrize("layers", ["head", "all"])
@pytest.mark.parametrize("of_user", [False, True])
def test_weights_within_plates_are_refused(layers, of_user):
    x, y = data()
    network = bayesianize(MixtureDensityNetwork(2, 2, 3, 8), layers=layers)
    model = Offset(network) if of_user else network.model
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    message = r"network: expected .*weight of shape \(\d+, \d\), outside of plates, got \(3, 1, .* num_particles="
    with pytest.raises(ValueError, match=message):
        SVI(model, guide, Adam({"lr": 0.01}), elbo).step(x, y)
    with pytest.raises(ValueError, match="expected shape"):
        SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x[:, :1], y)


def test_two_networks_with_names_of_their_own():
    x, y = torch.randn(20, 2), torch.randn(20, 1)
    both = PyroModule()
    both.first, both.second = MixtureDensityNetwork(2, 1, 2), MixtureDensityNetwork(1, 1, 2)

    def program(x, y=None, z=None):
        y = both.first.model(x, y)
        return both.second.model(y, z, name="z", plate="rows")

    nodes = poutine.trace(program).get_trace(x, y, y).nodes
    assert_close(nodes["y"]["fn"].log_prob(y), -both.first.loss(x, y))
    assert_close(nodes["z"]["fn"].log_prob(y), -both.second.loss(y, y))
    assert {"data", "rows"} <= nodes.keys()
    assert Predictive(program, num_samples=3)(x)["z"].shape == (3, 20, 1)


def test_models_as_modules():
    """The gradients are those of the loss, and all parameters are trained, each once."""
    network, (x, y) = MixtureDensityNetwork(2, 1, 2), (torch.randn(20, 2), torch.randn(20, 1))
    model = NetworkModel(network, name="z", plate="rows")
    elbo = Trace_ELBO()(model, lambda *args, **kwargs: None)
    loss = elbo(x, y)
    assert_close(loss, network.loss(x, y).sum())
    assert [id(p) for p in elbo.parameters()] == [id(p) for p in network.parameters()]
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()
    assert elbo(x, y) < loss
    assert_close(dict(model.state_dict()), {f"network.{n}": t for n, t in network.state_dict().items()})
    bayesianize(network, layers="head")
    guide = AutoNormal(model)
    guide(x, y)
    draws = Predictive(model, guide=guide, num_samples=3)(x)
    assert draws["z"].shape == (3, 20, 1)
    assert posterior_predictive(network, guide, x, 4).batch_shape == (4, 20)
    for names in ({"name": ""}, {"name": "data"}, {"plate": None}):
        with pytest.raises(ValueError, match="name, plate: expected"):
            NetworkModel(network, **names)


def test_svi_of_a_second_network_warns_that_it_does_not_train():
    x, y = torch.randn(20, 1), torch.randn(20, 1)

    def steps(network):
        svi = SVI(network.model, lambda *args: None, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
        before = network.head.linear.weight.detach().clone()
        svi.step(x, y)
        return bool((network.head.linear.weight != before).any())

    assert steps(MixtureDensityNetwork(1, 1))
    with pytest.warns(UserWarning, match="clear_param_store"):
        assert not steps(MixtureDensityNetwork(1, 1))
    pyro.clear_param_store()
    assert steps(MixtureDensityNetwork(1, 1))
