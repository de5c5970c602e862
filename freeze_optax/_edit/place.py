"""`place` and `place_state`: params and parked statistics in device memory or host memory."""

from typing import Any

import jax

from freeze_optax._edit.state_holders import only_state, replace_state
from freeze_optax._rows.flags import Flag
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.shared_buffers import check_ties, first_of_buffer
from freeze_optax._tree.kinds import is_numpy_only, is_scale, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import DEVICE, check_memory, home_of, moved_to_memory


def place(params: Any, frozen: Spec, memory: str = "pinned_host") -> Any:
    """Moves the leaves that are frozen to host memory, and those that train to the device.

    The inverse is `memory="device"`, which moves all leaves to the device. After an edit of the
    state call it again: only what is not in its place yet is moved.

    JAX computes nothing from arrays in different memories. So the loss brings frozen leaves to the
    device where it uses them: stacked layers with `freeze_optax.scan` and `stream=True`, the
    weights of one call with `freeze_optax.streamed`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.adam(0.1), "encoder").init(params)
      >>> params = fo.place(params, opt_state)
      >>> params["encoder"].sharding.memory_kind, params["head"].sharding.memory_kind
      ('pinned_host', 'device')

    Args:
      params: A pytree. Arrays of NumPy become arrays of JAX; the frozen ones do not pass through
        device memory. Abstract arrays (`jax.ShapeDtypeStruct`) get a sharding of that memory, so
        that a plan for a model of any size costs nothing.
      frozen: Which leaves go to `memory`: any spec, see `freeze_optax.mask`; usually the optimizer
        state. Leaves that cannot be trained go there too, integers for example. A leaf that is
        frozen in part goes to the device.
      memory: The kind of memory for what is frozen, as the devices name it. With `"device"` all
        leaves go there, whatever `frozen` selects. Under jit only `"device"` and the host's are
        told apart.

    Returns:
      A tree like `params`. Leaves that are in their place already are the same objects, and so are
      PRNG keys and what is no array. All others keep their devices and their sharding. As JAX
      commits an array in host memory to its devices, one that is committed to none yet goes to all
      devices of the others. Leaves that share one buffer share one afterwards.

    Raises:
      ValueError: If the spec does not fit the params; if one of two leaves that share a buffer is
        frozen and the other not; or if a device has no such memory.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools, or `memory` is no text.
    """
    leaves = Leaves(params)
    flags = resolve(frozen, leaves)
    check_memory(memory, leaves.values)
    new = placed_values(leaves, flags, memory)
    is_same = all(x is y for x, y in zip(new, leaves.values, strict=True))
    return params if is_same else leaves.rebuild(new)


def placed_values(leaves: Leaves, flags: list[Flag], memory: str) -> list[Any]:
    """Returns the leaves, each in the memory where it belongs; raises before anything is moved."""
    if memory != DEVICE:
        check_ties(leaves, flags)
    firsts, home, new = first_of_buffer(leaves), home_of(leaves.values), list(leaves.values)
    for i, (x, flag) in enumerate(zip(leaves.values, flags, strict=True)):
        first = firsts.get(i, i)
        if first != i and _sharding(x) == _sharding(leaves.values[first]):
            is_moved = new[first] is not leaves.values[first]
            new[i] = new[first] if is_moved else x
        elif _has_memory(x):
            new[i] = moved_to_memory(x, memory if flag is True else DEVICE, home)
    return new


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _has_memory(x: Any) -> bool:
    """Returns whether a leaf is an array that can be in either memory: no key, and no number."""
    is_numeric = number_kind(x) != "other" or is_scale(x)
    return is_numeric and not is_numpy_only(x)


def place_state(state: Any, memory: str = "pinned_host") -> Any:
    """Moves the statistics of parked leaves to host memory.

    Parked is what is frozen and keeps its state: `freeze_optax.freeze` with `keep_state=True`. A
    step does not compute with it. `thaw` brings it back to the memory where the others train, and
    what is parked later joins it in host memory. The inverse is `memory="device"`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.sgd(0.1, momentum=0.9)).init(params)
      >>> opt_state = fo.freeze(opt_state, params, "encoder", keep_state=True)
      >>> opt_state = fo.place_state(opt_state)
      >>> trace = optax.tree_utils.tree_get(opt_state, "trace")
      >>> trace["encoder"].sharding.memory_kind, trace["head"].sharding.memory_kind
      ('pinned_host', 'device')

    Args:
      state: A `FreezeState`, or any tree that holds exactly one.
      memory: The kind of memory for what is parked, as for `freeze_optax.place`.

    Returns:
      The same tree with the parked statistics in that memory, or `state` itself if they are there
      already. All other arrays are the same objects: statistics of what trains, counters, clocks,
      factors of `freeze_optax.rates`, norms of `freeze_optax.measured`.

    Raises:
      TypeError: If `state` holds no `FreezeState`, or `memory` is no text.
      ValueError: If `state` holds several `FreezeState`s; if a device has no such memory; or if it
        is the state of `freeze_optax.scheduled`, as one program trains all that has state there.
    """
    freeze_state = only_state("place_state", state)
    plan = freeze_state.plan
    if plan.schedule:
        raise ValueError(
            "place_state was given a state of fo.scheduled, in which nothing is parked for good: "
            "what one phase freezes another one trains, in the same program; call "
            "fo.set_frozen(state, params, phases.at(step), keep_state=True) in a loop in its place"
        )
    check_memory(memory, jax.tree.leaves(freeze_state.inner))
    if not plan.parked:
        return state
    layout = plan.layout
    places = layout.places(freeze_state.inner)
    home = home_of(jax.tree.leaves(freeze_state))
    triples = zip(layout.prefixes, layout.owners, places, strict=True)
    moved = [
        x if owner not in plan.parked or prefix in layout.scalars else _moved_tree(x, memory, home)
        for prefix, owner, x in triples
    ]
    if all(x is y for x, y in zip(moved, places, strict=True)):
        return state
    inner = layout.rebuild(moved)
    return replace_state(state, FreezeState(inner, freeze_state.ages, plan))


def _moved_tree(tree: Any, memory: str, home: Any) -> Any:
    """Returns the statistics of a leaf in a memory; the tree itself if they are there already."""
    values, treedef = jax.tree.flatten(tree)
    moved = [moved_to_memory(x, memory, home) for x in values]
    is_same = all(x is y for x, y in zip(moved, values, strict=True))
    return tree if is_same else jax.tree.unflatten(treedef, moved)
