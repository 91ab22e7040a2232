r"""Deep ensembles: networks of one architecture, side by side."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.distributions.predictions import Prediction, predicted_in_parts
from pyro_mdn.networks.batched.functional import MixtureTensors, in_parts, in_passes, over_draws
from pyro_mdn.networks.batched.layers import dense_cost, dense_raw, is_dense
from pyro_mdn.networks.files import require_loadable
from pyro_mdn.networks.network import MixtureDensityNetwork, evaluating, shapes_outside_backbone, warn_if_unlike
from pyro_mdn.networks.starting_point import draw_anew_
from pyro_mdn.support import tensor_files
from pyro_mdn.support.arrays import as_tensor, require_no_infinity
from pyro_mdn.support.checks import is_known, require_counts, shown
from pyro_mdn.support.fingerprint import described, differing, incomparable
from pyro_mdn.support.process_state import isolated, require_seed, seeded
from pyro_mdn.support.torch_compat import REGISTERED, own_buffers, own_parameters

__all__ = ["DeepEnsemble"]

M = TypeVar("M", bound=nn.Module | None)
_OF_CLASSES = ("__dict__", "__weakref__")  # what each class makes for itself


class DeepEnsemble(nn.Module):
    r"""Networks of one architecture that differ in their weights; together, their average density.

    .. math:: p(y \mid x) = \frac1M \sum_{m=1}^M p_m(y \mid x)

    exactly a mixture of M·K components. :func:`pyro_mdn.fit` trains all members in one vectorised pass, each from its
    own initial weights, on its own split of the rows, in its own order, and up to its own best epoch.

    Args:
        network: Network of the architecture; it is copied, and each member initialised anew, but for parameters that
            do not require a gradient. Or a sequence of networks, which become the members as they are.
        size: Number of members M; by default 10.
        seed: Seed of the members' first weights. By default they come from torch's generator, which a seed leaves
            alone. Networks of a sequence have theirs already, and take none.
        bootstrap: Whether each member trains on rows drawn with replacement from its training rows (Breiman, 1996).

    Attributes:
        stacked: Network whose tensors have a leading axis of members; not to be called.

    Raises:
        ValueError: If the size is not positive, if there is a seed beside a sequence, if networks have latent weights,
            if they differ in more than the values of their tensors (types, attributes, hooks), if layers share tensors,
            or if a layer has no ``reset_parameters`` to initialise it anew.

    Warns:
        UserWarning: If networks have attributes that cannot be compared, such as a lock; those of the first are used.

    References:
        Lakshminarayanan, Pritzel & Blundell (2017), Simple and scalable predictive uncertainty estimation using deep
        ensembles.

    >>> ensemble = DeepEnsemble(MixtureDensityNetwork(2, 1, n_components=3), size=4)
    >>> ensemble(torch.randn(5, 2))
    GaussianMixture(batch_shape=(5,), n_components=12, dim=1, covariance=DiagonalCovariance)
    >>> ensemble.members(torch.randn(5, 2)).batch_shape
    torch.Size([4, 5])
    """

    stacked: MixtureDensityNetwork
    size: int
    bootstrap: bool

    def __init__(
        self,
        network: MixtureDensityNetwork | Sequence[MixtureDensityNetwork],
        size: int | None = None,
        *,
        bootstrap: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require_counts(size=size)
        require_seed(seed)
        if isinstance(network, MixtureDensityNetwork):
            with seeded(seed):
                members = [_initialized_anew(network) for _ in range(size or 10)]
        else:
            members = list(network)
            if seed is not None:
                raise ValueError(f"seed: expected none beside networks with weights of their own, got {shown(seed)}")
            if not members or size not in (None, len(members)):
                raise ValueError(f"size: expected one network at least, and as many as size={size}, got {len(members)}")
        self.stacked, self.size, self.bootstrap = _stack(members), len(members), bootstrap
        if not isinstance(network, MixtureDensityNetwork):
            _warn_if_unsure(members)

    def extra_repr(self) -> str:
        """Describe the ensemble in a module's printout."""
        return f"size={self.size}, bootstrap={self.bootstrap}"

    def forward(self, x: Any) -> GaussianMixture:
        """Average of the members' densities over y, ``batch_shape`` ``(*batch,)``, for inputs ``(*batch, dim_in)``."""
        return self.members(x).pool(0)

    def members(self, x: Any, which: Tensor | slice = slice(None), *, chunk_size: int | None = None) -> GaussianMixture:
        """Mixture over y by each member, ``batch_shape`` ``(M, *batch)``, for inputs ``(*batch, dim_in)``.

        Args:
            x: Inputs.
            which: Positions of the members, by default all.
            chunk_size: Members in one pass at most. By default all where there are gradients or in training mode, and
                otherwise as many as keep intermediate results at about 16 MB, with parts of the rows one after another
                where one member takes more.
        """
        x = self.stacked.inputs(x)
        tensors = {name: tensor[which] for name, tensor in self._tensors().items()}
        if not self.stacked.is_described_by_raw:
            return self._called(x, tensors, shared=True, chunk_size=chunk_size)
        raw = self._raw(x, tensors, shared=True, chunk_size=chunk_size)
        shift, scale = (self._unit(tensors[f"head.{name}"], raw[0].ndim - 1) for name in ("shift", "scale"))
        return self.stacked.head.mixture(raw, shift, scale)

    def predict(self, x: Any, *, chunk_size: int = 1024) -> Prediction:
        """Predict rows by the average density; see :meth:`MixtureDensityNetwork.predict`."""
        with evaluating(self):
            return predicted_in_parts(self, x, self.stacked, chunk_size)

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        r"""Negative log-likelihood :math:`-\log p_m(y \mid x)` of each member's own rows, ``(M, *batch)``, in nats.

        Args:
            x: Inputs ``(M, *batch, dim_in)``, those of each member.
            y: Targets ``(M, *batch, D)``.
            replicated: Whether there may be several targets for each input, ``(*sample, M, *batch, D)``, and so losses
                ``(*sample, M, *batch)``.

        Raises:
            ValueError: If the shapes do not agree or, when Pyro validates, if a value is infinite or one of x NaN.
        """
        x, y = self.stacked.inputs(x), as_tensor(y, "y", self.stacked.x_shift.device)
        if x.ndim == len(self.stacked.input_shape) or len(x) != self.size:
            raise ValueError(f"x: expected shape ({self.size}, *batch, ...), got {tuple(x.shape)}")
        tensors = self._tensors()
        if not self.stacked.is_described_by_raw:
            mixture = self._called(x, tensors, shared=False)
            self._require_targets(y, mixture.batch_shape, replicated=replicated)
            return -mixture.log_prob(y)
        raw = self._raw(x, tensors, shared=False)
        self._require_targets(y, raw[0].shape[:-1], replicated=replicated)
        shift, scale = (self._unit(tensors[f"head.{name}"], raw[0].ndim - 1) for name in ("shift", "scale"))
        return -self.stacked.head.log_density(raw, y, shift, scale)

    def _require_targets(self, y: Tensor, batch_shape: torch.Size, *, replicated: bool) -> None:
        expected = (*batch_shape, self.stacked.dim_out)
        if y.shape[-len(expected) if replicated else 0 :] != expected:
            raise ValueError(f"y: expected shape {expected} as x has it, got {tuple(y.shape)}")
        if is_validation_enabled() and is_known(y):
            require_no_infinity(y, "y", None, self.stacked.x_shift.dtype)

    def member(self, i: int) -> MixtureDensityNetwork:
        """Member number i as a network of its own: a copy."""
        network = _copied(self.stacked)
        _set_tensors(network, {name: tensor[i] for name, tensor in self._tensors().items()})
        return network

    @torch.no_grad()
    def initialize_(self, x: Tensor, y: Tensor) -> None:
        """Set the scalers of each member from its own rows, and spread its components over its targets.

        Args:
            x: Inputs ``(M, *batch, dim_in)``, those of each member.
            y: Targets ``(M, *batch, D)``, likewise.
        """
        for i in range(self.size):
            member = self.member(i)
            member.initialize_(x[i], y[i])
            self._take_over(i, member)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of all members anew, but for frozen ones."""
        for i in range(self.size):
            member = self.member(i)
            draw_anew_(member)
            self._take_over(i, member)

    def _take_over(self, i: int, member: MixtureDensityNetwork) -> None:
        """Give member number i the tensors of a network."""
        tensors = self._tensors()
        for name, tensor in member.state_dict().items():
            tensors[name][i].copy_(tensor)

    def _raw(
        self, x: Tensor, tensors: dict[str, Tensor], *, shared: bool, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw parameters ``(M, *batch, ...)`` of the mixtures, for inputs that members share or have each their own."""
        if is_dense(self.stacked):

            def dense(tensors: Any, x: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
                return dense_raw(self.stacked, x.unsqueeze(0) if shared else x, tensors, chunk_size=chunk_size)

            if not (shared and chunk_size is None and self._in_passes(x, tensors)):
                return dense(tensors, x, chunk_size)
            logits, locs, noise = in_parts(dense, dense_cost(self.stacked, tensors), tensors, x)
            return logits, locs, noise
        raw = _Raw(self.stacked)

        def call(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
            return functional_call(raw, {f"network.{name}": tensor for name, tensor in tensors.items()}, (x,))

        logits, locs, noise = self._of_each(call, x, tensors, shared, chunk_size)
        return logits, locs, noise

    def _called(
        self, x: Tensor, tensors: dict[str, Tensor], *, shared: bool, chunk_size: int | None = None
    ) -> GaussianMixture:
        """Mixtures that calls of the networks give, ``(M, *batch)``."""
        called = MixtureTensors(lambda tensors, x: functional_call(self.stacked, tensors, (x,)))
        return called.mixture(*self._of_each(called, x, tensors, shared, chunk_size))

    def _of_each(
        self, call: Callable[..., Any], x: Tensor, tensors: dict[str, Tensor], shared: bool, chunk_size: int | None
    ) -> tuple[Tensor, ...]:
        """Results ``(M, *batch, ...)`` of a function of a member's tensors and of inputs."""
        with isolated():
            if shared and chunk_size is None and self._in_passes(x, tensors):
                return in_passes(call, tensors, x, self.stacked)

            def member(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
                own = x if shared else draw.pop("x")
                return call(draw, own)

            return over_draws(member, tensors if shared else {**tensors, "x": x}, self.stacked, chunk_size=chunk_size)

    def _in_passes(self, x: Tensor, tensors: dict[str, Tensor]) -> bool:
        """Whether intermediate results are not needed any more, and rows go through each member by themselves."""
        kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors.values()))
        training = any(part.training for part in self.stacked.modules())  # batch norm, and the noise of dropout
        return x.ndim > len(self.stacked.input_shape) and not (kept or training)

    def _unit(self, tensor: Tensor, batch_dim: int) -> Tensor:
        """Shape ``(M, D)`` for a batch ``(M, ...)`` of mixtures."""
        return tensor.reshape(len(tensor), *(1,) * (batch_dim - 1), -1)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.stacked.named_parameters()), **dict(self.stacked.named_buffers())}

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write configuration and tensors to one safetensors file; a file already there is replaced as a whole.

        Raises:
            ValueError: If the networks have other tensors than :meth:`load` builds, apart from a backbone's, as
                parametrised or pruned layers of a head have: the error says how to make plain ones of them. Nothing is
                written then.
        """
        config = {"ensemble": self.stacked.config(), "size": self.size, "bootstrap": self.bootstrap}
        expected, got = shapes_outside_backbone(self.stacked)
        expected = {name: (self.size, *shape) for name, shape in expected.items()}
        require_loadable(self.stacked, expected, got, of_members=True)
        tensor_files.write_tensors(path, config, self.stacked.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> Self:
        """Read an ensemble that :meth:`save` wrote, into evaluation mode; nothing in the file is executed.

        Args:
            path: The file.
            backbone: A module of the same architecture, where the networks were built with one, or their hidden layers
                were changed.

        Raises:
            ValueError: If the file is damaged, not from here, or does not fit the backbone, which stays as it was; or
                if there is no backbone where the file needs one.

        Warns:
            UserWarning: If the networks that were saved had other types, attributes or hooks, which are named.
        """
        config, tensors = tensor_files.read_tensors(path)
        if not isinstance(config.get("ensemble"), dict) or not isinstance(config.get("size"), int):
            raise ValueError(f"{path}: expected an ensemble, got another file of this library")
        network = MixtureDensityNetwork.from_config(config["ensemble"], str(path), backbone=_copied(backbone))
        ensemble = cls([network] * config["size"], bootstrap=bool(config.get("bootstrap")))
        tensor_files.require_fitting(str(path), ensemble.stacked.state_dict(), tensors)
        ensemble.to(tensors["head.linear.weight"].dtype)
        ensemble.stacked.load_state_dict(tensors)
        warn_if_unlike(ensemble.stacked, config["ensemble"], str(path))
        return ensemble.eval()


class _Raw(nn.Module):
    """A network whose call gives the raw parameters of its mixtures, away from Pyro's handlers."""

    def __init__(self, network: MixtureDensityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.network.head.raw(self.network.features(x))


def _initialized_anew(network: MixtureDensityNetwork) -> MixtureDensityNetwork:
    """Copy of a network with fresh weights, but for frozen ones."""
    network = _copied(network)
    draw_anew_(network)
    return network


def _stack(members: Sequence[MixtureDensityNetwork]) -> MixtureDensityNetwork:
    """Network with the tensors of all members along a new first axis."""
    for member in members:
        if not isinstance(member, MixtureDensityNetwork):
            raise ValueError(f"network: expected MixtureDensityNetwork, got {type(member).__name__}")
        if member.latent:
            raise ValueError("network: expected no latent weights: see posterior_predictive for these")
        _require_alike(members[0], member)
        every = [*member.named_parameters(remove_duplicate=False), *member.named_buffers(remove_duplicate=False)]
        if len({id(tensor) for _, tensor in every}) != len(every):
            raise ValueError("network: expected tensors of their own in each layer, got some that layers share")
    stacked = _copied(members[0])
    states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in members]
    _set_tensors(stacked, {name: torch.stack([state[name].detach() for state in states]) for name in states[0]})
    return stacked


def _warn_if_unsure(members: Sequence[MixtureDensityNetwork]) -> None:
    """Warn if networks that are not one and the same have attributes that cannot be compared."""
    names = incomparable(described(network=members[0], buffers=False))
    if names and any(member is not members[0] for member in members):
        text = f"network: cannot tell whether these agree in all networks, and use those of the first: {names}"
        warnings.warn(text, stacklevel=3)


def _copied(network: M) -> M:
    """Copy of a module. Attributes that cannot be copied, such as a lock, are shared with it."""
    copied = _deeply_copied(network)
    for part in [] if copied is None else copied.modules():
        kind = type(part)
        # torch makes a class for each parametrised module, which copies share: what removes the parametrization of one
        # would take the weights of all.
        if parametrize.is_parametrized(part) and kind.__module__ == parametrize.__name__:
            members = {name: member for name, member in vars(kind).items() if name not in _OF_CLASSES}
            alike: Any = type(kind.__name__, kind.__bases__, members)
            part.__class__ = alike
    return copied


def _deeply_copied(network: M) -> M:
    try:
        return copy.deepcopy(network)
    except Exception:  # whatever an attribute's own code raises
        modules = [] if network is None else network.modules()
        values = [value for part in modules for name, value in vars(part).items() if name not in REGISTERED]
        return copy.deepcopy(network, {id(value): value for value in values if not _can_be_copied(value)})


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever its own code raises
        return False
    return True


def _require_alike(first: MixtureDensityNetwork, member: MixtureDensityNetwork) -> None:
    """Raise a ``ValueError`` unless two networks differ in the values of their tensors alone."""
    # Buffers are stacked, so that each member has its own.
    a, b = (described(network=network, buffers=False) for network in (first, member))
    if names := differing(a, b):
        got = f"{a.get(names[0])} and {b.get(names[0])} for {names[0]}"
        others = f", and others for {names[1:]}" if names[1:] else ""
        raise ValueError(f"network: expected networks of one architecture, got {got}{others}")
    if names := sorted({name for name, *_ in _tensors(member) ^ _tensors(first)}):
        kinds = "one shape, dtype and requires_grad"
        raise ValueError(f"network: expected tensors of {kinds} in all networks, got others for {names}")


def _tensors(network: nn.Module) -> set[tuple[str, torch.Size, torch.dtype, bool]]:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


def _set_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors of any shape in place of parameters and buffers."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        part = network.get_submodule(path)
        if leaf in (buffers := own_buffers(part)):
            buffers[leaf] = tensor.detach().clone()
        else:
            trained = (parameters := own_parameters(part))[leaf]
            parameters[leaf] = nn.Parameter(
                tensor.detach().clone(), requires_grad=trained is not None and trained.requires_grad
            )
