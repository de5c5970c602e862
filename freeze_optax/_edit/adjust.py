"""The edit `adjust`: other factors for some leaves, without a new plan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.flags import Flag, flag_and, flag_minus
from freeze_optax._rows.parts import Parts, is_hole_or_parts
from freeze_optax._select.specs import Spec, as_selector, untrainable
from freeze_optax._state.freeze_state import states_in
from freeze_optax._state.plan import Plan
from freeze_optax._state.rates_state import RatesState, rates_in
from freeze_optax._transform.rates import check_factor
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.memory import memory_of, put_in_memory
from freeze_optax._tree.messages import path_differences, quoted_list
from freeze_optax._tree.node_types import replace_node
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable


def adjust(state: Any, params: Any, where: Spec, factor: Any) -> Any:
    """Sets the factors of these leaves, which `rates` multiplies their updates by.

    Nothing is compiled again, and nothing else in the state changes. It also works inside a jitted
    function, and on a state of `freeze_optax.scheduled`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> tx = fo.freezable(optax.chain(optax.sgd(1.0), fo.rates({"body": 0.1})))
      >>> opt_state = fo.adjust(tx.init(params), params, "body", 0.25)
      >>> updates, opt_state = tx.update(params, opt_state, params)
      >>> updates
      {'body': Array([-0.25], dtype=float32), 'head': Array([-1.], dtype=float32)}

    Args:
      state: An optimizer state, or any tree, with one state of `freeze_optax.rates` in it.
      params: The params that the state belongs to.
      where: The leaves: any spec, see `freeze_optax.mask`. Leaves that cannot be trained have no
        factor, and are left out. A parked leaf keeps the factor until it trains again. Of a leaf in
        parts, select all of it, or all rows of some parts.
      factor: A finite number, 0 or more. It may be traced, and is not checked then. For a state of
        several models (`jax.vmap(tx.init)`) it may be an array with one factor for each.

    Returns:
      The same tree with these factors. All other arrays in it are the same objects.

    Raises:
      TypeError: If `state` holds no state of `rates`, or if `factor` is no number.
      ValueError: If `state` holds several; if it is the state of other params; if no leaf is
        selected; if a selected leaf has no factor, as it is frozen and its state was dropped; if a
        part of a leaf is selected that shares its factor with the rest; or if `factor` is negative,
        not finite, or of another shape. After an error nothing has changed.

    Source: `adjust!` of Optimisers.jl; the `lr` of the parameter groups of PyTorch.
    """
    check_factor(factor, "fo.adjust")
    rates_state = _only_rates(state)
    leaves = param_leaves(params)
    plans = [one.plan for one in states_in(state) if rates_in(one)]
    plan = plans[0] if plans else None
    if plan:
        plan.flags(leaves, "params")
    slots = Leaves(rates_state.factors, stop=is_hole_or_parts)
    index = _places(slots, leaves)
    has_factor = [not is_hole(unwrap_variable(slots.values[slot])) for slot in index]
    flags = _selected(as_selector(where).flags(leaves), leaves, has_factor)
    if all(flag is False for flag in flags):
        raise ValueError(
            f"fo.adjust was given {where!r}, which selects no leaf that can be trained"
        )
    values, missing = list(slots.values), list[str]()
    aliases = _tied_to(plan)
    for i, flag in enumerate(flags):
        if flag is False:
            continue
        path, slot = leaves.paths[i], index[i]
        value, found = _with_factor(
            values[slot], _subsets(plan, leaves, i), flag, leaves, i, factor
        )
        first = aliases.get(path)
        if not found and not (first and flags[leaves.paths.index(first)] is not False):
            missing.append(f"{path} (tied to {first})" if first else path)
        values[slot] = value
    if missing:
        raise ValueError(
            f"fo.adjust was given {quoted_list(missing)}, which has no factor in the state: such a "
            "leaf is frozen and its state was dropped, or it is another optimizer's. Leave it out; "
            "when it is thawed it gets the factor of its rule, which adjust can change then"
        )
    return replace_node(RatesState, state, RatesState(slots.rebuild(values)))


def _only_rates(state: Any) -> RatesState:
    """Returns the one state of `rates` in a tree; raises if there is none, or several."""
    found = rates_in(state)
    if not found:
        raise TypeError(
            f"fo.adjust was given a {type(state).__name__} for its state, in which no state of "
            "fo.rates is; put fo.rates({}) at the end of the chain: "
            "fo.freezable(optax.chain(optimizer, fo.rates({})), frozen)"
        )
    if len(found) > 1:
        raise ValueError(
            f"fo.adjust was given a {type(state).__name__} with {len(found)} states of fo.rates, "
            "so which factor is meant is not known; adjust one of their states alone, and put the "
            "result in its place"
        )
    return found[0]


def _places(slots: Leaves, leaves: Leaves) -> list[int]:
    """Returns for each leaf of the params the index of its factor; raises for other params."""
    if slots.paths == leaves.paths:
        return list(range(len(leaves.paths)))
    place = {path: i for i, path in enumerate(slots.paths)}
    if sorted(slots.paths) != sorted(leaves.paths):
        raise ValueError(
            "the params and the factors in the optimizer state are of different params: "
            + path_differences(leaves.paths, slots.paths, "in the params", "in the state")
        )
    return [place[path] for path in leaves.paths]


def _selected(flags: Any, leaves: Leaves, has_factor: list[bool]) -> list[Flag]:
    """Returns the flags without the leaves that can't be trained.

    The scale of a quantized node is one of these, unless the state trains it.
    """
    triples = zip(flags, untrainable(leaves), has_factor, strict=True)
    return [False if never is True and not has else flag for flag, never, has in triples]


def _tied_to(plan: Plan | None) -> dict[str, str]:
    """Returns for each leaf that `tie` trains as another one the path of that one."""
    groups = plan.layout.ties if plan else ()
    order = {path: i for i, path in enumerate(plan.paths if plan else ())}
    firsts = {path: min(group, key=lambda p: order[p]) for group in groups for path in group}
    return {path: first for path, first in firsts.items() if path != first}


def _subsets(plan: Plan | None, leaves: Leaves, i: int) -> list[Flag]:
    """Returns which subset of leaf `i` each of its parts is; True for all of it."""
    if plan is None or plan.part_table is None:
        return [True]
    leaf = plan.paths.index(leaves.paths[i]) if plan.paths != leaves.paths else i
    table = plan.part_table
    return [table.parts[part][1] or True for part in table.by_leaf[leaf]]


def _with_factor(
    slot: Any, subsets: list[Flag], flag: Flag, leaves: Leaves, i: int, factor: Any
) -> tuple[Any, bool]:
    """Returns the factors of a leaf with those of the selected parts set, and whether one is."""
    shape = np.shape(leaves.values[i])
    values = list(slot.values) if isinstance(slot, Parts) else [slot]
    is_set = False
    for part, (value, subset) in enumerate(zip(values, subsets, strict=True)):
        if flag_and(subset, flag, shape) is False or is_hole(unwrap_variable(value)):
            continue
        if flag_minus(subset, flag, shape) is not False:
            of_leaf = f"{subset!r} of it" if subset is not True else "it"
            raise ValueError(
                f"fo.adjust was given {flag!r} of {leaves.paths[i]!r}, but all of {of_leaf} has "
                "one factor; select all of that"
            )
        old = unwrap_variable(value)
        if np.shape(factor) not in ((), old.shape):
            raise ValueError(
                f"fo.adjust was given factors of shape {np.shape(factor)}, but the state has "
                f"factors of shape {old.shape} for {leaves.paths[i]!r}; give one number, or an "
                "array with one for each model of a state that jax.vmap(tx.init) made"
            )
        values[part] = rewrap_variable(value, _like(old, factor))
        is_set = True
    return (Parts(values, slot.subsets) if isinstance(slot, Parts) else values[0]), is_set


def _like(old: Any, factor: Any) -> Any:
    """Returns a factor as an array that takes the place of another without a retrace."""
    if isinstance(old, Tracer) or isinstance(factor, Tracer):
        value = jnp.broadcast_to(jnp.asarray(factor, old.dtype), old.shape)
        return put_in_memory(value, memory_of(old))
    # Made anew for each leaf, because no array can be donated twice: `device_put` shares the buffer
    # of a NumPy array, which may be the caller's.
    value = np.full(old.shape, factor, old.dtype)
    if not isinstance(old, jax.Array):
        return value if isinstance(old, np.ndarray) else old
    # Committed as the old one: where only the sharding differs, jit would compile again.
    return jax.device_put(value, old.sharding) if old.committed else jnp.array(value)
