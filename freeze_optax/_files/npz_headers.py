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


def read_npz_headers(file: Path) -> Iterator[tuple[str, Any]]:
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
    leaf = as_abstract_array(shape, dtype)
    if not stored.hasobject and member.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has not as many bytes")
    return leaf
