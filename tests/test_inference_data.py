"""What goes to ArviZ, of either generation, against the mixtures and closed forms; and what ArviZ makes of it."""

import builtins
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cases import linear_regression
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from scipy import stats
from torch import nn
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    Diagonal,
    DiagonalCovariance,
    GaussianMixture,
    Mixture,
    MixtureDensityNetwork,
    PosteriorSamples,
    Targets,
    bayesianize,
    fit,
    fit_mcmc,
    posterior_predictive,
    scores,
    to_inference_data,
)
from pyro_mdn.calibration import uniformity_p_value
from pyro_mdn.inference_data import compare, loo, loo_pit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OLD = not az.__version__.startswith("1.")
FILE = Path(__file__).parent / "data" / "arviz_0_23.nc"
ROWS = 30


def make(dim_out=2, *, latent=False):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(2, dim_out, 3, hidden_dim=6, noise=Diagonal()).double()
    x = torch.randn(ROWS, 2, dtype=torch.float64)
    y = 3 + 2 * torch.randn(ROWS, dim_out, dtype=torch.float64)
    network.initialize_(x, y)
    return (bayesianize(network, layers="head") if latent else network), x, y


def chains(network, count=2, size=40):
    """Draws around the starting weights that stand for those of a sampler."""
    guide = AutoNormal(network.model, init_scale=0.1)
    guide(torch.zeros(1, 2).double(), torch.zeros(1, network.head.dim_out).double())
    names = ["head.linear.bias", "head.linear.weight"]
    samples = {
        name: torch.stack([guide()[name].detach() for _ in range(count * size)]).reshape(count, size, *shape)
        for name, shape in zip(names, [(15,), (15, 6)], strict=True)
    }
    diverging = torch.zeros(count, size, dtype=torch.bool)
    diverging[1, 3] = True
    log_joint = torch.arange(float(count * size)).reshape(count, size)
    return PosteriorSamples(samples, log_joint, diverging, [0.9] * count, 1.0)


def values(data, group, name):
    return torch.as_tensor(np.asarray(data[group][name]))


# Groups


def test_point_network():
    network, x, y = make()
    data = to_inference_data(network, x=x, y=y, num_samples=200, seed=0)
    mixture = network(x)
    assert dict(data["posterior_predictive"].sizes) == {"chain": 1, "draw": 200, "obs_id": ROWS}
    assert_close(values(data, "log_likelihood", "joint")[0, 0], mixture.log_prob(y).detach())
    for i, name in enumerate(["y0", "y1"]):
        assert_close(values(data, "log_likelihood", name)[0, 0], mixture.marginal(i).log_prob(y[:, [i]]).detach())
        assert_close(values(data, "observed_data", name), y[:, i])
        drawn = values(data, "posterior_predictive", name)[0]
        error = (drawn.mean(0) - mixture.mean[:, i]).detach() / (mixture.stddev[:, i].detach() / 200**0.5)
        assert error.abs().max() < 5
    assert_close(values(data, "posterior", "mean")[0, 0], mixture.mean.detach())
    assert_close(values(data, "constant_data", "x"), x)
    assert data.attrs["inference_method"] == "point estimate"
    assert data.attrs["y_shift"] == pytest.approx(network.head.shift.tolist())
    assert {"torch_version", "pyro_version", "arviz_version", "inference_library_version"} <= set(data.attrs)


@pytest.mark.parametrize("returned", ["torch", "numpy"])
def test_draws_that_predictive_gives_have_the_shapes_of_weights(returned):
    network, x, y = make(1, latent=True)
    guide = AutoNormal(network.model, init_scale=0.1)
    guide(x, y)
    names = ["head.linear.bias", "head.linear.weight", "y"]
    drawn = Predictive(network.model, guide=guide, num_samples=9, return_sites=names)(x)
    assert drawn["head.linear.bias"].ndim == 3
    assert "y" in drawn
    drawn = {name: value.detach() if returned == "torch" else value.detach().numpy() for name, value in drawn.items()}
    data = to_inference_data(network, x=x, y=y, posterior={**drawn, "offset": torch.arange(9.0)}, predictions=x[:4])
    posterior = data["posterior"]
    assert "y" not in posterior
    assert values(data, "posterior", "offset")[0].tolist() == [*range(9)]
    for name in names[:2]:
        shape = network.get_buffer(f"{name}_start").shape
        assert posterior[name].shape == (1, 9, *shape)
        assert_close(values(data, "posterior", name), torch.as_tensor(drawn[name]).reshape(1, 9, *shape))
    expected = posterior_predictive(network, drawn, x)
    assert_close(values(data, "log_likelihood", "y")[0], expected.log_prob(y))
    assert_close(values(data, "posterior", "mean")[0], expected.mean)
    assert_close(values(data, "posterior_predictive", "y").mean(), expected.mean.mean(), rtol=0.2, atol=0.2)
    with pytest.raises(ValueError, match="posterior: expected the sites"):
        to_inference_data(network, x=x, y=y, posterior={"head.linear.bias": drawn["head.linear.bias"]})


def test_draws_of_the_weights_stay_draws():
    network, x, y = make(1, latent=True)
    posterior = AutoNormal(network.model)
    torch.manual_seed(0)
    mixture = posterior_predictive(network, posterior, x, 70)
    data = to_inference_data(mixture, x=x, y=y, method="SVI")
    assert dict(data["posterior_predictive"]["y"].sizes) == {"chain": 1, "draw": 70, "obs_id": ROWS}
    assert_close(values(data, "log_likelihood", "y")[0], mixture.log_prob(y))
    assert list(data["log_likelihood"].data_vars) == ["y"]
    assert data.attrs["inference_method"] == "SVI"
    made = to_inference_data(network, x=x, y=y, posterior=posterior, num_samples=60)
    assert made.attrs["inference_method"] == "SVI with AutoNormal"
    assert made["log_likelihood"].sizes["draw"] == 60
    again = {name: values(made, "posterior", name)[0] for name in ("head.linear.weight", "head.linear.bias")}
    assert_close(values(made, "log_likelihood", "y")[0], posterior_predictive(network, again, x).log_prob(y))


def test_chains_stay_chains():
    network, x, y = make(latent=True)
    posterior = chains(network)
    data = to_inference_data(network, x=x, y=y, posterior=posterior)
    mixture = posterior_predictive(network, posterior, x)
    assert data["posterior"].sizes["chain"] == 2
    assert_close(values(data, "log_likelihood", "joint").flatten(0, 1), mixture.log_prob(y))
    assert_close(values(data, "posterior", "head.linear.bias"), posterior.samples["head.linear.bias"])
    assert_close(values(data, "sample_stats", "lp"), posterior.log_joint.double())
    assert values(data, "sample_stats", "diverging").nonzero().tolist() == [[1, 3]]
    summary = az.summary(data, var_names=["head.linear.bias"])
    assert len(summary) == 15
    rhat = az.rhat(data, var_names=["head.linear.bias"], method="split")
    expected = posterior.r_hat["head.linear.bias"]
    rhat = rhat.get("posterior", rhat)
    assert np.allclose(np.asarray(rhat["head.linear.bias"]), expected, atol=1e-6)
    assert "head.linear.bias" not in to_inference_data(network, x=x, y=y, posterior=posterior, sites=False)["posterior"]


def test_chains_of_pyro():
    network, x, y = make(1)
    bayesianize(network, layers="head.linear.bias")
    mcmc = MCMC(NUTS(network.model, max_tree_depth=2), num_samples=5, warmup_steps=2, disable_progbar=True)
    mcmc.run(x, y)
    data = to_inference_data(network, x=x, y=y, posterior=mcmc)
    drawn = mcmc.get_samples(group_by_chain=True)["head.linear.bias"]
    assert_close(values(data, "posterior", "head.linear.bias"), drawn)
    assert_close(values(data, "log_likelihood", "y")[0], posterior_predictive(network, mcmc, x).log_prob(y))
    assert values(data, "sample_stats", "diverging")[0].sum() == len(mcmc.diagnostics()["divergences"]["chain 0"])
    assert data.attrs["inference_method"] == "MCMC"


def test_ensemble_is_pooled():
    network, x, y = make(1)
    ensemble = DeepEnsemble(network, 3)
    data = to_inference_data(ensemble, x=x, y=y, num_samples=500, seed=0)
    assert data.attrs["inference_method"] == "ensemble"
    assert data["log_likelihood"].sizes["draw"] == 3
    drawn, pooled = values(data, "posterior_predictive", "y")[0], ensemble(x)
    assert drawn.shape == (500, ROWS)
    assert uniformity_p_value(torch.stack([pooled.cdf(d[:, None]) for d in drawn[:20]]).detach()) > 0.001


def test_quantities():
    network, x, y = make()
    names = ["mean", "stddev", "weights", "locs", "scales", "entropy_bounds"]
    data = to_inference_data(network, x=x, y=y, quantities=names)
    mixture = network(x)
    expected = {
        "stddev": mixture.stddev,
        "weights": mixture.logits.exp(),
        "locs": mixture.locs,
        "scales": mixture.covariance.variance().sqrt(),
        "entropy_bounds": torch.stack(mixture.entropy_bounds(), -1),
    }
    for name, value in expected.items():
        assert_close(values(data, "posterior", name)[0, 0], value.detach())
    assert data["posterior"]["locs"].dims == ("chain", "draw", "obs_id", "component", "output")
    assert data["posterior"]["entropy_bounds"].coords["bound"].values.tolist() == ["lower", "upper"]


def test_prior_and_new_inputs():
    network, x, y = make()
    drawn = torch.randn(7, ROWS, 2)
    data = to_inference_data(network, x=x, y=y, prior=drawn, predictions=x[:4], num_samples=50)
    assert_close(values(data, "prior_predictive", "y1")[0], drawn[..., 1].double())
    assert dict(data["predictions"]["y0"].sizes) == {"chain": 1, "draw": 50, "obs_id": 4}
    assert_close(values(data, "predictions_constant_data", "x"), x[:4])
    mixture = network(x)
    data = to_inference_data(mixture, y=y, prior=mixture.expand((5, ROWS)), predictions=(network(x[:3]), x[:3]))
    assert data["prior_predictive"].sizes["draw"] == 5
    assert data["predictions"].sizes["obs_id"] == data["predictions_constant_data"].sizes["obs_id"] == 3
    latent, x, y = make(latent=True)
    data = to_inference_data(latent, x=x, y=y, posterior=chains(latent), predictions=x[:4])
    assert dict(data["predictions"]["y0"].sizes) == {"chain": 2, "draw": 40, "obs_id": 4}


def test_numbers_have_a_type_that_sums_keep_exact():
    network, x, y = make(latent=True)
    posterior, network, x, y = chains(network), network.float(), x.float(), y.float()
    posterior = replace(posterior, samples={name: value.float() for name, value in posterior.samples.items()})
    given = {"prior": torch.randn(4, ROWS, 2), "predictions": x[:4], "quantities": ["mean", "weights"]}
    data = to_inference_data(network, x=x, y=y, posterior=posterior, **given)
    assert posterior_predictive(network, posterior, x).locs.dtype == torch.float32
    groups = ["posterior", "posterior_predictive", "log_likelihood", "prior_predictive", "observed_data", "predictions"]
    found = {data[group][name].dtype for group in groups for name in data[group].data_vars}
    assert found | {data["sample_stats"]["lp"].dtype} == {np.dtype("float64")}


def test_float32_draws_have_the_moments_of_float64():
    """With an offset of 1e5, sums of a thousand numbers in float32 are wrong by more than their spread."""
    torch.manual_seed(0)
    locs = 1e5 + torch.randn(1000, ROWS, 1, 1)
    mixture = GaussianMixture(torch.zeros(1000, ROWS, 1), locs, DiagonalCovariance(torch.ones_like(locs)))
    data = to_inference_data(mixture, y=torch.full((ROWS, 1), 1e5), quantities=["mean"])
    for found, drawn in [("mean", mixture.mean), ("y", None)]:
        stored = data["posterior" if found == "mean" else "posterior_predictive"][found]
        exact = np.asarray(stored, dtype=np.float64)[0]
        assert drawn is None or np.array_equal(exact, drawn.double())
        assert np.allclose(np.asarray(stored.mean(("chain", "draw"))), exact.mean(0), atol=1e-6, rtol=0)
        assert np.allclose(np.asarray(stored.std(("chain", "draw"))), exact.std(0), rtol=1e-6)


# Names


def test_names_come_from_pandas():
    network, x, y = make()
    index = pd.date_range("2020-01-01", periods=ROWS)
    x, y = pd.DataFrame(x, index, ["age", "height"]), pd.DataFrame(y, index, ["left", "right"])
    data = to_inference_data(network, x=x, y=y, predictions=x[:2])
    assert list(data["observed_data"].data_vars) == ["left", "right"]
    assert set(data["log_likelihood"].data_vars) == {"joint", "left", "right"}
    assert data["constant_data"].coords["input"].values.tolist() == ["age", "height"]
    assert (data["observed_data"].coords["obs_id"].values == index.values).all()
    assert (data["predictions"].coords["obs_id"].values == index.values[:2]).all()
    assert data["posterior"].coords["output"].values.tolist() == ["left", "right"]
    missing = pd.DataFrame({"a": pd.array([1.5] * (ROWS - 1) + [None], dtype="Float64"), "b": 1.0}, index)
    assert to_inference_data(network, x=x, y=missing)["observed_data"]["a"].shape == (ROWS - 1,)
    one, x1, y1 = make(1)
    series = pd.Series(y1.flatten(), name="height")
    assert list(to_inference_data(one, x=x1, y=series)["observed_data"].data_vars) == ["height"]


INDICES = {
    "numbers with NaN": pd.Index([0.0, np.nan, 2.0, np.nan]),
    "times with NaT": pd.DatetimeIndex(["2020-01-01", None, "2021-01-01", None]),
    "time zone": pd.date_range("2020-01-01", periods=4, tz="Europe/Paris"),
    "nullable": pd.Index([1, None, 3, 4], dtype="Int64"),
    "strings": pd.Index(["a", None, "c", "d"], dtype="string"),
    "multi": pd.MultiIndex.from_tuples([("a", 1.0), ("a", np.nan), ("b", 1.0), ("b", 2.0)]),
    "categorical": pd.CategoricalIndex(["a", "b", None, "a"]),
    "objects": pd.Index([3, 1, 2, 0], dtype=object),
    "mixed": pd.Index([1, "a", None, np.nan], dtype=object),
    "periods": pd.period_range("2020-01", periods=4, freq="M"),
    "repeated": pd.Index([1, 1, 2, 2]),
}


@pytest.mark.parametrize("kind", INDICES)
def test_equal_indices_are_equal(kind, tmp_path):
    network, x, y = make()
    index = INDICES[kind]
    x, y = pd.DataFrame(x[:4], index), pd.DataFrame(y[:4], index.copy(), ["a", "b"])
    data = to_inference_data(network, x=x, y=y, num_samples=3)
    data.to_netcdf(str(tmp_path / "a.nc"))
    labels = data["observed_data"].coords["obs_id"].values
    back = az.from_netcdf(str(tmp_path / "a.nc"))["observed_data"].coords["obs_id"].values
    assert len(labels) == 4
    assert (labels[0], labels[3]) == (back[0], back[3]) or pd.isna(labels[3])
    if kind != "repeated":
        with pytest.raises(ValueError, match="x, y: expected the same index in the same order"):
            to_inference_data(network, x=x, y=y.iloc[[2, 1, 0, 3]], num_samples=3)


def test_an_index_of_objects_is_that_of_its_numbers():
    network, x, y = make()
    x, y = pd.DataFrame(x, pd.Index(range(ROWS), dtype=object)), pd.DataFrame(y)
    assert to_inference_data(network, x=x, y=y, num_samples=3)["observed_data"].coords["obs_id"].dtype == np.int64


@pytest.mark.parametrize("kind", ["polars", "arrow table", "arrow frame", "nullable"])
def test_tables_of_other_kinds(kind):
    pl, pa = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    network, x, y = make()
    y[2, 1] = torch.nan
    frames = [pd.DataFrame(x, columns=["u", "v"]), pd.DataFrame(y, columns=["a", "b"])]
    if kind == "polars":
        tables = [pl.from_pandas(frame, nan_to_null=True) for frame in frames]
    elif kind == "arrow table":
        tables = [pa.Table.from_pandas(frame, preserve_index=False) for frame in frames]
    else:
        to = {"dtype_backend": "pyarrow"} if kind == "arrow frame" else {}
        tables = [frame.convert_dtypes(**to) for frame in frames]
    data, expected = (to_inference_data(network, x=x, y=y, num_samples=3, seed=0) for x, y in [tables, frames])
    assert list(data["observed_data"].data_vars) == ["a", "b"]
    assert data["constant_data"].coords["input"].values.tolist() == ["u", "v"]
    assert data["observed_data"]["b"].coords["obs_id_b"].values.tolist() == [i for i in range(ROWS) if i != 2]
    for group in ("log_likelihood", "constant_data", "observed_data"):
        for name in expected[group].data_vars:
            assert np.array_equal(data[group][name], expected[group][name])


@pytest.mark.parametrize("change", ["reverse", "flip", "frame", "order", "long", "strided"])
def test_arrays_of_any_layout(change):
    network, x, y = make()
    changes = {
        "reverse": lambda a: a[::-1],
        "flip": lambda a: np.flip(a, 1),
        "frame": lambda a: pd.DataFrame(a).iloc[::-1],
        "order": lambda a: a.astype(">f8"),
        "long": lambda a: a.astype(np.longdouble),
        "strided": lambda a: np.repeat(a, 2, 0)[::-2],
    }
    x, y = changes[change](x.numpy()), changes[change](y.numpy())
    plain = [torch.tensor(np.array(a, dtype=np.float64, order="C")) for a in (x, y)]
    data = to_inference_data(network, x=x, y=y, num_samples=3, predictions=x[::-1], prior=np.stack([y, y])[::-1])
    expected = network(plain[0]).log_prob(plain[1]).detach()
    assert_close(values(data, "log_likelihood", "joint")[0, 0], expected)
    assert np.array_equal(np.asarray(data["constant_data"]["x"]), plain[0].numpy())


def test_names_can_be_given():
    network, x, y = make()
    coords = {"obs_id": [f"row {i}" for i in range(ROWS)], "input": ["a", "b"]}
    data = to_inference_data(network, x=x.numpy(), y=y.numpy(), output_names=["u", "v"], coords=coords)
    assert data["observed_data"]["u"].coords["obs_id"].values[3] == "row 3"
    assert data["constant_data"].coords["input"].values.tolist() == ["a", "b"]


# Missing targets


def test_missing_targets_stay_out():
    network, x, y = make()
    y[3, 0] = torch.nan
    y[5] = torch.nan
    data = to_inference_data(network, x=x, y=y, prior=torch.randn(4, ROWS, 2))
    for group in ("observed_data", "posterior_predictive", "log_likelihood", "prior_predictive"):
        assert data[group]["y0"].dims[-1] == "obs_id_y0"
        assert data[group]["y0"].sizes["obs_id_y0"] == ROWS - 2
        assert not np.isnan(data[group]["y0"]).any()
    joint = data["log_likelihood"]["joint"]
    assert 3 in joint.coords["obs_id_joint"]
    assert 5 not in joint.coords["obs_id_joint"]
    expected = network(x).log_prob(y).detach()
    assert_close(values(data, "log_likelihood", "joint")[0, 0], torch.cat([expected[:5], expected[6:]]))
    masked = np.ma.masked_array(y.nan_to_num(nan=-9999.0).numpy(), y.isnan().numpy())
    assert data["observed_data"].equals(to_inference_data(network, x=x, y=masked)["observed_data"])
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        to_inference_data(network, x=np.ma.masked_array(x.numpy(), y.isnan().numpy()[:, :1].repeat(x.shape[1], 1)), y=y)


# Files


def test_files_keep_all(tmp_path):
    network, x, y = make(latent=True)
    data = to_inference_data(network, x=x, y=y, posterior=chains(network), seed=0)
    data.to_netcdf(str(tmp_path / "a.nc"))
    back = az.from_netcdf(str(tmp_path / "a.nc"))
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"):
        for name in data[group].data_vars:
            assert np.array_equal(data[group][name], back[group][name])
    assert back.attrs["inference_method"] == "MCMC"
    assert np.allclose(back.attrs["x_scale"], network.x_scale)


def test_files_of_arviz_0_load():
    """Written by ``python tests/test_inference_data.py`` on ArviZ 0.23.4."""
    data = az.from_netcdf(str(FILE))
    assert data.attrs["arviz_version"].startswith("0.23")
    assert dict(data["posterior"]["head.linear.bias"].sizes) == {"chain": 2, "draw": 26, "head.linear.bias_dim_0": 15}
    mixture, y, x = written()
    assert_close(values(data, "log_likelihood", "joint").flatten(0, 1), mixture.log_prob(y))
    posterior = chains(make(latent=True)[0], size=26)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, now = (loo(d) for d in (data, to_inference_data(mixture, x=x, y=y, posterior=posterior)))
    name = "elpd_loo" if OLD else "elpd"
    assert float(getattr(loaded, name)) == pytest.approx(float(getattr(now, name)), rel=1e-6)


def written():
    network, x, y = make(latent=True)
    torch.manual_seed(3)
    return posterior_predictive(network, chains(network, size=26), x), y, x


# Leave-one-out


def exact():
    """Draws from an exact posterior, and log-density and transform of each target given the others in closed form."""
    network, x, y, mean, covariance = linear_regression()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, len(mean), generator=generator, dtype=torch.float64)
    flat = mean + noise @ torch.linalg.cholesky(covariance).T
    draws = {"head.linear.bias": flat[:, :2], "head.linear.weight": flat[:, 2:].reshape(-1, 2, 3)}
    features = torch.cat([torch.ones(len(x), 1), (x - network.x_shift) / network.x_scale], -1)
    rows = [1, 5, 6, 7]  # intercept and slopes of the mean
    unit = network.head.scale
    leverage = unit**2 * (features @ covariance[rows][:, rows] * features).sum(-1) / 0.3**2
    residual = (y - network.head.shift).squeeze(-1) - unit * features @ mean[rows]
    left_out = stats.norm(0, 0.3 / (1 - leverage).sqrt().numpy())
    scaled = (residual / (1 - leverage)).numpy()
    return posterior_predictive(network, draws, x), y, left_out.logpdf(scaled), left_out.cdf(scaled)


def test_leave_one_out_is_that_of_the_closed_form():
    mixture, y, log_density, _ = exact()
    result = loo(to_inference_data(mixture, y=y))
    assert float(result.elpd_loo if OLD else result.elpd) == pytest.approx(log_density.sum(), abs=0.1)
    assert np.allclose(np.asarray(result.loo_i if OLD else result.elpd_i), log_density, atol=0.05)


def test_leave_one_out_transforms_are_those_of_the_closed_form():
    mixture, y, _, transforms = exact()
    result = loo_pit(mixture, y)
    assert result.pareto_k.max() < 0.7
    assert np.allclose(result.pit.flatten(), transforms, atol=0.01)
    seen = scores.pit(mixture.pool(0), y).flatten().numpy()
    assert abs(seen - transforms).max() > 0.02  # of a row that was seen they are closer to the middle


def posterior_of(x, y, n_components, seed):
    """Mixture of lines with NUTS over all of its parameters."""
    torch.manual_seed(seed)
    lines = {"hidden_dim": 1, "backbone": nn.Identity(), "noise": Diagonal(homoscedastic=True)}
    network = MixtureDensityNetwork(1, 1, n_components, **lines).double()
    fit(network, x, y, max_epochs=100, seed=seed, progress=False)
    bayesianize(network, layers="head")
    settings = {"num_samples": 150, "warmup_steps": 100, "num_chains": 2, "max_tree_depth": 5, "progress": False}
    return to_inference_data(network, x=x, y=y, posterior=fit_mcmc(network, x, y, seed=seed, **settings), seed=seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fit_mcmc", "ignore:(loo|compare).* expected Pareto")
def test_comparison_finds_the_number_of_components():
    found = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = 2 * torch.rand(200, 1, generator=generator, dtype=torch.float64) - 1
        side = torch.where(torch.rand(200, 1, generator=generator) < 0.4, -1.0, 1.0)
        y = x + 1.5 * side + 0.5 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
        models = {str(k): posterior_of(x, y, k, seed) for k in (1, 2, 5)}
        found += compare({k: models[k] for k in ("1", "2")}).index[0] == "2"
        pair = compare({k: models[k] for k in ("2", "5")})
        behind, error = -pair.loc["2", "elpd_diff"], pair.loc["2", "dse"]
        assert behind <= 2 * error  # both are 0 of the best one
    assert found >= 9


# Figures of ArviZ


@pytest.mark.parametrize("dim_out", [1, 2])
def test_figures_of_arviz(dim_out):
    network, x, y = make(dim_out, latent=True)
    guide = AutoNormal(network.model, init_scale=0.02)
    data = to_inference_data(network, x=x, y=y, posterior=guide, num_samples=200, seed=0)
    other = to_inference_data(network, x=x, y=y, posterior=guide, num_samples=200, seed=1)
    name = "y" if dim_out == 1 else "y1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, table = loo(data), compare({"one": data, "other": other})
        if OLD:
            shown = [
                az.plot_ppc(data, num_pp_samples=20),
                az.plot_loo_pit(data, y=name),
                az.plot_compare(table),
                az.plot_khat(result),
            ]
        else:
            shown = [
                az.plot_ppc_dist(data),
                az.plot_loo_pit(data, var_names=[name]),
                az.plot_compare(table),
                az.plot_khat(result),
            ]
    assert all(figure is not None for figure in shown)
    assert all(any(axes.has_data() for axes in plt.figure(number).axes) for number in plt.get_fignums())
    assert len(plt.get_fignums()) >= 4
    plt.close("all")


# Refusals


def test_leave_one_out_needs_a_posterior():
    network, x, y = make(1)
    message = r"leave-one-out: expected at least 50 draws .* pyro_mdn\.scores\.compare"
    for predictive in (network, DeepEnsemble(network, 3), network(x).expand((20, ROWS))):
        data = to_inference_data(predictive, x=x, y=y, num_samples=10)
        with pytest.raises(ValueError, match=message):
            loo(data)
        with pytest.raises(ValueError, match=message):
            compare({"a": data, "b": data})
    network, x, y = make(1, latent=True)
    for guide in (AutoDelta(network.model), AutoLaplaceApproximation(network.model)):
        data = to_inference_data(network, x=x, y=y, posterior=guide, num_samples=60)
        with pytest.raises(ValueError, match="draws that are all the same, by SVI with Auto"):
            loo(data)
    network, x, y = make(1)
    with pytest.raises(ValueError, match="leave-one-out: expected at least 50 draws"):
        loo_pit(network(x).expand((20, ROWS)), y)
    draws = network(x).affine(0.01 * torch.randn(60, 1, 1).double())
    one, other = to_inference_data(draws, y=y), to_inference_data(draws, y=y + 1)
    with pytest.raises(ValueError, match="models: expected the same targets"):
        compare({"a": one, "b": other})
    with pytest.raises(ValueError, match="models: expected two"):
        compare({"a": one})


def test_arguments_without_names():
    network, x, y = make(2)
    named = to_inference_data(network, x=x, y=y, num_samples=5, seed=0)
    for arguments, names in [((y, x), {}), ((y,), {"x": x})]:
        with pytest.warns(FutureWarning, match="expected x and y by name, .* took what has no name as y") as caught:
            data = to_inference_data(network, *arguments, **names, num_samples=5, seed=0)
        assert caught[0].filename == __file__
        assert np.array_equal(data["log_likelihood"]["joint"], named["log_likelihood"]["joint"])
    for arguments, names in [((x,), {"y": y}), ((y, x), {"y": y}), ((y, x), {"x": x}), ((y, x, 3), {})]:
        with pytest.raises(ValueError, match="to_inference_data: expected x and y by name"):
            to_inference_data(network, *arguments, **names)
    with pytest.raises(ValueError, match="y: expected the observed targets, got none"):
        to_inference_data(network, x=x)


def test_bad_input():
    network, x, y = make()
    latent = make(latent=True)[0]
    mixture = network(x)
    posterior = chains(latent)
    frame = pd.DataFrame(y.numpy())
    sequences = MixtureDensityNetwork(2, 2, 3, hidden_dim=6).double()
    for arguments, settings, message in [
        ((network, y[:5], x), {}, "y: expected shape"),
        ((network, y[:, :1], x), {}, "y: expected shape"),
        ((network, y), {}, "x: expected the inputs"),
        ((mixture, y, x[:4]), {}, "x: expected 30 rows, got 4"),
        ((mixture.expand((2, 3, ROWS)), y), {}, "predictive: expected mixtures of batch shape"),
        (("network", y, x), {}, "predictive: expected a Mixture, a network or an ensemble"),
        ((latent, y, x), {}, "posterior: expected one for a network with latent weights"),
        ((mixture.expand((3, ROWS)), y), {"posterior": posterior}, "posterior: expected 3 draws"),
        ((mixture, y), {"posterior": 3}, "posterior: expected a guide"),
        ((mixture, y), {"output_names": ["a"]}, "output_names: expected 2"),
        ((mixture, y), {"output_names": ["a", "a"]}, "output_names: expected 2 that differ"),
        ((mixture, y), {"output_names": ["a", "joint"]}, "output_names: expected 2 .* none of them .*'joint'"),
        ((mixture, y), {"output_names": ["a", "draw"]}, "output_names: expected 2 .* none of them .*'draw'"),
        ((mixture, y), {"output_names": ["a", "obs_id_a"]}, "output_names: expected 2 "),
        ((mixture.marginal(0), pd.Series(y[:, 0], name="chain")), {}, "output_names: expected 1 "),
        ((mixture.marginal(0), pd.Series(y[:, 0], name="km/h")), {}, "output_names: expected names without '/'"),
        ((mixture, frame, frame[::-1]), {}, "x, y: expected the same index .* got 29 and 0 in row 0"),
        ((sequences, y[:, None], x[:, None]), {}, r"predictive: .* \(N,\) for each draw .*, got \(30, 1\)"),
        ((latent, y[:, None], x[:, None]), {"posterior": posterior}, r"predictive: .* got \(30, 1\)"),
        ((mixture, y), {"quantities": ["mode"]}, "quantities: expected some of"),
        ((mixture, y), {"coords": {"obs_id": [1, 2]}}, "coords: expected 30 labels of 'obs_id', got 2"),
        ((mixture, y, x), {"coords": {"input": ["a"]}}, "coords: expected 2 labels of 'input', got 1"),
        ((mixture, y), {"coords": {"rows": [1]}}, "coords: expected labels of some of"),
        ((mixture, y), {"num_samples": 0}, "num_samples: expected a positive integer"),
        ((mixture, y), {"prior": torch.zeros(3, 4, 2)}, "prior: expected draws of y"),
        ((mixture, y), {"predictions": x}, "predictions: expected a Mixture"),
        ((mixture, y), {"predictions": mixture.marginal(0)}, "predictions: expected mixtures"),
        ((mixture, [["a", "b"]] * ROWS), {}, "y: expected numbers"),
        ((mixture, y / 0), {}, "y: expected finite numbers"),
        ((network, y[:0], x[:0]), {}, "y: expected finite numbers, or NaN, in one row at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_inference_data(arguments[0], **dict(zip("yx", arguments[1:], strict=False)), **settings)


def test_without_arviz(monkeypatch):
    network, x, y = make()
    real = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name == "arviz":
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install '\.\[arviz\]'"):
        to_inference_data(network, x=x, y=y)


def test_nothing_global_changes():
    network, x, y = make()
    state, mode = torch.get_rng_state(), network.training
    first = to_inference_data(network, x=x, y=y, num_samples=5, seed=1)
    assert (torch.get_rng_state() == state).all()
    assert network.training == mode
    second = to_inference_data(network, x=x, y=y, num_samples=5, seed=1)
    assert np.array_equal(first["posterior_predictive"]["y0"], second["posterior_predictive"]["y0"])
    latent = make(latent=True)[0]
    guide = AutoNormal(latent.model)
    guide(x, y)
    state = torch.get_rng_state()
    one, other = (to_inference_data(latent, x=x, y=y, posterior=guide, num_samples=5, seed=1) for _ in range(2))
    assert (torch.get_rng_state() == state).all()
    assert np.array_equal(one["posterior"]["head.linear.bias"], other["posterior"]["head.linear.bias"])


if __name__ == "__main__":
    mixture, y, x = written()
    network = make(latent=True)[0]
    torch.manual_seed(3)
    to_inference_data(mixture, x=x, y=y, posterior=chains(network, size=26), seed=0).to_netcdf(str(FILE))


# Targets that are intervals, and counts


def test_names_of_limits_are_taken():
    x, y = torch.randn(4, 1), Targets.censored(torch.rand(4, 2), right=torch.eye(4, 2))
    network = MixtureDensityNetwork(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"output_names: expected names that no coordinate .* got {'p_upper'}"):
        to_inference_data(network, x=x, y=y, num_samples=4, output_names=["p", "p_upper"])


def test_censored_targets_have_limits_and_kinds(tmp_path):
    network, x, y = make()
    y[4, 0] = float("nan")
    lower, upper = y.clone(), y.clone()
    upper[:5, 0], upper[5:9, 1], lower[9:12, 1] = torch.inf, torch.inf, -torch.inf
    upper[12, 1] = lower[12, 1] + 1
    lower[4, 0] = -torch.inf
    targets = Targets.interval(lower, upper)
    data = to_inference_data(network, x=x, y=targets, num_samples=20, output_names=["a", "b"])
    observed = data["observed_data"]
    assert list(observed["a_kind"].values[:5]) == ["right-censored"] * 4 + ["exact"]
    assert list(observed["b_kind"].values[8:14]) == ["right-censored"] + ["left-censored"] * 3 + ["interval", "exact"]
    assert observed["a"].dims == observed["a_upper"].dims == ("obs_id_a",)
    assert np.isinf(observed["a_upper"].values[:4]).all()
    assert observed["b"].values[[5, 9, 12, 13]].tolist() == [y[5, 1], y[9, 1], y[12, 1] + 0.5, y[13, 1]]
    assert list(data["constant_data"].data_vars) == ["x", "a"]  # b has entries that are no times to an event
    assert data["constant_data"]["a"].values.tolist() == [0] * 4 + [1] * 25
    joint = network(x).log_prob(targets)
    assert_close(values(data, "log_likelihood", "joint")[0, 0], joint.detach())
    for i, name in enumerate(["a", "b"]):
        rows = ~torch.isnan(y[:, i])
        marginal = network(x).marginal(i).log_prob(targets[:, [i]])[rows]
        assert_close(values(data, "log_likelihood", name)[0, 0], marginal.detach())
    data.to_netcdf(tmp_path / "data.nc")
    back = az.from_netcdf(tmp_path / "data.nc")
    assert list(back["observed_data"]["b_kind"].values) == list(observed["b_kind"].values)
    whole = to_inference_data(network, x=x, y=Targets.exact(y), num_samples=20)
    assert "y0_kind" not in whole["observed_data"].coords
    assert list(whole["constant_data"].data_vars) == ["x"]


def test_counts_are_integers_also_beside_missing_and_censored_ones():
    x = torch.randn(20, 1)
    network = MixtureDensityNetwork(1, 1, 2, 4, family="poisson", seed=0)
    y = torch.poisson(2 * torch.ones(20, 1))
    y[3] = float("nan")
    capped = y.clamp(max=2)
    for observed, numbers in ((y, y), (Targets.censored(capped, right=y > 2), capped), (Targets.cells(y, 1.0), y)):
        data = to_inference_data(network, x=x, y=observed, num_samples=10)
        assert data["observed_data"]["y"].dtype == data["posterior_predictive"]["y"].dtype == np.int64
        assert data["observed_data"]["y"].values.tolist() == numbers[~numbers.isnan()].tolist()


def test_leave_one_out_transforms_of_censored_and_counted_targets():
    """Uniform under draws from the mixtures themselves, whose weights are nearly equal."""
    x = torch.randn(2000, 1).double()
    for network in (
        MixtureDensityNetwork(1, 1, 2, 4, seed=0).double(),
        MixtureDensityNetwork(1, 1, 2, 4, family="poisson", seed=0).double(),
    ):
        with torch.no_grad():
            logits = network(x).logits + 1e-3 * torch.randn(60, 1, 2)
            mixtures = Mixture(logits, network(x).components.over_batch((60, 2000)))
        y = mixtures[0].sample()
        limit = y.quantile(0.6).clamp(min=1)
        for observed in (y, Targets.censored(y.clamp(max=limit), right=y >= limit)):
            assert uniformity_p_value(loo_pit(mixtures, observed).pit) > 0.01
