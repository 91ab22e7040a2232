r"""Univariate mixtures on raw tensors, and the laws of their components."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad
from torch.special import erfc

from pyro_mdn.support.checks import is_differentiated, is_known
from pyro_mdn.support.torch_compat import tracing_state
from pyro_mdn.tensors.numerics import exp, log_sum_exp
from pyro_mdn.tensors.roots import follow_root, solve_tail
from pyro_mdn.tensors.tensor_batch import TensorBatch

__all__ = ["GRID", "Law", "SymmetricLaw", "TailAndDensity", "UnivariateMixture"]

TailAndDensity = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function of points that gives their cumulative distribution and density."""

GRID = (-8.5, -5.0, -3.4, -2.4, -1.6, -0.8, 0.0, 0.8, 1.6, 2.4, 3.4, 5.0, 8.5)


@dataclass(frozen=True, eq=False)
class Law(TensorBatch):
    """Law of a univariate component at location 0 and scale 1; see :class:`SymmetricLaw` for symmetric ones.

    Tensors that it stores, such as degrees of freedom, have the shape ``(*batch, K)`` and no further dimension.
    """

    @abstractmethod
    def log_density(self, z: Tensor) -> Tensor:
        """Log-density at z."""

    @abstractmethod
    def cdf(self, z: Tensor) -> Tensor:
        """Cumulative distribution at z, with relative accuracy in the lower tail, and differentiable."""

    @abstractmethod
    def quantile(self, q: Tensor) -> Tensor:
        """Inverse of :meth:`cdf` for q in [0, 1/2], or a good approximation of it; without gradients."""

    @abstractmethod
    def mean_distance(self, z: Tensor) -> Tensor:
        r"""Expected distance :math:`E|Z - z|`; infinite if there is no mean."""

    @abstractmethod
    def mirrored(self) -> Law:
        """Law of -Z."""

    @abstractmethod
    def mean(self) -> Tensor | float:
        """Mean of Z, which moments of mixtures are made of."""

    def mean_below(self, z: Tensor) -> Tensor:
        r"""Compute :math:`E[(z - Z)^+]`; infinite if there is no mean."""
        return (0.5 * (self.mean_distance(z) + z - self.mean())).clamp(min=0)

    def stddev(self) -> Tensor | float:
        """Return the standard deviation, which moments of mixtures are made of."""
        raise NotImplementedError(f"stddev: {type(self).__name__} does not say its standard deviation")

    def mean_versine(self, rate: Tensor) -> Tensor | None:
        r"""Compute :math:`1 - E[e^{i t Z}]` at rates t for a symmetric law; ``None`` if there is no closed form."""
        return None

    def log_cdf(self, z: Tensor) -> Tensor:
        """Logarithm of :meth:`cdf`; where that underflows, to first order, by density over logarithmic slope."""
        cdf, least = self.cdf(z), 4 * torch.finfo(z.dtype).tiny
        known = cdf.clamp(min=least).log()
        if tracing_state() is not None or (z.is_cpu and is_known(z) and not bool((cdf < least).any())):
            return known
        with torch.no_grad():
            slope = self.slope(z)
            far = (cdf < least) & (slope > 0) & slope.isfinite() & self.log_density(z).isfinite()
            inside = self.quantile(torch.full_like(z, 0.25))
        # Elsewhere at a point that keeps NaN out of the gradients.
        tail = self.log_density(torch.where(far, z, inside)) - torch.where(far, slope, 1.0).log()
        return torch.where(far, tail, known)

    def relative_log_density(self, z: Tensor, log_scale: Tensor) -> Tensor:
        """Log-density at ``(*batch, K)`` in units of a scale, up to a constant for all components."""
        return self.log_density(z) - log_scale

    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the log-density; without a graph."""
        if tracing_state() is not None:
            with torch.enable_grad():
                point = z.detach().requires_grad_()
                return torch.autograd.grad(self.log_density(point).sum(), point)[0]
        # Other transforms, and compilers, go through those of torch.func alone.
        return grad(lambda point: self.log_density(point).sum())(z.detach()).detach()

    def log_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        """Log-probability of the interval within ``half`` of a centre, accurate in both tails and if it is narrow."""
        law, at = self.mirrored(), -centre.abs()  # in the lower tail logarithms are accurate
        if law is not self:
            above = centre > 0
            return torch.where(above, law._log_lower_mass(at, half), self._log_lower_mass(at, half))
        return self._log_lower_mass(at, half)

    def _log_lower_mass(self, centre: Tensor, half: Tensor) -> Tensor:
        # The density at the centre is wrong by the square of the width, a difference of logarithms by eps over it.
        narrow = half * (1 + self.slope(centre).abs()) < torch.finfo(centre.dtype).eps ** (1 / 3)
        width = torch.where(narrow, half, 1.0).log() + math.log(2)
        wide = torch.where(narrow, 1.0, half)
        upper, lower = self.log_cdf(centre + wide), self.log_cdf(centre - wide)
        difference = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-torch.finfo(centre.dtype).tiny)))
        return torch.where(narrow, self.log_density(centre) + width, difference)

    def tail_and_density(self, weights: Tensor, locs: Tensor, scale: Tensor) -> TailAndDensity:
        """Cumulative distribution and density of a mixture as one function, which root finding calls often."""
        height = weights / scale

        def function(point: Tensor) -> tuple[Tensor, Tensor]:
            z = (point.unsqueeze(-1) - locs) / scale
            return (weights * self.cdf(z)).sum(-1), (height * exp(self.log_density(z))).sum(-1)

        return function

    def outer_tail(self, z: Tensor) -> Tensor:
        """Probability beyond z on its side of 0: below z where it is negative, above z where it is positive."""
        below = self.cdf(-z.abs())
        law = self.mirrored()
        return below if law is self else torch.where(z > 0, law.cdf(-z.abs()), below)

    def two_sided_quantile(self, q: Tensor) -> Tensor:
        """Quantile for q in [0, 1]."""
        lower, upper = self.quantile(q.clamp(max=0.5)), -self.mirrored().quantile((1 - q).clamp(max=0.5))
        return torch.where(q > 0.5, upper, lower)

    def followed_quantile(self, q: Tensor) -> Tensor:
        """Quantile for q in (0, 1/2], with gradients of the parameters of the law."""
        root = self.quantile(q).detach()
        if not is_differentiated(*self.tensors()):
            return root
        return follow_root(root, lambda point: (self.cdf(point) - q, self.log_density(point).exp()))

    def half_mean_difference(self, weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor | None:
        """Half the expected distance of two draws from a mixture, ``(*batch)``; ``None`` if it has no closed form."""
        return None

    def grid(self, like: Tensor) -> Tensor:
        """Thirteen points in ascending order, close to each other where the density bends; ``(*batch, K, 13)``."""
        below = like.new_tensor(GRID[: len(GRID) // 2])
        probabilities = 0.5 * erfc(-math.sqrt(0.5) * below)  # ndtr rounds to multiples of eps
        spread = self.map(lambda t, n: t.unsqueeze(-1))
        lower = spread.quantile(probabilities)
        upper = -spread.mirrored().quantile(probabilities).flip(-1)
        return torch.cat([lower, torch.zeros_like(lower[..., :1]), upper], -1)


@dataclass(frozen=True, eq=False)
class SymmetricLaw(Law):
    """Law of a component that is symmetric about its location."""

    def mirrored(self) -> Law:
        """Law of -Z, which is the same."""
        return self

    def mean(self) -> Tensor | float:
        """Mean of Z, 0 by symmetry."""
        return 0.0


class UnivariateMixture(NamedTuple):
    """A univariate mixture: parameters ``(*batch, K)`` that broadcast; values have the shape ``(*batch)``.

    Attributes:
        logits: Normalised log-weights.
        locs: Locations.
        scale: Scales.
        law: Law of the components.
    """

    logits: Tensor
    locs: Tensor
    scale: Tensor
    law: Law

    def mirrored(self) -> UnivariateMixture:
        """Distribution of minus the variable, whose lower tail is the upper one of this."""
        return UnivariateMixture(self.logits, -self.locs, self.scale, self.law.mirrored())

    def is_differentiated(self) -> bool:
        """Whether a parameter needs a gradient."""
        return is_differentiated(self.logits, self.locs, self.scale, *self.law.tensors())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density."""
        terms = self.logits + self.law.log_density(self._standardized(value)) - self.scale.log()
        return log_sum_exp(terms.movedim(-1, 0))

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density, and its derivative with respect to the cumulative distribution."""
        z = self._standardized(value)
        joint = self.logits + self.law.log_density(z) - self.scale.log()
        total = joint.logsumexp(-1)
        share = exp(joint - total.unsqueeze(-1))  # quicker than a softmax over few components
        return total, (share * self.law.slope(z) / self.scale).sum(-1) * (-total).exp()

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution, with relative accuracy in the lower tail."""
        return (self.logits.exp() * self.law.cdf(self._standardized(value))).sum(-1).clamp(max=1)

    def expected_below(self, value: Tensor) -> Tensor:
        r"""Compute :math:`E[(y - Y)^+]` at values y."""
        return (self.logits.exp() * self.scale * self.law.mean_below(self._standardized(value))).sum(-1)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Logarithm of :meth:`cdf`, accurate in both tails."""
        inside = value.isfinite()
        z = self._standardized(torch.where(inside, value, 0.0))
        terms = self.logits + self.law.log_cdf(z).clamp(min=-0.25 * torch.finfo(self.locs.dtype).max)
        lower = log_sum_exp(terms.movedim(-1, 0))
        # Above the median the logarithm of a number near 1 has no digits: that of what is missing to 1 has them.
        above = (self.logits.exp() * self.law.mirrored().cdf(-z)).sum(-1)
        upper = torch.log1p(-torch.where(above < 0.5, above, 0.0))
        ends = torch.where(value.isnan(), value, torch.where(value < 0, -math.inf, 0.0))
        return torch.where(inside, torch.where(above < 0.5, upper, lower), ends.to(lower))

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        """Log-probability of the interval within ``half`` of a centre, accurate where it is small or narrow."""
        z = self._standardized(centre)
        width = half.unsqueeze(-1) if isinstance(half, Tensor) else half
        terms = self.logits + self.law.log_mass(z, (width / self.scale).expand(z.shape))
        return terms.logsumexp(-1)

    def quantile(self, q: Tensor) -> Tensor:
        """Quantile, with gradients by the implicit function theorem.

        Quantiles above a half are those of the mirrored mixture at 1 - q, so that both tails are lower tails.
        """
        sign = torch.where(q > 0.5, -1.0, 1.0).to(q)
        tail = torch.where(q > 0.5, 1 - q, q)
        if self.law.mirrored() is self.law:
            locs = sign.unsqueeze(-1) * self.locs
            return sign * UnivariateMixture(self.logits, locs, self.scale, self.law)._lower_quantile(tail)
        below, above = self._lower_quantile(tail), self.mirrored()._lower_quantile(tail)
        return torch.where(q > 0.5, -above, below)

    def _lower_quantile(self, tail: Tensor) -> Tensor:
        """Quantile at probabilities up to a half."""
        with torch.no_grad():
            root = self._solve(tail).detach()  # in forward mode that is not one thing
        if not (self.is_differentiated() or is_differentiated(tail)):
            return root

        def equation(point: Tensor) -> tuple[Tensor, Tensor]:
            return self.cdf(point) - tail, self.log_prob(point).exp()

        # Where the quantile is infinite, any finite point keeps NaN out of the gradients.
        finite = torch.where(tail > 0, root, self.locs[..., 0].detach())
        return torch.where(tail > 0, follow_root(finite, equation), root)

    def _solve(self, tail: Tensor) -> Tensor:
        """Root between the smallest and the largest quantile of the components."""
        ends = self.locs + self.scale * self.law.quantile(tail.unsqueeze(-1))
        absent = self.logits == -math.inf
        low = ends.masked_fill(absent, math.inf).amin(-1)
        high = ends.masked_fill(absent, -math.inf).amax(-1)
        point = solve_tail(tail, low, high, self.law.tail_and_density(self.logits.exp(), self.locs, self.scale))
        return torch.where(tail > 0, point, -math.inf).masked_fill(self.logits.isnan().any(-1), math.nan)

    def _standardized(self, value: Tensor) -> Tensor:
        return (value.unsqueeze(-1) - self.locs) / self.scale
