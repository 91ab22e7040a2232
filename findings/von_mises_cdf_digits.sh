#!/usr/bin/env bash
# The von Mises distribution function of scipy loses eight digits at a concentration of 50.
#
# Versions: scipy 1.17.1, numpy 2.4.6, mpmath 1.3.0.
# Behaviour: scipy.stats.vonmises.cdf sums a series below a concentration of 50, to rounding, and takes a normal approximation
# from there on. Its error jumps from 1e-14 to 2e-6, and falls with the concentration: 6e-9 at 1000. Quantiles and intervals,
# which invert it, and Kolmogorov-Smirnov tests have the same errors; the density is exact on both sides.
# A good guess: a distribution function of scipy is exact to some 1e-10 in double precision, and smooth in its parameters.
# Output seen:
#   concentration 49.9: error 7.0e-14
#   concentration 50: error 2.7e-06
#   concentration 100: error 6.5e-07
#   concentration 1000: error 6.4e-09
# Way around: integrate the density, by a Gauss-Legendre rule between the tail and the angle.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6 mpmath==1.3.0
cd "$place"
cat > show.py <<'PYTHON'
import mpmath
from scipy.stats import vonmises

mpmath.mp.dps = 30


def exact(angle, concentration):
    def density(z):
        return mpmath.exp(concentration * mpmath.cos(z)) / (2 * mpmath.pi * mpmath.besseli(0, concentration))

    return float(0.5 + mpmath.quad(density, [0, angle]))


for concentration, least, most in ((49.9, 0, 1e-12), (50, 1e-6, 1e-5), (100, 1e-7, 1e-5), (1000, 1e-9, 1e-7)):
    angles = [scaled / concentration**0.5 for scaled in (-2.1, -1.1, -0.4, 0.7, 1.4)]
    error = max(abs(vonmises.cdf(angle, concentration) - exact(angle, concentration)) for angle in angles)
    print(f"concentration {concentration:g}: error {error:.1e}")
    assert least <= error < most, "scipy has other digits now"
PYTHON
"$place/venv/bin/python" show.py
