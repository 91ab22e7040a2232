import math

import pytest
import torch
from cases import NOISE, make_head, make_mixture
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    IsotropicCovariance,
    LowRank,
    MixtureDensityNetwork,
    MixtureHead,
)

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)


@every_noise
def test_sharing_and_source(noise):
    """Tied: the components agree. Homoscedastic: the inputs agree. Otherwise they differ."""
    matrix = make_mixture(noise, (5,)).covariance.expand((5, 3)).matrix()
    assert torch.equal(matrix[:, 0], matrix[:, 1]) is noise.tied
    assert torch.equal(matrix[0], matrix[1]) is noise.homoscedastic


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
        (lambda: MixtureHead(3, 2, 2, noise=Diagonal), "noise: expected a NoiseModel"),
        (lambda: MixtureHead(0, 2, 2), "in_features: expected a positive integer, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
