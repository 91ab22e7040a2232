"""Mixtures over every noise model × tied × homoscedastic × batch shape, dense ones to check against; memory."""

import dataclasses
import itertools
import math
import subprocess
import sys
import weakref

import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_mdn import (
    Diagonal,
    Fixed,
    Full,
    Isotropic,
    LowRank,
    MixtureDensityNetwork,
    MixtureHead,
    NegativeLogLikelihood,
    SymmetricLaw,
    bayesianize,
)

DIM, K = 4, 3
STRUCTURES = {"full": Full, "low_rank": LowRank, "diagonal": Diagonal, "isotropic": Isotropic}
BATCH_SHAPES = {"unbatched": (), "vector": (5,), "matrix": (2, 3)}

NOISE = {
    f"{name}{'-tied' * tied}{'-homoscedastic' * homoscedastic}": structure(tied=tied, homoscedastic=homoscedastic)
    for (name, structure), tied, homoscedastic in itertools.product(STRUCTURES.items(), [False, True], [False, True])
} | {"fixed": Fixed(0.7)}


def make_head(noise, dim=DIM, n_components=K, in_features=6):
    """A float64 head with weights and units that are not special."""
    torch.manual_seed(1)
    if getattr(noise, "rank", 1) > dim:
        noise = dataclasses.replace(noise, rank=dim)
    head = MixtureHead(in_features, dim, n_components, noise=noise).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.shift.normal_()
    head.scale.uniform_(0.5, 2.0)
    return head


def make_mixture(noise, batch_shape=(5,), dim=DIM, n_components=K):
    """A float64 mixture without gradients, its memory channel-first as the head lays it out."""
    head = make_head(noise, dim, n_components)
    with torch.no_grad():
        return head(torch.randn(*batch_shape, 6, dtype=torch.float64))


def dense(mixture):
    """The same mixture by torch alone, from dense covariance matrices."""
    matrix = mixture.covariance.matrix().expand(*mixture.batch_shape, mixture.n_components, -1, -1)
    components = MultivariateNormal(mixture.locs, covariance_matrix=matrix)
    return MixtureSameFamily(Categorical(logits=mixture.logits), components)


@dataclasses.dataclass(frozen=True, eq=False)
class LaplaceLaw(SymmetricLaw):
    """A law that a user may write, which says no more than it has to: its cdf underflows."""

    def log_density(self, z):
        return -z.abs() - math.log(2)

    def cdf(self, z):
        return torch.where(z < 0, 0.5 * z.clamp(max=0).exp(), 1 - 0.5 * (-z.clamp(min=0)).exp())

    def quantile(self, q):
        return (2 * q).log()

    def mean_distance(self, z):
        return z.abs() + (-z.abs()).exp()

    def stddev(self):
        return math.sqrt(2)


def linear_regression(dim_out=1, rows=40, prior_scale=1.5):
    """A network that is Bayesian linear regression, its data, and mean and covariance of its posterior.

    Order of the weights: ``head.linear.bias``, then ``head.linear.weight``, each from the logit to the last output.
    """
    torch.manual_seed(2)
    network = MixtureDensityNetwork(3, dim_out, 1, hidden_dim=3, backbone=nn.Identity(), noise=Fixed(0.3)).double()
    x = torch.randn(rows, 3, dtype=torch.float64)
    y = 2 + x @ torch.randn(3, dim_out, dtype=torch.float64) + 0.3 * torch.randn(rows, dim_out, dtype=torch.float64)
    network.initialize_(x, y)
    bayesianize(network, prior_scale)
    features = torch.cat([torch.ones(rows, 1), (x - network.x_shift) / network.x_scale], -1)
    prior = torch.tensor([1.0, 3.0, 3.0, 3.0]).double().diag() / prior_scale**2
    unit = network.head.scale
    precision = (unit / 0.3).square() * features.T @ features + prior
    mean = torch.linalg.solve(precision, features.T @ (y - network.head.shift) * unit / 0.3**2).T
    means = torch.cat([torch.zeros(1, 4), mean])
    blocks = torch.block_diag(prior.inverse(), *[precision.inverse()] * dim_out)
    order = [4 * row for row in range(1 + dim_out)]
    order += [4 * row + column for row in range(1 + dim_out) for column in (1, 2, 3)]
    return network, x, y, means.flatten()[order], blocks[order][:, order]


def peak_memory(code):
    """GiB that code takes at most in a process of its own, beyond what this package takes once it is imported."""
    shown = f"""
import torch, pyro_mdn
def taken(kind):
    line = next(line for line in open("/proc/self/status") if line.startswith(kind))
    return int(line.split()[1]) / 1024**2
before = taken("VmRSS")
{code}
print(taken("VmHWM") - before)
"""
    return float(subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout)


class Held(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


class Recording(NegativeLogLikelihood):
    """Keeps the batches that it is called with, in training and in validation."""

    def __init__(self, network):
        super().__init__(network)
        self.seen = {True: [], False: []}

    def forward(self, x, y):
        self.seen[self.training].append((x, y))
        return super().forward(x, y)
