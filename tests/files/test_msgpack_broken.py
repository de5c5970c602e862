"""MessagePack that is cut, damaged or crafted: an error in one sentence, and no memory taken."""

import tracemalloc
from typing import Any
from unittest import mock

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broken_files import peak_of
from tests.support.checkpoints import is_error_or_headers, read, restored, told
from tests.support.sampling import cases, examples

ARRAY, SCALAR = 1, 3
MARK = "__msgpack_chunked_array__"


def _pack(tree):
    """Any tree in MessagePack, also one that Flax would not write."""
    return msgpack.packb(tree, default=flax.serialization._msgpack_ext_pack)


def _array(shape, dtype, data, code=ARRAY):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


SMALL = {
    "a": {"w": np.ones((5, 1), np.int8), "b": np.ones(2, np.int8), "c": 1j},
    "l": [0.5, None, "t", np.int8(2)],
}


def _is_error_or_headers(data, folder):
    file = folder / "checkpoint"
    file.write_bytes(data)
    return is_error_or_headers(file)


def _chunked_small():
    with mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", 3):
        return flax.serialization.msgpack_serialize(SMALL)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
def test_a_file_cut_at_any_byte_is_an_error(chunked, tmp_path):
    data = _chunked_small() if chunked else flax.serialization.msgpack_serialize(SMALL)
    assert told(read(data, tmp_path)) == restored(data)
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"nor one of flax\.serialization: it ends after"):
            read(data[:size], tmp_path)


def test_bytes_after_the_end_are_an_error(tmp_path):
    data = flax.serialization.msgpack_serialize(SMALL)
    with pytest.raises(ValueError, match="2 bytes follow its end"):
        read(data + b"\xc0\xc0", tmp_path)


def test_a_flipped_bit_is_an_error_or_another_file(tmp_path):
    data, odd = _chunked_small(), []
    tracemalloc.start()
    for byte in range(len(data)):
        for bit in range(8):
            flipped = data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]
            try:
                if not _is_error_or_headers(flipped, tmp_path):
                    odd.append(flipped)
            except Exception as error:  # noqa: BLE001
                odd.append((type(error), flipped))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert odd == []
    assert peak < 10_000_000


@examples(200)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=4)), min_size=1
    )
)
def test_any_damage_is_an_error_or_another_file(changes, tmp_path_factory):
    data = _chunked_small()
    for start, count, new in changes:
        data = data[:start] + new + data[start + count :]
    assert _is_error_or_headers(data, tmp_path_factory.getbasetemp())


CLAIMS = {
    "text": b"\xdb",
    "bytes": b"\xc6",
    "list": b"\xdd",
    "map": b"\xdf",
    "extension": b"\xc9",
}


@pytest.mark.parametrize("first", CLAIMS.values(), ids=CLAIMS)
def test_a_length_of_four_gigabytes_takes_no_memory(first, tmp_path):
    claim = first + b"\xff\xff\xff\xff" + b"\x01" * 15
    nested = b"\x81\xa1a" + claim
    in_array = b"\x81\xa1a\xc7\x14\x01\x93\x91\x04\xa7float32" + claim
    as_key = b"\x81" + claim
    in_shape = b"\x81\xa1a\xc7\x20\x01\x93" + claim + b"\x01" * 15
    for data in (claim, nested, in_array, as_key, in_shape):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"nor one of flax\.serialization: ") as caught:
            read(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "level", [b"\x91", b"\x81\xa1a", b"\x92\x01"], ids=["lists", "maps", "lists with numbers"]
)
def test_deep_nesting_takes_no_more_memory_than_a_few_times_the_file(level, tmp_path):
    # The first depth shows whether memory grows with its square, which at the last would be all
    # there is.
    for depth, most in ((2_000, 20_000_000), (100_000, 30_000_000)):
        data = level * depth + b"\x01"
        tracemalloc.start()
        try:
            readable = _is_error_or_headers(data, tmp_path)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert readable
        assert peak < most


def test_nesting_of_a_hundred_levels_isread(tmp_path):
    tree: Any = np.ones(2, np.float32)
    for _ in range(100):
        tree = {"a": tree}
    expected = {"/".join("a" * 100): jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert read(flax.serialization.msgpack_serialize(tree), tmp_path) == expected


def test_as_deep_as_a_tree_may_be_is_read_and_no_deeper(tmp_path):
    name, leaf = b"\x81\xa1a", msgpack.packb(1.5)
    assert list(read(name * 1_024 + leaf, tmp_path)) == ["/".join("a" * 1_024)]
    with pytest.raises(ValueError, match="it is nested more than 1,024 deep"):
        read(name * 1_025 + leaf, tmp_path)


NO_SHAPES = {
    "negative": ((-1, -1), b"abcd"),
    "negative and zero": ((-1, 0), b""),
    "fractional": ((0.5, 2.0), b"abcd"),
    "float": ((1.0,), b"abcd"),
    "bool": ((True,), b"abcd"),
    "None": ((None,), b"abcd"),
    "nested": (((1,),), b"abcd"),
    "text": (("1",), b"abcd"),
    "a number": (1, b"abcd"),
    "too large": ((2,), b"abcd"),
    "too small": ((1,), b"abcdabcd"),
    "far too large": ((2**62, 2**62), b"abcd"),
}


@pytest.mark.parametrize("code", [ARRAY, SCALAR])
@pytest.mark.parametrize(("shape", "data"), NO_SHAPES.values(), ids=NO_SHAPES)
def test_a_shape_that_is_none_is_an_error(shape, data, code, tmp_path):
    with pytest.raises(ValueError, match=r"nor one of flax\.serialization: "):
        read(_pack({"w": _array(shape, "float32", data, code)}), tmp_path)


@pytest.mark.parametrize(
    "dtype", ["O", "object", "V8", "f4,f4", "2f4", "float999", "", "U2", "S8", "datetime64[s]", 8]
)
def test_a_dtype_that_no_parameter_has_is_none_or_an_error(dtype, tmp_path):
    good = {"good": np.ones(2, np.float32)}
    data = _pack({**good, "w": _array((1,), dtype, b"abcdefgh")})
    try:
        headers = read(data, tmp_path)
    except ValueError as error:
        assert "nor one of flax.serialization: " in str(error)  # noqa: PT017
    else:
        assert headers == {"good": jax.ShapeDtypeStruct((2,), jnp.float32)}


def test_dates_are_no_parameters(tmp_path):
    tree = {"when": np.array(["2020-02-02"], "M8[D]"), "w": np.ones(2, np.float32)}
    data = flax.serialization.msgpack_serialize(tree)
    assert flax.serialization.msgpack_restore(data)["when"].dtype == "M8[D]"
    assert read(data, tmp_path) == {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}


BYTES = np.ones(2, np.int8)
NO_CHUNKS = {
    "nothing more": {MARK: True},
    "a number for the shape": {MARK: True, "shape": 2, "chunks": {"0": BYTES}},
    "a number for the chunks": {MARK: True, "shape": {"0": 2}, "chunks": 2},
    "a number for a chunk": {MARK: True, "shape": {"0": 2}, "chunks": {"0": 2}},
    "an array for a dimension": {MARK: True, "shape": {"0": BYTES}, "chunks": {"0": BYTES}},
    "text for an index": {MARK: True, "shape": {"x": 2}, "chunks": {"0": BYTES}},
    "a float for a dimension": {MARK: True, "shape": {"0": 2.0}, "chunks": {"0": BYTES}},
    "negative": {MARK: True, "shape": {"0": -1, "1": -2}, "chunks": {"0": BYTES}},
    "too few": {MARK: True, "shape": {"0": 3}, "chunks": {"0": BYTES}},
    "too many": {MARK: True, "shape": {"0": 3}, "chunks": {"0": BYTES, "1": BYTES}},
    "far too few": {MARK: True, "shape": {"0": 2**62}, "chunks": {"0": BYTES}},
    "none": {MARK: True, "shape": {"0": 0}, "chunks": {}},
    "chunks in chunks": {
        MARK: True,
        "shape": {"0": 2},
        "chunks": {MARK: True, "shape": {"0": 2}, "chunks": {"0": BYTES}},
    },
}


@pytest.mark.parametrize("tree", NO_CHUNKS.values(), ids=NO_CHUNKS)
def test_chunks_that_make_up_no_array_are_an_error(tree, tmp_path):
    for whole in ({"w": tree}, {"a": {"w": tree}}, tree):
        with pytest.raises(ValueError, match=r"nor one of flax\.serialization: "):
            read(_pack(whole), tmp_path)


def test_a_shape_of_many_numbers_is_not_multiplied(tmp_path):
    sizes = [2**64 - 1] * 100_000
    for axes in (65, 100_000):
        whole = _pack({"w": _array(sizes[:axes], "float32", b"")})
        shape = {str(i): size for i, size in enumerate(sizes[:axes])}
        chunked = _pack({"w": {MARK: True, "shape": shape, "chunks": {"0": BYTES}}})
        for data in (whole, chunked):
            with pytest.raises(ValueError, match=f"an array of {axes:,} axes, over the limit of"):
                read(data, tmp_path)


def test_a_shape_of_a_million_numbers_is_not_read(tmp_path):
    data = _pack({"w": _array([1] * 1_000_000, "float32", b"abcd")})

    def refused():
        with pytest.raises(ValueError, match="an array of 1,000,000 axes, over the limit of 64"):
            read(data, tmp_path)

    assert peak_of(refused) < 1_000_000


@pytest.mark.parametrize("dtype", ["(", ",", "f4(", "((1,)f4", "\x1b[31mX", "f4," * 33])
def test_a_dtype_that_numpy_cannot_parse_is_an_error(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"nor one of flax\.serialization: (it holds|an array of)"):
        read(_pack({"w": _array((1,), dtype, b"abcd")}), tmp_path)


def test_a_dtype_of_many_fields_is_not_parsed(tmp_path):
    data = _pack({"w": _array((1,), "i1," * 500_000, b"abcd")})
    tracemalloc.start()
    with pytest.raises(ValueError, match="whose dtype has a name of 1,500,000 bytes"):
        read(data, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def _below(key, levels, leaves):
    tree: Any = {str(i): 1.0 for i in range(leaves)}
    for _ in range(levels):
        tree = {key: tree}
    return msgpack.packb(tree)


SHARED = {
    "a long key": (_below("k" * 100_000, 1, 3_000), "the path 'kkkkk.*… has 100,000 characters"),
    "long keys": (_below("k" * 600, 20, 3_000), "the path 'kkkkk.*… has 10,216 characters"),
    "a key up to the limit": (_below("k" * 9_990, 1, 30_000), "its names would take over"),
    "many levels": (_below("a", 1_000, 30_000), "its names would take over"),
    "many numbers": (msgpack.packb([1] * 400_000), "its names would take over 140,000,500 bytes"),
}


@pytest.mark.parametrize(
    ("data", "said"), cases(SHARED, ["a long key", "long keys", "a key up to the limit"])
)
def test_paths_that_take_far_more_memory_than_the_file_are_an_error(data, said, tmp_path):
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"nor one of flax\.serialization: {said}"):
        read(data, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000 + 100 * len(data)


def test_in_a_larger_file_there_is_room_for_more_names(tmp_path):
    names = _below("k" * 3_000, 1, 20_000)
    with pytest.raises(ValueError, match=r"its names would take over 1[0-9,]{10} bytes of memory"):
        read(names, tmp_path)
    array = _pack(np.ones(1_000_000, np.int8))
    larger = b"\x82\xa1a" + names + b"\xa1w" + array
    assert len(read(larger, tmp_path)) == 20_001


CRAFTED = {
    "an extension that Flax has not": _pack({"w": msgpack.ExtType(42, b"abc")}),
    "an array cut inside": _pack({"w": msgpack.ExtType(ARRAY, b"\x93\x91\x02")}),
    "an array of two parts": _pack({"w": msgpack.ExtType(ARRAY, msgpack.packb(((1,), "int8")))}),
    "an array that is a number": _pack({"w": msgpack.ExtType(ARRAY, b"\x01")}),
    "an empty array": _pack({"w": msgpack.ExtType(ARRAY, b"")}),
    "text that is no UTF-8": b"\x81\xa2\xff\xfe\x01",
    "a byte that MessagePack has not": b"\x81\xa1a\xc1",
    "a key that is bytes": _pack({b"a": 1.0}),
    "a key that is a list": _pack({(1, 2): 1.0}),
    "a key that is a map": b"\x81\x81\x01\x01\x01",
}


@pytest.mark.parametrize("data", CRAFTED.values(), ids=CRAFTED)
def test_what_flax_does_not_write_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"nor one of flax\.serialization: "):
        read(data, tmp_path)


def test_two_leaves_of_one_path_are_an_error(tmp_path):
    collisions = [{"a.b": 1.0, "a": {"b": 2.0}}, {"a": {"b": 1.0}, "a/b": 2.0}, {0: 1.0, "0": 2.0}]
    for tree in collisions:
        with pytest.raises(ValueError, match=r"two arrays at 'a/b'|the key '0' twice"):
            read(_pack(tree), tmp_path)


def test_an_error_says_at_which_byte(tmp_path):
    with pytest.raises(ValueError, match="byte 3 is 0xc1, which MessagePack does not use"):
        read(CRAFTED["a byte that MessagePack has not"], tmp_path)
