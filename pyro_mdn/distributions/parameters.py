r"""Parameters of mixtures: where they come from, whether they agree, and which components are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from operator import index
from typing import Any, Protocol, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.families.components import Components
from pyro_mdn.support.checks import is_known, shown
from pyro_mdn.tensors.channels import channels_first
from pyro_mdn.tensors.numerics import single_at_least
from pyro_mdn.tensors.tensor_batch import broadcast_shapes

__all__ = [
    "Dims",
    "Origin",
    "as_probabilities",
    "batch_dim",
    "broadcast",
    "check_dims",
    "check_shapes",
    "draw_components",
]

Dims = int | Sequence[int] | Tensor | np.ndarray
"""Indices of outputs: one integer, or several."""

_FEW = 16  # for at most this many components, comparisons are quicker than a search


class Origin(Protocol):
    """Source of a mixture whose parameters are not built yet, such as the raw outputs of a network."""

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        ...

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        ...

    @property
    def has_pathwise_draws(self) -> bool:
        """Whether draws can be differentiated with respect to the parameters."""
        ...

    def parameters(self) -> tuple[Tensor, Components]:
        """Build normalised log-weights and components."""
        ...

    def log_prob(self, y: Tensor, name: str) -> Tensor:
        """Compute the log-density of points, called by a name in errors; an entry that is NaN was not observed."""
        ...

    def is_moderate(self) -> bool:
        """Check whether the parameters are so far from the limits of their precision that they need no validation."""
        ...


def check_shapes(logits: Tensor, components: Components) -> Components:
    """Check that logits and components agree; return the components, set to the number of outputs of their locations.

    Raises:
        ValueError: If shapes, dtypes or devices do not agree.
    """
    locs = components.locs
    if not (logits.is_floating_point() and locs.is_floating_point()):
        raise ValueError(f"logits, locs: expected floating point, got {logits.dtype} and {locs.dtype}")
    stored = [logits, *components.tensors()]
    if len({(t.dtype, t.device) for t in stored}) > 1:
        got = ", ".join(f"{t.dtype} on {t.device}" for t in stored)
        raise ValueError(f"logits, locs, covariance: expected one dtype and device, got {got}")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (*batch, K) with K > 0, got {tuple(logits.shape)}")
    if locs.ndim < 2 or locs.shape[-1] == 0:
        raise ValueError(f"locs: expected shape (*batch, K, D) with D > 0, got {tuple(locs.shape)}")
    if locs.shape[-2] != logits.shape[-1]:
        raise ValueError(f"locs: expected {logits.shape[-1]} components, got {locs.shape[-2]}")
    components.require_components(logits.shape[-1])
    return components.of_dim(locs.shape[-1])


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Broadcast batch shapes; raise a ``ValueError`` if they do not broadcast."""
    try:
        return broadcast_shapes(*shapes)
    except RuntimeError as error:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"batch shapes: expected some that broadcast, got {listed}") from error


def as_probabilities(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast probabilities against a shape; raise a ``ValueError`` if they do not fit it or are outside [0, 1]."""
    if is_known(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError("value: expected probabilities in [0, 1]")
    try:
        return value.expand(torch.broadcast_shapes(value.shape, shape))
    except RuntimeError as error:
        raise ValueError(f"value: expected a shape that broadcasts with {shape}, got {tuple(value.shape)}") from error


def batch_dim(dim: Any, n: int) -> int:
    """Convert one of n batch dimensions to its non-negative index; raise a ``ValueError`` if it does not exist."""
    if not isinstance(dim, Integral) or not -n <= int(dim) < n:
        raise ValueError(f"dim: expected one of {n} batch dimensions, got {shown(dim)}")
    return int(dim) % n


def draw_components(logits: Tensor, sample_shape: torch.Size) -> Tensor:
    """Draw indices of components, ``(*sample, *batch)``, by cumulative weights, more quickly than ``Categorical``."""
    # In bfloat16, cumulative weights would have only 256 levels.
    levels = logits.to(single_at_least(logits.dtype)).exp().cumsum(-1)
    # Scaled uniforms stay below the last level, also after rounding, so that no component of weight zero is drawn.
    batch_shape, n_components = logits.shape[:-1], logits.shape[-1]
    u = torch.rand(sample_shape + batch_shape, dtype=levels.dtype, device=levels.device) * levels[..., -1]
    if n_components <= _FEW:
        passed = channels_first(levels, 1)[:-1].unflatten(0, (-1, *(1,) * len(sample_shape)))
        return (u >= passed).sum(0)
    together = u.reshape(sample_shape.numel(), *batch_shape).movedim(0, -1)
    found = torch.searchsorted(levels.contiguous(), together.contiguous(), right=True)
    return found.movedim(-1, 0).reshape(u.shape)


def check_dims(dims: Dims, dim: int) -> list[int]:
    """Convert indices of outputs to non-negative ones; raise a ``ValueError`` unless they are distinct and in range.

    >>> check_dims(range(2), 3), check_dims(np.array([0, -1]), 3), check_dims(torch.tensor(1), 3)
    ([0, 1], [0, 2], [1])
    """
    listed = _integers(dims)
    wrapped = [d + dim if d < 0 else d for d in listed]
    if not wrapped or len(set(wrapped)) != len(wrapped) or not all(0 <= d < dim for d in wrapped):
        raise ValueError(f"dims: expected distinct indices of {dim} outputs, one at least, got {listed}")
    return wrapped


def _integers(dims: Any) -> list[int]:
    """List one integer or several, of Python, NumPy or torch; raise a ``ValueError`` for anything else."""
    array = isinstance(dims, Tensor | np.ndarray | np.generic)
    values = dims.tolist() if array else dims
    listed = [v.item() if _is_scalar(v) else v for v in (values if isinstance(values, Iterable) else [values])]
    if all(isinstance(v, SupportsIndex) and not isinstance(v, bool | Tensor) for v in listed):
        return [index(v) for v in listed]
    kinds = f"{dims.dtype} and shape {tuple(dims.shape)}" if array else ", ".join({type(v).__name__: 0 for v in listed})
    raise ValueError(f"dims: expected integers, got {type(dims).__name__} of {kinds}")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0
