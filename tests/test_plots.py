"""Figures hold what they promise: their artists and data against the mixtures, not pixels."""

import builtins
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from cases import make_mixture
from numpy.testing import assert_allclose
from scipy import integrate

from pyro_mdn import (
    Angle,
    Diagonal,
    DiagonalCovariance,
    FitResult,
    Full,
    GaussianMixture,
    MixtureDensityNetwork,
    NormalComponents,
    ZeroInflated,
    plots,
    scores,
    uncertainty,
)
from pyro_mdn.adapters import density_grids
from pyro_mdn.calibration import ecdf_band, uniformity_p_value
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.units.circular.circles import Circle, Circles
from pyro_mdn.distributions.units.circular.wrapped import wrapped_components

mpl.use("Agg")
import matplotlib.pyplot as plt

ROWS = 40


@pytest.fixture(autouse=True)
def closed():
    settings = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == settings
    plt.close("all")


def along(dim=1, seed=0, scale=0.2):
    """Two modes that move apart along x, in random order of x, and targets from them."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(ROWS, generator=generator, dtype=torch.float64) - 1
    locs = torch.stack([2 + x, -2 - x], 1).unsqueeze(-1).expand(ROWS, 2, dim) + torch.arange(dim)
    logits = torch.tensor([0.3, 0.7]).double().log().expand(ROWS, 2)
    mixture = GaussianMixture(logits, locs, DiagonalCovariance(torch.full((1, 1, 1), scale).double().expand(1, 1, dim)))
    torch.manual_seed(seed)
    return x, mixture, mixture.sample()


FILLED = "FillBetweenPolyCollection", "PolyCollection"  # from matplotlib 3.10 on, and before


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Densities


def test_heat_map_is_the_density():
    x, mixture, y = along(2)
    ax = plots.plot_conditional_density(mixture, x, y, output=1)
    (mesh,) = [c for c in ax.collections if type(c).__name__ == "QuadMesh"]
    coordinates = mesh.get_coordinates()
    across, up = coordinates[..., 0], coordinates[..., 1]
    order = x.argsort()
    assert np.allclose(across[0], x[order])
    expected = mixture.marginal(1).log_prob(torch.as_tensor(up[:, :1])[:, None]).exp()[:, order].numpy()
    shown = np.asarray(mesh.get_array()).reshape(up.shape)
    assert np.allclose(shown, expected, atol=0.002 * expected.max())
    assert np.allclose(integrate.trapezoid(shown, up[:, 0], axis=0), 1, atol=0.002)
    (points,) = [c for c in ax.collections if type(c).__name__ == "PathCollection"]
    assert np.allclose(np.asarray(points.get_offsets()), torch.stack([x, y[:, 1]], 1)[order].numpy())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y1")
    assert ax.figure.axes[1].get_ylabel() == "density"


@pytest.mark.parametrize("width", [1.5, 5.0])
def test_points_leave_what_is_behind_them_visible(width):
    mixture = make_mixture(Full(), (), dim=2)
    ax = plt.figure(figsize=(width, width)).subplots()
    plots.plot_conditional_density(mixture, y=mixture.sample((60,)), ax=ax)
    (points,) = [c for c in ax.collections if type(c).__name__ == "PathCollection"]
    inches = ax.get_window_extent().width * ax.get_window_extent().height / ax.figure.dpi**2
    assert 60 * float(points.get_sizes()[0]) <= max(0.01 * inches * 72**2, 60 * 2.0) + 1e-6


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-4])
def test_narrow_modes_are_shown(scale):
    x, mixture, _ = along(scale=scale)
    ax = plots.plot_conditional_density(mixture, x)
    (mesh,) = [c for c in ax.collections if type(c).__name__ == "QuadMesh"]
    up = mesh.get_coordinates()[:, 0, 1]
    shown = np.asarray(mesh.get_array()).reshape(len(up), ROWS)
    assert np.allclose(integrate.trapezoid(shown, up, axis=0), 1, atol=0.002)
    share = integrate.trapezoid(shown * (up > 0)[:, None], up, axis=0)
    assert np.allclose(share, 0.3, atol=0.002)


def test_contours_enclose_their_probability():
    torch.manual_seed(0)
    mixture = make_mixture(Full(), (), dim=3)
    y = pd.DataFrame(mixture.sample((50,)), columns=["a", "b", "c"])
    ax = plots.plot_conditional_density(mixture, y=y, output=(2, 0))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("c", "a")
    assert legend(ax) == ["95 %", "80 %", "50 %"]
    drawn = mixture.marginal([2, 0]).sample((4000,))
    regions = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
    for region, mass in zip(regions, [0.95, 0.8, 0.5], strict=True):
        inside = np.zeros(len(drawn), dtype=bool)
        for polygon in region.get_paths()[0].to_polygons():
            inside ^= mpl.path.Path(polygon).contains_points(drawn.numpy())
        assert inside.mean() == pytest.approx(mass, abs=0.03)


def test_components():
    x, mixture, _ = along(2)
    ax = plots.plot_components(mixture, x, output=1)
    assert legend(ax) == ["1: weight 0.30 to 0.30", "2: weight 0.70 to 0.70"]
    order = x.argsort()
    assert len({line.get_linestyle() for line in ax.lines}) == 2  # told apart without colours
    for k, (line, band) in enumerate(zip(ax.lines, ax.collections, strict=True)):
        means = mixture.locs[order, k, 1].numpy()
        assert np.allclose(line.get_ydata(), means)
        corners = np.array([path.vertices[:4] for path in band.get_paths()])
        assert np.allclose(corners[:, 0, 1], means[:-1] - 0.2)
        assert np.allclose(corners[:, 3, 1], means[:-1] + 0.2)
    assert [text.get_text() for text in ax.texts] == ["1", "2"]
    light, dark = (band.get_facecolor()[:, 3] for band in ax.collections)
    assert (light < dark - 0.1).all()
    low, high = ax.get_ylim()
    assert low < mixture.locs[..., 1].min() - 0.2 < mixture.locs[..., 1].max() + 0.2 < high


def test_training_is_readable_in_grey():
    """Three line styles, and a light and a dark colour, by the luminance that a grey print shows."""
    rows = [{"epoch": e, "loss": 1 / (e + 1), "validation_loss": 2 / (e + 1)} for e in range(5)]
    ax = plots.plot_training(FitResult(history=rows, best_epoch=3))
    assert len({line.get_linestyle() for line in ax.lines}) == 3
    luminance = [np.dot(mpl.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114]) for line in ax.lines]
    assert luminance[0] - luminance[1] > 0.25
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [
        [r[n] for r in rows] for n in ("loss", "validation_loss")
    ]


@pytest.mark.parametrize("settings", [{"family": "student_t"}, {"family": "gumbel"}, {"target_transform": "log"}])
def test_components_of_every_family(settings):
    """Their means and standard deviations in the units of y, which are not locations and scales."""
    network = MixtureDensityNetwork(1, 1, 2, **settings)
    x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    mixture = network(x)
    ax = plots.plot_components(mixture, x)
    drawn = np.stack([line.get_ydata() for line in ax.lines])
    assert_allclose(drawn, mixture.components.mean()[..., 0].T.detach(), rtol=1e-5)


def test_each_component_looks_different():
    torch.manual_seed(0)
    x, logits, locs = torch.arange(4.0), torch.zeros(4, 20), torch.randn(4, 20, 1)
    ax = plots.plot_components(GaussianMixture(logits, locs, DiagonalCovariance(torch.ones(4, 20, 1))), x)
    looks = [(line.get_color(), line._dash_pattern) for line in ax.lines]
    assert len({str(style) for _, style in looks[:5]}) == 5
    assert len(set(map(str, looks))) == 20


def test_numbers_of_components_stay_apart():
    """Also of components that are heaviest at the same x, and there have about the same mean."""
    x = torch.linspace(-1, 1, 50)
    logits = torch.stack([3 * x, 3 * x + 0.1, 3 * x - 0.1], 1)
    locs = torch.stack([x, x + 0.01, x - 0.01], 1).unsqueeze(-1)
    mixture = GaussianMixture(logits, locs, DiagonalCovariance(torch.ones(50, 3, 1)))
    ax = plots.plot_components(mixture, x)
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text, mean in zip(ax.texts, locs[..., 0].T, strict=True):
        row = np.abs(x.numpy() - text.xy[0]).argmin()
        assert text.xy == pytest.approx((float(x[row]), float(mean[row])))


def test_components_without_weight_are_not_drawn():
    x, mixture, _ = along()
    far = torch.where(torch.tensor([True, False])[:, None], 1e6, mixture.locs)
    logits = torch.where(x[:, None] > 0, mixture.logits, torch.tensor([-math.inf, 0.0]).double())
    near = torch.where(x[:, None, None] > 0, mixture.locs, far)
    ax = plots.plot_components(GaussianMixture(logits, near, mixture.covariance), x)
    assert np.isnan(ax.lines[0].get_ydata()).sum() == (x <= 0).sum()
    assert len(ax.collections[0].get_paths()) == (x > 0).sum() - 1
    assert legend(ax)[0] == "1: weight 0.00 to 0.30"
    assert ax.get_ylim()[1] < 10


@pytest.mark.parametrize("kind", ["components", "central", "highest density", "joint"])
def test_legends_hide_nothing(kind):
    x, mixture, _ = along(dim=2, scale=1.0)
    _, axes = plt.subplots(2, 2)
    for ax in axes.flat[: 1 + 3 * (kind == "central")]:
        if kind == "joint":
            plots.plot_conditional_density(mixture[0], ax=ax)
        elif kind == "components":
            plots.plot_components(mixture, x, ax=ax)
        else:
            plots.plot_predictive_intervals(mixture, x, kind=kind, ax=ax)
        parts = [path.vertices for area in ax.collections for path in area.get_paths() if len(path.vertices)]
        box = ax.get_legend().get_window_extent()
        assert box.y0 > ax.transData.transform(np.concatenate(parts))[:, 1].max()
        assert box.x0 >= ax.get_window_extent().x0
        ax.scatter(0, 50)  # what is drawn later is in sight
        assert ax.get_ylim()[1] > 50


@pytest.mark.parametrize("kind", ["central", "shortest"])
def test_intervals(kind):
    x, mixture, y = along()
    ax = plots.plot_predictive_intervals(mixture, x, y, masses=[0.5, 0.9], kind=kind)
    bands = [c for c in ax.collections if type(c).__name__ in FILLED]
    for band, mass in zip(bands, [0.9, 0.5], strict=True):
        lower, upper = mixture.interval(mass, kind=kind)
        vertices = {(round(a, 6), round(b, 6)) for a, b in band.get_paths()[0].vertices}
        for ends in (lower, upper):
            assert {(round(float(a), 6), round(float(b), 6)) for a, b in zip(x, ends[:, 0], strict=True)} <= vertices
    (median,) = ax.lines
    assert np.allclose(median.get_ydata(), mixture.icdf(0.5)[x.argsort(), 0])
    assert legend(ax) == ["90 %", "50 %", "median"]


def test_regions_of_highest_density_may_have_parts():
    x, mixture, _ = along()
    ax = plots.plot_predictive_intervals(mixture, x, masses=[0.8], kind="highest density")
    (region,) = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
    polygons = region.get_paths()[0].to_polygons()
    right = max(polygons, key=lambda p: p[:, 1].max()), min(polygons, key=lambda p: p[:, 1].min())
    assert len(polygons) == 2  # apart all along x
    assert right[0][:, 1].min() > right[1][:, 1].max() - 2
    n = int((x - 0.5).abs().argmin())
    path = [mpl.path.Path(p) for p in polygons]
    drawn = mixture.sample((2000,))[:, n, 0]
    inside = [any(p.contains_point((float(x[n]), float(v))) for p in path) for v in drawn]
    assert np.mean(inside) == pytest.approx(0.8, abs=0.04)


def test_regions_of_highest_density_of_narrow_modes():
    x, mixture, _ = along(scale=0.01)
    ax = plots.plot_predictive_intervals(mixture, x, masses=[0.5], kind="highest density")
    (region,) = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
    polygons = [mpl.path.Path(p) for p in region.get_paths()[0].to_polygons()]
    n = int((x - 0.5).abs().argmin())
    drawn = mixture.sample((2000,))[:, n, 0]
    inside = [any(p.contains_point((float(x[n]), float(v))) for p in polygons) for v in drawn]
    assert np.mean(inside) == pytest.approx(0.5, abs=0.05)


def test_regions_of_modes_narrower_than_a_pixel():
    x, mixture, _ = along(scale=1e-4)
    ax = plots.plot_predictive_intervals(mixture, x, masses=[0.5, 0.8], kind="highest density")
    both, main = (c.get_paths()[0].to_polygons() for c in ax.collections if type(c).__name__ == "QuadContourSet")
    assert {bool(p[:, 1].mean() > 0) for p in both} == {True, False}
    assert {bool(p[:, 1].mean() > 0) for p in main} == {False}  # the mode of weight 0.7
    for polygons in (both, main):
        shown = np.concatenate([p[:, 0] for p in polygons if p[:, 1].mean() < 0])
        assert (shown.min(), shown.max()) == pytest.approx((float(x.min()), float(x.max())))


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-5])
def test_thresholds_of_highest_density(scale):
    torch.manual_seed(0)
    locs, logits = 3 * torch.randn(6, 50, 1), torch.randn(6, 50).masked_fill(torch.rand(6, 50) < 0.2, -math.inf)
    mixture = GaussianMixture(logits, locs, DiagonalCovariance(scale * (0.5 + torch.rand(6, 50, 1))))
    log_density = mixture.log_prob(mixture.sample((20_000,)))
    for mass, threshold in zip([0.9, 0.5], density_grids.log_thresholds(mixture, [0.9, 0.5]), strict=True):
        assert torch.allclose((log_density >= threshold).float().mean(0), torch.tensor(mass), atol=0.02)


def test_draws_of_the_weights_are_averaged():
    x, mixture, _ = along()
    pair = mixture.expand((2, ROWS))
    one, other = (plots.plot_predictive_intervals(m, x, masses=[0.9]) for m in (mixture, pair))
    for first, second in zip(one.collections, other.collections, strict=True):
        assert np.allclose(first.get_paths()[0].vertices, second.get_paths()[0].vertices, atol=1e-6)


def test_observed_vs_sampled():
    x, mixture, y = along(2)
    sampled = mixture.sample()
    axes = plots.plot_observed_vs_sampled(x, y, sampled, output=1)
    for ax, part, title in zip(axes, [y, sampled], ["observed", "sampled"], strict=True):
        assert np.allclose(np.asarray(ax.collections[0].get_offsets()), torch.stack([x, part[:, 1]], 1))
        assert ax.get_title() == title
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylim()[1] > max(y[:, 1].max(), sampled[:, 1].max())


def test_observed_vs_sampled_of_constants_and_of_nothing():
    x, _, y = along()
    for part in (torch.zeros_like(y), torch.full_like(y, math.nan)):
        axes = plots.plot_observed_vs_sampled(x, part, part)
        assert axes[0].get_ylim() == axes[1].get_ylim()
        assert axes[0].get_xlim() == axes[1].get_xlim()


# Calibration


def test_transforms_and_their_band():
    _, mixture, y = along(2)
    u = scores.pit(mixture, y)
    u[:5, 1] = torch.nan
    ax = plots.plot_pit(u, output_names=["left", "right"])
    assert legend(ax) == ["95 % band", "left", "right"]
    points = np.linspace(0, 1, 101)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 101]
    for line, column in zip(lines, [u[:, 0], u[5:, 1]], strict=True):
        ecdf = (column.numpy()[:, None] <= points).mean(0)
        assert np.allclose(line.get_ydata(), ecdf - points)
    lower, upper = ecdf_band(ROWS - 5)
    vertices = ax.collections[0].get_paths()[0].vertices
    assert vertices[:, 1].min() == pytest.approx((lower - points[1:-1]).min())
    assert vertices[:, 1].max() == pytest.approx((upper - points[1:-1]).max())
    styles = {line.get_linestyle() for line in lines}
    assert len(styles) == 2  # told apart without colours


def test_masks_hide_from_figures():
    _, mixture, y = along(2)
    hidden = np.arange(ROWS)[:, None] < [5, 0]
    masked = np.ma.masked_array(np.where(hidden, 1e6, y), hidden)
    missing = np.where(hidden, np.nan, y)
    curves = [plots.plot_calibration(mixture, part).lines[1].get_ydata() for part in (masked, missing)]
    assert np.array_equal(*curves)
    u = scores.pit(mixture, y).numpy()[:, 0]
    bands = [plots.plot_pit(part).lines[1].get_ydata() for part in (np.ma.masked_array(u, u > 0.5), u[u <= 0.5])]
    assert np.array_equal(*bands)
    assert uniformity_p_value(np.ma.masked_array(u, u > 0.5)) == uniformity_p_value(u[u <= 0.5])
    with pytest.raises(ValueError, match="x: expected finite values"):
        plots.plot_predictive_intervals(mixture, np.ma.masked_array(np.arange(ROWS), np.arange(ROWS) == 3))


def test_too_narrow_predictions_leave_the_band():
    u = scores.pit(*_narrow())
    ax = plots.plot_pit(u)
    line = next(line for line in ax.lines if len(line.get_xdata()) == 101)
    lower, upper = ecdf_band(500)
    points = np.linspace(0, 1, 101)[1:-1]
    inside = line.get_ydata()[1:-1]
    assert ((inside < lower - points) | (inside > upper - points)).any()


def _narrow():
    torch.manual_seed(0)
    mixture = GaussianMixture(
        torch.zeros(500, 1), torch.zeros(500, 1, 1), DiagonalCovariance(torch.full((1, 1, 1), 0.7))
    )
    return mixture, torch.randn(500, 1)


def test_calibration():
    _, mixture, y = along(2)
    y[:5, 0] = torch.nan
    ax = plots.plot_calibration(mixture, pd.DataFrame(y, columns=["a", "b"]), masses=[0.2, 0.5, 0.9])
    assert legend(ax) == ["95 % band", "a", "b"]
    for i, rows in enumerate([slice(5, None), slice(None)]):
        line = ax.lines[1 + i]
        part, targets = mixture[rows], y[rows]
        expected = [scores.coverage(part, targets, mass)[:, i].mean() for mass in (0.2, 0.5, 0.9)]
        assert np.allclose(line.get_ydata(), expected)


def test_uncertainty_split():
    x, mixture, _ = along()
    shift = torch.tensor([-0.5, 0.0, 0.5]).double()[:, None, None] * (1 + x[None, :, None])
    draws = mixture.expand((3, ROWS)).affine(shift)
    ax = plots.plot_uncertainty_split(draws, x)
    order = x.argsort()
    shown = {line.get_label(): line.get_ydata() for line in ax.lines}
    noise, open_ = uncertainty.aleatoric_variance(draws)[order, 0], uncertainty.epistemic_variance(draws)[order, 0]
    assert np.allclose(shown["aleatoric: noise"], noise.sqrt())
    assert np.allclose(shown["epistemic: open"], open_.sqrt())
    assert np.allclose(shown["total"], draws.pool(0).stddev[order, 0])
    assert legend(ax) == list(shown)


def test_moments_in_small_units():
    """In single precision, where their squares underflow."""
    x, mixture, _ = along(2, scale=0.02)
    single = mixture.float()
    small = single.affine(0.0, 1e-25)
    for one, other in [(single, small), (single.marginal(0), small.marginal(0))]:
        grid, small_grid = (density_grids.grid_of(m) for m in (one, other))
        assert len(grid) > density_grids.PIXELS  # two points for each standard deviation, so that its size matters
        assert np.allclose(small_grid * 1e25, grid, rtol=1e-4)
        draws = [m.expand((3, ROWS)) for m in (one, other)]
        lines = [plots.plot_uncertainty_split(draw, x).lines[0].get_ydata() for draw in draws]
        assert np.allclose(lines[1] * 1e25, lines[0], rtol=1e-4)


def directions(size=ROWS):
    """Directions that turn once around the circle along x, and targets from them."""
    x = torch.linspace(-1, 1, size, dtype=torch.float64)
    locs = torch.stack([3.2 * x, 3.2 * x + 0.5], 1).unsqueeze(-1)
    base = NormalComponents(locs, DiagonalCovariance(torch.full((1, 1, 1), 0.2).double()))
    torch.manual_seed(0)
    mixture = Mixture(
        torch.zeros(size, 2).double(), wrapped_components(base, Circles((Circle(2 * math.pi, -math.pi),)))
    )
    return x, mixture, mixture.sample()


@pytest.mark.parametrize("kind", ["central", "shortest", "highest density"])
def test_intervals_of_directions_contain_targets_across_the_cut(kind):
    x, mixture, _ = directions()
    draws = mixture.sample((200,))[..., 0].numpy()
    ax = plots.plot_predictive_intervals(mixture, x, masses=[0.9], kind=kind)
    assert legend(ax) == (["90 %"] if kind == "highest density" else ["90 %", "median"])
    assert ax.dataLim.ymin >= -math.pi - 1e-9
    inside = np.zeros(draws.shape, dtype=bool)
    for region in ax.collections:
        for path in region.get_paths():
            for polygon in path.to_polygons():
                points = np.stack(np.broadcast_arrays(x.numpy(), draws), -1).reshape(-1, 2)
                inside |= mpl.path.Path(polygon).contains_points(points, radius=1e-3).reshape(draws.shape)
    assert inside.mean() == pytest.approx(0.9, abs=0.03)
    assert inside[np.abs(draws) > 3].mean() > 0.8
    for line in ax.lines:
        assert np.nanmax(np.abs(np.diff(line.get_ydata()))) < 0.5  # no line across the figure
    medians = np.array([line.get_ydata() for line in ax.lines]).reshape(-1, ROWS)
    assert np.isfinite(medians).any(0).all() == (kind != "highest density")


def test_figures_of_directions_and_positive_outputs_stay_in_the_support():
    x, mixture, y = directions()
    for function in (plots.plot_conditional_density, plots.plot_components):
        ax = function(mixture, x)
        assert -math.pi - 1e-6 <= ax.dataLim.ymin
        assert function(mixture, x).has_data()
    (mesh,) = [c for c in plots.plot_conditional_density(mixture, x, y).collections if type(c).__name__ == "QuadMesh"]
    up = mesh.get_coordinates()[:, 0, 1]
    shown = np.asarray(mesh.get_array()).reshape(len(up), ROWS)
    assert np.allclose(shown.sum(0) * (up[1] - up[0]), 1, atol=1e-6)
    for transform in ("log", "logit", ["angle", "log"]):
        torch.manual_seed(0)
        network = MixtureDensityNetwork(1, 2 if isinstance(transform, list) else 1, target_transform=transform)
        mixture = network(x.float().unsqueeze(-1)).detach()
        for output in range(mixture.dim):
            ax = plots.plot_predictive_intervals(mixture, x, kind="highest density", output=output)
            assert ax.has_data()
            grid = density_grids.grid_of(mixture.marginal(output))
            assert bool(mixture.marginal(output).support.check(grid[:, None, None]).all())
    assert plots.plot_conditional_density(mixture[0]).has_data()


@pytest.mark.parametrize("family", ["normal", "von_mises"])
def test_densities_around_the_circle(family):
    torch.manual_seed(0)
    network = MixtureDensityNetwork(1, 2, 2, family=family, target_transform=["angle", Angle(360.0, 0.0)]).double()
    mixture = network(torch.randn(3, 1).double()).detach()
    y = mixture.sample()
    y[1] = torch.nan
    ax = plots.plot_directions(mixture, y, mass=0.6, output=1, labels=["a", "b", "c"])
    assert legend(ax) == ["a", "b", "c", "shortest arc, 60 %"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"{a}" for a in range(0, 360, 45)]
    single, radian = mixture.marginal(1), 180 / math.pi
    lower, upper = (end[:, 0].numpy() for end in single.interval(0.6, kind="shortest"))
    filled = [c for c in ax.collections if type(c).__name__ in FILLED][:3]
    for i, (line, area) in enumerate(zip(ax.lines, filled, strict=True)):
        theta, density = (np.asarray(t) for t in line.get_data())
        assert_allclose(density, single[i].log_prob(torch.from_numpy(radian * theta)[:, None]).exp(), rtol=1e-6)
        assert integrate.trapezoid(density, radian * theta) == pytest.approx(1, abs=1e-3)
        angles = radian * area.get_paths()[0].vertices[:, 0]
        assert (angles.min(), angles.max()) == pytest.approx((lower[i], upper[i]))
    (marks,) = [c for c in ax.collections if type(c).__name__ == "PathCollection"]
    assert_allclose(radian * marks.get_offsets()[:, 0].filled(np.nan), y[:, 1])
    ax = plots.plot_directions(mixture[0], y[0])
    assert legend(ax) == ["density", "shortest arc, 80 %"]
    assert [tick.get_text() for tick in ax.get_xticklabels()][1:5] == ["π/4", "π/2", "3π/4", "-π"]
    polar, flat = plt.figure().add_subplot(projection="polar"), plt.figure().subplots()
    assert plots.plot_directions(mixture, ax=polar) is polar
    assert plots.plot_directions(mixture.expand((2, 3)), ax=polar).has_data()
    for call, message in [
        (lambda: plots.plot_directions(mixture, ax=flat), "ax: expected polar axes, such as .*, got rectilinear"),
        (
            lambda: plots.plot_directions(mixture.expand((2, 2, 3))),
            r"mixture: expected batch shape \(\) or \(N,\), N up to 7",
        ),
        (lambda: plots.plot_directions(mixture[:1].expand((8,))), r"N up to 7, got \(8,\)"),
        (lambda: plots.plot_directions(mixture, output=2), "output: expected one of 2, got 2"),
        (lambda: plots.plot_directions(mixture, output="a"), "output: expected one of 2, got 'a'"),
        (lambda: plots.plot_directions(mixture, y[:2]), r"y: expected shape \(3, 2\)"),
        (lambda: plots.plot_directions(mixture, labels=["a"]), "labels: expected 3, got 1"),
        (lambda: plots.plot_directions(mixture, y + 10), "y: expected numbers between -3.14159 and 3.14159, got"),
        (lambda: plots.plot_directions(mixture, mass=1.0), "mass: expected a probability"),
        (lambda: plots.plot_directions(along()[1][:2]), "output: expected an angle, as target_transform='angle'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# Axes and inputs


def every():
    x, mixture, y = along()
    draws = mixture.expand((3, ROWS))
    return {
        "density": lambda ax: plots.plot_conditional_density(mixture, x, ax=ax),
        "contours": lambda ax: plots.plot_conditional_density(make_mixture(Diagonal(), (), dim=2), ax=ax),
        "components": lambda ax: plots.plot_components(mixture, x, ax=ax),
        "intervals": lambda ax: plots.plot_predictive_intervals(mixture, x, ax=ax),
        "pit": lambda ax: plots.plot_pit(scores.pit(mixture, y), ax=ax),
        "calibration": lambda ax: plots.plot_calibration(mixture, y, ax=ax),
        "split": lambda ax: plots.plot_uncertainty_split(draws, x, ax=ax),
    }


@pytest.mark.parametrize("name", every())
def test_axes_of_the_caller(name):
    figure, ax = plt.subplots()
    assert every()[name](ax) is ax
    assert ax.has_data()
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert plt.get_fignums() == [figure.number]


def test_two_axes_of_the_caller():
    x, _, y = along()
    figure, axes = plt.subplots(1, 2)
    assert plots.plot_observed_vs_sampled(x, y, y, ax=axes) == list(axes)
    assert plt.get_fignums() == [figure.number]


def test_kinds_of_inputs():
    x, mixture, y = along()
    tracked = GaussianMixture(mixture.logits, mixture.locs.clone().requires_grad_(), mixture.covariance)
    series = pd.Series(x.numpy(), name="age")
    ax = plots.plot_conditional_density(tracked, series, pd.DataFrame(y, columns=["height"]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("age", "height")
    assert plots.plot_predictive_intervals(tracked, x.unsqueeze(1).numpy(), y.flatten()).get_ylabel() == "y"
    assert plots.plot_predictive_intervals(tracked, x, pd.Series(y[:, 0], name="height")).get_ylabel() == "height"
    for table in (pl.DataFrame({"age": x.numpy()}), pa.table({"age": x.numpy()})):
        assert plots.plot_predictive_intervals(tracked, table).get_xlabel() == "age"
    dates = pd.Series(pd.date_range("2020", periods=ROWS), name="day")
    assert plots.plot_components(tracked, dates).get_xlabel() == "day"
    assert plots.plot_components(tracked, x.tolist()).has_data()
    assert plots.plot_calibration(tracked, y.flatten()).has_data()
    assert plots.plot_pit(scores.pit(tracked, y).requires_grad_()).has_data()


def test_names_of_outputs():
    x, mixture, y = along(2)
    draws = mixture.expand((3, ROWS))
    assert plots.plot_conditional_density(mixture, x).get_ylabel() == "y0"
    assert plots.plot_conditional_density(mixture, x, output=1, output_names=["a", "b"]).get_ylabel() == "b"
    assert plots.plot_predictive_intervals(mixture, x).get_ylabel() == "y0"
    assert plots.plot_components(mixture, x).get_ylabel() == "y0: mean ± std of components"
    assert plots.plot_uncertainty_split(draws, x).get_ylabel() == "standard deviation of y0"
    single = make_mixture(Diagonal(), (), dim=2)
    ax = plots.plot_conditional_density(single, output=np.array([0, -1]), output_names=["a", "b"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    assert legend(plots.plot_pit(pd.DataFrame(scores.pit(mixture, y), columns=["a", "b"])))[1:] == ["a", "b"]


def test_large_posteriors_go_in_parts():
    """Ten points at a time, each of which needs a number for every row and component."""
    _, mixture, _ = along()
    grid, sizes = density_grids.grid_of(mixture)[:, None, None], []

    def cdf(points):
        sizes.append(len(points))
        return mixture.cdf(points)

    parts = density_grids.in_parts(cdf, grid, mixture, elements=10 * ROWS * 2)
    assert set(sizes) == {10}
    torch.testing.assert_close(parts, mixture.cdf(grid))
    assert len(density_grids.in_parts(mixture.cdf, grid, mixture, elements=1)) == len(grid)  # one point at least


def test_bad_input():
    x, mixture, y = along(2)
    single = make_mixture(Diagonal(), ())
    for call, message in [
        (lambda: plots.plot_conditional_density(mixture, x[:5]), r"mixture: expected batch shape \(5,\)"),
        (lambda: plots.plot_conditional_density(mixture), "mixture, output: expected one mixture"),
        (lambda: plots.plot_conditional_density(single, output=1), "mixture, output: expected one mixture"),
        (lambda: plots.plot_conditional_density(single, output=(0, 9)), "dims: expected"),
        (lambda: plots.plot_conditional_density(mixture, x, output=(0, 1)), "output: expected one output"),
        (lambda: plots.plot_conditional_density(mixture, x, y[:5]), "y: expected shape"),
        (lambda: plots.plot_conditional_density(mixture, torch.zeros(ROWS, 2)), "x: expected values of one input"),
        (lambda: plots.plot_components(mixture.expand((2, ROWS)), x), "mixture: expected batch shape"),
        (lambda: plots.plot_components(mixture, x, output=2), "output: expected one of 2, got 2"),
        (lambda: plots.plot_components(mixture, x, output="a"), "output: expected one of 2, got 'a'"),
        (lambda: plots.plot_predictive_intervals(mixture, x, output=None), "output: expected one of 2, got None"),
        (lambda: plots.plot_observed_vs_sampled(x, y, y, output="a"), "output: expected one of 2, got 'a'"),
        (lambda: plots.plot_conditional_density(single, output=np.int64(0)), "mixture, output: expected one mixture"),
        (lambda: plots.plot_conditional_density(single, output="ab"), "mixture, output: expected one mixture"),
        (
            lambda: plots.plot_components(mixture, []),
            "mixture: expected batch shape",
        ),
        (lambda: plots.plot_predictive_intervals(mixture, x, kind="widest"), "kind: expected"),
        (lambda: plots.plot_predictive_intervals(mixture, x, masses=[1.2]), "masses: expected"),
        (lambda: plots.plot_predictive_intervals(mixture, x, masses=[1.2], kind="highest density"), "masses: expected"),
        (lambda: plots.plot_predictive_intervals(mixture, x, masses=[]), "masses: expected"),
        (lambda: plots.plot_predictive_intervals(mixture, x, y[:, :1], output=1), r"y: expected shape \(40, 2\)"),
        (lambda: plots.plot_predictive_intervals(mixture, torch.zeros(ROWS)), "x: expected two different values"),
        (lambda: plots.plot_predictive_intervals(mixture, x / 0), "x: expected finite"),
        (lambda: plots.plot_conditional_density(mixture, ["a"] * ROWS), "x: expected numbers"),
        (lambda: plots.plot_conditional_density(single, y=y[:, :1], output=(1, 2)), r"y: expected shape \(N, 4\)"),
        (lambda: plots.plot_conditional_density(single, output=0), "mixture, output: expected one mixture"),
        (lambda: plots.plot_conditional_density(single, masses=[]), "masses: expected"),
        (lambda: plots.plot_conditional_density(single, x), "mixture: expected batch shape"),
        (lambda: plots.plot_observed_vs_sampled([], y[:0], y[:0]), "y, sampled: expected one shape, not empty"),
        (lambda: plots.plot_pit(["a", "b"]), "pit: expected numbers"),
        (lambda: plots.plot_calibration(mixture, y, level=2), "level: expected"),
        (lambda: plots.plot_observed_vs_sampled(x, y, y[:, :1]), "y, sampled: expected one shape"),
        (lambda: plots.plot_observed_vs_sampled(x, y, y, ax=[plt.gca()]), "ax: expected two axes"),
        (lambda: plots.plot_pit([0.5, 1.5]), "pit: expected numbers in"),
        (lambda: plots.plot_pit([]), "pit: expected numbers in"),
        (lambda: plots.plot_pit([0.5], output_names=["a", "b"]), "output_names: expected 1"),
        (lambda: plots.plot_pit(torch.rand(2, 3, 4)), "pit: expected numbers in"),
        (lambda: plots.plot_calibration(mixture, y[:5]), "y: expected shape"),
        (lambda: plots.plot_calibration(mixture, y[:, :1]), r"y: expected shape \(40, 2\)"),
        (lambda: plots.plot_uncertainty_split(mixture, x), "mixture: expected batch shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **settings)

    x, mixture, _ = along()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install '\.\[plots\]'"):
        plots.plot_components(mixture, x)


def test_regions_of_counts_are_refused():
    x = torch.linspace(-1, 1, 5).unsqueeze(-1)
    zeros = MixtureDensityNetwork(1, 1, 2, 4, family=ZeroInflated("normal"), target_transform="log")
    for network in (MixtureDensityNetwork(1, 1, 2, 4, family="poisson"), zeros):
        with pytest.raises(NotImplementedError, match=r"kind='highest density': not closed .* 'shortest' is"):
            plots.plot_predictive_intervals(network(x), x, kind="highest density")
