"""Kernels compile as one graph, and give there what they give eagerly."""

import pytest
import torch
from torch.testing import assert_close

from pyro_mdn import kernels


def draw(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.2


CALLS = {
    "cat_channels": lambda: (draw(5, 3, 2), draw(5, 3, 4)),
    "location_and_scale": lambda: (draw(5, 3),),
    "low_rank_capacitance": lambda: (draw(5, 3, 4, 2),),
    "low_rank_project": lambda: (draw(5, 3, 4, 2), draw(5, 3, 4)),
    "mixture_cdf": lambda: (draw(5), draw(5, 3), draw(5, 3), draw(5, 3)),
    "mixture_log_density": lambda: (draw(5), draw(5, 3), draw(5, 3), draw(5, 3)),
    "mixture_quantile": lambda: (draw(5) / 2, kernels.normalize_logits(draw(5, 3)), draw(5, 3), draw(5, 3)),
    "normal_cdf": lambda: (draw(5),),
    "normal_log_density": lambda: (draw(5, 3, 4), draw(5, 3)),
    "normalize_logits": lambda: (draw(5, 3),),
    "sum_outputs": lambda: (draw(5, 3, 4),),
    "tril_matvec": lambda: (draw(5, 3, 10), draw(5, 3, 4)),
    "tril_solve": lambda: (draw(5, 3, 10), draw(5, 3, 4)),
}
NOT_ALONE = {"channels_first", "channels_last", "follow_root", "minimize_bracketed", "unpack_tril"}


def test_every_kernel_is_covered():
    assert set(CALLS) | NOT_ALONE == set(kernels.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name):
    kernel, arguments = getattr(kernels, name), CALLS[name]()
    torch.compiler.reset()
    compiled = torch.compile(kernel, backend="eager", fullgraph=True)
    assert_close(compiled(*arguments), kernel(*arguments))


def test_channels_first_and_last_are_views_and_inverses():
    tensor = torch.randn(2, 5, 3, 4)
    first = kernels.channels_first(tensor, 2)
    assert first.shape == (4, 3, 2, 5)
    assert first.data_ptr() == tensor.data_ptr()
    assert torch.equal(kernels.channels_last(first, 2), tensor)


def test_minimum_of_a_function_with_two_valleys():
    found = kernels.minimize_bracketed(
        lambda p: (p - 0.2) ** 2 * (p - 0.7) ** 2 - 0.01 * p, torch.zeros(3).double(), 1.0
    )
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    best = grid[((grid - 0.2) ** 2 * (grid - 0.7) ** 2 - 0.01 * grid).argmin()]
    assert_close(found, best.expand(3), rtol=0, atol=2e-5)
