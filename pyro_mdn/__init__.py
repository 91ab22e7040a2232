"""Mixture density networks for Pyro: conditional densities that are Pyro distributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_mdn import decisions, scores, uncertainty
from pyro_mdn.distributions.covariance.base import Covariance
from pyro_mdn.distributions.covariance.diagonal import DiagonalCovariance, IsotropicCovariance
from pyro_mdn.distributions.covariance.full import FullCovariance
from pyro_mdn.distributions.covariance.low_rank import LowRankCovariance
from pyro_mdn.distributions.covariance.noise_models import Diagonal, Fixed, Full, Isotropic, LowRank, NoiseModel
from pyro_mdn.distributions.families.circular.von_mises import VonMises
from pyro_mdn.distributions.families.components import Components
from pyro_mdn.distributions.families.counts.count_families import NegativeBinomial, Poisson
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.families.laws.gumbel import Gumbel
from pyro_mdn.distributions.families.laws.laplace import Laplace
from pyro_mdn.distributions.families.laws.logistic import Logistic
from pyro_mdn.distributions.families.location_scale import IndependentComponents, LocationScale
from pyro_mdn.distributions.families.normal import Normal, NormalComponents
from pyro_mdn.distributions.families.products.product_family import Product
from pyro_mdn.distributions.families.shares.beta import Beta
from pyro_mdn.distributions.families.student_t import StudentT, StudentTComponents
from pyro_mdn.distributions.families.zeros.zero_families import Hurdle, ZeroInflated
from pyro_mdn.distributions.gaussian.divergence import kl_monte_carlo, kl_variational_approximation
from pyro_mdn.distributions.gaussian.mixture import GaussianMixture
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.distributions.predictions import Prediction
from pyro_mdn.distributions.units.circular.angles import Angle
from pyro_mdn.distributions.units.compound_transforms import Chain, PerOutput
from pyro_mdn.distributions.units.splines.quantile import Quantile
from pyro_mdn.distributions.units.target_transforms import (
    Asinh,
    Identity,
    Log,
    Logit,
    Softplus,
    Standardize,
    TargetTransform,
    YeoJohnson,
)
from pyro_mdn.inference_data import to_inference_data
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.head import MixtureHead
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.networks.pyro_model import NetworkModel
from pyro_mdn.posteriors.laplace import laplace
from pyro_mdn.posteriors.mcmc import fit_mcmc
from pyro_mdn.posteriors.posterior_samples import ConvergenceWarning, PosteriorSamples
from pyro_mdn.posteriors.predictive import posterior_predictive
from pyro_mdn.posteriors.priors import bayesianize, starting_weights
from pyro_mdn.tensors.univariate import Law, SymmetricLaw
from pyro_mdn.training.fit import CollapseWarning, MissingTargetsWarning, TargetHint, fit
from pyro_mdn.training.objectives import ContinuousRankedProbability, NegativeElbo, NegativeLogLikelihood, WeightedSum
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.settings import (
    Checkpointing,
    EarlyStopping,
    Initialization,
    NoiseSchedule,
    Optimization,
    TrainingLoop,
    VariationalInference,
)

if TYPE_CHECKING:
    from pyro_mdn import calibration as calibration
    from pyro_mdn import inference_data as inference_data
    from pyro_mdn import lightning as lightning
    from pyro_mdn import plots as plots
    from pyro_mdn import sklearn as sklearn

__version__ = "0.1.0"

__all__ = [
    "Angle",
    "Asinh",
    "Beta",
    "Chain",
    "Checkpointing",
    "CollapseWarning",
    "Components",
    "ContinuousRankedProbability",
    "ConvergenceWarning",
    "Covariance",
    "DeepEnsemble",
    "Diagonal",
    "DiagonalCovariance",
    "EarlyStopping",
    "Family",
    "FitResult",
    "Fixed",
    "Full",
    "FullCovariance",
    "GaussianMixture",
    "Gumbel",
    "Hurdle",
    "Identity",
    "IndependentComponents",
    "Initialization",
    "Isotropic",
    "IsotropicCovariance",
    "Laplace",
    "Law",
    "LocationScale",
    "Log",
    "Logistic",
    "Logit",
    "LowRank",
    "LowRankCovariance",
    "MissingTargetsWarning",
    "Mixture",
    "MixtureDensityNetwork",
    "MixtureHead",
    "NegativeBinomial",
    "NegativeElbo",
    "NegativeLogLikelihood",
    "NetworkModel",
    "NoiseModel",
    "NoiseSchedule",
    "Normal",
    "NormalComponents",
    "Optimization",
    "PerOutput",
    "Poisson",
    "PosteriorSamples",
    "Prediction",
    "Product",
    "Quantile",
    "Softplus",
    "Standardize",
    "StudentT",
    "StudentTComponents",
    "SymmetricLaw",
    "TargetHint",
    "TargetTransform",
    "Targets",
    "TrainingLoop",
    "VariationalInference",
    "VonMises",
    "WeightedSum",
    "YeoJohnson",
    "ZeroInflated",
    "bayesianize",
    "decisions",
    "fit",
    "fit_mcmc",
    "kl_monte_carlo",
    "kl_variational_approximation",
    "laplace",
    "posterior_predictive",
    "scores",
    "starting_weights",
    "to_inference_data",
    "uncertainty",
]

_LAZY = {"calibration", "inference_data", "lightning", "plots", "sklearn"}  # they import much, or what may be missing


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:  # whoever looks whether it is there expects this one
        raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    """Names of this package, with those of modules that are not imported yet."""
    return sorted({*globals(), *_LAZY})
