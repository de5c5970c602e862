"""Update cohorts: leaves that were thawed together, and have step counters of their own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import DynamicJaxprTracer

from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import COUNTER
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable

Run = Callable[[Any], tuple[Any, Any]]
"""A function that takes an inner state and returns the updates of all live leaves, and the next
inner state."""


def update_cohorts(run: Run, state: FreezeState) -> tuple[Any, FreezeState]:
    """Updates each live leaf with the counters of its own cohort.

    Adam's bias correction needs the step count of each leaf, but optax keeps one count for all
    leaves. So this function calls `run` once for each live cohort, with the counters of that
    cohort. Each call sees all live leaves, so that a norm inside is the norm of all of them. Of
    each result only the leaves of that cohort are kept, and XLA removes the rest. A call on the
    leaves of one cohort alone would be cheaper to trace, but would clip each cohort by itself. So
    under a trace `run` is traced once, for the first cohort, and its equations are repeated for
    the other cohorts.

    Args:
      run: A function that updates all live leaves, see `Run`.
      state: The state before the step.

    Returns:
      The updates of all live leaves, and the state after the step.
    """
    plan = state.plan
    if plan.live in ([], [0]) and not plan.parked and not state.ages:
        updates, inner = run(state.inner)
        return updates, FreezeState(inner, (), plan)

    layout = plan.layout
    before = layout.places(state.inner)
    counters_before = cohort_counters(state, before)
    _check_count(state, counters_before)
    run = _trace_once(run, state)
    updates: dict[int, Leaves] = {}
    after: dict[int, list[Any]] = {}
    # If no leaf is live, there is one run, on holes alone, so that clocks (a schedule's count) run
    # on.
    for cohort in plan.live or [0]:
        pairs = zip(layout.owners, before, strict=True)
        values = [rewrap_variable(x, HOLE) if owner in plan.parked else x for owner, x in pairs]
        for place, counter in zip(layout.counters, counters_before[cohort], strict=True):
            values[place] = counter
        cohort_updates, inner = run(layout.rebuild(values))
        updates[cohort], after[cohort] = Leaves(cohort_updates), layout.places(inner)

    first = next(iter(after))

    def next_at(place: int, owner: int) -> Any:
        if owner == COUNTER:
            return after[0][place] if 0 in plan.live else before[place]
        if owner in plan.parked:
            return before[place]
        cohort = plan.cohorts[owner] if owner >= 0 else first
        return after.get(cohort, after[first])[place]

    inner = layout.rebuild([next_at(place, owner) for place, owner in enumerate(layout.owners)])
    counters_after = [
        [after[cohort][place] for place in layout.counters] if cohort in plan.live else old_counters
        for cohort, old_counters in enumerate(counters_before)
    ]
    count = len(plan.cohorts)
    merged = updates[first].rebuild(
        updates.get(plan.cohorts[i % count], updates[first]).values[i]
        for i in range(len(updates[first].values))
    )
    return merged, FreezeState(inner, stack_ages(counters_after[1:]), plan)


def _trace_once(run: Run, state: FreezeState) -> Run:
    """Returns `run`, under jit where this lets several cohorts share one trace."""
    leaves = jax.tree.leaves(state)
    # Only if all of the state is staged out. In eager mode jit would compile, and would round
    # differently. It would also hide concrete values of the state from a transformation that reads
    # them.
    if len(state.plan.live) < 2 or not all(isinstance(x, DynamicJaxprTracer) for x in leaves):
        return run
    return jax.jit(run, inline=True)


def cohort_counters(state: FreezeState, places: list[Any]) -> list[list[Any]]:
    """Returns the counters of each cohort, in the order of the layout.

    Those of the first cohort are in the inner state, those of the others in `ages`.
    """
    first = [places[place] for place in state.plan.layout.counters]
    later_cohorts = state.ages[0].shape[0] if state.ages else 0
    ages = list(map(unwrap_variable, state.ages))

    def counters(i: int) -> list[Any]:
        # Not `age[i]`: on a mesh that is a gather, which JAX refuses for an array in host memory.
        row = functools.partial(jax.lax.index_in_dim, index=i, keepdims=False)
        return [_called(row, age) for age in ages]

    return [first, *map(counters, range(later_cohorts))]


def _check_count(state: FreezeState, counters: list[list[Any]]) -> None:
    """Raises ValueError if a state has the counters of more or fewer cohorts than its plan."""
    # Within an edit a cohort may be left that no leaf belongs to any more, but not between edits.
    count = max(0, *state.plan.cohorts) + 1
    if state.ages and len(counters) != count:
        raise ValueError(
            f"the state has the counters of {len(counters)} cohorts, but its plan has {count}; "
            "it was restored onto a state of another plan: make that with the edits that the "
            "stored one had, or store fo.export_state(state), which has the plan"
        )


def stack_ages(counters: list[list[Any]]) -> tuple[Any, ...]:
    """Stacks the counters of the later cohorts: one array per counter, one row per cohort."""
    return tuple(
        _called(lambda *rows: jnp.stack(rows), *column) for column in zip(*counters, strict=True)
    )


def _called(function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns the result of a function for arrays; if one is abstract, an abstract result."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        return jax.eval_shape(function, *arrays)
    return function(*arrays)
