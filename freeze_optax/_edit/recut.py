"""Cutting the leaves of a state into other parts, before an edit of rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._rows.parts import Cut
from freeze_optax._rows.rows import Flag, Rows, both, either, flag_of, invert, minus
from freeze_optax._rows.take_put import take
from freeze_optax._state.freeze_state import FreezeState
from freeze_optax._state.layout import Place, shapes
from freeze_optax._state.plan import DROPPED, Plan
from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.variables import replaced, value_of


def recut(
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
    if plan.cut is None and not any(isinstance(flag, Rows) for flag in mask):
        return state, tuple(flag is True for flag in mask)
    old = plan.cut or Cut((i, None) for i in range(len(mask)))
    pairs = [
        ((leaf, rows if isinstance(rows, Rows) else None), source)
        for leaf, flag in enumerate(mask)
        for rows, source in _parts_of(leaf, old, plan, flag, keep_state)
    ]
    cut, sources = Cut(part for part, _ in pairs), [source for _, source in pairs]
    frozen = tuple(minus(rows or True, mask[leaf]) is False for leaf, rows in cut.parts)
    if cut == old:
        return state, frozen
    new = Plan(
        plan.paths,
        tuple(source is None or plan.frozen[source] for source in sources),
        tuple(DROPPED if source is None else plan.cohorts[source] for source in sources),
        plan.origin,
        cut=cut if any(rows for _, rows in cut.parts) else None,
    )
    statistics, shared = plan.layout.split(state.inner)
    expected, _ = new.layout.split(abstract(new, [cohort != DROPPED for cohort in new.cohorts]))

    def statistic(place: Place, path: str) -> Any:
        prefix, part = place
        (leaf, rows), source = cut.parts[part], sources[part]
        # Even a part without state has one of its leaf beside it, maybe in an NNX Variable.
        beside = old.by_leaf[leaf][0] if source is None else source
        x = statistics.get((prefix, beside), HOLE)
        if source is None:
            return replaced(x, HOLE)
        before = old.parts[source][1]
        return x if before == rows else _carved(x, rows, before, shapes(expected[place]), path)

    return FreezeState(new.layout.join(statistic, shared), state.ages, new), frozen


def _parts_of(
    leaf: int, old: Cut, plan: Plan, frozen: Flag, keep_state: bool
) -> list[tuple[Flag, int | None]]:
    """The new parts of a leaf, each with the old one that has its state."""
    parts: list[tuple[Flag, int | None]] = []
    kept: Flag = False
    for part in old.by_leaf[leaf]:
        if plan.cohorts[part] == DROPPED:
            continue
        rows = old.parts[part][1] or True
        kept = either(kept, rows)
        parts.append((minus(rows, frozen), part))
        if keep_state or plan.frozen[part]:
            parts.append((both(rows, frozen), part))
    parts.append((minus(invert(frozen), kept), None))
    return [(rows, part) for rows, part in parts if rows is not False] or [(True, None)]


def _carved(x: Any, new: Rows | None, old: Rows | None, expected: Any, path: str) -> Any:
    """The statistics of a part, out of those of the rows that it is cut from."""
    if not jax.tree.leaves(x):
        return x
    inside = flag_of(new.mask[old.mask]) if new and old else new
    count = old.count if old else len(new.mask) if new else 0
    # As many rows as there were, and otherwise what init would make for the new ones.
    if not isinstance(inside, Rows) or [(count, *shape[1:]) for shape in expected] != shapes(x):
        raise ValueError(
            f"{path!r} has {shapes(x)} for {count} rows, and {expected} for a part of them, so "
            "they can't be told apart in it; freeze or thaw all of them at once"
        )
    return replaced(x, jax.tree.map(lambda array: take(array, inside), value_of(x)))
