import os

# For processes that tests start: several threads each, beside other tests, wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _clean_start():
    """Each test starts from one seed, an empty parameter store, and with validation, which torch.compile ends."""
    torch.distributions.Distribution.set_default_validate_args(True)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
