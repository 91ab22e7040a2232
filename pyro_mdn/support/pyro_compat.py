r"""The names of Pyro that are private, or public but undocumented, each with what it gives: nobody else uses any.

``tests/test_private_names.py`` has a test of what each means. All pass with Pyro 1.9.0 and with 1.9.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
from pyro.infer.mcmc import util as _mcmc
from pyro.nn import PyroModule
from pyro.nn import module as _module
from pyro.poutine import runtime as _runtime
from pyro.poutine import util as _poutine
from torch import nn

from pyro_mdn.support.torch_compat import own_parameters

__all__ = [
    "LEARNED_OR_DRAWN",
    "MARK",
    "am_i_wrapped",
    "context_of",
    "draws_or_registers",
    "handlers",
    "has_lost_model",
    "is_latent",
    "latent_parameters",
    "name_in_store",
    "names_of_parameters",
    "select_samples",
    "site_is_subsample",
    "stored_parameter",
    "to_pyro_module_",
]

# Handlers and models

handlers = _runtime._PYRO_STACK
"""The list of handlers that are active, the innermost last; Pyro changes it in place. Public ones only join it."""

am_i_wrapped = _runtime.am_i_wrapped
"""Whether a handler is active. Undocumented."""

site_is_subsample = _poutine.site_is_subsample
"""Whether a site of a trace is a plate's subsample. Undocumented; the test of types that it makes may change."""

select_samples = _mcmc.select_samples
"""Draws of chains ``(chains, draws, ...)`` as ``MCMC.get_samples`` gives them, which takes them from its own alone."""


def has_lost_model(guide: Any) -> bool:
    """Whether a guide was pickled, and thereby has lost its model: to ask for the model is an error then."""
    return getattr(guide, "_model", guide) is None


# Modules

MARK = "_pyro_"
"""How the attributes begin in which Pyro keeps its own affairs of a module."""

LEARNED_OR_DRAWN = frozenset(("_pyro_params", "_pyro_samples"))
"""Attributes in which a module has its constrained and its latent parameters; they are empty where it has none."""

to_pyro_module_ = _module.to_pyro_module_
"""Change the class of a module and of its parts to ``PyroModule[...]``, in place. Undocumented."""


def latent_parameters(module: nn.Module) -> Mapping[str, Any]:
    """Priors of the latent parameters of a module itself, by name: an attribute would be a draw."""
    return module.__dict__.get("_pyro_samples", {})


def is_latent(module: nn.Module | None) -> bool:
    """Whether a module or a part of it has latent weights; asked at every call, so that it has to be quick."""
    return module is not None and (
        bool(module.__dict__.get("_pyro_samples")) or any(map(is_latent, module._modules.values()))
    )


def draws_or_registers(module: nn.Module) -> bool:
    """Whether a call draws weights of a module, or parts of it register their parameters; asked at every call, too."""
    if module.__dict__.get("_pyro_samples"):
        return True
    for part in module._modules.values():
        if part is not None and (isinstance(part, PyroModule) or (part._modules and draws_or_registers(part))):
            return True
    return False


def name_in_store(module: PyroModule, name: str) -> str:
    """Name of a parameter or site, given its name within a module, which may be a part of another one.

    A module has that place from its owner, and nothing public tells it.
    """
    return f"{module._pyro_name}.{name}".removeprefix(".")


def names_of_parameters(module: PyroModule) -> list[str]:
    """Names of the parameters of a module itself in the parameter store; constrained ones have another suffix there."""
    return [name_in_store(module, leaf.removesuffix("_unconstrained")) for leaf in own_parameters(module)]


def context_of(module: PyroModule) -> Any:
    """Context in which calls of a module share what they draw.

    ``active`` counts the calls; ``used`` says whether parameters may be in the store under the module's name.
    """
    return module._pyro_context


def stored_parameter(name: str, default: Any) -> Any:
    """Tensor of this name in the parameter store as it was put there; the store itself gives constrained ones."""
    return pyro.get_param_store()._params.get(name, default)
