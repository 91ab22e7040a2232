"""Kernels compile as one graph, and give there what they give eagerly; gradients by hand are those of autograd."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pyro_mdn.distributions.covariance.diagonal import DiagonalWhitening, RawDiagonalWhitening
from pyro_mdn.distributions.covariance.full import FullWhitening, RawFullWhitening
from pyro_mdn.distributions.covariance.low_rank import (
    LowRankWhitening,
    RawLowRankWhitening,
    gram_schmidt,
    low_rank_capacitance,
    low_rank_project,
)
from pyro_mdn.distributions.families.circular.von_mises import RawVonMisesKernel
from pyro_mdn.distributions.families.kernels import EllipticalKernel, NormalKernel, WrappedNormalKernel
from pyro_mdn.distributions.families.normal import (
    NORMAL,
    normal_cdf,
    normal_log_cdf,
    normal_log_density,
    relative_log_density,
)
from pyro_mdn.distributions.families.student_t import KnownStudentTRadial, RawStudentTRadial
from pyro_mdn.distributions.families.student_t_law import StudentTLaw, StudentTRadial
from pyro_mdn.tensors import channels, mixture_density, numerics, packed_triangles
from pyro_mdn.tensors.channel_density import channel_log_density
from pyro_mdn.tensors.channels import BlockLayout, Layout
from pyro_mdn.tensors.univariate import UnivariateMixture

K, D, R = 3, 4, 2


def draw(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.2


CALLS = {
    channels.cat_channels: lambda: (draw(5, 3, 2), draw(5, 3, 4)),
    numerics.exp: lambda: (draw(5, 3),),
    gram_schmidt: lambda: (draw(2, 4, 3, 5),),
    numerics.location_and_scale: lambda: (draw(5, 3),),
    mixture_density.logits_gradient: lambda: (draw(3, 5), draw(3, 5).log_softmax(0)),
    numerics.log_sum_exp: lambda: (draw(3, 5),),
    low_rank_capacitance: lambda: (draw(5, 3, 4, 2),),
    low_rank_project: lambda: (draw(5, 3, 4, 2), draw(5, 3, 4)),
    numerics.norm: lambda: (draw(5, 3, 4),),
    normal_log_density: lambda: (draw(5, 3, 4), draw(5, 3)),
    channels.normalize_logits: lambda: (draw(5, 3),),
    numerics.shares: lambda: (draw(3, 5),),
    relative_log_density: lambda: (draw(5, 3, 4), draw(5, 3)),
    channels.split_channels: lambda: (draw(5, 3, 4), [1, 3]),
    numerics.sum_logs: lambda: (draw(5, 3, 4),),
    numerics.winsorized: lambda: (draw(5, 3),),
    channels.sum_outputs: lambda: (draw(5, 3, 4),),
    packed_triangles.pack_tril: lambda: (draw(5, 3, 4, 4),),
    packed_triangles.tril_add_transposed_: lambda: (draw(4, 3, 5), draw(6, 3, 5), draw(4, 3, 5)),
    packed_triangles.tril_matvec: lambda: (draw(4, 3, 5), draw(6, 3, 5), draw(4, 3, 5)),
    packed_triangles.tril_below: lambda: (draw(6, 3, 5), 4, draw(1, 3, 5)),
    packed_triangles.tril_block: lambda: (draw(6, 3, 5), 4, 1, 4),
    packed_triangles.tril_outer: lambda: (draw(4, 3, 5), draw(4, 3, 5), draw(6, 3, 5)),
    packed_triangles.tril_position: lambda: (torch.tensor([1, 3]), torch.tensor([0, 2]), 4),
    packed_triangles.tril_positions: lambda: (4,),
    packed_triangles.tril_solve: lambda: (draw(4, 3, 5), draw(6, 3, 5), draw(4, 3, 5)),
    packed_triangles.unpack_tril: lambda: (draw(5, 3, 4), draw(5, 3, 6)),
    normal_cdf: lambda: (draw(5),),
    normal_log_cdf: lambda: (3 * draw(5),),
}
ELSEWHERE = {"BlockLayout", "Layout", "channels_first", "channels_last", "with_channels"}
ELSEWHERE |= {"constant", "negligible", "positive"}
ELSEWHERE |= {"single_at_least", "in_double", "as_before", "moderate"}  # of dtypes: there is nothing to differentiate

# Each with the channels of its factors, for D outputs.
WHITENINGS = {
    "diagonal": (DiagonalWhitening(), [D]),
    "isotropic": (DiagonalWhitening(), [1]),
    "full": (FullWhitening(), [D, D * (D - 1) // 2]),
    "low rank": (LowRankWhitening(), [D, D * R]),
    "raw diagonal": (RawDiagonalWhitening(1e-2), [D]),
    "raw isotropic": (RawDiagonalWhitening(1e-2), [1]),
    "raw full": (RawFullWhitening(1e-2), [D * (D + 1) // 2]),
    "raw low rank": (RawLowRankWhitening(1e-2), [D * (R + 1)]),
}
KERNELS = {name: (NormalKernel(whitening), widths) for name, (whitening, widths) in WHITENINGS.items()}
KERNELS |= {
    f"{name} student": (
        EllipticalKernel(whitening, RawStudentTRadial(1.0) if name.startswith("raw") else StudentTRadial(), 1),
        [*widths, 1],
    )
    for name, (whitening, widths) in WHITENINGS.items()
    if name in ("diagonal", "low rank", "raw full")  # both pull-backs of each are tested through the normal ones
}
KERNELS["raw full known student"] = (
    EllipticalKernel(RawFullWhitening(1e-2), KnownStudentTRadial(3.0), 0),
    [D * (D + 1) // 2],
)
KERNELS |= {
    f"{name} angle": (WrappedNormalKernel(whitening, 1, torch.tensor(3.0)), widths)
    for name, (whitening, widths) in WHITENINGS.items()
    if whitening.has_columns
}
KERNELS["raw von mises"] = (RawVonMisesKernel(1e-2), [D])
KERNELS["raw von mises, shared"] = (RawVonMisesKernel(1e-2), [1])
# Batch shapes of logits, locations, values and factors, and components of the factors.
SHAPES = {
    "alike": ((5,), (5,), (5,), (5,), K),
    "unbatched": ((), (), (), (), K),
    "tied": ((5,), (5,), (5,), (5,), 1),
    "homoscedastic": ((5,), (5,), (5,), (), K),
    "tied and homoscedastic": ((2, 3), (2, 3), (2, 3), (), 1),
    "many values": ((5,), (5,), (4, 5), (5,), K),
    "one mixture": ((), (), (4,), (), K),
    "locations alone": ((), (2, 3), (3,), (1, 1), K),
    "value alone": ((5,), (), (), (), K),
    "more factors": ((5,), (5,), (5,), (2, 1), K),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def arguments(name, shapes="alike", dtype=torch.float64):
    torch.manual_seed(0)
    logits, locs, value, factors, groups = SHAPES[shapes]
    tensors = [torch.randn(*logits, K), torch.randn(*locs, K, D), torch.randn(*value, D)]
    tensors += [torch.rand(*factors, groups, width) + 0.3 for width in KERNELS[name][1]]
    return [t.to(dtype).requires_grad_() for t in tensors]


def by_hand(name, *tensors, normalize=True):
    return mixture_density.mixture_log_density(KERNELS[name][0], *tensors, normalize=normalize)


def by_autograd(name, *tensors, normalize=True):
    return mixture_density.density_by_autograd(KERNELS[name][0], normalize, *tensors)


def test_every_kernel_is_covered():
    modules = channels, numerics, packed_triangles
    named = {name for module in modules for name in module.__all__}
    assert named - ELSEWHERE <= {f.__name__ for f in CALLS}


UNIVARIATE = {
    "cdf": (draw(5),),
    "log_cdf": (draw(5),),
    "log_density_by_level": (draw(5),),
    "log_mass": (draw(5), draw(5)),
    "log_prob": (draw(5),),
    "quantile": (draw(5) / 2,),
}


SLOW = ("student", "quantile")  # each step of its root finding has a quadrature, and all are in the graph


@pytest.mark.parametrize(
    ("law", "method"),
    [
        pytest.param(law, method, marks=pytest.mark.slow if (law, method) == SLOW else ())
        for law in ("normal", "student")
        for method in UNIVARIATE
    ],
)
def test_univariate_mixtures_compile_as_one_graph(law, method):
    logits, locs, scale = channels.normalize_logits(draw(5, 3)), draw(5, 3), draw(5, 3)

    def call(df, *points):
        mixture = UnivariateMixture(logits, locs, scale, StudentTLaw(df) if law == "student" else NORMAL)
        return getattr(mixture, method)(*points)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    df = 3 * draw(5, 3) + 1
    assert_close(compiled(df, *UNIVARIATE[method]), call(df, *UNIVARIATE[method]))


@pytest.mark.parametrize("kernel", CALLS, ids=lambda kernel: kernel.__name__)
def test_compiles_as_one_graph(kernel):
    torch.compiler.reset()
    compiled = torch.compile(kernel, backend="eager", fullgraph=True)
    drawn = CALLS[kernel]()
    assert_close(compiled(*drawn), kernel(*drawn))


def test_channels_first_and_last_are_views_and_inverses():
    tensor = torch.randn(2, 5, 3, 4)
    first = channels.channels_first(tensor, 2)
    assert first.shape == (4, 3, 2, 5)
    assert first.data_ptr() == tensor.data_ptr()
    assert torch.equal(channels.channels_last(first, 2), tensor)


def test_norms_of_what_is_not_finite():
    rows = torch.tensor([[3.0, 4.0], [math.inf, 1.0], [math.nan, 1.0], [3e30, 4e30], [0.0, 0.0]])
    assert_close(numerics.norm(rows), torch.tensor([5.0, math.inf, math.nan, 5e30, 0.0]), equal_nan=True)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_dependent_columns_of_a_low_rank_factor_cost_no_digits(size):
    torch.manual_seed(0)
    column, scale = torch.randn(50, 1, D), torch.rand(50, 1, D) + 0.5
    factor = size * torch.stack([column, column + 1e-3 * torch.randn(50, 1, D)], -1)
    value = (factor.squeeze(1) @ torch.randn(50, R, 1)).squeeze(-1) + torch.randn(50, D)
    single = [torch.zeros(50, 1), torch.zeros(50, 1, D), value, scale, factor.flatten(-2)]
    answers = []
    for tensors in (single, [t.double() for t in single]):
        tensors = [t.requires_grad_() for t in tensors]
        log_density = by_hand("low rank", *tensors)
        answers.append([log_density, *torch.autograd.grad(log_density.sum(), tensors[1:])])
    for got, expected in zip(*answers, strict=True):
        assert (got - expected).abs().max() < max(1e-5, 1e-6 * size) * expected.abs().max()


# Gradients by hand


@every_kernel
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_by_hand_are_those_of_autograd(name, shapes, normalize):
    tensors = arguments(name, shapes)
    results = []
    for function in (by_hand, by_autograd):
        density = function(name, *tensors, normalize=normalize)
        cotangent = torch.linspace(-1, 2, density.numel(), dtype=torch.float64).reshape(density.shape)
        results.append([density, *torch.autograd.grad(density, tensors, cotangent)])
    assert_close(*results, rtol=1e-10, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("shapes", ["alike", "tied", "many values"])
def test_second_derivatives(name, shapes):
    tensors = arguments(name, shapes)
    assert torch.autograd.gradcheck(lambda *t: by_hand(name, *t), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: by_hand(name, *t), tensors, fast_mode=True)


def of_channels(name, *tensors):
    kernel, widths = KERNELS[name]
    logits, locs, value, *factors = tensors
    parts = logits.T, *(t.permute(2, 1, 0).flatten(0, 1) for t in (locs, *factors))
    layout = Layout.of(
        logits.shape[-1], locs.shape[-1], [BlockLayout(width, logits.shape[-1], is_own=False) for width in widths]
    )
    return channel_log_density(kernel, layout, torch.cat(parts), value)


def under_vmap(name, *tensors):
    return torch.func.vmap(lambda *rows: by_hand(name, *rows))(*tensors)


def compiled_channels(name, *tensors):
    torch.compiler.reset()
    return torch.compile(of_channels, backend="eager", fullgraph=True)(name, *tensors)


PATHS = [(name, path) for name in KERNELS for path in (by_hand, by_autograd, under_vmap)]
PATHS += [(name, path) for name in KERNELS if name.startswith("raw") for path in (of_channels, compiled_channels)]


def with_shares_of_all_sizes(name):
    """Mixtures whose weights and distances leave shares from 1 down to 0, in single precision."""
    torch.manual_seed(0)
    n, k = 64, 20
    logits = torch.linspace(0, -140, k).expand(n, k)
    locs = torch.linspace(0, 16, k)[:, None] + 0.01 * torch.randn(n, k, D)
    factors = [0.3 + 0.3 * torch.rand(n, k, width) for width in KERNELS[name][1]]
    return [t.clone().requires_grad_() for t in (logits, locs, 20 * torch.rand(n, D), *factors)]


def has_subnormal(numbers):
    return bool(((numbers != 0) & (numbers.abs() < torch.finfo(torch.float32).tiny)).any())


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, path in PATHS if "student" not in name])
def test_no_gradient_is_a_subnormal_number(name, path):
    tensors = with_shares_of_all_sizes(name)
    gradients = torch.autograd.grad(path(name, *tensors).mean(), tensors)
    double = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(by_autograd(name, *double).mean(), double)
    assert all(has_subnormal(gradient) for i, gradient in enumerate(expected) if i != 2)  # the value has all shares
    for gradient, exact in zip(gradients, expected, strict=True):
        assert not has_subnormal(gradient)
        assert_close(gradient, exact.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("raw")])
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
@pytest.mark.parametrize("groups", [K, 1])
@pytest.mark.parametrize("shared", ["none", "last", "all", "all, of the batch"])
def test_channels_of_a_layer(name, batch, groups, shared):
    kernel, widths = KERNELS[name]
    torch.manual_seed(0)
    first = {"none": len(widths), "last": len(widths) - 1}.get(shared, 0)
    layout = Layout.of(K, D, [BlockLayout(width, groups, is_own=i >= first) for i, width in enumerate(widths)])
    own_batch = batch if "batch" in shared else ()
    shapes = [(sum(layout.sizes), *batch), (*batch, D), (groups * sum(widths[first:]), *own_batch)]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    tensors = tensors[:2] if shared == "none" else tensors

    def together(*tensors):
        return channel_log_density(kernel, layout, *tensors)

    def apart(drawn, value, *own):
        logits, locs, *raw = drawn.split([K, K * D, *(width * groups for width in widths[:first])])
        logits, locs = channels.channels_last(logits, 1), channels.channels_last(locs.reshape(D, K, *batch), 2)
        for tensor in own:
            tensor = tensor.reshape(*tensor.shape, *(1,) * (len(batch) + 1 - tensor.ndim)).expand(-1, *batch)
            raw += tensor.split([width * groups for width in widths[first:]])
        shaped = [part.reshape(width, groups, *batch) for part, width in zip(raw, widths, strict=True)]
        factors = [channels.channels_last(part, 2) for part in shaped]
        return mixture_density.mixture_log_density(kernel, logits, locs, value, *factors)

    results = [
        [density := f(*tensors), *torch.autograd.grad(density.square().sum(), tensors)] for f in (together, apart)
    ]
    assert_close(*results, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(together, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(together, tensors, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("raw")])
def test_strides_of_channels_do_not_matter(name):
    kernel, widths = KERNELS[name]
    torch.manual_seed(0)
    layout = Layout.of(K, D, [BlockLayout(width, K, is_own=False) for width in widths])
    drawn, value = torch.randn(3, 2, sum(layout.sizes)).double().movedim(-1, 0), torch.randn(3, 2, D).double()
    results = []
    for leaf in (drawn, drawn.contiguous()):
        density = channel_log_density(kernel, layout, leaf.requires_grad_(), value)
        results.append([density, *torch.autograd.grad(density.sum(), leaf)])
    assert_close(*results)


@every_kernel
def test_transforms_of_torch_func(name):
    tensors = [t.detach() for t in arguments(name)]

    def total(*tensors):
        return by_hand(name, *tensors).sum()

    every = tuple(range(len(tensors)))
    expected = torch.autograd.functional.hessian(total, tuple(tensors))
    assert_close(torch.func.hessian(total, every)(*tensors), expected)
    assert_close(torch.func.jacrev(torch.func.jacrev(total, every), every)(*tensors), expected)
    assert_close(torch.vmap(lambda *t: by_hand(name, *t))(*tensors), by_hand(name, *tensors))
    for i in every:  # batched in one argument alone
        in_dims = tuple(0 if j == i else None for j in every)
        given = [t if j == i else t[0] for j, t in enumerate(tensors)]
        mapped = torch.vmap(lambda *t: by_hand(name, *t), in_dims)(*given)
        assert_close(
            mapped,
            torch.stack([by_hand(name, *(t[n] if j == i else t[0] for j, t in enumerate(tensors))) for n in range(5)]),
        )
    tangents = tuple(torch.randn_like(t) for t in tensors)
    gradients = torch.func.grad(total, every)(*tensors)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert_close(torch.func.jvp(total, tuple(tensors), tangents)[1], along)


@every_kernel
def test_gradients_compile_as_one_graph(name):
    tensors = arguments(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: by_hand(name, *t), backend="aot_eager", fullgraph=True)
    results = [
        [density := f(*tensors), *torch.autograd.grad(density.sum(), tensors)]
        for f in (compiled, lambda *t: by_hand(name, *t))
    ]
    assert_close(*results)


@every_kernel
def test_strides_do_not_matter(name):
    tensors = arguments(name)
    strided = [
        channels.channels_last(channels.channels_first(t, n).contiguous(), n)
        for t, n in zip(tensors, (1, 2, 1, 2, 2, 2), strict=False)
    ]
    strided = [t.detach().requires_grad_() for t in strided]
    expanded = [t.detach()[:1].expand(5, *t.shape[1:]).requires_grad_() for t in tensors]
    assert_close(gradients(name, strided), gradients(name, tensors))
    assert_close(
        gradients(name, expanded), gradients(name, [t.detach().contiguous().requires_grad_() for t in expanded])
    )


def gradients(name, tensors):
    density = by_hand(name, *tensors)
    return [density, *torch.autograd.grad(density.sum(), tensors)]


@every_kernel
def test_nothing_that_is_given_or_kept_changes(name):
    tensors = arguments(name)
    before = [t.detach().clone() for t in tensors]
    density = by_hand(name, *tensors)
    first, second = (torch.autograd.grad(density.sum(), tensors, retain_graph=True) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert_close([t.detach() for t in tensors], before, rtol=0, atol=0)


def test_one_tensor_in_two_places():
    both = draw(5, K, D).requires_grad_()
    logits, value = draw(5, K), draw(5, D)

    def density(both):
        return mixture_density.mixture_log_density(NormalKernel(DiagonalWhitening()), logits, both, value, both)

    assert torch.autograd.gradcheck(density, both, fast_mode=True)
    assert torch.autograd.gradgradcheck(density, both, fast_mode=True)


def test_only_some_gradients_are_wanted():
    tensors = arguments("full")
    expected = torch.autograd.grad(by_hand("full", *tensors).sum(), tensors)
    for wanted in itertools.product([True, False], repeat=len(tensors)):
        if any(wanted):
            some = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            by_hand("full", *some).sum().backward()
            assert_close(
                [t.grad for t in some if t.requires_grad], [e for e, w in zip(expected, wanted, strict=True) if w]
            )


@every_kernel
def test_single_precision(name):
    double, single = arguments(name), arguments(name, dtype=torch.float32)
    assert_close(gradients(name, single), [t.float() for t in gradients(name, double)], rtol=2e-4, atol=2e-5)


@given(exponent=st.floats(-6, 6), ratio=st.floats(0, 6))
def test_low_rank_gradients_do_not_cancel(exponent, ratio):
    """However large the factor is against the diagonal: against dense matrices in float64."""
    torch.manual_seed(0)
    scale, factor = 10.0**exponent * draw(1, D), 10.0 ** (exponent + ratio) * torch.randn(1, D, R).double()
    residual = (factor @ torch.randn(R).double()) + scale * torch.randn(D).double()
    given = [torch.zeros(1).double(), residual, torch.zeros(D).double(), scale, factor.flatten(-2)]
    tensors = [t.requires_grad_() for t in given]
    density = by_hand("low rank", *tensors)
    _, grad_locs, _, grad_scale, _ = torch.autograd.grad(density, tensors)
    reference = [t.detach().requires_grad_() for t in (scale, factor, residual)]
    with torch.enable_grad():
        dense = torch.distributions.LowRankMultivariateNormal(
            torch.zeros(D).double(), reference[1], reference[0].square()
        )
        expected = dense.log_prob(reference[2]).squeeze()
    expected_scale, _, expected_residual = torch.autograd.grad(expected.sum(), reference)
    tolerance = 1e-12 * 10.0 ** (2 * ratio)  # of Woodbury's identity
    unit = 10.0**-exponent
    assert_close(density, expected, rtol=1e-9, atol=100 * tolerance)
    assert_close(-grad_locs, -expected_residual, rtol=1e-9, atol=100 * tolerance * unit)
    assert_close(grad_scale, expected_scale, rtol=1e-9, atol=100 * tolerance * unit)


def test_a_density_that_underflows_everywhere_is_minus_infinity():
    tensors = [torch.zeros(2), torch.zeros(2, 1), torch.full((1,), 1e25), torch.ones(2, 1)]
    assert mixture_density.mixture_log_density(NormalKernel(DiagonalWhitening()), *tensors).item() == -math.inf


def test_gradients_of_one_component_in_closed_form():
    """Against the score of a Gaussian: Σ⁻¹ (y − μ) with respect to μ."""
    _, locs, value, diagonal, lower = arguments("full")
    one = [torch.zeros(5, 1).double(), locs[:, :1], value, diagonal[:, :1], lower[:, :1]]
    (grad,) = torch.autograd.grad(by_hand("full", *one).sum(), locs)
    factor = packed_triangles.unpack_tril(diagonal, lower)[:, 0]
    residual = (value - locs[:, 0]).unsqueeze(-1)
    assert_close(grad[:, 0], (factor.mT @ factor @ residual).squeeze(-1))


@pytest.mark.parametrize("dim", range(1, 7))
@pytest.mark.parametrize("unit", [1.0, 1e-25, 1e25, 1e-21])
def test_logarithms_of_pairs_are_those_of_each(dim, unit):
    factors = (unit * draw(dim, 3, 1000)).float().requires_grad_()
    expected = factors.detach().double().log().sum(0)
    found = numerics.sum_logs(factors)
    assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), factors)
    assert_close(grad, 1 / factors.detach())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_logarithms_of_pairs_are_not_traced(unit):
    """What was in range when it was traced may not be later."""
    factors = draw(4, 3, 1000).float().detach()
    traced = torch.jit.trace(numerics.sum_logs, (factors,))
    assert_close(traced(unit * factors), (unit * factors).double().log().sum(0).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_densities_in_units_whose_square_is_out_of_range(unit):
    scale, value = torch.full((3000, 1, D), unit), unit * torch.randn(3000, D)  # enough for pairs of logarithms
    density = by_hand("diagonal", torch.zeros(1), torch.zeros(1, D), value, scale)
    expected = torch.distributions.Normal(0.0, scale.squeeze(1).double()).log_prob(value.double()).sum(-1)
    assert_close(density.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("raw", [-1e25, 1e25])
def test_densities_and_gradients_are_finite_whatever_the_channels(raw):
    names = "raw diagonal", "raw full", "raw low rank", "raw diagonal angle", "raw full angle", "raw von mises"
    for name in names:
        kernel, (width,) = KERNELS[name]
        drawn = torch.zeros(K * (1 + D + width), 1000)  # enough for pairs of logarithms
        drawn[K * (1 + D) : K * (1 + 2 * D)] = raw
        layout = Layout.of(K, D, [BlockLayout(width, K, is_own=False)])
        density = channel_log_density(kernel, layout, drawn.requires_grad_(), torch.ones(1000, D))
        (gradient,) = torch.autograd.grad(density.sum(), drawn)
        assert density.isfinite().all(), name
        assert gradient.isfinite().all(), name


def test_logits_of_less_precision():
    logits, locs, value, scale = (t.detach() for t in arguments("diagonal"))
    single = logits.float().requires_grad_()
    (grad,) = torch.autograd.grad(by_hand("diagonal", single, locs, value, scale).sum(), single)
    (expected,) = torch.autograd.grad(by_autograd("diagonal", single, locs, value, scale).sum(), single)
    assert_close(grad, expected)


def batched_gradients(density, tensors):
    """Derivatives of all rows at once, and one after the other."""
    cotangents = torch.eye(density.numel(), dtype=density.dtype).reshape(-1, *density.shape)
    apart = [torch.autograd.grad(density, tensors, c, retain_graph=True) for c in cotangents]
    together = torch.autograd.grad(density, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    return together, [torch.stack(rows) for rows in zip(*apart, strict=True)]


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, path in PATHS if path in (by_hand, of_channels)])
def test_batched_gradients(name, path):
    tensors = arguments(name)
    assert_close(*map(list, batched_gradients(path(name, *tensors), tensors)))
    given = tuple(t.detach() for t in tensors)
    for strategy in ("reverse-mode", "forward-mode"):
        jacobian = torch.autograd.functional.jacobian(
            lambda *t: path(name, *t), given, vectorize=True, strategy=strategy
        )
        assert_close(list(jacobian), batched_gradients(path(name, *tensors), tensors)[1])
    mixed = torch.autograd.functional.hessian(lambda *t: path(name, *t).sum(), given, vectorize=True)
    assert_close(mixed, torch.autograd.functional.hessian(lambda *t: path(name, *t).sum(), given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in KERNELS if name.endswith("angle")])
def test_angles_are_sums_over_images(name, dtype):
    """Of scales that are usual, wide and narrow, and of outputs far away, which move the nearest image."""
    kernel, plain = KERNELS[name][0], NormalKernel(KERNELS[name][0].whitening)
    period, images = kernel.period.double(), torch.arange(-60, 61).double()
    logits, locs, value, raw = (t.detach() for t in arguments(name))
    for change in (-1.0, 0.5, -8.0):
        raw = raw + change
        turned = value + torch.nn.functional.one_hot(torch.tensor(1), D) * (period * images).reshape(-1, 1, 1)
        tensors = [t.clone().requires_grad_() for t in (logits, locs, raw)]
        density = mixture_density.mixture_log_density(plain, *tensors[:2], turned, tensors[2])
        expected = density.logsumexp(0)
        given = [t.detach().to(dtype).requires_grad_() for t in tensors]
        got = mixture_density.mixture_log_density(kernel, *given[:2], value.to(dtype), given[2])
        kwargs = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-3}
        assert_close(got.double(), expected, **kwargs)
        for a, b in zip(
            torch.autograd.grad(got.sum(), given), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            assert_close(a.double(), b, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gross_outliers_do_not_decide_location_and_scale(dtype):
    """Each column: outliers on one side, on both, among NaN, a mode that is not rare, and two values."""
    torch.manual_seed(0)
    clean = torch.randn(1000, 5, dtype=torch.float64)
    clean[:150, 3] += 1e4
    clean[:, 4] = torch.arange(1000) < 30
    rows = clean.clone()
    rows[:10, 0] = 1e4
    rows[:10, 1] = 1e30 * clean[:10, 1]
    rows[:10, 2], rows[10:20, 2] = -1e4, math.nan
    near = numerics.winsorized(rows.to(dtype))
    assert near.dtype == dtype
    assert_close(near[20:], rows[20:].to(dtype), rtol=0, atol=0)
    assert_close(near[:, 3:], rows[:, 3:].to(dtype), rtol=0, atol=0)
    assert bool(near[10:20, 2].isnan().all())
    widths = clean.quantile(0.9, 0) - clean.quantile(0.1, 0)
    assert_close(near[:10, 0].double(), (10 * widths[0]).expand(10), rtol=0.05, atol=0.05)
    location, scale = numerics.location_and_scale(rows.to(dtype))
    assert bool((location[[0, 2]].abs() < 0.4).all())
    assert bool((scale[[0, 2]] < 3.0).all())
    assert_close(location[3:], clean[:, 3:].mean(0), rtol=1e-6, atol=1e-6)
    assert_close(scale[3:], clean[:, 3:].std(0, unbiased=False), rtol=1e-6, atol=1e-6)
    assert bool((((rows.to(dtype) - location) / scale).nan_to_num().to(dtype).square() < math.inf).all())


def test_rounding_is_no_distance_between_deciles():
    column = torch.full((1000, 1), 0.1, dtype=torch.float64)
    column[:500] = math.nextafter(0.1, 1.0)
    column[::50] = 1.0
    assert_close(numerics.winsorized(column), column, rtol=0, atol=0)
