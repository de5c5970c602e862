"""NNX Variables: nodes that hold one leaf, recognized by the name of their class."""

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


def is_variable(x: Any) -> bool:
    """Returns whether `x` is an NNX Variable."""
    return is_variable_type(type(x))


def unwrap_variable(x: Any) -> Any:
    """Returns the value of an NNX Variable, or a hole if it has none; returns other `x` itself."""
    return next(iter(jax.tree.leaves(x)), HOLE) if is_variable(x) else x


def rewrap_variable(old: Any, new: Any) -> Any:
    """Returns `new`; if `old` is an NNX Variable, returns a copy of it with the value of `new`."""
    if not is_variable(old) or new is old:
        return new
    return old.replace(unwrap_variable(new))


def tree_of_holes(tree: Any) -> Any:
    """Returns the containers of `tree`, with a hole for each leaf and each NNX Variable."""
    return jax.tree.map(lambda _: HOLE, tree, is_leaf=lambda x: is_hole(x) or is_variable(x))
