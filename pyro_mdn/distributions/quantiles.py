r"""Distribution functions, quantiles and intervals of single outputs, and regions of highest density."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pyro_mdn.distributions.density import as_points, own_points
from pyro_mdn.distributions.marginals import Marginals
from pyro_mdn.distributions.parameters import as_probabilities
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import require_unmapped, shown

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = [
    "cdf",
    "central_quantile",
    "highest_density_threshold",
    "icdf",
    "in_highest_density_region",
    "interval",
    "log_cdf",
    "log_sf",
    "sf",
    "thresholds",
    "univariate",
]


def univariate(mixture: Mixture) -> Marginals:
    """Return the distributions of single outputs, ``(*batch, D)``."""
    return mixture.components.marginals(mixture.logits)


@in_widest_precision
def cdf(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute the marginal cumulative distribution function of each output, shape ``(*sample, *batch, D)``.

    .. math:: F_d(y_d) = \sum_k w_k \, \Phi\left( (y_d - \mu_{kd}) / \sigma_{kd} \right)

    Args:
        mixture: The mixture.
        value: Points ``(*sample, *batch, D)``, or one number for all outputs of all mixtures.
    """
    value = thresholds(mixture, value)
    return univariate(mixture).cdf(value)


def thresholds(mixture: Mixture, value: Any) -> Tensor:
    """Convert points as :func:`own_points` does; one number stands for all outputs of all mixtures."""
    single = isinstance(value, Real)
    value = value.expand(mixture.dim) if isinstance(value, Tensor) and value.ndim == 0 else value
    return own_points(mixture, mixture.components.like.new_tensor(value).expand(mixture.dim) if single else value)


@in_widest_precision
def sf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the marginal survival function 1 - F of each output, accurate where small, ``(*sample, *batch, D)``."""
    value = thresholds(mixture, value)
    return univariate(mixture).sf(value)


@in_widest_precision
def log_cdf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the logarithm of :meth:`cdf`, accurate in both tails, shape ``(*sample, *batch, D)``.

    This is the log-likelihood of an observation of which only an upper limit is known (left-censored). It is
    differentiable twice. The result is NaN where ``value`` is NaN, and such entries add nothing to gradients.

    >>> import torch
    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> normal.log_cdf(torch.tensor([[-40.0], [0.0]])).flatten()
    tensor([-8.0461e+02, -6.9315e-01])
    """
    value = thresholds(mixture, value)
    return univariate(mixture).log_cdf(value)


@in_widest_precision
def log_sf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the logarithm of :meth:`sf`, accurate in both tails, shape ``(*sample, *batch, D)``.

    This is the log-likelihood of an observation of which only a lower limit is known (right-censored). Derivatives and
    NaN are as for :meth:`log_cdf`.
    """
    value = thresholds(mixture, value)
    return univariate(mixture).log_sf(value)


@in_widest_precision
def icdf(mixture: Mixture, value: Any) -> Tensor:
    """Compute the marginal quantile of each output: the inverse of :meth:`cdf`, shape ``(*sample, *batch, D)``.

    Gradients, also with respect to ``value``, are those of the implicit function theorem.

    Args:
        mixture: The mixture.
        value: Probabilities, broadcast against ``(*batch, D)``; 0 and 1 give the ends of the support.

    Raises:
        ValueError: If a probability is outside [0, 1] or the shape does not fit.
    """
    q = as_tensor(value, "value", mixture.device).to(mixture.components.like)
    return univariate(mixture).quantile(as_probabilities(q, (*mixture.batch_shape, mixture.dim)))


@in_widest_precision
def central_quantile(mixture: Mixture, value: Any) -> Tensor:
    """Compute quantiles as :func:`icdf` does, but those of angles from the angle opposite to their mean direction.

    Where the period of an angle begins is a convention, which must not decide what is predicted. Counted like this, the
    median and the ends of central intervals do not depend on it, and quantiles are angles of the period.

    References:
        Mardia & Jupp (2000), Directional statistics, on medians and quantiles of circular distributions.
    """
    q = as_tensor(value, "value", mixture.device).to(mixture.components.like)
    return univariate(mixture).central_quantile(as_probabilities(q, (*mixture.batch_shape, mixture.dim)))


@in_widest_precision
def interval(
    mixture: Mixture, mass: float, *, kind: Literal["central", "shortest"] = "central"
) -> tuple[Tensor, Tensor]:
    """Compute the lower and upper ends, ``(*batch, D)`` each, of an interval with probability ``mass`` for each output.

    Args:
        mixture: The mixture.
        mass: Probability inside, in (0, 1).
        kind: ``"central"`` leaves equal probabilities on both sides. ``"shortest"`` is the shortest single interval,
            for which all local minima of the width are compared. If there is one mode, that interval contains the
            points of highest density. Intervals of angles are arcs: they begin in the period and may go on beyond its
            end, and central ones leave equal probabilities between them and the angle opposite to the mean.

    Raises:
        ValueError: If the mass is not in (0, 1) or the kind is unknown.
    """
    _check_mass(mass)
    if kind not in ("central", "shortest"):
        raise ValueError(f"kind: expected 'central' or 'shortest', got {shown(kind)}")
    if kind == "central":
        tail = mixture.components.like.new_full((*mixture.batch_shape, mixture.dim), (1 - mass) / 2)
        return univariate(mixture).central_interval(tail)
    require_unmapped("interval", mixture.logits, *mixture.components.tensors())
    return univariate(mixture).shortest_interval(1 - mass)


@in_widest_precision
def highest_density_threshold(mixture: Mixture, mass: float, *, num_samples: int = 10_000) -> Tensor:
    r"""Estimate the log-density above which the points have probability ``mass``, shape ``(*batch,)``, from draws.

    .. math:: P(\log p(Y) \ge t) = \text{mass}

    Raises:
        ValueError: If the mass is not in (0, 1).

    References:
        Hyndman (1996), Computing and graphing highest density regions.
    """
    _check_mass(mass)
    densities = mixture.log_prob(mixture.sample((num_samples,)))
    return densities.quantile(1 - mass, 0) if densities.numel() else densities[0]


def in_highest_density_region(mixture: Mixture, value: Any, mass: float, *, num_samples: int = 10_000) -> Tensor:
    """Check whether points lie in the smallest region of probability ``mass``, shape ``(*sample, *batch)``."""
    value = as_points(mixture, value)
    return mixture.log_prob(value) >= mixture.highest_density_threshold(mass, num_samples=num_samples)


def _check_mass(mass: float) -> None:
    single = isinstance(mass, Real) or (isinstance(mass, Tensor) and mass.ndim == 0)
    if not single or not 0 < float(mass) < 1:
        raise ValueError(f"mass: expected a probability in (0, 1), got {shown(mass)}")
