r"""The Gaussian mixture: its quantiles, its transport to uniforms, and the shape of its density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_mdn.distributions.algebra import MixtureAlgebra
from pyro_mdn.distributions.covariance.correlated import plus
from pyro_mdn.distributions.modes import find_modes
from pyro_mdn.distributions.precision import in_widest_precision
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import is_differentiated, is_known, require_unmapped, shown
from pyro_mdn.tensors import kernels, univariate
from pyro_mdn.tensors.shortest_intervals import shortest_intervals

__all__ = ["GaussianMixture"]


class GaussianMixture(MixtureAlgebra):
    r"""Mixture of :math:`K` Gaussians over :math:`\mathbb{R}^D`.

    .. math:: p(y) = \sum_{k=1}^K w_k \, \mathcal{N}(y \mid \mu_k, \Sigma_k)

    A Pyro distribution with ``event_shape`` ``(D,)``. Arguments broadcast over the batch. Every closed form is
    differentiable, and is again a mixture where it is a distribution.

    Results have the precision of the parameters, which may also be half. They are computed in single precision at
    least, and in double if an argument is. A batch of mixtures is indexed like a tensor: ``mixture[rows]``.

    Args:
        logits: Log-weights up to a constant, shape ``(*batch, K)``. A weight of zero is ``-inf``.
        locs: Component means, shape ``(*batch, K, D)``.
        covariance: Component covariances; a component axis of 1 ties them.
        validate_args: Check values of parameters and arguments; by default as ``pyro.enable_validation`` was told.

    Raises:
        ValueError: If shapes or dtypes do not agree or, when validating, if a parameter is not finite or a
            covariance not positive definite.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> from pyro_mdn import DiagonalCovariance
    >>> locs, covariance = torch.tensor([[-1.0], [1.0]]), DiagonalCovariance(torch.ones(1, 1))
    >>> mixture = GaussianMixture(torch.zeros(2), locs, covariance)
    >>> mixture.mean, mixture.variance
    (tensor([0.]), tensor([2.]))
    """

    has_rsample = True

    # Quantiles, one output at a time

    @in_widest_precision
    def cdf(self, value: Any) -> Tensor:
        r"""Marginal cumulative distribution of each output, shape ``(*sample, *batch, D)``.

        .. math:: F_d(y_d) = \sum_k w_k \, \Phi\left( (y_d - \mu_{kd}) / \sigma_{kd} \right)
        """
        value = self._points(value)
        return univariate.mixture_cdf(value, *self._univariate())

    @in_widest_precision
    def sf(self, value: Any) -> Tensor:
        """Marginal survival function 1 - F of each output, ``(*sample, *batch, D)``, accurate where it is small."""
        value = self._points(value)
        logits, locs, scale = self._univariate()
        return univariate.mixture_cdf(-value, logits, -locs, scale)

    @in_widest_precision
    def log_cdf(self, value: Any) -> Tensor:
        """Logarithm of :meth:`cdf`, accurate in both tails, shape ``(*sample, *batch, D)``.

        The log-likelihood of an observation of which only an upper limit is known (left-censored). Differentiable
        twice. Entries that are NaN are NaN, and add nothing to gradients.

        >>> from pyro_mdn import IsotropicCovariance
        >>> normal = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), IsotropicCovariance(torch.ones(1)))
        >>> normal.log_cdf(torch.tensor([[-40.0], [0.0]])).flatten()
        tensor([-8.0461e+02, -6.9315e-01])
        """
        value = self._points(value)
        return univariate.mixture_log_cdf(value, *self._univariate())

    @in_widest_precision
    def log_sf(self, value: Any) -> Tensor:
        """Logarithm of :meth:`sf`, accurate in both tails, shape ``(*sample, *batch, D)``.

        The log-likelihood of an observation of which only a lower limit is known (right-censored); see :meth:`log_cdf`.
        """
        value = self._points(value)
        logits, locs, scale = self._univariate()
        return univariate.mixture_log_cdf(-value, logits, -locs, scale)

    @in_widest_precision
    def icdf(self, value: Any) -> Tensor:
        """Marginal quantile of each output: the inverse of :meth:`cdf`, shape ``(*sample, *batch, D)``.

        Gradients are those of the implicit function, also with respect to ``value``.

        Args:
            value: Probabilities, broadcast against ``(*batch, D)``; 0 and 1 give ∓inf.

        Raises:
            ValueError: If a probability is outside [0, 1] or the shape does not fit.
        """
        q = as_tensor(value, "value", self.locs.device).to(self.locs)
        q = _probabilities(q, (*self.batch_shape, self.dim))
        return univariate.mixture_quantile(q, *self._univariate())

    def _univariate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters of the marginals: logits ``(*batch, 1, K)``, locations and scales ``(*batch, D, K)``."""
        return self.logits.unsqueeze(-2), self.locs.mT, self.covariance.stddev().mT

    @in_widest_precision
    def interval(self, mass: float, *, kind: Literal["central", "shortest"] = "central") -> tuple[Tensor, Tensor]:
        """Lower and upper ends, ``(*batch, D)`` each, of an interval with probability ``mass`` for each output.

        Args:
            mass: Probability inside, in (0, 1).
            kind: ``"central"`` leaves equal tails; ``"shortest"`` is the shortest single interval, which contains
                the points of highest density if there is one mode. All local minima of the width are compared.

        Raises:
            ValueError: If the mass is not in (0, 1) or the kind is unknown.
        """
        _check_mass(mass)
        if kind not in ("central", "shortest"):
            raise ValueError(f"kind: expected 'central' or 'shortest', got {shown(kind)}")
        outside = 1 - mass
        left = right = self.locs.new_full((*self.batch_shape, self.dim), outside / 2)
        if kind == "shortest":
            require_unmapped("interval", *self._univariate())
            left, right, *ends = shortest_intervals(outside, *self._univariate())
            if not is_differentiated(*self._univariate()):
                return ends[0], ends[1]
            left = self._follow_shortest(left, right)
            right = right + (left.detach() - left)
        return self.icdf(left), self._upper(right)

    def _upper(self, tail: Tensor) -> Tensor:
        """Point with probability ``tail`` above it, for each output."""
        logits, locs, scale = self._univariate()
        return -univariate.mixture_quantile(tail, logits, -locs, scale)

    def _follow_shortest(self, left: Tensor, right: Tensor) -> Tensor:
        """Give the probabilities below shortest intervals their derivatives: the density is the same at both ends."""
        parameters = self._univariate()
        if not is_differentiated(*parameters):
            return left

        def equation(tail: Tensor) -> tuple[Tensor, Tensor]:
            ends = self.icdf(tail), self._upper(right + (left - tail))
            (low, bend_low), (high, bend_high) = (univariate.log_density_by_level(end, *parameters) for end in ends)
            slope, terms = bend_low - bend_high, bend_low.abs() + bend_high.abs()
            # Two shortest intervals that become one: there are no derivatives.
            return low - high, slope.masked_fill(~(slope > 1e-3 * terms), math.inf)

        return univariate.follow_root(left, equation)

    # Regions of highest density

    @in_widest_precision
    def highest_density_threshold(self, mass: float, *, num_samples: int = 10_000) -> Tensor:
        r"""Log-density above which the points have probability ``mass``, shape ``(*batch,)``, from draws.

        .. math:: P(\log p(Y) \ge t) = \text{mass}

        Raises:
            ValueError: If the mass is not in (0, 1).

        References:
            Hyndman (1996), Computing and graphing highest density regions.
        """
        _check_mass(mass)
        densities = self.log_prob(self.sample((num_samples,)))
        return densities.quantile(1 - mass, 0) if densities.numel() else densities[0]

    def in_highest_density_region(self, value: Any, mass: float, *, num_samples: int = 10_000) -> Tensor:
        """Whether points lie in the smallest region of probability ``mass``, shape ``(*sample, *batch)``."""
        return self.log_prob(value) >= self.highest_density_threshold(mass, num_samples=num_samples)

    # Transport to and from independent uniforms

    @in_widest_precision
    def rosenblatt(self, value: Any) -> Tensor:
        r"""Conditional probability integral transforms, shape ``(*sample, *batch, D)``.

        .. math:: u_d = F(y_d \mid y_1, \dots, y_{d-1})

        If y follows the mixture, they are independent and uniform. If what is observed was rounded, or is a count, they
        are not, nor are they with a draw from each cell: of such targets test each output, by
        :func:`pyro_mdn.scores.pit` with ``cell``.

        References:
            Rosenblatt (1952), Remarks on a multivariate transformation.
        """
        value = self._points(value)

        def walk(d: int, *conditional: Tensor) -> Tensor:
            levels.append(univariate.mixture_cdf(value[..., d], *conditional))
            return value[..., d]

        levels: list[Tensor] = []
        self._walk(walk)
        return torch.stack(levels, -1)

    @in_widest_precision
    def inverse_rosenblatt(self, value: Any) -> Tensor:
        """Points whose :meth:`rosenblatt` is ``value``, shape ``(*sample, *batch, D)``.

        Values of 0 and 1 give ∓inf, and NaN in the outputs after it, which have no distribution then.
        """
        value = _probabilities(self._points(value), (*self.batch_shape, self.dim))
        return self._walk(lambda d, *conditional: univariate.mixture_quantile(value[..., d], *conditional))

    @in_widest_precision
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws with pathwise gradients to locations, covariances and logits, ``(*sample_shape, *batch, D)``.

        The draw is that of :meth:`sample`. Its derivatives keep the conditional probability integral transforms
        fixed, one output after another. For modes far apart the gradients of the logits are right on average, but
        vary without bound: the few draws between the modes carry all of it.

        References:
            Figurnov, Mohamed & Mnih (2018), Implicit reparameterization gradients.
            Graves (2016), Stochastic backpropagation through mixture density distributions.
        """
        draws = self.sample(sample_shape).detach()  # in forward mode they have derivatives: those of the components

        def follow(d: int, *conditional: Tensor) -> Tensor:
            logits, locs, scale = conditional
            level = univariate.mixture_cdf(draws[..., d], logits, locs, scale).detach()

            def equation(point: Tensor) -> tuple[Tensor, Tensor]:
                slope = univariate.mixture_log_density(point, logits, locs, scale).exp()
                return univariate.mixture_cdf(point, logits, locs, scale) - level, slope

            return univariate.follow_root(draws[..., d], equation)

        if is_differentiated(self.logits, self.locs, *self.covariance.tensors()):
            return self._walk(follow)
        return draws

    def _walk(self, choose: Callable[..., Tensor]) -> Tensor:
        """Choose outputs in order, each from its univariate mixture given those before it.

        ``choose(d, logits, locs, scale)`` sees parameters ``(*sample, *batch, K)`` and returns ``(*sample, *batch)``.
        """
        covariance, logits = self.covariance.triangular(), self.logits
        residuals: list[Tensor] = []
        outputs: list[Tensor] = []
        for d in range(self.dim):
            shift, scale = covariance.next_output(residuals)
            locs = self.locs[..., d] + shift
            outputs.append(choose(d, logits, locs, scale))
            standardized = (outputs[-1].unsqueeze(-1) - locs) / scale
            density = kernels.relative_log_density(standardized.unsqueeze(-1), scale.log())
            logits = kernels.normalize_logits(logits + density)
            residuals.append(outputs[-1].unsqueeze(-1) - self.locs[..., d])
        return torch.stack(outputs, -1)

    # Shape of the density

    @in_widest_precision
    def modes(self) -> Tensor:
        """Local maxima of the density, highest first, shape ``(*batch, M, D)``; NaN where a mixture has fewer than M.

        By climbing from each component's mean; a maximum that none of them leads to, which is rare, is not among them.
        Not differentiable.

        References:
            Carreira-Perpiñán (2000), Mode-finding for mixtures of Gaussian distributions.
        """
        if not self.batch_shape.numel():
            return self.locs[..., :0, :].detach()
        require_unmapped("modes", self.logits, self.locs, *self.covariance.tensors())
        with torch.no_grad():
            flat = self._flat(self.batch_shape)
            precision_tril = flat.covariance.expand((len(flat.locs), self.n_components)).precision_tril().double()
            log_weights = (flat.logits - flat.covariance.half_log_det()).double()
            precisions = precision_tril.mT @ precision_tril
            points, distinct = find_modes(log_weights, flat.locs.double(), precisions)
            points = points.masked_fill(~distinct.unsqueeze(-1), math.nan)
            first = torch.argsort((~distinct).to(torch.int8), dim=-1, stable=True)
            points = points.gather(1, first.unsqueeze(-1).expand_as(points))[:, : int(distinct.sum(-1).max())]
        return points.reshape(*self.batch_shape, *points.shape[1:]).to(self.locs)

    @in_widest_precision
    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        r"""Lower and upper bound of the differential entropy in nats, shape ``(*batch,)`` each.

        .. math:: -\sum_k w_k \log \sum_l w_l \, \mathcal{N}(\mu_k \mid \mu_l, \Sigma_k + \Sigma_l) \le H \le
                  \sum_k w_k \left( -\log w_k + \tfrac12 \log\det(2 \pi e \Sigma_k) \right)

        The upper bound is also kept below the entropy of the Gaussian with the same covariance.

        References:
            Huber et al. (2008), On entropy approximation for Gaussian mixture random vectors.
        """
        weights, constant = self.logits.exp(), 0.5 * self.dim * math.log(2 * math.pi * math.e)
        surprise = -self.logits.masked_fill(weights == 0, 0.0)
        components = (weights * (surprise + self.covariance.half_log_det())).sum(-1)
        gaussian = self.as_gaussian().half_log_det().squeeze(-1)
        lower = torch.zeros_like(components)
        covariance = self.covariance.expand((*self.covariance.batch_shape[:-1], self.n_components))
        axis = len(covariance.batch_shape) - 1
        for k in range(self.n_components):
            summed = plus(covariance, covariance.map(lambda t, n, k=k: t.narrow(axis, k, 1)))
            crossed = self._with(self.locs, summed).log_prob(self.locs[..., k, :])
            lower = lower - weights[..., k] * crossed
        return lower, torch.minimum(components, gaussian) + constant


def _probabilities(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast probabilities with outputs of this shape; a ``ValueError`` if they are none, or do not fit."""
    if is_known(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError("value: expected probabilities in [0, 1]")
    try:
        return value.expand(torch.broadcast_shapes(value.shape, shape))
    except RuntimeError as error:
        raise ValueError(f"value: expected a shape that broadcasts with {shape}, got {tuple(value.shape)}") from error


def _check_mass(mass: float) -> None:
    single = isinstance(mass, Real) or (isinstance(mass, Tensor) and mass.ndim == 0)
    if not single or not 0 < float(mass) < 1:
        raise ValueError(f"mass: expected a probability in (0, 1), got {shown(mass)}")
