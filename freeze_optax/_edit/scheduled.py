"""Phases inside one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._edit.freeze_thaw import check_mask
from freeze_optax._edit.phases import Phases
from freeze_optax._rows.parts import Part, PartTable
from freeze_optax._rows.rows import Flag, Rows, flag_from_vector, flag_vector
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import FreezeState, ScheduledState
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._transform.cohorts import cohort_counters, stack_ages
from freeze_optax._transform.freezable import freezable
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves


def scheduled(
    inner: optax.GradientTransformation, phases: Phases
) -> optax.GradientTransformationExtraArgs:
    """Freezes what the phases say at each step, without a recompilation and off the host.

    For loops that never return to the host, as inside `lax.scan`; elsewhere `set_frozen` with
    `Phases.at` keeps no state for what is still frozen. Leaves that train in some phase keep
    their state throughout, parked while they are frozen, so the result equals that of the host
    loop with `keep_state=True`; leaves that never train keep none. What a phase freezes costs
    it no work: one `lax.switch` chooses among static updates, and `value_and_grad(fun,
    frozen=state)` switches likewise, so the backward pass ends where it has to. Apply the updates
    with `apply_updates(params, updates, frozen=state)`: that of optax flushes subnormal numbers
    on a CPU here even under jit.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.scheduled(optax.sgd(0.1), fo.Phases({0: "encoder", 2: fo.nothing}))
      >>> def step(carry, _):
      ...     params, state = carry
      ...     loss = lambda params: (params["encoder"] + params["head"]).sum()
      ...     grads = fo.grad(loss, frozen=state)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return (fo.apply_updates(params, updates, frozen=state), state), None
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
      >>> [round(float(params[name][0]), 2) for name in ("encoder", "head")]
      [0.9, 0.7]

    Args:
      inner: Any optax transformation whose init takes holes for params.
      phases: What is frozen from each step on. Steps are counted by the calls of `update`.

    Returns:
      A transformation. Its state is a `ScheduledState`, a step counter and a `FreezeState`, which
      as a spec says what no phase trains; it can't be edited. `init` raises ValueError if a spec
      does not fit the params; `update` as that of `freezable`, and if a statistic has another
      dtype in one phase than in another.

    Raises:
      TypeError: If `inner` is no transformation, or `phases` are no `Phases`.
      ValueError: If the first phase begins after step 0.
    """
    if not isinstance(phases, Phases):
        raise TypeError(
            f"scheduled takes Phases, not a {type(phases).__name__}: write "
            "fo.scheduled(inner, fo.Phases({0: frozen, 500: fo.nothing}))"
        )
    phases.at(0)
    inner = as_transformation("scheduled", inner)
    tx: Any = freezable(inner)

    def init_fn(params: optax.Params) -> Any:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return ScheduledState(step, tx.init(params))
        leaves = param_leaves(params)
        flags = phases.resolve(leaves)
        plan = _plan(leaves, flags, phases, PlanContext(inner, params, leaves))
        for mask in flags:
            check_mask(plan, leaves, mask, plan.layout.ties)
        inner_state = inner.init(plan.drop_frozen_params(params, leaves))
        state = FreezeState(inner_state, (), plan)
        (first,) = cohort_counters(state, plan.layout.places(inner_state))
        ages = stack_ages([first] * max(plan.cohorts, default=0))
        return ScheduledState(step, FreezeState(inner_state, ages, plan))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if not isinstance(state, ScheduledState):
            raise TypeError(
                f"update was given a {type(state).__name__} for its state, not the "
                "ScheduledState that init gives; the order is update(gradients, state, params)"
            )
        step, whole = state
        plan = whole.plan

        def branch(frozen: tuple[bool, ...]) -> Any:
            now = plan.with_frozen(frozen, plan.cohorts)

            def update(_: None) -> Any:
                state = FreezeState(whole.inner, whole.ages, now)
                moved, after = tx.update(updates, state, params, **extra)
                return moved, after.inner, after.ages

            return update

        branches = _of_one_dtype([branch(frozen) for _, frozen in plan.schedule], plan)
        moved, inner_state, ages = jax.lax.switch(state.phase, branches, None)
        after = FreezeState(inner_state, ages, plan)
        count: Any = optax.safe_increment(step)
        return moved, ScheduledState(count, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _plan(
    leaves: Leaves, flags: tuple[tuple[Flag, ...], ...], phases: Phases, context: PlanContext
) -> Plan:
    """A cohort for each set of leaves, or rows, that are always frozen and thawed together."""
    parts: list[Part] = []
    patterns: list[tuple[bool, ...]] = []
    for leaf, in_phases in enumerate(zip(*flags, strict=True)):
        for rows, pattern in _patterns(in_phases):
            parts.append((leaf, rows))
            patterns.append(pattern)
    never = tuple(map(all, patterns))
    kept = dict.fromkeys(p for p, dropped in zip(patterns, never, strict=True) if not dropped)
    table = PartTable(parts) if any(rows for _, rows in parts) else None
    # Without counters there is nothing for cohorts to keep apart.
    order = {p: i if context.layout(table).counters else 0 for i, p in enumerate(kept)}
    cohorts = tuple(order.get(pattern, DROPPED) for pattern in patterns)
    frozen = [tuple(pattern[i] for pattern in patterns) for i in range(len(phases.starts))]
    schedule = tuple(zip(phases.starts, frozen, strict=True))
    return Plan(leaves.paths, never, cohorts, context, schedule, table)


def _patterns(flags: tuple[Flag, ...]) -> list[tuple[Rows | None, tuple[bool, ...]]]:
    """The rows of a leaf that are always frozen and thawed together, each with when they are."""
    count = next((len(flag.mask) for flag in flags if isinstance(flag, Rows)), None)
    if count is None:
        return [(None, tuple(flag is True for flag in flags))]
    table = np.stack([flag_vector(flag, count) for flag in flags], axis=1)
    patterns = dict.fromkeys(map(tuple, table.tolist()))
    parts = [(flag_from_vector((table == pattern).all(axis=1)), pattern) for pattern in patterns]
    return [
        (rows, pattern) for rows, pattern in parts if isinstance(rows, Rows) and not all(pattern)
    ]


def _of_one_dtype(branches: list[Any], plan: Plan) -> list[Any]:
    """Gives the zeros of each branch the dtypes that the updates have where the leaf trains.

    A transformation may return another dtype than that of the params, and the branches of a
    switch have to agree.
    """
    count = len(plan.paths)
    masks = [plan.mask_of(frozen) for _, frozen in plan.schedule]
    shapes = [jax.eval_shape(branch, None) for branch in branches]
    _check_dtypes([FreezeState(inner, ages, plan) for _, inner, ages in shapes])
    moved = [Leaves(updates).values for updates, _, _ in shapes]

    def dtype_at(i: int) -> Any:
        phases = zip(moved, masks, strict=True)
        live = (values[i].dtype for values, mask in phases if mask[i % count] is not True)
        return next(live, None)

    dtypes = [dtype_at(i) for i in range(len(moved[0]))]

    def cast(branch: Any) -> Any:
        def run(_: None) -> Any:
            moved, *rest = branch(None)
            leaves = Leaves(moved)
            pairs = zip(leaves.values, dtypes, strict=True)
            return leaves.rebuild(x if d is None else x.astype(d) for x, d in pairs), *rest

        return run

    return [cast(branch) for branch in branches]


def _check_dtypes(states: list[FreezeState]) -> None:
    """Raises where a statistic comes out in another dtype than where it is parked."""
    leaves = [Leaves(state) for state in states]
    for path, *values in zip(leaves[0].paths, *(own.values for own in leaves), strict=True):
        dtypes = dict.fromkeys(str(x.dtype) for x in values if not is_hole(x))
        if len(dtypes) > 1:
            raise ValueError(
                f"the state at {path!r} is of {' in one phase and of '.join(dtypes)} in another, "
                "which one program can't have; cast the gradients to the dtype of the params, or "
                "let the optimizer keep its state in another (mu_dtype, accumulator_dtype)"
            )
