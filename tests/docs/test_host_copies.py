"""The ways of `benchmarks/host_copies.py` compute the same, so their times can be compared."""

import jax
import numpy as np
import pytest

from benchmarks import host_copies

WAYS = [
    host_copies.on_the_device,
    host_copies.ahead_and_clamped,
    host_copies.ahead_and_linear,
    host_copies.ahead_and_together,
    host_copies.as_scanned,
]


@pytest.mark.parametrize("way", [*WAYS, host_copies.whole_arrays], ids=lambda way: way.__name__)
def test_each_way_applies_all_layers_in_order(way):
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(host_copies.LAYERS, 4, 4)).astype(np.float32)
    x = rng.normal(size=(2, 4)).astype(np.float32)
    expected = [x]
    for kernel in stack:
        after = expected[-1]
        for _ in range(host_copies.PRODUCTS):
            after = np.tanh(after @ kernel)
        expected.append(after)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    weights = stack if way is host_copies.on_the_device else jax.device_put(stack, sharding)
    if way is host_copies.whole_arrays:
        weights = [jax.device_put(kernel, sharding) for kernel in stack]
    result, kept = jax.jit(way)(weights, x)
    np.testing.assert_allclose(result, expected[-1], rtol=1e-4)
    # Those that end their loop early do not keep the last one.
    assert len(kept) >= host_copies.LAYERS - 1
    np.testing.assert_allclose(np.stack(kept), expected[1 : len(kept) + 1], rtol=1e-4)
