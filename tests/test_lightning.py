import math
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from cases import Recording
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_mdn import MixtureDensityNetwork, NegativeElbo, NegativeLogLikelihood, WeightedSum, bayesianize, fit
from pyro_mdn.lightning import LightningObjective
from pyro_mdn.training.schedules import FINAL_NOISE, INPUT_NOISE, TARGET_NOISE, default_weight_decay, fading

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
NO_NOISE = {"input_noise": 0.0, "target_noise": 0.0}


def fork(n=300):
    """Return x and y = ±(1 + x) with noise: two branches of known width."""
    x = 2 * torch.rand(n, 1) - 1
    sign = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return x, sign * (1 + x) + 0.1 * torch.randn(n, 1)


def network(x, y, **settings):
    torch.manual_seed(0)
    made = MixtureDensityNetwork(1, 1, 3, 16, **settings)
    made.initialize_(x, y)
    return made


def loader(*rows, size=None):
    """Give the rows in order, by default all in one batch."""
    return DataLoader(TensorDataset(*rows), size or len(rows[0]))


def trainer(*callbacks, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    defaults = {"accelerator": "cpu", "max_epochs": 3, "gradient_clip_val": 1.0, "log_every_n_steps": 1, **quiet}
    return Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


class Stream:
    """A loader that has no data set: one batch."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield self.batch

    def __len__(self):
        return 1


class Losses(Callback):
    """Keeps the loss of each epoch, and the gradients of the last step."""

    def __init__(self):
        self.epochs, self.gradients = [], []

    def on_after_backward(self, trainer, module):
        self.gradients = [p.grad.clone() for p in module.parameters()]

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(trainer.callback_metrics["loss"].item())


def test_learns_two_branches():
    """Within 0.15 nats of the true density: a branch at random, then Gaussian noise."""
    x, y = fork(600)
    held_x, held_y = fork(2000)
    trained = network(x, y)
    run, module = trainer(max_epochs=50), LightningObjective(NegativeLogLikelihood(trained))
    run.fit(module, loader(x, y, size=32), loader(held_x, held_y))
    branches = torch.stack([held_y - (1 + held_x), held_y + (1 + held_x)])
    true = (-0.5 * (branches / 0.1) ** 2).exp().sum(0) / (2 * 0.1 * math.sqrt(2 * math.pi))
    loss = trained.loss(held_x, held_y).mean()
    assert loss < -true.log().mean() + 0.15
    assert_close(run.callback_metrics["validation_loss"], loss, rtol=1e-5, atol=1e-5)
    assert module.optimizers().param_groups[0]["lr"] == 0.0  # the end of the schedule


@pytest.mark.parametrize("schedule", [{}, {"first_weight_decay": 2.0, "fading": 8.0}])
def test_takes_the_steps_of_fit(schedule):
    """The same optimiser, schedules and default decay: without noise, the same loss after each step."""
    x, y = fork(100)
    weight = torch.rand(100)
    settings = {"validation": 0, "max_epochs": 40, "batch_size": 100, "initialize": False, "progress": False}
    settings["few_rows"] = False
    expected = fit(network(x, y), x, y, sample_weight=weight, **settings, **schedule, **NO_NOISE)
    losses = Losses()
    module = LightningObjective(NegativeLogLikelihood(network(x, y)), **schedule, **NO_NOISE)
    trainer(losses, max_epochs=40).fit(module, loader(x, y, weight / weight.mean()))
    assert_close(losses.epochs, [row["loss"] for row in expected.history], rtol=1e-4, atol=1e-4)
    assert losses.epochs[-1] < losses.epochs[0] - 0.1


def test_noise_fades_in_standardised_units_and_validation_has_none():
    x, y = fork(2000)
    x, y = 10 * x, 3 * y
    objective = Recording(network(x, y))
    run = trainer(max_epochs=5)
    run.fit(LightningObjective(objective, weight_decay=0.0, lr=1e-6), loader(x, y), loader(x, y))
    for step, (noisy_x, noisy_y) in enumerate(objective.seen[True]):
        fade = fading(step, 5, FINAL_NOISE)
        assert_close((noisy_x - x).std(), fade * INPUT_NOISE * x.std(), rtol=0.08, atol=0)
        assert_close((noisy_y - y).std(), fade * TARGET_NOISE * y.std(), rtol=0.08, atol=0)
    assert len(objective.seen[True]) == 5
    assert objective.seen[False]
    assert all(torch.equal(a, x) and torch.equal(b, y) for a, b in objective.seen[False])


def test_weights_multiply_the_losses():
    x, y = fork(50)
    weight = torch.rand(50)
    objective, losses = NegativeLogLikelihood(network(x, y)), Losses()
    objective.network.loss(x, y).mul(weight / weight.mean()).mean().backward()
    expected = [p.grad.clone() for p in objective.parameters()]
    module = LightningObjective(objective, weight_decay=0.0, **NO_NOISE)
    trainer(losses, max_steps=1).fit(module, loader(x, y, weight))
    assert_close(losses.gradients, expected)


def test_only_ratios_of_weights_matter():
    """Batches have other mean weights than all the rows: what counts is the mean of what was trained on so far."""
    x, y = fork(50)
    gradients = {}
    for unit in (1.0, 1000.0):
        objective, losses = NegativeLogLikelihood(network(x, y)), Losses()
        module = LightningObjective(objective, weight_decay=0.0, lr=1e-12, **NO_NOISE)
        batches = loader(x, y, unit * torch.arange(50.0), size=25)
        run = trainer(losses, max_epochs=1, gradient_clip_val=None)
        run.fit(module, batches, batches)
        gradients[unit] = losses.gradients
        expected = (objective.network.loss(x, y) * torch.arange(50.0)).sum() / torch.arange(50.0).sum()
        for name in ("loss", "validation_loss"):
            assert_close(run.callback_metrics[name], expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients[1.0], gradients[1000.0], rtol=1e-4, atol=1e-6)
    # Row 0 has no weight, and is no row.
    weight = torch.arange(25.0, 50.0) / (torch.arange(50.0).sum() / 49)
    objective.zero_grad()
    objective.network.loss(x[25:], y[25:]).mul(weight).mean().backward()
    assert_close(gradients[1.0], [p.grad for p in objective.parameters()], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_padded_sequences_count_by_what_was_observed(flat):
    """Losses and gradients; also where a batch has nothing, and where targets come without their last axis."""
    x, y = fork(80)
    x, y = x.reshape(16, 5, 1), y.reshape(16, 5, 1)
    seen = torch.arange(5) < torch.arange(16).unsqueeze(1) % 6
    seen[8:] = False
    trained = network(x[seen], y[seen])
    y = y.masked_fill(~seen.unsqueeze(-1), torch.nan)
    expected = trained.loss(x, y)[seen].mean()
    rows = x.masked_fill(~seen.unsqueeze(-1), -999.0), y.squeeze(-1) if flat else y
    run, losses = trainer(max_epochs=1), Losses()
    module = LightningObjective(NegativeLogLikelihood(trained), weight_decay=0.0, lr=1e-12, **NO_NOISE)
    run.fit(module, loader(*rows, size=4), loader(*rows, size=8))
    for name in ("loss", "validation_loss"):
        assert_close(run.callback_metrics[name], expected.detach(), rtol=1e-4, atol=1e-4)
    settings = {"max_steps": 1, "gradient_clip_val": None}
    trainer(losses, **settings).fit(LightningObjective(module.objective, weight_decay=0.0, **NO_NOISE), loader(*rows))
    trained = network(x[seen], y[seen])
    trained.loss(x, y)[seen].mean().backward()
    assert_close(losses.gradients, [p.grad for p in trained.parameters()], rtol=1e-3, atol=1e-4)


class SquaredErrors(nn.Module):
    """One loss for each output, 0 where it was not observed."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        mean = self.network(x).mean
        return (mean - torch.where(y.isnan(), mean.detach(), y)).square()


def test_losses_of_outputs_have_the_mean_of_fit():
    """It is over the outputs that were observed, some of which are missing where others are not."""
    x = fork(40)[0]
    y = torch.cat([x, x.square()], 1)
    y[::4, 0], y[1::3, 1] = torch.nan, torch.nan
    torch.manual_seed(0)
    objective = SquaredErrors(MixtureDensityNetwork(1, 2, 3, 16))
    objective.network.initialize_(x, y)
    expected = (objective(x, y).sum() / (~y.isnan()).sum()).item()
    still = {"lr": 1e-12, "weight_decay": 0.0, **NO_NOISE}
    run = trainer(max_epochs=1)
    run.fit(LightningObjective(objective, **still), loader(x, y, size=7))
    assert run.callback_metrics["loss"].item() == pytest.approx(expected, rel=1e-4)
    quiet = {"max_epochs": 1, "batch_size": 7, "validation": 0, "initialize": False, "progress": False}
    result = fit(objective.network, x, y, objective=objective, **quiet, **still)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", [NegativeLogLikelihood, lambda n: WeightedSum([NegativeLogLikelihood(n)], [2.0])])
def test_checkpoint_gives_the_network_again(objective, tmp_path):
    x, y = fork(50)
    module = LightningObjective(objective(network(x, y)), lr=1e-3, weight_decay=0.1)
    run = trainer(ModelCheckpoint(tmp_path), enable_checkpointing=True)
    run.fit(module, loader(x, y))
    path = run.checkpoint_callback.best_model_path
    fresh = MixtureDensityNetwork(1, 1, 3, 16)
    loaded = LightningObjective.load_from_checkpoint(path, objective=objective(fresh))
    assert loaded.network is fresh
    assert torch.equal(fresh.loss(x, y), module.network.loss(x, y))
    assert loaded.hparams == module.hparams
    # Plain numbers and tensors: nothing in the file needs to be executed.
    settings = torch.load(path, weights_only=True)["hyper_parameters"]
    noise = {"input_noise": INPUT_NOISE, "target_noise": TARGET_NOISE, "final_noise": FINAL_NOISE}
    assert settings == {"lr": 1e-3, "weight_decay": 0.1, "first_weight_decay": None, "fading": 3.0, **noise}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, weighted):
    x, y = fork(50)
    rows = (x, y, torch.arange(50.0)) if weighted else (x, y)
    results = []
    for path in (None, tmp_path / "epoch=3.ckpt"):
        every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        module = LightningObjective(NegativeLogLikelihood(network(x, y)), weight_decay=0.1, **NO_NOISE)
        trainer(every, max_epochs=8, enable_checkpointing=True).fit(module, loader(*rows, size=25), ckpt_path=path)
        results.append(module.network.loss(x, y))
    assert torch.equal(*results)


def test_mixed_precision():
    """Products in bfloat16, weights and densities in float32: a loss like that of full precision."""
    x, y = fork(200)
    loss = {}
    for precision in ("32-true", "bf16-mixed"):
        losses, trained = Losses(), network(x, y)
        module = LightningObjective(NegativeLogLikelihood(trained), weight_decay=0.1, **NO_NOISE)
        trainer(losses, precision=precision, max_epochs=60).fit(module, loader(x, y))
        assert all(p.dtype == torch.float32 for p in trained.parameters())
        loss[precision] = losses.epochs[-1]
        assert loss[precision] < losses.epochs[0] - 0.1
    assert loss["bf16-mixed"] != loss["32-true"]
    assert abs(loss["bf16-mixed"] - loss["32-true"]) < 0.05


def test_true_half_precision_rounds_neither_units_nor_targets():
    """Rounded to bfloat16, targets around 5000 would be multiples of 32."""
    x, y = fork(201)
    x, y = 300 + x, 5000 + 5 * y
    loss = {}
    for precision in ("32-true", "bf16-true"):
        losses, trained = Losses(), network(x, y)
        module = LightningObjective(NegativeLogLikelihood(trained), weight_decay=0.1, **NO_NOISE)
        run = trainer(losses, precision=precision, max_epochs=60)
        run.fit(module, loader(x, y), loader(x, y))
        scalers = trained.x_shift, trained.x_scale, trained.head.shift, trained.head.scale
        assert all(scaler.dtype == torch.float32 for scaler in scalers)
        assert_close(trained.head.shift, y.mean(0))
        loss[precision] = trained.loss(x, y).mean().item()
        assert losses.epochs[-1] == pytest.approx(loss[precision], abs=0.1)
    assert all(p.dtype == torch.bfloat16 for p in trained.parameters())
    assert abs(loss["bf16-true"] - loss["32-true"]) < 0.1
    assert run.precision_plugin.convert_input(x).dtype == torch.bfloat16


def test_the_parameter_store_stays_as_it_was():
    """Also with a backbone that registers itself, and with a guide."""
    x, y = fork(50)
    plain = NegativeLogLikelihood(network(x, y, backbone=PyroModule[nn.Linear](1, 16)))
    latent = network(x, y)
    latent.head.linear = PyroModule[nn.Linear](16, 9)
    latent.head.linear.bias = PyroSample(pyro.distributions.Normal(0.0, 1.0).expand([9]).to_event(1))
    bayesian = NegativeElbo(latent, AutoNormal(latent.model), num_data=50)
    bayesian(x, y)  # sets the guide up
    pyro.clear_param_store()
    kept = pyro.param("backbone.weight", torch.zeros(2))
    for objective in (plain, bayesian):
        before = [p.detach().clone() for p in objective.parameters()]
        trainer().fit(LightningObjective(objective, weight_decay=0.0), loader(x, y), loader(x, y))
        assert not any(torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True))
        assert list(pyro.get_param_store().keys()) == ["backbone.weight"]
        assert pyro.param("backbone.weight") is kept


def test_two_trainings_share_no_guide():
    """Their sites have the same names, and the networks are not of one size."""
    x, y = fork(50)
    posteriors = []
    for width in (8, 4):
        latent = MixtureDensityNetwork(1, 1, 2, width)
        latent.initialize_(x, y)
        objective = NegativeElbo(bayesianize(latent), AutoNormal(latent.model), num_data=50)
        objective(x, y)
        posteriors.append(objective)
    assert not list(pyro.get_param_store())
    first, second = posteriors
    trainer().fit(LightningObjective(first, weight_decay=0.0), loader(x, y))
    learned = {name: value.clone() for name, value in first.state_dict().items()}
    trainer().fit(LightningObjective(second, weight_decay=0.0), loader(x, y))
    assert_close(dict(first.state_dict()), learned, rtol=0, atol=0)


class OfPyro(nn.Module):
    """An objective around an ELBO of Pyro."""

    def __init__(self, network, guide):
        super().__init__()
        self.network, self.guide = network, guide

    def forward(self, x, y):
        loss = Trace_ELBO().differentiable_loss(self.network.model, self.guide, x, y)
        return (loss / len(x)).expand(len(x))


def test_parameters_in_the_store_alone_are_refused():
    def guide(x, y=None):
        pyro.sample("head.linear.bias", pyro.distributions.Normal(pyro.param("loc", torch.zeros(6)), 0.1).to_event(1))

    latent = bayesianize(MixtureDensityNetwork(1, 1, 2, 4), layers="head.linear.bias")
    module = LightningObjective(OfPyro(latent, guide), weight_decay=0.0)
    with pytest.raises(ValueError, match=r"expected a module that owns its parameters, got pyro.param for \['loc'\]"):
        trainer().fit(module, loader(*fork(50)))


# Bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr: expected a finite number that is positive, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number that is not negative, got -1.0"),
        ({"input_noise": math.inf}, "input_noise: expected a finite number"),
        ({"target_noise": math.nan}, "target_noise: expected a finite number"),
        ({"final_noise": -0.1}, "final_noise: expected a finite number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LightningObjective(NegativeLogLikelihood(MixtureDensityNetwork(1, 1)), **settings)


def test_bad_objectives():
    one, other = MixtureDensityNetwork(1, 1), MixtureDensityNetwork(1, 1)
    two = WeightedSum([NegativeLogLikelihood(one), NegativeLogLikelihood(other)], [1.0, 1.0])
    for objective in (nn.Linear(1, 1), two, one.loss):
        with pytest.raises(ValueError, match="objective: expected a module with one network"):
            LightningObjective(objective)
    with pytest.raises(ValueError, match="objective: expected parameters to train"):
        LightningObjective(NegativeLogLikelihood(one.requires_grad_(False)))


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        ((torch.zeros(5, 1),), {}, r"batch: expected \(x, y\) or \(x, y, weight\) of tensors, got tuple"),
        ({"x": torch.zeros(5, 1)}, {}, "batch: expected .* got dict"),
        ((torch.zeros(5, 1), torch.zeros(4, 1)), {}, "y: expected shape"),
        ((torch.zeros(5, 1), torch.zeros(5, 1), torch.ones(5, 1)), {}, r"weight: expected shape \(5,\), got \(5, 1\)"),
        ((torch.zeros(5, 1), torch.zeros(5, 1)), {"max_epochs": -1}, "Trainer: expected max_epochs or max_steps"),
    ],
)
def test_bad_batches_and_trainers(batch, settings, message):
    module = LightningObjective(NegativeLogLikelihood(MixtureDensityNetwork(1, 1)), weight_decay=0.1, **NO_NOISE)
    with pytest.raises(ValueError, match=message):
        trainer(**settings).fit(module, Stream(batch))


@pytest.mark.parametrize("settings", [{}, {"max_epochs": -1, "max_steps": 5}])
def test_decay_needs_a_known_number_of_rows(settings):
    x, y = fork(50)
    module = LightningObjective(NegativeLogLikelihood(network(x, y)))
    with pytest.raises(ValueError, match="weight_decay: expected a number, since the number of training rows"):
        trainer(**settings).fit(module, Stream((x, y)))
    trainer(**settings).fit(module, loader(x, y, size=25))
    decays = [group["weight_decay"] for group in module.optimizers().param_groups]
    assert decays == [default_weight_decay(len(x)), 0.0]


def test_without_lightning_the_error_says_what_to_install():
    code = "import sys; sys.modules['lightning'] = None; import pyro_mdn; print('fine'); import pyro_mdn.lightning"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout == "fine\n"
    assert "ImportError: pyro_mdn.lightning needs Lightning: in a checkout pip install '.[lightning]'" in shown.stderr


# Two processes


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning says it where a part stays so
def test_networks_in_evaluation_mode_are_trained_in_training_mode(whole):
    """As from ``load``; a part alone that is in evaluation mode stays in it, which is Lightning's rule."""
    x, y = fork(64)
    trained, seen = network(x, y), set()
    trained.backbone.append(nn.Dropout(0.5))
    (trained if whole else trained.backbone[-1]).eval()
    trained.backbone[-1].register_forward_hook(lambda module, inputs, out: seen.add(module.training))
    trainer(max_epochs=1).fit(LightningObjective(NegativeLogLikelihood(trained)), loader(x, y, size=32))
    assert seen == {whole}


def test_a_network_without_scalers_is_named_once():
    x, y = fork(64)
    module = LightningObjective(NegativeLogLikelihood(MixtureDensityNetwork(1, 1, 3, 8)))
    with pytest.warns(UserWarning, match=r"expected scalers from network\.initialize_\(x, y\).*y of up to") as caught:
        trainer(max_epochs=2).fit(module, loader(x, 1e5 + 1e4 * y, size=32))
    assert sum("initialize_" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("initialized", [True, False])
def test_scalers_are_not_needed_where_data_are_standardised(initialized):
    """Warnings are errors here."""
    x, y = fork(64)
    plain = MixtureDensityNetwork(1, 1, 3, 8)
    y = 1e5 + 1e4 * y if initialized else y
    if initialized:
        plain.initialize_(x, y)
    trainer(max_epochs=1).fit(LightningObjective(NegativeLogLikelihood(plain)), loader(x, y, size=32))


UNEQUAL = """
import os, sys
import torch
sys.path.insert(0, {tests!r})
from test_lightning import *

torch.manual_seed(0)
(x, y), rank = fork(8), int(os.environ.get("LOCAL_RANK", 0))
share = slice(0, 3) if rank == 0 else slice(3, 8)
batch, losses = loader(x[share], y[share]), Losses()
objective = NegativeLogLikelihood(network(x, y))
objective(x, y).mean().backward()
expected, loss = [p.grad.clone() for p in objective.parameters()], objective(x, y).mean().item()
module = LightningObjective(objective, weight_decay=0.0, lr=1e-12, **NO_NOISE)
settings = dict(max_steps=1, strategy="ddp", devices=2, use_distributed_sampler=False, gradient_clip_val=None)
run = trainer(losses, **settings)
run.fit(module, batch, batch)
assert_close(losses.gradients, expected, rtol=1e-4, atol=1e-6)
for name in ("loss", "validation_loss"):
    assert_close(run.callback_metrics[name].item(), loss, rtol=1e-4, atol=1e-5)
objective = Recording(network(x, y))
torch.manual_seed(0)
trainer(**settings).fit(LightningObjective(objective, weight_decay=0.0), batch)
noise = objective.seen[True][0][0][:3] - x[share][:3]
both = [torch.empty_like(noise) for _ in range(2)]
torch.distributed.all_gather(both, noise)
assert not torch.isclose(both[0], both[1]).any(), both
Path(f"rank_{{rank}}").touch()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_script(path, *arguments):
    return subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, cwd=path.parent)


def test_processes_with_unequally_many_rows(tmp_path):
    """Gradients and logged losses are means over rows, not over processes; noise differs by process."""
    path = tmp_path / "unequal.py"
    path.write_text(UNEQUAL.format(tests=str(Path(__file__).parent)))
    shown = run_script(path)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "rank_0").exists()
    assert (tmp_path / "rank_1").exists(), shown.stderr


def test_two_processes_have_the_gradients_of_one(tmp_path):
    shown = run_script(EXAMPLE, "--smoke", "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    difference = re.findall(r"largest relative difference (\S+)", shown.stdout)
    nll = re.findall(r"^(?:one|two) process(?:es)? +(\S+)", shown.stdout, flags=re.MULTILINE)
    assert len(difference) == 1, shown.stdout  # the first process alone speaks
    assert float(difference[0]) < 1e-5
    assert_close(float(nll[0]), float(nll[1]), rtol=0, atol=1e-3)
    assert MixtureDensityNetwork.load(tmp_path / "distributed.safetensors").n_components == 3
