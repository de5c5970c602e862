"""The edits `freeze`, `thaw` and `set_frozen`, for use in the middle of training.

The three share their arguments and their errors. The docstring of `freeze` describes them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from freeze_optax._edit.fresh_state import abstract_init, check_batch_axis, init_leaves
from freeze_optax._edit.repartition import repartition_state
from freeze_optax._edit.repeated_edit import repeated_edit
from freeze_optax._edit.state_holders import editable_state, params_of_state, replace_state
from freeze_optax._edit.transition import apply_transition
from freeze_optax._rows.flags import Flag, combine_flags, flag_minus, flag_or
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._select.untrainable import can_thaw
from freeze_optax._state.plan import Plan
from freeze_optax._state.shared_buffers import TIED, Group, check_group, check_ties
from freeze_optax._transform.elementwise import check_takes_elements
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import quoted_list


def freeze(state: Any, params: Any, where: Spec, keep_state: bool = False) -> Any:
    """Freezes more leaves of a state, and thaws none.

    All other leaves keep the same buffers of state.

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
      params: The params that the state belongs to.
      where: The leaves to freeze: any spec, see `freeze_optax.mask`. A leaf that is frozen
        already does not change, and its state stays parked if it is parked.
      keep_state: If False, the state of these leaves is dropped. If True, it is parked: it stays
        in the state unchanged, step counters included, until `thaw` continues with it. `freeze!`
        of Optimisers.jl and `requires_grad = False` of PyTorch keep it in the same way. If what is
        parked already is in another memory (`freeze_optax.place_state`), it goes there too.

    Returns:
      The same tree with its `FreezeState` replaced, or `state` itself if nothing changes. The
      input `state` is not modified, and arrays of leaves that the edit does not affect are not
      copied.

    Raises:
      TypeError: If `state` holds no `FreezeState`, or a mask holds anything but bools.
      ValueError: If `state` holds several `FreezeState`s; if it is the state of other params; if
        it cannot be edited, because it is one of `scheduled`, or because its transformation mixes
        leaves in one array or refuses holes at `init`; if a pattern selects nothing; or if one
        of two leaves that share a buffer would be frozen and the other not.
      IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
    """

    def target(plan: Plan, leaves: Leaves, selector: Selector) -> list[Flag]:
        selected = plan.in_plan_order(leaves, selector.flags(leaves))
        values = plan.in_plan_order(leaves, leaves.values)
        return combine_flags(flag_or, plan.mask, selected, values)

    return _edit("freeze", state, params, where, target, keep_state)


def thaw(state: Any, params: Any, where: Spec) -> Any:
    """Trains leaves again, with their parked state or with fresh state.

    Parked state continues exactly where it stopped. A leaf whose state was dropped behaves like a
    leaf of a fresh optimizer: it has a step count of its own, so Adam's bias correction starts
    anew for it. Schedules run on for all leaves.

    `thaw` also works inside a jitted function. There it uses the transformation that the state had
    when jit traced the function. jit does not compare transformations, so pass only states of
    that one.

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
      state: As for `freeze`.
      params: As for `freeze`.
      where: The leaves to train: any spec, see `freeze_optax.mask`. Leaves that train already do
        not change. Leaves that cannot be trained stay frozen.

    Returns:
      As for `freeze`. New moments have the sharding of their parameter. They are in the memory (of
      the device, or `pinned_host`) of the moments that train already, or, if none do, of their
      parameter. Parked moments that train again move to that memory.

    Raises:
      TypeError, ValueError, IndexError: As for `freeze`.
    """

    def target(plan: Plan, leaves: Leaves, selector: Selector) -> list[Flag]:
        flags = selector.flags(leaves)
        selected = plan.in_plan_order(leaves, flags)
        trainable = plan.in_plan_order(leaves, can_thaw(flags, leaves))
        values = plan.in_plan_order(leaves, leaves.values)
        thawed = combine_flags(flag_minus, plan.mask, selected, values)
        triples = zip(plan.mask, thawed, trainable, strict=True)
        return [after if can_be_trained else frozen for frozen, after, can_be_trained in triples]

    return _edit("thaw", state, params, where, target, keep_state=False)


def set_frozen(state: Any, params: Any, frozen: Spec, keep_state: bool = False) -> Any:
    """Freezes exactly these leaves and trains all others: `freeze` and `thaw` in one call.

    Leaves that cannot be trained stay frozen.

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
      state: As for `freeze`.
      params: As for `freeze`.
      frozen: The leaves that are frozen afterwards: any spec, see `freeze_optax.mask`.
        `Phases.at` gives one.
      keep_state: As for `freeze`, for the leaves that this call freezes.

    Returns:
      As for `freeze`, and for `thaw` where a leaf trains again.

    Raises:
      TypeError, ValueError, IndexError: As for `freeze`.
    """

    def target(plan: Plan, leaves: Leaves, selector: Selector) -> list[Flag]:
        return plan.in_plan_order(leaves, resolve(selector, leaves))

    return _edit("set_frozen", state, params, frozen, target, keep_state)


def _edit(
    verb: str,
    tree: Any,
    params: Any,
    spec: Spec,
    target: Callable[[Plan, Leaves, Selector], list[Flag]],
    keep_state: bool,
) -> Any:
    """Edits the one state in a tree; `target` gives the frozen flags of its leaves afterwards."""
    state, selector = editable_state(verb, tree), as_selector(spec)
    repeated = repeated_edit(verb, selector, state.plan, params)
    if repeated is not None and repeated.keeps_plan():
        return tree
    params = params_of_state(tree, params)
    leaves = param_leaves(params)
    state.plan.flags(leaves, "params")
    mask = tuple(target(state.plan, leaves, selector))
    if mask == state.plan.mask:
        if repeated is not None:
            repeated.remember()
        return tree
    _check_rotation(verb, state.plan, mask)
    check_mask(state.plan, leaves, mask, state.plan.layout.ties)
    check_batch_axis(state, params)

    def inner_shapes(plan: Plan, wanted: list[bool]) -> Any:
        return abstract_init(lambda params: init_leaves(plan, params, wanted), params)

    in_plan_order = state.plan.in_plan_order(leaves, leaves.values)
    repartitioned, frozen = repartition_state(state, mask, keep_state, inner_shapes, in_plan_order)
    if repartitioned is not state:
        check_takes_elements(repartitioned.plan, params)
    return replace_state(tree, apply_transition(repartitioned, params, frozen, keep_state))


def _check_rotation(verb: str, plan: Plan, mask: Sequence[Flag]) -> None:
    """Raises ValueError if an edit changes what of a stack trains whose layers take turns."""
    stack = plan.rotation.leaves if plan.rotation else ()
    changed = [plan.paths[i] for i in stack if mask[i] is not False]
    if changed:
        raise ValueError(
            f"{verb} would freeze {quoted_list(changed)}, but the layers of that stack take turns "
            "(fo.rotating); name what is frozen of it in fo.rotating(…, frozen=…), and leave it "
            "out here"
        )


def check_mask(plan: Plan, leaves: Leaves, mask: Sequence[Flag], groups: Iterable[Group]) -> None:
    """Raises if leaves of one shared buffer or one tied group are not frozen alike."""
    by_path = dict(zip(plan.paths, mask, strict=True))
    check_ties(leaves, plan.in_order_of(leaves, mask, "params", overwritten=False))
    for group in groups:
        check_group([(path, by_path[path]) for path in group], TIED)
