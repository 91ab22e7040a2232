r"""The last layer: features in, mixture out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_mdn.distributions.density import has_missing
from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.networks.noise_models import NoiseModel, as_noise_model
from pyro_mdn.networks.raw_parameters import ChannelMixture, RawMixture, log_unit, split_channels
from pyro_mdn.support.checks import is_count, is_plain, is_traced, shown
from pyro_mdn.support.torch_compat import own_buffers, own_parameters
from pyro_mdn.tensors import kernels
from pyro_mdn.tensors.layer_density import layer_channels, layer_log_density

__all__ = ["MixtureHead", "exact_buffers", "single_at_least", "starting_value"]


class MixtureHead(nn.Module):
    r"""Linear layer whose outputs parameterise a Gaussian mixture in the units of y.

    .. math:: p(y \mid h) = \sum_k w_k(h) \, \mathcal{N}(y \mid \mu_k(h), \Sigma_k(h))

    The layer works in standardised units; the buffers ``shift`` and ``scale`` hold the units of y
    (0 and 1 until :meth:`initialize_` is called), in single precision also where weights have less.

    Args:
        in_features: Width of the features.
        dim_out: Number of outputs D.
        n_components: Number of components K.
        noise: Noise model of the components, or ``"diagonal"``, ``"full"``, ``"isotropic"`` or ``"low_rank"`` for one
            with its default settings; by default ``Diagonal()``.

    Raises:
        ValueError: If a width is not a positive integer or the noise model does not fit ``dim_out``.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> MixtureHead(8, dim_out=2, n_components=3)(torch.randn(5, 8))
    GaussianMixture(batch_shape=(5,), n_components=3, dim=2, covariance=DiagonalCovariance)
    """

    _settings = ("noise", "in_features", "dim_out", "n_components", "sizes", "raw_noise")  # for fingerprints

    noise: NoiseModel
    in_features: int
    dim_out: int
    n_components: int
    sizes: list[int]
    linear: nn.Linear
    raw_noise: nn.Parameter | None
    shift: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, dim_out: int, n_components: int, *, noise: NoiseModel | str | None = None
    ) -> None:
        super().__init__()
        for name, value in {"in_features": in_features, "dim_out": dim_out, "n_components": n_components}.items():
            if not is_count(value):
                raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")
        in_features, dim_out, n_components = int(in_features), int(dim_out), int(n_components)
        self.noise = as_noise_model(noise, dim_out)
        self.in_features, self.dim_out, self.n_components = in_features, dim_out, n_components
        n_noise = self.noise.num_params(dim_out) * (1 if self.noise.tied else n_components)
        learned_here = n_noise if self.noise.homoscedastic else 0
        self.sizes = [n_components, n_components * dim_out, n_noise - learned_here]
        self.linear = nn.Linear(in_features, sum(self.sizes))
        self.raw_noise = nn.Parameter(torch.empty(learned_here)) if learned_here else None
        single = single_at_least(torch.get_default_dtype())
        self.register_buffer("shift", torch.zeros(dim_out, dtype=single))
        self.register_buffer("scale", torch.ones(1 if self.noise.common_unit else dim_out, dtype=single))
        self.start_anywhere()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.linear.reset_parameters()
        self.start_anywhere()

    def start_anywhere(self) -> None:
        """Let the biases give components of equal weight at random places."""
        shape = self.n_components, self.dim_out
        self._start(torch.zeros(self.n_components), torch.randn(shape), torch.ones(shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_buffers(self, "shift", "scale"):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Describe the head in a module's printout."""
        return f"dim_out={self.dim_out}, n_components={self.n_components}, noise={self.noise}"

    def forward(self, features: Tensor) -> GaussianMixture:
        """Mixture with ``batch_shape`` ``features.shape[:-1]``, in the units of y."""
        if self.raw_noise is not None or self.noise.whitening is None:
            return self.mixture(self.raw(features), self.shift, self.scale)
        # Clones, because the mixture stays as it is when the units change.
        predicted = self._predicted(features, self.shift.clone(), self.scale.clone())
        return predicted.mixture() if is_traced(predicted.channels) else GaussianMixture.deferred(predicted)

    def _predicted(self, features: Tensor, shift: Tensor, scale: Tensor) -> ChannelMixture:
        return ChannelMixture(self.noise, self.n_components, self.dim_out, self.channels(features), shift, scale)

    def log_prob(self, features: Tensor, y: Tensor) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` given the features, in nats and the units of y.

        That of ``forward(features).log_prob(y)``, without building that mixture.

        Raises:
            ValueError: If the shapes do not agree or y is not floating point.
        """
        expected = (*features.shape[:-1], self.dim_out)
        if not y.is_floating_point() or y.shape[-len(expected) :] != expected:
            raise ValueError(f"y: expected floating point of shape {expected}, got {y.dtype} of shape {tuple(y.shape)}")
        if self.raw_noise is not None:
            return self.log_density(self.raw(features), y, self.shift, self.scale)
        whitening = self.noise.whitening if self._is_quicker_as_one(features) else None
        if whitening is None or y.ndim > features.ndim or has_missing(y):
            return self._predicted(features, self.shift, self.scale).log_density(y)
        weight, bias = self.linear.weight, self.linear.bias
        value = ((y - self.shift) / self.scale).to(weight.dtype)
        settings = whitening, self.n_components, self.noise.num_params(self.dim_out)
        flat = features.reshape(-1, self.in_features), value.reshape(-1, self.dim_out)
        density = layer_log_density(*settings, weight, bias, *flat).reshape(y.shape[:-1])
        return density - log_unit(self.noise, self.dim_out, self.scale)

    def _is_quicker_as_one(self, features: Tensor) -> bool:
        """Whether layer and density may be one function, and are quicker that way: with many channels."""
        many = sum(self.sizes) > self.in_features and _is_affine(self.linear)
        return many and _is_exact(features, self.linear.weight)

    def log_density(self, raw: tuple[Tensor, Tensor, Tensor], y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` under :meth:`mixture` of the same arguments, without that."""
        return RawMixture(self.noise, *raw, shift, scale).log_density(y)

    def mixture(self, raw: tuple[Tensor, Tensor, Tensor], shift: Tensor, scale: Tensor) -> GaussianMixture:
        """Mixture in the units of y that :meth:`raw` describes, of any batch shape.

        Args:
            raw: Raw logits, locations and noise.
            shift: Location of the standardised units, shape ``(*batch, D)`` (broadcast).
            scale: Their size, likewise; one number for all outputs if the noise model has a common unit.
        """
        return RawMixture(self.noise, *raw, shift, scale).mixture()

    def raw(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits ``(*batch, K)``, locations ``(*batch, K, D)`` and noise: what :meth:`mixture` takes.

        Views of one channel-first product, in float32 at least.
        """
        return self.split(self.channels(features), self.raw_noise)

    def channels(self, features: Tensor) -> Tensor:
        """What the linear layer gives, channel-first, ``(C, *batch)``, in float32 at least."""
        if features.ndim < 1 or features.shape[-1] != self.in_features:
            raise ValueError(f"features: expected shape (*batch, {self.in_features}), got {tuple(features.shape)}")
        flat = features if features.ndim == 2 else features.reshape(-1, self.in_features)
        if _is_affine(linear := self.linear):
            # The bias first: guides and files of draws have latent weights in the order in which they are looked up.
            channels = layer_channels(linear.bias, linear.weight, flat)
        else:
            channels = linear(flat).T.contiguous()
        if features.ndim != 2:
            channels = channels.reshape(channels.shape[0], *features.shape[:-1])
        return _accumulated(channels)

    def split(self, channels: Tensor, raw_noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits, locations and noise as :meth:`raw` gives them, from channels ``(C, *batch)`` of the linear layer.

        Args:
            channels: What the layer gives.
            raw_noise: Channels ``(C', *batch)`` (broadcast) of noise that does not depend on the features, if any.
        """
        noise = None if raw_noise is None else _accumulated(raw_noise)
        return split_channels(self.noise, self.n_components, self.dim_out, _accumulated(channels), noise)

    @torch.no_grad()
    def initialize_(self, y: Tensor) -> None:
        """Set the units of y, and spread the components over the data, from targets ``(N, D)``.

        Components start at the clusters of a k-means on the standardised targets (Lloyd, 1982), with their
        proportions and spreads, so that they do not collapse into one. Entries that are NaN are taken from other
        rows at random for that.

        Raises:
            ValueError: If y is not ``(N, D)`` with N > 0, has an infinite entry, or no observed one in a column.
        """
        if y.ndim != 2 or y.shape[1] != self.dim_out or len(y) == 0:
            raise ValueError(f"y: expected shape (N, {self.dim_out}) with N > 0, got {tuple(y.shape)}")
        if bool(y.isinf().any() | y.isnan().all(0).any()):
            raise ValueError("y: expected finite numbers, some in each column, or NaN for missing ones")
        shift, scale = kernels.location_and_scale(y.cpu(), common_unit=self.noise.common_unit)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self._start(*_clusters(_filled((y.cpu() - shift) / scale), self.n_components))

    @torch.no_grad()
    def _start(self, logits: Tensor, locs: Tensor, scale: Tensor) -> None:
        """Let the biases alone give this mixture, ``(K,)``, ``(K, D)`` and ``(K, D)``."""
        if self.noise.tied:
            scale = scale.square().mean(0, keepdim=True).sqrt()
        bias = starting_value(self.linear, "bias")
        if not isinstance(bias, Tensor):
            expected = "expected a layer with a bias, which the components start from"
            raise ValueError(f"head.linear: {expected}, got {type(self.linear).__name__}: replace it after initialize_")
        raw = self.noise.start(scale).T.flatten().to(bias)
        if self.sizes[-1] != len(raw):
            starting_value(self, "raw_noise").copy_(raw)
            raw = raw[:0]
        bias.copy_(torch.cat([logits.to(raw), locs.T.flatten().to(raw), raw]))


def _is_affine(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, with a bias."""
    return is_plain(layer, nn.Linear) and own_parameters(layer).get("bias", layer) is not None


def _is_exact(features: Tensor, weight: Tensor) -> bool:
    """Whether products of these are of single precision at least; others are accumulated in it."""
    exact = features.dtype == weight.dtype and features.dtype.itemsize >= 4
    return exact and not torch.is_autocast_enabled(features.device.type)


def single_at_least(dtype: torch.dtype) -> torch.dtype:
    """Give single precision for less of it, and this precision otherwise."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def exact_buffers(module: nn.Module, *names: str) -> Iterator[None]:
    """Keep buffers in single precision at least while a module is converted: rounded units are other units."""
    before = {name: own_buffers(module)[name] for name in names}
    yield
    for name, exact in before.items():
        converted = own_buffers(module)[name]
        if exact is not None and converted is not None and converted.dtype.itemsize < 4:
            own_buffers(module)[name] = exact.to(converted.device, torch.float32)


def _accumulated(channels: Tensor) -> Tensor:
    """Single precision at least, whatever autocast made of the layer."""
    return channels.to(single_at_least(channels.dtype))


def starting_value(module: nn.Module, name: str) -> Any:
    """Parameter of a module or, where it is latent, the buffer that inference starts from; ``None`` if neither is."""
    value = own_buffers(module).get(f"{name}_start")
    return getattr(module, name, None) if value is None else value


def _filled(y: Tensor) -> Tensor:
    """Put observed entries of the same column, drawn at random, in place of NaN."""
    columns = []
    for column in y.unbind(-1):
        observed = column[~column.isnan()]
        if len(observed) < len(column):
            column = torch.where(
                column.isnan(), observed[torch.randint(len(observed), column.shape, device="cpu")], column
            )
        columns.append(column)
    return torch.stack(columns, -1)


def _clusters(y: Tensor, n_components: int, max_rows: int = 10_000) -> tuple[Tensor, Tensor, Tensor]:
    """Log-proportions ``(K,)``, centres and spreads ``(K, D)`` of a k-means over standardised ``(N, D)``."""
    from scipy.cluster.vq import kmeans2  # it takes longer to import than all of this package

    rows = y[torch.randperm(len(y), device="cpu")[:max_rows]]
    distinct = rows.unique(dim=0)
    if len(distinct) <= n_components:
        extra = torch.randint(len(distinct), (n_components - len(distinct),), device="cpu")
        centers = torch.cat([distinct, distinct[extra]])
    else:
        rng = np.random.default_rng(int(torch.randint(2**31, (), device="cpu")))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            centers = torch.from_numpy(kmeans2(rows.numpy(), n_components, minit="++", rng=rng)[0])
    member = one_hot(torch.cdist(rows, centers).argmin(-1), n_components).to(rows)
    # One pseudo-observation from the whole of the data keeps empty and single-point clusters alive.
    count = member.sum(0) + 1
    spread = member.T @ rows.square() - 2 * centers * (member.T @ rows) + centers.square() * (count - 1)[:, None] + 1
    return (count / count.sum()).log(), centers, (spread / count[:, None]).sqrt()
