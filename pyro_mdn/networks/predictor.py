r"""Predictors: networks and ensembles, which predict mixtures over y by one or several members."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.predictions import Prediction, predicted_in_parts
from pyro_mdn.networks.files import require_loadable, warn_if_unlike
from pyro_mdn.support import tensor_files
from pyro_mdn.support.arrays import require_columns
from pyro_mdn.support.process_state import evaluating

if TYPE_CHECKING:
    from pyro_mdn.networks.network import MixtureDensityNetwork

__all__ = ["ENSEMBLE", "POINT", "Predictor"]

POINT, ENSEMBLE = "point estimate", "ensemble"


class Predictor(nn.Module):
    """Base class of models that predict mixtures over y from inputs x, by one or several members of one architecture.

    A network has one member: itself. Training, posteriors, plots and groups for ArviZ rely on the methods and
    properties of this class, and never ask for the type of a model.
    """

    @property
    def architecture(self) -> MixtureDensityNetwork:
        """Network that holds the tensors of the predictor; those of several members have a leading axis."""
        raise NotImplementedError

    @property
    def num_members(self) -> int:
        """Number of members M."""
        raise NotImplementedError

    @property
    def inference_method(self) -> str:
        """Name of the inference that the weights come from, which is a point estimate or an ensemble."""
        return POINT if self.architecture is self else ENSEMBLE

    @property
    def dim_out(self) -> int:
        """Number of outputs D."""
        return self.architecture.dim_out

    @property
    def latent(self) -> bool:
        """Whether there are latent weights; see :func:`pyro_mdn.bayesianize`."""
        return self.architecture.latent

    def members(self, x: Any, which: Tensor | slice = slice(None), *, chunk_size: int | None = None) -> Mixture:
        """Predict the mixture over y by each member, ``batch_shape`` ``(M, *batch)``, for inputs ``(*batch, dim_in)``.

        Args:
            x: Inputs.
            which: Positions of the members, by default all.
            chunk_size: Largest number of members in one pass; by default as many as fit into the cache.
        """
        raise NotImplementedError

    def loss(self, x: Any, y: Any, *, replicated: bool = False) -> Tensor:
        """Compute the negative log-likelihood of rows, in nats and the units of y."""
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

        Several members predict by their average density. Networks are in evaluation mode meanwhile, so that dropout and
        batch normalisation do not make predictions random.

        Args:
            x: Inputs ``(N, ..., dim_in)`` of any container and on any device.
            chunk_size: Number of rows that go through the network at once, on its device. The first dimension of x is
                split into chunks: a backbone whose rows depend on each other needs ``chunk_size=len(x)``.

        Raises:
            ValueError: If x is not usable, such as a data frame whose columns are not those of training in their order;
                or if weights are latent: only a posterior has values of these.

        >>> from pyro_mdn import MixtureDensityNetwork
        >>> network = MixtureDensityNetwork(dim_in=2, dim_out=1)
        >>> network.predict([[0.0, 1.0], [2.0, 3.0]]).mean.shape
        (2, 1)
        """
        if self.latent:
            instead = "Prediction(posterior_predictive(network, posterior, x).pool(0), like=x)"
            raise ValueError(f"network: expected no latent weights, got some: use {instead}")
        require_columns(self.architecture.input_names, x, "x")
        with evaluating(self):
            return predicted_in_parts(self, x, self.architecture, chunk_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write configuration and tensors to one safetensors file; an existing file is replaced atomically.

        The file contains no code: neither hooks, nor layers that replaced those of the head (:meth:`load` warns of
        these), nor a backbone other than the hidden layers of ``hidden_dim`` (:meth:`load` takes one).

        Raises:
            ValueError: If weights are latent: a guide or samples hold what was learned of these. Or if the head has
                other tensors than :meth:`load` builds, as parametrised or pruned layers have: the error says how to
                make plain layers of them. Nothing is written in either case.
        """
        config = self.config()
        require_loadable(self, config)
        tensor_files.write_tensors(path, config, self.architecture.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> Self:
        """Read what :meth:`save` wrote, in evaluation mode; nothing in the file is executed.

        Args:
            path: The file.
            backbone: A module of the same architecture, if the saved network was built with one or its hidden layers
                were changed. A single network takes over this very module, with the weights in the file.

        Raises:
            ValueError: If the file is damaged, was not written by :meth:`save`, or does not fit the backbone, which
                stays as it was; or if the file needs a backbone and there is none.

        Warns:
            UserWarning: If the saved networks had other types, attributes or hooks; the warning names these.
        """
        config, tensors = tensor_files.read_tensors(path)
        predictor = cls.from_config(config, str(path), backbone=backbone)
        network = predictor.architecture
        tensor_files.require_fitting(str(path), network.state_dict(), tensors)
        predictor.to(tensors["head.linear.weight"].dtype)
        network.load_state_dict(tensors)
        warn_if_unlike(network, config.get("ensemble", config), str(path))
        return predictor.eval()
