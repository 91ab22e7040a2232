r"""Laplace approximation: a Gaussian at the mode of the posterior of the weights."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from tqdm.auto import tqdm

from pyro_mdn.distributions.observations.targets import TargetsOrTensor
from pyro_mdn.networks.batched.functional import over_draws
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.raw_parameters import Raw
from pyro_mdn.posteriors.guide_draws import LaplaceGuide
from pyro_mdn.posteriors.log_joint import LogJoint, reciprocal_variance, rows_of, undisturbed
from pyro_mdn.support.checks import all_finite, shown
from pyro_mdn.support.process_state import give_way

__all__ = ["laplace", "mode_and_scale", "prior_precision"]

_LIMIT = 10_000  # latent weights; the precision matrix takes their square times 8 bytes
_NEGLIGIBLE = 1e-13  # share in the precision of the prior
_BLOCK = 512


def laplace(
    network: MixtureDensityNetwork, x: Any, y: Any, *, max_iter: int = 1000, progress: bool = True
) -> LaplaceGuide:
    r"""Approximate the posterior of latent weights by a Gaussian at its mode, with generalised Gauss-Newton curvature.

    .. math:: q(w) = \mathcal{N}(w \mid \hat w, \Lambda^{-1}), \quad
              \Lambda = \sum_n J_n^\top H_n^+ J_n - \nabla^2 \log p(\hat w)

    Here :math:`J_n` is the Jacobian of the raw outputs of the head for row n with respect to the latent weights, and
    :math:`H_n^+` the Hessian of the row's negative log-likelihood with respect to these outputs. That of a mixture is
    not convex; negative eigenvalues are set to 0, so that :math:`\Lambda` is positive definite. The approximation is
    exact for latent weights of the head, one component and fixed noise.

    The posterior of a mixture network has many modes, because components and hidden units are exchangeable; this is a
    mode near the values that the weights had. The posterior of weights in all layers is less normal than that of the
    head, ``bayesianize(network, layers="head")``: draws need ``posterior_predictive(..., linearize=True)``.

    For P weights and N rows with C raw outputs each, time grows as :math:`(N C + P) P^2`, memory as :math:`P^2`: some
    seconds for the 5 263 weights of a default network and 600 rows.

    Args:
        network: Network with latent weights, 10 000 at most.
        x: Inputs ``(N, ..., dim_in)``: all rows.
        y: Targets ``(N, ..., D)``. NaN marks missing entries: the density of a row is that of its observed ones.
        max_iter: Largest number of steps of L-BFGS from ``starting_weights(network)`` to the mode; 0 takes the starting
            weights as they are.
        progress: Show a progress bar.

    Returns:
        Guide of ``network.model``, ready for :func:`pyro_mdn.posterior_predictive` and whatever takes a guide.

    Raises:
        ValueError: If there are no latent weights or too many, if the support of a prior is not the real line, if a
            prior depends on other weights, or if the data are not usable.
        FloatingPointError: If the density of the starting weights is not finite, or a derivative at the mode.

    References:
        MacKay (1992), A practical Bayesian framework for backpropagation networks.
        Martens (2020), New insights and perspectives on the natural gradient method.
        Daxberger et al. (2021), Laplace Redux: effortless Bayesian deep learning.

    >>> from pyro_mdn import bayesianize, posterior_predictive
    >>> network = bayesianize(MixtureDensityNetwork(1, 1, n_components=3), layers="head")
    >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = laplace(network, x, x**2, max_iter=10, progress=False)
    >>> posterior_predictive(network, guide, x, num_samples=20).batch_shape
    torch.Size([20, 50])
    """
    if isinstance(max_iter, bool) or not isinstance(max_iter, Integral) or int(max_iter) < 0:
        raise ValueError(f"max_iter: expected an integer that is not negative, got {shown(max_iter)}")
    with undisturbed(network):
        rows = rows_of(network, x, y)
        joint = LogJoint(network, rows)
        if joint.num_weights > _LIMIT:
            expected = f"at most {_LIMIT} latent weights, such as bayesianize(network, layers='head') makes"
            raise ValueError(f"network: expected {expected}, got {joint.num_weights}")
        return _guide(network, *mode_and_scale(joint, int(max_iter), progress=progress), rows.x[:1], rows.y[:1])


def mode_and_scale(joint: LogJoint, max_iter: int, *, progress: bool, block: int = _BLOCK) -> tuple[Tensor, Tensor]:
    """Compute mode ``(P,)`` and lower triangle of the covariance ``(P, P)`` of :func:`laplace`, in float64.

    Args:
        joint: Density of weights and data.
        max_iter: Largest number of steps to the mode.
        progress: Show a progress bar.
        block: Columns of a triangle that are computed together.
    """
    mode = _climb(joint, max_iter, progress=progress)
    return mode, _inverse_root(_precision(joint, mode, block), block)


def _climb(joint: LogJoint, max_iter: int, *, progress: bool) -> Tensor:
    """Find the mode by L-BFGS: the weights of the highest density that it meets."""
    from scipy.optimize import minimize  # it takes longer to import than all of this package

    best = joint.flatten(joint.start)
    if max_iter == 0:
        return best
    highest, _ = joint.value_and_gradient(best)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, highest
        vector = torch.from_numpy(point).to(best)
        value, gradient = joint.value_and_gradient(vector)
        if value > highest:
            best, highest = vector.clone(), value
        # A line search steps back from large numbers, but not from infinite ones or NaN.
        return min(-value, 1e300) if value == value else 1e300, -gradient.nan_to_num().cpu().numpy()

    with tqdm(total=max_iter, desc="laplace", disable=not progress, leave=False) as bar:
        options: Any = {"maxiter": max_iter, "maxfun": 10 * max_iter, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-7}
        minimize(
            loss, best.cpu().numpy(), jac=True, method="L-BFGS-B", callback=lambda _: bar.update(), options=options
        )
    return best


# Curvature


def _precision(joint: LogJoint, mode: Tensor, block: int) -> Tensor:
    """Compute the Gauss-Newton precision ``(P, P)``, in float64."""
    weights = joint.unflatten(mode)
    head = joint.network.head
    blocks = [prior_precision(prior, weights[name]) for name, prior in joint.priors.items()]
    total = torch.block_diag(*blocks)
    floor = total.diagonal().min()
    for inputs, y in joint.chunks(joint.rows(lambda part: (_jacobian(joint, mode, part),))):
        give_way()
        jacobian = _jacobian(joint, mode, inputs)
        with torch.no_grad():
            raw = _joined(joint.raw(weights, inputs))
        weighted = (_output_root(head, raw, y, (jacobian != 0).any(-1)).mT @ jacobian).reshape(-1, len(mode))
        # Outputs of unused components and directions without curvature are negligible beside the prior.
        _add_square(total, weighted[~(weighted.square().sum(-1) <= _NEGLIGIBLE * floor)], block)  # NaN counts
    total = total.tril() + total.tril(-1).mT
    if not all_finite(total):
        raise FloatingPointError("network: expected finite derivatives at the mode, got NaN or Inf")
    return total


def _add_square(total: Tensor, factor: Tensor, block: int) -> None:
    """Add ``factor.mT @ factor`` to the lower triangle of a matrix, in place."""
    for start in range(0, len(total), block):
        stop = start + block
        total[start:stop, :stop].addmm_(factor[:, start:stop].mT, factor[:, :stop])


def _jacobian(joint: LogJoint, mode: Tensor, inputs: Tensor) -> Tensor:
    """Compute the Jacobian of each row's raw outputs with respect to the weights, ``(N, ..., C, P)``."""

    def of_row(row: dict[str, Tensor]) -> tuple[Tensor]:
        def outputs(vector: Tensor) -> Tensor:
            return _joined(joint.raw(joint.unflatten(vector), row["inputs"].unsqueeze(0)))[0]

        return (torch.func.jacrev(outputs)(mode),)

    module = joint.network.head if joint.in_head else joint.network
    (jacobian,) = over_draws(of_row, {"inputs": inputs}, module)
    return jacobian.detach()


def _output_root(head: MixtureHead, raw: Tensor, y: TargetsOrTensor, latent: Tensor) -> Tensor:
    """Compute a root R of the positive part of the Hessian of each row's loss, :math:`H^+ = R R^T`.

    The root has shape ``(N, ..., C, C)``. Outputs that do not depend on latent weights, ``(N, ..., C)``, are constants.
    """
    raw = raw.double().requires_grad_()
    density = head.log_density(_split(head, raw), y.double(), head.units_in(torch.float64))
    (gradient,) = torch.autograd.grad(-density.sum(), raw, create_graph=True)
    # Rows do not depend on each other, so that one derivative of the sum has those of all rows.
    columns = [torch.autograd.grad(g.sum(), raw, retain_graph=True)[0] for g in gradient.unbind(-1)]
    hessian = torch.stack(columns, -1) * latent.unsqueeze(-1) * latent.unsqueeze(-2)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def _joined(raw: Raw) -> Tensor:
    """Raw outputs ``(*batch, C)`` in one tensor."""
    logits, *others = raw
    return torch.cat([logits, *(part.flatten(-2).expand(*logits.shape[:-1], -1) for part in others)], -1)


def _split(head: MixtureHead, joined: Tensor) -> Raw:
    """Inverse of :func:`_joined`."""
    n_components = head.n_components
    blocks = [(1 if block.tied else n_components, block.width) for block in head.family.blocks(head.dim_out)]
    shapes = [(n_components, head.dim_out), *blocks]
    logits, *parts = joined.split([n_components, *(groups * width for groups, width in shapes)], -1)
    return logits, *(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


def prior_precision(prior: Distribution, value: Tensor) -> Tensor:
    """Compute minus the Hessian of a prior's log-density, ``(P, P)``, but at least the precision of the prior."""
    floor = reciprocal_variance(prior, value)
    if not isinstance(prior, Independent) or prior.base_dist.event_shape:
        hessian = torch.autograd.functional.hessian(
            lambda v: -prior.log_prob(v.reshape(value.shape)).sum(), value.flatten()
        )
        values, vectors = torch.linalg.eigh(torch.as_tensor(hessian).double())
        # No direction has a variance above the sum of those of all entries, so a joint normal stays as it is.
        return (vectors * values.clamp(min=1 / float(floor.reciprocal().sum()))) @ vectors.mT
    value = value.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(prior.log_prob(value).sum(), value, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), value, allow_unused=True) if slope.requires_grad else (None,)
    curvature = torch.zeros_like(value) if bend is None else -bend
    return torch.maximum(curvature.double(), floor).flatten().diag()


def _inverse_root(precision: Tensor, block: int) -> Tensor:
    r"""Lower triangle L of a covariance :math:`\Sigma = L L^T = \Lambda^{-1}`."""
    jitter, scale = 0.0, precision.diagonal().mean()
    while True:
        damped = precision.clone()
        damped.diagonal().add_(jitter * scale)
        # The factor of the matrix in reverse order is an upper triangle U with UUᵀ = Λ; L is its inverse transposed.
        root, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        jitter = max(1e-14, 10 * jitter)
    return _inverse_triangle(root.flip(0, 1).mT, block)


def _inverse_triangle(root: Tensor, block: int) -> Tensor:
    """Invert a lower triangle block by block, without its zeros."""
    inverse = torch.zeros_like(root, memory_format=torch.contiguous_format)
    for start in range(0, len(root), block):
        part = root[start:, start:]
        columns = torch.eye(len(part), min(block, len(part)), dtype=root.dtype, device=root.device)
        inverse[start:, start : start + block] = torch.linalg.solve_triangular(part, columns, upper=False)
    return inverse


# Guide


def _guide(network: MixtureDensityNetwork, loc: Tensor, scale_tril: Tensor, x: Tensor, y: TargetsOrTensor) -> Any:
    guide: Any = LaplaceGuide(network.model)
    guide(x, y)  # with targets, which an AutoGuide would take for latent otherwise
    with torch.no_grad():
        scale = scale_tril.diagonal()
        guide.loc.copy_(loc)
        guide.scale = scale.to(guide.loc)
        guide.scale_tril = (scale_tril / scale.unsqueeze(-1)).to(guide.loc)
    return guide
