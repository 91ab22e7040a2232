import contextlib
import copy
import logging
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from cases import Recording
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.masked import masked_tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_mdn
from pyro_mdn import (
    CollapseWarning,
    DeepEnsemble,
    Diagonal,
    FitResult,
    Fixed,
    Full,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    NegativeElbo,
    NegativeLogLikelihood,
    TargetHint,
    ZeroInflated,
    bayesianize,
    fit,
)
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.support.process_state import unvalidated
from pyro_mdn.training.fit import warn_if_compiling_is_slow
from pyro_mdn.training.loop import copied
from pyro_mdn.training.optimizer import AveragedWeights, FusedAdamW
from pyro_mdn.training.schedules import default_smoothing, warmup_cosine

SILENT = {"progress": False, "seed": 0}
QUICK = {"max_epochs": 3, "few_rows": False, **SILENT}


def fork(n=300):
    """Return x and y = ±(1 + x) with noise: two branches of known width."""
    x = 2 * torch.rand(n, 1) - 1
    sign = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return x, sign * (1 + x) + 0.1 * torch.randn(n, 1)


def network(**settings):
    torch.manual_seed(0)
    return MixtureDensityNetwork(1, 1, 3, 16, **settings)


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_learns_two_branches():
    """Within 0.15 nats of the true density: a branch at random, then Gaussian noise."""
    x, y = fork(600)
    held_x, held_y = fork(2000)
    trained = network()
    fit(trained, x, y, seed=0, progress=False)
    branches = torch.stack([held_y - (1 + held_x), held_y + (1 + held_x)])
    true = (-0.5 * (branches / 0.1) ** 2).exp().sum(0) / (2 * 0.1 * math.sqrt(2 * math.pi))
    assert trained.loss(held_x, held_y).mean() < -true.log().mean() + 0.15


def test_network_keeps_the_best_averaged_weights():
    x, y = fork()
    trained = network()
    held_out = fork(100)
    result = fit(trained, x, y, validation=held_out, max_epochs=20, seed=0, progress=False)
    assert result.best_loss == min(row["validation_loss"] for row in result.history)
    assert result.best_loss == result.history[result.best_epoch - 1]["validation_loss"]
    assert_close(trained.loss(*held_out).mean().item(), result.best_loss, rtol=1e-5, atol=1e-5)


def test_stops_early_when_the_validation_loss_gets_worse():
    """Held-out targets that contradict the training rows: every epoch is worse than the first few."""
    x, y = fork(50)
    result = fit(network(), x, y, validation=(x, y + 5), max_epochs=500, patience=5, seed=0, progress=False)
    assert result.stopped_early
    assert len(result.history) == result.best_epoch + 5


def test_without_validation_all_rows_train_to_the_end():
    x, y = fork()
    result = fit(network(), x, y, validation=0, **QUICK)
    assert (result.best_epoch, result.stopped_early, len(result.history)) == (3, False, 3)
    assert math.isnan(result.history[0]["validation_loss"])


def test_seed_decides_everything_and_the_generator_is_left_alone():
    x, y = fork()
    trained = [network() for _ in range(3)]
    state = torch.get_rng_state()
    fit(trained[0], x, y, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    fit(trained[1], x, y, **QUICK)
    fit(trained[2], x, y, **{**QUICK, "seed": 1})
    assert states_equal(trained[0], trained[1])
    assert not states_equal(trained[0], trained[2])


@pytest.mark.parametrize("size", [None, 3])
def test_seeds_of_constructor_and_fit_decide_everything(size):
    """Two constructions and trainings agree bit for bit; the process's generator is neither read nor moved."""
    x, y = fork()

    def trained(state):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        built = MixtureDensityNetwork(1, 1, 3, 16, seed=4)
        built = built if size is None else DeepEnsemble(built, size, seed=5)
        fit(built, x, y, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        return built

    assert states_equal(trained(1), trained(2))
    assert not states_equal(MixtureDensityNetwork(1, 1, seed=1), MixtureDensityNetwork(1, 1, seed=2))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("size", [None, 3])
def test_a_second_fit_that_reinitializes_is_the_first(size, refit):
    """Also the first after the constructor with the same seed; without it, training goes on from where it was."""
    if size is not None and refit:
        pytest.skip("an ensemble has no refit")
    x, y = fork()
    settings = {**QUICK, "refit": refit}

    def built(seed):
        single = MixtureDensityNetwork(1, 1, 3, 16, seed=seed)
        return single if size is None else DeepEnsemble(single, size, seed=seed)

    first, other = built(0), built(1)
    fit(first, x, y, **settings)
    weights = copied(first.state_dict())
    fit(other, x, y, reinitialize=True, **settings)
    fit(first, x, y, reinitialize=True, **settings)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, weights[name])
        assert torch.equal(tensor, other.state_dict()[name])
    fit(first, x, y, **settings)
    assert not states_equal(first, other)


@pytest.mark.parametrize("affine", [True, False])
def test_reinitializing_keeps_frozen_weights_and_forgets_statistics(affine):
    x, y = fork()
    layers = nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16, affine=affine), nn.Linear(16, 16).requires_grad_(False))
    first, frozen = network(backbone=layers), layers[2].weight.clone()
    fit(first, x, y, reinitialize=True, **QUICK)
    weights = copied(first.state_dict())
    fit(first, x + 3, y, max_epochs=1, progress=False)
    fit(first, x, y, reinitialize=True, **QUICK)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
    assert torch.equal(first.backbone[2].weight, frozen)


class NoReset(nn.Module):
    """Layer that cannot draw its weights anew."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 16))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (
            lambda: network(backbone=nn.Sequential(nn.Linear(1, 1), NoReset())),
            {},
            r"got backbone\.1 \(NoReset\) without",
        ),
        (network, {"initialize": False}, "initialize, reinitialize: expected one"),
        (lambda: bayesianize(network(), layers="head"), {"guide": AutoNormal}, "expected False beside a guide"),
        (network, {"seed": True}, "seed: expected an integer from 0 to .*, got True"),
        (network, {"seed": torch.zeros(3)}, "seed: expected an integer from 0 to .*, got Tensor"),
    ],
)
def test_what_cannot_be_reinitialized_is_refused(made, settings, message):
    trained = made()
    before = copied(trained.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(trained, *fork(50), **{**QUICK, **settings}, reinitialize=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert trained.training


def test_latent_weights_are_not_reinitialized():
    latent = bayesianize(network(), layers="head")
    objective = NegativeElbo(latent, AutoNormal(latent.model), 50)
    with pytest.raises(ValueError, match=r"expected no latent weights to draw anew, got some in head\.linear"):
        fit(latent, *fork(50), objective=objective, reinitialize=True, **QUICK)


def test_compiling_for_few_steps_warns(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **settings: module)
    with pytest.warns(UserWarning, match="compiling takes longer than it saves in 6 steps") as caught:
        fit(network(), *fork(64), compile=True, **QUICK)
    assert caught[0].filename == __file__


def test_compiling_for_many_steps_does_not_warn():
    with pytest.warns(UserWarning, match="in 9999 steps"):
        warn_if_compiling_is_slow(9_999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_compiling_is_slow(10_000)


def test_two_fits_never_see_each_other_nor_the_parameter_store():
    x, y = fork()
    alone, second = network(), network()
    fit(alone, x, y, **QUICK)
    with pyro.get_param_store().scope():
        other = MixtureDensityNetwork(1, 1, 3, 16)
        pyro.module("backbone", other.backbone)
        pyro.module("head", other.head)
        before = set(pyro.get_param_store())
        fit(MixtureDensityNetwork(1, 1, 3, 16), x, y, **QUICK)
        fit(second, x, y, **QUICK)
        assert set(pyro.get_param_store()) == before
    assert states_equal(alone, second)


def test_pyro_modules_as_backbones_stay_out_of_the_store():
    x, y = fork()
    backbone = PyroModule[nn.Sequential](PyroModule[nn.Linear](1, 16), PyroModule[nn.Tanh]())
    trained = network(backbone=backbone)
    before = copy.deepcopy(trained.state_dict())
    fit(trained, x, y, **QUICK)
    assert not list(pyro.get_param_store())
    assert not torch.equal(trained.state_dict()["backbone.0.weight"], before["backbone.0.weight"])


@pytest.mark.parametrize(
    "convert",
    [lambda t: t.numpy(), lambda t: t.double().numpy(), lambda t: pd.DataFrame(t.numpy()), lambda t: t.double()],
    ids=["numpy", "float64 numpy", "pandas", "float64 tensor"],
)
def test_kinds_of_data(convert):
    x, y = fork()
    reference, other = network(), network()
    fit(reference, x, y, lr=1e-3, **QUICK)
    fit(other, convert(x), convert(y), lr=1e-3, **QUICK)
    assert_close(other.loss(x, y), reference.loss(x, y), rtol=1e-3, atol=1e-3)


def test_a_series_is_read_as_a_column_and_the_data_stay_as_they_were():
    x, y = fork()
    frame = pd.DataFrame({"x": x.numpy()[:, 0], "y": y.numpy()[:, 0]})
    before = frame.copy()
    reference, other = network(), network()
    fit(reference, x, y, **QUICK)
    fit(other, frame[["x"]], frame["y"], **QUICK)
    assert states_equal(reference, other)
    pd.testing.assert_frame_equal(frame, before)


def test_training_further_keeps_scalers_and_weights():
    x, y = fork()
    trained = network()
    fit(trained, x, y, **QUICK)
    before = copy.deepcopy(trained.state_dict())
    with pytest.warns(CollapseWarning, match="components explain less than"):
        fit(trained, x + 100, y + 100, initialize=False, lr=1e-12, **QUICK)
    assert all(torch.allclose(t, before[name], atol=1e-6) for name, t in trained.state_dict().items())


def test_sequences_train_as_their_steps_do():
    """In batches of everything and without noise: the same losses, up to rounding."""
    x = torch.randn(40, 6, 2)
    y = x.sum(-1, keepdim=True).sin() + 0.1 * torch.randn(40, 6, 1)
    settings = {"validation": 0, "batch_size": 1000, "input_noise": 0.0, "target_noise": 0.0, "max_epochs": 20}
    histories = []
    for shape in ((40, 6), (240,)):
        trained = MixtureDensityNetwork(2, 1, 2, 8, seed=0)
        result = fit(trained, x.reshape(*shape, 2), y.reshape(*shape, 1), seed=0, progress=False, **settings)
        histories.append([row["loss"] for row in result.history])
        assert trained(x).batch_shape == (40, 6)
    assert_close(*histories, rtol=1e-3, atol=1e-3)
    assert histories[0][-1] < histories[0][0] - 0.1


class Modes(nn.Module):
    """Identity that keeps the modes in which it is called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, x):
        self.seen.add((self.training, torch.is_grad_enabled()))
        return x


def random_backbone():
    return nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), Modes())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("size", [None, 2])
def test_training_mode_while_training_and_evaluation_mode_afterwards(mode, size):
    """Whatever the mode was: dropout is on for each gradient, and off for validation and all that comes later."""
    x, y = fork()
    single = network(backbone=random_backbone())
    trained = (single if size is None else DeepEnsemble(single, size)).train(mode)
    fit(trained, x, y, **QUICK)
    part = single if size is None else trained.stacked
    assert (True, True) in part.backbone[-1].seen
    assert (False, True) not in part.backbone[-1].seen
    assert not any(module.training for module in trained.modules())
    assert torch.equal(trained(x).log_prob(y), trained(x).log_prob(y))
    assert_close(trained(x).log_prob(y)[:5], trained(x[:5]).log_prob(y[:5]))


class Total(nn.Module):
    """Loss that is no loss of rows."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return self.network.loss(x, y).sum()


def test_objectives_and_guides_are_in_evaluation_mode_too():
    x, y = fork(50)
    trained = network(backbone=random_backbone())
    objective = NegativeLogLikelihood(trained)
    fit(trained, x, y, objective=objective, **QUICK)
    latent = bayesianize(network(backbone=random_backbone()), layers="head")
    guide = AutoNormal(latent.model)
    made = fit(bayesianize(network(), layers="head"), x, y, guide=AutoNormal, **QUICK).guide
    fit(latent, x, y, guide=guide, **QUICK)
    assert not any(module.training for whole in (objective, latent, guide, made) for module in whole.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_evaluation_mode_also_after_a_training_that_ended_early(error):
    def stop(module, inputs, output):
        if module.training and len(result.history):
            raise error

    result = FitResult()
    trained = network(backbone=random_backbone())
    trained.backbone[0].register_forward_hook(stop)
    callbacks = [lambda so_far: result.history.extend(so_far.history)]
    with contextlib.suppress(RuntimeError):
        fit(trained, *fork(50), callbacks=callbacks, **QUICK)
    assert not any(module.training for module in trained.modules())


def test_modes_stay_where_data_are_refused():
    trained = network(backbone=random_backbone())
    trained.backbone[1].eval()
    with pytest.raises(ValueError, match="one loss for each"):
        fit(trained, *fork(50), objective=Total(trained))
    assert [part.training for part in trained.backbone] == [True, False, True, True]


@pytest.mark.parametrize("size", [None, 2])
def test_loaded_networks_are_in_evaluation_mode(tmp_path, size):
    saved = network(backbone=random_backbone())
    saved = saved if size is None else DeepEnsemble(saved, size)
    saved.save(tmp_path / "saved")
    loaded = type(saved).load(tmp_path / "saved", backbone=random_backbone())
    assert saved.training
    assert not any(module.training for module in loaded.modules())
    x, y = fork(20)
    assert torch.equal(loaded(x).log_prob(y), saved.eval()(x).log_prob(y))


def test_batch_norm_statistics_go_with_the_weights():
    x, y = fork()
    trained = network(backbone=nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16)))
    held_out = fork(100)
    result = fit(trained, x, y, validation=held_out, **QUICK)
    assert trained.backbone[1].num_batches_tracked > 0
    assert_close(trained.eval().loss(*held_out).mean().item(), result.best_loss, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_objective_is_that_of_a_mixture_in_plain_torch():
    """Built from the components by torch's own distributions, and differentiated by autograd."""
    objective = NegativeLogLikelihood(network().double())
    x, y = (part.double() for part in fork())
    objective(x, y).mean().backward()
    gradients = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    mixture = objective.network(x)
    normals = torch.distributions.Normal(mixture.locs.squeeze(-1), mixture.covariance.scale.squeeze(-1))
    expected = torch.logsumexp(mixture.logits.log_softmax(-1) + normals.log_prob(y), -1)
    assert_close(objective(x, y), -expected)
    (-expected).mean().backward()
    assert_close(gradients, [p.grad for p in objective.parameters()])


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 20), (7, 3), (1000, 1)])
def test_batch_sizes(batch_size, batches):
    """The network is called once for each batch, and losses are means over all rows, whatever the batches."""
    x, y = fork(20)
    trained, sizes = network(), []
    trained.initialize_(x, y)
    expected = trained.loss(x, y).mean().item()

    def count(layer, inputs, output):
        if layer.training:
            sizes.append(len(output))

    trained.backbone[0].register_forward_hook(count)
    still = {"lr": 1e-12, "weight_decay": 0.0, "input_noise": 0.0, "target_noise": 0.0, "initialize": False}
    result = fit(trained, x, y, batch_size=batch_size, validation=0, **still, **QUICK)
    assert len(sizes) == 3 * batches
    assert sum(sizes) == 3 * 20
    assert_close([row["loss"] for row in result.history], [expected] * 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_handful_of_rows(rows):
    """They are all that scalers and start come from, and training fits them better than the start did."""
    x, y = fork(rows)
    trained, started = network(), network()
    started.initialize_(x, y)
    fit(trained, x, y, validation=0, max_epochs=100, seed=0, progress=False)
    assert_close(trained.x_shift, x.mean(0))
    assert_close(trained.head.shift, y.mean(0))
    assert_close(trained.head.scale, y.std(0, correction=0))
    assert trained.loss(x, y).mean() < started.loss(x, y).mean()


def test_a_loss_that_is_not_finite_is_named_and_good_weights_are_kept():
    class Failing(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 16)

        def forward(self, x):
            Failing.calls += self.training
            return self.linear(x) * (math.nan if Failing.calls > 25 else 1.0)

    x, y = fork()
    trained = network(backbone=Failing())
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 4, batch 5 of 7"):
        fit(trained, x, y, seed=0, progress=False)
    Failing.calls = 0
    assert all(p.isfinite().all() for p in trained.parameters())
    assert trained.loss(x, y).mean() < 5


class Exploding(torch.autograd.Function):
    """Identity whose gradient is not a number from the 12th call on."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Exploding.calls += 1
        return grad * (math.nan if Exploding.calls > 11 else 1.0)


@pytest.mark.parametrize("validation", [0.1, 0])
def test_a_gradient_that_is_not_finite_is_named_and_good_weights_are_kept(validation):
    class Backbone(nn.Linear):
        def forward(self, x):
            return Exploding.apply(super().forward(x))

    Exploding.calls = 0
    x, y = fork()
    trained = network(backbone=Backbone(1, 16))
    with pytest.raises(FloatingPointError, match=r"norm of the gradient is nan in epoch 2, batch [23] of"):
        fit(trained, x, y, validation=validation, seed=0, progress=False)
    assert all(p.isfinite().all() and p.grad is None for p in trained.parameters())


def test_a_validation_loss_that_is_not_finite_is_named():
    x, y = fork()
    with pytest.raises(FloatingPointError, match="validation loss is inf after epoch 1"):
        fit(network(), x, y, validation=(x[:5], torch.full((5, 1), 1e25)), **QUICK)


@pytest.mark.parametrize(
    ("x", "y", "settings", "message"),
    [
        (torch.zeros(5, 1), torch.zeros(4, 1), {}, "x, y: expected equally many rows"),
        (torch.zeros(0, 1), torch.zeros(0, 1), {}, "x: expected data"),
        (torch.zeros(0, 1), torch.zeros(0, 1), {"validation": 0}, "x: expected data"),
        (torch.zeros(1, 1), torch.zeros(1, 1), {}, "validation: expected to leave rows for training, got 1 rows"),
        (torch.zeros(5, 2), torch.zeros(5, 1), {}, "x: expected shape"),
        (torch.zeros(5, 1), torch.zeros(5, 2), {}, "y: expected shape"),
        (np.zeros((5, 1), dtype=object), torch.zeros(4, 1), {}, "x, y: expected equally many rows"),
        (torch.zeros(5, 1), pd.Series(list("abcde")), {}, "y: expected numbers, got text"),
        (torch.zeros(5, 1, dtype=torch.complex64), torch.zeros(5, 1), {}, "x: expected numbers, got complex numbers"),
        (torch.full((5, 1), math.nan), torch.zeros(5, 1), {}, "x: expected finite numbers"),
        (torch.zeros(5, 1), torch.full((5, 1), math.inf), {}, "y: expected finite numbers"),
        (
            torch.full((5, 1), 1e300, dtype=torch.float64),
            torch.zeros(5, 1),
            {},
            "x: expected finite .* beyond the range of torch.float32, in row 0",
        ),
        (
            torch.zeros(5, 1),
            torch.full((5, 1), 1e300, dtype=torch.float64),
            {},
            "y: expected finite .* beyond the range of torch.float32, in row 0",
        ),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"validation": 1.0}, "validation: expected a fraction"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"validation": 0.95}, "validation: expected to leave rows"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"lr": 0.0}, "lr: expected a finite number that is positive, got 0.0"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"input_noise": math.inf}, "input_noise: expected a finite number"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"validation": "x"}, "validation: expected a fraction"),
        (torch.zeros(1), torch.zeros(1, 1), {}, "x: expected a batch of inputs"),
        (torch.zeros(5, 1), torch.zeros(5, 5, 1), {}, "y: expected shape"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        (torch.zeros(5, 1), torch.zeros(5, 1), {"max_epochs": 2.5}, "max_epochs: expected a positive integer, got 2.5"),
        (
            torch.zeros(5, 1),
            torch.zeros(5, 1),
            {"weight_decay": -1.0},
            "weight_decay: expected a finite number that is not",
        ),
    ],
)
def test_bad_data_and_settings_are_refused_before_anything_changes(x, y, settings, message):
    untouched = network()
    before = copy.deepcopy(untouched)
    with pytest.raises(ValueError, match=message):
        fit(untouched, x, y, progress=False, **settings)
    assert states_equal(untouched, before)


def test_a_frozen_network_is_refused():
    x, y = fork(20)
    with pytest.raises(ValueError, match="network: expected parameters to train"):
        fit(network().requires_grad_(False), x, y, progress=False)


def test_bad_rows_anywhere_are_found_before_anything_changes():
    """Infinite in a row that the split may hold out, and in validation data of the caller's own."""
    x, y = fork(20)
    untouched = network()
    before = copy.deepcopy(untouched)
    for row in range(20):
        bad = y.clone()
        bad[row] = math.inf
        with pytest.raises(ValueError, match="y: expected finite numbers"):
            fit(untouched, x, bad, progress=False)
    with pytest.raises(ValueError, match="y: expected finite numbers"):
        fit(untouched, x, y, validation=(x, bad), progress=False)
    assert states_equal(untouched, before)


def test_constant_targets_train_to_the_floor():
    x = torch.randn(100, 1)
    trained = MixtureDensityNetwork(1, 1, 3, 16, noise=Diagonal(min_scale=1e-2))
    with pytest.warns(CollapseWarning, match="2 of 3 components explain less than 0.1% of the rows"):
        fit(trained, x, torch.full((100, 1), 3.0), seed=0, max_epochs=200, progress=False)
    assert_close(trained(x).mean, torch.full((100, 1), 3.0), rtol=0, atol=0.05)


# Refit, callbacks, diagnostics


def test_refit_trains_on_all_rows_a_little_longer():
    x, y = fork()
    searched, again = network(), network()
    found = fit(searched, x, y, patience=2, max_epochs=20, seed=0, progress=False, refit=False)
    result = fit(again, x, y, patience=2, max_epochs=20, seed=0, progress=False, refit=True)
    assert result.history == found.history
    assert len(result.refit_history) == round(result.best_epoch * 1.5**0.25)
    assert result.seconds > 0
    # Scaled by the mean of all rows, not of those that were left for training.
    assert torch.equal(again.x_shift, x.double().mean(0).float())
    assert not torch.equal(searched.x_shift, again.x_shift)
    assert not states_equal(searched, again)


class Pairs(Dataset):
    """Data set of arrays, which ``fit`` does not know as such."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, row):
        return tuple(array[row] for array in self.arrays)


FEW = {"max_epochs": 2, "batch_size": 10_000, "seed": 0, "progress": False}


@pytest.mark.parametrize(
    ("rows", "given"), [(1900, {}), (2100, {"few_rows": True}), (2100, {}), (1900, {"few_rows": False})], ids=str
)
def test_few_rows_have_much_noise_a_third_held_out_and_a_refit(rows, given):
    x, y = fork(rows)
    few = given.get("few_rows", rows < 2000)
    trained = network()
    objective = Recording(trained)
    result = fit(trained, x, y, objective=objective, **FEW, **given)
    held_out = round(rows / (3 if few else 10))
    steps = objective.seen[True]
    assert [len(seen) for seen, _ in steps[:2]] == [rows - held_out] * 2
    refit = few * round(result.best_epoch * 1.5**0.25)
    assert sum(len(seen) for seen, _ in steps[2:]) == refit * rows
    assert {len(seen) for seen, _ in objective.seen[False]} == {2, held_out}  # 2 to see whether it can be called
    assert len(result.refit_history) == refit
    noise = 0.3 if few else 0.1
    assert_close(steps[0][0].std(), x.std() * math.sqrt(1 + noise**2), rtol=0.025, atol=0)
    assert_close(steps[0][1].std(), y.std() * math.sqrt(1 + noise**2), rtol=0.025, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_whether_rows_are_few_is_decided_once_by_all_of_them(seed):
    """Half of the sequences are short: those that are left for training do not tell how many targets there are."""
    x, y = torch.randn(100, 40, 1), torch.randn(100, 40, 1)
    y[::2, 1:] = math.nan
    for length, few in ((40, False), (38, True)):
        part = x[:, :length], y[:, :length]
        assert (int((~part[1].isnan()).sum()) < 2000) == few
        trained = network()
        objective = Recording(trained)
        result = fit(trained, *part, objective=objective, **{**FEW, "seed": seed})
        assert len(objective.seen[True][0][0]) == (67 if few else 90)
        assert bool(result.refit_history) == few


@pytest.mark.parametrize("given", [{"validation": 0.25}, {"refit": False}, {"validation": 0}], ids=str)
def test_what_was_asked_for_goes_before_the_defaults_for_few_rows(given):
    x, y = fork(60)
    trained = network()
    objective = Recording(trained)
    result = fit(trained, x, y, objective=objective, **FEW, **given)
    held_out = round(60 * given.get("validation", 1 / 3))
    assert {len(seen) for seen, _ in objective.seen[True]} == {60 - held_out}
    assert not result.refit_history


def test_an_ensemble_of_few_rows_holds_out_a_tenth_for_each_member():
    x, y = fork(60)
    ensemble = DeepEnsemble(network(), 2)
    objective = Recording(ensemble)
    fit(ensemble, x, y, objective=objective, **FEW)
    assert {seen.shape[:2] for seen, _ in objective.seen[True]} == {(2, 54)}


def test_a_data_set_of_few_rows_holds_out_a_tenth():
    trained = network()
    objective = Recording(trained)
    result = fit(trained, Pairs(*fork(60)), objective=objective, **FEW)
    assert {len(seen) for seen, _ in objective.seen[True]} == {54}
    assert not result.refit_history


def test_few_sequences_of_many_steps_are_no_few_rows():
    x, y = torch.randn(60, 40, 1), torch.randn(60, 40, 1)
    assert not fit(network(), x, y, **FEW).refit_history
    assert fit(network(), x, y.masked_fill(torch.rand(60, 40, 1) < 0.5, math.nan), **FEW).refit_history


@pytest.mark.parametrize("make", ["elbo", "guide"])
def test_a_prior_regularises_few_rows(make):
    latent = bayesianize(network(), layers="head")
    if make == "guide":
        result = fit(latent, *fork(60), guide=AutoNormal, **FEW)
    else:
        result = fit(latent, *fork(60), objective=NegativeElbo(latent, AutoNormal(latent.model), 60), **FEW)
    assert not result.refit_history


class Constant(nn.Module):
    """Objective that does not depend on the weights, so that only weight decay changes them."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return 0.0 * self.network.loss(x, y)


@pytest.mark.parametrize(
    "given", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "first_weight_decay": 3.0}], ids=str
)
@pytest.mark.parametrize("members", [1, 2])
def test_weight_decay_fades_to_the_last_one(given, members):
    x, y = fork(50)
    trained = network() if members == 1 else DeepEnsemble(network(), members)
    parameters = trained.state_dict()
    weights, biases = ([n for n, p in trained.named_parameters() if n.endswith(e)] for e in ("weight", "bias"))
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    settings = {"validation": 0, "initialize": False, "batch_size": 50, "max_epochs": 10, "lr": 0.1, "fading": 2.0}
    fit(trained, x, y, objective=Constant(trained), **settings, **SILENT, **given)
    last, kept = given.get("weight_decay", 20 / 50), 1.0
    first = given.get("first_weight_decay", last if given else default_smoothing(50).first_weight_decay)
    average = 1.0
    for step in range(10):
        kept *= 1 - 0.1 * warmup_cosine(step, 10) * (last + (first - last) * (1 - step / 10) ** 2)
        average += max(0.01, 9 / (10 + step)) * (kept - average)
    assert weights
    assert biases
    for name in weights:
        assert_close(trained.state_dict()[name], average * before[name], rtol=1e-4, atol=1e-6)
    for name in biases:
        assert_close(trained.state_dict()[name], before[name])


def test_few_rows_of_a_noisy_function_are_not_overfitted():
    """100 rows: better than the defaults for many rows by more than .3 nats, and than the marginal distribution."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2100, 3, generator=generator)
    y = (2 * x[:, :1]).sin() + 0.3 * torch.randn(2100, 1, generator=generator)
    losses = {}
    for few in (None, False):
        trained = MixtureDensityNetwork(3, 1, seed=0)
        fit(trained, x[:100], y[:100], few_rows=few, seed=0, progress=False)
        losses[few] = trained.loss(x[100:], y[100:]).mean().item()
    marginal = -torch.distributions.Normal(y[:100].mean(), y[:100].std()).log_prob(y[100:]).mean()
    assert losses[None] < losses[False] - 0.3
    assert losses[None] < marginal - 0.3


def test_callbacks_see_every_epoch_and_can_stop():
    x, y = fork()
    seen = []

    def watch(result):
        seen.append(result.history[-1]["epoch"])
        return len(seen) == 2

    result = fit(network(), x, y, callbacks=[watch, lambda result: None], **QUICK)
    assert seen == [1, 2]
    assert result.stopped_early


def test_epochs_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, "pyro_mdn"):
        fit(network(), *fork(), **QUICK)
    assert [record.levelname for record in caplog.records] == ["DEBUG"] * 3
    assert "epoch 3: loss" in caplog.text


class Sometimes(nn.Linear):
    """Layer that gives NaN for every fifth batch of training."""

    calls = 0

    def forward(self, x):
        Sometimes.calls += self.training
        return super().forward(x) * (math.nan if self.training and Sometimes.calls % 5 == 0 else 1.0)


def test_bad_batches_are_skipped_and_counted(caplog):
    Sometimes.calls = 0
    x, y = fork()
    trained = network(backbone=Sometimes(1, 16))
    result = fit(trained, x, y, skip_bad_batches=True, validation=0.1, max_epochs=10, seed=0, progress=False)
    assert result.skipped_batches == 9 * 10 // 5
    assert caplog.text.count("loss is nan in epoch") == result.skipped_batches
    assert all(p.isfinite().all() for p in trained.parameters())
    assert trained.loss(x, y).isfinite().all()


def test_an_epoch_without_a_good_batch_is_an_error():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (math.nan if self.training else 1.0)

    untouched = network(backbone=Broken(1, 16))
    with pytest.raises(FloatingPointError, match="no batch of epoch 1 has a finite loss"):
        fit(untouched, *fork(), skip_bad_batches=True, **QUICK)
    assert all(p.isfinite().all() for p in untouched.parameters())


def test_component_weights_are_mean_responsibilities():
    x, y = fork()
    trained = network()
    result = fit(trained, x, y, validation=(x, y), max_epochs=5, seed=0, progress=False)
    expected = trained(x).responsibilities(y).mean(0)
    assert_close(torch.tensor(result.component_weights), expected, rtol=1e-4, atol=1e-5)
    entropy = -(expected * expected.log()).sum()
    assert_close(result.effective_components, entropy.exp().item(), rtol=1e-4, atol=1e-4)


def test_dead_components_are_named():
    x, y = fork()
    trained = network()
    fit(trained, x, y, **QUICK)
    with torch.no_grad():
        trained.head.linear.bias[1] -= 500
    with pytest.warns(CollapseWarning, match="1 of 3 components explain less than 0.1% of the rows each") as caught:
        result = fit(trained, x, y, initialize=False, lr=1e-12, **QUICK)
    assert caught[0].filename == __file__
    assert result.effective_components < 2.1


def test_the_history_is_drawn():
    result = fit(network(), *fork(), **QUICK)
    axes = result.plot()
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert_close(torch.tensor(lines["training"][:, 1]), torch.tensor([r["loss"] for r in result.history]).double())
    held_out = torch.tensor([row["validation_loss"] for row in result.history]).double()
    assert_close(torch.tensor(lines["validation"][:, 1]), held_out)
    assert f"best epoch, {result.best_epoch}" in lines
    assert axes.get_xlabel() == "epoch"
    assert fit(network(), *fork(), validation=0, **QUICK).plot(axes) is axes
    with pytest.raises(ValueError, match="result: expected one epoch"):
        FitResult().plot()


# Precision and compilation


def test_autocast_trains_in_bfloat16_about_as_well():
    x, y = fork(600)
    exact, rounded = network(), network()
    settings = {"max_epochs": 30, "seed": 0, "progress": False}
    fit(exact, x, y, **settings)
    dtypes = set()
    hook = rounded.backbone[0].register_forward_hook(lambda m, i, out: dtypes.add((m.training, out.dtype)))
    fit(rounded, x, y, autocast=torch.bfloat16, **settings)
    hook.remove()
    assert (True, torch.bfloat16) in dtypes
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert abs(rounded.loss(x, y).mean() - exact.loss(x, y).mean()) < 0.1
    with pytest.raises(ValueError, match=r"autocast: expected None or torch.bfloat16, got torch.float16"):
        fit(rounded, x, y, autocast=torch.float16)


@pytest.mark.parametrize("noise", [Diagonal(), Full(), LowRank(1), Isotropic(), Fixed(0.1)], ids=repr)
def test_objective_compiles_as_one_graph_for_any_batch(noise):
    torch.compiler.reset()
    counter = CompileCounter()
    objective = NegativeLogLikelihood(MixtureDensityNetwork(1, 1, 3, 16, noise=noise))
    with pyro.validation_enabled(False):
        compiled = torch.compile(objective, backend=counter, fullgraph=True, dynamic=True)
        for n in (33, 32, 57):
            x, y = fork(n)
            assert_close(compiled(x, y), objective(x, y))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_training_gives_the_same_network():
    x, y = fork(70)
    plain, compiled = network(), network()
    fit(plain, x, y, **QUICK)
    fit(compiled, x, y, compile=True, **QUICK)
    assert_close(compiled.loss(x, y), plain.loss(x, y), rtol=1e-3, atol=1e-3)


def test_targets_on_a_grid_are_compiled():
    torch.compiler.reset()
    x, y = fork(70)
    objective = NegativeLogLikelihood(network(), torch.tensor([0.5]))
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=True)
    y = y.mul(2).round().div(2)
    with unvalidated():
        for rows in (slice(70), slice(33)):
            losses = []
            for function in (compiled, objective):
                torch.manual_seed(0)
                losses.append(function(x[rows], y[rows]))
            assert_close(*losses)


def test_compilation_leaves_validation_as_it_was():
    """In a process of its own, since torch.compile switches it off only once."""
    code = """
import torch
from pyro_mdn import MixtureDensityNetwork, NegativeLogLikelihood
from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.loop import Loop
from pyro_mdn.training.settings import LoopSettings
network, rows = MixtureDensityNetwork(1, 1), Rows(torch.randn(8, 1), torch.randn(8, 1))
numbers = dict.fromkeys(["weight_decay", "input_noise", "target_noise", "final_noise"], 0.0)
settings = LoopSettings(max_epochs=1, patience=1, compile=True, **numbers)
units = network.input_units, network.head.units
Loop(NegativeLogLikelihood(network), InMemory(rows), None, units, settings)
print(torch.distributions.Distribution._validate_args)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_missing_targets_are_not_compiled():
    x, y = fork(20)
    y = torch.cat([y, y], 1)
    y[0, 0] = math.nan
    with pytest.raises(ValueError, match="compile: expected exact and complete targets"):
        fit(MixtureDensityNetwork(1, 2), x, y, compile=True, **QUICK)


@pytest.mark.parametrize("of", ["loss", "log_prob", "component_log_prob", "condition"])
def test_missing_targets_are_not_compiled_by_users(of):
    torch.compiler.reset()
    with unvalidated():
        net, x, y = MixtureDensityNetwork(1, 2, 2, 4), torch.randn(6, 1), torch.randn(6, 2)
        functions = {
            "loss": net.loss,
            "log_prob": lambda x, y: net(x).log_prob(y),
            "component_log_prob": lambda x, y: net(x).component_log_prob(y),
            "condition": lambda x, y: net(x).condition(y[:, :1], [0]).mean,
        }
        compiled = torch.compile(functions[of], backend="aot_eager")
        assert_close(compiled(x, y), functions[of](x, y))
        with pytest.raises(RuntimeError, match=r"expected complete points under torch\.compile, got NaN"):
            compiled(x, y.masked_fill(torch.eye(6, 2, dtype=torch.bool), math.nan))


# What a reader of the documentation relies on


def test_global_flags_are_as_they_were():
    x, y = fork(50)
    trained = network()
    objective = NegativeLogLikelihood(trained)
    modes = []
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        callbacks = [lambda result: modes.append(objective.training)]
        fit(trained, x, y, objective=objective, callbacks=callbacks, **QUICK)
        assert not torch.distributions.Distribution._validate_args
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)
    assert modes == [False] * 3


def test_numpy_scalars_are_settings():
    x, y = fork(50)
    a, b = network(), network()
    fit(a, x, y, max_epochs=2, lr=0.25, validation=0.25, seed=3, progress=False)
    settings = {"max_epochs": np.int64(2), "lr": np.float32(0.25), "validation": np.float32(0.25)}
    fit(b, x, y, seed=np.int64(3), progress=False, **settings)
    assert states_equal(a, b)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(context):
    x, y = fork(50)
    a, b = network(), network()
    with context():
        fit(a, x, y, **QUICK)
        assert not torch.is_grad_enabled()
    fit(b, x, y, **QUICK)
    assert states_equal(a, b)


@pytest.mark.parametrize(("kind", "native"), [(">f4", np.float32), (np.longdouble, np.float64)])
def test_other_kinds_of_floating_point(kind, native):
    x, y = (tensor.numpy() for tensor in fork(50))
    a, b = network(), network()
    fit(a, x.astype(kind), y.astype(kind), **QUICK)
    fit(b, x.astype(native), y.astype(native), **QUICK)
    assert states_equal(a, b)


def test_what_numpy_masks_is_missing():
    x, y = (tensor.numpy() for tensor in fork(50))
    mask = np.arange(50)[:, None] % 3 == 0
    a, b = network(), network()
    fit(a, x, np.ma.masked_array(np.where(mask, 1e6, y), mask), **QUICK)
    fit(b, x, np.where(mask, np.float32(np.nan), y), **QUICK)
    assert states_equal(a, b)
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        fit(network(), np.ma.masked_array(x, mask), y, **QUICK)
    with pytest.raises(ValueError, match="sample_weight: expected finite numbers"):
        fit(network(), x, y, sample_weight=np.ma.masked_array(np.ones(50), mask[:, 0]), **QUICK)
    with pytest.raises(ValueError, match="sample_weight: expected finite numbers"):
        fit(network(), x, y, sample_weight=np.ma.masked_array(np.ones(50, dtype=int), mask[:, 0]), **QUICK)
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        fit(network(), x, y, **{**QUICK, "validation": (np.ma.masked_array(x, mask), y)})


def test_rows_that_are_masked_one_by_one():
    x, y = (tensor.numpy() for tensor in fork(50))
    mask = np.arange(50)[:, None] % 3 == 0
    a, b = network(), network()
    fit(a, x, [np.ma.masked_array(*row) for row in zip(np.where(mask, 1e6, y), mask, strict=True)], **QUICK)
    fit(b, x, np.where(mask, np.float32(np.nan), y), **QUICK)
    assert states_equal(a, b)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_what_torch_masks_is_missing():
    x, y = fork(50)
    mask = torch.arange(50).unsqueeze(1) % 3 == 0
    a, b = network(), network()
    fit(a, x, masked_tensor(y.masked_fill(mask, 1e6), ~mask), **QUICK)
    fit(b, x, y.masked_fill(mask, torch.nan), **QUICK)
    assert states_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", ["below", "above"])
@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_ranges_beyond_the_precision_are_refused(dtype, unit, which, ensemble):
    """Training would be on zeros, or on an infinite scale; a single number that is tiny is no fault."""
    exponents = {"below": (-60, -200), "above": (39, 200)}[unit]
    factor = 10.0 ** exponents[dtype == torch.float64]
    data = dict(zip("xy", (tensor.double() for tensor in fork(50)), strict=True))
    untouched = MixtureDensityNetwork(1, 1).to(dtype)
    before = copied(untouched.state_dict())
    model = DeepEnsemble([untouched] * 2) if ensemble else untouched
    faulty = {**data, which: data[which] * factor}
    with pytest.raises(ValueError, match=rf"{which}: expected .* in|{which}: expected columns whose range is within"):
        fit(model, **faulty, **QUICK)
    with pytest.raises(ValueError, match=rf"{which}: expected"):
        fit(model, DataLoader(TensorDataset(*faulty.values()), 10), **QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.state_dict().items())
    small = data[which].clone()
    small[0] *= 1e-60
    assert fit(model, **{**data, which: small}, **QUICK).best_loss < math.inf


def test_ranges_are_refused_for_what_the_conversion_takes_alone():
    """A column that comes below the normal range, as softmax features may, trains as one that is all 0 or nearly so."""
    x, y = fork(50)
    x = torch.cat([x, 1e-39 * torch.rand(50, 1)], 1)
    assert 0 < x[:, 1].amax() < torch.finfo(torch.float32).tiny
    trained = MixtureDensityNetwork(2, 1, 2, 8)
    assert math.isfinite(fit(trained, x, y, **QUICK).best_loss)
    assert trained.loss(x, y).isfinite().all()
    wide = MixtureDensityNetwork(2, 1, 2, 8).double()
    assert math.isfinite(fit(wide, x.double(), y.double(), **QUICK).best_loss)
    with pytest.raises(ValueError, match=r"x: expected columns whose range is within that of torch\.float32"):
        fit(MixtureDensityNetwork(2, 1, 2, 8), x.double(), y, **QUICK)
    far = torch.tensor([[3e38], [torch.nan], [-3e38]]).expand(3, 1)
    with pytest.raises(ValueError, match=r"y: expected columns whose range is within that of torch\.float32"):
        trained.check(torch.rand(3, 2), far)


def test_weights_in_bfloat16_are_averaged_in_more_digits():
    parameter = torch.ones(3, dtype=torch.bfloat16)
    average = AveragedWeights([parameter])
    parameter.mul_(2)
    for step in range(1000, 1100):
        average.update(step)
    expected = 2 - 0.99**100
    assert_close(average.averages[0], torch.full((3,), expected))
    with average.swapped_in():
        assert_close(parameter.float(), torch.full((3,), expected), rtol=0.01, atol=0)
    assert (parameter == 2).all()


def test_weights_without_a_gradient_do_not_decay():
    used, unused = torch.ones(2, 2), torch.ones(2, 2)
    used.grad = torch.zeros(2, 2)
    FusedAdamW([used, unused]).step(0.1, weight_decay=0.5)
    assert_close(used, torch.full((2, 2), 0.95))
    assert (unused == 1).all()


class Ending(NegativeLogLikelihood):
    """A likelihood whose gradient is 0 from the tenth call on."""

    calls = 0

    def forward(self, x, y):
        self.calls += 1
        return super().forward(x, y) * (self.calls < 10)


def test_moments_without_gradients_do_not_become_subnormal_numbers(monkeypatch):
    moments, flush = [], FusedAdamW.flush

    def recorded(optimizer):
        moments.append([m.clone() for m in (*optimizer.means, *optimizer.squares)])
        flush(optimizer)

    monkeypatch.setattr(FusedAdamW, "flush", recorded)
    trained = network()
    fit(trained, *fork(), objective=Ending(trained), batch_size=30, validation=0, progress=False, max_epochs=120)
    assert len(moments) == 12  # of 1200 steps
    tiny = torch.finfo(torch.float32).tiny
    assert all(bool(((m == 0) | (m.abs() >= tiny)).all()) for row in moments for m in row)
    assert all(bool((m == 0).all()) for m in moments[-1][: len(moments[-1]) // 2])


class Interrupting(NegativeLogLikelihood):
    """A likelihood that is interrupted when it is called first, on a network that has been drawn anew."""

    def forward(self, x, y):
        self.seen = copied(self.network.state_dict())
        raise KeyboardInterrupt


def test_an_interrupted_start_leaves_the_network_as_it_was():
    trained = network()
    objective = Interrupting(trained)
    with pytest.raises(KeyboardInterrupt):
        fit(trained, *fork(50), objective=objective, reinitialize=True, **{**QUICK, "seed": 1})
    assert not torch.equal(objective.seen["head.linear.weight"], network().head.linear.weight)
    assert states_equal(trained, network())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": 3}, "callbacks: expected functions of a FitResult, got int"),
        ({"callbacks": [print, 3]}, "callbacks: expected functions of a FitResult, got int"),
        ({"lr": "0.1"}, "lr: expected a finite number"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"seed": 0.5}, "seed: expected an integer"),
        ({"max_epochs": True}, "max_epochs: expected a positive integer, got True"),
        ({"checkpoint": "nowhere/run"}, "checkpoint: expected a file in a directory that can be written to"),
        ({"checkpoint": "."}, "checkpoint: expected a file in a directory that can be written to"),
    ],
)
def test_bad_settings(settings, message):
    untouched = network()
    with pytest.raises(ValueError, match=message):
        fit(untouched, *fork(20), progress=False, **settings)
    assert states_equal(untouched, network())


@pytest.mark.parametrize("stranger", [torch.nn.Linear(1, 1), "network", torch.zeros(5, 1)])
def test_other_modules_are_refused(stranger):
    with pytest.raises(ValueError, match="network: expected a MixtureDensityNetwork or a DeepEnsemble, got"):
        fit(stranger, *fork(20))


def test_one_callback_is_a_list_of_one():
    seen = []
    result = fit(network(), *fork(20), callbacks=seen.append, **QUICK)
    assert len(seen) == len(result.history)


def test_a_scalar_objective_is_refused():
    untouched = network()
    with pytest.raises(ValueError, match=r"objective: expected one loss for each of 2 rows, got \(\)"):
        fit(untouched, *fork(20), objective=Total(untouched), **QUICK)
    assert states_equal(untouched, network())


def test_skipped_batches_leave_no_trace_in_buffers():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.calls = nn.BatchNorm1d(1), nn.Linear(1, 16), 0

        def forward(self, x):
            self.calls += self.training
            return self.linear(self.norm(x * (math.nan if self.training and self.calls == 4 else 1.0)))

    trained = network(backbone=Poisoned())
    result = fit(trained, *fork(), validation=0, skip_bad_batches=True, **QUICK)
    assert result.skipped_batches == 1
    assert all(buffer.isfinite().all() for buffer in trained.buffers())


# Kinds of targets


def kinds(size=400):
    rng = np.random.default_rng(0)
    return {
        "small counts": rng.poisson(2.0, size),
        "between 0 and 1": rng.uniform(size=size),
        "positive, and skewed": rng.lognormal(0, 1, size),
    }, {
        "normal": rng.normal(size=size),
        "positive": 5 + rng.normal(size=size),
        "exponential": -rng.lognormal(0, 1, size),
        "binary": rng.integers(0, 2, size),
        "large counts": rng.poisson(500.0, size),
        "grades": rng.integers(3, 8, size),
        "few": rng.lognormal(0, 1, 30),
        "small shares": 0.1 * rng.uniform(size=size),
    }


def hinted(y, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network = MixtureDensityNetwork(1, y.shape[-1], 1, hidden_dim=2, **settings)
        fit(network, np.zeros((len(y), 1)), y, max_epochs=1, progress=False)
    return [str(w.message) for w in caught if issubclass(w.category, TargetHint)]


def test_hints_are_given_for_the_kinds_that_have_an_argument():
    suited, others = kinds()
    arguments = {
        "small counts": "family",
        "between 0 and 1": "target_transform",
        "positive, and skewed": "target_transform",
    }
    for name, y in suited.items():
        (message,) = hinted(y[:, None].astype(float))
        assert name in message
        argument, value = re.search(r'(\w+)="(\w+)"', message).groups()
        assert argument == arguments[name]
        assert hinted(y[:, None].astype(float), **{argument: value}) == []  # it can be given, and ends the hints
    for y in others.values():
        assert hinted(y[:, None].astype(float)) == []
    (message,) = hinted(suited["positive, and skewed"][:, None] * (np.arange(400) % 3 > 0)[:, None])
    assert 'ZeroInflated("normal")' in message


def advised(message):
    """Arguments that a hint names."""
    code = re.split(r" may | gives | keeps |, in place|, without", message.split(": ", 2)[2])[0]
    return eval(f"dict({code.replace(' and target', ', target')})", vars(pyro_mdn))


def test_what_hints_advise_can_be_done():
    """For outputs of one kind and of several, beside each kind of noise."""
    suited, others = kinds()
    shares, counts, prices = (suited[name] for name in ("between 0 and 1", "small counts", "positive, and skewed"))
    zeros = np.arange(400) % 3 > 0
    for noise in (None, "isotropic", "full"):
        of_noise = {} if noise is None else {"noise": noise}
        for columns in ([counts, counts], [prices * zeros, prices * zeros], [shares * zeros], [shares, prices]):
            y = np.stack(columns, 1).astype(float)
            for message in hinted(y, **of_noise):
                chosen = advised(message)
                beside = {} if isinstance(chosen.get("family"), ZeroInflated) else of_noise
                if "without noise= that correlates" in message:
                    assert noise == "full"
                    assert "family" in chosen
                    beside = {}
                assert hinted(y, **chosen, **beside) == []
    y = np.stack([counts, others["normal"], counts, prices, shares, prices * zeros], 1).astype(float)
    y[3] = np.nan
    of_counts, positive, bounded, with_zeros = hinted(y)
    assert of_counts.startswith("y: all targets of column 0, 2 are small counts: ")
    assert advised(of_counts) == advised(positive) == advised(bounded) == advised(with_zeros)
    assert "in place of noise=" not in of_counts
    assert hinted(y, **advised(of_counts)) == []
    (positive, bounded) = hinted(y[:, 3:5])
    assert advised(positive) == advised(bounded) == {"target_transform": ["log", "logit"]}
    assert all(", in place of noise=, " in message for message in hinted(y, noise="isotropic"))


def test_hints_for_shares_keep_them_below_1():
    shares = kinds()[0]["between 0 and 1"] * (np.arange(400) % 3 > 0)
    (message,) = hinted(shares[:, None])
    assert advised(message) == {"family": ZeroInflated("normal"), "target_transform": "logit"}
    assert hinted(np.where(shares > 0.95, 1.0, shares)[:, None]) == []


def test_hints_name_gross_outliers():
    """One message for each column that has some and is of no other kind."""
    _, others = kinds()
    clean = others["normal"]
    far = np.where(np.arange(len(clean)) % 20 == 7, 12345.0, clean)
    (message,) = hinted(far[:, None])
    found = re.match(r"y: (\d+) of (\d+) targets lie far from all others, such as 12345: ", message)
    count, rows = map(int, found.groups())  # of the rows that are not held out
    assert count < 20 < rows
    assert abs(count / rows - 0.05) < 0.04
    assert 'family="student_t"' in message
    assert hinted(far[:, None], family="student_t") == []
    messages = hinted(np.stack([clean, far, -far], 1))
    assert [re.search("of column ([0-9])", message).group(1) for message in messages] == ["1", "2"]
    assert hinted(far[:40, None]) == []  # too few to tell


def test_whoever_has_chosen_is_left_alone():
    for y in kinds()[0].values():
        y = y[:, None].astype(float)
        for settings in ({"family": "student_t"}, {"family": "normal"}, {"target_transform": "standardize"}):
            assert hinted(y, **settings) == []
        with warnings.catch_warnings():
            warnings.simplefilter("error", TargetHint)
            MDNRegressor(target_transform="standardize", max_epochs=1, hidden_dim=2).fit(np.zeros((len(y), 1)), y)
