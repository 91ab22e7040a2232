"""Predictions as arrays and data frames: those of the mixture, in parts, without gradients or randomness."""

import copy
import os
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from cases import NOISE
from numpy.testing import assert_allclose
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_mdn import DeepEnsemble, MixtureDensityNetwork, Prediction, bayesianize, posterior_predictive
from pyro_mdn.calibration import coverage_table
from pyro_mdn.scores import crps
from pyro_mdn.support.arrays import to_numpy

ROWS = 7


@pytest.fixture
def x():
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(noise=None, dim_out=2, **settings):
    torch.manual_seed(0)
    return MixtureDensityNetwork(3, dim_out, 3, 8, noise=noise, **settings).double()


@pytest.mark.parametrize("chunk_size", [1, 3, ROWS, 100])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_predictions_are_those_of_the_mixture(noise, chunk_size, x):
    net = network(noise)
    prediction, mixture = net.predict(x, chunk_size=chunk_size), net(x)
    assert len(prediction) == ROWS
    assert_allclose(prediction.mean, to_numpy(mixture.mean))
    assert_allclose(prediction.std, to_numpy(mixture.stddev))
    assert_allclose(prediction.quantiles(0.3), to_numpy(mixture.icdf(0.3)))
    assert_allclose(prediction.quantiles([0.1, 0.9])[:, 1], to_numpy(mixture.icdf(0.9)))
    for kind in ("central", "shortest"):
        assert_allclose(prediction.interval(0.8, kind=kind), [to_numpy(e) for e in mixture.interval(0.8, kind=kind)])
    y = np.where(np.eye(ROWS, 2) > 0, np.nan, 0.5)
    assert_allclose(prediction.log_prob(y), to_numpy(mixture.log_prob(y)))
    assert prediction.sample(4).shape == (4, ROWS, 2)
    assert_allclose(to_numpy(prediction.mixture.log_prob(y)), to_numpy(mixture.log_prob(y)))
    assert not prediction.mixture.locs.requires_grad


class Noticed(nn.Module):
    """Dropout that calls a function before each pass."""

    def __init__(self, notice):
        super().__init__()
        self.notice, self.dropout = notice, nn.Dropout(0.5)

    def forward(self, x):
        self.notice()
        return self.dropout(x)


def noticed(notice):
    return network(backbone=nn.Sequential(nn.Linear(3, 8), Noticed(notice))).train()


def test_threads_predict_without_dropout(x):
    """Each in evaluation mode to its end, whichever of them ends first; then the mode is that of before."""
    entered = {name: threading.Event() for name in ("first", "second")}
    left, means = threading.Event(), {}

    def notice():
        name = threading.current_thread().name
        if name in entered:
            entered[name].set()
            (entered["second"] if name == "first" else left).wait(10)

    def predict():
        means[threading.current_thread().name] = net.predict(x).mean
        if threading.current_thread().name == "first":
            left.set()

    net = noticed(notice)
    frozen = net.backbone[0].eval()  # a mode of its own
    threads = [threading.Thread(target=predict, name=name) for name in entered]
    threads[0].start()
    entered["first"].wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    alone = copy.deepcopy(net).eval().predict(x).mean
    for mean in means.values():
        assert_allclose(mean, alone)
    assert len(means) == 2
    assert [part.training for part in net.modules()] == [part is not frozen for part in net.modules()]


def test_threads_predict_alike(x):
    """Many of them, however they fall together: every mean is that without dropout."""
    net = noticed(lambda: None)
    alone = copy.deepcopy(net).eval().predict(x).mean
    with ThreadPoolExecutor(4) as pool:
        means = list(pool.map(lambda _: net.predict(x, chunk_size=1).mean, range(60)))
    assert_allclose(means, np.stack([alone] * 60))
    assert all(part.training for part in net.modules())


def test_modes_after_a_prediction_that_failed(x):
    def refuse():
        assert not net.training
        raise ZeroDivisionError

    net = noticed(refuse)
    with pytest.raises(ZeroDivisionError):
        net.predict(x)
    assert all(part.training for part in net.modules())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_beside_a_prediction_has_the_modes_of_before(x):
    """The thread that predicts is not in the child; a thread that forks while it predicts itself is."""
    inside, leave, codes = threading.Event(), threading.Event(), []

    def notice():
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(10)

    def fork():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(2 * net.training + other.training)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    net, other = noticed(notice), noticed(fork)
    thread = threading.Thread(target=net.predict, args=(x,))
    thread.start()
    inside.wait(10)
    other.predict(x)
    leave.set()
    thread.join(10)
    assert codes == [2]  # the first trains again, the other is still evaluated
    assert net.training
    assert other.training


def test_draws_follow_the_distribution(x):
    prediction = network().predict(x, chunk_size=3)
    draws = prediction.sample(20_000)
    error = prediction.std / np.sqrt(len(draws))
    assert bool((abs(draws.mean(0) - prediction.mean) < 5 * error).all())


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_random_and_the_mode_stays(training, x):
    backbone = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    torch.manual_seed(0)
    net = MixtureDensityNetwork(3, 1, 3, 8, backbone=backbone).double().train(training)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    state = torch.get_rng_state()
    first, second = net.predict(x), net.predict(x, chunk_size=2)
    assert_allclose(first.mean, second.mean)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training == training for part in net.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_what_only_a_distribution_has_is_said(x):
    y, prediction = np.zeros((ROWS, 2)), network().predict(x)
    for call in (lambda: crps(prediction, y), lambda: coverage_table(prediction, y)):
        with pytest.raises(AttributeError, match="its attribute mixture is the distribution"):
            call()
    assert crps(prediction.mixture, y).shape == (ROWS, 2)
    assert copy.copy(prediction).mean.shape == pickle.loads(pickle.dumps(prediction)).mean.shape


def test_ensembles_predict_their_average(x):
    ensemble = DeepEnsemble(network(), 3)
    assert_allclose(ensemble.predict(x, chunk_size=2).quantiles(0.2), to_numpy(ensemble(x).icdf(0.2)))


def test_sequences_keep_their_shape():
    torch.manual_seed(0)
    net, x = MixtureDensityNetwork(3, 2, 3, 8), torch.randn(5, 4, 3)
    prediction = net.predict(x, chunk_size=2)
    assert prediction.mean.shape == (5, 4, 2)
    assert_allclose(prediction.quantiles([0.1, 0.9])[:, 1], to_numpy(net(x).icdf(0.9)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"to_frame: expected one distribution for each row, got \(4,\)"):
        prediction.to_frame()


def test_frames_have_the_index_of_the_caller(x):
    frame = pd.DataFrame(x.numpy(), columns=list("abc"), index=pd.date_range("2020", periods=ROWS))
    prediction = network(dim_out=1).predict(frame)
    table = prediction.to_frame([0.1, 0.5])
    assert table.index.equals(frame.index)
    assert list(table.columns) == ["mean", "std", "0.1", "0.5"]
    assert_allclose(table["0.1"], prediction.quantiles(0.1)[:, 0])
    both = network().predict(frame, chunk_size=3).to_frame(output_names=["price", "volume"])
    assert list(both["volume"].columns) == ["mean", "std", "0.05", "0.5", "0.95"]
    assert_allclose(both["volume"]["std"], network().predict(frame).std[:, 1])
    plain = network(dim_out=1).predict(pl.from_pandas(frame)).to_frame()
    assert list(plain.index) == list(range(ROWS))


@pytest.mark.parametrize(
    ("levels", "labels"),
    [
        (0.5, ["0.5"]),
        (np.float32(0.05), ["0.05"]),
        (torch.tensor(0.05), ["0.05"]),
        ((0.9999999, 0.99999999, 1), ["0.9999999", "0.99999999", "1"]),
        (np.array([0.05, 0.1], np.float32), ["0.05", "0.1"]),
        (pd.Series([1e-7, 0.123456789], index=[5, 6]), ["1e-07", "0.123456789"]),
    ],
)
def test_frames_have_a_column_for_each_quantile(levels, labels, x):
    prediction = network(dim_out=1).predict(x)
    table = prediction.to_frame(levels)
    assert list(table.columns) == ["mean", "std", *labels]
    for label, level in zip(labels, np.atleast_1d(levels), strict=True):
        assert_allclose(table[label], prediction.quantiles(level)[:, 0])


def test_draws_of_weights_predict_their_average(x):
    net = bayesianize(network())
    with pytest.raises(ValueError, match="network: expected no latent weights, got some: use Prediction"):
        net.predict(x)
    guide = AutoNormal(net.model)
    pooled = posterior_predictive(net, guide, x, num_samples=5).pool(0)
    frame = pd.DataFrame(x.numpy(), index=list("abcdefg"))
    assert list(Prediction(pooled, like=frame).to_frame().index) == list("abcdefg")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: n.predict(x[0]), "x: expected a batch of inputs|x: expected shape"),
        (lambda n, x: n.predict(x[:0]), r"x: expected rows to predict, got Tensor torch.float64 \(0, 3\)"),
        (lambda n, x: n.predict(x[:, :2]), "x: expected shape"),
        (lambda n, x: n.predict(x.masked_fill(x == x[4, 1], torch.nan), chunk_size=2), "got nan in row 4, column 1$"),
        (lambda n, x: n.predict(x, chunk_size=0), "chunk_size: expected a positive integer, got 0"),
        (lambda n, x: n.predict(x).quantiles(1.5), r"probabilities: expected one or several in \[0, 1\], got 1.5"),
        (lambda n, x: n.predict(x).interval(1.0), "mass: expected"),
        (lambda n, x: n.predict(x).interval(np.array([0.5, 0.9])), r"mass: expected one .*, got ndarray"),
        (lambda n, x: n.predict(x).interval([0.5, 0.9]), "mass: expected one number in .*, got list of 2"),
        (lambda n, x: n.predict(x).interval("a"), "mass: expected numbers, got text"),
        (lambda n, x: n.predict(x).to_frame(1.5), "probabilities: expected one or several"),
        (lambda n, x: n.predict(x).to_frame("a"), "quantiles: expected numbers, got text"),
        (lambda n, x: n.predict(x).to_frame(output_names=["a", "a"]), "output_names: expected 2 of them, all diff"),
        (lambda n, x: n.predict(x).log_prob(np.zeros((3, 2))), r"y: expected 7 rows, .*, got ndarray float64 \(3, 2\)"),
        (lambda n, x: n.predict(x).to_frame(output_names=["one"]), "output_names: expected 2"),
        (lambda n, x: Prediction([]), "mixture: expected a Mixture with a batch of rows, got list of 0"),
        (lambda n, x: Prediction(n(x), like=pd.Series([1.0])), "like: expected 7 rows"),
    ],
)
def test_bad_arguments_are_refused(call, message, x):
    with pytest.raises(ValueError, match=message):
        call(network(), x)
