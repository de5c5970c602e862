"""Trees that hold the params once, or twice as `optax.lookahead` has them."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from freeze_optax._tree.leaves import Leaves


def copies_of(tree: Any) -> list[Any]:
    """The copies of the params: the tree itself, the two of `LookaheadParams`, or none in None."""
    if tree is None:
        return []
    return list(tree) if isinstance(tree, optax.LookaheadParams) else [tree]


def leaves_of(params: Any) -> Leaves:
    """The leaves of the params, of the first copy where there are two."""
    if params is None:
        raise TypeError("the params are missing: None was given for them")
    return Leaves(copies_of(params)[0])


def like(tree: Any, copies: Sequence[Any]) -> Any:
    """Other copies in the form of `tree`."""
    if isinstance(tree, optax.LookaheadParams):
        return optax.LookaheadParams(*copies)
    return copies[0] if copies else None


def on_each(function: Callable[[Any], Any], tree: Any) -> Any:
    """What the function makes of each copy, in the form of `tree`."""
    return like(tree, [function(copy) for copy in copies_of(tree)])
