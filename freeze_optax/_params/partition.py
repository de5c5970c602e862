"""Split a tree into what trains and the rest, each with holes where the other has leaves."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from freeze_optax._rows.flags import Flag, flag_not
from freeze_optax._rows.meshes import mesh_axes_of
from freeze_optax._rows.parts import Parts, is_hole_or_parts, join_parts
from freeze_optax._rows.rows import Rows
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put, take, take_bitwise
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import few_clauses, path_differences, quoted_list


def partition(tree: Any, frozen: Spec) -> tuple[Any, Any]:
    """Splits `tree` into its trainable leaves and the rest; `merge` is the inverse.

    Examples:
      >>> import freeze_optax as fo
      >>> trainable, rest = fo.partition({"encoder": 1.0, "head": 2.0}, "encoder")
      >>> trainable
      {'encoder': MaskedNode(), 'head': 2.0}
      >>> rest
      {'encoder': 1.0, 'head': MaskedNode()}
      >>> fo.merge(trainable, rest)
      {'encoder': 1.0, 'head': 2.0}

    Args:
      tree: Any pytree.
      frozen: Which leaves go to the rest: any spec, see `freeze_optax.mask`. Leaves that cannot be
        trained go there too.

    Returns:
      A pair of trees of the structure of `tree`, the trainable leaves and the rest. Each tree has
      a hole, `optax.MaskedNode()` (a node without leaves), where the other one has the leaf. The
      leaves are the same objects as in `tree`. Where a leaf is frozen in part, the trainable tree
      has an array of the rows that train, and the rest has the frozen rows in a node that knows
      their indices. Where single elements are frozen, the trainable tree has a vector of those that
      train, and the node in the rest has the whole leaf.

    Raises:
      ValueError: If the spec does not fit the tree.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools.
    """
    leaves = Leaves(tree)
    flags = resolve(frozen, leaves)
    return split_by_flags(leaves, flags)


def split_by_flags(leaves: Leaves, frozen: Sequence[Flag]) -> tuple[Any, Any]:
    """Splits leaves as `partition` does, by flags that are resolved already."""
    pairs = list(zip(leaves.values, frozen, strict=True))
    trainable = leaves.rebuild(_selected(leaf, flag_not(flag)) for leaf, flag in pairs)
    rest = leaves.rebuild(
        _frozen_part(leaf, flag) if isinstance(flag, Subset) else _selected(leaf, flag)
        for leaf, flag in pairs
    )
    return trainable, rest


def _selected(leaf: Any, flag: Flag) -> Any:
    if isinstance(flag, Subset):
        return take(leaf, flag)
    return leaf if flag else HOLE


def _frozen_part(leaf: Any, frozen: Subset) -> Parts:
    if isinstance(frozen, Rows):
        return Parts([take_bitwise(leaf, frozen)], (frozen,), mesh_axes_of(leaf, frozen.axis))
    # Most elements are frozen. A vector of them would be a second copy of nearly the whole leaf,
    # and `merge` would move each of them back.
    return Parts([leaf], (frozen,))


def merge(trainable: Any, rest: Any) -> Any:
    """Joins the two trees that `partition` gives into one again.

    Examples:
      >>> import jax
      >>> import freeze_optax as fo
      >>> trainable, rest = fo.partition({"encoder": 1.0, "head": 2.0}, "encoder")
      >>> fo.merge(jax.tree.map(lambda x: x + 1, trainable), rest)
      {'encoder': 1.0, 'head': 3.0}

    Args:
      trainable: A tree with holes (`optax.MaskedNode`).
      rest: A tree of the same structure, with leaves where `trainable` has holes and holes
        elsewhere.

    Returns:
      A tree with the leaves of both, the same objects. Only a leaf that is frozen in part is a new
      array, made of both parts. Where both trees have a hole, the hole stays.

    Raises:
      ValueError: If the structures differ; if both trees have a leaf at one path; or if the rows
        or elements in `trainable` are not those that `rest` lacks, where a leaf is frozen in part.
    """
    left, right = Leaves(trainable, stop=is_hole_or_parts), Leaves(rest, stop=is_hole_or_parts)
    if any(map(_is_part, left.values)):
        exchanged = [path for path, x in zip(left.paths, left.values, strict=True) if _is_part(x)]
        raise ValueError(
            f"at {quoted_list(exchanged)} `trainable` holds what is frozen of a leaf; the order is "
            "fo.merge(trainable, rest)"
        )
    if left.treedef != right.treedef:
        raise ValueError(
            "the two parts are of different trees: "
            + path_differences(left.paths, right.paths, "in `trainable`", "in `rest`")
        )
    pairs = list(zip(left.values, right.values, strict=True))
    # Errors alone read the paths: their text takes time to make, and a loss calls this in each
    # of its traces.
    twice = [i for i, (a, b) in enumerate(pairs) if not (is_hole(a) or is_hole(b) or _is_part(b))]
    if twice:
        raise ValueError(
            f"both parts have a leaf at {quoted_list(left.paths[i] for i in twice)}; each leaf "
            "belongs to one of them, with optax.MaskedNode() in the other, as fo.partition "
            "gives them"
        )
    problems = [
        f"{left.paths[i]!r} {problem}"
        for i, (a, b) in enumerate(pairs)
        if _is_part(b) and (problem := _part_problem(a, b))
    ]
    if problems:
        raise ValueError(f"the rows of the two parts are not of one leaf: {few_clauses(problems)}")
    return left.rebuild(_merge_leaf(a, b) for a, b in pairs)


def _is_part(x: Any) -> bool:
    return isinstance(x, Parts)


def _part_problem(left: Any, right: Parts) -> str:
    """Says why what trains does not fit what is frozen of a leaf; empty if it does."""
    (frozen,), (value,) = right.subsets, right.values
    if isinstance(frozen, Rows):
        what, expected = "rows", frozen.with_length(value.shape, (~frozen).count)
    else:
        what, expected = "elements", (~frozen).compact_shape(value.shape)
    if is_hole(left):
        return f"is a hole in `trainable`, where `rest` lacks {what} of shape {expected}"
    if np.shape(left) != expected:
        return f"is of shape {np.shape(left)}, where `rest` lacks {what} of shape {expected}"
    left_dtype, right_dtype = (jax.dtypes.canonicalize_dtype(x.dtype) for x in (left, value))
    if left_dtype == right_dtype:
        return ""
    return f"is {left_dtype} in `trainable` and {right_dtype} in `rest`"


def _merge_leaf(left: Any, right: Any) -> Any:
    if not isinstance(right, Parts):
        return right if is_hole(left) else left
    (frozen,), (value,) = right.subsets, right.values
    if isinstance(frozen, Rows):
        return join_parts(Parts((value, left), (frozen, ~frozen), right.mesh_axes))
    return put(value, ~frozen, left)
