"""Data that go wrong in practice, at default settings: a finite model, or an error that says what to do.

Only the epochs of hundreds of rows are fewer than by default, as the bounds hold by then, with no shorter patience. A
handful of rows is trained to the end.
"""

import math
import warnings

import pytest
import torch

from pyro_mdn import DeepEnsemble, Full, MixtureDensityNetwork, TargetHint, fit

N, EPOCHS = 300, 250


def rows(n=N, outputs=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    y = x[:, :1].sin() + 0.1 * torch.randn(n, outputs, generator=generator)
    return x, y


def constant():
    x, y = rows()
    return x, torch.full_like(y, 3.0)


def mostly_constant():
    x, y = rows()
    y[torch.arange(N) % 20 != 0] = 0.0
    return x, y


def duplicates():
    x, y = rows(30)
    return x.repeat(10, 1), y.repeat(10, 1)


def unequal_columns():
    x, y = rows()
    return x * torch.tensor([1e-3, 1e9]), y


def outliers():
    x, y = rows()
    y[:3] = torch.tensor([[1e6], [-1e6], [2e6]]) * y.std()
    return x, y


def collinear():
    x, y = rows()
    return x, torch.cat([y, 2 * y], 1)


def integers():
    x, y = rows()
    return x, (3 * y).round()


def constant_input():
    x, y = rows()
    return x * torch.tensor([1.0, 0.0]), y


# Bounds on the mean loss of the rows: well below the entropy of a normal distribution with their overall deviation.
FAULTS = {
    "constant targets": (constant, -4.0),
    "constant for 19 rows in 20": (mostly_constant, -1.0),
    "each row ten times": (duplicates, 1.2),
    "five rows": (lambda: rows(5), 1.5),
    "two rows": (lambda: rows(2), 5.0),
    "an input 1e12 times another": (unequal_columns, -0.5),
    "a constant input": (constant_input, -0.5),
    "targets 1e6 deviations away": (outliers, 0.5),
    "targets on a grid": (integers, 1.2),
}


@pytest.mark.filterwarnings("ignore:.*lie far from all others")
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data_give_a_finite_and_useful_model(fault):
    make, bound = FAULTS[fault]
    x, y = make()
    torch.manual_seed(0)
    network = MixtureDensityNetwork(2, 1)
    shortened = {"max_epochs": EPOCHS, "patience": EPOCHS} if len(x) == N else {}
    result = fit(network, x, y, seed=0, progress=False, **shortened)
    check_finite(network, x, y, result)
    assert network.loss(x, y).mean() < bound


def check_finite(network, x, y, result):
    assert all(p.isfinite().all() for p in network.parameters())
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["validation_loss"]) for row in result.history)
    mixture = network(x)
    assert mixture.log_prob(y).isfinite().all()
    assert mixture.mean.isfinite().all()
    assert mixture.sample().isfinite().all()


def test_collinear_outputs_with_full_covariance():
    """The second output is twice the first: the density is bounded by the floor, and the correlation is found."""
    x, y = collinear()
    torch.manual_seed(0)
    network = MixtureDensityNetwork(2, 2, noise=Full())
    result = fit(network, x, y, seed=0, progress=False, max_epochs=EPOCHS)
    check_finite(network, x, y, result)
    covariance = network(x).covariance_matrix
    correlation = covariance[:, 0, 1] / (covariance[:, 0, 0] * covariance[:, 1, 1]).sqrt()
    assert correlation.mean() > 0.98


def test_one_row_is_an_error_that_says_what_to_do():
    x, y = rows(1)
    with pytest.raises(ValueError, match="validation: expected to leave rows for training, got 1 rows in all"):
        fit(MixtureDensityNetwork(2, 1), x, y, progress=False)


def test_validation_that_leaves_nothing_is_an_error():
    x, y = rows(5)
    with pytest.raises(ValueError, match="validation: expected to leave rows for training, got 5 rows in all"):
        fit(MixtureDensityNetwork(2, 1), x, y, validation=0.99, progress=False)


def spoilt(kind):
    """Rows of which one in a hundred is faulty, in y or in x."""
    torch.manual_seed(0)
    x = torch.randn(2500, 2)
    y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(2500, 1)
    faulty = torch.rand(2500, 1) < 0.01
    wrong = {"shifted": y + 1e4, "one value": 1e8, "scattered": 1e4 * torch.randn(2500, 1), "inputs": y}[kind]
    return torch.where(faulty, -9999.0, x) if kind == "inputs" else x, torch.where(faulty, wrong, y)


@pytest.mark.parametrize("kind", ["shifted", "one value", "scattered", "inputs"])
def test_gross_outliers_leave_the_intervals_of_other_rows_alone(kind):
    x, y = spoilt(kind)
    network = MixtureDensityNetwork(2, 1, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(network, x, y, seed=0, progress=False, max_epochs=50)
    hints = [str(w.message) for w in caught if issubclass(w.category, TargetHint)]
    assert len(hints) == (kind != "inputs"), "outliers of y are named"
    assert all("lie far from all others" in hint for hint in hints)
    torch.manual_seed(1)
    x = torch.randn(4000, 2)
    y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(4000, 1)
    low, high = network(x).interval(0.5)
    assert abs(((low < y) & (y < high)).double().mean().item() - 0.5) < 0.05
    assert network.loss(x, y).mean() < 0.35  # the truth has 0.22


@pytest.mark.filterwarnings("ignore:.*lie far from all others")
def test_gross_outliers_in_one_output_or_input_leave_every_kind_of_start_alone():
    """Networks with a unit of each output and with a common one, and the members of an ensemble."""
    x, y = spoilt("scattered")
    x, y = torch.cat([spoilt("inputs")[0], x], 1), torch.cat([y, y.clamp(-2, 2)], 1)
    for noise in ("diagonal", "isotropic", "full"):
        network = MixtureDensityNetwork(4, 2, noise=noise, seed=0)
        ensemble = DeepEnsemble(network, 2, seed=0)
        for model in (network, ensemble):
            fit(model, x, y, seed=0, progress=False, max_epochs=1)
        for trained in (network, ensemble.member(1)):
            assert bool((trained.x_scale < 5).all()), noise
            assert bool((trained.head.scale < 5).all()), noise
