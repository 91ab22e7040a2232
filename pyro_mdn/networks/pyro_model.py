r"""A network's Pyro model as a module of its own."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_mdn.networks.network import MixtureDensityNetwork

__all__ = ["NetworkModel"]


class NetworkModel(nn.Module):
    """``network.model`` as a module, which has the network's parameters; a bound method has none.

    ``Trace_ELBO()(NetworkModel(network), guide)`` is then a module whose ``parameters()``, after one call of it, are
    those of network and guide, for an optimizer of torch. The network's sites have the same names as in
    ``network.model``.

    Args:
        network: The network.
        name: Name of the site of y.
        plate: Name of the plate around it.

    Raises:
        ValueError: If the network is not a :class:`MixtureDensityNetwork`, or if a name is empty or both are the same.

    >>> import torch
    >>> from pyro.infer import Trace_ELBO
    >>> model = NetworkModel(MixtureDensityNetwork(1, 1), name="z", plate="rows")
    >>> loss = Trace_ELBO()(model, lambda x, y: None)
    >>> x, y = torch.randn(5, 1), torch.randn(5, 1)
    >>> bool(loss(x, y).isfinite()), len(list(loss.parameters())) == len(list(model.network.parameters()))
    (True, True)
    """

    network: MixtureDensityNetwork

    def __init__(self, network: MixtureDensityNetwork, *, name: str = "y", plate: str = "data") -> None:
        super().__init__()
        if not isinstance(network, MixtureDensityNetwork):
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
