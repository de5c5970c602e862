"""What is in a checkpoint: names, shapes and dtypes, its arrays unread."""

import io
import math
import operator
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import starmap, takewhile
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._tree.leaves import Leaves, is_array
from freeze_optax._tree.globs import listed
from freeze_optax._files.msgpack_headers import MOST_AXES, Room, abstract, skim

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
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F32": jnp.float32,
    "F64": jnp.float64,
    "C64": jnp.complex64,
}
# NumPy has no names for the dtypes of machine learning, and stores them as bytes without meaning.
# Of two bytes there is one. Of one byte there are several, float8s and integers of four bits: the
# first stands for them all, as left out they would not be counted, and their bytes are right.
_RAW: dict[str, Any] = {"V2": jnp.bfloat16, "V1": jnp.float8_e4m3fn}

_INFLATED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1_032}
"""The compressions of NumPy, each with the most bytes that it makes of one. Python decompresses
others without a limit: four kilobytes of bzip2 may be gigabytes."""

_NPY = {(1, 0): 2, (2, 0): 4}
"""For each version of a header of numbers, how many bytes its length has."""

_LONGEST_NPY = 10_000
"""The most bytes of a header. NumPy reads no more either, but measures only what it has read."""


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
    room = Room(sum(map(_plain_size, _files(checkpoint))))
    read = _of_folder if checkpoint.is_dir() else _of_file
    headers: dict[str, Any] = {}
    for name, leaf in read(checkpoint):
        path = name.replace(".", "/")
        if path in headers:
            raise ValueError(f"{checkpoint} has two arrays at {path!r}, where dots are slashes")
        if leaf is not None:
            headers[path] = leaf
    # In the order of a nested dict of these, where the end of a name comes before all characters.
    ordered = OrderedDict(sorted(headers.items(), key=lambda item: item[0].replace("/", "\0")))
    try:
        _take(room, ordered)
    except ValueError as error:
        raise ValueError(f"{checkpoint} can't be shown: {error}") from error
    return ordered


def _files(checkpoint: Path) -> list[Path]:
    """The files that have the names in them."""
    if not checkpoint.is_dir():
        return [checkpoint]
    return _shards(checkpoint) or [*checkpoint.glob("_METADATA"), *checkpoint.glob("*/_METADATA")]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _plain_size(file: Path) -> int:
    """The size of a file; an error if it is no plain one, as to open a pipe is to wait."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is no plain file; copy what it gives into one")
    return status.st_size


def _take(room: Room, paths: Iterable[str]) -> None:
    """Makes room for leaves, and for all nodes above them."""
    before = list[str]()
    for path in paths:
        keys = path.split("/")
        shared = sum(takewhile(bool, starmap(operator.eq, zip(keys, before, strict=False))))
        room.take(keys, len(keys) - shared)
        before = keys


def _of_file(file: Path) -> _Named:
    # By what is in it: checkpoints of Flax have no suffix, and others the wrong one at times.
    with file.open("rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length < file.stat().st_size:
        return _safetensors(file)
    return _npz(file) if start.startswith((b"PK\3\4", b"PK\5\6")) else _msgpack(file)


def _of_folder(folder: Path) -> _Named:
    shards = _shards(folder)
    if shards:
        return (pair for file in shards for pair in _safetensors(file))
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
                shape = tuple(piece.get_shape())
                if len(shape) > MOST_AXES:
                    raise ValueError(f"{file} has {name!r} of over {MOST_AXES} axes")
                yield name, jax.ShapeDtypeStruct(shape, _SAFETENSORS[dtype])
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole .safetensors file: {error}") from error


def _npz(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            members, size = archive.infolist(), file.stat().st_size
            others = [member.filename for member in members if member.filename[-4:] != ".npy"]
            if others:
                raise ValueError(f"it holds {listed(others, 3)}; PyTorch files are such archives")
            for member in members:
                _check_claim(member, size)
                with archive.open(member) as opened:
                    yield member.filename[:-4], _npy(opened, member.file_size)
    except OSError:
        raise
    except Exception as error:
        # NumPy reads a header as a Python literal, so a broken one raises what a parser does.
        raise ValueError(f"{file} is no whole .npz file: {error}") from error


def _check_claim(member: zipfile.ZipInfo, size: int) -> None:
    """Raises where a member is more than can be in a file of this size."""
    if member.compress_type not in _INFLATED:
        raise ValueError(
            f"{member.filename!r} is compressed as NumPy does not; write it with np.savez or "
            "np.savez_compressed"
        )
    stored = min(member.compress_size, size)
    if member.file_size > _INFLATED[member.compress_type] * stored:
        raise ValueError(
            f"{member.filename!r} is said to have {member.file_size:,} bytes, which {stored:,} in "
            "the file can't be"
        )


def _npy(member: IO[bytes], size: int) -> jax.ShapeDtypeStruct | None:
    version = np.lib.format.read_magic(member)
    if version not in _NPY:
        raise ValueError(f"an array in it has a header of version {version}")
    length = member.read(_NPY[version])
    count = int.from_bytes(length, "little")
    if count > _LONGEST_NPY:
        raise ValueError(
            f"an array in it has a header of {count:,} bytes, over the limit of {_LONGEST_NPY:,}"
        )
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, stored = read(io.BytesIO(length + member.read(count)))
    raw = stored.names is None and stored.subdtype is None
    dtype = np.dtype(_RAW.get(stored.str.lstrip("<>|"), stored) if raw else stored)
    leaf = abstract(shape, dtype)
    if not stored.hasobject and member.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has not as many bytes")
    return leaf


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
        from orbax import checkpoint  # noqa: PLC0415
    except ImportError as error:
        raise _missing("orbax-checkpoint") from error
    for file in items[0].rglob("*"):
        if not file.is_dir():
            _plain_size(file)
    try:
        # Declared as a path of another library; one of pathlib does, but no relative one.
        item: Any = items[0].resolve()
        tree = checkpoint.PyTreeCheckpointHandler().metadata(item)
        leaves = Leaves(getattr(tree, "tree", tree))  # older versions give the tree itself
        for path, leaf in zip(leaves.paths, leaves.values, strict=True):
            # What is no array, as text is not, has no shape.
            yield path, abstract(leaf.shape, leaf.dtype) if is_array(leaf) else None
    except Exception as error:
        # A broken file raises what the parsers of JSON, and the stores behind it, do.
        raise ValueError(f"{items[0]} is no whole Orbax checkpoint: {error}") from error


def _missing(package: str) -> ImportError:
    return ImportError(
        f"this checkpoint is read with {package}; install it with: pip install 'freeze_optax[cli]'"
    )
