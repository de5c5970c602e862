"""The bytes of an optimizer state, in all and for each leaf."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, final

import optax

from freeze_optax._edit.fresh_state import abstract_init
from freeze_optax._edit.state_holders import params_of_state
from freeze_optax._report.counts import total_bytes
from freeze_optax._report.memory import bytes_on_host, is_on_host
from freeze_optax._rows.flags import Flag
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, schedules_in_spec, state_in_spec
from freeze_optax._state.freeze_state import FreezeState, schedules_in, states_in
from freeze_optax._state.plan import DROPPED
from freeze_optax._transform.freezable import freezable, ignoring_specs
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import path_differences
from freeze_optax._tree.overwritten import optimized_params, paths_in_params


class StateBytes(NamedTuple):
    """The bytes of an optimizer state.

    Attributes:
      total: The bytes of the whole state, counters and clocks included.
      by_leaf: The bytes of the statistics of each leaf; None if the state mixes leaves in one
        array.
      host: The bytes of the whole state in host memory.
      host_by_leaf: The bytes of the statistics of each leaf in host memory; 0 if not known.
    """

    total: int
    by_leaf: Sequence[int | None]
    host: int
    host_by_leaf: Sequence[int]

    def spread(self, places: Iterable[int | None]) -> "StateBytes":
        """Returns the same bytes for the leaves of a larger tree.

        Args:
          places: For each leaf of that tree, its place among those of the state; None for a leaf
            that the state has not, which has 0 bytes.
        """
        places = list(places)
        by_leaf = [0 if place is None else self.by_leaf[place] for place in places]
        on_host = [0 if place is None else self.host_by_leaf[place] for place in places]
        return self._replace(by_leaf=by_leaf, host_by_leaf=on_host)


@final
class _Resolved(Selector):
    """A spec that is resolved already.

    The spec itself may read the values of leaves, which do not exist where shapes are traced.
    """

    def __init__(self, flags: Sequence[Flag]):
        self._flags = flags

    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        del leaves
        return self._flags


def state_bytes(
    params: Any, frozen: Spec, flags: Sequence[Flag], optimizer: Any
) -> tuple[StateBytes | None, StateBytes | None]:
    """Returns the bytes of the state with these params frozen, and with nothing frozen.

    Args:
      params: The params, abstract or not.
      frozen: Any spec. If it is a state, or a list of nothing but states, that state is counted.
      flags: The frozen flags of the leaves, to which the spec resolved.
      optimizer: A transformation. If it contains a `freezable`, the spec of that has no effect.
        None if `frozen` is a state: then its own transformation is used.

    Returns:
      The two, each None if not known. That is the case without an optimizer and a state, and if a
      state has lost its transformation in pickling. The second is also None if the optimizer
      refuses to train what is frozen.

    Raises:
      TypeError: If `optimizer` is not a transformation.
      ValueError: If `optimizer` contains several `freezable`s, or the state is not one of it.
    """
    state, leaves = state_in_spec(frozen), param_leaves(params)
    in_params = paths_in_params(leaves)
    if in_params and not (state and state.plan.paths == leaves.paths):
        own = [flag for flag, path in zip(flags, in_params, strict=True) if path is not None]
        found = state_bytes(optimized_params(params), frozen, own, optimizer)
        counter = itertools.count()
        places = [None if path is None else next(counter) for path in in_params]
        present, unfrozen = (x and x.spread(places) for x in found)
        return present, unfrozen
    steps = [schedule.step for schedule in schedules_in_spec(frozen)] if state else []
    if optimizer is None:
        inner, around, unfrozen, live = _inner_of(state), 0, None, params
    else:
        is_stepped = bool(steps)
        inner, around, unfrozen, live = _find_inner(optimizer, params, flags, is_stepped)
    if state is None and inner is None:
        return None, None
    around += total_bytes(steps)
    if state is None:
        now = _bytes_of_new(_abstract_state(inner, live, flags), leaves, around)
    else:
        if optimizer is not None:
            _check_optimizer(inner, params, state, leaves)
        now = _bytes_of_state(state, leaves, around, bytes_on_host(steps))
    if inner is None:
        return now, None
    try:
        unfrozen = unfrozen or _unfrozen(inner, params)
    except ValueError:  # optax.partition without a transformation for the frozen group, say
        return now, None
    return now, _bytes_of_new(unfrozen, leaves, around)


def _inner_of(state: FreezeState | None) -> Any:
    """Returns the transformation inside a state, if there is a state."""
    return state.plan.context.inner if state else None


def _find_inner(
    optimizer: Any, params: Any, flags: Sequence[Flag], is_stepped: bool
) -> tuple[Any, int, FreezeState | None, Any]:
    """Returns the transformation that sees the trainable leaves, and the bytes of state around it.

    If that is the optimizer itself, its state with nothing frozen is returned too. To make this,
    even as shapes, takes most of the time of a summary of a large model. Last come the params as
    that transformation sees them: where layers take turns, without those that do not train.

    Args:
      optimizer: The optimizer.
      params: The params.
      flags: The frozen flags of the leaves.
      is_stepped: Whether to leave out the step of a schedule in it, because a state has its own.
    """
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}, not a transformation; pass one such "
            "as optax.adamw(1e-3)"
        )
    without_specs = _without_specs(optimizer)
    try:
        unfrozen = _unfrozen(without_specs, params)
    except ValueError:
        # It refuses to train what is frozen. With a `freezable` in it, where that is is not known.
        if states_in(_abstract_state(optimizer, params, flags).inner):
            raise
        return optimizer, 0, None, params
    states = states_in(unfrozen.inner)
    if not states:
        return optimizer, 0, unfrozen, params
    if len(states) > 1:
        raise ValueError(
            f"the state of the optimizer holds {len(states)} FreezeStates; pass a transformation "
            "with one freezable in it, or with none"
        )
    complete = abstract_init(without_specs.init, params)
    steps = [schedule.step for schedule in schedules_in(complete)] if is_stepped else []
    around = total_bytes(complete) - total_bytes([states_in(complete), steps])
    return _inner_of(states[0]), around, None, params_of_state(complete, params)


def _unfrozen(inner: Any, params: Any) -> FreezeState:
    """Returns the state that `inner` has if all that can train does, as shapes."""
    with ignoring_specs():
        return abstract_init(freezable(inner).init, params)


def _without_specs(optimizer: Any) -> optax.GradientTransformation:
    """Returns the optimizer with every `freezable` in it freezing nothing."""

    def init(params: Any) -> Any:
        with ignoring_specs():
            return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def _abstract_state(inner: Any, params: Any, flags: Sequence[Flag]) -> FreezeState:
    """Returns the state that `inner` would have with these leaves frozen, as shapes."""
    return abstract_init(freezable(inner, _Resolved(flags)).init, params)


def _check_optimizer(inner: Any, params: Any, state: FreezeState, leaves: Leaves) -> None:
    """Raises ValueError if the state has other leaves than one of the optimizer would have."""
    plan = state.plan
    stateless = plan.mask_of(tuple(cohort == DROPPED for cohort in plan.cohorts))
    expected = _abstract_state(inner, params, plan.in_order_of(leaves, stateless, "params"))
    # Without repeats, because the parts of a leaf that is split by rows have one path.
    state_paths, expected_paths = (
        tuple(dict.fromkeys(Leaves(x.inner).paths)) for x in (state, expected)
    )
    if set(state_paths) != set(expected_paths):
        differences = path_differences(
            state_paths, expected_paths, "in the state", "in one of the optimizer"
        )
        raise ValueError(
            f"the state is not one of the optimizer that was given: {differences}; pass the "
            "optimizer that made the state, or none"
        )


def _bytes_of_new(state: FreezeState, leaves: Leaves, around: int) -> StateBytes:
    """Returns the bytes of a state that `init` would make, and of what is around it.

    Its arrays are abstract, so they do not tell their memory: `init` makes the statistics of each
    leaf in the memory of that leaf.
    """
    by_leaf = _statistics(state, leaves, total_bytes)
    on_host = [
        size if size and is_on_host(leaf) else 0
        for size, leaf in zip(by_leaf, leaves.values, strict=True)
    ]
    return StateBytes(total_bytes(state) + around, by_leaf, sum(on_host), on_host)


def _bytes_of_state(
    state: FreezeState, leaves: Leaves, around: int, around_on_host: int
) -> StateBytes:
    """Returns the bytes of a state and of what is around it, each array in the memory it is in."""
    host = bytes_on_host(state)
    sizes = _statistics(state, leaves, bytes_on_host) if host else [0] * len(leaves.values)
    return StateBytes(
        total_bytes(state) + around,
        _statistics(state, leaves, total_bytes),
        host + around_on_host,
        [size or 0 for size in sizes],
    )


def _statistics(
    state: FreezeState, leaves: Leaves, size_of: Callable[[Any], int]
) -> Sequence[int | None]:
    """Returns the size of the statistics of each leaf; None for all if the state mixes leaves."""
    plan = state.plan
    try:
        statistics, _ = plan.layout.split(state.inner)
    except (
        ValueError,
        TypeError,
    ):  # the state mixes leaves in one array, or its init refuses holes
        return [None] * len(leaves.values)
    sizes = [0] * len(plan.paths)
    for (_, part), value in statistics.items():
        leaf = part if plan.part_table is None else plan.part_table.parts[part][0]
        sizes[leaf] += size_of(value)
    return plan.in_order_of(leaves, sizes, "params")
