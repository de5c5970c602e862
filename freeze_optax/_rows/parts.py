"""Leaves in parts: subsets of one leaf that keep separate state."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, final

import jax
import numpy as np
import optax

from freeze_optax._former_names import with_present_names
from freeze_optax._rows.flags import Flag, flag_not, flag_union
from freeze_optax._rows.meshes import MeshAxes
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import below_axes, join, put, take, take_within
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.key_paths import Transparent
from freeze_optax._tree.kinds import rank
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import is_variable_or_box, rewrap_variable, unwrap_variable

Part = tuple[int, Subset | None]
"""The index of a leaf, and which subset of it the part is; None for the whole leaf."""


@final
@jax.tree_util.register_pytree_with_keys_class
class Parts(Transparent):
    """A node that holds subsets of one leaf, in several arrays.

    It takes the place of the leaf in a tree like the params.

    Attributes:
      values: The arrays.
      subsets: For each array, which subset of the leaf it holds. Static.
      mesh_axes: The mesh axes that the axis of the rows is sharded over in the leaf, where they are
        explicit and are to be restored; else None. Static.
    """

    mesh_axes: MeshAxes = None  # so that former pickles have it

    def __init__(
        self, values: Iterable[Any], subsets: tuple[Subset, ...], mesh_axes: MeshAxes = None
    ):
        self.values, self.subsets, self.mesh_axes = tuple(values), subsets, mesh_axes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(with_present_names(state, {"rows": "subsets"}))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keys = [jax.tree_util.SequenceKey(i) for i in range(len(self.values))]
        return list(zip(keys, self.values, strict=True)), (self.subsets, self.mesh_axes)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], values: Iterable[Any]) -> "Parts":
        return cls(values, *static)

    def __repr__(self) -> str:
        pairs = zip(self.subsets, self.values, strict=True)
        return f"Parts({', '.join(f'{subset!r}: {value!r}' for subset, value in pairs)})"


def is_hole_or_parts(x: Any) -> bool:
    """Returns whether `x` takes the place of one leaf of the params, as a hole or `Parts`."""
    return isinstance(x, optax.MaskedNode | Parts)


def join_parts(value: Any, leaf_rank: int | None = None, like: Any = None) -> Any:
    """Returns the subsets in `Parts` as one array, in order, without holes; else `value` itself.

    Args:
      value: `Parts`, or anything else.
      leaf_rank: The number of axes of the leaf, if its arrays may have axes of examples in front.
      like: As for `join`. It is ignored if there are axes in front.
    """
    if not isinstance(value, Parts):
        return value
    pairs = zip(value.subsets, map(unwrap_variable, value.values), strict=True)
    present = [(subset, x) for subset, x in pairs if not is_hole(x)]
    subsets, arrays = [subset for subset, _ in present], [x for _, x in present]
    in_front = axes_in_front_of(arrays[0], subsets[0], leaf_rank)
    if not in_front:
        return join(subsets, arrays, like, value.mesh_axes)
    return below_axes(lambda *arrays: join(subsets, arrays), in_front, *arrays)


def axes_in_front(x: Any, leaf_rank: int | None) -> int:
    """Returns how many axes `x` has more than its leaf, which come first; None is as `x`."""
    return 0 if leaf_rank is None else max(rank(x) - leaf_rank, 0)


def axes_in_front_of(x: Any, subset: Subset, leaf_rank: int | None) -> int:
    """Returns how many axes `x` has more than the compact array of a subset of its leaf."""
    return axes_in_front(x, None if leaf_rank is None else subset.compact_rank(leaf_rank))


@final
class PartTable:
    """Lists the parts of all leaves, in order. It is hashable and immutable.

    Each part has its own statistics. A leaf that is frozen in part has one part for what trains of
    it, and one more part for what was thawed, or parked, at another time. What is in no part keeps
    no state.

    Attributes:
      parts: The parts. Each leaf has at least one.
    """

    def __init__(self, parts: Iterable[Part]):
        self.parts = tuple(parts)
        self._hash = hash(self.parts)

    @classmethod
    def from_flags(cls, flags: Sequence[Flag]) -> "PartTable | None":
        """Returns one part for each leaf, without what is frozen; None if no leaf is split.

        Args:
          flags: For each leaf, whether it is frozen, or which part of it is.
        """
        if not any(isinstance(flag, Subset) for flag in flags):
            return None
        live = [flag_not(flag) for flag in flags]
        return cls((i, flag if isinstance(flag, Subset) else None) for i, flag in enumerate(live))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartTable) and self.parts == other.parts

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return PartTable, (self.parts,)  # A Python hash is valid in one process only.

    @functools.cached_property
    def by_leaf(self) -> list[list[int]]:
        """For each leaf, the indices of its parts."""
        grouped: list[list[int]] = []
        for part, (leaf, _) in enumerate(self.parts):
            if leaf == len(grouped):
                grouped.append([])
            grouped[leaf].append(part)
        return grouped

    def mask(self, frozen: Sequence[bool]) -> tuple[Flag, ...]:
        """Returns what is frozen of each leaf when these parts are frozen."""
        return tuple(
            flag_not(self._union_where(parts, [not frozen[i] for i in parts]))
            for parts in self.by_leaf
        )

    def _union_where(self, parts: list[int], flags: list[bool]) -> Flag:
        """Returns what of one leaf is in a part whose flag is set."""
        # Rows along two axes overlap, so where parts differ in their axes, one of them has
        # elements, which know the shape of the leaf.
        subsets = [self.parts[i][1] for i, flag in zip(parts, flags, strict=True) if flag]
        return flag_union(True if subset is None else subset for subset in subsets)

    def split(
        self,
        leaves: Leaves,
        frozen: Sequence[bool],
        numbers: bool = False,
        ranks: Sequence[int | None] | None = None,
        like: Leaves | None = None,
    ) -> Any:
        """Returns the tree with the leaves split into parts, and holes for the frozen parts.

        Args:
          leaves: The leaves of the params, or of a tree like the params. A leaf that is frozen in
            part may be whole, or only the compact array of what trains.
          frozen: For each part, whether a hole takes its place.
          numbers: Whether a leaf may be a scalar that stands for the whole. It is not split.
          ranks: The number of axes of each leaf of the params, where the leaves of `leaves` may
            have axes of examples in front.
          like: The leaves of the params, whose sharding the parts follow; by default `leaves`.

        Raises:
          ValueError: If a leaf is neither whole nor exactly what trains, naming it.
        """
        mask = self.mask(frozen)
        tree = leaves.rebuild(
            x
            if numbers and not np.ndim(x) and not is_hole(x) and flag is not True
            else self._split_leaf(leaves, i, flag_not(flag), frozen, ranks, like or leaves)
            for i, (x, flag) in enumerate(zip(leaves.values, mask, strict=True))
        )
        if len(self.parts) == len(self.by_leaf):
            return tree
        return parts_of_variables(tree)

    def _split_leaf(
        self,
        leaves: Leaves,
        i: int,
        live: Flag,
        frozen: Sequence[bool],
        ranks: Sequence[int | None] | None,
        like: Leaves,
    ) -> Any:
        x, parts = leaves.values[i], self.by_leaf[i]
        in_front = axes_in_front(x, ranks[i] if ranks else None)
        param = None if in_front else like.values[i]
        values = [
            HOLE
            if frozen[part] or is_hole(x)
            else _take_part(leaves, i, self.parts[part][1], live, in_front, param)
            for part in parts
        ]
        subsets = [self.parts[part][1] for part in parts]
        return Parts(values, tuple(s for s in subsets if s)) if len(parts) > 1 else values[0]

    def group_by_leaf(self, values: Sequence[Any]) -> list[Any]:
        """Returns one value for each leaf from one for each part: `Parts` if it has several."""
        return [
            values[parts[0]]
            if len(parts) == 1
            else Parts(
                (values[i] for i in parts), tuple(s for i in parts if (s := self.parts[i][1]))
            )
            for parts in self.by_leaf
        ]


def parts_of_variables(tree: Any) -> Any:
    """Turns each NNX Variable, or box, that holds `Parts` into `Parts` of Variables or boxes.

    A state has this form, because each part is a separate value there.
    """
    return jax.tree.map(_parts_of_variable, tree, is_leaf=is_variable_or_box)


def _parts_of_variable(x: Any) -> Any:
    if not is_variable_or_box(x):
        return x
    content, *more = Leaves(x, stop=is_hole_or_parts).values
    if more or not isinstance(content, Parts):
        return x
    return Parts((rewrap_variable(x, value) for value in content.values), content.subsets)


def _take_part(
    leaves: Leaves, i: int, subset: Subset | None, live: Flag, in_front: int, param: Any
) -> Any:
    """Returns the compact array of a part, from a leaf that is whole or only what trains."""
    x = leaves.values[i]
    if subset is None:
        return x
    shape = np.shape(x)
    of_leaf = shape[in_front:]
    if subset.fits(of_leaf):
        return below_axes(functools.partial(take, subset=subset, like=param), in_front, x)
    if isinstance(live, Subset) and live.is_compact(of_leaf):
        within = functools.partial(take_within, inner=subset, outer=live, like=param)
        return below_axes(within, in_front, x)
    if isinstance(subset, Rows):
        expected = f"all {len(subset.mask)} rows or the {getattr(live, 'count', 0)} that train"
    else:
        expected = f"a leaf of which {live!r} train"
    is_stacked = subset.fits(shape[1:])
    hint = (
        f"; it has one more axis, of length {shape[0]}, in front: where jax.vmap(tx.init) made the "
        "state, call this under jax.vmap too"
        if is_stacked
        else ""
    )
    raise ValueError(
        f"{leaves.paths[i]!r} is of shape {shape}, but the optimizer state is for {expected}{hint}"
    )


def put_live(leaf: Any, live: Subset, value: Any) -> Any:
    """Returns a leaf with new values in what trains of it.

    Args:
      leaf: An array that is whole, or only what trains.
      live: What trains.
      value: The new values, one array or `Parts`.
    """
    if live.is_compact(leaf.shape):
        return join_parts(value, like=leaf)
    return put(leaf, live, join_parts(value))
