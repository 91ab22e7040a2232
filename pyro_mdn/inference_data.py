r"""Convert predictions, and the draws of the weights that they come from, to groups for ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.adapters.arviz_versions import assemble
from pyro_mdn.adapters.leave_one_out import LooPit, compare, loo, loo_pit
from pyro_mdn.adapters.observed import Observed, as_whole
from pyro_mdn.adapters.sources import Source, predict
from pyro_mdn.adapters.xarray_labels import JOINT, Labels, by_chain
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.support.arrays import Array, as_array, to_numpy
from pyro_mdn.support.checks import require_counts
from pyro_mdn.support.process_state import seeded

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["LooPit", "compare", "loo", "loo_pit", "to_inference_data"]


def to_inference_data(
    predictive: Mixture | MixtureDensityNetwork | DeepEnsemble,
    *positional: Any,
    x: Any = None,
    y: Any = None,
    posterior: Any = None,
    prior: Mixture | Any = None,
    predictions: Any = None,
    num_samples: int | None = None,
    quantities: Sequence[str] = ("mean",),
    sites: bool = True,
    output_names: Sequence[str] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> Any:
    r"""Convert predictions of observed rows to ``InferenceData`` on ArviZ 0.x, to ``xarray.DataTree`` on 1.x.

    The result has these groups, whose variables all have named dimensions:

    * ``posterior_predictive``: draws of each output, one for each draw of the weights. For a point estimate or an
      ensemble these are ``num_samples`` draws from the (average) density.
    * ``log_likelihood``: pointwise log-density of each draw of the weights. With several outputs, ``"joint"`` is their
      joint density, which ``loo`` needs, and each output is there under its name.
    * ``posterior``: ``quantities`` of the mixtures, and the draws of the weights if there are any.
    * ``sample_stats``: log joint density and divergences, from :class:`pyro_mdn.PosteriorSamples`.
    * ``observed_data``, ``constant_data`` (the inputs), ``prior_predictive``, ``predictions`` and
      ``predictions_constant_data``, if their arguments are given.

    Attributes contain the kind of inference, the versions of packages, and the scalers of the network. Targets that are
    NaN were not observed: an output with such targets has only its observed rows, on a dimension ``obs_id_<name>``.
    Targets that are censored, or known to lie in an interval, are in ``observed_data`` with the limit or the middle of
    the interval, and beside them, as coordinates ``<name>_lower``, ``<name>_upper`` and ``<name>_kind``, what is known.
    Draws and ``observed_data`` of counts are integers.

    Args:
        predictive: Mixtures of batch shape ``(N,)``, a point estimate, or ``(S, N)``, for S draws of the weights. Or a
            network or an ensemble, which is applied to x.
        positional: y, and then x, without names. Deprecated, because ``fit`` and all other functions take x first.
        x: Inputs ``(N, ..., dim_in)``, optional for mixtures: a tensor, array or data frame, whose index and columns
            name rows and inputs.
        y: Observed targets ``(N, D)``, or ``(N,)`` for D = 1, likewise, or :class:`pyro_mdn.Targets`.
        posterior: For a network, what :func:`pyro_mdn.posterior_predictive` takes. For mixtures, the draws of the
            weights that they were computed from: ``(S, *shape)`` by site, :class:`pyro_mdn.PosteriorSamples` or
            ``MCMC``; the last two keep their chains apart.
        prior: Mixtures ``(S, N)`` by draws from the prior, or draws of y ``(S, N, D)``.
        predictions: Mixtures for new inputs, ``(N',)`` or ``(S, N')``; a pair of them and these inputs; or the inputs
            alone, if ``predictive`` is a network or an ensemble.
        num_samples: Number of draws of the weights from a guide, or of y from a point estimate or an ensemble; by
            default 1000.
        quantities: Some of ``"mean"``, ``"stddev"``, ``"weights"``, ``"locs"``, ``"scales"`` and ``"entropy_bounds"``.
        sites: Whether ``posterior`` contains the draws of the weights.
        output_names: Names of the D outputs; by default columns of y, ``"y"``, or ``"y0"``, ``"y1"``, ....
        coords: Labels along ``"obs_id"``, ``"input"``, or ``"component"``.
        method: Name of the inference; by default derived from ``predictive`` and ``posterior``. Mixtures of an ensemble
            need ``method="ensemble"``.
        seed: Seed of the draws; by default they are from torch's global generator.

    Raises:
        ValueError: If shapes, names, indices or counts do not agree.
        ImportError: If ArviZ is not installed.

    Warns:
        FutureWarning: If y or x are given without names.

    References:
        Kumar, Carroll, Hartikainen & Martin (2019), ArviZ: a unified library for exploratory analysis of Bayesian
        models in Python.

    >>> x, y = torch.randn(5, 1), torch.randn(5, 1)
    >>> data = to_inference_data(MixtureDensityNetwork(1, 1), x=x, y=y, num_samples=100)
    >>> dict(data["posterior_predictive"]["y"].sizes)
    {'chain': 1, 'draw': 100, 'obs_id': 5}
    """
    x, y = _named(positional, x, y)
    require_counts(num_samples=num_samples)
    observed = Observed.of(y)
    targets = observed.numbers
    with torch.no_grad(), seeded(seed):
        source = Source.of(predictive, x, posterior, num_samples, method)
        mixture = source.mixture
        if mixture.batch_shape[1:] != targets.shape[:1] or mixture.dim != targets.shape[-1] or targets.ndim != 2:
            expected = f"shape {(*mixture.batch_shape[1:], mixture.dim)}, as the predictions have it"
            raise ValueError(f"y: expected {expected}, got {targets.shape}")
        labels = Labels.of(x, y, len(targets), mixture.dim, output_names, coords)
        groups: dict[str, Dataset] = {}
        of_rows = _quantities(mixture, quantities, source.chains)
        groups["posterior"] = labels.dataset({**of_rows, **(_unnamed(source.sites) if sites else {})})
        groups["posterior_predictive"] = labels.of_outputs(_draws(source, mixture, num_samples), targets)
        groups["log_likelihood"] = _log_likelihood(mixture, observed, source.chains, labels)
        if source.stats:
            groups["sample_stats"] = labels.dataset(_unnamed(source.stats))
        if prior is not None:
            groups["prior_predictive"] = labels.of_outputs(_prior_draws(prior, targets.shape), targets)
        groups["observed_data"] = observed.dataset(labels, mixture)
        groups |= _constant(x, observed, labels)
        if predictions is not None:
            groups |= _predictions(predictions, source, num_samples, labels)
    return assemble(groups, {"inference_method": source.method, **_versions(), **source.scaling})


def _named(positional: Sequence[Any], x: Any, y: Any) -> tuple[Any, Any]:
    """Return x and y; arguments without names are in the order of earlier versions, y first, unlike in ``fit``."""
    given = [name for name, value in [("y", y), ("x", x)] if value is not None]
    if taken := ["y", "x"][: len(positional)]:
        if len(positional) > 2 or set(taken) & set(given):
            got = f"{len(positional)} without a name" + (f" besides {' and '.join(given)}" if given else "")
            raise ValueError(f"to_inference_data: expected x and y by name, as in (network, x=x, y=y), got {got}")
        message = "expected x and y by name, as in (network, x=x, y=y); took what has no name as"
        warnings.warn(f"to_inference_data: {message} {', then '.join(taken)}", FutureWarning, stacklevel=3)
        y, x = (*positional, x)[:2]
    if y is None:
        raise ValueError("y: expected the observed targets, got none")
    return x, y


# Groups


def _quantities(mixture: Mixture, names: Sequence[str], chains: int) -> dict[str, tuple[Array, Any]]:
    """Compute values ``(chains, draws, N, ...)``, with the names of the dimensions from N on."""
    known: dict[str, tuple[Callable[[], Tensor], str]] = {
        "mean": (lambda: mixture.mean, "output"),
        "stddev": (lambda: mixture.stddev, "output"),
        "weights": (lambda: mixture.logits.exp(), "component"),
        "locs": (lambda: mixture.locs, "component output"),
        "scales": (lambda: mixture.components.stddev().expand(mixture.locs.shape), "component output"),
        "entropy_bounds": (lambda: torch.stack(mixture.entropy_bounds(), -1), "bound"),
    }
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"quantities: expected some of {list(known)}, got {unknown}")
    chosen = {name: known[name] for name in names}
    return {n: (by_chain(to_numpy(value()), chains), ["obs_id", *dims.split()]) for n, (value, dims) in chosen.items()}


def _unnamed(values: Mapping[str, Array]) -> dict[str, tuple[Array, None]]:
    return {name: (value, None) for name, value in values.items()}


def _draws(source: Source, mixture: Mixture, num_samples: int | None) -> list[Array]:
    """Draws of each output, ``(chains, draws, N)``."""
    if source.is_posterior:
        return as_whole(by_chain(to_numpy(mixture.sample()), source.chains), mixture)
    return as_whole(to_numpy(mixture.pool(0).sample((num_samples or 1000,)))[None], mixture)


def _log_likelihood(mixture: Mixture, y: Observed, chains: int, labels: Labels) -> Dataset:
    values, dim = y.values(mixture), mixture.dim
    joint = by_chain(to_numpy(mixture.log_prob(values)), chains)
    observed: Array = ~np.isnan(y.numbers)
    rows: dict[str, tuple[Array, Array]] = {JOINT if dim > 1 else labels.names[0]: (joint, observed.max(1))}
    if dim > 1:
        for i, name in enumerate(labels.names):
            marginal = mixture.marginal(i).log_prob(values[:, [i]])
            rows[name] = (by_chain(to_numpy(marginal), chains), observed[:, i])
    return labels.of_rows(rows)


def _constant(x: Any, observed: Observed, labels: Labels) -> dict[str, Dataset]:
    """Inputs, and whether the event of a right-censored output was observed."""
    inputs = None if x is None else labels.inputs(as_array(x, "x"), len(observed.numbers))
    events = observed.events(labels)
    if inputs is None or events is None:
        known = events if inputs is None else inputs
        return {} if known is None else {"constant_data": known}
    return {"constant_data": inputs.merge(events.drop_vars("x", errors="ignore"))}


def _prior_draws(prior: Any, shape: tuple[int, ...]) -> list[Array]:
    drawn = to_numpy(prior.sample()) if isinstance(prior, Mixture) else as_array(prior, "prior")
    if drawn.ndim != 3 or drawn.shape[1:] != shape:
        raise ValueError(f"prior: expected draws of y {('S', *shape)}, got {drawn.shape}")
    return as_whole(drawn[None], prior) if isinstance(prior, Mixture) else [*np.moveaxis(drawn[None], -1, 0)]


def _predictions(predictions: Any, source: Source, num_samples: int | None, labels: Labels) -> dict[str, Dataset]:
    new, inputs = predictions if isinstance(predictions, tuple) else (predictions, None)
    if not isinstance(new, Mixture):
        if source.network is None:
            expected = "a Mixture, as predictive is one"
            raise ValueError(f"predictions: expected {expected}, got {type(new).__name__}")
        new, inputs = predict(source.network, new, source.posterior), new
    if new.dim != len(labels.names) or len(new.batch_shape) not in (1, 2):
        expected = f"mixtures (N',) or (S, N') over {len(labels.names)} outputs"
        raise ValueError(f"predictions: expected {expected}, got {tuple(new.batch_shape)} over {new.dim}")
    new = new.expand((1, *new.batch_shape)) if len(new.batch_shape) == 1 else new
    size = new.batch_shape[1]
    rows = labels.at(inputs, size)
    chains = source.chains if new.batch_shape[0] == source.mixture.batch_shape[0] else 1
    drawn = _draws(source._replace(chains=chains), new, num_samples)
    groups = {"predictions": rows.of_outputs(drawn, np.zeros((size, new.dim)))}
    if inputs is not None:
        groups["predictions_constant_data"] = rows.inputs(as_array(inputs, "predictions"), size)
    return groups


def _versions() -> dict[str, str]:
    names = {"pyro_mdn": "pyro-mdn", "pyro": "pyro-ppl", "torch": "torch", "arviz": "arviz"}
    own = {"inference_library": "pyro_mdn", "inference_library_version": version("pyro-mdn")}
    return own | {
        "_".join((name, "version")): version(package) for name, package in names.items() if name != "pyro_mdn"
    }
