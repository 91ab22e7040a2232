r"""Mean direction and circular standard deviation of angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mdn.distributions.units.circular.circles import Circle, wrapped_into
from pyro_mdn.distributions.units.circular.panels import CircularMixture, integral
from pyro_mdn.tensors.univariate import UnivariateMixture

__all__ = ["direction_and_spread"]


def direction_and_spread(mixture: UnivariateMixture, circle: Circle) -> tuple[Tensor, Tensor]:
    r"""Compute the mean direction and the circular standard deviation, ``(*batch)`` each, in units of y.

    .. math:: E[e^{i \omega Y}] = R e^{i \omega \mu}, \qquad \sigma = \frac{\sqrt{-2 \log R}}{\omega},
              \qquad \omega = \frac{2\pi}{P}

    They are closed forms for normal components, and computed by quadrature for others. A distribution without a mean
    direction, such as the uniform one, has an arbitrary one, and a large standard deviation.

    Args:
        mixture: Mixture on the line, with parameters ``(*batch, K)`` and locations in one period.
        circle: The circle.

    References:
        Mardia & Jupp (2000), Directional statistics.
    """
    logits, locs, scale, law = mixture
    rate = 2 * math.pi / circle.period
    lost = law.mean_versine(rate * scale)
    if lost is None:
        direction, variance = _by_quadrature(mixture, circle)
    else:
        weights, angles = logits.exp(), rate * locs
        resultant = weights * (1 - lost)
        direction = torch.atan2((resultant * angles.sin()).sum(-1), (resultant * angles.cos()).sum(-1))
        # The part of 1 - R that a difference from 1 would leave no digits of.
        deviation = (0.5 * (angles - direction.detach().unsqueeze(-1))).sin().square()
        variance = (weights * lost + 2 * resultant * deviation).sum(-1)
    variance = variance.clamp(max=1 - torch.finfo(variance.dtype).eps)
    return wrapped_into(direction / rate, circle.start, circle.period), (-2 * torch.log1p(-variance)).sqrt() / rate


def _by_quadrature(mixture: UnivariateMixture, circle: Circle) -> tuple[Tensor, Tensor]:
    """Direction in radians, and 1 - R."""
    rate = 2 * math.pi / circle.period
    wrapped = CircularMixture.wrapped(mixture, circle)
    edges = wrapped.edges(circle.period)

    def moments(y: Tensor) -> Tensor:
        return wrapped.density(y) * torch.stack([(rate * y).cos(), (rate * y).sin(), torch.ones_like(y)])

    cosine, sine, total = integral(moments, edges, wrapped.size)
    direction = torch.atan2(sine, cosine)
    known = direction.detach()

    def versine(y: Tensor) -> Tensor:
        return 2 * (0.5 * (rate * y - known)).sin().square() * wrapped.density(y)

    return direction, integral(versine, edges, wrapped.size) / total
