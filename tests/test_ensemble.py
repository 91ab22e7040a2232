"""Deep ensembles: members side by side are what they would be alone."""

import copy
import functools
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_mdn import (
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeLogLikelihood,
    WeightedSum,
    bayesianize,
    fit,
    posterior_predictive,
    scores,
)
from pyro_mdn.networks.batched.layers import is_dense
from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.members import MemberBatches
from pyro_mdn.training.objectives import Memberwise

PLAIN = {"progress": False, "input_noise": 0.0, "target_noise": 0.0, "initialize": False}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(1, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0][:, -1]


def backbone(kind):
    return {
        "default": lambda: None,
        "custom": lambda: nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU()),
        "normalized": lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh()),
        "batch norm": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh()),
        "convolutional": lambda: nn.Sequential(nn.Unflatten(-1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Flatten()),
        "recurrent": Recurrent,
    }[kind]()


def make(kind="default", dim_out=1, **settings):
    return MixtureDensityNetwork(3, dim_out, 4, 8, backbone=backbone(kind), **settings)


def networks(n, kind="default", **settings):
    torch.manual_seed(0)
    return [make(kind, **settings) for _ in range(n)]


def data(rows=120, dim_out=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    return x, torch.sin(3 * x[:, :dim_out]) + 0.2 * torch.randn(rows, dim_out, generator=generator)


KINDS = ["default", "custom", "normalized", "batch norm", "convolutional", "recurrent"]
NOISE = [
    Full(),
    Full(tied=True, homoscedastic=True),
    LowRank(1),
    Isotropic(),
    Isotropic(homoscedastic=True),
    Fixed(0.3),
    Diagonal(tied=True),
    Diagonal(homoscedastic=True),
]


# Predictions


@pytest.mark.parametrize("kind", KINDS)
def test_members_predict_as_alone(kind):
    members = [n.double() for n in networks(3, kind)]
    x, y = (t.double() for t in data(10))
    for i, network in enumerate(members):
        network.initialize_(x + i, 10 * y - i)
    ensemble = DeepEnsemble(members)
    expected = torch.stack([network(x).log_prob(y) for network in members])
    assert_close(ensemble.members(x).log_prob(y), expected)
    assert_close(ensemble(x).log_prob(y), expected.logsumexp(0) - math.log(3))
    assert_close(ensemble.loss(x.expand(3, -1, -1), y.expand(3, -1, -1)), -expected)
    assert_close(ensemble.members(x, torch.tensor([2, 0])).log_prob(y), expected[[2, 0]])
    for i, network in enumerate(members):
        assert_close(ensemble.member(i)(x).log_prob(y), network(x).log_prob(y))


class Centered(nn.Module):
    """A backbone that mixes rows."""

    def forward(self, x):
        return torch.cat([x, x - x.mean(0), x[:, :2]], -1)


@pytest.mark.parametrize("use", ["members", "some", "posterior_predictive", "predict"])
@pytest.mark.parametrize("kind", [*KINDS, "rows together", "hooked"])
def test_passes_without_gradients_change_no_result(kind, use, monkeypatch):
    members = networks(3, kind if kind in KINDS else "convolutional", noise=Full(homoscedastic=True))
    if kind == "rows together":
        members = [MixtureDensityNetwork(3, 1, 4, 8, backbone=Centered()) for _ in range(3)]
    ensemble, (x, y) = DeepEnsemble(members).double().eval(), data(50)
    x, y, seen = x.double(), y.double(), []
    if kind == "hooked":
        ensemble.stacked.register_forward_hook(lambda _, inputs, mixture: mixture.temper(2.0))
    given = {
        "members": lambda **chunks: ensemble.members(x, **chunks),
        "some": lambda **chunks: ensemble.members(x, torch.tensor([2, 0]), **chunks),
        "posterior_predictive": lambda **chunks: posterior_predictive(ensemble.stacked, ensemble, x, **chunks),
        "predict": lambda **_: ensemble.predict(x).mixture,
    }[use]
    expected = given().log_prob(y).detach()
    assert_close(given(chunk_size=2).log_prob(y), expected)
    for limit in (1.0, 4000.0, 2.0**30):
        monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", limit)
        with torch.no_grad():
            assert_close(given().log_prob(y), expected)
    if kind in ("convolutional", "hooked"):
        monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", 4000.0)
        ensemble.stacked.backbone[1].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        with torch.no_grad():
            given()
        assert max(seen) < 50
        if use != "predict":
            given()  # there are gradients
            assert max(seen) == 50


def test_members_in_training_mode_go_at_once(monkeypatch):
    """Rows are normalised together, and dropout draws what it drew before."""
    norm = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Dropout(0.5))
    ensemble = DeepEnsemble(MixtureDensityNetwork(3, 1, 4, 8, backbone=norm), 3)
    (x, y), results = data(50), []
    for limit in (1.0, 2.0**30):
        monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", limit)
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(ensemble.members(x).log_prob(y))
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("noise", NOISE, ids=repr)
@pytest.mark.parametrize("kind", ["default", "custom"])
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 5)])
def test_every_noise_model_and_batch_shape(noise, kind, batch_shape):
    members = [n.double() for n in networks(3, kind, dim_out=2, noise=noise)]
    for i, network in enumerate(members):
        network.initialize_(*(i + t.double() for t in data(50, 2, seed=i)))
    ensemble = DeepEnsemble(members)
    x, y = torch.randn(*batch_shape, 3).double(), torch.randn(*batch_shape, 2).double()
    expected = torch.stack([network(x).log_prob(y) for network in members])
    assert_close(ensemble.members(x).log_prob(y), expected)
    assert_close(ensemble.loss(x.expand(3, *x.shape), y.expand(3, *y.shape)), -expected)


def test_missing_targets():
    members = networks(2, dim_out=2, noise=Full())
    x, y = data(6, 2)
    y[::2, 0] = math.nan
    expected = torch.stack([network.loss(x, y) for network in members])
    assert_close(DeepEnsemble(members).loss(x.expand(2, -1, -1), y.expand(2, -1, -1)), expected)


class Residual(MixtureDensityNetwork):
    def features(self, x):
        return super().features(x) + x.mean(-1, keepdim=True)


class Warmer(MixtureDensityNetwork):
    def forward(self, x):
        return super().forward(x).temper(2.0)


NETWORKS = {
    "subclass": lambda **settings: Warmer(3, 2, 4, 8, **settings),
    "hook": lambda **settings: hooked(make(dim_out=2, **settings), lambda network: network),
    "hook of the head": lambda **settings: hooked(make(dim_out=2, **settings), lambda network: network.head),
}


def hooked(network, part):
    part(network).register_forward_hook(lambda _, inputs, mixture: mixture.temper(2.0))
    return network


@pytest.mark.parametrize("noise", NOISE, ids=repr)
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_whose_call_is_changed(kind, noise):
    members = [NETWORKS[kind](noise=noise).double() for _ in range(3)]
    for i, network in enumerate(members):
        network.initialize_(*(i + t.double() for t in data(50, 2, seed=i)))
    ensemble, (x, y) = DeepEnsemble(members), (t.double() for t in data(6, 2))
    expected = torch.stack([network(x).log_prob(y) for network in members])
    assert_close(ensemble.members(x).log_prob(y), expected)
    assert_close(ensemble(x).log_prob(y), expected.logsumexp(0) - math.log(3))
    assert_close(ensemble.members(x, torch.tensor([2, 0])).log_prob(y), expected[[2, 0]])
    assert_close(ensemble.loss(x.expand(3, -1, -1), y.expand(3, -1, -1)), -expected)
    with pytest.raises(ValueError, match="y: expected shape"):
        ensemble.loss(x.expand(3, -1, -1), y)


@pytest.mark.parametrize("change", ["features", "squashed head"])
def test_networks_that_were_changed(change):
    members = [Residual(3, 1, 4, 8) if change == "features" else make() for _ in range(2)]
    for network in members if change == "squashed head" else []:
        nn.utils.parametrize.register_parametrization(network.head.linear, "weight", nn.Tanh())
    x, y = data(6)
    assert_close(DeepEnsemble(members).members(x).log_prob(y), torch.stack([n(x).log_prob(y) for n in members]))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(*args):
    return 2 * args[-1]


CODE = {
    "subclass": lambda b: b.__setitem__(2, Doubled(8, 8)),
    "hook": lambda b: b[2].register_forward_hook(doubled),
    "pre-hook": lambda b: b[2].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
    "hook of an activation": lambda b: b[1].register_forward_hook(lambda _, inputs, output: output - output.mean(0)),
    "hook of all": lambda b: b.register_forward_hook(doubled),
    "forward": lambda b: setattr(b[2], "forward", lambda x: torch.sin(x)),
    "parametrization": lambda b: nn.utils.parametrize.register_parametrization(b[2], "weight", nn.Tanh()),
    "shared activation": lambda b: b.__setitem__(3, b[1]),
    "plain": lambda b: None,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["default", "custom"])
@pytest.mark.parametrize("change", CODE)
def test_layers_that_compute_something_else(change, kind):
    torch.manual_seed(0)
    first = make(kind).double()
    CODE[change](first.backbone.double())
    first.double()
    members = [first, *(copy.deepcopy(first) for _ in range(2))]
    for network in members:
        network.load_state_dict({name: t + 0.3 * torch.randn_like(t).abs() for name, t in first.state_dict().items()})
    ensemble, (x, y) = DeepEnsemble(members), (t.double() for t in data(6))
    expected = torch.stack([network(x).log_prob(y) for network in members])
    assert_close(ensemble.members(x).log_prob(y), expected)
    assert_close(ensemble.loss(x.expand(3, -1, -1), y.expand(3, -1, -1)), -expected)
    assert is_dense(ensemble.stacked) is (change in ("shared activation", "plain"))


def test_hooks_of_all_modules():
    members = networks(2)
    ensemble, (x, y) = DeepEnsemble(members), data(6)
    plain = ensemble.members(x).log_prob(y)
    with nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if type(m) is nn.Linear else None):
        expected = torch.stack([network(x).log_prob(y) for network in members])
        assert_close(ensemble.members(x).log_prob(y), expected)
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize("part", ["linear", "hooked", "raw", "features", "backbone"])
def test_batched_products_are_those_of_plain_layers(part):
    network = make()
    assert is_dense(network)
    if part == "linear":
        network.head.linear = Doubled(8, 12)
    elif part == "hooked":
        network.head.linear.register_forward_hook(doubled)
    elif part == "raw":
        network.head.raw = MixtureHead(8, 1, 4).raw
    elif part == "features":
        network.features = make().features
    else:
        network.backbone = Recurrent()
    assert not is_dense(network)


def test_backbones_of_another_width_are_refused():
    ensemble = DeepEnsemble([MixtureDensityNetwork(3, 1, 4, 8, backbone=nn.Sequential(nn.Linear(3, 5), nn.GELU()))] * 2)
    with pytest.raises(ValueError, match=r"backbone: expected features \(\*batch, 8\), got width 5"):
        ensemble(data(6)[0])


def test_members_differ_and_the_network_does_not_change():
    network = make("custom")
    before = copy.deepcopy(network.state_dict())
    ensemble = DeepEnsemble(network, 3)
    assert_close(network.state_dict(), before)
    for name, parameter in ensemble.stacked.named_parameters():
        assert parameter.shape[0] == 3
        if "bias" not in name or "linear" not in name:
            assert not torch.equal(parameter[0], parameter[1]), name
    assert len(DeepEnsemble(network).stacked.x_shift) == 10


def test_frozen_parameters_are_kept():
    network = make("custom")
    network.backbone[0].requires_grad_(False)
    ensemble = DeepEnsemble(network, 3)
    assert_close(ensemble.stacked.backbone[0].weight, network.backbone[0].weight.expand(3, -1, -1))
    assert not ensemble.stacked.backbone[0].weight.requires_grad
    assert not ensemble.member(1).backbone[0].weight.requires_grad
    x, y = data()
    fit(ensemble, x, y, max_epochs=2, seed=0, progress=False)
    assert_close(ensemble.stacked.backbone[0].weight, network.backbone[0].weight.expand(3, -1, -1))


@pytest.mark.parametrize("name", ["backbone.0.bias", "head.linear.weight"])
def test_single_frozen_parameters_are_kept(name):
    network = make()
    network.get_parameter(name).requires_grad_(False)
    for key, parameter in DeepEnsemble(network, 2).stacked.named_parameters():
        if key != "head.linear.bias":
            assert torch.equal(parameter[0], parameter[1]) == (key == name), key
            assert torch.equal(parameter[0], network.get_parameter(key)) == (key == name), key


def test_served_by_a_smaller_mixture():
    x, y = data()
    ensemble = DeepEnsemble(make(), 5)
    fit(ensemble, x, y, max_epochs=20, seed=0, progress=False)
    pooled = ensemble(x)
    small = pooled.reduce(6)
    assert small.n_components == 6
    assert_close(small.mean, pooled.mean, atol=1e-4, rtol=1e-4)
    assert scores.log_score(small, y).mean() < scores.log_score(pooled, y).mean() + 0.1


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_together_is_training_alone(kind):
    members = [n.double() for n in networks(3, kind)]
    (x, y), held_out = ([t.double() for t in data(60, seed=i)] for i in (0, 1))
    for i, network in enumerate(members):
        network.initialize_(x + 0.1 * i, y + i)
    ensemble = DeepEnsemble(members)
    settings = {**PLAIN, "validation": tuple(held_out), "batch_size": 60, "max_epochs": 40, "patience": 3, "lr": 0.2}
    together = fit(ensemble, x, y, **settings)
    alone = [fit(network, x, y, **settings) for network in members]
    assert [r.best_epoch for r in together.members] == [r.best_epoch for r in alone]
    assert [r.stopped_early for r in together.members] == [r.stopped_early for r in alone]
    assert len({r.best_epoch for r in alone}) > 1, "the test should tell members apart"
    for i, (network, result) in enumerate(zip(members, alone, strict=True)):
        assert_close(dict(ensemble.member(i).state_dict()), dict(network.state_dict()), rtol=1e-6, atol=1e-6)
        assert_close([r["loss"] for r in together.members[i].history], [r["loss"] for r in result.history])
        assert_close(together.members[i].component_weights, result.component_weights, rtol=1e-6, atol=1e-6)


def test_members_have_splits_and_orders_of_their_own():
    x, y = data(100)
    ensemble = DeepEnsemble(make(), 4)
    result = fit(ensemble, x, y, max_epochs=3, seed=0, progress=False)
    assert len({r.history[0]["validation_loss"] for r in result.members}) == 4
    assert result.history[0]["loss"] == pytest.approx(sum(r.history[0]["loss"] for r in result.members) / 4)
    assert result.best_loss == pytest.approx(sum(r.best_loss for r in result.members) / 4)
    assert len(torch.unique(ensemble.stacked.x_shift, dim=0)) == 4, "scalers of their own training rows"
    assert all(sum(r.component_weights) == pytest.approx(1) for r in result.members)


def test_batches_are_the_rows_of_each_member():
    rows = Rows(torch.arange(10.0).unsqueeze(-1), torch.arange(10.0).unsqueeze(-1))
    positions = torch.stack([torch.randperm(10)[:8] for _ in range(3)])
    batches = MemberBatches(rows, positions, 3)
    seen = torch.cat([batch.x for batch in batches], 1).squeeze(-1)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert_close(seen.sort(1).values, positions.sort(1).values.float())
    assert not torch.equal(seen, torch.cat([batch.x for batch in batches], 1).squeeze(-1))


def test_bootstrap_draws_from_the_training_rows():
    x, y = data(200)
    seen = {}
    for bootstrap in (False, True):
        ensemble = DeepEnsemble(make(), 3, bootstrap=bootstrap)
        fit(ensemble, x, y, max_epochs=1, seed=0, progress=False, validation=0.5)
        seen[bootstrap] = ensemble.stacked.x_shift
    assert not torch.equal(seen[False], seen[True])


def test_quality_and_pooling():
    x, y = data(600)
    ensemble = DeepEnsemble(make(), 5)
    fit(ensemble, x, y, seed=0, progress=False, max_epochs=60)
    x, y = data(1000, seed=1)
    pooled = scores.log_score(ensemble(x), y).mean()
    single = scores.log_score(ensemble.members(x), y).mean()
    assert pooled < single
    assert pooled < 0.1, "about -0.1 with these settings; the noise alone has -0.19"


@pytest.mark.parametrize("kind", ["default", "custom"])
def test_the_same_seed_gives_the_same_bits(kind):
    x, y = data()
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        ensemble = DeepEnsemble(make(kind), 3)
        before = torch.get_rng_state()
        fit(ensemble, x, y, seed=3, max_epochs=3, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(ensemble.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_resume_gives_the_same_bits(tmp_path):
    x, y = data()

    def run(**settings):
        torch.manual_seed(0)
        ensemble = DeepEnsemble(make("custom"), 3)
        settings = {"seed": 3, "max_epochs": 12, "patience": 4, "progress": False, **settings}
        return ensemble, fit(ensemble, x, y, **settings)

    whole, expected = run()

    def fall(result):
        if len(result.history) == 7:
            raise RuntimeError("power failure")

    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="power"):
        run(callbacks=[fall], **checkpoint)
    resumed, result = run(resume=True, **checkpoint)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert result.members == expected.members


@pytest.mark.parametrize("source", ["loader", "weights", "missing", "dataset", "sequence"])
def test_sources_of_data(source):
    x, y = data(100)
    settings = {"max_epochs": 3, "seed": 0, "progress": False}
    ensemble = DeepEnsemble(make(), 3)
    if source == "loader":
        held_out = DataLoader(TensorDataset(x, y), 50)
        result = fit(ensemble, DataLoader(TensorDataset(x, y), 25), validation=held_out, **settings)
    elif source == "weights":
        result = fit(ensemble, x, y, sample_weight=torch.rand(100), **settings)
    elif source == "missing":
        ensemble, y = DeepEnsemble(make(dim_out=2, noise=Full()), 3), torch.cat([y, -y], 1)
        y[::3, 0] = math.nan
        result = fit(ensemble, x, y, **settings)
    elif source == "dataset":
        result = fit(ensemble, TensorDataset(x, y), **settings)
    else:
        ensemble = DeepEnsemble(make("custom"), 3)
        result = fit(ensemble, x.reshape(20, 5, 3), y.reshape(20, 5, 1), **settings)
        x = x.reshape(20, 5, 3)
    assert len(result.members) == 3
    assert all(math.isfinite(r.best_loss) for r in result.members)
    assert ensemble(x).batch_shape == x.shape[:-1]


def test_sample_weights_count():
    members = [n.double() for n in networks(2)]
    x, y = (t.double() for t in data(60))
    weight = torch.rand(60)
    ensemble = DeepEnsemble(members)
    settings = {**PLAIN, "validation": 0, "batch_size": 60, "max_epochs": 5, "sample_weight": weight}
    fit(ensemble, x, y, **settings)
    for i, network in enumerate(members):
        fit(network, x, y, **settings)
        assert_close(dict(ensemble.member(i).state_dict()), dict(network.state_dict()), rtol=1e-6, atol=1e-6)


OBJECTIVES = {
    "crps": ContinuousRankedProbability,
    "likelihood": NegativeLogLikelihood,
    "sum": lambda n: WeightedSum([NegativeLogLikelihood(n), ContinuousRankedProbability(n)], [1.0, 0.5]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective(name):
    x, y = (t.double() for t in data(60))
    members = [n.double() for n in networks(2)]
    ensemble = DeepEnsemble(members)
    settings = {**PLAIN, "validation": 0, "batch_size": 60, "max_epochs": 5}
    fit(ensemble, x, y, objective=OBJECTIVES[name](ensemble.stacked), **settings)
    for i, network in enumerate(members):
        fit(network, x, y, objective=OBJECTIVES[name](network), **settings)
        assert_close(dict(ensemble.member(i).state_dict()), dict(network.state_dict()), rtol=1e-6, atol=1e-6)


def test_missing_targets_are_refused_where_members_are_mapped():
    x, y = data()
    ensemble = DeepEnsemble(networks(2))
    y[3] = torch.nan
    objective = Memberwise(NegativeLogLikelihood(ensemble.stacked), 2)
    with pytest.raises(ValueError, match=r"value: expected complete points under torch\.vmap, got NaN"):
        objective(torch.stack([x, x]), torch.stack([y, y]))
    with pytest.raises(ValueError, match=r"value: expected complete points under torch\.vmap, got NaN"):
        torch.vmap(ensemble.member(0)(x[0]).log_prob)(y)
    assert objective.objective.network.head.linear.weight is ensemble.stacked.head.linear.weight
    assert isinstance(ensemble.stacked.head.linear.weight, nn.Parameter)


def test_dropout_differs_from_member_to_member():
    layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))
    network = MixtureDensityNetwork(3, 1, 4, 8, backbone=layers)
    ensemble = DeepEnsemble([network] * 4).train()
    locs = ensemble.members(torch.randn(5, 3)).locs
    assert not torch.equal(locs[0], locs[1])
    locs = ensemble.eval().members(torch.randn(5, 3)).locs
    assert torch.equal(locs[0], locs[1])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.size = nn.Linear(3, 8), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.tanh(self.size * self.layer(x))


def test_parameters_that_are_one_number():
    networks = [MixtureDensityNetwork(3, 1, 4, 8, backbone=Scaled()) for _ in range(2)]
    x, y = data()
    fit(ensemble := DeepEnsemble(networks), x, y, max_epochs=2, seed=0, progress=False)
    assert bool((ensemble.stacked.backbone.size != 1).all())


def test_one_bad_member_is_named():
    members = networks(3)
    with torch.no_grad():
        members[1].head.linear.weight.fill_(math.nan)
    x, y = data()
    with pytest.raises(FloatingPointError, match="loss is nan in member 1 of 3 in epoch 1, batch 1"):
        fit(DeepEnsemble(members), x, y, initialize=False, progress=False)


# Files and refusals


def test_save_and_load_of_changed_layers(tmp_path):
    member = make()
    member.backbone[1] = nn.ReLU()
    ensemble = DeepEnsemble([member, member])
    ensemble.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"expected backbone= .*network\.backbone\.1: ReLU"):
        DeepEnsemble.load(tmp_path / "file")
    x, y = data(6)
    loaded = DeepEnsemble.load(tmp_path / "file", backbone=member.backbone)
    assert_close(loaded.members(x).log_prob(y), ensemble.members(x).log_prob(y), rtol=0, atol=0)
    DeepEnsemble([Residual(3, 1, 4, 8) for _ in range(2)]).save(tmp_path / "residual")
    with pytest.warns(UserWarning, match=r"network: Residual\(.*\), now MixtureDensityNetwork"):
        DeepEnsemble.load(tmp_path / "residual")


@pytest.mark.parametrize("kind", ["default", "custom"])
def test_save_and_load(tmp_path, kind):
    ensemble = DeepEnsemble(make(kind, noise=Full(tied=True)), 3, bootstrap=True)
    x, y = data()
    fit(ensemble, x, y, max_epochs=1, progress=False)
    ensemble.save(tmp_path / "file")
    given = backbone(kind)
    before = None if given is None else copy.deepcopy(given.state_dict())
    loaded = DeepEnsemble.load(tmp_path / "file", backbone=given)
    assert before is None or given is not None
    assert repr(loaded) == repr(ensemble)
    assert_close(loaded.members(x).log_prob(y), ensemble.members(x).log_prob(y))
    if given is not None:
        assert_close(given.state_dict(), before)
    with pytest.raises(ValueError, match="expected"):
        MixtureDensityNetwork.load(tmp_path / "file")
    make(kind).save(tmp_path / "single")
    with pytest.raises(ValueError, match="expected an ensemble"):
        DeepEnsemble.load(tmp_path / "single")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        DeepEnsemble.load(tmp_path / "file", backbone=given)


def test_members_are_parametrised_apart():
    """torch makes a class for each parametrised module: members must not share it with the network or each other."""
    network = make()
    torch.nn.utils.parametrizations.weight_norm(network.head.linear)
    ensemble = DeepEnsemble([network, network])
    (x, y), member = data(6), ensemble.member(0)
    before = ensemble.member(1)(x).log_prob(y)
    for one in (network, member):
        torch.nn.utils.parametrize.remove_parametrizations(one.head.linear, "weight")
        assert_close(one(x).log_prob(y), before)
    assert_close(ensemble.member(1)(x).log_prob(y), before)
    assert ensemble.stacked.head.linear.parametrizations.weight.original0.shape[0] == 2


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return x @ self.weight.T


class Activated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layer, self.activation = nn.Linear(3, 8), activation

    def forward(self, x):
        activation = self.activation
        return activation["f"](self.layer(x)) if isinstance(activation, dict) else activation(self.layer(x))


def leaky(slope):
    return lambda x: nn.functional.leaky_relu(x, slope)


class Factor:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


ACTIVATIONS = {
    "function": (torch.tanh, torch.sin),
    "function of Python": (nn.functional.relu, nn.functional.silu),
    "closure": (leaky(0.1), leaky(0.2)),
    "container": ({"f": torch.tanh}, {"f": torch.sin}),
    "object": (Factor(1.0), Factor(2.0)),
    "tensor": (Factor(torch.ones(8)), Factor(torch.full((8,), 2.0))),
    "array": (Factor(np.ones(1)[0]), Factor(np.full(1, 2.0)[0])),
    "module in an object": (Factor(nn.GELU()), Factor(nn.GELU("tanh"))),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_networks_of_other_code_are_refused(kind):
    """Types and printouts agree, and so do the tensors."""
    a, b = (MixtureDensityNetwork(3, 1, 4, 8, backbone=Activated(f)) for f in ACTIVATIONS[kind])
    with pytest.raises(ValueError, match=r"one architecture, got .* for network\.backbone\.activation"):
        DeepEnsemble([a, b])


def test_a_hook_that_not_all_have_is_refused():
    a, b = networks(2)
    b.backbone[2].register_forward_hook(doubled)
    with pytest.raises(ValueError, match=r"for network\.backbone\.2\._forward_hooks"):
        DeepEnsemble([a, b])


UNCOMPARABLE = {
    "lock": threading.Lock(),
    "generator": (i for i in range(3)),
    "nested too deep": functools.reduce(lambda inner, _: [inner], range(5000), []),
}


@pytest.mark.parametrize("kind", UNCOMPARABLE)
def test_attributes_that_cannot_be_compared_are_named_and_shared(kind, tmp_path):
    def backbone():
        module = nn.Sequential(nn.Linear(3, 8), nn.GELU())
        module.odd = UNCOMPARABLE[kind]
        return module

    members = [MixtureDensityNetwork(3, 1, 4, 8, backbone=backbone()) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"cannot tell whether .*network\.backbone\.odd"):
        ensemble = DeepEnsemble(members)
    x, y = data()
    expected = torch.stack([network.loss(x, y) for network in members])
    assert_close(-ensemble.members(x).log_prob(y), expected)
    assert ensemble.member(1).backbone.odd is members[0].backbone.odd
    ensemble.save(tmp_path / "ensemble")
    again = DeepEnsemble.load(tmp_path / "ensemble", backbone=backbone())
    assert_close(-again.members(x).log_prob(y), expected)
    assert DeepEnsemble(members[0], 2).stacked.backbone.odd is members[0].backbone.odd


def test_notes_on_networks_are_no_part_of_their_architecture():
    members = networks(2)
    for i, network in enumerate(members):
        network.seed, network.head.lock = i, threading.Lock()
    assert DeepEnsemble(members).size == 2
    members[1].forward = members[0].forward
    with pytest.raises(ValueError, match=r"for network\.forward"):
        DeepEnsemble(members)


def test_settings_of_own_networks_are_part_of_their_architecture():
    class Own(MixtureDensityNetwork):
        pass

    members = [Own(3, 1, 4, 8) for _ in range(2)]
    members[0].power, members[1].power = 1, 2
    with pytest.raises(ValueError, match=r"got 1 and 2 for network\.power"):
        DeepEnsemble(members)


def test_networks_that_were_trained_apart_are_of_one_architecture():
    x, y = data(60)
    members = [MixtureDensityNetwork(3, 1, 4, 8, backbone=Activated(leaky(0.1))) for _ in range(2)]
    fit(members[0], x, y, max_epochs=2, progress=False)
    members[1].eval().backbone.mask_cache = torch.ones(3)
    expected = torch.stack([network(x).log_prob(y) for network in members])
    assert_close(DeepEnsemble(members).members(x).log_prob(y), expected)


def test_refusals():
    x, y = data()
    with pytest.raises(ValueError, match="size"):
        DeepEnsemble(make(), 0)
    with pytest.raises(ValueError, match="size"):
        DeepEnsemble(networks(2), 3)
    with pytest.raises(ValueError, match="one network at least"):
        DeepEnsemble([])
    with pytest.raises(ValueError, match="one architecture"):
        DeepEnsemble([make(), make(noise=Full())])
    frozen, other = make(), MixtureDensityNetwork(3, 1, 4, 8, backbone=Stubborn())
    frozen.head.linear.bias.requires_grad_(False)
    other.backbone.weight = nn.Parameter(torch.randn(8, 4))
    stubborn = MixtureDensityNetwork(3, 1, 4, 8, backbone=Stubborn())
    for pair in [(make(), frozen), (make().double(), make()), (stubborn, other)]:
        with pytest.raises(ValueError, match="one shape, dtype and requires_grad"):
            DeepEnsemble(pair)
    with pytest.raises(ValueError, match="latent"):
        DeepEnsemble([bayesianize(make())])
    with pytest.raises(ValueError, match="got Linear"):
        DeepEnsemble([nn.Linear(1, 1)])
    shared = make("custom")
    shared.backbone[2].bias = shared.backbone[0].bias
    layer = nn.Sequential(nn.Linear(3, 3))
    twice = MixtureDensityNetwork(3, 1, 4, 8, backbone=nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 8)))
    for network in (shared, twice):
        with pytest.raises(ValueError, match="some that layers share"):
            DeepEnsemble(network, 8)
    with pytest.raises(ValueError, match=r"reset_parameters, got backbone \(Stubborn\)"):
        DeepEnsemble(stubborn, 2)
    assert DeepEnsemble([stubborn, stubborn])(x).n_components == 8
    with pytest.raises(ValueError, match="seed: expected none beside networks with weights of their own, got 3"):
        DeepEnsemble([make(), make()], seed=3)
    ensemble = DeepEnsemble(make(), 2)
    with pytest.raises(ValueError, match="guide: expected None"):
        fit(ensemble, x, y, guide=lambda x, y: None)
    with pytest.raises(ValueError, match="refit: expected one network"):
        fit(ensemble, x, y, refit=True, progress=False)
    with pytest.raises(ValueError, match="objective: expected a module with the network"):
        fit(ensemble, x, y, objective=ContinuousRankedProbability(make()))
    with pytest.raises(ValueError, match="x: expected shape"):
        ensemble(x[:, :2])
    both = x.expand(2, -1, -1), y.expand(2, -1, -1)
    for bad in (x, x.unsqueeze(0), both[0][..., :2]):
        with pytest.raises(ValueError, match="x: expected shape"):
            ensemble.loss(bad, both[1])
    for bad in (y, both[1][:, :1], both[1][..., 0]):
        with pytest.raises(ValueError, match="y: expected shape"):
            ensemble.loss(both[0], bad)


def test_refused_fits_leave_the_ensemble_as_it_was():
    ensemble = DeepEnsemble(make(), 2)
    before = copy.deepcopy(ensemble.state_dict())
    x, y = data()
    for bad in ({"validation": 2.0}, {"sample_weight": torch.zeros(120)}, {"checkpoint": "/nowhere/at/all"}):
        with pytest.raises(ValueError, match="expected"):
            fit(ensemble, x, y, progress=False, **bad)
    with pytest.raises(ValueError, match="finite"):
        fit(ensemble, x, y * math.inf, progress=False)
    assert_close(ensemble.state_dict(), before)


def test_members_that_have_stopped_may_diverge():
    torch.manual_seed(0)
    x = torch.randn(60, 1)
    y = x + torch.randn(60, 1)
    settings = {"max_epochs": 40, "patience": 3, "validation": 0.3, "seed": 0, "progress": False}
    start = DeepEnsemble(MixtureDensityNetwork(1, 1, 2, hidden_dim=8), size=4)
    alone, together, poisoned = copy.deepcopy(start), copy.deepcopy(start), []

    def poison(result):
        stopped = [i for i, member in enumerate(result.members) if member.stopped_early]
        if stopped and not poisoned:
            poisoned.extend(stopped)
            with torch.no_grad():
                for parameter in together.stacked.parameters():
                    parameter[stopped] = torch.nan

    expected = fit(alone, x, y, **settings)
    result = fit(together, x, y, callbacks=[poison], **settings)
    assert 0 < len(poisoned) < 4
    assert [r.best_epoch for r in result.members] == [r.best_epoch for r in expected.members]
    assert len(result.history) == len(expected.history)
    for one, other in zip(alone.parameters(), together.parameters(), strict=True):
        assert_close(one, other)
