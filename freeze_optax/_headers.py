"""What is in a checkpoint: names, shapes and dtypes, its arrays unread."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._leaves import Leaves
from freeze_optax._patterns import listed
from freeze_optax._skim import skim

_Named = Iterable[tuple[str, Any]]

_SAFETENSORS: dict[str, Any] = {
    "BOOL": jnp.bool_,
    "U8": jnp.uint8,
    "U16": jnp.uint16,
    "U32": jnp.uint32,
    "U64": jnp.uint64,
    "I8": jnp.int8,
    "I16": jnp.int16,
    "I32": jnp.int32,
    "I64": jnp.int64,
    "F4": jnp.float4_e2m1fn,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F32": jnp.float32,
    "F64": jnp.float64,
    "C64": jnp.complex64,
}
# NumPy has no names for the dtypes of machine learning, and stores them as bytes without meaning.
_RAW: dict[str, Any] = {"V2": jnp.bfloat16, "V1": jnp.float8_e4m3fn}
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


def read_headers(checkpoint: Path) -> dict[str, Any]:
    """The leaves in a checkpoint, abstract, by their key paths.

    Dots in stored names separate components, as slashes do. Nothing is unpickled or evaluated.

    Args:
      checkpoint: A `.safetensors` or `.npz` file, one that `flax.serialization` wrote, a folder of
        `.safetensors` files, or an Orbax checkpoint: its own folder, or one with nothing else.

    Returns:
      For each path a `jax.ShapeDtypeStruct`, or a number. A tree of params as it stands.

    Raises:
      OSError: If there is no such file.
      ValueError: If it is none of these, or broken.
      ImportError: If the package that reads it, of the extra `freeze_optax[cli]`, is missing.
    """
    read = _of_folder if checkpoint.is_dir() else _of_file
    headers: dict[str, Any] = {}
    for name, leaf in read(checkpoint):
        path = name.replace(".", "/")
        if path in headers:
            raise ValueError(f"{checkpoint} has two arrays at {path!r}, where dots are slashes")
        headers[path] = leaf
    return headers


def _of_file(file: Path) -> _Named:
    # By what is in it: checkpoints of Flax have no suffix, and others the wrong one at times.
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith(b"PK"):
        return _npz(file)
    return _safetensors(file) if start[8:] == b"{" else _msgpack(file)


def _of_folder(folder: Path) -> _Named:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return (pair for file in files for pair in _safetensors(file))
    return _orbax(folder)


def _safetensors(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415
    except ImportError as error:
        raise _missing("safetensors") from error
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                dtype = piece.get_dtype()
                if dtype not in _SAFETENSORS:
                    raise ValueError(f"{file} has {name!r} in the dtype {dtype}, which jax has not")
                yield name, jax.ShapeDtypeStruct(tuple(piece.get_shape()), _SAFETENSORS[dtype])
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole .safetensors file: {error}") from error


def _npz(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            others = [name for name in names if not name.endswith(".npy")]
            if others:
                raise ValueError(f"it holds {listed(others, 3)}; PyTorch files are such archives")
            for name in names:
                with archive.open(name) as member:
                    leaf = _npy(member)
                if leaf is not None:
                    yield name.removesuffix(".npy"), leaf
    except _BROKEN_ZIP as error:
        raise ValueError(f"{file} is no whole .npz file: {error}") from error


def _npy(member: Any) -> jax.ShapeDtypeStruct | None:
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array in it has a header of version {version}")
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    dtype = np.dtype(_RAW.get(dtype.str.lstrip("<>|"), dtype))
    # Text, dates and Python objects are no parameters; the last would have to be unpickled.
    return None if dtype.kind in "OSUMm" else jax.ShapeDtypeStruct(shape, dtype)


def _msgpack(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as opened:
            leaves = skim(opened)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is neither a .safetensors nor an .npz file, nor one of flax.serialization: "
            f"{error}"
        ) from error
    for keys, leaf in leaves.items():
        yield "/".join(keys), leaf


def _orbax(folder: Path) -> Iterator[tuple[str, Any]]:
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    items = [path for path in (folder, *below) if (path / "_METADATA").exists()]
    if not items:
        raise ValueError(
            f"{folder} holds no .safetensors file and no item of an Orbax checkpoint; of the "
            "folder of a CheckpointManager name one step"
        )
    if len(items) > 1:
        raise ValueError(f"{folder} holds several items, name one: {listed(map(str, items))}")
    try:
        from etils import epath  # noqa: PLC0415
        from orbax import checkpoint  # noqa: PLC0415
    except ImportError as error:
        raise _missing("orbax-checkpoint") from error
    tree = checkpoint.PyTreeCheckpointHandler().metadata(epath.Path(items[0]))
    tree = getattr(tree, "tree", tree)
    leaves = Leaves(tree)
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        yield path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _missing(package: str) -> ImportError:
    return ImportError(
        f"this checkpoint is read with {package}; install it with: pip install 'freeze_optax[cli]'"
    )
