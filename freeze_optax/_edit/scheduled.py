"""`scheduled`: a transformation that follows `Phases` inside one compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._edit.freeze_thaw import check_mask
from freeze_optax._edit.phases import Phases
from freeze_optax._rows.flags import Flag, flag_along, flag_from_mask, flag_from_vector
from freeze_optax._rows.parts import Part, PartTable
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Shape, Subset
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import FreezeState, ScheduledState
from freeze_optax._state.memories import init_in_memory
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._transform.chained import remember_updates
from freeze_optax._transform.cohorts import cohort_counters, stack_ages
from freeze_optax._transform.elementwise import check_takes_elements
from freeze_optax._transform.freezable import freezable
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._transform.settled_structure import with_settled_structure
from freeze_optax._tree.holes import is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import put_in_memory, traced_memory_of


def scheduled(
    inner: optax.GradientTransformation, phases: Phases
) -> optax.GradientTransformationExtraArgs:
    """Freezes at each step what the phases say, inside one compiled program.

    Nothing is recompiled when the phase changes. This is for loops that never return to the host,
    such as `lax.scan`. In other loops use `set_frozen` with `Phases.at`: it keeps no state for
    leaves that are still frozen.

    A leaf that trains in some phase has state from the start. Its state is parked while the leaf is
    frozen, so the result equals that of the host loop with `keep_state=True`. A leaf that never
    trains has no state. What a phase freezes costs it no work: one `lax.switch` selects the static
    update of the phase. `value_and_grad(fun, frozen=state)` switches in the same way, so the
    backward pass goes no further than the leaves that train in the phase.

    Where phases freeze different rows of a leaf, the optimizer sees it in parts from the start. One
    that draws noise (`optax.noisy_sgd`) draws it for each part, other noise than in the host loop.

    Apply the updates with `apply_updates(params, updates, frozen=state)`. `optax.apply_updates`
    flushes subnormal numbers on a CPU here, even under jit.

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
      inner: Any optax transformation whose `init` takes holes for params.
      phases: What is frozen from each step on. A step is one call of `update`.

    Returns:
      A transformation. Its state is a `ScheduledState`, of a step counter and a `FreezeState`. As a
      spec, this state selects the leaves that no phase trains. It cannot be edited. `init` raises
      ValueError if a spec does not fit the params. `update` raises as that of `freezable`, and
      ValueError if a statistic has another dtype in one phase than in another.

    Raises:
      TypeError: If `inner` is not a transformation, or `phases` is not a `Phases`.
      ValueError: If the first phase begins after step 0.
    """
    if not isinstance(phases, Phases):
        raise TypeError(
            f"scheduled takes Phases, not a {type(phases).__name__}: write "
            "fo.scheduled(inner, fo.Phases({0: frozen, 500: fo.nothing}))"
        )
    phases.at(0)
    inner = with_settled_structure(as_transformation("scheduled", inner))
    tx: Any = freezable(inner)

    def init_fn(params: optax.Params) -> Any:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return ScheduledState(step, tx.init(params))
        leaves = param_leaves(params)
        flags = phases.resolve(leaves)
        plan = _plan(leaves, flags, phases, PlanContext(inner, params, leaves))
        check_takes_elements(plan, params)
        for mask in flags:
            check_mask(plan, leaves, mask, plan.layout.ties)
        inner_state = init_in_memory(plan, plan.drop_frozen_params(params, leaves), params)
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
        step, freeze_state = state
        plan, index = freeze_state.plan, state.switch_index()

        def branch(frozen: tuple[bool, ...]) -> Any:
            phase_plan = plan.with_frozen(frozen, plan.cohorts)

            def update(_: None) -> Any:
                state = FreezeState(freeze_state.inner, freeze_state.ages, phase_plan)
                new_updates, after = tx.update(updates, state, params, **extra)
                return new_updates, after.inner, after.ages

            return update

        leaves = param_leaves(updates if params is None else params)
        branches = [branch(frozen) for _, frozen in plan.schedule]
        branches = _with_equal_types(branches, plan, list(map(traced_memory_of, leaves.values)))
        new_updates, inner_state, ages = jax.lax.switch(index, branches, None)
        remember_updates(Leaves(new_updates).values, plan.mask)
        after = FreezeState(inner_state, ages, plan)
        count: Any = optax.safe_increment(step)
        return new_updates, ScheduledState(count, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _plan(
    leaves: Leaves, flags: tuple[tuple[Flag, ...], ...], phases: Phases, context: PlanContext
) -> Plan:
    """Returns the plan, with one cohort for all leaves or rows that freeze and thaw together."""
    parts: list[Part] = []
    patterns: list[tuple[bool, ...]] = []
    for leaf, in_phases in enumerate(zip(*flags, strict=True)):
        for subset, pattern in _parts_by_pattern(in_phases, np.shape(leaves.values[leaf])):
            parts.append((leaf, subset))
            patterns.append(pattern)
    never_trains = tuple(map(all, patterns))
    pairs = zip(patterns, never_trains, strict=True)
    trained = dict.fromkeys(pattern for pattern, never in pairs if not never)
    table = PartTable(parts) if any(subset for _, subset in parts) else None
    # Cohorts differ in their counters alone, so without counters there is one cohort.
    order = {p: i if context.layout(table).counters else 0 for i, p in enumerate(trained)}
    cohorts = tuple(order.get(pattern, DROPPED) for pattern in patterns)
    frozen = [tuple(pattern[i] for pattern in patterns) for i in range(len(phases.starts))]
    schedule = tuple(zip(phases.starts, frozen, strict=True))
    return Plan(leaves.paths, never_trains, cohorts, context, schedule, table)


def _parts_by_pattern(
    flags: tuple[Flag, ...], shape: Shape
) -> list[tuple[Subset | None, tuple[bool, ...]]]:
    """Splits a leaf into parts that freeze and thaw together; returns each with its pattern."""
    subsets = [flag for flag in flags if isinstance(flag, Subset)]
    if not subsets:
        return [(None, tuple(flag is True for flag in flags))]
    axes = {one.axis if isinstance(one, Rows) else None for one in subsets}
    axis = axes.pop() if len(axes) == 1 else None
    if axis is None:
        masks = [flag if isinstance(flag, bool) else flag.mask_of(shape) for flag in flags]
        columns = [np.broadcast_to(mask, shape).ravel() for mask in masks]
    else:
        columns = [flag_along(flag, axis, shape) for flag in flags]
    # Rows or elements of one pattern get one number, in the order in which they come.
    pattern_numbers: Any = np.zeros(columns[0].size, int)
    for column in columns:
        _, pattern_numbers = np.unique(2 * pattern_numbers + column, return_inverse=True)
    _, firsts = np.unique(pattern_numbers, return_index=True)
    parts: list[tuple[Subset | None, tuple[bool, ...]]] = []
    for first in sorted(firsts.tolist()):
        pattern = tuple(bool(column[first]) for column in columns)
        mask = np.asarray(pattern_numbers == pattern_numbers[first])
        part = flag_from_mask(mask.reshape(shape)) if axis is None else flag_from_vector(mask, axis)
        if isinstance(part, Subset) and not all(pattern):
            parts.append((part, pattern))
    return parts


def _with_equal_types(branches: list[Any], plan: Plan, memories: Sequence[str | None]) -> list[Any]:
    """Gives the updates of all branches the same types, as `lax.switch` requires.

    A transformation may return another dtype than that of the params. So the zeros of a frozen leaf
    get the dtype that the updates of this leaf have in the phases that train it. An update is in
    the memory of its leaf, as the zeros are.

    Args:
      branches: The update of each phase.
      plan: The plan.
      memories: For each leaf of the params, its memory.
    """
    count = len(plan.paths)
    masks = [plan.mask_of(frozen) for _, frozen in plan.schedule]
    results = [jax.eval_shape(branch, None) for branch in branches]
    _check_dtypes([FreezeState(inner, ages, plan) for _, inner, ages in results])
    branch_updates = [Leaves(updates).values for updates, _, _ in results]

    def dtype_at(i: int) -> Any:
        phases = zip(branch_updates, masks, strict=True)
        live = (values[i].dtype for values, mask in phases if mask[i % count] is not True)
        return next(live, None)

    dtypes = [dtype_at(i) for i in range(len(branch_updates[0]))]

    def cast(branch: Any) -> Any:
        def run(_: None) -> Any:
            updates, *rest = branch(None)
            leaves = Leaves(updates)
            casts = (
                x if dtype is None else put_in_memory(x.astype(dtype), memories[i % count])
                for i, (x, dtype) in enumerate(zip(leaves.values, dtypes, strict=True))
            )
            return leaves.rebuild(casts), *rest

        return run

    return [cast(branch) for branch in branches]


def _check_dtypes(states: list[FreezeState]) -> None:
    """Raises ValueError if a statistic has one dtype in a phase and another in another phase."""
    leaves = [Leaves(state) for state in states]
    values_of_phases = [of_phase.values for of_phase in leaves]
    for path, *values in zip(leaves[0].paths, *values_of_phases, strict=True):
        dtypes = dict.fromkeys(str(x.dtype) for x in values if not is_hole(x))
        if len(dtypes) > 1:
            raise ValueError(
                f"the state at {path!r} is of {' in one phase and of '.join(dtypes)} in another, "
                "which one program can't have; cast the gradients to the dtype of the params, or "
                "set the dtype of the optimizer's state (mu_dtype, accumulator_dtype)"
            )
