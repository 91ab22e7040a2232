r"""Convert arrays of predictions to ``xarray`` data sets, with names of rows, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mdn.support.arrays import Array, in_columns

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["JOINT", "Labels", "by_chain", "names_of"]

JOINT = "joint"
"""Name of the joint log-likelihood of all outputs, if there are several."""


class Labels(NamedTuple):
    """Names of outputs and labels along dimensions."""

    names: list[str]
    coords: dict[str, Array]

    @classmethod
    def of(
        cls, x: Any, y: Any, size: int, dim: int, names: Sequence[str] | None, coords: Mapping[str, Any] | None
    ) -> Labels:
        """Take labels from the caller's arguments, or else from pandas objects."""
        known = {"obs_id", "input", "component"}
        if unknown := set(coords or {}) - known:
            raise ValueError(f"coords: expected labels of some of {sorted(known)}, got {sorted(map(str, unknown))}")
        names = names_of(y, names, dim)
        _require_same_rows(x, y)
        index = _index(y, x)
        found = {"obs_id": np.arange(size) if index is None else index, "output": np.array(names)}
        found["bound"] = np.array(["lower", "upper"])
        if (columns := _columns(x)) is not None:
            found["input"] = _writable(columns)
        labels = cls(names, found | {dim: _writable(values) for dim, values in (coords or {}).items()})
        labels._check("obs_id", size)
        return labels

    def at(self, x: Any, size: int) -> Labels:
        """Return labels for the rows of other inputs."""
        index = _index(x)
        return self._replace(coords={**self.coords, "obs_id": np.arange(size) if index is None else index})

    def dataset(self, variables: Mapping[str, tuple[Array, Sequence[str] | None]]) -> Dataset:
        """Make a data set of draws ``(chain, draw, ...)``; ``None`` names the other dimensions by the variable."""
        named = {}
        for name, (values, dims) in variables.items():
            own = [f"{name}_dim_{i}" for i in range(values.ndim - 2)] if dims is None else dims
            named[name] = (("chain", "draw", *own), _exact(values))
        return self._dataset(named)

    def of_outputs(self, values: Sequence[Array], y: Array) -> Dataset:
        """Make a variable of the values ``(..., N)`` of each output, with the rows where y is observed."""
        columns = zip(self.names, values, ~np.isnan(y.T), strict=True)
        return self.of_rows({name: (own, observed) for name, own, observed in columns})

    def of_rows(self, variables: Mapping[str, tuple[Array, Array]]) -> Dataset:
        """Make a data set of variables ``(..., N)``, with a mask of the rows to keep for each."""
        named, coords = {}, {}
        for name, (values, rows) in variables.items():
            dim = "obs_id" if rows.all() else f"obs_id_{name}"
            coords[dim] = self.coords["obs_id"][rows]
            named[name] = (("chain", "draw", dim)[-values.ndim :], _exact(values[..., rows]))
        return self._dataset(named, coords)

    def inputs(self, x: Array, size: int) -> Dataset:
        """Make a data set of the inputs of the rows."""
        if len(x) != size:
            raise ValueError(f"x: expected {size} rows, got {len(x)}")
        x = in_columns(x)
        return self._dataset({"x": (("obs_id", *(f"x_dim_{i}" for i in range(x.ndim - 2)), "input"), x)})

    def _dataset(self, variables: Mapping[str, Any], coords: Mapping[str, Array] | None = None) -> Dataset:
        from xarray import Dataset

        dims = {dim: size for dims, values in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
        labels = self._replace(coords={**self.coords, **(coords or {})})
        for dim, size in dims.items():
            labels._check(dim, size)
        return Dataset(dict(variables), coords={d: labels.coords.get(d, np.arange(size)) for d, size in dims.items()})

    def _check(self, dim: str, size: int) -> None:
        if len(labels := self.coords.get(dim, range(size))) != size:
            raise ValueError(f"coords: expected {size} labels of {dim!r}, got {len(labels)}")


def _exact(values: Array) -> Array:
    """Convert floating point to float64, because ArviZ adds and subtracts in the type that it finds."""
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def by_chain(values: Array, chains: int) -> Array:
    """Reshape ``(S, ...)`` to ``(chains, S / chains, ...)``."""
    return values.reshape(chains, -1, *values.shape[1:])


# Names


def names_of(y: Any, given: Sequence[str] | None, dim: int) -> list[str]:
    """Choose names of outputs: the given ones, those of pandas objects, or else y, or y0, y1, ..."""
    if given is None:
        columns = _columns(y) if _columns(y) is not None else [getattr(y, "name", None)]
        named = [str(column) for column in columns if column is not None and str(column)]
        given = named or (["y"] if dim == 1 else [f"y{i}" for i in range(dim)])
    names = [given] if isinstance(given, str) else [str(name) for name in given]
    taken = ["chain", "draw", "obs_id", *([JOINT] if dim > 1 else [])]
    of_rows = {f"obs_id_{name}" for name in names}
    if len(names) != dim or len(set(names)) != dim or not of_rows.union(taken).isdisjoint(names):
        raise ValueError(f"output_names: expected {dim} that differ, none of them one of {taken}, got {names}")
    if any("/" in name for name in names):
        raise ValueError(f"output_names: expected names without '/', which xarray takes for a path, got {names}")
    return names


def _columns(values: Any) -> Any:
    """Return the names of the columns of a table of pandas, polars or pyarrow."""
    return getattr(values, "column_names", getattr(values, "columns", None))


def _index(*data: Any) -> Array | None:
    """Return the index of the first argument that has one."""
    indices = [getattr(values, "index", None) for values in data]
    return next((_writable(index) for index in indices if index is not None and not callable(index)), None)


def _require_same_rows(x: Any, y: Any) -> None:
    """Raise a ``ValueError`` if x and y have indices that differ."""
    of_x, of_y = _index(x), _index(y)
    if of_x is None or of_y is None or len(of_x) != len(of_y):
        return
    missing = (of_x != of_x) & (of_y != of_y)  # NaN and NaT differ from themselves
    if (differ := (of_x != of_y) & ~missing).any():
        row = int(np.argmax(differ))
        got = f"{of_x[row]} and {of_y[row]} in row {row}"
        raise ValueError(f"x, y: expected the same index in the same order, got {got}")


def _writable(values: Sequence[Any]) -> Array:
    """Convert labels to types that a netCDF file can hold: numbers, times or strings."""
    array = np.asarray(values)
    if array.dtype == object:
        with suppress(TypeError, ValueError):  # an index of objects may contain only numbers
            array = np.array(list(values))
    return array if array.ndim == 1 and array.dtype.kind in "biufMU" else np.array([str(v) for v in values])
