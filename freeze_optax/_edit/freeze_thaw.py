"""Freezing and thawing mid-training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from freeze_optax._edit.fresh_state import abstract_init, init_leaves
from freeze_optax._edit.repartition import repartition_state
from freeze_optax._edit.state_holders import editable_state, replace_state
from freeze_optax._edit.transition import apply_transition
from freeze_optax._rows.rows import Flag, flag_minus, flag_or
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._state.plan import Plan
from freeze_optax._state.shared_buffers import TIED, Group, check_group, check_ties
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves


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
        return list(map(flag_or, plan.mask, selected))

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
        return [flag_minus(frozen, a) if b else frozen for frozen, a, b in rows]

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
    leaves = param_leaves(params)
    state.plan.flags(leaves, "params")
    mask = tuple(target(state.plan, leaves))
    if mask == state.plan.mask:
        return tree
    check_mask(state.plan, leaves, mask, state.plan.layout.ties)

    def abstract(plan: Plan, wanted: list[bool]) -> Any:
        return abstract_init(lambda params: init_leaves(plan, params, wanted), params)

    recut_state, frozen = repartition_state(state, mask, keep_state, abstract)
    return replace_state(tree, apply_transition(recut_state, params, frozen, keep_state))


def check_mask(plan: Plan, leaves: Leaves, mask: Sequence[Flag], groups: Iterable[Group]) -> None:
    """Raises where leaves that share a buffer, or are of one of the groups, would part."""
    by_path = dict(zip(plan.paths, mask, strict=True))
    check_ties(leaves, plan.in_order_of(leaves, mask, "params"))
    for group in groups:
        check_group([(path, by_path[path]) for path in group], TIED)
