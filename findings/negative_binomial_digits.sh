#!/usr/bin/env bash
# The log-probability of a negative binomial distribution that is nearly Poisson is 0.8 nats off in single precision.
#
# Versions: torch 2.13.0, pyro-ppl 1.9.2, scipy 1.17.1, numpy 2.4.6, mpmath 1.3.0.
# Behaviour: NegativeBinomial(total_count, logits).log_prob of torch, and that of Pyro, which inherits it, is a difference of
# logarithms of gamma functions near the total count. With a total count of 1e6 these are near 1e7, and in single precision
# their difference has no digit: -4.04 for -3.22 at a mean and a count of 100. scipy.stats.nbinom.logpmf has the same
# cancellation in double precision: at a total count of 1e10, six digits are right. Networks reach such counts while they
# learn that data are hardly overdispersed.
# A good guess: the distribution tends to the Poisson one, which is accurate, so that the limit is harmless.
# Output seen:
#   torch, float32, total count 1e+06, mean 100, count 100: -4.039062 for -3.222407
#   Pyro, float32, total count 1e+06, mean 100, count 100: -4.039062 for -3.222407
#   torch, float32, Poisson(100) at 100: -3.222351 for -3.222357
#   scipy, float64, total count 1e+10, mean 5, count 3: -1.963442100 for -1.963445732
# Way around: Loader's saddle-point form (2000), in which the deviance and Stirling's errors are computed apart.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 pyro-ppl==1.9.2 scipy==1.17.1 numpy==2.4.6 mpmath==1.3.0
cd "$place"
cat > show.py <<'PYTHON'
import mpmath
import pyro.distributions
import scipy.stats
import torch

mpmath.mp.dps = 40


def exact(total, mean, count):
    total, mean = mpmath.mpf(total), mpmath.mpf(mean)
    gammas = mpmath.loggamma(count + total) - mpmath.loggamma(total) - mpmath.loggamma(count + 1)
    return float(gammas + total * mpmath.log(total / (total + mean)) + count * mpmath.log(mean / (total + mean)))


def show(name, total, mean, count, got, digits):
    setting = f"total count {total:g}, mean {mean:g}, count {count:g}"
    print(f"{name}, {setting}: {got:.{digits}f} for {exact(total, mean, count):.{digits}f}")
    return abs(got - exact(total, mean, count))


total, mean, count = 1e6, 100.0, 100.0
for name, kind in (("torch", torch.distributions.NegativeBinomial), ("Pyro", pyro.distributions.NegativeBinomial)):
    law = kind(torch.tensor(total), logits=torch.tensor(mean / total).log())
    error = show(f"{name}, float32", total, mean, count, law.log_prob(torch.tensor(count)).item(), 6)
    assert error > 0.1, f"{name} is accurate now"

poisson, limit = torch.distributions.Poisson(torch.tensor(mean)), scipy.stats.poisson.logpmf(100, 100)
print(f"torch, float32, Poisson(100) at 100: {poisson.log_prob(torch.tensor(count)).item():.6f} for {limit:.6f}")
assert abs(poisson.log_prob(torch.tensor(count)).item() - limit) < 1e-3

total, mean, count = 1e10, 5.0, 3.0
got = scipy.stats.nbinom.logpmf(count, total, total / (total + mean))
assert show("scipy, float64", total, mean, count, got, 9) > 1e-7, "scipy is accurate now"
PYTHON
"$place/venv/bin/python" show.py
