"""The leaves of a pytree in order, holes included, and their key paths as text."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

HOLE = optax.MaskedNode()


def is_hole(x: Any) -> bool:
    """Whether `x` stands where a leaf was taken out."""
    return isinstance(x, optax.MaskedNode)


def is_placeholder(tree: Any) -> bool:
    """Whether `optax.tree_map_params` calls, with the stand-in it passes for the params.

    The class is private to optax and has moved between its modules, so it is told by name.
    """
    return type(tree).__name__ == "_ParamsPlaceholder"


@functools.cache
def _kind(dtype: Any) -> str:
    # A format of exponents alone, for the scales of block formats: its smallest number is
    # not 0, so it has neither a zero gradient nor an update that changes nothing.
    if dtype == jnp.float8_e8m0fnu:
        return "other"
    if isinstance(dtype, np.dtype) and dtype.kind == "m":  # a duration, an integer to NumPy
        return "other"
    if jnp.issubdtype(dtype, jnp.inexact):
        return "inexact"
    exact = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    return "exact" if exact else "other"


def kind(leaf: Any) -> str:
    """`"inexact"` (float, complex), `"exact"` (integer, bool) or `"other"`, Python numbers too."""
    if is_array(leaf):
        return _kind(leaf.dtype)
    if isinstance(leaf, float | complex):
        return "inexact"
    return "exact" if isinstance(leaf, int) else "other"


def is_array(leaf: Any) -> bool:
    """Whether `leaf` has a shape and a dtype, as arrays do; abstract and NumPy ones too."""
    # Classes such as jnp.float32 have such attributes as well.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def is_foreign(leaf: Any) -> bool:
    """Whether `leaf` is a float of NumPy that jax has not: longer, or in another byte order."""
    dtype = leaf.dtype if isinstance(leaf, np.ndarray | np.generic) else None
    if dtype is None or dtype.kind not in "fc":
        return False
    return not dtype.isnative or dtype.itemsize > (8 if dtype.kind == "f" else 16)


def can_train(leaf: Any) -> bool:
    """Whether a gradient step can move `leaf`: a float or complex array, or Python number."""
    return kind(leaf) == "inexact"


@functools.cache
def _is_variable_type(cls: type) -> bool:
    # Told by name: importing flax here would make everyone pay for it.
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ in ("Variable", "VariableState")
        for base in cls.__mro__
    )


def is_variable(x: Any) -> bool:
    """Whether `x` is an NNX Variable."""
    return _is_variable_type(type(x))


def value_of(x: Any) -> Any:
    """What an NNX Variable holds, a hole if nothing; anything else as it is."""
    return next(iter(jax.tree.leaves(x)), HOLE) if is_variable(x) else x


def replaced(old: Any, new: Any) -> Any:
    """`new` in place of `old`, within the NNX Variable that `old` may be."""
    if not is_variable(old) or new is old:
        return new
    return old.replace(value_of(new))


def skeleton(tree: Any) -> Any:
    """The containers of `tree`, with a hole for each leaf and each NNX Variable."""
    return jax.tree.map(lambda _: HOLE, tree, is_leaf=lambda x: is_hole(x) or is_variable(x))


class Transparent:
    """A node whose children go by its own path."""


@functools.cache
def _is_transparent(cls: type) -> bool:
    return _is_variable_type(cls) or issubclass(cls, Transparent)


_COMPONENT: dict[type, Callable[[Any], Any]] = {
    jax.tree_util.DictKey: operator.attrgetter("key"),
    jax.tree_util.SequenceKey: operator.attrgetter("idx"),
    jax.tree_util.GetAttrKey: operator.attrgetter("name"),
    jax.tree_util.FlattenedIndexKey: operator.attrgetter("key"),
}


def _component(entry: Any) -> str:
    # An empty key is quoted, as the empty path is that of the root.
    return str(_COMPONENT.get(type(entry), str)(entry)) or "''"


def text(entries: Iterable[Any]) -> str:
    """The components of a key path as text, `/` between them."""
    return "/".join(map(_component, entries))


def _texts(paths: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """Key paths as text; the part that a leaf shares with the one before is made once."""
    above, start = None, ""
    for entries in paths:
        if entries and entries[:-1] != above:
            above = entries[:-1]
            start = text(above) + "/" if above else ""
        yield start + _component(entries[-1]) if entries else ""


def _entries(
    tree: Any, stop: Callable[[Any], bool], prefix: tuple[Any, ...] = ()
) -> Iterator[tuple[Any, ...]]:
    """The key path of each leaf, without those of transparent nodes."""
    is_leaf: Callable[[Any], bool] = lambda x: (  # noqa: E731
        (_is_transparent(type(x)) or stop(x)) and x is not tree
    )
    if stop(tree):
        yield prefix
        return
    # Only below such a node is its own key known; a user's field named `value` must stay, so it
    # can't be told from the text.
    start = 1 if _is_transparent(type(tree)) else 0
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        entries = (*prefix, *keys[start:]) if prefix or start else keys
        if _is_transparent(type(node)) and not stop(node) and node is not tree:
            yield from _entries(node, stop, entries)
        else:
            yield entries


def ancestors(path: str) -> Iterator[str]:
    """`path` and the paths of all nodes above it, the nearest first; not the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def check_unique(paths: Sequence[str], what: str) -> None:
    """Raises where two leaves go by one path, as a slash in a key allows.

    Args:
      paths: Those of leaves that are to be found by path, in a tree of other containers.
      what: What to call that tree.
    """
    path, count = max(Counter(paths).items(), key=operator.itemgetter(1), default=("", 0))
    if count > 1:
        raise ValueError(
            f"two leaves go by the path {path!r}, so the {what}, whose containers are others, "
            "can't tell them apart; use the same containers, or another key than one with `/`"
        )


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
    def of(cls, tree: Any, values: list[Any], treedef: Any, paths: tuple[str, ...]) -> "Leaves":
        """The leaves of `tree` as another structure tells them, which may find None at some."""
        leaves = cls(tree)
        leaves.values, leaves.treedef = values, treedef
        leaves.__dict__["paths"] = paths
        return leaves

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The key path of each leaf, `/` between components, an NNX Variable's `value` left out."""
        return tuple(_texts(_entries(self.tree, self._stop)))

    def names(self, aliases: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
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

    def below(self, nodes: Container[str], aliases: Mapping[str, str] | None = None) -> list[bool]:
        """For each leaf, whether it is at or below one of the nodes; the root is `""`.

        Args:
          nodes: Paths.
          aliases: More of them than the leaves were made with.
        """
        flags = ["" in nodes] * len(self.paths)
        for path, i in self.names(aliases):
            flags[i] = flags[i] or any(node in nodes for node in ancestors(path))
        return flags

    def rebuild(self, values: Iterable[Any]) -> Any:
        """The tree with other leaves."""
        return jax.tree.unflatten(self.treedef, values)

    def fill(self, values: Iterable[Any]) -> Any:
        """The tree with other leaves where it has leaves; its holes stay."""
        pairs = zip(self.values, values, strict=True)
        return self.rebuild(leaf if is_hole(leaf) else value for leaf, value in pairs)

    def without(self, flags: Iterable[bool]) -> Any:
        """The tree with a hole wherever a flag is set."""
        return self.rebuild(HOLE if f else x for x, f in zip(self.values, flags, strict=True))
