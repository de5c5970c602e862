"""Single rows of arrays in host memory, also where `jax.vmap` stacked arrays or indices.

JAX's own rule for a stacked index makes a gather or a scatter, which it does not take in host
memory beside indices in device memory. So each model of a population has a copy of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freeze_optax._tree.memory import copied_to_device, memory_of, put_in_memory

Read = Callable[[Any, Any, int], Any]
"""Returns one row, of an array at an index along an axis, without that axis."""


def row_of_host(x: jax.Array, i: Any, axis: int, read: Read) -> jax.Array:
    """Returns one row of an array that may be in host memory, to be copied to the device.

    It is in the memory of the array, but on the device where `jax.vmap` stacked the index.

    Args:
      x: The array.
      i: The index of the row, an int32 scalar.
      axis: The axis of the rows.
      read: Reads the row in the memory of the array.
    """

    @jax.custom_batching.custom_vmap
    def row(x: jax.Array, i: Any) -> jax.Array:
        return read(x, i, axis)

    @row.def_vmap
    def _(count: int, is_stacked: Sequence[bool], x: Any, i: Any) -> tuple[jax.Array, bool]:
        if not is_stacked[1]:
            return row_of_host(x, i, axis + 1, read), True
        read_own = [_of_model(j) if is_stacked[0] else read for j in range(count)]
        rows = [row_of_host(x, i[j], axis, read_own[j]) for j in range(count)]
        return jnp.stack([copied_to_device(x) for x in rows]), True

    return row(x, i)


def _of_model(j: int) -> Read:
    """Returns how to read a row of one model, of the stacked arrays of a population."""

    def read(x: Any, i: Any, axis: int) -> Any:
        starts: list[Any] = [0] * x.ndim
        sizes = list(x.shape)
        starts[0], sizes[0] = j, 1
        starts[axis + 1], sizes[axis + 1] = i, 1
        return jax.lax.squeeze(jax.lax.dynamic_slice(x, starts, sizes), (0, axis + 1))

    return read


def with_row_replaced(x: jax.Array, row: jax.Array, i: Any, axis: int) -> jax.Array:
    """Returns an array that may be in host memory with one row replaced, in its memory.

    Args:
      x: The array.
      row: The row, with its axis, of length 1.
      i: The index of the row, an int32 scalar.
      axis: The axis of the rows.
    """

    @jax.custom_batching.custom_vmap
    def replaced(x: jax.Array, row: jax.Array, i: Any) -> jax.Array:
        row = put_in_memory(row, memory_of(x))
        return jax.lax.dynamic_update_slice_in_dim(x, row, i, axis)

    @replaced.def_vmap
    def _(count: int, is_stacked: Sequence[bool], x: Any, row: Any, i: Any) -> tuple[Any, bool]:
        memory = memory_of(x)
        if not is_stacked[0]:
            whole = jnp.broadcast_to(put_in_memory(x, None), (count, *x.shape))
            x = put_in_memory(whole, memory)
        if not is_stacked[1]:
            row = jnp.broadcast_to(row, (count, *row.shape))
        if not is_stacked[2]:
            return with_row_replaced(x, row, i, axis + 1), True
        for j in range(count):
            starts: list[Any] = [0] * x.ndim
            starts[0], starts[axis + 1] = j, i[j]
            own = put_in_memory(row[j : j + 1], memory)
            x = jax.lax.dynamic_update_slice(x, own, starts)
        return x, True

    return replaced(x, row, i)
