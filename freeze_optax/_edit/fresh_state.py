"""The inner state that `init` makes for some parts of the params alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import array_shapes
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._state.whole_params import making_state_for
from freeze_optax._tree.batch_axis import UNDER_VMAP, extra_axis
from freeze_optax._tree.kinds import is_numpy_only, number_kind, rank
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, param_leaves, rewrap_copies
from freeze_optax._tree.memory import put_tree_in_memory


def init_leaves(plan: Plan, params: Any, wanted: Sequence[bool]) -> Any:
    """Returns the inner state of the wanted parts alone, in the containers that `init` saw.

    It is in device memory, also where a parameter is in host memory: see `init_in_memory`.
    """
    copies = param_copies(params)
    rebuilt: list[Any] = []
    for i, containers in enumerate(param_copies(plan.context.skeleton)):
        param_values = Leaves(copies[min(i, len(copies) - 1)])
        leaves = Leaves(containers)
        leaves.values = plan.in_plan_order(param_values, param_values.values)
        live = plan.drop_parts(leaves, [not flag for flag in wanted])
        rebuilt.append(put_tree_in_memory(live, None))
    with making_state_for(params):
        return plan.context.init(rewrap_copies(plan.context.skeleton, rebuilt))


def check_batch_axis(state: FreezeState, params: Any) -> None:
    """Raises ValueError if either the state or the params are of one model, and the other of many.

    An edit would make new statistics of another shape than those beside them. Where the state has
    counters or clocks, and is the one with the axis, `Layout.places` has found it already.
    """
    plan = state.plan
    leaves = param_leaves(params)
    ndims = plan.in_plan_order(leaves, list(map(rank, leaves.values)))
    if plan.part_table:
        ndims = [ndims[leaf] for leaf, _ in plan.part_table.parts]
    layout, places = plan.layout, plan.layout.places(state.inner)
    # The statistics of most transformations are like their parameter, so a check of the number of
    # axes is enough. It saves a trace of `init`.
    triples = zip(layout.prefixes, layout.owners, places, strict=True)
    if all(
        _has_ndim(x, 0 if prefix in layout.scalars else ndims[owner])
        for prefix, owner, x in triples
        if owner >= 0
    ):
        return
    wanted = [cohort != DROPPED for cohort in plan.cohorts]
    fresh = abstract_init(lambda params: init_leaves(plan, params, wanted), params)
    triples = zip(layout.owners, places, layout.places(fresh), strict=True)
    pairs = [
        pair
        for owner, x, new in triples
        if owner >= 0
        for pair in zip(array_shapes(x), array_shapes(new), strict=False)
    ]
    length = extra_axis(pairs)
    if length is not None:
        raise ValueError(
            f"the state has one more axis, of length {length}, than the params, {UNDER_VMAP}"
        )
    length = extra_axis((new, old) for old, new in pairs)
    if length is not None:
        raise ValueError(
            f"the params have one more axis, of length {length}, than the state, which is that of "
            "one model; make a state of each with jax.vmap(tx.init)(params), and edit it under "
            "jax.vmap"
        )


def _has_ndim(statistics: Any, ndim: int) -> bool:
    """Returns whether all arrays of the statistics of a leaf have this number of axes."""
    if isinstance(statistics, jax.Array):
        return statistics.ndim == ndim
    return all(len(shape) == ndim for shape in array_shapes(statistics))


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns the state that `init` would make, as `jax.ShapeDtypeStruct`s, with its plans."""
    leaves = Leaves(params)
    array_types = jax.Array | jax.ShapeDtypeStruct
    traced = [
        isinstance(x, array_types) or (number_kind(x) != "other" and not is_numpy_only(x))
        for x in leaves.values
    ]

    def of_arrays(arrays: list[Any]) -> Any:
        values = iter(arrays)
        pairs = zip(leaves.values, traced, strict=True)
        return init(leaves.rebuild(next(values) if flag else x for x, flag in pairs))

    # This is no `init` of the user, so the warning that nothing is left to train would be wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jax.eval_shape(
            of_arrays, [x for x, f in zip(leaves.values, traced, strict=True) if f]
        )
