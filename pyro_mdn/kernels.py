r"""Pure functions on raw tensors: the arithmetic under every density.

Public tensors are batch-first, ``(*batch, K, D)``. Their memory is channel-first, ``(D, K, *batch)``, so that
elementwise work streams over a contiguous batch and sums over components and outputs are outer reductions.
:func:`channels_first` and :func:`channels_last` go between the two views without copying.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import erfc, log_ndtr, ndtri

__all__ = [
    "cat_channels",
    "channels_first",
    "channels_last",
    "follow_root",
    "location_and_scale",
    "low_rank_capacitance",
    "low_rank_project",
    "minimize_bracketed",
    "mixture_cdf",
    "mixture_log_density",
    "mixture_quantile",
    "normal_cdf",
    "normal_log_density",
    "normalize_logits",
    "sum_outputs",
    "tril_matvec",
    "tril_solve",
    "unpack_tril",
]


def channels_first(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(*batch, A, B)`` as ``(B, A, *batch)``, for ``event_dim`` trailing dimensions."""
    batch = tensor.ndim - event_dim
    return tensor.permute(*range(tensor.ndim - 1, batch - 1, -1), *range(batch))


def channels_last(tensor: Tensor, event_dim: int) -> Tensor:
    """View ``(B, A, *batch)`` as ``(*batch, A, B)``: the inverse of :func:`channels_first`."""
    return tensor.permute(*range(event_dim, tensor.ndim), *range(event_dim - 1, -1, -1))


def cat_channels(*tensors: Tensor) -> Tensor:
    """Concatenate ``(*batch, K, C_i)`` along the last dimension, in channel-first memory."""
    return channels_last(torch.cat([channels_first(t, 2) for t in tensors]), 2)


def sum_outputs(tensor: Tensor) -> Tensor:
    """Sum ``(*batch, K, D)`` over D; the result ``(*batch, K)`` is channel-first in memory."""
    return channels_last(channels_first(tensor, 2).sum(0), 1)


def location_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in float64, of the columns of ``(N, ...)``; constant ones have a scale of 1.

    NaN are left out.
    """
    location = rows.double().nanmean(0)
    scale = (rows.double() - location).square().nanmean(0).sqrt()
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.nan_to_num().abs().amax(0)
    return location, torch.where(scale > rounding, scale, 1.0)


def normalize_logits(logits: Tensor) -> Tensor:
    """Log-weights that sum to one: unlike ``log_softmax`` this keeps the strides."""
    return logits - logits.logsumexp(-1, keepdim=True)


def normal_log_density(whitened: Tensor, half_log_det: Tensor) -> Tensor:
    """Gaussian log-density ``(*batch, K)`` from a whitened residual ``(*batch, K, D)`` and ½ log det Σ."""
    constant = 0.5 * math.log(2 * math.pi) * whitened.shape[-1]
    return -0.5 * sum_outputs(whitened.square()) - half_log_det - constant


def tril_matvec(packed: Tensor, vector: Tensor) -> Tensor:
    """Product of a packed lower triangle ``(*batch, K, D(D+1)/2)`` and a vector ``(*batch, K, D)``.

    Packed order: the diagonal, then the strictly lower triangle row by row.
    """
    channels = channels_first(vector, 2)
    products = [
        diagonal * channels[i] + (row * channels[:i]).sum(0)
        for i, (diagonal, row) in enumerate(_tril_rows(packed, vector))
    ]
    return channels_last(torch.stack(products), 2)


def tril_solve(packed: Tensor, vector: Tensor) -> Tensor:
    """Solve a packed lower triangle by forward substitution: the inverse of :func:`tril_matvec`."""
    solution: list[Tensor] = []
    for (diagonal, row), rest in zip(_tril_rows(packed, vector), channels_first(vector, 2), strict=True):
        for coefficient, known in zip(row, solution, strict=True):
            rest = rest - coefficient * known
        solution.append(rest / diagonal)
    return channels_last(torch.stack(solution), 2)


def _tril_rows(packed: Tensor, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of a packed triangle as (diagonal entry, entries before it), aligned with the vector's batch."""
    dim = vector.shape[-1]
    channels = channels_first(packed[(None,) * (vector.ndim - packed.ndim)], 2)
    lower = channels[dim:]
    return [(channels[i], lower[i * (i - 1) // 2 : i * (i + 1) // 2]) for i in range(dim)]


def unpack_tril(packed: Tensor, dim: int) -> Tensor:
    """Dense lower-triangular ``(*batch, dim, dim)`` from packed ``(*batch, dim(dim+1)/2)``."""
    zero = packed.shape[-1]
    position = torch.full((dim, dim), zero, device=packed.device)
    position[range(dim), range(dim)] = torch.arange(dim, device=packed.device)
    rows, columns = torch.tril_indices(dim, dim, -1, device=packed.device)
    position[rows, columns] = torch.arange(dim, zero, device=packed.device)
    padded = torch.cat([packed, torch.zeros_like(packed[..., :1])], -1)
    return padded[..., position.flatten()].unflatten(-1, (dim, dim))


def low_rank_capacitance(factor: Tensor) -> Tensor:
    """Cholesky factor of ``I + BᵀB``, shape ``(*batch, R, R)``, for a factor B ``(*batch, D, R)``.

    By modified Gram-Schmidt on the columns of B stacked on I, which never forms the squares: row i of I stands in
    column i alone, so that the diagonal is at least 1 in floating point too, however dependent the columns.
    """
    rank = factor.shape[-1]
    identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
    stacked = torch.cat([factor, identity.expand(*factor.shape[:-2], rank, rank)], -2)
    directions: list[Tensor] = []
    rows: list[Tensor] = []
    for i, column in enumerate(stacked.unbind(-1)):
        row = []
        for direction in directions:
            row.append((direction * column).sum(-1))
            column = column - row[-1].unsqueeze(-1) * direction
        row.append(column.norm(dim=-1))
        directions.append(column / row[-1].unsqueeze(-1))
        rows.append(torch.nn.functional.pad(torch.stack(row, -1), (0, rank - 1 - i)))
    return torch.stack(rows, -2)


def low_rank_project(factor: Tensor, vector: Tensor) -> Tensor:
    """``Bᵀv``, shape ``(*batch, R)``, for B ``(*batch, D, R)`` and v ``(*batch, D)``."""
    return torch.stack([(column * vector).sum(-1) for column in factor.unbind(-1)], -1)


# Univariate mixtures: parameters (*batch, K), values (*batch)


def normal_cdf(value: Tensor) -> Tensor:
    """Standard normal cdf, accurate in the lower tail, where ``torch.special.ndtr`` rounds to multiples of eps."""
    return 0.5 * erfc(-math.sqrt(0.5) * value)


def mixture_log_density(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a univariate mixture."""
    standardized = (value.unsqueeze(-1) - locs) / scale
    constant = 0.5 * math.log(2 * math.pi)
    return (logits - 0.5 * standardized.square() - scale.log() - constant).logsumexp(-1)


def mixture_cdf(value: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Cumulative distribution of a univariate mixture; relative accuracy in the lower tail."""
    return (logits.exp() * normal_cdf((value.unsqueeze(-1) - locs) / scale)).sum(-1).clamp(max=1)


def mixture_quantile(q: Tensor, logits: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Quantile of a univariate mixture, with gradients by the implicit function theorem.

    Quantiles above a half are those of the mirrored mixture at 1 - q, so that both tails are lower tails.
    """
    sign = torch.where(q > 0.5, -1.0, 1.0).to(q)
    tail = torch.where(q > 0.5, 1 - q, q)
    mirrored = sign.unsqueeze(-1) * locs
    with torch.no_grad():
        root = _solve_lower_tail(tail, logits, mirrored, scale)

    def equation(point: Tensor) -> tuple[Tensor, Tensor]:
        slope = mixture_log_density(point, logits, mirrored, scale).exp()
        return mixture_cdf(point, logits, mirrored, scale) - tail, slope

    # Where the quantile is infinite, any finite point keeps NaN out of the gradients.
    finite = torch.where(tail > 0, root, mirrored[..., 0].detach())
    return sign * torch.where(tail > 0, follow_root(finite, equation), root)


def follow_root(root: Tensor, equation: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Give a known root the derivatives of the implicit function, up to the second.

    ``equation(point)`` returns residual and slope. Two Newton steps from the root move it by nothing, and their
    derivatives are the root's.
    """
    point = root
    for _ in range(2):
        residual, slope = equation(point)
        step = (residual - residual.detach()) / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        point = point - step
    return point


def _solve_lower_tail(tail: Tensor, logits: Tensor, locs: Tensor, scale: Tensor, max_steps: int = 200) -> Tensor:
    """Solve cdf(point) = tail, for tails up to a half: Newton on the logarithm, bisection where that does not help.

    The root lies between the smallest and the largest quantile of the components, and every step keeps it bracketed.
    """
    eps = torch.finfo(locs.dtype).eps
    ends = locs + scale * ndtri(tail).unsqueeze(-1)
    absent = logits == -math.inf
    low = ends.masked_fill(absent, math.inf).amin(-1)
    high = ends.masked_fill(absent, -math.inf).amax(-1)
    point, last = low + (high - low) / 2, high - low
    log_tail = tail.log()
    for _ in range(max_steps):
        log_cdf = (logits + log_ndtr((point.unsqueeze(-1) - locs) / scale)).logsumexp(-1)
        excess = log_cdf - log_tail
        low, high = torch.where(excess < 0, point, low), torch.where(excess >= 0, point, high)
        found = (excess.abs() <= 2 * eps) | ~(high - low > eps * torch.maximum(low.abs(), high.abs()))
        if not torch.compiler.is_compiling() and bool(found.all()):
            break
        newton = point - excess * (log_cdf - mixture_log_density(point, logits, locs, scale)).exp()
        helps = (newton > low) & (newton < high) & ((newton - point).abs() < last / 2)
        proposal = torch.where(found, point, torch.where(helps, newton, low + (high - low) / 2))
        point, last = proposal, (proposal - point).abs()
    return torch.where(tail > 0, point, -math.inf)


def minimize_bracketed(
    function: Callable[[Tensor], Tensor], like: Tensor, end: float, grid: int = 64, steps: int = 40
) -> Tensor:
    """Minimise elementwise over (0, end): the best of a grid, then golden sections around it (Kiefer, 1953)."""
    with torch.no_grad():
        points = [torch.full_like(like, end * (i + 0.5) / grid) for i in range(grid)]
        values = torch.stack([function(p) for p in points])
        best = torch.stack(points).take_along_dim(values.argmin(0, keepdim=True), 0).squeeze(0)
        low, high = (best - end / grid).clamp(min=0), (best + end / grid).clamp(max=end)
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(steps):
            inner, outer = high - ratio * (high - low), low + ratio * (high - low)
            closer = function(inner) < function(outer)
            low, high = torch.where(closer, low, inner), torch.where(closer, outer, high)
        return (low + high) / 2
