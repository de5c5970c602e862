"""What the command line says of a file, and whether it is right."""

import ast
import io
import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import numpy as np

from freeze_optax._files.command_line import main
from tests.support.checkpoints import leaves_in

Leaves = dict[str, tuple[int, int]]
"""The elements and bytes of each leaf, by its path."""


class Said(NamedTuple):
    """How the command ended, and what it printed."""

    code: Any
    out: str
    err: str

    @property
    def fault(self) -> str:
        """What is wrong with it: it is to be a table, or one line on stderr and the code 2."""
        if self.code == 0:
            return "" if self.out and not self.err else f"printed {self.out!r} and {self.err!r}"
        line = self.err.removesuffix("\n")
        right = (self.code, self.out) == (2, "") and line != self.err and line.isprintable()
        begins = line.startswith("freeze-optax summary: error: ")
        return "" if right and begins else f"ended with {self}"


def said(capsys: Any, *arguments: Any) -> Said:
    """What the command says."""
    try:
        main(["summary", *map(str, arguments)])
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    return Said(code, *capsys.readouterr())


def fault(capsys: Any, checkpoint: Path, expected: Leaves | None) -> str:
    """What is wrong with what is said of a checkpoint.

    Args:
      capsys: That of pytest.
      checkpoint: The file or folder.
      expected: The leaves in it, None if it has to be refused. It may be refused in any case.
    """
    told = said(capsys, checkpoint, "--json", "--depth", "99")
    if told.code or told.fault:
        return told.fault
    if expected is None:
        return f"read it: {told.out}"
    table = json.loads(told.out)
    found = {row["path"]: row["total"] for row in table["rows"]}
    size = table["trainable_bytes"] + table["frozen_bytes"]
    counts = {path: count for path, (count, _) in expected.items() if count}
    right = counts.items() <= found.items() and table["total"] == sum(counts.values())
    right = right and size == sum(size for _, size in expected.values())
    return "" if right else f"said {told.out}, not {expected}"


def odd_files(
    capsys: Any,
    file: Path,
    versions: Iterable[bytes],
    expected: Callable[[bytes], Leaves | None],
    checkpoint: Path | None = None,
) -> list[tuple[bytes, str]]:
    """The versions of a file that are neither refused in one line nor told of as they are."""
    odd, count, whole = [], 0, file.read_bytes() if file.exists() else b""
    for count, data in enumerate(versions, 1):  # noqa: B007
        file.write_bytes(data)
        try:
            what = fault(capsys, checkpoint or file, expected(data))
        except Exception as error:  # noqa: BLE001
            what = f"raised {error!r}"
        if what:
            odd.append((data, what))
    assert count
    file.write_bytes(whole)
    return odd


def peak_of(function: Callable[[], Any]) -> int:
    """The most bytes of memory that a call takes."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _sum_of(leaves: Iterable[tuple[str, int, int]]) -> Leaves:
    return {path.replace(".", "/"): (count, size) for path, count, size in leaves}


def in_safetensors(data: bytes) -> Leaves | None:
    """The leaves by the JSON in front, sizes by what it says of places; None if there is none."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        abouts = [(name, about) for name, about in header.items() if name != "__metadata__"]
        return _sum_of(
            (name, math.prod(about["shape"]), about["data_offsets"][1] - about["data_offsets"][0])
            for name, about in abouts
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


_HEADER = re.compile(rb"\x93NUMPY.{4}(\{.*?\}) *\n", re.DOTALL)
_NAME = re.compile(rb"PK\x01\x02.{42}([^\x00]*?)\.npy", re.DOTALL)


def in_npz(data: bytes) -> Leaves | None:
    """The leaves by the headers in front of arrays that are not compressed, None if not all.

    An array that the directory of the archive hides is none to NumPy either.
    """
    try:
        with np.load(io.BytesIO(data)) as archive:
            held = {name: archive.zip.getinfo(f"{name}.npy").file_size for name in archive.files}
        found = list(_HEADER.finditer(data))
        headers = [ast.literal_eval(header[1].decode("latin1")) for header in found]
        names = [name.decode("cp437") for name in _NAME.findall(data)]
        counts = [math.prod(header["shape"]) for header in headers]
        sizes = [np.dtype(header["descr"]).itemsize for header in headers]
        lengths = [len(header[0]) for header in found]
        leaves = list(zip(names, counts, sizes, lengths, strict=True))
        assert all(held.get(name, n * x + y) == n * x + y for name, n, x, y in leaves)
    except Exception:  # noqa: BLE001
        return None
    return _sum_of((name, n, n * x) for name, n, x, _ in leaves if name in held)


def in_msgpack(data: bytes) -> Leaves | None:
    """The leaves that Flax restores; None if it does not."""
    try:
        tree = flax.serialization.msgpack_restore(data)
        pairs = list(leaves_in(tree))
    except Exception:  # noqa: BLE001
        return None
    # What stands for an array is its shape and dtype, for a number of Python its type.
    arrays = [(keys, x) for keys, x in pairs if isinstance(x[1], np.dtype)]
    sizes = {bool: 1, complex: 8}
    numbers = [("/".join(k), 1, sizes.get(x[0], 4)) for k, x in pairs if type(x[0]) is type]
    return _sum_of(
        [
            *(
                ("/".join(keys), math.prod(shape), math.prod(shape) * dtype.itemsize)
                for keys, (shape, dtype) in arrays
            ),
            *numbers,
        ]
    )
