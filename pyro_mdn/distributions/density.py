r"""Density of mixtures, also of points that were observed in part; draws and moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.families.components import Components, total_stddev
from pyro_mdn.distributions.observations.likelihood import (
    by_pattern,
    component_log_likelihood,
    independent_log_likelihood,
    log_likelihood,
    relative_log_likelihood,
)
from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.distributions.parameters import batch_dim, broadcast, draw_components
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import is_known, is_mapped, sample_shape_of, unwrapped
from pyro_mdn.support.torch_compat import assert_async, functional_assert_async, transforms_active
from pyro_mdn.tensors.channels import channels_first, channels_last
from pyro_mdn.tensors.numerics import log_sum_exp, shares

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

T = TypeVar("T", Targets, Tensor)

__all__ = [
    "VarianceSplit",
    "as_gaussian",
    "as_observations",
    "as_outcomes",
    "as_points",
    "complete_when_run",
    "component_log_prob",
    "covariance_matrix",
    "has_missing",
    "log_prob",
    "mean",
    "own_points",
    "relative_joint_log_prob",
    "responsibilities",
    "sample",
    "split_variance",
    "stddev",
    "variance",
]

_COMPLETE = "value: expected complete points under {}, got NaN for missing ones"


def as_points(mixture: Mixture, value: Any, name: str = "value") -> Tensor:
    """Convert points of any container to a tensor ``(*sample, *batch, D)``, as all methods do.

    Args:
        mixture: The mixture.
        value: A tensor, array, data frame or nested lists. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``.
        name: What to call it in errors.

    Raises:
        ValueError: If there is something else than numbers, or the shape does not fit.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        value = as_tensor(value, name, mixture.device)
    return _fitting(mixture, value, name)


def as_outcomes(mixture: Mixture, value: Any, name: str = "y") -> Tensor:
    """Convert what was observed as :func:`as_points` does, and refuse angles outside of their periods."""
    value = as_points(mixture, value, name)
    if mixture.validates:
        mixture.components.require_inside(value, name)
    return value


def as_observations(mixture: Mixture, value: Any, name: str = "value") -> TargetsOrTensor:
    """Convert points as :func:`as_points` does; :class:`Targets` stay what they are."""
    return _fitting(mixture, value, name) if isinstance(value, Targets) else as_points(mixture, value, name)


def _fitting(mixture: Mixture, value: T, name: str) -> T:
    if value.ndim == 0 or value.shape[-1] != mixture.dim:
        if mixture.dim > 1 or value.shape != mixture.batch_shape:
            raise ValueError(f"{name}: expected shape (*batch, {mixture.dim}), got {tuple(value.shape)}")
        value = value.unsqueeze(-1)
    if mixture.validates and value.shape[:-1] != mixture.batch_shape:
        broadcast(value.shape[:-1], mixture.batch_shape)
    return value


def own_points(mixture: Mixture, value: Any, name: str = "value") -> Tensor:
    """Convert points as :func:`as_points` does, to the precision of the mixture, which was widened to theirs."""
    return as_points(mixture, value, name).to(mixture.dtype)


def log_prob(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute the log-density in nats, all constants included, shape ``(*sample, *batch)``.

    .. math:: \log p(y) = \log \sum_k w_k \, p_k(y)

    Args:
        mixture: The mixture.
        value: Points y, shape ``(*sample, *batch, D)``: a tensor, array, data frame or list. For D = 1,
            ``(*batch,)`` is read as ``(*batch, 1)``. An entry that is NaN was not observed: the density is that
            of the other entries, and 1 if there are none. :class:`Targets` may have intervals: the result is then the
            log-density of the exact entries plus the log-probability of the intervals given these.

    Raises:
        ValueError: If the shape does not fit.
    """
    value = as_observations(mixture, value)
    origin = mixture.origin_for(value) if isinstance(value, Tensor) else None
    return _log_prob(mixture, value) if origin is None else origin.log_prob(value, "value")


@in_widest_precision
def _log_prob(mixture: Mixture, value: TargetsOrTensor) -> Tensor:
    if mixture.components.has_parts:
        return log_sum_exp((mixture.logits + _over_parts(mixture, value, _component_log_prob)).movedim(-1, 0))
    if _lacks_angles(mixture, value):
        return by_pattern(mixture, value, log_likelihood)[0]
    inner, value, log_slope = _pulled_back(mixture, value)
    if isinstance(value, Targets) and inner.components.has_independent_outputs and is_known(value.lower, value.upper):
        result = independent_log_likelihood(inner, value)
    elif isinstance(value, Targets) or has_missing(value):
        result = by_pattern(inner, value, log_likelihood)[0]
    else:
        result = inner.components.mixture_log_prob(inner.logits, complete_when_run(value))
    result = result if log_slope is None else result + log_slope
    return log_sum_exp(result) if mixture.components.has_angles else result


def _pulled_back(mixture: Mixture, value: TargetsOrTensor) -> tuple[Mixture, TargetsOrTensor, Tensor | None]:
    """Change variables as :meth:`Components.pulled_back` does, for a mixture."""
    components, value, log_slope = mixture.components.pulled_back(value)
    inner = mixture if components is mixture.components else mixture.of_any_family(components)
    return inner, value, log_slope


def _lacks_angles(mixture: Mixture, value: TargetsOrTensor) -> bool:
    """Whether entries are missing, and others may be angles, whose images depend on which ones were observed."""
    return mixture.components.has_angles and isinstance(value, Tensor) and has_missing(value)


def _over_parts(mixture: Mixture, value: TargetsOrTensor, function: Callable[[Any, Any], Tensor]) -> Tensor:
    """Sum a log-density of each component over the parts of the outputs, which have the weights of the mixture."""
    whole = mixture.components

    def of_part(components: Components, own: TargetsOrTensor) -> Tensor:
        return function(mixture if components is whole else mixture.of_any_family(components), own)

    parts: list[Tensor] = whole.over_parts(of_part, value)
    return sum(parts[1:], parts[0])


@in_widest_precision
def component_log_prob(mixture: Mixture, value: Any) -> Tensor:
    r"""Log-density :math:`\log p_k(y)` of each component, ``(*sample, *batch, K)``."""
    value = as_observations(mixture, value).to(mixture.dtype)
    return _over_parts(mixture, value, _component_log_prob)


def _component_log_prob(mixture: Mixture, value: TargetsOrTensor) -> Tensor:
    if _lacks_angles(mixture, value):
        return by_pattern(mixture, value, component_log_likelihood)[0]
    inner, value, log_slope = _pulled_back(mixture, value)
    if isinstance(value, Targets) or has_missing(value):
        result = by_pattern(inner, value, component_log_likelihood)[0]
    else:
        result = inner.components.log_prob(complete_when_run(value))
    result = result if log_slope is None else result + log_slope.unsqueeze(-1)
    return log_sum_exp(result) if mixture.components.has_angles else result


@in_widest_precision
def responsibilities(mixture: Mixture, value: Any) -> Tensor:
    r"""Posterior probability of each component given ``value``, ``(*sample, *batch, K)``.

    .. math:: r_k = \frac{w_k \, p_k(y)}{p(y)}

    One below about 1e-29 (1e-231 in double precision) is exactly 0.
    """
    joint = relative_joint_log_prob(mixture, value)
    return channels_last(shares(channels_first(joint, 1)), 1)


@in_widest_precision
def relative_joint_log_prob(mixture: Mixture, value: Any) -> Tensor:
    """Log-density of component and value, up to a constant for all components, ``(*sample, *batch, K)``."""
    value = as_observations(mixture, value).to(mixture.dtype)
    return mixture.logits + _over_parts(mixture, value, _relative_log_prob)


def _relative_log_prob(mixture: Mixture, value: TargetsOrTensor) -> Tensor:
    if mixture.components.has_angles:  # a constant of each image would change its share of the sum
        return _component_log_prob(mixture, value)
    inner, value, _ = _pulled_back(mixture, value)
    if isinstance(value, Targets) or has_missing(value):
        return by_pattern(inner, value, relative_log_likelihood)[0]
    return inner.components.relative_log_prob(value)


# Missing entries


def has_missing(value: Tensor) -> bool:
    """Whether an entry is NaN; no under compilation, where control flow must not depend on data.

    What is compiled raises a ``RuntimeError`` where an entry is NaN at run time. On a GPU an error would end the
    process: densities are NaN there.

    Raises:
        ValueError: If one is under ``torch.vmap`` or ``torch.jit``, for the same reason.
    """
    if torch.compiler.is_compiling():
        if value.is_cpu and not transforms_active():
            assert_async(~value.isnan().any(), _COMPLETE.format("torch.compile"))
        return False
    whole, mapped = unwrapped(value), is_mapped(value)
    missing = math.isnan(whole.sum().item()) and bool(whole.isnan().any())  # the sum is quicker, and NaN if any is
    if missing and (mapped or torch.jit.is_tracing()):  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(_COMPLETE.format("torch.vmap" if mapped else "torch.jit"))
    return missing


def complete_when_run(value: Tensor) -> Tensor:
    """Give a value back; what ``torch.jit`` traces then raises a ``RuntimeError`` where an entry is NaN at run time.

    A trace leaves out what nothing depends on: what is checked is a part of a sum.
    """
    if not torch.jit.is_tracing() or not value.is_cpu:  # pyright: ignore[reportPrivateImportUsage]
        return value
    has_missing(value)  # an error that names its caller, for the numbers that are there already
    complete, message = ~value.isnan().any(), _COMPLETE.format("torch.jit")
    return value + functional_assert_async(complete, message, value.new_zeros(()))


# Draws


@in_widest_precision
def sample(mixture: Mixture, sample_shape: Sequence[int] = ()) -> Tensor:
    """Independent draws, shape ``(*sample_shape, *batch, D)``: a component each, then a point of it."""
    with torch.no_grad():
        component = draw_components(mixture.logits, torch.Size(sample_shape_of(sample_shape)))
        return mixture.components.select(component).draw().squeeze(-2)


# Moments


@in_widest_precision
def mean(mixture: Mixture) -> Tensor:
    r""":math:`\sum_k w_k \mu_k`, shape ``(*batch, D)``; the mean direction of an angle."""
    own = mixture.components.mixture_moments(mixture.logits)
    if own is not None:
        return own[0]
    return _average(mixture, mixture.components.mean())


@in_widest_precision
def variance(mixture: Mixture) -> Tensor:
    r"""Variance of each output, shape ``(*batch, D)``, by the law of total variance; see :meth:`stddev` for angles."""
    own = mixture.components.mixture_moments(mixture.logits)
    if own is not None:
        return own[1].square()
    return _average(mixture, mixture.components.variance() + _deviation(mixture).square())


@in_widest_precision
def stddev(mixture: Mixture) -> Tensor:
    r"""Standard deviation of each output, shape ``(*batch, D)``, also where the variance over- or underflows.

    That of an angle is the circular one, :math:`\sqrt{-2 \log R}` radians for a mean resultant length R.
    """
    own = mixture.components.mixture_moments(mixture.logits)
    if own is not None:
        return own[1]
    return total_stddev(mixture.logits, mixture.components.stddev(), _deviation(mixture))


@in_widest_precision
def covariance_matrix(mixture: Mixture) -> Tensor:
    r"""Covariance of the mixture, shape ``(*batch, D, D)``.

    .. math:: \sum_k w_k \left( \Sigma_k + (\mu_k - \bar\mu)(\mu_k - \bar\mu)^\top \right)
    """
    if mixture.components.has_angles:
        if mixture.dim > 1:
            mixture.components.require_line("covariance_matrix", "variance is, of each output; or use draws")
        return variance(mixture).unsqueeze(-1)
    weight, deviation = mixture.logits.exp()[..., None, None], _deviation(mixture)
    between = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    return (weight * (mixture.components.covariance_matrix() + between)).sum(-3)


@in_widest_precision
def as_gaussian(mixture: Mixture) -> FullCovariance:
    """Covariance of the mixture as one operator, component axis 1; accurate also where the matrix is not."""
    mixture.components.require_line("as_gaussian", "mean and stddev are those of directions")
    root = mixture.components.covariance_root()
    root = root.expand(*mixture.batch_shape, mixture.n_components, *root.shape[-2:])
    stacked = torch.cat([root, _deviation(mixture).unsqueeze(-1)], -1) * (0.5 * mixture.logits).exp()[..., None, None]
    return FullCovariance.from_root(stacked.movedim(-3, -2).flatten(-2).unsqueeze(-3))


class VarianceSplit(NamedTuple):
    """Law of total variance over a batch dimension: covariances ``(*batch, D, D)`` that add up to the whole."""

    aleatoric: Tensor
    epistemic: Tensor


@in_widest_precision
def split_variance(mixture: Mixture, dim: int = 0) -> VarianceSplit:
    r"""Split the covariance of the mixture pooled over batch dimension ``dim`` (draws of the weights, say).

    .. math:: \mathrm{Cov}(y) = \underbrace{E_s[\mathrm{Cov}(y \mid s)]}_{\text{aleatoric}} +
              \underbrace{\mathrm{Cov}_s(E[y \mid s])}_{\text{epistemic}}
    """
    mixture.components.require_line("split_variance", "pool has the stddev of all mixtures together")
    dim = batch_dim(dim, len(mixture.batch_shape))
    deviation = mixture.mean - mixture.mean.mean(dim, keepdim=True)
    epistemic = (deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).mean(dim)
    return VarianceSplit(mixture.covariance_matrix.mean(dim), epistemic)


def _average(mixture: Mixture, values: Tensor) -> Tensor:
    """Average over components; where one is infinite the result has no gradients, which would be NaN."""
    weights = mixture.logits.exp().unsqueeze(-1)
    finite = values.isfinite()
    known = (weights * torch.where(finite, values, 0.0)).sum(-2)
    return torch.where(finite.all(-2), known, (weights * values).sum(-2).detach())


def _deviation(mixture: Mixture) -> Tensor:
    means = mixture.components.mean()
    centre = _average(mixture, means).unsqueeze(-2)
    return torch.where(centre.isinf(), math.inf, means - centre)
