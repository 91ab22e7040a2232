"""Packed triangles against dense ones."""

import pytest
import torch
from torch.testing import assert_close

from pyro_mdn.tensors import packed_triangles

every_dim = pytest.mark.parametrize("dim", [1, 2, 3, 6])


def packed(dim, *batch):
    """Dense triangle ``(*batch, D, D)``; its diagonal and the rest, channel-first."""
    torch.manual_seed(0)
    dense = torch.randn(*batch, dim, dim, dtype=torch.float64).tril()
    return dense, *(part.movedim(-1, 0) for part in packed_triangles.pack_tril(dense))


def test_order():
    dense = torch.tensor([[11.0, 0, 0], [21, 22, 0], [31, 32, 33]])
    diagonal, lower = packed_triangles.pack_tril(dense)
    assert diagonal.tolist() == [11, 22, 33]
    assert lower.tolist() == [21, 32, 31]
    assert [lower[packed_triangles.tril_position(i, j, 3)].item() for i, j in ((1, 0), (2, 0), (2, 1))] == [21, 31, 32]


@every_dim
def test_unpacking_undoes_packing(dim):
    dense = packed(dim, 2, 5)[0]
    assert torch.equal(
        packed_triangles.unpack_tril(*packed_triangles.pack_tril(dense + torch.ones(dim, dim).triu(1))), dense
    )


@every_dim
@pytest.mark.parametrize("by", ["bands", "square"])
def test_products_and_their_inverse(dim, by, monkeypatch):
    monkeypatch.setattr(packed_triangles, "_is_launched", lambda vector: by == "square")
    dense, diagonal, lower = packed(dim, 2, 5)
    vector = torch.randn(2, 5, dim, dtype=torch.float64)
    first = vector.movedim(-1, 0)
    expected = (dense @ vector.unsqueeze(-1)).squeeze(-1)
    assert_close(packed_triangles.tril_matvec(diagonal, lower, first).movedim(0, -1), expected)
    solution = packed_triangles.tril_solve(diagonal, lower, first).movedim(0, -1)
    assert_close(solution, torch.linalg.solve_triangular(dense, vector.unsqueeze(-1), upper=False).squeeze(-1))
    above = dense.tril(-1).mT
    total = torch.randn(dim, 2, 5, dtype=torch.float64)
    expected_total = total + (above @ vector.unsqueeze(-1)).squeeze(-1).movedim(-1, 0)
    assert_close(packed_triangles.tril_add_transposed_(total, lower, first), expected_total)
    outer = packed_triangles.pack_tril(vector.unsqueeze(-1) * solution.unsqueeze(-2))[1]
    assert_close(packed_triangles.tril_outer(first, solution.movedim(-1, 0), 0 * lower).movedim(0, -1), outer)
    monkeypatch.undo()
    # What is mapped alone cannot be added to in place.
    mapped = torch.vmap(packed_triangles.tril_matvec, (None, 0, None))(diagonal, torch.stack([lower, 0 * lower]), first)
    assert_close(mapped.movedim(1, -1), torch.stack([expected, dense.diagonal(dim1=-2, dim2=-1) * vector]))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_squares(tied, monkeypatch):
    """One triangle for all components."""
    _, diagonal, lower = packed(4, 1 if tied else 3, 5)
    vector = torch.randn(4, 3, 5, dtype=torch.float64)
    products = []
    for by in ("bands", "square"):
        monkeypatch.setattr(packed_triangles, "_is_launched", lambda vector, by=by: by == "square")
        total = vector.clone()
        products.append([packed_triangles.tril_matvec(diagonal, lower, vector), total])
        packed_triangles.tril_add_transposed_(total, lower, vector)
    assert_close(products[0], products[1])


@every_dim
def test_blocks(dim):
    dense, _, lower = packed(dim, 5)
    for start in range(dim):
        for stop in range(start + 1, dim + 1):
            expected = packed_triangles.pack_tril(dense[:, start:stop, start:stop])[1]
            assert torch.equal(packed_triangles.tril_block(lower, dim, start, stop).movedim(0, -1), expected)
        if start:
            vector = torch.randn(5, start, dtype=torch.float64)
            below = packed_triangles.tril_below(lower, dim, vector.movedim(-1, 0)).movedim(0, -1)
            assert_close(below, (dense[:, start:, :start] @ vector.unsqueeze(-1)).squeeze(-1))
