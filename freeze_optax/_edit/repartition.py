"""Cutting the leaves of a state into other parts, before an edit of rows."""

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
    abstract: Callable[[Plan, list[bool]], Any],
) -> tuple[FreezeState, tuple[bool, ...]]:
    """The same state in parts of which each will be frozen, or train, as a whole.

    Rows that are to lose their state are in none of them. A part that stays as it was keeps its
    very buffers.

    Args:
      state: The state.
      mask: What is to be frozen of each leaf.
      keep_state: Whether newly frozen parts keep their state.
      abstract: Gives the inner state of a plan for the wanted parts alone, as shapes.

    Returns:
      The state, and for each of its parts whether it is to be frozen.

    Raises:
      ValueError: If statistics of a part that has to be cut can't be told apart by rows, as they
        would be of another shape for these alone.
    """
    plan = state.plan
    if plan.part_table is None and not any(isinstance(flag, Rows) for flag in mask):
        return state, tuple(flag is True for flag in mask)
    old = plan.part_table or PartTable((i, None) for i in range(len(mask)))
    pairs = [
        ((leaf, rows if isinstance(rows, Rows) else None), source)
        for leaf, flag in enumerate(mask)
        for rows, source in _parts_of(leaf, old, plan, flag, keep_state)
    ]
    table, sources = PartTable(part for part, _ in pairs), [source for _, source in pairs]
    frozen = tuple(flag_minus(rows or True, mask[leaf]) is False for leaf, rows in table.parts)
    if table == old:
        return state, frozen
    new = Plan(
        plan.paths,
        tuple(source is None or plan.frozen[source] for source in sources),
        tuple(DROPPED if source is None else plan.cohorts[source] for source in sources),
        plan.context,
        part_table=table if any(rows for _, rows in table.parts) else None,
    )
    statistics, shared = plan.layout.split(state.inner)
    expected, _ = new.layout.split(abstract(new, [cohort != DROPPED for cohort in new.cohorts]))

    def statistic(place: Place, path: str) -> Any:
        prefix, part = place
        (leaf, rows), source = table.parts[part], sources[part]
        # Even a part without state has one of its leaf beside it, maybe in an NNX Variable.
        beside = old.by_leaf[leaf][0] if source is None else source
        x = statistics.get((prefix, beside), HOLE)
        if source is None:
            return rewrap_variable(x, HOLE)
        before = old.parts[source][1]
        return (
            x
            if before == rows
            else _take_statistics(x, rows, before, array_shapes(expected[place]), path)
        )

    return FreezeState(new.layout.join(statistic, shared), state.ages, new), frozen


def _parts_of(
    leaf: int, old: PartTable, plan: Plan, frozen: Flag, keep_state: bool
) -> list[tuple[Flag, int | None]]:
    """The new parts of a leaf, each with the old one that has its state."""
    parts: list[tuple[Flag, int | None]] = []
    kept: Flag = False
    for part in old.by_leaf[leaf]:
        if plan.cohorts[part] == DROPPED:
            continue
        rows = old.parts[part][1] or True
        kept = flag_or(kept, rows)
        parts.append((flag_minus(rows, frozen), part))
        if keep_state or plan.frozen[part]:
            parts.append((flag_and(rows, frozen), part))
    parts.append((flag_minus(flag_not(frozen), kept), None))
    return [(rows, part) for rows, part in parts if rows is not False] or [(True, None)]


def _take_statistics(x: Any, new: Rows | None, old: Rows | None, expected: Any, path: str) -> Any:
    """The statistics of a part, out of those of the rows that it is cut from."""
    if not jax.tree.leaves(x):
        return x
    inside = flag_from_vector(new.mask[old.mask]) if new and old else new
    count = old.count if old else len(new.mask) if new else 0
    # As many rows as there were, and otherwise what init would make for the new ones.
    if not isinstance(inside, Rows) or [(count, *shape[1:]) for shape in expected] != array_shapes(
        x
    ):
        raise ValueError(
            f"{path!r} has {array_shapes(x)} for {count} rows, and {expected} for a part of them, "
            "so they can't be told apart in it; freeze or thaw all of them at once"
        )
    return rewrap_variable(
        x, jax.tree.map(lambda array: take_rows(array, inside), unwrap_variable(x))
    )
