"""The leaves of a pytree in order, holes included, and their key paths as text."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax

from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.key_paths import ancestors, leaf_key_paths, path_texts


class Leaves:
    """The leaves of `tree`, with holes as leaves; paths are made when first asked for.

    Args:
      tree: Any pytree.
      stop: Which nodes are leaves too.
      modules: The modules whose params they are, by path, if the tree does not hold them.
      aliases: For each other path of a leaf or node the one that the tree has: NNX keeps a shared
        Variable once.

    Attributes:
      tree: The tree itself.
      modules: As given.
      values: Its leaves and holes, in flattening order.
      treedef: Its structure, a hole being a leaf.
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

    @classmethod
    def with_values(
        cls, tree: Any, values: list[Any], treedef: Any, paths: tuple[str, ...]
    ) -> "Leaves":
        """The leaves of `tree` as another structure tells them, which may find None at some."""
        leaves = cls(tree)
        leaves.values, leaves.treedef = values, treedef
        leaves.__dict__["paths"] = paths
        return leaves

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The key path of each leaf, `/` between components, an NNX Variable's `value` left out."""
        return tuple(path_texts(leaf_key_paths(self.tree, self._stop)))

    def all_paths(self, aliases: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
        """Each path by which a leaf goes, with the leaf's index.

        Args:
          aliases: More of them than the leaves were made with.
        """
        yield from zip(self.paths, range(len(self.paths)), strict=True)
        others = {**self._aliases, **(aliases or {})}
        below: dict[str, list[str]] = {}
        for alias, node in others.items():
            below.setdefault(node, []).append(alias)
        if below:
            for i, path in enumerate(self.paths):
                for node in ancestors(path):
                    for alias in below.get(node, ()):
                        yield alias + path[len(node) :], i

    def flags_below(
        self, nodes: Container[str], aliases: Mapping[str, str] | None = None
    ) -> list[bool]:
        """For each leaf, whether it is at or below one of the nodes; the root is `""`.

        Args:
          nodes: Paths.
          aliases: More of them than the leaves were made with.
        """
        flags = ["" in nodes] * len(self.paths)
        for path, i in self.all_paths(aliases):
            flags[i] = flags[i] or any(node in nodes for node in ancestors(path))
        return flags

    def rebuild(self, values: Iterable[Any]) -> Any:
        """The tree with other leaves."""
        return jax.tree.unflatten(self.treedef, values)

    def fill_leaves(self, values: Iterable[Any]) -> Any:
        """The tree with other leaves where it has leaves; its holes stay."""
        pairs = zip(self.values, values, strict=True)
        return self.rebuild(leaf if is_hole(leaf) else value for leaf, value in pairs)

    def with_holes(self, flags: Iterable[bool]) -> Any:
        """The tree with a hole wherever a flag is set."""
        return self.rebuild(HOLE if f else x for x, f in zip(self.values, flags, strict=True))
