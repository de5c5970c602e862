"""Where an imported state goes: the statistics of a param beside the param."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from freeze_optax._rows.meshes import sharding_of_rows
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import memory_of, put_in_memory
from freeze_optax._tree.variables import is_variable, rewrap_variable, unwrap_variable


def place_beside(state: FreezeState, params: Any) -> FreezeState:
    """Puts the statistics of each param where `init` makes them: beside the param.

    They get the devices and the memory of the param; one that was exported from host memory stays
    there. If the param is in an NNX Variable, they get one of its kind.
    """
    leaves = param_leaves(params)
    boxes = Leaves(leaves.tree, stop=lambda x: is_hole(x) or is_variable(x)).values
    boxes = state.plan.in_plan_order(
        leaves, boxes if len(boxes) == len(leaves.values) else leaves.values
    )
    params_and_state = [*leaves.values, *jax.tree.leaves(state.inner)]
    if not any(is_variable(box) or is_sharded(box) for box in boxes) and not any(
        map(memory_of, params_and_state)
    ):
        return state  # so a transformation that mixes leaves, and has no layout, can pass
    layout, table = state.plan.layout, state.plan.part_table

    def beside(x: Any, param: Any) -> Any:
        memory = memory_of(x)
        sharding = _sharding_beside(x, param)
        if sharding is not None:
            placed = jax.device_put(x, sharding)
            return put_in_memory(placed, memory) if memory else placed
        if memory_of(param) and not memory:
            if isinstance(param, Tracer):
                return put_in_memory(jnp.asarray(x), memory_of(param))
            return jax.device_put(x, _host_sharding(x, param))
        return x

    def placed(place: Any, owner: int, prefix: Any) -> Any:
        if owner < 0:
            return place
        box = boxes[table.parts[owner][0] if table else owner]
        # Factors and norms stay where they are, as counters do.
        if prefix not in layout.scalars:
            place = jax.tree.map(lambda x: beside(x, unwrap_variable(box)), place)
        return rewrap_variable(box, place)

    triples = zip(layout.places(state.inner), layout.owners, layout.prefixes, strict=True)
    inner = layout.rebuild([placed(*triple) for triple in triples])
    return FreezeState(inner, state.ages, state.plan)


def is_sharded(x: Any) -> bool:
    """Returns whether `x` is an array on several devices, and not one under a trace."""
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return is_concrete and len(x.sharding.device_set) > 1


def _sharding_beside(x: Any, param: Any) -> Any:
    """Returns the sharding of a statistic of a sharded param; None if it has no shape like it."""
    if not is_sharded(param) or x.ndim != param.ndim:
        return None
    pairs = zip(x.shape, param.shape, strict=True)
    axes = [axis for axis, (length, whole) in enumerate(pairs) if length != whole]
    if not axes:
        return param.sharding
    if len(axes) > 1:
        return None
    of_rows = sharding_of_rows(x.shape[axes[0]], axes[0], param)
    return of_rows and NamedSharding(param.sharding.mesh, of_rows.spec)


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
