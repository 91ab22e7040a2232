import copy
import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import NOISE, make_head, make_mixture
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    IsotropicCovariance,
    LowRank,
    MixtureDensityNetwork,
    MixtureHead,
)
from pyro_mdn.distributions.covariance.noise_models import NoiseModel, as_noise_model
from pyro_mdn.support.fingerprint import described

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
def test_sharing_and_source(noise):
    """Tied: the components agree. Homoscedastic: the inputs agree. Otherwise they differ."""
    matrix = make_mixture(noise, (5,)).covariance.expand((5, 3)).matrix()
    assert torch.equal(matrix[:, 0], matrix[:, 1]) is noise.tied
    assert torch.equal(matrix[0], matrix[1]) is noise.homoscedastic


@pytest.mark.parametrize(
    ("noise", "former"),
    [
        (Fixed(1), {"scale": 1}),
        (Fixed(0.3), {"scale": 0.3, "tied": True, "homoscedastic": True}),
        (Fixed(0.3), {"scale": np.float64(0.3)}),
        (Full(min_scale=1), {"min_scale": 1}),
        (LowRank(1, min_scale=2), {"min_scale": np.float64(2)}),
    ],
)
def test_equal_noise_models_have_one_fingerprint(noise, former):
    """Also one from a pickle of an earlier version, which held numbers as they were given."""
    old = copy.copy(noise)
    vars(old).update(former)
    assert old == noise
    fingerprints = [described(head=MixtureHead(2, 1, 1, noise=n))["head.noise"] for n in (noise, old)]
    assert fingerprints[0] == fingerprints[1]
    other = dataclasses.replace(noise, **{name: 0.7 for name in ("scale", "min_scale") if name in former})
    assert described(head=MixtureHead(2, 1, 1, noise=other))["head.noise"] != fingerprints[0]


def test_settings_of_a_class_stay_there():
    assert vars(Fixed(0.3)) == {"scale": 0.3}
    assert vars(Fixed(np.float32(2))) == {"scale": 2.0}
    assert type(Full(min_scale=1).min_scale) is float


@pytest.mark.parametrize("name", [name for name, noise in NOISE.items() if noise.common_unit])
def test_isotropic_and_fixed_are_isotropic_in_the_units_of_y(name):
    noise = NOISE[name]
    mixture = make_mixture(noise, (5,), dim=2, n_components=3)
    matrix = mixture.covariance.expand((5, 3)).matrix()
    scale = mixture.covariance.expand((5, 3)).variance()[..., 0].sqrt()
    assert isinstance(mixture.covariance, IsotropicCovariance)
    assert_close(matrix, scale.square()[..., None, None] * torch.eye(2, dtype=torch.float64).expand(5, 3, 2, 2))
    if isinstance(noise, Fixed):
        assert_close(scale, torch.full((5, 3), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("noise", [Isotropic(), Fixed(0.5)], ids=["isotropic", "fixed"])
def test_isotropic_after_training_on_outputs_of_different_size(noise):
    network = MixtureDensityNetwork(1, 2, n_components=3, noise=noise)
    network.initialize_(torch.randn(50, 1), torch.randn(50, 2) * torch.tensor([1.0, 1000.0]))
    variance = network(torch.randn(4, 1)).covariance.variance()
    assert_close(variance[..., 0], variance[..., 1])


@pytest.mark.parametrize("structure", [Full, LowRank, Diagonal, Isotropic])
@pytest.mark.parametrize("raw", [-1e4, -30.0, 0.0])
def test_min_scale_bounds_every_conditional_deviation(structure, raw):
    noise = structure(min_scale=0.05)
    channels = torch.randn(7, 3, noise.num_params(4), dtype=torch.float64)
    channels[..., :4] = raw
    covariance = noise.build(channels, 4, torch.ones(1))
    conditional = torch.linalg.cholesky(covariance.matrix()).diagonal(dim1=-2, dim2=-1)
    assert conditional.min() >= 0.05 - 1e-12
    bound = -4 * math.log(0.05 * math.sqrt(2 * math.pi))
    assert (-covariance.half_log_det() - 2 * math.log(2 * math.pi)).max() <= bound + 1e-9


@every_noise
def test_start_gives_the_scales_asked_for(noise):
    scale = torch.rand(3, 4, dtype=torch.float64) + 0.1
    covariance = noise.build(noise.start(scale), 4, torch.ones(1)).expand((3,))
    expected = {True: scale.square().mean(-1, keepdim=True).sqrt().expand(3, 4), False: scale}[noise.common_unit]
    if isinstance(noise, Fixed):
        expected = torch.full((3, 4), 0.7, dtype=torch.float64)
    if isinstance(noise, LowRank):  # its factor does not start at zero, which would be a saddle point
        expected = (scale.square() + covariance.factor.square().sum(-1)).sqrt()
        assert covariance.factor.abs().amax() > 0
    assert_close(covariance.variance().sqrt(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "scale: expected a positive finite number, got 0"),
        (lambda: Fixed(math.nan), "scale: expected a positive finite number"),
        (lambda: Fixed("1"), "scale: expected a positive finite number, got '1'"),
        (lambda: Diagonal(min_scale=0.0), "min_scale: expected a positive finite number"),
        (lambda: Full(min_scale=-1.0), "min_scale: expected a positive finite number"),
        (lambda: LowRank(0), "rank: expected a positive integer, got 0"),
        (lambda: LowRank(1.5), "rank: expected a positive integer, got 1.5"),
        (lambda: MixtureHead(3, 2, 2, noise=LowRank(3)), "rank: expected at most dim_out=2, got 3"),
        (lambda: MixtureHead(3, 2, 2, noise=Diagonal), "noise: expected a NoiseModel .*, got the class Diagonal"),
        (lambda: MixtureHead(3, 2, 2, noise="Full"), "noise: expected a NoiseModel or one of .*'full'.*, got 'Full'"),
        (lambda: MixtureHead(3, 2, 2, noise=torch.zeros(9)), r"got Tensor torch.float32 \(9,\)"),
        (lambda: MixtureDensityNetwork(3, 2, noise="fixed"), r"noise: expected Fixed\(scale\) for a known scale"),
        (lambda: Fixed(True), "scale: expected a positive finite number, got True"),
        (lambda: Fixed(np.bool_(True)), "scale: expected a positive finite number, got True"),
        (lambda: Fixed(torch.tensor(True)), r"scale: expected a positive finite number, got Tensor torch.bool \(\)"),
        (lambda: Fixed(np.ones(50)), r"scale: expected a positive finite number, got ndarray float64 \(50,\)"),
        (lambda: Fixed(1j), "scale: expected a positive finite number, got 1j"),
        (lambda: LowRank(True), "rank: expected a positive integer, got True"),
        (lambda: LowRank(np.ones(3)), r"rank: expected a positive integer, got ndarray float64 \(3,\)"),
        *(
            (lambda kind=kind, name=name, value=value: kind(**{name: value}), f"{name}: expected True or False, got")
            for kind in (Diagonal, Full, Isotropic, LowRank)
            for name in ("tied", "homoscedastic")
            for value in ("no", 1, None, torch.tensor(True))
        ),
        (lambda: MixtureHead(0, 2, 2), "in_features: expected a positive integer, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NAMES = {"diagonal": Diagonal(), "full": Full(), "isotropic": Isotropic(), "low_rank": LowRank(2)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 3])
def test_names_of_noise_models(name, dim, tmp_path):
    """A name stands for the noise model with its defaults: in heads, networks, ensembles, and files of them."""
    expected = LowRank(1) if name == "low_rank" and dim == 1 else NAMES[name]
    by_name, by_model = (MixtureDensityNetwork(2, dim, 3, 8, noise=noise, seed=0) for noise in (name, expected))
    x = torch.randn(5, 2)
    assert by_name.head.noise == MixtureHead(4, dim, 2, noise=name).noise == expected
    assert torch.equal(by_name(x).covariance_matrix, by_model(x).covariance_matrix)
    for saved in (by_name, DeepEnsemble(by_name, 2)):
        saved.save(tmp_path / "saved")
        loaded = type(saved).load(tmp_path / "saved")
        assert torch.equal(loaded(x).covariance_matrix, saved(x).covariance_matrix)


def test_every_noise_model_has_a_name_that_files_know():
    for model in (*NAMES.values(), Fixed(0.3)):
        assert NoiseModel.from_config(model.to_config()) == model
    ours = {kind for kind in NoiseModel.known.values() if kind.__module__.startswith("pyro_mdn")}
    assert {type(model) for model in (*NAMES.values(), Fixed(0.3))} == ours
    named = {type(as_noise_model(name, 2, scale=0.3)) for name in [*NAMES, "fixed"]}
    assert named == ours


@pytest.mark.parametrize("one", [np.float32, np.float16, np.float64, np.int64, np.asarray, torch.tensor, Fraction])
def test_settings_may_be_of_numpy_and_torch(one, tmp_path):
    """They become Python's, so that equal models are equal, and can be saved."""
    assert Fixed(one(2)) == Fixed(2.0)
    assert Diagonal(min_scale=one(2), tied=np.bool_(True)) == Diagonal(min_scale=2.0, tied=True)
    assert LowRank(np.int64(1)) == LowRank(1)
    network = MixtureDensityNetwork(2, 1, noise=Fixed(one(2)))
    network.save(tmp_path / "saved")
    assert MixtureDensityNetwork.load(tmp_path / "saved").head.noise == Fixed(2.0)


@every_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(noise, dtype):
    """Densities, mixtures and members of ensembles are those of the rounded weights, in single precision."""
    rounded = MixtureDensityNetwork(2, 4, 3, 8, noise=noise, seed=0)
    x, y = torch.randn(20, 2), torch.randn(20, 4)
    rounded.initialize_(x, y)
    rounded.to(dtype)
    exact = MixtureDensityNetwork(2, 4, 3, 8, noise=noise)
    exact.load_state_dict(rounded.state_dict())
    mixture, loss = rounded(x), rounded.loss(x, y)
    assert {t.dtype for t in (mixture.logits, mixture.locs, *mixture.covariance.tensors(), loss)} == {torch.float32}
    assert_close(-mixture.log_prob(y), loss)
    assert_close(loss, exact.loss(x, y), atol=0.3, rtol=0.02)  # features are rounded
    assert_close(DeepEnsemble([rounded])(x).log_prob(y), mixture.log_prob(y), atol=0.1, rtol=0.01)
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in rounded.parameters())


def test_memory_is_channel_first():
    """Logits, locations and factors are views of one product, the batch contiguous."""
    head = make_head(Full(), dim=3)
    logits, locs, raw = head.raw(torch.randn(100, 6, dtype=torch.float64))
    assert logits.untyped_storage().data_ptr() == locs.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()
    mixture = head(torch.randn(100, 6, dtype=torch.float64))
    tensors = [mixture.logits, mixture.locs, *mixture.covariance.tensors()]
    assert all(t.stride(0) == 1 and min(t.stride()[1:]) >= 100 for t in tensors)
    log_prob = mixture.component_log_prob(torch.randn(100, 3, dtype=torch.float64))
    assert log_prob.stride() == (1, 100)


def test_bfloat16_autocast_accumulates_in_float32():
    head, features, y = MixtureHead(6, 2, 3, noise=LowRank()), torch.randn(20, 6), torch.randn(20, 2)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = head.log_prob(features, y)
        mixture = head(features)
    assert log_prob.dtype == mixture.log_prob(y).dtype == torch.float32
    assert_close(log_prob, head.log_prob(features, y), rtol=0.05, atol=0.05)
    assert_close(mixture.log_prob(y), log_prob)
