"""Names of the columns that a network was trained on."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer.autoguide import AutoNormal

from pyro_mdn import (
    DeepEnsemble,
    MixtureDensityNetwork,
    bayesianize,
    fit,
    laplace,
    posterior_predictive,
    to_inference_data,
)

QUICK = {"max_epochs": 1, "progress": False, "seed": 0}
NAMES = ["age", "weight", "height"]


def frame(rows=40):
    return pd.DataFrame(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).numpy(), columns=NAMES)


def trained(size=None):
    network = MixtureDensityNetwork(3, 1, 2, 8, seed=0)
    network = network if size is None else DeepEnsemble(network, size)
    fit(network, frame(), frame()["age"], **QUICK)
    return network


USES = {
    "call": lambda network, x: network(x),
    "predict": lambda network, x: network.predict(x),
    "members": lambda network, x: network.members(x),
    "groups for ArviZ": lambda network, x: to_inference_data(network, x=x, y=frame()["age"]),
    "loss": lambda network, x: network.loss(x, frame()["age"]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("size", [None, 2])
def test_columns_in_another_order_are_refused(use, size):
    network, x = trained(size), frame()
    with pytest.raises(
        ValueError, match=r"x: expected columns in the order of training, \['age', 'weight', 'height'\]"
    ):
        USES[use](network, x[NAMES[::-1]])
    with pytest.raises(ValueError, match=r"columns of training.*missing \['age'\], and unknown \['AGE'\]"):
        USES[use](network, x.rename(columns={"age": "AGE"}))
    with pytest.raises(ValueError, match=r"missing \['age', 'weight'\], and unknown \[\]"):
        USES[use](network, x[["height"]])


@pytest.mark.parametrize("size", [None, 2])
def test_what_has_no_names_counts_by_order(size):
    network, x = trained(size), frame()
    expected = network.predict(x).mean
    for same in (x.to_numpy(), torch.tensor(x.to_numpy()), x.to_numpy().tolist(), pl.from_pandas(x)):
        assert_allclose(network.predict(same).mean, expected, rtol=1e-5, atol=1e-6)
    assert_allclose(network.predict(pd.DataFrame(x.to_numpy())).mean, expected)  # its labels are numbers
    with pytest.raises(ValueError, match="in the order of training"):
        network.predict(pl.from_pandas(x[NAMES[::-1]]))


@pytest.mark.parametrize("size", [None, 2])
def test_files_have_the_names(size, tmp_path):
    network = trained(size)
    network.save(tmp_path / "network.safetensors")
    loaded = type(network).load(tmp_path / "network.safetensors")
    assert loaded.architecture.input_names == NAMES
    with pytest.raises(ValueError, match="in the order of training"):
        loaded(frame()[NAMES[::-1]])
    if size is not None:
        assert loaded.member(1).input_names == NAMES


def test_a_later_training_has_its_own_columns():
    """Names are those of the last training, and of none if it was on an array; a refused one changes nothing."""
    network, x = trained(), frame()
    renamed = x.rename(columns={"age": "AGE"})
    with pytest.raises(ValueError, match="y"):
        fit(network, renamed, np.full(40, np.inf), **QUICK)
    assert network.input_names == NAMES
    fit(network, renamed, x["age"], **QUICK)
    assert network.input_names == ["AGE", "weight", "height"]
    fit(network, x.to_numpy(), x["age"], **QUICK)
    assert network.input_names is None
    network(x[NAMES[::-1]])


def test_held_out_columns():
    x = frame()
    for held_out in ((x[NAMES[::-1]], x["age"]), [x[NAMES[::-1]], x["age"], np.ones(40)]):
        with pytest.raises(ValueError, match="validation x: expected columns in the order of training"):
            fit(MixtureDensityNetwork(3, 1, 2, 8, seed=0), x, x["age"], validation=held_out, **QUICK)


def test_posteriors():
    x = frame()
    network = bayesianize(trained(), layers="head")
    guide = fit(network, x, x["age"], guide=AutoNormal, **QUICK).guide
    for use in (
        lambda wrong: posterior_predictive(network, guide, wrong, num_samples=2),
        lambda wrong: laplace(network, wrong, x["age"], max_iter=1, progress=False),
    ):
        with pytest.raises(ValueError, match="x: expected columns in the order of training"):
            use(x[NAMES[::-1]])
