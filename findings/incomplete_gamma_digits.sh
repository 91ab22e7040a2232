#!/usr/bin/env bash
# The regularised incomplete gamma functions of torch have about nine digits in double precision, those of scipy sixteen.
#
# Versions: torch 2.13.0, scipy 1.17.1, numpy 2.4.6, mpmath 1.3.0.
# Behaviour: from arguments of about 20 on, where an asymptotic expansion takes over, torch.special.gammaincc (and gammainc)
# has relative errors of 1e-10 to 8e-10 in double precision, near the middle of the distribution. The same function of scipy
# is right to rounding. Poisson and gamma distribution functions that are made of it have these errors, too.
# A good guess: a special function in double precision is right to rounding, or says that it is not.
# Output seen:
#   a=21.5, x=21: torch 7.8e-10, scipy 2.5e-18
#   a=51, x=50: torch 4.8e-10, scipy 5.3e-17
#   a=101, x=100: torch 3.5e-10, scipy 1.1e-16
#   a=1001, x=1010: torch 1.5e-10, scipy 5.2e-17
# Way around: scipy.special.gammaincc, with the derivative by hand.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 scipy==1.17.1 numpy==2.4.6 mpmath==1.3.0
cd "$place"
cat > show.py <<'PYTHON'
import mpmath
import scipy.special
import torch

mpmath.mp.dps = 40
for a, x in ((21.5, 21.0), (51.0, 50.0), (101.0, 100.0), (1001.0, 1010.0)):
    exact = mpmath.gammainc(a, x, regularized=True)
    by_torch = torch.special.gammaincc(*(torch.tensor(t, dtype=torch.float64) for t in (a, x))).item()
    errors = [float(abs(value - exact) / exact) for value in (by_torch, scipy.special.gammaincc(a, x))]
    print(f"a={a:g}, x={x:g}: torch {errors[0]:.1e}, scipy {errors[1]:.1e}")
    assert 5e-11 < errors[0] < 1e-8, "torch has other digits now"
    assert errors[1] < 1e-15
PYTHON
"$place/venv/bin/python" show.py
