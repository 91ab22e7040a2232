"""Latent weights: priors, draws from every kind of posterior, and predictives that are exact mixtures."""

import math
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import Held
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    ConvergenceWarning,
    DeepEnsemble,
    Diagonal,
    Full,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    bayesianize,
    fit,
    fit_mcmc,
    laplace,
    posterior_predictive,
    starting_weights,
)
from pyro_mdn.adapters.sources import Source
from pyro_mdn.networks.batched.functional import over_draws
from pyro_mdn.networks.batched.layers import is_dense
from pyro_mdn.networks.predictor import Predictor
from pyro_mdn.posteriors.guide_draws import draw_from
from pyro_mdn.posteriors.posterior import Posterior
from pyro_mdn.posteriors.predictive import draw_weights
from pyro_mdn.posteriors.priors import fan_in_normal

GUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoDelta,
    lambda model: AutoIAFNormal(model, [200]),
]
NAMES = ["normal", "diagonal", "full", "low rank", "delta", "flow"]


class Convolutional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, width), nn.Tanh())

    def forward(self, x):
        return self.layers(x.unsqueeze(-2))


class Recurrent(nn.Module):
    def __init__(self, width, kind=nn.LSTM):
        super().__init__()
        self.layer = kind(1, width, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0][:, -1]


def make(backbone="mlp", **settings):
    torch.manual_seed(0)
    settings = {"n_components": 3, "hidden_dim": 4, **settings}
    module = {"mlp": None, "conv": Convolutional(4), "lstm": Recurrent(4), "gru": Recurrent(4, nn.GRU)}[backbone]
    network = MixtureDensityNetwork(6, settings.pop("dim_out", 1), backbone=module, **settings)
    return network.double()


def data(dim_out=1, rows=7):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for d in (6, dim_out))
    return x, y


def one_after_another(network, draws, x, y):
    """Log-densities ``(S, N)`` by Pyro's model, given each draw of the weights in turn."""
    rows = []
    for i in range(len(next(iter(draws.values())))):
        model = poutine.condition(network.model, data={name: value[i] for name, value in draws.items()})
        rows.append(poutine.trace(model).get_trace(x).nodes["y"]["fn"].log_prob(y))
    return torch.stack(rows)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Priors


def test_prior_scales_with_fan_in():
    network = bayesianize(make(hidden_dim=(64, 32)), 2.0)
    trace = poutine.trace(network.model).get_trace(data()[0])
    scale = {name: trace.nodes[name]["fn"].base_dist.stddev for name in starting_weights(network)}
    assert scale.keys() == dict(make().named_parameters()).keys()
    for name, fan_in in [("backbone.0.weight", 6), ("backbone.2.weight", 64), ("head.linear.weight", 32)]:
        assert_close(scale[name], torch.full_like(scale[name], 2 / math.sqrt(fan_in)))
    assert bool((scale["backbone.0.bias"] == 2).all())


def test_convolutions_and_recurrent_layers_have_fan_in_too():
    assert_close(fan_in_normal(1.0)("", torch.zeros(3, 2, 5)).base_dist.stddev.max(), torch.tensor(0.1**0.5))
    network = bayesianize(make("lstm"))
    assert {name for name in starting_weights(network) if "layer" in name} == {
        f"backbone.layer.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_any_prior():
    network = bayesianize(
        make(),
        prior=dist.Laplace(torch.tensor(0.0, dtype=torch.float64), 0.5),
        layers=["backbone.0", "head.linear.bias"],
    )
    nodes = poutine.trace(network.model).get_trace(data()[0]).nodes
    latent = [n for n, s in nodes.items() if s["type"] == "sample" and not s["is_observed"] and n not in ("data", "y")]
    assert sorted(latent) == ["backbone.0.bias", "backbone.0.weight", "head.linear.bias"]
    assert isinstance(nodes["backbone.0.weight"]["fn"].base_dist, dist.Laplace)
    assert nodes["backbone.0.weight"]["fn"].event_shape == (4, 6)

    def around(name, value):
        return dist.Normal(value, 0.1).to_event(value.ndim)

    network = make()
    weight = network.head.linear.weight.detach().clone()
    bayesianize(network, prior=around, layers="head.linear.weight")
    assert_close(poutine.trace(network.model).get_trace(data()[0]).nodes["head.linear.weight"]["fn"].mean, weight)


def test_starting_weights_are_those_that_were_learned():
    network = make()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    x, y = data()
    expected = network(x).log_prob(y)
    assert bayesianize(network) is network
    assert_close(starting_weights(network), before)
    draws = {name: value.unsqueeze(0) for name, value in before.items()}
    assert_close(posterior_predictive(network, draws, x).log_prob(y)[0], expected)


class Stretched(MixtureDensityNetwork):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.size = nn.Parameter(torch.full((), 2.0))

    def features(self, x):
        return self.size * super().features(x)


def test_parameters_of_the_network_itself():
    network = Stretched(6, 1, 2, 4).double()
    x, y = data()
    expected = network(x).log_prob(y)
    bayesianize(network)
    assert starting_weights(network)["size"] == 2
    draws = {name: value.unsqueeze(0) for name, value in starting_weights(network).items()}
    assert_close(posterior_predictive(network, draws, x).log_prob(y)[0], expected)


def test_starting_weights_are_no_other_buffers():
    network = make("conv")
    network.backbone.register_buffer("cold_start", torch.zeros(2).double())
    bayesianize(network, layers="backbone.layers.0")
    assert starting_weights(network).keys() == {"backbone.layers.0.weight", "backbone.layers.0.bias"}
    x, y = data()
    assert posterior_predictive(network, approximated(network, x, y), x, 2, linearize=True).batch_shape == (2, 7)


def test_initialize_sets_the_start():
    network = bayesianize(make(n_components=1))
    x, y = data(rows=200)
    network.initialize_(x, 5 + y)
    assert_close(network.head.shift, 5 + y.mean(0), check_dtype=False)
    assert starting_weights(network)["head.linear.bias"][1].abs() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "tail"}, "layers: expected 'all', 'head' or names among"),
        ({"layers": ["head", "backbone.1"]}, "got 'backbone.1'"),
        ({"prior_scale": 0.0}, "prior_scale"),
        ({"prior": 3}, "prior: expected a distribution or a function"),
        ({"prior": dist.Normal(0.0, 1.0)}, "prior: expected .* torch.float64 .* torch.float32"),
        ({"prior": dist.Normal(torch.zeros(2), 1.0)}, "prior: expected the distribution of one number"),
        ({"prior": lambda name, value: dist.Normal(value, 1.0)}, "prior: expected event shape"),
        (
            {"prior": lambda name, value: dist.Normal(value, 1.0).expand([2, *value.shape]).to_event(value.ndim)},
            "batch",
        ),
        ({"prior": torch.distributions.Normal(0.0, 1.0)}, "pyro.distributions, got torch.distributions.normal.Normal"),
        ({"prior": lambda name, value: None}, "prior: expected one of pyro.distributions, got builtins.NoneType"),
    ],
)
def test_refused_and_unchanged(settings, message):
    network = make()
    with pytest.raises(ValueError, match=message):
        bayesianize(network, **settings)
    assert len(list(network.parameters())) == 6
    assert not network.latent


def test_layers_keep_their_order():
    network = MixtureDensityNetwork(6, 1, hidden_dim=(5, 4))
    expected = [name for name, _ in network.named_modules()]
    bayesianize(network)
    assert [name for name, _ in network.named_modules()] == expected


def test_twice_is_refused():
    with pytest.raises(ValueError, match="layers"):
        bayesianize(bayesianize(make()))


def test_shared_parameters_are_refused():
    layer = nn.Linear(6, 6)
    network = MixtureDensityNetwork(6, 1, hidden_dim=6, backbone=nn.Sequential(layer, nn.Tanh(), layer))
    with pytest.raises(ValueError, match="share"):
        bayesianize(network)


@pytest.mark.filterwarnings("ignore:network. its weights are latent")
def test_what_worked_on_the_model_still_does():
    network = bayesianize(make())
    x, y = data()
    pyro.set_rng_seed(0)
    guide = AutoNormal(network.model)
    svi = SVI(network.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(50)]
    assert sum(losses[-10:]) < sum(losses[:10])
    draws = Predictive(network.model, guide=guide, num_samples=3)(x)["y"]
    assert draws.shape == (3, 7, 1)
    mcmc = MCMC(NUTS(network.model, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(x, y)
    assert posterior_predictive(network, mcmc, x).batch_shape == (3, 7)
    assert_close(
        posterior_predictive(network, mcmc, x).logits, posterior_predictive(network, mcmc.get_samples(), x).logits
    )
    network(x)  # one draw from the prior


@pytest.mark.filterwarnings("ignore:network. its weights are latent")
def test_calls_leave_the_parameter_store_alone():
    pyro.clear_param_store()
    network = bayesianize(make(), layers="head")
    x, _ = data()
    network(x), network.sample(x), network.raw(x)
    posterior_predictive(network, AutoNormal(network.model), x, 2)
    assert not list(pyro.get_param_store())


def test_bayesianize_leaves_the_parameter_store_alone():
    with pyro.get_param_store().scope():
        mine = pyro.param("backbone.mine", torch.ones(2))
        network = make()
        poutine.trace(network.model).get_trace(*data())
        before = list(pyro.get_param_store())
        bayesianize(network, layers=["backbone.0", "head.linear.bias"])
        assert list(pyro.get_param_store()) == before
        assert pyro.param("backbone.mine") is mine


def by_svi(network, x, y):
    SVI(network.model, AutoNormal(network.model), Adam({"lr": 0.1}), Trace_ELBO()).step(x, y)


def by_an_optimizer_of_torch(network, x, y):
    guide = AutoNormal(network.model)
    Trace_ELBO()(network.model, guide)(x, y).backward()
    trained = [p for p in [*network.parameters(), *guide.parameters()] if p.requires_grad]
    torch.optim.Adam(trained, lr=0.1).step()


def fitted(network, x, y, **settings):
    fit(network, x, y, guide=AutoNormal, max_epochs=2, progress=False, initialize=False, **settings)


def by_nuts(network, x, y):
    MCMC(NUTS(network.model, max_tree_depth=2), 2, 1, disable_progbar=True).run(x, y)


@pytest.mark.filterwarnings("ignore:network. its weights are latent")
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
@pytest.mark.parametrize("layers", ["backbone.2.bias", ["head.linear.weight", "backbone.0.bias"]])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda network, x, y: network(x),
        lambda network, x, y: network.loss(x, y),
        lambda network, x, y: network.model(x, y),
        lambda network, x, y: Larger(network)(x, y),
        lambda network, x, y: posterior_predictive(network, AutoNormal(network.model), x, 3),
        lambda network, x, y: laplace(network, x, y, max_iter=2, progress=False),
        lambda network, x, y: fit_mcmc(network, x, y, num_samples=1, warmup_steps=1, max_tree_depth=1, progress=False),
        by_nuts,
        by_svi,
        by_an_optimizer_of_torch,
        fitted,
        partial(fitted, num_particles=3),
    ],
)
def test_what_is_frozen_stays_frozen(layers, use, local):
    """Some weights of a part are latent, some are trained, and some are neither."""
    if local and use is by_svi:
        pytest.skip("Pyro's SVI has no parameters of modules' own")
    with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=local):
        network, (x, y) = make(), data()
        for name in ("backbone.0.weight", "backbone.2.weight", "head.linear.bias"):
            network.get_parameter(name).requires_grad_(False)
        bayesianize(network, layers=layers)
        before = {name: (p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()}
        use(network, x, y)
    trains = use in (by_svi, by_an_optimizer_of_torch, fitted) or isinstance(use, partial)
    for name, p in network.named_parameters():
        requires_grad, value = before[name]
        assert p.requires_grad == requires_grad, name
        assert torch.equal(p, value) != (requires_grad and trains), name


class HalfFrozen(PyroModule):
    """A guide of the bias of the head whose scale is not to be learned."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(9, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((9,), -2.0, dtype=torch.float64), requires_grad=False)

    def forward(self, x, y=None, num_data=None):
        pyro.sample("head.linear.bias", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_what_is_frozen_in_a_guide_stays_frozen(num_particles):
    network, (x, y), guide = bayesianize(make(), layers="head.linear.bias"), data(), HalfFrozen()
    posterior_predictive(network, guide, x, num_particles)
    assert not guide.log_scale.requires_grad
    fit(network, x, y, guide=guide, max_epochs=2, num_particles=num_particles, progress=False)
    assert not guide.log_scale.requires_grad
    assert_close(guide.log_scale, torch.full_like(guide.log_scale, -2.0), rtol=0, atol=0)
    assert guide.loc.abs().max() > 0


def test_copies_and_files():
    network = bayesianize(make(), layers="head")
    with pytest.raises(ValueError, match="latent"):
        network.save("nowhere")
    assert network.float().head.linear.weight.dtype == torch.float32


# Predictives


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
@pytest.mark.parametrize("backbone", ["mlp", "conv", "lstm", "gru"])
def test_guides_predict_as_one_after_another(guide, backbone):
    network = bayesianize(make(backbone))
    x, y = data()
    torch.manual_seed(3)
    with default_dtype(torch.float64):  # a flow makes its own networks
        guide = guide(network.model)
        guide(x, y)
    torch.manual_seed(3)
    mixture = posterior_predictive(network, guide, x, 5)
    torch.manual_seed(3)
    draws = draw_weights(network, guide, x, 5)
    expected = one_after_another(network, draws, x, y)
    assert mixture.batch_shape == (5, 7)
    assert_close(mixture.log_prob(y), expected, rtol=1e-9, atol=1e-9)
    assert_close(mixture.pool(0).log_prob(y), expected.logsumexp(0) - math.log(5), rtol=1e-9, atol=1e-9)


def chains(network, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so few draws have not converged
        return fit_mcmc(network, x, y, num_samples=2, warmup_steps=2, num_chains=2, max_tree_depth=2, progress=False)


def approximated(network, x, y):
    return laplace(network, x, y, max_iter=5, progress=False)


@pytest.mark.parametrize("infer", [approximated, chains])
@pytest.mark.parametrize("layers", ["head", "all"])
@pytest.mark.parametrize("backbone", ["mlp", "conv", "lstm", "gru"])
def test_other_posteriors_predict_as_one_after_another(infer, layers, backbone, monkeypatch):
    monkeypatch.setattr("pyro_mdn.posteriors.mcmc._MAX_ITER", 5)  # any draws will do, however far from the mode
    network = make(backbone)
    x, y = data(rows=20)
    network.initialize_(x, y)
    posterior = infer(bayesianize(network, layers=layers), x, y)
    torch.manual_seed(3)
    mixture = posterior_predictive(network, posterior, x, 4, linearize=False)
    torch.manual_seed(3)
    draws = draw_weights(network, posterior, x, 4)
    if infer is chains:
        assert_close(draws, posterior.get_samples())
    expected = one_after_another(network, draws, x, y)
    assert_close(mixture.log_prob(y), expected, rtol=1e-9, atol=1e-9)
    assert_close(mixture.pool(0).log_prob(y), expected.logsumexp(0) - math.log(4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", [Full(), LowRank(1), Isotropic(), Diagonal(tied=True), Diagonal(homoscedastic=True)])
def test_every_noise_model(noise):
    network = bayesianize(make(dim_out=2, noise=noise))
    network.initialize_(*data(2, 50))
    x, y = data(2)
    draws = draw_weights(network, AutoNormal(network.model), x, 5)
    assert_close(posterior_predictive(network, draws, x).log_prob(y), one_after_another(network, draws, x, y))


@pytest.mark.parametrize("transform", [None, ["angle", "log"]], ids=["normal", "angle"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_noise_alone_may_be_latent(transform, chunk_size):
    """Networks then share all channels of the head: there is one row of them for all draws."""
    settings = {} if transform is None else {"target_transform": transform}
    network = bayesianize(make(dim_out=2, noise=Full(homoscedastic=True), **settings), layers="head.raw_noise")
    x, y = data(2)
    y = y.abs()
    draws = draw_weights(network, AutoNormal(network.model, init_scale=1.0), x, 5)
    expected = one_after_another(network, draws, x, y)
    assert expected.std(0).min() > 1e-3
    for inputs in (x, x.clone().requires_grad_()):  # chunks are put together in another way if there are gradients
        mixture = posterior_predictive(network, draws, inputs, chunk_size=chunk_size)
        assert mixture.batch_shape == (5, len(x))
        assert_close(mixture.log_prob(y), expected)


def test_batch_shapes_and_chunks():
    network = bayesianize(make())
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    draws = draw_weights(network, AutoNormal(network.model), x, 6)
    whole = posterior_predictive(network, draws, x)
    assert whole.batch_shape == (6, 4, 3)
    assert_close(posterior_predictive(network, draws, x, chunk_size=4).locs, whole.locs)
    assert_close(posterior_predictive(network, draws, x[0, 0]).locs, whole.locs[:, 0, 0])
    fewer = posterior_predictive(network, draws, x, 3)
    assert_close(fewer.locs, whole.locs[[0, 2, 5]])


class Images(nn.Sequential):
    """Convolutions whose features are a hundred times larger than what they end in."""

    def __init__(self, side, *channels):
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise([1, *channels])]
        super().__init__(*layers, nn.GELU(), nn.Flatten(), nn.Linear(channels[-1] * side**2, 4))


@pytest.mark.parametrize(("images", "draws"), [(100, 20), (1000, 2), (1, 2000)])
def test_memory_of_a_prediction(images, draws):
    side, few = (28, 100) if images > 1 else (8, 1)
    network = MixtureDensityNetwork((1, side, side), 1, 2, 4, backbone=Images(side, 8, 16))
    bayesianize(network, layers=["backbone.0", "backbone.1", "head"])
    weights = draw_weights(network, AutoNormal(network.model), torch.zeros(few, 1, side, side), draws)
    x = torch.randn(images, 1, side, side)
    with Held() as held:
        posterior_predictive(network, weights, x)
    assert held.peak < 64 * 2**20


class Across(nn.Module):
    """Rows that depend on each other: steps of a sequence, or a set."""

    def __init__(self, kind):
        super().__init__()
        kinds = {"sequence": nn.LSTM(6, 4), "steps": nn.Conv1d(6, 4, 3, padding=1)}
        self.kind, self.layer = kind, kinds.get(kind, nn.Linear(6, 4))

    def forward(self, x):
        if self.kind == "steps":
            return self.layer(x.mT).mT
        return self.layer(x)[0] if self.kind == "sequence" else SETS[self.kind](self.layer(x))


SETS = {
    "set": lambda rows: rows - rows.mean(0),
    "rows before": lambda rows: rows.cumsum(0),
    "rows after": lambda rows: rows.flip(0).cumsum(0).flip(0),
    "row before": lambda rows: torch.cat([torch.zeros_like(rows[:1]), rows[:-1]]),
    "row after": lambda rows: torch.cat([rows[1:], torch.zeros_like(rows[:1])]),
}
SMALL = ["mlp", "conv", "lstm", "called", "sequence", "steps", *SETS]


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("noise", [Diagonal(), Full(homoscedastic=True)])
@pytest.mark.parametrize("linearize", [False, True])
def test_passes_change_no_result(backbone, noise, linearize, monkeypatch):
    if backbone in ("mlp", "conv", "lstm", "called"):
        network = make("conv" if backbone == "called" else backbone, dim_out=2, noise=noise)
    else:
        network = MixtureDensityNetwork(6, 2, 3, 4, noise=noise, backbone=Across(backbone)).double()
    network.initialize_(*data(2, 50))
    guide, (x, y) = AutoMultivariateNormal(bayesianize(network).model, init_scale=0.5), data(2)
    if backbone == "called":
        network.register_forward_hook(lambda _, inputs, mixture: mixture.temper(2.0))
    torch.manual_seed(1)
    guide(x, y)
    linearize = linearize and backbone not in ("lstm", "sequence", "called")  # forward mode has none of these
    results = []
    for size, limit in ((5, 1.0), (None, 1.0), (None, 4000.0), (None, 2.0**30)):
        monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", limit)
        torch.manual_seed(3)
        results.append(posterior_predictive(network, guide, x, 5, linearize=linearize, chunk_size=size).log_prob(y))
    for result in results:
        assert result.shape == (5, 7)
        assert_close(result, results[0])


def test_memory_of_plain_layers_is_that_of_all():
    wide = nn.Sequential(nn.Linear(6, 4000), nn.GELU(), nn.Linear(4000, 4))  # wider than hidden_dim says
    network = bayesianize(MixtureDensityNetwork(6, 1, 3, 4, backbone=wide).double())
    x, _ = data(rows=500)
    draws = draw_weights(network, AutoNormal(network.model), x, 20)
    with Held() as held:
        posterior_predictive(network, draws, x)
    assert held.peak < 64 * 2**20


@pytest.mark.parametrize("layers", ["head", "backbone.2.weight", ["backbone.0", "head.linear.bias"]])
@pytest.mark.parametrize("noise", [Diagonal(), Full(homoscedastic=True)])
def test_weights_that_are_not_latent(layers, noise):
    network = bayesianize(make(dim_out=2, noise=noise, hidden_dim=(5, 4)), layers=layers)
    network.initialize_(*data(2, 50))
    x, y = data(2)
    draws = draw_weights(network, AutoNormal(network.model), x, 5)
    mixture = posterior_predictive(network, draws, x, chunk_size=2)
    assert mixture.batch_shape == (5, 7)
    assert_close(mixture.log_prob(y), one_after_another(network, draws, x, y))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = ["spectral norm", "other layer", "no bias", "subclass", "hook", "pre-hook", "forward", "shared activation"]


@pytest.mark.parametrize("change", CHANGES)
def test_backbones_that_were_changed(change):
    network = make()
    if change == "spectral norm":
        nn.utils.parametrizations.spectral_norm(network.backbone[2])
    elif change == "other layer":
        network.backbone.append(nn.Tanh())
    elif change == "no bias":
        network.backbone[0] = nn.Linear(6, 4, bias=False).double()
    elif change == "subclass":
        network.backbone[0] = Doubled(6, 4).double()
    elif change == "hook":
        network.backbone[0].register_forward_hook(lambda *args: 2 * args[-1])
    elif change == "pre-hook":
        network.backbone[0].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    elif change == "forward":
        network.backbone[0].forward = lambda x: x[..., :4]
    else:
        network.backbone[3] = network.backbone[1]
    bayesianize(network.eval(), layers="head")
    x, y = data()
    draws = draw_weights(network, AutoNormal(network.model), x, 5)
    assert_close(posterior_predictive(network, draws, x).log_prob(y), one_after_another(network, draws, x, y))


class Warmer(MixtureDensityNetwork):
    def forward(self, x):
        return super().forward(x).temper(2.0)


@pytest.mark.parametrize("change", ["subclass", "hook", "hook of the head"])
@pytest.mark.parametrize("noise", [Diagonal(), Full(homoscedastic=True), LowRank(1), Isotropic()])
def test_networks_whose_call_is_changed(change, noise):
    kind = Warmer if change == "subclass" else MixtureDensityNetwork
    network = kind(6, 2, 3, 4, noise=noise).double()
    network.initialize_(*data(2, 50))
    bayesianize(network, layers=["head.linear", "backbone.0"])
    if change != "subclass":
        part = network if change == "hook" else network.head
        part.register_forward_hook(lambda _, inputs, mixture: mixture.temper(2.0))
    x, y = data(2)
    draws = draw_weights(network, AutoNormal(network.model), x, 5)
    mixture = posterior_predictive(network, draws, x, chunk_size=2)
    expected = []
    for i in range(5):
        with poutine.condition(data={name: value[i] for name, value in draws.items()}):
            expected.append(network(x).log_prob(y))
    assert mixture.batch_shape == (5, 7)
    assert_close(mixture.log_prob(y), torch.stack(expected))


@pytest.mark.parametrize("layers", ["all", "head", "backbone.0.weight"])
def test_plain_layers_with_latent_weights_are_plain(layers):
    """Pyro makes subclasses of their types, which compute the same."""
    assert is_dense(bayesianize(make(), layers=layers))


def test_draws_of_a_guide_follow_it():
    network = bayesianize(make(), layers="head.linear.bias")
    guide = AutoMultivariateNormal(network.model, init_scale=0.3)
    x, _ = data()
    draws = draw_weights(network, guide, x, 20_000)["head.linear.bias"]
    posterior = guide.get_posterior()
    assert (draws.mean(0) - posterior.mean).abs().max() < 5 * 0.3 / math.sqrt(20_000)
    assert (draws.std(0) / 0.3 - 1).abs().max() < 5 / math.sqrt(2 * 20_000)
    # Independent draws: neighbours do not repeat.
    assert abs(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]) < 5 / math.sqrt(20_000)


def test_guides_of_ones_own():
    network = bayesianize(make(), layers="head.linear.bias")
    loc = torch.zeros(9, dtype=torch.float64)

    def guide(x, y=None, num_data=None):
        common = pyro.sample("common", dist.Normal(loc[0], 1.0), infer={"is_auxiliary": True})
        pyro.sample("head.linear.bias", dist.Normal(loc + common, 0.01).to_event(1))

    draws = draw_weights(network, guide, data()[0], 1000)["head.linear.bias"]
    assert draws.shape == (1000, 9)
    assert draws.std(0).min() > 0.8
    assert draws.std(1).max() < 0.05


@pytest.mark.parametrize("kind", ["function", "module"])
def test_guides_with_parameters_in_the_store(kind):
    network, (x, y) = bayesianize(make(), layers="head.linear.bias"), data()

    def function(x, y=None):
        loc = pyro.param("loc", torch.zeros(9, dtype=torch.float64))
        pyro.sample("head.linear.bias", dist.Normal(loc, 1e-6).to_event(1))

    class Module(PyroModule):
        def __init__(self):
            super().__init__("guide")
            self.shift = PyroParam(torch.zeros(9, dtype=torch.float64))

        def forward(self, x, y=None):
            loc = pyro.param("loc", torch.zeros(9, dtype=torch.float64))
            pyro.sample("head.linear.bias", dist.Normal(loc + self.shift, 1e-6).to_event(1))

    pyro.clear_param_store()
    guide = function if kind == "function" else Module()
    svi = SVI(network.model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x, y)
    learned = pyro.param("loc").detach().clone()
    if kind == "module":
        learned += guide.shift.detach()
        pyro.get_param_store()["guide.shift"] = torch.full((9,), 50.0).double()  # left by another of the same name
    assert learned.abs().max() > 0.1
    before = list(pyro.get_param_store())
    draws = draw_weights(network, guide, x, 3)["head.linear.bias"]
    assert_close(draws, learned.expand(3, -1), rtol=0, atol=1e-4)
    assert list(pyro.get_param_store()) == before


def test_printing_draws_nothing():
    network = bayesianize(make())
    state = torch.get_rng_state()
    assert "backbone" in repr(network)
    assert torch.equal(torch.get_rng_state(), state)


def test_hierarchical_priors():
    network = bayesianize(make(), layers="head")
    network.width = pyro.nn.PyroSample(dist.HalfNormal(torch.ones((), dtype=torch.float64)))
    network.backbone = pyro.nn.PyroModule[nn.Linear](6, 4).double()
    network.backbone.weight = pyro.nn.PyroSample(
        lambda module: dist.Normal(0.0, network.width).expand([4, 6]).to_event(2)
    )
    x, y = data()
    draws = draw_weights(network, AutoNormal(network.model), x, 4)
    assert draws["width"].shape == (4,)
    assert_close(posterior_predictive(network, draws, x).log_prob(y), one_after_another(network, draws, x, y))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        _, _, _ = x.shape  # of sequences alone
        return self.layer(x, x, x)[0]


def test_backbones_of_sequences_alone():
    network = bayesianize(MixtureDensityNetwork(6, 1, 2, 6, backbone=Attending()).double())
    x, y = torch.randn(4, 3, 6).double(), torch.randn(4, 3, 1).double()
    guide = AutoNormal(network.model)
    draws = draw_weights(network, guide, x, 2)
    mixture = posterior_predictive(network, draws, x)
    assert_close(mixture.log_prob(y).sum(-1), one_after_another(network, draws, x, y))
    assert posterior_predictive(network, guide, x[:0], 2).batch_shape == (2, 0, 3)


def test_autocast():
    network = bayesianize(make().float())
    x = data()[0].float()
    draws = draw_weights(network, AutoNormal(network.model), x, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixture = posterior_predictive(network, draws, x, chunk_size=2)
    assert_close(mixture.locs, posterior_predictive(network, draws, x).locs, rtol=0.1, atol=0.1)


def test_no_rows():
    network = bayesianize(make())
    mixture = posterior_predictive(network, AutoNormal(network.model), data()[0][:0], 3)
    assert mixture.batch_shape == mixture.log_prob(data()[1][:0]).shape == (3, 0)
    assert mixture.pool(0).n_components == 3 * network.n_components


def test_networks_and_guides_can_be_pickled():
    network = make()
    prior = dist.Laplace(torch.tensor(0.0, dtype=torch.float64), 0.5)
    bayesianize(bayesianize(network, layers="backbone"), layers="head", prior=prior)
    guide, (x, y) = AutoNormal(network.model), data()
    guide(x, y)
    mixtures = []
    for both in [(network, guide), pickle.loads(pickle.dumps((network, guide)))]:
        torch.manual_seed(0)
        mixtures.append(posterior_predictive(*both, x, 3))
    assert_close(mixtures[1].locs, mixtures[0].locs)


def test_samples_of_another_dtype_or_kind():
    network = bayesianize(make().float())
    x = data()[0].float()
    draws = draw_weights(network, AutoNormal(network.model), x, 3)
    expected = posterior_predictive(network, draws, x).locs
    for other in ({n: v.double() for n, v in draws.items()}, {n: v.numpy() for n, v in draws.items()}):
        assert_close(posterior_predictive(network, other, x).locs, expected)


def test_gradients_reach_the_inputs():
    network = bayesianize(make())
    x, y = data()
    guide = AutoNormal(network.model)
    assert not posterior_predictive(network, guide, x, 3).locs.requires_grad
    x.requires_grad_()
    posterior_predictive(network, guide, x, 3).log_prob(y).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


# Linearised


class Raw(nn.Module):
    """Raw outputs of a network in one tensor, ``(N, C)``."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.cat([part.flatten(1) for part in self.network.raw(x)], 1)


def test_forward_mode_of_torch_does_not_warn():
    """Torch scripts functions at its first use in a process, with a warning whose category depends on the release."""
    code = """
import torch
from pyro.infer.autoguide import AutoNormal
from pyro_mdn import MixtureDensityNetwork, bayesianize, posterior_predictive
network, x = bayesianize(MixtureDensityNetwork(1, 1), layers="head"), torch.randn(5, 1)
guide = AutoNormal(network.model)
guide(x, x)
posterior_predictive(network, guide, x, num_samples=3, linearize=True)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("backbone", ["mlp", "conv", "gru"])
def test_linearized_outputs_have_the_jacobian_of_the_network(guide, backbone):
    plain, (x, y) = Raw(make(backbone)), data()
    network = bayesianize(make(backbone))
    guide = guide(network.model, init_scale=0.5, init_loc_fn=init_to_value(values=starting_weights(network)))
    draws = draw_weights(network, guide, x, 3)
    names, center = list(draws), {name: value.detach() for name, value in guide.median().items()}

    def outputs(*weights):
        given = {f"network.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(plain, given, (x,))

    at = tuple(center[name] for name in names)
    jacobians = torch.autograd.functional.jacobian(outputs, at)
    torch.manual_seed(3)
    mixture = posterior_predictive(network, guide, x, 3, linearize=True)
    torch.manual_seed(3)
    draws = draw_weights(network, guide, x, 3)
    for s in range(3):
        steps = [(draws[name][s] - center[name]).flatten() for name in names]
        raw = outputs(*at) + sum(j.flatten(2) @ step for j, step in zip(jacobians, steps, strict=True))
        logits, locs, noise = raw.split(3, 1)
        expected = network.head.mixture((logits, locs.unsqueeze(-1), noise.unsqueeze(-1)), network.head.units)
        assert_close(mixture.log_prob(y)[s], expected.log_prob(y), rtol=1e-9, atol=1e-9)


def test_weights_of_the_head_are_linear():
    network = bayesianize(make(noise=Diagonal(homoscedastic=True)), layers="head")
    x, y = data()
    guide = AutoMultivariateNormal(network.model, init_scale=2.0)
    guide(x, y)
    mixtures = []
    for linearize in (False, True):
        torch.manual_seed(3)
        mixtures.append(posterior_predictive(network, guide, x, 10, linearize=linearize).log_prob(y))
    assert_close(*mixtures, rtol=1e-9, atol=1e-9)


def test_linearized_gradients_and_chunks():
    network = bayesianize(make())
    x, y = data()
    guide = AutoNormal(network.model, init_loc_fn=init_to_value(values=starting_weights(network)))
    guide(x, y)
    x.requires_grad_()
    results = []
    for chunk_size in (None, 2):
        torch.manual_seed(3)
        mixture = posterior_predictive(network, guide, x, 5, linearize=True, chunk_size=chunk_size)
        results.append((mixture.locs.detach(), *torch.autograd.grad(mixture.log_prob(y).sum(), x)))
    assert_close(*results)
    assert bool(results[0][1].abs().sum() > 0)


def test_only_guides_with_a_median_are_linearized():
    network = bayesianize(make())
    x, _ = data()
    with default_dtype(torch.float64):
        flow = AutoIAFNormal(network.model, [200])
        flow(*data())
    samples = draw_weights(network, AutoNormal(network.model), x, 2)
    for posterior in (samples, flow, DeepEnsemble(make(), 2)):
        with pytest.raises(ValueError, match="posterior: expected a guide"):
            posterior_predictive(network, posterior, x, 2, linearize=True)


def test_ensembles_and_their_members():
    ensemble = DeepEnsemble(make(), 4)
    x, y = data()
    members = posterior_predictive(ensemble.stacked, ensemble, x)
    assert_close(members.log_prob(y), ensemble.members(x).log_prob(y))
    assert posterior_predictive(ensemble.stacked, ensemble, x, 2).batch_shape == (2, 7)
    with pytest.raises(ValueError, match="num_samples: expected at most the 4"):
        posterior_predictive(ensemble.stacked, ensemble, x, 5)


def test_ensembles_are_evaluated_without_dropout():
    backbone = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    ensemble = DeepEnsemble(MixtureDensityNetwork(6, 1, 2, 4, backbone=backbone).double(), 2)
    x, _ = data()
    mixture = posterior_predictive(ensemble.stacked, ensemble, x)
    assert ensemble.training
    assert_close(mixture.locs, ensemble.eval().members(x).locs)


def test_modes_and_validation_stay_as_they_were():
    network = bayesianize(make()).train()
    validates = torch.distributions.Distribution._validate_args
    state = torch.get_rng_state()
    draws = {name: value.unsqueeze(0) for name, value in starting_weights(network).items()}
    posterior_predictive(network, draws, data()[0])
    assert network.training
    assert torch.distributions.Distribution._validate_args is validates
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("head.linear.bias"), "posterior: expected the sites"),
        (lambda d: d.update({"head.linear.bias_decentered": d.pop("head.linear.bias")}), "reparametrised"),
        (
            lambda d: d.update({"head.linear.bias": torch.zeros(5, 3)}),
            r"expected shape \(9,\) at site head.linear.bias",
        ),
        (lambda d: d.update({"head.linear.bias": torch.zeros(4, 9)}), "as many draws of each site"),
        (lambda d: d.update({n: v[:0] for n, v in d.items()}), "as many draws of each site"),
    ],
)
def test_samples_that_do_not_fit_are_refused(change, message):
    network = bayesianize(make())
    draws = draw_weights(network, AutoNormal(network.model), data()[0], 5)
    change(draws)
    with pytest.raises(ValueError, match=message):
        posterior_predictive(network, draws, data()[0])


class Larger(PyroModule):
    """A user's model: the network, a latent offset of its targets, and a site of its own for them."""

    def __init__(self, network):
        super().__init__()
        self.part = network

    def forward(self, x, y=None):
        offset = pyro.sample("offset", dist.Normal(x.new_zeros(()), 1.0))
        mixture = self.part(x).affine(offset)
        with pyro.plate("rows", len(x)):
            return pyro.sample("target", mixture, obs=y)


@pytest.mark.parametrize("layers", ["head", "all"])
def test_posteriors_of_a_larger_model(layers):
    network, (x, y) = make(), data()
    learned, expected = {n: p.detach().clone() for n, p in network.named_parameters()}, network(x).log_prob(y).detach()
    model = Larger(bayesianize(network, layers=layers))
    start = starting_weights(network)
    assert_close(start, {name: learned[name.removeprefix("part.")] for name in start})
    init = init_to_value(values=start)
    guide = AutoNormal(model, init_loc_fn=init, init_scale=1e-6)
    guide(x, y)
    assert_close(posterior_predictive(network, guide, x, 1).log_prob(y)[0], expected, rtol=1e-3, atol=1e-3)
    mcmc = MCMC(NUTS(model, init_strategy=init, max_tree_depth=1), 3, 1, disable_progbar=True)
    mcmc.run(x, y)
    with torch.no_grad():
        drawn = Predictive(AutoNormal(model), num_samples=3)(x, y)
    for posterior, draws in [(mcmc, mcmc.get_samples()), (drawn, drawn)]:
        assert draws.keys() >= {"offset", *start}
        densities = posterior_predictive(network, posterior, x).log_prob(y)
        assert_close(densities, one_after_another(network, {name: draws[name] for name in start}, x, y))


@pytest.mark.parametrize("layers", ["head", "all"])
def test_laplace_of_a_part_of_a_larger_model(layers):
    x, y = data()
    alone = laplace(bayesianize(make(), layers=layers), x, y, max_iter=2)
    network = Larger(bayesianize(make(), layers=layers)).part
    part = laplace(network, x, y, max_iter=2)
    assert_close(part.scale_tril, alone.scale_tril)
    assert posterior_predictive(network, part, x, 3, linearize=True).batch_shape == (3, 7)


def test_guides_of_networks_with_more_latent_weights_are_refused():
    network = bayesianize(make(), layers="head")
    with pytest.raises(ValueError, match="guide: expected the sites"):
        posterior_predictive(network, AutoNormal(bayesianize(make()).model), data()[0])


def test_other_refusals():
    network, x = bayesianize(make()), data()[0]
    guide = AutoNormal(network.model)
    with pytest.raises(ValueError, match="num_samples"):
        posterior_predictive(network, guide, x, 0)
    with pytest.raises(ValueError, match="guide: expected the sites"):
        posterior_predictive(network, AutoNormal(bayesianize(make(), layers="head").model), x)
    with pytest.raises(ValueError, match="guide: expected shape"):
        posterior_predictive(network, AutoNormal(bayesianize(make(hidden_dim=5)).model), x)
    guide = AutoNormal(network.model)
    guide(x)
    with pytest.raises(ValueError, match=r"guide: expected the sites .* 'y'"):
        posterior_predictive(network, guide, x)
    with pytest.raises(ValueError, match="posterior: expected a guide"):
        posterior_predictive(network, [1, 2], x)
    with pytest.raises(ValueError, match="x: expected shape"):
        posterior_predictive(network, guide, x[:, :2])
    with pytest.raises(ValueError, match="expected latent weights"):
        posterior_predictive(make(), {}, x)


def test_layers_that_vmap_cannot_handle_are_named():
    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    network = MixtureDensityNetwork(6, 1, hidden_dim=6, backbone=nn.Sequential(nn.Linear(6, 6), Deciding())).double()
    bayesianize(network)
    x, _ = data()
    with pytest.raises(ValueError, match=r"got backbone\.1 \(PyroDeciding\)"):
        posterior_predictive(network, AutoNormal(network.model), x)
    assert not network.backbone[1]._forward_hooks


def test_errors_of_functions_pass():
    with pytest.raises(RuntimeError, match="mine"):
        over_draws(lambda draw: (_ for _ in ()).throw(RuntimeError("mine")), {"a": torch.zeros(2)}, nn.Identity())


def test_init_to_starting_weights():
    network = make()
    x, y = data(rows=200)
    fit(network, x, y, seed=0, progress=False, max_epochs=5)
    expected = network(x).log_prob(y)
    bayesianize(network)
    guide = AutoNormal(network.model, init_loc_fn=init_to_value(values=starting_weights(network)), init_scale=1e-6)
    assert_close(posterior_predictive(network, guide, x, 1).log_prob(y)[0], expected, rtol=1e-3, atol=1e-3)


# Calls, parts and names


@pytest.mark.parametrize("call", [lambda n, x, y: n(x), lambda n, x, y: n.raw(x), MixtureDensityNetwork.loss, "sample"])
@pytest.mark.parametrize("hooked", [False, True])
def test_draws_from_the_prior_warn_once_where_they_are_made(call, hooked):
    network, (x, y) = bayesianize(make()), data()
    if hooked:
        network.register_forward_hook(lambda *_: None)
    call = (lambda n, x, y: n.sample(x)) if call == "sample" else call
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(network, x, y)
    assert {warning.filename for warning in seen} == {__file__}
    assert len(seen) == 1
    assert "posterior_predictive" in str(seen[0].message)


def test_handlers_and_our_own_calls_do_not_warn():
    network, (x, y) = make(), data()
    network(x), network.loss(x, y), network.sample(x)
    bayesianize(network)  # warnings are errors here
    repr(network), network.check(x, y), network.features(x)
    Predictive(network.model, num_samples=2)(x)
    for call in (network, network.sample, network.raw):
        poutine.trace(call).get_trace(x)
    fit(network, x, y, guide=AutoNormal(network.model), max_epochs=2, validation=0.2, progress=False)
    posterior_predictive(network, laplace(network, x, y, max_iter=2, progress=False), x, 2, linearize=True)
    chains(network, x, y)


@pytest.mark.filterwarnings("ignore:network. its weights are latent")
@pytest.mark.parametrize("use", ["call", "model", "posterior_predictive", "part"])
def test_networks_join_a_larger_module_after_a_call(use):
    network, (x, y) = bayesianize(make()), data()
    if use == "call":
        network(x)
    elif use == "model":
        network.model(x, y)
    elif use == "part":
        first = PyroModule()
        first.part = network
        network(x)
        whole = PyroModule()
        whole.first = first
        assert "first.part.head.linear.bias" in poutine.trace(network).get_trace(x)
        return
    else:
        posterior_predictive(network, AutoNormal(network.model), x, 2)
    whole = PyroModule()
    whole.network = network
    trace = poutine.trace(network.model).get_trace(x, y)
    assert {f"network.{name}" for name in ("head.linear.bias", "backbone.0.weight")} <= set(trace.nodes)
    assert posterior_predictive(network, AutoNormal(network.model), x, 2).batch_shape == (2, 7)


def test_draws_that_predictive_gives():
    network, (x, y) = bayesianize(make()), data()
    guide = AutoNormal(network.model)
    guide(x, y)
    names = [*starting_weights(network), "y"]
    draws = Predictive(network.model, guide=guide, num_samples=4, return_sites=names)(x)
    plain = {name: draws[name].reshape(4, *value.shape) for name, value in starting_weights(network).items()}
    assert draws["head.linear.bias"].shape != plain["head.linear.bias"].shape
    mixture = posterior_predictive(network, draws, x)
    assert_close(mixture.log_prob(y), one_after_another(network, plain, x, y))


REPARAMETRISED = {
    "learned": AutoReparam,
    "decentered": lambda: AutoReparam(centered=0.0),
    "one site": lambda: {"head.linear.weight": LocScaleReparam(0.3), "part.head.linear.weight": LocScaleReparam(0.3)},
}


def far_from_zero(name, value):
    """A prior that a reparametrisation does not leave as it is, and one over positive numbers."""
    if name.endswith("bias"):
        return dist.LogNormal(torch.full_like(value, -0.5), 0.3).to_event(value.ndim)
    return dist.Normal(torch.full_like(value, 0.4), 0.3).to_event(value.ndim)


def traced(model, network, draws, x):
    """Weights of each draw, from a trace of the model for each."""
    traces = [
        poutine.trace(poutine.condition(model, data={n: v[i] for n, v in draws.items()})).get_trace(x)
        for i in range(len(next(iter(draws.values()))))
    ]
    return {name: torch.stack([t.nodes[name]["value"] for t in traces]).detach() for name in starting_weights(network)}


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_guides_of_reparametrised_models(kind, larger, make_guide):
    pyro.clear_param_store()
    network, (x, y) = bayesianize(make(), prior=far_from_zero), data()
    model = poutine.reparam(Larger(network) if larger else network.model, config=REPARAMETRISED[kind]())
    guide = make_guide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    torch.manual_seed(1)
    mixture = posterior_predictive(network, guide, x, 3)
    torch.manual_seed(1)
    draws, _ = draw_from(guide, 3, x, density=False)
    assert not draws.keys() >= starting_weights(network).keys()
    assert_close(mixture.log_prob(y), one_after_another(network, traced(model, network, draws, x), x, y))
    median = traced(model, network, {name: value.unsqueeze(0) for name, value in guide.median().items()}, x)
    if make_guide is AutoDelta:
        linear = posterior_predictive(network, guide, x, 1, linearize=True)
        assert_close(linear.log_prob(y), one_after_another(network, median, x, y))
    with pytest.raises(ValueError, match="guide: expected the sites"):
        posterior_predictive(network, pickle.loads(pickle.dumps(guide)), x, 3)  # without its model
    pyro.clear_param_store()


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("larger", [False, True])
def test_chains_of_reparametrised_models(kind, larger):
    pyro.clear_param_store()
    network, (x, y) = bayesianize(make(), prior=far_from_zero, layers="head"), data()
    model = poutine.reparam(Larger(network) if larger else network.model, config=REPARAMETRISED[kind]())
    mcmc = MCMC(NUTS(model, max_tree_depth=2), 3, 2, disable_progbar=True)
    mcmc.run(x, y)
    names, samples = sorted(starting_weights(network)), mcmc.get_samples()
    expected = one_after_another(network, traced(model, network, samples, x), x, y)
    assert_close(posterior_predictive(network, mcmc, x).log_prob(y), expected)
    with pytest.raises(ValueError, match=r"return_sites=\[.*\]\) gives them, got those of a reparametrised model"):
        posterior_predictive(network, samples, x)
    predicted = Predictive(model, samples, return_sites=names)(x)  # as the error says
    assert_close(posterior_predictive(network, predicted, x).log_prob(y), expected)
    assert_close(posterior_predictive(network, {**samples, **predicted}, x).log_prob(y), expected)
    pyro.clear_param_store()


def test_a_weight_that_the_guide_of_a_reparametrised_model_lacks_is_not_made_up():
    network, (x, y) = bayesianize(make()), data()
    model = poutine.reparam(network.model, config=AutoReparam(centered=0.0))
    guide = AutoNormal(poutine.block(model, hide=["head.linear.bias_decentered"]))
    guide(x, y)
    with pytest.raises(ValueError, match="guide: expected the sites"):
        posterior_predictive(network, guide, x)


# Posteriors and predictors that others wrote


class TwoPoints(Posterior):
    """Two values of the weights, from two chains of one draw each."""

    method = "two points"
    chains = 2

    def __init__(self, values):
        self.values = values

    def draws(self, network, x, num_samples=None):
        return {name: value[:num_samples] for name, value in self.values.items()}

    def sites(self):
        return {name: value.unsqueeze(1) for name, value in self.values.items()}

    def statistics(self):
        return {"lp": torch.tensor([[1.0], [2.0]])}


def test_posteriors_of_others_predict():
    network, (x, y) = bayesianize(make()), data()
    weights = draw_weights(network, AutoNormal(network.model), x, 2)
    posterior = TwoPoints(weights)
    expected = posterior_predictive(network, weights, x)
    assert_close(posterior_predictive(network, posterior, x).log_prob(y), expected.log_prob(y))
    assert posterior_predictive(network, posterior, x, 1).batch_shape == (1, len(x))
    with pytest.raises(ValueError, match=r"expected a guide with a median, .* got TwoPoints"):
        posterior_predictive(network, posterior, x, linearize=True)
    source = Source.of(network, x, posterior, None, None)
    assert (source.method, source.chains) == ("two points", 2)
    assert_close(torch.as_tensor(source.stats["lp"]), torch.tensor([[1.0], [2.0]]))
    assert_close(source.mixture.log_prob(y), expected.log_prob(y))


class Halves(Predictor):
    """The first two of four members."""

    def __init__(self, ensemble):
        super().__init__()
        self.ensemble = ensemble

    architecture = property(lambda self: self.ensemble.stacked)
    num_members = 2

    def members(self, x, which=slice(None), *, chunk_size=None):
        return self.ensemble.members(x)[:2][which]

    def forward(self, x):
        return self.members(x).pool(0)


def test_predictors_of_others_predict():
    ensemble, (x, y) = DeepEnsemble(make(), 4), data()
    halves, expected = Halves(ensemble), ensemble.members(x)[:2].log_prob(y)
    assert_close(posterior_predictive(ensemble.stacked, halves, x).log_prob(y), expected)
    assert_close(posterior_predictive(ensemble.stacked, halves, x, 1).log_prob(y), expected[:1])
    with pytest.raises(ValueError, match="num_samples: expected at most the 2 draws"):
        posterior_predictive(ensemble.stacked, halves, x, 3)
    source = Source.of(halves, x, None, None, None)
    assert source.method == "ensemble"
    assert_close(source.mixture.log_prob(y), expected)
    log_density = torch.as_tensor(halves.predict(x).log_prob(y))
    assert_close(log_density, expected.logsumexp(0) - math.log(2))


def test_a_network_is_a_predictor_with_one_member():
    network, (x, y) = make(), data()
    assert (network.architecture, network.num_members, network.inference_method) == (network, 1, "point estimate")
    assert_close(network.members(x).log_prob(y), network(x).log_prob(y).unsqueeze(0))
    ensemble = DeepEnsemble(network, 3)
    assert (ensemble.architecture, ensemble.num_members, ensemble.dim_out) == (ensemble.stacked, 3, network.dim_out)


def test_members_take_no_posterior_beside_them():
    network, (x, _) = bayesianize(make()), data()
    weights = draw_weights(network, AutoNormal(network.model), x, 2)
    with pytest.raises(ValueError, match="posterior: expected none for several members"):
        Source.of(DeepEnsemble(make(), 2), x, weights, None, None)
