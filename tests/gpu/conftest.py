"""Only `make lane-gpu` has the compiler for GPUs."""

import os

import pytest

from tests.support import absent_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("FREEZE_OPTAX_LANE") == "gpu":
        assert absent_gpu.is_installed(), "the plugin of JAX for CUDA is not on the path"
        return
    for item in items:
        if "/tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="of make lane-gpu alone"))
