"""Nodes of a tree by their key path: find them, read them, replace them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax

from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import leaf_key_paths, path_text
from freeze_optax._tree.messages import nearest_names

Entries = tuple[Any, ...]
"""A key path as JAX has it. A key may have slashes, so it can't be made from the text."""


def find_nodes(tree: Any, paths: Sequence[str], name: str) -> dict[str, Entries]:
    """Returns the key path of each node, given as text.

    Args:
      tree: Any pytree.
      paths: The paths; that of the root is `""`.
      name: The name of the public function, for an error.

    Raises:
      ValueError: If there is no such node, or more than one.
    """
    found: dict[str, set[Entries]] = {path: set() for path in paths}
    seen = dict[str, None]()
    for entries in leaf_key_paths(tree, is_hole):
        for end in range(len(entries) + 1):
            path = path_text(entries[:end])
            seen[path] = None
            if path in found:
                found[path].add(entries[:end])
    for path, places in found.items():
        if len(places) > 1:
            raise ValueError(
                f"fo.{name} can't tell which of {len(places)} nodes at {path!r} is meant; use keys "
                "without `/`"
            )
        if not places:
            hint = nearest_names(path, filter(None, seen))
            raise ValueError(f"fo.{name} finds nothing at {path!r}; {hint}")
    return {path: next(iter(places)) for path, places in found.items()}


def children_by_key(node: Any) -> list[tuple[Entries, Any]]:
    """Returns the children of a node, each with a key path of one key."""
    return _open(node)[0]


def _open(node: Any) -> tuple[list[tuple[Entries, Any]], Any]:
    """Returns the children of a node, with their keys, and its structure."""
    # JAX asks first about the node itself, then about its children.
    is_below = itertools.chain([False], itertools.repeat(True))
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(is_below))


def node_at(tree: Any, entries: Entries) -> Any:
    """Returns the node at a key path."""
    for key in entries:
        tree = next(child for keys, child in children_by_key(tree) if keys == (key,))
    return tree


def replace_node(tree: Any, entries: Entries, new: Any) -> Any:
    """Returns a tree with another node at a key path."""
    if not entries:
        return new
    children, structure = _open(tree)
    return jax.tree.unflatten(
        structure,
        [
            replace_node(child, entries[1:], new) if keys == entries[:1] else child
            for keys, child in children
        ],
    )
