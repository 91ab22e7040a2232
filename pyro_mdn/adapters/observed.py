r"""Observed targets as ArviZ takes them: one number for each entry, and what is known of entries that are intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mdn.adapters.xarray_labels import Labels
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets, TargetsOrTensor, without_intervals
from pyro_mdn.support.arrays import Array, as_array, as_tensor, in_columns, to_numpy

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Observed", "as_whole"]


class Observed(NamedTuple):
    """What was observed of the targets.

    Attributes:
        numbers: One number for each entry, ``(N, D)``: its value, the limit at which it is censored, or the middle of
            its interval; NaN where it is missing.
        intervals: The targets, if some are intervals.
    """

    numbers: Array
    intervals: Targets | None

    @classmethod
    def of(cls, y: Any) -> Observed:
        """Take targets of any container.

        Raises:
            ValueError: If there are none, or infinite ones.
        """
        targets = without_intervals(y) if isinstance(y, Targets) else y
        if isinstance(targets, Targets):
            targets = targets.unsqueeze(-1) if targets.ndim == 1 else targets
            return cls(_numbers(targets), targets)
        numbers = in_columns(as_array(targets, "y"))
        if not numbers.size or np.isinf(numbers).any():
            raise ValueError(f"y: expected finite numbers, or NaN, in one row at least, got shape {numbers.shape}")
        return cls(numbers, None)

    def values(self, mixture: Mixture) -> TargetsOrTensor:
        """Return the targets that a mixture has a log-likelihood of, in its precision and on its device."""
        given = as_tensor(self.numbers, "y") if self.intervals is None else self.intervals
        return given.to(mixture.locs)

    def dataset(self, labels: Labels, mixture: Mixture) -> Dataset:
        """Make the group of observed data; coordinates tell limits and kinds of an output with intervals.

        Raises:
            ValueError: If an output has the name of such a coordinate.
        """
        whole = as_whole(np.where(np.isnan(self.numbers), 0, self.numbers), mixture)  # missing rows are left out
        data = labels.of_outputs(whole, self.numbers)
        if self.intervals is None:
            return data
        about = {"lower": self._limits[0], "upper": self._limits[1], "kind": self._kinds()}
        if taken := {f"{name}_{end}" for name in labels.names for end in about}.intersection(labels.names):
            raise ValueError(f"output_names: expected names that no coordinate of another output has, got {taken}")
        for i, name in enumerate(labels.names):
            rows, dims = ~np.isnan(self.numbers[:, i]), data[name].dims
            data = data.assign_coords({f"{name}_{end}": (dims, values[rows, i]) for end, values in about.items()})
        return data

    def events(self, labels: Labels) -> Dataset | None:
        """Tell for each output with right-censored entries, and no others, whether each entry is exact: 1 or 0.

        ``arviz.plot_ppc_censored`` looks for these under the names of the outputs in the group of constant data.
        """
        if self.intervals is None:
            return None
        kinds, seen = self._kinds(), ~np.isnan(self.numbers)
        events = {}
        for i, name in enumerate(labels.names):
            if set(kinds[seen[:, i], i]) in ({"exact", "right-censored"}, {"right-censored"}):
                events[name] = (kinds[:, i] == "exact").astype(np.int64), seen[:, i]
        return labels.of_rows(events) if events else None

    @property
    def _limits(self) -> tuple[Array, Array]:
        assert self.intervals is not None
        return _doubles(self.intervals)

    def _kinds(self) -> Array:
        lower, upper = self._limits
        one_sided = np.where(np.isinf(upper), "right-censored", "left-censored")
        return np.where(lower == upper, "exact", np.where(np.isinf(lower) | np.isinf(upper), one_sided, "interval"))


def as_whole(values: Array, mixture: Mixture) -> list[Array]:
    """Split values by output: counts as integers, which ArviZ draws as bars, unless some are missing."""
    columns = [(values[..., d], mixture.marginal(d).support.is_discrete) for d in range(mixture.dim)]
    return [np.floor(own).astype(np.int64) if counts and not np.isnan(own).any() else own for own, counts in columns]


def _doubles(targets: Targets) -> tuple[Array, Array]:
    return to_numpy(targets.lower).astype(np.float64), to_numpy(targets.upper).astype(np.float64)


def _numbers(targets: Targets) -> Array:
    lower, upper = _doubles(targets)
    missing = np.isinf(lower) & np.isinf(upper)
    start = np.where(np.isinf(lower), upper, lower)
    middle = 0.5 * start + 0.5 * np.where(np.isinf(upper), start, upper)
    return np.where(missing, np.nan, np.where(lower == upper, start, middle))
