import jax
import pytest


@pytest.fixture(autouse=True)
def freshly_compiled():
    """Compiles all anew: of a stored program XLA may not know what it costs."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
