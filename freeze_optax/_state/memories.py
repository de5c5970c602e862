"""In which memory the statistics of a state are, and where new ones go."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._state.layout import Keys
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._state.whole_params import making_state_for
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import (
    home_of,
    is_memory_error,
    memory_of,
    put_in_memory,
    put_tree_in_memory,
)
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.variables import unwrap_variable


def init_in_memory(plan: Plan, live_params: Any, params: Any) -> Any:
    """Returns the inner state of a new state, each statistic in the memory of its parameter.

    On one device, `jnp.zeros_like` fails for an array in host memory, and transformations call it.
    So they get these params in device memory.

    Args:
      plan: The plan of the state.
      live_params: The params with holes, as the transformation gets them.
      params: The params.
    """
    init = plan.context.init
    with making_state_for(params):
        if not any(map(memory_of, jax.tree.leaves(live_params))):
            return init(live_params)
        state = init(put_tree_in_memory(live_params, None))
    try:
        places = plan.layout.places(state)
    except ValueError:  # It mixes the leaves in one array, so no parameter tells its memory.
        return state
    memories = next_memories(plan, places, params, is_new=True)
    home = home_of(jax.tree.leaves(params))
    pairs = zip(places, memories, strict=True)
    values = [put_tree_in_memory(x, memory, home) for x, memory in pairs]
    return plan.layout.rebuild(values)


def next_memories(
    plan: Plan, places: Sequence[Any], params: Any, is_new: bool = False
) -> list[str | None]:
    """Returns, for each place of a state, the memory that new statistics there belong in.

    It is that of the statistics that train now in the same moment tree, since a step computes with
    all of them; those of the same leaf come first. If none train, or if they are in several
    memories, it is the memory of the parameter. Parked statistics do not count, as they may be in
    host memory because they do not train.

    Args:
      plan: The plan of the state.
      places: What each place of the state holds.
      params: The params.
      is_new: Whether the state is a new one, in which nothing trains yet.

    Returns:
      For each place the kind of memory, as `memory_of` gives it. A counter or a clock stays in the
      memory that it is in.
    """
    layout, leaf_of = plan.layout, plan.leaf_of_part
    if not any(map(memory_of, jax.tree.leaves((list(places), params)))):
        return [None] * len(places)
    leaves = param_leaves(params)
    of_param = plan.in_plan_order(leaves, [memory_of(x) for x in leaves.values])
    trained: dict[tuple[Keys, int | None], set[str | None]] = {}
    entries = list(zip(layout.prefixes, layout.owners, places, strict=True))
    for prefix, owner, value in entries:
        if is_new or owner < 0 or plan.cohorts[owner] == DROPPED or plan.frozen[owner]:
            continue
        memories = _memories(value)
        trained.setdefault((prefix, leaf_of[owner]), set()).update(memories)
        trained.setdefault((prefix, None), set()).update(memories)

    def next_memory(prefix: Keys, owner: int, value: Any) -> str | None:
        if owner < 0:
            return next(iter(_memories(value)), None)
        for leaf in (leaf_of[owner], None):
            found = trained.get((prefix, leaf), set())
            if len(found) == 1:
                return next(iter(found))
        # Factors and norms are made on the device, as counters are.
        return None if prefix in layout.scalars else of_param[leaf_of[owner]]

    return [next_memory(*entry) for entry in entries]


def parked_memories(plan: Plan, places: Sequence[Any]) -> list[str | None]:
    """Returns, for each place of a state, the memory of what is parked in the same moment tree.

    Args:
      plan: The plan of the state.
      places: What each place of the state holds.

    Returns:
      For each place the kind of memory; None also if nothing is parked, or in several memories.
    """
    if not plan.parked or not any(map(memory_of, jax.tree.leaves(list(places)))):
        return [None] * len(places)
    prefixes, owners = plan.layout.prefixes, plan.layout.owners
    parked: dict[Keys, set[str | None]] = {}
    for prefix, owner, value in zip(prefixes, owners, places, strict=True):
        if owner in plan.parked:
            parked.setdefault(prefix, set()).update(_memories(value))
    found = [parked.get(prefix, set()) for prefix in prefixes]
    return [next(iter(memories)) if len(memories) == 1 else None for memories in found]


def put_beside(new: Any, old: Any) -> Any:
    """Puts a counter on all the devices of another, and in the memory of it.

    Among several processes Orbax cannot store an array that only one of them has.
    """
    new, old = unwrap_variable(new), unwrap_variable(old)
    if not isinstance(old, jax.Array):
        return new
    if isinstance(new, Tracer) or isinstance(old, Tracer):
        return put_in_memory(new, memory_of(old))
    if len(old.sharding.device_set) == 1 and memory_of(new) == memory_of(old):
        return new
    # First the memory: JAX fails to move an array from a mesh to one device in another memory.
    return jax.device_put(put_in_memory(new, memory_of(old)), old.sharding)


def _memories(tree: Any) -> set[str | None]:
    return {memory_of(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)}


def mixed_memories(trees: Mapping[str, Any]) -> str | None:
    """Returns a clause for an error that names what is in host memory, if not all arrays are.

    Args:
      trees: Trees that a step computes with, by the name that an error gives them.
    """
    on_host, on_device = list[str](), list[str]()
    for name, tree in trees.items():
        hosted, others = _by_memory(Leaves(tree))
        on_host += [f"{name}: {path}" for path in hosted]
        on_device += [f"{name}: {path}" for path in others]
    if not (on_host and on_device):
        return None
    return (
        f"in host memory are {quoted_list(on_host)}, in device memory {quoted_list(on_device)}; "
        "JAX computes nothing from both. Before the loss write params = fo.place(params, state), "
        "which moves what trains to the device; move the state of what trains, and gradients, with "
        "jax.device_put(x, jax.memory.Space.Device)"
    )


def explain_memories_of_loss(
    error: Exception, leaves: Leaves, remedy: str = "params = fo.place(params, frozen, 'device')"
) -> None:
    """Raises, with the paths, if an error of JAX is about a loss of params in host memory.

    Args:
      error: What the loss, or its backward pass, has raised.
      leaves: The leaves of the params.
      remedy: The code that moves all of them to the device.
    """
    hosted, others = _by_memory(leaves) if is_memory_error(error) else ([], [])
    if hosted:
        beside = f", in device memory {quoted_list(others)}" if others else ""
        raise ValueError(
            "the loss computes with leaves in another memory than the rest of its arrays: in host "
            f"memory are {quoted_list(hosted)}{beside}. Move all of them to the device with "
            f"{remedy}, or bring each in where the loss uses it: fo.streamed(f)(params['layer'], "
            "x), or fo.scan(…, stream=True) for stacked layers"
        ) from error


def explain_memories_of_layers(error: Exception, leaves: Leaves) -> None:
    """Raises, with the paths, if an error of JAX is about a loop over layers in host memory.

    Args:
      error: What the loop has raised.
      leaves: The leaves of the stack.
    """
    hosted, _ = _by_memory(leaves) if is_memory_error(error) else ([], [])
    if hosted:
        raise ValueError(
            f"fo.scan computes with layers in host memory, {quoted_list(hosted)}, and other arrays "
            "in device memory. Bring the layers to the device one by one: fo.scan(f, carry, "
            "layers, frozen=…, stream=True), where `frozen` says which of them (True: all); or "
            "move the stack there: fo.place(layers, True, 'device')"
        ) from error


def _by_memory(leaves: Leaves) -> tuple[list[str], list[str]]:
    """Returns the paths of the arrays in host memory, and of those in device memory."""
    pairs = zip(leaves.paths, leaves.values, strict=True)
    arrays = [(path, memory_of(x)) for path, x in pairs if isinstance(x, jax.Array)]
    return [path for path, kind in arrays if kind], [path for path, kind in arrays if not kind]
