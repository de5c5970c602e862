"""What the plans of one optimizer state share, and no comparison reads."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from freeze_optax._rows.parts import PartTable
from freeze_optax._state.layout import Layout
from freeze_optax._state.tracers import holds_tracers
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import map_copies, param_leaves
from freeze_optax._tree.variables import tree_of_holes

_MOST_REMEMBERED = 8
"""How many layouts a context remembers, and how many structures."""


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_hole)


class PlanContext:
    """What the plans of one optimizer state share, from `init` through all edits; not compared.

    Attributes:
      inner: The wrapped transformation, for edits, which are given nothing but the state. Under
        `optax.inject_hyperparams` each trace makes another one, which holds tracers, so
        `update` passes on the one that `init` was given. None after unpickling.
      treedefs: The structures that params and gradients are known to have.
    """

    def __init__(self, inner: Any, params: Any, leaves: Leaves):
        self.inner: optax.GradientTransformationExtraArgs | None = inner
        self._params = leaves.treedef if params is leaves.tree else _structure(params)
        self._count = len(leaves.values)
        self.treedefs: list[Any] = [leaves.treedef]
        self._layouts: dict[PartTable | None, Layout] = {}

    @functools.cached_property
    def skeleton(self) -> Any:
        """The params as `init` was given them, with a hole for each leaf; for edits only."""
        treedef = self._params
        return tree_of_holes(jax.tree.unflatten(treedef, [HOLE] * treedef.num_leaves))

    @property
    def init(self) -> Callable[[Any], Any]:
        """Makes the inner state for params with holes."""
        if self.inner is None:
            raise ValueError(
                "this state was unpickled, without its transformation, which pickle refuses; it "
                "can be edited after an update (outside of jit, if optax.inject_hyperparams makes "
                "the freezable), or stored with fo.export_state instead"
            )
        return self.inner.init

    def layout(self, table: PartTable | None) -> Layout:
        """The layout of the inner state; made when an edit or a second cohort first needs it."""
        if table not in self._layouts:
            init = self.init
            if len(param_leaves(self.skeleton).values) != self._count:
                raise ValueError(
                    "the state of params with a tree in an NNX Variable can't be edited, nor "
                    "follow phases; make a Variable of each array"
                )
            self._layouts[table] = Layout(init, self._skeleton_of_parts(table))
            # Rows may be drawn anew at each edit, and their layouts never be asked for again.
            for old in list(self._layouts)[:-_MOST_REMEMBERED]:
                del self._layouts[old]
        return self._layouts[table]

    def _skeleton_of_parts(self, table: PartTable | None) -> Any:
        if table is None:
            return self.skeleton
        holes = table.group_by_leaf([HOLE] * len(table.parts))
        return map_copies(lambda copy: Leaves(copy).rebuild(holes), self.skeleton)

    def remember_structure(self, treedef: Any) -> None:
        """Remembers another container for the same paths, as a FrozenDict or an `nnx.State` is.

        So a training loop compares texts once. Some only: where a static field of the params
        changes at each step, so does the structure.
        """
        treedefs = [*self.treedefs, treedef]
        del treedefs[1 : 1 - _MOST_REMEMBERED]
        self.treedefs = treedefs  # at once, as another thread may be going through them

    def recover_inner(self, inner: Any, params: Any, leaves: Leaves) -> None:
        """Takes what unpickling has lost from the transformation that updates the state.

        Args:
          inner: The transformation; one that holds tracers is not kept.
          params: The params, or the gradients, which `leaves` are of.
          leaves: Those of the first copy.
        """
        if self.inner is None and not holds_tracers(inner):
            self.inner, self._count = inner, len(leaves.values)
            self._params = leaves.treedef if params is leaves.tree else _structure(params)

    def __getstate__(self) -> dict[str, Any]:
        # Transformations are made of closures, which pickle refuses.
        lost: dict[str, Any] = {"inner": None, "_params": None, "treedefs": []}
        return {**lost, "_layouts": {}, "_count": 0}
