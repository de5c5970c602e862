"""Functions that take subsets out of arrays and put them into others, bit for bit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from freeze_optax._rows.exact import run_bitwise, run_move
from freeze_optax._rows.flags import flag_union, flag_within, shape_of_elements
from freeze_optax._rows.meshes import (
    MeshAxes,
    is_on_mesh,
    mesh_axes_of,
    on_automatic_axes,
    reshard_like,
    sharding_of_rows,
    type_sharding,
    unsharded,
)
from freeze_optax._rows.moves import (
    concatenate,
    gather,
    in_order,
    is_slice,
    pieces,
    scatter,
    slice_runs,
    update_runs,
)
from freeze_optax._rows.remembered import remember_compact, remembered_compact
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Shape, Subset
from freeze_optax._tree.memory import put_in_memory, run_on_device, traced_memory_of


def take(x: Any, subset: Subset, like: Any = None) -> Any:
    """Returns the compact array of a subset: its rows, or a vector of its elements.

    Args:
      x: The array of the whole leaf, which may be abstract.
      subset: What to return of it.
      like: As for `sharding_of_rows`.
    """
    if isinstance(x, np.ndarray):
        return _take_numpy(x, subset)
    sharding = _sharding_of_compact(x, subset, like)
    compact = remembered_compact(x, subset)
    if compact is not None and type_sharding(compact) == sharding:
        return compact
    return run_move(_taking(subset, sharding), not is_slice(subset), x)


def take_if_whole(x: Any, subset: Subset) -> Any:
    """Returns the compact array of a subset, of an array that is whole, or is that already."""
    return x if subset.is_compact(x.shape) else take(x, subset)


def take_bitwise(x: Any, subset: Subset, like: Any = None) -> Any:
    """Returns the compact array of a subset with every bit kept, as what is frozen needs it.

    On a mesh it is gathered: XLA sends the rows of a short slice by a sum, even as bits.
    """
    if isinstance(x, np.ndarray):
        return _take_numpy(x, subset)
    sharding = _sharding_of_compact(x, subset, like)
    return run_bitwise(_taking(subset, sharding, _is_on_mesh(x)), True, x)


def _is_on_mesh(x: Any) -> bool:
    return isinstance(x, jax.Array) and is_on_mesh(x)


def _take_numpy(x: np.ndarray, subset: Subset) -> np.ndarray:
    if isinstance(subset, Rows):
        return np.compress(subset.mask, x, subset.axis)
    return x[subset.mask_of(x.shape)]


def _sharding_of_compact(x: Any, subset: Subset, like: Any = None) -> NamedSharding | None:
    """Returns the sharding of what is taken out of `x`, if it is a part of its type."""
    if isinstance(subset, Rows):
        return sharding_of_rows(subset.count, subset.axis, x, like)
    return unsharded(1, x)


def _taking(
    subset: Subset, sharding: NamedSharding | None, as_gather: bool = False
) -> Callable[..., Any]:
    return functools.partial(on_automatic_axes, _take, (subset, as_gather), sharding)


def _take(subset: Subset, as_gather: bool, x: Any) -> Any:
    if isinstance(subset, Rows) and subset.runs and not as_gather:
        return slice_runs(x, subset.runs, subset.axis)
    return gather(x, subset)


def take_within(
    x: Any, inner: Subset, outer: Subset | None, like: Any = None, exact: bool = False
) -> Any:
    """Returns the compact array of a subset, out of that of a larger one.

    Args:
      x: The compact array of the larger subset; it may be abstract.
      inner: What to return.
      outer: The larger subset, which contains the other; None for the whole leaf.
      like: As for `sharding_of_rows`.
      exact: Whether to keep every bit, as `take_bitwise` does.
    """
    if inner == outer:
        return x
    within = flag_within(inner, outer)
    assert isinstance(within, Subset)
    if outer is None or (isinstance(inner, Rows) and isinstance(outer, Rows)):
        return (take_bitwise if exact else take)(x, within, like)
    shape = inner.compact_shape(shape_of_elements([inner, outer]))
    if isinstance(x, np.ndarray):
        return _take_numpy(x, within).reshape(shape)
    moving = functools.partial(
        on_automatic_axes, _take_reshaped, (within, shape), unsharded(len(shape), x)
    )
    return (run_bitwise if exact else run_move)(moving, True, x)


def _take_reshaped(subset: Subset, shape: tuple[int, ...], x: Any) -> Any:
    return _take(subset, True, x).reshape(shape)


def put(x: Any, subset: Subset, values: Any) -> Any:
    """Returns the array of a whole leaf with a subset replaced; a NumPy array stays one.

    XLA writes the subset in place where it can. The rest of the leaf keeps every bit.

    Args:
      x: The array. It is not changed.
      subset: What to replace.
      values: The compact array of the new values.
    """
    return _put_either(x, subset, values, False)


def put_bitwise(x: Any, subset: Subset, values: Any) -> Any:
    """Returns what `put` returns, with every bit of the new values too."""
    return _put_either(x, subset, values, _is_on_mesh(x) or _is_on_mesh(values))


def _put_either(x: Any, subset: Subset, values: Any, as_scatter: bool) -> Any:
    if isinstance(x, np.ndarray) and not isinstance(values, Tracer):
        new = x.copy()
        if isinstance(subset, Rows):
            new[(slice(None),) * subset.axis + (subset.mask,)] = values
        else:
            new[subset.mask_of(x.shape)] = values
        return new
    may_sum = as_scatter or not is_slice(subset)
    return run_bitwise(_putting(x, subset, values, as_scatter), may_sum, x, values)


def _putting(x: Any, subset: Subset, values: Any, as_scatter: bool = False) -> Callable[..., Any]:
    sharding, is_sharded = type_sharding(x), False
    if isinstance(subset, Rows):
        is_sharded = mesh_axes_of(x, subset.axis) is not None
        sharding = sharding or sharding_of_rows(x.shape[subset.axis], subset.axis, values)
    else:
        sharding = sharding or unsharded(x.ndim, values)
    static = (subset, as_scatter, is_sharded)
    return functools.partial(on_automatic_axes, _put, static, sharding)


def _put(subset: Subset, as_scatter: bool, is_sharded: bool, x: Any, values: Any) -> Any:
    if isinstance(subset, Rows) and subset.runs and not as_scatter:
        return update_runs(x, values, subset.runs, subset.axis, is_sharded)
    return scatter(x, subset, values)


def join(
    subsets: Sequence[Subset], arrays: Sequence[Any], like: Any = None, mesh_axes: MeshAxes = None
) -> Any:
    """Returns the compact array of the union of several subsets, or the whole leaf if that is it.

    Args:
      subsets: The subsets, of one leaf. No element is in two of them.
      arrays: The compact array of each.
      like: An array whose sharding the result has, if the arrays are on a mesh with explicit axes.
      mesh_axes: Without `like`, the mesh axes for the axis of the rows; by default those of the
        first array that has some.
    """
    if len(arrays) == 1:
        return reshard_like(arrays[0], like)
    same_axis = _axis_of_all(subsets)
    is_traced = any(isinstance(x, Tracer) for x in arrays)
    if any(isinstance(x, np.ndarray) for x in arrays) and not is_traced:
        (dtype,) = {x.dtype for x in arrays if isinstance(x, np.ndarray)}
        arrays = [np.asarray(x, dtype) for x in arrays]
        if same_axis is None:
            return _join_elements(tuple(subsets), *arrays)
        order = np.argsort(np.concatenate([one.indices for one in _as_rows(subsets)]))
        return np.concatenate(arrays, same_axis).take(order, same_axis)

    if same_axis is None:
        move: Callable[..., Any] = _join_elements
        sharding = type_sharding(like) or unsharded(len(_union_shape(subsets)), *arrays)
    else:
        move = _join_rows
        sharded = next((x for x in arrays if mesh_axes_of(x, same_axis)), arrays[0])
        count = sum(one.count for one in subsets)
        sharding = type_sharding(like) or sharding_of_rows(
            count, same_axis, sharded, mesh_axes=mesh_axes
        )
    moving = functools.partial(on_automatic_axes, move, (tuple(subsets),), sharding)
    return run_bitwise(moving, True, *arrays)


def _axis_of_all(subsets: Sequence[Subset]) -> int | None:
    """Returns the axis that all subsets are rows of; None if there is none."""
    axes = {one.axis if isinstance(one, Rows) else None for one in subsets}
    return axes.pop() if len(axes) == 1 else None


def _as_rows(subsets: Sequence[Subset]) -> list[Rows]:
    return [one for one in subsets if isinstance(one, Rows)]


def _join_rows(subsets: Sequence[Subset], *arrays: Any) -> Any:
    rows = _as_rows(subsets)
    axis = rows[0].axis
    if not all(one.runs for one in rows):
        order = np.argsort(np.concatenate([one.indices for one in rows]))
        joined = jnp.concatenate(arrays, axis)
        return joined[(slice(None),) * axis + (order,)]
    pairs = zip(rows, arrays, strict=True)
    return in_order([pair for one, x in pairs for pair in pieces(x, one.runs or [], axis)], axis)


def _union_shape(subsets: Sequence[Subset]) -> tuple[int, ...]:
    """Returns the shape of what `join` gives for elements."""
    shape = tuple(shape_of_elements(subsets))
    union = flag_union(subsets, shape)
    return union.compact_shape(shape) if isinstance(union, Subset) else shape


def _join_elements(subsets: Sequence[Subset], *arrays: Any) -> Any:
    shape = shape_of_elements(subsets)
    order = np.argsort(np.concatenate([np.flatnonzero(one.mask_of(shape)) for one in subsets]))
    xp: Any = np if all(isinstance(x, np.ndarray) for x in arrays) else jnp
    joined = xp.concatenate([x.reshape(-1) for x in arrays])[order]
    return joined.reshape(_union_shape(subsets))


def put_among_zeros(values: jax.Array, subset: Subset, fill: float, like: Any = None) -> jax.Array:
    """Returns a whole leaf with the values of a subset in their places, and zeros elsewhere.

    Args:
      values: The compact array of the subset.
      subset: What of the result they are.
      fill: The zero elsewhere, 0.0 or -0.0; of a complex dtype, in the real and the imaginary
        part.
      like: As for `sharding_of_rows`.
    """
    if isinstance(values, np.ndarray):
        values = jnp.asarray(values)  # without x64, NumPy's numbers of 64 bits become those of 32
    if isinstance(subset, Rows):
        shape = subset.with_length(values.shape, len(subset.mask))
        other = sharding_of_rows(len(subset.mask), subset.axis, values, like)
    else:
        shape = tuple(shape_of_elements([subset]))
        other = unsharded(len(shape), values)
    # Rows that were joined from elements are not sharded, but the leaf may be.
    sharding = (type_sharding(like) if np.shape(like) == shape else None) or other
    # The zero is given as text, because 0.0 and -0.0 are equal: jit would find the function of one
    # for the other.
    static = (subset, str(fill), values.dtype, shape)
    moving = functools.partial(on_automatic_axes, _put_among_zeros, static, sharding)
    whole = run_move(moving, True, values)
    remember_compact(whole, subset, values)
    return whole


def _put_among_zeros(
    subset: Subset, fill: str, dtype: Any, shape: tuple[int, ...], values: jax.Array
) -> jax.Array:
    """Does what `put_among_zeros` does; `values` may be numbers of the dtype, or their bits."""
    zero = float(fill)
    if values.dtype == dtype:
        other: Any = complex(zero, zero) if jnp.iscomplexobj(values) else zero
    else:
        other = np.asarray(zero, jnp.finfo(dtype).dtype).view(values.dtype)

    def filled(shape: Shape) -> jax.Array:
        return jnp.full(shape, other, values.dtype)

    if not isinstance(subset, Rows) or not subset.runs:
        return scatter(filled(shape), subset, values)
    # A few runs are concatenated: XLA can take a slice of the result back out at no cost.
    parts: list[jax.Array] = []
    end = 0
    for first, piece in pieces(values, subset.runs, subset.axis):
        parts += [filled(subset.with_length(shape, first - end)), piece]
        end = first + piece.shape[subset.axis]
    last = filled(subset.with_length(shape, len(subset.mask) - end))
    return concatenate([*parts, last], subset.axis)


def below_axes(move: Callable[..., Any], count: int, *arrays: Any) -> Any:
    """Calls a function that moves a subset on arrays with axes of examples in front of the leaf's.

    Args:
      move: The function.
      count: The number of axes in front. All arrays have them.
      *arrays: The arguments of `move`.
    """
    for _ in range(count):
        move = jax.vmap(move)
    return move(*arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def with_live_subset(x: Any, values: Any, subset: Subset) -> Any:
    """Returns `x`, with derivatives for `values`, which is the compact array of a subset of it.

    `put(x, subset, values)` has the same value and derivatives, but it copies the whole array.

    Args:
      x: The array of the whole leaf.
      values: `take(x, subset)`.
      subset: The subset.
    """
    del values, subset
    return x


@with_live_subset.defjvp
def _with_live_subset_jvp(subset: Subset, primals: Any, tangents: Any) -> Any:
    # Not `put`: JAX has to transpose this function, and the exact bits of a tangent do not matter.
    # The sharding is that of the array, as the tangent of a constant may have none.
    tangent = run_on_device(_putting(primals[0], subset, primals[1]), *tangents)
    # JAX makes a zero tangent in device memory, and requires the memory of the primal here.
    return with_live_subset(*primals, subset), put_in_memory(tangent, traced_memory_of(primals[0]))
