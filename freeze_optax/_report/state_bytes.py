"""What an optimizer state takes, and for which leaf."""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import optax

from freeze_optax._edit.fresh_state import abstract_init
from freeze_optax._report.counts import total_bytes
from freeze_optax._rows.rows import Flag
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, schedules_in_spec, state_in_spec
from freeze_optax._state.freeze_state import FreezeState, schedules_in, states_in
from freeze_optax._state.plan import DROPPED
from freeze_optax._transform.freezable import freezable, ignoring_specs
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import path_differences


class StateBytes(NamedTuple):
    """Bytes of optimizer state.

    Attributes:
      total: All of it, counters and clocks too.
      by_leaf: The statistics of each leaf; None where leaves can't be told apart.
    """

    total: int
    by_leaf: list[int | None]


@final
class _Resolved(Selector):
    """What a spec came to: it may read values, which there are none of where shapes are traced."""

    def __init__(self, flags: Sequence[Flag]):
        self._flags = flags

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        del leaves
        return self._flags


def state_bytes(
    params: Any, frozen: Spec, flags: Sequence[Flag], optimizer: Any
) -> tuple[StateBytes | None, StateBytes | None]:
    """The optimizer state of params with these frozen, and with nothing frozen.

    Args:
      params: The params, abstract or not.
      frozen: Any spec. Where it is a state, or a list of nothing else, this is the one.
      flags: What the spec came to, for each leaf.
      optimizer: A transformation: with a `freezable` in it, what that is told to freeze does
        not count. None if `frozen` is a state, whose own transformation is taken then.

    Returns:
      Both, None for what is not known: where there is neither an optimizer nor a state, or a
      state has lost its transformation in pickling.

    Raises:
      TypeError: If the optimizer is none.
      ValueError: If there are several `freezable`s in it, or the state is not one of it.
    """
    state, leaves = state_in_spec(frozen), param_leaves(params)
    steps = [schedule.step for schedule in schedules_in_spec(frozen)] if state else []
    if optimizer is None:
        inner, around, unfrozen = _inner_of(state), 0, None
    else:
        inner, around, unfrozen = _find_inner(optimizer, params, is_stepped=bool(steps))
    if state is None and inner is None:
        return None, None
    if state is None:
        state = _abstract_state(inner, params, flags)
    elif optimizer is not None:
        _check_optimizer(inner, params, state, leaves)
    around += total_bytes(steps)
    now = _state_bytes(state, leaves, around)
    if inner is None:
        return now, None
    unfrozen = unfrozen or abstract_init(freezable(inner).init, params)
    return now, _state_bytes(unfrozen, leaves, around)


def _inner_of(state: FreezeState | None) -> Any:
    return state.plan.context.inner if state else None


def _find_inner(
    optimizer: Any, params: Any, is_stepped: bool
) -> tuple[Any, int, FreezeState | None]:
    """The transformation that sees the trainable leaves, and the bytes of state around it.

    Where that is the optimizer itself, also its state with nothing frozen: to make this, if only
    of shapes, is what a summary of a large model takes its time for.

    Args:
      optimizer: The optimizer.
      params: The params.
      is_stepped: Whether the step of a schedule in it does not count, as a state has its own.
    """
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}, not a transformation, such as "
            "optax.adamw(1e-3) is"
        )
    specless = _without_specs(optimizer)
    unfrozen = abstract_init(freezable(specless).init, params)
    states = states_in(unfrozen.inner)
    if not states:
        return optimizer, 0, unfrozen
    if len(states) > 1:
        raise ValueError(
            f"the state of the optimizer holds {len(states)} FreezeStates; pass a transformation "
            "with one freezable in it, or with none"
        )
    whole = abstract_init(specless.init, params)
    steps = [schedule.step for schedule in schedules_in(whole)] if is_stepped else []
    around = total_bytes(whole) - total_bytes([states_in(whole), steps])
    return _inner_of(states[0]), around, None


def _without_specs(optimizer: Any) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        with ignoring_specs():
            return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def _abstract_state(inner: Any, params: Any, flags: Sequence[Flag]) -> FreezeState:
    return abstract_init(freezable(inner, _Resolved(flags)).init, params)


def _check_optimizer(inner: Any, params: Any, state: FreezeState, leaves: Leaves) -> None:
    plan = state.plan
    stateless = plan.mask_of(tuple(cohort == DROPPED for cohort in plan.cohorts))
    own = _abstract_state(inner, params, plan.in_order_of(leaves, stateless, "params"))
    # Each path once, as a leaf that is cut by rows has one for all of its parts.
    ours, theirs = (tuple(dict.fromkeys(Leaves(x.inner).paths)) for x in (state, own))
    if set(ours) != set(theirs):
        odd = path_differences(ours, theirs, "in the state", "in one of the optimizer")
        raise ValueError(
            f"the state is not one of the optimizer that was given: {odd}; pass the optimizer "
            "that made the state, or none"
        )


def _state_bytes(state: FreezeState, leaves: Leaves, around: int) -> StateBytes:
    return StateBytes(total_bytes(state) + around, _statistics(state, leaves))


def _statistics(state: FreezeState, leaves: Leaves) -> list[int | None]:
    plan = state.plan
    try:
        statistics, _ = plan.layout.split(state.inner)
    except (ValueError, TypeError):  # a part of the state mixes the leaves, or refuses holes
        return [None] * len(leaves.values)
    sizes = [0] * len(plan.paths)
    for (_, part), value in statistics.items():
        sizes[part if plan.part_table is None else plan.part_table.parts[part][0]] += total_bytes(
            value
        )
    return list(plan.in_order_of(leaves, sizes, "params"))
