"""Random trees with awkward keys and leaves, a walk over them, and how two are compared."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from hypothesis import strategies as st

HOLE = optax.MaskedNode()
KEY = jax.random.key(7)

# No number with a leading zero: `1` and `01` are as high as each other in natural order.
NAMES = [
    *("a", "b", "ab", "A", "layer_1", "layer_2", "layer_10", "0", "10", "value", "w2x10"),
    *("x y", " ", "é", "e\u0301", "日本", "a\nb", "'", '"', "\\d", "a.b", "~", "#", "&&", "+"),
    *("[a]", "]", "{a,b}", "}", ",", "*", "**", "?", "!", "^a", "a-b", "{0..2}"),
    *("a/b", "b/", "a//b", "b/c/layer_3"),
]
INTEGERS = [-2, -1, 0, 1, 2, 9, 10, 11]

TRAINABLE: list[Callable[[], Any]] = [
    lambda: 1.5,
    lambda: 2.0 - 1j,
    lambda: np.float64(0.5),
    lambda: np.ones(2, np.float32),
    lambda: np.ones((2, 3), np.float16),
    lambda: np.ones((1, 2), jnp.bfloat16),
    lambda: np.ones(3, np.complex64),
    lambda: np.ones((0, 2), np.float32),
    lambda: jnp.zeros(2),
]
COUNTED: list[Callable[[], Any]] = [
    lambda: 3,
    lambda: True,
    lambda: np.ones(2, np.int32),
    lambda: np.ones((), np.uint8),
    lambda: np.zeros((2, 2), bool),
]
OTHERS: list[Callable[[], Any]] = [lambda: KEY, lambda: "text", lambda: len, object]


def leaves(*kinds: list[Callable[[], Any]]) -> st.SearchStrategy[Any]:
    """Fresh leaves of these kinds, the first kind as often as all others."""
    first, *others = (st.sampled_from(kind).map(lambda make: make()) for kind in kinds)
    return st.one_of(first, st.one_of(others)) if others else first


# Few names too, so that the slash in a key makes two leaves go by one path.
KEYS = st.one_of(st.sampled_from(["a", "b", "a/b"]), st.sampled_from(NAMES))
EMPTY = [None, {}, [], ()]


@st.composite
def trees(
    draw: Any,
    nodes: st.SearchStrategy[Any],
    keys: st.SearchStrategy[str] = KEYS,
    depth: int = 3,
    least: int = 2,
) -> Any:
    """Nested dicts, lists, tuples and FrozenDicts of these leaves, a bare leaf at times."""
    is_root = least == 2
    if not depth or draw(st.integers(0, 19)) > (18 if is_root else 10):
        return draw(nodes)
    if not is_root and draw(st.integers(0, 9)) == 9:
        return draw(st.sampled_from(EMPTY))
    inner = trees(nodes, keys, depth - 1, least=1)
    kind = draw(st.sampled_from([dict, dict, dict, FrozenDict, list, tuple]))
    if kind in (list, tuple):
        return kind(draw(st.lists(inner, min_size=least, max_size=3)))
    names = st.sampled_from(INTEGERS) if draw(st.integers(0, 4)) == 4 else keys
    return kind(draw(st.dictionaries(names, inner, min_size=least, max_size=4)))


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """What is in a container by its key, in the order of jax; None for a leaf."""
    if isinstance(node, dict | FrozenDict):
        return [(key, node[key]) for key in sorted(node)]
    if type(node) in (list, tuple):
        return list(enumerate(node))
    return [] if node is None else None


def container_like(node: Any, values: list[Any]) -> Any:
    """The container with other things in it."""
    if isinstance(node, dict | FrozenDict):
        return type(node)(dict(zip(sorted(node), values, strict=True)))
    return None if node is None else type(node)(values)


def walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Path and value of each leaf and hole, found without jax."""
    below = children(tree)
    if below is None:
        yield "/".join(path), tree
        return
    for key, node in below:
        yield from walk(node, (*path, str(key)))


def rebuilt(tree: Any, values: Iterator[Any]) -> Any:
    """The tree with other leaves, holes being leaves."""
    below = children(tree)
    if below is None:
        return next(values)
    return container_like(tree, [rebuilt(node, values) for _, node in below])


def is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def trains(leaf: Any) -> bool:
    """Whether an optimizer may move the leaf."""
    if hasattr(leaf, "dtype"):
        return str(leaf.dtype) in ("float64", "float32", "float16", "bfloat16", "complex64")
    return isinstance(leaf, float | complex)


def frozen(tree: Any, flags: list[bool]) -> list[bool]:
    """The flags, with those of leaves that cannot be trained set."""
    return [flag or not trains(leaf) for (_, leaf), flag in zip(walk(tree), flags, strict=True)]


def learned(leaf: Any) -> bool:
    """Whether the leaf is a number or an array of them, or was."""
    counts = trains(leaf) or isinstance(leaf, bool | int) or is_hole(leaf)
    return counts or str(getattr(leaf, "dtype", "")) in ("int32", "uint8", "bool")


def pairs(tree: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """The leaves of two trees that have to be of one structure."""
    values, structure = jax.tree.flatten(tree, is_leaf=is_hole)
    others, other_structure = jax.tree.flatten(expected, is_leaf=is_hole)
    assert structure == other_structure
    for x, y in zip(values, others, strict=True):
        # One hole is as good as another.
        if not (is_hole(x) and is_hole(y)):
            yield x, y


def assert_equal(tree: Any, expected: Any) -> None:
    """The same structure, and leaves of the same types and values."""
    for x, y in pairs(tree, expected):
        assert (type(x), x) == (type(y), y)


def assert_very_same(tree: Any, expected: Any) -> None:
    """The same structure and the very same leaves."""
    for x, y in pairs(tree, expected):
        assert x is y


def assert_bitwise(tree: Any, expected: Any) -> None:
    """The same structure, and leaves of the same shapes, dtypes and bits."""
    for x, y in pairs(tree, expected):
        assert _bits(x) == _bits(y)


def _bits(x: Any) -> tuple[bytes, tuple[int, ...], Any]:
    array = x if hasattr(x, "dtype") else jnp.asarray(x)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(array) if is_key else array
    return np.asarray(data).tobytes(), array.shape, array.dtype
