"""Leave-one-out means the same on every ArviZ, also for rows and draws that importance sampling cannot deal with."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats

from pyro_mdn import DiagonalCovariance, GaussianMixture, to_inference_data
from pyro_mdn.adapters.pareto_smoothing import good_k, smoothed_weights
from pyro_mdn.inference_data import compare, loo, loo_pit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

OLD = not az.__version__.startswith("1.")
DRAWS, ROWS = 400, 6


def normal(locs):
    """Mixtures ``(S, N)`` of one component with standard deviation 1."""
    locs = torch.as_tensor(locs)[..., None, None]
    return GaussianMixture(torch.zeros_like(locs[..., 0]), locs, DiagonalCovariance(torch.ones_like(locs)))


def shifts(scale, seed=0):
    return scale * np.random.default_rng(seed).standard_normal((DRAWS, ROWS))


Y = torch.linspace(-1, 1, ROWS, dtype=torch.float64)[:, None]


def log_densities(locs):
    return stats.norm.logpdf(Y.numpy().T, locs)


def result_of(locs, y=Y, chains=1):
    """Total, terms and Pareto's k by ``loo``, and how many of its warnings there were."""
    data = to_inference_data(normal(locs), y=y)
    if chains > 1:
        sites = {"site": torch.arange(float(DRAWS)).reshape(chains, -1)}
        data = with_chains(locs, y, sites)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = loo(data)
    assert {str(w.message).split(":")[0] for w in caught} <= {"loo"}
    total, terms = (found.elpd_loo, found.loo_i) if OLD else (found.elpd, found.elpd_i)
    assert bool(found.warning) == bool(caught)
    assert float(found.se) == pytest.approx(np.sqrt(ROWS * np.asarray(terms).var(ddof=1)), rel=1e-9)
    return float(total), np.asarray(terms), np.asarray(found.pareto_k), len(caught)


def with_chains(locs, y, sites):
    from pyro_mdn import PosteriorSamples

    shape = next(iter(sites.values())).shape
    posterior = PosteriorSamples(sites, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), [1.0], 0.0)
    return to_inference_data(normal(locs), y=y, posterior=posterior)


# Smoothing


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 2.0, 20.0])
def test_weights_are_those_of_arviz(scale):
    log_likelihood = shifts(scale)[:100].T
    weights, k = smoothed_weights(log_likelihood, 0.9)
    if OLD:
        expected = az.psislw(-log_likelihood, reff=0.9)
    else:
        from arviz_stats.base import array_stats

        expected = array_stats.psislw(log_likelihood, r_eff=0.9, axis=-1)
    assert np.allclose(weights, expected[0], atol=1e-8)
    assert np.allclose(k, expected[1], atol=1e-8)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.6])
def test_k_is_the_shape_of_the_tail(shape):
    draws = stats.genpareto(shape).rvs((200, 4000), random_state=0)
    _, k = smoothed_weights(-np.log(1 + draws))
    drawn_to_the_prior = (189 * shape + 5) / 199  # 190 draws are smoothed
    error = k.std() / np.sqrt(len(k))
    assert abs(k.mean() - drawn_to_the_prior) < 4 * error + 0.02


def test_weights_do_not_depend_on_a_constant():
    log_likelihood = shifts(1.0).T
    weights, k = smoothed_weights(log_likelihood)
    again, same = smoothed_weights(log_likelihood - 1e4)
    assert np.allclose(weights, again, atol=1e-8)
    assert np.allclose(k, same, atol=1e-6)
    assert np.allclose(special.logsumexp(weights, axis=1), 0, atol=1e-12)


# Rows and draws that importance sampling cannot deal with


def test_a_row_with_the_same_density_under_all_draws_is_exact():
    locs = shifts(0.3)
    expected = result_of(locs)
    locs[:, 2] = 0.5
    total, terms, k, warned = result_of(locs)
    assert terms[2] == pytest.approx(stats.norm.logpdf(float(Y[2]), 0.5), abs=1e-12)
    assert (k[2], warned) == (0, 0)
    others = np.arange(ROWS) != 2
    assert np.allclose(terms[others], expected[1][others], atol=1e-3)  # effective draws are a mean over rows
    assert total == pytest.approx(terms.sum())
    found = loo_pit(normal(locs), Y)
    assert found.pareto_k[2] == 0
    assert float(found.pit[2]) == pytest.approx(stats.norm.cdf(float(Y[2]), 0.5))


def test_a_row_without_targets_is_no_problem():
    y = Y.clone()
    y[3] = torch.nan
    found = loo_pit(normal(shifts(0.3)), y)
    assert found.pareto_k[3] == 0
    assert found.pit.isnan().squeeze(-1).tolist() == [False] * 3 + [True] + [False] * 2
    full = loo_pit(normal(shifts(0.3)), Y.numpy())
    assert torch.equal(found.pit[:3], full.pit[:3])


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_chain_that_is_stuck_has_infinite_k(offset):
    """The stuck draws have the lowest density, so that their weights are the largest: all equal."""
    locs = shifts(0.3)
    locs[DRAWS // 2 :] = 4.0 + offset
    total, terms, k, warned = result_of(locs, chains=2)
    harmonic = np.log(DRAWS) - special.logsumexp(-log_densities(locs), axis=0)  # nothing is smoothed
    assert np.isposinf(k).all()
    assert warned == 1
    assert np.allclose(terms, harmonic, atol=1e-9)
    assert total == pytest.approx(harmonic.sum())
    with pytest.warns(UserWarning, match=r"loo_pit: expected Pareto's k up to 0.62, got 6 of 6 above it, at most inf"):
        assert loo_pit(normal(locs), Y).pareto_k.isposinf().all()


@pytest.mark.parametrize("scale", [10.0, 40.0, 300.0])
def test_uneven_draws_are_never_called_good(scale):
    locs = shifts(scale)
    total, terms, k, warned = result_of(locs)
    assert warned == 1
    assert (k > good_k(DRAWS)).all()
    assert np.isfinite(total)
    assert (terms >= log_densities(locs).min(0) - 1e-6).all()
    assert (terms <= log_densities(locs).max(0)).all()


@pytest.mark.parametrize("scale", [0.3, 3.0, 40.0])
def test_float32_has_the_sums_of_float64(scale):
    """Locations are exact in both, so that the densities differ by rounding alone."""
    locs, y = np.round(shifts(scale) * 64) / 64, torch.round(Y * 64) / 64
    single = result_of(locs.astype(np.float32), y.float())
    double = result_of(locs, y)
    assert single[0] == pytest.approx(double[0], rel=1e-5)
    assert np.allclose(single[2], double[2], rtol=1e-3, atol=1e-3)
    data = to_inference_data(normal(locs.astype(np.float32)), y=y.float())
    stored = data["log_likelihood"]["y"]
    assert stored.dtype == np.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if scale < 10:  # ArviZ itself, on what is stored
            direct = az.loo(data, reff=1.0, var_name="y")
            assert float(direct.elpd_loo if OLD else direct.elpd) == pytest.approx(double[0], rel=0.01, abs=0.02)
        kept = stored.copy(data=np.asarray(stored, dtype=np.float32))  # a file of old
        dropped = data["log_likelihood"].to_dataset() if hasattr(data["log_likelihood"], "to_dataset") else None
        if OLD:
            data["log_likelihood"]["y"] = kept
        else:
            data["log_likelihood"] = type(data)(dropped.assign(y=kept))
        assert data["log_likelihood"]["y"].dtype == np.float32
        again = loo(data)
        assert float(again.elpd_loo if OLD else again.elpd) == pytest.approx(double[0], rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_densities_that_are_not_finite_are_refused(value):
    data = to_inference_data(normal(shifts(0.3)), y=Y)
    np.asarray(data["log_likelihood"]["y"].data)[0, 3, 2] = value
    with pytest.raises(ValueError, match=r"log_likelihood: expected finite numbers, got 1 of 2400"):
        loo(data)


# Comparison


def test_differences_have_one_meaning():
    models = {"far": shifts(0.2) + 1.0, "near": shifts(0.2, 1), "middle": shifts(0.2, 2) + 0.5}
    results = {name: result_of(locs)[1] for name, locs in models.items()}
    table = compare({name: to_inference_data(normal(locs), y=Y) for name, locs in models.items()})
    assert list(table.index) == ["near", "middle", "far"]
    assert table["rank"].tolist() == [0, 1, 2]
    for name, terms in results.items():
        behind = terms - results["near"]
        assert table.loc[name, "elpd"] == pytest.approx(terms.sum(), rel=1e-12)  # unrounded
        assert table.loc[name, "elpd_diff"] == pytest.approx(behind.sum(), rel=1e-12)
        assert table.loc[name, "dse"] == pytest.approx(np.sqrt(ROWS * behind.var()), rel=1e-12)
        assert table.loc[name, "se"] == pytest.approx(np.sqrt(ROWS * terms.var(ddof=1)), rel=1e-12)
        assert not table.loc[name, "warning"]
    assert (table["elpd_diff"] <= 0).all()
    assert {"p", "weight"} <= set(table.columns)
    if not OLD:
        rounded = compare({n: to_inference_data(normal(m), y=Y) for n, m in models.items()}, round_to=1)
        assert rounded.loc["far", "elpd"] == round(table.loc["far", "elpd"], 1)


def test_stacking_survives_a_density_that_underflows():
    """The best weights of two models are those of a search in logarithms."""
    y = Y.clone()
    y[0] = 45.0
    models = {"a": shifts(0.01), "b": shifts(0.01, 1) + 0.4}
    table = compare({name: to_inference_data(normal(locs), y=y) for name, locs in models.items()})
    assert table["elpd"].min() < -800
    one, other = (result_of(locs, y)[1] for locs in models.values())
    weights = np.linspace(0, 1, 1001)[1:-1, None]
    scores = np.logaddexp(np.log(weights) + one, np.log1p(-weights) + other).sum(1)
    assert table.loc["a", "weight"] == pytest.approx(float(weights[scores.argmax(), 0]), abs=2e-3)


def test_warnings_name_the_model_and_the_caller():
    good, bad = (to_inference_data(normal(shifts(scale)), y=Y) for scale in (0.3, 40.0))
    with pytest.warns(UserWarning, match=r"compare, 'uneven': expected Pareto's k up to 0.62, got 6 of 6") as caught:
        table = compare({"good": good, "uneven": bad})
    assert table["warning"].tolist() == [False, True]
    with pytest.warns(UserWarning, match="loo: expected Pareto's k up to 0.62") as more:
        loo(bad)
    assert {warning.filename for warning in [*caught, *more]} == {__file__}


def test_models_of_other_rows_are_refused():
    locs = shifts(0.2)
    index = pd.date_range("2020-01-01", periods=ROWS)
    frame = pd.DataFrame({"y": np.ones(ROWS)}, index)  # the targets are equal, only their labels are not
    data = to_inference_data(normal(locs), y=frame)
    reverse = to_inference_data(normal(locs[:, ::-1].copy()), y=frame.iloc[::-1])
    message = "models: expected the same targets of the same rows in the same order, got others in 'a' and 'b'"
    with pytest.raises(ValueError, match=message):
        compare({"a": data, "b": reverse})
    with pytest.raises(ValueError, match=message):
        compare({"a": data, "b": to_inference_data(normal(locs), y=frame.rename(columns={"y": "z"}))})
    assert (compare({"a": data, "b": to_inference_data(normal(locs), y=frame)})["elpd_diff"] == 0).all()
