"""What belongs to the whole process is as it was, whoever else uses it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Distribution
from torch.testing import assert_close

from pyro_mdn import MixtureDensityNetwork, bayesianize, fit, posterior_predictive
from pyro_mdn.isolation import isolated, seeded, unvalidated

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
