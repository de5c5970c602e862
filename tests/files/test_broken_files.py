"""Files cut at any byte and flipped in any bit: one line and code 2, or the numbers they hold."""

import io
import zipfile

import flax.serialization
import numpy as np
import pytest
import safetensors.numpy

from tests.support.broken_files import fault, in_msgpack, in_npz, in_safetensors, odd_files, said
from tests.support.checkpoints import flips, npz
from tests.support.sampling import stride

SMALL = {"a.w": np.ones((2, 3), np.float32), "b": np.ones(5, np.int8)}
LEAVES = {"a/w": (6, 24), "b": (5, 5)}
NESTED = {"a": {"w": SMALL["a.w"]}, "b": SMALL["b"]}
FORMATS = {
    "safetensors": (safetensors.numpy.save(SMALL), in_safetensors),
    "npz": (npz(**SMALL), in_npz),
    "msgpack": (flax.serialization.to_bytes(NESTED), in_msgpack),
}
EACH = pytest.mark.parametrize(("data", "leaves_of"), FORMATS.values(), ids=FORMATS)


def restores_numbers_for_keys() -> bool:
    try:
        return flax.serialization.msgpack_restore(b"\x81\x01\x02") == {1: 2}
    except ValueError:
        return False


@EACH
def test_a_whole_file_is_told_of_as_it_is(data, leaves_of, tmp_path, capsys):
    file = tmp_path / "whole"
    file.write_bytes(data)
    assert leaves_of(data) == LEAVES
    assert fault(capsys, file, LEAVES) == ""
    assert said(capsys, file).out.endswith("trainable: 6 of 11 parameters (54.55%)\n")
    assert fault(capsys, file, {"a/w": (6, 24), "b": (5, 6)}).startswith("said ")


@EACH
def test_a_file_cut_at_any_byte_is_one_line(data, leaves_of, tmp_path, capsys):
    cut = (data[:size] for size in range(len(data)))
    assert odd_files(capsys, tmp_path / "cut", cut, lambda data: None) == []


@EACH
def test_a_file_without_any_one_of_its_bytes_is_one_line_or_its_numbers(
    data, leaves_of, tmp_path, capsys
):
    if leaves_of is in_msgpack and not restores_numbers_for_keys():
        pytest.skip("this Flax refuses keys that are numbers, as a lost byte makes them")
    cut = (data[:i] + data[i + 1 :] for i in range(len(data)))
    assert odd_files(capsys, tmp_path / "cut", cut, leaves_of) == []


@pytest.mark.sampled
@EACH
def test_any_flipped_bit_is_one_line_or_the_numbers_it_makes(data, leaves_of, tmp_path, capsys):
    if leaves_of is in_npz:  # twice as long, and the second array has all that the first has
        data = npz(w=SMALL["a.w"])
        assert leaves_of(data) == {"w": (6, 24)}
    flipped = flips(data, range(0, 8 * len(data), stride(1)))
    assert odd_files(capsys, tmp_path / "flipped", flipped, leaves_of) == []


@pytest.mark.sampled
def test_any_flipped_bit_of_a_member_with_the_right_checksum_is_one_line_or_its_numbers(
    tmp_path, capsys
):
    with zipfile.ZipFile(io.BytesIO(npz(w=SMALL["a.w"]))) as archive:
        member = archive.read("w.npy")

    def zipped(data: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("w.npy", data)
        return file.getvalue()

    assert in_npz(zipped(member)) == {"w": (6, 24)}
    flipped = map(zipped, flips(member, range(0, 8 * (member.index(b"}") + 2), stride(1))))
    assert odd_files(capsys, tmp_path / "flipped", flipped, in_npz) == []
