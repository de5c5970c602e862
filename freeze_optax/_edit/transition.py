"""The second step of an edit: other parts frozen, with their statistics, counters and cohorts."""

from typing import Any

import jax

from freeze_optax._edit.fresh_state import init_leaves
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.memories import next_memories, parked_memories, put_beside
from freeze_optax._state.plan import DROPPED
from freeze_optax._transform.cohorts import cohort_counters, stack_ages
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.memory import home_of, put_tree_in_memory
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable

_FRESH = 1 << 30
"""The cohort of newly made state, a number above those of all cohorts that exist."""


def apply_transition(
    state: FreezeState, params: Any, frozen: tuple[bool, ...], keep_state: bool
) -> FreezeState:
    """Returns the state with exactly these parts frozen."""
    plan = state.plan
    layout = plan.layout
    places = layout.places(state.inner)
    changes = list(zip(plan.cohorts, plan.frozen, frozen, strict=True))
    groups = [_cohort_after(*change, keep_state, bool(layout.counters)) for change in changes]
    order = {group: i for i, group in enumerate(sorted({g for g in groups if g is not None}))}
    cohorts = tuple(DROPPED if group is None else order[group] for group in groups)

    renewed = [cohort == DROPPED and not now for cohort, _, now in changes]
    # Parked statistics that train again go where those are that train already, and what is parked
    # now goes where those are that are parked already.
    resumed = [was and cohort != DROPPED and not now for cohort, was, now in changes]
    parks = [now and cohort != DROPPED and not was for cohort, was, now in changes]
    memories, of_parked = next_memories(plan, places, params), parked_memories(plan, places)
    has_host = any(memories) or any(of_parked)
    home = home_of(jax.tree.leaves((state, params))) if has_host else None
    fresh = places
    if any(renewed) or not order:
        fresh = layout.places(init_leaves(plan, params, renewed))

    # New factors and norms go where the others are: no parameter has their sharding.
    scalars = {
        prefix: place
        for prefix, place in zip(layout.prefixes, places, strict=True)
        if prefix in layout.scalars and not is_hole(unwrap_variable(place))
    }

    def next_at(place: int, owner: int) -> Any:
        if owner < 0:
            return places[place]
        if cohorts[owner] == DROPPED:
            return rewrap_variable(places[place], HOLE)
        if parks[owner]:
            memory, statistics = of_parked[place], places[place]
            return put_tree_in_memory(statistics, memory, home) if memory else statistics
        if not (renewed[owner] or resumed[owner]):
            return places[place]
        # `init` saw boxes that the state may have lost since (`nn.meta.unbox`).
        value = unwrap_variable(fresh[place]) if renewed[owner] else places[place]
        if layout.prefixes[place] in scalars:
            value = put_beside(value, scalars[layout.prefixes[place]])
        return rewrap_variable(places[place], put_tree_in_memory(value, memories[place], home))

    values = [next_at(place, owner) for place, owner in enumerate(layout.owners)]
    counters = dict(enumerate(cohort_counters(state, places)))
    counters[_FRESH] = [fresh[place] for place in layout.counters]
    first, *others = [counters[source] for source, _ in order] or [counters[_FRESH]]
    for place, counter in zip(layout.counters, first, strict=True):
        values[place] = rewrap_variable(places[place], put_beside(counter, places[place]))
    counters_now = [places[place] for place in layout.counters]
    ages = stack_ages([list(map(put_beside, row, counters_now)) for row in others])
    ages = tuple(
        rewrap_variable(now, put_beside(age, now))
        for now, age in zip(counters_now, ages, strict=False)
    )
    after = FreezeState(layout.rebuild(values), ages, plan.with_frozen(frozen, cohorts))
    # New counters have values, as `init` gives them, which an abstract state has not.
    return jax.eval_shape(lambda: after) if _is_abstract(state) else after


def _is_abstract(state: FreezeState) -> bool:
    leaves = jax.tree.leaves(state)
    return bool(leaves) and all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def _cohort_after(
    cohort: int, was_frozen: bool, is_frozen: bool, keep_state: bool, counted: bool
) -> tuple[int, bool] | None:
    """Returns the cohort whose counters a part will have, and whether these are parked.

    None means that the part will have no state. A part keeps the counters of its present cohort. A
    cohort splits if only some of its parts are parked, or only some parked parts continue.
    """
    if is_frozen and (cohort == DROPPED or not (was_frozen or keep_state)):
        return None
    if not counted:  # cohorts differ in their counters alone
        return (0, False)
    return (_FRESH if cohort == DROPPED else cohort, is_frozen)
