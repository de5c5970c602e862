"""Which nodes of a tree are quantized arrays, and which merely hold integers beside weights."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import sparse

import freeze_optax as fo
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.quantized import quantized_nodes
from tests.support.nodes import Keyless, Quantized

BASE, SCALE = jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3))


@flax.struct.dataclass
class Struct:
    qvalue: Any
    scale: Any
    zero_point: Any = None


class Pair(NamedTuple):
    values: Any
    scale: Any


class ArrayPair(Pair):
    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.scale.dtype)


class Layer(eqx.Module):
    weight: Any
    scale: Any


class EquinoxArray(Layer):
    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.scale.dtype


class Stored(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(Quantized(BASE, SCALE))
        self.bias = nnx.Param(jnp.ones(3))


def paths_of(tree: Any) -> list[str]:
    leaves = Leaves(tree)
    return [node.path(leaves) for node in quantized_nodes(leaves)]


SMALL = ["int2", "int4", "int8", "uint2", "uint4", "uint8"]
SMALL += ["float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize("dtype", SMALL)
def test_an_array_of_few_bits_and_its_scale_in_a_class_of_their_own_are_one_node(dtype):
    stored = jax.ShapeDtypeStruct((4, 3), dtype)
    tree = {"a": [jnp.ones(2), Quantized(stored, SCALE)], "b": SCALE, "c": Struct(stored, SCALE)}
    assert paths_of(tree) == ["a/1", "c"]


UNITS = {
    "zero point": Quantized(BASE, SCALE, jnp.ones((1, 3))),
    "int8 zero point": Quantized(BASE, SCALE, jnp.ones((1, 3), jnp.int8)),
    "scales in a list": Quantized(BASE, [SCALE, SCALE]),
    "a number": Quantized(BASE, 0.5),
    "one scale for each value": Quantized(jnp.ones((1, 3), jnp.int8), SCALE),
    "exponents": Quantized(
        jax.ShapeDtypeStruct((4, 32), "float4_e2m1fn"), jnp.ones((4, 1), jnp.float8_e8m0fnu)
    ),
    "small scales of a small dtype": Quantized(
        jax.ShapeDtypeStruct((4, 16), "float4_e2m1fn"), jnp.ones((4, 1), jnp.float8_e4m3fn)
    ),
    "NumPy": Quantized(np.ones((4, 3), np.int8), np.ones((1, 3))),
    "no keys": Keyless(BASE, SCALE),
    "in a struct": {"x": Struct(Quantized(BASE, SCALE), jnp.ones(9))}["x"].qvalue,
    "a tuple for an array": ArrayPair(BASE, SCALE),
    "an Equinox array": EquinoxArray(BASE, SCALE),
    "names of qwix in a dict": {"qvalue": BASE, "scale": SCALE},
    "names of qwix in an nnx.State": nnx.State(
        {"qvalue": nnx.Param(BASE), "scale": nnx.Param(SCALE)}
    ),
    "names of AQT": {"qvalue": BASE, "scale": [SCALE, SCALE], "bias": [SCALE]},
}


@pytest.mark.parametrize("node", UNITS.values(), ids=UNITS)
def test_a_quantized_node_is_found_in_any_form(node):
    assert paths_of({"w": jnp.ones(2), "x": {"node": node}, "y": jnp.ones(2)}) == ["x/node"]
    assert paths_of(node) == [""]
    leaves = Leaves({"node": node, "z": 1.0})
    (found,) = quantized_nodes(leaves)
    assert sorted((found.stored, *found.companions)) == list(range(len(leaves.values) - 1))
    assert fo.mask(fo.nothing, {"node": node, "z": 1.0})["z"] is False
    assert all(jax.tree.leaves(fo.mask(fo.nothing, node)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    kernel: Any
    more: Any


ORDINARY = {
    "dict": {"kernel": SCALE, "mask": BASE},
    "list": [BASE, SCALE],
    "tuple": (BASE, SCALE),
    "NamedTuple": Pair(BASE, SCALE),
    "an Equinox layer": Layer(BASE, SCALE),
    "an nnx.State": nnx.State({"kernel": nnx.Param(SCALE), "table": nnx.Param(BASE)}),
    "FrozenDict": flax.core.freeze({"kernel": SCALE, "table": BASE}),
    "a counter": Weights(SCALE, jnp.zeros((), jnp.int32)),
    "a small counter": Weights(SCALE, jnp.zeros((), jnp.int8)),
    "a bool mask": Weights(SCALE, SCALE > 0),
    "a PRNG key": Weights(SCALE, jax.random.key(0)),
    "a raw PRNG key": Weights(SCALE, jax.random.PRNGKey(0)),
    "few integers beside many weights": Weights(jnp.ones((4, 4)), jnp.ones(4, jnp.int8)),
    "a model with a table": Weights({"w": SCALE}, BASE),
    "a model with a layer": Weights(Weights(SCALE, SCALE), BASE),
    "weights of eight bits": Weights(
        jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(2, jnp.float8_e4m3fn)
    ),
    "a sparse matrix": sparse.BCOO.fromdense(jnp.eye(3), index_dtype=jnp.int8),
    "qvalue alone": {"qvalue": jnp.ones(3, jnp.float8_e4m3fn)},
    "qvalue of float32": {"qvalue": jnp.ones(3), "scale": SCALE},
    "qvalue without a scale": {"qvalue": jnp.ones(3, jnp.int8), "scaled": SCALE},
}


@pytest.mark.parametrize("node", ORDINARY.values(), ids=ORDINARY)
def test_weights_beside_integers_go_on_training_in_an_ordinary_node(node):
    tree = {"node": node, "q": Quantized(BASE, SCALE)}
    assert paths_of(tree) == ["q"]
    assert not paths_of(node)
    mask = fo.mask(fo.nothing, tree)["node"]
    for leaf, frozen in zip(jax.tree.leaves(node), jax.tree.leaves(mask), strict=True):
        assert frozen == (not jnp.issubdtype(leaf.dtype, jnp.floating))


def test_a_quantized_node_in_an_nnx_variable_is_found():
    model = Stored()
    for tree in (nnx.state(model), model):
        mask = fo.mask(fo.nothing, tree)
        assert jax.tree.leaves(mask) == [False, True, True]


def test_nodes_are_found_beside_holes_and_in_deep_trees():
    tree: Any = Quantized(BASE, SCALE)
    for _ in range(300):
        tree = Weights(jnp.ones(2), [Struct(tree, fo.partition(1.0, True)[0])])
    leaves = Leaves(tree)
    (node,) = quantized_nodes(leaves)
    assert [leaves.values[i].dtype for i in (node.stored, *node.companions)] == ["int8", "float32"]


def test_a_node_is_found_where_it_stands_in_a_node_of_another_class():
    tree = Struct(jnp.ones(3), Quantized(BASE, SCALE))
    assert fo.mask(fo.nothing, tree) == Struct(False, Quantized(True, True))


def test_a_hole_in_place_of_the_values_leaves_the_scale_to_the_spec():
    trainable, rest = fo.partition({"q": Quantized(BASE, SCALE)}, fo.everything - "q/scale")
    assert jax.tree.leaves(fo.mask(fo.nothing, trainable)) == [False]
    assert jax.tree.leaves(fo.mask(fo.nothing, rest)) == [True]
