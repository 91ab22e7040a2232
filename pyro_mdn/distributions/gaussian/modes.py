r"""Modes of Gaussian mixtures: climbing from every mean by Newton's method, or by a fixed-point iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.tensors.numerics import exp

__all__ = ["find_modes"]

_ELEMENTS = 50_000
"""Largest number of pairs of climber and component in one pass, to fit in a cache; a single climber may have more."""

_FEW = 0.2
"""Once at most this share of climbers moves, each gets a copy of its mixture, and all of a group climb together."""

_GROUP = 2**22
"""Largest total size of the copies of mixtures."""

_NEAR = 0.1
"""Newton steps shorter than this many standard deviations lead to the same mode if they end at the same point."""

_FARTHEST = 0.5
"""Largest length of a step in standard deviations, so that no step crosses a trough."""

_CLOSE = 1e-7
"""After a Newton step shorter than this many standard deviations, only rounding error is left."""


class _Rows(NamedTuple):
    """Mixtures in the layout of matrix products, with the outputs as first dimension."""

    log_weights: Tensor  # (N, 1, K), with the normalising constants
    locs: Tensor  # (D, N, 1, K)
    precisions: Tensor  # (D, N, D, K)
    pulls: Tensor  # (D, N, 1, K): precision times mean
    distance: Tensor  # (N, D): where the origin of these coordinates lies in those of the user

    @classmethod
    def of(cls, log_weights: Tensor, locs: Tensor, precisions: Tensor) -> _Rows:
        origin = locs.mean(1)
        locs = locs - origin.unsqueeze(1)  # differences of large numbers would cancel
        pulls = (precisions @ locs.unsqueeze(-1)).squeeze(-1)
        planes = precisions.permute(2, 0, 3, 1).contiguous()
        rows = log_weights.unsqueeze(1), _planes(locs), planes, _planes(pulls), origin
        return cls(*rows)

    def pick(self, rows: Tensor | slice) -> _Rows:
        weights, locs, precisions, pulls, origin = self
        return _Rows(weights[rows], locs[:, rows], precisions[:, rows], pulls[:, rows], origin[rows])


class _Climbers(NamedTuple):
    """Climbers ``(N, S, ...)``; those that are moving are about to go from ``point`` to ``point + step``."""

    cell: Tensor  # index of the climber's place in ``_Ends``
    point: Tensor
    height: Tensor
    step: Tensor
    moving: Tensor


class _Ends(NamedTuple):
    """Points at which the climbers of all starts came to rest, ``(N * K, ...)``; ``top`` says which are maxima.

    The tensors are written in place.
    """

    point: Tensor
    height: Tensor
    precision: Tensor
    top: Tensor


def find_modes(
    log_weights: Tensor, locs: Tensor, precisions: Tensor, steps: int = 1000, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    r"""Climb from every mean, and find out which ends are distinct modes.

    A step is at most half a standard deviation long, and is halved if it descends. Where the log-density is concave, a
    climber takes Newton steps. Elsewhere it takes steps towards the next point of the fixed-point iteration, which
    always climb:

    .. math:: y \leftarrow \Big(\sum_k r_k(y) \Sigma_k^{-1}\Big)^{-1} \sum_k r_k(y) \Sigma_k^{-1} \mu_k

    Args:
        log_weights: Log-weights with the components' normalising constants, shape ``(N, K)``.
        locs: Means, shape ``(N, K, D)``.
        precisions: Inverse covariances, shape ``(N, K, D, D)``.
        steps: Largest number of steps.
        tolerance: Ends closer than this many standard deviations count as one; the standard deviation is that of the
            mean precision of the components there.

    Returns:
        The ends ``(N, K, D)``, highest density first, and whether each is a maximum and distinct from those
        before it, ``(N, K)``. Ends that are not maxima may be anywhere.

    References:
        Carreira-Perpiñán (2000), Mode-finding for mixtures of Gaussian distributions.
    """
    k, dim = locs.shape[1:]
    size = max(1, int(_GROUP / (_FEW * k * k * dim * dim)))
    parts = zip(*(t.split(size) for t in (log_weights, locs, precisions)), strict=True)
    found = [_climb_all(w, m, p, steps, tolerance) for w, m, p in parts]
    points, distinct = (torch.cat(part) for part in zip(*found, strict=True))
    return points, distinct


def _climb_all(
    log_weights: Tensor, locs: Tensor, precisions: Tensor, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    mixtures = _Rows.of(log_weights, locs, precisions)
    n, k = locs.shape[:2]
    ends = _Ends(
        torch.zeros_like(locs).flatten(0, 1),
        locs.new_full((n * k,), -math.inf),
        torch.zeros_like(precisions).flatten(0, 1),
        torch.zeros(n * k, dtype=torch.bool, device=locs.device),
    )
    starts = _Climbers(
        torch.arange(n * k, device=locs.device).reshape(n, k),
        locs - mixtures.distance.unsqueeze(1),
        ends.height.reshape(n, k),
        torch.zeros_like(locs),
        ~ends.top.reshape(n, k),
    )
    late = []
    rows, columns = max(1, _ELEMENTS // (k * k)), max(1, _ELEMENTS // k)
    for row in range(0, n, rows):
        part = mixtures.pick(slice(row, row + rows))
        for column in range(0, k, columns):
            among = slice(row, row + rows), slice(column, column + columns)
            late.append(_climb_together(part, _Climbers(*(t[among] for t in starts)), ends, steps, tolerance))
    _climb_alone(mixtures, _Climbers(*(torch.cat(t) for t in zip(*late, strict=True))), ends, steps, k)
    return _distinct(_Ends(*(t.reshape(n, k, *t.shape[1:]) for t in ends)), mixtures.distance, tolerance)


def _climb_together(mixtures: _Rows, at: _Climbers, ends: _Ends, steps: int, tolerance: float) -> _Climbers:
    """Climb with ``(N, S)`` climbers at a time until few are moving; return these, ``(P, 1)``."""
    for count in range(steps):
        at, precision, arriving = _advance(mixtures, at, ends)
        if count:
            at = _stop_followers(at, precision, arriving, tolerance)
        moving = at.moving.sum(-1)
        if int(moving.sum()) <= _FEW * len(moving) * mixtures.log_weights.shape[-1]:
            break
        if int(moving.amax()) < 0.7 * at.moving.shape[1]:
            columns = torch.argsort((~at.moving).to(torch.int8), dim=-1, stable=True)[:, : int(moving.amax())]
            rows = torch.arange(len(columns), device=columns.device).unsqueeze(-1)
            at = _Climbers(*(t[rows, columns] for t in at))
    return _Climbers(*(t[at.moving].unsqueeze(1) for t in at))


def _climb_alone(mixtures: _Rows, at: _Climbers, ends: _Ends, steps: int, n_components: int) -> None:
    """Climb with one climber in each row, ``(P, 1)``, which has a copy of its mixture."""
    copies = mixtures.pick(at.cell.squeeze(1) // n_components)
    for _ in range(steps):
        left = at.moving.squeeze(1).nonzero().squeeze(-1)
        if not len(left):
            return
        if len(left) < 0.8 * len(at.moving):
            at, copies = _Climbers(*(t[left] for t in at)), copies.pick(left)
        at, _, _ = _advance(copies, at, ends)


def _advance(mixtures: _Rows, at: _Climbers, ends: _Ends) -> tuple[_Climbers, Tensor, Tensor]:
    """Take one step, unless it descends, and compute the next one.

    A climber whose next step is too short to matter takes that step and has arrived.

    Returns:
        The climbers; the mean precisions of the components there; and which climbers will arrive soon.
    """
    point = at.point + at.step
    height, slope, precision, curvature = _surroundings(mixtures, point)
    step, concave = _next_step(slope, precision, curvature)
    length = _length(step, precision)
    least = 100 * torch.finfo(step.dtype).eps * (1 + _length(point + mixtures.distance.unsqueeze(1), precision))
    rests = ~(length > torch.where(concave, least.clamp(min=_CLOSE), least))
    descends = at.moving & (height < at.height - 1e-12 * (1 + at.height.abs())) & ~rests
    done = (at.moving & rests).nonzero(as_tuple=True)
    for end, now in zip(ends, (point + step, height, precision, concave), strict=True):
        end[at.cell[done]] = now[done]
    step = step / (length / _FARTHEST).clamp(min=1.0).unsqueeze(-1)
    if bool(descends.any()):
        point = torch.where(descends.unsqueeze(-1), at.point, point)
        height = torch.where(descends, at.height, height)
        step = torch.where(descends.unsqueeze(-1), at.step / 2, step)
    arriving = at.moving & concave & (length < _NEAR) & ~descends & ~rests
    return _Climbers(at.cell, point, height, step, at.moving & ~rests), precision, arriving


def _next_step(slope: Tensor, precision: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Newton's step where the log-density is concave, else the fixed-point step; also where it is concave."""
    if slope.shape[-1] == 1:
        concave = curvature > 0
        return slope / torch.where(concave, curvature, precision).squeeze(-1), concave.squeeze((-2, -1))
    root, info = torch.linalg.cholesky_ex(curvature)
    elsewhere = info.nonzero(as_tuple=True)
    if len(elsewhere[0]):
        root[elsewhere], failed = torch.linalg.cholesky_ex(precision[elsewhere])
        root[elsewhere] = root[elsewhere].masked_fill((failed != 0)[:, None, None], math.nan)
    return torch.cholesky_solve(slope.unsqueeze(-1), root).squeeze(-1), info == 0


def _stop_followers(at: _Climbers, precision: Tensor, arriving: Tensor, tolerance: float) -> _Climbers:
    """Stop climbers that are about to reach the same point as a climber before them in their row."""
    target, unit = at.point + at.step, precision.diagonal(dim1=-2, dim2=-1) * precision.shape[-1]
    apart = precision.new_zeros((*arriving.shape, arriving.shape[1]))
    for d in range(target.shape[-1]):  # an upper bound of the squared length
        plane = target[..., d]
        apart.addcmul_((plane.unsqueeze(2) - plane.unsqueeze(1)).square_(), unit[..., d, None])
    earlier = torch.ones_like(apart[0], dtype=torch.bool).tril(-1)
    follows = arriving & ((apart < tolerance**2) & earlier & arriving.unsqueeze(1)).any(-1)
    return at._replace(moving=at.moving & ~follows)


def _distinct(ends: _Ends, distance: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Sort the ends by density, and mark those that are maxima and distinct from all before them."""
    order = ends.height.masked_fill(~ends.top, -math.inf).argsort(-1, descending=True)
    first, rows = order[:, : int(ends.top.sum(-1).amax())], torch.arange(len(order), device=order.device).unsqueeze(-1)
    point, _, precision, top = (t[rows, first] for t in ends)
    eps = torch.finfo(point.dtype).eps
    reach = tolerance + 1e3 * eps * _length(point + distance.unsqueeze(1), precision)
    distinct = top.clone()
    for i in range(1, top.shape[1]):
        apart = _length(point[:, i, None] - point[:, :i], precision[:, i, None])
        distinct[:, i] &= ~((apart < reach[:, i, None]) & top[:, :i]).any(-1)
    points, found = ends.point[rows, order] + distance.unsqueeze(1), torch.zeros_like(ends.top)
    found[:, : distinct.shape[1]] = distinct
    return points, found


def _surroundings(mixtures: _Rows, point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute log-density at points ``(N, S, D)``, its gradient, mean precision of components, and negative Hessian."""
    log_weights, locs, precisions, pulls, _ = mixtures
    dim = point.shape[-1]
    pull = pulls - (precisions * point if dim == 1 else point @ precisions)
    joint = log_weights.expand(pull.shape[1:]).clone()
    for d in range(dim):
        joint.addcmul_(locs[d] - point[..., d, None], pull[d], value=-0.5)
    top = joint.amax(-1, keepdim=True)
    share = exp(joint.sub_(top))
    total = share.sum(-1, keepdim=True)
    share /= total
    weighted = pull * share
    slope = weighted.sum(-1).movedim(0, -1)
    precision = (precisions @ share.mT).permute(1, 3, 0, 2)
    spread = point.new_empty((dim, dim, *point.shape[:-1]))
    for i in range(dim):
        spread[i, : i + 1] = spread[: i + 1, i] = (weighted[i] * pull[: i + 1]).sum(-1)
    curvature = precision - spread.permute(2, 3, 0, 1) + slope.unsqueeze(-1) * slope.unsqueeze(-2)
    return (top + total.log()).squeeze(-1), slope, precision, curvature


def _planes(vectors: Tensor) -> Tensor:
    return vectors.movedim(-1, 0).unsqueeze(2).contiguous()


def _length(vector: Tensor, precision: Tensor) -> Tensor:
    """Compute the length of vectors in standard deviations."""
    if vector.shape[-1] == 1:
        return (precision.squeeze(-1).sqrt() * vector.abs()).squeeze(-1)
    return ((precision * vector.unsqueeze(-2)).sum(-1) * vector).sum(-1).clamp(min=0).sqrt()
