"""The estimator against its own distributions, and scikit-learn's checks of it."""

import math
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import multivariate_normal
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import make_regression
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale

from pyro_mdn import DeepEnsemble, Diagonal, Fixed, Full, GaussianMixture, Isotropic, LowRank, Targets, scores
from pyro_mdn.sklearn import (
    MDNRegressor,
    Scorer,
    concordance,
    neg_crps,
    neg_integrated_brier,
    neg_interval_score,
    neg_log_score,
    predictive_distribution,
)

GEYSER = Path(__file__).parents[1] / "examples" / "data" / "geyser.csv"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 3))
Y = np.stack([np.sin(X[:, 0]), X[:, 1] - X[:, 0]], 1) + 0.1 * RNG.normal(size=(80, 2))
Y1 = Y[:, 0]
WEIGHT = RNG.uniform(0.5, 2.0, 80)


def regressor(**settings):
    quick = {"n_components": 2, "hidden_dim": 8, "max_epochs": 4, "random_state": 0}
    return MDNRegressor(**{**quick, **settings})


@pytest.fixture(scope="module")
def single():
    return regressor().fit(X, Y1)


@pytest.fixture(scope="module")
def double():
    return regressor(noise="full").fit(X, Y)


# scikit-learn's own checks

CHECKS = """
import sys, warnings
from sklearn.utils.estimator_checks import check_estimator
from pyro_mdn.sklearn import MDNRegressor
warnings.simplefilter("ignore")
estimator = MDNRegressor(n_components=2, hidden_dim=8, max_epochs=20, ensemble_size=int(sys.argv[1]))
expected = {"check_sample_weight_equivalence_on_dense_data": "a weight scales a loss; two rows are two in a split"}
results = check_estimator(estimator, expected_failed_checks=expected, on_fail=None, on_skip=None)
print(len(results) > 50, {r["check_name"]: r["status"] for r in results if r["status"] != "passed"})
"""


@pytest.mark.parametrize("size", [1, 2])
def test_estimator_checks(size):
    # Without that variable scikit-learn skips what it says of the array API.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCIPY_ARRAY_API": "1"}
    command = [sys.executable, "-c", CHECKS, str(size)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.stdout.strip() == "True {'check_sample_weight_equivalence_on_dense_data': 'xfail'}", shown.stderr


def test_means_are_good_where_score_is_not_r2():
    """What the tag ``poor_score`` spares the check of scikit-learn, on the same data."""
    data, y = make_regression(200, 10, n_informative=1, bias=5.0, noise=20, random_state=42)
    data, y = scale(data), scale(y)
    assert regressor(max_epochs=20).fit(data, y).r2_score(data, y) > 0.5


# Predictions


@pytest.mark.parametrize("y", [Y1, Y1[:, None], Y], ids=["(N,)", "(N, 1)", "(N, 2)"])
def test_shapes_and_dtypes(y):
    model, rest = regressor().fit(X, y), y.shape[1:]
    shapes = {
        (80, *rest): [*model.predict(X, return_std=True), *model.predict_interval(X), model.predict_quantiles(X, 0.5)],
        (80, 2, *rest): [model.predict_quantiles(X, [0.1, 0.9])],
        (4, 80, *rest): [model.sample(X, 4)],
        (1, *rest): [model.predict(X[:1])],
    }
    for shape, arrays in shapes.items():
        assert all(array.shape == shape and array.dtype == np.float64 for array in arrays)
    mixture = model.predict_distribution(X)
    assert isinstance(mixture, GaussianMixture)
    assert mixture.batch_shape == (80,)
    assert not mixture.mean.requires_grad


@pytest.mark.parametrize("kind", ["central", "shortest"])
def test_predictions_are_those_of_the_distribution(double, kind):
    mixture, levels = double.predict_distribution(X), [0.05, 0.5, 0.95]
    mean, std = double.predict(X, return_std=True)
    np.testing.assert_array_equal(mean, mixture.mean)
    np.testing.assert_array_equal(std, mixture.stddev)
    quantiles = torch.tensor(double.predict_quantiles(X, levels))
    for i, level in enumerate(levels):
        torch.testing.assert_close(quantiles[:, i], mixture.icdf(level))
        torch.testing.assert_close(mixture.cdf(quantiles[:, i]), torch.full((80, 2), level, dtype=torch.float64))
    lower, upper = (torch.tensor(end) for end in double.predict_interval(X, 0.7, kind=kind))
    inside = mixture.cdf(upper) - mixture.cdf(lower)
    torch.testing.assert_close(inside, torch.full((80, 2), 0.7, dtype=torch.float64), atol=1e-6, rtol=0)


def test_samples_follow_the_distribution(single):
    draws, mixture = single.sample(X, 4000, random_state=0), single.predict_distribution(X)
    z = (draws.mean(0) - mixture.mean[:, 0].numpy()) / (mixture.stddev[:, 0].numpy() / math.sqrt(4000))
    assert abs(z).max() < 4.5
    np.testing.assert_array_equal(draws[:, :5], single.sample(X, 4000, random_state=0)[:, :5])


def test_precision_of_inputs():
    """Inputs in float32 are what they are in float64."""
    narrow, model = X.astype(np.float32), regressor().fit(X.astype(np.float32), Y)
    np.testing.assert_array_equal(model.predict(narrow), model.predict(narrow.astype(np.float64)))
    np.testing.assert_array_equal(model.predict(X), regressor().fit(narrow.astype(np.float64), Y).predict(X))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_precision_of_training(dtype):
    network = regressor(dtype=dtype).fit(X, Y).network_
    assert all(tensor.dtype == torch.float64 for tensor in network.state_dict().values())
    held = all(torch.equal(weight, weight.float().double()) for weight in network.parameters())
    assert held == (dtype == "float32")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("noise", ["full", "isotropic"])
def test_offsets_that_float32_cannot_hold(size, noise):
    plain, far = (regressor(noise=noise, ensemble_size=size) for _ in range(2))
    plain.fit(X, Y)
    far.fit(X + 1e9, Y - 1e8)
    np.testing.assert_allclose(far.predict_quantiles(X + 1e9) + 1e8, plain.predict_quantiles(X), atol=1e-4)
    assert math.isclose(far.score(X + 1e9, Y - 1e8), plain.score(X, Y), abs_tol=1e-4)


@pytest.mark.parametrize("factor", [1000.0, 2.0**-20])
def test_units(double, factor):
    scaled = regressor(noise="full").fit(X / factor, Y * factor)
    np.testing.assert_allclose(
        scaled.predict_quantiles(X / factor) / factor, double.predict_quantiles(X), rtol=1e-3, atol=1e-3
    )
    assert math.isclose(scaled.score(X / factor, Y * factor), double.score(X, Y) - 2 * math.log(factor), abs_tol=1e-3)


# Randomness, copies


@pytest.mark.parametrize("size", [1, 2])
def test_random_state(size):
    first, second, other = (regressor(ensemble_size=size, random_state=seed).fit(X, Y1) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.predict_quantiles(X), second.predict_quantiles(X))
    assert not np.array_equal(first.predict(X), other.predict(X))


def test_global_generators():
    """NumPy's is drawn from where nothing was said, as in all of scikit-learn; torch's never."""
    state = torch.get_rng_state()
    predictions = []
    for _ in range(2):
        np.random.seed(3)  # noqa: NPY002
        model = regressor(random_state=None).fit(X, Y1)
        predictions.append((model.predict(X), model.sample(X, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(*predictions, strict=True):
        np.testing.assert_array_equal(first, second)
    shared = np.random.RandomState(0)
    assert not np.array_equal(*(regressor(random_state=shared).fit(X, Y1).predict(X) for _ in range(2)))


@pytest.mark.parametrize("settings", [{}, {"ensemble_size": 2}, {"noise": Full(tied=True)}])
def test_pickle_and_clone(settings):
    model = regressor(**settings).fit(X, Y)
    copied = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copied.predict_quantiles(X), model.predict_quantiles(X))
    assert copied.score(X, Y) == model.score(X, Y)
    again = clone(model)
    assert again.get_params() == model.get_params()
    assert not hasattr(again, "network_")
    np.testing.assert_array_equal(again.fit(X, Y).predict(X), model.predict(X))


# Weights and missing targets


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_do_not_count(size):
    weight = np.where(np.arange(80) % 4 == 0, 0.0, WEIGHT)
    kept = weight > 0
    model = regressor(ensemble_size=size).fit(X, Y1, weight)
    dropped = regressor(ensemble_size=size).fit(X[kept], Y1[kept], weight[kept])
    missing = regressor(ensemble_size=size).fit(X, np.where(kept, Y1, np.nan), WEIGHT)
    for other in (dropped, missing):
        np.testing.assert_array_equal(model.predict(X), other.predict(X))
    assert not np.array_equal(model.predict(X), regressor(ensemble_size=size).fit(X, Y1).predict(X))


def test_only_ratios_of_weights_matter():
    model, scaled = regressor().fit(X, Y1, WEIGHT), regressor().fit(X, Y1, 8 * WEIGHT)
    np.testing.assert_array_equal(model.predict(X), scaled.predict(X))


def test_missing_targets_are_marginalised(double):
    y = np.where([True, False], Y, np.nan)
    marginal = double.predict_distribution(X).marginal(0)
    assert math.isclose(double.score(X, y), marginal.log_prob(torch.tensor(Y[:, :1])).mean())
    hidden = np.random.default_rng(1).random(Y.shape) < 0.2
    partly = regressor(noise="full", max_epochs=20).fit(X, np.where(hidden, np.nan, Y))
    assert partly.result_.unobserved == hidden.sum(0).tolist()
    gaussian = multivariate_normal(Y.mean(0), np.cov(Y.T)).logpdf(Y).mean()  # what needs no inputs
    assert partly.score(X, Y) > gaussian + 1


def test_masks_are_honoured_or_refused(double):
    hidden = np.arange(80) % 4 == 0
    y = np.ma.masked_array(np.where(hidden, -9999.0, Y1), hidden)
    missing = np.where(hidden, np.nan, Y1)
    np.testing.assert_array_equal(regressor().fit(X, y).predict(X), regressor().fit(X, missing).predict(X))
    counts = np.ma.masked_array(np.where(hidden, -9999, Y1.round().astype(int)), hidden)
    rounded = np.where(hidden, np.nan, Y1.round())
    np.testing.assert_array_equal(regressor().fit(X, counts).predict(X), regressor().fit(X, rounded).predict(X))
    model = regressor().fit(X, Y1)
    for score in (model.score, model.r2_score, partial(neg_crps, model), partial(neg_interval_score, model)):
        assert score(X, y) == score(X, missing)
        with pytest.raises(ValueError, match="sample_weight contains NaN"):
            score(X, Y1, np.ma.masked_array(WEIGHT, hidden))
    with pytest.raises(ValueError, match="sample_weight contains NaN"):
        regressor().fit(X, Y1, np.ma.masked_array(WEIGHT, hidden))
    masked = np.ma.masked_array(X, np.broadcast_to(hidden[:, None], X.shape))
    for call in (lambda: regressor().fit(masked, Y1), lambda: model.predict(masked), lambda: model.score(masked, Y1)):
        with pytest.raises(ValueError, match="Input X contains NaN"):
            call()


# Scores


def test_scores(single):
    mixture, y = single.predict_distribution(X), torch.tensor(Y1[:, None])
    density = mixture.log_prob(y).numpy()
    assert math.isclose(single.score(X, Y1), density.mean())
    assert math.isclose(single.score(X, Y1, WEIGHT), np.average(density, weights=WEIGHT))
    assert single.log_score(X, Y1, WEIGHT) == -single.score(X, Y1, WEIGHT)
    assert neg_log_score(single, X, Y1, WEIGHT) == single.score(X, Y1, WEIGHT)
    for scorer, score in [(neg_crps, scores.crps), (neg_interval_score, partial(scores.interval_score, mass=0.9))]:
        values = score(mixture, y).numpy()[:, 0]
        assert math.isclose(scorer(single, X, Y1), -values.mean())
        assert math.isclose(scorer(single, X, Y1, sample_weight=WEIGHT), -np.average(values, weights=WEIGHT))
    narrow = neg_interval_score(single, X, Y1, mass=0.5)
    assert math.isclose(narrow, -scores.interval_score(mixture, y, 0.5).mean())


def test_r2(double):
    assert math.isclose(double.r2_score(X, Y), r2_score(Y, double.predict(X)))
    assert math.isclose(double.r2_score(X, Y, WEIGHT), r2_score(Y, double.predict(X), sample_weight=WEIGHT))
    y, seen = Y.copy(), np.arange(80) > 9
    y[~seen, 1] = np.nan
    columns = [r2_score(Y[rows, i], double.predict(X)[rows, i]) for i, rows in enumerate([seen | True, seen])]
    assert math.isclose(double.r2_score(X, y), np.mean(columns))


@pytest.mark.parametrize("scorer", [neg_crps, neg_interval_score, neg_log_score])
def test_scores_leave_out_what_was_not_observed(double, scorer):
    y, seen = Y.copy(), np.arange(80) > 9
    y[~seen] = np.nan
    assert math.isclose(scorer(double, X, y), scorer(double, X[seen], Y[seen]))
    assert math.isclose(scorer(double, X, y, WEIGHT), scorer(double, X[seen], Y[seen], WEIGHT[seen]))
    with pytest.raises(ValueError, match="y: expected an observed target"):
        scorer(double, X, np.full_like(Y, np.nan))


# Inside of scikit-learn's other tools


def test_scorers_see_through_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), regressor()).fit(X, Y1)
    direct, transformed = pipeline[-1], pipeline[0].transform(X)
    for scorer in (neg_crps, neg_interval_score, neg_log_score):
        assert scorer(pipeline, X, Y1) == scorer(direct, transformed, Y1)
        assert scorer(make_pipeline(direct), transformed, Y1) == scorer(direct, transformed, Y1)
    assert pipeline.score(X, Y1) == direct.score(transformed, Y1)
    assert torch.equal(predictive_distribution(pipeline, X).mean, direct.predict_distribution(transformed).mean)


@pytest.mark.parametrize("model", [LinearRegression(), TransformedTargetRegressor(regressor())])
def test_no_distribution_to_score(model):
    for estimator in (model, make_pipeline(StandardScaler(), model)):
        with pytest.raises(ValueError, match=r"estimator: expected predict_distribution, got (Linear|Transformed)"):
            neg_crps(estimator.fit(X, Y1), X, Y1)


def test_search_in_a_pipeline():
    grid = {"mdnregressor__n_components": np.arange(1, 3), "mdnregressor__noise": ["diagonal", Full(tied=True)]}
    pipeline = make_pipeline(StandardScaler(), regressor(max_epochs=2))
    search = GridSearchCV(pipeline, grid, scoring={"crps": neg_crps, "log": neg_log_score}, refit="log", cv=2)
    search.fit(X, Y)
    results = search.cv_results_
    for settings, crps, log in zip(*(results[n] for n in ("params", "mean_test_crps", "mean_test_log")), strict=True):
        halves = [slice(0, 40), slice(40, 80)]
        fitted = [clone(pipeline).set_params(**settings).fit(X[half], Y[half]) for half in halves[::-1]]
        for scorer, value in [(neg_crps, crps), (neg_log_score, log)]:
            expected = [scorer(model, X[half], Y[half]) for model, half in zip(fitted, halves, strict=True)]
            np.testing.assert_allclose(value, np.mean(expected))
    assert len(set(results["mean_test_log"])) == 4
    assert search.best_index_ == np.argmax(results["mean_test_log"])
    assert neg_crps(search, X, Y) == neg_crps(search.best_estimator_, X, Y)


def test_old_faithful_has_more_than_one_component():
    eruptions = np.loadtxt(GEYSER, delimiter=",", skiprows=1)
    x, y = eruptions[:-1][:238], eruptions[1:][:238]
    grid = {"n_components": [1, 3, 5], "noise": ["diagonal", "full"]}
    search = GridSearchCV(MDNRegressor(max_epochs=60, random_state=0), grid, cv=3, refit=False, error_score="raise")
    assert search.fit(x, y).best_params_["n_components"] > 1


def test_cross_validation():
    pipeline = make_pipeline(StandardScaler(), regressor())
    values = cross_val_score(pipeline, X, Y1, scoring=partial(neg_interval_score, mass=0.5), cv=2)
    second = clone(pipeline).fit(X[:40], Y1[:40])
    assert math.isclose(values[1], neg_interval_score(second, X[40:], Y1[40:], mass=0.5))
    assert values[0] != values[1]
    for y in (Y1, Y):
        folds = cross_val_predict(regressor(), X, y, cv=2)
        np.testing.assert_array_equal(folds[40:], regressor().fit(X[:40], y[:40]).predict(X[40:]))


@pytest.mark.parametrize("scorer", [neg_crps, partial(neg_interval_score, mass=0.5)])
def test_weights_are_routed_to_scorers(scorer):
    weight = np.linspace(0, 3, 80)
    with config_context(enable_metadata_routing=True):
        model = regressor().set_fit_request(sample_weight=False)
        scoring = {"weighted": clone(Scorer(scorer).set_score_request(sample_weight=True)), "plain": scorer}
        settings = {"cv": 2, "params": {"sample_weight": weight}, "return_estimator": True, "return_indices": True}
        found = cross_validate(model, X, Y1, scoring=scoring, **settings)
        for fold, (fitted, rows) in enumerate(zip(found["estimator"], found["indices"]["test"], strict=True)):
            assert found["test_weighted"][fold] == scorer(fitted, X[rows], Y1[rows], weight[rows])
            assert found["test_weighted"][fold] != found["test_plain"][fold]
    assert pickle.loads(pickle.dumps(Scorer(scorer)))(fitted, X, Y1) == scorer(fitted, X, Y1)


def test_weights_are_routed():
    with config_context(enable_metadata_routing=True):
        model = regressor().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        result = cross_validate(model, X, Y1, cv=2, params={"sample_weight": WEIGHT})
    expected = regressor().fit(X[40:], Y1[40:], WEIGHT[40:]).score(X[:40], Y1[:40], WEIGHT[:40])
    assert result["test_score"][0] == expected


def test_transformed_targets():
    model = TransformedTargetRegressor(regressor(), func=np.log, inverse_func=np.exp).fit(X, np.exp(Y1))
    np.testing.assert_array_equal(model.predict(X), np.exp(model.regressor_.predict(X)))
    np.testing.assert_allclose(model.predict(X), np.exp(regressor().fit(X, Y1).predict(X)), rtol=1e-3)


def test_data_frames():
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(80)[::-1])
    model = regressor().fit(frame, pd.DataFrame(Y, columns=["u", "v"]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert model.n_features_in_ == 3
    assert model.n_outputs_ == 2
    np.testing.assert_array_equal(model.predict(frame), regressor().fit(X, Y).predict(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(X)
    scaler = StandardScaler().set_output(transform="pandas")
    pipeline = make_pipeline(scaler, regressor()).fit(frame, pd.Series(Y1, index=frame.index))
    assert list(pipeline[-1].feature_names_in_) == ["a", "b", "c"]
    assert neg_crps(pipeline, frame, Y1) < 0


# Settings


NOISE = {"diagonal": Diagonal, "full": Full, "isotropic": Isotropic, "low_rank": LowRank, "fixed": Fixed}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("y", [Y1, Y], ids=["one", "two"])
def test_noise_models(noise, y):
    model = regressor(noise=noise, noise_scale=0.3).fit(X, y)
    assert type(model.network_.head.noise) is NOISE[noise]
    assert math.isfinite(model.score(X, y))


def test_settings_of_noise_models():
    assert regressor(noise=Isotropic(tied=True)).fit(X, Y).network_.head.noise == Isotropic(tied=True)
    fixed = regressor(noise="fixed", noise_scale=np.float32(0.5)).fit(X, 100 * Y)
    assert fixed.network_.head.noise == Fixed(0.5)
    variance = fixed.predict_distribution(X).covariance.variance()
    torch.testing.assert_close(variance, torch.full_like(variance, 0.25))
    assert regressor(noise="low_rank").fit(X, Y).network_.head.noise.rank == 2
    assert regressor(noise="low_rank", rank=1).fit(X, Y).network_.head.noise.rank == 1


def test_ensembles():
    model = regressor(ensemble_size=3).fit(X, Y1)
    assert isinstance(model.network_, DeepEnsemble)
    assert len(model.result_.members) == 3
    members = model.network_.members(torch.tensor(X)).mean.mean(0)[:, 0]
    np.testing.assert_allclose(model.predict(X), members.detach())
    assert model.predict_distribution(X).n_components == 6


def test_settings_as_grids_have_them():
    settings = {"n_components": np.int64(2), "hidden_dim": np.int64(8), "ensemble_size": np.int64(1)}
    settings |= {"lr": np.float64(0.02), "batch_size": np.int64(32), "random_state": np.int64(0)}
    model = regressor(**settings).fit(X, Y1)
    np.testing.assert_array_equal(model.predict(X), regressor(batch_size=32, lr=0.02).fit(X, Y1).predict(X))
    widths = regressor(hidden_dim=np.array([8, 4])).fit(X, Y1)
    assert widths.network_.hidden_dim == (8, 4)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"noise": "diag"},
            r"noise: expected a NoiseModel or one of \['diagonal', 'fixed', 'full', 'isotropic', 'low_",
        ),
        ({"noise": None}, "noise: expected a NoiseModel or one of"),
        ({"noise": "fixed"}, "noise_scale: expected a number for noise='fixed', got None"),
        ({"noise": "fixed", "noise_scale": -1.0}, "scale: expected a positive"),
        ({"noise": "low_rank", "rank": 2}, "rank: expected at most dim_out=1, got 2"),
        ({"n_components": 0}, "n_components: expected a positive integer, got 0"),
        ({"n_components": "3"}, "n_components: expected a positive integer, got '3'"),
        ({"hidden_dim": "64"}, "hidden_dim: expected a positive integer or a sequence of them, got '64'"),
        ({"hidden_dim": [8, 0.5]}, "hidden_dim: expected a positive integer"),
        ({"ensemble_size": 0}, "ensemble_size: expected a positive integer, got 0"),
        ({"validation": (X, Y1)}, "validation: expected a fraction"),
        ({"validation": 1.0}, "validation: expected a fraction"),
        ({"dtype": "float16"}, r"dtype: expected one of \['float32', 'float64'\], got 'float16'"),
        ({"lr": 0}, "lr: expected a finite number that is positive"),
        ({"max_epochs": 0}, "max_epochs: expected a positive integer"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        regressor(**settings).fit(X, Y1)


@pytest.mark.parametrize(
    ("x", "y", "weight", "message"),
    [
        (np.where(X > 2, np.nan, X), Y1, None, "Input X contains NaN"),
        (X[:1], Y1[:1], None, "minimum of 2 is required"),
        (X, np.where(Y1 > 1, np.inf, Y1), None, "y contains infinity"),
        (X, np.full(80, np.nan), None, "y: expected an observed target in each column, got none in"),
        (X, np.where([True, False], Y, np.nan), None, "y: expected an observed target in each column, got none in"),
        (X, 1e-60 * Y1, None, r"y: expected columns whose range is within that of torch.float32, got one of \S+e-60"),
        (X, 1e39 * Y1, None, r"y: expected columns whose range is within that of torch.float32, got one of \S+e\+39"),
        (X * [1, 1, 1e-60], Y1, None, r"X: expected columns whose range is within that of torch.float32"),
        (X, Y1[:-1], None, "inconsistent numbers of samples"),
        (X, Y[..., None], None, "Found array with dim 3"),
        (np.full((80, 3), "a"), Y1, None, "could not convert string to float"),
        (X, np.full(80, "a"), None, "could not convert string to float"),
        (X, Y1, np.ones(79), r"sample_weight: expected shape \(80,\), got \(79,\)"),
        (X, Y1, -WEIGHT, "sample_weight: expected numbers that are not negative"),
        (X, Y1, np.zeros(80), "sample_weight: expected .* got zero for all rows"),
    ],
)
def test_bad_data(x, y, weight, message):
    with pytest.raises(ValueError, match=message):
        regressor().fit(x, y, weight)


def test_sparse_inputs_are_refused(single):
    with pytest.raises(TypeError, match="Sparse data was passed for X, but dense data is required"):
        regressor().fit(csr_array(X), Y1)
    with pytest.raises(TypeError, match="Sparse data"):
        single.predict(csr_array(X))


@pytest.mark.parametrize("quantiles", [0.0, 1.0, 1.5, -0.1, np.nan, [0.5, 1.0], [], [[0.5]]])
def test_bad_quantiles(single, quantiles):
    with pytest.raises(ValueError, match=r"quantiles: expected probabilities in \(0, 1\)"):
        single.predict_quantiles(X, quantiles)


def test_bad_predictions(single):
    with pytest.raises(ValueError, match=r"mass: expected a probability in \(0, 1\), got 1"):
        single.predict_interval(X, 1)
    with pytest.raises(ValueError, match="n: expected a positive integer, got 0"):
        single.sample(X, 0)
    with pytest.raises(ValueError, match=r"y: expected shape \(80, 1\) as the prediction has it, got \(80, 2\)"):
        single.score(X, Y)
    with pytest.raises(ValueError, match="sample_weight: expected shape"):
        single.score(X, Y1, WEIGHT[:3])
    with pytest.raises(NotFittedError):
        regressor().predict_distribution(X)


def test_a_refused_fit_leaves_the_last_one():
    model = regressor().fit(X, Y1)
    before = model.predict(X)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(np.full_like(X, np.nan), Y1)
    np.testing.assert_array_equal(model.predict(X), before)


def test_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import pyro_mdn.sklearn"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: pyro_mdn.sklearn needs scikit-learn" in shown.stderr


def test_complex_and_ragged_data_are_named_and_not_printed():
    numbers, rows = np.ones((4, 2)), [[1, 2], [1], [1], [1]]
    model = MDNRegressor(max_epochs=1)
    for X, y, message in [
        (numbers * 1j, numbers, r"X: expected numbers, got ndarray complex128 \(4, 2\): Complex data not supported$"),
        (numbers, numbers * 1j, r"y: expected numbers, got ndarray complex128 \(4, 2\): Complex data not supported$"),
        (rows, numbers, "X: expected numbers in rows of one length, got list of 4$"),
        (numbers, rows, "y: expected numbers in rows of one length, got list of 4$"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(X, y)


def test_positive_targets_have_positive_predictions():
    """The data are centred before training, except targets that go through a transform."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 1))
    y = np.exp(3 + 0.5 * X[:, 0] + 0.3 * rng.normal(size=200))
    model = MDNRegressor(target_transform="log", n_components=1, max_epochs=40, random_state=0).fit(X, y)
    assert (model.predict_quantiles(X, [1e-6]) > 0).all()
    median = model.predict_quantiles(X, 0.5)
    assert np.abs(np.log(median) - 3 - 0.5 * X[:, 0]).mean() < 0.1
    assert clone(model).target_transform == "log"
    with pytest.raises(ValueError, match="y: expected numbers between 0 and inf, got -1 in row 3"):
        MDNRegressor(target_transform="log").fit(X, np.where(np.arange(200) == 3, -1.0, y))


def survival_times(n=300):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 1))
    time, end = np.exp(1 + 0.5 * X[:, 0] + 0.3 * rng.normal(size=n)), rng.uniform(1, 8, n)
    return X, np.minimum(time, end), time <= end


def test_censored_times_of_scikit_survival():
    """A structured array, `Targets`, and the likelihood by hand agree; without censoring, medians are too low."""
    X, time, seen = survival_times()
    structured = np.array(list(zip(seen, time, strict=True)), dtype=[("event", bool), ("time", float)])
    targets = Targets.censored(time, right=~seen)
    settings = {"target_transform": "log", "n_components": 1, "max_epochs": 40, "random_state": 0}
    model = MDNRegressor(**settings).fit(X, structured)
    same = MDNRegressor(**settings).fit(X, targets)
    np.testing.assert_array_equal(model.predict_quantiles(X), same.predict_quantiles(X))
    mixture = model.predict_distribution(X)
    y = torch.tensor(time).unsqueeze(-1)
    by_hand = torch.where(torch.tensor(seen), mixture.log_prob(y), mixture.log_sf(y)[:, 0]).mean().item()
    for given in (structured, targets):
        assert model.score(X, given) == pytest.approx(by_hand, rel=1e-9)
    naive = MDNRegressor(**settings).fit(X, time)
    true = np.exp(1 + 0.5 * X[:, 0])
    error, bias = (np.log(m.predict_quantiles(X, 0.5) / true).mean() for m in (model, naive))
    assert abs(error) < 0.06 < -bias
    assert model.predict(X).shape == (300,)
    brier = partial(neg_integrated_brier, times=[1.0, 2.0, 4.0])
    column = targets.unsqueeze(-1)
    for given in (structured, targets):
        assert brier(model, X, given) == -scores.integrated_brier(mixture, column, [1.0, 2.0, 4.0]).mean().item()
        assert concordance(model, X, given) == scores.concordance(mixture, column).item()
    own = scores.integrated_brier(mixture, column, [1.0, 2.0, 4.0], column[:99]).mean().item()
    assert brier(model, X, structured, train=structured[:99]) == -own
    weight = np.arange(300) % 2
    assert brier(model, X, structured, weight) == pytest.approx(
        -scores.integrated_brier(mixture, column, [1.0, 2.0, 4.0])[1::2].mean().item(), rel=1e-12
    )
    with pytest.raises(ValueError, match="sample_weight: expected none"):
        concordance(model, X, structured, weight)
    quick, scoring = (
        MDNRegressor(**{**settings, "max_epochs": 3}),
        {"brier": brier, "c": concordance, "log": neg_log_score},
    )
    found = cross_validate(quick, X, structured, cv=2, scoring=scoring, error_score="raise")
    assert all(np.isfinite(found[f"test_{name}"]).all() for name in scoring)


def test_censored_targets_of_several_outputs():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 2)), 100 + rng.normal(size=(80, 2))
    targets = Targets.censored(y, left=y < 99.5)
    model = MDNRegressor(max_epochs=3, random_state=0).fit(X, targets)
    assert model.predict(X).shape == (80, 2)
    assert np.isfinite(model.score(X, targets))
    assert model.result_.intervals == ((y < 99.5).sum(0)).tolist()
    with pytest.raises(ValueError, match="expected exact targets"):
        model.r2_score(X, targets)
    with pytest.raises(ValueError, match="a boolean and a number as fields"):
        model.fit(X, np.zeros(80, dtype=[("a", float), ("b", float)]))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X[:40], targets)
