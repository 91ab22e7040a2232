"""Mixtures as arrays of mixtures: indexed, put together, moved and copied, they have the densities of their rows."""

import copy
import pickle

import numpy as np
import pyro
import pytest
import torch
from cases import BATCH_SHAPES, DIM, NOISE, make_head, make_mixture
from pyro import poutine
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_mdn import (
    Diagonal,
    DiagonalCovariance,
    Fixed,
    Full,
    GaussianMixture,
    Isotropic,
    IsotropicCovariance,
    LowRank,
    MixtureDensityNetwork,
)

every_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)

MASK = torch.tensor([[True, False, True], [False, False, True]])
ROWS = {
    "vector": [
        *(0, -1, np.int64(2), slice(1, 4), slice(None, None, 2), slice(2, 2), ..., None, (None, 2), (..., 3), ()),
        *([4, 0, 0], range(2), (None, [1, 2], None), [True, False, True, False, False], True, False),
        *(torch.tensor(2), torch.tensor([3, 3, 1]), torch.tensor([[0, 1], [2, 3]]), torch.tensor([]).long()),
        *(torch.arange(5) % 2 == 0, torch.zeros(5, dtype=torch.bool)),
        *(np.array(3), np.array([1, 4]), np.array([True, False, True, False, True])),
    ],
    "matrix": [
        *(
            1,
            (1, 2),
            (..., 0),
            (slice(None), 1),
            (0, ...),
            (0, slice(1, None)),
            ...,
            (..., 0, 1),
            (-1, -1),
            (1, None, 2),
        ),
        *((None, ..., [2, 0]), ([0, 1], [2, 0]), (torch.tensor([1, 0]), slice(0, 2)), MASK, MASK.numpy()),
        *((slice(None), MASK[0]), (slice(None), None, np.array([[0], [2]]))),
    ],
    "unbatched": [..., (), None, (None, None), True],
}
CASES = [pytest.param(name, rows, id=f"{name}-{i}") for name, listed in ROWS.items() for i, rows in enumerate(listed)]


def of_rows(tensor, rows):
    """Rows of ``(*batch, D)``, indexed over the batch alone."""
    return torch.stack([column[rows] for column in tensor.unbind(-1)], -1)


def tensors(mixture):
    return [mixture.logits, mixture.locs, *mixture.covariance.tensors()]


@every_noise
@pytest.mark.parametrize(("name", "rows"), CASES)
def test_density_of_rows_is_that_of_the_mixture(noise, name, rows):
    mixture = make_mixture(noise, BATCH_SHAPES[name])
    y = torch.randn(*mixture.batch_shape, DIM, dtype=torch.float64)
    picked, log_prob = mixture[rows], mixture.log_prob(y)
    assert picked.batch_shape == log_prob[rows].shape
    assert_close(picked.log_prob(of_rows(y, rows)), log_prob[rows], rtol=1e-12, atol=1e-12)
    assert type(picked.covariance) is type(mixture.covariance)
    assert_close(picked.variance, of_rows(mixture.variance, rows))


@every_noise
@pytest.mark.parametrize("name", ["vector", "matrix"])
def test_iteration_goes_over_the_first_dimension(noise, name):
    mixture = make_mixture(noise, BATCH_SHAPES[name])
    rows = list(mixture)
    assert len(rows) == len(mixture) == mixture.batch_shape[0]
    assert_close(torch.stack([row.covariance_matrix for row in rows]), mixture.covariance_matrix)
    assert_close(torch.stack([row.mean for row in reversed(mixture)]), mixture.mean.flip(0))


def test_rows_of_the_whole_batch_share_memory_and_a_homoscedastic_covariance_stays_one():
    mixture = make_mixture(Full(homoscedastic=True), (5,))
    assert mixture[1:3].locs.data_ptr() == mixture.locs[1].data_ptr()
    for rows in (0, slice(2), [0, 1, 4], mixture.locs[:, 0, 0] > 0):
        assert mixture[rows].covariance.diagonal.shape == (mixture.n_components, DIM)


def test_partly_broadcast_covariances():
    scale = torch.rand(1, 3, 2, 4, dtype=torch.float64) + 0.5
    mixture = GaussianMixture(
        torch.randn(2, 3, 2).double(), torch.randn(2, 3, 2, 4).double(), DiagonalCovariance(scale)
    )
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    for rows in (1, (slice(None), 2), (..., [0, 2]), ([0, 1], [2, 0]), mixture.locs[..., 0, 0] > 0):
        assert_close(mixture[rows].log_prob(of_rows(y, rows)), mixture.log_prob(y)[rows])


@pytest.mark.parametrize("rows", [5, -6, (0, 0), (0, ..., 0), [7], (..., [0], [0]), (slice(None), slice(None))])
def test_indices_of_nothing_are_refused(rows):
    with pytest.raises(IndexError):
        make_mixture(Full(), (5,))[rows]


def test_one_mixture_is_no_array():
    mixture = make_mixture(Full(), ())
    with pytest.raises(IndexError, match="expected at most 0 indices"):
        mixture[0]
    with pytest.raises(TypeError, match="expected a mixture with a batch dimension"):
        len(mixture)
    with pytest.raises(TypeError, match="expected a mixture with a batch dimension"):
        iter(mixture)


# Put together


@every_noise
@pytest.mark.parametrize(("batch_shape", "dim"), [((5,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3), -2)])
def test_parts_put_together_are_the_whole(noise, batch_shape, dim):
    mixture = make_mixture(noise, batch_shape)
    parts = [
        mixture[(*(slice(None),) * (dim % len(batch_shape)), rows)] for rows in (slice(1), slice(1, None), slice(0))
    ]
    whole = GaussianMixture.cat(iter(parts), dim)
    assert whole.batch_shape == mixture.batch_shape
    y = torch.randn(3, *batch_shape, DIM, dtype=torch.float64)
    assert_close(whole.log_prob(y), mixture.log_prob(y), rtol=1e-12, atol=1e-12)


@every_noise
def test_different_mixtures_keep_their_covariances(noise):
    one = make_mixture(noise, (2, 3))
    other = one.affine(1.0, 2.0)
    y = torch.randn(2, 3, DIM, dtype=torch.float64)
    for dim in (0, 1):
        expected = torch.cat([one.log_prob(y), other.log_prob(y)], dim)
        assert_close(GaussianMixture.cat([one, other], dim).log_prob(torch.cat([y, y], dim)), expected)
    for dim in (0, 1, 2, -1):
        expected = torch.stack([one.log_prob(y), other.log_prob(y)], dim)
        stacked = GaussianMixture.stack([one, other], dim)
        assert_close(stacked.log_prob(torch.stack([y, y], dim if dim >= 0 else -2)), expected)
    single = GaussianMixture.stack([one[0, 0], other[0, 0]])
    assert_close(single.log_prob(y[0, 0]), torch.stack([one[0, 0].log_prob(y[0, 0]), other[0, 0].log_prob(y[0, 0])]))


def test_what_is_shared_in_a_batch_stays_shared():
    mixture = make_mixture(Full(homoscedastic=True), (2, 1000))
    whole = GaussianMixture.cat([mixture, mixture.affine(0.0, 2.0)])
    assert whole.covariance.batch_shape == (4, 1, mixture.n_components)
    assert_close(whole[1, 5].covariance_matrix, mixture[1, 5].covariance_matrix)


def test_tied_and_untied_covariances_and_dtypes_are_joined():
    one, other = make_mixture(Diagonal(tied=True)), make_mixture(Diagonal())
    y = torch.randn(5, DIM, dtype=torch.float64)
    whole = GaussianMixture.cat([one, other.float()])
    assert whole.dtype == torch.float64
    assert_close(whole.log_prob(torch.cat([y, y])), torch.cat([one.log_prob(y), other.log_prob(y)]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([make_mixture(Full(), n_components=2)], "expected equal numbers of components and outputs"),
        ([make_mixture(Full(), dim=3)], "expected equal numbers of components and outputs"),
        (
            [make_mixture(Diagonal())],
            "structures of components, got covariance=FullCovariance of .* and covariance=DiagonalCovariance",
        ),
        ([make_mixture(Full(), (2, 5))], "expected equal batch shapes"),
        ([torch.zeros(3)], "expected one mixture at least, got GaussianMixture, Tensor"),
    ],
)
def test_what_cannot_be_joined_is_named(others, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture.cat([make_mixture(Full()), *others])


def test_bad_calls_are_refused():
    mixture = make_mixture(LowRank(2))
    for function in (GaussianMixture.cat, GaussianMixture.stack):
        with pytest.raises(ValueError, match="expected one mixture at least, got none"):
            function([])
        with pytest.raises(ValueError, match="dim: expected"):
            function([mixture], 2)
    with pytest.raises(ValueError, match="dim: expected one of 0 batch dimensions"):
        GaussianMixture.cat([mixture[0]])
    with pytest.raises(ValueError, match=r"stack: expected mixtures of equal batch shape, got \(5,\), \(2,\)"):
        GaussianMixture.stack([mixture, mixture[:2]])
    with pytest.raises(ValueError, match="structures of components"):
        GaussianMixture.cat([mixture, make_mixture(LowRank(1))])
    with pytest.raises(ValueError, match="expected a floating-point dtype"):
        mixture.to(torch.int64)


# Moved, detached and copied


@every_noise
def test_conversion_and_detachment(noise):
    mixture = make_head(noise)(torch.randn(5, 6, dtype=torch.float64))
    y = torch.randn(5, DIM, dtype=torch.float64)
    single = mixture.float()
    assert {t.dtype for t in tensors(single)} == {torch.float32} == {single.dtype}
    assert_close(single.log_prob(y.float()).double(), mixture.log_prob(y), rtol=1e-4, atol=1e-4)
    assert_close(single.double().logits.exp().sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-15)
    assert mixture.to("cpu").device == mixture.cpu().device == torch.device("cpu")
    assert mixture.to(y.float()).dtype == torch.float32
    assert not any(t.requires_grad for t in tensors(mixture.detach()))
    assert_close(mixture.detach().log_prob(y), mixture.log_prob(y).detach())


@every_noise
@pytest.mark.parametrize("ask", [lambda m: m[1:3].mean, lambda m: m.float().mean, lambda m: m.cat([m, m]).mean])
def test_what_is_derived_from_a_network_keeps_its_graph(noise, ask):
    network = MixtureDensityNetwork(2, 3, 2, 4, noise=noise)
    ask(network(torch.randn(5, 2))).sum().backward()
    assert network.head.linear.weight.grad.abs().sum() > 0


@every_noise
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("asked", [False, True])
def test_copies(noise, again, asked):
    network, x, y = MixtureDensityNetwork(2, DIM, 2, 4, noise=noise), torch.randn(5, 2), torch.randn(5, DIM)
    mixture = network(x)
    if asked:
        assert mixture.mean.requires_grad
    assert_close(again(mixture).log_prob(y), mixture.log_prob(y))
    assert_close(again(mixture.detach()).log_prob(y), mixture.log_prob(y))
    assert copy.deepcopy([mixture] * 2)[0].batch_shape == (5,)


def test_a_deep_copy_is_another_one():
    locs = torch.zeros(1, 1, requires_grad=True)
    mixture = GaussianMixture(torch.zeros(1), locs, IsotropicCovariance(torch.ones(1)))
    copied = copy.deepcopy(mixture)
    with torch.no_grad():
        locs.add_(1.0)
    assert copied.locs.item() == 0.0
    assert copied.locs.requires_grad


# In Pyro


@pytest.mark.parametrize("noise", [Full(), Fixed(0.5), Isotropic(homoscedastic=True)])
def test_pyro_takes_a_mixture_for_one_distribution(noise):
    """What has a length may be taken for a sequence, or be false."""
    mixture = make_mixture(noise, (5,))
    assert mixture
    assert mixture[:0]
    assert bool(mixture[0])
    y = mixture.sample()

    def model(n=5):
        with pyro.plate("rows", n):
            return pyro.sample("y", mixture[:n])

    conditioned = poutine.condition(model, {"y": y})
    traced = poutine.trace(conditioned).get_trace()
    assert_close(traced.log_prob_sum(), mixture.log_prob(y).sum())
    assert traced.nodes["y"]["fn"].batch_shape == (5,)
    assert pyro.sample("none", mixture[:0].to_event(1)).shape == (0, DIM)
    assert Predictive(model, num_samples=3)()["y"].shape == (3, 5, DIM)
    assert mixture.to_event(1).log_prob(y).shape == ()
    assert mixture.mask(torch.arange(5) < 2).log_prob(y)[2:].abs().sum() == 0
    assert torch.utils._pytree.tree_leaves({"a": mixture}) == [mixture]


def test_rows_of_a_network_under_transforms():
    network, x, y = MixtureDensityNetwork(2, 1, 2, 4), torch.randn(5, 2), torch.randn(5, 1)
    rows = torch.tensor([[0, 1], [4, 2], [3, 3]])
    mixture = network(x)
    mapped = torch.vmap(lambda r: mixture[r].log_prob(y[r]))(rows)
    assert_close(mapped, mixture.log_prob(y)[rows])
