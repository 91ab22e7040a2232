r"""Distributions of single outputs of different kinds, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mdn.distributions.marginals import Marginals

__all__ = ["MarginalsByColumn"]


class MarginalsByColumn(Marginals):
    """Marginals of which each output has its own kind.

    Args:
        parts: Marginals of one output each.
    """

    def __init__(self, parts: Sequence[Marginals]) -> None:
        self.parts = list(parts)

    def is_differentiated(self) -> bool:
        return any(part.is_differentiated() for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._each("log_prob", value)

    def cdf(self, value: Tensor) -> Tensor:
        return self._each("cdf", value)

    def sf(self, value: Tensor) -> Tensor:
        return self._each("sf", value)

    def levels(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("levels", lower, upper)

    def log_cdf(self, value: Tensor) -> Tensor:
        return self._each("log_cdf", value)

    def log_sf(self, value: Tensor) -> Tensor:
        return self._each("log_sf", value)

    def log_mass(self, centre: Tensor, half: Tensor | float) -> Tensor:
        return self._each("log_mass", centre, torch.as_tensor(half, dtype=centre.dtype, device=centre.device))

    def log_between(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self._each("log_between", lower, upper)

    def quantile(self, q: Tensor) -> Tensor:
        return self._each("quantile", q)

    def upper_quantile(self, q: Tensor) -> Tensor:
        return self._each("upper_quantile", q)

    def central_quantile(self, q: Tensor) -> Tensor:
        return self._each("central_quantile", q)

    def log_density_by_level(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("log_density_by_level", value)

    def shortest(self, outside: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _joined([part.shortest(outside) for part in self.parts])

    def central_interval(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        return self._all("central_interval", tail)

    def shortest_interval(self, outside: float) -> tuple[Tensor, Tensor]:
        return _joined([part.shortest_interval(outside) for part in self.parts])

    def missed(self, value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return self._each("missed", value, lower, upper)

    def expected_below(self, value: Tensor) -> Tensor:
        return self._each("expected_below", value)

    def expected_above(self, value: Tensor) -> Tensor:
        return self._each("expected_above", value)

    def crps(self, value: Tensor) -> Tensor:
        return self._each("crps", value)

    def _each(self, name: str, *arguments: Tensor) -> Tensor:
        return torch.cat(self._columns(name, arguments), -1)

    def _all(self, name: str, *arguments: Tensor) -> Any:
        return _joined(self._columns(name, arguments))

    def _columns(self, name: str, arguments: Sequence[Tensor]) -> list[Any]:
        count = len(self.parts)
        split = [t.expand(*t.shape[:-1], count).split(1, -1) if t.ndim else [t] * count for t in arguments]
        columns = zip(*split, strict=True)
        return [getattr(part, name)(*own) for part, own in zip(self.parts, columns, strict=True)]


def _joined(several: Sequence[Sequence[Tensor]]) -> Any:
    return tuple(torch.cat(columns, -1) for columns in zip(*several, strict=True))
