r"""Guides of variational inference: many draws of the latent weights in one pass, with their densities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoMultivariateNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_mdn.networks.batched.functional import OwnParameters, over_draws
from pyro_mdn.support.process_state import KeepFrozen, unvalidated
from pyro_mdn.support.pyro_compat import site_is_subsample

__all__ = ["LaplaceGuide", "draw_from", "latent_sites", "log_density_at", "require_sites"]


class LaplaceGuide(AutoMultivariateNormal):
    """Normal around a mode, whose precision is the curvature of a network with outputs linear in the weights."""


def draw_from(
    guide: Callable[..., Any], size: int, *args: Any, pathwise: bool = False, density: bool = True, **kwargs: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw at the sites of a guide, ``(S, *shape)`` by name, and compute the log-density of each draw, ``(S,)``.

    Args:
        guide: The guide. An AutoGuide that was never called is called once, to make its parameters.
        size: Number of draws S.
        args: Arguments of the guide, which are those of the model.
        pathwise: Whether every site must have pathwise gradients.
        density: Whether to compute the log-density; it is 0 otherwise.
        kwargs: Further arguments of the guide.

    Raises:
        ValueError: If a site has no pathwise gradients, but must have them, or torch.vmap cannot handle the guide.
    """
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        with KeepFrozen():
            guide(*args, **kwargs)
    posterior = guide.get_posterior(*args, **kwargs) if isinstance(guide, AutoContinuous) and size > 1 else None
    names: list[str] = []

    def draw(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with KeepFrozen(), _Auxiliary(given.get("latent")):
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        sites = latent_sites(trace)
        if pathwise:
            _require_pathwise(sites)
        names[:] = (name for name, site in sites.items() if not _is_auxiliary(site))
        counted = () if not density else names if "latent" in given else sites
        return (*(sites[name]["value"] for name in names), log_density_at(counted, trace))

    if size == 1:
        *values, log_density = (result.unsqueeze(0) for result in draw({}))
        return dict(zip(names, values, strict=True)), log_density
    given = {"number": torch.arange(size)}
    if posterior is not None:
        given["latent"] = _sampled(posterior, size)
    *values, log_density = _mapped(draw, given, guide)
    if posterior is not None and density:
        log_density = log_density + posterior.log_prob(given["latent"])
    return dict(zip(names, values, strict=True)), log_density


def _sampled(posterior: Any, size: int) -> Tensor:
    """Draw vectors from a distribution; for normals, in fewer passes over memory than by ``rsample``."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(size, like.shape[-1], dtype=like.dtype, device=like.device)

    if isinstance(posterior, dist.MultivariateNormal):
        return torch.addmm(posterior.loc, noise(posterior.loc), posterior.scale_tril.mT)
    if isinstance(posterior, dist.LowRankMultivariateNormal):
        spread = noise(posterior.loc) * posterior.cov_diag.sqrt()
        return torch.addmm(posterior.loc + spread, noise(posterior.cov_factor), posterior.cov_factor.mT)
    if isinstance(posterior, dist.Independent) and isinstance(normal := posterior.base_dist, dist.Normal):
        return torch.addcmul(normal.loc, noise(normal.loc), normal.scale)
    return posterior.rsample(torch.Size((size,)))


def _mapped(function: Callable[..., tuple[Tensor, ...]], given: Mapping[str, Tensor], guide: Any) -> tuple[Tensor, ...]:
    module = guide if isinstance(guide, nn.Module) else nn.Identity()
    with ExitStack() as stack:
        stack.enter_context(unvalidated())
        stack.enter_context(OwnParameters())
        return over_draws(function, given, module)


def latent_sites(trace: Any, given: Collection[str] = ()) -> dict[str, Any]:
    """Select the sample sites of a trace that are not observed, and those that were given."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and (name in given or not site["is_observed"])
    }


def log_density_at(names: Collection[str], trace: Any) -> Tensor:
    """Compute the joint log-density of a trace at these sites, a number."""
    total = trace.log_prob_sum(lambda name, _: name in names)
    return total if isinstance(total, Tensor) else torch.zeros(())


def require_sites(name: str, expected: Collection[str], got: Collection[str]) -> None:
    """Raise a ``ValueError`` if sites differ from the expected ones."""
    if set(expected) != set(got):
        raise ValueError(f"{name}: expected the sites {sorted(expected)}, got {sorted(got)}")


def _require_pathwise(sites: Mapping[str, Any]) -> None:
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(f"guide: expected pathwise gradients at site {name!r}, got {type(site['fn']).__name__}")


def _is_auxiliary(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("is_auxiliary"))


class _Auxiliary(Messenger):
    """Set the auxiliary site of a guide to a value, if the value is not ``None``."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        if self.value is not None and _is_auxiliary(msg):
            msg["value"] = self.value
