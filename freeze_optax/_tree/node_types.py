"""The nodes of one type in a tree, found and replaced."""

from typing import Any, TypeVar

import jax

T = TypeVar("T")


def nodes_of_type(node_type: type[T], tree: Any) -> list[T]:
    """Returns all nodes of a type in a tree, in order; those inside of another one are left out."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, node_type))
    return [x for x in nodes if isinstance(x, node_type)]


def replace_node(node_type: type[Any], tree: Any, node: Any) -> Any:
    """Returns the tree with `node` in the place of its nodes of a type."""
    return jax.tree.map(
        lambda x: node if isinstance(x, node_type) else x,
        tree,
        is_leaf=lambda x: isinstance(x, node_type),
    )
