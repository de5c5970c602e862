"""`assign`: sets leaves by their exact path; dtype, sharding and kind of array stay the leaf's."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import freeze_optax as fo


def params() -> dict[str, Any]:
    return {
        "dense": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 3.0)},
        "layers": [jnp.full(2, 4.0), jnp.full(2, 5.0)],
        "steps": jnp.array(7),
    }


def same_leaves(tree: Any, leaves: list[Any]) -> bool:
    return all(a is b for a, b in zip(jax.tree.leaves(tree), leaves, strict=True))


ROW = np.array([1.0, -0.0, 3.0], np.float32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(0.5, np.full((2, 3), 0.5), id="Python float"),
        pytest.param(1, np.ones((2, 3)), id="Python int"),
        pytest.param(True, np.ones((2, 3)), id="Python bool"),
        pytest.param(np.float32(0.25), np.full((2, 3), 0.25), id="NumPy scalar"),
        pytest.param(jnp.int32(-3), np.full((2, 3), -3.0), id="jax scalar"),
        pytest.param(ROW, np.stack([ROW, ROW]), id="row"),
        pytest.param([[1.0], [2.0]], np.repeat([[1.0], [2.0]], 3, axis=1), id="column, a list"),
        pytest.param(jnp.asarray(ROW)[None], np.stack([ROW, ROW]), id="one row"),
        pytest.param(np.eye(2, 3, dtype=np.float64), np.eye(2, 3), id="whole, of more bits"),
        pytest.param(jnp.eye(2, 3, dtype=jnp.bfloat16), np.eye(2, 3), id="whole, of fewer bits"),
    ],
)
def test_scalars_and_arrays_broadcast_to_the_leaf(value, expected):
    before = params()
    leaves = jax.tree.leaves(before)
    new = fo.assign(before, {"dense/kernel": value})
    wanted = {**params(), "dense": {**params()["dense"], "kernel": expected.astype(np.float32)}}
    fo.testing.assert_frozen(wanted, new, True)
    assert isinstance(new["dense"]["kernel"], jax.Array)
    others = (new["dense"]["bias"], *new["layers"], new["steps"])
    assert all(any(x is leaf for leaf in leaves) for x in others)
    assert same_leaves(before, leaves)
    fo.testing.assert_frozen(params(), before, True)


def test_several_leaves_are_set_at_once_and_none_by_an_empty_dict():
    new = fo.assign(params(), {"layers/1": 0.0, "steps": 0, "dense/bias": ROW})
    expected = params()
    expected["layers"][1], expected["steps"] = jnp.zeros(2), jnp.array(0)
    expected["dense"]["bias"] = jnp.asarray(ROW)
    fo.testing.assert_frozen(expected, new, True)
    before = params()
    assert same_leaves(fo.assign(before, {}), jax.tree.leaves(before))


def test_every_bit_of_a_value_of_the_same_dtype_is_set():
    bits = np.array([0x80000000, 0x00000001, 0x7FC00123, 0xFF800000], np.uint32)
    value = bits.view(np.float32)  # -0.0, a subnormal, a NaN with a payload, -inf
    for given in (value, jnp.asarray(value)):
        new = fo.assign({"a": jnp.ones((2, 4))}, {"a": given})["a"]
        np.testing.assert_array_equal(np.asarray(new).view(np.uint32), np.stack([bits, bits]))


DTYPES = [
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "int8",
    "uint8",
    "int4",
    "uint32",
    "bool",
]


@pytest.mark.parametrize("library", [jnp, np], ids=["jax", "NumPy"])
@pytest.mark.parametrize("name", DTYPES)
def test_the_dtype_and_the_library_stay_those_of_the_leaf(name, library):
    dtype = jnp.dtype(name)
    leaf = library.zeros((2, 2), dtype)
    value = True if name == "bool" else 1
    for given in (value, np.full(2, value), jnp.full((2, 1), value)):
        new = fo.assign({"a": leaf}, {"a": given})["a"]
        assert isinstance(new, jax.Array if library is jnp else np.ndarray)
        assert (new.dtype, new.shape) == (dtype, (2, 2))
        np.testing.assert_array_equal(np.asarray(new).astype(np.complex64), np.ones((2, 2)))
    np.testing.assert_array_equal(np.asarray(leaf).astype(np.complex64), np.zeros((2, 2)))


@pytest.mark.parametrize("library", [jnp, np], ids=["jax", "NumPy"])
@pytest.mark.parametrize(
    ("name", "largest", "beyond"),
    [
        ("float8_e4m3fn", 448, [500, math.inf, -math.inf]),
        ("float8_e5m2", 57344, [65536]),
        ("float4_e2m1fn", 6, [100, -10, math.inf, math.nan]),
        ("bfloat16", 2.0**127, [3.4e39]),
        ("float16", 65504, [65536]),
        ("complex64", 3e38, [1e39, 1e39j]),
    ],
)
def test_a_number_that_the_dtype_has_not_is_an_error(name, largest, beyond, library):
    leaf = library.zeros(2, jnp.dtype(name))
    for x in (largest, -largest):
        assert complex(fo.assign({"a": leaf}, {"a": x})["a"][0]) == pytest.approx(x)
    for x in beyond:
        with pytest.raises(ValueError, match="which that dtype can't hold; cast it first"):
            fo.assign({"a": leaf}, {"a": x})


@pytest.mark.parametrize("name", ["float8_e5m2", "bfloat16", "float16", "complex64"])
def test_infinity_and_nan_stay_what_they_are(name):
    for x in (math.inf, -math.inf, math.nan):
        new = fo.assign({"a": jnp.zeros(2, jnp.dtype(name))}, {"a": x})["a"]
        np.testing.assert_array_equal(np.asarray(new).astype(np.complex64).real, [x, x])


def test_a_numpy_leaf_is_a_new_array_that_can_be_written_to():
    leaf, value = np.zeros((2, 3)), np.ones(3)
    new = fo.assign({"a": leaf}, {"a": value})["a"]
    assert new.dtype == np.float64
    new[0] = 5.0
    np.testing.assert_array_equal(value, np.ones(3))
    np.testing.assert_array_equal(leaf, np.zeros((2, 3)))
    np.testing.assert_array_equal(new, [[5.0] * 3, [1.0] * 3])


def test_a_numpy_scalar_stays_one():
    for leaf in (np.float32(1), np.float64(1), np.int16(1)):
        new = fo.assign({"a": leaf}, {"a": 2})["a"]
        assert type(new) is type(leaf)
        assert new == 2


@pytest.mark.parametrize(
    ("leaf", "value", "expected"),
    [
        (1.0, 2, 2.0),
        (1.0, jnp.array(2.5), 2.5),
        (1, np.int8(3), 3),
        (1, True, 1),
        (True, False, False),
        (1j, 2.0, 2 + 0j),
    ],
)
def test_python_numbers_stay_python(leaf, value, expected):
    new = fo.assign({"a": leaf}, {"a": value})["a"]
    assert type(new) is type(leaf)
    assert new == expected


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def placements() -> dict[str, Any]:
    return {
        "split": NamedSharding(mesh(), PartitionSpec("data")),
        "replicated": NamedSharding(mesh(), PartitionSpec()),
        "another device": SingleDeviceSharding(jax.devices()[3]),
        "nowhere in particular": None,
    }


def put(x: Any, sharding: Any) -> Any:
    return x if sharding is None else jax.device_put(x, sharding)


@pytest.mark.parametrize("of_value", [*placements(), "NumPy", "a number"])
@pytest.mark.parametrize("of_leaf", placements())
def test_the_sharding_and_committed_devices_stay_those_of_the_leaf(of_leaf, of_value):
    leaf = put(jnp.zeros(8), placements()[of_leaf])
    numbers = np.arange(8.0, dtype=np.float32)
    if of_value == "a number":
        value, numbers = 2.0, np.full(8, 2.0, np.float32)
    elif of_value == "NumPy":
        value = numbers
    else:
        value = put(jnp.asarray(numbers), placements()[of_value])
    new = fo.assign({"a": leaf}, {"a": value})["a"]
    assert new.sharding == leaf.sharding
    assert new.committed == leaf.committed
    np.testing.assert_array_equal(new, numbers)


@pytest.mark.parametrize("of_leaf", placements())
@pytest.mark.parametrize("kind", ["float", "key"])
def test_donating_the_new_params_leaves_the_users_array_alive(kind, of_leaf):
    leaf, value = jnp.zeros(8), jnp.arange(8.0)
    if kind == "key":
        leaf, value = (jax.random.split(jax.random.key(seed), 8) for seed in (0, 1))
    sharding = placements()[of_leaf]
    leaf, value = put(leaf, sharding), put(value, sharding)
    new = fo.assign({"a": leaf, "b": leaf.copy()}, {"a": value, "b": value})
    # Before the step: jax fails on one buffer that is donated twice.
    assert new["a"] is not value
    assert new["a"] is not new["b"]
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x[::-1], tree), donate_argnums=0)
    moved = step(new)
    assert not value.is_deleted()
    fo.testing.assert_frozen({"a": value[::-1], "b": value[::-1]}, moved, True)


def test_key_leaves_take_keys_of_their_kind_and_nothing_else():
    keys = {"key": jax.random.key(0), "keys": jax.random.split(jax.random.key(1), 3)}
    new = fo.assign(keys, {"key": jax.random.key(5), "keys": jax.random.key(6)})
    row = jax.random.key_data(jax.random.key(6))
    np.testing.assert_array_equal(jax.random.key_data(new["keys"]), jnp.stack([row] * 3))
    assert jax.random.key_data(new["key"])[1] == 5
    assert new["keys"].dtype == keys["keys"].dtype
    for value in (jax.random.PRNGKey(0), 0, jax.random.key(0, impl="rbg")):
        with pytest.raises(TypeError, match="'key' is key<fry>"):
            fo.assign(keys, {"key": value})
    with pytest.raises(TypeError, match=r"'w' is uint32\[2\], the value key<fry>"):
        fo.assign({"w": jax.random.PRNGKey(0)}, {"w": jax.random.key(0)})


def test_it_works_under_jit_with_concrete_and_traced_values():
    @jax.jit
    def run(tree, value):
        return fo.assign(tree, {"dense/kernel": value, "dense/bias": 1.0, "steps": 3})

    new = run(params(), ROW)
    expected = params()
    expected["dense"] = {"kernel": jnp.stack([ROW, ROW]), "bias": jnp.ones(3)}
    expected["steps"] = jnp.array(3)
    fo.testing.assert_frozen(expected, new, True)
    with pytest.raises(ValueError, match=r"'steps' is int32\[\], the value float32\[\]"):
        jax.jit(lambda tree, value: fo.assign(tree, {"steps": value}))(params(), 3.0)


def test_fields_of_an_equinox_module():
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    new = fo.assign(model, {"layers/0/weight": jnp.eye(2), "layers/1/bias": 0.0})
    assert isinstance(new, eqx.nn.MLP)
    expected = eqx.tree_at(
        lambda m: (m.layers[0].weight, m.layers[1].bias), model, (jnp.eye(2), jnp.zeros(2))
    )
    fo.testing.assert_frozen(expected, new, True)
    assert new.layers[0].bias is model.layers[0].bias
    assert new.activation is model.activation
    with pytest.raises(TypeError, match="the leaf at 'activation' is"):
        fo.assign(model, {"activation": 1.0})


def test_variables_of_an_nnx_state_keep_their_type_and_metadata():
    state = nnx.State(
        {
            "kernel": nnx.Param(jnp.zeros((2, 2)), note="mine"),
            "mean": nnx.BatchStat(jnp.zeros(2)),
        }
    )
    new = fo.assign(state, {"kernel": jnp.eye(2), "mean": 1.0})
    assert type(new) is type(state)
    assert (type(new["kernel"]), type(new["mean"])) == (nnx.Param, nnx.BatchStat)
    assert new["kernel"].get_metadata()["note"] == "mine"
    np.testing.assert_array_equal(jax.tree.leaves(new["kernel"])[0], np.eye(2))
    np.testing.assert_array_equal(jax.tree.leaves(new["mean"])[0], np.ones(2))
    assert all(not x.any() for x in jax.tree.leaves(state))


def test_a_frozendict_stays_one():
    tree = FrozenDict({"a": {"b": jnp.ones(2), "c": jnp.ones(2)}})
    new = fo.assign(tree, {"a/b": 0.0})
    assert isinstance(new, FrozenDict)
    fo.testing.assert_frozen(FrozenDict({"a": {"b": jnp.zeros(2), "c": jnp.ones(2)}}), new, True)


def test_a_key_with_a_slash_is_named_as_it_is_written():
    tree = {"mlp/~/linear": {"w": 1.0}}
    assert fo.assign(tree, {"mlp/~/linear/w": 2.0}) == {"mlp/~/linear": {"w": 2.0}}


WIDE = {
    **params(),
    "small": jnp.zeros(2, jnp.int8),
    "half": jnp.zeros(2, jnp.float16),
    "flag": jnp.array(True),
    "abstract": jax.ShapeDtypeStruct((3,), jnp.float32),
    "hole": optax.MaskedNode(),
    "act": jnp.tanh,
    "name": "x",
}


NO_NUMBER = "'dense/bias'.*(not an array or a number|only numbers are cast)"


@pytest.mark.parametrize(
    ("path", "value", "error", "match"),
    [
        ("dense/kernl", 0.0, ValueError, r"'dense/kernl', which is no leaf; nearest: 'dense/ker"),
        ("dense/*", 0.0, ValueError, r"'dense/\*', which is no leaf; nearest: 'dense/bias'"),
        ("dense", 0.0, ValueError, "'dense', which is no leaf; it is a node, with 'dense/bias', "),
        ("dens", 0.0, ValueError, "'dens', which is no leaf"),
        ("", 0.0, ValueError, "'', which is no leaf"),
        ("dense/kernel/value", 0.0, ValueError, "no leaf; nearest: 'dense/kernel'"),
        (0, 0.0, (TypeError, ValueError), "fo.assign"),
        ("dense/bias", ROW[:2], ValueError, r"float32\[3\], the value float32\[2\], which does no"),
        ("dense/bias", ROW[None], ValueError, r"the value float32\[1, 3\], which does not broad"),
        ("steps", [1], ValueError, r"'steps' is int32\[\], the value int64\[1\], which does not"),
        ("steps", 1.5, ValueError, "'steps' is int32.*can't hold; cast it first"),
        ("small", 300, ValueError, r"'small' is int8\[2\].*can't hold"),
        (
            "small",
            jnp.array([1, -129]),
            ValueError,
            r"value int32\[2\], which that dtype can't hold",
        ),
        ("flag", 2, ValueError, "'flag' is bool.*can't hold"),
        ("dense/bias", 1j, ValueError, "'dense/bias' is float32.*complex128.*can't hold"),
        ("half", 1e5, ValueError, "'half' is float16"),
        ("half", jnp.float32(1e5), ValueError, "'half' is float16"),
        (
            "dense/bias",
            "zeros",
            TypeError,
            NO_NUMBER,
        ),
        (
            "dense/bias",
            None,
            TypeError,
            NO_NUMBER,
        ),
        (
            "dense/bias",
            jnp.zeros,
            TypeError,
            NO_NUMBER,
        ),
        (
            "dense/bias",
            {"b": 1.0},
            TypeError,
            NO_NUMBER,
        ),
        ("dense/bias", [1.0, [2.0]], (TypeError, ValueError), "'dense/bias'"),
        ("dense/bias", WIDE["abstract"], TypeError, "'dense/bias'"),
        ("abstract", 1.0, TypeError, "the leaf at 'abstract' is abstract"),
        ("hole", 1.0, TypeError, "the leaf at 'hole' is a MaskedNode"),
        ("act", 1.0, TypeError, "the leaf at 'act' is a"),
        ("name", "y", TypeError, "the leaf at 'name' is a str"),
    ],
)
def test_an_error_names_the_path_and_sets_nothing(path, value, error, match):
    tree = {**WIDE, "own": np.ones(2)}
    leaves = jax.tree.leaves(tree)
    with pytest.raises(error, match=match):
        fo.assign(tree, {"own": 0.0, "dense/kernel": 0.0, path: value})
    assert same_leaves(tree, leaves)
    np.testing.assert_array_equal(tree["own"], np.ones(2))


def test_a_path_of_two_leaves_is_an_error():
    tree = {"a/b": 1.0, "a": {"b": 2.0}, "c": 3.0}
    with pytest.raises(ValueError, match="which of 2 leaves at 'a/b' is meant"):
        fo.assign(tree, {"a/b": 0.0})
    assert fo.assign(tree, {"c": 0.0}) == {"a/b": 1.0, "a": {"b": 2.0}, "c": 0.0}


def test_what_is_no_mapping_is_an_error():
    with pytest.raises(TypeError, match=r"takes a dict \{path: value\}, not a list"):
        fo.assign(params(), [("dense/bias", 0.0)])


def test_set_and_frozen_by_the_same_paths_the_leaves_stay_bitwise():
    start = {
        "head": {"kernel": jnp.full((3, 3), 0.5), "bias": jnp.ones(3)},
        "body": {"kernel": jnp.full((3, 3), 0.5), "bias": jnp.ones(3)},
    }
    values = {"head/kernel": jnp.eye(3), "head/bias": 0.0}
    tree = fo.assign(start, values)
    tx = fo.freezable(optax.adamw(0.1, weight_decay=0.1), frozen=list(values))

    def loss(tree, x):
        x = jnp.tanh(x @ tree["body"]["kernel"] + tree["body"]["bias"])
        return ((x @ tree["head"]["kernel"] + tree["head"]["bias"]) ** 2).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tree, state):
        grads = fo.grad(loss, frozen=state)(tree, jnp.ones((4, 3)))
        updates, state = tx.update(grads, state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    body = jax.tree.map(np.array, start["body"])
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(tree)
        for _ in range(3):
            tree, state = step(tree, state)
    np.testing.assert_array_equal(np.asarray(tree["head"]["kernel"]), np.eye(3))
    np.testing.assert_array_equal(np.asarray(tree["head"]["bias"]), np.zeros(3))
    assert not np.signbit(tree["head"]["kernel"]).any()
    assert not np.signbit(tree["head"]["bias"]).any()
    assert all((tree["body"][name] != body[name]).all() for name in body)
    np.testing.assert_array_equal(values["head/kernel"], np.eye(3))


TRACED = {
    "a shorter float": lambda: (jnp.zeros(3), jnp.float16(1.5)),
    "integers": lambda: (jnp.zeros(3), jnp.arange(3, dtype=jnp.int8)),
    "the same dtype": lambda: (jnp.zeros((2, 3)), jnp.arange(3.0)),
    "a key": lambda: (jax.random.split(jax.random.key(0), 2), jax.random.key(7)),
}


@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
def test_traced_values_and_leaves_are_set_as_those_at_hand(make):
    leaf, value = make()
    eager = fo.assign({"w": leaf}, {"w": value})
    traced = {
        "value": jax.jit(lambda x: fo.assign({"w": leaf}, {"w": x}))(value),
        "leaf": jax.jit(lambda x: fo.assign({"w": x}, {"w": value}))(leaf),
        "both": jax.jit(lambda x, y: fo.assign({"w": x}, {"w": y}))(leaf, value),
    }
    for given in traced.values():
        assert given["w"].dtype == leaf.dtype
        fo.testing.assert_frozen(eager, given, True)
