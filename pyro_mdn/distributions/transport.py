r"""Rosenblatt transport to and from independent uniforms, output by output, and draws with pathwise gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_mdn.distributions.density import own_points, sample
from pyro_mdn.distributions.families.components import not_closed
from pyro_mdn.distributions.parameters import as_probabilities
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.checks import is_differentiated
from pyro_mdn.tensors.channels import normalize_logits
from pyro_mdn.tensors.roots import follow_root
from pyro_mdn.tensors.univariate import UnivariateMixture

if TYPE_CHECKING:
    from pyro_mdn.distributions.mixture import Mixture

__all__ = ["inverse_rosenblatt", "rosenblatt", "rsample"]


@in_widest_precision
def rosenblatt(mixture: Mixture, value: Any) -> Tensor:
    r"""Compute conditional probability integral transforms, shape ``(*sample, *batch, D)``.

    .. math:: u_d = F(y_d \mid y_1, \dots, y_{d-1})

    If y follows the mixture, the transforms are independent and uniform. Those of rounded targets or counts are not,
    even if each target is replaced by a draw from its cell. Test such targets output by output, by
    :func:`pyro_mdn.scores.pit` with ``cell``.

    References:
        Rosenblatt (1952), Remarks on a multivariate transformation.
    """
    value = mixture.components.to_inner(own_points(mixture, value))

    def walk(d: int, conditional: UnivariateMixture) -> Tensor:
        levels.append(conditional.cdf(value[..., d]))
        return value[..., d]

    levels: list[Tensor] = []
    _walk(mixture, walk)
    return torch.stack(levels, -1)


@in_widest_precision
def inverse_rosenblatt(mixture: Mixture, value: Any) -> Tensor:
    """Compute the points whose :meth:`rosenblatt` is ``value``, shape ``(*sample, *batch, D)``.

    Values of 0 and 1 give -inf and +inf. The outputs after such a value are NaN, because they have no conditional
    distribution.
    """
    mixture.components.require_line("inverse_rosenblatt", "icdf is, of each output")
    points = own_points(mixture, value)
    levels = as_probabilities(points, (*mixture.batch_shape, mixture.dim))
    points = _walk(mixture, lambda d, conditional: conditional.quantile(levels[..., d]))
    return mixture.components.from_inner(points)


@in_widest_precision
def rsample(mixture: Mixture, sample_shape: Sequence[int] = ()) -> Tensor:
    r"""Draw with pathwise gradients to locations, covariances and logits, shape ``(*sample_shape, *batch, D)``.

    The draws are those of :meth:`sample`. Their derivatives keep the conditional probability integral transforms
    fixed, one output after another. Gradients of the logits are unbiased, but for modes far apart their variance has no
    bound, because the few draws between the modes carry the whole gradient.

    References:
        Figurnov, Mohamed & Mnih (2018), Implicit reparameterization gradients.
        Graves (2016), Stochastic backpropagation through mixture density distributions.

    Raises:
        NotImplementedError: If a parameter needs a gradient, and outputs are counts, may be zero, or are angles.
    """
    draws = sample(mixture, sample_shape).detach()  # in forward mode, draws have the derivatives of their components
    if not is_differentiated(mixture.logits, *mixture.components.tensors()):
        return draws
    if not mixture.components.has_pathwise_draws:
        not_closed("rsample", mixture.components, "draws are without gradients: detach the mixture, or sample")
    points = mixture.components.to_inner(draws)

    def follow(d: int, conditional: UnivariateMixture) -> Tensor:
        level = conditional.cdf(points[..., d]).detach()

        def equation(point: Tensor) -> tuple[Tensor, Tensor]:
            return conditional.cdf(point) - level, conditional.log_prob(point).exp()

        return follow_root(points[..., d], equation)

    return mixture.components.from_inner(_walk(mixture, follow))


def _walk(mixture: Mixture, choose: Callable[[int, UnivariateMixture], Tensor]) -> Tensor:
    """Choose the outputs in order, each from its univariate mixture given the outputs before it, in the inner space.

    ``choose(d, conditional)`` takes a mixture with parameters ``(*sample, *batch, K)`` and returns values
    ``(*sample, *batch)``.
    """
    in_order, logits = mixture.components.inner.in_order(), mixture.logits
    outputs: list[Tensor] = []
    for d in range(mixture.dim):
        locs, scale, law = in_order.next_output()
        outputs.append(choose(d, UnivariateMixture(logits, locs, scale, law)))
        value = outputs[-1].unsqueeze(-1)
        logits = normalize_logits(logits + law.relative_log_density((value - locs) / scale, scale.log()))
        in_order.observe(value)
    return torch.stack(outputs, -1)
