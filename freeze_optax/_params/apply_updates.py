"""Apply updates to the params, without touching the frozen leaves."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._rows.flags import Flag
from freeze_optax._rows.remembered import remembered_parts
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.rows_by_value import RowsByValue
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put, take_if_whole
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, resolve, rotations_in_spec, schedules_in_spec
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import run_on_device
from freeze_optax._tree.messages import path_differences, quoted_list


def apply_updates(params: Any, updates: Any, frozen: Spec = nothing) -> Any:
    """Adds the updates to the params as `optax.apply_updates`, but returns frozen leaves unchanged.

    A frozen leaf is returned as the same object. So every bit of it stays, in eager mode too, where
    `p + 0` turns -0.0 into 0.0 and flushes subnormal numbers. Its buffer is not copied in eager
    mode, and under `jax.jit` it is not copied if the params are donated.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"encoder": 1.0, "head": 2.0}
      >>> new = fo.apply_updates(params, {"encoder": 9.0, "head": 0.5}, frozen="encoder")
      >>> new["encoder"] is params["encoder"], float(new["head"])
      (True, 2.5)

    Args:
      params: A pytree.
      updates: A pytree with a leaf, a hole (`optax.MaskedNode`) or None for each leaf of `params`.
        The updates of frozen leaves are not read.
      frozen: Which leaves stay unchanged: any spec, see `freeze_optax.mask`; usually the optimizer
        state. Where a leaf is frozen in part, its frozen rows stay unchanged. A leaf whose update
        is None or a hole, and a leaf that cannot be trained, stays unchanged too.

    Returns:
      A tree like `params`. Unchanged leaves are the same objects; every other leaf is the sum of
      param and update, in the dtype and the memory of the param.

    Raises:
      ValueError: If the updates or the spec do not fit the params.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    leaves = Leaves(params)
    flags = resolve(frozen, leaves, partitioned=True)
    steps = _align(leaves, updates)
    is_in_turn = _leaves_in_turn(frozen, leaves)
    triples = zip(leaves.values, steps, flags, strict=True)

    def applied(i: int, param: Any, update: Any, frozen: Flag) -> Any:
        add = functools.partial(run_on_device, _add_unless_zero if is_in_turn[i] else _add)
        if frozen is True or update is None or is_hole(update) or is_hole(param):
            return param
        rows, compact = remembered_parts(update)
        if isinstance(rows, RowsByValue):
            new = run_on_device(_add, rows.take(param), compact)
            return rows.put(param, new)
        if not isinstance(frozen, Subset):
            return add(param, update)
        _check_part(update, frozen, leaves, i)
        return _add_part(param, update, ~frozen, add)

    return leaves.rebuild(applied(i, *triple) for i, triple in enumerate(triples))


def _leaves_in_turn(frozen: Spec, leaves: Leaves) -> Sequence[bool]:
    """Returns for each leaf whether only its update shows what of it is frozen at this step."""
    for state in rotations_in_spec(frozen):
        return [rows is not None for rows in state.rows_in_order(leaves)]
    return [bool(schedules_in_spec(frozen))] * len(leaves.values)


def _check_part(update: Any, frozen: Subset, leaves: Leaves, i: int) -> None:
    shape, live = np.shape(update), ~frozen
    fits = frozen.fits(shape) or live.is_compact(shape)
    if isinstance(frozen, Rows):
        leaf_shape = leaves.values[i].shape
        fits = fits and frozen.with_length(shape, 0) == frozen.with_length(leaf_shape, 0)
    if shape and not fits:
        what = "rows" if isinstance(frozen, Rows) else "elements"
        raise ValueError(
            f"the update of {leaves.paths[i]!r} is of shape {shape}, but the leaf is of shape "
            f"{leaves.values[i].shape}, and {live!r} train; give an update of all {what} or of the "
            f"{what} that train"
        )


def _add_part(param: Any, update: Any, live: Subset, add: Callable[[Any, Any], Any]) -> Any:
    """Adds the update to what trains; param and update may be whole or only that."""
    live_param = take_if_whole(param, live)
    new = add(live_param, take_if_whole(update, live) if np.ndim(update) else update)
    return new if live_param is param else put(param, live, new)


def _add(param: Any, update: Any) -> Any:
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)


def _add_unless_zero(param: Any, update: Any) -> Any:
    """Adds, but keeps every bit of `param` where the update is -0.0, as for a frozen leaf.

    With the state of `scheduled` only the updates show what is frozen. Where XLA does not see that
    an update is constant, its addition flushes subnormals on a CPU.
    """
    parts = (jnp.real(update), jnp.imag(update)) if jnp.iscomplexobj(update) else (update,)
    is_unchanged = functools.reduce(operator.and_, map(_is_negative_zero, parts))
    return jnp.where(is_unchanged, jnp.asarray(param), _add(param, update))


def _is_negative_zero(x: Any) -> jax.Array:
    # `signbit` works for 16 bits and more. Some of the smaller formats have no -0.0. Those have
    # no subnormal numbers that an addition would flush, and no NaNs that it would change.
    x = jnp.asarray(x)
    x = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 16 else x
    return (x == 0) & jnp.signbit(x)


def _align(leaves: Leaves, updates: Any) -> list[Any]:
    """Returns the update, a hole or None for each leaf of the params."""
    update_leaves = Leaves(updates)
    if update_leaves.treedef == leaves.treedef:
        return update_leaves.values
    try:
        values = leaves.treedef.flatten_up_to(updates)
    except (ValueError, TypeError):
        raise ValueError(
            "the updates are of other params: "
            + path_differences(update_leaves.paths, leaves.paths, "in the updates", "in the params")
        ) from None
    nodes = [
        path
        for path, u in zip(leaves.paths, values, strict=True)
        if not (u is None or is_hole(u) or jax.tree_util.all_leaves([u]))
    ]
    if nodes:
        raise ValueError(
            f"the updates have nodes where the params have leaves: {quoted_list(nodes)}"
        )
    return values
