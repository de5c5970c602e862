"""Trees that hold the params once, or twice as `optax.lookahead` holds them."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from freeze_optax._tree.leaves import Leaves


def param_copies(tree: Any) -> list[Any]:
    """Returns the copies of the params: one, two for `LookaheadParams`, none for None."""
    if tree is None:
        return []
    return list(tree) if isinstance(tree, optax.LookaheadParams) else [tree]


def param_leaves(params: Any) -> Leaves:
    """Returns the leaves of the params; where there are two copies, of the first."""
    if params is None:
        raise TypeError("the params are missing: None was given for them")
    return Leaves(param_copies(params)[0])


def rewrap_copies(tree: Any, copies: Sequence[Any]) -> Any:
    """Returns new copies in the form of `tree`, the inverse of `param_copies`."""
    if isinstance(tree, optax.LookaheadParams):
        return optax.LookaheadParams(*copies)
    return copies[0] if copies else None


def map_copies(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to each copy of the params, and returns the results in the same form."""
    return rewrap_copies(tree, [function(copy) for copy in param_copies(tree)])
