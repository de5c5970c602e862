"""Checkpoints that are cut, damaged or crafted: an error in one sentence, and no memory taken."""

import contextlib
import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from freeze_optax._files.checkpoint_headers import read_headers
from freeze_optax._files.npz_headers import _check_claim
from tests.support.checkpoints import (
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
from tests.support.sampling import examples

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


WHOLE = {
    "safetensors": safetensors.numpy.save(FEW),
    "npz": npz(**FEW),
    "compressed npz": npz(np.savez_compressed, **FEW),
}
EVERY = pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)


@contextlib.contextmanager
def at_most(size):
    """Fails where what is done takes more memory than `size` bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size


@EVERY
def test_a_file_cut_at_any_byte_is_an_error(data, tmp_path):
    assert read(data, tmp_path) == FEW_READ
    # One byte may be all of a file of Flax: a number.
    for size in (0, *range(2, len(data))):
        with pytest.raises(ValueError, match=r"is not a valid|is neither a"):
            read(data[:size], tmp_path)


@EVERY
def test_a_flipped_bit_is_an_error_or_another_file(data, tmp_path):
    with at_most(20_000_000):
        odd = odd_versions(tmp_path / "checkpoint", flips(data, range(0, 8 * len(data), 7)))
    assert odd == []


CHANGES = st.lists(
    st.tuples(st.integers(0, 800), st.integers(0, 3), st.binary(max_size=4)), min_size=1
)


@EVERY
@examples(100)
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
    with pytest.raises(ValueError, match=r"is not a valid \.npz file: "):
        read(_archive(_npy(header)), tmp_path)


def test_a_member_of_another_version_is_an_error(tmp_path):
    member = _npy(_about())
    for version in (b"\x03\x00", b"\x04\x00", b"\xff\xff"):
        with pytest.raises(ValueError, match=r"is not a valid \.npz file: .*version"):
            read(_archive(member[:6] + version + member[8:]), tmp_path)


def test_a_header_that_claims_four_gigabytes_takes_no_memory(tmp_path):
    member = b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 20
    for data in (_archive(member), b"\xff\xff\xff\xff\x00\x00\x00\x00{" + b" " * 20):
        with at_most(1_000_000), pytest.raises(ValueError, match=r"is not a valid|is neither"):
            read(data, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_compressions_that_numpy_does_not_write_are_an_error(method, tmp_path):
    with pytest.raises(
        ValueError, match=r"'w\.npy' has a compression that NumPy does not use; write it"
    ):
        read(_archive(_npy(_about()), method), tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_is_small_takes_little_memory(method, tmp_path):
    count = 100_000_000
    data = _archive(b"\x93NUMPY\x02\x00" + count.to_bytes(4, "little") + b" " * count, method)
    assert len(data) < 200_000
    with at_most(1_000_000), pytest.raises(ValueError, match=r"is not a valid \.npz file: "):
        read(data, tmp_path)


@pytest.mark.parametrize(("version", "digits"), [(1, 2), (2, 4)])
def test_a_header_is_as_long_as_numpy_reads_and_no_longer(version, digits, tmp_path):
    def member(size):
        text = _about().encode().ljust(size - 1) + b"\n"
        start = b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(digits, "little")
        return _archive(start + text + bytes(16))

    assert read(member(10_000), tmp_path) == only_w((4,), F4)
    assert np.load(io.BytesIO(member(10_000)))["w"].shape == (4,)
    with pytest.raises(ValueError, match="has a header of 10,001 bytes, over the limit") as caught:
        read(member(10_001), tmp_path)
    assert "allow_pickle" not in str(caught.value)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(io.BytesIO(member(10_001)))["w"]


def _claiming(data, size, packed):
    """The archive with other sizes in its directory."""
    at = data.index(b"PK\x01\x02") + 20
    sizes = packed.to_bytes(4, "little") + size.to_bytes(4, "little")
    return data[:at] + sizes + data[at + 8 :]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_that_claims_more_than_can_be_in_the_file_is_an_error(method, tmp_path):
    elements = 10**9
    data = _archive(_npy(_about(f"({elements},)")), method)
    size, said = 128 + 4 * elements, r"'w\.npy' claims to have \d[\d,]* bytes, but"
    for packed in (len(data), 2**32 - 2):
        with pytest.raises(ValueError, match=said):
            read(_claiming(data, size, packed), tmp_path)


def test_what_deflates_best_is_read(tmp_path):
    elements = 50_000_000
    data = npz(np.savez_compressed, w=np.zeros(elements, np.int8))
    assert elements / len(data) > 1_000
    assert read(data, tmp_path) == only_w((elements,), np.int8)


def _named(names):
    arrays = dict.fromkeys(names, np.ones(1, np.int8))
    return [safetensors.numpy.save(arrays), npz(**arrays)]


FAR = {
    "deep": (["a" + ".a" * 1_024], "it is nested more than 1,024 deep"),
    "deep by slashes": (["a" + "/a" * 30_000], "it is nested more than 1,024 deep"),
    "long": (["k" * 10_001], "the path 'kkkkkkkkkkkkkkkkkkkk'… has 10,001 characters, over the"),
    "many": ([f"{i}" + ".a" * 1_000 for i in range(60)], "names would take over 1[0-9,]{10} bytes"),
}


@pytest.mark.parametrize(("names", "said"), FAR.values(), ids=FAR)
def test_names_that_would_take_far_more_memory_than_the_file_are_an_error(names, said, tmp_path):
    for data in _named(names):
        with pytest.raises(ValueError, match=f"checkpoint can't be shown: .*{said}"):
            read(data, tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(_named(names)[0])
    with pytest.raises(ValueError, match=f"shards can't be shown: .*{said}"):
        read_headers(tmp_path / "shards")


def test_names_up_to_the_limits_are_read(tmp_path):
    for names in (["a" + "/a" * 1_023], ["k" * 10_000], [f"a/{i}" for i in range(2_000)]):
        for data in _named(names):
            assert set(read(data, tmp_path)) == set(names)


def test_nodes_that_leaves_share_take_room_once(tmp_path):
    # Each with budget of its own for all above it, these would take more than there is.
    above = "a/" * 500
    names = [f"{above}{i}" for i in range(500)]
    for data in _named(names):
        assert list(read(data, tmp_path)) == sorted(names)


@pytest.mark.parametrize("axes", [65, 1_500])
def test_more_axes_than_an_array_may_have_are_an_error(axes, tmp_path):
    with pytest.raises(ValueError, match=f"an array of {axes:,} axes, over the limit of 64"):
        read(_archive(_npy(_about(str((1,) * axes)), bytes(4))), tmp_path)
    with pytest.raises(ValueError, match="has 'w' of over 64 axes"):
        read(tensor("F32", [1] * axes, 4), tmp_path)


def test_a_pipe_is_an_error_and_not_waited_for(tmp_path):
    pipe, shards, step = tmp_path / "pipe", tmp_path / "shards", tmp_path / "step"
    (step / "default").mkdir(parents=True)
    shards.mkdir()
    for made in (pipe, shards / "a.safetensors", step / "default" / "_METADATA"):
        os.mkfifo(made)
    for checkpoint in (pipe, shards, step, step / "default"):
        with pytest.raises(ValueError, match=r"is not a plain file; copy its contents into one"):
            read_headers(checkpoint)


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


@pytest.mark.parametrize(
    ("method", "ratio"), [(zipfile.ZIP_STORED, 1), (zipfile.ZIP_DEFLATED, 1_032)]
)
def test_a_member_may_claim_what_its_compression_can_make_of_it_and_no_byte_more(method, ratio):
    member = zipfile.ZipInfo("w.npy")
    member.compress_type, member.compress_size, member.file_size = method, 10, 10 * ratio
    _check_claim(member, 10)
    member.file_size += 1
    message = rf"'w\.npy' claims to have {member.file_size:,} bytes, but its 10 bytes in the file"
    with pytest.raises(ValueError, match=message):
        _check_claim(member, 10)
    member.compress_size += 1  # now the member claims to be larger than the file
    with pytest.raises(ValueError, match=message):
        _check_claim(member, 10)


def test_a_length_of_eight_bytes_is_read_whole(tmp_path):
    whole = tensor("F32", [1], 4)
    assert whole[8:9] == b"{"
    with pytest.raises(ValueError, match=r"is neither a \.safetensors nor"):
        read(whole[:7] + b"\1" + whole[8:], tmp_path)


def test_as_many_axes_as_an_array_may_have_are_read(tmp_path):
    assert read(tensor("F32", [1] * 64, 4), tmp_path) == only_w((1,) * 64, F4)
    member = _npy(_about(str((1,) * 64)), bytes(4))
    assert read(_archive(member), tmp_path) == only_w((1,) * 64, F4)
