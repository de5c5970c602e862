"""Leaves that were thawed together, and the counters that each such cohort has for itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import DynamicJaxprTracer

from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import COUNTER
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import rewrap_variable

Run = Callable[[Any], tuple[Any, Any]]
"""Updates all live leaves from an inner state: gives the updates and the next inner state."""


def update_cohorts(run: Run, state: FreezeState) -> tuple[Any, FreezeState]:
    """Updates each live leaf with the counters of its own cohort.

    Adam's bias correction needs each leaf's own step count, and optax keeps one for all leaves.
    So `run` is called once for each live cohort, with that cohort's counters but always on all
    live leaves, so that a norm taken inside is the norm of them all; of each result only that
    cohort's share is kept, and XLA removes the rest. Calling it on the leaves of one cohort
    would be cheaper to trace, but would clip each cohort by itself; so under a trace it is traced
    for the first cohort, and its equations are repeated for the others.

    Args:
      run: Updates all live leaves.
      state: The state before.

    Returns:
      The updates of all live leaves, and the state after.
    """
    plan = state.plan
    if plan.live in ([], [0]) and not plan.parked and not state.ages:
        updates, inner = run(state.inner)
        return updates, FreezeState(inner, (), plan)

    layout = plan.layout
    before = layout.places(state.inner)
    rows = cohort_counters(state, before)
    run = _trace_once(run, state)
    updates: dict[int, Leaves] = {}
    after: dict[int, list[Any]] = {}
    # With nothing live one run is left, on holes alone, as the clocks run on.
    for cohort in plan.live or [0]:
        pairs = zip(layout.owners, before, strict=True)
        own = [rewrap_variable(x, HOLE) if owner in plan.parked else x for owner, x in pairs]
        for place, counter in zip(layout.counters, rows[cohort], strict=True):
            own[place] = counter
        moved, inner = run(layout.rebuild(own))
        updates[cohort], after[cohort] = Leaves(moved), layout.places(inner)

    first = next(iter(after))

    def next_at(place: int, owner: int) -> Any:
        if owner == COUNTER:
            return after[0][place] if 0 in plan.live else before[place]
        if owner in plan.parked:
            return before[place]
        cohort = plan.cohorts[owner] if owner >= 0 else first
        return after.get(cohort, after[first])[place]

    inner = layout.rebuild([next_at(place, owner) for place, owner in enumerate(layout.owners)])
    counters = [
        [after[cohort][place] for place in layout.counters] if cohort in plan.live else row
        for cohort, row in enumerate(rows)
    ]
    count = len(plan.cohorts)
    moved = updates[first].rebuild(
        updates.get(plan.cohorts[i % count], updates[first]).values[i]
        for i in range(len(updates[first].values))
    )
    return moved, FreezeState(inner, stack_ages(counters[1:]), plan)


def _trace_once(run: Run, state: FreezeState) -> Run:
    leaves = jax.tree.leaves(state)
    # Only where all of the state is staged out: eagerly jit would compile, and round otherwise,
    # and it would hide what is known of the state from a transformation that looks at it.
    if len(state.plan.live) < 2 or not all(isinstance(x, DynamicJaxprTracer) for x in leaves):
        return run
    return jax.jit(run, inline=True)


def cohort_counters(state: FreezeState, places: list[Any]) -> list[list[Any]]:
    """The counters of each cohort, the first one's from the inner state, in the layout's order."""
    first = [places[place] for place in state.plan.layout.counters]
    more = state.ages[0].shape[0] if state.ages else 0
    return [first, *([age[i] for age in state.ages] for i in range(more))]


def stack_ages(rows: list[list[Any]]) -> tuple[Any, ...]:
    """The ages: one array for each counter, a row for each cohort after the first."""
    return tuple(jnp.stack(column) for column in zip(*rows, strict=True))
