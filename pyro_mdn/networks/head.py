r"""The last layer: features in, mixture out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_mdn.distributions.covariance.noise_models import NoiseModel
from pyro_mdn.distributions.families.family import Family, layout_of
from pyro_mdn.distributions.families.normal import Normal
from pyro_mdn.distributions.families.products.product_family import as_family
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor, missing
from pyro_mdn.distributions.units.target_transforms import Standardize, TargetTransform
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks.raw_parameters import (
    ChannelParameters,
    KeptParameters,
    LayerParameters,
    Raw,
    RawParameters,
    accumulated,
    mixture_class,
    raw_from_channels,
)
from pyro_mdn.networks.starting_point import clusters, filled
from pyro_mdn.support.checks import is_count, is_plain, is_traced, shown
from pyro_mdn.support.torch_compat import REGISTERED, own_buffers
from pyro_mdn.tensors.channel_density import layer_channels
from pyro_mdn.tensors.channels import Layout
from pyro_mdn.tensors.numerics import single_at_least

__all__ = ["MixtureHead", "exact_buffers", "starting_value"]

_, _PARAMETERS, _BUFFERS = REGISTERED  # by ``getattr``, which costs a training step no call


class MixtureHead(nn.Module):
    r"""Linear layer whose outputs parameterise a mixture in the units of y.

    .. math:: p(y \mid h) = \sum_k w_k(h) \, p_k(y \mid h)

    The layer works in standardised units. The tensors of the target transform, which are buffers ``shift`` and
    ``scale`` by default, hold the units of y (0 and 1 until :meth:`initialize_` is called), in single precision also
    where weights have less.

    Args:
        in_features: Width of the features.
        dim_out: Number of outputs D.
        n_components: Number of components K.
        noise: Noise model of the components, or ``"diagonal"``, ``"full"``, ``"isotropic"`` or ``"low_rank"`` for one
            with its default settings; by default ``Diagonal()``.
        family: Family of the components, or its name, such as ``"student_t"``; by default ``Normal(noise)``. A list
            has one for each output, as :class:`Product`.
        target_transform: What targets go through before components see them, such as ``Log()`` for positive ones, or
            its name; a list has one for each output. By default, they are only standardised.

    Raises:
        ValueError: If a width is not a positive integer or the noise model does not fit ``dim_out``.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> MixtureHead(8, dim_out=2, n_components=3)(torch.randn(5, 8))
    GaussianMixture(batch_shape=(5,), n_components=3, dim=2, covariance=DiagonalCovariance)
    """

    # For fingerprints.
    _settings = ("noise", "in_features", "dim_out", "n_components", "sizes", "raw_noise", "family", "transform")

    has_defaults: bool
    """Whether neither a family nor a target transform was chosen; a head from a file does not know of its defaults."""

    family: Family
    transform: TargetTransform
    in_features: int
    dim_out: int
    n_components: int
    sizes: list[int]
    layout: Layout
    has_quick_density: bool
    """Whether a kernel has densities straight from the channels."""

    linear: nn.Linear
    raw_noise: nn.Parameter | None
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        dim_out: int,
        n_components: int,
        *,
        noise: NoiseModel | str | None = None,
        family: Family | str | Sequence[Family | str] | None = None,
        target_transform: TargetTransform | str | Sequence[TargetTransform | str | None] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"in_features": in_features, "dim_out": dim_out, "n_components": n_components}.items():
            if not is_count(value):
                raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")
        self.has_defaults = family is None and target_transform is None
        in_features, dim_out, n_components = int(in_features), int(dim_out), int(n_components)
        self.family = as_family(family, noise, dim_out, Normal)
        self.transform = self.family.transform_for(target_transform, dim_out)
        self.noise: NoiseModel = self.family.noise
        self.in_features, self.dim_out, self.n_components = in_features, dim_out, n_components
        self.layout = layout_of(self.family, dim_out, n_components)
        widths = {True: 0, False: 0}  # of blocks, by whether they are homoscedastic
        for block in self.family.blocks(dim_out):
            widths[block.homoscedastic] += block.width * (1 if block.tied else n_components)
        self.sizes = [n_components, n_components * dim_out, widths[False]]
        self.linear = nn.Linear(in_features, sum(self.sizes))
        self.raw_noise = nn.Parameter(torch.empty(widths[True])) if widths[True] else None
        self.has_quick_density = self.family.kernel is not None
        single = single_at_least(torch.get_default_dtype())
        tensors = self.transform.identity(dim_out, common_unit=self.noise.common_unit)
        self._names_of_units = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(single))
        self.start_anywhere()

    @property
    def _unnamed_before(self) -> frozenset[str]:
        """Attributes that earlier versions did not have, at values that mean what those did; for fingerprints."""
        usual = {"family": type(self.family) is Normal, "transform": type(self.transform) is Standardize}
        return frozenset(name for name, is_usual in usual.items() if is_usual)

    @property
    def initialized(self) -> bool:
        """Whether the units of y differ from those of a new head."""
        new = self.transform.identity(self.dim_out, common_unit=self.noise.common_unit)
        buffers = getattr(self, _BUFFERS)
        return any(bool((buffers[name].cpu() != tensor).any()) for name, tensor in new.items())

    @property
    def units(self) -> Units:
        """Map to the units of y."""
        return self.units_of(getattr(self, _BUFFERS))

    def units_of(self, tensors: Mapping[str, Any]) -> Units:
        """Map to the units of y that tensors by name define; they may have leading batch dimensions."""
        units = self.transform.units(tensors)
        return units.with_lower_ends() if self.family.has_atom else units

    def units_in(self, dtype: torch.dtype) -> Units:
        """Map to the units of y, computed in another precision."""
        return self.units_of({name: b if b is None else b.to(dtype) for name, b in getattr(self, _BUFFERS).items()})

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.linear.reset_parameters()
        self.start_anywhere()

    def start_anywhere(self) -> None:
        """Let the biases give components of equal weight at random places."""
        shape = self.n_components, self.dim_out
        self._start(torch.zeros(self.n_components), torch.randn(shape), torch.ones(shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_buffers(self, *self._names_of_units):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Describe the head in a module's printout."""
        transform = "" if type(self.transform) is Standardize else f", target_transform={self.transform}"
        return f"dim_out={self.dim_out}, n_components={self.n_components}, family={self.family}{transform}"

    def forward(self, features: Tensor) -> Mixture:
        """Mixture with ``batch_shape`` ``features.shape[:-1]``, in the units of y."""
        if not self.has_quick_density:
            return self.mixture(self.raw(features), self.units)
        # Clones, because the mixture stays as it is when the head changes.
        units = self.units_of({name: None if b is None else b.clone() for name, b in getattr(self, _BUFFERS).items()})
        own = tuple([tensor.clone() for tensor in self._own()])
        kind = mixture_class(self.family) if units.is_affine else Mixture
        layer = self._layer(features, units, own)
        if layer and layer.is_differentiated() and layer.is_uniform() and not is_traced(*layer.tensors()):
            return kind.deferred(KeptParameters(layer))
        predicted = ChannelParameters(self.family, self.layout, self.channels(features), units, own)
        return predicted.mixture() if is_traced(predicted.channels, *own) else kind.deferred(predicted)

    def _own(self) -> tuple[Tensor, ...]:
        """Channels ``(C',)`` of the blocks that do not depend on the features, if there are some."""
        if not self.layout.has_own:  # quicker than to look for a parameter
            return ()
        assert self.raw_noise is not None
        return (accumulated(self.raw_noise),)

    def _layer(self, features: Tensor, units: Units, own: tuple[Tensor, ...]) -> LayerParameters | None:
        """Parameters through the linear layer, if that and the features are plain."""
        if features.ndim != 2 or not _is_affine(linear := self.linear):
            return None
        self._require_width(features)
        return LayerParameters(self.family, self.layout, linear.bias, linear.weight, features, units, own)

    def log_prob(self, features: Tensor, y: TargetsOrTensor) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` given the features, in nats and the units of y.

        That of ``forward(features).log_prob(y)``, without building that mixture.

        Raises:
            ValueError: If the shapes do not agree or y is not floating point.
        """
        expected = (*features.shape[:-1], self.dim_out)
        if not y.dtype.is_floating_point or y.shape[-len(expected) :] != expected:
            raise ValueError(f"y: expected floating point of shape {expected}, got {y.dtype} of shape {tuple(y.shape)}")
        own, units = self._own(), self.units
        if layer := self._layer(features, units, own):
            return layer.log_prob(y)
        return ChannelParameters(self.family, self.layout, self.channels(features), units, own).log_prob(y)

    def log_density(self, raw: Raw, y: TargetsOrTensor, units: Units) -> Tensor:
        """Log-density of y ``(*sample, *batch, D)`` under :meth:`mixture` of the same arguments, without that."""
        return RawParameters(self.family, raw, units).log_prob(y)

    def mixture(self, raw: Raw, units: Units) -> Mixture:
        """Mixture in the units of y that :meth:`raw` describes, of any batch shape.

        Args:
            raw: Raw logits, locations and blocks of the family.
            units: Map to the units of y, whose tensors broadcast with the batch.
        """
        return RawParameters(self.family, raw, units).mixture()

    def raw(self, features: Tensor) -> Raw:
        """Raw logits ``(*batch, K)``, locations ``(*batch, K, D)`` and blocks of the family, as :meth:`mixture` takes.

        Views of one channel-first product, in float32 at least.
        """
        return self.split(self.channels(features), self.raw_noise)

    def channels(self, features: Tensor) -> Tensor:
        """What the linear layer gives, channel-first, ``(C, *batch)``, in float32 at least."""
        self._require_width(features)
        flat = features if features.ndim == 2 else features.reshape(-1, self.in_features)
        if _is_affine(linear := self.linear):
            # The bias first: guides and files of draws have latent weights in the order in which they are looked up.
            channels = layer_channels(linear.bias, linear.weight, flat)
        else:
            channels = linear(flat).T.contiguous()
        if features.ndim != 2:
            channels = channels.reshape(channels.shape[0], *features.shape[:-1])
        return accumulated(channels)

    def _require_width(self, features: Tensor) -> None:
        if features.ndim < 1 or features.shape[-1] != self.in_features:
            raise ValueError(f"features: expected shape (*batch, {self.in_features}), got {tuple(features.shape)}")

    def split(self, channels: Tensor, raw_noise: Tensor | None) -> Raw:
        """Raw parameters as :meth:`raw` gives them, from channels ``(C, *batch)`` of the linear layer.

        Args:
            channels: What the layer gives.
            raw_noise: Channels ``(C', *batch)`` (broadcast) of the blocks that do not depend on the features, if any.
        """
        own = () if raw_noise is None else (accumulated(raw_noise),)
        return raw_from_channels(self.layout, accumulated(channels), *own)

    @torch.no_grad()
    def initialize_(self, y: TargetsOrTensor, *, warp: Mapping[str, Tensor] | None = None) -> None:
        """Set the units of y, and spread the components over the data, from targets ``(N, D)``.

        Components start at the clusters of a k-means on the standardised targets (Lloyd, 1982), with their
        proportions and spreads, so that they do not collapse into one. Entries that are NaN are taken from other
        rows at random for that.

        Args:
            y: The targets.
            warp: Tensors of the warp of the target transform, by default those that fit y.

        Raises:
            ValueError: If y is not ``(N, D)`` with N > 0, has an infinite entry, or no observed one in a column.
        """
        if y.ndim != 2 or y.shape[1] != self.dim_out or len(y) == 0:
            raise ValueError(f"y: expected shape (N, {self.dim_out}) with N > 0, got {tuple(y.shape)}")
        points = self.starting_points(y).cpu()
        fitted = self.transform.fit(points, common_unit=self.noise.common_unit, warp=warp)
        for name, tensor in fitted.items():
            getattr(self, name).copy_(tensor)
        standardized = filled(self.transform.units(fitted).standardize(points))
        self._start(*clusters(standardized, self.n_components, alike=not self.family.is_product))

    def starting_points(self, y: TargetsOrTensor) -> Tensor:
        """Return numbers above the lower end of the support for targets ``(N, D)``, some in each column, or NaN.

        Raises:
            ValueError: If a target is infinite or outside of the support, or a column has no observed one.
        """
        if bool((isinstance(y, Tensor) and y.isinf().any()) or missing(y).all(0).any()):
            raise ValueError("y: expected finite numbers, some in each column, or NaN for missing ones")
        units = self.units
        units.require_inside(y, "y")
        y = units.above(y)
        points = units.points(y) if isinstance(y, Targets) else y
        return torch.where(points.isnan().all(0), units.from_line(torch.zeros_like(points)), points)

    @torch.no_grad()
    def _start(self, logits: Tensor, locs: Tensor, scale: Tensor) -> None:
        """Let the biases alone give components of these log-weights ``(K,)``, means and spreads ``(K, D)``."""
        bias = starting_value(self.linear, "bias")
        if not isinstance(bias, Tensor):
            expected = "expected a layer with a bias, which the components start from"
            raise ValueError(f"head.linear: {expected}, got {type(self.linear).__name__}: replace it after initialize_")
        starts = self.family.start(scale)
        locs = self.family.start_locs(locs, starts, self.units.unit.to(locs))
        raw: dict[bool, list[Tensor]] = {True: [], False: []}
        for block, start in zip(self.family.blocks(self.dim_out), starts, strict=True):
            raw[block.homoscedastic].append(start.T.flatten().to(bias))
        own = starting_value(self, "raw_noise")
        if own is not None:
            own.copy_(torch.cat(raw[True]))
        bias.copy_(torch.cat([logits.to(bias), locs.T.flatten().to(bias), *raw[False]]))


def _is_affine(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, with a bias."""
    return is_plain(layer, nn.Linear) and getattr(layer, _PARAMETERS).get("bias", layer) is not None


@contextmanager
def exact_buffers(module: nn.Module, *names: str) -> Iterator[None]:
    """Keep buffers in single precision at least while a module is converted: rounded units are other units."""
    before = {name: own_buffers(module)[name] for name in names}
    yield
    for name, exact in before.items():
        converted = own_buffers(module)[name]
        if exact is not None and converted is not None and converted.dtype.itemsize < 4:
            own_buffers(module)[name] = exact.to(converted.device, torch.float32)


def starting_value(module: nn.Module, name: str) -> Any:
    """Parameter of a module or, where it is latent, the buffer that inference starts from; ``None`` if neither is."""
    value = own_buffers(module).get(f"{name}_start")
    return getattr(module, name, None) if value is None else value
