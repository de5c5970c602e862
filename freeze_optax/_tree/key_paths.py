"""Key paths as text: components joined by `/`."""

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from freeze_optax._tree.variables import is_box_type, is_variable_type


class Transparent:
    """Base class of nodes whose own key is left out, so their children have the node's path."""


@functools.cache
def _is_transparent(cls: type) -> bool:
    return is_variable_type(cls) or is_box_type(cls) or issubclass(cls, Transparent)


_COMPONENT: dict[type, Callable[[Any], Any]] = {
    jax.tree_util.DictKey: operator.attrgetter("key"),
    jax.tree_util.SequenceKey: operator.attrgetter("idx"),
    jax.tree_util.GetAttrKey: operator.attrgetter("name"),
    jax.tree_util.FlattenedIndexKey: operator.attrgetter("key"),
}


def key_of(entry: Any) -> Any:
    """Returns the key, index or name in an entry of a key path."""
    return _COMPONENT.get(type(entry), str)(entry)


def _component(entry: Any) -> str:
    # An empty key is quoted, because the empty path is the path of the root.
    return str(key_of(entry)) or "''"


def path_text(entries: Iterable[Any]) -> str:
    """Returns a key path as text, with `/` between components."""
    return "/".join(map(_component, entries))


def path_texts(paths: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """Yields key paths as text; leaves in a row below one node share the text of that node."""
    parent, parent_text = None, ""
    for entries in paths:
        if entries and entries[:-1] != parent:
            parent = entries[:-1]
            parent_text = path_text(parent) + "/" if parent else ""
        yield parent_text + _component(entries[-1]) if entries else ""


def leaf_key_paths(
    tree: Any, stop: Callable[[Any], bool], prefix: tuple[Any, ...] = ()
) -> Iterator[tuple[Any, ...]]:
    """Yields the key path of each leaf, without the keys inside transparent nodes.

    Args:
      tree: Any pytree.
      stop: Says which nodes also count as leaves.
      prefix: The key path of `tree` in a larger tree.
    """
    is_leaf: Callable[[Any], bool] = lambda x: (  # noqa: E731
        (_is_transparent(type(x)) or stop(x)) and x is not tree
    )
    if stop(tree):
        yield prefix
        return
    # The key that a transparent node adds is left out here, where the node is known, and not in the
    # text of the path: there, a user's field named `value` looks the same, and it must stay.
    start = 1 if _is_transparent(type(tree)) else 0
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    if not prefix and not start and not any(map(_is_transparent, {type(x) for _, x in pairs})):
        yield from (keys for keys, _ in pairs)  # as in nearly all trees
        return
    for keys, node in pairs:
        entries = (*prefix, *keys[start:]) if prefix or start else keys
        if _is_transparent(type(node)) and not stop(node) and node is not tree:
            yield from leaf_key_paths(node, stop, entries)
        else:
            yield entries


def ancestors(path: str) -> Iterator[str]:
    """Yields `path` and the paths of all nodes above it, the nearest first, without the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def check_unique(paths: Sequence[str], what: str) -> None:
    """Raises if two leaves have the same path, which a slash in a key makes possible.

    Args:
      paths: The paths of leaves that are to be matched by path with a tree in other containers.
      what: What to call that tree in the error.

    Raises:
      ValueError: Naming the path.
    """
    path, count = max(Counter(paths).items(), key=operator.itemgetter(1), default=("", 0))
    if count > 1:
        raise ValueError(
            f"two leaves have the path {path!r}, so they can't be matched by path with the {what}, "
            "whose containers differ; use the same containers, or a key without `/`"
        )


def nodes_of(paths: Iterable[str]) -> dict[str, None]:
    """Returns the paths and those of all nodes above them, each once, in order, as dict keys."""
    return dict.fromkeys(node for path in paths for node in (path, *ancestors(path)))


def natural_order(text: str) -> tuple[Any, ...]:
    """Returns a sort key that puts `layer_2` before `layer_10`."""
    # Splitting on a group alternates text and digits, so items at one position can be compared.
    # Digits are not converted with `int`, which refuses more than 4,300 of them.
    pieces = enumerate(re.split(r"([0-9]+)", text))
    return tuple((len(s.lstrip("0")), s.lstrip("0")) if i % 2 else s for i, s in pieces)


def dots_as_slashes(text: str) -> str:
    """Returns a key path in which dots separate components too, as in the names of PyTorch."""
    return text.replace(".", "/")
