"""Where an imported state goes: the statistics of a param beside the param."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from freeze_optax._rows.elements import Elements
from freeze_optax._rows.meshes import sharding_of_rows, unsharded
from freeze_optax._rows.subset import Subset
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import home_of, memory_of, put_in_memory
from freeze_optax._tree.variables import is_variable, rewrap_variable, unwrap_variable


def place_beside(state: FreezeState, params: Any) -> FreezeState:
    """Puts the statistics of each param where `init` makes them: beside the param.

    They get the devices and the memory of the param; one that was exported from host memory stays
    there. If the param is in an NNX Variable, they get one of its kind. Counters that an export has
    on several devices go to those of the params.
    """
    leaves = param_leaves(params)
    boxes = Leaves(leaves.tree, stop=lambda x: is_hole(x) or is_variable(x)).values
    boxes = state.plan.in_plan_order(
        leaves, boxes if len(boxes) == len(leaves.values) else leaves.values
    )
    params_and_state = [*leaves.values, *jax.tree.leaves(state)]
    if not any(map(is_variable, boxes)) and not any(
        is_sharded(x) or memory_of(x) for x in params_and_state
    ):
        return state
    home = home_of(leaves.values)
    try:
        layout, table = state.plan.layout, state.plan.part_table
        places = layout.places(state.inner)
    except ValueError:  # It mixes the leaves in one array, so no parameter says where that goes.
        return jax.tree.map(lambda x: put_at_home(x, home), state)

    def beside(x: Any, param: Any, part: Subset | None) -> Any:
        memory = memory_of(x)
        sharding = _sharding_beside(x, param, part)
        if sharding is not None:
            placed = jax.device_put(x, sharding)
            return put_in_memory(placed, memory) if memory else placed
        if memory_of(param) and not memory:
            if isinstance(param, Tracer):
                return put_in_memory(jnp.asarray(x), memory_of(param))
            return jax.device_put(x, _host_sharding(x, param))
        return put_at_home(x, home_of([param]))

    def placed(place: Any, owner: int, prefix: Any) -> Any:
        if owner < 0:
            return jax.tree.map(lambda x: put_at_home(x, home), place)
        leaf, part = table.parts[owner] if table else (owner, None)
        box = boxes[leaf]
        # Factors and norms are scalars, and go where counters go.
        if prefix in layout.scalars:
            place = jax.tree.map(lambda x: put_at_home(x, home), place)
        else:
            place = jax.tree.map(lambda x: beside(x, unwrap_variable(box), part), place)
        return rewrap_variable(box, place)

    triples = zip(places, layout.owners, layout.prefixes, strict=True)
    inner = layout.rebuild([placed(*triple) for triple in triples])
    ages = jax.tree.map(lambda x: put_at_home(x, home), state.ages)
    return FreezeState(inner, ages, state.plan)


def put_at_home(x: Any, home: Sharding | None) -> Any:
    """Returns an array whole on the devices of `home`; `x` itself if it is not on several others.

    Args:
      x: An array, or anything else. It stays in its memory.
      home: A sharding of the params. If None, they are committed to no device, so jit takes them
        along to those of `x`.
    """
    if home is None or not is_sharded(x):
        return x
    if isinstance(home, NamedSharding) and isinstance(x.sharding, NamedSharding):
        is_there = x.sharding.mesh == home.mesh
    else:
        is_there = x.sharding.device_set == home.device_set
    if is_there:
        return x
    memory = memory_of(x)
    return jax.device_put(x, home.with_memory_kind(memory) if memory else home)


def put_beside_namesake(x: Any, path: str, params: Mapping[str, Any], home: Sharding | None) -> Any:
    """Returns an array with the sharding of the param that its path ends with, or else at home.

    Args:
      x: An array of a tree that holds a state, and not in the state itself.
      path: Its path.
      params: The params by path.
      home: As for `put_at_home`.
    """
    while is_sharded(x) and path:
        param: Any = params.get(path)
        if is_sharded(param) and param.shape == x.shape:
            return jax.device_put(x, param.sharding)
        path = path.partition("/")[2]
    return put_at_home(x, home)


def is_sharded(x: Any) -> bool:
    """Returns whether `x` is an array on several devices, and not one under a trace."""
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return is_concrete and len(x.sharding.device_set) > 1


def _sharding_beside(x: Any, param: Any, part: Subset | None) -> Any:
    """Returns the sharding of a statistic of a sharded param; None if it has no shape like it.

    Args:
      x: The statistic.
      param: The param.
      part: The part of the param whose statistic it is; None for all of it.
    """
    if not is_sharded(param):
        return None
    if isinstance(part, Elements) and np.shape(x) == (part.count,):
        return _whole_beside(param) if _is_elsewhere(x, param) else None
    if x.ndim != param.ndim:
        return None
    pairs = zip(x.shape, param.shape, strict=True)
    axes = [axis for axis, (length, whole) in enumerate(pairs) if length != whole]
    if len(axes) != 1:
        return None if axes else param.sharding
    of_rows = sharding_of_rows(x.shape[axes[0]], axes[0], param)
    kind = param.sharding.memory_kind
    if of_rows is not None:
        return NamedSharding(param.sharding.mesh, of_rows.spec, memory_kind=kind)
    # On the same devices XLA chose the sharding in a step.
    chosen = _sharding_of_rows_by_xla(x.shape[axes[0]], axes[0], param)
    return chosen if _is_elsewhere(x, param) else None


def _whole_beside(param: jax.Array) -> Sharding | None:
    """Returns a sharding for a vector that each device of a param has all of."""
    home, of_type = home_of([param]), unsharded(1, param)
    if of_type is None or not isinstance(home, NamedSharding):
        return home
    # On explicit axes the type names each axis of the vector, as that of `init` does.
    return NamedSharding(home.mesh, of_type.spec)


def _is_elsewhere(x: Any, param: jax.Array) -> bool:
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return is_concrete and x.sharding.device_set != param.sharding.device_set


def _sharding_of_rows_by_xla(count: int, axis: int, param: jax.Array) -> NamedSharding | None:
    """Returns the sharding of some rows of a param on a mesh whose axes are not explicit."""
    if not isinstance(param.sharding, NamedSharding):
        return None
    mesh, spec = param.sharding.mesh, list(param.sharding.spec)
    names = spec[axis] if axis < len(spec) else None
    names = names if isinstance(names, tuple) else (names,) if names else ()
    if count % math.prod(mesh.shape[name] for name in names):
        spec[axis] = None
    kind = param.sharding.memory_kind
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)


def _host_sharding(x: Any, param: jax.Array) -> jax.sharding.Sharding:
    """Returns a sharding for statistics of a param in host memory, in the same memory."""
    sharding, kind = param.sharding, param.sharding.memory_kind
    if x.shape == param.shape:
        return sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=kind)
    device, *_ = sharding.device_set
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
