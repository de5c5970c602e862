"""`Leaves`: the leaves of a pytree in order, holes included, with their key paths as text."""

import copy
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.key_paths import ancestors, dots_as_slashes, leaf_key_paths, path_texts


class Leaves:
    """Lists the leaves of a pytree, with holes as leaves. It makes the paths on first use.

    Args:
      tree: Any pytree.
      stop: Says which nodes also count as leaves; by default, holes.
      modules: The modules of the params, by path, if the tree does not hold them.
      aliases: Further paths of leaves or nodes: from each alias to the path in the tree. NNX, for
        example, keeps a shared Variable at one path only.

    Attributes:
      tree: The tree itself.
      modules: The argument `modules`.
      values: The leaves and holes, in flattening order.
      treedef: The structure of the tree, in which a hole is a leaf.
      as_stored: The same leaves with the paths of the tree, if `dotted` made these; else itself.
    """

    def __init__(
        self,
        tree: Any,
        stop: Callable[[Any], bool] = is_hole,
        modules: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self.tree, self.modules, self._stop, self._aliases = tree, modules, stop, aliases or {}
        self.values, self.treedef = jax.tree.flatten(tree, is_leaf=stop)
        self.as_stored = self

    @classmethod
    def with_values(
        cls, tree: Any, values: list[Any], treedef: Any, paths: tuple[str, ...]
    ) -> "Leaves":
        """Returns the leaves of `tree` as another structure divides it; some values may be None.

        Args:
          tree: The tree.
          values: Its leaves, in the order of `treedef`.
          treedef: The other structure.
          paths: The key path of each leaf.
        """
        leaves = cls(tree)
        leaves.values, leaves.treedef = values, treedef
        leaves.__dict__["paths"] = paths
        return leaves

    def of_types(self, arrays: Iterable[Any]) -> "Leaves":
        """Returns leaves of the same structure and paths, with the types of arrays as values.

        A function that outlives its trace may hold these, to rebuild the tree.

        Args:
          arrays: One array for each leaf.
        """
        types = [jax.typeof(x) for x in arrays]
        return Leaves.with_values(None, types, self.treedef, self.paths)

    def dotted(self) -> "Leaves":
        """Returns the same leaves with paths in which dots separate components too."""
        aliases = {dots_as_slashes(a): dots_as_slashes(b) for a, b in self._aliases.items()}
        leaves = copy.copy(self)
        leaves._aliases, leaves.as_stored = aliases, self
        leaves.__dict__["paths"] = tuple(map(dots_as_slashes, self.paths))
        return leaves

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The key path of each leaf, with `/` between components.

        The `value` of an NNX Variable, or of a metadata box of Linen, is left out.
        """
        return tuple(path_texts(leaf_key_paths(self.tree, self._stop)))

    def all_paths(self, aliases: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
        """Yields each path of each leaf, aliases too, with the index of the leaf.

        Args:
          aliases: More aliases, beside those of the constructor.
        """
        yield from zip(self.paths, range(len(self.paths)), strict=True)
        all_aliases = {**self._aliases, **(aliases or {})}
        aliases_of: dict[str, list[str]] = {}
        for alias, node in all_aliases.items():
            aliases_of.setdefault(node, []).append(alias)
        if aliases_of:
            for i, path in enumerate(self.paths):
                for node in ancestors(path):
                    for alias in aliases_of.get(node, ()):
                        yield alias + path[len(node) :], i

    def flags_below(
        self, nodes: Container[str], aliases: Mapping[str, str] | None = None
    ) -> list[bool]:
        """Returns for each leaf whether it is at or below one of the nodes.

        Args:
          nodes: The paths of the nodes; the path of the root is `""`.
          aliases: As for `all_paths`.
        """
        flags = ["" in nodes] * len(self.paths)
        for path, i in self.all_paths(aliases):
            flags[i] = flags[i] or any(node in nodes for node in ancestors(path))
        return flags

    def rebuild(self, values: Iterable[Any]) -> Any:
        """Returns the tree with other values, one for each leaf and each hole.

        Raises:
          ValueError: If a node refuses its values, naming the path and what the node says.
        """
        values = list(values)
        try:
            return jax.tree.unflatten(self.treedef, values)
        except Exception as error:
            node, start, count = refusing_node(self.treedef, values)
            span = range(start, start + count)
            i = next((i for i in span if values[i] is not self.values[i]), None)
            if i is None:
                raise
            raise ValueError(
                f"{self.paths[i]!r} is in a {node.__name__}, which refuses "
                f"{_change(self.values[i], values[i])}: {error}"
            ) from error

    def fill_leaves(self, values: Iterable[Any]) -> Any:
        """Returns the tree with other values for its leaves; the holes stay.

        Args:
          values: One value for each leaf and each hole; those for holes are ignored.
        """
        pairs = zip(self.values, values, strict=True)
        return self.rebuild(leaf if is_hole(leaf) else value for leaf, value in pairs)

    def with_holes(self, flags: Iterable[bool]) -> Any:
        """Returns the tree with a hole at each leaf whose flag is set."""
        return self.rebuild(HOLE if f else x for x, f in zip(self.values, flags, strict=True))


def refusing_node(treedef: Any, values: list[Any]) -> tuple[type, int, int]:
    """Returns the type of the innermost node that refuses its values, and where these are.

    The classes of users may check in their `tree_unflatten` what they are made of.
    """
    start, remaining = 0, [treedef]
    while remaining:
        child = remaining.pop(0)
        if _accepts(child, values[start : start + child.num_leaves]):
            start += child.num_leaves
        else:
            treedef, remaining = child, child.children()
    node_type = (treedef.node_data() or (object,))[0]
    return node_type, start - treedef.num_leaves, treedef.num_leaves


def _accepts(treedef: Any, values: list[Any]) -> bool:
    try:
        jax.tree.unflatten(treedef, values)
    except Exception:  # noqa: BLE001
        return False
    return True


def _change(old: Any, new: Any) -> str:
    """Returns a clause for an error that says what a node was to hold, and the remedy."""
    shape, new_shape = (getattr(x, "shape", None) for x in (old, new))
    if new_shape is None or shape == new_shape:
        return (
            f"a {type(new).__name__} in place of its {type(old).__name__} (jax asks that "
            "`tree_unflatten` accept any object: let it check arrays alone)"
        )
    return (
        f"a shape {new_shape} in place of {shape} (to freeze some rows, the params need a node "
        "that accepts these, or the bare array; it can be frozen as a whole)"
    )
