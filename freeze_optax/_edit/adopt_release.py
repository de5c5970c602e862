"""From a plain optimizer's state to ours and back."""

from typing import Any

import jax
import optax

from freeze_optax._edit.fresh_state import abstract_init, init_leaves
from freeze_optax._edit.state_holders import editable_state, replace_state
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.take_put import put_rows
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import CLOCK, COUNTER, Place, array_shapes
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._transform.freezable import ignoring_specs
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.kinds import can_train, number_kind
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import few_clauses
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable


def adopt(tx: optax.GradientTransformation, inner_state: Any, params: Any) -> FreezeState:
    """Takes over the state of the plain optimizer inside `tx`, with everything trainable.

    So a run that began without this library goes on with it, and no moment is lost.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> plain = optax.adam(0.1).init(params)
      >>> opt_state = fo.adopt(fo.freezable(optax.adam(0.1)), plain, params)
      >>> opt_state = fo.freeze(opt_state, params, "encoder")

    Args:
      tx: A `freezable`; what it is to freeze does not count here.
      inner_state: The state of the transformation inside it.
      params: The params that the state is for.

    Returns:
      The `FreezeState`; its arrays are the very ones. Leaves that cannot be trained are frozen.

    Raises:
      TypeError: If `tx` is no `freezable`.
      ValueError: If the state is none of that transformation, naming what differs.
    """
    plan = _plan_for("adopt", tx, params)
    leaves = param_leaves(params)
    frozen = tuple(not can_train(leaf) for leaf in leaves.values)
    plan = Plan.from_flags(plan.paths, frozen, plan.context)
    layout = plan.layout
    places = layout.places(inner_state)
    _check_shapes(plan, places, params)
    pairs = zip(layout.owners, places, strict=True)
    kept = [rewrap_variable(x, HOLE) if owner >= 0 and frozen[owner] else x for owner, x in pairs]
    return FreezeState(layout.rebuild(kept), (), plan)


def release(state: Any, params: Any) -> Any:
    """Gives back the state of the plain optimizer: the inverse of `adopt`.

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
      params: The params that the state is for.

    Returns:
      The same tree with the inner state in its place. Its counters are those of the first cohort,
      as a plain optimizer has one set of them; a leaf without state gets a fresh one.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If it holds several, is of other params, or can't be edited, as it mixes leaves.
    """
    whole = editable_state("release", state)
    plan = whole.plan
    leaves = param_leaves(params)
    plan.flags(leaves, "params")
    table = plan.part_table or PartTable((i, None) for i in range(len(plan.paths)))
    numbers = _numbers(plan, params)
    complete = [
        [(plan.cohorts[i] != DROPPED, table.parts[i][1]) for i in own] == [(True, None)]
        for own in table.by_leaf
    ]
    missing = [number and not done for number, done in zip(numbers, complete, strict=True)]
    uncut = Plan.from_flags(plan.paths, [not flag for flag in missing], plan.context)
    own, shared = plan.layout.split(whole.inner)
    fresh, fresh_shared = own, shared
    if any(missing):
        fresh, fresh_shared = uncut.layout.split(init_leaves(uncut, params, missing))

    def statistic(place: Place, path: str) -> Any:
        prefix, leaf = place
        parts = table.by_leaf[leaf]
        first = own.get((prefix, parts[0]), HOLE)
        if not missing[leaf]:
            return first
        value = fresh[place]
        for part in parts:
            rows = table.parts[part][1]
            if rows and plan.cohorts[part] != DROPPED:
                value = _with_rows(value, rows, own.get((prefix, part), HOLE), path)
        return rewrap_variable(first, value)

    if all(cohort == DROPPED for cohort in plan.cohorts):
        kinds = (owner for owner in uncut.layout.owners if owner in (COUNTER, CLOCK))
        triples = zip(kinds, shared, fresh_shared, strict=True)
        shared = [rewrap_variable(x, new) if kind == COUNTER else x for kind, x, new in triples]
    return replace_state(state, uncut.layout.join(statistic, shared))


def _with_rows(fresh: Any, rows: Rows, x: Any, path: str) -> Any:
    """Fresh statistics of a leaf with those of some rows in their place."""
    if not jax.tree.leaves(x):
        return fresh
    if [(rows.count, *shape[1:]) for shape in array_shapes(fresh)] != array_shapes(x):
        raise ValueError(
            f"{path!r} has {array_shapes(x)} for {rows!r}, which can't be put among the "
            f"other rows of {array_shapes(fresh)}"
        )
    return jax.tree.map(lambda whole, own: put_rows(whole, rows, own), fresh, unwrap_variable(x))


def _numbers(plan: Plan, params: Any) -> list[bool]:
    """For which leaves a plain optimizer keeps state: integers too, but init fails on the rest."""
    leaves = param_leaves(params)
    return plan.in_own_order(leaves, [number_kind(leaf) != "other" for leaf in leaves.values])


def _plan_for(verb: str, tx: optax.GradientTransformation, params: Any) -> Plan:
    with ignoring_specs():
        state = abstract_init(as_transformation(verb, tx).init, params)
    if not isinstance(state, FreezeState):
        raise TypeError(
            f"{verb} takes the transformation that fo.freezable gives, but the state of this one "
            f"is a {type(state).__name__}; pass the freezable itself, not a chain around it"
        )
    return state.plan


def _check_shapes(plan: Plan, places: list[Any], params: Any) -> None:
    wanted = _numbers(plan, params)
    layout = plan.layout
    alone = abstract_init(lambda params: init_leaves(plan, params, wanted), params)
    expected = layout.places(alone)
    rows = zip(layout.paths, layout.owners, places, expected, strict=True)
    odd = [
        f"{path!r} has {array_shapes(x)}, where the params give {array_shapes(new)}"
        for path, owner, x, new in rows
        if owner >= 0 and wanted[owner] and array_shapes(x) != array_shapes(new)
    ]
    if odd:
        raise ValueError(f"the state is of other params: {few_clauses(odd)}")
