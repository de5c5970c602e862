"""The modules of a model, by path: the nodes of its tree, or a table that an adapter makes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import path_text
from freeze_optax._tree.variables import is_variable

KeyPath = tuple[Any, ...]
Children = Callable[[Any], list[tuple[KeyPath, Any]] | None]


class Modules(dict[str, Any]):
    """A table of modules by path, for params that do not hold them.

    Attributes:
      aliases: For each other path of a shared leaf the one that the params have.
      more: Further modules at paths that have one: Linen's `share_scope` puts two at one path.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        more: Sequence[tuple[str, Any]] = (),
    ):
        super().__init__(table)
        self.aliases, self.more = dict(aliases or {}), list(more)


def children_of(node: Any) -> list[tuple[KeyPath, Any]] | None:
    """What stands directly below a node of a pytree, with its key; None if it is a leaf."""
    # All but the node itself, which is asked first, are leaves; it may be among its own children.
    is_below = itertools.chain([False], itertools.repeat(True))
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(is_below))
    if len(below) == 1 and not below[0][0]:
        return None
    # The `value` of an NNX Variable is no component of a path.
    return [((), value) for _, value in below] if is_variable(node) else below


def walk_nodes(tree: Any, children: Children = children_of) -> Iterator[tuple[str, Any]]:
    """All nodes above the leaves with their paths, those above first.

    Args:
      tree: Any pytree, or what else `children` can take apart.
      children: What is directly below a node; None if it is a leaf.

    Yields:
      Pairs of path and node. A node that is shared comes once for each of its paths.
    """
    # No recursion: it would end at a depth that jax still flattens. What is above a node goes
    # with it, as modules of NNX may hold each other.
    stack: list[tuple[KeyPath, Any, Any]] = [((), tree, None)]
    while stack:
        entries, node, above = stack.pop()
        below = None if _is_above(node, above) else children(node)
        if below is None:
            continue
        yield path_text(entries), node
        chain = (node, above)
        stack.extend(((*entries, *keys), child, chain) for keys, child in reversed(below))


def _is_above(node: Any, chain: Any) -> bool:
    while chain is not None:
        if chain[0] is node:
            return True
        chain = chain[1]
    return False


_CONTAINERS = (dict, list, tuple, type(None))
# Told by name, as flax may not be there: boxes around a param, and what NNX keeps in a module.
_FLAX_WRAPPERS = {"flax.core.meta.AxisMetadata", "flax.nnx.pytreelib.PytreeState"}


def is_module(node: Any) -> bool:
    """Whether a node is an instance of a class that may mean something: no mere container."""
    if type(node) in _CONTAINERS or is_hole(node) or is_variable(node):
        return False
    bases = {f"{base.__module__}.{base.__name__}" for base in type(node).__mro__}
    if bases & _FLAX_WRAPPERS:
        return False
    # Dataclasses of chex are Mappings as well, and so is nnx.Dict.
    is_class = dataclasses.is_dataclass(node) or "flax.nnx.module.Module" in bases
    return is_class or not isinstance(node, Mapping)
