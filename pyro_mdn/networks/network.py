r"""The network: backbone, head and scalers, as a Pyro module and a Pyro model."""

from __future__ import annotations

import copy
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

import pyro
import torch
from pyro.distributions.util import is_validation_enabled
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_mdn.distributions.density import complete_when_run
from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.distributions.predictions import Prediction, predicted_in_parts
from pyro_mdn.networks.files import require_loadable, shapes_of
from pyro_mdn.networks.head import MixtureHead, exact_buffers, single_at_least
from pyro_mdn.networks.noise_models import NoiseModel, noise_from_config, noise_to_config
from pyro_mdn.support import tensor_files
from pyro_mdn.support.arrays import as_tensor, require_finite, require_no_infinity
from pyro_mdn.support.checks import is_count, is_hooked, is_inherited, is_known, require_range, sample_shape_of, shown
from pyro_mdn.support.fingerprint import FORMS, described, differing
from pyro_mdn.support.process_state import KeepFrozen, own_generators, own_store, require_seed, seeded
from pyro_mdn.support.pyro_compat import (
    am_i_wrapped,
    context_of,
    draws_or_registers,
    is_latent,
    latent_parameters,
    name_in_store,
    stored_parameter,
)
from pyro_mdn.support.torch_compat import own_buffers, own_modules, own_parameters
from pyro_mdn.tensors import kernels

__all__ = ["FirstLinear", "MixtureDensityNetwork", "evaluating", "shapes_outside_backbone", "warn_if_unlike"]


Shapes = dict[str, tuple[int, ...]]


class MixtureDensityNetwork(PyroModule):
    r"""Network that maps x to a Gaussian mixture over y.

    .. math:: p(y \mid x) = \sum_{k=1}^K w_k(x) \, \mathcal{N}(y \mid \mu_k(x), \Sigma_k(x))

    Inputs and outputs are standardised inside, by buffers that :meth:`initialize_` sets; every mixture, density
    and sample is in the units of y. ``bfloat16()`` and ``half()`` convert the weights: these buffers, and densities,
    have single precision at least.

    Args:
        dim_in: Width of the inputs or, for a backbone that takes more than a vector, their shape.
        dim_out: Number of outputs D.
        n_components: Number of mixture components K.
        hidden_dim: Width of two hidden layers, or a sequence of widths. With a ``backbone``: the width of the
            features that it returns.
        noise: Noise model of the components, by default ``Diagonal()``; or ``"diagonal"``, ``"full"``,
            ``"isotropic"`` or ``"low_rank"`` for one with its default settings.
        backbone: Any module from inputs to features ``(*batch, hidden_dim)``, in place of the hidden layers.
        seed: Seed of the first weights, but for those of a ``backbone``, which has its own. By default they come from
            torch's generator, which a seed leaves alone.

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

    _settings = ("input_shape", "hidden_dim", "weight_dtype")  # for fingerprints

    input_shape: tuple[int, ...]
    hidden_dim: tuple[int, ...]
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
        backbone: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require_seed(seed)
        self.input_shape = _sizes(dim_in, "dim_in")
        widths = _sizes(hidden_dim, "hidden_dim")
        self.hidden_dim = widths * 2 if isinstance(hidden_dim, Integral) else widths
        if backbone is None and len(self.input_shape) != 1:
            raise ValueError(f"dim_in: expected a width, or a backbone that takes shape {self.input_shape}")
        if not (backbone is None or isinstance(backbone, nn.Module)):
            raise ValueError(f"backbone: expected a torch.nn.Module, got {type(backbone).__name__}")
        with seeded(seed):
            self.backbone = _mlp([*self.input_shape, *self.hidden_dim]) if backbone is None else backbone
            self.head = MixtureHead(self.hidden_dim[-1], dim_out, n_components, noise=noise)
        single = single_at_least(torch.get_default_dtype())
        self.register_buffer("x_shift", torch.zeros(self.input_shape, dtype=single))
        self.register_buffer("x_scale", torch.ones(self.input_shape, dtype=single))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_buffers(self, "x_shift", "x_scale"):
            return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        with own_generators():  # torch's layers look at their weights, which are draws where they are latent
            return super().__repr__()

    @property
    def dim_out(self) -> int:
        """Number of outputs D."""
        return self.head.dim_out

    @property
    def n_components(self) -> int:
        """Number of mixture components K."""
        return self.head.n_components

    # Outside Pyro's handlers a call is plain PyTorch: it does not touch the global parameter store, where another
    # network's weights may stand under the same names.

    def __call__(self, x: Any) -> GaussianMixture:
        """Mixture over y for inputs x, in the units of y; see :meth:`forward`.

        Warns:
            UserWarning: If there are latent weights, and no handler of Pyro's sees them: they are drawn from the prior.
        """
        with self._context(warns=True):
            return nn.Module.__call__(self, x)

    def _context(self, *, warns: bool = False) -> AbstractContextManager[Any]:
        if am_i_wrapped():
            return self._making_statements()
        if not draws_or_registers(self):
            return nullcontext()
        if warns and self.latent:
            drawn = "network: its weights are latent, and outside of Pyro's handlers a call draws them from the prior"
            instead = "posterior_predictive(network, posterior, x) predicts; Predictive(network.model, ...) draws too"
            warnings.warn(f"{drawn}; {instead}", stacklevel=3)  # who calls what has this context
        return self._drawing()

    @contextmanager
    def _making_statements(self) -> Iterator[None]:
        with KeepFrozen(), context_of(self):
            yield

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        context = context_of(self)
        used = context.used
        with own_store(), self._making_statements():
            yield
        if not context.active:
            context.used = used  # nothing remains under the names that it has now

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        # Pyro refuses parts that were called before, whose parameters may be in its store under another name: here
        # the module holds them, and what runs next puts them there under the new one.
        context_of(self).used = False
        super()._pyro_set_supermodule(name, context)

    def raw(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits, locations and noise for inputs x: what ``head.mixture`` makes a mixture of."""
        with self._context(warns=True):
            return self.head.raw(self.features(x))

    @property
    def is_described_by_raw(self) -> bool:
        """Whether a call gives what the head makes of :meth:`raw`: no hook and no other ``forward`` has a say."""
        head: Any = self._modules["head"]  # as an attribute, Pyro would look at it for microseconds
        own = is_inherited(self, MixtureDensityNetwork, "__call__", "forward")
        return own and is_inherited(head, MixtureHead, "forward") and not (is_hooked(self) or is_hooked(head))

    @property
    def latent(self) -> bool:
        """Whether there are latent weights; see :func:`pyro_mdn.bayesianize`."""
        return is_latent(self)

    def forward(self, x: Any) -> GaussianMixture:
        """Mixture over y, ``batch_shape`` ``(*batch,)``, for inputs ``(*batch, dim_in)``, in the units of y.

        Its numbers are tensors with a graph, so that gradients can flow to the weights; :meth:`predict` gives arrays.

        Args:
            x: Inputs ``(*batch, dim_in)``: a tensor, array, data frame or nested lists of numbers.

        Raises:
            ValueError: If the shape, dtype or device of x does not fit or, when Pyro validates, if x is not finite.
        """
        try:
            return self.head(self.features(x))
        except RuntimeError as error:
            _require_single_weights(self, error)
            raise

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        r"""Negative log-likelihood :math:`-\log p(y \mid x)` in nats and the units of y, shape ``(*batch,)``.

        That of the mixture that a call gives, which is not built unless a hook or a ``forward`` of your own may
        change it.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``. An entry that is NaN was
                not observed: the density is that of the others.
            replicated: Whether there may be several targets for each input, ``(*sample, *batch, D)``, and so losses
                ``(*sample, *batch)``.

        Raises:
            ValueError: If shapes, dtypes or devices do not agree or, when Pyro validates, if a value is infinite or
                one of x NaN.
        """
        with self._context(warns=True):
            if not self.is_described_by_raw:
                mixture = self(x)
                return -mixture.log_prob(self.targets(y, mixture.batch_shape, replicated=replicated))
            features = self.features(x)
            y = self.targets(y, features.shape[:-1], replicated=replicated)
            return -self.head.log_prob(features, complete_when_run(y))

    def sample(self, x: Any, sample_shape: int | Sequence[int] = (), *, temperature: float = 1.0) -> Tensor:
        r"""Draws of y given x, shape ``(*sample_shape, *batch, D)``.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            sample_shape: Shape of independent draws for each input, or their number.
            temperature: :math:`\tau > 0` divides the logits by τ and multiplies the scales by √τ: below 1 draws
                are more cautious, above 1 more adventurous (Ha & Schmidhuber, 2018, World Models).

        Raises:
            ValueError: If x is not usable, or ``sample_shape`` or the temperature is not what they have to be.
        """
        sample_shape = sample_shape_of(sample_shape)
        with torch.no_grad(), self._context(warns=True):
            return self(x).temper(temperature).sample(sample_shape)

    def predict(self, x: Any, *, chunk_size: int = 1024) -> Prediction:
        """Predict rows: means, quantiles, intervals and draws as NumPy arrays or a data frame, without gradients.

        The network is in evaluation mode meanwhile: dropout and batch normalisation do not make predictions random.

        Args:
            x: Inputs ``(N, ..., dim_in)`` of any container and on any device.
            chunk_size: Rows that go through the network at once, on its device. The first dimension of x is taken apart
                without asking: a backbone whose rows depend on each other needs ``chunk_size=len(x)``.

        Raises:
            ValueError: If x is not usable, or if there are latent weights, which only a posterior has values of.

        >>> network = MixtureDensityNetwork(dim_in=2, dim_out=1)
        >>> network.predict([[0.0, 1.0], [2.0, 3.0]]).mean.shape
        (2, 1)
        """
        if self.latent:
            instead = "Prediction(posterior_predictive(network, posterior, x).pool(0), like=x)"
            raise ValueError(f"network: expected no latent weights, got some: use {instead}")
        with evaluating(self):
            return predicted_in_parts(self, x, self, chunk_size)

    def model(
        self,
        x: Any,
        y: Any = None,
        *,
        num_data: int | None = None,
        name: str = "y",
        plate: str = "data",
    ) -> Tensor:
        """Pyro model of y given x: a plate ``"data"`` around a site ``"y"``.

        For two networks in one program, or a program with such sites of its own, give other names;
        ``functools.partial(network.model, name="z", plate="rows")`` and :class:`pyro_mdn.NetworkModel` are models with
        names for guides, SVI, NUTS and ``Predictive``.

        Args:
            x: Inputs ``(N, ..., dim_in)``; the first dimension is the plate's, further ones belong to the event.
            y: Targets ``(N, ..., D)`` to condition on, if any. For D = 1, ``(N, ...)`` is read as ``(N, ..., 1)``. An
                entry that is NaN was not observed.
            num_data: Size of the whole data when x is a minibatch of it: the likelihood is scaled to it.
            name: Name of the site.
            plate: Name of the plate.

        Warns:
            UserWarning: If Pyro's parameter store has another network's weights under the same names: SVI trains those.
        """
        with self._context():
            # Weights are global, so the network is evaluated outside the plate.
            x = self.inputs(x)
            mixture = nn.Module.__call__(self, x)  # a call, but for the context, which there is
            self.require_batch(x)
            size = len(x) if num_data is None else num_data
            if size < len(x):
                raise ValueError(f"num_data: expected at least the batch of {len(x)}, got {num_data}")
            obs = None if y is None else self.targets(y, mixture.batch_shape, replicated=True)
            if obs is not None and torch.is_grad_enabled():
                self._warn_of_strangers()
            # A given subsample spares the plate a permutation of the whole data.
            with pyro.plate(plate, size, subsample=torch.arange(len(x), device=x.device), dim=-1):
                return pyro.sample(name, mixture.to_event(len(mixture.batch_shape) - 1), obs=obs)

    def _warn_of_strangers(self) -> None:
        """Warn if the parameter store has the head of another network in the place of this one's: SVI trains that."""
        head = own_modules(self)["head"]
        if isinstance(head, PyroModule) or head is None:
            return  # Pyro puts the store's parameters into its own modules
        prefix = name_in_store(self, "head$$$")
        for name, parameter in head.named_parameters():
            if stored_parameter(prefix + name, parameter) is not parameter and parameter.requires_grad:
                there = "network: Pyro's parameter store has weights of another network under the same names"
                warnings.warn(f"{there}, and SVI trains those: pyro.clear_param_store() first", stacklevel=2)
                return

    @torch.no_grad()
    def initialize_(self, x: Any, y: Any) -> None:
        """Set the scalers from data, and spread the components over the targets.

        Where nothing was observed, as at the padding of sequences, inputs do not count either.

        Args:
            x: Inputs ``(*batch, dim_in)``. A column that is constant is only shifted.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``. Entries may be NaN.

        Raises:
            ValueError: If :meth:`check` does; nothing is changed then.
        """
        x, y = self.check(x, y)
        observed = ~y.isnan().all(-1)
        if not bool(observed.all()):
            x, y = x[observed], y[observed]
        shift, scale = kernels.location_and_scale(x.reshape(-1, *self.input_shape).cpu())
        self.head.initialize_(y.reshape(-1, self.dim_out))
        self.x_shift.copy_(shift)
        self.x_scale.copy_(scale)

    @property
    def initialized(self) -> bool:
        """Whether scalers were set; see :meth:`initialize_`."""
        shifts, scales = (self.x_shift, self.head.shift), (self.x_scale, self.head.scale)
        return any(bool((shift != 0).any()) for shift in shifts) or any(bool((scale != 1).any()) for scale in scales)

    # Checks

    @torch.no_grad()
    def check(self, x: Any, y: Any, *, given: tuple[Any, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Check data as a whole, running the network on one row, and return them as tensors, y ``(*batch, D)``.

        Args:
            x: Inputs ``(*batch, dim_in)``.
            y: Targets ``(*batch, D)``. For D = 1, ``(*batch,)`` is read as ``(*batch, 1)``.
            given: What x and y were converted from, whose names of rows and columns errors have.

        Raises:
            ValueError: If shapes, dtypes or devices do not agree, if there are no data, if some are not finite, or if
                the range of a column is beyond that of the network's precision; a target may be NaN where it was not
                observed, but not a whole column.
        """
        given_x, given_y = given or (x, y)
        x = self.inputs(x)
        self.require_batch(x)
        if x.numel() == 0:
            raise ValueError(f"x: expected data, got shape {tuple(x.shape)}")
        with self._context(), evaluating(self):
            features = self.features(x[:1])
        y = self.targets(y, self._batch_shape(x)[: features.ndim - 1])
        require_finite(x, "x", given_x, self.x_shift.dtype)
        require_no_infinity(y, "y", given_y, self.x_shift.dtype)
        unobserved = y.isnan().reshape(-1, self.dim_out).all(0)
        if bool(unobserved.any()):
            raise ValueError(
                f"y: expected an observed target in each column, got none in {unobserved.nonzero().flatten().tolist()}"
            )
        require_range(x.reshape(-1, *self.input_shape), "x", self.x_shift.dtype)
        require_range(y.reshape(-1, self.dim_out), "y", self.x_shift.dtype)
        return x, y

    def features(self, x: Any) -> Tensor:
        """What the backbone makes of inputs x, ``(*batch, hidden_dim)``."""
        x = self.inputs(x)
        batch_shape = self._batch_shape(x)
        shift, scale = self._units()
        features = self.backbone(((x - shift) / scale).to(self.weight_dtype))
        n = features.ndim - 1 if isinstance(features, Tensor) else -1
        if n < min(1, len(batch_shape)) or features.shape != (*batch_shape[:n], self.hidden_dim[-1]):
            expected = f"features (*batch, {self.hidden_dim[-1]}) for x of shape {tuple(x.shape)}"
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"backbone: expected {expected}, got {got}")
        return features

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision of the weights, and of what the backbone is given; scalers have single precision at least."""
        head: Any = own_modules(self)["head"]
        linear: Any = own_modules(head)["linear"]
        weight = own_parameters(linear).get("weight", own_buffers(linear).get("weight_start"))
        if weight is None:  # a layer of the user's, or one whose weight is computed
            weight = next(linear.parameters(), self._units()[0])
        return weight.dtype

    def _units(self) -> tuple[Tensor, Tensor]:
        """Scalers of x; Pyro takes microseconds over an attribute of its modules."""
        buffers: Any = own_buffers(self)
        return buffers["x_shift"], buffers["x_scale"]

    def require_batch(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless inputs have a dimension of rows."""
        if x.ndim == len(self.input_shape):
            raise ValueError(f"x: expected a batch of inputs, got one of shape {tuple(x.shape)}")

    def _batch_shape(self, x: Tensor) -> torch.Size:
        return x.shape[: x.ndim - len(self.input_shape)]

    def inputs(self, x: Any) -> Tensor:
        """Convert inputs of any container to a tensor ``(*batch, dim_in)`` on the device of the network.

        Raises:
            ValueError: If there is something else than numbers, if a tensor is on another device, if the shape does
                not fit or, when Pyro validates, if a number is not finite in the precision of the network.
        """
        unit = self._units()[0]
        n, given, x = len(self.input_shape), x, as_tensor(x, "x", unit.device)
        _require_device(x, "x", unit.device)
        if x.ndim < n or x.shape[x.ndim - n :] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: expected shape (*batch, {expected}), got {tuple(x.shape)}")
        if is_validation_enabled() and is_known(x):
            require_finite(x, "x", given, unit.dtype)
        return x

    def targets(self, y: Any, batch_shape: torch.Size, *, replicated: bool = False) -> Tensor:
        """Convert targets of any container to ``(*batch, D)``; if ``replicated``, perhaps with further dimensions left.

        Raises:
            ValueError: If there is something else than numbers, if the shape or the device of a tensor does not fit
                or, when Pyro validates, if a value is infinite, or beyond the precision of the network.
        """
        unit = self._units()[0]
        given, y = y, as_tensor(y, "y", unit.device)
        _require_device(y, "y", unit.device)
        y = y.unsqueeze(-1) if self.dim_out == 1 and y.shape == batch_shape else y
        expected = (*batch_shape, self.dim_out)
        if y.shape[max(0, y.ndim - len(expected)) if replicated else 0 :] != expected:
            raise ValueError(f"y: expected shape {expected} as x has it, got {tuple(y.shape)}")
        if is_validation_enabled() and is_known(y):
            require_no_infinity(y, "y", given, unit.dtype)
        return y

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write configuration and tensors to one safetensors file; a file already there is replaced as a whole.

        Hooks, and what was put into the head in place of its own layers, are not in the file: :meth:`load` warns then.
        A backbone of other layers than those of ``hidden_dim`` is not in it either, however it came there.

        Raises:
            ValueError: If there are latent weights: what was learned of them is in the guide or the samples. Or if the
                head has other tensors than :meth:`load` builds, as parametrised or pruned layers have: the error says
                how to make plain ones of them. Nothing is written then.
        """
        config, state = self.config(), self.state_dict()
        expected, got = shapes_outside_backbone(self)
        if expected != got and not _builds(self, config):
            require_loadable(self, expected, got)
        tensor_files.write_tensors(path, config, state)

    def config(self) -> dict[str, Any]:
        """What to build a network like this from, in plain values, and what it is to be compared with then.

        Raises:
            ValueError: If there are latent weights.
        """
        if self.latent:
            raise ValueError("network: expected no latent weights: save it before bayesianize, and the posterior apart")
        return {
            "dim_in": list(self.input_shape),
            "dim_out": self.dim_out,
            "n_components": self.n_components,
            "hidden_dim": list(self.hidden_dim),
            "noise": noise_to_config(self.head.noise),
            "custom_backbone": _is_custom(self.backbone, [*self.input_shape, *self.hidden_dim]),
            "structure": described(network=self, buffers=False, code=False, values=False),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> Self:
        """Read a network that :meth:`save` wrote, into evaluation mode; nothing in the file is executed.

        Args:
            path: The file.
            backbone: A module of the same architecture, where the network was built with one, or its hidden layers were
                changed; its weights are taken from the file.

        Raises:
            ValueError: If the file is damaged, not from here, or does not fit the backbone, which stays as it was; or
                if there is no backbone where the file needs one.

        Warns:
            UserWarning: If the network that was saved had other types, attributes or hooks, which are named.
        """
        config, tensors = tensor_files.read_tensors(path)
        network = cls.from_config(config, str(path), backbone=backbone)
        tensor_files.require_fitting(str(path), network.state_dict(), tensors)
        network.to(tensors["head.linear.weight"].dtype).load_state_dict(tensors)
        warn_if_unlike(network, config, str(path))
        return network.eval()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str, *, backbone: nn.Module | None = None) -> Self:
        """Build the network that :meth:`config` described; a ``ValueError`` that names the source if it is not one."""
        config = dict(config)
        if "custom_backbone" not in config:
            kind = "an ensemble" if "ensemble" in config else "another file of this library"
            raise ValueError(f"{source}: expected a network, got {kind}")
        structure = config.pop("structure", {})
        _require_backbone(source, config.pop("custom_backbone"), backbone, structure)
        try:
            noise = noise_from_config(config.pop("noise"))
            with own_generators():  # the first weights do not stay
                return cls(**config, noise=noise, backbone=backbone)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source}: expected the configuration of a network, got {config}") from error


def shapes_outside_backbone(network: MixtureDensityNetwork) -> tuple[Shapes, Shapes]:
    """Shapes by name of the tensors that a new network of these settings has, and of those of this one."""
    with torch.device("meta"):
        head = MixtureHead(network.hidden_dim[-1], network.dim_out, network.n_components, noise=network.head.noise)
    expected = shapes_of({f"head.{name}": tensor for name, tensor in head.state_dict().items()})
    got = shapes_of(network.state_dict())
    units = dict.fromkeys(("x_shift", "x_scale"), network.input_shape)
    return {**expected, **units}, {name: shape for name, shape in got.items() if not name.startswith("backbone.")}


def _builds(network: MixtureDensityNetwork, config: Mapping[str, Any]) -> bool:
    """Whether a class of the user's builds a network with the tensors of this one."""
    if type(network).__init__ is MixtureDensityNetwork.__init__:
        return False
    try:
        backbone = copy.deepcopy(network.backbone) if config["custom_backbone"] else None
        built = type(network).from_config(config, "", backbone=backbone)
    except Exception:  # whatever its own code raises
        return False
    return shapes_of(built.state_dict()) == shapes_of(network.state_dict())


def warn_if_unlike(network: MixtureDensityNetwork, config: Mapping[str, Any], source: str) -> None:
    """Warn if a network is not built like the one that this configuration is of; what was added since does not count.

    Files of earlier versions do not say how it was built.
    """
    # Files of earlier versions have values in other forms, or in words, and name the classes that Pyro makes of others.
    forms = [(values, form) for form in FORMS for values in (False, True)]
    known = [described(network=network, buffers=False, code=False, values=values, form=form) for values, form in forms]
    then = {name: re.sub(r"^PyroModule\[(.+?)\]", r"\1", text) for name, text in config.get("structure", {}).items()}
    lost = [(name, text) for name, text in then.items() if all(text != k.get(name) for k in known)]
    if lost:
        told = "; ".join(f"{name}: {text}, now {known[0].get(name)}" for name, text in lost)
        warnings.warn(f"{source}: expected a network built like the one saved; {told}", stacklevel=3)


def _require_backbone(source: str, custom: Any, backbone: nn.Module | None, structure: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` unless there is a backbone exactly if a file needs one."""
    if custom is True and backbone is None:
        parts = [f"{name}: {text}" for name, text in structure.items() if name.startswith("network.backbone")]
        shown = "; ".join(part for part in parts if not part.endswith((": parameter", ": buffer")))
        like = f" that is built like this: {shown}" if shown else ""
        raise ValueError(f"{source}: expected backbone= with a module in place of the usual hidden layers{like}")
    if custom is not (backbone is not None):
        raise ValueError(f"{source}: expected no backbone=, since the file has the usual hidden layers, got one")


_MODES = threading.Lock()  # held for moments, never while code of others runs
_evaluated: dict[int, tuple[nn.Module, bool, list[int]]] = {}  # parts by id, with the mode they had, and who is inside


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part's own mode again once nobody is inside, in whatever thread."""
    parts, thread = [*module.modules()], threading.get_ident()
    with _MODES:
        for part in parts:
            _evaluated.setdefault(id(part), (part, part.training, []))[2].append(thread)
    try:
        module.eval()
        yield
    finally:
        with _MODES:
            for part in parts:
                _leave(part, thread)


def _leave(part: nn.Module, thread: int) -> None:
    """Count a thread out of the evaluation of a module; the last gives it the mode it had."""
    _, training, inside = _evaluated[id(part)]
    inside.remove(thread)
    if not inside:
        part.training = training
        del _evaluated[id(part)]


def _leave_for_others() -> None:
    """Count out, in a process that was forked, the threads that are not there any more."""
    global _MODES
    _MODES = threading.Lock()  # one of them may have held it
    for part, _, inside in [*_evaluated.values()]:
        for thread in {*inside} - {threading.get_ident()}:
            for _ in range(inside.count(thread)):
                _leave(part, thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_for_others)


def _require_single_weights(network: MixtureDensityNetwork, error: Exception) -> None:
    """Raise a ``ValueError`` from an error if latent weights were drawn in a plate, with further dimensions."""
    for name, part in network.named_modules():
        for leaf in latent_parameters(part):
            start, value = own_buffers(part).get(f"{leaf}_start"), getattr(part, leaf)
            if start is not None and value.shape != start.shape:
                expected = f"{name}.{leaf} of shape {tuple(start.shape)}, outside of plates"
                instead = "fit(guide=, num_particles=) and posterior_predictive have many draws in one pass"
                got = f"{tuple(value.shape)}, as vectorize_particles=True and parallel=True have it"
                raise ValueError(f"network: expected {expected}, got {got}; {instead}") from error


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers = [(nn.Linear if i else FirstLinear)(a, b) for i, (a, b) in enumerate(pairwise(widths))]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.GELU())))


def _is_custom(backbone: nn.Module, widths: Sequence[int]) -> bool:
    """Whether a backbone is another than the hidden layers of these widths, apart from weights and hooks."""
    with torch.device("meta"):
        usual = _mlp(widths)
    structures = (described(backbone=module, hooks=False, buffers=False) for module in (backbone, usual))
    return bool(differing(*structures))


class FirstLinear(nn.Linear):
    """Linear layer with initial weights three times those of torch, for inputs of unit scale.

    What it gives has a variance of 3 then, so that the network starts with features that vary within the range of the
    data. From the small weights of torch, jumps between the levels of an input take far longer to learn.
    """

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(3.0)


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    sizes = [value] if isinstance(value, Integral) else value
    if not isinstance(sizes, Iterable) or not (sizes := [*sizes]) or not all(map(is_count, sizes)):
        raise ValueError(f"{name}: expected a positive integer or a sequence of them, got {shown(value)}")
    return tuple(map(int, sizes))


def _require_device(value: Tensor, name: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
