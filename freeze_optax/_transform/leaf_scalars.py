"""Trees like the params that hold a few numbers for each leaf: factors of `rates`, norms."""

from collections.abc import Sequence
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import is_variable_or_box


def tree_of_scalars(tree: Any, arrays: Sequence[Any]) -> Any:
    """Returns a tree like the params, without boxes and Variables, of other arrays.

    The sharding of a box or a Variable has a name for each axis of its leaf, and these have none.

    Args:
      tree: The params.
      arrays: An array for each leaf; a hole takes the place of None.
    """
    treedef = jax.tree.structure(tree, is_leaf=_is_slot)
    return jax.tree.unflatten(treedef, [HOLE if array is None else array for array in arrays])


def _is_slot(x: Any) -> bool:
    return is_hole(x) or (is_variable_or_box(x) and len(Leaves(x).values) == 1)


class _NoParam:
    """A leaf in the place of scalars, for `optax.tree_map_params`: no part of the params.

    Scalars have neither the shape nor the sharding of their leaf.
    """


def mapped_scalars(trees: Sequence[Any]) -> Any:
    """Returns leaves in the place of the scalars of the state that `tree_map_params` maps.

    Args:
      trees: The trees of scalars in that state.
    """
    structures = {jax.tree.structure(tree) for tree in trees}
    # With several of different structures, it is not known which of them this `init` is for.
    if len(structures) != 1:
        return _NoParam()
    return jax.tree.map(lambda _: _NoParam(), trees[0], is_leaf=is_variable_or_box)
