r"""Predictors: networks, and whatever else gives mixtures over y by one or several members."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from pyro_mdn.distributions.mixture import GaussianMixture
from pyro_mdn.distributions.predictions import Prediction, predicted_in_parts
from pyro_mdn.networks.files import require_loadable, warn_if_unlike
from pyro_mdn.support import tensor_files
from pyro_mdn.support.evaluation_mode import evaluating

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork

__all__ = ["ENSEMBLE", "POINT", "Predictor"]

POINT, ENSEMBLE = "point estimate", "ensemble"


class Predictor(nn.Module):
    """Base class of what predicts mixtures over y from inputs x, by one or several members of one architecture.

    A network has one member, which is itself. What needs a predictor asks for the methods and properties here, and not
    for its type.
    """

    @property
    def architecture(self) -> MixtureDensityNetwork:
        """Network that has the tensors of the predictor, those of several members with a leading axis."""
        raise NotImplementedError

    @property
    def num_members(self) -> int:
        """Number of members M."""
        raise NotImplementedError

    @property
    def inference_method(self) -> str:
        """How the weights came about, in words."""
        return POINT if self.architecture is self else ENSEMBLE

    @property
    def dim_out(self) -> int:
        """Number of outputs D."""
        return self.architecture.dim_out

    @property
    def latent(self) -> bool:
        """Whether there are latent weights; see :func:`pyro_mdn.bayesianize`."""
        return self.architecture.latent

    def members(self, x: Any, which: Tensor | slice = slice(None), *, chunk_size: int | None = None) -> GaussianMixture:
        """Mixture over y by each member, ``batch_shape`` ``(M, *batch)``, for inputs ``(*batch, dim_in)``.

        Args:
            x: Inputs.
            which: Positions of the members, by default all.
            chunk_size: Members in one pass at most; by default as many as fit into memory that is quick.
        """
        raise NotImplementedError

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        """Negative log-likelihood of rows, in nats and the units of y."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Describe by plain values how to build a predictor like this, for :meth:`from_config`."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str, *, backbone: nn.Module | None = None) -> Self:
        """Build what :meth:`config` described; raise a ``ValueError`` that names the source if it is something else."""
        raise NotImplementedError

    def predict(self, x: Any, *, chunk_size: int = 1024) -> Prediction:
        """Predict rows: means, quantiles, intervals and draws as NumPy arrays or a data frame, without gradients.

        Several members predict by their average density. The networks are in evaluation mode meanwhile: dropout and
        batch normalisation do not make predictions random.

        Args:
            x: Inputs ``(N, ..., dim_in)`` of any container and on any device.
            chunk_size: Rows that go through the network at once, on its device. The first dimension of x is taken apart
                without asking: a backbone whose rows depend on each other needs ``chunk_size=len(x)``.

        Raises:
            ValueError: If x is not usable, or if there are latent weights, which only a posterior has values of.

        >>> from pyro_mdn import MixtureDensityNetwork
        >>> network = MixtureDensityNetwork(dim_in=2, dim_out=1)
        >>> network.predict([[0.0, 1.0], [2.0, 3.0]]).mean.shape
        (2, 1)
        """
        if self.latent:
            instead = "Prediction(posterior_predictive(network, posterior, x).pool(0), like=x)"
            raise ValueError(f"network: expected no latent weights, got some: use {instead}")
        with evaluating(self):
            return predicted_in_parts(self, x, self.architecture, chunk_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write configuration and tensors to one safetensors file; a file already there is replaced as a whole.

        Hooks, and what was put into the head in place of its own layers, are not in the file: :meth:`load` warns then.
        A backbone of other layers than those of ``hidden_dim`` is not in it either, however it came there.

        Raises:
            ValueError: If there are latent weights: what was learned of them is in the guide or the samples. Or if the
                head has other tensors than :meth:`load` builds, as parametrised or pruned layers have: the error says
                how to make plain ones of them. Nothing is written then.
        """
        config = self.config()
        require_loadable(self, config)
        tensor_files.write_tensors(path, config, self.architecture.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> Self:
        """Read what :meth:`save` wrote, into evaluation mode; nothing in the file is executed.

        Args:
            path: The file.
            backbone: A module of the same architecture, where the network was built with one, or its hidden layers were
                changed; a single network takes it over, with the weights in the file.

        Raises:
            ValueError: If the file is damaged, not from here, or does not fit the backbone, which stays as it was; or
                if there is no backbone where the file needs one.

        Warns:
            UserWarning: If the networks that were saved had other types, attributes or hooks, which are named.
        """
        config, tensors = tensor_files.read_tensors(path)
        predictor = cls.from_config(config, str(path), backbone=backbone)
        network = predictor.architecture
        tensor_files.require_fitting(str(path), network.state_dict(), tensors)
        predictor.to(tensors["head.linear.weight"].dtype)
        network.load_state_dict(tensors)
        warn_if_unlike(network, config.get("ensemble", config), str(path))
        return predictor.eval()
