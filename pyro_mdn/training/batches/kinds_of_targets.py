r"""Kinds of targets that another target transform or family suits better than the default."""

from __future__ import annotations

import warnings

from torch import Tensor

from pyro_mdn.distributions.units.target_transforms import Standardize
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.tensors.numerics import in_double

__all__ = ["TargetHint", "hints", "warn_of_kinds"]


class TargetHint(UserWarning):
    """Advice on an argument that may suit the targets better than its default; nothing was changed."""


_FEWEST = 50
"""Targets of an output from which on there is advice."""

_COUNTED = 20.0
"""Mean of counts up to which a family of counts is recommended: above, a density is as good."""

_ZEROS = 0.02
"""Share of zeros from which on they are recommended a probability of their own."""

_SKEWED = 1.0


def warn_of_kinds(y: Tensor, head: MixtureHead, stacklevel: int = 2) -> None:
    """Warn once for each kind of targets, rows ``(..., D)``, which the default of a head does not suit."""
    for hint in hints(y, head):
        warnings.warn(hint, TargetHint, stacklevel=stacklevel + 1)


def hints(y: Tensor, head: MixtureHead) -> list[str]:
    """Describe kinds of targets, rows ``(..., D)``, for which there is an argument; none if one was given.

    Outputs of fewer than 50 targets are left alone.
    """
    if not isinstance(head.transform, Standardize):
        return []
    found: dict[str, list[int]] = {}
    for i, column in enumerate(in_double(y.detach()).reshape(-1, y.shape[-1]).unbind(-1)):
        hint = _hint(column[~column.isnan()])
        if hint is not None:
            found.setdefault(hint, []).append(i)
    if y.shape[-1] == 1:
        return [f"y: all targets {hint}" for hint in found]
    return [f"y: all targets of column {', '.join(map(str, columns))} {hint}" for hint, columns in found.items()]


def _hint(values: Tensor) -> str | None:
    compare = "compare held-out scores, and see 'Your kind of target' in the documentation"
    if len(values) < _FEWEST or not bool(values.isfinite().all()) or not bool((values >= 0).all()):
        return None
    mean, variance = values.mean(), values.var()
    if bool((values == values.floor()).all()):
        few = mean < _COUNTED and variance > 0.8 * mean and len(values.unique()) > 2
        return f'are small counts: family="negative_binomial" may suit them better; {compare}' if few else None
    positive = values[values > 0]
    if 1 - len(positive) / len(values) >= _ZEROS and len(positive) >= _FEWEST:
        arguments = 'family=ZeroInflated("normal") and target_transform="log"'
        return f"are positive or zero: {arguments} give zeros their probability; {compare}"
    if len(positive) < len(values):
        return None
    if bool((values < 1).all()):
        wide = values.amin() < 0.25 and values.amax() > 0.75
        return f'lie between 0 and 1: target_transform="logit" keeps predictions there; {compare}' if wide else None
    skew = _skewness(values)
    if skew > _SKEWED and abs(_skewness(values.log())) < 0.5 * skew:
        return f'are positive, and skewed: target_transform="log" keeps predictions positive; {compare}'
    return None


def _skewness(values: Tensor) -> float:
    deviation = values - values.mean()
    scale = deviation.square().mean().sqrt()
    return (deviation / scale).pow(3).mean().item() if bool(scale > 0) else 0.0
