r"""Raw outputs of a head, and the mixture that they describe in the units of y."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_mdn.distributions.density import has_missing
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.families.normal import Normal
from pyro_mdn.distributions.gaussian.mixture import GaussianMixture
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import EXACT, Targets, TargetsOrTensor
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.support.torch_compat import version_of
from pyro_mdn.tensors.channel_density import GivenChannels, channel_log_density, layer_channels, layer_log_density
from pyro_mdn.tensors.channels import Layout, channels_last
from pyro_mdn.tensors.mixture_density import Kernel, mixture_log_density
from pyro_mdn.tensors.numerics import log_sum_exp, moderate, single_at_least

__all__ = [
    "ChannelParameters",
    "KeptParameters",
    "LayerParameters",
    "Raw",
    "RawParameters",
    "accumulated",
    "mixture_class",
    "raw_from_channels",
]

Raw = tuple[Tensor, ...]
"""Raw log-weights ``(*batch, K)``, locations ``(*batch, K, D)`` and blocks of a family ``(*batch, K | 1, width)``."""


class RawParameters(NamedTuple):
    """Parameters of a mixture as unconstrained numbers, with the family and the units that give them their meaning.

    Attributes:
        family: Family of the components.
        raw: Log-weights up to a constant, locations in standardised units, and blocks, which broadcast.
        units: Map to the units of y.
    """

    family: Family
    raw: Raw
    units: Units

    def log_prob(self, y: TargetsOrTensor, name: str = "y") -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` in nats and the units of y, without building the mixture.

        Args:
            y: The targets.
            name: What to call them in errors.
        """
        _require_inside(self.units, y, name)
        if not self.units.has_line:
            return self.mixture(validate_args=False).log_prob(y)
        if isinstance(y, Targets) or has_missing(y):
            return self._log_likelihood(y)
        logits, locs, *blocks = self.raw
        kernel = None if self.family.kernel is None else self.units.kernel(self.family.kernel)
        one_by_one = self.units.has_angles and kernel is None and not self.family.is_circular
        if one_by_one:  # images are points of their own
            points = self.units.images(y, max(logits.ndim - 1, locs.ndim - 2)).to(locs.dtype)
            kernel, locs = self.family.kernel, self._facing(y)
        else:
            points = self.units.placed(y).to(locs.dtype)
        if kernel is not None:
            density = mixture_log_density(kernel, logits, locs, points, *blocks)
        else:
            components = self.family.build(locs, blocks, self.units.unit)
            density = components.mixture_log_prob(logits, points, normalize=True)
        return (log_sum_exp(density) if one_by_one else density) - self.units.log_volume(y)

    def _facing(self, y: Tensor) -> Tensor:
        """Move locations, ``(*sample, *batch, K, D)``, by whole turns to where images of targets are around them."""
        with torch.no_grad():
            moved = self.units.facing(self._components(), y).locs - self.raw[1]
        return self.raw[1] + moved

    def _log_likelihood(self, y: TargetsOrTensor) -> Tensor:
        """Log-likelihood of targets that were observed in part: only exact entries have a density, and so a unit."""
        if isinstance(y, Targets):
            # In single precision the ends of a cell may become one number in standardised units.
            y = y.double() if y.has_cells() and y.device.type != "mps" else y
        if self.units.has_angles:  # which have no place on the real line
            return self.mixture(validate_args=False).log_prob(y)
        if isinstance(y, Targets):
            value, volume = y.limits(self.units.standardize_limits), self._log_volume(y.lower, y.kinds() == EXACT)
        else:
            value, volume = self.units.standardize(y).to(self.raw[1].dtype), self._log_volume(y, ~y.isnan())
        return self._standardized(validate_args=False).log_prob(value) - volume

    def _log_volume(self, y: Tensor, observed: Tensor) -> Tensor:
        return self.units.log_volume(y, observed=observed).to(self.raw[1].dtype)

    def mixture(self, *, validate_args: bool | None = None) -> Mixture:
        """Mixture in the units of y."""
        return self.units.push(self._standardized(validate_args=validate_args))

    def _standardized(self, *, validate_args: bool | None) -> Mixture:
        kind = mixture_class(self.family)
        return kind.of_components(self.raw[0], self._components(), validate_args=validate_args)

    def _components(self) -> Components:
        _, locs, *blocks = self.raw
        return self.family.build(locs, blocks, self.units.unit)


class ChannelParameters(NamedTuple):
    """The same in one tensor of channels, from which densities are quickest.

    Attributes:
        family: Family of the components that has a kernel.
        layout: Positions of the parameters among the channels.
        channels: K logits, D·K locations and the blocks of the family that depend on the inputs, ``(C, *batch)``.
        units: Map to the units of y.
        own: The tensor of its other blocks, ``(C',)``, if there are some.
    """

    family: Family
    layout: Layout
    channels: Tensor
    units: Units
    own: tuple[Tensor, ...] = ()

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        return self.layout.dim

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures."""
        return self.channels.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return self.channels.dtype

    @property
    def has_pathwise_draws(self) -> bool:
        """Whether draws can be differentiated with respect to the parameters; those of angles cannot."""
        return not self.units.has_angles

    def log_prob(self, y: TargetsOrTensor, name: str = "y") -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` as :meth:`RawParameters.log_prob` computes it."""
        kernel = _kernel_for(self.family, self.units, self.batch_shape, y)
        if kernel is None:
            return self._raw().log_prob(y, name)
        assert isinstance(y, Tensor)
        _require_inside(self.units, y, name)
        points = self.units.placed(y).to(self.dtype)
        density = channel_log_density(kernel, self.layout, self.channels, points, *self.own)
        return density - self.units.log_volume(y)

    def mixture(self, *, validate_args: bool | None = None) -> Mixture:
        """Mixture in the units of y."""
        return self._raw().mixture(validate_args=validate_args)

    def parameters(self) -> tuple[Tensor, Components]:
        """Normalised log-weights and components in the units of y."""
        mixture = self.mixture(validate_args=False)
        return mixture.logits, mixture.components

    def is_moderate(self) -> bool:
        """Whether all numbers are so far from the limits of their precision that every parameter is within them."""
        scale, *others = self.units.tensors()
        sizes = [torch.linalg.vector_norm(tensor.detach()) for tensor in (self.channels, *self.own)]  # none is greater
        seen, limit = _numbers_of(scale, *others, *sizes), moderate(self.dtype)
        least = 1 / limit
        return all(least < unit for unit in seen[: scale.numel()]) and all(-limit < n < limit for n in seen)

    def _raw(self) -> RawParameters:
        return RawParameters(self.family, raw_from_channels(self.layout, self.channels, *self.own), self.units)


def _numbers_of(*tensors: Tensor) -> list[float]:
    """List the numbers of small tensors; on a GPU from one tensor, because to look at a number is to wait for it."""
    if not tensors[0].is_cpu:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).tolist()
    numbers = []
    for tensor in tensors:
        numbers += tensor.tolist() if tensor.ndim == 1 else tensor.reshape(-1).tolist()
    return numbers


def _require_inside(units: Units, y: TargetsOrTensor, name: str) -> None:
    if is_validation_enabled():
        units.require_inside(y, name)


class LayerParameters(NamedTuple):
    """The same in the linear layer that gives the channels, for a single density, which is quicker still.

    Attributes:
        family: Family of the components.
        layout: Positions of the parameters among the channels.
        bias: Bias of the layer, ``(C,)``.
        weight: Weight of the layer, ``(C, H)``.
        features: What it is applied to, ``(N, H)``.
        units: Map to the units of y.
        own: The tensor of the blocks that do not depend on the inputs, ``(C',)``, if there are some.
    """

    family: Family
    layout: Layout
    bias: Tensor
    weight: Tensor
    features: Tensor
    units: Units
    own: tuple[Tensor, ...] = ()

    def log_prob(self, y: TargetsOrTensor, name: str = "y", given: GivenChannels | None = None) -> Tensor:
        """Log-density of y ``(*sample, N, D)`` in nats and the units of y, without building the mixture.

        Args:
            y: The targets.
            name: What to call them in errors.
            given: What the layer gave before, if that is known.
        """
        layer = self.bias, self.weight, self.features
        uniform = given is not None or self.is_uniform()
        kernel = _kernel_for(self.family, self.units, self.features.shape[:-1], y) if uniform else None
        if kernel is None:
            channels = accumulated(layer_channels(*layer)) if given is None else given.recorded(*layer)
            return self.with_channels(channels).log_prob(y, name)
        assert isinstance(y, Tensor)
        _require_inside(self.units, y, name)
        points = self.units.placed(y).to(self.features.dtype)
        density = layer_log_density(kernel, self.layout, *layer, points, *self.own, given=given)
        return density - self.units.log_volume(y)

    def with_channels(self, channels: Tensor) -> ChannelParameters:
        """The same, of channels that the layer gives."""
        return ChannelParameters(self.family, self.layout, channels, self.units, self.own)

    def tensors(self) -> list[Tensor]:
        """All tensors that channels are computed from."""
        return [self.bias, self.weight, self.features, *self.own]

    def is_differentiated(self) -> bool:
        """Whether channels have a graph."""
        needed = self.bias.requires_grad or self.weight.requires_grad or self.features.requires_grad
        return needed and torch.is_grad_enabled()

    def is_uniform(self) -> bool:
        """Whether the layer computes in the precision of its features, which is that of densities."""
        dtype = self.features.dtype
        same = self.bias.dtype == self.weight.dtype == dtype and dtype.itemsize >= 4
        for tensor in self.own:
            same = same and tensor.dtype == dtype
        return same and not torch.is_autocast_enabled(self.features.device.type)


class KeptParameters:
    """The same for a mixture, which stays as it is when the layer changes.

    Channels are computed at once, without a graph: a density has one through the layer, and so do parameters.

    Args:
        layer: The layer, uniform.
    """

    def __init__(self, layer: LayerParameters) -> None:
        self._layer = layer
        self._versions = self._found_versions()
        channels = layer_channels(layer.bias.detach(), layer.weight.detach(), layer.features.detach())
        self._given = GivenChannels(channels)
        self._known = layer.with_channels(channels)
        self.dim, self.batch_shape = layer.layout.dim, channels.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return self._known.dtype

    @property
    def has_pathwise_draws(self) -> bool:
        """Whether draws can be differentiated with respect to the parameters."""
        return self._known.has_pathwise_draws

    def is_moderate(self) -> bool:
        """Whether all numbers are so far from the limits of their precision that every parameter is within them."""
        return self._known.is_moderate()

    def log_prob(self, y: TargetsOrTensor, name: str = "y") -> Tensor:
        """Log-density of y ``(*sample, N, D)`` in nats and the units of y, without building the mixture."""
        if self._found_versions() == self._versions:
            return self._layer.log_prob(y, name, self._given)
        return self._with_graph().log_prob(y, name)

    def parameters(self) -> tuple[Tensor, Components]:
        """Normalised log-weights and components in the units of y."""
        return self._with_graph().parameters()

    def _found_versions(self) -> list[tuple[int, int]]:
        """Where each tensor of the layer is, and how often it was written to."""
        layer = self._layer
        return [(tensor.data_ptr(), version_of(tensor)) for tensor in (layer.bias, layer.weight, layer.features)]

    def _with_graph(self) -> ChannelParameters:
        """Channels with a graph, through which no gradient can go any more after the layer has changed."""
        layer = self._layer
        if self._found_versions() == self._versions:
            return layer.with_channels(self._given.recorded(layer.bias, layer.weight, layer.features))
        channels = self._given.channels.clone().requires_grad_()
        channels.register_hook(_refuse_gradient)
        return layer.with_channels(channels)


def _refuse_gradient(_: Tensor) -> None:
    expected = "expected the weights and features of the mixture as they were, to compute gradients"
    raise RuntimeError(f"{expected}; an operation changed them in place: build the mixture anew")


def _kernel_for(family: Family, units: Units, batch_shape: torch.Size, y: TargetsOrTensor) -> Kernel | None:
    """Return the kernel for the log-density of y from channels, if y is exact and has one point for each row."""
    if isinstance(y, Targets) or y.shape[:-1] != batch_shape:
        return None
    kernel = family.kernel
    if kernel is not None and units.has_angles:
        kernel = units.kernel(kernel)
    return None if kernel is None or has_missing(y) else kernel


def accumulated(channels: Tensor) -> Tensor:
    """Convert channels to single precision at least, whatever autocast made of the layer."""
    return channels.to(single_at_least(channels.dtype))


def mixture_class(family: Family) -> type[Mixture]:
    """Class of the mixtures of a family, in units that are an affine map of standardised ones."""
    return GaussianMixture if isinstance(family, Normal) else Mixture


def raw_from_channels(layout: Layout, channels: Tensor, *own: Tensor) -> Raw:
    """Raw parameters as views of channels ``(C, *batch)`` and of the tensor of the blocks that are not among them."""
    logits, locs, blocks = layout.split(channels, *own)
    return channels_last(logits, 1), channels_last(locs, 2), *(channels_last(block, 2) for block in blocks)
