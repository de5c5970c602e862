"""The ground of every test: eight virtual devices, strict dtype promotion, quick compiling."""

import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.support.compiling import QUICK_FLAGS, SharedContext, share_programs

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
# Nobody reads the source lines in the tests' programs, and to look for them takes time.
jax.config.update("jax_traceback_in_locations_limit", 0)
_context = SharedContext()


# The folder of compiled programs: of the process that starts the workers, which inherit this.
_FOLDER = "FREEZE_OPTAX_PROGRAMS"


def pytest_configure(config):
    # Before the tests are collected, as that compiles hundreds of small programs.
    if not hasattr(config, "workerinput"):
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="freeze_optax_tests_")
    share_programs(os.environ[_FOLDER])


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        jax.config.update("jax_compilation_cache_dir", None)
        shutil.rmtree(os.environ.pop(_FOLDER))


def pytest_collection_finish(session):
    # Modules and cases stay until the end. The collector goes through them thousands of times.
    if not session.config.option.collectonly:
        gc.collect()
        gc.freeze()


# What XLA frees stays with glibc, in pieces, until it is asked for them.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_most_pages = 1_250_000_000 // _PAGE


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    # jax keeps each program for ever: without this a worker grows to gigabytes. To let go of all
    # of them takes a second, and the next file would compile half of them again.
    global _most_pages  # noqa: PLW0603 (of the process, as the memory is)
    if _resident_pages() > _most_pages:
        jax.clear_caches()
        _context.renew()
        gc.collect()
        if _TRIM:
            _TRIM(0)
        # What does not go must not be asked for after each test.
        _most_pages = max(_most_pages, _resident_pages() + 200_000_000 // _PAGE)


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
