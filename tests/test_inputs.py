"""What inputs go through before the backbone: standardised, transformed by column, or left as they are."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    Angle,
    DeepEnsemble,
    Identity,
    Log,
    Logit,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    Standardize,
    TargetTransform,
    bayesianize,
    fit,
    laplace,
    posterior_predictive,
    starting_weights,
    to_inference_data,
)
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.training.schedules import blur_inputs

QUICK = {"max_epochs": 2, "progress": False, "seed": 0}
COLUMNS = ["log", "standardize", "identity"]


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(-2), nn.Linear(8, 6), nn.Tanh())


def coded(**settings):
    return MixtureDensityNetwork(2, 1, 2, 6, backbone=embedding(), input_transform="identity", **settings)


def codes(rows=40):
    x = torch.randint(0, 5, (rows, 2), generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(1))


def columns(rows=60):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 3, generator=generator).double()
    x = torch.stack([x[:, 0].exp(), 1000 + 50 * x[:, 1], 0.2 * x[:, 2]], 1)
    return x, x[:, :1].log() + 0.1 * torch.randn(rows, 1, generator=generator).double()


class Seeing(nn.Linear):
    """A layer that keeps all inputs it has seen."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.__dict__["seen"] = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x.flatten(1).to(self.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64])
def test_inputs_are_left_as_they_are(dtype):
    x = torch.arange(24).reshape(4, 3, 2).to(dtype)
    network = MixtureDensityNetwork((3, 2), 1, 2, 4, backbone=Seeing(6, 4), input_transform=Identity())
    network(x)
    (seen,) = network.backbone.seen
    assert torch.equal(seen.double(), x.double())
    assert seen.dtype == (torch.float32 if dtype.is_floating_point else dtype)


def test_images_reach_a_backbone_as_they_are_also_in_training():
    images = torch.rand(30, 3, 4, 4)
    y = images.mean((1, 2, 3)).unsqueeze(-1)
    network = MixtureDensityNetwork((3, 4, 4), 1, 2, 4, backbone=Seeing(48, 4), input_transform="identity")
    fit(network, images, y, validation=0, **QUICK)
    assert rows_of(torch.cat(network.backbone.seen)) == rows_of(images)
    assert bool((network.x_shift == 0).all())
    assert bool((network.x_scale == 1).all())
    fit(network, images, y, input_noise=0.1, validation=0, **QUICK)  # noise in the units of x, if it is asked for
    assert len(rows_of(torch.cat(network.backbone.seen))) > 2 * len(images)


def rows_of(images):
    return {tuple(row.flatten().tolist()) for row in images}


def test_codes_in_every_container():
    x, y = codes()
    network = coded(seed=1)
    fit(network, x, y, **QUICK)
    expected = network.predict(x).mean
    frame = pytest.importorskip("pandas").DataFrame(x.numpy(), columns=["a", "b"])
    for given in (x.numpy(), x.tolist(), x.to(torch.int32), frame, list(x), x.numpy().astype(np.uint16)):
        assert np.array_equal(network.predict(given).mean, expected)
    histories = []
    for given in (x, x.numpy(), frame, x.tolist()):
        network = coded(seed=1)
        histories.append(fit(network, given, y, **QUICK).history)
    assert all(history == histories[0] for history in histories)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    fit(network, loader, validation=(x[:9], y[:9]), **QUICK)


def test_codes_everywhere(tmp_path):
    x, y = codes()
    network = coded(seed=1)
    fit(network, x, y, **QUICK)
    network.save(tmp_path / "network")
    again = MixtureDensityNetwork.load(tmp_path / "network", backbone=embedding())
    assert torch.equal(again.loss(x, y), network.eval().loss(x, y))
    ensemble = DeepEnsemble(network, 2, seed=0)
    fit(ensemble, x, y, **QUICK)
    for i in range(2):
        assert_close(ensemble.members(x)[i].mean, ensemble.member(i)(x).mean)
    ensemble.save(tmp_path / "ensemble")
    assert_close(DeepEnsemble.load(tmp_path / "ensemble", backbone=embedding())(x).mean, ensemble(x).mean)
    groups = to_inference_data(network, x=x, y=y)
    assert np.array_equal(groups["constant_data"]["x"].to_numpy(), x.numpy())
    bayesianize(network, layers="head")
    assert posterior_predictive(network, laplace(network, x, y, progress=False), x, num_samples=3).batch_shape == (
        3,
        40,
    )
    fit(network, x, y, guide=AutoNormal, **QUICK)


def test_hidden_layers_get_floating_point_whatever_comes():
    network = MixtureDensityNetwork(2, 1, 2, 4, input_transform="identity")
    x, y = codes()
    fit(network, x.tolist(), y, **QUICK)
    assert_close(network(x.tolist()).mean, network(x.float()).mean)
    assert_close(network.features(x), network.backbone(x.float()))


def test_each_column_has_its_transform():
    x, y = columns()
    network = MixtureDensityNetwork(3, 1, 2, 4, input_transform=COLUMNS).double()
    network.initialize_(x, y)
    expected = torch.stack([scipy_standardized(x[:, 0].log()), scipy_standardized(x[:, 1]), x[:, 2]], 1)
    assert_close(network.features(x), network.backbone(expected), rtol=1e-6, atol=1e-6)
    assert_close(network.input_units.standardize(x), expected, rtol=1e-5, atol=1e-5)
    assert network.x_scale[2] == 1
    assert network.x_shift[2] == 0


def scipy_standardized(column):
    return torch.from_numpy(scipy.stats.zscore(column.numpy()))


@pytest.mark.parametrize("given", ["log", "asinh", "yeo_johnson", "softplus", "identity", COLUMNS], ids=str)
def test_transforms_of_inputs_everywhere(given, tmp_path):
    x, y = columns()
    x, y = (x if isinstance(given, list) else x[:, :1]).float(), y.float()
    network = MixtureDensityNetwork(x.shape[1], 1, 2, 4, input_transform=given, seed=0)
    fit(network, x, y, **QUICK)
    network.save(tmp_path / "network")
    again = MixtureDensityNetwork.load(tmp_path / "network")
    assert torch.equal(again(x).mean, network.eval()(x).mean)
    assert again.input_transform == network.input_transform
    for changed in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(changed(x).mean, again(x).mean)
    ensemble = DeepEnsemble(network, 2, seed=0)
    fit(ensemble, x, y, **QUICK)
    for i in range(2):
        assert_close(ensemble.members(x)[i].mean, ensemble.member(i)(x).mean)
    half = copy.deepcopy(network).half()
    assert_close(half(x).mean, again(x).mean, rtol=0.1, atol=0.1)
    assert {half.x_shift.dtype, half.input_units.standardize(x).dtype} == {torch.float32}
    scaled = network.input_units.standardize(x)
    noisy = blur_inputs(x.repeat(500, 1), network.input_units, 0.1 * network.input_units.unit)
    moved = network.input_units.standardize(noisy) - scaled.repeat(500, 1)
    assert_close(moved.std(0), torch.full((x.shape[1],), 0.1), rtol=0.03, atol=0)
    draws = {name: tensor.unsqueeze(0) for name, tensor in starting_weights(bayesianize(network)).items()}
    assert_close(posterior_predictive(network, draws, x).mean[0], again(x).mean)


def test_an_input_outside_of_the_support_is_named():
    x, y = columns()
    network = MixtureDensityNetwork(3, 1, 2, 4, input_transform=COLUMNS)
    network.initialize_(x, y)
    before = copy.deepcopy(network.state_dict())
    x[7, 0] = 0.0
    for call in (lambda: fit(network, x, y, **QUICK), lambda: network(x), lambda: network.predict(x)):
        with pytest.raises(ValueError, match=r"x: expected numbers between 0 and inf, got 0 in row 7, column 0"):
            call()
    frame = pd.DataFrame(x.numpy(), columns=["a", "b", "c"], index=[f"day {i}" for i in range(len(x))])
    with pytest.raises(ValueError, match=r"got 0 in row 7 \(index 'day 7'\), column 'a'"):
        network.predict(frame, chunk_size=3)  # in the third part of the rows
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    x[7, 0] = torch.nan
    with pytest.raises(ValueError, match="x: expected finite numbers, got nan in row 7, column 0"):
        network(x)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        (2, "angle", "input_transform: expected none of angles, got Angle.*: give their sine and cosine"),
        (2, ["log", Angle(360, low=0)], "input_transform: expected none of angles"),
        (2, "counts", "input_transform: expected one of real numbers, got Counts"),
        (2, ["log"], "input_transform: expected 2 transforms, one for each column, got 1"),
        (2, "none", "input_transform: expected a TargetTransform or one of .*, got 'none'"),
        (2, 3, "input_transform: expected a TargetTransform or a name, got 3"),
        ((3, 4, 4), Log(), r"expected 'standardize' or 'identity' for inputs of shape \(3, 4, 4\), got Log"),
    ],
)
def test_other_transforms_are_refused(shape, given, message):
    with pytest.raises(ValueError, match=message):
        MixtureDensityNetwork(shape, 1, backbone=nn.Identity(), input_transform=given)


def test_the_default_is_what_it_was():
    """Names of tensors, configurations and pickled networks are those of before there were transforms of inputs."""
    network = MixtureDensityNetwork(2, 1, 2, 4)
    assert {name for name in network.state_dict() if name.startswith("x_")} == {"x_shift", "x_scale"}
    assert "input_transform" not in network.config()
    assert network.input_transform == Standardize()
    for name in ("input_transform", "keeps_integers"):
        del network.__dict__[name]
    x, y = columns()
    fit(network, x[:, 1:], y, **QUICK)


@pytest.mark.parametrize("given", ["identity", "log", COLUMNS, None], ids=str)
def test_the_estimator_of_scikit_learn_takes_them(given):
    x, y = (t.numpy() for t in columns())
    x = x if isinstance(given, list) else x[:, :1]
    model = MDNRegressor(2, 4, max_epochs=2, validation=0, random_state=0, input_transform=given).fit(x, y[:, 0])
    network = model.network_
    assert_close(network(torch.from_numpy(x)).mean[:, 0], torch.from_numpy(model.predict(x)))
    if given == "identity":
        assert network.x_shift == 0
    if given == "log":
        assert_close(network.x_shift, torch.from_numpy(np.log(x).mean(0)), rtol=1e-5, atol=1e-5)


def test_the_module_of_lightning_has_no_default_noise_on_inputs_as_they_are():
    lightning = pytest.importorskip("pyro_mdn.lightning")
    _x, _y = columns()
    noises = []
    for given in ("identity", None):
        network = MixtureDensityNetwork(3, 1, 2, 4, input_transform=given)
        noises.append(lightning.LightningObjective(NegativeLogLikelihood(network)).input_noise)
    assert noises == [0.0, 0.1]
    assert lightning.LightningObjective(NegativeLogLikelihood(network), input_noise=0.3).input_noise == 0.3


def test_targets_may_be_left_as_they_are():
    _, y = codes()
    network = MixtureDensityNetwork(1, 1, 2, 4, target_transform="identity")
    network.initialize_(torch.randn(40, 1), 5 * y)
    assert network.head.shift == 0
    assert network.head.scale == 1
    both = MixtureDensityNetwork(1, 2, 2, 4, target_transform=["identity", Logit(0, 100)])
    both.initialize_(torch.randn(40, 1), torch.cat([5 * y, 10 + y], 1))
    assert both.head.shift[0] == 0
    assert both.head.scale[0] == 1
    assert both.head.shift[1] != 0
    assert TargetTransform.named("identity") is Identity
