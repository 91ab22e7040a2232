r"""Laws of counts with more zeros than another law has, or fewer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_mdn.distributions.families.counts.count_law import CountLaw, smallest_count
from pyro_mdn.support.checks import require_unmapped
from pyro_mdn.tensors.numerics import as_before, in_double
from pyro_mdn.tensors.tensor_batch import nested, stored

__all__ = ["HurdleLaw", "InflatedLaw", "ZeroLaw"]


@dataclass(frozen=True, eq=False)
class ZeroLaw(CountLaw):
    """Base of laws that put a probability on zero beside another law.

    Args:
        base: The other law.
        logit: Logit of the probability, in the shape of the parameters of the law.
    """

    base: CountLaw = nested()
    logit: Tensor = stored(1)

    @abstractmethod
    def _log_rest(self) -> Tensor:
        """Logarithm of the probability of the positive counts, over that under the other law."""

    def _rest(self) -> Tensor:
        return self._log_rest().exp()

    def mean(self) -> Tensor:
        return self._rest() * self.base.mean()

    def variance(self) -> Tensor:
        mean = self.base.mean()
        square = self.base.variance() + mean.square()
        return self._rest() * square - (self._rest() * mean).square()

    def bulk(self) -> tuple[Tensor, Tensor]:
        return self.base.bulk()

    def cdf(self, k: Tensor) -> Tensor:
        zero = torch.zeros_like(k)
        positive = self._rest() * self.base.between(zero + 1, torch.maximum(k, zero))
        return torch.where(k < 0, 0.0, self.log_prob(zero).exp() + positive)

    def sf(self, k: Tensor) -> Tensor:
        return torch.where(k < 0, 1.0, self._rest() * self.base.sf(k))

    def log_between(self, first: Tensor, last: Tensor) -> Tensor:
        some, zero = last > 0, torch.zeros_like(first)
        positive = self.base.log_between(first.clamp(min=1), torch.where(some, last, 1.0))
        positive = (self._log_rest() + positive).masked_fill(~some, -torch.inf)
        return torch.where(first > 0, positive, torch.logaddexp(positive, self.log_prob(zero)))

    def mean_up_to(self, k: Tensor) -> Tensor:
        return self._rest() * self.base.mean_up_to(k)

    def mean_beyond(self, k: Tensor) -> Tensor:
        return self._rest() * self.base.mean_beyond(k)

    def validate(self) -> None:
        self.base.validate()
        if not bool(self.logit.isfinite().all()):
            raise ValueError("law: expected finite logits of the probability of zero")


@dataclass(frozen=True, eq=False)
class InflatedLaw(ZeroLaw):
    """Law that is zero with a probability, and follows another law, which may be zero too, otherwise."""

    def _log_rest(self) -> Tensor:
        return logsigmoid(-self.logit)

    def log_prob(self, k: Tensor) -> Tensor:
        counted = self._log_rest() + self.base.log_prob(k)
        return torch.where(k > 0, counted, torch.logaddexp(logsigmoid(self.logit), counted))

    def draw(self) -> Tensor:
        draws = self.base.draw()
        return torch.where(torch.rand_like(draws) < self.logit.detach().sigmoid(), 0.0, draws)

    def as_pyro(self) -> dist.TorchDistribution:
        return dist.ZeroInflatedDistribution(self.base.as_pyro(), gate_logits=self.logit)


@dataclass(frozen=True, eq=False)
class HurdleLaw(ZeroLaw):
    """Law that is zero with a probability, and otherwise follows another law given that this is not zero."""

    def _log_rest(self) -> Tensor:
        return logsigmoid(-self.logit) - self._log_positive()

    def log_prob(self, k: Tensor) -> Tensor:
        some = k > 0
        counted = self._log_rest() + self.base.log_prob(torch.where(some, k, 1.0))
        return torch.where(some, counted, logsigmoid(self.logit))

    @torch.no_grad()
    def draw(self) -> Tensor:
        require_unmapped("sample", *self.tensors())
        shape = torch.broadcast_shapes(self.base.mean().shape, self.logit.shape)
        base, positive = self.base.map(lambda t, n: in_double(t)), in_double(self._log_positive()).exp()
        above = positive * torch.rand(shape, dtype=positive.dtype, device=positive.device)
        guess = (base.mean() + 6 * base.variance().sqrt() + 4).expand(shape)
        draws = smallest_count(lambda k: base.sf(k) <= above, guess).clamp(min=1)
        draws = as_before(draws, self.logit)
        return torch.where(torch.rand_like(draws) < self.logit.sigmoid(), 0.0, draws)

    def _log_positive(self) -> Tensor:
        """Logarithm of the probability that the other law gives to positive counts."""
        log_zero = self.base.log_prob(torch.zeros_like(self.base.mean()))
        return (-torch.expm1(log_zero)).clamp(min=torch.finfo(log_zero.dtype).tiny).log()
