"""The operations of XLA that move rows and elements."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freeze_optax._rows.elements import Elements
from freeze_optax._rows.meshes import is_on_mesh
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset

Runs = list[tuple[int, int]]
"""For each run of rows, its first row and the row after its last."""


def is_slice(subset: Subset) -> bool:
    """Returns whether a subset is one run of rows."""
    return isinstance(subset, Rows) and len(subset.runs or ()) == 1


def slice_runs(x: Any, runs: Runs, axis: int) -> Any:
    """Returns the rows of some runs."""
    return concatenate([jax.lax.slice_in_dim(x, *run, axis=axis) for run in runs], axis)


def update_runs(x: Any, values: Any, runs: Runs, axis: int, is_sharded: bool) -> Any:
    """Returns an array with the rows of some runs replaced.

    Args:
      x: The array.
      values: The new rows, of all runs.
      runs: The runs.
      axis: The axis of the rows.
      is_sharded: Whether this axis is sharded over explicit mesh axes.
    """
    for first, piece in pieces(values, runs, axis):
        if is_sharded and first == 0:
            x = _replace_front(x, piece, axis)
        else:
            x = jax.lax.dynamic_update_slice_in_dim(x, piece, first, axis)
    return x


def _replace_front(x: Any, rows: Any, axis: int) -> Any:
    """Returns an array with its first rows replaced.

    Not in place: on a sharded axis XLA may write zeros over the rows behind them, where these are
    about one shard (JAX 0.10.2 to 0.12.0.1; findings/xla_zeros_rows_behind_an_update_in_place.sh).
    """
    count, length = rows.shape[axis], x.shape[axis]
    widths = [(0, length - count if i == axis else 0, 0) for i in range(x.ndim)]
    padded = jax.lax.pad(rows, jnp.zeros((), rows.dtype), widths)
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, padded, x)


def pieces(values: Any, runs: Runs, axis: int) -> list[tuple[int, Any]]:
    """Returns the index of the first row of each run, and the rows of that run."""
    if len(runs) == 1:
        return [(runs[0][0], values)]
    found: list[tuple[int, Any]] = []
    start = 0
    for first, stop in runs:
        piece = jax.lax.slice_in_dim(values, start, start + stop - first, axis=axis)
        found.append((first, piece))
        start += stop - first
    return found


def in_order(pairs: Sequence[tuple[int, Any]], axis: int) -> Any:
    """Returns the rows of pieces, in the order of their first rows, in one array."""
    return concatenate([piece for _, piece in sorted(pairs, key=lambda pair: pair[0])], axis)


def concatenate(arrays: Sequence[Any], axis: int) -> Any:
    """Returns arrays in one, without those that have no rows."""
    present = [x for x in arrays if x.shape[axis]]
    return present[0] if len(present) == 1 else jnp.concatenate(present, axis)


def gather(x: Any, subset: Subset) -> Any:
    """Returns the compact array of a subset."""
    if isinstance(subset, Elements) and not is_on_mesh(x):
        return _gather_elements(x, subset.indices)
    return x.at[_index(subset)].get(
        indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def scatter(x: Any, subset: Subset, values: Any) -> Any:
    """Returns an array with a subset replaced."""
    if isinstance(subset, Elements) and not is_on_mesh(x):
        return _scatter_elements(x, subset.indices, values)
    return x.at[_index(subset)].set(
        values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def _index(subset: Subset) -> tuple[Any, ...]:
    if isinstance(subset, Elements):
        return tuple(subset.indices.T)
    assert isinstance(subset, Rows)
    return (slice(None),) * subset.axis + (subset.indices,)


# The indices are an argument of a jitted function: leaves of one shape, with as many elements each,
# share its trace. Not on a mesh: in eager mode JAX keeps an argument of this kind for the backward
# pass, as an array on explicit axes, which it then refuses on those of `on_automatic_axes`.
@functools.partial(jax.jit, inline=False)
def _gather_elements(x: Any, indices: Any) -> Any:
    axes = tuple(range(x.ndim))
    numbers = jax.lax.GatherDimensionNumbers((), collapsed_slice_dims=axes, start_index_map=axes)
    return jax.lax.gather(
        x,
        indices,
        numbers,
        slice_sizes=(1,) * x.ndim,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


@functools.partial(jax.jit, inline=False)
def _scatter_elements(x: Any, indices: Any, values: Any) -> Any:
    axes = tuple(range(x.ndim))
    numbers = jax.lax.ScatterDimensionNumbers((), axes, axes)
    return jax.lax.scatter(
        x,
        indices,
        values,
        numbers,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
