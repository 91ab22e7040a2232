"""Scores and calibration of times to an event, of which some are right-censored."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyro_mdn import (
    DiagonalCovariance,
    GaussianMixture,
    Mixture,
    MixtureDensityNetwork,
    NegativeBinomial,
    Targets,
    ZeroInflated,
    scores,
)
from pyro_mdn.calibration import coverage_table, d_calibration, uniformity_p_value
from pyro_mdn.distributions.units.warped import WarpedComponents
from pyro_mdn.distributions.units.warps import LogWarp

TIMES = np.linspace(0.3, 1.9, 9)


def log_normal(x, scale=0.6, dtype=torch.float64):
    """Two log-normal components for each row of x, ``(N, D)``."""
    locs = torch.as_tensor(np.stack([x, x - 0.5], 1), dtype=dtype)
    base = GaussianMixture(locs.new_zeros(len(x), 2), locs, DiagonalCovariance(torch.full_like(locs, scale)))
    return Mixture(base.logits, WarpedComponents(base.components, LogWarp()))


def sample(n, seed, *, dim=1, grid=0.0):
    """Covariates, times until an event or the censoring, and which of them; on a grid there are ties."""
    rng = np.random.default_rng(seed)
    x, end = 0.6 * rng.normal(size=(n, dim)), rng.uniform(0.2, 3, (n, dim))
    time = np.exp(x - 0.5 * (rng.random((n, dim)) < 0.5) + 0.6 * rng.normal(size=(n, dim)))
    if grid:
        time, end = np.ceil(time / grid) * grid, np.ceil(end / grid) * grid
    return x, np.minimum(time, end), time <= end


def targets(time, event):
    return Targets.censored(time, right=~event)


def uncensored(time, event, t, *, before):
    """The Kaplan-Meier estimate by its definition, one time after the other; events come before censorings."""
    estimate = 1.0
    for at in sorted(set(time)):
        if at < t or (at == t and not before):
            at_risk = (time >= at).sum() - ((time == at) & event).sum()
            estimate *= 1 - ((time == at) & ~event).sum() / at_risk if at_risk else 1.0
    return estimate


def naive_brier(survival, time, event, train, t):
    """Brier scores of rows, from predicted probabilities to survive t."""
    return [
        s**2 / uncensored(*train, y, before=True)
        if y <= t and seen
        else (1 - s) ** 2 / uncensored(*train, t, before=False) * (y > t)
        for s, y, seen in zip(survival, time, event, strict=True)
    ]


def naive_concordance(median, time, event, weight):
    total = agreeing = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[j] > time[i] or (time[j] == time[i] and not event[j])):
                total += weight[i]
                agreeing += weight[i] * ((median[j] > median[i]) + 0.5 * (median[j] == median[i]))
    return agreeing / total


@pytest.mark.parametrize("grid", [0.0, 0.25])
def test_brier_scores_are_those_of_their_definition(grid):
    x, time, event = sample(40, 1, dim=2, grid=grid)
    _, *train = sample(60, 2, dim=2, grid=grid)
    mixture, y = log_normal(x), targets(time, event)
    result = scores.brier_score(mixture, y, TIMES, targets(*train))
    assert result.shape == (len(TIMES), 40, 2)
    survival = mixture.sf(torch.tensor(TIMES).reshape(-1, 1, 1).expand(-1, 1, 2))
    for d in range(2):
        column = train[0][:, d], train[1][:, d]
        for i, t in enumerate(TIMES):
            truth = naive_brier(survival[i, :, d].numpy(), time[:, d], event[:, d], column, t)
            assert_close(result[i, :, d], torch.tensor(truth), rtol=1e-12, atol=1e-14)
    integral = torch.trapezoid(result, torch.tensor(TIMES), dim=0) / (TIMES[-1] - TIMES[0])
    assert_close(scores.integrated_brier(mixture, y, TIMES, targets(*train)), integral)
    assert_close(scores.brier_score(mixture, y, TIMES[3], targets(*train)), result[3])
    own = scores.brier_score(mixture, y, TIMES)
    assert_close(own, scores.brier_score(mixture, y, TIMES, y), rtol=0, atol=0)


def test_scores_of_scikit_survival():
    """Numbers of ``sksurv.metrics`` 0.28.0 for the same rows; without ties its weights are the same."""
    x, time, event = sample(200, 1)
    mixture, y, train = log_normal(x), targets(time, event), targets(*sample(300, 2)[1:])
    found = [
        scores.integrated_brier(mixture, y, TIMES, train).mean(),
        scores.concordance(mixture, y),
        scores.concordance(mixture, y, train, horizon=1.9),
    ]
    assert [float(value) for value in found] == pytest.approx(
        [0.14446030472288643, 0.7221744593611533, 0.7073836247585646], rel=1e-12
    )


@pytest.mark.parametrize("grid", [0.0, 0.25])
def test_concordance_is_that_of_its_definition(grid):
    x, time, event = sample(40, 1, dim=2, grid=grid)
    x[5] = x[4]  # equal medians
    _, *train = sample(60, 2, dim=2, grid=grid)
    mixture, y = log_normal(x), targets(time, event)
    median = mixture.icdf(0.5).numpy()
    plain, weighted = scores.concordance(mixture, y), scores.concordance(mixture, y, targets(*train), horizon=1.9)
    for d in range(2):
        column = train[0][:, d], train[1][:, d]
        weight = np.array([uncensored(*column, t, before=True) if t < 1.9 else math.inf for t in time[:, d]]) ** -2.0
        rows = median[:, d], time[:, d], event[:, d]
        assert plain[d].item() == pytest.approx(naive_concordance(*rows, np.ones(40)), rel=1e-12)
        assert weighted[d].item() == pytest.approx(naive_concordance(*rows, weight), rel=1e-12)


def test_infinite_medians_are_tied():
    medians = torch.tensor([1.0, math.inf, math.inf, 2.0])
    mixture = log_normal(np.zeros((4, 1)))
    mixture.icdf = lambda value: medians.unsqueeze(-1)
    assert scores.concordance(mixture, torch.arange(4.0)).item() == 3.5 / 6


def test_concordance_in_blocks(monkeypatch):
    x, time, event = sample(40, 1)
    whole = scores.concordance(log_normal(x), targets(time, event))
    monkeypatch.setattr("pyro_mdn.scores.survival._PAIRS", 100)
    assert_close(scores.concordance(log_normal(x), targets(time, event)), whole)


def test_weights_undo_the_censoring():
    """On times with many ties: the mean of censored scores is that of the scores without censoring."""
    rng = np.random.default_rng(0)
    time, end = rng.integers(1, 5, (40_000, 1)) * 1.0, rng.integers(1, 7, (40_000, 1)) * 1.0
    mixture = log_normal(np.zeros((1, 1)))
    full = scores.brier_score(mixture, time, [1.0, 2.0, 3.5]).mean(1)
    seen = scores.brier_score(mixture, targets(np.minimum(time, end), time <= end), [1.0, 2.0, 3.5])
    error = (seen.mean(1) - full).abs() / (seen.std(1) / math.sqrt(len(time)))
    assert (error < 4).all(), error


def test_brier_scores_are_proper_and_have_gradients():
    x, time, event = sample(4000, 3)
    y = targets(time, event)
    truth = scores.integrated_brier(log_normal(x), y, TIMES)
    for other in (log_normal(x + 0.4), log_normal(x - 0.4), log_normal(x, 1.2), log_normal(0 * x)):
        assert (scores.integrated_brier(other, y, TIMES) - truth).mean() > 0
    locs = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(3, 2, 1, dtype=torch.float64, requires_grad=True)
    y = Targets.censored([[0.1], [0.5], [math.nan]], right=[[False], [True], [False]])

    def whole(locs, scales):
        mixture = GaussianMixture(torch.zeros(3, 2, dtype=torch.float64), locs, DiagonalCovariance(1 + scales))
        return scores.integrated_brier(mixture, y, [0.2, 0.3, 0.4])

    assert torch.autograd.gradcheck(lambda *parameters: whole(*parameters)[:2], (locs, scales), fast_mode=True)
    loss = whole(locs, scales)
    assert loss.isnan().flatten().tolist() == [False, False, True]
    assert torch.autograd.grad(loss.nansum(), locs)[0].isfinite().all()


def test_shapes_and_precision():
    x, time, event = sample(20, 1)
    y = targets(time, event)
    single, double = log_normal(x, dtype=torch.float32), log_normal(x)
    result = scores.brier_score(single, y.to(torch.float32), TIMES)
    assert result.dtype == torch.float32
    assert_close(result.double(), scores.brier_score(double, y, TIMES), rtol=1e-4, atol=1e-5)
    assert scores.brier_score(double.expand((3, 20)), y, TIMES).shape == (9, 3, 20, 1)
    assert scores.brier_score(double[0], y, TIMES).shape == (9, 20, 1)
    assert_close(scores.brier_score(double, y, TIMES[0]), scores.brier_score(double, y, TIMES)[0])
    exact = scores.brier_score(double, time, TIMES[2])
    survival = double.sf(torch.full((20, 1), TIMES[2]).double())
    assert_close(exact, (survival - torch.tensor(time > TIMES[2]).double()).square())


def test_censored_transforms_are_uniform():
    """Those of right-, left- and interval-censored targets under the truth, and not under others."""
    x, time, event = sample(3000, 4)
    truth = log_normal(x)
    y = truth.sample()
    low, high = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (2, 3000, 1))].sort(0).values.double()
    inside = (y > low) & (y < high)
    lower = torch.where(inside, low, torch.where(y <= low, -math.inf, high))
    upper = torch.where(inside, high, torch.where(y <= low, low, math.inf))
    for observed in (targets(time, event), Targets.interval(lower, upper), Targets.cells(y, 0.3)):
        u = scores.pit(truth, observed)
        assert ((u >= 0) & (u <= 1)).all()
        assert uniformity_p_value(u) > 0.01
        assert d_calibration(truth, observed) > 0.01
        wrong = log_normal(x + 0.3)
        assert uniformity_p_value(scores.pit(wrong, observed)) < 1e-4
        assert d_calibration(wrong, observed) < 1e-4


def test_mean_transforms_of_censored_targets():
    """Draws of a transform have the distribution that ``mean_pit`` averages over; missing ones do not count."""
    x, time, event = sample(4, 5, dim=2)
    time[0, 0] = math.nan
    mixture, y = log_normal(x), targets(time, event)
    draws = torch.stack([scores.pit(mixture, y) for _ in range(4000)])
    assert draws[:, 0, 0].isnan().all()
    for u, mean in zip([0.2, 0.5, 0.8], scores.mean_pit(mixture, y, points=[0.2, 0.5, 0.8]), strict=True):
        share = (draws <= u).double().masked_fill(draws.isnan(), math.nan).nanmean(1)
        assert (share.mean(0) - mean).abs().max() < 4 * 0.5 / math.sqrt(4000)
    exact = ~torch.tensor(~event) & ~torch.tensor(time).isnan()
    assert_close(draws[0][exact], scores.pit(mixture, time)[exact])


@pytest.mark.parametrize(
    ("network", "limit"),
    [
        (MixtureDensityNetwork(1, 1, 2, 8, family=NegativeBinomial(), seed=0), 3.0),
        (MixtureDensityNetwork(1, 1, 2, 8, family=ZeroInflated("normal"), target_transform="log", seed=0), 0.5),
        (MixtureDensityNetwork(1, 1, 2, 8, target_transform="angle", seed=0), 1.0),
    ],
    ids=["counts", "zeros", "angles"],
)
def test_censored_transforms_of_other_targets(network, limit):
    """Of counts, targets that may be zero, and angles: also where the limit itself has a probability."""
    x = torch.randn(4000, 1)
    mixture = network(x).double().detach()
    y = mixture.sample()
    observed = Targets.censored(y.clamp(max=limit), right=y >= limit)
    assert uniformity_p_value(scores.pit(mixture, observed)) > 0.01
    left = Targets.censored(y.clamp(min=limit), left=y <= limit)
    assert uniformity_p_value(scores.pit(mixture, left)) > 0.01
    assert d_calibration(mixture, left).item() > 0.01


def test_bad_arguments_are_refused():
    x, time, event = sample(20, 1)
    event[time.argmax()] = False
    mixture, y = log_normal(x), targets(time, event)
    left = Targets.censored(time, left=~event)
    angles = MixtureDensityNetwork(1, 1, target_transform="angle")(x[:, :1])
    cases = [
        (lambda: scores.brier_score(mixture, left, 1.0), "y: expected times that are exact or right-censored, got"),
        (lambda: scores.concordance(mixture, y, left), "train: expected times that are exact or right-censored, got"),
        (lambda: scores.brier_score(mixture, y, [1.0, 1e3]), "times: expected times before .* got 1000 in row 1"),
        (lambda: scores.brier_score(mixture, y, math.nan), "times: expected finite numbers"),
        (lambda: scores.brier_score(mixture, time[:, [0, 0]], 1.0), "y: expected shape"),
        (lambda: scores.brier_score(mixture, y, 1.0, np.ones((3, 2))), r"train: expected shape \(M, 1\), got \(3, 2\)"),
        (lambda: scores.integrated_brier(mixture, y, 1.0), "times: expected two at least, in ascending order, got 1"),
        (lambda: scores.integrated_brier(mixture, y, [1.0, 0.5]), "times: expected two at least, in ascending order"),
        (lambda: scores.concordance(mixture[:1], y[:1]), "y: expected a pair of rows .* got none in column 0"),
        (lambda: scores.concordance(mixture, y, horizon=-1.0), "before the horizon -1.0, got none in column 0"),
        (lambda: scores.concordance(mixture, y, horizon=math.nan), "horizon: expected a time, got nan"),
        (lambda: scores.concordance(mixture[0], y), r"mixture, y: expected batch shape \(N,\)"),
        (lambda: scores.pit(mixture, y, 0.5), "cell: expected 0 for Targets"),
        (lambda: d_calibration(mixture, y, bins=1), "bins: expected 2 at least"),
        (lambda: d_calibration(mixture, torch.full((20, 1), math.nan)), "y: expected an observed entry in each column"),
        (lambda: d_calibration(mixture[:3], y), "y: expected|mixture, y: expected|shape"),
        (lambda: coverage_table(mixture, y), "y: expected exact targets .* got intervals; .*scores.pit take these"),
        (lambda: scores.crps(mixture, y), "y: expected exact targets .* scores.pit take these"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for score in (scores.brier_score, scores.integrated_brier):
        with pytest.raises(NotImplementedError, match="angle"):
            score(angles, y, [1.0, 2.0])
    with pytest.raises(NotImplementedError, match="angle"):
        scores.concordance(angles, y)
    few = targets(*(values[:5] for values in (np.arange(1.0, 6.0)[:, None], np.array([[True]] + [[False]] * 4))))
    late = targets(np.full((20, 1), 9.0), np.ones((20, 1), bool))
    with pytest.raises(ValueError, match="y: expected events while rows of train are not all censored"):
        scores.concordance(mixture, late, few)
