#!/usr/bin/env bash
# Replacing one part of a PyroModule deletes the parameters of another part whose name begins the same.
#
# Versions: pyro-ppl 1.9.2, torch 2.13.0, numpy 2.4.6.
# Behaviour: parts `net` and `net2` of a PyroModule have their parameters in Pyro's store. Assigning a new module to `net`
# removes every entry whose name starts with "net", so that what was learned for `net2` is gone from the store as well:
# PyroModule.__delattr__ compares by `startswith(fullname)`, without the dot that ends a name. Nothing is said.
# A good guess: only `net.weight` and `net.bias` go.
# Output seen:
#   before: ['net.bias', 'net.weight', 'net2.bias', 'net2.weight']
#   after:  []
# Way around: names of which none is the beginning of another one; or a store of its own around the assignment, as
# `bayesianize` has here.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet pyro-ppl==1.9.2 torch==2.13.0 numpy==2.4.6
cd "$place"
cat > show.py <<'PYTHON'
import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](1, 1)
        self.net2 = PyroModule[torch.nn.Linear](1, 1)

    def forward(self, x):
        return self.net(x) + self.net2(x)


model = Model()
poutine.trace(model).get_trace(torch.ones(1))
before = sorted(pyro.get_param_store().keys())
model.net = PyroModule[torch.nn.Linear](1, 1)
after = sorted(pyro.get_param_store().keys())
print(f"before: {before}\nafter:  {after}")
assert before == ["net.bias", "net.weight", "net2.bias", "net2.weight"], "the store is filled in another way now"
assert after == [], "parameters of the other part are kept now"
PYTHON
"$place/venv/bin/python" show.py
