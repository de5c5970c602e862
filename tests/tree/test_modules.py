"""The modules of a model by path: the nodes of a tree, what stands below them, which ones count."""

import collections
import dataclasses
import typing

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, struct
from flax.core import FrozenDict

from freeze_optax._tree.holes import HOLE
from freeze_optax._tree.modules import Modules, children_of, is_module, walk_nodes
from tests.support.nodes import Keyless


class Pair(typing.NamedTuple):
    w: typing.Any
    b: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: typing.Any
    name: str = dataclasses.field(default="block", metadata={"static": True})


@struct.dataclass
class Scale:
    value: typing.Any


@chex.dataclass
class Moments:
    mean: typing.Any


class Layer(eqx.Module):
    w: typing.Any
    inner: typing.Any = None


def named(tree, children=children_of):
    return [(path, type(node).__name__) for path, node in walk_nodes(tree, children)]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (1.0, []),
        (jnp.ones(2), []),
        (jax.ShapeDtypeStruct((2,), jnp.float32), []),
        ("text", []),
        (jax.nn.relu, []),
        ({}, [("", "dict")]),
        (None, [("", "NoneType")]),
        ({"b": [1.0], "a": (2.0,)}, [("", "dict"), ("a", "tuple"), ("b", "list")]),
        (
            {"x": Block([Pair(1.0, Scale(2.0))])},
            [
                ("", "dict"),
                ("x", "Block"),
                ("x/kernel", "list"),
                ("x/kernel/0", "Pair"),
                ("x/kernel/0/b", "Scale"),
            ],
        ),
        (
            Keyless(1.0, Keyless({"y": [2.0]})),
            [("", "Keyless"), ("1", "Keyless"), ("1/0", "dict"), ("1/0/y", "list")],
        ),
        (FrozenDict({"a": {"b": 1.0}}), [("", "FrozenDict"), ("a", "dict")]),
        (
            Layer(1.0, Layer(Scale(2.0))),
            [
                ("", "Layer"),
                ("inner", "Layer"),
                ("inner/w", "Scale"),
                ("inner/inner", "NoneType"),
            ],
        ),
        ({"mlp/~/linear_0": Scale(1.0)}, [("", "dict"), ("mlp/~/linear_0", "Scale")]),
        ({1: [1.0], 10: [2.0]}, [("", "dict"), ("1", "list"), ("10", "list")]),
        ((HOLE, 1.0), [("", "tuple"), ("0", "MaskedNode")]),
    ],
)
def test_walk_gives_each_node_above_the_leaves_with_its_path(tree, expected):
    found = named(tree)
    assert found[:1] == expected[:1]
    assert sorted(found) == sorted(expected)


def test_walk_gives_the_very_nodes_and_those_above_first():
    inner = Layer(1.0)
    tree = {"z": [inner], "a": Scale({"x": 2.0})}
    nodes = dict(walk_nodes(tree))
    assert nodes[""] is tree
    assert nodes["z"] is tree["z"]
    assert nodes["z/0"] is inner
    assert nodes["a"] is tree["a"]
    order = list(nodes)
    assert order == ["", "a", "a/value", "z", "z/0", "z/0/inner"]


def test_a_shared_node_comes_once_for_each_of_its_paths():
    shared = Scale({"x": 1.0})
    nodes = list(walk_nodes({"a": shared, "b": [shared, shared]}))
    assert [path for path, node in nodes if node is shared] == ["a", "b/0", "b/1"]
    inside = [path for path, node in nodes if node is shared.value]
    assert inside == ["a/value", "b/0/value", "b/1/value"]


def test_walk_ends_where_nodes_hold_each_other():
    left, right = {}, {}
    left["right"], right["left"] = right, left

    def children(node):
        return [((key,), child) for key, child in node.items()]

    pairs = [(path, node is left) for path, node in walk_nodes(left, children)]
    assert pairs == [("", True), ("right", False)]


def test_walk_takes_apart_what_the_function_can():
    tree = {"a": {"b": 1, "c": {}}, "d": {}}

    def children(node):
        return [((key,), child) for key, child in node.items()] if type(node) is dict else None

    assert [path for path, _ in walk_nodes(tree, children)] == ["", "a", "a/c", "d"]


@pytest.mark.parametrize("wrap", [lambda t: [t], lambda t: {"a": t}, Keyless, Scale])
def test_walk_reaches_the_bottom_of_a_tree_a_thousand_levels_deep(wrap):
    tree = 1.0
    for _ in range(1000):
        tree = wrap(tree)
    depths = [path.count("/") + bool(path) for path, _ in walk_nodes(tree)]
    assert depths == list(range(1000))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.gains = nnx.Param({"value": [jnp.ones(1)]})
        self.value = nnx.Param(jnp.ones(1))


def test_the_value_of_an_nnx_variable_is_no_component():
    nodes = {}
    for path, node in walk_nodes(Net(nnx.Rngs(0))):
        nodes.setdefault(path, []).append(type(node).__name__)
    assert nodes["layers/0/kernel"] == ["Param"]
    assert nodes["value"] == ["Param"]
    assert nodes["gains"] == ["Param", "dict"]
    assert nodes["gains/value"] == ["list"]
    assert not {path for path in nodes if path.endswith(("kernel/value", "gains/value/value"))}


@pytest.mark.parametrize(
    "leaf", [1.0, 1, "a", jnp.ones(2), jax.ShapeDtypeStruct((), float), jax.nn.relu, object()]
)
def test_nothing_stands_below_a_leaf(leaf):
    assert children_of(leaf) is None


@pytest.mark.parametrize("node", [{}, [], (), None, HOLE, Keyless(), optax.EmptyState()])
def test_below_an_empty_node_is_an_empty_list(node):
    assert children_of(node) == []


KEYS = jax.tree_util


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"b": 1.0, "a": [2.0]}, [((KEYS.DictKey("a"),), [2.0]), ((KEYS.DictKey("b"),), 1.0)]),
        ([None, (1.0,)], [((KEYS.SequenceKey(0),), None), ((KEYS.SequenceKey(1),), (1.0,))]),
        (Pair({}, 1.0), [((KEYS.GetAttrKey("w"),), {}), ((KEYS.GetAttrKey("b"),), 1.0)]),
        (Keyless([1.0]), [((KEYS.FlattenedIndexKey(0),), [1.0])]),
        (Block({"x": 1.0}), [((KEYS.GetAttrKey("kernel"),), {"x": 1.0})]),
    ],
)
def test_children_are_what_stands_directly_below(node, expected):
    assert children_of(node) == expected


def test_a_node_equal_to_its_child_is_still_a_node():
    class Same:
        def __init__(self, child):
            self.child = child

        def __eq__(self, other):
            return True

        __hash__ = None

    jax.tree_util.register_pytree_node(Same, lambda s: ([s.child], None), lambda _, c: Same(*c))
    leaf = jnp.ones(2)
    ((_, below),) = children_of(Same(leaf))
    assert below is leaf


@pytest.mark.parametrize(
    "node",
    [
        Layer(1.0),
        Block(1.0),
        Scale(1.0),
        Pair(1.0, 2.0),
        Keyless(),
        Moments(mean=1.0),
        nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
        nnx.Dict(a=nnx.Param(1.0)),
        optax.ScaleByAdamState(count=0, mu=1.0, nu=1.0),
    ],
    ids=lambda node: type(node).__name__,
)
def test_an_instance_of_a_class_that_may_mean_something_is_a_module(node):
    assert is_module(node)


@pytest.mark.parametrize(
    "node",
    [
        {},
        [],
        (),
        None,
        HOLE,
        FrozenDict({}),
        collections.OrderedDict(a=1.0),
        collections.defaultdict(list),
        nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))),
        nnx.Param(1.0),
        nnx.BatchStat(1.0),
    ],
    ids=lambda node: type(node).__name__,
)
def test_a_mere_container_is_no_module(node):
    assert not is_module(node)


def test_a_table_is_a_dict_that_knows_the_other_paths():
    table = {"": 1, "a": 2}
    aliases = {"b": "a"}
    modules = Modules(table, aliases)
    assert modules == {"": 1, "a": 2}
    assert modules.aliases == {"b": "a"}
    assert Modules(table).aliases == {}


def test_a_table_keeps_its_own_copy_of_the_aliases():
    aliases = {"b": "a"}
    modules = Modules({}, aliases)
    aliases["c"] = "a"
    assert modules.aliases == {"b": "a"}
