"""What belongs to the whole process is as it was, whoever else uses it."""

import contextlib
import functools
import itertools
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.runtime import am_i_wrapped
from torch.distributions import Distribution
from torch.testing import assert_close

from pyro_mdn import (
    DeepEnsemble,
    MixtureDensityNetwork,
    bayesianize,
    fit,
    fit_mcmc,
    laplace,
    posterior_predictive,
    starting_weights,
)
from pyro_mdn.support.process_state import (
    give_way,
    has_process,
    isolated,
    num_waiting,
    own_store,
    released,
    seeded,
    unvalidated,
)
from pyro_mdn.training.loop import copied

LATENT = ("head.linear.weight", "head.linear.bias")


def posterior_of(kind, network):
    if kind == "guide":
        return AutoNormal(network.model)
    trace = poutine.trace(network.model).get_trace(torch.zeros(1, 2))
    return {name: trace.nodes[name]["value"].expand(4, *trace.nodes[name]["value"].shape) for name in LATENT}


@pytest.mark.parametrize("kind", ["guide", "samples"])
def test_predictions_within_a_model_add_no_sites_to_it(kind):
    network = bayesianize(MixtureDensityNetwork(2, 1, 2, 8), layers="head")
    posterior, x = posterior_of(kind, network), torch.randn(5, 2)

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        mixture = posterior_predictive(network, posterior, x, 4).pool(0).affine(shift)
        with pyro.plate("rows", 5):
            pyro.sample("y", mixture)

    trace = poutine.trace(model).get_trace()
    assert set(trace.nodes) == {"_INPUT", "shift", "rows", "y", "_RETURN"}


def test_threads_take_turns():
    """Each has its own seed, parameter store and validation, as if it ran alone."""
    x = torch.linspace(-1, 1, 40).unsqueeze(-1)

    def trained(seed):
        network = bayesianize(networks[seed], layers="head")
        guide = AutoNormal(network.model)
        fit(network, x, x**2, guide=guide, max_epochs=2, seed=seed)
        return posterior_predictive(network, guide, x, 3).batch_shape, network.backbone[0].weight.detach()

    def fresh():
        torch.manual_seed(0)
        return [MixtureDensityNetwork(1, 1, 2, 8) for _ in range(4)]

    pyro.param("mine", torch.ones(2))
    validates = Distribution._validate_args
    networks = fresh()
    alone = [trained(seed) for seed in range(4)]
    networks = fresh()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(trained, range(4)))
    assert_close(together, alone, rtol=0, atol=0)
    assert Distribution._validate_args == validates
    assert list(pyro.get_param_store()) == ["mine"]


class Watched(torch.nn.Module):
    """Identity that tells each training step to a function."""

    def __init__(self, tell, always=False):
        super().__init__()
        self.always = always
        self.tell = [tell]  # functions of lists are not compared

    def forward(self, x):
        if self.training or self.always:
            self.tell[0]()
        return x


def watched(tell, seed=0):
    backbone = torch.nn.Sequential(torch.nn.Linear(1, 8), Watched(tell))
    torch.manual_seed(seed)
    backbone[0].reset_parameters()
    return MixtureDensityNetwork(1, 1, 2, 8, backbone=backbone, seed=seed)


LINE = torch.linspace(-1, 1, 300).unsqueeze(-1)
STEPS = {"max_epochs": 1, "batch_size": 1, "validation": 0, "target_noise": 0.0, "progress": False, "seed": 0}


def test_others_have_their_turn_between_the_steps_of_a_training():
    """They find the process as the caller left it, may change it, and the training is none the worse."""
    alone = watched(lambda: None)
    fit(alone, LINE, LINE**2, **STEPS)
    started, done, seen, turns = threading.Event(), threading.Event(), [], []

    def step():
        started.set()
        seen.append(done.is_set())
        time.sleep(0.001)

    def other():
        started.wait(10)
        for _ in range(3):
            with own_store():
                turns.append((torch.get_rng_state(), Distribution._validate_args, am_i_wrapped(), len(seen)))
                torch.rand(5)
        done.set()

    trained = watched(step)
    torch.manual_seed(3)
    before, validates = torch.get_rng_state(), Distribution._validate_args
    thread = threading.Thread(target=other)
    thread.start()
    fit(trained, LINE, LINE**2, **STEPS)
    thread.join(10)
    assert seen[-1], "the other thread had to wait for the end"
    assert torch.equal(turns[0][0], before)
    assert all(turn[1] == validates and not turn[2] for turn in turns)
    assert_close(trained.state_dict(), alone.state_dict(), rtol=0, atol=0)
    after = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(15)
    assert torch.equal(torch.rand(4), after)


def alone_or_with_others(use, tell, before):
    """What a long computation gives, as tensors; others begin once the call does."""
    layers = torch.nn.Sequential(torch.nn.Linear(1, 8, dtype=torch.float64), Watched(tell, always=True))
    torch.manual_seed(0)
    layers[0].reset_parameters()
    network = MixtureDensityNetwork(1, 1, 2, 8, backbone=layers, seed=0).double()
    network.initialize_(x := LINE.double(), x**2)
    if use == "ensemble":
        ensemble = DeepEnsemble([network] * 3).eval()
        before()
        with torch.no_grad():
            return ensemble.members(x).locs
    positive = dist.LogNormal(torch.tensor(0.0).double(), 1.0)
    priors = {"model": lambda _, value: positive.expand(value.shape).to_event(value.ndim)}
    bayesianize(network, layers="backbone", prior=priors.get(use))
    if use == "laplace":
        before()
        part = x[::3]
        return laplace(network, part, part**2, max_iter=5, progress=False).scale_tril
    if use in ("mcmc", "model"):
        quick = {"num_samples": 4, "warmup_steps": 4, "num_chains": 2, "max_tree_depth": 3, "seed": 0}
        before()
        return dict(fit_mcmc(network, x[:30], x[:30] ** 2, progress=False, **quick).samples)
    weights = starting_weights(network)
    draws = {
        name: value + torch.arange(4.0).double().reshape(-1, *(1,) * value.ndim) for name, value in weights.items()
    }
    before()
    return posterior_predictive(network, draws, x).locs


@pytest.mark.filterwarnings("ignore::pyro_mdn.ConvergenceWarning")
@pytest.mark.parametrize("use", ["laplace", "mcmc", "model", "draws", "ensemble"])
def test_others_have_their_turn_during_long_computations(use, monkeypatch):
    """As during a training: they find the process as the caller left it, and the results are the same."""
    monkeypatch.setattr("pyro_mdn.networks.batched.passes.BYTES", 5000.0)
    alone = alone_or_with_others(use, lambda: None, lambda: None)
    ready, started, done, seen, turns = threading.Event(), threading.Event(), threading.Event(), [], []

    def step():
        if ready.is_set():
            seen.append(done.is_set())
            if len(seen) == 8:  # within the longest part
                started.set()
            time.sleep(0.002)

    def other():
        started.wait(10)
        for _ in range(3):
            with own_store():
                turns.append((Distribution._validate_args, am_i_wrapped(), [*pyro.get_param_store()]))
                torch.rand(5)
        done.set()

    pyro.param("mine", torch.ones(2))
    validates, thread = Distribution._validate_args, threading.Thread(target=other)
    thread.start()
    together = alone_or_with_others(use, step, ready.set)
    thread.join(10)
    assert seen[-1], "the other thread had to wait for the end"
    assert turns == [(validates, False, [])] * 3
    assert_close(together, alone, rtol=0, atol=0)


def test_trainings_in_threads_alternate():
    """Neither waits for the other's end, and each gives what it gives alone, down to its draws of latent weights."""
    order = []

    def fresh():
        return [bayesianize(watched(functools.partial(order.append, seed), seed), layers="head") for seed in range(2)]

    def trained(seed):
        network = networks[seed]
        guide = AutoNormal(network.model)
        fit(network, LINE, LINE**2, guide=guide, **{**STEPS, "seed": seed, "batch_size": 5})
        return copied(guide.state_dict())

    networks = fresh()
    alone = [trained(seed) for seed in range(2)]
    order.clear()
    networks = fresh()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(trained, range(2)))
    assert_close(together, alone, rtol=0, atol=0)
    assert sum(a != b for a, b in itertools.pairwise(order)) > 1
    assert not len(pyro.get_param_store()) or "mine" in pyro.get_param_store()


def test_callbacks_have_the_process_as_the_caller_left_it():
    """They may wait for other threads that need it, and draw: the run is the same, the caller's generator moves on."""
    latent = bayesianize(MixtureDensityNetwork(1, 1), layers="head")
    shown, states, draws = [], [], []

    def callback(result):
        states.append((Distribution._validate_args, [*pyro.get_param_store()]))
        thread = threading.Thread(target=lambda: shown.append(repr(latent)), daemon=True)
        thread.start()
        thread.join(10)
        draws.append(torch.rand(3))

    quick = {"max_epochs": 3, "few_rows": False, "seed": 0, "progress": False}
    alone, trained = (MixtureDensityNetwork(1, 1, 2, 8, seed=0) for _ in range(2))
    fit(alone, LINE, LINE**2, **quick)
    state = Distribution._validate_args, [*pyro.get_param_store()]
    torch.manual_seed(5)
    fit(trained, LINE, LINE**2, callbacks=[callback], **quick)
    after = torch.rand(3)
    assert len(shown) == 3, "the callback waits for a thread that waits for the training"
    assert states == [state] * 3
    torch.manual_seed(5)
    assert torch.equal(torch.stack([*draws, after]), torch.stack([torch.rand(3) for _ in range(4)]))
    assert_close(trained.state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("in_thread", [False, True])
def test_trainings_do_not_wait_for_a_callback(in_thread):
    """While a callback runs, its training has no use for the process: one that trains meanwhile waits for nobody."""
    waiting = []

    class Watching(MixtureDensityNetwork):
        def forward(self, x):
            waiting.append(num_waiting())
            return super().forward(x)

    def train():
        fit(Watching(1, 1, 2, 8, seed=1), LINE, LINE**2, **{**STEPS, "batch_size": 10})

    def callback(result):
        thread = threading.Thread(target=train)
        for run in [thread.start, thread.join] if in_thread else [train]:
            run()

    fit(MixtureDensityNetwork(1, 1, 2, 8, seed=0), LINE, LINE**2, callbacks=[callback], **{**STEPS, "batch_size": 30})
    assert {*waiting} == {0}


def test_the_process_is_whole_again_after_errors():
    """However deep: in a turn that others were offered, in released code, and in what is nested."""
    pyro.param("mine", torch.ones(2))
    torch.manual_seed(7)
    before, validates = torch.get_rng_state(), Distribution._validate_args
    with contextlib.suppress(KeyError), isolated(), seeded(1), unvalidated(), own_store():
        inside = torch.get_rng_state()
        pyro.param("own", torch.ones(2))
        with contextlib.suppress(ZeroDivisionError), released():
            assert torch.equal(torch.get_rng_state(), before)
            assert [*pyro.get_param_store()] == ["mine"]
            assert Distribution._validate_args == validates
            raise ZeroDivisionError
        assert torch.equal(torch.get_rng_state(), inside)
        assert [*pyro.get_param_store()] == ["own"]
        assert not Distribution._validate_args
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    assert [*pyro.get_param_store()] == ["mine"]
    assert Distribution._validate_args == validates
    give_way()  # nothing to give: nothing happens
    with released():
        assert torch.equal(torch.get_rng_state(), before)


def succeeds_in_a_fork(function):
    """Whether a function returns True in a process that was forked, within ten seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if function() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_beside_a_training_has_the_process():
    """The thread that trained is not there; what it had changed is as it was, and no lock is left of it."""
    latent = bayesianize(MixtureDensityNetwork(1, 1, 2, 8), layers="head")
    pyro.param("mine", torch.ones(2))
    state, entered, leave = (Distribution._validate_args, ["mine"]), threading.Event(), threading.Event()

    def train():
        with isolated(), seeded(1):
            entered.set()
            leave.wait(20)

    def usable():
        found = Distribution._validate_args, [*pyro.get_param_store()]
        other = threading.Thread(target=lambda: seen.append(repr(latent)))
        other.start()
        other.join()
        return found == state and repr(latent) == seen[0]

    seen, thread = [], threading.Thread(target=train)
    thread.start()
    entered.wait(10)
    try:
        assert succeeds_in_a_fork(usable)
    finally:
        leave.set()
        thread.join(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_the_thread_that_has_the_process_goes_on():
    """As the workers of loaders do, and what is called back: the state it changed is its own, to be put back."""
    validates = Distribution._validate_args

    def goes_on(stack):
        inside = has_process(), Distribution._validate_args
        stack.close()
        return inside == (True, False) and Distribution._validate_args == validates

    with contextlib.ExitStack() as stack:
        stack.enter_context(unvalidated())
        assert succeeds_in_a_fork(lambda: goes_on(stack))
        assert not Distribution._validate_args
    with isolated():
        with released():
            assert succeeds_in_a_fork(lambda: repr(MixtureDensityNetwork(1, 1)))
        assert not Distribution._validate_args


@pytest.mark.parametrize("context", [isolated, unvalidated, lambda: seeded(1)])
def test_one_thread_at_a_time(context):
    entered = threading.Event()

    def enter():
        with context():
            entered.set()

    other = threading.Thread(target=enter)
    with context(), context():
        other.start()
        assert not entered.wait(0.1)
    other.join(10)
    assert entered.is_set()
