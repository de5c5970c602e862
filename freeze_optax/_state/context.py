"""`PlanContext`: what the plans of one optimizer state share."""

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

from freeze_optax._rows.parts import PartTable, parts_of_variables
from freeze_optax._state.layout import Layout
from freeze_optax._state.tracers import holds_tracers
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.kinds import number_kind, rank
from freeze_optax._tree.leaves import Leaves, refusing_node
from freeze_optax._tree.lookahead import map_copies, param_leaves
from freeze_optax._tree.variables import tree_of_holes

_MOST_REMEMBERED = 8
"""The largest number of layouts, and of structures, that a context keeps."""


LeafKind = tuple[int, str]
"""The number of axes of a leaf, and the kind of numbers that it holds, see `number_kind`."""


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_hole)


class PlanContext:
    """Holds what the plans of one optimizer state share, from `init` through all edits.

    Plans are hashed without it, and of all that it holds only the kinds of the leaves are compared.

    Args:
      inner: The wrapped transformation.
      params: The params that `init` was called with.
      leaves: The leaves of the first copy of the params.

    Attributes:
      inner: The wrapped transformation. Edits need it, as their only other source is the state.
        Under `optax.inject_hyperparams` each trace makes a new one, which holds tracers, so
        `update` passes on the one that `init` was given. It is None after unpickling.
      treedefs: The known structures of params and gradients.
      leaf_kinds: The kind of each leaf of the params, None for a hole. Gradients alone do not show
        it, as they may have axes of examples in front. Shapes are not kept: under `jax.shard_map`
        the leaves of one state have other lengths than outside. In a pickle of version 0.1.0 it is
        missing.
    """

    leaf_kinds: tuple[LeafKind | None, ...] | None = None
    _masks: Mapping[Hashable, tuple[Any, Any]] = types.MappingProxyType({})

    def __init__(self, inner: Any, params: Any, leaves: Leaves):
        self.inner: optax.GradientTransformationExtraArgs | None = inner
        self._params = leaves.treedef if params is leaves.tree else _structure(params)
        self._count = len(leaves.values)
        self.treedefs: list[Any] = [leaves.treedef]
        self._layouts: dict[PartTable | None, Layout] = {}
        self.leaf_kinds = tuple(
            None if is_hole(x) else (rank(x), number_kind(x)) for x in leaves.values
        )

    def is_of_same_kinds(self, other: "PlanContext") -> bool:
        """Returns whether the leaves are of the kinds of those of another state, where known."""
        ours, theirs = self.leaf_kinds, other.leaf_kinds
        if ours is theirs or ours is None or theirs is None or ours == theirs:
            return True
        pairs = zip(ours, theirs, strict=True)
        return all(a is None or b is None or a == b for a, b in pairs)

    @functools.cached_property
    def skeleton(self) -> Any:
        """The params that `init` was given, with a hole for each leaf; only edits use it."""
        treedef = self._params
        holes = [HOLE] * treedef.num_leaves
        try:
            return tree_of_holes(jax.tree.unflatten(treedef, holes))
        except Exception as error:
            node, *_ = refusing_node(treedef, holes)
            raise ValueError(
                f"the params can't be edited: a {node.__name__} in them refuses a hole "
                "(optax.MaskedNode) in place of an array; jax asks that `tree_unflatten` accept "
                f"any object, so let it check arrays alone: {error}"
            ) from error

    @property
    def init(self) -> Callable[[Any], Any]:
        """The function that makes the inner state for params with holes."""
        if self.inner is None:
            raise ValueError(
                "this state was unpickled without its transformation, which pickle can't store, or "
                "returned by a program that jax.export loaded; "
                "run an update before you edit the state (outside of jit, if "
                "optax.inject_hyperparams makes the freezable), or store the state with "
                "fo.export_state instead of pickle"
            )
        return self.inner.init

    def layout(self, table: PartTable | None) -> Layout:
        """Returns the layout of the inner state, made when it is first needed.

        An edit needs it, and so does a second cohort.

        Args:
          table: The parts of the leaves; None if no leaf is frozen by rows.

        Raises:
          ValueError: If the state can't be edited.
        """
        if table not in self._layouts:
            init = self.init
            if len(param_leaves(self.skeleton).values) != self._count:
                raise ValueError(
                    "the state of params with a tree in an NNX Variable can't be edited, nor "
                    "follow phases; make a Variable of each array"
                )
            self._layouts[table] = Layout(init, self._skeleton_of_parts(table))
            # Each edit may choose new rows, whose layouts are then never needed again.
            for old in list(self._layouts)[:-_MOST_REMEMBERED]:
                del self._layouts[old]
        return self._layouts[table]

    def _skeleton_of_parts(self, table: PartTable | None) -> Any:
        if table is None:
            return self.skeleton
        holes = table.group_by_leaf([HOLE] * len(table.parts))
        return map_copies(
            lambda copy: parts_of_variables(Leaves(copy).rebuild(holes)), self.skeleton
        )

    def remember_structure(self, treedef: Any) -> None:
        """Keeps the structure of a tree with the same paths in other containers.

        A FrozenDict or an `nnx.State` is such a tree. As the structure is kept, a training loop
        compares the texts of the paths once. Only the last few structures are kept: where a static
        field of the params changes at each step, the structure changes too.
        """
        treedefs = [*self.treedefs, treedef]
        del treedefs[1 : 1 - _MOST_REMEMBERED]
        # One assignment, as another thread may be iterating over the list.
        self.treedefs = treedefs

    def remember_mask(self, edit: Hashable, params: Any, mask: Any) -> None:
        """Keeps what an edit came to, for a loop that repeats it in each step.

        Args:
          edit: What tells the edit from others.
          params: What it depends on beside that. It is compared, and not hashed.
          mask: What is frozen of each leaf afterwards.
        """
        masks = {**self._masks, edit: (params, mask)}
        for old in list(masks)[:-_MOST_REMEMBERED]:
            del masks[old]
        # One assignment, as in `remember_structure`.
        self._masks = masks

    def known_mask(self, edit: Hashable, params: Any) -> Any:
        """Returns what an edit came to, or None if that is not known."""
        known, mask = self._masks.get(edit, (None, None))
        return mask if known == params else None

    def recover_inner(self, inner: Any, params: Any, leaves: Leaves) -> None:
        """Restores what pickle could not store, from the transformation that updates the state.

        Args:
          inner: The transformation. It is not kept if it holds tracers.
          params: The params, or the gradients.
          leaves: The leaves of the first copy of `params`.
        """
        if self.inner is None and not holds_tracers(inner):
            self.inner, self._count = inner, len(leaves.values)
            self._params = leaves.treedef if params is leaves.tree else _structure(params)

    @classmethod
    def without_transformation(
        cls, leaf_kinds: tuple[LeafKind | None, ...] | None
    ) -> "PlanContext":
        """Returns the context of a state that was stored, which `recover_inner` completes."""
        context = cls.__new__(cls)
        vars(context).update(_stored_fields(leaf_kinds))
        return context

    def __getstate__(self) -> dict[str, Any]:
        return _stored_fields(self.leaf_kinds)


def _stored_fields(leaf_kinds: tuple[LeafKind | None, ...] | None) -> dict[str, Any]:
    # Transformations are made of closures, which can't be stored.
    without_inner: dict[str, Any] = {"inner": None, "_params": None, "treedefs": []}
    return {**without_inner, "_layouts": {}, "_count": 0, "leaf_kinds": leaf_kinds}
