"""Functions that take rows out of arrays and put them into others, bit for bit."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.meshes import (
    MeshAxes,
    is_on_mesh,
    leading_mesh_axes,
    on_automatic_axes,
    reshard_like,
    sharding_of_rows,
    type_sharding,
)
from freeze_optax._rows.rows import Rows
from freeze_optax._tree.memory import put_in_memory, run_on_device, traced_memory_of


def take_rows(x: Any, rows: Rows, like: Any = None) -> Any:
    """Returns the rows of an array.

    Args:
      x: The array, which may be abstract.
      rows: Which rows to return.
      like: As for `sharding_of_rows`.
    """
    if isinstance(x, np.ndarray):
        return x[rows.mask]
    return _run_on_mesh(_taking(x, rows, like), x)


def take_rows_if_whole(x: Any, rows: Rows) -> Any:
    """Returns the rows of an array that has all rows, or that has only these rows already."""
    return x if x.shape[0] == rows.count else take_rows(x, rows)


def take_rows_bitwise(x: Any, rows: Rows) -> Any:
    """Returns the rows of an array with every bit kept, as frozen rows need it."""
    return x[rows.mask] if isinstance(x, np.ndarray) else _run_bitwise(_taking(x, rows), x)


def _taking(x: Any, rows: Rows, like: Any = None) -> Callable[..., Any]:
    sharding = sharding_of_rows(rows.count, x, like)
    return functools.partial(on_automatic_axes, _take, (rows,), sharding)


def _take(rows: Rows, x: Any) -> Any:
    if rows.runs:
        return _concatenate([jax.lax.slice_in_dim(x, *run) for run in rows.runs])
    return x.at[rows.indices].get(
        indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def put_rows(x: Any, rows: Rows, values: Any) -> Any:
    """Returns the array with some rows replaced; a NumPy array stays one.

    XLA writes the rows in place where it can.

    Args:
      x: The array. It is not changed.
      rows: Which rows to replace.
      values: The new rows.
    """
    if isinstance(x, np.ndarray) and not isinstance(values, Tracer):
        new = x.copy()
        new[rows.mask] = values
        return new

    return _run_bitwise(_putting(x, rows, values), x, values)


def _putting(x: Any, rows: Rows, values: Any) -> Callable[..., Any]:
    sharding = type_sharding(x) or sharding_of_rows(x.shape[0], values)
    return functools.partial(on_automatic_axes, _put, (rows,), sharding)


def _put(rows: Rows, x: Any, values: Any) -> Any:
    if not rows.runs:
        return x.at[rows.indices].set(
            values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
        )
    for first, piece in _pieces(rows.runs, values):
        x = jax.lax.dynamic_update_slice_in_dim(x, piece, first, 0)
    return x


def join_rows(
    rows: Sequence[Rows], arrays: Sequence[Any], like: Any = None, mesh_axes: MeshAxes = None
) -> Any:
    """Returns the rows of several arrays in one array, in the order that they have in the leaf.

    Args:
      rows: For each array, which rows of the leaf it holds. No row is in two arrays.
      arrays: The arrays.
      like: An array whose sharding the result has, if the arrays are on a mesh with explicit axes.
      mesh_axes: Without `like`, the mesh axes for the leading axis of the result; by default those
        of the first array that has some.
    """
    if len(arrays) == 1:
        return reshard_like(arrays[0], like)
    order = np.argsort(np.concatenate([one.indices for one in rows]))
    if any(isinstance(x, np.ndarray) for x in arrays) and not _any_isinstance(arrays, Tracer):
        (dtype,) = {x.dtype for x in arrays if isinstance(x, np.ndarray)}
        return np.concatenate([np.asarray(x, dtype) for x in arrays])[order]

    sharded = next(filter(leading_mesh_axes, arrays), arrays[0])
    sharding = type_sharding(like) or sharding_of_rows(len(order), sharded, mesh_axes=mesh_axes)
    join = functools.partial(on_automatic_axes, _join, (tuple(rows),), sharding)
    return _run_bitwise(join, *arrays)


def _join(rows: Sequence[Rows], *arrays: Any) -> Any:
    if not all(one.runs for one in rows):
        order = np.argsort(np.concatenate([one.indices for one in rows]))
        return jnp.concatenate(arrays)[order]
    pairs = zip(rows, arrays, strict=True)
    pieces = [piece for one, x in pairs for piece in _pieces(one.runs or [], x)]
    return _concatenate([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])])


def scatter_rows(values: jax.Array, rows: Rows, fill: float, like: Any = None) -> jax.Array:
    """Returns an array with the given rows in their places, and zeros in all other rows.

    Args:
      values: The rows.
      rows: Which rows of the result they are.
      fill: The zero in the other rows, 0.0 or -0.0; of a complex dtype, in the real and the
        imaginary part.
      like: As for `sharding_of_rows`.
    """
    # The zero is given as text, because 0.0 and -0.0 are equal: jit would find the function of one
    # for the other.
    static = (rows, str(fill), values.dtype)
    sharding = sharding_of_rows(len(rows.mask), values, like)
    return _run_on_mesh(functools.partial(on_automatic_axes, _scatter, static, sharding), values)


def _scatter(rows: Rows, fill: str, dtype: Any, values: jax.Array) -> jax.Array:
    """Does what `scatter_rows` does; `values` may be numbers of the dtype, or their bits."""
    zero = float(fill)
    if values.dtype == dtype:
        other: Any = complex(zero, zero) if jnp.iscomplexobj(values) else zero
    else:
        other = np.asarray(zero, jnp.finfo(dtype).dtype).view(values.dtype)

    def filled(count: int) -> jax.Array:
        return jnp.full((count, *values.shape[1:]), other, values.dtype)

    if not rows.runs:
        return put_rows(filled(len(rows.mask)), rows, values)
    # A few runs are concatenated: XLA can take a slice of the result back out at no cost.
    pieces: list[jax.Array] = []
    end = 0
    for first, piece in _pieces(rows.runs, values):
        pieces += [filled(first - end), piece]
        end = first + piece.shape[0]
    return _concatenate([*pieces, filled(len(rows.mask) - end)])


def below_axes(move: Callable[..., Any], count: int, *arrays: Any) -> Any:
    """Calls a function that moves rows on arrays that have axes of examples in front of the rows.

    Args:
      move: The function.
      count: The number of axes in front. All arrays have them.
      *arrays: The arguments of `move`.
    """
    for _ in range(count):
        move = jax.vmap(move)
    return move(*arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def with_live_rows(x: Any, part: Any, rows: Rows) -> Any:
    """Returns `x`, with derivatives for `part`, which holds some of its rows.

    `put_rows(x, rows, part)` has the same value and derivatives, but it copies the whole array.

    Args:
      x: The array.
      part: Some rows of `x`: `take_rows(x, rows)`.
      rows: Which rows these are.
    """
    del part, rows
    return x


@with_live_rows.defjvp
def _with_live_rows_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    # Not `put_rows`: JAX has to transpose this function, and the exact bits of a tangent do not
    # matter. The sharding is that of the array, as the tangent of a constant may have none.
    tangent = run_on_device(_putting(primals[0], rows, primals[1]), *tangents)
    # JAX makes a zero tangent in device memory, and requires the memory of the primal here.
    return with_live_rows(*primals, rows), put_in_memory(tangent, traced_memory_of(primals[0]))


def _pieces(runs: list[tuple[int, int]], values: Any) -> Iterator[tuple[int, Any]]:
    """Yields the index of the first row of each run, and the rows of that run."""
    if len(runs) == 1:
        yield runs[0][0], values
        return
    start = 0
    for first, stop in runs:
        yield first, jax.lax.slice_in_dim(values, start, start + stop - first)
        start += stop - first


def _concatenate(pieces: list[Any]) -> Any:
    present = [piece for piece in pieces if piece.shape[0]]
    return present[0] if len(present) == 1 else jnp.concatenate(present)


def _any_isinstance(arrays: Sequence[Any], array_type: type) -> bool:
    return any(isinstance(x, array_type) for x in arrays)


def _run_on_mesh(move: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a function that moves rows; on a mesh, so that every bit is kept.

    Where the leading axis is sharded, XLA moves rows between devices by a sum of the rows of one
    device and the zeros of all others. This sum turns -0.0 into 0.0, and flushes subnormal numbers
    on a CPU. A sum of bits, as unsigned integers, is exact.
    """
    if _any_isinstance(arrays, jax.ShapeDtypeStruct):
        return jax.eval_shape(move, *arrays)
    return run_on_device(functools.partial(_move_on_mesh, move), *map(jnp.asarray, arrays))


def _move_on_mesh(move: Callable[..., Any], *arrays: Any) -> Any:
    dtype, has_bits = arrays[0].dtype, False
    if any(map(is_on_mesh, arrays)):
        has_bits = jnp.issubdtype(dtype, jnp.inexact) and all(x.dtype == dtype for x in arrays)
    return _run_as_bits(move, *arrays) if has_bits else move(*arrays)


def _run_bitwise(move: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a function that moves rows, and keeps every bit of them."""
    if _any_isinstance(arrays, jax.ShapeDtypeStruct):
        return jax.eval_shape(move, *arrays)
    return run_on_device(functools.partial(_move_bitwise, move), *map(jnp.asarray, arrays))


def _move_bitwise(move: Callable[..., Any], *arrays: Any) -> Any:
    dtype = arrays[0].dtype
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.float16
    if not is_narrow or any(x.dtype != dtype for x in arrays) or any(map(is_on_mesh, arrays)):
        return _move_on_mesh(move, *arrays)
    # On a CPU, XLA widens these formats even to copy them, and then a NaN loses its payload.
    as_bits = functools.partial(_run_as_bits, move)
    return jax.lax.platform_dependent(*arrays, cpu=as_bits, default=move)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_as_bits(move: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
    """Calls a function that moves rows on the bits of the arrays, as unsigned integers."""
    dtype = arrays[0].dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = [[part(x) for x in arrays] for part in (jax.lax.real, jax.lax.imag)]
        return jax.lax.complex(*(_run_as_bits(move, *part) for part in parts))
    unsigned = f"uint{jnp.finfo(dtype).bits}"
    moved = move(*(jax.lax.bitcast_convert_type(x, unsigned) for x in arrays))
    return jax.lax.bitcast_convert_type(moved, dtype)


@_run_as_bits.defjvp
def _run_as_bits_jvp(move: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    # Moving rows is linear, but reading bits as an integer has no derivative.
    return _run_as_bits(move, *primals), move(*tangents)
