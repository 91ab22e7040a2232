"""Fingerprints of modules: they show what changes what is computed, and nothing else, in every process alike."""

import copy
import dataclasses
import enum
import functools
import itertools
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from pyro_mdn import DeepEnsemble, MixtureDensityNetwork
from pyro_mdn.support.fingerprint import described, differing, incomparable


class Mode(enum.Enum):
    SOFT = 1
    HARD = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Settings:
    slope: float
    names: list = dataclasses.field(default_factory=list)


class Quiet:
    """Object whose ``repr`` says nothing of its setting."""

    def __init__(self, slope):
        self.slope = slope

    def __repr__(self):
        return "Quiet"


class Counting(Quiet):
    """Object whose ``repr`` is another each time."""

    def __repr__(self):
        return f"{next(TIMES)}"


TIMES = itertools.count()


class Slots:
    __slots__ = ("slope",)

    def __init__(self, slope):
        self.slope = slope


class Part(nn.Module):
    """Module with one attribute, perhaps a private one."""

    def __init__(self, value, name="value"):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        setattr(self, name, value)

    def method(self, x):
        return x

    @functools.cached_property
    def expensive(self):
        return object()


def closure(slope):
    return lambda x: functional.leaky_relu(x, slope)


def local_class(slope):
    class Activation(nn.Module):
        def forward(self, x):
            return functional.leaky_relu(x, slope)

    return Activation


def looped(*values):
    values = [*values]
    values.append(values)
    return values


def alike(a, b):
    return not differing(described(f=a), described(f=b))


PAIRS = {
    "number": (0.1, 0.2),
    "object whose repr is the same": (Quiet(0.1), Quiet(0.2)),
    "number and text": (1, "1"),
    "tuple and list": ((1, 2), [1, 2]),
    "nested": ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "set": ({"a", "b"}, {"a", "c"}),
    "function": (torch.relu, torch.tanh),
    "function of Python": (functional.relu, functional.silu),
    "function of C": (functional.gelu, functional.softplus),
    "method of C": (torch.Tensor.relu, torch.Tensor.tanh),
    "dispatched function": (functional.max_pool1d, functional.adaptive_max_pool1d),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "closure": (closure(0.1), closure(0.2)),
    "default": (lambda x, a=1: x, lambda x, a=2: x),
    "partial": (functools.partial(functional.elu, alpha=1.0), functools.partial(functional.elu, alpha=2.0)),
    "pattern": (re.compile("a"), re.compile("b")),
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "dtype of a tensor": (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "dtype": (torch.float32, torch.float64),
    "array": (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "array of objects": (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
    "scalar of NumPy": (np.float64(1.0), np.float64(2.0)),
    "enumeration": (Mode.SOFT, Mode.HARD),
    "enumeration of numbers": (Level.LOW, Level.HIGH),
    "dataclass": (Settings(0.1), Settings(0.2)),
    "inner list": (Settings(0.1, ["a"]), Settings(0.1, ["b"])),
    "slots": (Slots(0.1), Slots(0.2)),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "class": (nn.ReLU, nn.GELU),
    "local class": (local_class(0.1), local_class(0.2)),
    "distribution": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)),
    "module in a list": ([nn.GELU()], [nn.GELU("tanh")]),
    "weights in a list": ([nn.Linear(2, 2)], [nn.Linear(2, 2)]),
    "what goes in circles": (looped(1, 2), looped(1, 3)),
}


@pytest.mark.parametrize("name", ["value", "_value"])
@pytest.mark.parametrize("pair", PAIRS)
def test_attributes_that_differ_show(pair, name):
    a, b = (Part(value, name) for value in PAIRS[pair])
    assert f"f.{name}" in {n[: len(name) + 2] for n in differing(described(f=a), described(f=b))}
    assert alike(a, a)


def rebuilt(make):
    return make(), make()


SAME = {
    "object whose repr changes": lambda: Counting(0.1),
    "closure": lambda: closure(0.1),
    "local class": lambda: local_class(0.1),
    "nested": lambda: {"a": [1, (2.5, "b")], "c": {3, 4}},
    "tensor": lambda: torch.arange(3.0),
    "array": lambda: np.arange(3.0),
    "pattern": lambda: re.compile("a"),
    "dataclass": lambda: Settings(0.1, ["a"]),
    "distribution": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "what goes in circles": lambda: looped(1),
    "partial": lambda: functools.partial(functional.elu, alpha=0.5),
    "generators": lambda: [torch.Generator(), np.random.default_rng(), np.random.RandomState()],
}


@pytest.mark.parametrize("kind", SAME)
def test_attributes_that_were_built_alike_are_the_same(kind):
    assert alike(*(Part(value) for value in rebuilt(SAME[kind])))


def test_what_use_changes_without_an_effect_does_not_show():
    a, b = (Part(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))) for _ in range(2))
    assert b.eval().expensive is b.__dict__["expensive"]
    assert b.value.precision_matrix is b.value.__dict__["precision_matrix"]
    b.layer.weight.data += 1
    a.mask_cache, b.mask_cache = None, torch.ones(2)
    a.generator, b.generator = torch.Generator(), torch.Generator().manual_seed(3)
    a.handle = a.layer.register_forward_hook(print)
    b.layer.register_forward_hook(lambda *_: None).remove()
    b.handle = b.layer.register_forward_hook(print)
    a.where, b.where = torch.device("cpu"), torch.device("meta")
    assert alike(a, b)


def test_defaults_that_were_named_are_defaults():
    networks = [MixtureDensityNetwork(1, 1, seed=0), MixtureDensityNetwork(1, 1, seed=1, family="normal")]
    assert [network.head.has_defaults for network in networks] == [True, False]
    assert described(network=networks[0]) == described(network=networks[1])
    assert DeepEnsemble(networks).size == 2


def test_copies_of_an_object_leave_no_trace():
    class Sheet:  # of this test alone: the first copy leaves a cache in its class
        def __init__(self):
            self.slope = 0.1

    part = Part(Sheet())
    before = described(f=part)
    copy.copy(part.value)
    assert "__slotnames__" in vars(Sheet)
    assert not differing(before, described(f=part))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.identity(m, "weight")]
)
def test_weights_that_are_computed_from_others_are_weights(change):
    a, b = (change(nn.Linear(2, 2)) for _ in range(2))
    with torch.no_grad():
        b(torch.ones(1, 2))
    assert alike(a, b)
    assert not alike(a, nn.Linear(2, 2))


def test_parametrized_layers_are_those_of_their_parts():
    first, other = (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), dim=dim) for dim in (0, 1))
    assert alike(first, nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert alike(first, copy.deepcopy(first))
    assert not alike(first, other)
    assert not alike(first, nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)))


def test_recurrent_layers_and_compiled_ones_have_no_more_than_their_settings():
    assert alike(nn.LSTM(2, 3), nn.LSTM(2, 3))
    assert not alike(nn.LSTM(2, 3), nn.LSTM(2, 3, bidirectional=True))
    a, b = (torch.compile(Part(slope), backend="eager") for slope in (0.1, 0.2))
    assert not alike(a, b)
    assert alike(a, torch.compile(Part(0.1), backend="eager"))


def test_functions_of_notebooks_count_by_their_code():
    """A cell that was run again: name and module lead to the new function, and to the new class."""
    source = "def act(x): return relu(x, {0})\nclass Act:\n    def act(self, x): return relu(x, {0})"
    first, second, third = ({"__name__": "__main__", "relu": functional.leaky_relu} for _ in range(3))
    for slope, cell in [(0.1, first), (0.2, second), (0.2, third)]:
        exec(source.format(slope), cell)
    for name in ("act", "Act"):
        assert not alike(Part(first[name]), Part(second[name]))
        assert alike(Part(second[name]), Part(third[name]))
        assert not differing(*(described(f=Part(cell[name]), code=False) for cell in (first, second)))


GLOBALS = """
class Options:
    resume = {resume}

def act(x):
    return x {sign} 1

class Backbone(Module):
    def __init__(self):
        super(Backbone, self).__init__()
        self.width = width

    def forward(self, x):
        return act(x) if Options.resume or args else act(x) + 1
"""


def cell(*, sign="+", resume=False, width=8, **values):
    """A module of a class of a notebook."""
    names = {"__name__": "__main__", "Module": nn.Module, "width": width, "args": None, **values}
    exec(GLOBALS.format(sign=sign, resume=resume), names)
    return names["Backbone"]()


def test_of_globals_functions_count_and_values_do_not():
    for other in (cell(args=["--resume"]), cell(args=torch.ones(3)), cell(args=threading.Lock()), cell(resume=True)):
        assert alike(cell(), other)
        assert not incomparable(described(f=other))
    assert differing(described(f=cell()), described(f=cell(sign="-"))) == ["f", "f: Backbone.forward"]
    assert differing(described(f=cell()), described(f=cell(width=9))) == ["f.width"]


def test_bound_methods_are_those_of_their_module():
    a, b = Part(0), Part(0)
    a.value, b.value = a.method, b.method
    assert described(f=a)["f.value"].endswith("f.method")
    assert alike(a, b)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_and_overridden_calls_show(register):
    a, b, c, d = (nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(4))
    getattr(b[1], register)(lambda *_: None)
    getattr(c[1], register)(lambda *_: 0)
    d[1].forward = torch.tanh
    assert all(not alike(*pair) for pair in [(a, b), (b, c), (a, d)])
    assert not differing(described(f=a, hooks=False), described(f=b, hooks=False))


def test_types_order_and_sharing_show():
    gelu, relu, linear = nn.GELU(), nn.ReLU(), nn.Linear(2, 2)
    assert not alike(nn.Sequential(linear, gelu), nn.Sequential(linear, relu))
    assert not alike(nn.ModuleDict({"a": gelu, "b": gelu}), nn.ModuleDict({"b": gelu, "a": gelu}))
    assert not alike(nn.Sequential(linear, linear), nn.Sequential(linear, nn.Linear(2, 2)))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert not alike(tied, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert not alike(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def test_buffers_count_by_value_where_no_file_holds_them():
    def part(value, *, persistent):
        module = nn.Module()
        module.register_buffer("value", torch.full((2,), value), persistent=persistent)
        return module

    assert alike(part(1.0, persistent=True), part(2.0, persistent=True))
    transient = part(1.0, persistent=False), part(2.0, persistent=False)
    assert not alike(*transient)
    assert not differing(*(described(f=module, buffers=False) for module in transient))


def test_modules_of_pyro_are_told_apart_without_a_draw():
    def latent(kind, scale):
        to_pyro_module_(layer := kind(2, 2))
        layer.weight = PyroSample(dist.Normal(0.0, scale).expand([2, 2]).to_event(2))
        return layer

    before = torch.get_rng_state()
    assert alike(latent(nn.Linear, 1.0), latent(nn.Linear, 1.0))
    assert not alike(latent(nn.Linear, 1.0), latent(nn.Linear, 2.0))
    assert not alike(PyroModule[nn.GELU](), PyroModule[nn.ReLU]())
    described(f=(layer := latent(nn.Linear, 1.0)))
    torch.set_rng_state(before)
    described(f=layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_objects_that_cannot_be_compared_are_named():
    assert incomparable(described(f=Part([threading.Lock()]))) == ["f.value"]
    assert incomparable(described(f=Part([*range(1000), threading.Lock()]))) == ["f.value"]
    assert not incomparable(described(f=Part([1, torch.ones(1), closure(0.1)])))


def test_descriptions_are_the_same_in_every_process():
    code = """
        import hashlib, json, sys
        sys.path.insert(0, "tests")
        from test_fingerprint import *
        kinds = {**{name: pair[0] for name, pair in PAIRS.items() if name != "weights in a list"},
                 **{f"same {name}": make() for name, make in SAME.items()}}
        text = json.dumps({name: described(f=Part(value)) for name, value in kinds.items()})
        print(hashlib.sha256(text.encode()).hexdigest())
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    code = code.replace("**{f", " **{f")
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    outputs = [run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert outputs[0] == outputs[1] != ""
