r"""Operations whose result is again a mixture: marginals, conditionals, maps, pools, fewer components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pyro_mdn.distributions.density import has_missing, own_points
from pyro_mdn.distributions.families.components import Components, repeated
from pyro_mdn.distributions.observations.likelihood import Pattern, by_pattern
from pyro_mdn.distributions.parameters import Dims, batch_dim, check_dims
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.distributions.quantiles import thresholds
from pyro_mdn.distributions.truncation.truncated_components import truncated_components
from pyro_mdn.support.arrays import as_tensor, refuse
from pyro_mdn.support.checks import describe, is_differentiated, is_known, plain_number, shown
from pyro_mdn.tensors.channels import normalize_logits
from pyro_mdn.tensors.tensor_batch import folded

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

M = TypeVar("M", bound="Mixture")

__all__ = ["affine", "condition", "marginal", "pool", "prune", "temper", "truncated"]


@in_widest_precision
def marginal(mixture: M, dims: Dims) -> M:
    """Return the marginal distribution of the outputs ``dims``, an integer or several, in that order.

    Raises:
        ValueError: If an index repeats or is out of range, or if there are no indices.
    """
    dims = check_dims(dims, mixture.dim)
    return mixture.with_components(mixture.components.marginal(dims))


@in_widest_precision
def condition(mixture: M, values: Any, dims: Dims) -> M:
    r"""Return the conditional distribution of the remaining outputs, in ascending order, given ``values`` at ``dims``.

    .. math:: w_k' \propto w_k \, \mathcal{N}(v \mid \mu_{k,G}, \Sigma_{k,GG}), \quad
              \mu_k' = \mu_{k,F} + \Sigma_{k,FG} \Sigma_{k,GG}^{-1} (v - \mu_{k,G})

    Args:
        mixture: The mixture.
        values: Known values, shape ``(*sample, *batch, len(dims))``, in the order of ``dims``. An entry that is
            NaN was not observed: that row is conditioned on its other entries.
        dims: Indices of the known outputs, an integer or several; at least one output must remain.

    Raises:
        ValueError: If an index repeats or is out of range, if no output remains, if ``values`` has another width, or,
            when validating, if a value is impossible.
    """
    dims = check_dims(dims, mixture.dim)
    free = [d for d in range(mixture.dim) if d not in dims]
    if not free:
        raise ValueError(f"dims: expected at least one of {mixture.dim} outputs to stay free, got all of them")
    ordered, n = mixture.marginal([*dims, *free]), len(dims)
    known = ordered.marginal(range(n))
    values = own_points(known, values, "values")
    if has_missing(values):
        _joint(known, values)  # before rows are grouped, so that an error names the row that the caller has
        return _condition_on_observed(mixture, values, dims, free)
    if (given := ordered.components.given_images(ordered.logits, values)) is not None:
        return mixture.reweighted(*given)
    return mixture.reweighted(_joint(known, values), ordered.components.condition(values))


def _joint(known: Mixture, values: Tensor) -> Tensor:
    """Log-weights given values of all outputs of a mixture; a ``ValueError`` for what all components rule out."""
    joint = known.relative_joint_log_prob(values)
    impossible = (joint == -math.inf).all(-1, keepdim=True)
    if known.validates and is_known(impossible) and bool(impossible.any()):
        values = values.expand(*impossible.shape[:-1], known.dim)
        single = impossible & (known.univariate().log_prob(values) == -math.inf)
        refuse(values, single if bool(single.any()) else impossible, "values", "values of positive density")
    return joint


def _condition_on_observed(mixture: M, values: Tensor, dims: list[int], free: list[int]) -> M:
    form: Components = mixture.marginal(free).components
    count = mixture.components.num_given(dims, mixture.n_components)

    def given(rows: M, pattern: Pattern) -> tuple[Tensor, ...]:
        nonlocal form
        observed = pattern.exact
        rest = rows.marginal([*(dims[i] for i in observed), *free])
        rest = rest.condition(pattern.points, range(len(observed))) if observed else rest
        rest = _with_absent(rest, count)
        form = rest.components
        return rest.logits, *form.expand((*rest.batch_shape, rest.n_components)).tensors()

    logits, *tensors = by_pattern(mixture, values, given)
    return mixture.reweighted(logits, form.with_tensors(tensors))


def _with_absent(mixture: M, count: int) -> M:
    """Append components of weight zero until there are ``count``, a multiple of those that there are."""
    n = mixture.n_components
    if n == count:
        return mixture
    logits = torch.cat([mixture.logits, mixture.logits.new_full((*mixture.batch_shape, count - n), -math.inf)], -1)
    return mixture.derived(logits, repeated(mixture.components, count // n, (*mixture.batch_shape, n)))


@in_widest_precision
def affine(mixture: M, shift: Any = 0.0, scale: Any = 1.0, *, matrix: Any = None) -> M:
    r"""Return the distribution of ``shift + scale * y``, elementwise, or of ``shift + matrix @ y``.

    Args:
        mixture: The mixture.
        shift: Number or tensor, shape ``(*batch, D)`` (broadcast).
        scale: Number or tensor, shape ``(*batch, D)`` (broadcast); not zero, of either sign. One number for all
            outputs keeps an isotropic covariance isotropic.
        matrix: Matrix in place of ``scale``, shape ``(*batch, M, D)`` with M ≤ D, of full rank. The resulting
            covariance is full.

    Raises:
        ValueError: If the shapes do not agree, if both a scale and a matrix are given or, when validating, if a
            number is not finite, a scale is zero or a matrix is not of full rank.
    """
    if matrix is not None:
        return _map_linearly(mixture, shift, scale, matrix)
    shift, scale = _as_vector(mixture, shift, "shift", mixture.dim), _as_vector(mixture, scale, "scale", mixture.dim)
    known = mixture.validates and is_known(shift, scale)
    if known and not bool((scale.isfinite() & (scale != 0)).all() & shift.isfinite().all()):
        raise ValueError("shift, scale: expected finite numbers, and scales other than zero")
    return mixture.with_components(mixture.components.affine(shift.unsqueeze(-2), scale.unsqueeze(-2)))


def _map_linearly(mixture: M, shift: Any, scale: Any, matrix: Any) -> M:
    if not isinstance(scale, float | int) or scale != 1:
        raise ValueError("affine: expected a scale or a matrix, got both")
    matrix = as_tensor(matrix, "matrix", mixture.device).to(mixture.components.like)
    if matrix.ndim < 2 or matrix.shape[-1] != mixture.dim or not 0 < matrix.shape[-2] <= mixture.dim:
        raise ValueError(
            f"matrix: expected shape (*batch, M, {mixture.dim}), M <= {mixture.dim}, got {tuple(matrix.shape)}"
        )
    matrix = matrix.unsqueeze(-3)
    shift = _as_vector(mixture, shift, "shift", matrix.shape[-2]).unsqueeze(-2)
    components = mixture.components.map_linearly(shift, matrix)
    known = mixture.validates and is_known(*components.tensors())
    if known and not all(bool(tensor.isfinite().all()) for tensor in components.tensors()):
        raise ValueError("matrix: expected finite numbers and full rank")
    return mixture.with_components(components)


def _as_vector(mixture: Mixture, value: Any, name: str, dim: int) -> Tensor:
    value = as_tensor(value, name, mixture.device).to(mixture.components.like)
    value = value.unsqueeze(-1) if value.ndim == 0 else value
    if value.shape[-1] not in (1, dim):
        raise ValueError(f"{name}: expected a last dimension of 1 or {dim}, got {tuple(value.shape)}")
    return value


@in_widest_precision
def truncated(mixture: Mixture, low: Any = -math.inf, high: Any = math.inf) -> Mixture:
    r"""Return the distribution given that each output lies in an interval, again a mixture, of truncated components.

    .. math:: p(y \mid a \le y \le b) = \sum_k w_k' \frac{p_k(y)}{m_k}, \quad w_k' \propto w_k m_k, \quad
              m_k = P_k(a \le y \le b)

    Densities, distribution functions, quantiles, central intervals and draws are exact, also where the interval is far
    out; moments and scores are by quadrature, and shortest intervals by a search. An event that has not happened until
    a time t is at the times of ``mixture.truncated(low=t)``. Beside outputs with an interval, those without may be of
    other families, such as counts.

    Args:
        mixture: The mixture.
        low: Lower ends a, one number or ``(*batch, D)``; minus infinity for none.
        high: Upper ends b, likewise; infinity for none.

    Raises:
        ValueError: If a lower end is not below its upper end, or the interval is outside of the support.
        NotImplementedError: If outputs with an interval are dependent within a component, counts, angles, or may be
            zero.

    >>> from pyro_mdn import GaussianMixture, IsotropicCovariance
    >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
    >>> half = normal.truncated(low=0.0)
    >>> half.mean, half.cdf(0.0), half.icdf(0.5)
    (tensor([0.7979]), tensor([0.]), tensor([0.6745]))
    """
    start, end = torch.broadcast_tensors(thresholds(mixture, low), thresholds(mixture, high))
    if is_known(start, end) and not bool((start < end).all()):
        raise ValueError(f"low, high: expected ends in ascending order, got {shown(low)} and {shown(high)}")
    whole = mixture.expand(torch.broadcast_shapes(start.shape[:-1], mixture.batch_shape))
    parts: list[tuple[Components, Tensor]] = whole.components.over_parts(truncated_components, start, end)
    components = whole.components.of_parts([part for part, _ in parts])
    log_mass = torch.stack([mass for _, mass in parts]).sum(0)
    if is_known(log_mass) and not bool((whole.logits + log_mass > -math.inf).any(-1).all()):
        raise ValueError(f"low, high: expected a range within the support, got {shown(low)} and {shown(high)}")
    return whole.of_any_family(components).reweighted(whole.logits + log_mass, components)


def temper(mixture: M, temperature: float) -> M:
    r"""Divide the logits by :math:`\tau` and multiply the scales by :math:`\sqrt\tau`.

    Args:
        mixture: The mixture.
        temperature: :math:`\tau > 0`; below 1 draws are more cautious, above 1 more adventurous.

    Raises:
        ValueError: If the temperature is not positive and finite, if its square root over- or underflows in the dtype
            of the mixture, or if the scale of an angle becomes larger than 30 radians.

    References:
        Ha & Schmidhuber (2018), World Models.
    """
    given, temperature = temperature, plain_number(temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {shown(given)}")
    root, limits = math.sqrt(temperature), torch.finfo(mixture.dtype)
    if not limits.tiny <= root <= limits.max:
        raise ValueError(f"temperature: expected a number with a root in {mixture.dtype}, got {temperature}")
    if temperature == 1:  # which leaves scales of angles as they are, however large
        return mixture.derived(mixture.logits, mixture.components)
    scale = mixture.components.like.new_full((1,), root)
    # The largest logit stays 0, however small the temperature.
    logits = (mixture.logits - mixture.logits.detach().amax(-1, keepdim=True)) / scale / scale
    return mixture.reweighted(logits, mixture.components.widen(scale))


@in_widest_precision
def pool(mixture: M, dim: int, weights: Any = None) -> M:
    r"""Average the density over batch dimension ``dim``; the result is exactly a mixture of S·K components.

    .. math:: p(y) = \sum_{s=1}^S a_s \, p_s(y)

    Args:
        mixture: The mixture.
        dim: Batch dimension to fold into the components.
        weights: Weights :math:`a_s \ge 0`, shape ``(S,)``, normalised here; by default all equal. Their gradient
            is right at 0 too, because a weight that is differentiated counts as at least the square root of the
            smallest normal number of its dtype.

    Raises:
        ValueError: If there is no such batch dimension, if it is empty, or if the weights are not S finite numbers,
            none negative and not all zero.
    """
    n = len(mixture.batch_shape)
    dim = batch_dim(dim, n)
    full = (*mixture.batch_shape, mixture.n_components)
    log_weights = _log_weights(weights, mixture.batch_shape[dim], mixture.logits)
    logits = mixture.logits + log_weights.reshape(-1, *(1,) * (n - dim))
    return mixture.reweighted(folded(logits, dim, n), mixture.components.pooled(torch.Size(full), dim))


def prune(mixture: M, threshold: float) -> M:
    """Drop components of weight below ``threshold``, and give their weight to the others in proportion.

    In a batch, a component stays as long as one mixture keeps it; in the others its weight becomes zero. Under
    ``torch.vmap`` and in compiled functions all components stay, because no shape may depend on values there.

    Raises:
        ValueError: If the threshold is not in [0, 1), or if nothing would be left of a mixture.
    """
    given, threshold = threshold, plain_number(threshold)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {shown(given)}")
    small = mixture.logits < math.log(threshold) if threshold else torch.zeros_like(mixture.logits, dtype=torch.bool)
    if not small.numel():
        return mixture
    if not is_known(small):
        return mixture.reweighted(mixture.logits.masked_fill(small, -math.inf), mixture.components)
    if bool(small.all(-1).any()):
        raise ValueError(f"threshold: expected to leave components, got {threshold}, above all weights")
    kept = (~small).reshape(-1, mixture.n_components).any(0).nonzero().squeeze(-1)

    def keep(tensor: Tensor, event_dim: int) -> Tensor:
        axis = tensor.ndim - event_dim - 1
        return tensor if tensor.shape[axis] == 1 else tensor.index_select(axis, kept)

    logits = mixture.logits.masked_fill(small, -math.inf)[..., kept]
    return mixture.reweighted(logits, mixture.components.map(keep))


def _log_weights(weights: Any, size: int, like: Tensor) -> Tensor:
    if not size:
        raise ValueError("dim: expected mixtures along it, got none")
    if weights is None:
        return like.new_full((size,), -math.log(size))
    given, weights = weights, as_tensor(weights, "weights", like.device).to(like)
    total = weights.detach().sum()
    known = weights.shape == (size,) and is_known(weights)
    if weights.shape != (size,) or (known and not bool((weights >= 0).all() & (total > 0) & total.isfinite())):
        expected = f"{size} finite numbers, none negative and not all zero"
        raise ValueError(f"weights: expected {expected}, got {describe(given)}")
    if is_differentiated(weights):  # the logarithm has no finite gradient at 0
        least = math.sqrt(torch.finfo(weights.dtype).tiny)
        weights = weights + (least - weights.detach()).clamp(min=0)
    return normalize_logits(weights.log())
