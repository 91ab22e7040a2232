"""What fit can be fed: weights, missing targets, data sets, loaders."""

import copy
import logging
import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from torch.masked import masked_tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_mdn import DeepEnsemble, Diagonal, Full, MissingTargetsWarning, MixtureDensityNetwork, fit
from pyro_mdn.networks.rows import Rows
from pyro_mdn.scores import log_score
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.training.batches.in_memory import InMemory
from pyro_mdn.training.batches.preparation import prepare
from pyro_mdn.training.batches.streams import Streamed
from pyro_mdn.training.batches.target_grids import grid_spacing

QUICK = {"max_epochs": 3, "progress": False, "seed": 0}


def data(n=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    return x, x.square() + 0.1 * torch.randn(n, 2, generator=generator)


def network(**settings):
    torch.manual_seed(0)
    return MixtureDensityNetwork(2, 2, 3, 16, **settings)


def states_equal(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


class Pairs(Dataset):
    """Rows that are only ever fetched one by one."""

    def __init__(self, *tensors):
        self.tensors = list(tensors)

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return tuple(t[i] for t in self.tensors)


# Weights


def test_equal_weights_change_nothing():
    x, y = data()
    plain, weighted = network(), network()
    fit(plain, x, y, **QUICK)
    fit(weighted, x, y, sample_weight=torch.full((200,), 7.0), **QUICK)
    for a, b in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [np.int64, list, "pandas"])
def test_weights_may_be_counts(kind):
    x, y = data()
    counts = torch.arange(200) % 3
    a, b = network(), network()
    fit(a, x, y, sample_weight=counts.float(), **QUICK)
    weight = (
        pd.Series(counts.numpy()) if kind == "pandas" else np.int64(counts) if kind is np.int64 else counts.tolist()
    )
    fit(b, x, y, sample_weight=weight, **QUICK)
    assert states_equal(a, b)


def test_weights_choose_between_two_answers():
    """Two clusters of targets for the same x, three to one: the weights of the mixture are those of the rows."""
    x = torch.zeros(400, 1)
    y = torch.tensor([[-1.0], [1.0]]).repeat(200, 1) + 0.05 * torch.randn(400, 1)
    weight = torch.where(y.squeeze(-1) < 0, 3.0, 1.0)
    trained = MixtureDensityNetwork(1, 1, 2, 8)
    fit(trained, x, y, sample_weight=weight, max_epochs=60, seed=0, progress=False)
    assert_close(trained(x[:1]).cdf(torch.zeros(1, 1)).item(), 0.75, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"sample_weight: expected shape \(200,\), got \(3,\)"),
        (torch.ones(200, 1), r"sample_weight: expected shape \(200,\), got \(200, 1\)"),
        (-torch.ones(200), "sample_weight: expected finite numbers that are not negative"),
        (torch.zeros(200), "sample_weight: expected .* one positive at least"),
        (torch.full((200,), math.nan), "sample_weight: expected finite numbers"),
        (["a"] * 200, "sample_weight: expected numbers, got text"),
    ],
)
def test_bad_weights(weight, message):
    untouched = network()
    with pytest.raises(ValueError, match=message):
        fit(untouched, *data(), sample_weight=weight, **QUICK)
    assert states_equal(untouched, network())


# Missing targets


@pytest.mark.parametrize("noise", [Diagonal(), Full()])
def test_missing_targets_lose_little(noise):
    """30 % of the entries gone: within 0.1 nats of complete data. Dropping incomplete rows costs more."""
    x, y = data(600)
    held_x, held_y = (part[-300:] for part in data(900))
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    sparse = y.masked_fill(missing, math.nan)
    complete = ~missing.any(-1)
    losses = {}
    for name, (a, b) in {"all": (x, y), "sparse": (x, sparse), "dropped": (x[complete], y[complete])}.items():
        trained = network(noise=noise)
        fit(trained, a, b, max_epochs=60, few_rows=False, seed=0, progress=False)
        losses[name] = trained.loss(held_x, held_y).mean().item()
    assert losses["sparse"] < losses["all"] + 0.1
    assert losses["sparse"] < losses["dropped"]


def test_rows_that_say_nothing_are_left_out():
    """Of weight 0, or without a target: as if they were not there, whatever is in them."""
    x, y = data(60)
    absent, weightless, few = network(), network(), network()
    gaps, far = y.clone(), y.clone()
    gaps[1::2] = math.nan
    far[1::2] = 1e6
    fit(absent, x, gaps, **QUICK)
    fit(weightless, x, far, sample_weight=(torch.arange(60) + 1) % 2, **QUICK)
    fit(few, x[::2], y[::2], **QUICK)
    assert states_equal(absent, few)
    for a, b in zip(weightless.state_dict().values(), few.state_dict().values(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_start_takes_missing_entries_from_other_rows():
    _, y = data(500)
    y[:, 0] += 100
    whole, sparse = network(), network()
    gaps = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    whole.head.initialize_(y)
    sparse.head.initialize_(y.masked_fill(gaps, math.nan))
    assert_close(sparse.head.shift, whole.head.shift, rtol=0.01, atol=0.2)
    assert_close(sparse.head.scale, whole.head.scale, rtol=0.3, atol=0)
    assert sparse.head.linear.bias.isfinite().all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [(math.nan, r"y: expected an observed target in each column, got none in \[1\]"), (math.inf, "y: expected finite")],
)
def test_columns_of_nothing(entry, message):
    x, y = data()
    y[:, 1] = entry
    untouched = network()
    with pytest.raises(ValueError, match=message):
        fit(untouched, x, y, **QUICK)
    assert states_equal(untouched, network())


@pytest.mark.parametrize("kind", ["arrays", "loader", "ensemble"])
def test_entries_that_were_not_observed_are_counted(kind, caplog):
    """By output, rows without any included, those held out too."""
    x, y = data()
    y[:50, 0], y[40:60] = math.nan, math.nan
    model = DeepEnsemble(network(), 2) if kind == "ensemble" else network()
    with caplog.at_level(logging.INFO, logger="pyro_mdn"):
        result = fit(model, *((DataLoader(Pairs(x, y), 40),) if kind == "loader" else (x, y)), **QUICK)
    assert result.unobserved == [60, 20]
    assert caplog.text.count("fit: [60, 20] entries of y, by output, were not observed") == 1
    caplog.clear()
    assert fit(model, *data(), **QUICK).unobserved == [0, 0]
    assert "observed" not in caplog.text


@pytest.mark.parametrize("convert", [lambda y: y, lambda y: y.numpy(), lambda y: pd.DataFrame(y.numpy())])
@pytest.mark.parametrize("kind", ["arrays", "loader", "dataset", "ensemble", "one output", "sequences"])
def test_a_few_targets_that_are_nan_are_told_of(kind, convert):
    """As the logarithm of a negative number is, in one column or in the only one."""
    x, y = data()
    y = y.abs() + 0.1
    y[7, 1] = -1.0
    x, y, expected = x, y.log(), "1 of 200 in output 1"
    model = network()
    if kind == "ensemble":
        model = DeepEnsemble(model, 2)
    if kind == "one output":
        model, y, expected = MixtureDensityNetwork(2, 1, 2, 8), y[:, 1:], "1 of 200 in output 0"
    if kind == "sequences":
        x, y, seen = padded()
        y[:, 0], y[3, 0, 1] = y[:, 0].nan_to_num(nan=0.0), math.nan
        expected, convert = f"1 of {seen.sum()} in output 1", lambda y: y
    source = (x, convert(y))
    if kind in ("loader", "dataset"):
        source = (DataLoader(Pairs(x, y), 40) if kind == "loader" else Pairs(x, y),)
        expected = "1 of 1[0-9]+ in output 1" if kind == "dataset" else expected
    with pytest.warns(MissingTargetsWarning, match=f"fit: of y, {expected} are NaN and count as not observed") as told:
        fit(model, *source, **{**QUICK, "seed": 1})
    assert [warning.filename for warning in told] == [__file__]
    meant = "filter this warning" if kind in ("loader", "dataset") else "mask them by numpy.ma"
    assert str(told[0].message).endswith(f"; {meant} if that is meant")


def test_missing_targets_that_are_meant_are_not_told_of():
    """Many of them, masks, and padding: warnings are errors here."""
    x, y = data()
    many = y.index_fill(0, torch.arange(20), math.nan)
    fit(network(), x, many, **QUICK)
    few = np.ma.masked_array(y.numpy(), np.arange(400).reshape(200, 2) == 7)
    fit(network(), x, few, **QUICK)
    MDNRegressor(max_epochs=2).fit(x, few)
    steps = torch.randn(60, 8, 1)
    steps[:3, -2:] = math.nan
    fit(MixtureDensityNetwork(2, 1, 2, 8), torch.randn(60, 8, 2), steps, **QUICK)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_what_a_batch_masks_is_not_told_of():
    """A NaN in another batch is."""
    x, y = data()
    mask = torch.arange(400).reshape(200, 2) != 7
    hidden = (x, masked_tensor(torch.where(mask, y, 1e6), mask))
    result = fit(network(), DataLoader([hidden], batch_size=None), **QUICK)
    assert result.unobserved == [0, 1]
    fit(network(), DataLoader(Pairs(*hidden), batch_size=40), **QUICK)
    few = y.masked_fill(torch.arange(400).reshape(200, 2) == 8, math.nan)
    with pytest.warns(MissingTargetsWarning, match="of y, 1 of 400 in output 0 are NaN"):
        fit(network(), DataLoader([hidden, (x, few)], batch_size=None), **QUICK)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "numpy, row by row", "torch", "loader"])
def test_integers_count_as_numbers_and_masked_ones_as_missing(kind, masked):
    x, y = data()[0], torch.arange(400).reshape(200, 2)
    hidden = (y == 7) & masked
    array = np.ma.masked_array(y.numpy(), hidden.numpy())
    of_torch = masked_tensor(y, ~hidden) if masked else y
    source = {
        "numpy": (x, array),
        "numpy, row by row": (x, [*array] if masked else y.tolist()),
        "torch": (x, of_torch),
        "loader": (DataLoader([(x, of_torch)], batch_size=None),),
    }[kind]
    floats = y.double().masked_fill(hidden, math.nan)
    reference = (DataLoader([(x, floats)], batch_size=None),) if kind == "loader" else (x, floats)
    trained, expected = network(), network()
    assert fit(trained, *source, **QUICK).unobserved == [0, int(masked)]
    with pytest.warns(MissingTargetsWarning) if masked else nullcontext():
        fit(expected, *reference, **QUICK)
    assert states_equal(trained, expected)


# Sequences


def padded(n=60, steps=8):
    """Sequences of different lengths, with x = -999 and no target behind their ends, and what was observed as rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, steps, 2, generator=generator)
    y = x.square() + 0.1 * torch.randn(x.shape, generator=generator)
    seen = torch.arange(steps) < torch.randint(1, steps + 1, (n, 1), generator=generator)
    y[:, 0, 1] = math.nan  # the other output was observed
    return x.masked_fill(~seen.unsqueeze(-1), -999.0), y.masked_fill(~seen.unsqueeze(-1), math.nan), seen


def test_scalers_and_components_are_those_of_what_was_observed():
    x, y, seen = padded()
    sequences, rows = network(), network()
    for trained, part in ((sequences, (x, y)), (rows, (x[seen], y[seen]))):
        torch.manual_seed(0)
        trained.initialize_(*part)
    assert states_equal(sequences, rows)
    assert_close(sequences.x_shift, x[seen].mean(0))
    assert_close(sequences.x_scale, x[seen].std(0, correction=0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "loader", "ensemble", "ensemble, loader"])
def test_sequences_train_as_the_rows_that_were_observed(kind, weighted):
    """Decay, losses and what components explain: nothing of the padding is in them."""
    (x, y, seen), (held_x, held_y, held) = padded(), padded(20)
    weight = torch.rand(60) + 0.5 if weighted else None
    calm = {"input_noise": 0.0, "target_noise": 0.0, "max_epochs": 20, "seed": 0, "progress": False}
    start = network()
    start.initialize_(x[seen], y[seen])

    def trained(x, y, weight, validation):
        model = DeepEnsemble([start] * 2) if kind.startswith("ensemble") else copy.deepcopy(start)
        settings = {**calm, "initialize": False, "validation": validation}
        if x.ndim == 2 or not kind.endswith("loader"):
            return fit(model, x, y, sample_weight=weight, batch_size=1000, **settings)
        return fit(model, DataLoader([(x, y) if weight is None else (x, y, weight)], batch_size=None), **settings)

    sequences = trained(x, y, weight, (held_x, held_y))
    of_rows = None if weight is None else weight.unsqueeze(1).expand(seen.shape)[seen]
    rows = trained(x[seen], y[seen], of_rows, (held_x[held], held_y[held]))
    for name in ("loss", "validation_loss"):
        got, expected = ([row[name] for row in result.history] for result in (sequences, rows))
        assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert_close(sequences.component_weights, rows.component_weights, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["arrays", "loader", "ensemble", "padded by batch"])
def test_logged_losses_are_means_over_what_was_observed(kind):
    """Also where batches have different shares of it."""
    x, y, seen = padded()
    order = seen.sum(1).argsort()
    x, y, seen = x[order], y[order], seen[order]
    trained = network()
    trained.initialize_(x, y)
    expected = trained.loss(x, y)[seen].mean().item()
    still = {"lr": 1e-12, "weight_decay": 0.0, "input_noise": 0.0, "target_noise": 0.0, "initialize": False, **QUICK}
    source, settings = (x, y), {"batch_size": 7, "validation": 0.0}
    if kind == "loader":
        source, settings = (DataLoader(Pairs(x, y), 7),), {"validation": DataLoader(Pairs(x, y), 9)}
    if kind == "padded by batch":
        longest = [int(part.sum(1).max()) for part in seen.split(7)]
        parts = zip(x.split(7), y.split(7), longest, strict=True)
        source = (DataLoader([(a[:, :length], b[:, :length]) for a, b, length in parts], batch_size=None),)
        settings = {}
    model = DeepEnsemble([trained] * 2) if kind == "ensemble" else trained
    for row in fit(model, *source, **settings, **still).history:
        assert row["loss"] == pytest.approx(expected, abs=1e-4)
        assert settings.keys() != {"validation"} or row["validation_loss"] == pytest.approx(expected, abs=1e-4)


def test_what_a_row_weighs():
    """Losses of steps count one by one; those of whole sequences, as an ELBO has them, once each."""
    x, y, seen = padded()
    rows = Rows(x, y).informative()
    assert rows.row_weight(torch.zeros(2, 8)) == pytest.approx(seen.sum().item() / 60)
    assert rows.row_weight(torch.zeros(2)) == 1
    weighted = Rows(x, y, 1000 * torch.arange(60.0)).informative()
    assert len(weighted) == 59
    assert weighted.row_weight(torch.zeros(2, 8)) / weighted.row_weight(torch.zeros(2)) == pytest.approx(
        (seen.sum(1) * torch.arange(60)).sum().item() / torch.arange(60).sum().item()
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_padding_of_joined_sequences_does_not_count(weighted):
    """It weighs nothing, on either side and whether or not others have weights."""
    x, y = torch.randn(4, 7, 2), torch.randn(4, 7, 2)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]) if weighted else None
    short = Rows(x[:, :3], y[:, :3], weight)
    for parts, each in [((Rows(x, y), short), (7, 3)), ((short, Rows(x, y)), (3, 7))]:
        rows = Rows.joined(parts)
        of = [(weight if weighted and steps == 3 else torch.ones(4)) * steps for steps in each]
        total, sums = rows.totals(torch.ones(8, 7))
        assert_close((total, sums), (torch.cat(of).sum(),) * 2)
        assert rows.row_weight(torch.zeros(8, 7)) == pytest.approx(torch.cat(of).mean().item())
        assert rows.targets_per_row() == 5
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        Rows.joined([Rows(torch.ones(2, 3), torch.ones(2, 1)), Rows(torch.ones(2, 4), torch.ones(2, 1))])


def test_rows_of_refit_have_their_own_lengths():
    """The mean loss that is logged is over the steps of both parts."""
    generator = torch.Generator().manual_seed(0)
    x, held_x = torch.randn(20, 7, 1, generator=generator), torch.randn(20, 3, 1, generator=generator)
    trained = MixtureDensityNetwork(1, 1, 2, 8)
    trained.initialize_(x, x.sin())
    expected = torch.cat([trained.loss(v, v.sin()).flatten() for v in (x, held_x)]).mean().item()
    still = {"lr": 1e-12, "weight_decay": 0.0, "input_noise": 0.0, "target_noise": 0.0, "initialize": False, **QUICK}
    result = fit(trained, x, x.sin(), validation=(held_x, held_x.sin()), refit=True, **still)
    assert result.refit_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


class LogScore(torch.nn.Module):
    """Losses of NaN where nothing was observed."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return log_score(self.network(x), y)


def test_losses_of_padding_may_be_nan():
    """They count as little as finite ones do, also in the gradient."""
    x, y, seen = padded()
    losses = [torch.where(seen, x.sum(-1), value).requires_grad_() for value in (math.nan, 7.0)]
    for loss in losses:
        total, weight = Rows(x, y).informative().totals(loss)
        assert_close((total, weight), (x.sum(-1)[seen].sum(), seen.sum().float()))
        total.backward()
        assert_close(loss.grad, seen.float())
    a, b = network(), network()
    fit(a, x, y, objective=LogScore(a), target_noise=0.0, **QUICK)
    fit(b, x, y, target_noise=0.0, **QUICK)
    assert all(torch.isfinite(parameter).all() for parameter in a.parameters())
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4), (3, 4, 2), (3, 2, 2)])
def test_losses_count_by_what_was_observed_in_their_place(shape):
    """Of rows, entries or outputs: the same for rows that were chosen and rows that were not, as Lightning has them."""
    y = torch.randn(3, *shape[1:] or (2,))
    y.flatten(1)[0, 0] = math.nan
    rows = Rows(torch.randn(*y.shape[:-1], 5), y)
    for n in range(1, y.ndim + 1):
        seen = ~y.isnan().reshape(*y.shape[:n], -1).all(-1)
        for counted in (rows.masked(), rows.counted(), Rows.joined([rows.masked()[:1], rows[1:]])):
            assert_close(counted.totals(torch.ones(y.shape[:n])), (seen.sum().float(),) * 2)


# Data sets and loaders


def test_a_tensor_data_set_is_its_tensors():
    x, y = data()
    a, b = network(), network()
    weight = torch.rand(200)
    fit(a, x, y, sample_weight=weight, **QUICK)
    fit(b, TensorDataset(x, y, weight), **QUICK)
    assert states_equal(a, b)


@pytest.mark.parametrize("weighted", [False, True])
def test_data_sets_are_split_and_train(weighted):
    x, y = data()
    tensors = (x, y, torch.ones(200)) if weighted else (x, y)
    trained = network()
    before = trained.loss(x, y).mean()
    result = fit(trained, Pairs(*tensors), **{**QUICK, "max_epochs": 20})
    assert math.isfinite(result.best_loss)
    assert trained.loss(x, y).mean() < before - 0.5
    assert_close(trained.x_shift, x.mean(0), rtol=0, atol=0.1)


def test_a_loader_trains_with_validation_of_the_callers_own():
    x, y = data()
    trained = network()
    loader = DataLoader(Pairs(x[:150], y[:150]), batch_size=40, shuffle=True)
    result = fit(trained, loader, validation=DataLoader(Pairs(x[150:], y[150:]), batch_size=17), **QUICK)
    assert_close(trained.loss(x[150:], y[150:]).mean().item(), result.best_loss, rtol=1e-4, atol=1e-4)
    assert math.isnan(fit(network(), loader, **QUICK).best_loss) is False
    assert math.isnan(fit(network(), loader, **QUICK).history[0]["validation_loss"])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_resumes_bit_for_bit(tmp_path, own_generator, weighted):
    x, y = data()
    rows = (x, y, torch.rand(200)) if weighted else (x, y)

    def loader():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(Pairs(*rows), batch_size=40, shuffle=True, generator=generator)

    def stop(result):
        if len(result.history) == 2:
            raise RuntimeError

    whole, part, resumed = network(), network(), network()
    fit(whole, loader(), **QUICK)
    settings = {**QUICK, "checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(RuntimeError):
        fit(part, loader(), callbacks=[stop], **settings)
    fit(resumed, loader(), resume=True, **settings)
    assert states_equal(resumed, whole)


@pytest.mark.parametrize("place", ["sampler", "validation"])
def test_all_generators_of_loaders_resume(tmp_path, place):
    x, y = data()

    def loaders():
        generator = torch.Generator().manual_seed(5)
        if place == "validation":
            rest = DataLoader(Pairs(x[150:], y[150:]), batch_size=7, shuffle=True, generator=generator)
            return DataLoader(Pairs(x, y), batch_size=40), rest
        sampler = torch.utils.data.RandomSampler(range(200), generator=generator)
        return DataLoader(Pairs(x, y), batch_sampler=torch.utils.data.BatchSampler(sampler, 40, False)), 0

    def stop(result):
        if len(result.history) == 2:
            raise RuntimeError

    whole, part, resumed = network(), network(), network()
    (loader, validation), settings = loaders(), {"checkpoint": tmp_path / "run", "checkpoint_every": 1, **QUICK}
    expected = fit(whole, loader, validation=validation, **QUICK)
    for trained, further in [(part, {"callbacks": [stop]}), (resumed, {"resume": True})]:
        loader, validation = loaders()
        with nullcontext() if trained is resumed else pytest.raises(RuntimeError):
            result = fit(trained, loader, validation=validation, **further, **settings)
    assert states_equal(resumed, whole)
    assert [row["validation_loss"] for row in result.history] == pytest.approx(
        [row["validation_loss"] for row in expected.history], rel=0, abs=0, nan_ok=True
    )


class Finite(IterableDataset):
    def __len__(self):
        return 200

    def __iter__(self):
        yield from zip(*data(), strict=True)


class Whole(Pairs):
    """Data that come in batches of 40 by themselves."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return super().__getitem__(slice(40 * i, 40 * i + 40))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Finite(), batch_size=40),
        lambda: DataLoader(Whole(*data()), batch_size=None),
        lambda: DataLoader(Pairs(*data(250)), batch_sampler=torch.utils.data.BatchSampler(range(200), 40, False)),
    ],
)
def test_rows_of_other_loaders_are_counted(loader):
    assert Streamed(network(), loader()).num_rows == 200
    assert len(fit(network(), loader(), **QUICK).history) == 3


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("ensemble", [False, True])
def test_loaders_of_flat_targets(ensemble, grid):
    """Those of a single output may lack its axis, as arrays may."""
    x, y = data()
    y = y[:, :1].mul(3).round().div(3) if grid else y[:, :1]

    def trained(y):
        network = MixtureDensityNetwork(2, 1, 2, 8)
        network = DeepEnsemble(network, 2) if ensemble else network
        loaders = (DataLoader(Pairs(x[rows], y[rows]), batch_size=40) for rows in (slice(150), slice(150, 200)))
        torch.manual_seed(0)
        return fit(network, next(loaders), validation=next(loaders), **QUICK), network

    (flat, a), (result, b) = trained(y[:, 0]), trained(y)
    assert flat.best_loss == result.best_loss
    assert states_equal(a, b)


@pytest.mark.parametrize("unit", [1e-300, 1e300])
def test_weights_are_ratios(unit):
    x, y = data()
    weight = torch.rand(200, dtype=torch.float64)
    a, b = network(), network()
    fit(a, x, y, sample_weight=weight * unit, **QUICK)
    fit(b, x, y, sample_weight=weight, **QUICK)
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_weights_of_loaders_are_ratios(kind, ensemble):
    x, y = data()
    weight = torch.rand(200)

    def trained(unit):
        torch.manual_seed(0)
        trained = DeepEnsemble(network(), 2) if ensemble else network()
        source = Pairs(x, y, unit * weight)
        return trained, fit(trained, DataLoader(source, batch_size=40) if kind == "loader" else source, **QUICK)

    (plain, expected), (scaled, result) = trained(1.0), trained(1024.0)
    assert states_equal(scaled, plain)
    assert repr(result.history) == repr(expected.history)


def test_weights_of_loaders_are_those_of_arrays():
    x, y = data()
    weight = torch.rand(200)
    weight[::3] = 0.0
    y[::3] = 1e6  # as if it were not there
    settings = {"input_noise": 0.0, "target_noise": 0.0, "initialize": False, **QUICK, "max_epochs": 10}
    a, b = network(), network()
    settings |= {"validation": 0, "weight_decay": 0.1}
    expected = fit(a, x, y, sample_weight=weight, batch_size=200, **settings)
    result = fit(b, DataLoader(Pairs(x, y, 1000 * weight), batch_size=200), **settings)
    got, losses = ([row["loss"] for row in r.history] for r in (result, expected))
    assert_close(got, losses, rtol=1e-4, atol=1e-4)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(2), torch.zeros(2)


X, Y = data(20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: fit(n, Pairs(X, Y), Y), "y, sample_weight: expected None beside a data set"),
        (lambda n: fit(n, TensorDataset(X)), "x: expected a data set of x, y and perhaps weight"),
        (lambda n: fit(n, TensorDataset(X, Y), Y), "x: expected a data set of x, y and perhaps weight"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y)), validation=0.1), "validation: expected a pair"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y)), batch_size=3), "batch_size: expected None beside a loader"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y)), refit=True), "refit: expected one network"),
        (lambda n: fit(n, DataLoader(Endless())), "x: expected a loader of known length"),
        (lambda n: fit(n, DataLoader(Pairs(X))), r"x: expected batches \(x, y\)"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y, X))), "x: expected batches of equally many rows"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y * math.inf))), "y: expected finite"),
        (lambda n: fit(n, DataLoader(Pairs(X * 1j, Y))), "x: expected numbers, got complex numbers"),
        (lambda n: fit(n, X, Y, validation=0, refit=True), "refit: expected one network, and arrays"),
        (lambda n: fit(n, Endless()), "x: expected a data set of known length"),
        (lambda n: fit(n, Finite()), "x: expected a loader over Finite"),
        (lambda n: fit(n, DataLoader(Pairs(X, Y, -torch.ones(20)))), "weight: expected finite numbers"),
        (lambda n: fit(n, X, Y, validation=DataLoader(Pairs(X, Y[:, :1]))), "y: expected shape"),
        (lambda n: fit(n, X, Y, sample_weight=torch.zeros(20)), "sample_weight: expected .* one positive at least"),
        (lambda n: fit(n, X), "y: expected targets beside x, got none"),
    ],
)
def test_bad_sources_are_refused(call, message):
    untouched = network()
    before = copy.deepcopy(untouched)
    with pytest.raises(ValueError, match=message):
        call(untouched)
    assert states_equal(untouched, before)


# Batches


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (10, 10), (10, 100), (7, 1), (257, 256)])
def test_batches_are_a_partition_of_nearly_equal_parts(rows, size):
    x = torch.arange(float(rows)).unsqueeze(-1)
    batches = InMemory(Rows(x, x, x.squeeze(-1)), size)
    parts = list(batches)
    assert len(parts) == len(batches) == math.ceil(rows / size)
    assert {len(part) for part in parts} <= {rows // len(parts), rows // len(parts) + 1}
    assert sorted(torch.cat([part.x for part in parts]).flatten().tolist()) == list(range(rows))
    assert all(torch.equal(part.x, part.y) and torch.equal(part.x[:, 0], part.weight) for part in parts)


def test_held_out_rows_are_not_trained_on():
    x, y = data(100)
    batches, held_out = prepare(network(), x, y, None, 0.25, None)
    rows = torch.cat([batches.rows.x, held_out.x])
    assert len(held_out) == 25
    assert len(rows.unique(dim=0)) == 100


def test_streams_give_the_rows_of_their_first_batches():
    x, y = data(100)
    stream = Streamed(network(), DataLoader(Pairs(x, y), batch_size=30))
    assert torch.equal(stream.head(31).x, x[:60])
    assert torch.equal(stream.head(1000).y, y)
    assert stream.num_rows == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grids_are_found_beneath_rounding(dtype):
    k = torch.arange(1000) % 10
    y = torch.where(torch.arange(1000) % 3 == 0, 0.1 * k.to(dtype), k.to(dtype) / 10)
    assert len(y.unique()) > 10
    assert_close(grid_spacing(y[:, None]), torch.tensor([0.1], dtype=dtype))


@pytest.mark.parametrize("ensemble", [False, True])
def test_rows_of_loaders_without_a_target_are_left_out(ensemble):
    x, y = data()
    riddled = y.index_fill(0, torch.arange(40, 100), math.nan)
    seen = ~riddled.isnan().all(1)

    def trained(x, y):
        torch.manual_seed(0)
        trained = DeepEnsemble(network(), 2) if ensemble else network()
        return fit(trained, DataLoader(Pairs(x, y), batch_size=40), **QUICK), trained

    result, _ = trained(x, riddled)
    assert all(math.isfinite(row["loss"]) for row in result.history)
    batches = list(Streamed(network(), DataLoader(Pairs(x, riddled), batch_size=40)))
    assert [len(batch) for batch in batches] == [40, 20, 40, 40]
    assert_close(torch.cat([batch.x for batch in batches]), x[seen])


def test_nothing_observed_has_gradients_of_zero():
    trained, x = network(), data()[0]
    trained.loss(x, torch.full((200, 2), math.nan)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in trained.parameters())


def test_bootstrap_needs_arrays():
    with pytest.raises(ValueError, match="x: expected arrays for an ensemble with bootstrap"):
        fit(DeepEnsemble(network(), 2, bootstrap=True), DataLoader(Pairs(*data()), batch_size=40), **QUICK)


def test_grids_of_targets_are_found():
    y = torch.stack([torch.arange(60.0) % 6, torch.arange(60.0), (torch.arange(60.0) % 4) * 0.25, torch.ones(60)], -1)
    y[::7, 0] = math.nan
    assert grid_spacing(y).tolist() == [1.0, 0.0, 0.25, 0.0]
    rare = torch.zeros(300, 2)
    rare[0] = 100.0
    rare[::2, 1] = 1.0
    rare[1, 1] = 1e-6
    assert grid_spacing(rare).tolist() == [0.0, 1.0]


def test_gross_outliers_make_no_grid_of_other_targets():
    torch.manual_seed(0)
    y = torch.stack([torch.randn(500), torch.arange(500.0) % 7], 1)
    y[:10] = 1e8
    assert grid_spacing(y).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("reverse", [lambda t: t.numpy()[::-1], lambda t: pd.DataFrame(t.numpy())[::-1]])
def test_arrays_of_any_strides(reverse):
    x, y = data(50)
    a, b = network(), network()
    fit(a, x.flip(0), y.flip(0), **QUICK)
    fit(b, reverse(x), reverse(y), **QUICK)
    assert states_equal(a, b)


def test_a_loader_counts_the_rows_that_it_visits():
    sampler = torch.utils.data.SubsetRandomSampler(range(40))
    assert Streamed(network(), DataLoader(Pairs(*data(200)), batch_size=10, sampler=sampler)).num_rows == 40


class Counted(Dataset):
    """Data set that counts the rows that are read."""

    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i], self.y[i]


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_first_rows_of_a_loader_are_read_once(size, shuffle):
    """For scalers, start, mean weight, the test of the objective, and the shares of components at the end."""
    x = torch.randn(300, 2)
    rows = Counted(x, x[:, :1].sin())
    network = MixtureDensityNetwork(2, 1, 2, 8)
    trained = network if size is None else DeepEnsemble(network, size)
    loader = DataLoader(rows, batch_size=50, shuffle=shuffle)
    fit(trained, loader, max_epochs=2, rows_to_start=100, progress=False)
    assert rows.reads == 100 + 2 * 300


@pytest.mark.parametrize("generator", [None, 5])
def test_resume_from_a_shuffled_loader_reads_the_same_rows(tmp_path, generator):
    """Bit for bit, whether the loader draws its order from torch's generator or from its own."""
    x = torch.randn(90, 1)
    settings = {"max_epochs": 4, "checkpoint_every": 1, "seed": 0, "progress": False}

    def loader():
        own = None if generator is None else torch.Generator().manual_seed(generator)
        return DataLoader(TensorDataset(x, x**2), batch_size=32, shuffle=True, generator=own)

    def stop(result):
        if len(result.history) == 2:
            raise KeyError

    whole, part, resumed = (MixtureDensityNetwork(1, 1, 2, 8, seed=0) for _ in range(3))
    expected = fit(whole, loader(), **settings)
    with pytest.raises(KeyError):
        fit(part, loader(), checkpoint=tmp_path / "run", callbacks=[stop], **settings)
    result = fit(resumed, loader(), checkpoint=tmp_path / "run", resume=True, **settings)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in expected.history]
    assert result.component_weights == expected.component_weights
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [None, 2])
def test_weights_of_held_out_rows(size):
    """The held-out loss is the weighted mean; a row of weight 0 is left out; only ratios matter."""
    x, held_x = torch.randn(60, 1), torch.randn(20, 1)
    y, held_y = x.sin(), held_x.sin() + 0.3 * torch.randn(20, 1)
    weight = torch.rand(20) * (torch.arange(20) > 5)
    networks = [MixtureDensityNetwork(1, 1, 2, 8, seed=0) for _ in range(2)]
    trained, other = (n if size is None else DeepEnsemble(n, size, seed=0) for n in networks)
    settings = {"max_epochs": 3, "seed": 0, "progress": False, "target_noise": 0.0}
    result = fit(trained, x, y, validation=(held_x, held_y, weight), **settings)
    fit(other, x, y, validation=[held_x.numpy(), held_y.numpy(), 7 * weight.numpy()], **settings)
    if size is None:
        losses = trained.loss(held_x, held_y)
        assert_close(result.best_loss, ((weight * losses).sum() / weight.sum()).item(), rtol=1e-4, atol=1e-5)
    else:
        losses = trained.loss(held_x.expand(size, -1, -1), held_y.expand(size, -1, -1))
        expected = (weight * losses).sum(1) / weight.sum()
        assert_close(torch.tensor([m.best_loss for m in result.members]), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(trained.state_dict().values(), other.state_dict().values(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (torch.zeros(400, 3), r"validation: expected .*, got Tensor torch\.float32 \(400, 3\)"),
        (np.zeros((400, 3)), r"validation: expected .*, got ndarray float64 \(400, 3\)"),
        (tuple(torch.zeros(4, 50)), "validation: expected .*, got tuple of 4"),
        ("a tenth", "validation: expected .*, got 'a tenth'"),
        (
            (torch.zeros(5, 1), torch.zeros(5, 1), torch.zeros(4)),
            r"validation weight: expected shape \(5,\), got \(4,\)",
        ),
        (
            (torch.zeros(5, 1), torch.zeros(5, 1), -torch.ones(5)),
            "validation weight: expected finite numbers that are not",
        ),
    ],
)
def test_a_wrong_validation_is_named_and_not_printed(validation, message):
    x = torch.randn(30, 1)
    with pytest.raises(ValueError, match=message) as caught:
        fit(MixtureDensityNetwork(1, 1), x, x, validation=validation)
    assert len(str(caught.value)) < 200
