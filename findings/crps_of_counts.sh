#!/usr/bin/env bash
# scoringrules gives negative CRPS for Poisson forecasts of integers from a mean of 20 on, and NaN for ordinary counts.
#
# Versions: scoringrules 0.10.0, numpy 2.4.6, scipy 1.17.1.
# Behaviour: the closed forms multiply powers, factorials and beta functions instead of adding their logarithms. With a mean and
# an observation that are integers, as counts are, the power in crps_poisson is one of 64-bit integers, which wraps around
# without a word: scores are negative, although a CRPS cannot be. As floats they are right up to a mean of about 140, then
# infinite, and NaN from 200 on. crps_negbinom is NaN from 400 successes on (probability one half), crps_binomial from 1100 trials on, and
# crps_beta from shapes of 280 on, whose standard deviation is .02.
# A good guess: a score does not depend on whether counts are 64-bit integers or floats, and is a number for every forecast.
# Output seen:
#   Poisson, mean 20: integers -2.228, floats 1.156, exact 1.156
#   Poisson, mean 100: integers -4.785, floats 2.728, exact 2.728
#   Poisson, mean 150: integers -5.725, floats inf, exact 3.417
#   Poisson, mean 200: integers nan, floats nan, exact 3.787
#   negative binomial, 400 successes: nan, exact 7.614
#   binomial, 1100 trials: nan, exact 4.470
#   beta, shapes 280: nan, exact 0.007
# Way around: sum the squared differences of the distribution functions of scipy, which are right here.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet scoringrules==0.10.0 numpy==2.4.6 scipy==1.17.1
cd "$place"
cat > show.py <<'PYTHON'
import math
import warnings

import numpy as np
import scoringrules
from scipy import integrate, stats

warnings.simplefilter("ignore")


def exact(distribution, observed):
    k = np.arange(20 + int(distribution.mean() + 40 * distribution.std()))
    return float(((distribution.cdf(k) - (k >= observed)) ** 2).sum())


seen = {}
for mean, observed in ((20, 21), (100, 103), (150, 154), (200, 204)):
    truth = exact(stats.poisson(mean), observed)
    integers = float(scoringrules.crps_poisson(np.array([observed]), np.array([mean]))[0])
    floats = float(scoringrules.crps_poisson(np.array([float(observed)]), np.array([float(mean)]))[0])
    seen[mean] = integers, floats, truth
    print(f"Poisson, mean {mean}: integers {integers:.3f}, floats {floats:.3f}, exact {truth:.3f}")
for mean in (20, 100):
    integers, floats, truth = seen[mean]
    assert integers < 0 < truth, "integers do not wrap around any more"
    assert math.isclose(floats, truth, rel_tol=1e-9)
assert seen[150][0] < 0 and seen[150][1] == math.inf and math.isnan(seen[200][1]), "floats go further now"

successes, trials = stats.nbinom(400, 0.5), stats.binom(1100, 0.5)
score = float(scoringrules.crps_negbinom(408.0, 400.0, 0.5))
print(f"negative binomial, 400 successes: {score:.3f}, exact {exact(successes, 408):.3f}")
assert math.isnan(score)
score = float(scoringrules.crps_binomial(555.0, 1100.0, 0.5))
print(f"binomial, 1100 trials: {score:.3f}, exact {exact(trials, 555):.3f}")
assert math.isnan(score)

shares = stats.beta(280, 280)
sides = integrate.quad(lambda t: shares.cdf(t) ** 2, 0, 0.51), integrate.quad(lambda t: shares.sf(t) ** 2, 0.51, 1)
score = float(scoringrules.crps_beta(0.51, 280.0, 280.0))
print(f"beta, shapes 280: {score:.3f}, exact {sides[0][0] + sides[1][0]:.3f}")
assert math.isnan(score)
PYTHON
"$place/venv/bin/python" show.py
