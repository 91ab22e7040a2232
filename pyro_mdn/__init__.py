"""Mixture density networks for Pyro: conditional densities that are Pyro distributions."""

from pyro_mdn.covariance import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    IsotropicCovariance,
    LowRankCovariance,
)
from pyro_mdn.head import MixtureHead
from pyro_mdn.mixture import GaussianMixture
from pyro_mdn.network import MixtureDensityNetwork
from pyro_mdn.noise import Diagonal, Fixed, Full, Isotropic, LowRank, NoiseModel
from pyro_mdn.training import FitResult, NegativeLogLikelihood, fit

__version__ = "0.1.0"

__all__ = [
    "Covariance",
    "Diagonal",
    "DiagonalCovariance",
    "FitResult",
    "Fixed",
    "Full",
    "FullCovariance",
    "GaussianMixture",
    "Isotropic",
    "IsotropicCovariance",
    "LowRank",
    "LowRankCovariance",
    "MixtureDensityNetwork",
    "MixtureHead",
    "NegativeLogLikelihood",
    "NoiseModel",
    "fit",
]
