"""Mixtures over every noise model × tied × homoscedastic × batch shape, and dense ones to check against."""

import dataclasses
import itertools

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_mdn import Diagonal, Fixed, Full, Isotropic, LowRank, MixtureHead

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
