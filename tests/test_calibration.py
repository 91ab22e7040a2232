"""Bands and tests of uniformity against simulation and scipy; tables against scores row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from pyro_mdn import DiagonalCovariance, GaussianMixture, scores
from pyro_mdn.calibration import coverage_table, ecdf_band, uniformity_p_value

POINTS = np.linspace(0, 1, 101)[1:-1]


def normal(size, scale=1.0, dim=1):
    scales = torch.full((size, 1, dim), scale, dtype=torch.float64)
    return GaussianMixture(torch.zeros(size, 1).double(), torch.zeros_like(scales), DiagonalCovariance(scales))


def draws(size, seed, dim=1):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The band


@pytest.mark.parametrize(("size", "level"), [(1, 0.9), (10, 0.5), (100, 0.95), (500, 0.8)])
def test_band_contains_samples_as_often_as_it_says(size, level):
    lower, upper = ecdf_band(size, level=level)
    sample = np.random.default_rng(0).uniform(size=(4000, size))
    ecdf = np.stack([(sample <= z).mean(1) for z in POINTS], 1)
    inside = ((lower - 1e-9 <= ecdf) & (ecdf <= upper + 1e-9)).all(1).mean()
    error = np.sqrt(level * (1 - level) / 4000)
    assert inside > level - 4 * error  # a sample is discrete: there can be more inside
    assert inside < level + 4 * error or size <= 10


def test_band_at_one_point_is_the_binomial_interval():
    lower, upper = ecdf_band(100, [0.3], 0.9)
    assert (lower[0], upper[0]) == tuple(end / 100 for end in stats.binom.interval(0.9, 100, 0.3))


def test_band_gets_narrow_beyond_the_size_that_is_computed_exactly():
    width = {size: np.subtract(*ecdf_band(size, [0.25, 0.5, 0.75])[::-1]) for size in (5000, 20_000)}
    assert np.allclose(width[20_000], width[5000] / 2, rtol=0.03)


@pytest.mark.parametrize("size", [50, 400])
def test_p_value_is_uniform_under_the_hypothesis(size):
    generator = np.random.default_rng(size)
    values = np.array([uniformity_p_value(generator.uniform(size=size)) for _ in range(1000)])
    for level in (0.05, 0.25, 0.5):
        assert abs((values <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 1000)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.floats(0.3, 3.0), st.integers(0, 1000))
def test_p_value_below_the_level_is_a_curve_outside_the_band(size, power, seed):
    u = np.random.default_rng(seed).uniform(size=size) ** power
    lower, upper = ecdf_band(size, level=0.9)
    ecdf = (u[:, None] <= POINTS).mean(0)
    inside = bool(((lower - 1e-9 <= ecdf) & (ecdf <= upper + 1e-9)).all())
    p_value = uniformity_p_value(u)
    if abs(p_value - 0.1) > 0.002:  # the level of the band is found by bisection
        assert inside == (p_value > 0.1)


@pytest.mark.parametrize("size", [1000, 2000, 5000, 100_000])
def test_transforms_far_from_uniform_have_a_p_value_of_nearly_zero(size):
    """Also where all tail probabilities are rounded to 0, and at once, however large the sample."""
    assert 0 <= uniformity_p_value(np.linspace(0, 0.5, size)) < 1e-12


def test_p_values_fall_as_transforms_move_away_from_uniform():
    """Through the least that is computed exactly."""
    p_values = np.array([uniformity_p_value(np.linspace(0, 1, 300) ** power) for power in np.linspace(1, 3, 30)])
    assert (np.diff(p_values) <= 1e-12).all()
    assert p_values[0] > 0.99
    assert p_values[-1] < 1e-20
    assert ((p_values > 1e-13) & (p_values < 1e-9)).any()


def test_transforms_of_the_truth_are_uniform():
    mixture = normal(500)
    p_values = [stats.kstest(scores.pit(mixture, draws(500, seed)).flatten(), "uniform").pvalue for seed in range(100)]
    assert sum(p > 0.01 for p in p_values) >= 95


def test_too_narrow_predictions_are_rejected():
    narrow = normal(500, scale=0.7)
    p_values = [uniformity_p_value(scores.pit(narrow, draws(500, seed))) for seed in range(100)]
    assert sum(p < 0.05 for p in p_values) >= 90


def test_dependence_that_each_output_hides_is_found_by_rosenblatt():
    y = draws(2000, 0, 2)
    y = torch.stack([y[:, 0], 0.8 * y[:, 0] + 0.6 * y[:, 1]], -1)  # correlated, where the mixture has none
    mixture = normal(2000, dim=2)
    assert all(uniformity_p_value(column) > 0.01 for column in scores.pit(mixture, y).unbind(-1))
    u = mixture.rosenblatt(y)
    radius = torch.special.ndtri(u).square().sum(-1)
    assert uniformity_p_value(stats.chi2(2).cdf(radius.numpy())) < 1e-6


def test_missing_transforms_are_left_out():
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert uniformity_p_value(torch.cat([u, torch.full((50,), torch.nan)])) == uniformity_p_value(u)


# Targets on a grid


def test_transforms_of_rounded_targets_are_uniform_within_their_cells():
    """A normal of few cells, rounded: without them the test rejects the truth, with them it does not."""
    mixture, torn = normal(2000, scale=0.7), []
    for seed in range(20):
        torch.manual_seed(1000 + seed)  # not that of the targets, or they would be drawn alike
        y = (0.7 * draws(2000, seed)).round()
        # Fewer targets are enough for this, and the p-value of many that are far from uniform takes a second.
        assert uniformity_p_value(scores.pit(mixture, y)[:200]) < 1e-5
        torn.append(uniformity_p_value(scores.pit(mixture, y, cell=1.0)))
    assert sum(p > 0.05 for p in torn) >= 16
    torch.manual_seed(0)
    assert uniformity_p_value(scores.pit(normal(2000, scale=1.2), y, cell=1.0)[:1000]) < 1e-5


def test_transforms_within_cells_are_drawn_between_their_ends():
    mixture, y = normal(4, dim=2), draws(4, 0, 2).round()
    y[1, 0] = torch.nan
    cell = torch.tensor([1.0, 0.0]).to(y)
    u = torch.stack([scores.pit(mixture, y, cell) for _ in range(2000)])
    low, high = (mixture.cdf(y + sign * cell / 2) for sign in (-1, 1))
    assert u[:, 1, 0].isnan().all()
    assert_close(u[0, :, 1], mixture.cdf(y)[:, 1])
    seen = torch.tensor([0, 2, 3])
    shares = ((u - low) / (high - low))[:, seen, 0]
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in shares.T) > 1e-4


def test_mean_transforms_are_those_of_many_draws():
    mixture, y = normal(40, dim=2), draws(40, 3, 2).round()
    y[7, 1], points = torch.nan, torch.tensor([0.1, 0.35, 0.8])
    torch.manual_seed(0)
    u = torch.stack([scores.pit(mixture, y, 1.0) for _ in range(4000)])
    ecdf = torch.stack([((u <= point) & ~u.isnan()).double().sum(1) / (~u.isnan()).sum(1) for point in points])
    error = ecdf.std(1) / 4000**0.5
    assert ((scores.mean_pit(mixture, y, 1.0, points) - ecdf.mean(1)).abs() < 5 * error + 1e-9).all()
    continuous = scores.mean_pit(mixture, y, 0.0, points)
    assert_close(continuous[1, 0].item(), (scores.pit(mixture, y)[:, 0] <= 0.35).double().mean().item())
    truth = scores.mean_pit(normal(20_000), draws(20_000, 5).round(), 1.0)
    assert_close(truth.flatten(), torch.linspace(0.01, 0.99, 99).to(truth), rtol=0, atol=5 * 0.5 / 20_000**0.5)


# Coverage


@pytest.mark.parametrize("kind", ["central", "shortest"])
def test_coverage_table_is_the_mean_of_scores(kind):
    mixture, y = normal(200, dim=2), draws(200, 1, 2)
    table = coverage_table(mixture, y, [0.5, 0.9], kind=kind)
    for row, mass in enumerate([0.5, 0.9]):
        inside = scores.coverage(mixture, y, mass, kind=kind)
        lower, upper = mixture.interval(mass, kind=kind)
        assert_close(table.coverage[row], inside.mean(0))
        assert_close(table.standard_error[row], inside.std(0) / 200**0.5)
        assert_close(table.width[row], (upper - lower).mean(0))
    missing = y.clone()
    missing[50:, 1] = torch.nan
    assert_close(
        coverage_table(mixture, missing).coverage[:, 1], coverage_table(normal(50, dim=2), y[:50]).coverage[:, 1]
    )


# Comparison


def test_comparison_is_paired():
    y = draws(300, 2)
    result = scores.compare({"wide": normal(300, 1.5), "right": normal(300), "narrow": normal(300, 0.5)}, y)
    assert next(iter(result)) == "right"
    assert result["right"].behind == result["right"].behind_standard_error == 0
    difference = scores.log_score(normal(300, 1.5), y) - scores.log_score(normal(300), y)
    expected = stats.ttest_1samp(difference.numpy(), 0)
    wide = result["wide"]
    assert wide.behind / wide.behind_standard_error == pytest.approx(expected.statistic)
    assert wide.log_score == pytest.approx(scores.log_score(normal(300, 1.5), y).mean().item())


def test_comparison_averages_draws_and_leaves_out_rows_without_targets():
    y = torch.cat([draws(50, 3), torch.full((10, 1), torch.nan)])
    result = scores.compare({"draws": normal(60).expand((4, 60)), "one": normal(60)}, y)
    assert result["draws"].log_score == pytest.approx(scores.log_score(normal(50), y[:50]).mean().item())
    assert result["one"].behind == pytest.approx(0, abs=1e-12)


# Refusals


def test_bad_input():
    mixture, y = normal(5), draws(5, 0)
    for call, message in [
        (lambda: ecdf_band(0), "size: expected a positive integer"),
        (lambda: ecdf_band(5, [0.5, 0.4]), "points: expected increasing numbers"),
        (lambda: ecdf_band(5, [0.0]), "points: expected increasing numbers"),
        (lambda: ecdf_band(5, level=1.0), "level: expected a probability"),
        (lambda: uniformity_p_value([]), r"pit: expected numbers in \[0, 1\], one at least that is not NaN, got none"),
        (lambda: uniformity_p_value([math.nan]), "one at least that is not NaN, got none"),
        (lambda: uniformity_p_value([0.5, 1.1]), "pit: expected numbers in .*, got 1 outside, such as 1.1"),
        (lambda: scores.pit(mixture, y, -1.0), "cell: expected a finite number, not negative"),
        (
            lambda: scores.pit(mixture, y, torch.ones(2)),
            r"cell: expected .*, got Tensor torch.float32 \(2,\)",
        ),
        (lambda: coverage_table(mixture, y[:4]), "mixture, y: expected"),
        (lambda: coverage_table(mixture.expand((2, 5)), y), "mixture, y: expected"),
        (lambda: coverage_table(mixture, y, []), "masses: expected one"),
        (lambda: coverage_table(mixture, y, [1.5]), "mass"),
        (lambda: coverage_table(mixture, y * torch.nan), "y: expected an observed entry"),
        (lambda: scores.compare({}, y), "predictions: expected one"),
        (lambda: scores.compare({"a": mixture}, y[:4]), "predictions\\['a'\\]: expected batch shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
