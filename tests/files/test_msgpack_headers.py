"""Headers of the files that Flax writes, held against what Flax itself restores from them."""

import io
import math
from unittest import mock

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from hypothesis import assume, given
from hypothesis import strategies as st

from freeze_optax._files.checkpoint_headers import read_headers
from freeze_optax._files.msgpack_headers import read_msgpack_headers
from tests.support.checkpoints import Counted, leaves_in, read, restored, told
from tests.support.sampling import examples

ARRAY, SCALAR = 1, 3
MARK = "__msgpack_chunked_array__"
DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "int4", "uint4"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
]


def _pack(tree):
    """Any tree in MessagePack, also one that Flax would not write."""
    return msgpack.packb(tree, default=flax.serialization._msgpack_ext_pack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 3), (2, 1, 0), (3, 2, 1, 2)], ids=str)
def test_every_dtype_and_shape_isread(shape, dtype, tmp_path):
    x = np.zeros(shape, jnp.dtype(dtype))
    headers = read(flax.serialization.to_bytes({"w": x}), tmp_path)
    assert headers == {"w": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}


def test_jax_arrays_and_fortran_order_are_arrays_like_others(tmp_path):
    tree = {"j": jnp.ones((2, 3), jnp.bfloat16), "f": np.asfortranarray(np.ones((2, 3), "f4"))}
    assert read(flax.serialization.to_bytes(tree), tmp_path) == {
        "j": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        "f": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    }


def test_numpy_scalars_are_scalars_of_their_dtype(tmp_path):
    scalars = {name: np.dtype(name).type(1) for name in ("float64", "int32", "complex64", "bool")}
    scalars["bfloat16"] = jnp.bfloat16.dtype.type(1)
    headers = read(flax.serialization.msgpack_serialize(scalars), tmp_path)
    assert headers == {name: jax.ShapeDtypeStruct((), jnp.dtype(name)) for name in scalars}


# Each form in which MessagePack writes a number, from both ends of its range.
INTEGERS = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1]
INTEGERS += [-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)]


@pytest.mark.parametrize("number", [*INTEGERS, 0.5, -1e300, math.inf, True, False], ids=repr)
def test_python_numbers_are_themselves(number, tmp_path):
    headers = read(flax.serialization.msgpack_serialize({"n": number}), tmp_path)
    assert headers == {"n": number}
    assert type(headers["n"]) is type(number)


def test_floats_of_four_bytes_are_numbers(tmp_path):
    assert read(msgpack.packb({"n": 0.1}, use_single_float=True), tmp_path) == {
        "n": float(np.float32(0.1))
    }


def test_a_python_complex_is_one_number(tmp_path):
    (number,) = read(flax.serialization.msgpack_serialize({"c": 1 + 2j}), tmp_path).values()
    assert type(number) is complex


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65535, 65536])
def test_text_bytes_and_none_are_no_parameters(size, tmp_path):
    tree = {"s": "x" * size, "b": b"x" * size, "n": None, "w": np.ones(2, np.float32), "z": "ä"}
    expected = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == expected


@pytest.mark.parametrize("size", [1, 31, 32, 255, 256, 10_000])
def test_keys_of_any_length_up_to_the_limit_areread(size, tmp_path):
    assert list(read(flax.serialization.msgpack_serialize({"k" * size: 1.5}), tmp_path)) == [
        "k" * size
    ]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 300, 70_000])
def test_maps_and_lists_of_any_length_areread(size, tmp_path):
    assert read(msgpack.packb({str(i): i for i in range(size)}), tmp_path) == {
        str(i): i for i in range(size)
    }
    if size:
        assert read(msgpack.packb([1.0] * size), tmp_path) == {str(i): 1.0 for i in range(size)}


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 17, 300, 70_000])
def test_arrays_of_any_length_are_skipped(count, tmp_path):
    tree = {"w": np.ones(count, np.int8), "x": np.ones(2, np.int8)}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == {
        "w": jax.ShapeDtypeStruct((count,), jnp.int8),
        "x": jax.ShapeDtypeStruct((2,), jnp.int8),
    }


def test_nested_dicts_and_lists_are_paths(tmp_path):
    tree = {"a": {"b": [1.0, [2.0, {"c": 3.0}]]}, "e": {}, "l": []}
    expected = {"a/b/0": 1.0, "a/b/1/0": 2.0, "a/b/1/1/c": 3.0}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == expected
    assert read(flax.serialization.to_bytes(tree), tmp_path) == expected


def test_dots_and_slashes_in_keys_separate_components(tmp_path):
    tree = {"a.b": {"c/d": 1.0}, "ä.0": 2.0}
    expected = {"a/b/c/d": 1.0, "ä/0": 2.0}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == expected


def test_keys_that_are_no_text_are_read_as_text(tmp_path):
    tree = {0: 1.0, 300: {-1: 2.0}}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == {"0": 1.0, "300/-1": 2.0}


def test_a_file_may_hold_one_array_and_nothing_else(tmp_path):
    data = flax.serialization.msgpack_serialize(np.ones((2, 3), np.float32))
    assert read(data, tmp_path) == {"": jax.ShapeDtypeStruct((2, 3), jnp.float32)}


def test_an_empty_dict_has_no_leaves(tmp_path):
    assert read(flax.serialization.to_bytes({}), tmp_path) == {}


def test_a_frozen_dict_and_a_train_state_areread(tmp_path):
    params = FrozenDict({"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}})
    w, b = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    assert read(flax.serialization.to_bytes(params), tmp_path) == {"a/w": w, "a/b": b}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    assert read(flax.serialization.to_bytes(state), tmp_path) == {
        "step": 0,
        "params/a/w": w,
        "params/a/b": b,
        "opt_state/0/count": jax.ShapeDtypeStruct((), jnp.int32),
        "opt_state/0/mu/a/w": w,
        "opt_state/0/mu/a/b": b,
        "opt_state/0/nu/a/w": w,
        "opt_state/0/nu/a/b": b,
    }


@pytest.mark.parametrize("limit", [4, 8, 20, 10_000])
def test_an_array_in_chunks_is_one_array(limit, monkeypatch, tmp_path):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
    tree = {"a": {"w": np.ones((3, 5), np.float32), "b": np.ones(4, np.int8)}, "c.d": np.ones(7)}
    data = flax.serialization.msgpack_serialize(tree)
    assert (MARK.encode() in data) is (limit < 60)
    assert read(data, tmp_path) == {
        "a/w": jax.ShapeDtypeStruct((3, 5), jnp.float32),
        "a/b": jax.ShapeDtypeStruct((4,), jnp.int8),
        "c/d": jax.ShapeDtypeStruct((7,), jnp.float64),
    }


def test_a_scalar_and_a_whole_file_may_be_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 4)
    data = flax.serialization.msgpack_serialize({"s": np.array(1.0)})
    assert MARK.encode() in data
    assert read(data, tmp_path) == {"s": jax.ShapeDtypeStruct((), jnp.float64)}
    data = flax.serialization.msgpack_serialize(np.ones((2, 3), np.float32))
    assert MARK.encode() in data
    assert read(data, tmp_path) == {"": jax.ShapeDtypeStruct((2, 3), jnp.float32)}


def test_chunks_beyond_ten_are_put_together(monkeypatch, tmp_path):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 2)
    shape = (2, 1, 3, 1, 1, 1, 1, 2, 1, 1, 1, 3)
    data = flax.serialization.msgpack_serialize({"w": np.ones(shape, np.int8)})
    assert read(data, tmp_path) == {"w": jax.ShapeDtypeStruct(shape, jnp.int8)}


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
ARRAYS = st.builds(lambda s, d: np.zeros(s, jnp.dtype(d)), SHAPES, st.sampled_from(DTYPES))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats() | st.booleans() | st.just(1j)
SCALARS = st.sampled_from(["int8", "float32", "complex64"]).map(lambda d: np.dtype(d).type(1))
LEAVES = ARRAYS | NUMBERS | SCALARS | st.none() | st.text(max_size=40) | st.binary(max_size=40)
TREES = st.recursive(
    LEAVES,
    lambda trees: (
        st.dictionaries(st.text(max_size=3), trees, max_size=5)
        | st.dictionaries(st.integers(0, 300), trees, max_size=3)
        | st.lists(trees, max_size=20)
    ),
    max_leaves=20,
)


@examples(300)
@given(tree=TREES, limit=st.sampled_from([1, 8, 2**30]))
def test_random_trees_are_read_as_flax_restores_them(tree, limit, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    with mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", limit):
        data = flax.serialization.msgpack_serialize(tree)
    try:
        leaves = list(leaves_in(flax.serialization.msgpack_restore(data)))
    except ValueError as error:  # Flax wrote what some versions of it do not read
        assume("strict_map_key" not in str(error))
        raise
    expected = restored(data)
    if not isinstance(tree, dict | list | np.ndarray | np.generic | complex):
        with pytest.raises(ValueError, match="does not begin with a tree"):
            read(data, folder)
    elif len(expected) < len(leaves):  # dots or slashes in keys
        with pytest.raises(ValueError, match="two arrays at"):
            read(data, folder)
    else:
        assert told(read(data, folder)) == expected


def test_the_ninth_byte_may_be_any(tmp_path):
    # That of a .safetensors file is the brace of its header, which is 123 as well.
    w = np.ones(2, np.float32)
    expected = {"epochs": 123, "w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    data = flax.serialization.msgpack_serialize({"epochs": 123, "w": w})
    assert data[8:9] == b"{"
    assert read(data, tmp_path) == expected
    data = flax.serialization.msgpack_serialize({"abcdef{": 1.5})
    assert data[8:9] == b"{"
    assert read(data, tmp_path) == {"abcdef{": 1.5}


def test_arrays_of_gigabytes_are_passed_over(tmp_path):
    file, elements = tmp_path / "checkpoint", 2**29
    head = msgpack.packb([[elements], "float64"])
    # As Flax writes it, but a hole in the file for the four gigabytes less a few bytes.
    size = elements * 8 - 64
    inner = b"\x93\x91" + msgpack.packb(elements - 8) + msgpack.packb("float64")
    inner += b"\xc6" + size.to_bytes(4, "big")
    assert head[2:7] == msgpack.packb(elements)
    with file.open("wb") as opened:
        for name in (b"\x82\xa1a", b"\xa1b"):
            opened.write(name + b"\xc9" + (len(inner) + size).to_bytes(4, "big") + b"\x01" + inner)
            opened.truncate(opened.tell() + size)
            opened.seek(0, io.SEEK_END)
    expected = jax.ShapeDtypeStruct((elements - 8,), jnp.float64)
    assert read_headers(file) == {"a": expected, "b": expected}
    Counted.count = 0
    with io.BufferedReader(Counted(file)) as opened:
        assert read_msgpack_headers(opened) == {("a",): expected, ("b",): expected}
    assert 0 < Counted.count < 100_000
