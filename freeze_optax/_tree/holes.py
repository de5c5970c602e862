"""Holes: `optax.MaskedNode()`, in the place of a leaf that was taken out."""

from typing import Any

import optax

HOLE = optax.MaskedNode()


def is_hole(x: Any) -> bool:
    """Returns whether `x` is a hole: it takes the place of a leaf that was taken out."""
    return isinstance(x, optax.MaskedNode)


def is_placeholder(tree: Any) -> bool:
    """Returns whether `tree` is the placeholder that `optax.tree_map_params` passes for the params.

    The class is private to optax and has moved between its modules, so it is recognized by name.
    """
    return type(tree).__name__ == "_ParamsPlaceholder"
