r"""Draw densities of angles around the circle, with the shortest arcs and observed angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_mdn.adapters.density_grids import pooled, require_output, targets_of
from pyro_mdn.adapters.figures.axes import COLORS, STYLES, percent, pyplot
from pyro_mdn.adapters.xarray_labels import names_of
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.units.circular.circles import Circle
from pyro_mdn.distributions.units.circular.circular_marginals import CircularMarginals
from pyro_mdn.support.arrays import Array, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_directions"]

_TICKS = 8


@torch.no_grad()
def plot_directions(
    mixture: Mixture,
    y: Any = None,
    *,
    mass: float = 0.8,
    output: int = 0,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the density of an angle around the circle for one distribution or a few, with observed angles.

    The distance of a curve from the inner circle is the density. Below a curve, the shortest arc is filled; a mark on
    the inner circle is the observed angle. For directions of a compass, call ``ax.set_theta_zero_location("N")`` and
    ``ax.set_theta_direction(-1)`` afterwards.

    Args:
        mixture: Predictive distributions, of batch shape ``()`` or ``(N,)``, N up to 7; ``mixture[rows]`` picks some.
        y: Observed targets ``(N, D)``, or ``(D,)`` for one distribution; NaN is not drawn.
        mass: Probability of the shortest arcs, in (0, 1).
        output: Index of the output, which has to be an angle.
        labels: Names of the distributions in the legend; by default their numbers, from 0 on.
        ax: Polar axes to draw on; by default new ones.

    Raises:
        ValueError: If shapes do not agree, if there is no such output, if it is no angle, if an observed angle is
            outside of its period, or if the axes are not polar.
        ImportError: If matplotlib is not installed.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> network = MixtureDensityNetwork(1, 1, family="von_mises")
    >>> plot_directions(network(torch.zeros(1, 1)), [[0.5]]).name
    'polar'
    """
    mixture, single = _angle_of(mixture, output)
    count = len(mixture)
    observed = None if y is None else _observed(y, count, mixture)
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count}, got {len(labels)}")
    ax = _polar(ax)
    names = labels or ([f"{i}" for i in range(count)] if count > 1 else ["density"])
    ends = mixture.marginal(output).interval(mass, kind="shortest")
    arcs = zip(*(to_numpy(end[:, 0]).tolist() for end in ends), strict=True)
    curves = _curves(single)
    for i, (curve, arc, name) in enumerate(zip(curves, arcs, names, strict=True)):
        _draw(ax, single.circle, curve, arc, COLORS[i], STYLES[i % len(STYLES)], name)
    ax.fill_between([], [], [], color="0.5", alpha=0.5, linewidth=0, label=f"shortest arc, {percent(mass)}")
    if observed is not None:
        theta = _radians(single.circle, observed[:, output])
        ax.scatter(theta, np.zeros(count), c=COLORS[:count], zorder=4, clip_on=False)
    highest = max(float(density.max()) for _, density in curves)
    _label(ax, single.circle, highest, names_of(y, None, mixture.dim)[output])
    return ax


def _polar(ax: Axes | None) -> Axes:
    """Return the caller's axes, which have to be polar, or new ones."""
    ax = pyplot().subplots(subplot_kw={"projection": "polar"})[1] if ax is None else ax
    assert ax is not None
    if ax.name != "polar":
        raise ValueError(f"ax: expected polar axes, such as plt.subplot(projection='polar'), got {ax.name}")
    return ax


def _angle_of(mixture: Mixture, output: int) -> tuple[Mixture, CircularMarginals]:
    """Distributions ``(N,)``, and those of an output that is an angle; a ``ValueError`` for anything else."""
    mixture = pooled(mixture)
    mixture = mixture if mixture.batch_shape else mixture.expand((1,))
    if len(mixture.batch_shape) > 1 or not 1 <= mixture.batch_shape.numel() <= len(COLORS):
        shape = tuple(mixture.batch_shape)
        raise ValueError(f"mixture: expected batch shape () or (N,), N up to {len(COLORS)}, got {shape}")
    require_output(output, mixture.dim)
    single = mixture.marginal(output).univariate()
    if not isinstance(single, CircularMarginals):
        raise ValueError(f"output: expected an angle, as target_transform='angle' makes one, got output {output}")
    return mixture, single


def _observed(y: Any, count: int, mixture: Mixture) -> Array:
    """Targets ``(N, D)``; a ``ValueError`` if an angle is none of its period, such as degrees for radians."""
    rows, dim = to_numpy(y), mixture.dim
    observed = targets_of(rows[None] if count == 1 and rows.shape == (dim,) else y, count, dim)
    mixture.components.require_inside(torch.from_numpy(np.asarray(observed, float)), "y")
    return observed


def _curves(single: CircularMarginals) -> list[tuple[Array, Array]]:
    """Angles in ascending order that are close where a density bends, and the density there, of each distribution."""
    edges = single.wrapped.edges(single.period)
    points = torch.cat([edges, edges[:-1] + 0.25 * edges.diff(dim=0), edges[:-1] + 0.6 * edges.diff(dim=0)])
    points = points.sort(0).values
    density = to_numpy(single.log_prob(points).exp())
    return list(zip(to_numpy(points)[..., 0].T, density[..., 0].T, strict=True))


def _draw(
    ax: Axes, circle: Circle, curve: tuple[Array, Array], arc: tuple[float, float], color: str, style: Any, name: str
) -> None:
    points, density = curve
    ax.plot(_radians(circle, points), density, color=color, linestyle=style, label=name)
    turned = np.concatenate([points, points[1:] + circle.period])
    inside = turned[(turned > arc[0]) & (turned < arc[1])]
    inside = np.concatenate([arc[:1], inside, arc[1:]])
    height = np.interp(inside, turned, np.concatenate([density, density[1:]]))
    ax.fill_between(_radians(circle, inside), 0, height, color=color, alpha=0.25, linewidth=0)


def _radians(circle: Circle, angle: Array) -> Array:
    return angle * (2 * math.pi / circle.period)


def _label(ax: Any, circle: Circle, highest: float, name: str) -> None:
    """Put angles in the units of y around the circle, and the place of density 0 at half of the radius."""
    ax.set_rlim(0, 1.05 * highest)
    ax.set_rorigin(-highest)
    ticks = np.arange(_TICKS) / _TICKS
    ax.set_xticks(2 * math.pi * ticks, [_shown(circle, tick) for tick in ticks])
    ax.set_yticks([0.5 * highest, highest], ["", ""])
    ax.set(xlabel=name, ylabel="density")
    ax.yaxis.labelpad = 30
    ax.legend(loc="upper left", bbox_to_anchor=(1.05, 1.0), frameon=False)


def _shown(circle: Circle, tick: float) -> str:
    """Angle of the period at a share of a turn from 0; that of radians in multiples of π."""
    value = circle.start + (circle.period * tick - circle.start) % circle.period
    if not math.isclose(circle.period, 2 * math.pi):
        return f"{value:g}"
    part = Fraction(value / math.pi).limit_denominator(_TICKS)
    if not part:
        return "0"
    sign, top = "-" if part < 0 else "", "" if abs(part.numerator) == 1 else abs(part.numerator)
    return f"{sign}{top}π" + (f"/{part.denominator}" if part.denominator > 1 else "")
