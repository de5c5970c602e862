"""Single rows of arrays in host memory, also where `jax.vmap` stacked arrays or indices.

JAX's own rule for a stacked index makes a gather or a scatter, which it does not take in host
memory beside indices in device memory. So the row of each model of a population is moved by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freeze_optax._tree.memory import copied_to_device, memory_of, put_in_memory

Read = Callable[[Any, Any, int], Any]
"""Returns one row, of an array at an index along an axis, without that axis."""

Picks = tuple[tuple[int, int], ...]
"""Axes of models in front of an array, in ascending order, each with the index of one model."""


def _read_row(x: Any, i: Any, axis: int) -> Any:
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def row_of_host(
    x: jax.Array, i: Any, axis: int, read: Read = _read_row, picks: Picks = ()
) -> jax.Array:
    """Returns one row of an array that may be in host memory, to be copied to the device.

    It is in the memory of the array, but on the device where `jax.vmap` stacked the index.

    Args:
      x: The array.
      i: The index of the row, an int32 scalar.
      axis: The axis of the rows.
      read: Reads the row in the memory of the array.
      picks: The model whose row it is, if the array is that of a population.
    """

    @jax.custom_batching.custom_vmap
    def row(x: jax.Array, i: Any) -> jax.Array:
        if not picks:
            return read(x, i, axis)
        single = {axis, *(a for a, _ in picks)}
        sizes = [1 if a in single else length for a, length in enumerate(x.shape)]
        picked = jax.lax.dynamic_slice(x, _starts(x.ndim, i, axis, picks), sizes)
        return jax.lax.squeeze(picked, sorted(single))

    @row.def_vmap
    def _(count: int, is_stacked: Sequence[bool], x: Any, i: Any) -> tuple[jax.Array, bool]:
        place = (axis + 1, read, _below(picks)) if is_stacked[0] else (axis, read, picks)
        if not is_stacked[1]:
            return row_of_host(x, i, *place), True
        own = [((0, j), *place[2]) if is_stacked[0] else picks for j in range(count)]
        rows = [row_of_host(x, i[j], *place[:2], own[j]) for j in range(count)]
        return jnp.stack([copied_to_device(x) for x in rows]), True

    return row(x, i)


def with_row_replaced(
    x: jax.Array, row: jax.Array, i: Any, axis: int, picks: Picks = ()
) -> jax.Array:
    """Returns an array that may be in host memory with one row replaced, in its memory.

    Args:
      x: The array.
      row: The row, with its axis, of length 1.
      i: The index of the row, an int32 scalar.
      axis: The axis of the rows.
      picks: As for `row_of_host`; the row has no axis for these.
    """

    @jax.custom_batching.custom_vmap
    def replaced(x: jax.Array, row: jax.Array, i: Any) -> jax.Array:
        row = jax.lax.expand_dims(put_in_memory(row, memory_of(x)), [a for a, _ in picks])
        return jax.lax.dynamic_update_slice(x, row, _starts(x.ndim, i, axis, picks))

    @replaced.def_vmap
    def _(count: int, is_stacked: Sequence[bool], x: Any, row: Any, i: Any) -> tuple[Any, bool]:
        if not is_stacked[0]:
            memory, whole = memory_of(x), put_in_memory(x, None)
            x = put_in_memory(jnp.broadcast_to(whole, (count, *whole.shape)), memory)
        if not is_stacked[1]:
            row = jnp.broadcast_to(row, (count, *row.shape))
        if not is_stacked[2]:
            return with_row_replaced(x, row, i, axis + 1, _below(picks)), True
        for j in range(count):
            x = with_row_replaced(x, row[j], i[j], axis + 1, ((0, j), *_below(picks)))
        return x, True

    return replaced(x, row, i)


def _below(picks: Picks) -> Picks:
    """Returns the same models, of an array with another axis in front."""
    return tuple((a + 1, j) for a, j in picks)


def _starts(rank: int, i: Any, axis: int, picks: Picks) -> list[Any]:
    """Returns where the row of a model begins, along each axis."""
    starts = {axis: i, **dict(picks)}
    return [starts.get(a, 0) for a in range(rank)]
