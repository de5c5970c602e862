"""Nodes of pytrees as users register them."""

import dataclasses
from typing import Any

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantized:
    """An array of few bits with its scale, as quantization libraries have it."""

    values: Any
    scale: Any
    zero_point: Any = None

    def dequantized(self):
        zero_point = 0 if self.zero_point is None else self.zero_point
        return (self.values.astype(self.scale.dtype) - zero_point) * self.scale


@jax.tree_util.register_pytree_with_keys_class
class NamedArray:
    """A node that checks the shape of its array whenever it is rebuilt, as haliax's does."""

    def __init__(self, array, axes):
        if hasattr(array, "shape") and tuple(array.shape) != axes:
            raise ValueError(f"Shape {array.shape} does not match the axes {axes}")
        self.array, self.axes = array, axes

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("array"), self.array),), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)
