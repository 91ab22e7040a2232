r"""The mixture density network: backbone, head and scalers of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_mdn.distributions.covariance.noise_models import NoiseModel
from pyro_mdn.distributions.density import complete_when_run
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor, missing
from pyro_mdn.distributions.units.target_transforms import Identity, Standardize, TargetTransform
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks import inputs
from pyro_mdn.networks.files import network_config, network_from_config
from pyro_mdn.networks.head import MixtureHead, exact_buffers
from pyro_mdn.networks.predictor import Predictor
from pyro_mdn.networks.pyro_model import PyroNetwork, require_single_weights
from pyro_mdn.networks.raw_parameters import Raw
from pyro_mdn.networks.rows import checked, converted_targets
from pyro_mdn.networks.starting_point import hidden_layers
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import as_sizes, is_inherited, sample_shape_of
from pyro_mdn.support.process_state import require_seed, seeded
from pyro_mdn.support.torch_compat import REGISTERED, is_hooked
from pyro_mdn.tensors.numerics import single_at_least

__all__ = ["MixtureDensityNetwork"]

_MODULES, _PARAMETERS, _BUFFERS = REGISTERED  # by ``getattr``, which costs a training step no call


class MixtureDensityNetwork(PyroNetwork, Predictor):
    r"""Network that maps x to a Gaussian mixture over y.

    .. math:: p(y \mid x) = \sum_{k=1}^K w_k(x) \, \mathcal{N}(y \mid \mu_k(x), \Sigma_k(x))

    The network standardises inputs and outputs inside, by buffers that :meth:`initialize_` sets. Every mixture, density
    and sample is in the units of y. ``bfloat16()`` and ``half()`` convert the weights alone: scalers and densities keep
    at least single precision.

    Args:
        dim_in: Width of the inputs or, for a backbone that takes more than a vector, their shape.
        dim_out: Number of outputs D.
        n_components: Number of mixture components K.
        hidden_dim: Width of two hidden layers, or a sequence of widths. With a ``backbone``: the width of the
            features that it returns.
        noise: Noise model of the components, by default ``Diagonal()``; or ``"diagonal"``, ``"full"``,
            ``"isotropic"`` or ``"low_rank"`` for one with its default settings.
        family: Family of the components, by default ``Normal(noise)``; or its name, such as ``"student_t"``, beside
            which ``noise`` may be given. A list has a family for each output, see :class:`pyro_mdn.Product`.
        target_transform: What targets go through before components see them, such as ``"log"`` for positive ones (see
            :class:`pyro_mdn.Log`); a list has one for each output. By default, they are only standardised.
        input_transform: What inputs go through before the backbone, such as ``"log"`` for positive ones; a list has
            one for each column. By default, they are standardised; ``"identity"`` leaves them as they are, for a
            backbone that was trained before, images or integer codes (see :class:`pyro_mdn.Identity`).
        backbone: Any module from inputs to features ``(*batch, hidden_dim)``, in place of the hidden layers.
        seed: Seed of the initial weights; a ``backbone`` keeps its own weights. Without a seed, the weights are drawn
            from torch's global generator. With a seed, that generator stays as it was.

    Raises:
        ValueError: If a size is not a positive integer, the noise model does not fit ``dim_out``, or the seed is none.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> network = MixtureDensityNetwork(dim_in=2, dim_out=1, n_components=3)
    >>> x, y = torch.randn(5, 2), torch.randn(5, 1)
    >>> network(x)
    GaussianMixture(batch_shape=(5,), n_components=3, dim=1, covariance=DiagonalCovariance)
    >>> network.loss(x, y).shape, network.sample(x).shape
    (torch.Size([5]), torch.Size([5, 1]))
    """

    _settings = ("input_shape", "hidden_dim", "weight_dtype", "input_transform")  # for fingerprints

    input_shape: tuple[int, ...]
    input_names: list[str] | None  # of the data frame that it was trained on, if it was one
    hidden_dim: tuple[int, ...]
    input_transform: TargetTransform = Standardize()  # that of pickled networks of before
    keeps_integers: bool = False
    """Whether the backbone gets integers as they are; everything else becomes floating point."""

    backbone: nn.Module
    head: MixtureHead
    x_shift: Tensor
    x_scale: Tensor

    def __init__(
        self,
        dim_in: int | Sequence[int],
        dim_out: int,
        n_components: int = 5,
        hidden_dim: int | Sequence[int] = 64,
        *,
        noise: NoiseModel | str | None = None,
        family: Family | str | Sequence[Family | str] | None = None,
        target_transform: TargetTransform | str | Sequence[TargetTransform | str | None] | None = None,
        input_transform: TargetTransform | str | Sequence[TargetTransform | str] | None = None,
        backbone: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require_seed(seed)
        self.input_shape, self.input_names = as_sizes(dim_in, "dim_in"), None
        widths = as_sizes(hidden_dim, "hidden_dim")
        self.hidden_dim = widths * 2 if isinstance(hidden_dim, Integral) else widths
        if backbone is None and len(self.input_shape) != 1:
            raise ValueError(f"dim_in: expected a width, or a backbone that takes shape {self.input_shape}")
        if not (backbone is None or isinstance(backbone, nn.Module)):
            raise ValueError(f"backbone: expected a torch.nn.Module, got {type(backbone).__name__}")
        self.input_transform = inputs.transform_for(input_transform, self.input_shape)
        self.keeps_integers = type(self.input_transform) is Identity and backbone is not None
        with seeded(seed):
            self.backbone = hidden_layers([*self.input_shape, *self.hidden_dim]) if backbone is None else backbone
            settings: dict[str, Any] = {"noise": noise, "family": family, "target_transform": target_transform}
            self.head = MixtureHead(self.hidden_dim[-1], dim_out, n_components, **settings)
        single = single_at_least(torch.get_default_dtype())
        for name, tensor in inputs.new(self.input_transform, self.input_shape).items():
            self.register_buffer(name, tensor.to(single))

    @property
    def _unnamed_before(self) -> frozenset[str]:
        """Attributes that earlier versions did not have, at values that mean what those did; for fingerprints."""
        return frozenset({"input_transform", "keeps_integers"} if type(self.input_transform) is Standardize else ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_buffers(self, *inputs.buffers_of(self.input_transform).values()):
            return super()._apply(fn, recurse)

    @property
    def architecture(self) -> MixtureDensityNetwork:
        """The network itself; a :class:`DeepEnsemble` has several members of one architecture."""
        return self

    @property
    def num_members(self) -> int:
        """Number of members that predict, which is one."""
        return 1

    @property
    def dim_out(self) -> int:
        """Number of outputs D."""
        return self.head.dim_out

    @property
    def n_components(self) -> int:
        """Number of mixture components K."""
        return self.head.n_components

    def __call__(self, x: Any) -> Mixture:
        """Predict the mixture over y for inputs x, in the units of y; see :meth:`forward`.

        Warns:
            UserWarning: If weights are latent and no handler of Pyro is active: the call draws them from the prior.
        """
        with self.calling(warns=True):
            return nn.Module.__call__(self, x)

    def raw(self, x: Any) -> Raw:
        """Compute raw logits, locations and blocks of the family for inputs x: what ``head.mixture`` takes."""
        with self.calling(warns=True):
            return self.head.raw(self.features(x))

    @property
    def is_described_by_raw(self) -> bool:
        """Whether a call equals what the head makes of :meth:`raw`: no hook or overridden ``forward`` changes it."""
        head: Any = self._modules["head"]  # as an attribute, Pyro would look at it for microseconds
        own = is_inherited(self, MixtureDensityNetwork, "__call__", "forward")
        return own and is_inherited(head, MixtureHead, "forward") and not (is_hooked(self) or is_hooked(head))

    def forward(self, x: Any) -> Mixture:
        """Predict the mixture over y, ``batch_shape`` ``(*batch,)``, for inputs ``(*batch, dim_in)``.

        The parameters of the mixture are tensors with a graph, so that gradients can flow to the weights;
        :meth:`predict` returns NumPy arrays.

        Args:
            x: Inputs ``(*batch, dim_in)``: a tensor, array, data frame or nested lists of numbers.

        Raises:
            ValueError: If the shape, dtype or device of x does not fit or, when Pyro validates, if x is not finite.
        """
        try:
            return self.head(self.features(x))
        except RuntimeError as error:
            require_single_weights(self, error)
            raise

    def members(self, x: Any, which: Tensor | slice = slice(None), *, chunk_size: int | None = None) -> Mixture:
        """Predict the mixture over y by the network as the only member, ``batch_shape`` ``(1, *batch)``."""
        mixture = self(x)
        return mixture.expand((1, *mixture.batch_shape))[which]

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        r"""Compute the negative log-likelihood :math:`-\log p(y \mid x)` in nats and the units of y, ``(*batch,)``.

        The loss equals ``-network(x).log_prob(y)``, without building that mixture, unless a hook or an overridden
        ``forward`` may change it.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``. NaN marks a missing entry:
                the loss is that of the observed entries, by their marginal density. :class:`Targets` may be censored.
            replicated: Whether each input may have several targets, ``(*sample, *batch, D)``; the losses then have
                shape ``(*sample, *batch)``.

        Raises:
            ValueError: If shapes, dtypes or devices do not agree or, when Pyro validates, if a value is infinite or
                one of x NaN.
        """
        with self.calling(warns=True):
            if not self.is_described_by_raw:
                mixture = self(x)
                return -mixture.log_prob(self.targets(y, mixture.batch_shape, replicated=replicated))
            features = self.features(x)
            y = self.targets(y, features.shape[:-1], replicated=replicated)
            return -self.head.log_prob(features, y if isinstance(y, Targets) else complete_when_run(y))

    def sample(self, x: Any, sample_shape: int | Sequence[int] = (), *, temperature: float = 1.0) -> Tensor:
        r"""Draw y given x, shape ``(*sample_shape, *batch, D)``.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            sample_shape: Shape of independent draws for each input, or their number.
            temperature: :math:`\tau > 0` divides the logits by τ and multiplies the scales by √τ: below 1 draws
                are more cautious, above 1 more adventurous (Ha & Schmidhuber, 2018, World Models).

        Raises:
            ValueError: If x is not usable, or ``sample_shape`` or the temperature is not what they have to be.
        """
        sample_shape = sample_shape_of(sample_shape)
        with torch.no_grad(), self.calling(warns=True):
            return self(x).temper(temperature).sample(sample_shape)

    @torch.no_grad()
    def initialize_(self, x: Any, y: Any, *, warp: Mapping[str, Tensor] | None = None) -> None:
        """Set the scalers from data, and start the components at clusters of the targets (k-means).

        Rows without an observed target, such as the padding of sequences, do not count.

        Args:
            x: Inputs ``(*batch, dim_in)``. A column that is constant is only shifted.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``. NaN marks missing entries.
            warp: Tensors of the warp of the target transform, by default those that fit y.

        Raises:
            ValueError: If :meth:`check` refuses the data; the network stays as it was.
        """
        x, y = self.check(x, y)
        observed = ~missing(y).all(-1)
        if not bool(observed.all()):
            x, y = x[observed], y[observed]
        fitted = inputs.fitted(self.input_transform, x.reshape(-1, *self.input_shape))
        self.head.initialize_(y.reshape(-1, self.dim_out), warp=warp)
        for name, tensor in fitted.items():
            getattr(self, name).copy_(tensor)

    @property
    def initialized(self) -> bool:
        """Whether the scalers differ from those of a new network; see :meth:`initialize_`."""
        return bool((self.x_shift != 0).any() | (self.x_scale != 1).any()) or self.head.initialized

    # Checks

    @torch.no_grad()
    def check(self, x: Any, y: Any, *, given: tuple[Any, Any] | None = None) -> tuple[Tensor, TargetsOrTensor]:
        """Check whole data, run the network on one row, and return the data as tensors, y ``(*batch, D)``.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``.
            given: The containers that x and y were converted from; errors name their rows and columns.

        Raises:
            ValueError: If shapes, dtypes or devices do not agree, if there are no data, if a number is not finite, or
                if the range of a column exceeds that of the network's precision. NaN marks missing targets, but each
                column needs an observed one.
        """
        return checked(self, x, y, given or (x, y))

    def features(self, x: Any) -> Tensor:
        """Compute the features of inputs x by the backbone, ``(*batch, hidden_dim)``."""
        x = self.inputs(x)
        scaled = inputs.scaled(self.input_transform, getattr(self, _BUFFERS), x, self.weight_dtype)
        features = self.backbone(scaled)
        inputs.require_features(features, self.hidden_dim[-1], x, x.shape[: x.ndim - len(self.input_shape)])
        return features

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights and of the inputs to the backbone; scalers keep at least single precision."""
        linear: Any = getattr(self._modules["head"], _MODULES)["linear"]
        weight = getattr(linear, _PARAMETERS).get("weight", getattr(linear, _BUFFERS).get("weight_start"))
        if weight is None:  # a layer of the user's, or one whose weight is computed
            weight = next(linear.parameters(), getattr(self, _BUFFERS)["x_shift"])
        return weight.dtype

    @property
    def input_units(self) -> Units:
        """Map of the inputs to standardised units."""
        return inputs.units_of(self.input_transform, getattr(self, _BUFFERS))

    def as_numbers(self, x: Any, name: str = "x", device: torch.device | None = None) -> Tensor:
        """Convert inputs of any container to a tensor: floating point, or integers if the backbone keeps them."""
        return as_tensor(x, name, device, integers=self.keeps_integers)

    def require_batch(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless inputs have a dimension of rows."""
        if x.ndim == len(self.input_shape):
            raise ValueError(f"x: expected a batch of inputs, got one of shape {tuple(x.shape)}")

    def inputs(self, x: Any) -> Tensor:
        """Convert inputs of any container to a tensor ``(*batch, dim_in)`` on the device of the network.

        Raises:
            ValueError: If x holds anything but numbers, if a tensor is on another device, if the shape or the names of
                columns do not fit or, when Pyro validates, if a number is not finite in the network's precision.
        """
        # From the buffers: an attribute of a Pyro module takes microseconds to look up.
        return inputs.converted(self, x, getattr(self, _BUFFERS)["x_shift"])

    def targets(self, y: Any, batch_shape: torch.Size, *, replicated: bool = False) -> TargetsOrTensor:
        """Convert targets of any container to ``(*batch, D)``, or ``(*sample, *batch, D)`` if ``replicated``.

        Raises:
            ValueError: If y holds anything but numbers, if the shape or the device of a tensor does not fit or, when
                Pyro validates, if a value is infinite or beyond the precision of the network.
        """
        return converted_targets(self, y, batch_shape, replicated=replicated)

    # Files

    def config(self) -> dict[str, Any]:
        """Describe the network in plain values: settings to build one like it, and a fingerprint to compare it with.

        Raises:
            ValueError: If there are latent weights.
        """
        return network_config(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str, *, backbone: nn.Module | None = None) -> Self:
        """Build the network that :meth:`config` described, or raise a ``ValueError`` that names the source."""
        return network_from_config(cls, config, source, backbone)
