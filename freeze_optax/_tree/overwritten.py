"""Variables that their gradient overwrites, such as the scales of Flax's fp8 layers.

Flax keeps them in a collection of their own, beside the params. What `jax.grad` gives there is no
gradient: it is the next value. `TrainState` gives its optimizer the params alone, and takes the
next values from the gradient.
"""

from collections.abc import Mapping
from typing import Any

from freeze_optax._tree.leaves import Leaves

# The name in `flax.linen.fp8_ops`, which is not imported here.
OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


def has_overwritten(tree: Any) -> bool:
    """Returns whether a tree is one of variables with a collection that gradients overwrite."""
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def overwritten(leaves: Leaves) -> list[bool]:
    """Returns for each leaf whether its gradient overwrites it."""
    # Errors and such trees alone read the paths, as their text takes time to make.
    if not has_overwritten(leaves.tree):
        return [False] * len(leaves.values)
    return [path.startswith(f"{OVERWRITE_WITH_GRADIENT}/") for path in leaves.paths]


def paths_in_params(leaves: Leaves) -> list[str | None] | None:
    """Returns for each leaf its path in the params, the part of the variables that is optimized.

    Args:
      leaves: The leaves of a tree.

    Returns:
      A path for each leaf, or None for a leaf that its gradient overwrites. None in all if the tree
      is not one of variables with such leaves, or has other collections.
    """
    if not has_overwritten(leaves.tree) or leaves.tree.keys() != {
        OVERWRITE_WITH_GRADIENT,
        "params",
    }:
        return None
    pairs = zip(leaves.paths, overwritten(leaves), strict=True)
    return [None if flag else path.removeprefix("params").removeprefix("/") for path, flag in pairs]


def optimized_params(params: Any) -> Any:
    """Returns the part of the variables that is optimized; `params` itself if they are no more."""
    return params["params"] if paths_in_params(Leaves(params)) is not None else params
