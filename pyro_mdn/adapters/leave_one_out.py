r"""Leave-one-out cross-validation from draws of a posterior: densities, comparisons, and exact PIT values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.adapters.arviz_versions import comparison, dataset, effective_share, leave_one_out
from pyro_mdn.adapters.pareto_smoothing import smoothed_weights, varies, warn_if_unreliable
from pyro_mdn.adapters.sources import ENSEMBLE, POINT
from pyro_mdn.adapters.xarray_labels import JOINT
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.scores.transforms import levels_of
from pyro_mdn.support.arrays import Array, as_tensor, in_columns

__all__ = ["LooPit", "compare", "loo", "loo_pit"]

_FEWEST_DRAWS = 50
_ROUNDING = 1e-9


class LooPit(NamedTuple):
    """Leave-one-out PIT values ``(N, D)``, and Pareto's k of each row ``(N,)``; above 0.7 a row is not reliable."""

    pit: Tensor
    pareto_k: Tensor


def loo(data: Any, *, pointwise: bool = True) -> Any:
    r"""Estimate the expected log predictive density by leave-one-out cross-validation, jointly over outputs.

    .. math:: \sum_n \log p(y_n \mid y_{-n})

    The estimate is by Pareto-smoothed importance sampling over draws from the posterior. The relative efficiency of
    the draws is that of the likelihoods. The result has ArviZ's own type, with the same numbers on 0.x (``elpd_loo``,
    ``p_loo``, ``loo_i``) and 1.x (``elpd``, ``p``, ``elpd_i``); ``se``, ``pareto_k`` and ``warning`` have the same
    names on both.

    Pareto's k is infinite, never NaN, if no distribution fits the largest weights: those of a chain that is stuck, or
    weights that are too uneven for floating point. If a row has the same density under all draws, the estimate is
    exactly this density, and k = 0.

    Args:
        data: Result of :func:`pyro_mdn.to_inference_data` for draws from a posterior.
        pointwise: Whether the result has the term and Pareto's k of each row.

    Raises:
        ValueError: If the data are of a point estimate (also as a guide: ``AutoDelta``), an ensemble, or fewer than 50
            draws, for which leave-one-out has no meaning; :func:`pyro_mdn.scores.compare` compares those on held-out
            rows. If a log-likelihood is not finite.

    Warns:
        UserWarning: If Pareto's k of some rows is too large for that many draws.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    >>> from pyro_mdn import MixtureDensityNetwork, to_inference_data
    >>> mixture = MixtureDensityNetwork(1, 1)(torch.randn(5, 1)).affine(0.01 * torch.randn(500, 1, 1))  # 500 draws
    >>> int(loo(to_inference_data(mixture, y=torch.randn(5, 1))).n_data_points)
    5
    """
    return _loo(data, pointwise, "loo")


def compare(models: Mapping[str, Any], **settings: Any) -> Any:
    """Compare models by :func:`loo`, and weight them; returns ArviZ's pandas frame, with the best model first.

    Numbers are not rounded. On ArviZ 0.x and 1.x these columns have the same meaning: ``rank``, ``elpd``,
    ``p``, ``elpd_diff`` (the model less the best one, so never above 0), ``dse``, ``se``, ``weight`` and ``warning``.

    Args:
        models: Result of :func:`pyro_mdn.to_inference_data` for each, with the same targets of the same rows.
        settings: Arguments of ``arviz.compare``.

    Raises:
        ValueError: If targets or the labels of their rows differ, if there is only one model, or if :func:`loo` refuses
            one.

    Warns:
        UserWarning: If Pareto's k of some rows of a model is too large.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Using stacking to average Bayesian predictive distributions.

    >>> from pyro_mdn import MixtureDensityNetwork, to_inference_data
    >>> y, mixture = torch.randn(5, 1), MixtureDensityNetwork(1, 1)(torch.randn(5, 1))
    >>> draws = {"a": mixture.affine(0.01 * torch.randn(500, 1, 1)), "b": mixture.affine(0.01 * torch.randn(500, 1, 1))}
    >>> sorted(compare({name: to_inference_data(draws[name], y=y) for name in draws}).index)
    ['a', 'b']
    """
    if len(models) < 2:
        raise ValueError(f"models: expected two at least, got {len(models)}")
    observed = {name: dataset(data, "observed_data") for name, data in models.items()}
    first, *others = observed
    for name in others:
        if not observed[first].equals(observed[name]):
            expected = "the same targets of the same rows in the same order"
            raise ValueError(f"models: expected {expected}, got others in {first!r} and {name!r}")
    results = {}
    for name, data in models.items():
        results[name] = _loo(data, True, f"compare, {name!r}")
    return comparison(results, settings)


@torch.no_grad()
def loo_pit(mixture: Mixture, y: Any, *, reff: float = 1.0) -> LooPit:
    r"""Compute the probability integral transform (PIT) of each row by the prediction that leaves the row out.

    .. math:: u_{nd} = \sum_s w_{sn} F_d(y_{nd} \mid x_n, \theta_s), \quad w_{sn} \propto 1 / p(y_n \mid x_n, \theta_s)

    The weights are Pareto-smoothed, and the mixture's own distribution function takes the place of draws of y. Results
    are NaN where a target was not observed. Pareto's k is that of :func:`loo`: infinite if no distribution fits, 0 if
    all draws have the same density.

    Args:
        mixture: Mixtures for S draws from a posterior, ``(S, N)``.
        y: Targets ``(N, D)`` that the posterior was conditioned on: a tensor, array or data frame, or
            :class:`pyro_mdn.Targets`. Where a target is a count, or known to lie in an interval, the transform is drawn
            between the ends of its step, as :func:`pyro_mdn.scores.pit` does.
        reff: Effective share of independent draws among the S draws.

    Raises:
        ValueError: If there are fewer than 50 draws, if all are the same, or if shapes do not agree.

    Warns:
        UserWarning: If Pareto's k of some rows is too large for that many draws.

    References:
        Gelfand, Dey & Chang (1992), Model determination using predictive distributions with implementation via
        sampling-based methods.
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    >>> from pyro_mdn import MixtureDensityNetwork
    >>> mixture = MixtureDensityNetwork(1, 1)(torch.randn(5, 1)).affine(0.01 * torch.randn(500, 1, 1))  # 500 draws
    >>> loo_pit(mixture, torch.randn(5, 1)).pit.shape
    torch.Size([5, 1])
    """
    y = y if isinstance(y, Targets) else in_columns(as_tensor(y, "y", mixture.locs.device))
    if len(mixture.batch_shape) != 2 or y.shape != (*mixture.batch_shape[1:], mixture.dim):
        expected = "mixtures (S, N) and y of shape (N, D)"
        raise ValueError(f"mixture, y: expected {expected}, got {tuple(mixture.batch_shape)} and {tuple(y.shape)}")
    rows = mixture.log_prob(y).T.double().cpu().numpy()
    _require_posterior(rows, "draws from a posterior")
    log_weights, pareto_k = smoothed_weights(rows, reff)
    warn_if_unreliable("loo_pit", pareto_k, rows.shape[1])
    weights = torch.from_numpy(log_weights).exp().T.unsqueeze(-1).to(y.device)
    lower, upper = levels_of(mixture, y, 0.0)
    pit = (weights * lower).sum(0)
    if lower is not upper:
        pit = torch.lerp(pit, (weights * upper).sum(0), torch.rand_like(pit))
        pit = torch.where(pit > 1 + _ROUNDING, pit - 1, pit)  # of an arc that goes on at the start of the period
    return LooPit(pit.clamp(0, 1).to(y.dtype), torch.from_numpy(pareto_k))


def _loo(data: Any, pointwise: bool, name: str) -> Any:
    """Compute the result of :func:`loo`, with a warning that begins with this name."""
    likelihood, method = _joint_log_likelihood(data)
    values = np.asarray(likelihood)
    rows = values.reshape(-1, values.shape[2]).T
    changing = _require_posterior(rows, method)
    relative = values[..., changing]
    reff = effective_share(np.exp(relative - relative.max((0, 1))))
    log_weights, pareto_k = smoothed_weights(rows, reff)
    unreliable = warn_if_unreliable(name, pareto_k, rows.shape[1], stacklevel=4)
    return leave_one_out(likelihood, log_weights, pareto_k, reff, unreliable=unreliable, pointwise=pointwise)


def _joint_log_likelihood(data: Any) -> tuple[Any, str]:
    """Return the joint log-likelihood ``(chain, draw, N)`` in float64, and the name of the inference."""
    group = dataset(data, "log_likelihood")
    names: list[Hashable] = list(group.data_vars)
    method = str(data.attrs.get("inference_method", "draws from a posterior"))
    if method in (POINT, ENSEMBLE):
        raise _no_posterior(f"{'an' if method == ENSEMBLE else 'a'} {method}")
    likelihood = group[JOINT if len(names) > 1 else names[0]]
    return likelihood.transpose("chain", "draw", ...).astype(np.float64), method


def _require_posterior(rows: Array, method: str) -> Array:
    """Return which rows of log-likelihoods ``(N, S)`` vary; a ``ValueError`` unless they are of a posterior."""
    if (draws := rows.shape[1]) < _FEWEST_DRAWS:
        raise _no_posterior(f"{draws} draws")
    if count := int((~np.isfinite(rows)).sum()):
        raise ValueError(f"log_likelihood: expected finite numbers, got {count} of {rows.size} that are not")
    changing = varies(rows)
    if not changing.any():
        raise _no_posterior(f"draws that are all the same, by {method}")
    return changing


def _no_posterior(got: str) -> ValueError:
    expected = f"at least {_FEWEST_DRAWS} draws from a posterior"
    advice = "held-out rows tell such predictions apart: pyro_mdn.scores.compare, and scores.pit"
    return ValueError(f"leave-one-out: expected {expected}, got {got}; {advice}")
