r"""Predictions, and the draws behind them, in ArviZ: its only importer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.arrays import Array, as_array, to_numpy
from pyro_mdn.checks import require_counts
from pyro_mdn.ensemble import DeepEnsemble
from pyro_mdn.isolation import seeded
from pyro_mdn.labels import JOINT, Labels, by_chain
from pyro_mdn.mixture import GaussianMixture
from pyro_mdn.network import MixtureDensityNetwork
from pyro_mdn.source import ENSEMBLE, POINT, Source, predict

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["LooPit", "compare", "loo", "loo_pit", "to_inference_data"]

_FEWEST_DRAWS = 50


class LooPit(NamedTuple):
    """Leave-one-out transforms ``(N, D)``, and Pareto's k of each row ``(N,)``: above 0.7 they are not reliable."""

    pit: Tensor
    pareto_k: Tensor


def to_inference_data(
    predictive: GaussianMixture | MixtureDensityNetwork | DeepEnsemble,
    y: Any,
    x: Any = None,
    *,
    posterior: Any = None,
    prior: GaussianMixture | Any = None,
    predictions: Any = None,
    num_samples: int | None = None,
    quantities: Sequence[str] = ("mean",),
    sites: bool = True,
    output_names: Sequence[str] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> Any:
    r"""Predictions of observed rows as ArviZ has them: ``InferenceData`` on 0.x, ``xarray.DataTree`` on 1.x.

    Groups and their variables, all with named dimensions:

    * ``posterior_predictive``: draws of each output. One for each draw of the weights; for a point estimate or an
      ensemble ``num_samples`` of the (average) density.
    * ``log_likelihood``: pointwise log-density of each draw of the weights. Of several outputs together under
      ``"joint"``, which is what ``loo`` needs, and of each under its name.
    * ``posterior``: ``quantities`` of the mixtures, and the draws of the weights where there are any.
    * ``sample_stats``: log joint density and divergences, of :class:`pyro_mdn.PosteriorSamples`.
    * ``observed_data``, ``constant_data`` (the inputs), ``prior_predictive``, ``predictions`` and
      ``predictions_constant_data``, of what is given.

    Attributes say which inference it was, the versions of packages, and how the network scales the data. Targets
    that are NaN were not observed: an output with some has its observed rows only, on a dimension ``obs_id_<name>``.

    Args:
        predictive: Mixtures of batch shape ``(N,)``, a point estimate, or ``(S, N)``, by draws of the weights. Or a
            network, or an ensemble, which are applied to x.
        y: Observed targets ``(N, D)``, or ``(N,)`` for D = 1: a tensor, array or pandas object, whose index and
            columns name rows and outputs.
        x: Inputs ``(N, ..., dim_in)``, likewise.
        posterior: Of a network, what :func:`pyro_mdn.posterior_predictive` takes. Of mixtures, the draws of the weights
            that they were made from: ``(S, *shape)`` by site, :class:`pyro_mdn.PosteriorSamples` or ``MCMC``; of the
            last two the chains stay apart.
        prior: Mixtures ``(S, N)`` by draws from the prior, or draws of y ``(S, N, D)``.
        predictions: Mixtures for new inputs, ``(N',)`` or ``(S, N')``; a pair of them and these inputs; or the inputs
            alone, if ``predictive`` is a network or an ensemble.
        num_samples: Draws of the weights from a guide, or of y from a point estimate or an ensemble; by default 1000.
        quantities: Some of ``"mean"``, ``"stddev"``, ``"weights"``, ``"locs"``, ``"scales"`` and ``"entropy_bounds"``.
        sites: Whether to have the draws of the weights in ``posterior``.
        output_names: Names of the D outputs; by default columns of y, ``"y"``, or ``"y0"``, ``"y1"``, ....
        coords: Labels along ``"obs_id"``, ``"input"``, or ``"component"``.
        method: Name of the inference; by default what can be told from ``predictive`` and ``posterior``. Mixtures of
            an ensemble need ``method="ensemble"``.
        seed: Seed of the draws; by default torch's generator goes on.

    Raises:
        ValueError: If shapes, names, indices or counts do not agree.
        ImportError: If ArviZ is not installed.

    References:
        Kumar, Carroll, Hartikainen & Martin (2019), ArviZ: a unified library for exploratory analysis of Bayesian
        models in Python.

    >>> data = to_inference_data(MixtureDensityNetwork(1, 1), torch.randn(5, 1), torch.randn(5, 1), num_samples=100)
    >>> dict(data["posterior_predictive"]["y"].sizes)
    {'chain': 1, 'draw': 100, 'obs_id': 5}
    """
    require_counts(num_samples=num_samples)
    targets = as_array(y, "y")
    targets = targets[:, None] if targets.ndim == 1 else targets
    if not targets.size or np.isinf(targets).any():
        raise ValueError(f"y: expected finite numbers, or NaN, in one row at least, got shape {targets.shape}")
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
        groups["log_likelihood"] = _log_likelihood(mixture, targets, source.chains, labels)
        if source.stats:
            groups["sample_stats"] = labels.dataset(_unnamed(source.stats))
        if prior is not None:
            groups["prior_predictive"] = labels.of_outputs(_prior_draws(prior, targets.shape), targets)
        groups["observed_data"] = labels.of_outputs(targets, targets)
        if x is not None:
            groups["constant_data"] = labels.inputs(as_array(x, "x"), len(targets))
        if predictions is not None:
            groups |= _predictions(predictions, source, num_samples, labels)
    return _assemble(groups, {"inference_method": source.method, **_versions(), **source.scaling})


def loo(data: Any, *, pointwise: bool = True) -> Any:
    r"""Expected log predictive density by leave-one-out cross-validation, from ArviZ, on the joint log-likelihood.

    .. math:: \sum_n \log p(y_n \mid y_{-n})

    by Pareto-smoothed importance sampling over draws from the posterior. The relative efficiency of the draws is that
    of the likelihoods.

    Args:
        data: What :func:`to_inference_data` gave for draws from a posterior.
        pointwise: Have the terms, and Pareto's k of each row.

    Raises:
        ValueError: If it is of a point estimate (also as a guide: ``AutoDelta``), an ensemble, or fewer than 50 draws,
            for which it has no meaning:
            :func:`pyro_mdn.scores.compare` compares those on held-out rows.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    >>> mixture = MixtureDensityNetwork(1, 1)(torch.randn(5, 1)).affine(0.01 * torch.randn(500, 1, 1))  # 500 draws
    >>> int(loo(to_inference_data(mixture, torch.randn(5, 1))).n_data_points)
    5
    """
    az = _arviz()
    name, likelihood = _joint_log_likelihood(data)
    with _without_deprecations():
        efficiency = az.ess(np.exp(likelihood - likelihood.max(("chain", "draw"))).to_dataset(name=name), method="mean")
        draws = likelihood.sizes["chain"] * likelihood.sizes["draw"]
        reff = float(np.clip(efficiency[name].mean() / draws, 1 / draws, 1.0))
        return az.loo(data, pointwise=pointwise, var_name=name, reff=reff)


def compare(models: Mapping[str, Any], **settings: Any) -> Any:
    """Compare models by :func:`loo`, and weight them; a pandas frame, from ArviZ, the best first.

    Args:
        models: What :func:`to_inference_data` gave for each, of the same targets.
        settings: For ``arviz.compare``.

    Raises:
        ValueError: If the targets differ, there is one model only, or :func:`loo` refuses one.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Using stacking to average Bayesian predictive distributions.

    >>> y, mixture = torch.randn(5, 1), MixtureDensityNetwork(1, 1)(torch.randn(5, 1))
    >>> draws = {"a": mixture.affine(0.01 * torch.randn(500, 1, 1)), "b": mixture.affine(0.01 * torch.randn(500, 1, 1))}
    >>> sorted(compare({name: to_inference_data(draws[name], y) for name in draws}).index)
    ['a', 'b']
    """
    if len(models) < 2:
        raise ValueError(f"models: expected two at least, got {len(models)}")
    first, *others = models.items()
    for name, data in others:
        if not _same(first[1]["observed_data"], data["observed_data"]):
            raise ValueError(f"models: expected the same targets, got others in {first[0]!r} and {name!r}")
    results = {name: loo(data) for name, data in models.items()}
    with _without_deprecations():
        return _arviz().compare(results, **settings)


@torch.no_grad()
def loo_pit(mixture: GaussianMixture, y: Tensor, *, reff: float = 1.0) -> LooPit:
    r"""Probability integral transforms of each row by the predictive distribution that did not see it.

    .. math:: u_{nd} = \sum_s w_{sn} F_d(y_{nd} \mid x_n, \theta_s), \quad w_{sn} \propto 1 / p(y_n \mid x_n, \theta_s)

    with Pareto-smoothed weights, and the mixture's own distribution function in place of draws. NaN where a target was
    not observed.

    Args:
        mixture: Mixtures by draws from a posterior, ``(S, N)``.
        y: Targets ``(N, D)`` that it was conditioned on.
        reff: Effective share of independent draws among them.

    Raises:
        ValueError: If there are fewer than 50 draws, or shapes do not agree.

    References:
        Gelfand, Dey & Chang (1992), Model determination using predictive distributions with implementation via
        sampling-based methods.
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    >>> mixture = MixtureDensityNetwork(1, 1)(torch.randn(5, 1)).affine(0.01 * torch.randn(500, 1, 1))  # 500 draws
    >>> loo_pit(mixture, torch.randn(5, 1)).pit.shape
    torch.Size([5, 1])
    """
    if len(mixture.batch_shape) != 2 or y.shape != (*mixture.batch_shape[1:], mixture.dim):
        expected = "mixtures (S, N) and y of shape (N, D)"
        raise ValueError(f"mixture, y: expected {expected}, got {tuple(mixture.batch_shape)} and {tuple(y.shape)}")
    _require_draws(mixture.batch_shape[0])
    log_weights, pareto_k = _psis(mixture.log_prob(y).T.double().cpu().numpy(), reff)
    weights = torch.from_numpy(log_weights).exp().T.unsqueeze(-1).to(y)
    pit = (weights * mixture.cdf(y)).sum(0).clamp(0, 1)
    return LooPit(pit, torch.from_numpy(pareto_k))


# Groups


def _quantities(mixture: GaussianMixture, names: Sequence[str], chains: int) -> dict[str, tuple[Array, Any]]:
    """Values ``(chains, draws, N, ...)`` and names of the dimensions from N on."""
    known: dict[str, tuple[Callable[[], Tensor], str]] = {
        "mean": (lambda: mixture.mean, "output"),
        "stddev": (lambda: mixture.stddev, "output"),
        "weights": (lambda: mixture.logits.exp(), "component"),
        "locs": (lambda: mixture.locs, "component output"),
        "scales": (lambda: mixture.covariance.stddev().expand(mixture.locs.shape), "component output"),
        "entropy_bounds": (lambda: torch.stack(mixture.entropy_bounds(), -1), "bound"),
    }
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"quantities: expected some of {list(known)}, got {unknown}")
    chosen = {name: known[name] for name in names}
    return {n: (by_chain(to_numpy(value()), chains), ["obs_id", *dims.split()]) for n, (value, dims) in chosen.items()}


def _unnamed(values: Mapping[str, Array]) -> dict[str, tuple[Array, None]]:
    return {name: (value, None) for name, value in values.items()}


def _draws(source: Source, mixture: GaussianMixture, num_samples: int | None) -> Array:
    """Draws of y, ``(chains, draws, N, D)``."""
    if source.is_posterior:
        return by_chain(to_numpy(mixture.sample()), source.chains)
    return to_numpy(mixture.pool(0).sample((num_samples or 1000,)))[None]


def _log_likelihood(mixture: GaussianMixture, y: Array, chains: int, labels: Labels) -> Dataset:
    values = torch.tensor(y, device="cpu").to(mixture.locs)
    joint = by_chain(to_numpy(mixture.log_prob(values)), chains)
    observed: Array = ~np.isnan(y)
    rows: dict[str, tuple[Array, Array]] = {JOINT if y.shape[1] > 1 else labels.names[0]: (joint, observed.max(1))}
    if y.shape[1] > 1:
        for i, name in enumerate(labels.names):
            marginal = mixture.marginal(i).log_prob(values[:, [i]])
            rows[name] = (by_chain(to_numpy(marginal), chains), observed[:, i])
    return labels.of_rows(rows)


def _prior_draws(prior: Any, shape: tuple[int, ...]) -> Array:
    drawn = to_numpy(prior.sample()) if isinstance(prior, GaussianMixture) else as_array(prior, "prior")
    if drawn.ndim != 3 or drawn.shape[1:] != shape:
        raise ValueError(f"prior: expected draws of y {('S', *shape)}, got {drawn.shape}")
    return drawn[None]


def _predictions(predictions: Any, source: Source, num_samples: int | None, labels: Labels) -> dict[str, Dataset]:
    new, inputs = predictions if isinstance(predictions, tuple) else (predictions, None)
    if not isinstance(new, GaussianMixture):
        if source.network is None:
            expected = "a GaussianMixture, as predictive is one"
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


# ArviZ


def _arviz() -> Any:
    with _without_deprecations():
        try:
            import arviz
        except ImportError as error:
            raise ImportError("this needs ArviZ: pip install 'pyro-mdn[arviz]'") from error
    return arviz


def _is_new(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) >= 1


def _assemble(groups: Mapping[str, Dataset], attributes: Mapping[str, Any]) -> Any:
    az = _arviz()
    kept = {name: group.assign_attrs(attributes) for name, group in groups.items() if group.data_vars}
    if _is_new(az):
        from xarray import DataTree

        tree = DataTree.from_dict(kept)
        tree.attrs.update(attributes)
        return tree
    return az.InferenceData(attrs=dict(attributes), **kept)


def _versions() -> dict[str, str]:
    names = {"pyro_mdn": "pyro-mdn", "pyro": "pyro-ppl", "torch": "torch", "arviz": "arviz"}
    own = {"inference_library": "pyro_mdn", "inference_library_version": version("pyro-mdn")}
    return own | {f"{name}_version": version(package) for name, package in names.items() if name != "pyro_mdn"}


def _psis(log_likelihood: Array, reff: float) -> tuple[Array, Array]:
    """Log-weights ``(N, S)`` that leave each row out, from its log-likelihood by draw, and Pareto's k ``(N,)``."""
    az = _arviz()
    with _without_deprecations():
        if _is_new(az):
            from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

            return array_stats.psislw(log_likelihood, r_eff=reff, axis=-1)
        return az.psislw(-log_likelihood, reff=reff)


def _joint_log_likelihood(data: Any) -> tuple[str, Any]:
    group = data["log_likelihood"]
    names: list[Hashable] = list(group.data_vars)
    name = str(JOINT if len(names) > 1 else names[0])
    method = data.attrs.get("inference_method", "draws from a posterior")
    if method in (POINT, ENSEMBLE):
        article = "an" if method == ENSEMBLE else "a"
        raise _no_posterior(f"{article} {method}")
    likelihood = group[name]
    _require_draws(likelihood.sizes["chain"] * likelihood.sizes["draw"])
    spread = likelihood.max(("chain", "draw")) - likelihood.min(("chain", "draw"))
    if bool((spread <= 1e-5 * (1 + abs(likelihood).max())).all()):
        raise _no_posterior(f"draws that are all the same, by {method}")
    return name, likelihood


def _require_draws(draws: int) -> None:
    if draws < _FEWEST_DRAWS:
        raise _no_posterior(f"{draws} draws")


def _no_posterior(got: str) -> ValueError:
    expected = f"at least {_FEWEST_DRAWS} draws from a posterior"
    advice = "held-out rows tell such predictions apart: pyro_mdn.scores.compare, and scores.pit"
    return ValueError(f"leave-one-out: expected {expected}, got {got}; {advice}")


def _same(one: Any, other: Any) -> bool:
    names = set(one.data_vars)
    return names == set(other.data_vars) and all(np.array_equal(one[name], other[name]) for name in names)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """What ArviZ 0.x itself uses of other packages is not the caller's concern."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield
