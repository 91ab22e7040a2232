r"""Transport to and from independent uniforms, output by output, and draws with pathwise gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_mdn.distributions.density import own_points, sample
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
    r"""Conditional probability integral transforms, shape ``(*sample, *batch, D)``.

    .. math:: u_d = F(y_d \mid y_1, \dots, y_{d-1})

    If y follows the mixture, they are independent and uniform. If what is observed was rounded, or is a count, they
    are not, nor are they with a draw from each cell: of such targets test each output, by
    :func:`pyro_mdn.scores.pit` with ``cell``.

    References:
        Rosenblatt (1952), Remarks on a multivariate transformation.
    """
    value = own_points(mixture, value)

    def walk(d: int, conditional: UnivariateMixture) -> Tensor:
        levels.append(conditional.cdf(value[..., d]))
        return value[..., d]

    levels: list[Tensor] = []
    _walk(mixture, walk)
    return torch.stack(levels, -1)


@in_widest_precision
def inverse_rosenblatt(mixture: Mixture, value: Any) -> Tensor:
    """Points whose :meth:`rosenblatt` is ``value``, shape ``(*sample, *batch, D)``.

    Values of 0 and 1 give ∓inf, and NaN in the outputs after it, which have no distribution then.
    """
    points = own_points(mixture, value)
    levels = as_probabilities(points, (*mixture.batch_shape, mixture.dim))
    return _walk(mixture, lambda d, conditional: conditional.quantile(levels[..., d]))


@in_widest_precision
def rsample(mixture: Mixture, sample_shape: Sequence[int] = ()) -> Tensor:
    r"""Draws with pathwise gradients to locations, covariances and logits, ``(*sample_shape, *batch, D)``.

    The draw is that of :meth:`sample`. Its derivatives keep the conditional probability integral transforms
    fixed, one output after another. For modes far apart the gradients of the logits are right on average, but
    vary without bound: the few draws between the modes carry all of it.

    References:
        Figurnov, Mohamed & Mnih (2018), Implicit reparameterization gradients.
        Graves (2016), Stochastic backpropagation through mixture density distributions.
    """
    draws = sample(mixture, sample_shape).detach()  # in forward mode they have derivatives: those of the components

    def follow(d: int, conditional: UnivariateMixture) -> Tensor:
        level = conditional.cdf(draws[..., d]).detach()

        def equation(point: Tensor) -> tuple[Tensor, Tensor]:
            return conditional.cdf(point) - level, conditional.log_prob(point).exp()

        return follow_root(draws[..., d], equation)

    if is_differentiated(mixture.logits, *mixture.components.tensors()):
        return _walk(mixture, follow)
    return draws


def _walk(mixture: Mixture, choose: Callable[[int, UnivariateMixture], Tensor]) -> Tensor:
    """Choose outputs in order, each from its univariate mixture given those before it.

    ``choose(d, conditional)`` sees parameters ``(*sample, *batch, K)`` and returns ``(*sample, *batch)``.
    """
    in_order, logits = mixture.components.in_order(), mixture.logits
    outputs: list[Tensor] = []
    for d in range(mixture.dim):
        locs, scale, law = in_order.next_output()
        outputs.append(choose(d, UnivariateMixture(logits, locs, scale, law)))
        value = outputs[-1].unsqueeze(-1)
        logits = normalize_logits(logits + law.relative_log_density((value - locs) / scale, scale.log()))
        in_order.observe(value)
    return torch.stack(outputs, -1)
