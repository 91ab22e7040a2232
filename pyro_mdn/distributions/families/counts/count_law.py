r"""Laws of counts: Poisson and negative binomial, accurate from rates of 1e-6 to 1e6."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mdn.distributions.families.counts.log_probabilities import log_negative_binomial, log_poisson
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

    def bulk(self) -> tuple[Tensor, Tensor]:
        """Centre and width of where most counts other than zero are."""
        return self.mean(), self.variance().sqrt()

    def between(self, first: Tensor, last: Tensor) -> Tensor:
        """Probability of counts from ``first`` to ``last``, from the tail that is smaller."""
        below = self.cdf(last)
        return torch.where(below < 0.5, below - self.cdf(first - 1), self.sf(first - 1) - self.sf(last))

    def log_between(self, first: Tensor, last: Tensor) -> Tensor:
        """Logarithm of :meth:`between`, also where that underflows, and for an infinite ``last``.

        Far from the mean, probabilities fall nearly as those of a geometric law, whose sum is taken.
        """
        ends = last.isinf()
        end = torch.where(ends, first, last)
        mass = torch.where(ends, self.sf(first - 1), self.between(first, end))
        number = end - first + 1
        far = torch.where(ends, False, number == 1) | (mass < 4 * torch.finfo(mass.dtype).tiny)
        heights = self.log_prob(first), self.log_prob(end)
        up = heights[0] >= heights[1]
        highest = torch.where(up, *heights)
        # Rounding must not make probabilities rise.
        least = 4096 * torch.finfo(mass.dtype).eps
        log_ratio = (self.log_prob(torch.where(up, first + 1, end - 1).clamp(min=0)) - highest).clamp(max=-least)
        sums = torch.where(ends, 0.0, torch.log(-torch.expm1(number * log_ratio))) - torch.log(-torch.expm1(log_ratio))
        return torch.where(far, highest + sums, torch.where(far, 1.0, mass).log())

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
        guess: Numbers to begin with, not negative. For those that are NaN, and where no count satisfies the condition,
            the result is NaN or infinite.
    """
    high = guess.ceil()
    while not bool((done := reached(high) | ~(high < torch.inf)).all()):
        high = torch.where(done, high, 2 * high + 1)
    low = torch.full_like(high, -1.0)
    while True:
        middle = ((low + high) / 2).floor().clamp(min=0)
        between = (low < middle) & (middle < high)  # large floating-point numbers are further than 1 apart
        if not bool(between.any()):
            return high
        met = reached(middle)
        low, high = torch.where(between & ~met, middle, low), torch.where(between & met, middle, high)


@dataclass(frozen=True, eq=False)
class PoissonLaw(CountLaw):
    r"""Poisson law, :math:`P(k) = \lambda^k e^{-\lambda} / k!`.

    Args:
        rate: Rate λ, positive.
    """

    rate: Tensor = stored(1)

    def mean(self) -> Tensor:
        return self.rate

    def variance(self) -> Tensor:
        return self.rate

    def log_prob(self, k: Tensor) -> Tensor:
        return log_poisson(k, self.rate)

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
    """

    rate: Tensor = stored(1)
    shape: Tensor = stored(1)

    def mean(self) -> Tensor:
        return self.rate

    def variance(self) -> Tensor:
        return self.rate + self.rate.square() / self.shape

    def log_prob(self, k: Tensor) -> Tensor:
        return log_negative_binomial(k, self.shape, self.rate)

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
