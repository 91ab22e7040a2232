r"""Use both generations of ArviZ, 0.x and 1.x, with the same results; no other module imports ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mdn.adapters.pareto_smoothing import good_k, log_mean_exp, log_sum_exp
from pyro_mdn.support.arrays import Array

if TYPE_CHECKING:
    from xarray import DataArray, Dataset

__all__ = ["assemble", "comparison", "dataset", "effective_share", "leave_one_out"]

_ROWS = "__row__"


def assemble(groups: Mapping[str, Dataset], attributes: Mapping[str, Any]) -> Any:
    """Combine groups into ``InferenceData`` on 0.x, into ``xarray.DataTree`` on 1.x."""
    az = _arviz()
    kept = {name: group.assign_attrs(attributes) for name, group in groups.items() if group.data_vars}
    if _is_new(az):
        from xarray import DataTree

        tree = DataTree.from_dict(kept)
        tree.attrs.update(attributes)
        return tree
    return az.InferenceData(attrs=dict(attributes), **kept)


def dataset(data: Any, group: str) -> Dataset:
    """Return a group as an ``xarray.Dataset``."""
    found = data[group]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def effective_share(values: Array) -> float:
    """Compute the mean over N of the effective share of independent draws, for values ``(chains, draws, N)``."""
    from xarray import Dataset

    az, draws = _arviz(), values.shape[0] * values.shape[1]
    with _without_deprecations():
        sizes = az.ess(Dataset({"values": (("chain", "draw", _ROWS), values)}), method="mean")
    share = float(np.asarray(sizes["values"]).mean()) / draws
    return float(np.clip(share, 1 / draws, 1)) if np.isfinite(share) else 1.0


def leave_one_out(
    likelihood: DataArray, log_weights: Array, pareto_k: Array, reff: float, *, unreliable: bool, pointwise: bool
) -> Any:
    """Make the result of ``arviz.loo`` from log-likelihoods ``(chain, draw, N)`` and given weights ``(N, S)``."""
    az = _arviz()
    k = likelihood.isel(chain=0, draw=0, drop=True).copy(data=pareto_k).rename("pareto_k")
    if _is_new(az):
        weights = likelihood.copy(data=log_weights.T.reshape(likelihood.shape))
        tree = assemble({"log_likelihood": likelihood.to_dataset(name="joint")}, {})
        settings = {"log_weights": weights, "pareto_k": k, "reff": reff, "pointwise": pointwise}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Estimated shape parameter", UserWarning)
            return az.loo(tree, var_name="joint", **settings)
    rows = np.asarray(likelihood).reshape(-1, len(pareto_k)).T
    terms, draws = log_sum_exp(log_weights + rows), rows.shape[1]
    values = {
        "elpd_loo": terms.sum(),
        "se": np.sqrt(len(terms) * terms.var(ddof=1)) if len(terms) > 1 else np.nan,
        "p_loo": (log_mean_exp(rows) - terms).sum(),
        "n_samples": draws,
        "n_data_points": len(terms),
        "warning": unreliable,
        **({"loo_i": k.copy(data=terms).rename("loo_i"), "pareto_k": k} if pointwise else {}),
        "scale": "log",
        "good_k": good_k(draws),
    }
    return az.stats.ELPDData(data=list(values.values()), index=list(values))


def comparison(results: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Call ``arviz.compare``, unrounded, and give its columns the names and the sign of differences of 1.x."""
    az, method = _arviz(), str(settings.get("method") or "stacking").lower()
    new = _is_new(az)
    shifted = _shifted(results, "elpd_i" if new else "loo_i") if method == "stacking" else dict(results)
    if new:
        exact = "none" if settings.get("round_to") is None else settings["round_to"]
        table = az.compare(shifted, **{**settings, "round_to": exact})
        return table.assign(warning=[bool(results[name].warning) for name in table.index])
    with _without_deprecations():
        table = az.compare(shifted, **settings)
    return table.assign(elpd=table["elpd_loo"], p=table["p_loo"], elpd_diff=0.0 - table["elpd_diff"])


def _shifted(results: Mapping[str, Any], terms: str) -> dict[str, Any]:
    """Subtract the largest term of each row: stacking gives the same weights, and exponentials do not underflow."""
    pointwise = np.stack([np.asarray(result[terms]) for result in results.values()])
    shifted = {name: copy(result) for name, result in results.items()}
    for result, values in zip(shifted.values(), pointwise - pointwise.max(0), strict=True):
        result[terms] = result[terms].copy(data=values)
    return shifted


def _arviz() -> Any:
    with _without_deprecations():
        try:
            import arviz
        except ImportError as error:
            raise ImportError("this needs ArviZ: in a checkout pip install '.[arviz]'") from error
    return arviz


def _is_new(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) >= 1


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Ignore deprecation warnings about ArviZ's own use of other packages, which the caller cannot change."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield
