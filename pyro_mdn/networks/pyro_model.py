r"""A network as a Pyro model: the context of its calls, its sites, and the model as a module of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.support.process_state import KeepFrozen, own_generators, own_store
from pyro_mdn.support.pyro_compat import (
    am_i_wrapped,
    context_of,
    draws_or_registers,
    is_latent,
    latent_parameters,
    name_in_store,
    stored_parameter,
)
from pyro_mdn.support.torch_compat import own_buffers, own_modules

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork

__all__ = ["NetworkModel", "PyroNetwork", "require_single_weights"]


class PyroNetwork(PyroModule):
    """Network that is a Pyro model, and whose calls are plain PyTorch while no handler of Pyro is active.

    A plain call does not touch Pyro's global parameter store, where the weights of another network may be registered
    under the same names.
    """

    inputs: Callable[..., Tensor]
    targets: Callable[..., TargetsOrTensor]
    require_batch: Callable[[Tensor], None]

    @property
    def latent(self) -> bool:
        """Whether there are latent weights; see :func:`pyro_mdn.bayesianize`."""
        return is_latent(self)

    def calling(self, *, warns: bool = False) -> AbstractContextManager[Any]:
        """Return the context in which the network or its parts have to be called.

        Args:
            warns: Whether to warn if the call would draw latent weights from the prior.
        """
        if am_i_wrapped():
            return self._making_statements()
        if not draws_or_registers(self):
            return nullcontext()
        if warns and self.latent:
            drawn = "network: its weights are latent, and outside of Pyro's handlers a call draws them from the prior"
            instead = "posterior_predictive(network, posterior, x) predicts; Predictive(network.model, ...) draws too"
            warnings.warn(f"{drawn}; {instead}", stacklevel=3)  # at the caller of the method that uses this context
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
            context.used = used  # the store is as it was: nothing is registered under these names

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        # Pyro refuses to rename a module that was called before, because its parameters may be in the store under the
        # old name. Here the module itself holds the parameters, and the next call registers them under the new name.
        context_of(self).used = False
        super()._pyro_set_supermodule(name, context)

    def __repr__(self) -> str:
        with own_generators():  # the printout of a layer reads its weights, and reading a latent weight draws it
            return super().__repr__()

    def model(
        self,
        x: Any,
        y: Any = None,
        *,
        num_data: int | None = None,
        name: str = "y",
        plate: str = "data",
    ) -> Tensor:
        """Run the Pyro model of y given x: a plate ``"data"`` around a site ``"y"``.

        Two networks in one program need different names of their sites. ``functools.partial(network.model, name="z",
        plate="rows")`` and :class:`pyro_mdn.NetworkModel` are models with other names, for guides, SVI (stochastic
        variational inference), NUTS and ``Predictive``.

        Args:
            x: Inputs ``(N, ..., dim_in)``; the first dimension is the plate's, further ones belong to the event.
            y: Targets ``(N, ..., D)`` to condition on, if any. For D = 1, ``(N, ...)`` is read as ``(N, ..., 1)``. NaN
                marks missing entries.
            num_data: Number of rows of the whole data, if x is a minibatch: the likelihood is scaled up to them.
            name: Name of the site.
            plate: Name of the plate.

        Warns:
            UserWarning: If Pyro's parameter store has another network's weights under the same names: SVI trains those.
        """
        with self.calling():
            # All rows share the weights, so the network is evaluated outside the plate.
            x = self.inputs(x)
            mixture = nn.Module.__call__(self, x)  # like a call, whose context is already active
            self.require_batch(x)
            size = len(x) if num_data is None else num_data
            if size < len(x):
                raise ValueError(f"num_data: expected at least the batch of {len(x)}, got {num_data}")
            obs: Any = None if y is None else self.targets(y, mixture.batch_shape, replicated=True)
            if obs is not None and torch.is_grad_enabled():
                _warn_of_strangers(self)
            # With a given subsample, the plate does not permute all indices to draw one.
            with pyro.plate(plate, size, subsample=torch.arange(len(x), device=x.device), dim=-1):
                return pyro.sample(name, mixture.to_event(len(mixture.batch_shape) - 1), obs=obs)


class NetworkModel(nn.Module):
    """Module whose call is ``network.model``: unlike a bound method, it has the parameters of the network.

    ``Trace_ELBO()(NetworkModel(network), guide)`` is a module whose ``parameters()``, after its first call, are those
    of network and guide, for an optimiser of torch. The sites of the weights have the same names as in
    ``network.model``.

    Args:
        network: The network.
        name: Name of the site of y.
        plate: Name of the plate around it.

    Raises:
        ValueError: If the network is not a :class:`MixtureDensityNetwork`, or if a name is empty or both are the same.

    >>> from pyro.infer import Trace_ELBO
    >>> from pyro_mdn import MixtureDensityNetwork
    >>> model = NetworkModel(MixtureDensityNetwork(1, 1), name="z", plate="rows")
    >>> loss = Trace_ELBO()(model, lambda x, y: None)
    >>> x, y = torch.randn(5, 1), torch.randn(5, 1)
    >>> bool(loss(x, y).isfinite()), len(list(loss.parameters())) == len(list(model.network.parameters()))
    (True, True)
    """

    network: MixtureDensityNetwork

    def __init__(self, network: MixtureDensityNetwork, *, name: str = "y", plate: str = "data") -> None:
        super().__init__()
        if not isinstance(network, PyroNetwork):
            raise ValueError(f"network: expected a MixtureDensityNetwork, got {type(network).__name__}")
        if not (isinstance(name, str) and isinstance(plate, str) and name and plate and name != plate):
            raise ValueError(f"name, plate: expected two different names, got {name!r} and {plate!r}")
        self.network, self.name, self.plate = network, name, plate

    def extra_repr(self) -> str:
        """Describe the sites in a module's printout."""
        return f"name={self.name!r}, plate={self.plate!r}"

    def forward(self, x: Tensor, y: Tensor | None = None, *, num_data: int | None = None) -> Tensor:
        """Run the model; see :meth:`MixtureDensityNetwork.model`."""
        return self.network.model(x, y, num_data=num_data, name=self.name, plate=self.plate)


def _warn_of_strangers(network: PyroNetwork) -> None:
    """Warn if Pyro's parameter store holds the head of another network under the same names: SVI would train that."""
    head = own_modules(network)["head"]
    if isinstance(head, PyroModule) or head is None:
        return  # a Pyro module takes its parameters from the store
    for name, parameter in head.named_parameters():
        stored = stored_parameter(name_in_store(network, f"head$$${name}"), parameter)
        if stored is not parameter and parameter.requires_grad:
            there = "network: Pyro's parameter store has weights of another network under the same names"
            warnings.warn(f"{there}, and SVI trains those: pyro.clear_param_store() first", stacklevel=2)
            return


def require_single_weights(network: MixtureDensityNetwork, error: Exception) -> None:
    """Raise a ``ValueError`` in place of an error if a plate gave latent weights further dimensions."""
    for name, part in network.named_modules():
        for leaf in latent_parameters(part):
            start, value = own_buffers(part).get(f"{leaf}_start"), getattr(part, leaf)
            if start is not None and value.shape != start.shape:
                expected = f"{name}.{leaf} of shape {tuple(start.shape)}, outside of plates"
                instead = "fit(guide=, num_particles=) and posterior_predictive have many draws in one pass"
                got = f"{tuple(value.shape)}, as vectorize_particles=True and parallel=True have it"
                raise ValueError(f"network: expected {expected}, got {got}; {instead}") from error
