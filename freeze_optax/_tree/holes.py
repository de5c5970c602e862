"""Holes: what stands where a leaf was taken out."""

from typing import Any

import optax

HOLE = optax.MaskedNode()


def is_hole(x: Any) -> bool:
    """Whether `x` stands where a leaf was taken out."""
    return isinstance(x, optax.MaskedNode)


def is_placeholder(tree: Any) -> bool:
    """Whether `optax.tree_map_params` calls, with the stand-in it passes for the params.

    The class is private to optax and has moved between its modules, so it is told by name.
    """
    return type(tree).__name__ == "_ParamsPlaceholder"
