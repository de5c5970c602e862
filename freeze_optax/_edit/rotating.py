"""`rotating`: a transformation that trains some layers of a stack at a time, in turns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._edit.fresh_state import init_leaves
from freeze_optax._edit.rotation_arguments import (
    at_least_one,
    checked_order,
    fitting_order,
    rotation_of,
)
from freeze_optax._params.apply_updates import apply_updates
from freeze_optax._rows.remembered import remembered_compact
from freeze_optax._rows.rows_by_value import RowsByValue
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._state.context import PlanContext
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.memories import init_in_memory
from freeze_optax._state.plan import Plan
from freeze_optax._state.rotation import RotatingState, Rotation
from freeze_optax._state.shared_buffers import check_ties
from freeze_optax._transform.cohorts import cohort_counters, stack_ages
from freeze_optax._transform.elementwise import check_takes_elements
from freeze_optax._transform.extra_arguments import adapt_extra_arguments
from freeze_optax._transform.freezable import freezable
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._transform.settled_structure import with_settled_structure
from freeze_optax._tree.holes import is_hole, is_placeholder
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies, param_leaves
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable

Order = str | Sequence[Sequence[int]]


def rotating(  # noqa: PLR0913
    inner: optax.GradientTransformation,
    stack: Spec,
    count: int,
    every: int,
    *,
    order: Order = "random",
    key: Any = None,
    frozen: Spec = nothing,
    axis: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains `count` layers of a stack at a time, and other ones after each `every` steps.

    This is block-coordinate training: the gradient and the optimizer state are those of `count`
    layers, so a model fits into the memory of a few layers. All other leaves train as usual, unless
    they are frozen. Which layers train is a value in the state, so one compiled program serves all
    of them. The moments of a layer begin anew with each of its turns, and its step count too.

    The loss hands its layers to `freeze_optax.scan`. Under
    `fo.value_and_grad(loss, frozen=state)` it computes no gradient of a layer that does
    not train, and the backward pass stops at the lowest one that does, if nothing below it trains.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"layers": jnp.ones((4, 2)), "head": jnp.ones(2)}
      >>> def loss(params, x):
      ...     x, _ = fo.scan(lambda x, layer: (x * layer, None), x, params["layers"])
      ...     return (x * params["head"]).sum()
      >>> tx = fo.rotating(optax.sgd(0.5), "layers", count=1, every=1, order="ascending")
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = fo.grad(loss, frozen=state)(params, jnp.ones(2))
      ...     updates, state = tx.update(grads, state, params)
      ...     return fo.apply_updates(params, updates, frozen=state), state
      >>> params, state = step(params, tx.init(params))
      >>> params["layers"][:, 0].tolist(), state.rows.tolist()
      ([0.5, 1.0, 1.0, 1.0], [1])

    Args:
      inner: Any optax transformation whose `init` takes holes for params.
      stack: The leaves that hold the layers: any spec, see `freeze_optax.mask`. All have the same
        length along `axis`, which is the number of layers. Those of them that are frozen, or cannot
        be trained, take no part.
      count: How many layers train at a time.
      every: How many steps they train. A step is one call of `update`.
      order: `"random"`: layers drawn by the key, none that trained just before where there are
        enough others (LISA), so half of the layers alternate with the other half. `"ascending"` and
        `"descending"`: one block after the other, and from the start again (BAdam). Or the blocks,
        a sequence of sequences of `count` layers.
      key: A PRNG key, for a random order alone.
      frozen: What never trains: any spec, see `freeze_optax.mask`.
      axis: The axis of the layers in the leaves of the stack.

    Returns:
      A transformation. Its state, a `RotatingState`, has the fields `step`, `rows` (the layers that
      train now), `key`, and `state`, a `FreezeState` whose leaves of the stack have `count` rows.
      `freeze_optax.freeze`, `thaw` and `set_frozen` change which other leaves train. As a spec, it
      selects what never trains.

      `init` raises ValueError if a spec does not fit the params, if the leaves of the stack differ
      in length, if nothing of the stack trains, or if it has fewer than `count` layers. `update`
      needs the params, and raises as that of `freezable`. It gives an update of whole leaves:
      `freeze_optax.apply_updates` adds only the layers that train.

    Raises:
      TypeError: If `inner` is not a transformation, `count` or `every` is no integer, or `key` is
        missing.
      ValueError: If `count` or `every` is below 1, or the order is not one of these.

    Source: LISA (arXiv 2403.17919), BAdam (arXiv 2404.02827).
    """
    inner = with_settled_structure(as_transformation("rotating", inner))
    count, every = at_least_one("count", count), at_least_one("every", every)
    stored_order = checked_order(order, count, key)
    stack_selector, selector = as_selector(stack), as_selector(frozen)
    tx: Any = freezable(inner)

    def init_fn(params: optax.Params) -> Any:
        step = jnp.zeros((), jnp.int32)
        stored_key = key if stored_order == "random" else ()
        if is_placeholder(params):
            return RotatingState(step, step, stored_key, tx.init(params))
        leaves = param_leaves(params)
        flags = resolve(selector, leaves)
        rotation = rotation_of(leaves, flags, stack_selector.flags(leaves), axis, count, every)
        order = fitting_order(stored_order, rotation.length)
        rotation = dataclasses.replace(rotation, order=order)
        check_ties(leaves, flags)
        rows = rotation.block(step, None, stored_key)
        own = [rotation.rows_of(i, rows) for i in range(len(flags))]
        live = map_copies(lambda copy: _taken(Leaves(copy), own), params)
        live_leaves = param_leaves(live)
        plan = Plan.from_flags(leaves.paths, flags, PlanContext(inner, live, live_leaves))
        check_takes_elements(plan, live)
        plan = _with_cohorts(plan, rotation)
        inner_state = init_in_memory(plan, plan.drop_frozen_params(live, live_leaves), live)
        places = plan.layout.places(inner_state)
        (first,) = cohort_counters(FreezeState(inner_state, (), plan), places)
        ages = stack_ages([first] * max(plan.cohorts, default=0))
        return RotatingState(step, rows, stored_key, FreezeState(inner_state, ages, plan))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if not isinstance(state, RotatingState):
            raise TypeError(
                f"update was given a {type(state).__name__} for its state, not the RotatingState "
                "that init gives; the order is update(gradients, state, params)"
            )
        if params is None:
            raise ValueError(
                "the update of fo.rotating needs the params, as it makes the moments of the next "
                "layers: update(gradients, state, params)"
            )
        rotation, live_params = state.rotation, state.take(params)
        inner_extra = _adapt_extra(extra, state, params)
        live_updates, after = tx.update(
            _live(state, updates), state.state, live_params, **inner_extra
        )
        whole_updates = _whole(state, live_updates, params)
        step: Any = optax.safe_increment(state.step)
        is_over = step % rotation.every == 0
        following = rotation.block(step // rotation.every, state.rows, state.key)
        rows = jnp.where(is_over, following, state.rows)
        new_state = RotatingState(step, rows, state.key, after)
        # Only an `init` that reads values of the params (`optax.contrib.schedule_free`) needs those
        # after the update. XLA leaves this out for all others.
        new_params = new_state.take(apply_updates(params, whole_updates))
        after = _with_fresh_statistics(after, new_params, is_over)
        return whole_updates, RotatingState(step, rows, state.key, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _taken(leaves: Leaves, rows: Sequence[RowsByValue | None]) -> Any:
    pairs = zip(leaves.values, rows, strict=True)
    return leaves.rebuild(x if own is None else own.take(x) for x, own in pairs)


def _with_cohorts(plan: Plan, rotation: Rotation) -> Plan:
    """Returns the plan with a cohort of their own for the layers, as their counters restart."""
    stack, owners = set(rotation.leaves), plan.leaf_of_part
    has_others = any(
        not frozen and owner not in stack for frozen, owner in zip(plan.frozen, owners, strict=True)
    )
    table, cohorts = plan.part_table, list(plan.cohorts)
    if has_others and plan.layout.counters:
        cohorts = [
            1 if owner in stack and not frozen else cohort
            for cohort, owner, frozen in zip(cohorts, owners, plan.frozen, strict=True)
        ]
    return Plan(plan.paths, plan.frozen, tuple(cohorts), plan.context, (), table, rotation)


def _stack_parts(plan: Plan) -> list[bool]:
    """Returns for each part whether it is of the layers that take turns."""
    rotation = plan.rotation
    assert rotation is not None
    return [leaf in rotation.leaves for leaf in plan.leaf_of_part]


def _with_fresh_statistics(old: FreezeState, live_params: Any, begins: jax.Array) -> FreezeState:
    """Returns the inner state, with fresh statistics of the layers if a turn begins.

    They are made at the end of the turn before, not at the first step. There the choice would be in
    the middle of the arithmetic of an update, which LLVM then contracts in another way: the last
    bits would differ from those of layers that are frozen by hand.

    Args:
      old: The inner state.
      live_params: The params, with the layers that train next in place of the stack.
      begins: Whether a turn begins.
    """
    plan, layout = old.plan, old.plan.layout
    in_stack = _stack_parts(plan)
    places = layout.places(old.inner)
    fresh = layout.places(init_leaves(plan, live_params, in_stack))

    def settled(old_value: Any, new_value: Any) -> Any:
        def select(old: Any, new: Any) -> Any:
            new = new.astype(old.dtype) if new.dtype != old.dtype else new
            return jnp.where(begins, new, old)

        value = jax.tree.map(select, unwrap_variable(old_value), unwrap_variable(new_value))
        return rewrap_variable(old_value, value)

    values = list(places)
    for i, (owner, prefix) in enumerate(zip(layout.owners, layout.prefixes, strict=True)):
        # A factor of `freeze_optax.adjust` is for the leaf, whichever layers train. Norms are of
        # the layers.
        if owner >= 0 and in_stack[owner] and prefix not in layout.factors:
            values[i] = settled(places[i], fresh[i])
    own = {
        c for c, mine, f in zip(plan.cohorts, in_stack, plan.frozen, strict=True) if mine and not f
    }
    counters = cohort_counters(old, places)
    for cohort in own if layout.counters else ():
        new = [fresh[i] for i in layout.counters]
        counters[cohort] = [
            settled(unwrap_variable(a), b) for a, b in zip(counters[cohort], new, strict=True)
        ]
    for i, counter in zip(layout.counters, counters[0], strict=True):
        values[i] = rewrap_variable(places[i], unwrap_variable(counter))
    ages = stack_ages(counters[1:])
    return FreezeState(layout.rebuild(values), ages, plan)


def _live(state: RotatingState, gradients: Any) -> Any:
    """Returns gradients with the layers that train now in place of the stack."""
    leaves = state.state.plan.align(gradients, "gradient")

    def live(i: int, gradient: Any) -> Any:
        rows = state.rows_of(i)
        if rows is None or gradient is None or is_hole(gradient):
            return gradient
        compact = remembered_compact(gradient, rows)
        if compact is not None or np.shape(gradient)[rows.axis] != rows.length:
            return gradient if compact is None else compact
        return rows.take(gradient)

    return leaves.rebuild(live(i, x) for i, x in enumerate(leaves.values))


def _whole(state: RotatingState, live_updates: Any, params: Any) -> Any:
    """Returns updates of whole leaves, with -0.0 for the layers that do not train now."""
    plan, like = state.state.plan, param_leaves(params)

    def whole_copy(copy: Any) -> Any:
        leaves = plan.align(copy, "update")
        values = plan.in_plan_order(like, like.values)
        return leaves.rebuild(
            x
            if (rows := state.rows_of(i)) is None or is_hole(x)
            else rows.put_among_zeros(x, -0.0, values[i])
            for i, x in enumerate(leaves.values)
        )

    return map_copies(whole_copy, live_updates)


def _adapt_extra(extra: dict[str, Any], state: RotatingState, params: Any) -> dict[str, Any]:
    """Returns the extra arguments with the layers that train now in place of the stack."""
    plan, reference = state.state.plan, param_leaves(params)
    values = plan.in_plan_order(reference, reference.values)

    def is_like_params(value: Any) -> bool:
        leaves = Leaves(value)
        is_one = jax.tree_util.treedef_is_leaf(leaves.treedef)
        return not is_one and plan.knows_structure(leaves)

    def whole(value: Any) -> Any:
        leaves = Leaves(value)
        return leaves.rebuild(
            x if (rows := state.rows_of(i)) is None or is_hole(x) else rows.put(values[i], x)
            for i, x in enumerate(leaves.values)
        )

    return adapt_extra_arguments(
        extra, is_like_params, lambda _, value: state.take(value), whole, state.take
    )
