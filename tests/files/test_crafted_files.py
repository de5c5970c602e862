"""Headers written by hand to mislead: told in one line, or as they are, and no memory taken."""

import contextlib
import io
import json
import struct
import zipfile
from typing import Any

import flax.serialization
import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from freeze_optax._files.checkpoint_headers import read_headers
from tests.support.broken_files import fault, odd_files, peak_of, said
from tests.support.checkpoints import npz

LEAST = 2_000_000
"""Bytes that the command takes for any file: its own tables, and what is read of the table."""


def most(data: bytes) -> int:
    """Bytes that the names in a file may take."""
    return 100_000_000 + 100 * len(data)


def about(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safe(header: Any, size: int = 0, length: int | None = None) -> bytes:
    """A .safetensors file with this header, of JSON or as it stands, and so many bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def array(shape: Any, dtype: Any, data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def npy(size: int = 16, shape: str = "(4,)", descr: str = "'<f4'", length: int = 117) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    header = text.encode().ljust(length) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(size)


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
    return file.getvalue()


ONE = safe({"w": about([4], 0, 16)}, 16)
LENGTHS = [0, 1, 7, len(ONE), 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_of_any_claimed_length_is_one_line_and_takes_no_memory(length, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safe(ONE[8:], length=length))
    assert fault(capsys, file, None) == ""
    assert peak_of(lambda: said(capsys, file)) < LEAST


TWICE = b'"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
PLACES: dict[str, Any] = {
    "over each other": {"a": about([2], 0, 8), "b": about([2], 4, 12)},
    "in one place": {"a": about([1], 0, 4), "b": about([1], 0, 4)},
    "with a gap between": {"a": about([1], 0, 4), "b": about([1], 8, 12)},
    "with a gap before": {"a": about([2], 4, 12)},
    "with bytes after": {"a": about([2], 0, 8)},
    "beyond the file": {"a": about([4], 0, 16)},
    "far beyond the file": {"a": about([2**61], 0, 2**63)},
    "before the file": {"a": about([3], -12, 0)},
    "from the end to the start": {"a": about([3], 12, 0)},
    "of no number": {"a": about([3], 0.0, 12.5)},
    "of text": {"a": about([3], "0", "12")},
    "of none": {"a": about([3], None, None)},
    "of another size": {"a": about([2], 0, 12)},
    "of a negative shape": {"a": about([-3], 0, 12)},
    "of a negative and a zero": {"a": about([-3, 0], 0, 0), "b": about([3], 0, 12)},
    "of two negatives": {"a": about([-3, -1], 0, 12)},
    "of a huge shape": {"a": about([2**63], 0, 12)},
    "of shapes whose product is small modulo 2**64": {"a": about([2**32, 2**32 + 3], 0, 12)},
    "of a shape of huge numbers and no elements": {"a": about([2**40, 2**40, 0], 0, 0)},
    "of a shape beyond 64 bits": {"a": about([2**70], 0, 12)},
    "of a shape in a shape": {"a": about([[3]], 0, 12)},
    "of bools": {"a": about([True, 3], 0, 12)},
    "without a shape": {"a": {"dtype": "F32", "data_offsets": [0, 12]}},
    "without a dtype": {"a": {"shape": [3], "data_offsets": [0, 12]}},
    "without a place": {"a": {"dtype": "F32", "shape": [3]}},
    "with one end": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0]}},
    "of no dict": {"a": [3, 0, 12]},
    "of no metadata": {"a": about([3], 0, 12), "__metadata__": {"a": 1}},
    "twice the same name, elsewhere": b"{%b, %b}" % (TWICE, TWICE.replace(b"0, 4", b"4, 12")),
    "no JSON": b"{'a': 1}",
    "no UTF-8": b'{"\xff": 1}',
    "nested deep": b'{"a":' + b"[" * 100_000,
    "nested deep in dicts": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("header", PLACES.values(), ids=PLACES)
def test_tensors_that_the_file_does_not_hold_are_one_line(header, tmp_path, capsys):
    data = safe(header, 12)
    with pytest.raises(safetensors.SafetensorError, match=r"\w"):
        safetensors.deserialize(data)
    assert odd_files(capsys, tmp_path / "model", [data], lambda data: None) == []


def test_a_name_that_is_there_twice_counts_once(tmp_path, capsys):
    file = tmp_path / "model"
    file.write_bytes(safe(b"{%b, %b}" % (TWICE, TWICE), 4))
    assert fault(capsys, file, {"w": (1, 4)}) == ""


FAR = (2**63 - 1, 2**64 - 1)
EMPTY = {
    "safetensors": safe({"w": about([0, FAR[0]], 0, 0)}),
    "npz": archive({"w.npy": npy(0, f"(0, {FAR[0]})")}),
    "npz, beyond 64 bits": archive({"w.npy": npy(0, f"(0, {2**90})")}),
    "msgpack": msgpack.packb({"w": array([0, FAR[1]], "float32", b"")}),
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("optimizer", [[], ["--optimizer", "adam"]], ids=["plain", "adam"])
def test_a_huge_array_without_elements_is_one_line_or_no_parameters(
    data, optimizer, tmp_path, capsys
):
    file = tmp_path / "model"
    file.write_bytes(data)
    told = said(capsys, file, *optimizer)
    assert told.fault == ""
    assert told.code == 2 or told.out.endswith("trainable: 0 of 0 parameters (0.00%)\n")


def many_axes(count: int) -> dict[str, tuple[bytes, Any]]:
    ones = [1] * count
    return {
        "safetensors": (safe({"w": about(ones, 0, 4)}, 4), safetensors.numpy.load),
        "npz": (archive({"w.npy": npy(4, str(tuple(ones)), length=9_001)}), _load),
        "msgpack": (
            msgpack.packb({"w": array(ones, "float32", bytes(4))}),
            flax.serialization.msgpack_restore,
        ),
    }


def _load(data: bytes) -> Any:
    with np.load(io.BytesIO(data)) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("form", many_axes(1))
def test_more_axes_than_an_array_can_have_are_one_line(form, tmp_path, capsys):
    data, load = many_axes(64)[form]
    assert load(data)["w"].shape == (1,) * 64
    file = tmp_path / "model"
    file.write_bytes(data)
    assert fault(capsys, file, {"w": (1, 4)}) == ""
    for count in (65, 2_000):
        data, load = many_axes(count)[form]
        with pytest.raises(Exception, match=r"dimension"):
            load(data)
        file.write_bytes(data)
        assert fault(capsys, file, None) == ""


def test_a_million_axes_take_no_more_memory_than_a_few_times_the_file(tmp_path, capsys):
    data = safe({"w": about([1] * 1_000_000, 0, 4)}, 4)
    file = tmp_path / "model"
    file.write_bytes(data)
    assert fault(capsys, file, {"w": (1, 4)}) == ""
    assert peak_of(lambda: said(capsys, file)) < LEAST + 30 * len(data)


def deep(levels: int, count: int = 1) -> dict[str, bytes]:
    names = [f"{i}" + ".a" * (levels - 1) for i in range(count)]
    arrays = dict.fromkeys(names, np.ones(1, np.float32))
    return {
        "safetensors": safetensors.numpy.save(arrays),
        "npz": npz(**arrays),
        "msgpack": flax.serialization.msgpack_serialize(arrays),
        "msgpack, with slashes": flax.serialization.msgpack_serialize(
            {name.replace(".", "/"): x for name, x in arrays.items()}
        ),
    }


@pytest.mark.parametrize("form", deep(1))
def test_a_name_of_more_levels_than_may_be_nested_is_one_line(form, tmp_path, capsys):
    # As MessagePack nested so deep is: a table of it would have a line for each.
    file = tmp_path / "model"
    file.write_bytes(deep(1_100)[form])
    assert fault(capsys, file, None) == ""


@pytest.mark.parametrize("form", deep(1))
def test_deep_names_take_no_more_memory_than_the_limit(form, tmp_path, capsys):
    file = tmp_path / "model"
    for levels, count in ((3_000, 1), (1_000, 120)):
        data = deep(levels, count)[form]
        file.write_bytes(data)
        assert peak_of(lambda: said(capsys, file, "--depth", "1")) < most(data)


def test_many_leaves_below_a_deep_node_take_no_more_memory_than_the_limit(tmp_path):
    count = 12_000
    data = b"\x91" * 1_000 + b"\xdd" + struct.pack(">I", count) + b"\x01" * count
    file = tmp_path / "model"
    file.write_bytes(data)

    def read() -> None:
        with contextlib.suppress(ValueError):
            read_headers(file)

    assert peak_of(read) < most(data)


def test_a_header_that_was_packed_is_not_unpacked_beyond_the_size_of_the_file(tmp_path, capsys):
    length = 20_000_000
    member = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b" " * length
    file = tmp_path / "model.npz"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        file.write_bytes(archive({"w.npy": member}, method))
        assert file.stat().st_size < 30_000
        assert fault(capsys, file, None) == ""
        assert peak_of(lambda: said(capsys, file)) < 4 * LEAST


def test_an_array_that_was_packed_is_not_unpacked(tmp_path, capsys):
    size = 20_000_000
    file = tmp_path / "model.npz"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        file.write_bytes(archive({"w.npy": npy(size, f"({size // 4},)")}, method))
        assert file.stat().st_size < 30_000
        assert fault(capsys, file, {"w": (size // 4, size)}) == ""
        assert peak_of(lambda: said(capsys, file)) < 4 * LEAST


def test_a_dictionary_that_an_archive_claims_to_need_takes_no_memory(tmp_path, capsys):
    data = archive({"w.npy": npy()}, zipfile.ZIP_LZMA)
    # After the name: two bytes of version, two of a length, one of settings, and the size.
    at = data.index(b"w.npy") + 5 + 5
    file = tmp_path / "model.npz"
    for size in (2**28, 2**30):
        file.write_bytes(data[:at] + struct.pack("<I", size) + data[at + 4 :])
        assert said(capsys, file).fault == ""
        assert peak_of(lambda: said(capsys, file)) < 10 * LEAST
