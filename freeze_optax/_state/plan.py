"""`Plan`: what a spec resolved to on the params, as static metadata of the optimizer state."""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import optax

from freeze_optax._former_names import with_present_names
from freeze_optax._rows.flags import Flag
from freeze_optax._rows.parts import PartTable
from freeze_optax._rows.subset import Subset
from freeze_optax._state.context import LeafKind, PlanContext
from freeze_optax._state.layout import Layout
from freeze_optax._state.rotation import Rotation
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import check_unique
from freeze_optax._tree.kinds import rank
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, rewrap_copies
from freeze_optax._tree.messages import path_differences, quoted_list
from freeze_optax._tree.overwritten import OVERWRITE_WITH_GRADIENT, paths_in_params

T = TypeVar("T")

DROPPED = -1
"""The cohort of a leaf that keeps no optimizer state."""


def _reordered(
    paths: Sequence[str | None], values: Sequence[T], wanted_paths: Sequence[str]
) -> list[T]:
    """Returns the values, one for each of `paths`, in the order of `wanted_paths`."""
    by_path = dict(zip(paths, values, strict=True))
    return [by_path[path] for path in wanted_paths]


class Plan:
    """Records which leaves are frozen. `init` or an edit resolves it once; then it is static.

    A plan is part of the tree structure of the state, so `jax.jit` retraces exactly when the plan
    changes. Two plans are equal when their paths, frozen flags, cohorts, parts and schedules are
    equal, and their leaves are of the same kinds (see `PlanContext`).

    Attributes:
      paths: The key path of each leaf of the params.
      frozen: For each part of a leaf, whether it is frozen. A leaf is one part, unless it is
        split.
      cohorts: For each part, the index of the cohort whose counters it uses, or `DROPPED`. A
        frozen part that has a cohort is parked: its state is kept unchanged.
      schedule: Under `scheduled`, pairs of a first step and the frozen flags from that step on.
      part_table: The parts, if a leaf is frozen in part; else None.
      rotation: Under `rotating`, how the layers of the stack take turns; else None.
      context: What the plan shares with other plans of the state.
    """

    rotation: Rotation | None = None  # so that former pickles have it

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        paths: tuple[str, ...],
        frozen: tuple[bool, ...],
        cohorts: tuple[int, ...],
        context: PlanContext | None,
        schedule: tuple[tuple[int, tuple[bool, ...]], ...] = (),
        part_table: PartTable | None = None,
        rotation: Rotation | None = None,
    ):
        self.paths, self.frozen, self.cohorts, self.schedule = paths, frozen, cohorts, schedule
        self.part_table, self.rotation, self._context = part_table, rotation, context
        self._hash: int | None = None
        # True in a tree structure that `optax.tree_map_params` has made.
        self.is_mapped = context is None

    @classmethod
    def unknown(cls) -> "Plan":
        """Returns a plan that copies the first other plan that it is compared with.

        `optax.tree_map_params` calls `init` with a placeholder, which holds nothing of the params,
        and builds its result with the tree structure of the state that `init` returns. That state
        meets the real plan only where the two structures are compared, so it copies the real plan
        there.
        """
        return cls((), (), (), None)

    @classmethod
    def from_flags(
        cls, paths: tuple[str, ...], flags: Sequence[Flag], context: PlanContext
    ) -> "Plan":
        """Returns the plan of a new state, with one cohort."""
        table = PartTable.from_flags(flags)
        frozen = tuple(flag is True for flag in flags)
        cohorts = tuple(DROPPED if flag else 0 for flag in frozen)
        return cls(paths, frozen, cohorts, context, part_table=table)

    def unmapped(self) -> "Plan":
        """Returns the same plan, no longer marked as made by `optax.tree_map_params`."""
        frozen, cohorts, *others, paths = self._key()
        return Plan(paths, frozen, cohorts, self.context, *others)

    def with_frozen(self, frozen: tuple[bool, ...], cohorts: tuple[int, ...]) -> "Plan":
        """Returns a plan with these flags and cohorts, for the same parts and transformation."""
        table, rotation = self.part_table, self.rotation
        return Plan(self.paths, frozen, cohorts, self.context, (), table, rotation)

    @property
    def layout(self) -> Layout:
        """The layout of the inner state."""
        return self.context.layout(self.part_table)

    @functools.cached_property
    def mask(self) -> tuple[Flag, ...]:
        """For each leaf, what is frozen of it."""
        return self.mask_of(self.frozen)

    def mask_of(self, frozen: tuple[bool, ...]) -> tuple[Flag, ...]:
        """Returns what is frozen of each leaf when these parts are frozen."""
        return frozen if self.part_table is None else self.part_table.mask(frozen)

    @property
    def leaf_of_part(self) -> Sequence[int]:
        """For each part, the index of its leaf."""
        table = self.part_table
        return [leaf for leaf, _ in table.parts] if table else range(len(self.paths))

    @property
    def is_unknown(self) -> bool:
        """Whether the plan is still a placeholder, made by `Plan.unknown`."""
        return self._context is None

    @property
    def context(self) -> PlanContext:
        """What the plan shares with other plans of the state."""
        if self._context is None:
            raise ValueError(
                "this FreezeState has no plan; states are made by freezable(...).init(params)"
            )
        return self._context

    @functools.cached_property
    def live(self) -> list[int]:
        """The indices of the cohorts that have a part that trains, in order."""
        pairs = zip(self.cohorts, self.frozen, strict=True)
        return sorted({cohort for cohort, frozen in pairs if not frozen})

    @functools.cached_property
    def parked(self) -> frozenset[int]:
        """The indices of the parts that are frozen and keep their state."""
        pairs = enumerate(zip(self.cohorts, self.frozen, strict=True))
        return frozenset(i for i, (cohort, frozen) in pairs if frozen and cohort != DROPPED)

    def _copy_from(self, other: "Plan") -> None:
        self.paths, self.frozen, self.cohorts = other.paths, other.frozen, other.cohorts
        self.schedule, self.part_table = other.schedule, other.part_table
        self.rotation, self._context = other.rotation, other._context
        for cached in ("live", "parked", "mask"):
            self.__dict__.pop(cached, None)

    def _key(self) -> tuple[Any, ...]:
        parts = (self.schedule, self.part_table, self.rotation)
        return (self.frozen, self.cohorts, *parts, self.paths)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan):
            return NotImplemented
        if self.is_unknown or other.is_unknown:
            unknown, known = (self, other) if self.is_unknown else (other, self)
            unknown._copy_from(known)
            return True
        return (
            hash(self) == hash(other)
            and self._key() == other._key()
            and self.context.is_of_same_kinds(other.context)
        )

    def __hash__(self) -> int:
        if self.is_unknown:
            return 0
        # The hash is kept, because jit hashes the structure of its arguments at every call.
        if self._hash is None:
            self._hash = hash(self._key())
        return self._hash

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hash": None}  # A Python hash is valid in one process only.

    def __setstate__(self, state: dict[str, Any]) -> None:
        former = {"cut": "part_table", "_origin": "_context"}
        self.__dict__.update(with_present_names(state, former))

    def __repr__(self) -> str:
        parked = f", {len(self.parked)} of them parked" if self.parked else ""
        count = sum(not isinstance(flag, bool) for flag in self.mask)
        in_part = f", {count} in part" if count else ""
        frozen_whole = sum(flag is True for flag in self.mask)
        return f"Plan({frozen_whole} of {len(self.paths)} leaves frozen{in_part}{parked})"

    @property
    def leaf_kinds(self) -> Sequence[LeafKind | None]:
        """The kind of each leaf of the params; None where it is not known."""
        return self.context.leaf_kinds or [None] * len(self.paths)

    def drop_frozen(
        self,
        leaves: Leaves,
        numbers: bool = False,
        ranks: Sequence[int | None] | None = None,
        like: Leaves | None = None,
    ) -> Any:
        """Returns the tree with holes for what is frozen.

        Args:
          leaves: The leaves of the tree, in the plan's order.
          numbers: As for `PartTable.split`.
          ranks: As for `PartTable.split`.
          like: As for `PartTable.split`.
        """
        return self.drop_parts(leaves, self.frozen, numbers, ranks, like)

    def drop_frozen_params(self, params: Any, leaves: Leaves) -> Any:
        """Returns the params, in each of their copies, with holes for what is frozen.

        Args:
          params: The params.
          leaves: The leaves of the first copy, which the caller already has.
        """
        copies = (leaves, *map(Leaves, param_copies(params)[1:]))
        return rewrap_copies(params, [self.drop_frozen(copy) for copy in copies])

    def drop_parts(
        self,
        leaves: Leaves,
        dropped: Sequence[bool],
        numbers: bool = False,
        ranks: Sequence[int | None] | None = None,
        like: Leaves | None = None,
    ) -> Any:
        """Returns the tree with holes for some parts.

        Args:
          leaves: The leaves of the tree, in the plan's order.
          dropped: For each part, whether a hole takes its place.
          numbers: As for `PartTable.split`.
          ranks: As for `PartTable.split`.
          like: As for `PartTable.split`.
        """
        if self.part_table is None:
            return leaves.with_holes(dropped)
        return self.part_table.split(leaves, dropped, numbers, ranks, like)

    def flags(self, leaves: Leaves, role: str) -> tuple[Flag, ...]:
        """Returns what is frozen, in the order of `leaves`.

        Args:
          leaves: The leaves of the params, of gradients, or of another tree like the params.
          role: What to call the tree in an error.

        Returns:
          One flag for each leaf.

        Raises:
          ValueError: If the paths differ, naming those that differ; or if a leaf that is frozen in
            part has another number of axes than the params, as its rows are on one of them.
        """
        flags = tuple(self.in_order_of(leaves, self.mask, role, overwritten=False))
        if self.part_table is not None and self.context.leaf_kinds is not None:
            kinds = self.in_order_of(leaves, self.context.leaf_kinds, role, overwritten=())
            columns = zip(leaves.values, flags, kinds, strict=True)
            for i, (leaf, flag, kind) in enumerate(columns):
                if not isinstance(flag, Subset) or not kind:
                    continue
                if rank(leaf) not in (0, kind[0], flag.compact_rank(kind[0])):
                    raise ValueError(
                        f"{flag!r} of {leaves.paths[i]!r} are frozen, of a leaf of {kind[0]} axes, "
                        f"but in the {role} it is of shape {leaf.shape}; where there are axes of "
                        "examples or of models in front, use jax.vmap"
                    )
        return flags

    def in_order_of(
        self, leaves: Leaves, values: Sequence[T], role: str, overwritten: T | None = None
    ) -> Sequence[T]:
        """Returns values for the leaves, in the order of `leaves`.

        Args:
          leaves: As for `flags`.
          values: One value for each leaf, in the plan's order.
          role: As for `flags`.
          overwritten: The value for leaves that their gradient overwrites, which stand beside the
            params. If None, a tree with such leaves does not fit.

        Returns:
          The values, one for each leaf.

        Raises:
          ValueError: As for `flags`.
        """
        if self.knows_structure(leaves):
            return values
        if isinstance(leaves.tree, optax.LookaheadParams):
            copies = [self.in_order_of(Leaves(copy), values, role) for copy in leaves.tree]
            return (*copies[0], *copies[1])
        check_unique(self.paths, role)
        if leaves.paths == self.paths:
            self.context.remember_structure(leaves.treedef)
            return values
        if sorted(leaves.paths) == sorted(self.paths):
            return _reordered(self.paths, values, leaves.paths)
        in_params, paths = paths_in_params(leaves), leaves.paths
        if in_params:
            paths = tuple(path for path in in_params if path is not None)
        if in_params and sorted(paths) == sorted(self.paths):
            if overwritten is not None:
                by_path = dict(zip(self.paths, values, strict=True))
                return [overwritten if x is None else by_path[x] for x in in_params]
            raise ValueError(
                f"the {role} is of all variables, but the optimizer state is of the params alone; "
                "write tx.update(grads['params'], state, variables['params']), as the TrainState "
                f"of Flax does, and take the next {OVERWRITE_WITH_GRADIENT!r} from the gradient"
            )
        raise ValueError(
            f"the {role} and the optimizer state are of different params: "
            + path_differences(paths, self.paths, f"in the {role}", "in the state")
        )

    def in_plan_order(self, leaves: Leaves, values: Sequence[T]) -> list[T]:
        """Returns values for the leaves, in the plan's order.

        Args:
          leaves: The leaves of the same params.
          values: One value for each leaf, in the order of `leaves`.

        Returns:
          The values, one for each leaf.

        Raises:
          ValueError: If the containers differ and two leaves have the same path, naming it.
        """
        if self.knows_structure(leaves):
            return list(values)
        check_unique(self.paths, "params")
        in_params = None if leaves.paths == self.paths else paths_in_params(leaves)
        return _reordered(in_params or leaves.paths, values, self.paths)

    def knows_structure(self, leaves: Leaves) -> bool:
        """Returns whether the structure of a tree is known to be one of the params."""
        return leaves.treedef in self.context.treedefs

    def align(self, tree: Any, role: str) -> Leaves:
        """Returns the leaves of `tree` in the plan's order, None where the tree has None.

        Args:
          tree: Gradients, params, or another tree like the params; a leaf may be a hole or None.
          role: What to call the tree in an error.

        Returns:
          As many leaves as the plan has.

        Raises:
          ValueError: If the tree is of other params, naming the paths that differ; or if it has
            the leaves in another order.
        """
        leaves = Leaves(tree)
        if self.knows_structure(leaves):
            return leaves
        with_none = self._align_with_none(tree)
        if with_none is not None:
            return with_none
        if tuple(self.in_order_of(leaves, self.paths, role)) != self.paths:
            raise ValueError(
                f"the {role} has the leaves of the optimizer state in another order: {role} has "
                f"{quoted_list(leaves.paths)}, the state {quoted_list(self.paths)}"
            )
        return leaves

    def _align_with_none(self, tree: Any) -> Leaves | None:
        """Returns the leaves of a tree that has None at some leaves, or None if it does not fit."""
        # For jax, None is a node without leaves, so a gradient with None at a leaf has another
        # structure. One of the known structures shows where the leaves are.
        for treedef in self.context.treedefs:
            try:
                values = treedef.flatten_up_to(tree)
            except (ValueError, TypeError, AttributeError):
                continue
            if all(x is None or is_hole(x) or jax.tree_util.all_leaves([x]) for x in values):
                return Leaves.with_values(tree, values, treedef, self.paths)
        # The context of an unpickled state has no structures yet.
        leaves = Leaves(tree, stop=lambda x: x is None or is_hole(x))
        has_none = any(x is None for x in leaves.values)
        return leaves if has_none and leaves.paths == self.paths else None
