import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax.testing import assert_frozen

HOLE = optax.MaskedNode()


def _array(name, bits):
    """A jax array of that dtype with exactly these bits."""
    dtype = jnp.dtype(name)
    if name in ("int4", "bool"):
        return jnp.asarray(np.asarray(bits).astype(dtype))
    unsigned = np.dtype(f"u{min(dtype.itemsize, 4)}")
    return jnp.asarray(np.asarray(bits, unsigned).view(dtype))


# Before, after with the one element that differs, and its index.
CHANGES = {
    "float32 sign of zero": ("float32", [0, 0, 1], [0, 0x80000000, 1], 1),
    "float32 NaN payload": ("float32", [0x7FC00000, 1], [0x7FC00001, 1], 0),
    "float32 signalling NaN": ("float32", [1, 0x7F800001], [1, 0x7FC00001], 1),
    "float32 subnormal": ("float32", [0, 0, 1], [0, 0, 0], 2),
    "float32 infinity": ("float32", [0x7F800000], [0xFF800000], 0),
    "float32 last bit": ("float32", [0, 0x3F800000], [0, 0x3F800001], 1),
    "float16 sign of zero": ("float16", [0, 0], [0, 0x8000], 1),
    "float16 NaN payload": ("float16", [0x7E00, 0], [0x7E01, 0], 0),
    "float16 subnormal": ("float16", [1, 2], [1, 3], 1),
    "bfloat16 sign of zero": ("bfloat16", [0, 0], [0, 0x8000], 1),
    "bfloat16 NaN payload": ("bfloat16", [0x7FC0, 0], [0x7FC1, 0], 0),
    "bfloat16 subnormal": ("bfloat16", [1, 0], [0, 0], 0),
    "float8_e4m3fn sign of zero": ("float8_e4m3fn", [0, 0, 0], [0, 0, 0x80], 2),
    "float8_e4m3fn sign of NaN": ("float8_e4m3fn", [0x7F, 0], [0xFF, 0], 0),
    "float8_e4m3fn subnormal": ("float8_e4m3fn", [1, 1], [1, 2], 1),
    "float8_e5m2 NaN payload": ("float8_e5m2", [0x7E, 0], [0x7F, 0], 0),
    "int8": ("int8", [0, 255], [0, 254], 1),
    "int4": ("int4", [-8, 7, 0], [-8, 6, 0], 1),
    "uint32": ("uint32", [0, 2**32 - 1], [0, 2**32 - 2], 1),
    "int32": ("int32", [0, 7], [1, 7], 0),
    "bool": ("bool", [0, 1], [0, 0], 1),
    "complex64 real": ("complex64", [0, 0, 0, 0], [0, 0, 0x80000000, 0], 1),
    "complex64 imaginary": ("complex64", [0, 1, 0, 0], [0, 0, 0, 0], 0),
}


@pytest.mark.parametrize(("name", "old", "new", "index"), CHANGES.values(), ids=CHANGES)
def test_one_changed_bit_is_named_with_path_count_and_element(name, old, new, index):
    before, after = _array(name, old), _array(name, new)
    assert_frozen({"a": {"w": before}}, {"a": {"w": _array(name, old)}}, "a")
    was, is_now = np.asarray(before)[index], np.asarray(after)[index]
    message = (
        "1 frozen leaf is not bit-identical:\n  a/w: "
        f"1 of {before.size} elements differ, first at ({index},): {was} became {is_now}"
    )
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        assert_frozen({"a": {"w": before}}, {"a": {"w": after}}, "a")


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_elements_are_counted_and_the_first_is_named_by_its_index(convert):
    before = np.zeros((2, 3), np.float32)
    after = np.array([[0, 0, 5], [6, 0, -0.0]], np.float32)
    message = re.escape("w: 3 of 6 elements differ, first at (0, 2): 0.0 became 5.0")
    with pytest.raises(AssertionError, match=message):
        assert_frozen({"w": before}, {"w": convert(after)}, "w")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (jnp.zeros(()), -jnp.zeros(()), "w: 1 of 1 elements differ, first at (): 0.0 became -0.0"),
        (np.float32(1), np.float32(2), "w: 1 of 1 elements differ, first at (): 1.0 became 2.0"),
        (0.0, -0.0, "w: 0.0 became -0.0"),
        (1.0, 1.0 + 2**-52, "w: 1.0 became 1.0000000000000002"),
        (0j, complex(0.0, -0.0), "w: 0j became -0j"),
        (3, 4, "w: 3 became 4"),
        (1, True, "w: 1 became True"),
        ("old", "new", "w: 'old' became 'new'"),
        (len, max, "w: <built-in function len> became <built-in function max>"),
        (jnp.float32, jnp.float16, "float32'> became "),
        (jnp.ones(2), 1.0, "became 1.0"),
        (jnp.ones(2), HOLE, "became MaskedNode()"),
        (HOLE, jnp.ones(2), "w: MaskedNode() became "),
        (jnp.ones(2), jnp.ones(3), "w: float32[2] became float32[3]"),
        (jnp.ones(2), jnp.ones((2, 1)), "w: float32[2] became float32[2, 1]"),
        (jnp.ones(()), jnp.ones(1), "w: float32[] became float32[1]"),
        (jnp.ones(2), jnp.ones(2, jnp.float16), "w: float32[2] became float16[2]"),
        (jnp.zeros(2, jnp.int8), jnp.zeros(2, bool), "w: int8[2] became bool[2]"),
        (np.array(["a", "b"]), np.array(["a", "c"]), "1 of 2 elements differ, first at (1,)"),
        (np.array([1, {}], object), np.array([1, {"x": 2}], object), "w: "),
    ],
    ids=[
        "scalar array",
        "numpy scalar",
        "float",
        "last bit of float",
        "complex",
        "int",
        "bool for int",
        "string",
        "function",
        "class",
        "float for array",
        "hole for leaf",
        "leaf for hole",
        "shape",
        "rank",
        "rank 0",
        "dtype",
        "dtype of the same bits",
        "strings",
        "objects",
    ],
)
def test_a_leaf_of_any_kind_that_became_another_is_named_with_both(before, after, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_frozen({"w": before, "x": 1}, {"w": after, "x": 1}, True)


def _some_leaves():
    return {
        "bool": np.asarray([True, False]),
        "class": jnp.float32,
        "complex": complex(-0.0, float("nan")),
        "empty": jnp.zeros((0, 3)),
        "float": float("nan"),
        "float0": np.zeros(2, jax.dtypes.float0),
        "function": len,
        "hole": optax.MaskedNode(),
        "int": 3,
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1), 3),
        "none": None,
        "object": np.array([1, "x"], object),
        "raw key": jnp.asarray([0, 7], jnp.uint32),
        "reversed": np.arange(6.0, dtype=np.float32).reshape(2, 3)[::-1, ::2],
        "string": "text",
        "strings": np.array(["a", "b"]),
    }


@pytest.mark.parametrize("name", [name for name in _some_leaves() if name != "none"])
def test_a_leaf_of_any_kind_that_stayed_passes(name):
    before, after = _some_leaves()[name], _some_leaves()[name]
    assert_frozen({"w": before, "x": None}, {"w": after, "x": None}, "w")


def test_a_host_copy_of_the_params_serves_as_before():
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2, jnp.bfloat16), "i": jnp.arange(2)}
    copy = jax.tree.map(np.array, params)
    assert_frozen(copy, params, True)
    with pytest.raises(
        AssertionError, match=r"b: 1 of 2 elements differ, first at \(0,\): 1.0 became 2.0"
    ):
        assert_frozen(copy, params | {"b": jnp.asarray([2, 1], jnp.bfloat16)}, True)


def test_a_changed_key_is_counted_as_one_element_of_its_leaf():
    keys = jax.random.split(jax.random.key(0), 4)
    other = jnp.concatenate([keys[:2], jax.random.split(jax.random.key(1), 1), keys[3:]])
    assert_frozen({"k": keys}, {"k": jax.random.split(jax.random.key(0), 4)}, fo.nothing)
    with pytest.raises(AssertionError, match=r"k: 1 of 4 elements differ, first at \(2,\): "):
        assert_frozen({"k": keys}, {"k": other}, fo.nothing)
    with pytest.raises(AssertionError, match=r"k: 1 of 1 elements differ, first at \(\): "):
        assert_frozen({"k": keys[0]}, {"k": keys[1]}, fo.nothing)


def test_a_key_of_another_implementation_is_another_dtype():
    keys = jax.random.key(0, impl="threefry2x32"), jax.random.key(0, impl="rbg")
    with pytest.raises(AssertionError, match=r"k: key<fry>\[\] became key<rbg>\[\]"):
        assert_frozen({"k": keys[0]}, {"k": keys[1]}, fo.nothing)


def test_all_failing_leaves_are_listed_and_no_other():
    before = {
        "a": [jnp.ones(2), jnp.ones(2), "x"],
        "b": {"w": jnp.zeros(1), "n": 3},
        "c": jnp.ones(1),
    }
    after = {
        "a": [jnp.ones(2), jnp.asarray([1.0, 2.0]), "y"],
        "b": {"w": -jnp.zeros(1), "n": 3},
        "c": jnp.zeros(1),
    }
    with pytest.raises(AssertionError) as caught:
        assert_frozen(before, after, ["a", "b"])
    assert str(caught.value) == (
        "3 frozen leaves are not bit-identical:\n"
        "  a/1: 1 of 2 elements differ, first at (1,): 1.0 became 2.0\n"
        "  a/2: 'x' became 'y'\n"
        "  b/w: 1 of 1 elements differ, first at (0,): 0.0 became -0.0"
    )


SPECS = {
    "str": lambda params: "a",
    "selector": lambda params: ~fo.path("b"),
    "mask": lambda params: {"a": True, "b": False},
    "state": lambda params: fo.freezable(optax.sgd(0.1), "a").init(params),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_trainable_leaves_may_change_in_any_way_and_frozen_ones_may_not(spec):
    before = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for changed in (jnp.full(2, jnp.nan), jnp.ones(7), 1.0, "gone"):
        assert_frozen(before, {"a": jnp.ones(2), "b": changed}, spec(before))
        with pytest.raises(AssertionError, match=r"leaf is not bit-identical:\n  a: .* became "):
            assert_frozen(before, {"a": changed, "b": jnp.ones(2)}, spec(before))


def test_leaves_that_cannot_be_trained_are_frozen_whatever_the_spec_says():
    before = {"i": jnp.arange(2), "w": jnp.ones(1)}
    with pytest.raises(AssertionError, match=r"1 frozen leaf .*\n  i: 2 of 2 elements differ"):
        assert_frozen(before, {"i": jnp.arange(2) + 5, "w": jnp.zeros(1)}, fo.nothing)


def test_sharded_arrays_are_compared_whole():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    before = jax.device_put(jnp.zeros((16, 2)), sharding)
    after = jax.device_put(jnp.zeros((16, 2)).at[13, 1].set(-0.0), sharding)
    assert_frozen({"w": before}, {"w": jnp.zeros((16, 2))}, "w")
    with pytest.raises(AssertionError, match=r"w: 1 of 32 .* \(13, 1\): 0.0 became -0.0"):
        assert_frozen({"w": before}, {"w": after}, "w")


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"b": {"c": 1.0}}, r"different leaves; only before: 'a'$"),
        ({"a": 1.0, "b": {"c": 1.0, "d": 1.0}}, r"different leaves; only after: 'b/d'$"),
        ({"a": 1.0, "b": {"d": 1.0}}, r"only before: 'b/c'; only after: 'b/d'$"),
        ({"a": 1.0, "b": {"c": None}}, r"only before: 'b/c'$"),
    ],
    ids=["missing", "more", "renamed", "None"],
)
@pytest.mark.parametrize("frozen", ["b", fo.nothing], ids=["some", "nothing"])
def test_trees_with_different_leaves_are_an_assertion_error_naming_them(after, frozen, message):
    with pytest.raises(AssertionError, match=message):
        assert_frozen({"a": 1.0, "b": {"c": 1.0}}, after, frozen)


def test_a_mask_of_anything_but_bools_is_a_type_error():
    with pytest.raises(TypeError, match="the mask at 'a' is int, not a bool"):
        assert_frozen({"a": 1.0}, {"a": 1.0}, {"a": 1})


def test_a_spec_that_does_not_fit_is_a_value_error():
    with pytest.raises(ValueError, match=r"'b' selects no leaf; the tree has 'a'"):
        assert_frozen({"a": 1.0}, {"a": 1.0}, "b")
