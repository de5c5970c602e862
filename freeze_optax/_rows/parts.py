"""Leaves cut by rows: which parts of them keep state apart from each other."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, final

import jax
import numpy as np
import optax

from freeze_optax._rows.rows import Flag, Rows, flag_from_vector, flag_not, flag_union
from freeze_optax._rows.take_put import join_rows, put_rows, take_rows
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.key_paths import Transparent
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import is_variable, unwrap_variable

Part = tuple[int, Rows | None]
"""The index of a leaf, and the rows of it, None for all."""


@final
@jax.tree_util.register_pytree_with_keys_class
class Parts(Transparent):
    """Some rows of one leaf, in several arrays: a node where a tree like the params has a leaf.

    Attributes:
      values: The arrays.
      rows: Which rows of the leaf each of them holds. Static.
    """

    def __init__(self, values: Iterable[Any], rows: tuple[Rows, ...]):
        self.values, self.rows = tuple(values), rows

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Rows, ...]]:
        keys = [jax.tree_util.SequenceKey(i) for i in range(len(self.values))]
        return list(zip(keys, self.values, strict=True)), self.rows

    @classmethod
    def tree_unflatten(cls, rows: tuple[Rows, ...], values: Iterable[Any]) -> "Parts":
        return cls(values, rows)

    def __repr__(self) -> str:
        pairs = zip(self.rows, self.values, strict=True)
        return f"Parts({', '.join(f'{rows!r}: {value!r}' for rows, value in pairs)})"


def is_hole_or_parts(x: Any) -> bool:
    """Whether `x` stands for one leaf of the params: a hole, or its parts."""
    return isinstance(x, optax.MaskedNode | Parts)


def join_parts(value: Any) -> Any:
    """The rows that there are, in order, from one array or from parts; holes are passed over."""
    if not isinstance(value, Parts):
        return value
    pairs = zip(value.rows, map(unwrap_variable, value.values), strict=True)
    present = [(rows, x) for rows, x in pairs if not is_hole(x)]
    return join_rows([rows for rows, _ in present], [x for _, x in present])


@final
class PartTable:
    """The parts of all leaves, in order; hashable, and never changes.

    A part has its own statistics: a leaf that is frozen in part has one for the rows that train,
    and one more for rows that were thawed, or parked, at another time. Rows in no part keep
    no state.

    Attributes:
      parts: The parts; each leaf has one at least.
    """

    def __init__(self, parts: Iterable[Part]):
        self.parts = tuple(parts)
        self._hash = hash(self.parts)

    @classmethod
    def from_flags(cls, flags: Sequence[Flag]) -> "PartTable | None":
        """One part for each leaf, without the rows that are frozen; None if there are no such."""
        if not any(isinstance(flag, Rows) for flag in flags):
            return None
        live = [flag_not(flag) for flag in flags]
        return cls((i, rows if isinstance(rows, Rows) else None) for i, rows in enumerate(live))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartTable) and self.parts == other.parts

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return PartTable, (self.parts,)  # Python's hashes are of one process only.

    @functools.cached_property
    def by_leaf(self) -> list[list[int]]:
        """For each leaf the indices of its parts."""
        grouped: list[list[int]] = []
        for part, (leaf, _) in enumerate(self.parts):
            if leaf == len(grouped):
                grouped.append([])
            grouped[leaf].append(part)
        return grouped

    def mask(self, frozen: Sequence[bool]) -> tuple[Flag, ...]:
        """What is frozen of each leaf, when these parts are."""
        return tuple(
            flag_not(self._where(own, [not frozen[i] for i in own])) for own in self.by_leaf
        )

    def _where(self, own: list[int], flags: list[bool]) -> Flag:
        rows = [self.parts[i][1] for i, flag in zip(own, flags, strict=True) if flag]
        return flag_union(True if part is None else part for part in rows)

    def split(self, leaves: Leaves, frozen: Sequence[bool], numbers: bool = False) -> Any:
        """The tree with the parts that are not frozen where it has leaves.

        Args:
          leaves: The leaves of the params, or of a tree like them; where a leaf is frozen in
            part, it may have the rows that train alone.
          frozen: For each part whether it is to be a hole.
          numbers: Whether there may be a number for a leaf, which goes for all its rows.

        Raises:
          ValueError: If a leaf has neither all rows nor those that train, naming it.
        """
        mask = self.mask(frozen)
        triples = zip(leaves.values, self.by_leaf, mask, strict=True)
        tree = leaves.rebuild(
            x
            if numbers and not np.ndim(x) and not is_hole(x) and flag is not True
            else self._split_leaf(x, own, flag_not(flag), frozen, leaves, i)
            for i, (x, own, flag) in enumerate(triples)
        )
        if len(self.parts) == len(self.by_leaf):
            return tree
        return jax.tree.map(_parts_of_variables, tree, is_leaf=is_variable)

    def _split_leaf(
        self, x: Any, own: list[int], live: Flag, frozen: Sequence[bool], leaves: Leaves, i: int
    ) -> Any:
        values = [
            HOLE
            if frozen[part] or is_hole(x)
            else _take_part(x, self.parts[part][1], live, leaves, i)
            for part in own
        ]
        rows = [self.parts[part][1] for part in own]
        return Parts(values, tuple(r for r in rows if r)) if len(own) > 1 else values[0]

    def group_by_leaf(self, values: Sequence[Any]) -> list[Any]:
        """One value for each part, as one for each leaf: `Parts` where there are several."""
        return [
            values[own[0]]
            if len(own) == 1
            else Parts((values[i] for i in own), tuple(r for i in own if (r := self.parts[i][1])))
            for own in self.by_leaf
        ]


def _parts_of_variables(x: Any) -> Any:
    """Parts of which each stands in an NNX Variable, of a Variable in which parts stand.

    So it is in a state, where each part is a thing of its own.
    """
    if not is_variable(x):
        return x
    (inside,) = Leaves(x, stop=is_hole_or_parts).values
    if not isinstance(inside, Parts):
        return x
    return Parts((x.replace(value) for value in inside.values), inside.rows)


def _take_part(x: Any, rows: Rows | None, live: Flag, leaves: Leaves, i: int) -> Any:
    if rows is None:
        return x
    count = x.shape[0] if getattr(x, "shape", ()) else None
    if count == len(rows.mask):
        return take_rows(x, rows)
    if isinstance(live, Rows) and count == live.count:
        inside = flag_from_vector(rows.mask[live.mask])
        return take_rows(x, inside) if isinstance(inside, Rows) else x
    whole = f"of shape {getattr(x, 'shape', ())}"
    of = f"all {len(rows.mask)} rows or the {getattr(live, 'count', 0)} that train"
    raise ValueError(f"{leaves.paths[i]!r} is {whole}, but the optimizer state is for {of}")


def put_live_rows(whole: Any, live: Rows, value: Any) -> Any:
    """A leaf with the rows that train set, or these rows alone where `whole` has no others."""
    rows = join_parts(value)
    return rows if whole.shape[0] == live.count else put_rows(whole, live, rows)
