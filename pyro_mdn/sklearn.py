r"""A scikit-learn estimator whose predictions are distributions, and scorers for it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from pyro_mdn.adapters.sklearn_scorers import (
    Scorer,
    concordance,
    mean_r2,
    neg_crps,
    neg_integrated_brier,
    neg_interval_score,
    neg_log_score,
    predictive_distribution,
)
from pyro_mdn.adapters.sklearn_targets import as_targets, as_weight, centres, plain, shifted, uncentered, validated
from pyro_mdn.distributions.covariance.noise_models import NoiseModel, as_noise_model
from pyro_mdn.distributions.families.family import Family
from pyro_mdn.distributions.mixture import Mixture
from pyro_mdn.distributions.observations.targets import Targets
from pyro_mdn.distributions.quantiles import central_quantile
from pyro_mdn.distributions.units.target_transforms import TargetTransform
from pyro_mdn.networks.ensemble import DeepEnsemble
from pyro_mdn.networks.network import MixtureDensityNetwork
from pyro_mdn.support.arrays import as_tensor
from pyro_mdn.support.checks import is_count, require_counts, require_range, shown
from pyro_mdn.support.process_state import seeded
from pyro_mdn.support.settings import given_settings
from pyro_mdn.training.batches.kinds_of_targets import warn_of_kinds
from pyro_mdn.training.fit import fit
from pyro_mdn.training.result import FitResult
from pyro_mdn.training.schedules import LEARNING_RATE
from pyro_mdn.training.settings import EarlyStopping, NoiseSchedule, Optimization, TrainingLoop

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("pyro_mdn.sklearn needs scikit-learn 1.6: in a checkout pip install '.[sklearn]'") from error

__all__ = [
    "MDNRegressor",
    "Scorer",
    "concordance",
    "neg_crps",
    "neg_integrated_brier",
    "neg_interval_score",
    "neg_log_score",
    "predictive_distribution",
]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_GROUPS = (Optimization, TrainingLoop, NoiseSchedule, EarlyStopping)


class MDNRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    r"""Mixture density network as a scikit-learn regressor, which predicts distributions, not only means.

    .. math:: p(y \mid x) = \sum_{k=1}^K w_k(x) \, \mathcal{N}(y \mid \mu_k(x), \Sigma_k(x))

    You do not have to scale X and y: the network standardises both, and all predictions are in the units of y. If y was
    one-dimensional in :meth:`fit`, predictions lack the last axis D.

    The data are centred in float64, and training is in ``dtype``. Predictions are computed in float64 on the CPU from
    the original X. They are NumPy arrays of float64; :meth:`predict_distribution` returns a torch distribution.

    Args:
        n_components: Number of mixture components K.
        hidden_dim: Width of two hidden layers, or a sequence of widths.
        noise: ``"diagonal"``, ``"full"``, ``"isotropic"``, ``"low_rank"`` or ``"fixed"``; or a :class:`NoiseModel`
            such as ``Full(tied=True)``, with all its options.
        family: Family of the components, such as :class:`StudentT`, in place of ``noise``; or its name, such as
            ``"student_t"``, beside ``noise``. By default the components are normal. A list has a family for each
            output, see :class:`pyro_mdn.Product`, in place of ``noise``.
        target_transform: What y goes through before components see it, such as ``"log"`` for positive targets (see
            :class:`pyro_mdn.Log`); a list has one for each output. By default, y is only standardised.
        input_transform: What X goes through before the hidden layers, likewise; a list has one for each column. By
            default, X is standardised.
        rank: Rank, only for ``noise="low_rank"``; by default 2, but 1 for a single output.
        noise_scale: Standard deviation in the units of y, only for ``noise="fixed"``, which needs it.
        ensemble_size: Number of networks; from 2 on, the average density of a :class:`DeepEnsemble` is the prediction.
        max_epochs: Largest number of passes over the rows; for this and the next arguments see :func:`pyro_mdn.fit`.
        batch_size: Largest number of rows per step.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay of the weight matrices.
        input_noise: Standard deviation of the noise on X at the start, in standardised units.
        target_noise: Standard deviation of the noise on y at the start, in standardised units.
        validation: Fraction of the rows that is held out for early stopping; 0 for none. By default that of ``fit``.
        patience: Epochs without improvement of the validation loss before training stops.
        few_rows: Whether smoothing starts strong and fades fast; by default it does for fewer than 2000 rows.
        optimization: A whole :class:`pyro_mdn.Optimization`, in place of its fields above. This and the next three
            groups also have settings without a keyword of their own here, such as gradient clipping.
        training_loop: A whole :class:`pyro_mdn.TrainingLoop`.
        noise_schedule: A whole :class:`pyro_mdn.NoiseSchedule`.
        early_stopping: A whole :class:`pyro_mdn.EarlyStopping`, whose ``validation`` is a fraction here.
        device: Where to train, such as ``"cuda"``.
        dtype: ``"float32"`` or ``"float64"``, for training.
        verbose: Whether to show a progress bar.
        random_state: Seed of everything random in :meth:`fit`; an integer gives the same bits on the same machine.
            ``None`` and a ``RandomState`` draw a seed for each call, ``None`` from NumPy's global generator as in all
            of scikit-learn. The generators of torch are not changed.

    Attributes:
        network_: The trained :class:`MixtureDensityNetwork` or :class:`DeepEnsemble`, in float64, on the CPU.
        result_: The :class:`FitResult`: history, best epoch, share of the rows that each component explains.
        n_outputs_: Number of outputs D.
        n_features_in_: Number of columns of X.
        feature_names_in_: Names of the columns of X, if X was a data frame whose column names are all strings.

    References:
        Bishop (1994), Mixture Density Networks.

    >>> X = np.linspace(-1, 1, 100)[:, None]
    >>> model = MDNRegressor(n_components=2, max_epochs=2, random_state=0).fit(X, X[:, 0] ** 2)
    >>> model.predict(X).shape, model.predict_quantiles(X, [0.05, 0.5, 0.95]).shape
    ((100,), (100, 3))
    """

    network_: MixtureDensityNetwork | DeepEnsemble
    result_: FitResult
    n_outputs_: int

    def __init__(
        self,
        n_components: int = 5,
        hidden_dim: int | Sequence[int] = 64,
        *,
        noise: str | NoiseModel = "diagonal",
        family: str | Family | Sequence[str | Family] | None = None,
        target_transform: str | TargetTransform | Sequence[str | TargetTransform | None] | None = None,
        input_transform: str | TargetTransform | Sequence[str | TargetTransform] | None = None,
        rank: int | None = None,
        noise_scale: float | None = None,
        ensemble_size: int = 1,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        lr: float = LEARNING_RATE,
        weight_decay: float | None = None,
        input_noise: float | None = None,
        target_noise: float | None = None,
        validation: float | None = None,
        patience: int | None = None,
        few_rows: bool | None = None,
        optimization: Optimization | None = None,
        training_loop: TrainingLoop | None = None,
        noise_schedule: NoiseSchedule | None = None,
        early_stopping: EarlyStopping | None = None,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        verbose: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.hidden_dim = hidden_dim
        self.noise = noise
        self.family = family
        self.target_transform = target_transform
        self.input_transform = input_transform
        self.rank = rank
        self.noise_scale = noise_scale
        self.ensemble_size = ensemble_size
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.input_noise = input_noise
        self.target_noise = target_noise
        self.validation = validation
        self.patience = patience
        self.few_rows = few_rows
        self.optimization = optimization
        self.training_loop = training_loop
        self.noise_schedule = noise_schedule
        self.early_stopping = early_stopping
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on rows (X, y), and replace an earlier training.

        Args:
            X: Inputs ``(N, n_features)``: finite numbers, not sparse.
            y: Targets ``(N,)`` or ``(N, D)``. An entry that is NaN or masked was not observed: its row counts with
                the density of its other entries. (X and weights must not be masked.) :class:`pyro_mdn.Targets` may be
                censored, as may a structured array of scikit-survival: whether an event was observed, and when.
            sample_weight: Weights of the rows, ``(N,)``; only their ratios matter. A row of weight 0 is left out.

        Raises:
            ValueError: If the data or a setting are not usable.
            TypeError: If X is sparse.
        """
        X, targets, masked, vector = validated(self, X, y)
        rows = as_tensor(X, "X")
        weight = None if sample_weight is None else as_weight(sample_weight, len(rows))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with seeded(seed):
            network = self._build(rows.shape[1], targets.shape[1])
        numbers = targets.points() if isinstance(targets, Targets) else targets
        counted = ~numbers.isnan().all(-1) if weight is None else ~numbers.isnan().all(-1) & (weight > 0)
        shifts = centres(network.architecture, rows[counted], numbers[counted])
        dtype = _DTYPES[self.dtype]
        for values, shift, name in zip((rows, numbers), shifts, ("X", "y"), strict=True):
            require_range(values - shift, name, dtype)
        warn_of_kinds(numbers, network.architecture.head)
        outputs: Any = shifted(targets, shifts[1]).to(dtype)
        self.result_ = fit(
            network,
            (rows - shifts[0]).to(dtype),
            np.ma.masked_invalid(outputs.numpy()) if masked else outputs,
            sample_weight=weight,
            few_rows=self.few_rows,
            device=self.device,
            seed=seed,
            progress=bool(self.verbose),
            **given_settings(MDNRegressor.__init__, vars(self), *_GROUPS),
        )
        self.network_ = uncentered(network, *shifts)
        self.n_outputs_, self._vector = targets.shape[1], vector
        return self

    def predict_distribution(self, X: Any) -> Mixture:
        """Predict distributions, ``batch_shape`` ``(N,)`` and ``event_shape`` ``(D,)``, in float64 on the CPU.

        Raises:
            ValueError: If X is not usable, or is a data frame whose columns differ from those in :meth:`fit`. If there
                was no :meth:`fit`, this is scikit-learn's ``NotFittedError``.
        """
        check_is_fitted(self)
        X = validate_data(self, plain(X, "X"), reset=False, dtype=np.float64)
        with torch.no_grad():
            return self.network_(as_tensor(X, "X"))

    def predict(self, X: Any, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Predict the mean of each output, ``(N, D)``; with ``return_std`` also its standard deviation."""
        mixture = self.predict_distribution(X)
        mean = self._shaped(mixture.mean)
        return (mean, self._shaped(mixture.stddev)) if return_std else mean

    def predict_quantiles(self, X: Any, quantiles: Any = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Predict quantiles of each output, those of angles counted from opposite to the mean direction.

        Args:
            X: Inputs ``(N, n_features)``.
            quantiles: Q probabilities in (0, 1), for quantiles ``(N, Q, D)``, or a single one, for ``(N, D)``.

        Raises:
            ValueError: If a probability is not in (0, 1).
        """
        levels = torch.tensor(np.asarray(quantiles, dtype=np.float64), device="cpu")
        if levels.ndim > 1 or levels.numel() == 0 or not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"quantiles: expected probabilities in (0, 1), one or a sequence, got {shown(quantiles)}")
        points = central_quantile(self.predict_distribution(X), levels.reshape(-1, 1, 1)).movedim(0, 1)
        return self._shaped(points if levels.ndim else points.squeeze(1))

    def predict_interval(
        self, X: Any, mass: float = 0.9, *, kind: Literal["central", "shortest"] = "central"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict lower and upper ends, ``(N, D)`` each, of an interval with probability ``mass`` for each output.

        Args:
            X: Inputs ``(N, n_features)``.
            mass: Probability inside, in (0, 1).
            kind: ``"central"`` leaves equal tails, ``"shortest"`` is the shortest single interval.

        Raises:
            ValueError: If the mass is not in (0, 1) or the kind is unknown.
        """
        lower, upper = self.predict_distribution(X).interval(mass, kind=kind)
        return self._shaped(lower), self._shaped(upper)

    def sample(self, X: Any, n: int = 1, *, random_state: Any = None) -> np.ndarray:
        """Draw y given each row of X, ``(n, N, D)``.

        Args:
            X: Inputs ``(N, n_features)``.
            n: Number of draws for each row.
            random_state: Seed, as in scikit-learn; ``None`` draws a seed from NumPy's global generator.
        """
        require_counts(n=n)
        mixture = self.predict_distribution(X)
        with seeded(int(check_random_state(random_state).randint(2**31 - 1))):
            return self._shaped(mixture.sample((int(n),)))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        r"""Compute the mean log-likelihood :math:`\log p(y \mid x)` in nats; higher is better.

        The score of other regressors is R², here :meth:`r2_score`, which judges only the mean. The log-likelihood
        depends on the units of y: if y is multiplied by c, it changes by :math:`-D \log c`.

        Args:
            X: Inputs ``(N, n_features)``.
            y: Targets ``(N,)`` or ``(N, D)``; an entry that is NaN was not observed, and is left out.
            sample_weight: Weights of the rows, ``(N,)``.
        """
        return neg_log_score(self, X, y, sample_weight)

    def log_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Compute the mean negative log-likelihood in nats: :meth:`score` as a loss, like :mod:`pyro_mdn.scores`."""
        return -self.score(X, y, sample_weight)

    def r2_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Compute R² of the predicted means over the observed rows, as the mean over outputs; angles have none."""
        mixture = self.predict_distribution(X)
        mixture.components.require_line("r2_score", "score and scores.crps judge angles")
        mean = mixture.mean
        target = as_targets(y, *mean.shape)
        weight = None if sample_weight is None else as_weight(sample_weight, len(mean))
        return mean_r2(target, mean, weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # scikit-learn checks that ``score`` exceeds 0.5, as R² should; here ``score`` is a log-likelihood.
        tags.regressor_tags.poor_score = True
        return tags

    def _build(self, dim_in: int, dim_out: int) -> MixtureDensityNetwork | DeepEnsemble:
        """Construct the network or ensemble of these settings, or raise a ``ValueError`` that names a setting."""
        if not is_count(self.ensemble_size):
            raise ValueError(f"ensemble_size: expected a positive integer, got {shown(self.ensemble_size)}")
        fractions = [self.validation, getattr(self.early_stopping, "validation", None)]
        if others := [fraction for fraction in fractions if fraction is not None and not isinstance(fraction, Real)]:
            raise ValueError(f"validation: expected a fraction in [0, 1), got {shown(others[0])}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {shown(self.dtype)}")
        noise = None if isinstance(self.family, Family | list | tuple) else self._noise(dim_out)
        settings = {name: getattr(self, name) for name in ("family", "target_transform", "input_transform")}
        network = MixtureDensityNetwork(dim_in, dim_out, self.n_components, self.hidden_dim, noise=noise, **settings)
        network = network.to(_DTYPES[self.dtype])
        return network if self.ensemble_size == 1 else DeepEnsemble(network, self.ensemble_size)

    def _noise(self, dim_out: int) -> NoiseModel:
        if self.noise is None:
            raise ValueError(f"noise: expected a NoiseModel or one of {NoiseModel.names()}, got None")
        if isinstance(self.noise, str) and self.noise == "fixed" and self.noise_scale is None:
            raise ValueError("noise_scale: expected a number for noise='fixed', got None")
        return as_noise_model(self.noise, dim_out, rank=self.rank, scale=self.noise_scale)

    def _shaped(self, values: Tensor) -> np.ndarray:
        """Array of values ``(..., D)``, without the last axis if y had none."""
        return (values.squeeze(-1) if self._vector else values).numpy()
