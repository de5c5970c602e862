"""The ground every test stands on: eight virtual devices, strict dtype promotion."""

import os

# Before jax starts: sharding is tested on any machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# The same examples in each run, and no verdict on how fast the machine is.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
)
hypothesis.settings.load_profile("suite")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """For tests that run optax's own arithmetic, which mixes floats with integer counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield
