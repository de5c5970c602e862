"""The modules of a model by path: nodes of its tree, or a table that `linen` or `nnx` makes."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.key_paths import path_text
from freeze_optax._tree.variables import is_box_type, is_variable_or_box, is_variable_type

KeyPath = tuple[Any, ...]
Children = Callable[[Any], list[tuple[KeyPath, Any]] | None]
"""A function that gives the children of a node, each with its keys; None if the node is a leaf."""


class Modules(dict[str, Any]):
    """A table of modules by path, for params that do not hold their modules.

    Args:
      table: The modules by path.
      aliases: Other paths of shared leaves: from each alias to the path in the params.
      more: Pairs of path and module, for paths that `table` has already; and pairs of path and
        NNX Variable.

    Attributes:
      aliases: The aliases, as a dict.
      more: The further modules, as a list: Linen's `share_scope` puts two at one path. NNX's
        Variables are here, as `of_type` looks for their types too.
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
    """Returns the children of a node of a pytree, each with its keys; None if the node is a leaf.

    For a child of an NNX Variable, or of a metadata box of Linen, the keys are empty: `value` is no
    component of a path.
    """
    # Everything below the node counts as a leaf. JAX asks first about the node itself, so this goes
    # by the order of the calls and not by identity: a node may be one of its own children.
    is_below = itertools.chain([False], itertools.repeat(True))
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(is_below))
    if len(below) == 1 and not below[0][0]:
        return None
    return [((), value) for _, value in below] if is_variable_or_box(node) else below


def walk_nodes(tree: Any, children: Children = children_of) -> Iterator[tuple[str, Any]]:
    """Yields all nodes that are not leaves with their paths, a node before its children.

    Args:
      tree: Any pytree, or another object that `children` accepts.
      children: Gives the children of a node, as `children_of`.

    Yields:
      Pairs of path and node. A shared node comes once for each of its paths.
    """
    # No recursion: it would fail at a depth that jax still flattens. Each node carries the chain of
    # nodes above it, because NNX modules may hold each other in a circle.
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
    """Returns whether `node` is in a chain of nested pairs of a node and the chain above it."""
    while chain is not None:
        if chain[0] is node:
            return True
        chain = chain[1]
    return False


_CONTAINERS = (dict, list, tuple, type(None))
_NNX_MODULE = "flax.nnx.module.Module"
# By name, as flax may not be installed: the state that NNX keeps in a module.
_FLAX_WRAPPERS = {"flax.nnx.pytreelib.PytreeState"}


def is_module(node: Any) -> bool:
    """Returns whether a node can be a module: no container, hole, Variable, box or Flax wrapper."""
    return is_module_type(type(node))


@functools.cache
def is_module_type(cls: type) -> bool:
    """Returns whether nodes of a class can be modules."""
    is_wrapper = is_variable_type(cls) or is_box_type(cls)
    if cls in _CONTAINERS or issubclass(cls, type(HOLE)) or is_wrapper:
        return False
    bases = _base_names(cls)
    if bases & _FLAX_WRAPPERS:
        return False
    # Dataclasses of chex are Mappings too, and so is nnx.Dict.
    is_class = dataclasses.is_dataclass(cls) or _NNX_MODULE in bases
    return is_class or not issubclass(cls, Mapping)


def is_framework_module(cls: type) -> bool:
    """Returns whether a class is an NNX or Equinox module, which has params of its own."""
    bases = _base_names(cls)
    is_equinox = any(x.startswith("equinox.") and x.endswith(".Module") for x in bases)
    return is_equinox or _NNX_MODULE in bases


@functools.cache
def is_sparse_type(cls: type) -> bool:
    """Returns whether a class is one of the sparse matrices of `jax.experimental.sparse`."""
    return any(name.startswith("jax.experimental.sparse.") for name in _base_names(cls))


def _base_names(cls: type) -> set[str]:
    # By name, because an import of these packages would cost every user time.
    return {f"{base.__module__}.{base.__name__}" for base in cls.__mro__}
