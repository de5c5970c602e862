"""The ground every test stands on: eight virtual devices, strict dtype promotion."""

import os

# Before jax starts: sharding is tested on any machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """For tests that run optax's own arithmetic, which mixes floats with integer counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield
