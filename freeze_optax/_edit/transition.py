"""The state with other parts frozen: statistics, counters and cohorts."""

from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._edit.fresh_state import init_leaves
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.plan import DROPPED
from freeze_optax._transform.cohorts import cohort_counters, stack_ages
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable

_FRESH = 1 << 30
"""Where the counters of newly made state come from: after all cohorts there are."""


def apply_transition(
    state: FreezeState, params: Any, frozen: tuple[bool, ...], keep_state: bool
) -> FreezeState:
    """The state with other parts frozen."""
    plan = state.plan
    layout = plan.layout
    places = layout.places(state.inner)
    changes = list(zip(plan.cohorts, plan.frozen, frozen, strict=True))
    groups = [_cohort_after(*change, keep_state, bool(layout.counters)) for change in changes]
    order = {group: i for i, group in enumerate(sorted({g for g in groups if g is not None}))}
    cohorts = tuple(DROPPED if group is None else order[group] for group in groups)

    renewed = [cohort == DROPPED and not now for cohort, _, now in changes]
    fresh = places
    if any(renewed) or not order:
        fresh = layout.places(init_leaves(plan, params, renewed))

    def next_at(place: int, owner: int) -> Any:
        if owner < 0:
            return places[place]
        if cohorts[owner] == DROPPED:
            return rewrap_variable(places[place], HOLE)
        return rewrap_variable(places[place], fresh[place]) if renewed[owner] else places[place]

    moved = [next_at(place, owner) for place, owner in enumerate(layout.owners)]
    counters = dict(enumerate(cohort_counters(state, places)))
    counters[_FRESH] = [fresh[place] for place in layout.counters]
    first, *others = [counters[source] for source, _ in order] or [counters[_FRESH]]
    for place, counter in zip(layout.counters, first, strict=True):
        moved[place] = rewrap_variable(places[place], _on_devices_of(counter, places[place]))
    ages = stack_ages([[unwrap_variable(counter) for counter in row] for row in others])
    pairs = zip(layout.counters, ages, strict=False)
    ages = tuple(
        rewrap_variable(places[place], _on_devices_of(age, places[place])) for place, age in pairs
    )
    return FreezeState(layout.rebuild(moved), ages, plan.with_frozen(frozen, cohorts))


def _cohort_after(
    cohort: int, was_frozen: bool, is_frozen: bool, keep_state: bool, counted: bool
) -> tuple[int, bool] | None:
    """Whose counters a leaf will have, and whether they stand still; None for no state.

    A leaf keeps the counters of the cohort that it was in, which splits where only a part of it
    is parked or goes on.
    """
    if is_frozen and (cohort == DROPPED or not (was_frozen or keep_state)):
        return None
    if not counted:  # then cohorts have nothing to keep apart
        return (0, False)
    return (_FRESH if cohort == DROPPED else cohort, is_frozen)


def _on_devices_of(new: Any, old: Any) -> Any:
    """A counter on all the devices of another; Orbax stores none of one process among several."""
    new, old = unwrap_variable(new), unwrap_variable(old)
    if isinstance(new, Tracer) or isinstance(old, Tracer) or not isinstance(old, jax.Array):
        return new
    if len(old.sharding.device_set) == 1:
        return new
    return jax.device_put(new, old.sharding)
