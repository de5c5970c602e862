"""The names, shapes and dtypes in a MessagePack file of Flax, its arrays skipped.

No library reads such a file without the arrays: they all hand over what an extension type holds.
"""

import math
import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import numpy as np

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""The extension types of `flax.serialization`."""

_CHUNKED = "__msgpack_chunked_array__"
"""What marks an array that Flax has cut, as MessagePack holds no more than 4 GiB in one piece."""

_WHOLE: dict[int, tuple[str, Any]] = {
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
"""First bytes that say all: the kind of an item and its value or length."""

_FORMS = {
    **{0xC4 + n: ("bin", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xC7 + n: ("ext", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xCA + n: ("number", form) for n, form in enumerate(("f", "d", *"BHIQ", *"bhiq"))},
    **{0xD9 + n: ("str", form) for n, form in enumerate(("B", "H", "I"))},
    **{0xDC + n: ("array", form) for n, form in enumerate(("H", "I"))},
    **{0xDE + n: ("map", form) for n, form in enumerate(("H", "I"))},
}
"""First bytes before a number: the kind, and for `struct` the form of its value or length."""


class _Reader:
    """Reads MessagePack, item by item.

    Args:
      file: Open at the first byte.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.size = file, os.fstat(file.fileno()).st_size

    @property
    def position(self) -> int:
        """How many bytes are behind."""
        return self._file.tell()

    def _left(self, count: int) -> int:
        # Before memory is taken: a length in a file may be anything.
        if count > self.size - self.position:
            raise ValueError(f"it ends after {self.size:,} bytes, in the middle of an item")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self._file.read(self._left(struct.calcsize(form))))[0]

    def skip(self, count: int) -> None:
        """Passes over bytes."""
        self._file.seek(self._left(count), os.SEEK_CUR)

    def text(self, count: int) -> str:
        """So many bytes as text."""
        return self._file.read(self._left(count)).decode()

    def next(self) -> tuple[str, Any]:
        """The next item: a number, bool or None whole, of all else the kind and length."""
        first = self._number("B")
        if first in _WHOLE:
            return _WHOLE[first]
        if first not in _FORMS:
            raise ValueError(f"byte {self.position - 1:,} is {first:#x}, which MessagePack has not")
        kind, form = _FORMS[first]
        return kind, self._number(form)

    def of_kind(self, kind: str) -> Any:
        """The next item, which has to be of a kind."""
        found, value = self.next()
        if found != kind:
            raise ValueError(f"byte {self.position:,} has a {found} where a {kind} was expected")
        return value

    def extension(self, length: int) -> Any:
        """What an extension item of Flax stands for, an array without its contents."""
        code = self._number("b")
        end = self.position + self._left(length)
        if code == _COMPLEX:
            self.skip(length)
            return 0j
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"it holds an extension type {code}, which Flax does not write")
        if self.of_kind("array") != 3:
            raise ValueError("it holds an array that is not a shape, a dtype and bytes")
        shape = tuple(self.of_kind("number") for _ in range(self.of_kind("array")))
        dtype = np.dtype(self.text(self.of_kind("str")))
        count = self.of_kind("bin")
        if count != math.prod(shape) * dtype.itemsize or self.position + count != end:
            raise ValueError(f"an array of shape {shape} and dtype {dtype} has {count:,} bytes")
        self.skip(count)
        return jax.ShapeDtypeStruct(shape, dtype)


def skim(file: BinaryIO) -> dict[tuple[str, ...], Any]:
    """The leaves in a file that `flax.serialization` wrote, by their keys.

    Args:
      file: Open at the first byte, and seekable.

    Returns:
      For each leaf its number, or its shape and dtype; text and None are left out.

    Raises:
      ValueError: If the file is not of this format, or cut.
    """
    reader = _Reader(file)
    leaves: dict[tuple[str, ...], Any] = {}
    # No recursion: a file may be nested as deep as it likes. Each frame is of a map or array, and
    # has the keys of what is in it.
    frames = [_Frame((), 1, lambda: "")]
    while frames:
        frame = frames[-1]
        if not frame.left:
            frames.pop()
            continue
        frame.left -= 1
        keys = (*frame.keys, frame.next_key()) if len(frames) > 1 else ()
        kind, value = reader.next()
        if kind == "map":
            frames.append(_Frame(keys, value, lambda: _key(reader)))
        elif kind == "array":
            frames.append(_Frame(keys, value, iter(map(str, range(value))).__next__))
        elif kind == "ext":
            leaves[keys] = reader.extension(value)
        elif kind != "number":
            reader.skip(value)
        elif value is not None:
            leaves[keys] = value
    if reader.position != reader.size:
        raise ValueError(f"{reader.size - reader.position:,} bytes follow its end")
    return _whole(leaves)


class _Frame:
    def __init__(self, keys: tuple[str, ...], left: int, next_key: Callable[[], str]):
        self.keys, self.left, self.next_key = keys, left, next_key


def _key(reader: _Reader) -> str:
    kind, value = reader.next()
    if kind == "number":
        return str(value)
    if kind != "str":
        raise ValueError(f"byte {reader.position:,} has a {kind} for a key")
    return reader.text(value)


def _whole(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """The leaves, with each array that is in chunks as one."""
    whole = dict(leaves)
    for node in [keys[:-1] for keys in leaves if keys and keys[-1] == _CHUNKED]:
        below = {keys[len(node) :]: x for keys, x in leaves.items() if keys[: len(node)] == node}
        dims = {int(keys[1]): x for keys, x in below.items() if keys[0] == "shape"}
        chunks = [x for keys, x in below.items() if keys[0] == "chunks"]
        for keys in below:
            del whole[(*node, *keys)]
        shape = tuple(dims[i] for i in sorted(dims))
        if not chunks or sum(math.prod(x.shape) for x in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {'/'.join(node)!r} do not make up its shape {shape}")
        whole[node] = jax.ShapeDtypeStruct(shape, chunks[0].dtype)
    return whole
