"""The names, shapes and dtypes in a MessagePack file of Flax; the arrays are skipped.

There is no library that reads such a file without its arrays: all of them return the contents of an
extension type.
"""

import math
import os
import struct
from typing import Any, BinaryIO

import jax
import numpy as np

from freeze_optax._files.abstract_arrays import as_abstract_array, check_axes
from freeze_optax._files.name_budget import NameBudget
from freeze_optax._tree.messages import quoted_list

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""The extension types of `flax.serialization`."""

_LONGEST_DTYPE = 100
"""The most characters in the name of a dtype. NumPy parses one with commas as a record."""

_CHUNKED = "__msgpack_chunked_array__"
"""The key of an array that Flax has split, because MessagePack has at most 4 GiB in an item."""

_COMPLETE: dict[int, tuple[str, Any]] = {
    **{n: ("number", n) for n in range(0x80)},
    **{0x80 + n: ("map", n) for n in range(0x10)},
    **{0x90 + n: ("array", n) for n in range(0x10)},
    **{0xA0 + n: ("str", n) for n in range(0x20)},
    0xC0: ("number", None),
    0xC2: ("number", False),
    0xC3: ("number", True),
    **{0xD4 + n: ("ext", 2**n) for n in range(5)},
    **{0xE0 + n: ("number", n - 0x20) for n in range(0x20)},
}
"""First bytes that contain the whole header: the kind of an item and its value or length."""

_FORMATS = {
    **{0xC4 + n: ("bin", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xC7 + n: ("ext", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xCA + n: ("number", form) for n, form in enumerate(("f", "d", *"BHIQ", *"bhiq"))},
    **{0xD9 + n: ("str", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xDC + n: ("array", form) for n, form in enumerate(("H", "I"))},
    **{0xDE + n: ("map", form) for n, form in enumerate(("H", "I"))},
}
"""First bytes that a number follows: the kind, and the `struct` format of value or length."""


class _Reader:
    """Reads MessagePack, item by item.

    Args:
      file: The file, open at its first byte.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.size = file, os.fstat(file.fileno()).st_size

    @property
    def position(self) -> int:
        """How many bytes are read or skipped."""
        return self._file.tell()

    def _left(self, count: int) -> int:
        """Returns `count`; raises ValueError if fewer bytes are left."""
        # Checked before memory is allocated, because a length in a file may be anything.
        if count > self.size - self.position:
            raise ValueError(f"it ends after {self.size:,} bytes, in the middle of an item")
        return count

    def _number(self, form: str) -> Any:
        """Reads a number of a `struct` format."""
        return struct.unpack(f">{form}", self._file.read(self._left(struct.calcsize(form))))[0]

    def skip(self, count: int) -> None:
        """Skips bytes."""
        self._file.seek(self._left(count), os.SEEK_CUR)

    def text(self, count: int) -> str:
        """Reads bytes as text."""
        return self._file.read(self._left(count)).decode()

    def next(self) -> tuple[str, Any]:
        """Reads an item: the value of a number, bool or None; the length of anything else."""
        first = self._number("B")
        if first in _COMPLETE:
            return _COMPLETE[first]
        if first not in _FORMATS:
            raise ValueError(
                f"byte {self.position - 1:,} is {first:#x}, which MessagePack does not use"
            )
        kind, form = _FORMATS[first]
        return kind, self._number(form)

    def of_kind(self, kind: str) -> Any:
        """Reads an item; raises ValueError if it is of another kind."""
        actual, value = self.next()
        if actual != kind:
            raise ValueError(f"byte {self.position:,} has a {actual} where a {kind} was expected")
        return value

    def _dtype(self) -> np.dtype[Any]:
        """Reads a dtype by its name."""
        count = self.of_kind("str")
        if count > _LONGEST_DTYPE:
            raise ValueError(f"it holds an array whose dtype has a name of {count:,} bytes")
        name = self.text(count)
        try:
            return np.dtype(name)
        except (TypeError, ValueError, SyntaxError) as error:  # NumPy parses lists in names
            raise ValueError(
                f"it holds an array of the dtype {name!r}, which NumPy does not have"
            ) from error

    def extension(self, length: int) -> Any:
        """Returns what an extension item of Flax stands for; an array without its contents."""
        code = self._number("b")
        end = self.position + self._left(length)
        if code == _COMPLEX:
            self.skip(length)
            return 0j
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"it holds an extension type {code}, which Flax does not write")
        if self.of_kind("array") != 3:
            raise ValueError("it holds an array that is not a shape, a dtype and bytes")
        axes = self.of_kind("array")
        check_axes(axes)
        shape, dtype = [self.of_kind("number") for _ in range(axes)], self._dtype()
        count, leaf = self.of_kind("bin"), as_abstract_array(shape, dtype)
        if count != math.prod(shape) * dtype.itemsize or self.position + count != end:
            raise ValueError(f"an array of shape {shape} and dtype {dtype} has {count:,} bytes")
        self.skip(count)
        return leaf


def read_msgpack_headers(file: BinaryIO) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a file that `flax.serialization` wrote, by their keys.

    Args:
      file: The file, open at its first byte and seekable.

    Returns:
      For each leaf a number, or a `jax.ShapeDtypeStruct`. Text and None are left out.

    Raises:
      ValueError: If the file does not have this format, or is cut off, or if its names would take
        too much memory.
    """
    reader = _Reader(file)
    budget = NameBudget(reader.size)
    leaves: dict[tuple[str, ...], Any] = {}
    kind, value = reader.next()
    if kind not in ("map", "array", "ext"):
        raise ValueError("it does not begin with a tree")
    if kind == "ext":
        leaves[()] = reader.extension(value)
    # Not recursive, because a file may be nested deeper than Python's stack.
    frames = [] if kind == "ext" else [_Frame((), kind, value, reader)]
    while frames:
        frame = frames[-1]
        if not frame.left:
            frames.pop()
            continue
        keys = frame.next_keys()
        budget.take(keys)
        kind, value = reader.next()
        if kind in ("map", "array"):
            frames.append(_Frame(keys, kind, value, reader))
        elif kind == "ext":
            leaves[keys] = reader.extension(value)
        elif kind == "number":
            leaves[keys] = value
        else:
            reader.skip(value)
    if reader.position != reader.size:
        raise ValueError(f"{reader.size - reader.position:,} bytes follow its end")
    return _join_chunks({keys: leaf for keys, leaf in leaves.items() if leaf is not None})


class _Frame:
    """A map or array that is being read, with the number of items left."""

    def __init__(self, keys: tuple[str, ...], kind: str, count: int, reader: _Reader):
        self._keys, self._is_map, self._count, self._reader = keys, kind == "map", count, reader
        self._seen, self.left = set[str](), count

    def next_keys(self) -> tuple[str, ...]:
        """Returns the keys of the next item in it."""
        key = self._key() if self._is_map else str(self._count - self.left)
        self.left -= 1
        if key in self._seen:
            raise ValueError(f"it has the key {key!r} twice in one place")
        self._seen.add(key)
        return (*self._keys, key)

    def _key(self) -> str:
        """Reads a key of a map."""
        kind, value = self._reader.next()
        if kind == "number":
            return str(value)
        if kind != "str":
            raise ValueError(
                f"byte {self._reader.position:,} has a {kind} as a key, not a text or a number"
            )
        return self._reader.text(value)


def _join_chunks(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Returns the leaves, with one leaf for each array that is in chunks."""
    chunked: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {
        keys[:-1]: {"shape": {}, "chunks": {}} for keys in leaves if keys and keys[-1] == _CHUNKED
    }
    joined: dict[tuple[str, ...], Any] = {}
    for keys, leaf in leaves.items():
        if keys[:-2] in chunked and len(keys) > 1 and keys[-2] in ("shape", "chunks"):
            chunked[keys[:-2]][keys[-2]][keys[-1]] = leaf
        elif keys[:-1] not in chunked:
            joined[keys] = leaf
    for keys, pieces in chunked.items():
        path = "/".join(keys)
        shape, chunks = (_in_order(pieces[name], path) for name in ("shape", "chunks"))
        if not all(isinstance(chunk, jax.ShapeDtypeStruct) for chunk in chunks):
            raise ValueError(f"the chunks of {path!r} are not arrays")
        check_axes(len(shape))
        if not chunks or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {path!r} do not make up its shape {shape}")
        joined[keys] = as_abstract_array(shape, chunks[0].dtype)
    return joined


def _in_order(numbered: dict[str, Any], path: str) -> list[Any]:
    """Returns the list that Flax has stored as a dict with the keys "0", "1" and so on."""
    if any(str(i) not in numbered for i in range(len(numbered))):
        raise ValueError(f"the chunks of {path!r} are not numbered: {quoted_list(numbered)}")
    return [numbered[str(i)] for i in range(len(numbered))]
