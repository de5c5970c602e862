"""The ground of every test: eight virtual devices, strict dtype promotion, quick compiling."""

import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.support.compiling import QUICK_FLAGS

# Before jax starts. Sharding is tested on any machine.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
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


@pytest.fixture(scope="session", autouse=True)
def compiled_programs():
    """Keeps compiled programs in a folder for the run, as many tests compile the same ones.

    Each worker has a folder of its own: jax does not write these files in one piece.
    """
    folder = tempfile.mkdtemp(prefix="freeze_optax_tests_")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    shutil.rmtree(folder)


# What XLA frees stays with glibc, in pieces, until it is asked for them.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
_MOST_PAGES = 1_000_000_000 // os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    # jax keeps each program for ever: without this a worker grows to gigabytes.
    is_last = nextitem is None or nextitem.path != item.path
    if is_last and getattr(item.config, "keeps_programs", False):  # where mutants are tried
        return
    if is_last or _resident_pages() > _MOST_PAGES:
        jax.clear_caches()
        gc.collect()
        if _TRIM:
            _TRIM(0)


def _resident_pages():
    try:
        return int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return 0


@pytest.fixture
def standard_promotion():
    """For tests that run optax's own arithmetic, which mixes floats with integer counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield
