r"""Copies of rows: they stay together when rows are held out, or a network would be judged by rows it has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.networks.rows import Rows

__all__ = ["copies_of", "random_order"]

_LEAST_DISTINCT = 30  # fewer are the levels of a category rather than copies
_MANY = 1 / 3  # share of the rows that have a copy
_OWN = 0.1  # share of the repeated rows that have a target of their own


def copies_of(rows: Rows) -> Tensor | None:
    """Number the rows so that copies have the same number ``(N,)``; ``None`` if fewer than a third have a copy.

    Rows are copies if their inputs are the same, unless these are few, or one repeated row in ten has a target of its
    own: then they are repeated measurements, or categories. Where copies are few, the other rows that are held out
    still judge, and copies may be part of what is to be predicted.

    >>> x = torch.arange(60.0).repeat(2)[:, None]
    >>> copies_of(Rows(x, x.sin()))[[0, 60]].tolist()
    [0, 0]
    >>> copies_of(Rows(x, torch.arange(120.0)[:, None])) is None
    True
    """
    x = rows.x.flatten(1).cpu()  # not every device finds the rows that differ
    _, number, counts = x.unique(dim=0, return_inverse=True, return_counts=True)
    if len(counts) < _LEAST_DISTINCT or (counts[number] > 1).sum() < _MANY * len(rows):
        return None
    positions = torch.arange(len(rows))
    first = positions.new_full(counts.shape, len(rows)).scatter_reduce(0, number, positions, "amin")[number]
    own = torch.zeros(len(rows), dtype=torch.bool)
    for limit in (rows.y.lower, rows.y.upper) if isinstance(rows.y, Targets) else (rows.y,):
        y = limit.flatten(1).cpu()
        own |= ~y.isclose(y[first], rtol=0, atol=0, equal_nan=True).all(1)
    return number.to(rows.x.device) if own.sum() <= _OWN * (positions != first).sum() else None


def random_order(copies: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Draw an order of rows ``(N,)`` in which copies are side by side, so that a cut leaves them together.

    Args:
        copies: Numbers of the rows, as :func:`copies_of` gives them.
        size: Number N of rows.
        device: Device of the rows.

    >>> random_order(torch.tensor([0, 1, 0, 1]), 4, torch.device("cpu")).sort().values
    tensor([0, 1, 2, 3])
    """
    order = torch.randperm(size, device=device)
    if copies is None:
        return order
    turn = torch.randperm(int(copies.max()) + 1, device=device)
    return order[turn[copies[order]].argsort(stable=True)]
