"""Log-densities straight from the channels of a linear layer, with gradients by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_mdn import Diagonal, Full, Isotropic, LowRank, Mixture, MixtureHead, Normal, StudentT
from pyro_mdn.distributions.families.family import layout_of
from pyro_mdn.tensors.channel_density import channel_log_density, layer_channels, layer_log_density

K, D, H, N = 3, 4, 5, 7
NOISE = [Full(min_scale=1e-2), LowRank(2), Diagonal(), Isotropic()]
NOISE += [Full(tied=True), LowRank(2, tied=True), Diagonal(tied=True), Isotropic(tied=True)]
HOMOSCEDASTIC = [Diagonal(homoscedastic=True), Full(homoscedastic=True), Diagonal(tied=True, homoscedastic=True)]
FAMILIES = [Normal(noise) for noise in NOISE + HOMOSCEDASTIC]
FAMILIES += [StudentT(Diagonal()), StudentT(Full()), StudentT(Diagonal(homoscedastic=True)), StudentT(Full(), df=4)]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def arguments(family, n=N):
    """Settings of the kernel; weight, bias, features, values and channels that do not depend on features, if any."""
    torch.manual_seed(0)
    layout = layout_of(family, D, K)
    tensors = [torch.randn(sum(layout.sizes), H), torch.randn(sum(layout.sizes)), torch.randn(n, H), torch.randn(n, D)]
    own = sum(block.width * block.groups for block in layout.blocks if block.is_own)
    tensors += [torch.randn(own)] * (own > 0)
    return (family.kernel, layout), [t.double().requires_grad_() for t in tensors]


def of_layer(kernel, layout, weight, bias, features, value, *own):
    return layer_log_density(kernel, layout, bias, weight, features, value, *own)


def of_channels(kernel, layout, weight, bias, features, value, *own):
    return channel_log_density(kernel, layout, layer_channels(bias, weight, features), value, *own)


either_way = pytest.mark.parametrize("density_of", [of_layer, of_channels])


@every_family
@either_way
def test_density_of_the_mixture(family, density_of):
    settings, tensors = arguments(family)
    logits, locs, blocks = settings[1].split(layer_channels(tensors[1], tensors[0], tensors[2]), *tensors[4:])
    components = family.build(locs.permute(2, 1, 0), [b.permute(2, 1, 0) for b in blocks], torch.ones(D).double())
    expected = Mixture(logits.T, components).log_prob(tensors[3])
    gradients = [torch.autograd.grad(f.exp().sum(), tensors) for f in (density_of(*settings, *tensors), expected)]
    assert_close(density_of(*settings, *tensors), expected)
    assert_close(*gradients)


@pytest.mark.parametrize("rows", [H - 2, H + 20])
def test_channels_are_those_of_a_linear_layer(rows):
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(rows,), (rows, H), (N, H)]]

    def linear(bias, weight, features):
        return torch.nn.functional.linear(features, weight, bias).T

    results = [[c := f(*tensors), *torch.autograd.grad(c.square().sum(), tensors)] for f in (layer_channels, linear)]
    assert_close(*results)
    assert torch.autograd.gradcheck(layer_channels, tensors)
    assert torch.autograd.gradgradcheck(layer_channels, tensors)
    assert_close(torch.func.vmap(layer_channels)(*(torch.stack([t, t]) for t in tensors))[1], results[1][0])
    bias, weight, features = (t.detach().float().requires_grad_() for t in tensors)
    with torch.autocast("cpu", torch.bfloat16):
        layer_channels(bias, weight, features).sum().backward()
    assert_close(bias.grad, torch.full((rows,), float(N)))


@every_family
@either_way
def test_a_graph_that_is_kept_gives_the_same_again(family, density_of):
    settings, tensors = arguments(family)
    loss = density_of(*settings, *tensors).square().sum()
    first, second = (torch.autograd.grad(loss, tensors, retain_graph=True) for _ in range(2))
    assert_close(second, first, rtol=0, atol=0)
    assert_close(torch.autograd.grad(loss, tensors, create_graph=True), first, rtol=1e-8, atol=1e-9)


@every_family
def test_the_layer_gives_the_density_of_its_channels(family):
    settings, tensors = arguments(family)
    results = [
        [d := f(*settings, *tensors), *torch.autograd.grad(d.square().sum(), tensors)] for f in (of_layer, of_channels)
    ]
    assert_close(*results)


@every_family
@either_way
def test_second_derivatives(family, density_of):
    settings, tensors = arguments(family, n=4)

    def density(*tensors):
        return density_of(*settings, *tensors)

    assert torch.autograd.gradcheck(density, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(density, tensors, fast_mode=True)


@every_family
@either_way
def test_batched_gradients(family, density_of):
    settings, tensors = arguments(family)
    density = density_of(*settings, *tensors)
    cotangents = torch.eye(N, dtype=torch.float64)
    apart = [torch.autograd.grad(density, tensors, c, retain_graph=True) for c in cotangents]
    together = torch.autograd.grad(density, tensors, cotangents, is_grads_batched=True)
    assert_close(list(together), [torch.stack(rows) for rows in zip(*apart, strict=True)])


@pytest.mark.parametrize("rows", [H - 2, H + 20])
def test_batched_gradients_of_channels(rows):
    torch.manual_seed(0)
    tensors = tuple(torch.randn(*shape, dtype=torch.float64) for shape in [(rows,), (rows, H), (N, H)])
    expected = torch.autograd.functional.jacobian(layer_channels, tensors)
    assert_close(torch.autograd.functional.jacobian(layer_channels, tensors, vectorize=True), expected)


@pytest.mark.parametrize("wanted", range(5), ids=["weight", "bias", "features", "value", "own"])
@either_way
def test_only_what_is_wanted_is_differentiated(wanted, density_of):
    settings, tensors = arguments(StudentT(Full()))
    (expected,) = torch.autograd.grad(density_of(*settings, *tensors).sum(), tensors[wanted])
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    density_of(*settings, *alone).sum().backward()
    assert [t.grad is not None for t in alone] == [i == wanted for i in range(5)]
    assert_close(alone[wanted].grad, expected)


@every_family
@pytest.mark.parametrize("of", ["channels", "layer"])
def test_compiled_as_one_graph(family, of):
    settings, tensors = arguments(family)
    function = of_layer
    if of == "channels":
        weight, bias, features, value, *own = tensors
        tensors = [(weight @ features.T + bias.unsqueeze(-1)).detach().requires_grad_(), value.detach(), *own]
        function = channel_log_density
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: function(*settings, *t), backend="aot_eager", fullgraph=True)
    wanted, results = [t for t in tensors if t.requires_grad], []
    for f in (compiled, lambda *t: function(*settings, *t)):
        density = f(*tensors)
        cotangent = torch.linspace(-1, 2, N, dtype=torch.float64)
        results.append([density, *torch.autograd.grad(density, wanted, cotangent)])
    assert_close(*results, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("family", [Normal(Diagonal()), Normal(Full())], ids=repr)
def test_second_derivatives_of_compiled_densities_are_refused(family):
    settings, (weight, bias, features, value) = arguments(family)
    channels, value = (weight @ features.T + bias.unsqueeze(-1)).detach().requires_grad_(), value.detach()
    torch.compiler.reset()
    compiled = torch.compile(lambda c: channel_log_density(*settings, c, value), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"does not (currently support double backward|require grad)"):
        torch.autograd.grad(compiled(channels).sum(), channels, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("family", [Normal(Diagonal()), Normal(Full()), StudentT(Full())], ids=repr)
@pytest.mark.parametrize("compiled", [False, True])
@either_way
def test_transforms(family, compiled, density_of):
    settings, (weight, bias, *rest) = arguments(family)
    rows, own = [t.detach() for t in rest[:2]], rest[2:]

    def density(x, y):
        return density_of(*settings, weight, bias, x.unsqueeze(0), y.unsqueeze(0), *own).squeeze(0)

    mapped = torch.vmap(density)
    torch.compiler.reset()
    mapped = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    assert_close(mapped(*rows), density_of(*settings, weight, bias, *rows, *own))


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("family", [Normal(Full()), StudentT(Full()), Normal(Diagonal(homoscedastic=True))], ids=repr)
def test_batches_of_any_shape(family, batch):
    head = MixtureHead(H, D, K, family=family).double()
    features, y = torch.randn(*batch, H).double(), torch.randn(*batch, D).double()
    mixture = head(features)
    rebuilt = Mixture(mixture.logits, mixture.components)
    assert_close(head.log_prob(features, y), rebuilt.log_prob(y))
    assert_close(head(features).log_prob(y), rebuilt.log_prob(y))


@pytest.mark.parametrize("family", [StudentT(Diagonal()), Normal(Full(homoscedastic=True))], ids=repr)
def test_a_mixture_stays_as_it_is_when_the_head_changes(family):
    head = MixtureHead(H, D, K, family=family)
    features, y = torch.randn(6, H), torch.randn(6, D)
    expected, asked, built = head.log_prob(features, y).detach(), head(features), head(features)
    with torch.no_grad():
        head.raw_noise.add_(1.0)
    assert_close(asked.log_prob(y), expected)
    assert_close(Mixture(built.logits, built.components).log_prob(y), expected)
    assert not torch.allclose(head.log_prob(features, y), expected)
    asked, built = head(features), head(features)
    densities = head.log_prob(features, y), asked.log_prob(y), Mixture(built.logits, built.components).log_prob(y)
    first, *others = [torch.autograd.grad(d.sum(), head.raw_noise)[0] for d in densities]
    assert first.abs().sum() > 0
    for other in others:
        assert_close(other, first)


FAMILIES = [Normal(Diagonal()), Normal(Full()), StudentT(Diagonal()), Normal(Diagonal(homoscedastic=True))]


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize("what", ["weight", "bias", "features"])
def test_a_mixture_stays_as_it_is_when_its_layer_is_written_to(family, what):
    head = MixtureHead(H, D, K, family=family)
    features, y = torch.randn(6, H), torch.randn(6, D)
    partly = y.clone()
    partly[0, 0] = torch.nan
    expected, partial = head(features).log_prob(y).detach(), head(features).log_prob(partly).detach()
    first, second, third = head(features), head(features), head(features)
    changed = features if what == "features" else getattr(head.linear, what)
    with torch.no_grad():
        changed.add_(1.0)
    densities = first.log_prob(y), Mixture(second.logits, second.components).log_prob(y), third.log_prob(partly)
    for density, right in zip(densities, (expected, expected, partial), strict=True):
        assert_close(density, right)
        with pytest.raises(RuntimeError, match="build the mixture anew"):
            density.sum().backward()


@pytest.mark.parametrize("ask", ["density", "parameters"])
def test_a_mixture_stays_as_it_is_when_the_head_is_converted_or_changed_behind_autograd(ask):
    features, y = torch.randn(6, H), torch.randn(6, D)
    for change in (nn.Module.double, lambda head: head.linear.weight.data.add_(1.0)):
        head = MixtureHead(H, D, K, noise=Full())
        mixture, expected = head(features), head(features).log_prob(y).detach()
        change(head)
        density = mixture.log_prob(y) if ask == "density" else Mixture(mixture.logits, mixture.components).log_prob(y)
        assert_close(density, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_built_parameters_have_the_gradients_of_the_layer(family):
    head, y = MixtureHead(H, D, K, family=family).double(), torch.randn(6, D).double()
    weights = {name: p.detach() for name, p in head.named_parameters()}

    def density(features, weights):
        mixture = torch.func.functional_call(head, weights, (features,))
        return Mixture(mixture.logits, mixture.components).log_prob(y)

    features = torch.randn(6, H).double()
    leaves = [features.requires_grad_(), *(w.requires_grad_() for w in weights.values())]

    def of_leaves(features, *values):
        return density(features, dict(zip(weights, values, strict=True)))

    assert torch.autograd.gradcheck(of_leaves, leaves)
    assert torch.autograd.gradgradcheck(of_leaves, leaves)


def test_built_parameters_stay_after_the_mixture_is_gone():
    head, features, y = MixtureHead(H, D, K), torch.randn(6, H), torch.randn(6, D)
    mixture = head(features)
    density, logits, locs = mixture.log_prob(y), mixture.logits, mixture.locs
    expected = logits.detach().clone(), locs.detach().clone()
    del mixture
    density.sum().backward()
    assert_close((logits.detach(), locs.detach()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("missing", [True, False])
def test_a_density_under_autocast_is_that_of_the_mixture(missing):
    head, features, y = MixtureHead(H, D, K), torch.randn(6, H), torch.randn(6, D)
    y = y.masked_fill(torch.rand(6, D) < 0.3, torch.nan) if missing else y
    expected, mixture = head(features).log_prob(y), head(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(mixture.log_prob(y), expected)


def test_built_parameters_under_transforms():
    head, features, y = MixtureHead(H, D, K), torch.randn(6, H), torch.randn(6, D)
    mixture, other = head(features), head(features)
    assert_close(torch.vmap(lambda shift: mixture.affine(shift, torch.ones(D)).mean)(y), y.unsqueeze(1) + other.mean)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize("kept", [True, False])
def test_a_mixture_stays_as_it_is_after_a_backward_pass(family, kept):
    head = MixtureHead(H, D, K, family=family).double()
    features, y = torch.randn(6, H).double().requires_grad_(), torch.randn(6, D).double()
    wanted = [*head.parameters(), features]
    expected = Mixture(head(features).logits, head(features).components).log_prob(y)
    gradients = torch.autograd.grad(expected.sum(), wanted)
    mixture = head(features)
    density = mixture.log_prob(y)
    if not kept:
        del mixture
    for _ in range(2):  # the second pass computes anew what the first may have written over
        assert_close(torch.autograd.grad(density.sum(), wanted, retain_graph=True), gradients)
    again = torch.autograd.grad(density.sum(), wanted, create_graph=True)
    assert_close(again, gradients)
    assert again[0].requires_grad
    if kept:
        assert_close(mixture.log_prob(y), expected)
        assert_close(torch.autograd.grad(mixture.log_prob(y).sum(), wanted), gradients)


@pytest.mark.parametrize("frozen", [True, False])
def test_features_of_inference_mode_under_frozen_weights(frozen):
    head = MixtureHead(H, D, K).requires_grad_(not frozen)
    with torch.inference_mode():
        features, y = torch.randn(6, H), torch.randn(6, D)
        expected = head(features).log_prob(y)
    if frozen:
        assert_close(head(features).log_prob(y), expected)
    else:
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
            head(features).log_prob(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(dtype, autocast):
    """Densities are accumulated in single precision at least; products alone are of the dtype of autocast."""
    head = MixtureHead(H, D, K).to(dtype)
    assert sum(head.sizes) > H  # many channels
    features, y = torch.randn(6, H, dtype=dtype, requires_grad=True), torch.randn(6, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_prob = head.log_prob(features, y)
    assert log_prob.dtype == torch.promote_types(torch.float32, dtype)
    exact = copy.deepcopy(head).double()(features.double()).log_prob(y)
    rounding = 0.05 if autocast or dtype == torch.bfloat16 else 1e-4
    assert_close(log_prob.double(), exact, rtol=rounding, atol=rounding)
    log_prob.sum().backward()
    assert features.grad.dtype == dtype
    assert features.grad.isfinite().all()
