"""The conversion of users' data: one rule for every container and every entry point."""

import datetime
import decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from cases import NOISE
from torch.testing import assert_close

import pyro_mdn
from pyro_mdn import (
    DeepEnsemble,
    Diagonal,
    Full,
    GaussianMixture,
    IsotropicCovariance,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    calibration,
    fit,
    scores,
    to_inference_data,
)
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.support.arrays import as_array, as_tensor
from pyro_mdn.support.checks import describe

X = pd.DataFrame({"age": [3, 1, 4, 1, 5], "member": [True, False, True, True, False], "score": [0.5, 1.5, -1, 0, 2]})
NUMBERS = X.astype(float).to_numpy()

CONTAINERS = {
    "tensor": torch.tensor(NUMBERS),
    "array": NUMBERS,
    "reversed": NUMBERS[::-1, ::-1][::-1, ::-1][::-1][::-1],
    "frame": X,
    "nullable": X.convert_dtypes(),
    "arrow": X.convert_dtypes(dtype_backend="pyarrow"),
    "polars": pl.from_pandas(X),
    "table": pa.Table.from_pandas(X),
    "record batch": pa.RecordBatch.from_pandas(X.astype(float)),
    "lists": NUMBERS.tolist(),
    "rows": [torch.tensor(row) for row in NUMBERS],
    "objects": NUMBERS.astype(object),
    "big endian": NUMBERS.astype(">f8"),
    "extended": NUMBERS.astype(np.longdouble),
}
"""The same numbers, in float64 at least, in every container."""


def reversed_views():
    array = np.ascontiguousarray(NUMBERS[::-1])
    frame = X.iloc[::-1].reset_index(drop=True)
    return {"array": array[::-1], "flip": np.flip(array, 0), "frame": frame.iloc[::-1].reset_index(drop=True)}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_tensor(kind):
    assert torch.equal(as_tensor(CONTAINERS[kind], "x"), torch.tensor(NUMBERS))


@pytest.mark.parametrize("kind", reversed_views())
def test_views_with_negative_strides(kind):
    assert torch.equal(as_tensor(reversed_views()[kind], "x"), torch.tensor(NUMBERS))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.ones(2, np.float16), torch.float16),
        (np.ones(2, np.float32), torch.float32),
        (np.ones(2, bool), torch.float32),
        (np.ones(2, np.uint8), torch.float32),
        (np.ones(2, np.int32), torch.float64),
        (torch.ones(2, dtype=torch.int16), torch.float32),
        (torch.ones(2, dtype=torch.int64), torch.float64),
        (torch.ones(2, dtype=torch.bfloat16), torch.bfloat16),
        ([1, 1], torch.float64),
        (1, torch.float64),
        ([decimal.Decimal(1)], torch.float64),
    ],
)
def test_precision_holds_every_number(values, dtype):
    converted = as_tensor(values, "x")
    assert converted.dtype == dtype
    assert bool((converted == 1).all())


def test_integers_are_exact():
    large = np.array([2**53 - 1, 2**24 + 1])
    for values in (large, torch.from_numpy(large), large.tolist(), pd.Series(large), pd.array(large, dtype="Int64")):
        assert as_tensor(values, "x").tolist() == large.tolist()


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, None]],
        np.ma.masked_equal([[1, 2], [3, -999]], -999),
        [np.ma.masked_equal([1, 2], -999), np.ma.masked_equal([3, -999], -999)],
        pd.DataFrame({"a": [1, 3], "b": [2, None]}),
        pd.DataFrame({"a": [1, 3], "b": [2, None]}).convert_dtypes(),
        pd.DataFrame({"a": [1, 3], "b": [2, None]}).convert_dtypes(dtype_backend="pyarrow"),
        pd.DataFrame({"a": [1, 3], "b": pd.Series([2, None], dtype=object)}),
        pl.DataFrame({"a": [1, 3], "b": [2, None]}),
        pa.table({"a": [1, 3], "b": [2, None]}),
    ],
)
def test_what_is_missing_becomes_nan(values):
    assert_close(as_tensor(values, "y"), torch.tensor([[1.0, 2.0], [3.0, torch.nan]]).double(), equal_nan=True)


def test_lists_of_tensors_keep_their_graphs():
    leaf, other = torch.ones(2, requires_grad=True), np.full(2, 3.0)
    network = MixtureDensityNetwork(2, 1)
    for rows in ([leaf, 2 * leaf], (leaf, 2 * leaf), [[leaf[0], leaf[1]], [2 * leaf[0], 2 * leaf[1]]]):
        (gradient,) = torch.autograd.grad(network.loss(rows, [0.0, 1.0]).sum(), leaf)
        (expected,) = torch.autograd.grad(network.loss(torch.stack([leaf, 2 * leaf]), [0.0, 1.0]).sum(), leaf)
        assert_close(gradient, expected)
    mixed = as_tensor([leaf, other, [None, 5], torch.tensor([6, 7])], "x")
    assert_close(mixed, torch.tensor([[1, 1], [3, 3], [torch.nan, 5], [6, 7]]).double(), equal_nan=True)
    assert_close(as_tensor([leaf[0], None], "x"), torch.tensor([1.0, torch.nan]).double(), equal_nan=True)
    assert as_tensor([leaf.bfloat16()] * 2, "x").dtype == torch.bfloat16
    copy = as_tensor([leaf.detach()], "x")
    copy.zero_()
    assert leaf.tolist() == [1, 1]


def test_distributions_given_as_data_are_not_indexed(monkeypatch):
    mixture = MixtureDensityNetwork(3, 1)(X)
    monkeypatch.setattr(type(mixture), "__getitem__", lambda self, index: pytest.fail("indexed"))
    with pytest.raises(ValueError, match=r"y: expected numbers, got GaussianMixture$"):
        as_tensor(mixture, "y")


def test_tensors_keep_their_graph_and_everything_else_is_a_copy():
    leaf = torch.ones(2, requires_grad=True)
    assert as_tensor(leaf, "x") is leaf
    array = np.ones(2)
    as_tensor(array, "x").zero_()
    assert array.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.DataFrame({"a": [1.0], "city": ["Bern"]}), "x, column 'city': expected numbers, got text"),
        (pl.DataFrame({"a": [1.0], "city": ["Bern"]}), "x, column 'city': expected numbers, got text"),
        (pd.DataFrame({"city": pd.Categorical(["Bern"])}), "x, column 'city': expected numbers, got categories"),
        (
            pl.DataFrame({"c": pl.Series(["a"], dtype=pl.Categorical)}),
            "x, column 'c': expected numbers, got categories",
        ),
        (pd.DataFrame({"when": pd.date_range("2020", periods=2)}), "x, column 'when': expected numbers, got dates"),
        (pl.DataFrame({"when": [datetime.date(2020, 1, 1)]}), "x, column 'when': expected numbers, got dates"),
        (pd.DataFrame({"t": pd.to_timedelta([1, 2])}), "x, column 't': expected numbers, got time spans"),
        ([pd.Timestamp("2020")], "x: expected numbers, got dates"),
        (np.array(["2020"], "M8[D]"), "x: expected numbers, got dates"),
        (np.array(["1"]), "x: expected numbers, got text"),
        (np.ones(2) + 1j, "x: expected numbers, got complex numbers"),
        ([[1.0], [1.0, 2.0]], "x: expected numbers in rows of one length, got list of 2"),
        (None, "x: expected numbers, got NoneType"),
        ({"a": 1}, "x: expected numbers, got dict of 1"),
        ("text", "x: expected numbers, got text"),
        (object(), "x: expected numbers, got object"),
        (pd.Categorical([1, 2, 3]), "x: expected numbers, got categories"),
        (pd.Series([1.5, 2], dtype="category"), "x: expected numbers, got categories"),
        (pd.CategoricalIndex([1, 2]), "x: expected numbers, got categories"),
        (pd.DataFrame({"c": pd.Categorical([1, 2])}), "x, column 'c': expected numbers, got categories"),
        (pl.Series(["1", "2"], dtype=pl.Enum(["1", "2"])), "x: expected numbers, got categories"),
        (pa.array([1, 2, 1]).dictionary_encode(), "x: expected numbers, got categories"),
        (
            pa.table({"a": [1.0, 2.0], "c": pa.array([1, 2]).dictionary_encode()}),
            "x, column 'c': expected numbers, got categories",
        ),
        (
            pa.RecordBatch.from_pydict({"a": [1.0], "c": pa.array([1]).dictionary_encode()}),
            "x, column 'c': expected numbers, got categories",
        ),
        (pa.table({"a": [1.0], "city": ["Bern"]}), "x, column 'city': expected numbers, got text"),
        (pa.table({"when": [datetime.date(2020, 1, 1)]}), "x, column 'when': expected numbers, got dates"),
        (MixtureDensityNetwork(3, 1)(X), "x: expected numbers, got GaussianMixture$"),
        ([torch.distributions.Normal(torch.zeros(2), 1.0)] * 2, "x: expected numbers, got list of 2"),
        ([torch.zeros(2), torch.zeros(3)], "x: expected numbers in rows of one length, got list of 2"),
        ([torch.zeros(2), "text"], "x: expected numbers, got text"),
        ([torch.tensor(1j)], "x: expected numbers, got complex numbers"),
    ],
)
def test_what_is_no_number_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        as_tensor(values, "x")


def test_shapes_of_draws_and_masses_are_numbers():
    torch.manual_seed(0)
    mixture = MixtureDensityNetwork(3, 1)(NUMBERS)
    assert mixture.sample(3).shape == mixture.rsample(3).shape == mixture.sample([3]).shape == (3, 5, 1)
    with pytest.raises(ValueError, match=r"sample_shape: expected a number of draws, or a shape of them, got 'a'"):
        mixture.sample("a")
    with pytest.raises(ValueError, match=r"mass: expected a probability in \(0, 1\), got ndarray float64 \(2,\)"):
        mixture.interval(np.array([0.5, 0.9]))
    assert_close(mixture.interval(torch.tensor(0.5)), mixture.interval(0.5))


def test_values_are_never_printed():
    assert describe(torch.zeros(100, 3)) == "Tensor torch.float32 (100, 3)"
    assert describe(X) == "DataFrame (5, 3)"
    with pytest.raises(ValueError, match=r"^value: expected shape \(\*batch, 1\), got \(100, 2\)$"):
        MixtureDensityNetwork(3, 1)(NUMBERS).log_prob(np.zeros((100, 2)))


def test_single_numbers_are_no_rows():
    with pytest.raises(ValueError, match="y: expected a row for each observation, got a single number"):
        as_array(1.0, "y")


# Every entry point


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    trained = MixtureDensityNetwork(3, 3, 2, 8, noise=Full())
    trained.initialize_(torch.tensor(NUMBERS), torch.tensor(NUMBERS))
    return trained


@pytest.fixture(scope="module")
def ensemble(network):
    return pyro_mdn.DeepEnsemble([network, network])


ENTRIES = {
    "call": lambda n, e, v: n(v).mean,
    "loss": lambda n, e, v: n.loss(v, v),
    "raw": lambda n, e, v: n.raw(v)[0],
    "features": lambda n, e, v: n.features(v),
    "ensemble": lambda n, e, v: e(v).mean,
    "members": lambda n, e, v: e.members(v).mean,
    "log_prob": lambda n, e, v: n(v).log_prob(v),
    "component_log_prob": lambda n, e, v: n(v).component_log_prob(v),
    "responsibilities": lambda n, e, v: n(v).responsibilities(v),
    "cdf": lambda n, e, v: n(v).cdf(v),
    "rosenblatt": lambda n, e, v: n(v).rosenblatt(v),
    "affine": lambda n, e, v: n(v).affine(v).mean,
    "log_score": lambda n, e, v: scores.log_score(n(v), v),
    "crps": lambda n, e, v: scores.crps(n(v), v),
    "pinball": lambda n, e, v: scores.pinball(n(v), v, 0.3),
    "interval_score": lambda n, e, v: scores.interval_score(n(v), v, 0.9),
    "interval_log_score": lambda n, e, v: scores.interval_log_score(n(v), v, 1.0),
    "coverage": lambda n, e, v: scores.coverage(n(v), v, 0.9),
    "dawid_sebastiani": lambda n, e, v: scores.dawid_sebastiani(n(v), v),
    "pit": lambda n, e, v: scores.pit(n(v), v),
    "pit of cells": lambda n, e, v: scores.mean_pit(n(v), v, [1, 1, 2]),
    "loss of cells": lambda n, e, v: NegativeLogLikelihood(n, cell=[1, 1, 2]).eval()(v, v),
    "loss of one cell": lambda n, e, v: NegativeLogLikelihood(n, cell=1.0).eval()(v, v),
    "compare": lambda n, e, v: torch.tensor(scores.compare({"a": n(v)}, v)["a"]),
    "coverage_table": lambda n, e, v: calibration.coverage_table(n(v), v).coverage,
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_takes_every_container(network, ensemble, entry, kind):
    expected = ENTRIES[entry](network, ensemble, torch.tensor(NUMBERS))
    assert_close(ENTRIES[entry](network, ensemble, CONTAINERS[kind]), expected, equal_nan=True)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_draws_and_conditionals_of_every_container(network, kind):
    x = CONTAINERS[kind]
    torch.manual_seed(0)
    drawn = network.sample(x)
    torch.manual_seed(0)
    assert torch.equal(drawn, network.sample(torch.tensor(NUMBERS)))
    conditional = network(x).condition(X[["age"]], 0)
    assert_close(conditional.mean, network(torch.tensor(NUMBERS)).condition(torch.tensor(NUMBERS[:, :1]), 0).mean)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_training_takes_every_container(kind):
    settings = {"max_epochs": 2, "progress": False, "seed": 0, "validation": 0.0}
    states = []
    for values in (CONTAINERS[kind], torch.tensor(NUMBERS)):
        torch.manual_seed(0)
        trained = MixtureDensityNetwork(3, 3, 2, 8)
        fit(trained, values, values, **settings)
        states.append(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("noise", [Diagonal(), Full()])
def test_one_output_may_lack_its_axis(noise):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(3, 1, 2, 8, noise=noise)
    y = X["score"]
    column = torch.tensor(y.to_numpy()).unsqueeze(-1)
    mixture = network(X)
    for method in ("log_prob", "cdf", "component_log_prob", "responsibilities", "rosenblatt"):
        assert_close(getattr(mixture, method)(y), getattr(mixture, method)(column))
    for score in (scores.log_score, scores.crps, scores.pit, scores.energy_score, scores.dawid_sebastiani):
        assert_close(score(mixture, y), score(mixture, column))
    assert_close(scores.compare({"a": mixture}, y), scores.compare({"a": mixture}, column))
    assert_close(scores.mean_pit(mixture, y, 0.5), scores.mean_pit(mixture, column, 0.5))
    table, expected = calibration.coverage_table(mixture, y), calibration.coverage_table(mixture, column)
    assert_close(table.coverage, expected.coverage)
    assert_close(network.loss(X, y), network.loss(X, column))


@pytest.mark.parametrize("kind", ["int64 tensor", "int64 array", "list", "frame", "float64 tensor", "polars"])
@pytest.mark.parametrize("name", ["log_prob", "component_log_prob", "cdf", "log_cdf", "log_score", "crps", "pit"])
def test_digits_are_kept_in_every_container(name, kind):
    """The nearest number in single precision is a whole standard deviation away."""
    locs = torch.tensor([[2.0**24]])
    mixture = GaussianMixture(torch.zeros(1), locs, IsotropicCovariance(torch.ones(1)))
    whole = np.array([[2**24 + 1]])
    value = {
        "int64 tensor": torch.from_numpy(whole),
        "int64 array": whole,
        "list": whole.tolist(),
        "frame": pd.DataFrame(whole),
        "float64 tensor": torch.from_numpy(whole).double(),
        "polars": pl.DataFrame(whole),
    }[kind]
    function = getattr(scores, name) if hasattr(scores, name) else lambda m, y: getattr(m, name)(y)
    expected = function(mixture.double(), torch.from_numpy(whole).double())
    result = function(mixture, value)
    assert result.dtype == torch.float32
    assert_close(result, expected.float())


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_probabilities_may_be_arrays(noise):
    torch.manual_seed(0)
    mixture = MixtureDensityNetwork(3, 3, 2, 8, noise=noise)(X)
    levels = np.array([0.1, 0.5, 0.9], np.float32).reshape(3, 1, 1)
    assert_close(mixture.icdf(levels), mixture.icdf(torch.tensor(levels)))
    assert_close(mixture.icdf([0.1, 0.5, 0.9]), mixture.icdf(torch.tensor([0.1, 0.5, 0.9])))
    inner = mixture.rosenblatt(mixture.mean)
    assert_close(mixture.inverse_rosenblatt(inner.detach().numpy()), mixture.inverse_rosenblatt(inner))


@pytest.mark.parametrize("backend", ["pandas", "nullable", "arrow", "polars"])
def test_estimators_take_frames_and_remember_their_columns(backend):
    frame = {"pandas": X, "nullable": CONTAINERS["nullable"], "arrow": CONTAINERS["arrow"]}.get(
        backend, CONTAINERS["polars"]
    )
    settings = {"max_epochs": 2, "random_state": 0, "validation": 0.0}
    model, expected = MDNRegressor(**settings).fit(frame, frame), MDNRegressor(**settings).fit(NUMBERS, NUMBERS)
    np.testing.assert_array_equal(model.predict(frame), expected.predict(NUMBERS))
    assert list(model.feature_names_in_) == list(X.columns)
    assert model.score(frame, frame) == expected.score(NUMBERS, NUMBERS)


def test_estimators_take_reversed_views_and_refuse_dates():
    settings = {"max_epochs": 2, "random_state": 0, "validation": 0.0}
    expected = MDNRegressor(**settings).fit(NUMBERS[::-1].copy(), NUMBERS[::-1].copy())
    for view in (NUMBERS[::-1], X.iloc[::-1], np.flip(NUMBERS, 0)):
        model = MDNRegressor(**settings).fit(view, view)
        np.testing.assert_array_equal(model.predict(view), expected.predict(NUMBERS[::-1]))
    dates = pd.DataFrame({"when": pd.date_range("2020", periods=5)})
    for bad in (dates, dates.to_numpy(), dates["when"]):
        with pytest.raises(ValueError, match=r"y.*: expected numbers, got dates"):
            MDNRegressor(**settings).fit(NUMBERS, bad)
    with pytest.raises(ValueError, match="X, column 'when': expected numbers, got dates"):
        MDNRegressor(**settings).fit(dates, NUMBERS)
    with pytest.raises(ValueError, match="X, column 'when': expected numbers, got dates"):
        model.predict(X.assign(when=dates["when"]))


def test_inference_data_of_frames(network):
    pytest.importorskip("arviz")
    data = to_inference_data(network, y=X, x=X)
    assert list(data["observed_data"].data_vars) == ["age", "member", "score"]


# Where a number is not finite


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.assign(score=[0.5, np.nan, 1, np.inf, 2]), "got nan in row 1, column 'score', and 1 more"),
        (
            X.assign(score=[0.5, np.nan, 1, 0, 2]).set_index(pd.Index(list("abcde"))),
            r"got nan in row 1 \(index 'b'\), column 'score'$",
        ),
        (np.where(NUMBERS == 4, -np.inf, NUMBERS), "got -inf in row 2, column 0$"),
        (pl.DataFrame({"a": [1.0, None], "b": [1, 1], "c": [1, 1]}), "got nan in row 1, column 'a'$"),
        (pa.table({"a": [1.0, None], "b": [1, 1], "c": [1, 1]}), "got nan in row 1, column 'a'$"),
    ],
)
def test_errors_say_where_a_number_is_not_finite(x, message):
    network = MixtureDensityNetwork(3, 1)
    for call in (network, lambda x: network.loss(x, np.zeros(len(x))), lambda x: fit(network, x, np.arange(len(x)))):
        with pytest.raises(ValueError, match="x: expected finite numbers, " + message):
            call(x)


def test_numbers_beyond_the_precision_of_the_network_are_named():
    network, x, y = MixtureDensityNetwork(3, 1), np.zeros((4, 3)), np.zeros((4, 1))
    ensemble = DeepEnsemble(network, 2)
    large_x, large_y = np.where(np.eye(4, 3) > 0, 1e60, x), np.array([[0], [0], [1e60], [0]])
    message = r"x: expected finite numbers, got 1e\+60, beyond the range of torch.float32, .*0.*, and \d more"
    for call in (network, network.raw, network.sample, network.predict, network.model, ensemble, ensemble.predict):
        with pytest.raises(ValueError, match=message):
            call(large_x)
    for call in (lambda: network.loss(large_x, y), lambda: ensemble.loss([large_x] * 2, [y] * 2)):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: network.loss(x, large_y),
        lambda: network.model(x, large_y),
        lambda: ensemble.loss([x] * 2, [large_y] * 2),
    ):
        with pytest.raises(ValueError, match=r"y: .*, got 1e\+60, beyond the range of torch.float32"):
            call()
    assert bool(network.double()(large_x).locs.isfinite().all())
    missing = torch.tensor([[torch.nan], [3e38], [-3e38], [0.0]]).double()
    assert network.float().loss(x, missing).shape == (4,)


def test_errors_say_which_target_is_infinite_or_out_of_range():
    network = MixtureDensityNetwork(3, 1)
    with pytest.raises(ValueError, match=r"y: expected finite numbers, or NaN for missing ones, got inf in row 4"):
        fit(network, X, pd.DataFrame({"price": [1.0, np.nan, 2.0, 3.0, np.inf]}))
    with pytest.raises(ValueError, match=r"y: .*, got 1e\+300, beyond the range of torch.float32, in row 2"):
        fit(network, X, np.array([1.0, 2.0, 1e300, 0.0, 1.0]))
    sequences = torch.zeros(2, 3, 3)
    sequences[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got nan at position \(1, 2, 0\)"):
        network(sequences)
