"""Trees as flat dicts from name to NumPy array, as other systems see their params."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Flat = dict[str, np.ndarray]


def flat(tree: Any) -> Flat:
    """The leaves by name, joined by slashes, in double precision; holes left out."""
    entries = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in entries
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts that has these values at these names."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *nodes, last = name.split("/")
        below = tree
        for node in nodes:
            below = below.setdefault(node, {})
        below[last] = value
    return tree


def draw(names: Sequence[str], seed: int, size: int = 2) -> Flat:
    """Numbers for each name, of both signs and of several sizes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=size) * 2.0 ** rng.integers(-2, 2) for name in names}


def as_params(values: Mapping[str, Any]) -> Any:
    """The tree with these numbers, in single precision."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), nested(values))


def assert_close(tree: Any, expected: Mapping[str, Any], rtol: float = 1e-5) -> None:
    actual = flat(tree)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol, atol=1e-6, err_msg=name)
