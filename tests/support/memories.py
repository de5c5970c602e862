"""Arrays in host memory, and the memory of each array of a tree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HOST, DEVICE = "pinned_host", "device"
PLACES = ["one device", "mesh"]
JITS = [pytest.param(lambda f: f, id="eager"), pytest.param(jax.jit, id="jit")]


def make_params(place: str) -> dict[str, Any]:
    """Three leaves in device memory, on the first device or along a mesh of eight."""
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.normal(size=(8, 2)), jnp.float32) for name in "abc"}
    return (
        jax.device_put(params, NamedSharding(_mesh(), PartitionSpec("x")))
        if (place == "mesh")
        else params
    )


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("x",))


def on_host(tree: Any) -> Any:
    """The tree in host memory, its scalars on all devices of its other arrays."""
    on_mesh = any(len(x.sharding.device_set) > 1 for x in jax.tree.leaves(tree))

    def moved(x: Any) -> Any:
        sharding = x.sharding
        if on_mesh and len(sharding.device_set) == 1:
            sharding = NamedSharding(_mesh(), PartitionSpec())
        return jax.device_put(x, sharding.with_memory_kind(HOST))

    return jax.tree.map(moved, tree)


def on_device(tree: Any) -> Any:
    """The tree in device memory; what is there already stays uncommitted."""
    return jax.tree.map(
        lambda x: (
            x
            if x.sharding.memory_kind == DEVICE
            else jax.device_put(x, x.sharding.with_memory_kind(DEVICE))
        ),
        tree,
    )


def kinds(tree: Any) -> Any:
    """The kind of memory of each array."""
    return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compares two trees whole: structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))  # noqa: PLW2901
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def jit_keeps_memory() -> bool:
    """Whether what this JAX computes from arrays in host memory is in host memory (0.7.1: no)."""
    return kinds(jax.jit(lambda x: x)(on_host(jnp.ones(2)))) == HOST
