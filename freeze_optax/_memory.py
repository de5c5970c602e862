"""What an optimizer state takes, and for which leaf."""

from typing import Any, NamedTuple

from freeze_optax._copies import leaves_of
from freeze_optax._edit import abstract_init
from freeze_optax._leaves import Leaves
from freeze_optax._selectors import Spec, planned, schedules_of
from freeze_optax._state import FreezeState, states_in
from freeze_optax._tally import total_bytes
from freeze_optax._transform import freezable


class Memory(NamedTuple):
    """Bytes of optimizer state.

    Attributes:
      total: All of it, counters and clocks too.
      by_leaf: The statistics of each leaf; None where leaves can't be told apart.
    """

    total: int
    by_leaf: list[int | None]


def memories(params: Any, frozen: Spec, optimizer: Any) -> tuple[Memory | None, Memory | None]:
    """The optimizer state of params with these frozen, and with nothing frozen.

    Args:
      params: The params, abstract or not.
      frozen: Any spec. Where it is a state, this is the one.
      optimizer: A transformation: with a `freezable` in it, what that is told to freeze does
        not count. None if `frozen` is a state, whose own transformation is taken then.

    Returns:
      Both, None for what is not known: where there is neither an optimizer nor a state, or a
      state has lost its transformation in pickling.

    Raises:
      TypeError: If the optimizer is none.
      ValueError: If there are several `freezable`s in it.
    """
    state = planned(frozen)
    if optimizer is None:
        steps = [schedule.step for schedule in schedules_of(frozen)]
        inner, around, unfrozen = _inner_of(state), total_bytes(steps), None
    else:
        inner, around, unfrozen = _inside(optimizer, params)
    if state is None and inner is None:
        return None, None
    leaves = leaves_of(params)
    state = state or abstract_init(freezable(inner, frozen).init, params)
    now = _memory(state, leaves, around)
    if inner is None:
        return now, None
    unfrozen = unfrozen or abstract_init(freezable(inner).init, params)
    return now, _memory(unfrozen, leaves, around)


def _inner_of(state: FreezeState | None) -> Any:
    return state.plan.origin.inner if state else None


def _inside(optimizer: Any, params: Any) -> tuple[Any, int, FreezeState | None]:
    """The transformation that sees the trainable leaves, and the bytes of state around it.

    Where that is the optimizer itself, also its state with nothing frozen: to make this, if only
    of shapes, is what a summary of a large model takes its time for.
    """
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}, not a transformation, such as "
            "optax.adamw(1e-3) is"
        )
    unfrozen = abstract_init(freezable(optimizer).init, params)
    states = states_in(unfrozen.inner)
    if not states:
        return optimizer, 0, unfrozen
    if len(states) > 1:
        raise ValueError(
            f"the state of the optimizer holds {len(states)} FreezeStates; pass a transformation "
            "with one freezable in it, or with none"
        )
    whole = abstract_init(optimizer.init, params)
    return _inner_of(states[0]), total_bytes(whole) - total_bytes(states_in(whole)), None


def _memory(state: FreezeState, leaves: Leaves, around: int) -> Memory:
    return Memory(total_bytes(state) + around, _by_leaf(state, leaves))


def _by_leaf(state: FreezeState, leaves: Leaves) -> list[int | None]:
    plan = state.plan
    try:
        statistics, _ = plan.layout.split(state.inner)
    except ValueError:  # a part of the state mixes the leaves
        return [None] * len(leaves.values)
    sizes = [0] * len(plan.paths)
    for (_, part), value in statistics.items():
        sizes[part if plan.cut is None else plan.cut.parts[part][0]] += total_bytes(value)
    if plan.paths == leaves.paths:
        return list(sizes)
    by_path = dict(zip(plan.paths, sizes, strict=True))
    return [by_path[path] for path in leaves.paths]
