"""The first step of an edit: splits the leaves of a state into other parts, if rows are edited."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.rows import (
    Flag,
    Rows,
    flag_and,
    flag_from_vector,
    flag_minus,
    flag_not,
    flag_or,
)
from freeze_optax._rows.take_put import take_rows
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import Place, array_shapes
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.variables import rewrap_variable, unwrap_variable


def repartition_state(
    state: FreezeState,
    mask: Sequence[Flag],
    keep_state: bool,
    inner_shapes: Callable[[Plan, list[bool]], Any],
    params: Sequence[Any],
) -> tuple[FreezeState, tuple[bool, ...]]:
    """Splits the leaves of a state into parts that will be frozen, or will train, as a whole.

    Rows that will lose their state are in no part. A part that does not change keeps its buffers.

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
      ValueError: If a part has to be split and its statistics cannot be: those of some rows alone
        would have another shape than the same rows of them have now.
    """
    plan = state.plan
    if plan.part_table is None and not any(isinstance(flag, Rows) for flag in mask):
        return state, tuple(flag is True for flag in mask)
    old_table = plan.part_table or PartTable((i, None) for i in range(len(mask)))
    pairs = [
        ((leaf, rows if isinstance(rows, Rows) else None), source)
        for leaf, flag in enumerate(mask)
        for rows, source in _parts_of(leaf, old_table, plan, flag, keep_state)
    ]
    table, sources = PartTable(part for part, _ in pairs), [source for _, source in pairs]
    frozen = tuple(flag_minus(rows or True, mask[leaf]) is False for leaf, rows in table.parts)
    if table == old_table:
        return state, frozen
    new_plan = Plan(
        plan.paths,
        tuple(source is None or plan.frozen[source] for source in sources),
        tuple(DROPPED if source is None else plan.cohorts[source] for source in sources),
        plan.context,
        part_table=table if any(rows for _, rows in table.parts) else None,
    )
    statistics, shared = plan.layout.split(state.inner)
    has_state = [cohort != DROPPED for cohort in new_plan.cohorts]
    expected, _ = new_plan.layout.split(inner_shapes(new_plan, has_state))

    def statistic(place: Place, path: str) -> Any:
        prefix, part = place
        (leaf, rows), source = table.parts[part], sources[part]
        # A part without state takes its container, maybe an NNX Variable, from another part.
        source_part = old_table.by_leaf[leaf][0] if source is None else source
        old_statistics = statistics.get((prefix, source_part), HOLE)
        if source is None:
            return rewrap_variable(old_statistics, HOLE)
        old_rows = old_table.parts[source][1]
        if old_rows == rows:
            return old_statistics
        shapes = array_shapes(expected[place])
        return _take_statistics(old_statistics, rows, old_rows, shapes, path, params[leaf])

    return FreezeState(new_plan.layout.join(statistic, shared), state.ages, new_plan), frozen


def _parts_of(
    leaf: int, old_table: PartTable, plan: Plan, frozen: Flag, keep_state: bool
) -> list[tuple[Flag, int | None]]:
    """Returns the new parts of a leaf, each with the index of the old part that has its state."""
    parts: list[tuple[Flag, int | None]] = []
    rows_with_state: Flag = False
    for part in old_table.by_leaf[leaf]:
        if plan.cohorts[part] == DROPPED:
            continue
        rows = old_table.parts[part][1] or True
        rows_with_state = flag_or(rows_with_state, rows)
        parts.append((flag_minus(rows, frozen), part))
        if keep_state or plan.frozen[part]:
            parts.append((flag_and(rows, frozen), part))
    parts.append((flag_minus(flag_not(frozen), rows_with_state), None))
    return [(rows, part) for rows, part in parts if rows is not False] or [(True, None)]


def _take_statistics(
    statistics: Any,
    new_rows: Rows | None,
    old_rows: Rows | None,
    expected: Any,
    path: str,
    param: Any,
) -> Any:
    """Returns the statistics of a new part, taken from those of the old part that it is in."""
    if not jax.tree.leaves(statistics):
        return statistics
    rows = flag_from_vector(new_rows.mask[old_rows.mask]) if new_rows and old_rows else new_rows
    count = old_rows.count if old_rows else len(new_rows.mask) if new_rows else 0
    # They can be split if their first axis has the old rows and the rest is as in a fresh state.
    if not isinstance(rows, Rows) or [(count, *shape[1:]) for shape in expected] != array_shapes(
        statistics
    ):
        raise ValueError(
            f"{path!r} has {array_shapes(statistics)} for {count} rows, and {expected} for a part "
            "of them, so its rows can't be separated; freeze or thaw all of them at once"
        )
    return rewrap_variable(
        statistics,
        jax.tree.map(lambda array: take_rows(array, rows, param), unwrap_variable(statistics)),
    )
