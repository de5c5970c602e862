"""The memory that an array is in: that of its device, or of the host (`pinned_host`)."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

DEVICE = "device"
"""The kind of memory that a device computes in."""


def memory_of(x: Any) -> str | None:
    """Returns the kind of memory that an array is in; None for its device, and for other values."""
    if isinstance(x, Tracer):
        return traced_memory_of(x)
    kind = x.sharding.memory_kind if isinstance(x, jax.Array) else None
    return None if kind == DEVICE else kind


def traced_memory_of(x: Any) -> str | None:
    """Returns the memory that an array has under a trace, where its type alone counts.

    The types of JAX 0.7.1 name the memory only of arrays on a mesh.
    """
    is_host = isinstance(x, jax.Array) and x.aval.memory_space is jax.memory.Space.Host
    return "pinned_host" if is_host else None


def put_in_memory(x: Any, memory: str | None, home: Sharding | None = None) -> Any:
    """Returns an array in this memory of its devices; `x` itself if it is there already.

    JAX commits an array in host memory to its devices, and jit takes no arrays that are committed
    to different devices.

    Args:
      x: An array of JAX. Any other value is returned itself.
      memory: As `memory_of` returns it.
      home: Where an array goes that is committed to no device yet, as `home_of` returns it.
    """
    if memory_of(x) == memory or not isinstance(x, jax.Array):
        return x
    if isinstance(x, Tracer):
        space = jax.memory.Space
        source, target = (space.Device, space.Host) if memory else (space.Host, space.Device)
        # Without the source, JAX 0.12 leaves the cotangent in host memory.
        return jax.device_put(x, target, src=source)
    sharding = x.sharding if home is None or x.committed else home
    return jax.device_put(x, sharding.with_memory_kind(memory or DEVICE))


def copied_to_device(x: Any) -> Any:
    """Returns a copy of a constant in device memory, wherever its type says that it is."""
    return jax.device_put(x, jax.memory.Space.Device)


def put_tree_in_memory(tree: Any, memory: str | None, home: Sharding | None = None) -> Any:
    """Returns a tree with its arrays in this memory; the tree itself if they are there already."""
    if all(memory_of(x) == memory for x in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda x: put_in_memory(x, memory, home), tree)


def home_of(values: Iterable[Any]) -> Sharding | None:
    """Returns a sharding for arrays of any shape on the devices that some values are committed to.

    Args:
      values: Any values. The first array on several devices counts, or else the first that is
        committed.

    Returns:
      The sharding; None if no value is committed to a device, or under jit.
    """
    arrays = [x for x in values if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    committed = [x.sharding for x in arrays if x.committed]
    meshes = [x.mesh for x in committed if isinstance(x, NamedSharding) and x.mesh.size > 1]
    if meshes:
        return NamedSharding(meshes[0], PartitionSpec())
    return next((x for x in committed if isinstance(x, SingleDeviceSharding)), None)


def moved_to_memory(x: Any, memory: str, home: Sharding | None = None) -> Any:
    """Returns an array in this memory; `x` itself if it is there already, or is no array.

    An array of NumPy becomes an array of JAX. On its way to host memory it does not pass through
    device memory, where there may be no room for it. An abstract array gets a sharding of this
    memory; without a sharding it is on the default device, as it is for `jax.jit`.

    Args:
      x: Any value.
      memory: The kind of memory, `"device"` or `"pinned_host"` say.
      home: As for `put_in_memory`. If None, an array of NumPy goes to the default device.
    """
    kind = None if memory == DEVICE else memory
    if isinstance(x, np.ndarray | np.generic):
        if kind is None or _is_tracing():
            return put_in_memory(jnp.array(x), kind)
        sharding = home or _default_sharding()
        # A copy, as on a CPU an array of JAX may share the buffer of the caller's.
        return jax.device_put(np.array(x), sharding.with_memory_kind(memory))
    if isinstance(x, jax.ShapeDtypeStruct):
        sharding: Any = x.sharding or (kind and (home or _default_sharding()))
        if sharding is None or sharding.memory_kind == memory:
            return x
        return x.update(sharding=sharding.with_memory_kind(memory))
    return put_in_memory(x, kind, home)


def _default_sharding() -> Sharding:
    with jax.ensure_compile_time_eval():
        return jax.device_put(np.zeros((), bool)).sharding


def check_memory(memory: Any, values: Iterable[Any]) -> None:
    """Raises unless the devices of these values have this kind of memory.

    Args:
      memory: The kind of memory.
      values: Any values. Where none of them is on a device, the default device counts.

    Raises:
      TypeError: If `memory` is no text.
      ValueError: If a device has no such memory, naming those that it has.
    """
    if not isinstance(memory, str):
        raise TypeError(
            f"memory is the name of a kind of memory, 'pinned_host' or 'device' say, not {memory!r}"
        )
    devices = set[jax.Device]()
    for x in values:
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not isinstance(x, Tracer):
            # The mesh of an abstract array may be abstract too, without devices.
            with contextlib.suppress(ValueError):
                devices |= x.sharding.device_set if x.sharding is not None else set()
    for device in devices or jax.local_devices()[:1]:
        if device.process_index != jax.process_index():
            continue
        kinds = [one.kind for one in device.addressable_memories()]
        if memory not in kinds:
            raise ValueError(
                f"{device} has no memory of the kind {memory!r}; it has "
                f"{', '.join(map(repr, kinds))}"
            )


def is_memory_error(error: BaseException) -> bool:
    """Returns whether an error, or its cause, is JAX's about arrays in different memories."""
    text = str(error.__cause__ or error)
    if not isinstance(error, ValueError | TypeError):
        return False
    return text.startswith("memory_space of all inputs") or (
        "<host>" in text and any(phrase in text for phrase in _OF_TYPES)
    )


_OF_TYPES = (
    "must have equal types, but they differ",  # the carry of a loop
    "must have equal output types but they differ",  # branches
    "unexpected JAX type",  # a value in host memory
)
"""What JAX says where two types differ. The type of an array in host memory has `<host>` in it."""


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
    if isinstance(leaf, Tracer) or _is_tracing():
        return put_in_memory(jnp.full(leaf.shape, value, leaf.dtype), traced_memory_of(leaf))
    # Not `jax.make_array_from_callback`: the type of its array says device memory (JAX 0.12).
    return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)


def _is_tracing() -> bool:
    """Returns whether jit traces the caller, so that what JAX makes is no array yet."""
    return isinstance(jnp.zeros(1), Tracer)
