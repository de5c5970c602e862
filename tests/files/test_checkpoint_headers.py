"""What is in a checkpoint of each format, as those who write the format write it."""

import io
import sys
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import freeze_optax as fo
from freeze_optax._files.checkpoint_headers import read_headers
from tests.support.checkpoints import F4, FEW, FEW_READ, W, npz, only_w, read, tensor

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

COMMON = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
]
ML = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
ML += ["float8_e4m3fnuz", "float8_e5m2fnuz"]
SHAPES = pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 3), (2, 1, 0)], ids=str)


@SHAPES
@pytest.mark.parametrize("dtype", COMMON + ML)
def test_safetensors_of_every_dtype_and_shape_areread(dtype, shape, tmp_path):
    x = np.zeros(shape, jnp.dtype(dtype))
    try:
        data = safetensors.numpy.save({"w": x})
    except safetensors.SafetensorError:
        pytest.skip(f"this version of safetensors does not write {dtype}")
    assert read(data, tmp_path) == only_w(shape, dtype)


@SHAPES
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [*COMMON, "complex128", "bfloat16", "float8_e5m2"])
def test_npz_of_every_dtype_and_shape_areread(dtype, save, shape, tmp_path):
    x = np.zeros(shape, jnp.dtype(dtype))
    assert read(npz(save, w=x), tmp_path) == only_w(shape, dtype)


def test_npz_with_long_headers_is_read(tmp_path):
    member = io.BytesIO()
    np.lib.format.write_array(member, np.zeros((2, 3), "f4"), version=(2, 0))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("w.npy", member.getvalue())
    assert read(data.getvalue(), tmp_path) == {"w": W}


ONE_BYTE = ["float8_e4m3fn", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn"]


@pytest.mark.parametrize("dtype", [*ONE_BYTE, "int4", "uint4", "int2"])
def test_of_one_byte_without_a_name_in_numpy_the_bytes_stay_raw(dtype, tmp_path):
    data = npz(w=np.zeros((2, 3), np.dtype(dtype)), b=np.zeros(2, "f4"))
    loaded = dict(np.load(io.BytesIO(data)))
    leaves = read(data, tmp_path)
    assert leaves == {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in loaded.items()}
    # NumPy does not store whether it trains: the same error for the header and for the array.
    errors = []
    for params in (leaves, loaded):
        with pytest.raises(ValueError, match="'w' is raw bytes, of dtype V1") as error:
            fo.summary(params)
        errors.append(str(error.value))
        summary = fo.summary(params, "w", optax.sgd(0.1, momentum=0.9))
        assert (summary.trainable, summary.frozen_bytes, summary.state_bytes) == (2, 6, 8)
    assert errors[0] == errors[1]


def test_what_numpy_writes_but_cannot_read_isread(tmp_path):
    data = npz(w=np.zeros(2, jnp.float8_e5m2), b=np.zeros((2, 3), "f4"))
    with pytest.raises(ValueError, match="'<f1'"):
        np.load(io.BytesIO(data))["w"]
    expected = {"b": W, **only_w((2,), jnp.float8_e5m2)}
    assert read(data, tmp_path) == expected


def test_records_and_voids_of_other_sizes_are_no_params(tmp_path):
    dtypes = {"a": [("x", "<f4")], "b": "V4", "c": "V1,V1"}
    arrays = {name: np.zeros(2, dtype) for name, dtype in dtypes.items()}
    assert read(npz(w=np.zeros((2, 3), "f4"), **arrays), tmp_path) == {"w": W}
    assert fo.mask(fo.nothing, arrays) == {"a": True, "b": True, "c": True}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_any_order_of_bytes_and_axes_areread(save, tmp_path):
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
    assert read(npz(save, **arrays), tmp_path) == {
        "fortran": W,
        "big": W,
        "big/fortran": jax.ShapeDtypeStruct((2, 3), jnp.int64),
        "scalar": jax.ShapeDtypeStruct((), jnp.float64),
        "number": jax.ShapeDtypeStruct((), jnp.int64),
        "view": jax.ShapeDtypeStruct((2, 2), F4),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }


def test_names_with_slashes_and_suffixes_areread(tmp_path):
    names = ["a/b", "c.d", "e.npy", "ä", "x y", "[red]x[/red]", "arr_0"]
    data = npz(**dict.fromkeys(names, np.ones((2, 3), np.float32)))
    paths = ["a/b", "c/d", "e/npy", "ä", "x y", "[red]x[/red]", "arr_0"]
    assert read(data, tmp_path) == dict.fromkeys(paths, W)


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
    data = npz(save, bomb=bomb, w=np.ones((2, 3), np.float32))
    np.load(io.BytesIO(data), allow_pickle=True)["bomb"]
    assert EXPLODED == [True]
    EXPLODED.clear()
    assert read(data, tmp_path) == {"w": W}
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
    assert read(npz(**arrays), tmp_path) == {"w": W}


@pytest.mark.parametrize("fields", [[("x", "i2")], [("x", "i1")], [("x", "f4"), ("y", "f4")]])
def test_records_are_no_parameters(fields, tmp_path):
    data = npz(records=np.zeros(3, fields), w=np.ones((2, 3), np.float32))
    assert read(data, tmp_path) == {"w": W}


@pytest.mark.parametrize("data", [npz(), safetensors.numpy.save({})], ids=["npz", "safetensors"])
def test_a_file_without_arrays_has_no_leaves(data, tmp_path):
    assert read(data, tmp_path) == {}


def test_metadata_of_safetensors_are_no_parameters(tmp_path):
    data = safetensors.numpy.save(FEW, metadata={"format": "pt", "b": "c"})
    assert read(data, tmp_path) == FEW_READ


@pytest.mark.parametrize("name", ["model.npz", "model", "model.safetensors", "a.msgpack"])
def test_a_file_is_known_by_what_is_in_it(name, tmp_path):
    for data in (safetensors.numpy.save(FEW), npz(**FEW), flax.serialization.to_bytes(FEW)):
        (tmp_path / name).write_bytes(data)
        assert read_headers(tmp_path / name) == FEW_READ


def test_a_header_of_any_length_isread(tmp_path):
    # Its length in the first two bytes is that of 19,280, which are the first of a zip file too.
    for size in (19_272, 19_280, 19_288):
        plain = safetensors.numpy.save(FEW, metadata={"pad": ""})
        pad = "x" * (size - int.from_bytes(plain[:8], "little"))
        data = safetensors.numpy.save(FEW, metadata={"pad": pad})
        assert int.from_bytes(data[:8], "little") == size
        assert read(data, tmp_path) == FEW_READ


# The bits that the format gives each of its dtypes, from its own code (`Dtype::bitsize`).
STORED = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BF16": 16, "C64": 64}
STORED |= {f"{kind}{bits}": bits for kind in "UI" for bits in (8, 16, 32, 64)}
STORED |= {f"F{bits}": bits for bits in (16, 32, 64)}
STORED |= {f"F8_{name}": 8 for name in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}


@pytest.mark.parametrize("dtype", STORED)
def test_safetensors_of_every_dtype_of_the_format_have_its_bytes(dtype, tmp_path):
    size = 8 * STORED[dtype] // 8
    data = tensor(dtype, [2, 4], size)
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        pytest.skip(f"this version of safetensors does not know {dtype}")
    leaves = read(data, tmp_path)
    assert leaves["w"].shape == (2, 4)
    summary = fo.summary(leaves)
    assert summary.total == 8
    assert summary.trainable_bytes + summary.frozen_bytes == size
    trains = dtype[0] in "FBC" and dtype not in ("BOOL", "F8_E8M0")
    # JAX 0.7 knows no float of six bits.
    if not dtype.startswith("F6") or jnp.issubdtype("float6_e2m3fn", jnp.floating):
        assert summary.trainable == (8 if trains else 0)


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
    with pytest.raises(ValueError, match=r"is not a valid \.safetensors file: "):
        read(tensor(dtype, shape, size), tmp_path)


def test_shards_in_a_folder_are_one_checkpoint(tmp_path):
    for i in range(3):
        file = tmp_path / f"model-{i:05}-of-00003.safetensors"
        safetensors.numpy.save_file({f"layer.{i}.w": np.ones((2, 3), np.float32)}, file)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    assert read_headers(tmp_path) == {f"layer/{i}/w": W for i in range(3)}


def test_two_arrays_of_one_path_are_an_error(tmp_path):
    x = np.ones((2, 3), np.float32)
    for data in (safetensors.numpy.save({"a.b": x, "a/b": x}), npz(**{"a.b": x, "a/b": x})):
        with pytest.raises(ValueError, match="two arrays at 'a/b'; dots in stored names count"):
            read(data, tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("one", "two"):
        safetensors.numpy.save_file({"w": x}, tmp_path / "shards" / f"{name}.safetensors")
    with pytest.raises(ValueError, match="two arrays at 'w'"):
        read_headers(tmp_path / "shards")


def test_a_path_may_end_where_another_goes_on(tmp_path):
    x = np.ones((2, 3), np.float32)
    assert read(safetensors.numpy.save({"a": x, "a.b": x}), tmp_path) == {"a": W, "a/b": W}


def test_what_is_missing_empty_or_something_else_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_headers(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither a \.safetensors nor an \.npz file"):
        read(b"", tmp_path)
    for data in (b"hello world\n", b"<html></html>", b"\x80\x02}q\x00.", b"\x89HDF\r\n\x1a\n" * 9):
        with pytest.raises(ValueError, match=r"neither a \.safetensors nor an \.npz file"):
            read(data, tmp_path)
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
        read(file.getvalue(), tmp_path)
