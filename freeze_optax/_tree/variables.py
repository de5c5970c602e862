"""NNX Variables: nodes that hold one leaf, told by the name of their class."""

import functools
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE, is_hole


@functools.cache
def is_variable_type(cls: type) -> bool:
    # Told by name: importing flax here would make everyone pay for it.
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ in ("Variable", "VariableState")
        for base in cls.__mro__
    )


def is_variable(x: Any) -> bool:
    """Whether `x` is an NNX Variable."""
    return is_variable_type(type(x))


def unwrap_variable(x: Any) -> Any:
    """What an NNX Variable holds, a hole if nothing; anything else as it is."""
    return next(iter(jax.tree.leaves(x)), HOLE) if is_variable(x) else x


def rewrap_variable(old: Any, new: Any) -> Any:
    """`new` in place of `old`, within the NNX Variable that `old` may be."""
    if not is_variable(old) or new is old:
        return new
    return old.replace(unwrap_variable(new))


def tree_of_holes(tree: Any) -> Any:
    """The containers of `tree`, with a hole for each leaf and each NNX Variable."""
    return jax.tree.map(lambda _: HOLE, tree, is_leaf=lambda x: is_hole(x) or is_variable(x))
