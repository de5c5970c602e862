"""Key paths as text, and which leaves can be trained."""

import dataclasses
import functools
import typing

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx, struct
from flax.core import FrozenDict

from freeze_optax._tree.holes import HOLE, is_hole
from freeze_optax._tree.kinds import can_train, is_numpy_only
from freeze_optax._tree.leaves import Leaves
from tests.support.nodes import Keyless


class Pair(typing.NamedTuple):
    w: typing.Any
    value: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    value: typing.Any
    kernel: typing.Any


@struct.dataclass
class Variable:
    value: typing.Any
    name: str = struct.field(pytree_node=False, default="mine")


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"b": 1.0, "a": {"c": 2.0}}, ("a/c", "b")),
        (FrozenDict({"b": 1.0, "a": {"c": 2.0}}), ("a/c", "b")),
        ([1.0, (2.0, 3.0), [{"x": 4.0}]], ("0", "1/0", "1/1", "2/0/x")),
        ({0: 1.0, 2: 2.0, 10: [3.0]}, ("0", "2", "10/0")),
        (Pair(w=1.0, value={"value": 2.0}), ("w", "value/value")),
        ({"block": Block(value=1.0, kernel=2.0)}, ("block/value", "block/kernel")),
        ({"x": Variable(1.0)}, ("x/value",)),
        (Variable({"value": 1.0}), ("value/value",)),
        ({"c": Keyless(1.0, {"x": 2.0})}, ("c/0", "c/1/x")),
        ({"a": None, "b": [None, 1.0]}, ("b/1",)),
        ({"a": HOLE, "b": (1.0, HOLE)}, ("a", "b/0", "b/1")),
        ({"mlp/~/linear_0": {"w": 1.0}, "mlp": {"b": 2.0}}, ("mlp/b", "mlp/~/linear_0/w")),
        (3.0, ("",)),
        (HOLE, ("",)),
        (None, ()),
        ({}, ()),
    ],
)
def test_paths_are_the_keys_joined_by_slashes(tree, paths):
    assert Leaves(tree).paths == paths


def test_the_path_of_a_bare_array_is_empty():
    assert Leaves(jnp.ones(2)).paths == ("",)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)])
        self.value = nnx.Param(jnp.ones(2))
        self.gains = nnx.Param({"value": jnp.ones(1), "x": [jnp.ones(1)]})
        self.inner = nnx.data({"value": nnx.Param(jnp.ones(1))})


NET = (
    "gains/value",
    "gains/x/0",
    "inner/value",
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/mean",
    "layers/1/scale",
    "layers/1/var",
    "value",
)
STATISTICS = ("layers/1/mean", "layers/1/var")


def test_the_value_of_an_nnx_variable_is_dropped_and_a_field_of_that_name_stays():
    net = Net(nnx.Rngs(0))
    assert Leaves(net).paths == NET
    assert Leaves(nnx.state(net)).paths == NET
    params = nnx.state(net, nnx.Param)
    assert Leaves(params).paths == tuple(path for path in NET if path not in STATISTICS)


def test_an_nnx_state_of_plain_arrays_has_the_same_paths():
    assert Leaves(nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0))))).paths == NET


class Gain(nnx.Param):
    pass


def test_variables_of_every_kind_have_the_path_of_their_owner():
    assert Leaves(nnx.Param(jnp.ones(2))).paths == ("",)
    assert Leaves(nnx.Param({"value": jnp.ones(2)})).paths == ("value",)
    assert Leaves({"a": Gain(jnp.ones(2)), "b": nnx.BatchStat(1.0)}).paths == ("a", "b")


def test_a_variable_with_a_hole_keeps_its_path():
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    held = jax.tree.map(lambda _: HOLE, state)
    assert Leaves(held).paths == ("bias", "kernel")
    assert Leaves(held).values == [HOLE, HOLE]


def test_the_value_of_a_linen_box_is_dropped_and_a_field_of_that_name_stays():
    init = linen.with_partitioning(linen.initializers.ones, ("x", "y"))
    variables = linen.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    assert Leaves(variables["params"]).paths == ("bias", "kernel")
    box = functools.partial(linen.LogicallyPartitioned, names=("x",))
    tree = {"a": box({"value": jnp.ones(1), "b": jnp.ones(1)}), "value": box(box(jnp.ones(1)))}
    assert Leaves(tree).paths == ("a/b", "a/value", "value")
    assert Leaves(box(HOLE)).paths == ("",)


def test_equinox_modules_have_the_paths_of_their_fields():
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    layers = ("layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias")
    assert Leaves(mlp).paths == (*layers, "activation", "final_activation")
    assert Leaves(eqx.filter(mlp, eqx.is_array)).paths == layers


def haiku_mlp(x):
    return hk.nets.MLP([3, 2])(x)


def test_slashes_in_haiku_names_separate_components():
    params = hk.transform(haiku_mlp).init(jax.random.key(0), jnp.ones((1, 2)))
    assert Leaves(params).paths == (
        "mlp/~/linear_0/b",
        "mlp/~/linear_0/w",
        "mlp/~/linear_1/b",
        "mlp/~/linear_1/w",
    )


def test_paths_stand_in_the_order_of_the_values():
    tree = {
        "z": Block(1.0, 2.0),
        "a": [3.0, HOLE],
        "net": nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))),
    }
    leaves = Leaves(tree)
    by_path = dict(zip(leaves.paths, leaves.values, strict=True))
    net = tree["net"]
    assert by_path == {
        "a/0": 3.0,
        "a/1": HOLE,
        "net/bias": net["bias"][...],
        "net/kernel": net["kernel"][...],
        "z/value": 1.0,
        "z/kernel": 2.0,
    }


def test_rebuild_gives_the_tree_with_other_leaves():
    assert Leaves({"a": 1.0, "b": HOLE}).rebuild([2, 3]) == {"a": 2, "b": 3}


def test_fill_leaves_the_holes():
    assert Leaves({"a": 1.0, "b": HOLE}).fill_leaves([2, 3]) == {"a": 2, "b": HOLE}


def test_holes_are_those_of_optax():
    assert is_hole(optax.MaskedNode())
    assert not any(map(is_hole, [None, (), {}, 0.0, optax.EmptyState(), optax.MaskedNode]))


TRAINABLE = {
    "float32": jnp.ones(2),
    "float16": jnp.ones(2, jnp.float16),
    "bfloat16": jnp.ones(2, jnp.bfloat16),
    "float8_e4m3fn": jnp.ones(2, jnp.float8_e4m3fn),
    "float8_e5m2": jnp.ones(2, jnp.float8_e5m2),
    "complex64": jnp.ones(2, jnp.complex64),
    "scalar array": jnp.float32(1),
    "empty array": jnp.ones((0, 3)),
    "numpy float64": np.ones(2),
    "numpy complex128": np.ones(2, np.complex128),
    "numpy bfloat16": np.ones(2, ml_dtypes.bfloat16),
    "numpy scalar": np.float32(1),
    "numpy complex scalar": np.complex64(1),
    "float": 1.0,
    "nan": float("nan"),
    "complex": 1j,
    "abstract float": jax.ShapeDtypeStruct((2,), jnp.float32),
    "abstract bfloat16": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    "abstract complex": jax.ShapeDtypeStruct((2,), jnp.complex64),
}


@pytest.mark.parametrize("leaf", TRAINABLE.values(), ids=TRAINABLE)
def test_floats_and_complex_numbers_can_be_trained(leaf):
    assert can_train(leaf) is True


UNTRAINABLE = {
    "int32": jnp.ones(2, jnp.int32),
    "uint8": jnp.ones(2, jnp.uint8),
    "int4": jnp.ones(2, jnp.int4),
    "bool array": jnp.ones(2, bool),
    "float0": np.zeros(2, jax.dtypes.float0),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
    "raw key": jax.random.PRNGKey(0),
    "numpy int": np.ones(2, np.int64),
    "numpy bool": np.ones(2, bool),
    "numpy strings": np.array(["a"]),
    "numpy objects": np.array([1.0, None]),
    "np.bool_": np.bool_(True),
    "np.int32": np.int32(1),
    "int": 1,
    "bool": True,
    "str": "a",
    "bytes": b"a",
    "None": None,
    "hole": HOLE,
    "function": jax.nn.relu,
    "builtin": print,
    "jnp.float32": jnp.float32,
    "np.float32": np.float32,
    "float type": float,
    "dtype": np.dtype("float32"),
    "object": object(),
    "abstract int": jax.ShapeDtypeStruct((2,), jnp.int32),
    "abstract key": jax.eval_shape(lambda: jax.random.key(0)),
}


@pytest.mark.parametrize("leaf", UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_nothing_else_can_be_trained(leaf):
    assert can_train(leaf) is False


def test_a_traced_leaf_can_be_trained_as_its_dtype_says():
    seen = []
    jax.make_jaxpr(lambda *leaves: seen.extend(map(can_train, leaves)))(
        jnp.ones(2), jnp.ones(2, int), jax.random.key(0), 1.0
    )
    assert seen == [True, False, False, True]


OURS = ["float16", "float32", "float64", "complex64", "complex128", "int64", "bool"]


def test_floats_of_numpy_that_jax_has_not_are_told_by_length_and_byte_order():
    longer, swapped = [np.longdouble, np.clongdouble], [np.dtype(x).newbyteorder() for x in OURS]
    assert [dtype for dtype in OURS if is_numpy_only(np.ones(2, dtype))] == []
    assert [dtype for dtype in longer if not is_numpy_only(np.ones(2, dtype))] == []
    assert [is_numpy_only(np.ones(2, dtype)) for dtype in swapped] == [True] * 5 + [False] * 2
    # A number is never in another byte order.
    numbers = [np.ones(2, dtype)[0] for dtype in (*longer, *OURS, *swapped)]
    assert [is_numpy_only(number) for number in numbers] == [True] * 2 + [False] * 14
    assert not is_numpy_only(jnp.ones(2))
