"""What is in a checkpoint of each format, as those who write the format write it."""

import io
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from freeze_optax._headers import read_headers

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

F4 = jnp.float32
W = jax.ShapeDtypeStruct((2, 3), F4)
FEW = {"a.w": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}
FEW_READ = {"a/w": W, "b": jax.ShapeDtypeStruct((4,), jnp.int8)}

COMMON = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
]
ML = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
ML += ["float8_e4m3fnuz", "float8_e5m2fnuz"]
SHAPES = pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 3), (2, 1, 0)], ids=str)


def _read(data, folder):
    file = folder / "checkpoint"
    file.write_bytes(data)
    return read_headers(file)


def _npz(save=np.savez, /, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def _header(shape: Any, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {"w": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}


@SHAPES
@pytest.mark.parametrize("dtype", COMMON + ML)
def test_safetensors_of_every_dtype_and_shape_are_read(dtype, shape, tmp_path):
    x = np.zeros(shape, jnp.dtype(dtype))
    try:
        data = safetensors.numpy.save({"w": x})
    except safetensors.SafetensorError:
        pytest.skip(f"this version of safetensors does not write {dtype}")
    assert _read(data, tmp_path) == _header(shape, dtype)


@SHAPES
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [*COMMON, "complex128", "bfloat16", "float8_e4m3fn"])
def test_npz_of_every_dtype_and_shape_are_read(dtype, save, shape, tmp_path):
    x = np.zeros(shape, jnp.dtype(dtype))
    assert _read(_npz(save, w=x), tmp_path) == _header(shape, dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e8m0fnu", "int4", "uint4"])
def test_of_one_byte_without_a_name_in_numpy_the_size_is_read(dtype, tmp_path):
    leaf = _read(_npz(w=np.zeros((2, 3), jnp.dtype(dtype))), tmp_path)["w"]
    assert (leaf.shape, leaf.dtype.itemsize) == ((2, 3), 1)


def test_what_numpy_writes_but_cannot_read_is_an_error(tmp_path):
    data = _npz(w=np.zeros(2, jnp.float8_e5m2))
    with pytest.raises(ValueError, match="'<f1'"):
        np.load(io.BytesIO(data))["w"]
    with pytest.raises(ValueError, match="'<f1'"):
        _read(data, tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_any_order_of_bytes_and_axes_are_read(save, tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {
        "fortran": np.asfortranarray(x),
        "big": x.astype(">f4"),
        "big.fortran": np.asfortranarray(x.astype(">i8")),
        "scalar": np.float64(2.5),
        "number": 3,
        "view": x[::-1, ::2],
        "key": np.asarray(jax.random.key_data(jax.random.key(0))),
    }
    assert _read(_npz(save, **arrays), tmp_path) == {
        "fortran": W,
        "big": W,
        "big/fortran": jax.ShapeDtypeStruct((2, 3), jnp.int64),
        "scalar": jax.ShapeDtypeStruct((), jnp.float64),
        "number": jax.ShapeDtypeStruct((), jnp.int64),
        "view": jax.ShapeDtypeStruct((2, 2), F4),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }


def test_names_with_slashes_and_suffixes_are_read(tmp_path):
    names = ["a/b", "c.d", "e.npy", "ä", "x y", "[red]x[/red]", "arr_0"]
    data = _npz(**dict.fromkeys(names, np.ones((2, 3), np.float32)))
    paths = ["a/b", "c/d", "e/npy", "ä", "x y", "[red]x[/red]", "arr_0"]
    assert _read(data, tmp_path) == dict.fromkeys(paths, W)


class _Bomb:
    def __reduce__(self):
        return (sys.modules[__name__].explode, ())


EXPLODED = []


def explode():
    EXPLODED.append(True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_never_unpickled(save, tmp_path):
    bomb = np.empty((), object)
    bomb[()] = _Bomb()
    data = _npz(save, bomb=bomb, w=np.ones((2, 3), np.float32))
    np.load(io.BytesIO(data), allow_pickle=True)["bomb"]
    assert EXPLODED == [True]
    EXPLODED.clear()
    assert _read(data, tmp_path) == {"w": W}
    assert EXPLODED == []


def test_text_dates_and_objects_are_no_parameters(tmp_path):
    arrays = {
        "text": np.array(["a", "bc"]),
        "bytes": np.array([b"a"]),
        "date": np.array(["2020-02-02"], "M8[D]"),
        "span": np.array([1], "m8[s]"),
        "objects": np.array([1, "a", None], object),
        "w": np.ones((2, 3), np.float32),
    }
    assert _read(_npz(**arrays), tmp_path) == {"w": W}


@pytest.mark.parametrize("fields", [[("x", "i2")], [("x", "i1")], [("x", "f4"), ("y", "f4")]])
def test_records_are_no_parameters(fields, tmp_path):
    data = _npz(records=np.zeros(3, fields), w=np.ones((2, 3), np.float32))
    assert _read(data, tmp_path) == {"w": W}


@pytest.mark.parametrize("data", [_npz(), safetensors.numpy.save({})], ids=["npz", "safetensors"])
def test_a_file_without_arrays_has_no_leaves(data, tmp_path):
    assert _read(data, tmp_path) == {}


def test_metadata_of_safetensors_are_no_parameters(tmp_path):
    data = safetensors.numpy.save(FEW, metadata={"format": "pt", "b": "c"})
    assert _read(data, tmp_path) == FEW_READ


@pytest.mark.parametrize("name", ["model.npz", "model", "model.safetensors", "a.msgpack"])
def test_a_file_is_known_by_what_is_in_it(name, tmp_path):
    for data in (safetensors.numpy.save(FEW), _npz(**FEW), flax.serialization.to_bytes(FEW)):
        (tmp_path / name).write_bytes(data)
        assert read_headers(tmp_path / name) == FEW_READ


def test_a_header_of_any_length_is_read(tmp_path):
    # Its length in the first two bytes is that of 19,280, which are the first of a zip file too.
    for size in (19_272, 19_280, 19_288):
        plain = safetensors.numpy.save(FEW, metadata={"pad": ""})
        pad = "x" * (size - int.from_bytes(plain[:8], "little"))
        data = safetensors.numpy.save(FEW, metadata={"pad": pad})
        assert int.from_bytes(data[:8], "little") == size
        assert _read(data, tmp_path) == FEW_READ


def _tensor(dtype, shape, size):
    about = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"w": about}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_four_bits_are_a_dtype_and_six_are_not(tmp_path):
    try:
        safetensors.deserialize(_tensor("F4", [2, 4], 4))
    except safetensors.SafetensorError:
        pytest.skip("this version of safetensors knows neither")
    assert _read(_tensor("F4", [2, 4], 4), tmp_path) == _header((2, 4), jnp.float4_e2m1fn)
    with pytest.raises(ValueError, match="has 'w' in the dtype F6_E2M3, which jax has not"):
        _read(_tensor("F6_E2M3", [4], 3), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("F32", [2], 4),
        ("F32", [2**63], 0),
        ("F32", [2**40, 2**40], 0),
        ("F32", [-1], 4),
        ("F32", [1.0], 4),
        ("F32", "ab", 4),
        ("F99", [1], 4),
        (["F32"], [1], 4),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error(dtype, shape, size, tmp_path):
    with pytest.raises(ValueError, match=r"is no whole \.safetensors file: "):
        _read(_tensor(dtype, shape, size), tmp_path)


def test_shards_in_a_folder_are_one_checkpoint(tmp_path):
    for i in range(3):
        file = tmp_path / f"model-{i:05}-of-00003.safetensors"
        safetensors.numpy.save_file({f"layer.{i}.w": np.ones((2, 3), np.float32)}, file)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    assert read_headers(tmp_path) == {f"layer/{i}/w": W for i in range(3)}


def test_two_arrays_of_one_path_are_an_error(tmp_path):
    x = np.ones((2, 3), np.float32)
    for data in (safetensors.numpy.save({"a.b": x, "a/b": x}), _npz(**{"a.b": x, "a/b": x})):
        with pytest.raises(ValueError, match="two arrays at 'a/b', where dots are slashes"):
            _read(data, tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("one", "two"):
        safetensors.numpy.save_file({"w": x}, tmp_path / "shards" / f"{name}.safetensors")
    with pytest.raises(ValueError, match="two arrays at 'w'"):
        read_headers(tmp_path / "shards")


def test_a_path_may_end_where_another_goes_on(tmp_path):
    x = np.ones((2, 3), np.float32)
    assert _read(safetensors.numpy.save({"a": x, "a.b": x}), tmp_path) == {"a": W, "a/b": W}


def test_what_is_missing_empty_or_something_else_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_headers(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither a \.safetensors nor an \.npz file"):
        _read(b"", tmp_path)
    for data in (b"hello world\n", b"<html></html>", b"\x80\x02}q\x00.", b"\x89HDF\r\n\x1a\n" * 9):
        with pytest.raises(ValueError, match=r"neither a \.safetensors nor an \.npz file"):
            _read(data, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.safetensors file and no item of an Or"):
        read_headers(tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        read_headers(tmp_path / "checkpoint" / "below")


def test_an_archive_of_pytorch_is_named(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"):
            archive.writestr(name, b"x")
    with pytest.raises(ValueError, match=r"it holds 'archive/data\.pkl', .*PyTorch files are such"):
        _read(file.getvalue(), tmp_path)


WHOLE = {
    "safetensors": safetensors.numpy.save(FEW),
    "npz": _npz(**FEW),
    "compressed npz": _npz(np.savez_compressed, **FEW),
}
EVERY = pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)


def _is_header(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return type(leaf) in (bool, int, float, complex)
    dims = all(type(dim) is int and dim >= 0 for dim in leaf.shape)
    return dims and leaf.dtype.kind not in "OSUmM"


def _is_error_or_headers(checkpoint):
    """Whether it is read, or said to be broken in one sentence; anything else is raised."""
    try:
        headers = read_headers(checkpoint)
    except (ValueError, OSError) as error:
        return bool(str(error))
    return all(map(_is_header, headers.values())) and all(type(path) is str for path in headers)


def _odd(file, versions):
    """The versions of a file that are neither read nor said to be broken."""
    whole, odd = file.read_bytes() if file.exists() else b"", []
    for data in versions:
        file.write_bytes(data)
        # A file of Orbax is one of several in a folder.
        checkpoint = file.parent if (file.parent / "_METADATA").exists() else file
        try:
            if not _is_error_or_headers(checkpoint):
                odd.append(data)
        except Exception as error:  # noqa: BLE001
            odd.append((error, data))
    file.write_bytes(whole)
    return odd


def _flips(data, bits):
    for i in bits:
        byte, bit = divmod(i, 8)
        yield data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


@EVERY
def test_a_file_cut_at_any_byte_is_an_error(data, tmp_path):
    assert _read(data, tmp_path) == FEW_READ
    # One byte may be all of a file of Flax: a number.
    for size in (0, *range(2, len(data))):
        with pytest.raises(ValueError, match=r"is no whole|is neither a"):
            _read(data[:size], tmp_path)


@EVERY
def test_a_flipped_bit_is_an_error_or_another_file(data, tmp_path):
    tracemalloc.start()
    odd = _odd(tmp_path / "checkpoint", _flips(data, range(0, 8 * len(data), 7)))
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
    assert _odd(file, [data]) == []


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


def test_a_member_written_by_hand_is_read(tmp_path):
    assert _read(_archive(_npy(_about())), tmp_path) == _header((4,), F4)


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
        _read(_archive(_npy(header)), tmp_path)


def test_a_member_of_another_version_is_an_error(tmp_path):
    member = _npy(_about())
    for version in (b"\x03\x00", b"\x04\x00", b"\xff\xff"):
        with pytest.raises(ValueError, match=r"is no whole \.npz file: .*version"):
            _read(_archive(member[:6] + version + member[8:]), tmp_path)


def test_a_header_that_claims_four_gigabytes_takes_no_memory(tmp_path):
    member = b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 20
    for data in (_archive(member), b"\xff\xff\xff\xff\x00\x00\x00\x00{" + b" " * 20):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"is no whole|is neither"):
            _read(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_other_compressions_are_read_and_damage_in_them_is_an_error(method, tmp_path):
    data = _archive(_npy(_about()), method)
    assert _read(data, tmp_path) == _header((4,), F4)
    start = data.index(b"w.npy") + 5
    damaged = [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(start, start + 60)]
    assert _odd(tmp_path / "checkpoint", damaged) == []


class _Counted(io.FileIO):
    """A file that counts the bytes that are read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int | None:
        read = super().readinto(buffer)
        _Counted.count += read or 0
        return read

    def readall(self) -> bytes:
        data = super().readall()
        _Counted.count += len(data)
        return data


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
        return io.BufferedReader(_Counted(path))

    monkeypatch.setattr(io, "open", counted)
    _Counted.count = 0
    expected = jax.ShapeDtypeStruct((size // 4,), F4)
    assert read_headers(file) == {"a": expected, "b": expected}
    assert 0 < _Counted.count < 1_000_000


def test_arrays_of_gigabytes_in_safetensors_are_passed_over(tmp_path):
    file, elements = tmp_path / "model.safetensors", 2**34
    header = _tensor("F32", [elements], 0).replace(b"[0, 0]", f"[0, {4 * elements}]".encode())
    header = (len(header) - 8).to_bytes(8, "little") + header[8:]
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 4 * elements)
    assert read_headers(file) == _header((elements,), F4)


TREE = {
    "a.b": {"w": jnp.ones((2, 3)), "h": jnp.ones(4, jnp.bfloat16)},
    "list": [jnp.ones(2, jnp.int32), jnp.ones(3, jnp.float8_e4m3fn)],
    "n": np.float64(2.5),
    "i": np.ones(2, np.int64),
    "u": jnp.ones(2, jnp.uint32),
    "bool": jnp.ones(2, bool),
    "c": jnp.ones(2, jnp.complex64),
    "s": jnp.ones(()),
    "e": {},
}
TREE_READ = {
    "a/b/w": W,
    "a/b/h": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
    "list/0": jax.ShapeDtypeStruct((2,), jnp.int32),
    "list/1": jax.ShapeDtypeStruct((3,), jnp.float8_e4m3fn),
    "n": jax.ShapeDtypeStruct((), jnp.float64),
    "i": jax.ShapeDtypeStruct((2,), jnp.int64),
    "u": jax.ShapeDtypeStruct((2,), jnp.uint32),
    "bool": jax.ShapeDtypeStruct((2,), bool),
    "c": jax.ShapeDtypeStruct((2,), jnp.complex64),
    "s": jax.ShapeDtypeStruct((), F4),
}


def _standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def _without_ocdbt(folder, tree):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(folder, tree)
    return folder


@pytest.mark.parametrize("save", [_standard, _without_ocdbt])
def test_orbax_of_every_dtype_and_shape_are_read(save, tmp_path):
    assert read_headers(save(tmp_path / "saved", TREE)) == TREE_READ


@pytest.mark.parametrize("save", [_standard, _without_ocdbt])
def test_python_numbers_of_orbax_are_scalars(save, tmp_path):
    headers = read_headers(save(tmp_path / "saved", {"f": 1.5, "i": 3, "w": jnp.ones((2, 3))}))
    assert headers.pop("w") == W
    assert {path: (x.shape, x.dtype.kind) for path, x in headers.items()} == {
        "f": ((), "f"),
        "i": ((), "i"),
    }


def test_text_and_none_of_orbax_are_no_parameters(tmp_path):
    tree = {"name": "bert", "none": None, "w": jnp.ones((2, 3))}
    assert read_headers(_without_ocdbt(tmp_path / "saved", tree)) == {"w": W}


def test_the_steps_of_a_checkpoint_manager_are_read(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=ocp.args.StandardSave(TREE))
        manager.save(7, args=ocp.args.StandardSave(TREE))
    assert read_headers(tmp_path / "run" / "0") == TREE_READ
    assert read_headers(tmp_path / "run" / "7" / "default") == TREE_READ
    with pytest.raises(ValueError, match="of the folder of a CheckpointManager name one step"):
        read_headers(tmp_path / "run")


def test_of_a_step_with_two_items_one_is_to_be_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {
            "params": ocp.args.StandardSave(TREE),
            "optimizer": ocp.args.PyTreeSave({"count": jnp.ones(2)}),
            "about": ocp.args.JsonSave({"a": 1}),
        }
        manager.save(3, args=ocp.args.Composite(**items))
    step = tmp_path / "run" / "3"
    with pytest.raises(
        ValueError, match=r"holds several items, name one: '.*optimizer', '.*params'"
    ):
        read_headers(step)
    assert read_headers(step / "params") == TREE_READ
    assert read_headers(step / "optimizer") == {"count": jax.ShapeDtypeStruct((2,), F4)}


def test_the_metadata_of_orbax_cut_at_any_byte_are_an_error(tmp_path):
    file = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))}) / "_METADATA"
    data = file.read_bytes()
    assert read_headers(file.parent) == {"w": W}
    assert _odd(file, (data[:size] for size in range(0, len(data), 7))) == []
    for size in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"\w"):
            read_headers(file.parent)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "3", '{"tree_metadata": 3}', '{"tree_metadata": {"a": {}}}']
)
def test_metadata_of_orbax_that_tell_nothing_are_an_error(text, tmp_path):
    file = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))}) / "_METADATA"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        read_headers(file.parent)


def test_a_flipped_bit_in_the_files_of_orbax_is_an_error_or_another_file(tmp_path):
    folder = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    for file in (folder / "_METADATA", folder / "w" / ".zarray"):
        data = file.read_bytes()
        assert _odd(file, _flips(data, range(0, 8 * len(data), 61))) == []


def test_an_array_of_orbax_that_is_missing_is_an_error(tmp_path):
    folder = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    (folder / "w" / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"w/\.zarray"):
        read_headers(folder)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(FEW, file)
    folder = _standard(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    install = r"install it with: pip install 'freeze_optax\[cli\]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        for checkpoint in (file, tmp_path):
            with pytest.raises(ImportError, match=f"read with safetensors; {install}"):
                read_headers(checkpoint)
    for name in ("orbax", "etils"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=f"read with orbax-checkpoint; {install}"):
                read_headers(folder)
