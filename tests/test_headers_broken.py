"""Checkpoints that are cut, damaged or crafted: an error in one sentence, and no memory taken."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from freeze_optax._headers import read_headers
from tests.checkpoints import (
    F4,
    FEW,
    FEW_READ,
    Counted,
    flips,
    npz,
    odd_versions,
    only_w,
    read,
    tensor,
)

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


WHOLE = {
    "safetensors": safetensors.numpy.save(FEW),
    "npz": npz(**FEW),
    "compressed npz": npz(np.savez_compressed, **FEW),
}
EVERY = pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)


@EVERY
def test_a_file_cut_at_any_byte_is_an_error(data, tmp_path):
    assert read(data, tmp_path) == FEW_READ
    # One byte may be all of a file of Flax: a number.
    for size in (0, *range(2, len(data))):
        with pytest.raises(ValueError, match=r"is no whole|is neither a"):
            read(data[:size], tmp_path)


@EVERY
def test_a_flipped_bit_is_an_error_or_another_file(data, tmp_path):
    tracemalloc.start()
    odd = odd_versions(tmp_path / "checkpoint", flips(data, range(0, 8 * len(data), 7)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert odd == []
    assert peak < 20_000_000


CHANGES = st.lists(
    st.tuples(st.integers(0, 800), st.integers(0, 3), st.binary(max_size=4)), min_size=1
)


@EVERY
@settings(max_examples=100, deadline=None)
@given(changes=CHANGES)
def test_any_damage_is_an_error_or_another_file(data, changes, tmp_path_factory):
    for start, count, new in changes:
        data = data[:start] + new + data[start + count :]
    file = tmp_path_factory.getbasetemp() / "checkpoint"
    assert odd_versions(file, [data]) == []


def _npy(header, data=bytes(16)):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _archive(member, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("w.npy", member)
    return file.getvalue()


def _about(shape="(4,)", descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def test_a_member_written_by_hand_isread(tmp_path):
    assert read(_archive(_npy(_about())), tmp_path) == only_w((4,), F4)


NO_HEADERS = {
    "negative": _about("(-4,)"),
    "negative and zero": _about("(-4, 0)"),
    "bool": _about("(True, 4)"),
    "float": _about("(4.0,)"),
    "None": _about("None"),
    "larger than the member": _about("(5,)"),
    "far larger than the member": _about("(10000000000000, 10000000000000)"),
    "an expression": _about("(2**2,)"),
    "a call": _about("(len([0, 0, 0, 0]),)"),
    "not closed": _about("(4,"),
    "text not closed": "'''",
    "only brackets": "(" * 117,
    "brackets in brackets": _about(descr="(" * 30 + ")" * 30),
    "no such dtype": _about(descr="'<f5'"),
    "a dtype of nothing": _about(descr="()"),
    "a dtype that is a number": _about(descr="4"),
    "lines that do not align": "\tx\n  y\n z",
    "bytes": "\x00\x01",
    "nothing": "",
}


@pytest.mark.parametrize("header", NO_HEADERS.values(), ids=NO_HEADERS)
def test_a_member_whose_header_is_none_is_an_error(header, tmp_path):
    with pytest.raises(ValueError, match=r"is no whole \.npz file: "):
        read(_archive(_npy(header)), tmp_path)


def test_a_member_of_another_version_is_an_error(tmp_path):
    member = _npy(_about())
    for version in (b"\x03\x00", b"\x04\x00", b"\xff\xff"):
        with pytest.raises(ValueError, match=r"is no whole \.npz file: .*version"):
            read(_archive(member[:6] + version + member[8:]), tmp_path)


def test_a_header_that_claims_four_gigabytes_takes_no_memory(tmp_path):
    member = b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 20
    for data in (_archive(member), b"\xff\xff\xff\xff\x00\x00\x00\x00{" + b" " * 20):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"is no whole|is neither"):
            read(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_other_compressions_are_read_and_damage_in_them_is_an_error(method, tmp_path):
    data = _archive(_npy(_about()), method)
    assert read(data, tmp_path) == only_w((4,), F4)
    start = data.index(b"w.npy") + 5
    damaged = [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(start, start + 60)]
    assert odd_versions(tmp_path / "checkpoint", damaged) == []


def test_arrays_of_gigabytes_in_an_npz_are_passed_over(tmp_path, monkeypatch):
    file, size = tmp_path / "model.npz", 5 * 2**30
    member = _npy(_about(f"({size // 4},)"), b"")
    with file.open("wb") as opened, zipfile.ZipFile(opened, "w") as archive:
        # As NumPy writes it, but a hole in the file for the array.
        for name in ("a.npy", "b.npy"):
            info = zipfile.ZipInfo(name)
            info.file_size = info.compress_size = len(member) + size
            info.header_offset, info.CRC = opened.tell(), 0
            opened.write(info.FileHeader(zip64=True) + member)
            opened.truncate(opened.tell() + size)
            opened.seek(0, io.SEEK_END)
            archive.filelist.append(info)
            archive.NameToInfo[name] = info
        archive.start_dir, archive._didModify = opened.tell(), True
    plain = io.open

    def counted(path, mode="r", *args, **kwargs):
        if Path(path) != file:
            return plain(path, mode, *args, **kwargs)
        return io.BufferedReader(Counted(path))

    monkeypatch.setattr(io, "open", counted)
    Counted.count = 0
    expected = jax.ShapeDtypeStruct((size // 4,), F4)
    assert read_headers(file) == {"a": expected, "b": expected}
    assert 0 < Counted.count < 1_000_000


def test_arrays_of_gigabytes_in_safetensors_are_passed_over(tmp_path):
    file, elements = tmp_path / "model.safetensors", 2**34
    header = tensor("F32", [elements], 0).replace(b"[0, 0]", f"[0, {4 * elements}]".encode())
    header = (len(header) - 8).to_bytes(8, "little") + header[8:]
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 4 * elements)
    assert read_headers(file) == only_w((elements,), F4)
