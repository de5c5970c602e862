"""The memory that an array is in: that of its device, or of the host (`pinned_host`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_DEVICE = "device"


def memory_of(x: Any) -> str | None:
    """Returns the kind of memory that an array is in; None for its device, and for other values."""
    if isinstance(x, Tracer):
        return traced_memory_of(x)
    kind = x.sharding.memory_kind if isinstance(x, jax.Array) else None
    return None if kind == _DEVICE else kind


def traced_memory_of(x: Any) -> str | None:
    """Returns the memory that an array has under a trace, where its type alone counts.

    The types of JAX 0.7.1 name the memory only of arrays on a mesh.
    """
    is_host = isinstance(x, jax.Array) and x.aval.memory_space is jax.memory.Space.Host
    return "pinned_host" if is_host else None


def put_in_memory(x: Any, memory: str | None) -> Any:
    """Returns an array in this memory of its device; `x` itself if it is there already.

    Args:
      x: An array of JAX. Any other value is returned itself.
      memory: As `memory_of` returns it.
    """
    if memory_of(x) == memory or not isinstance(x, jax.Array):
        return x
    if isinstance(x, Tracer):
        space = jax.memory.Space
        source, target = (space.Device, space.Host) if memory else (space.Host, space.Device)
        # Without the source, JAX 0.12 leaves the cotangent in host memory.
        return jax.device_put(x, target, src=source)
    return jax.device_put(x, x.sharding.with_memory_kind(memory or _DEVICE))


def copied_to_device(x: Any) -> Any:
    """Returns a copy of a constant in device memory, wherever its type says that it is."""
    return jax.device_put(x, jax.memory.Space.Device)


def put_tree_in_memory(tree: Any, memory: str | None) -> Any:
    """Returns a tree with its arrays in this memory; the tree itself if they are there already."""
    if all(memory_of(x) == memory for x in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda x: put_in_memory(x, memory), tree)


def run_on_device(function: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a function of arrays; the array that it returns goes to the memory of the first.

    JAX computes nothing from arrays in different memories. So if one is in host memory, the
    function gets copies in device memory.

    Args:
      function: A function of arrays that returns an array.
      *arrays: Its arguments.
    """
    if not any(map(memory_of, arrays)):
        return function(*arrays)
    result = function(*(put_in_memory(x, None) for x in arrays))
    return put_in_memory(result, memory_of(arrays[0]))


def full_in_host_memory(leaf: Any, value: Any) -> Any:
    """Returns an array like a leaf in host memory, where `jnp.full_like` fails or forgets it.

    Outside a trace it is made in host memory, as the device may have no room for it.

    Args:
      leaf: The leaf, an array of JAX.
      value: The number to fill the array with.
    """
    is_traced = isinstance(leaf, Tracer) or isinstance(jnp.zeros(1), Tracer)
    if is_traced:
        return put_in_memory(jnp.full(leaf.shape, value, leaf.dtype), traced_memory_of(leaf))
    # Not `jax.make_array_from_callback`: the type of its array says device memory (JAX 0.12).
    return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)
