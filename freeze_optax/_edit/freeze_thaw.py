"""Freezing and thawing mid-training."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._transform.cohorts import cohort_counters, stack
from freeze_optax._tree.lookahead import copies_of, leaves_of, like
from freeze_optax._edit.state_holders import editable_state, replace_state
from freeze_optax._tree.leaves import (
    HOLE,
    Leaves,
    can_train,
    is_foreign,
    kind,
    replaced,
    value_of,
)
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._edit.recut import recut
from freeze_optax._rows.rows import Flag, either, minus
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.shared_buffers import TIED, Group, check_group, check_ties

_FRESH = 1 << 30
"""Where the counters of newly made state come from: after all cohorts there are."""


def freeze(state: Any, params: Any, where: Spec, keep_state: bool = False) -> Any:
    """Freezes more leaves, and thaws none; all others keep their very state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.adam(0.1)).init(params)
      >>> opt_state = fo.freeze(opt_state, params, "encoder")
      >>> fo.mask(opt_state, params)
      {'encoder': True, 'head': False}

    Args:
      state: A `FreezeState`, or any tree that holds exactly one: the state of an `optax.chain`, a
        flax `TrainState`.
      params: The params that the state is for.
      where: The leaves to freeze: any spec, see `freeze_optax.mask`. A leaf that is frozen
        already stays as it is, parked or not.
      keep_state: Whether to park the state of these leaves, counters too, for `thaw` to go on
        with, rather than drop it. As `freeze!` of Optimisers.jl, or `requires_grad = False` of
        PyTorch, keeps it.

    Returns:
      The same tree with the state replaced; the tree itself where nothing changes. What `state`
      holds is not copied and does not change.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If it holds several, is of other params, or can't be edited, as it mixes leaves;
        or if a pattern selects nothing.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
    """

    def target(plan: Plan, leaves: Leaves) -> list[Flag]:
        selected = plan.in_own_order(leaves, as_selector(where).flags(leaves))
        return list(map(either, plan.mask, selected))

    return _edit("freeze", state, params, target, keep_state)


def thaw(state: Any, params: Any, where: Spec) -> Any:
    """Trains leaves again: parked state goes on exactly where it stopped, dropped state afresh.

    A leaf without state behaves like one of a fresh optimizer: it counts its own steps, so
    Adam's bias correction does not take it for an old one. Schedules run on for all.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.adam(0.1), "encoder").init(params)
      >>> opt_state = fo.thaw(opt_state, params, "encoder")
      >>> fo.mask(opt_state, params)
      {'encoder': False, 'head': False}

    Args:
      state: A `FreezeState`, or any tree that holds exactly one.
      params: The params that the state is for.
      where: The leaves to train: any spec, see `freeze_optax.mask`. Those that train already
        stay as they are, and those that cannot be trained stay frozen.

    Returns:
      The same tree with the state replaced; the tree itself where nothing changes. New moments
      have the sharding of their parameter. Works inside a jitted function too, for states of the
      transformation that it was traced with, which jit does not compare.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If it holds several, is of other params, or can't be edited, as it mixes leaves;
        or if a pattern selects nothing.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
    """

    def target(plan: Plan, leaves: Leaves) -> list[Flag]:
        selected = plan.in_own_order(leaves, as_selector(where).flags(leaves))
        trainable = plan.in_own_order(leaves, [can_train(leaf) for leaf in leaves.values])
        rows = zip(plan.mask, selected, trainable, strict=True)
        return [minus(frozen, a) if b else frozen for frozen, a, b in rows]

    return _edit("thaw", state, params, target, keep_state=False)


def set_frozen(state: Any, params: Any, frozen: Spec, keep_state: bool = False) -> Any:
    """Freezes exactly these leaves: `freeze` and `thaw` in one.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> opt_state = fo.freezable(optax.adam(0.1), "encoder").init(params)
      >>> opt_state = fo.set_frozen(opt_state, params, "head")
      >>> fo.mask(opt_state, params)
      {'encoder': False, 'head': True}

    Args:
      state: A `FreezeState`, or any tree that holds exactly one.
      params: The params that the state is for.
      frozen: What is to be frozen: any spec, see `freeze_optax.mask`; `Phases.at` gives one.
      keep_state: Whether to park the state of newly frozen leaves rather than drop it.

    Returns:
      The same tree with the state replaced; the tree itself where nothing changes.

    Raises:
      TypeError: If `state` holds no `FreezeState`.
      ValueError: If it holds several, is of other params, or can't be edited, as it mixes leaves;
        or if a pattern selects nothing.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
    """

    def target(plan: Plan, leaves: Leaves) -> list[Flag]:
        return plan.in_own_order(leaves, resolve(frozen, leaves))

    return _edit("set_frozen", state, params, target, keep_state)


def _edit(
    verb: str,
    tree: Any,
    params: Any,
    target: Callable[[Plan, Leaves], list[Flag]],
    keep_state: bool,
) -> Any:
    state = editable_state(verb, tree)
    leaves = leaves_of(params)
    state.plan.flags(leaves, "params")
    mask = tuple(target(state.plan, leaves))
    if mask == state.plan.mask:
        return tree
    check_mask(state.plan, leaves, mask, state.plan.layout.ties)

    def abstract(plan: Plan, wanted: list[bool]) -> Any:
        return abstract_init(lambda params: init_leaves(plan, params, wanted), params)

    recut_state, frozen = recut(state, mask, keep_state, abstract)
    return replace_state(tree, move(recut_state, params, frozen, keep_state))


def move(
    state: FreezeState, params: Any, frozen: tuple[bool, ...], keep_state: bool
) -> FreezeState:
    """The state with other parts frozen."""
    plan = state.plan
    layout = plan.layout
    places = layout.places(state.inner)
    changes = list(zip(plan.cohorts, plan.frozen, frozen, strict=True))
    groups = [_group(*change, keep_state, bool(layout.counters)) for change in changes]
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
            return replaced(places[place], HOLE)
        return replaced(places[place], fresh[place]) if renewed[owner] else places[place]

    moved = [next_at(place, owner) for place, owner in enumerate(layout.owners)]
    counters = dict(enumerate(cohort_counters(state, places)))
    counters[_FRESH] = [fresh[place] for place in layout.counters]
    first, *others = [counters[source] for source, _ in order] or [counters[_FRESH]]
    for place, counter in zip(layout.counters, first, strict=True):
        moved[place] = replaced(places[place], _beside(counter, places[place]))
    ages = stack([[value_of(counter) for counter in row] for row in others])
    pairs = zip(layout.counters, ages, strict=False)
    ages = tuple(replaced(places[place], _beside(age, places[place])) for place, age in pairs)
    return FreezeState(layout.rebuild(moved), ages, plan.edited(frozen, cohorts))


def check_mask(plan: Plan, leaves: Leaves, mask: Sequence[Flag], groups: Iterable[Group]) -> None:
    """Raises where leaves that share a buffer, or are of one of the groups, would part."""
    by_path = dict(zip(plan.paths, mask, strict=True))
    check_ties(leaves, plan.in_order_of(leaves, mask, "params"))
    for group in groups:
        check_group([(path, by_path[path]) for path in group], TIED)


def _group(
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


def init_leaves(plan: Plan, params: Any, wanted: Sequence[bool]) -> Any:
    """The inner state as `init` makes it for the wanted parts alone, in its own containers."""
    copies = copies_of(params)
    rebuilt: list[Any] = []
    for i, containers in enumerate(copies_of(plan.origin.skeleton)):
        given = Leaves(copies[min(i, len(copies) - 1)])
        leaves = Leaves(containers)
        leaves.values = plan.in_own_order(given, given.values)
        rebuilt.append(plan.part(leaves, [not flag for flag in wanted]))
    return plan.origin.init(like(plan.origin.skeleton, rebuilt))


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """The state that `init` would make, as shapes, with its plans."""
    leaves = Leaves(params)
    known = jax.Array | jax.ShapeDtypeStruct
    traced = [
        isinstance(x, known) or (kind(x) != "other" and not is_foreign(x)) for x in leaves.values
    ]

    def of_arrays(arrays: list[Any]) -> Any:
        given = iter(arrays)
        both = zip(leaves.values, traced, strict=True)
        return init(leaves.rebuild(next(given) if flag else x for x, flag in both))

    with warnings.catch_warnings():  # of nothing left to train, which is not settled here
        warnings.simplefilter("ignore")
        return jax.eval_shape(
            of_arrays, [x for x, f in zip(leaves.values, traced, strict=True) if f]
        )


def _beside(new: Any, old: Any) -> Any:
    """A counter on all the devices of another; Orbax stores none of one process among several."""
    new, old = value_of(new), value_of(old)
    if isinstance(new, Tracer) or isinstance(old, Tracer) or not isinstance(old, jax.Array):
        return new
    if len(old.sharding.device_set) == 1:
        return new
    return jax.device_put(new, old.sharding)
