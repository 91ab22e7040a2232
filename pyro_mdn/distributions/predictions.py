r"""Predictions as NumPy arrays and data frames, for whoever wants numbers and no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import as_targets
from pyro_mdn.distributions.quantiles import central_quantile
from pyro_mdn.support.arrays import Array, as_tensor, further_on, require_finite, to_numpy
from pyro_mdn.support.checks import describe, require_counts, shown

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Prediction", "predicted_in_parts"]


class Inputs(Protocol):
    """What says of inputs how they have to be."""

    x_shift: Tensor

    def as_numbers(self, x: Any) -> Tensor:
        """Convert inputs of any container to a tensor."""
        ...

    def require_batch(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless inputs have a dimension of rows."""
        ...


class Prediction:
    r"""Predictive distributions of rows, and what they say as NumPy arrays in the units of y.

    ``network.predict(x)`` makes one. It can also be made of a mixture, such as the average over draws of the weights:
    ``Prediction(posterior_predictive(network, posterior, x).pool(0), like=x)``.

    Args:
        mixture: Distributions of the rows, ``batch_shape`` ``(N, ...)``, or a sequence of those of successive rows.
        like: What has the labels of the rows, such as the data frame that was predicted from.

    Raises:
        ValueError: If there is no mixture, or one without a batch of rows.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> prediction = MixtureDensityNetwork(2, 1).predict(np.zeros((3, 2)))
    >>> lower, upper = prediction.interval(0.9)
    >>> prediction.mean.shape, lower.shape, prediction.quantiles([0.1, 0.5, 0.9]).shape
    ((3, 1), (3, 1), (3, 3, 1))
    """

    def __init__(self, mixture: Mixture | Sequence[Mixture], *, like: Any = None) -> None:
        parts = [mixture] if isinstance(mixture, Mixture) else list(mixture)
        if not parts or not all(isinstance(part, Mixture) and part.batch_shape for part in parts):
            raise ValueError(f"mixture: expected a Mixture with a batch of rows, got {describe(mixture)}")
        self._parts, self._index = parts, _labels(like)
        if self._index is not None and len(self._index) != len(self):
            raise ValueError(f"like: expected {len(self)} rows, as many as there are mixtures, got {len(self._index)}")

    def __len__(self) -> int:
        return sum(part.batch_shape[0] for part in self._parts)

    def __repr__(self) -> str:
        shape = (len(self), *self._parts[0].batch_shape[1:])
        return f"{type(self).__name__}(batch_shape={shape}, dim={self.dim})"

    def __getattr__(self, name: str) -> Any:
        # Only what a Prediction has not comes here, such as what scores and plots ask of a mixture.
        hint = "its attribute mixture is the distribution, which scores and plots take"
        raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}: {hint}")

    @property
    def dim(self) -> int:
        """Number of outputs D."""
        return self._parts[0].dim

    @property
    def mixture(self) -> Mixture:
        """Distribution of all rows, on the device of the network and without a graph."""
        return Mixture.cat(self._parts) if len(self._parts) > 1 else self._parts[0]

    @property
    def mean(self) -> Array:
        """Mean of each output, ``(N, ..., D)``."""
        return self._joined(lambda part: part.mean)

    @property
    def std(self) -> Array:
        """Standard deviation of each output, ``(N, ..., D)``."""
        return self._joined(lambda part: part.stddev)

    def quantiles(self, probabilities: Any = (0.05, 0.5, 0.95)) -> Array:
        """Compute quantiles of each output; those of angles are counted from the angle opposite to the mean direction.

        Args:
            probabilities: A number in [0, 1], for quantiles ``(N, ..., D)``; or Q of them, for ``(N, Q, ..., D)``.

        Raises:
            ValueError: If a probability is outside of [0, 1].
        """
        levels = as_tensor(probabilities, "probabilities")
        if levels.ndim > 1 or not levels.numel() or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"probabilities: expected one or several in [0, 1], got {shown(probabilities)}")
        points = self._joined(
            lambda part: torch.stack([central_quantile(part, q.item()) for q in levels.reshape(-1)], 1)
        )
        return points if levels.ndim else points[:, 0]

    def interval(self, mass: float = 0.9, *, kind: Literal["central", "shortest"] = "central") -> tuple[Array, Array]:
        """Compute lower and upper ends, ``(N, ..., D)`` each, of an interval with probability ``mass``.

        Args:
            mass: Probability inside, in (0, 1), of each output by itself.
            kind: ``"central"`` leaves equal tails, ``"shortest"`` is the shortest single interval.

        Raises:
            ValueError: If the mass is not one number in (0, 1) or the kind is unknown.
        """
        if as_tensor(mass, "mass").ndim:
            raise ValueError(f"mass: expected one number in (0, 1), got {describe(mass)}")
        ends = self._joined(lambda part: torch.stack(part.interval(mass, kind=kind), -1))
        return ends[..., 0], ends[..., 1]

    def sample(self, num_samples: int = 1) -> Array:
        """Draw y for each row by torch's generator, ``(num_samples, N, ..., D)``."""
        require_counts(num_samples=num_samples)
        return self._joined(lambda part: part.sample((num_samples,)), dim=1)

    def log_prob(self, y: Any) -> Array:
        """Compute the log-density of targets ``(N, ..., D)`` in nats, ``(N, ...)``; NaN entries were not observed."""
        rows = as_targets(y, "y", self._parts[0].locs.device)
        if rows.ndim == 0 or len(rows) != len(self):
            raise ValueError(f"y: expected {len(self)} rows, as many as were predicted, got {describe(y)}")
        values = iter(rows.split([part.batch_shape[0] for part in self._parts]))  # pyright: ignore[reportArgumentType]
        return self._joined(lambda part: part.log_prob(next(values)))

    def to_frame(self, quantiles: Any = (0.05, 0.5, 0.95), *, output_names: Sequence[str] | None = None) -> DataFrame:
        """Make a pandas data frame of means, standard deviations and quantiles, with the index of the caller's rows.

        Args:
            quantiles: Probabilities of the quantiles, in [0, 1]: one or several.
            output_names: Names of the outputs, by default y0, y1, ... of several. Columns have two levels then.

        Raises:
            ValueError: If rows have further dimensions, as sequences have, if a probability is outside of [0, 1], or
                if there are not D different names.
        """
        import pandas as pd

        if len(self._parts[0].batch_shape) > 1:
            shape = tuple(self._parts[0].batch_shape[1:])
            raise ValueError(f"to_frame: expected one distribution for each row, got {shape} of them")
        names = [f"y{i}" for i in range(self.dim)] if output_names is None else list(output_names)
        if len(names) != self.dim or isinstance(output_names, str) or len(set(names)) != self.dim:
            raise ValueError(f"output_names: expected {self.dim} of them, all different, got {shown(output_names)}")
        levels = to_numpy(as_tensor(quantiles, "quantiles"))
        levels = levels if levels.ndim else levels[None]
        points = self.quantiles(levels)
        statistics = {"mean": self.mean, "std": self.std} | {_label(q): points[:, i] for i, q in enumerate(levels)}
        columns = {(name, key): values[:, d] for d, name in enumerate(names) for key, values in statistics.items()}
        frame = pd.DataFrame(columns, index=self._index)
        return frame if self.dim > 1 or output_names is not None else frame.droplevel(0, axis=1)

    @torch.no_grad()
    def _joined(self, function: Callable[[Mixture], Tensor], dim: int = 0) -> Array:
        return np.concatenate([to_numpy(function(part)) for part in self._parts], dim)


def predicted_in_parts(predict: Callable[[Tensor], Mixture], x: Any, network: Inputs, chunk_size: int) -> Prediction:
    """Predict some rows at a time, so that memory for intermediate results stays small.

    Args:
        predict: Function of some rows.
        x: All rows, of any container.
        network: What knows the shape of a row, and where the weights are.
        chunk_size: Number of rows at a time.

    Raises:
        ValueError: If x has no rows, or a number that is not finite in the precision of the network.
    """
    require_counts(chunk_size=chunk_size)
    rows = network.as_numbers(x)
    if rows.ndim == 0 or not len(rows):
        raise ValueError(f"x: expected rows to predict, got {describe(x)}")
    network.require_batch(rows)
    require_finite(rows, "x", x, network.x_shift.dtype)
    parts: list[Mixture] = []
    for i, part in enumerate(rows.detach().split(chunk_size)):
        try:
            with torch.no_grad():
                parts.append(predict(part.to(network.x_shift.device)))
        except ValueError as error:
            raise further_on(error, i * chunk_size, x) from None
    return Prediction(parts, like=x)


def _label(probability: np.floating[Any]) -> str:
    """Shortest text that is this probability, in its own precision."""
    text = f"{probability:g}"
    return text if type(probability)(text) == probability else str(probability)


def _labels(like: Any) -> Any:
    """Index of the rows of a pandas object; None of anything else."""
    index = getattr(like, "index", None)
    return None if index is None or callable(index) else index
