"""The first step of an edit: splits the leaves of a state into other parts, if it has to."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._rows.flags import Flag, flag_and, flag_minus, flag_not, flag_or
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Shape, Subset
from freeze_optax._rows.take_put import take_within
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import Place, array_shapes
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.memory import run_on_device
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable


def repartition_state(
    state: FreezeState,
    mask: Sequence[Flag],
    keep_state: bool,
    inner_shapes: Callable[[Plan, list[bool]], Any],
    params: Sequence[Any],
) -> tuple[FreezeState, tuple[bool, ...]]:
    """Splits the leaves of a state into parts that will be frozen, or will train, as a whole.

    What will lose its state is in no part. A part that does not change keeps its buffers.

    Args:
      state: The state.
      mask: The frozen flags of the leaves after the edit.
      keep_state: Whether newly frozen parts keep their state.
      inner_shapes: A function of a plan and of one bool for each of its parts. It returns the inner
        state for the parts with True alone, as shapes.
      params: The leaves of the params, in the plan's order. New parts follow their sharding.

    Returns:
      The state in the new parts, and for each part whether it will be frozen.

    Raises:
      ValueError: If a part has to be split and its statistics cannot be: those of the smaller part
        alone would have another shape than what is taken out of them.
    """
    plan = state.plan
    if plan.part_table is None and not any(isinstance(flag, Subset) for flag in mask):
        return state, tuple(flag is True for flag in mask)
    old_table = plan.part_table or PartTable((i, None) for i in range(len(mask)))
    shapes = list(map(np.shape, params))
    pairs = [
        ((leaf, subset if isinstance(subset, Subset) else None), source)
        for leaf, flag in enumerate(mask)
        for subset, source in _parts_of(leaf, old_table, plan, flag, keep_state, shapes[leaf])
    ]
    table, sources = PartTable(part for part, _ in pairs), [source for _, source in pairs]
    frozen = tuple(
        flag_minus(subset or True, mask[leaf], shapes[leaf]) is False
        for leaf, subset in table.parts
    )
    if table == old_table:
        return state, frozen
    new_plan = Plan(
        plan.paths,
        tuple(source is None or plan.frozen[source] for source in sources),
        tuple(DROPPED if source is None else plan.cohorts[source] for source in sources),
        plan.context,
        part_table=table if any(subset for _, subset in table.parts) else None,
        rotation=plan.rotation,
    )
    statistics, shared = plan.layout.split(state.inner)
    has_state = [cohort != DROPPED for cohort in new_plan.cohorts]
    firsts = {source: part for part, source in reversed(list(enumerate(sources)))}
    expected, _ = new_plan.layout.split(inner_shapes(new_plan, has_state))

    def statistic(place: Place, path: str) -> Any:
        prefix, part = place
        (leaf, subset), source = table.parts[part], sources[part]
        # A part without state takes its container, maybe an NNX Variable, from another part.
        source_part = old_table.by_leaf[leaf][0] if source is None else source
        old_statistics = statistics.get((prefix, source_part), HOLE)
        if source is None:
            return rewrap_variable(old_statistics, HOLE)
        old_subset = old_table.parts[source][1]
        if prefix in plan.layout.scalars:
            # A copy, as no array can be donated twice.
            return old_statistics if firsts[source] == part else _copied(old_statistics)
        if subset is None or old_subset == subset:
            return old_statistics
        shapes = array_shapes(expected[place])
        return _take_statistics(old_statistics, subset, old_subset, shapes, path, params[leaf])

    return FreezeState(new_plan.layout.join(statistic, shared), state.ages, new_plan), frozen


def _parts_of(
    leaf: int, old_table: PartTable, plan: Plan, frozen: Flag, keep_state: bool, shape: Shape
) -> list[tuple[Flag, int | None]]:
    """Returns the new parts of a leaf, each with the index of the old part that has its state."""
    parts: list[tuple[Flag, int | None]] = []
    with_state: Flag = False
    for part in old_table.by_leaf[leaf]:
        if plan.cohorts[part] == DROPPED:
            continue
        subset = old_table.parts[part][1] or True
        with_state = flag_or(with_state, subset, shape)
        parts.append((flag_minus(subset, frozen, shape), part))
        if keep_state or plan.frozen[part]:
            parts.append((flag_and(subset, frozen, shape), part))
    parts.append((flag_minus(flag_not(frozen), with_state, shape), None))
    return [(subset, part) for subset, part in parts if subset is not False] or [(True, None)]


def _copied(statistics: Any) -> Any:
    copied = jax.tree.map(
        lambda x: run_on_device(jnp.copy, x) if isinstance(x, jax.Array) else x,
        unwrap_variable(statistics),
    )
    return rewrap_variable(statistics, copied)


def _take_statistics(
    statistics: Any,
    subset: Subset,
    old_subset: Subset | None,
    expected: Any,
    path: str,
    param: Any,
) -> Any:
    """Returns the statistics of a new part, taken from those of the old part that it is in."""
    if not jax.tree.leaves(statistics):
        return statistics
    shape = np.shape(param)
    if not _can_split(array_shapes(statistics), expected, subset, old_subset, shape):
        before = f"a leaf of shape {shape}" if old_subset is None else repr(old_subset)
        raise ValueError(
            f"{path!r} has {array_shapes(statistics)} for {before}, and {expected} for {subset!r} "
            "of it, so they can't be separated; freeze or thaw all of it at once"
        )
    return rewrap_variable(
        statistics,
        jax.tree.map(
            lambda array: take_within(array, subset, old_subset, param, exact=True),
            unwrap_variable(statistics),
        ),
    )


def _can_split(
    shapes: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
    subset: Subset,
    old_subset: Subset | None,
    shape: tuple[int, ...],
) -> bool:
    """Returns whether the statistics of a smaller part can be taken out of those of a part.

    Args:
      shapes: The shapes of the statistics of the part.
      expected: Those of fresh statistics of the smaller part.
      subset: The smaller part.
      old_subset: The part; None for the whole leaf.
      shape: The shape of the leaf.
    """
    if isinstance(subset, Rows) and isinstance(old_subset, Rows | None):
        # Rows may have statistics of other shapes, with one entry for each row on their axis.
        count = old_subset.count if old_subset else len(subset.mask)
        has_axis = all(len(one) > subset.axis for one in expected)
        return has_axis and shapes == [subset.with_length(one, count) for one in expected]
    of_old = shape if old_subset is None else old_subset.compact_shape(shape)
    of_new = subset.compact_shape(shape)
    return all(one == of_old for one in shapes) and all(one == of_new for one in expected)
