"""The names, shapes and dtypes in an `.npz` file."""

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._files.abstract_arrays import as_abstract_array
from freeze_optax._tree.messages import quoted_list

# NumPy does not know the dtypes of machine learning, and stores them as raw bytes. Only one of them
# has two bytes.
_BFLOAT16 = np.dtype("V2")

# Many have one byte: float8s, float4 and integers of a few bits. Which one it was is not stored, so
# the array stays raw, and is an error unless it is frozen.
_ONE_BYTE = np.dtype("V1")

# This one has the character of a float, and NumPy itself can't read what it writes for it.
_FLOAT8_E5M2 = (b"'descr': '<f1'", b"'descr': '|V1'")

_INFLATED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1_032}
"""The compressions that NumPy uses, each with the most bytes that it can make of one byte. Python
decompresses others without a limit: four kilobytes of bzip2 may be gigabytes."""

_NPY = {(1, 0): 2, (2, 0): 4}
"""For each version of an array header, the bytes that its length field has."""

_LONGEST_NPY = 10_000
"""The most bytes of a header. NumPy has the same limit, but checks it after reading."""


def read_npz_headers(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of an `.npz` file, abstract, with their names."""
    try:
        with zipfile.ZipFile(file) as archive:
            members, size = archive.infolist(), file.stat().st_size
            others = [member.filename for member in members if member.filename[-4:] != ".npy"]
            if others:
                raise ValueError(
                    f"it holds {quoted_list(others, 3)}; PyTorch files are such archives"
                )
            for member in members:
                _check_claim(member, size)
                with archive.open(member) as opened:
                    yield member.filename[:-4], _npy(opened, member.file_size)
    except OSError:
        raise
    except Exception as error:
        # NumPy parses a header as a Python literal, so a broken one may raise any parser error.
        raise ValueError(f"{file} is not a valid .npz file: {error}") from error


def _check_claim(member: zipfile.ZipInfo, size: int) -> None:
    """Raises ValueError if a member claims more bytes than a file of this size can contain."""
    if member.compress_type not in _INFLATED:
        raise ValueError(
            f"{member.filename!r} has a compression that NumPy does not use; write it with "
            "np.savez or np.savez_compressed"
        )
    stored = min(member.compress_size, size)
    if member.file_size > _INFLATED[member.compress_type] * stored:
        raise ValueError(
            f"{member.filename!r} claims to have {member.file_size:,} bytes, but its {stored:,} "
            "bytes in the file can't hold them"
        )


def _npy(member: IO[bytes], size: int) -> jax.ShapeDtypeStruct | None:
    """Returns the array that a member of an archive contains, abstract."""
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
    header = member.read(count)
    known = header.replace(*_FLOAT8_E5M2)
    shape, _, stored = read(io.BytesIO(length + known))
    if known != header:
        stored = np.dtype(jnp.float8_e5m2)
    dtype = np.dtype(jnp.bfloat16) if stored.newbyteorder("=") == _BFLOAT16 else stored
    leaf = as_abstract_array(shape, dtype)
    if stored == _ONE_BYTE:
        leaf = jax.ShapeDtypeStruct(tuple(shape), stored)
    if not stored.hasobject and member.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has the wrong size")
    return leaf
