"""Checkpoints: a run that was killed goes on bit for bit; what is damaged or foreign is refused."""

import copy
import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import save_file
from torch import nn

from pyro_mdn import (
    ContinuousRankedProbability,
    DeepEnsemble,
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    bayesianize,
    fit,
)
from pyro_mdn.support import tensor_files
from pyro_mdn.support.fingerprint import FORMS, described

SETTINGS = {"max_epochs": 6, "batch_size": 32, "few_rows": False, "checkpoint_every": 2, "seed": 0, "progress": False}


def data(n=120):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator)
    return x, x.square() + 0.1 * torch.randn(n, 1, generator=generator)


def network(**settings):
    torch.manual_seed(0)
    return MixtureDensityNetwork(1, 1, 2, 8, **settings)


def states_equal(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


class Stop(Exception):
    pass


def stop_after(epoch):
    def callback(result):
        if len(result.history) == epoch:
            raise Stop

    return callback


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """20 processes killed at random moments by SIGKILL: plain, dropout and batch norm, refit, guide, gaps."""
    command = [sys.executable, str(Path(__file__).parent / "killed.py"), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 20
    assert all(line.endswith(" same") for line in lines), done.stdout
    assert sum(" resumed " in line for line in lines) >= 15, done.stdout


@pytest.mark.parametrize("epoch", [3, 5])
def test_seed_and_history_come_from_the_checkpoint(tmp_path, epoch):
    x, y = data()
    settings = {**SETTINGS, "seed": None}
    torch.manual_seed(5)
    whole = network()
    torch.manual_seed(5)
    expected = fit(whole, x, y, **settings)
    part = network()
    torch.manual_seed(5)
    with pytest.raises(Stop):
        fit(part, x, y, checkpoint=tmp_path / "run", callbacks=[stop_after(epoch)], **settings)
    resumed = network()
    result = fit(resumed, x, y, checkpoint=tmp_path / "run", resume=True, **settings)
    assert states_equal(resumed, whole)
    assert result.history == expected.history
    assert result.best_epoch == expected.best_epoch


def test_a_finished_run_is_only_read(tmp_path):
    x, y = data()
    first, second = network(), network()
    expected = fit(first, x, y, checkpoint=tmp_path / "run", **SETTINGS)
    written = (tmp_path / "run").stat()
    calls = []
    result = fit(second, x, y, checkpoint=tmp_path / "run", resume=True, callbacks=[calls.append], **SETTINGS)
    assert states_equal(first, second)
    assert not calls
    assert result.history == expected.history
    assert result.component_weights == expected.component_weights
    assert (tmp_path / "run").stat() == written
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_stopped_by_a_callback_stays_stopped(tmp_path):
    x, y = data()
    first, second = network(), network()

    def enough(result):
        return len(result.history) == 2

    result = fit(first, x, y, checkpoint=tmp_path / "run", callbacks=[enough], **SETTINGS)
    assert result.stopped_early
    again = fit(second, x, y, checkpoint=tmp_path / "run", resume=True, **SETTINGS)
    assert again.stopped_early
    assert len(again.history) == 2
    assert states_equal(first, second)


def test_without_resume_a_checkpoint_is_replaced(tmp_path):
    x, y = data()
    first, second = network(), network()
    fit(first, x, y, checkpoint=tmp_path / "run", **SETTINGS)
    fit(second, x, y, checkpoint=tmp_path / "run", **{**SETTINGS, "seed": 1})
    _, tensors = tensor_files.read_tensors(tmp_path / "run")
    assert torch.equal(tensors["best.network.head.linear.weight"], second.head.linear.weight)
    assert not states_equal(first, second)


CHANGES = {
    "seed": lambda s: s.update(seed=7),
    "settings": lambda s: s.update(lr=0.1),
    "data": lambda s: s.update(y=s["y"] + 1e-3),
    "network": lambda s: s.update(network=MixtureDensityNetwork(1, 1, 3, 8)),
    "refit": lambda s: s.update(refit=True),
    "batches": lambda s: s.update(batch_size=60),
    "objective": lambda s: s.update(objective=ContinuousRankedProbability(s["network"])),
    "validation": lambda s: s.update(validation=(s["x"][:9], s["y"][:9])),
}


@pytest.mark.parametrize("what", CHANGES)
def test_checkpoints_of_other_runs_are_refused(tmp_path, what):
    x, y = data()
    fit(network(), x, y, checkpoint=tmp_path / "run", **SETTINGS)
    content = (tmp_path / "run").read_bytes()
    call = {"network": network(), "x": x, "y": y, **SETTINGS}
    CHANGES[what](call)
    before = copy.deepcopy(call["network"])
    with pytest.raises(ValueError, match=rf"expected a checkpoint of this run, .*{what}"):
        fit(checkpoint=tmp_path / "run", resume=True, **call)
    assert (tmp_path / "run").read_bytes() == content
    assert states_equal(call["network"], before)


def test_a_noise_model_of_another_floor_is_another_run(tmp_path):
    x, y = data()
    fit(network(), x, y, checkpoint=tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match="expected a checkpoint of this run"):
        fit(network(noise=Diagonal(min_scale=0.1)), x, y, checkpoint=tmp_path / "run", resume=True, **SETTINGS)


class Tempered(nn.Module):
    """Objective with settings that its printout does not show."""

    def __init__(self, network, setting):
        super().__init__()
        self.network, self.setting, self.calls = network, setting, 0

    def forward(self, x, y):
        self.calls += 1
        self.last_losses = self.network.loss(x, y)
        power = self.setting if isinstance(self.setting, float) else float(self.setting[0])
        return self.last_losses * power


def tempered(setting, **settings):
    return Tempered(network(**settings), setting)


@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), ([1.0], [2.0]), (torch.ones(1), torch.zeros(1)), (1.0, [1.0])])
def test_objectives_of_other_settings_are_of_another_run(tmp_path, a, b):
    (x, y), first, other = data(), tempered(a), tempered(b)
    fit(first.network, x, y, objective=first, checkpoint=tmp_path / "run", **SETTINGS)
    before = copy.deepcopy(other.network)
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run, .*objective\.setting"):
        fit(other.network, x, y, objective=other, checkpoint=tmp_path / "run", resume=True, **SETTINGS)
    assert states_equal(other.network, before)


@pytest.mark.parametrize("change", ["points", "buffer", "function", "hook"])
def test_settings_of_every_kind_are_of_the_run(tmp_path, change):
    x, y = data()

    def make(changed):
        backbone = nn.Sequential(nn.Linear(1, 8), nn.GELU())
        backbone[1].forward = torch.tanh if changed and change == "function" else torch.sin
        if changed and change == "hook":
            backbone.register_forward_hook(lambda *args: 2 * args[-1])
        model = network(backbone=backbone)
        cell, points = 1 + 1.0 * (changed and change == "buffer"), 8 + 1 * (changed and change == "points")
        return model, NegativeLogLikelihood(model, torch.full((1,), cell), points)

    (first, objective), (other, another) = make(False), make(True)
    fit(first, x, y, objective=objective, checkpoint=tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match="expected a checkpoint of this run"):
        fit(other, x, y, objective=another, checkpoint=tmp_path / "run", resume=True, **SETTINGS)


@dataclasses.dataclass(frozen=True)
class Named(Diagonal):
    name: str = ""


def test_checkpoints_hold_no_values_of_attributes(tmp_path):
    (x, y), path, secret = data(), tmp_path / "run", "hf_secret"
    objective = tempered(1.0, noise=Named(name=secret))
    objective.token = secret
    fit(objective.network, x, y, objective=objective, checkpoint=path, **SETTINGS)
    assert secret.encode() not in path.read_bytes()


SCRIPT = """
class Backbone(Sequential):
    def __init__(self):
        super().__init__(Linear(1, args["width"]), GELU())

    def forward(self, x):
        return {factor} * super(Backbone, self).forward(x)
"""


def test_a_script_may_have_other_arguments_when_it_resumes(tmp_path):
    def scripted(factor=1, **arguments):
        names = {"__name__": "__main__", **vars(nn), "args": {"width": 8, **arguments}}
        exec(SCRIPT.format(factor=factor), names)
        return network(backbone=names["Backbone"]())

    (x, y), path = data(), tmp_path / "run"
    fit(scripted(), x, y, checkpoint=path, **SETTINGS)
    fit(scripted(resume=True), x, y, checkpoint=path, resume=True, **SETTINGS)
    with pytest.raises(ValueError, match=r"this run, .*backbone: Backbone\.forward.*of another"):
        fit(scripted(2), x, y, checkpoint=path, resume=True, **SETTINGS)


@pytest.mark.parametrize("same", ["new", "used"])
@pytest.mark.parametrize("refit", [False, True])
def test_what_training_changes_is_no_setting(tmp_path, refit, same):
    """Counters, and tensors that are left behind, by objects that are built anew or were trained in part."""
    (x, y), settings = data(), {**SETTINGS, "validation": 0.2, "refit": refit}
    whole, part = tempered(2.0), tempered(2.0)
    expected = fit(whole.network, x, y, objective=whole, **settings)
    with pytest.raises(Stop):
        fit(part.network, x, y, objective=part, checkpoint=tmp_path / "run", callbacks=[stop_after(5)], **settings)
    resumed = part if same == "used" else tempered(2.0)
    result = fit(resumed.network, x, y, objective=resumed, checkpoint=tmp_path / "run", resume=True, **settings)
    assert states_equal(resumed.network, whole.network)
    assert result.history == expected.history


# Files of commit d591889, which had numbers in noise models as they were given, integers too. Networks are
# MixtureDensityNetwork(1, 1, 1, [2], noise=) after torch.manual_seed(0), with Fixed(1), Fixed(0.3), Full(min_scale=1);
# the checkpoint is that of resume_old with the last of these, without resume, that a callback stopped in epoch 2.
OLD = Path(__file__).parent / "data" / "noise_d591889"
OLD_NOISE = {"fixed_1": Fixed(1), "fixed_03": Fixed(0.3), "full_1": Full(min_scale=1)}


@pytest.mark.parametrize("name", OLD_NOISE)
def test_files_of_before_noise_models_had_floats(name):
    loaded = MixtureDensityNetwork.load(OLD / f"{name}.safetensors")
    assert loaded.head.noise == OLD_NOISE[name]


def resume_old(path, noise):
    x = torch.arange(-8.0, 8.0).unsqueeze(-1) / 8
    settings = {"max_epochs": 2, "batch_size": 16, "validation": 0, "target_noise": 0.0, "checkpoint_every": 1}
    settings["few_rows"] = False  # as it always was then
    trained = MixtureDensityNetwork(1, 1, 1, [2], noise=noise)
    return fit(trained, x, x**2, checkpoint=path, resume=True, seed=0, progress=False, **settings)


def test_runs_of_before_noise_models_had_floats(tmp_path):
    for noise in (Full(min_scale=2), Full(min_scale=1, tied=True), Diagonal(min_scale=1)):
        with pytest.raises(ValueError, match=r"expected a checkpoint of this run.*head\.noise"):
            resume_old(OLD / "full_1.checkpoint", noise)
    path = Path(shutil.copy(OLD / "full_1.checkpoint", tmp_path))
    before = tensor_files.read_tensors(path)[0]["progress"]["result"]["history"]
    result = resume_old(path, Full(min_scale=1))
    assert len(result.history) == 2
    assert result.history[:1] == before
    assert resume_old(path, Full(min_scale=1.0)).best_loss == result.best_loss  # as it was written now
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run.*head\.noise"):
        resume_old(path, Full(min_scale=2))


# Files of commit 0654dd6, which had all modules in one folder: networks MixtureDensityNetwork(2, 2, 2, [3]) in the
# units of ``flat_data()``, and runs of three epochs that a callback ended after the first.
FLAT = Path(__file__).parent / "data" / "flat_modules"
EXPECTED = json.loads((FLAT / "expected.json").read_text())


def flat_data():
    x = torch.arange(-6.0, 6.0).reshape(-1, 2) / 6
    return x, torch.stack([x.sum(1), x.prod(1)], 1)


def flat_network(seed=0):
    torch.manual_seed(seed)
    made = MixtureDensityNetwork(2, 2, 2, [3])
    made.initialize_(*flat_data())
    return made


@pytest.mark.parametrize("name", [path.stem for path in FLAT.glob("*.safetensors")])
def test_files_of_before_packages(name):
    x, y = flat_data()
    if name == "ensemble":
        losses = -DeepEnsemble.load(FLAT / "ensemble.safetensors")(x).log_prob(y)
    else:
        backbone = nn.Sequential(nn.Linear(2, 3), nn.GELU()) if name == "backbone" else None
        losses = MixtureDensityNetwork.load(FLAT / f"{name}.safetensors", backbone=backbone).loss(x, y)
    assert torch.allclose(losses, torch.tensor(EXPECTED[name]), atol=1e-5)


@pytest.mark.parametrize("name", ["network", "ensemble", "guide"])
def test_runs_of_before_packages_go_on(tmp_path, name):
    path = Path(shutil.copy(FLAT / f"{name}.checkpoint", tmp_path))
    settings = {"max_epochs": 3, "batch_size": 6, "validation": 0, "few_rows": False, "seed": 0, "progress": False}
    model = DeepEnsemble([flat_network(0), flat_network(1)]) if name == "ensemble" else flat_network()
    if name == "guide":
        bayesianize(model, prior_scale=1.0)
        settings["guide"] = AutoNormal
    before = tensor_files.read_tensors(path)[0]["progress"]["result"]["history"]
    result = fit(model, *flat_data(), checkpoint=path, resume=True, **settings)
    assert result.history[: len(before)] == before
    assert [row["loss"] for row in result.history] == pytest.approx(EXPECTED[f"{name}.checkpoint"], abs=1e-4)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("noise", [Fixed(1), Fixed(0.3), Diagonal(min_scale=1), LowRank(1, min_scale=2)], ids=repr)
def test_every_form_of_earlier_versions_is_known(tmp_path, noise, form, refit):
    """Also in the file of a second training, and of files that are written on."""
    (x, y), settings = data(), {**SETTINGS, "validation": 0.2, "refit": refit}
    network(noise=noise).save(tmp_path / "model")
    fit(network(noise=noise), x, y, checkpoint=tmp_path / "run", **settings)
    for name in ("model", "run", "run.refit") if refit else ("model", "run"):
        restate(tmp_path / name, network(noise=noise), form)
    MixtureDensityNetwork.load(tmp_path / "model")
    for _ in range(2):
        fit(network(noise=noise), x, y, checkpoint=tmp_path / "run", resume=True, **settings)
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run.*head\.noise"):
        fit(network(noise=Isotropic()), x, y, checkpoint=tmp_path / "run", resume=True, **settings)


def restate(path, model, form):
    """Have a file describe this model in one of the forms of earlier versions."""
    config, tensors = tensor_files.read_tensors(path)
    if "described" in config:
        key, modules, settings = "described", {"network": model, "objective": NegativeLogLikelihood(model)}, {}
    else:
        key, modules, settings = "structure", {"network": model}, {"buffers": False, "code": False}
    assert config[key] == described(**modules, **settings, values=False)
    config[key] = described(**modules, **settings, values=False, form=form)
    tensor_files.write_tensors(path, config, tensors)


def test_files_and_objects_that_cannot_be_compared_are_named(tmp_path):
    (x, y), path = data(), tmp_path / "run"
    fit(network(), x, y, checkpoint=path, **SETTINGS)
    config, tensors = tensor_files.read_tensors(path)
    del config["described"], config["changing"]
    others = {"network": "", "objective": ""}, {}
    for older, run in zip(({}, {"modules": {"network": "Other()"}, "changing": []}), others, strict=True):
        tensor_files.write_tensors(path, {**config, **older, "run": {**config["run"], **run}}, tensors)
        with pytest.warns(UserWarning, match="cannot tell whether .*the file does not describe them"):
            fit(network(), x, y, checkpoint=path, resume=True, **SETTINGS)
    path.unlink()
    locked = tempered(1.0)
    locked.lock = threading.Lock()
    fit(locked.network, x, y, objective=locked, checkpoint=path, **SETTINGS)
    with pytest.warns(UserWarning, match=r"cannot tell whether .*objective\.lock"):
        fit(locked.network, x, y, objective=locked, checkpoint=path, resume=True, **SETTINGS)


def test_backbones_that_look_alike_are_told_apart_by_their_tensors(tmp_path):
    class Backbone(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 8))

        def forward(self, x):
            return x @ self.weight[:1]

    x, y = data()
    fit(network(backbone=Backbone(1)), x, y, checkpoint=tmp_path / "run", **SETTINGS)
    untouched = network(backbone=Backbone(2))
    before = copy.deepcopy(untouched)
    with pytest.raises(ValueError, match=r"checkpoint: expected tensors of this model, .*backbone.weight"):
        fit(untouched, x, y, checkpoint=tmp_path / "run", resume=True, **SETTINGS)
    assert states_equal(untouched, before)


@pytest.mark.parametrize("kind", ["empty", "noise", "pickle", "model", "foreign safetensors", "truncated"])
def test_files_that_are_no_checkpoints_are_refused_and_stay(tmp_path, kind):
    path, (x, y) = tmp_path / "run", data()
    fit(network(), x, y, checkpoint=path, **SETTINGS)
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif kind == "pickle":
        torch.save(network().state_dict(), path)
    elif kind == "model":
        network().save(path)
    elif kind == "foreign safetensors":
        save_file({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(content[: len(content) // 2])
    content = path.read_bytes()
    untouched = network()
    with pytest.raises(ValueError, match="run: expected"):
        fit(untouched, x, y, checkpoint=path, resume=True, **SETTINGS)
    assert path.read_bytes() == content
    assert states_equal(untouched, network())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, and a model."""
    folder = tmp_path_factory.mktemp("files")
    trained = network()
    fit(trained, *data(), checkpoint=folder / "run", **SETTINGS)
    trained.save(folder / "model")
    return folder


@pytest.mark.parametrize("kind", ["run", "model"])
def test_fuzzed_files_never_load(files, tmp_path, kind):
    """250 mutations of each: bits flipped, bytes overwritten, added, cut out or off."""
    content = (files / kind).read_bytes()
    randomness = random.Random(0)
    path = tmp_path / "mutant"
    for i in range(250):
        path.write_bytes(mutate(content, randomness, i % 6))
        if kind == "run":
            with pytest.raises(ValueError, match="expected"):
                fit(network(), *data(), checkpoint=path, resume=True, **SETTINGS)
        else:
            with pytest.raises(ValueError, match="expected"):
                MixtureDensityNetwork.load(path)


def mutate(content, randomness, kind):
    """Return other bytes than ``content``."""
    changed = bytearray(content)
    # Half of the changes hit the header, which is short.
    end = len(content) if randomness.random() < 0.5 else 600
    at = randomness.randrange(end)
    if kind == 0:
        changed[at] ^= 1 << randomness.randrange(8)
    elif kind == 1:
        some = randomness.randbytes(16)
        changed[at : at + 16] = some if bytes(changed[at : at + 16]) != some else bytes(16)
    elif kind == 2:
        changed[at:at] = randomness.randbytes(randomness.randrange(1, 9))
    elif kind == 3:
        del changed[at : at + randomness.randrange(1, 9)]
    elif kind == 4:
        del changed[at:]
    else:
        changed += changed[:at] or b"x"
    return bytes(changed)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_training_goes_on(tmp_path, monkeypatch, caplog):
    x, y = data()
    whole = network()
    fit(whole, x, y, **SETTINGS)
    part, path = network(), tmp_path / "run"
    with pytest.raises(Stop):
        fit(part, x, y, checkpoint=path, callbacks=[stop_after(3)], **SETTINGS)
    content = path.read_bytes()

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    resumed = network()
    with caplog.at_level(logging.ERROR, "pyro_mdn"):
        fit(resumed, x, y, checkpoint=path, resume=True, **SETTINGS)
    assert "the checkpoint was not written, the last one stays: [Errno 28] No space left" in caplog.text
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["run"]
    assert states_equal(resumed, whole)


def test_the_refit_of_an_earlier_run_is_not_in_the_way(tmp_path):
    x, y = data()
    settings = {**SETTINGS, "checkpoint": tmp_path / "run", "refit": True}
    fit(network(), x, y, **settings)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.refit"]
    settings["seed"] = 1
    whole, part, resumed = network(), network(), network()
    fit(whole, x, y, **{**settings, "checkpoint": None})
    with pytest.raises(Stop):
        fit(part, x, y, callbacks=[stop_after(3)], **settings)
    fit(resumed, x, y, resume=True, **settings)
    assert states_equal(resumed, whole)


@pytest.mark.parametrize("refit", [False, True])
def test_resume_of_a_run_that_reinitialized(tmp_path, refit):
    """Bit for bit, whatever weights the network had; whether weights were drawn anew tells runs apart."""
    x, y = data()
    settings = {**SETTINGS, "reinitialize": True, "refit": refit}
    whole, part, resumed = network(), network(), MixtureDensityNetwork(1, 1, 2, 8, seed=7)
    fit(whole, x, y, **settings)
    with pytest.raises(Stop):
        fit(part, x, y, checkpoint=tmp_path / "run", callbacks=[stop_after(5)], **settings)
    with pytest.raises(ValueError, match=r"'initialize': True.* got one of another, .*'anew'"):
        fit(network(), x, y, checkpoint=tmp_path / "run", resume=True, **{**settings, "reinitialize": False})
    fit(resumed, x, y, checkpoint=tmp_path / "run", resume=True, **settings)
    assert states_equal(resumed, whole)


def test_resume_needs_a_file_name():
    with pytest.raises(ValueError, match="resume: expected checkpoint="):
        fit(network(), *data(), resume=True)


def test_interrupted_runs_keep_the_best_weights_and_the_checkpoint(tmp_path, caplog):
    x, y = data()
    interrupted, path = network(), tmp_path / "run"

    def press(result):
        if len(result.history) == 3:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "pyro_mdn"):
        result = fit(interrupted, x, y, checkpoint=path, callbacks=[press], **SETTINGS)
    assert result.interrupted
    assert len(result.history) == 3
    assert "interrupted after epoch 3" in caplog.text
    assert interrupted.loss(x, y).isfinite().all()
    resumed, whole = network(), network()
    again = fit(resumed, x, y, checkpoint=path, resume=True, **SETTINGS)
    fit(whole, x, y, **SETTINGS)
    assert not again.interrupted
    assert states_equal(resumed, whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_interrupted_refit_gives_the_weights_of_the_search(tmp_path, error):
    x, y = data()
    searched, interrupted = network(), network()
    found = fit(searched, x, y, **SETTINGS)
    calls = []

    def press(result):
        calls.append(result)
        if len(calls) == len(found.history) + 2:
            raise error

    settings = {**SETTINGS, "refit": True, "callbacks": [press]}
    if error is Stop:
        with pytest.raises(Stop):
            fit(interrupted, x, y, **settings)
    else:
        assert fit(interrupted, x, y, **settings).interrupted
    assert states_equal(interrupted, searched)
