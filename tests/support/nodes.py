"""Nodes of pytrees as users register them."""

import jax


@jax.tree_util.register_pytree_node_class
class Keyless:
    """A node without keys for its children."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)
