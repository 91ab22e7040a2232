r"""Laws of counts: Poisson and negative binomial, accurate from rates of 1e-6 to 1e6."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mdn.distributions.families.counts.tail_probabilities import beta_tail, gamma_tail
from pyro_mdn.tensors.tensor_batch import TensorBatch, stored

__all__ = ["CountLaw", "NegativeBinomialLaw", "PoissonLaw", "smallest_count"]


class CountLaw(TensorBatch):
    """Law of each output of each component, a distribution over 0, 1, 2, ...; parameters are ``(*batch, K, D)``.

    Counts are given as floating-point integers that broadcast with the parameters, and may be -1 for distribution
    functions.
    """

    @abstractmethod
    def mean(self) -> Tensor:
        """Means."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Variances."""

    @abstractmethod
    def log_prob(self, k: Tensor) -> Tensor:
        """Log-probability of counts."""

    @abstractmethod
    def cdf(self, k: Tensor) -> Tensor:
        """Probability of k or fewer, with relative accuracy where it is small."""

    @abstractmethod
    def sf(self, k: Tensor) -> Tensor:
        """Probability of more than k, with relative accuracy where it is small."""

    @abstractmethod
    def mean_up_to(self, k: Tensor) -> Tensor:
        r"""Part :math:`E[Y \, 1\{Y \le k\}]` of the mean."""

    @abstractmethod
    def mean_beyond(self, k: Tensor) -> Tensor:
        r"""Part :math:`E[Y \, 1\{Y > k\}]` of the mean."""

    @abstractmethod
    def draw(self) -> Tensor:
        """Independent draws in the shape of the parameters; without gradients."""

    def as_pyro(self) -> dist.TorchDistribution:
        """Law as a distribution of Pyro's own."""
        raise NotImplementedError(f"component_distribution: no Pyro distribution is known for {type(self).__name__}")

    def validate(self) -> None:
        """Raise ``ValueError`` unless every parameter is in its range."""
        if not all(bool(((tensor > 0) & tensor.isfinite()).all()) for tensor in self.tensors()):
            raise ValueError("law: expected positive finite parameters")


def smallest_count(reached: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
    """Find the smallest count that satisfies a condition, which all larger ones then do: by doubling and bisection.

    Args:
        reached: The condition, for counts in the shape of the guess.
        guess: Numbers to begin with, not negative.
    """
    high = guess.ceil()
    while not bool((done := reached(high)).all()):
        high = torch.where(done, high, 2 * high + 1)
    low = torch.full_like(high, -1.0)
    while bool(((high - low) > 1).any()):
        middle = ((low + high) / 2).floor().clamp(min=0)
        met = reached(middle)
        low, high = torch.where(met, low, middle), torch.where(met, middle, high)
        low = torch.where(met & (middle == 0), -1.0, low)
    return high


@dataclass(frozen=True, eq=False)
class PoissonLaw(CountLaw):
    r"""Poisson law, :math:`P(k) = \lambda^k e^{-\lambda} / k!`.

    The density is computed as the deviance from its largest value, in which no large numbers cancel.

    Args:
        rate: Rate λ, positive.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities.
    """

    rate: Tensor = stored(1)

    def mean(self) -> Tensor:
        return self.rate

    def variance(self) -> Tensor:
        return self.rate

    def log_prob(self, k: Tensor) -> Tensor:
        some = k > 0
        n = torch.where(some, k, 1.0)
        log_prob = -_stirling_error(n) - 0.5 * (2 * math.pi * n).log() - _deviance(n, self.rate)
        return torch.where(some, log_prob, -self.rate)

    def cdf(self, k: Tensor) -> Tensor:
        return gamma_tail(k + 1, self.rate, upper=True)

    def sf(self, k: Tensor) -> Tensor:
        return gamma_tail(k + 1, self.rate, upper=False)

    def mean_up_to(self, k: Tensor) -> Tensor:
        return self.rate * self.cdf(k - 1)

    def mean_beyond(self, k: Tensor) -> Tensor:
        return self.rate * self.sf(k - 1)

    def draw(self) -> Tensor:
        return torch.poisson(self.rate.detach())

    def as_pyro(self) -> dist.TorchDistribution:
        return dist.Poisson(self.rate)


@dataclass(frozen=True, eq=False)
class NegativeBinomialLaw(CountLaw):
    r"""Negative binomial law: Poisson, with a rate that has a gamma distribution of shape r.

    .. math:: P(k) = \frac{\Gamma(k + r)}{k! \, \Gamma(r)} \left(\frac{r}{r + \mu}\right)^r
              \left(\frac{\mu}{r + \mu}\right)^k, \qquad \mathrm{Var} = \mu + \mu^2 / r

    Args:
        rate: Mean μ, positive.
        shape: Shape r of the rates, positive; the coefficient of variation of the rates is :math:`r^{-1/2}`.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities.
    """

    rate: Tensor = stored(1)
    shape: Tensor = stored(1)

    def mean(self) -> Tensor:
        return self.rate

    def variance(self) -> Tensor:
        return self.rate + self.rate.square() / self.shape

    def log_prob(self, k: Tensor) -> Tensor:
        r, rate, some = self.shape, self.rate, k > 0
        n = torch.where(some, k, 1.0)
        total = n + r
        # n and r against their expectations among n + r.
        share = total / (r + rate)
        deviances = _deviance(n, share * rate) + _deviance(r, share * r)
        errors = _stirling_error(total) - _stirling_error(n) - _stirling_error(r)
        log_prob = errors - deviances + 0.5 * (r / total / n).log() - 0.5 * math.log(2 * math.pi)
        return torch.where(some, log_prob, -r * torch.log1p(rate / r))

    def cdf(self, k: Tensor) -> Tensor:
        return beta_tail(k + 1, self.shape, self.rate, upper=True)

    def sf(self, k: Tensor) -> Tensor:
        return beta_tail(k + 1, self.shape, self.rate, upper=False)

    def mean_up_to(self, k: Tensor) -> Tensor:
        return self.rate * self._weighted().cdf(k - 1)

    def mean_beyond(self, k: Tensor) -> Tensor:
        return self.rate * self._weighted().sf(k - 1)

    def draw(self) -> Tensor:
        shape, rate = torch.broadcast_tensors(self.shape.detach(), self.rate.detach())
        return torch.poisson(rate * torch.distributions.Gamma(shape, shape, validate_args=False).sample())

    def as_pyro(self) -> dist.TorchDistribution:
        return dist.NegativeBinomial(self.shape, logits=(self.rate / self.shape).log())

    def _weighted(self) -> NegativeBinomialLaw:
        """Law of Y - 1 if counts are weighted by Y, which is negative binomial again."""
        more = self.shape + 1
        return NegativeBinomialLaw(self.rate * more / self.shape, more)


_FEW = 10.0
"""Numbers from which on the asymptotic series of Stirling's error is used."""

_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def _stirling_error(n: Tensor) -> Tensor:
    r"""Compute :math:`\log \Gamma(n + 1) - (n + \tfrac12) \log n + n - \tfrac12 \log 2 \pi` for n > 0."""
    few = n < _FEW
    small, large = torch.where(few, n, 1.0), torch.where(few, _FEW, n)
    exact = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small - 0.5 * math.log(2 * math.pi)
    inverse, square = 1 / large, (1 / large).square()
    total = torch.zeros_like(large)
    for coefficient in reversed(_SERIES):
        total = total * square + coefficient
    return torch.where(few, exact, total * inverse)


def _deviance(n: Tensor, expected: Tensor) -> Tensor:
    r"""Compute :math:`n \log(n / m) + m - n`, of which the terms cancel for n near m."""
    t = (n - expected) / expected
    near = t.abs() < 0.1
    close, far = torch.where(near, t, 0.0), torch.where(near, 2 * expected, n)
    # (1 + t) log(1 + t) - t is the sum of (-t)^j / (j (j - 1)) from j = 2.
    series = torch.zeros_like(close)
    for j in range(18, 1, -1):
        series = series * -close + 1 / (j * (j - 1))
    return torch.where(near, expected * close.square() * series, far * (far.log() - expected.log()) + expected - far)
