r"""Deep ensembles: networks of one architecture that predict by their average density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.func import functional_call

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import TargetsOrTensor, as_targets
from pyro_mdn.distributions.units.units import Units
from pyro_mdn.networks import inputs
from pyro_mdn.networks.batched.functional import MixtureTensors, in_parts, in_passes, over_draws
from pyro_mdn.networks.batched.layers import aligned, dense_cost, dense_raw, is_dense
from pyro_mdn.networks.batched.stacking import copied, set_tensors, stack, warn_if_unsure
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.predictor import Predictor
from pyro_mdn.networks.raw_parameters import Raw
from pyro_mdn.networks.rows import require_usable
from pyro_mdn.networks.starting_point import draw_anew_
from pyro_mdn.support.checks import require_counts, shown
from pyro_mdn.support.process_state import isolated, require_seed, seeded

__all__ = ["DeepEnsemble"]


class DeepEnsemble(Predictor):
    r"""Ensemble of networks of one architecture that differ in their weights; it predicts by their average density.

    .. math:: p(y \mid x) = \frac1M \sum_{m=1}^M p_m(y \mid x)

    which is exactly a mixture of M·K components. :func:`pyro_mdn.fit` trains all members in one vectorised pass, each
    from its own initial weights, on its own split of the rows, in its own order, with early stopping of its own.

    Args:
        network: Network of the architecture. Each member is a copy with new initial weights, except for parameters that
            do not require a gradient. Or a sequence of networks, which become the members as they are.
        size: Number of members M; by default 10.
        seed: Seed of the members' initial weights. Without a seed, they are drawn from torch's global generator; with
            one, that generator stays as it was. A sequence of networks takes no seed.
        bootstrap: Whether each member trains on rows drawn with replacement from its training rows (Breiman, 1996).

    Attributes:
        stacked: Network whose tensors have a leading axis of members. Do not call it.

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
        self.stacked, self.size, self.bootstrap = stack(members), len(members), bootstrap
        if not isinstance(network, MixtureDensityNetwork):
            warn_if_unsure(members)

    @property
    def architecture(self) -> MixtureDensityNetwork:
        """The network ``stacked``."""
        return self.stacked

    @property
    def num_members(self) -> int:
        """Number of members M."""
        return self.size

    def extra_repr(self) -> str:
        """Describe the ensemble in a module's printout."""
        return f"size={self.size}, bootstrap={self.bootstrap}"

    def forward(self, x: Any) -> Mixture:
        """Predict the average of the members' densities, ``batch_shape`` ``(*batch,)``, for ``(*batch, dim_in)``."""
        return self.members(x).pool(0)

    def members(self, x: Any, which: Tensor | slice = slice(None), *, chunk_size: int | None = None) -> Mixture:
        """Predict the mixture over y by each member, ``batch_shape`` ``(M, *batch)``, for inputs ``(*batch, dim_in)``.

        Args:
            x: Inputs.
            which: Positions of the members, by default all.
            chunk_size: Largest number of members in one pass. By default all members, if gradients are recorded or in
                training mode; otherwise as many as keep intermediate results at about 16 MB. If one member takes more
                than that, the rows go in parts.
        """
        x = self.stacked.inputs(x)
        tensors = {name: tensor[which] for name, tensor in self._tensors().items()}
        if not self.stacked.is_described_by_raw:
            return self._called(x, tensors, shared=True, chunk_size=chunk_size)
        raw = self._raw(x, tensors, shared=True, chunk_size=chunk_size)
        return self.stacked.head.mixture(raw, self._units(tensors, raw[0].ndim - 1))

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        r"""Compute the negative log-likelihood :math:`-\log p_m(y \mid x)` of each member's own rows, ``(M, *batch)``.

        Args:
            x: Inputs ``(M, *batch, dim_in)``, those of each member.
            y: Targets ``(M, *batch, D)``.
            replicated: Whether each input may have several targets, ``(*sample, M, *batch, D)``; the losses then have
                shape ``(*sample, M, *batch)``.

        Raises:
            ValueError: If the shapes do not agree or, when Pyro validates, if a value is infinite or one of x NaN.
        """
        x, y = self.stacked.inputs(x), as_targets(y, "y", self.stacked.x_shift.device)
        if x.ndim == len(self.stacked.input_shape) or len(x) != self.size:
            raise ValueError(f"x: expected shape ({self.size}, *batch, ...), got {tuple(x.shape)}")
        tensors = self._tensors()
        if not self.stacked.is_described_by_raw:
            mixture = self._called(x, tensors, shared=False)
            self._require_targets(y, mixture.batch_shape, replicated=replicated)
            return -mixture.log_prob(y)
        raw = self._raw(x, tensors, shared=False)
        self._require_targets(y, raw[0].shape[:-1], replicated=replicated)
        return -self.stacked.head.log_density(raw, y, self._units(tensors, raw[0].ndim - 1))

    def _require_targets(self, y: TargetsOrTensor, batch_shape: torch.Size, *, replicated: bool) -> None:
        expected = (*batch_shape, self.stacked.dim_out)
        if y.shape[-len(expected) if replicated else 0 :] != expected:
            raise ValueError(f"y: expected shape {expected} as x has it, got {tuple(y.shape)}")
        if is_validation_enabled():
            require_usable(y, None, self.stacked.x_shift.dtype)

    def member(self, i: int) -> MixtureDensityNetwork:
        """Copy member number i to a network of its own."""
        network = copied(self.stacked)
        set_tensors(network, {name: tensor[i] for name, tensor in self._tensors().items()})
        return network

    @torch.no_grad()
    def initialize_(self, x: Tensor, y: TargetsOrTensor) -> None:
        """Set the scalers of each member from its own rows, and start its components at clusters of its targets.

        Args:
            x: Inputs ``(M, *batch, dim_in)``, those of each member.
            y: Targets ``(M, *batch, D)``, likewise.
        """
        # One warp for all members: otherwise their average would have one for each component.
        every = y.reshape(-1, self.dim_out)
        warp = self.stacked.head.transform.fit_warp(self.member(0).head.starting_points(every).cpu().double())
        for i in range(self.size):
            member = self.member(i)
            member.initialize_(x[i], y[i], warp=warp)
            self._take_over(i, member)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of all members anew, except for frozen parameters."""
        for i in range(self.size):
            member = self.member(i)
            draw_anew_(member)
            self._take_over(i, member)

    def _take_over(self, i: int, member: MixtureDensityNetwork) -> None:
        """Copy the tensors of a network to member number i."""
        tensors = self._tensors()
        for name, tensor in member.state_dict().items():
            tensors[name][i].copy_(tensor)

    def _raw(self, x: Tensor, tensors: dict[str, Tensor], *, shared: bool, chunk_size: int | None = None) -> Raw:
        """Compute raw parameters ``(M, *batch, ...)`` of the mixtures; members share inputs, or have each their own."""
        if is_dense(self.stacked):

            def dense(tensors: Any, x: Tensor, chunk_size: int | None) -> Raw:
                return dense_raw(self.stacked, x.unsqueeze(0) if shared else x, tensors, chunk_size=chunk_size)

            if not (shared and chunk_size is None and self._in_passes(x, tensors)):
                return dense(tensors, x, chunk_size)
            return in_parts(dense, dense_cost(self.stacked, tensors), tensors, x)
        raw = _Raw(self.stacked)

        def call(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
            return functional_call(raw, {f"network.{name}": tensor for name, tensor in tensors.items()}, (x,))

        return self._of_each(call, x, tensors, shared, chunk_size)

    def _called(self, x: Tensor, tensors: dict[str, Tensor], *, shared: bool, chunk_size: int | None = None) -> Mixture:
        """Compute mixtures by calls of the networks, ``(M, *batch)``."""
        called = MixtureTensors(lambda tensors, x: functional_call(self.stacked, tensors, (x,)))
        return called.mixture(*self._of_each(called, x, tensors, shared, chunk_size))

    def _of_each(
        self, call: Callable[..., Any], x: Tensor, tensors: dict[str, Tensor], shared: bool, chunk_size: int | None
    ) -> tuple[Tensor, ...]:
        """Compute results ``(M, *batch, ...)`` of a function of a member's tensors and of inputs."""
        with isolated():
            if shared and chunk_size is None and self._in_passes(x, tensors):
                return in_passes(call, tensors, x, self.stacked)

            def member(draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
                own = x if shared else draw.pop("x")
                return call(draw, own)

            return over_draws(member, tensors if shared else {**tensors, "x": x}, self.stacked, chunk_size=chunk_size)

    def _in_passes(self, x: Tensor, tensors: dict[str, Tensor]) -> bool:
        """Whether members and rows may go in parts: no gradients are recorded, and no layer is in training mode."""
        kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors.values()))
        training = any(part.training for part in self.stacked.modules())  # batch norm, and the noise of dropout
        return x.ndim > len(self.stacked.input_shape) and not (kept or training)

    def _units(self, tensors: dict[str, Tensor], batch_dim: int) -> Units:
        """Map to the units of y of each member, for a batch ``(M, ...)`` of mixtures."""
        head = self.stacked.head
        return head.units_of({name: aligned(tensors[f"head.{name}"], batch_dim) for name, _ in head.named_buffers()})

    def units(self, batch_dim: int) -> Units:
        """Map to the units of y of each member, for a batch ``(M, ...)`` with so many dimensions."""
        return self._units(self._tensors(), batch_dim)

    def input_units(self, batch_dim: int) -> Units:
        """Map to the standardised inputs of each member, for a batch ``(M, ...)`` with so many dimensions."""
        transform, tensors = self.stacked.input_transform, self._tensors()
        names = inputs.buffers_of(transform).values()
        return inputs.units_of(transform, {name: aligned(tensors[name], batch_dim) for name in names})

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.stacked.named_parameters()), **dict(self.stacked.named_buffers())}

    # Files

    def config(self) -> dict[str, Any]:
        """Describe the ensemble in plain values; see :meth:`MixtureDensityNetwork.config`."""
        return {"ensemble": self.stacked.config(), "size": self.size, "bootstrap": self.bootstrap}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str, *, backbone: nn.Module | None = None) -> Self:
        """Build the ensemble that :meth:`config` described, or raise a ``ValueError`` that names the source."""
        if not isinstance(config.get("ensemble"), dict) or not isinstance(config.get("size"), int):
            raise ValueError(f"{source}: expected an ensemble, got another file of this library")
        network = MixtureDensityNetwork.from_config(config["ensemble"], source, backbone=copied(backbone))
        return cls([network] * config["size"], bootstrap=bool(config.get("bootstrap")))


class _Raw(nn.Module):
    """Network whose call returns the raw parameters of its mixtures; Pyro's handlers do not see that call."""

    def __init__(self, network: MixtureDensityNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Raw:
        return self.network.head.raw(self.network.features(x))


def _initialized_anew(network: MixtureDensityNetwork) -> MixtureDensityNetwork:
    """Copy a network, and draw the weights of the copy anew, except for frozen parameters."""
    network = copied(network)
    draw_anew_(network)
    return network
