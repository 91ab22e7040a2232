r"""Inputs of networks: their conversion to tensors, and what they go through before the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.distributions.units.compound_transforms import PerOutput, as_transform
from pyro_mdn.distributions.units.target_transforms import Standardize, TargetTransform
from pyro_mdn.distributions.units.units import StandardUnits, Units
from pyro_mdn.distributions.units.warped_units import WarpedUnits
from pyro_mdn.support.arrays import as_tensor, require_columns, require_finite
from pyro_mdn.support.checks import is_known, require_range
from pyro_mdn.support.torch_compat import cached

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork

__all__ = [
    "buffers_of",
    "converted",
    "fitted",
    "new",
    "require_device",
    "require_features",
    "require_usable",
    "scaled",
    "transform_for",
    "units_of",
]


def transform_for(
    given: TargetTransform | str | Sequence[TargetTransform | str] | None, shape: tuple[int, ...]
) -> TargetTransform:
    """Return the transform that the argument ``input_transform`` of a constructor stands for.

    Args:
        given: The argument; a sequence has one for each column.
        shape: Shape of an input.

    Raises:
        ValueError: If no transform has the name given, if it is not one for real numbers, if there are more or fewer
            than columns, or if inputs that are no vectors should do more than to be standardised or left alone.
    """
    try:
        transform = as_transform(given)
    except ValueError as error:
        raise ValueError(str(error).replace("target_transform", "input_transform", 1)) from None
    if isinstance(transform, PerOutput) and len(transform.transforms) != shape[-1]:
        got = f"got {len(transform.transforms)}"
        raise ValueError(f"input_transform: expected {shape[-1]} transforms, one for each column, {got}")
    if len(shape) > 1 and not isinstance(transform, Standardize):
        expected = f"'standardize' or 'identity' for inputs of shape {shape}"
        raise ValueError(f"input_transform: expected {expected}, got {transform}: transform them in the backbone")
    if transform.circles(1) is not None:
        raise ValueError(f"input_transform: expected none of angles, got {transform}: give their sine and cosine")
    if not isinstance(units_of(transform, new(transform, shape)), StandardUnits | WarpedUnits):
        raise ValueError(f"input_transform: expected one of real numbers, got {transform}")
    return transform


@cached
def buffers_of(transform: TargetTransform) -> dict[str, str]:
    """Names of the buffers of a network that hold the tensors of a transform of its inputs, by those of the tensors."""
    return {name: f"x_{name}" for name in ("shift", "scale", *transform.start(1))}


def new(transform: TargetTransform, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the buffers by name, for inputs of a shape, before there are data."""
    tensors = {"shift": torch.zeros(shape), "scale": torch.ones(shape), **transform.start(shape[-1])}
    return {buffer: tensors[name] for name, buffer in buffers_of(transform).items()}


def fitted(transform: TargetTransform, x: Tensor) -> dict[str, Tensor]:
    """Return the buffers by name, fitted to inputs ``(N, *shape)``."""
    tensors = transform.fit(x.cpu(), common_unit=False)
    return {buffer: tensors[name] for name, buffer in buffers_of(transform).items()}


def units_of(transform: TargetTransform, tensors: Mapping[str, Any]) -> Units:
    """Map inputs to standardised units, by the buffers of a network, which may have leading batch dimensions."""
    return transform.units({name: tensors[buffer] for name, buffer in buffers_of(transform).items()})


def scaled(transform: TargetTransform, tensors: Mapping[str, Any], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Transform inputs for a backbone whose weights have this dtype; integers that are left as they are keep theirs."""
    if type(transform) is Standardize:  # what nearly every training step does
        return ((x - tensors["x_shift"]) / tensors["x_scale"]).to(dtype)
    scaled = units_of(transform, tensors).standardize(x)
    return scaled.to(dtype) if scaled.is_floating_point() else scaled


def converted(network: MixtureDensityNetwork, x: Any, unit: Tensor) -> Tensor:
    """Convert inputs as :meth:`MixtureDensityNetwork.inputs` does, to the device of a buffer."""
    require_columns(network.input_names, x, "x")
    shape = network.input_shape
    n, given, x = len(shape), x, as_tensor(x, "x", unit.device, integers=network.keeps_integers)
    require_device(x, "x", unit.device)
    if x.ndim < n or x.shape[x.ndim - n :] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"x: expected shape (*batch, {expected}), as dim_in says, got {tuple(x.shape)}")
    if is_validation_enabled() and is_known(x):
        require_finite(x, "x", given, unit.dtype)
        if type(network.input_transform) is not Standardize:
            network.input_units.require_inside(x, "x", given)
    return x


def require_device(value: TargetsOrTensor, name: str, device: torch.device) -> None:
    """Raise a ``ValueError`` unless a tensor is on a device."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def require_features(features: Any, width: int, x: Tensor, batch_shape: torch.Size) -> None:
    """Raise a ``ValueError`` unless a backbone has made features ``(*batch, width)`` of inputs x."""
    n = features.ndim - 1 if isinstance(features, Tensor) else -1
    if n < min(1, len(batch_shape)) or features.shape != (*batch_shape[:n], width):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone: expected features (*batch, {width}) for x of shape {tuple(x.shape)}, got {got}")


def require_usable(network: MixtureDensityNetwork, x: Tensor, given: Any, dtype: torch.dtype) -> None:
    """Raise a ``ValueError`` if an input is not finite, outside of its support, or in a column of too wide a range."""
    require_finite(x, "x", given, dtype)
    network.input_units.require_inside(x, "x", given)
    if x.is_floating_point():
        require_range(x.reshape(-1, *network.input_shape), "x", dtype)
