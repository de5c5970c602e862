"""Scan over stacked layers, with no backward pass for the frozen ones."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from freeze_optax._rows.meshes import leading_mesh_axes, on_automatic_axes, type_sharding
from freeze_optax._rows.rows import flag_vector
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    frozen: Spec,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Scans over stacked layers as `jax.lax.scan`, without a backward pass for frozen layers.

    One scan over all layers computes the gradients of all of them, the frozen ones too. So this
    function runs one scan for each run of consecutive frozen layers, and one for each run of
    consecutive layers that train. The result is the same. The backward pass stops at the first
    layer that trains. For frozen layers above it, the backward pass computes only the gradient of
    the carry, not that of their weights. Compared with a stack that was split by hand, the cost is
    one copy of the layers that train.

    The leading axis of a stack may be sharded over explicit mesh axes, which `jax.lax.scan` does
    not take. Then each device gets a frozen layer just before it is used, and a copy of all layers
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
      xs: The stacked layers: a pytree of arrays with the same leading axis, one row for each layer.
      frozen: Which layers, the rows of `xs`, are frozen: any spec for `xs`, see
        `freeze_optax.mask`. A layer counts as frozen if all its leaves that can train are frozen.
      unroll: As for `jax.lax.scan`.

    Returns:
      A pair of the last carry and the stacked outputs, as `jax.lax.scan` gives them.

    Raises:
      ValueError: If the spec does not fit `xs`, or the leaves do not have the same leading axis.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    leaves = Leaves(xs)
    lengths = {np.shape(x)[:1] for x in leaves.values}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "fo.scan needs leaves with the same leading axis, but they have the shapes "
            f"{sorted({np.shape(x) for x in leaves.values})}"
        )
    ((count,),) = lengths
    if count == 0:
        return jax.lax.scan(f, init, xs, unroll=unroll)
    is_frozen = np.ones(count, bool)
    for leaf, flag in zip(leaves.values, resolve(frozen, leaves), strict=True):
        if can_train(leaf):
            is_frozen &= flag_vector(flag, count)
    constants = jax.lax.stop_gradient(xs)

    # Frozen layers are read by index, as a slice would copy them.
    def apply_frozen(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        return f(carry, jax.tree.map(lambda x: _layer(x, i), constants))

    outputs: list[Any] = []
    carry, start = init, 0
    for run_is_frozen, run in itertools.groupby(is_frozen.tolist()):
        stop = start + len(list(run))
        if run_is_frozen:
            indices = jnp.arange(start, stop)
            carry, output = jax.lax.scan(apply_frozen, carry, indices, unroll=unroll)
        else:
            layers = jax.tree.map(lambda x, a=start, b=stop: _layers(x, a, b), xs)
            carry, output = jax.lax.scan(f, carry, layers, unroll=unroll)
        outputs.append(output)
        start = stop
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)


def _layer(x: jax.Array, i: jax.Array) -> jax.Array:
    """Returns one layer, which each device needs."""
    if leading_mesh_axes(x) is None:
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    sharding: Any = type_sharding(x)
    of_layer = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
    return on_automatic_axes(_gather_layer, (), of_layer, x, i)


def _gather_layer(x: jax.Array, i: jax.Array) -> jax.Array:
    # XLA sends one layer for a gather, but the whole stack for a dynamic slice.
    return x.at[i[None]].get(mode="promise_in_bounds")[0]


def _layers(x: jax.Array, start: int, stop: int) -> jax.Array:
    """Returns some layers, all of them on each device, as `jax.lax.scan` needs them."""
    if leading_mesh_axes(x) is None:
        return jax.lax.slice_in_dim(x, start, stop)
    sharding: Any = type_sharding(x)
    of_layers = sharding.update(spec=PartitionSpec(None, *sharding.spec[1:]))
    return on_automatic_axes(_slice_layers, (start, stop), of_layers, x)


def _slice_layers(start: int, stop: int, x: jax.Array) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, stop)
