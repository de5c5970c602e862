"""Quantized nodes: an array of a few bits with the scales that belong to it, as one unit.

To train a scale alone moves all the weights that it stands for, and a gradient for it exists only
by accident. So the leaves of such a node are frozen together, unless a spec tells them apart.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import is_array, is_scale, is_storage, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.modules import is_framework_module, is_module_type, is_sparse_type


class QuantizedNode(NamedTuple):
    """A node that stands for one array of weights.

    Attributes:
      stored: The index of the leaf that holds the quantized values.
      companions: The indices of its other leaves: scales, zero points.
    """

    stored: int
    companions: tuple[int, ...]

    def path(self, leaves: Leaves) -> str:
        """Returns the key path of the node; empty if the node is the root."""
        return leaves.paths[self.stored].rpartition("/")[0]


def quantized_nodes(leaves: Leaves) -> list[QuantizedNode]:
    """Finds the quantized nodes of a tree.

    A node is one in two cases. Its class is neither a container nor a module, it holds an array of
    at most eight bits, and beside that other leaves that have no more elements. Or it has the
    fields `qvalue` and `scale` of qwix, in whatever container: an `nnx.State` and a restored
    checkpoint keep the names of a `QArray` and lose its class.

    A dict, a layer or a model with an integer beside its weights is not quantized: the integer may
    be a counter or a table of its own. An Equinox module is a layer too, unless its class has
    `shape` and `dtype` and so stands for an array (Quax's are such modules).
    """
    if not any(map(is_storage, leaves.values)):
        return []
    nodes = {node.stored: node for node in _nodes_by_name(leaves)}
    return [*({node.stored: node for node in _nodes_by_class(leaves)} | nodes).values()]


def _nodes_by_name(leaves: Leaves) -> Iterator[QuantizedNode]:
    below: dict[str, list[int]] = {}
    for i, path in enumerate(leaves.paths):
        parent, _, name = path.rpartition("/")
        if name == "qvalue" and is_storage(leaves.values[i]):
            below[parent] = [i]
    for i, path in enumerate(leaves.paths if below else ()):
        # AQT keeps its scales in a list.
        parent, _, name = re.sub(r"/\d+$", "", path).rpartition("/")
        if parent in below and name != "qvalue":
            below[parent].append(i)
    for parent, (stored, *companions) in below.items():
        scale = f"{parent}/scale".lstrip("/")
        if any(re.fullmatch(rf"{re.escape(scale)}(/\d+)?", leaves.paths[i]) for i in companions):
            yield QuantizedNode(stored, tuple(companions))


def _nodes_by_class(leaves: Leaves) -> Iterator[QuantizedNode]:
    # No recursion, as a tree may be deeper than Python's stack.
    start, stack = 0, [leaves.tree] if _is_candidate(leaves.tree) else _below(leaves.tree)[::-1]
    while stack:
        node = stack.pop()
        if not _is_candidate(node):
            start += 1
            continue
        below = _below(node)
        if any(map(is_storage, below)) and not any(map(_is_candidate, below)):
            found = _as_quantized(Leaves(node), start)
            if found:
                yield found
                start += 1 + len(found.companions)
                continue
        stack += below[::-1]


def _below(node: Any) -> list[Any]:
    """Returns the leaves below a node, and in the place of others the candidates they are in."""
    # By the order of the calls, as `children_of`: a node may be one of its own children.
    is_below = itertools.chain([False], itertools.repeat(True))
    return jax.tree.leaves(
        node, is_leaf=lambda x: next(is_below) and (is_hole(x) or _is_candidate(x))
    )


_DIRECT = re.compile(r"[^/]+")
_DIRECT_OR_LISTED = re.compile(r"[^/]+(/\d+)?")


def _as_quantized(inner: Leaves, start: int) -> QuantizedNode | None:
    """Returns what a node of its own class is if it is quantized; None for an ordinary node."""
    pairs = list(enumerate(zip(inner.paths, inner.values, strict=True)))
    stored = [i for i, (path, x) in pairs if is_storage(x) and _DIRECT.fullmatch(path)]
    if not stored or not all(_DIRECT_OR_LISTED.fullmatch(path) for _, (path, _) in pairs):
        return None
    main = max(stored, key=lambda i: _size(inner.values[i]))
    others = [x for i, (_, x) in pairs if i != main and (is_scale(x) or number_kind(x) != "other")]
    # Leaves of one dtype are weights of equal rank, and a larger leaf is no scale of this one.
    dtype, size = inner.values[main].dtype, _size(inner.values[main])
    if all(getattr(x, "dtype", None) == dtype for x in others) or size < max(map(_size, others)):
        return None
    companions = tuple(start + i for i in range(len(pairs)) if i != main)
    return QuantizedNode(start + main, companions)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) if is_array(leaf) else 1


def _is_candidate(x: Any) -> bool:
    """Whether `x` is a node, and may by its class stand for an array."""
    return _is_candidate_type(type(x)) and not jax.tree_util.all_leaves([x])


@functools.cache
def _is_candidate_type(cls: type) -> bool:
    if issubclass(cls, Tracer | np.generic | np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        return False
    if not is_module_type(cls) or is_sparse_type(cls):
        return False
    stands_for_array = hasattr(cls, "shape") and hasattr(cls, "dtype")
    return stands_for_array or not (issubclass(cls, tuple) or is_framework_module(cls))
