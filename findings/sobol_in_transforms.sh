#!/usr/bin/env bash
# A Sobol engine of torch can neither be built nor drawn from within a transform of torch.func, not even as a constant.
#
# Versions: torch 2.13.0, numpy 2.4.6.
# Behaviour: torch.quasirandom.SobolEngine(2), built or drawn from within a function that torch.func.grad differentiates,
# raises a RuntimeError about the data pointer of a tensor without storage, although its points depend on nothing that is
# differentiated. Native code reads the tensors of the engine, and those made within torch.func.grad are wrapped. With
# points in a cache, whether a function can be differentiated depends on whether it was called before.
# A good guess: constants may be made anywhere, as torch.linspace and torch.tensor may.
# Output seen:
#   linspace within grad: works
#   engine built before, drawn within grad: Cannot access data pointer of Tensor that doesn't have storage
#   engine built within grad: Cannot access data pointer of Tensor that doesn't have storage
# Way around: scipy.stats.qmc.Sobol, and torch.from_numpy.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$place"
cat > show.py <<'PYTHON'
import torch
from torch.quasirandom import SobolEngine

before = SobolEngine(2)
CONSTANTS = {
    "linspace within grad": lambda: torch.linspace(0, 1, 4),
    "engine built before, drawn within grad": lambda: before.draw(4),
    "engine built within grad": lambda: SobolEngine(2).draw(4),
}


def outcome(constant):
    try:
        torch.func.grad(lambda x: x * constant().sum())(torch.tensor(2.0))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "works"


outcomes = {name: outcome(constant) for name, constant in CONSTANTS.items()}
for name, text in outcomes.items():
    print(f"{name}: {text}")
assert outcomes["linspace within grad"] == "works"
for name in ("engine built before, drawn within grad", "engine built within grad"):
    assert "data pointer" in outcomes[name], f"{name}: it works now"
PYTHON
"$place/venv/bin/python" show.py
