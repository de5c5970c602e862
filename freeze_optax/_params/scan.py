"""Scan over stacked layers, with no backward pass for the frozen ones."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from freeze_optax._params.layer_loop import Layers, scan_rotating
from freeze_optax._params.layer_stack import is_layer_stack, report_scanned
from freeze_optax._params.reading_again import reading_again
from freeze_optax._rows.flags import flag_along
from freeze_optax._rows.meshes import (
    is_on_mesh,
    mesh_axes_of,
    on_automatic_axes,
    type_sharding,
)
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    frozen: Spec = nothing,
    unroll: int | bool = 1,
    axis: int = 0,
) -> tuple[Any, Any]:
    """Scans over stacked layers as `jax.lax.scan`, without a backward pass for frozen layers.

    One scan over all layers computes the gradients of all of them, the frozen ones too. So this
    function runs one scan for each run of consecutive frozen layers, and one for each run of
    consecutive layers that train. The result is the same. The backward pass stops at the first
    layer that trains. For frozen layers above it, the backward pass computes only the gradient of
    the carry, not that of their weights, which it reads again. Compared with a stack that was split
    by hand, the cost is one copy of the layers that train.

    The axis of the layers may be sharded over explicit mesh axes, which `jax.lax.scan` does not
    take. Then each device gets a frozen layer just before it is used, and a copy of all layers
    that train.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layers": jnp.full((4, 2), 2.0)}
      >>> frozen = fo.rows("layers", slice(0, 3))
      >>> def loss(params, x):
      ...     layers = fo.mask(frozen, params)["layers"]  # which of them are frozen
      ...     x, _ = fo.scan(lambda x, w: (x * w, None), x, params["layers"], frozen=layers)
      ...     return x.sum()
      >>> fo.grad(loss, frozen)(params, jnp.ones(2))["layers"].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [8.0, 8.0]]

    Args:
      f: A function as for `jax.lax.scan`: takes the carry and one layer, and returns the next
        carry and an output.
      init: The first carry.
      xs: The stacked layers: a pytree of arrays with an axis of the same length, one row for each
        layer.
      frozen: Which layers, the rows of `xs`, are frozen: any spec for `xs`, see
        `freeze_optax.mask`. A layer counts as frozen if all its leaves that can train are frozen.
        Where layers take turns (`freeze_optax.rotating`), `xs` itself tells which of them train.
      unroll: As for `jax.lax.scan`.
      axis: The axis of the layers in each array of `xs`; a negative one is counted from the last.
        MaxText and `nn.scan(variable_axes={"params": 1})` stack layers along axis 1. The layers
        that train are copied, with this axis in front, as `jax.lax.scan` needs them.

    Returns:
      A pair of the last carry and the outputs, stacked along a leading axis, as `jax.lax.scan`
      gives them.

    Raises:
      ValueError: If the spec does not fit `xs`, or the leaves do not have such an axis of the same
        length.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools, or `axis` is not an integer.
    """
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"the axis of the layers is an integer, not {axis!r}")
    leaves = Leaves(xs, stop=_is_leaf)
    if any(map(is_layer_stack, leaves.values)):
        return _scan_rotating(f, init, leaves, frozen, unroll, axis)
    axes, count = _axes_and_length(leaves.values, axis)
    axis_of = leaves.fill_leaves(axes)
    if count == 0:
        return jax.lax.scan(f, init, jax.tree.map(_in_front, xs, axis_of), unroll=unroll)
    is_frozen = np.ones(count, bool)
    for leaf, a, flag in zip(leaves.values, axes, resolve(frozen, leaves), strict=True):
        if can_train(leaf):
            is_frozen &= flag_along(flag, a, np.shape(leaf))
    constants = jax.lax.stop_gradient(xs)

    # Frozen layers are read by index, as a slice would copy them.
    def read(i: Any) -> Any:
        return jax.tree.map(lambda x, a: _layer(x, i, a), constants, axis_of)

    def apply_frozen(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        return f(carry, read(i))

    step: Callable[[Any, Any], Any] = apply_frozen
    if is_frozen.any():
        step = reading_again(apply_frozen, f, (init, read(0)), leaves, axes)

    runs = [(flag, len(list(run))) for flag, run in itertools.groupby(is_frozen.tolist())]
    live, live_start, is_taken = xs, 0, False
    if sum(not flag for flag, _ in runs) > 1 and _can_gather(leaves, axes):
        # One gather, as the sum of the gradients of several slices would be of the whole stack.
        take = functools.partial(_gather_layers, np.flatnonzero(~is_frozen))
        live, is_taken = jax.tree.map(take, xs), True
    outputs: list[Any] = []
    carry, start = init, 0
    for run_is_frozen, count_of_run in runs:
        stop = start + count_of_run
        if run_is_frozen:
            indices = jnp.arange(start, stop)
            carry, output = jax.lax.scan(step, carry, indices, unroll=unroll)
        else:
            first = live_start if is_taken else start
            select = functools.partial(_layers, first, first + count_of_run)
            layers = jax.tree.map(select, live, axis_of)
            carry, output = jax.lax.scan(f, carry, layers, unroll=unroll)
            live_start += count_of_run
        outputs.append(output)
        start = stop
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)


def _axes_and_length(arrays: Sequence[Any], axis: int) -> tuple[list[int], int]:
    """Returns the axis of the layers in each array, and their number; raises if it differs."""
    axes = [axis + np.ndim(x) if axis < 0 else axis for x in arrays]
    pairs = zip(arrays, axes, strict=True)
    lengths = {np.shape(x)[a] if 0 <= a < np.ndim(x) else None for x, a in pairs}
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None:
        which = "leading axis" if axis == 0 else f"length of axis {axis}"
        raise ValueError(
            f"fo.scan needs leaves with the same {which}, but they have the shapes "
            f"{sorted({np.shape(x) for x in arrays})}"
        )
    return axes, length


def _can_gather(leaves: Leaves, axes: Sequence[int]) -> bool:
    """Returns whether layers along the leading axis can be gathered, on one device, at no cost."""
    arrays = [x for x in leaves.values if isinstance(x, jax.Array)]
    return not any(axes) and not any(map(is_on_mesh, arrays))


def _gather_layers(indices: np.ndarray, x: Any) -> jax.Array:
    modes: Any = {"unique_indices": True, "indices_are_sorted": True}
    return jnp.asarray(x).at[indices].get(mode="promise_in_bounds", **modes)


def _is_leaf(x: Any) -> bool:
    return is_hole(x) or is_layer_stack(x)


def _scan_rotating(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    leaves: Leaves,
    frozen: Spec,
    unroll: int | bool,
    axis: int,
) -> tuple[Any, Any]:
    """Scans where the layers that train are known as values, see `freeze_optax.rotating`."""
    whole = [x.whole if is_layer_stack(x) else x for x in leaves.values]
    axes, length = _axes_and_length(whole, axis)
    flags = resolve(frozen, Leaves(leaves.rebuild(whole)))
    stacks = [x for x in leaves.values if is_layer_stack(x)]
    for stack, a in zip(leaves.values, axes, strict=True):
        if is_layer_stack(stack) and stack.axis != a:
            raise ValueError(
                f"the layers of {stack.path!r} take turns along axis {stack.axis}, but fo.scan was "
                f"given axis {axis}"
            )
    for stack in stacks:
        if stack.length != length:
            raise ValueError(
                f"fo.scan was given {length} of the {stack.length} layers of "
                f"{stack.path!r}, which take turns (fo.rotating); it needs all of them"
            )
        report_scanned(stack)

    def read(arrays: Sequence[Any], i: Any) -> Any:
        layers = [_layer(x, i, a) for x, a in zip(arrays, axes, strict=True)]
        return leaves.rebuild(layers)

    differentiated = [
        is_layer_stack(x) and flag is not True for x, flag in zip(leaves.values, flags, strict=True)
    ]
    triples = zip(leaves.values, whole, flags, strict=True)
    arrays = [
        jax.lax.stop_gradient(array) if is_layer_stack(x) or flag is True else array
        for x, array, flag in triples
    ]
    triples = zip(leaves.values, axes, differentiated, strict=True)
    live = [_in_front(x.live, a) if own else None for x, a, own in triples]
    layers = Layers(arrays, live, stacks[0].rows, stacks[0].length, axes, read)
    return scan_rotating(f, init, layers, unroll)


def _in_front(x: jax.Array, axis: int) -> jax.Array:
    return jnp.moveaxis(x, axis, 0)


def _layer(x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """Returns one layer, which each device needs."""
    if mesh_axes_of(x, axis) is None:
        return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
    sharding: Any = type_sharding(x)
    others = [*sharding.spec[:axis], *sharding.spec[axis + 1 :]]
    of_layer = sharding.update(spec=PartitionSpec(*others))
    return on_automatic_axes(_gather_layer, (axis,), of_layer, x, i)


def _gather_layer(axis: int, x: jax.Array, i: jax.Array) -> jax.Array:
    # XLA sends one layer for a gather, but the whole stack for a dynamic slice.
    index = (slice(None),) * axis
    return x.at[(*index, i[None])].get(mode="promise_in_bounds")[(*index, 0)]


def _layers(start: int, stop: int, x: jax.Array, axis: int) -> jax.Array:
    """Returns some layers, all of them on each device, as `jax.lax.scan` needs them."""
    if mesh_axes_of(x, axis) is None:
        return _in_front(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)
    sharding: Any = type_sharding(x)
    others = [*sharding.spec[:axis], *sharding.spec[axis + 1 :]]
    of_layers = sharding.update(spec=PartitionSpec(None, *others))
    return on_automatic_axes(_slice_layers, (start, stop, axis), of_layers, x)


def _slice_layers(start: int, stop: int, axis: int, x: jax.Array) -> jax.Array:
    return _in_front(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)
