r"""Kinds of targets that another target transform or family suits better than the default, and gross outliers."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal, NoiseModel
from pyro_mdn.distributions.families.family import is_uncorrelated
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.tensors.numerics import in_double, winsorized

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


class _Kind(NamedTuple):
    """A kind of targets: what they are, the arguments that suit them, and why.

    Attributes:
        looks: What is seen of the targets.
        family: The argument ``family`` as code, for outputs of this kind; ``None`` for the default.
        transform: Name of a target transform of one output; ``None`` for the default.
        gain: What the arguments do.
    """

    looks: str
    family: str | None
    transform: str | None
    gain: str


_FEW_COUNTS = _Kind("are small counts", '"negative_binomial"', None, "may suit them better")
_WITH_ZEROS = _Kind("are positive or zero", "ZeroInflated({normal})", "log", "gives zeros their probability")
_SHARES = _Kind("lie between 0 and 1", None, "logit", 'keeps predictions there, as does family="beta"')
_SHARES_WITH_ZEROS = _WITH_ZEROS._replace(looks="are shares or zero", transform="logit")
_POSITIVE = _Kind("are positive, and skewed", None, "log", "keeps predictions positive")


def hints(y: Tensor, head: MixtureHead) -> list[str]:
    """Describe kinds of targets, rows ``(..., D)``, for which there is an argument; none if one was given.

    Outputs of fewer than 50 targets are left alone.
    """
    if not getattr(head, "has_defaults", True):  # pickled heads of before have none
        return []
    columns = [column[~column.isnan()] for column in in_double(y.detach()).reshape(-1, y.shape[-1]).unbind(-1)]
    kinds = [_kind(column) for column in columns]
    of_kinds = [_hint(kind, kinds, head.noise) for kind in dict.fromkeys(kinds) if kind is not None]
    others = [(i, column) for i, (column, kind) in enumerate(zip(columns, kinds, strict=True)) if kind is None]
    return of_kinds + [hint for i, column in others for hint in _of_outliers(column, i if len(columns) > 1 else None)]


def _of_outliers(values: Tensor, number: int | None) -> list[str]:
    """Advise on the gross outliers among the values of an output, or of the output of a number, if there are some."""
    if len(values) < _FEWEST:
        return []
    far = values[values != winsorized(values)]
    if len(far) == 0:
        return []
    where = "" if number is None else f" of column {number}"
    text = f"y: {len(far)} of {len(values)} targets{where} lie far from all others, such as {far[0]:.6g}"
    return [f'{text}: correct them if they are faults, or else try family="student_t" and compare held-out scores']


def _hint(kind: _Kind, kinds: list[_Kind | None], noise: NoiseModel) -> str:
    """Advise on one of the kinds of the outputs, by arguments that suit all of them."""
    columns = ", ".join(str(i) for i, other in enumerate(kinds) if other == kind)
    alike = all(other == kind for other in kinds)
    arguments, beside = _for_one_kind(kind, noise) if alike else _for_several(kinds, noise)
    where = f" of column {columns}" if len(kinds) > 1 else ""
    return f"y: all targets{where} {kind.looks}: {' and '.join(arguments)}{beside} {kind.gain}; {_COMPARE}"


def _for_one_kind(kind: _Kind, noise: NoiseModel) -> tuple[list[str], str]:
    """Return arguments as code, and what to do with the noise model beside them."""
    arguments, beside = [], ""
    if kind.family is not None:
        own = f"Normal({noise})" if noise != Diagonal() and is_uncorrelated(noise) else '"normal"'
        arguments.append(f"family={kind.family.format(normal=own)}")
        beside = ", without noise= that correlates outputs," if not is_uncorrelated(noise) else ""
    if kind.transform is not None:
        arguments.append(f'target_transform="{kind.transform}"')
    return arguments, beside


def _for_several(kinds: list[_Kind | None], noise: NoiseModel) -> tuple[list[str], str]:
    """Return the same for outputs of different kinds: a family for each if one needs it, and a transform for each."""
    families = ['"normal"' if k is None or k.family is None else k.family.format(normal='"normal"') for k in kinds]
    transforms = [f'"{"standardize" if k is None or k.transform is None else k.transform}"' for k in kinds]
    several = any(k is not None and k.family is not None for k in kinds)
    arguments = [f"family=[{', '.join(families)}]"] if several else []
    if any(k is not None and k.transform is not None for k in kinds):
        arguments.append(f"target_transform=[{', '.join(transforms)}]")
    return arguments, ", in place of noise=," if several and noise != Diagonal() else ""


_COMPARE = "compare held-out scores, and see 'Your kind of target' in the documentation"


def _kind(values: Tensor) -> _Kind | None:
    if len(values) < _FEWEST or not bool(values.isfinite().all()) or not bool((values >= 0).all()):
        return None
    mean, variance = values.mean(), values.var()
    if bool((values == values.floor()).all()):
        few = mean < _COUNTED and variance > 0.8 * mean and len(values.unique()) > 2
        return _FEW_COUNTS if few else None
    positive = values[values > 0]
    shares = bool((positive < 1).all()) and bool(positive.amin() < 0.25) and bool(positive.amax() > 0.75)
    if len(positive) < len(values):
        enough = 1 - len(positive) / len(values) >= _ZEROS and len(positive) >= _FEWEST
        if not enough or bool(positive.amax() == 1):  # 1 may be the upper end of shares, which no transform takes
            return None
        return _SHARES_WITH_ZEROS if shares else _WITH_ZEROS
    if bool((values < 1).all()):
        return _SHARES if shares else None
    skew = _skewness(values)
    return _POSITIVE if skew > _SKEWED and abs(_skewness(values.log())) < 0.5 * skew else None


def _skewness(values: Tensor) -> float:
    deviation = values - values.mean()
    scale = deviation.square().mean().sqrt()
    return (deviation / scale).pow(3).mean().item() if bool(scale > 0) else 0.0
