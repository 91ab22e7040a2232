"""Copies of rows are held out together: early stopping is not judged by rows that are trained on."""

import pytest
import torch

from pyro_mdn import DeepEnsemble, MixtureDensityNetwork, Targets, fit
from pyro_mdn.networks.rows import Rows
from pyro_mdn.training.batches.copies import copies_of
from pyro_mdn.training.batches.preparation import prepare, prepare_members

N, TIMES = 60, 5


def distinct(n=N, seed=0):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :1].sin()


def copied(*tensors):
    return [torch.cat([t] * TIMES) for t in tensors]


def common(first, second):
    """Number of rows that both have."""
    return len({tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()})


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_have_no_copies_to_train_on(seed):
    torch.manual_seed(seed)
    x, y = copied(*distinct())
    batches, held_out = prepare(MixtureDensityNetwork(2, 1), x, y, None, 1 / 3, None)
    assert len(held_out) == len(x) // 3
    assert common(batches.rows.x, held_out.x) <= 1  # that the cut goes through


def test_held_out_rows_of_members_have_no_copies_to_train_on():
    torch.manual_seed(0)
    x, y = copied(*distinct())
    network = MixtureDensityNetwork(2, 1)
    batches, held_out = prepare_members(network, 4, x, y, None, 0.1, None)
    own = batches.head(len(x))
    assert all(common(own.x[m], held_out.x[m]) <= 1 for m in range(4))
    assert common(held_out.x[0], held_out.x[1]) < N // 5  # each member has others


KINDS = {
    "gaps": lambda y: torch.where(torch.arange(len(y))[:, None] % 3 == 0, torch.nan, y),
    "intervals": lambda y: Targets.censored(y, right=torch.arange(len(y))[:, None] % 3 == 0),
    "sequences": lambda y: y[:, None].expand(-1, 4, -1),
    "double": lambda y: y.double(),
    "half": lambda y: y.half(),
    "bfloat16": lambda y: y.bfloat16(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_targets_of_all_kinds_are_found(kind):
    x, y = distinct()
    x = x[:, None].expand(-1, 4, -1) if kind == "sequences" else x
    y, rows = KINDS[kind](y), torch.arange(N).repeat(TIMES)
    order = torch.randperm(N * TIMES, generator=torch.Generator().manual_seed(0))
    number = copies_of(Rows(x[rows][order].to(y.dtype), y[rows][order]))
    assert torch.equal(number[:, None] == number, rows[order][:, None] == rows[order])


NOT_COPIED = {
    "all different": distinct(N * TIMES),
    "categories": (torch.eye(4).repeat(N, 1), torch.arange(4.0).repeat(N)[:, None]),
    "few copies": [torch.cat([t, t[: N // 2]]) for t in distinct(N * TIMES)],
    "repeated measurements": (copied(distinct()[0])[0], torch.arange(float(N * TIMES))[:, None]),
    "repeated measurements of a yes or no": (copied(distinct()[0])[0], torch.arange(N * TIMES)[:, None] // N % 2.0),
}


@pytest.mark.parametrize("kind", NOT_COPIED)
def test_repeated_measurements_and_categories_are_no_copies(kind):
    x, y = NOT_COPIED[kind]
    assert copies_of(Rows(x, y)) is None


@pytest.mark.parametrize("members", [1, 3])
def test_copies_do_not_spoil_a_density(members):
    """A network that has learned a hundred rows by heart would give others up to thousands of nats."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1100, 2, generator=generator)
    y = x[:, :1].sin() + 0.3 * torch.randn(1100, 1, generator=generator)
    network = MixtureDensityNetwork(2, 1, seed=0)
    model = network if members == 1 else DeepEnsemble(network, members, seed=0)
    fit(model, *copied(x[:100], y[:100]), seed=0, max_epochs=200, progress=False)
    assert -model.predict(x[100:]).mixture.log_prob(y[100:]).mean() < 1.5
