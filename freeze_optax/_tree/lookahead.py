"""Trees that hold the params once, or twice as `optax.lookahead` has them."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from freeze_optax._tree.leaves import Leaves


def param_copies(tree: Any) -> list[Any]:
    """The copies of the params: the tree itself, the two of `LookaheadParams`, or none in None."""
    if tree is None:
        return []
    return list(tree) if isinstance(tree, optax.LookaheadParams) else [tree]


def param_leaves(params: Any) -> Leaves:
    """The leaves of the params, of the first copy where there are two."""
    if params is None:
        raise TypeError("the params are missing: None was given for them")
    return Leaves(param_copies(params)[0])


def rewrap_copies(tree: Any, copies: Sequence[Any]) -> Any:
    """Other copies in the form of `tree`."""
    if isinstance(tree, optax.LookaheadParams):
        return optax.LookaheadParams(*copies)
    return copies[0] if copies else None


def map_copies(function: Callable[[Any], Any], tree: Any) -> Any:
    """What the function makes of each copy, in the form of `tree`."""
    return rewrap_copies(tree, [function(copy) for copy in param_copies(tree)])
