"""The edits `adopt` and `release`: from the state of a plain optimizer to ours and back."""

from typing import Any

import jax
import optax

from freeze_optax._edit.fresh_state import abstract_init, check_batch_axis, init_leaves
from freeze_optax._edit.state_holders import editable_state, replace_state
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put
from freeze_optax._select.specs import untrainable
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import CLOCK, COUNTER, Place, array_shapes
from freeze_optax._state.memories import next_memories, put_beside
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._transform.freezable import ignoring_specs
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._transform.settled_structure import settled_state
from freeze_optax._tree.batch_axis import UNDER_VMAP, extra_axis
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.kinds import number_kind
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import home_of, put_tree_in_memory
from freeze_optax._tree.messages import few_clauses
from freeze_optax._tree.overwritten import optimized_params
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable


def adopt(tx: optax.GradientTransformation, inner_state: Any, params: Any) -> FreezeState:
    """Turns the state of a plain optimizer into a `FreezeState` in which every leaf trains.

    A run that began without this library continues with it and loses no moment.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> plain = optax.adam(0.1).init(params)
      >>> opt_state = fo.adopt(fo.freezable(optax.adam(0.1)), plain, params)
      >>> opt_state = fo.freeze(opt_state, params, "encoder")

    Args:
      tx: A `freezable`. The spec that it was made with has no effect here.
      inner_state: The state of the transformation inside `tx`.
      params: The params that the state belongs to.

    Returns:
      The `FreezeState`. It holds the same array objects as `inner_state`, which does not change.
      Leaves that cannot be trained are frozen.

    Raises:
      TypeError: If `tx` is not a `freezable`.
      ValueError: If `inner_state` is not a state of that transformation for these params. The
        error names what differs.
    """
    params = optimized_params(params)
    plan = _plan_for("adopt", tx, params)
    leaves = param_leaves(params)
    frozen = [flag is True for flag in untrainable(leaves)]
    plan = Plan.from_flags(plan.paths, frozen, plan.context)
    layout = plan.layout
    inner = plan.context.inner
    values = layout.places(
        inner_state if inner is None else settled_state(inner, inner_state, params)
    )
    _check_shapes(plan, values, params)
    pairs = zip(layout.owners, values, strict=True)
    kept = [rewrap_variable(x, HOLE) if owner >= 0 and frozen[owner] else x for owner, x in pairs]
    return FreezeState(layout.rebuild(kept), (), plan)


def release(state: Any, params: Any) -> Any:
    """Returns the state of the plain optimizer: the inverse of `adopt`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.adam(0.1), "encoder").init(params)
      >>> plain = fo.release(opt_state, params)
      >>> updates, plain = optax.adam(0.1).update(params, plain, params)

    Args:
      state: A `FreezeState`, or any tree that holds exactly one.
      params: The params that the state belongs to.

    Returns:
      The same tree with the plain inner state in the place of the `FreezeState`. Its counters are
      those of the first cohort, because a plain optimizer has one set of counters. A leaf without
      state gets fresh state. It is in the memory that `thaw` would put it in.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If `state` holds several `FreezeState`s; if it is the state of other params; or
        if it cannot be edited, because it is one of `scheduled`, or because its transformation
        mixes leaves in one array or refuses holes at `init`.
    """
    freeze_state = editable_state("release", state)
    plan = freeze_state.plan
    if plan.rotation:
        raise ValueError(
            "release was given the state of fo.rotating, which has the moments of the layers that "
            "train now alone; a plain optimizer needs those of all: make its state with init"
        )
    leaves = param_leaves(params)
    plan.flags(leaves, "params")
    check_batch_axis(freeze_state, params)
    table = plan.part_table or PartTable((i, None) for i in range(len(plan.paths)))
    is_number = _is_number(plan, params)
    complete = [
        [(plan.cohorts[i] != DROPPED, table.parts[i][1]) for i in parts_of_leaf] == [(True, None)]
        for parts_of_leaf in table.by_leaf
    ]
    missing = [number and not done for number, done in zip(is_number, complete, strict=True)]
    unsplit_plan = Plan.from_flags(plan.paths, [not flag for flag in missing], plan.context)
    statistics, shared = plan.layout.split(freeze_state.inner)
    memories = _memories(plan, table, freeze_state.inner, params)
    home = home_of(jax.tree.leaves((freeze_state, params))) if any(memories.values()) else None
    fresh, fresh_shared = statistics, shared
    if any(missing):
        fresh, fresh_shared = unsplit_plan.layout.split(init_leaves(unsplit_plan, params, missing))

    def statistic(place: Place, path: str) -> Any:
        """Returns the statistics at one place: those of the state, completed with fresh ones."""
        prefix, leaf = place
        parts = table.by_leaf[leaf]
        first = statistics.get((prefix, parts[0]), HOLE)
        if not missing[leaf]:
            is_parked = parts[0] in plan.parked
            return put_tree_in_memory(first, memories[prefix, leaf], home) if is_parked else first
        value = unwrap_variable(fresh[place])
        if prefix in plan.layout.scalars:
            # A plain optimizer has one factor for a leaf, and one vector of norms, so those of the
            # first part count.
            kept = (unwrap_variable(statistics.get((prefix, part), HOLE)) for part in parts)
            value = next((x for x in kept if not is_hole(x)), value)
            parts = []
        for part in parts:
            subset = table.parts[part][1]
            if subset and plan.cohorts[part] != DROPPED:
                value = _with_part(value, subset, statistics.get((prefix, part), HOLE), path)
        return rewrap_variable(first, put_tree_in_memory(value, memories[prefix, leaf], home))

    if all(cohort == DROPPED for cohort in plan.cohorts):
        kinds = (owner for owner in unsplit_plan.layout.owners if owner in (COUNTER, CLOCK))
        triples = zip(kinds, shared, fresh_shared, strict=True)
        shared = [
            rewrap_variable(x, put_beside(new, x)) if kind == COUNTER else x
            for kind, x, new in triples
        ]
    return replace_state(state, unsplit_plan.layout.join(statistic, shared))


def _memories(plan: Plan, table: PartTable, inner: Any, params: Any) -> dict[Place, str | None]:
    """Returns, for each place of a leaf, the memory of statistics that are not there yet."""
    layout = plan.layout
    memories = next_memories(plan, layout.places(inner), params)
    triples = zip(layout.prefixes, layout.owners, memories, strict=True)
    return {
        (prefix, table.parts[owner][0]): memory for prefix, owner, memory in triples if owner >= 0
    }


def _with_part(fresh: Any, subset: Subset, kept: Any, path: str) -> Any:
    """Returns the fresh statistics of a leaf with the kept statistics of a part put in."""
    if not jax.tree.leaves(kept):
        return fresh
    shapes = array_shapes(fresh)
    # As in `repartition`: elements need statistics like the leaf, rows an axis of rows.
    if isinstance(subset, Rows):
        fits = all(len(shape) > subset.axis for shape in shapes)
    else:
        fits = all(map(subset.fits, shapes))
    if not fits or list(map(subset.compact_shape, shapes)) != array_shapes(kept):
        what = "rows" if isinstance(subset, Rows) else "elements"
        raise ValueError(
            f"{path!r} has {array_shapes(kept)} for {subset!r}, which can't be put among the "
            f"other {what} of {shapes}"
        )
    return jax.tree.map(
        lambda array, of_part: put(array, subset, of_part), fresh, unwrap_variable(kept)
    )


def _is_number(plan: Plan, params: Any) -> list[bool]:
    """Returns, for each leaf, whether a plain optimizer keeps state for it.

    Integers count, because a plain optimizer keeps state for them too. `init` fails on other
    leaves.
    """
    leaves = param_leaves(params)
    return plan.in_plan_order(leaves, [number_kind(leaf) != "other" for leaf in leaves.values])


def _plan_for(verb: str, tx: optax.GradientTransformation, params: Any) -> Plan:
    """Returns the plan of `tx` for these params; raises TypeError unless it is a `freezable`."""
    with ignoring_specs():
        state = abstract_init(as_transformation(verb, tx).init, params)
    if not isinstance(state, FreezeState):
        raise TypeError(
            f"{verb} takes the transformation that fo.freezable gives, but the state of this one "
            f"is a {type(state).__name__}; pass the freezable itself, not a chain around it"
        )
    return state.plan


def _check_shapes(plan: Plan, values: list[Any], params: Any) -> None:
    """Raises ValueError if the statistics of a leaf have other shapes than `init` gives."""
    is_number = _is_number(plan, params)
    layout = plan.layout
    fresh = abstract_init(lambda params: init_leaves(plan, params, is_number), params)
    expected = layout.places(fresh)
    entries = zip(layout.paths, layout.owners, values, expected, strict=True)
    mismatches = [
        f"{path!r} has {array_shapes(x)}, where the params give {array_shapes(new)}"
        for path, owner, x, new in entries
        if owner >= 0 and is_number[owner] and array_shapes(x) != array_shapes(new)
    ]
    if not mismatches:
        return
    pairs = [
        pair
        for owner, x, new in zip(layout.owners, values, expected, strict=True)
        if owner >= 0 and is_number[owner]
        for pair in zip(array_shapes(new), array_shapes(x), strict=False)
    ]
    hint = ""
    if (length := extra_axis(pairs)) is not None:
        hint = f"; the params have one more axis, of length {length}, so call adopt under jax.vmap"
    if (length := extra_axis((x, new) for new, x in pairs)) is not None:
        hint = f"; the state has one more axis, of length {length}, {UNDER_VMAP}"
    raise ValueError(f"the state is of other params: {few_clauses(mismatches)}{hint}")
