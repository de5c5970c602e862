"""Cutting the leaves of a state into other parts, before an edit of rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from freeze_optax._cut import Cut, Part
from freeze_optax._layout import ABSENT, Layout, shapes
from freeze_optax._leaves import HOLE, replaced
from freeze_optax._plan import DROPPED, Plan
from freeze_optax._rows import Flag, Rows, both, either, flag_of, invert, minus, take
from freeze_optax._state import FreezeState


def recut(
    state: FreezeState, leaf_shapes: Sequence[Any], mask: Sequence[Flag], keep_state: bool
) -> tuple[FreezeState, tuple[bool, ...]]:
    """The same state in parts of which each will be frozen, or train, as a whole.

    Rows that are to lose their state are in none of them. A part that stays as it was keeps its
    very buffers.

    Args:
      state: The state.
      leaf_shapes: The shape of each leaf of the params.
      mask: What is to be frozen of each leaf.
      keep_state: Whether newly frozen parts keep their state.

    Returns:
      The state, and for each of its parts whether it is to be frozen.

    Raises:
      ValueError: If statistics of a part that has to be cut have not its shape, so that they
        can't be told apart by rows.
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
    inner = _carried(state, new, old, cut, sources, leaf_shapes)
    return FreezeState(inner, state.ages, new), frozen


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


def _carried(
    state: FreezeState,
    new: Plan,
    old: Cut,
    cut: Cut,
    sources: list[int | None],
    leaf_shapes: Sequence[Any],
) -> Any:
    before, after = state.plan.layout, new.layout
    places = before.places(state.inner)
    at = {(before.prefixes[i], owner): x for i, (owner, x) in _owned(before, places)}
    shared = (x for owner, x in zip(before.owners, places, strict=True) if ABSENT < owner < 0)

    def value_at(place: int, owner: int) -> Any:
        if owner == ABSENT:
            return HOLE
        if owner < 0:
            return next(shared)
        (leaf, rows), source = cut.parts[owner], sources[owner]
        # Even a part without state has one of its leaf beside it, maybe in an NNX Variable.
        beside = old.by_leaf[leaf][0] if source is None else source
        x = at.get((after.prefixes[place], beside), HOLE)
        if source is None:
            return replaced(x, HOLE)
        return _carved(x, (leaf, rows), old.parts[source][1], leaf_shapes[leaf], after.paths[place])

    return after.rebuild([value_at(place, owner) for place, owner in enumerate(after.owners)])


def _owned(layout: Layout, places: list[Any]) -> Iterator[tuple[int, tuple[int, Any]]]:
    pairs = zip(layout.owners, places, strict=True)
    return ((i, pair) for i, pair in enumerate(pairs) if pair[0] >= 0)


def _carved(x: Any, part: Part, rows: Rows | None, shape: tuple[int, ...], path: str) -> Any:
    """The statistics of a part, out of those of the rows that it was cut from."""
    _, new = part
    if new is None or new == rows or not jax.tree.leaves(x):
        return x
    count = rows.count if rows else shape[0]
    if shapes(x) != [(count, *shape[1:])]:
        raise ValueError(
            f"{path!r} has {shapes(x)} for {count} rows of shape {shape[1:]}, which can't be told "
            "apart by rows; freeze or thaw all of them at once"
        )
    inside = flag_of(new.mask[rows.mask]) if rows else new
    (array,) = jax.tree.leaves(x)
    return replaced(x, take(array, inside) if isinstance(inside, Rows) else array)
