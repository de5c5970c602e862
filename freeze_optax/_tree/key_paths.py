"""Key paths as text: components with `/` between them."""

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from freeze_optax._tree.variables import is_variable_type


class Transparent:
    """A node whose children go by its own path."""


@functools.cache
def _is_transparent(cls: type) -> bool:
    return is_variable_type(cls) or issubclass(cls, Transparent)


_COMPONENT: dict[type, Callable[[Any], Any]] = {
    jax.tree_util.DictKey: operator.attrgetter("key"),
    jax.tree_util.SequenceKey: operator.attrgetter("idx"),
    jax.tree_util.GetAttrKey: operator.attrgetter("name"),
    jax.tree_util.FlattenedIndexKey: operator.attrgetter("key"),
}


def _component(entry: Any) -> str:
    # An empty key is quoted, as the empty path is that of the root.
    return str(_COMPONENT.get(type(entry), str)(entry)) or "''"


def path_text(entries: Iterable[Any]) -> str:
    """The components of a key path as text, `/` between them."""
    return "/".join(map(_component, entries))


def path_texts(paths: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """Key paths as text; the part that a leaf shares with the one before is made once."""
    above, start = None, ""
    for entries in paths:
        if entries and entries[:-1] != above:
            above = entries[:-1]
            start = path_text(above) + "/" if above else ""
        yield start + _component(entries[-1]) if entries else ""


def leaf_key_paths(
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
            yield from leaf_key_paths(node, stop, entries)
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


def nodes_of(paths: Iterable[str]) -> dict[str, None]:
    """All nodes, each once, in order: the paths themselves and those above them."""
    return dict.fromkeys(node for path in paths for node in (path, *ancestors(path)))


def natural_order(text: str) -> tuple[Any, ...]:
    """A key that sorts `layer_2` before `layer_10`."""
    # Splitting on a group alternates text and digits, so equal positions compare. Not by `int`,
    # which refuses more than 4,300 digits.
    pieces = enumerate(re.split(r"([0-9]+)", text))
    return tuple((len(s.lstrip("0")), s.lstrip("0")) if i % 2 else s for i, s in pieces)
