#!/usr/bin/env bash
# The Brier score of scikit-survival is biased where events and censorings happen at the same times, such as whole months.
#
# Versions: scikit-survival 0.28.0, scikit-learn 1.9.1, numpy 2.4.6, pandas 3.1.1.
# Behaviour: sksurv.metrics.brier_score divides the term of an event at time T by the estimated probability G(T) of not being
# censored until T, those censored at T itself included. An event at T is seen whatever happens to be censored at T, so that
# its weight is 1/G(T-), as Graf et al. (1999) have it for continuous times. A prediction of 1/2 has the squared error 1/4 in
# every row; with times from 1 to 4 and censoring from 1 to 6 the score is .30. Without ties, or without censoring, it is .25.
# A good guess: inverse weights are 1 on average, so that the score of a constant error is this error.
# Output seen:
#   ties 0.299, weights 1/G(T-) 0.250, no ties 0.250, no censoring 0.250
# Way around: move censored times behind the events of the same time, by less than the distance between times.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet scikit-survival==0.28.0 scikit-learn==1.9.1 numpy==2.4.6 pandas==3.1.1
cd "$place"
cat > show.py <<'PYTHON'
import numpy as np
from sksurv.metrics import brier_score
from sksurv.util import Surv

rng = np.random.default_rng(0)
rows, horizon = 40_000, 3.5
event, censoring = rng.integers(1, 5, rows).astype(float), rng.integers(1, 7, rows).astype(float)
half = np.full((rows, 1), 0.5)


def score(censoring):
    y = Surv.from_arrays(event <= censoring, np.minimum(event, censoring))
    return brier_score(y, y, half, [horizon])[1].item()


seen, time = event <= censoring, np.minimum(event, censoring)
left = {t: np.mean(censoring >= t) for t in range(1, 8)}  # the censoring is known here: G(T-)
weights = np.where(seen & (time <= horizon), 1 / np.array([left[int(t)] for t in time]), 0)
weights = np.where(time > horizon, 1 / np.mean(censoring > horizon), weights)
right = 0.25 * weights.mean()
ties, moved, none = score(censoring), score(censoring + 0.25), score(np.full(rows, 9.0))
print(f"ties {ties:.3f}, weights 1/G(T-) {right:.3f}, no ties {moved:.3f}, no censoring {none:.3f}")
assert 0.28 < ties < 0.32, "ties have other weights now"
assert all(abs(value - 0.25) < 0.005 for value in (right, moved, none))
PYTHON
"$place/venv/bin/python" show.py
