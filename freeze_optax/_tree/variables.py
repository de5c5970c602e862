"""Nodes around one value: NNX Variables and Linen's metadata boxes, recognized by their class."""

import functools
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE, is_hole


@functools.cache
def is_variable_type(cls: type) -> bool:
    """Returns whether a class is that of NNX Variables or of their states."""
    # By name: an import of flax here would cost every user of the package time.
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ in ("Variable", "VariableState")
        for base in cls.__mro__
    )


@functools.cache
def is_box_type(cls: type) -> bool:
    """Returns whether a class is that of Linen's metadata boxes: `nn.Partitioned` and the like."""
    return any(
        base.__module__ == "flax.core.meta" and base.__name__ == "AxisMetadata"
        for base in cls.__mro__
    )


def is_nnx_object(x: Any) -> bool:
    """Returns whether `x` is an NNX module, an `nnx.Optimizer` or another object of their kind."""
    bases = type(x).__mro__
    return any(b.__module__.startswith("flax.nnx") and b.__name__ == "Pytree" for b in bases)


def is_variable(x: Any) -> bool:
    """Returns whether `x` is an NNX Variable."""
    return is_variable_type(type(x))


def is_box(x: Any) -> bool:
    """Returns whether `x` is a metadata box of Linen."""
    return is_box_type(type(x))


def is_variable_or_box(x: Any) -> bool:
    """Returns whether `x` is a node around one value."""
    return is_variable(x) or is_box(x)


def tree_has_variables(tree: Any) -> bool:
    """Returns whether a tree holds an NNX Variable."""
    return any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))


def unwrap_variable(x: Any) -> Any:
    """Returns the value of an NNX Variable, or a hole if it has none, and the content of a box.

    Returns any other `x` itself.
    """
    if is_box(x):
        content, _ = _open_box(x)
        return unwrap_variable(content[0]) if len(content) == 1 else x
    return next(iter(jax.tree.leaves(x)), HOLE) if is_variable(x) else x


def rewrap_variable(old: Any, new: Any) -> Any:
    """Returns the value of `new` in a copy of the NNX Variable or box `old`.

    If `old` is neither, returns `new` itself.
    """
    if new is old:
        return new
    if is_box(old):
        content, treedef = _open_box(old)
        if len(content) == 1:
            return jax.tree.unflatten(treedef, [rewrap_variable(content[0], unwrap_variable(new))])
    return old.replace(unwrap_variable(new)) if is_variable(old) else new


def _open_box(box: Any) -> tuple[list[Any], Any]:
    """Returns what a box holds, and its structure, in which that is a leaf."""
    # Not `box.unbox()`, which constrains the sharding where a mesh is set, nor `box.replace`, which
    # is no part of the protocol of boxes.
    return jax.tree.flatten(box, is_leaf=lambda x: x is not box)


def tree_of_holes(tree: Any) -> Any:
    """Returns the containers of `tree`, with a hole for each leaf and each NNX Variable."""
    return jax.tree.map(lambda _: HOLE, tree, is_leaf=lambda x: is_hole(x) or is_variable(x))


def without_boxes_of_holes(tree: Any) -> Any:
    """Returns `tree` with a hole in the place of each box that holds one hole."""
    return jax.tree.map(
        lambda x: HOLE if is_box(x) and is_hole(unwrap_variable(x)) else x,
        tree,
        is_leaf=lambda x: is_hole(x) or is_box(x),
    )
