"""Private names of other libraries stand in one module each, and mean what we take them for."""

import ast
import copy
import math
import pickle
import warnings
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.nn.utils import prune
from torch.testing import assert_close

from pyro_mdn import MixtureDensityNetwork
from pyro_mdn.support import pyro_compat, torch_compat

PACKAGE = Path(__file__).parents[1] / "pyro_mdn"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
COMPAT = {"support/torch_compat.py", "support/pyro_compat.py"}
# Methods that Pyro calls by these names: the protocols of its messengers and modules.
CALLED_BY_PYRO = {"_pyro_param", "_pyro_get_init_messengers", "_pyro_set_supermodule"}
# What a subclass of a distribution of torch has from it, and a named tuple has instead of public names.
INHERITED = {"_validate_args", "_fields", "_replace"}
PUBLIC = {"_"}
FIGURES = ("axes", "calibration", "components", "densities", "directions", "predictions", "training")
UNDOCUMENTED = {
    ("pyro.infer.mcmc.util", "select_samples"),
    ("pyro.nn.module", "to_pyro_module_"),
    ("pyro.poutine.runtime", "am_i_wrapped"),
    ("pyro.poutine.util", "site_is_subsample"),
    ("torch.nn.modules", "module"),
    ("torch.optim.adam", "adam"),
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def imported(tree):
    """Module and name of everything that a file imports from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("pyro_mdn"):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def defined(tree):
    """Names that a file gives to something itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if isinstance(node.value, ast.Name) and node.value.id in ("self", "new") else []


OURS = {name for source in SOURCES.values() for name in defined(ast.parse(source))}
# Names that we and torch have for different things; the attributes of a module are asked for by these.
OF_MODULES = {"_modules", "_parameters", "_buffers", "_pyro_samples"}


def foreign(source):
    """Private names in a file that are no names of ours, and undocumented ones that it imports."""
    tree = ast.parse(source)
    found = {name for pair in imported(tree) for part in pair for name in part.split(".") if is_private(name)}
    found |= {".".join(pair) for pair in imported(tree) if pair in UNDOCUMENTED}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    foreign = {node.attr for node in attributes if is_private(node.attr) and node.attr not in OURS | INHERITED}
    own = {"self", "cls", "new", "mixture", "other"}
    modules = {node.attr for node in attributes if node.attr in OF_MODULES and ast.unparse(node.value) not in own}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words = {text for text in texts if text in OF_MODULES | private_attributes()}
    return found | foreign | modules | words


def private_attributes():
    """Names by which the modules for private names ask other libraries."""
    nodes = [node for name in COMPAT for node in ast.walk(ast.parse(SOURCES[name]))]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {name for name in attributes | texts if is_private(name) and name.isidentifier()} - INHERITED


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - COMPAT))
def test_private_names_are_used_nowhere_else(name):
    assert not foreign(SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "from torch._C import _functorch as functorch",
        "from torch.utils._pytree import tree_map",
        "import torch._dynamo",
        "def f(part):\n    return part._parameters",
        "def f(part):\n    return vars(part)['_modules']",
        "def f(store):\n    return store._params",
        "from torch.optim.adam import adam",
        "from pyro.poutine.runtime import am_i_wrapped",
    ],
)
def test_no_way_round(source):
    assert foreign(source)


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("arviz", {"adapters/arviz_versions.py"}),
        ("lightning", {"lightning.py"}),
        ("torchmetrics", {"lightning.py"}),
        ("matplotlib", {f"adapters/figures/{name}.py" for name in FIGURES}),
    ],
)
def test_a_library_that_is_optional_has_few_importers(package, users):
    found = {n for n, source in SOURCES.items() for module, _ in imported(ast.parse(source)) if is_in(module, package)}
    assert found == users


def is_in(module, package):
    return (module or "").split(".")[0] == package


@pytest.mark.parametrize("module", [torch_compat, pyro_compat], ids=lambda module: module.__name__)
def test_each_name_says_what_it_gives_and_has_a_test(module):
    body = ast.parse(Path(module.__file__).read_text()).body
    said = {node.name for node in body if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)}
    for node, text in pairwise(body):
        if isinstance(text, ast.Expr) and isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            said.add(target.id)
    assert said == {*module.__all__}
    here, of = Path(__file__).read_text(), module.__name__.rpartition(".")[2]
    assert not [name for name in module.__all__ if f"{of}.{name}" not in here]


# torch


def test_transforms_are_seen():
    assert not torch_compat.transforms_active()
    seen = []

    def look(row):
        seen.append((torch_compat.transforms_active(), torch_compat.is_wrapped(row), torch_compat.is_batched(row)))
        return row.sum()

    x = torch.ones(3, 2)
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    look(x)
    assert seen == [(True, True, True), (True, True, False), (False, False, False)]


def test_a_wrapped_tensor_gives_what_is_inside():
    shapes = []
    torch.vmap(lambda row: shapes.append(torch_compat.inner_tensor(row).shape) or row)(torch.ones(3, 2))
    assert shapes == [(3, 2)]


def test_the_older_vmap_is_seen():
    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch_compat.is_legacy_batched(grad), torch_compat.transforms_active()))
            return grad

    seen, x = [], torch.ones(2, requires_grad=True)
    y = Look.apply(x)
    torch.autograd.grad(y, x, torch.eye(2)[0], retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen[0] == (False, False)
    assert seen[1][0]


def test_traces_and_forward_mode_are_seen():
    seen = []
    torch.jit.trace(lambda x: seen.append(torch_compat.tracing_state() is not None) or x + 1, torch.ones(1))
    assert seen[0]
    assert torch_compat.tracing_state() is None
    assert getattr(forward_ad, torch_compat.FORWARD_LEVEL) < 0
    with forward_ad.dual_level():
        assert getattr(forward_ad, torch_compat.FORWARD_LEVEL) >= 0
    assert getattr(forward_ad, torch_compat.FORWARD_LEVEL) < 0


def test_versions_count_what_is_written():
    tensor = torch.ones(2)
    before = torch_compat.version_of(tensor)
    tensor.add_(1.0)
    assert torch_compat.version_of(tensor) == torch_compat.version_of(tensor.detach()) > before


def test_dispatch_sees_what_operations_make():
    class Look(torch_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(leaf.shape for leaf in torch_compat.tree_leaves(({"a": [result]},)))
            return result

    made = []
    with Look():
        torch.ones(3, 1) * torch.ones(1, 2)
    assert made[-1] == (3, 2)
    assert torch_compat.tree_leaves(((1, [2]), {"c": 3})) == [1, 2, 3]


def test_checks_run_with_compiled_code():
    def checked(x):
        torch_compat.assert_async(x.sum() > 0, "not positive")
        return x + 1

    with pytest.raises(RuntimeError, match="not positive"):
        checked(-torch.ones(2))
    torch.compiler.reset()
    compiled = torch.compile(checked, backend="aot_eager", fullgraph=True)
    assert_close(compiled(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="not positive"):
        compiled(-torch.ones(2))
    passed = torch.zeros(())
    assert_close(torch_compat.functional_assert_async(torch.tensor(True), "no", passed), passed)
    with pytest.raises(RuntimeError, match="no"):
        torch_compat.functional_assert_async(torch.tensor(False), "no", passed)


def test_gradient_of_log_softmax():
    logits, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    result = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(result, logits, grad)
    assert_close(torch_compat.log_softmax_gradient(grad, result.detach(), 0, grad.dtype), expected)


def test_many_tensors_at_once():
    tensors, others = [torch.randn(2), torch.randn(3, 2)], [torch.randn(2), torch.randn(3, 2)]
    assert_close(list(torch_compat.foreach_norm(tensors)), [t.norm() for t in tensors])
    expected = [a.lerp(b, 0.3) for a, b in zip(tensors, others, strict=True)]
    torch_compat.foreach_lerp_(tensors, others, 0.3)
    assert_close(tensors, expected)
    torch_compat.foreach_mul_(tensors, 2.0)
    assert_close(tensors, [2 * t for t in expected])


def test_a_step_of_adam_is_that_of_its_optimizer():
    value, grad = torch.randn(3), torch.randn(3)
    mine, theirs = value.clone(), nn.Parameter(value.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    mean, square, step = torch.zeros(3), torch.zeros(3), torch.zeros(())
    settings = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for _ in range(3):
        theirs.grad = grad
        optimizer.step()
        torch_compat.adam([mine], [grad], [mean], [square], [], [step], fused=True, lr=0.1, maximize=False, **settings)
    assert_close(mine, theirs.detach())
    assert step == 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_of_one_memory_have_one_number(device):
    a, b = torch.empty(4, device=device), torch.empty(4, device=device)
    assert torch_compat.storage_id(a) == torch_compat.storage_id(a[1:].view(3, 1)) != torch_compat.storage_id(b)


def test_what_a_module_keeps():
    layer = nn.Linear(2, 3)
    module = nn.Sequential(layer, nn.GELU(), layer)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("transient", torch.ones(1), persistent=False)
    module.register_parameter("empty", None)
    assert [*torch_compat.own_modules(module)] == ["0", "1", "2"]
    assert torch_compat.own_modules(module)["2"] is layer
    assert torch_compat.own_parameters(module) == {"empty": None}
    torch_compat.own_parameters(layer)["bias"] = bias = nn.Parameter(torch.ones(3))
    assert layer.bias is bias
    torch_compat.own_buffers(module)["kept"] = torch.full((1,), 7.0)
    assert module.state_dict()["kept"] == 7
    assert {*torch_compat.own_buffers(module)} == {"kept", "transient"}
    assert torch_compat.transient_buffers(module) == {"transient"}
    kept = (torch_compat.own_modules(module), torch_compat.own_parameters(module), torch_compat.own_buffers(module))
    assert all(vars(module)[name] is held for name, held in zip(torch_compat.REGISTERED, kept, strict=True))


REGISTER = {
    "_forward_pre_hooks": "register_forward_pre_hook",
    "_forward_hooks": "register_forward_hook",
    "_backward_pre_hooks": "register_full_backward_pre_hook",
    "_backward_hooks": "register_full_backward_hook",
}


@pytest.mark.parametrize("name", torch_compat.HOOKS)
def test_hooks_are_seen(name):
    layer, other = nn.Linear(1, 1), nn.Linear(1, 1)
    handle = getattr(layer, REGISTER[name])(hook := lambda *_: None)
    assert [*vars(layer)[name].values()] == [hook]
    assert torch_compat.is_hooked(layer)
    assert not torch_compat.is_hooked(other)
    handle.remove()
    assert not torch_compat.is_hooked(layer)
    everywhere = getattr(nn.modules.module, REGISTER[name].replace("register_", "register_module_", 1))
    handle = everywhere(hook)
    assert torch_compat.is_hooked(other)
    handle.remove()
    assert not torch_compat.is_hooked(other)


def test_hooks_that_prune_are_found():
    layer = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=2)
    (hook,) = torch_compat.pre_hooks(layer)
    prune.remove(layer, torch_compat.pruned_name(hook))
    assert not torch_compat.pre_hooks(layer)


def test_what_torch_and_its_compiler_add_to_a_module():
    layer = nn.GRU(1, 1)
    plain = {*vars(nn.Module())}
    lists = {name for name, value in vars(layer).items() if "weight_ih_l0" in str(value) or name == "_flat_weights"}
    assert {"_flat_weights", "_flat_weights_names"} <= {n for n in lists if torch_compat.is_flat_weight(layer, n)}
    assert not torch_compat.is_flat_weight(layer, "hidden_size")
    linear = nn.Linear(1, 1)
    before = {*vars(linear)}
    linear.compile(backend="eager")
    added = {name for name in vars(linear) if name not in before or vars(linear)[name] is not None} - before
    assert (added | {"_compiled_call_impl"}) - plain <= torch_compat.OF_COMPILERS
    assert torch_compat.is_compiler_wrapper(type(torch.compile(linear, backend="eager")))
    assert not torch_compat.is_compiler_wrapper(nn.Linear)


def test_compilers_do_not_warn_of_what_is_kept():
    calls, root = [], torch_compat.cached(math.sqrt)

    @torch_compat.cached
    def doubled(number):
        """Twice a number."""
        calls.append(number)
        return 2 * number

    assert (doubled(3), doubled(3), calls) == (6, 6, [3])
    assert doubled.__doc__ == "Twice a number."
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(lambda x: x * root(4.0), backend="aot_eager", fullgraph=True)
        assert compiled(torch.ones(1)) == 2


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: nn.MultiheadAttention(2, 1)])
def test_weights_are_drawn_anew(make):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    torch_compat.reset_of(layer)()
    assert any(not torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch_compat.reset_of(nn.GELU()) is None


@pytest.mark.parametrize("wanted", [True, False])
def test_validation_by_default(wanted):
    before = torch_compat.validates_by_default()
    try:
        Distribution.set_default_validate_args(wanted)
        assert torch_compat.validates_by_default() is wanted
    finally:
        Distribution.set_default_validate_args(before)


# Pyro


def latent():
    module = PyroModule[nn.Linear](1, 2)
    module.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
    return module


def test_handlers_are_a_list_that_may_be_changed():
    assert not pyro_compat.handlers
    assert not pyro_compat.am_i_wrapped()
    with poutine.trace() as trace, poutine.block() as block:
        assert pyro_compat.am_i_wrapped()
        assert pyro_compat.handlers == [trace, block]
        kept = pyro_compat.handlers[:]
        pyro_compat.handlers[:] = []
        pyro.sample("unseen", dist.Normal(0.0, 1.0))
        pyro_compat.handlers[:] = kept[:1]
        pyro.sample("seen", dist.Normal(0.0, 1.0))
        pyro_compat.handlers[:] = kept
    assert [*trace.trace.nodes] == ["seen"]
    assert not pyro_compat.handlers


def test_subsamples_are_told_from_other_sites():
    def model():
        with pyro.plate("plate", 4, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    nodes = poutine.trace(model).get_trace().nodes
    assert pyro_compat.site_is_subsample(nodes["plate"])
    assert not pyro_compat.site_is_subsample(nodes["z"])


def test_draws_of_chains_are_those_of_pyro():
    kernel = infer.NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), jit_compile=False)
    mcmc = infer.MCMC(kernel, num_samples=6, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["z"].shape == (1, 6)
    for settings in ({}, {"group_by_chain": True}):
        chosen = pyro_compat.select_samples(draws, settings.get("num_samples"), settings.get("group_by_chain", False))
        assert_close(chosen, mcmc.get_samples(**settings))


def test_a_guide_loses_its_model_when_pickled():
    guide = AutoNormal(MixtureDensityNetwork(1, 1).model)
    assert not pyro_compat.has_lost_model(guide)
    assert pyro_compat.has_lost_model(pickle.loads(pickle.dumps(guide)))
    assert not pyro_compat.has_lost_model(object())


def test_latent_parameters_are_seen():
    module, inside = latent(), nn.Sequential(nn.Sequential(latent()))
    assert [*pyro_compat.latent_parameters(module)] == ["weight"]
    assert not pyro_compat.latent_parameters(nn.Linear(1, 1))
    assert pyro_compat.is_latent(module)
    assert pyro_compat.is_latent(inside)
    assert not pyro_compat.is_latent(PyroModule[nn.Linear](1, 1))
    assert not pyro_compat.is_latent(None)


def test_parts_of_pyro_are_seen():
    whole = PyroModule()
    whole.part = nn.Sequential(nn.Linear(1, 1))
    assert not pyro_compat.draws_or_registers(whole)
    whole.part.append(nn.Sequential(PyroModule[nn.Linear](1, 1)))
    assert pyro_compat.draws_or_registers(whole)
    assert pyro_compat.draws_or_registers(latent())


def test_a_module_is_made_one_of_pyro():
    module = nn.Sequential(nn.Linear(1, 1))
    weight = module[0].weight
    pyro_compat.to_pyro_module_(module)
    assert type(module[0]) is PyroModule[nn.Linear]
    assert module[0].weight is weight


def test_pyro_marks_what_it_keeps():
    added = {*vars(PyroModule())} - {*vars(nn.Module())}
    assert added
    assert all(name.startswith(pyro_compat.MARK) for name in added)
    assert added >= pyro_compat.LEARNED_OR_DRAWN
    assert not any(vars(PyroModule())[name] for name in pyro_compat.LEARNED_OR_DRAWN)


def test_names_in_the_store_are_those_of_the_owner():
    whole = PyroModule()
    whole.part = part = PyroModule[nn.Linear](1, 1)
    part.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)
    pyro.clear_param_store()
    with poutine.trace() as trace, pyro_compat.context_of(part):
        assert part.weight.requires_grad
        assert_close(part.scale, torch.ones(2))
    assert [*trace.trace.nodes] == [pyro_compat.name_in_store(part, name) for name in ("weight", "scale")]
    assert {*pyro_compat.names_of_parameters(part)} == {"part.weight", "part.bias", "part.scale"}
    assert pyro_compat.name_in_store(whole, "z") == "z"
    # The store keeps unconstrained tensors.
    assert_close(pyro_compat.stored_parameter("part.scale", None), torch.zeros(2))
    assert pyro_compat.stored_parameter("part.weight", None) is pyro.param("part.weight")
    assert pyro_compat.stored_parameter("nothing", "default") == "default"
    pyro.clear_param_store()


def test_calls_of_a_module_share_a_context():
    module = latent()
    context = pyro_compat.context_of(module)
    assert not context.active
    assert not context.used
    with context:
        assert context.active == 1
        assert module.weight is module.weight  # drawn once
    assert not context.active
    with poutine.trace(), context:
        assert module.bias is not None
    assert context.used


@pytest.mark.parametrize("name", sorted(CALLED_BY_PYRO))
def test_pyro_calls_methods_of_ours(name):
    called = []

    def record(self, *args):
        called.append(name)

    if name == "_pyro_set_supermodule":
        whole, kind = PyroModule(), type("Part", (PyroModule,), {name: record})
        whole.part = kind()
    else:
        messenger = type("Look", (poutine.messenger.Messenger,), {name: record})()
        with messenger:
            pyro.param("p", torch.ones(1))
            with poutine.reparam(config={"z": LocScaleReparam()}):  # which asks for where a site starts
                pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.clear_param_store()
    assert called
