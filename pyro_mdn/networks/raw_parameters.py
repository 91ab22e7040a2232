r"""Raw outputs of a head, and the mixture that they describe in the units of y."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.distributions.density import has_missing, log_density
from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.networks.noise_models import NoiseModel
from pyro_mdn.support.checks import bounds
from pyro_mdn.tensors import kernels
from pyro_mdn.tensors.layer_density import channel_log_density

__all__ = ["ChannelMixture", "RawMixture", "log_unit", "split_channels"]


def log_unit(noise: NoiseModel, dim: int, scale: Tensor) -> Tensor:
    """Logarithm of the volume of a standardised unit of D outputs."""
    logs = scale.log().sum(-1)
    return dim * logs if noise.common_unit else logs


class RawMixture(NamedTuple):
    """Mixture in unconstrained numbers, and the units of y in which they are meant.

    Attributes:
        noise: Noise model, which makes covariances of its channels.
        logits: Log-weights up to a constant, ``(*batch, K)``.
        locs: Standardised locations, ``(*batch, K, D)``.
        factors: Raw channels of the noise, ``(*batch, K, num_params)`` (broadcast).
        shift: Location of the standardised units, ``(*batch, D)`` (broadcast).
        scale: Their size, likewise; one number for all outputs if the noise model has a common unit.
    """

    noise: NoiseModel
    logits: Tensor
    locs: Tensor
    factors: Tensor
    shift: Tensor
    scale: Tensor

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` in nats and the units of y, without building the mixture."""
        value = ((y - self.shift) / self.scale).to(self.locs.dtype)
        if has_missing(y):  # an entry without a density has no unit
            log_units = self.scale.log().expand(y.shape).masked_fill(y.isnan(), 0.0)
            return self._standardized(validate_args=False).log_prob(value) - log_units.sum(-1)
        if (whitening := self.noise.whitening) is not None:
            density = kernels.mixture_log_density(whitening, self.logits, self.locs, value, self.factors)
        else:
            density = log_density(self.logits, self.locs, self._covariance(), value)
        return density - log_unit(self.noise, self.locs.shape[-1], self.scale)

    def mixture(self, *, validate_args: bool | None = None) -> GaussianMixture:
        """Mixture in the units of y."""
        return self._standardized(validate_args=validate_args).affine(self.shift, self.scale)

    def _standardized(self, *, validate_args: bool | None) -> GaussianMixture:
        return GaussianMixture(self.logits, self.locs, self._covariance(), validate_args=validate_args)

    def _covariance(self) -> Covariance:
        return self.noise.build(self.factors, self.locs.shape[-1], self.scale)


class ChannelMixture(NamedTuple):
    """The same in one tensor of channels, from which densities are quickest.

    Attributes:
        noise: Noise model that has a whitening, and depends on the inputs.
        n_components: Number of components K.
        dim: Number of outputs D.
        channels: K logits, D·K locations and the channels of the noise, ``(C, *batch)``.
        shift: Location of the standardised units, ``(D,)``.
        scale: Their size, ``(D,)``, or ``(1,)`` if the noise model has a common unit.
    """

    noise: NoiseModel
    n_components: int
    dim: int
    channels: Tensor
    shift: Tensor
    scale: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures."""
        return self.channels.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return self.channels.dtype

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` in nats and the units of y, without building the mixture."""
        whitening = self.noise.whitening
        if whitening is None or y.shape[:-1] != self.batch_shape or has_missing(y):
            return self._raw().log_density(y)
        value, width = ((y - self.shift) / self.scale).to(self.dtype), self.noise.num_params(self.dim)
        density = channel_log_density(whitening, self.n_components, width, self.channels, value)
        return density - log_unit(self.noise, self.dim, self.scale)

    def mixture(self, *, validate_args: bool | None = None) -> GaussianMixture:
        """Mixture in the units of y."""
        return self._raw().mixture(validate_args=validate_args)

    def parameters(self) -> tuple[Tensor, Tensor, Covariance]:
        """Normalised log-weights, locations and covariances in the units of y."""
        mixture = self.mixture(validate_args=False)
        return mixture.logits, mixture.locs, mixture.covariance

    def is_moderate(self) -> bool:
        """Whether all numbers are so far from the limits of their precision that every parameter is within them."""
        # In one tensor: to look at a number is to wait for the device.
        extremes = [end for tensor in (self.scale, self.shift, self.channels) for end in bounds(tensor)]
        least, *others = torch.stack(extremes).tolist()
        limit = torch.finfo(self.dtype).max ** 0.5
        return least * limit > 1 and all(abs(end) < limit for end in others)

    def _raw(self) -> RawMixture:
        raw = split_channels(self.noise, self.n_components, self.dim, self.channels)
        return RawMixture(self.noise, *raw, self.shift, self.scale)


def split_channels(
    noise: NoiseModel, n_components: int, dim: int, channels: Tensor, raw_noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw logits, locations and noise of a :class:`RawMixture`: views of channels ``(C, *batch)``.

    Args:
        noise: Noise model.
        n_components: Number of components K.
        dim: Number of outputs D.
        channels: K logits, D·K locations and, without ``raw_noise``, the channels of the noise.
        raw_noise: Channels ``(C', *batch)`` (broadcast) of noise that does not depend on the inputs, if any; missing
            dimensions of the batch are added.
    """
    n = n_components * dim
    logits, locs, own = channels.split_with_sizes([n_components, n, channels.shape[0] - n_components - n])
    if raw_noise is not None:
        own = raw_noise.reshape(*raw_noise.shape, *(1,) * (channels.ndim - raw_noise.ndim))
    return kernels.channels_last(logits, 1), _grouped(locs, dim), _grouped(own, noise.num_params(dim))


def _grouped(channels: Tensor, width: int) -> Tensor:
    """View ``(width · K, *batch)`` as ``(*batch, K, width)``."""
    groups = channels.shape[0] // width if width else 1
    return kernels.channels_last(channels.reshape(width, groups, *channels.shape[1:]), 2)
