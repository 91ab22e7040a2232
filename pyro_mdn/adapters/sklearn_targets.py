r"""Inputs, targets and weights as scikit-learn hands them over, and censored targets as scikit-survival does."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.predictor import Predictor
from pyro_mdn.support.arrays import as_array, as_tensor, is_frame
from pyro_mdn.support.checks import describe, unmasked

try:
    from sklearn.utils import check_array, check_consistent_length
    from sklearn.utils.validation import validate_data
except ImportError as error:
    raise ImportError("pyro_mdn.sklearn needs scikit-learn: in a checkout pip install '.[sklearn]'") from error

__all__ = ["as_targets", "as_weight", "centres", "interval_targets", "plain", "shifted", "uncentered", "validated"]

P = TypeVar("P", bound=Predictor)

# Arguments for scikit-learn's checks of targets: NaN is allowed, since it means "not observed".
_TARGETS: dict[str, Any] = {"dtype": np.float64, "ensure_2d": False, "ensure_all_finite": "allow-nan"}


def plain(values: Any, name: str) -> Any:
    """Return values with NaN in place of masked entries, for the checks of scikit-learn.

    Raises:
        ValueError: If there are dates, which scikit-learn would read as numbers of nanoseconds, or if a column of a
            data frame does not contain numbers; the error names it. If numbers are complex, or rows of unequal length.
    """
    array = values
    if isinstance(values, list | tuple):
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{name}: expected numbers in rows of one length, got {describe(values)}") from error
    if getattr(getattr(array, "dtype", None), "kind", "") == "c":  # scikit-learn's message would print the data
        raise ValueError(f"{name}: expected numbers, got {describe(values)}: Complex data not supported")
    if is_frame(values) or getattr(getattr(values, "dtype", None), "kind", "") in ("m", "M"):
        as_array(values, name)
    return unmasked(values)


def as_targets(y: Any, size: int | None = None, dim: int | None = None) -> Tensor:
    """Convert targets to a tensor ``(N, D)`` in float64, with NaN for missing entries.

    Raises:
        ValueError: If targets are not numbers, are infinite, or do not have the shape ``(size, dim)``.
    """
    array = check_array(plain(y, "y"), input_name="y", **_TARGETS)
    columns = as_tensor(array, "y").reshape(len(array), -1)
    if size is not None and columns.shape != (size, dim):
        raise ValueError(f"y: expected shape {(size, dim)} as the prediction has it, got {array.shape}")
    return columns


def interval_targets(y: Any) -> Targets | None:
    """Convert targets of which some may be censored to :class:`Targets` ``(N, D)`` in float64; ``None`` for plain ones.

    Args:
        y: :class:`Targets` ``(N,)`` or ``(N, D)``, or a structured array with two fields, a boolean (whether the event
            was observed) and a number (the time of the event, or of the end of the observation), as scikit-survival
            has it. Anything else is plain.

    Raises:
        ValueError: If an array has other fields.
    """
    if isinstance(y, Targets):
        return (y.unsqueeze(-1) if y.ndim == 1 else y).double()
    kinds = getattr(getattr(y, "dtype", None), "fields", None)
    if not kinds:
        return None
    booleans = [name for name, (kind, *_) in kinds.items() if kind.kind == "b"]
    numbers = [name for name, (kind, *_) in kinds.items() if kind.kind in "fiu"]
    if (len(booleans), len(numbers), len(kinds)) != (1, 1, 2):
        raise ValueError(f"y: expected a boolean and a number as fields, whether and when, got {y.dtype}")
    times = np.asarray(y[numbers[0]], np.float64)[:, None]
    return Targets.censored(times, right=~np.asarray(y[booleans[0]])[:, None])


def as_weight(sample_weight: Any, size: int) -> Tensor:
    """Convert weights of rows to a tensor ``(size,)`` in float64; by default all are 1.

    Raises:
        ValueError: If weights are not finite numbers of that shape, if one is negative, or if all are zero.
    """
    if sample_weight is None:
        return torch.ones(size, dtype=torch.float64, device="cpu")
    array = check_array(
        plain(sample_weight, "sample_weight"), input_name="sample_weight", **{**_TARGETS, "ensure_all_finite": True}
    )
    if array.shape != (size,):
        raise ValueError(f"sample_weight: expected shape ({size},), got {array.shape}")
    if array.min() < 0 or array.max() <= 0:
        got = "zero for all rows" if array.max() == 0 else f"{array.min()}"
        raise ValueError(f"sample_weight: expected numbers that are not negative, one positive at least, got {got}")
    return as_tensor(array, "sample_weight")


class Validated(NamedTuple):
    """Data that scikit-learn has checked.

    Attributes:
        X: Inputs ``(N, n_features)``.
        targets: Targets ``(N, D)``.
        masked: Whether some of them were masked.
        is_vector: Whether they had no axis of outputs.
    """

    X: np.ndarray
    targets: TargetsOrTensor
    masked: bool
    is_vector: bool


def validated(estimator: Any, X: Any, y: Any) -> Validated:
    """Check X and y as scikit-learn does in ``fit``.

    Raises:
        ValueError: If the data are not usable.
        TypeError: If X is sparse.
    """
    inputs: dict[str, Any] = {"dtype": np.float64, "ensure_min_samples": 2}
    if (intervals := interval_targets(y)) is not None:
        X = validate_data(estimator, plain(X, "X"), **inputs)
        check_consistent_length(X, intervals)
        return Validated(X, intervals, False, y.ndim == 1)
    masked = unmasked(y) is not y
    checks: dict[str, Any] = {"validate_separately": (inputs, _TARGETS)}
    X, y = validate_data(estimator, plain(X, "X"), plain(y, "y"), **checks)
    check_consistent_length(X, y)
    return Validated(X, as_targets(y), masked, y.ndim == 1)


def centres(network: MixtureDensityNetwork, x: Tensor, y: Tensor) -> list[Tensor]:
    """Compute the means of inputs and of targets; 0 where centred numbers would not go through the same transform."""
    pairs = [(x, network.input_units), (y, network.head.units)]
    return [values.nanmean(0).nan_to_num() * (units.is_affine and not units.is_unscaled) for values, units in pairs]


def uncentered(predictor: P, x_shift: Tensor, y_shift: Tensor) -> P:
    """Convert a network to data that are not centred, in float64, because float32 could not hold the shifts."""
    network = predictor.cpu().double().architecture
    network.x_shift += x_shift
    network.head.shift += y_shift
    return predictor.eval()


def shifted(targets: TargetsOrTensor, shift: Tensor) -> TargetsOrTensor:
    """Subtract a shift ``(D,)`` from targets, or from both ends of their intervals."""
    return targets.limits(lambda t: t - shift) if isinstance(targets, Targets) else targets - shift
