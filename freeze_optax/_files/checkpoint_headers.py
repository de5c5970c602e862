"""The names, shapes and dtypes in a checkpoint of any format; no array is read."""

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import starmap, takewhile
from pathlib import Path
from typing import Any

from freeze_optax._files.msgpack_headers import read_msgpack_headers
from freeze_optax._files.name_budget import NameBudget
from freeze_optax._files.npz_headers import read_npz_headers
from freeze_optax._files.orbax_headers import read_orbax_headers
from freeze_optax._files.plain_files import plain_size
from freeze_optax._files.safetensors_headers import read_safetensors_headers
from freeze_optax._tree.key_paths import dots_as_slashes

_Named = Iterable[tuple[str, Any]]


def read_headers(checkpoint: Path) -> dict[str, Any]:
    """Returns the leaves of a checkpoint, abstract, by their key paths.

    Dots in stored names separate components, as slashes do. Nothing is unpickled or evaluated.

    Args:
      checkpoint: A `.safetensors` or `.npz` file, a file that `flax.serialization` wrote, a folder
        of `.safetensors` files, or an Orbax checkpoint: its own folder, or one that contains only
        it.

    Returns:
      A dict from each path to a `jax.ShapeDtypeStruct`, or to a number. It can be used as a tree of
      params.

    Raises:
      OSError: If there is no such file.
      ValueError: If the file has none of these formats, or is broken.
      ImportError: If the package that reads it, of the extra `freeze_optax[cli]`, is missing.
    """
    budget = NameBudget(sum(map(plain_size, _files(checkpoint))))
    read = _of_folder if checkpoint.is_dir() else _of_file
    headers: dict[str, Any] = {}
    for name, leaf in read(checkpoint):
        path = dots_as_slashes(name)
        if path in headers:
            raise ValueError(
                f"{checkpoint} has two arrays at {path!r}; dots in stored names count as slashes"
            )
        if leaf is not None:
            headers[path] = leaf
    # The order is that of a nested dict: there the end of a name sorts before all characters.
    ordered = OrderedDict(sorted(headers.items(), key=lambda item: item[0].replace("/", "\0")))
    try:
        _spend(budget, ordered)
    except ValueError as error:
        raise ValueError(f"{checkpoint} can't be shown: {error}") from error
    return ordered


def _files(checkpoint: Path) -> list[Path]:
    """Returns the files that contain the names of the leaves."""
    if not checkpoint.is_dir():
        return [checkpoint]
    return _shards(checkpoint) or [*checkpoint.glob("_METADATA"), *checkpoint.glob("*/_METADATA")]


def _shards(folder: Path) -> list[Path]:
    """Returns the `.safetensors` files in a folder, sorted."""
    return sorted(folder.glob("*.safetensors"))


def _spend(budget: NameBudget, paths: Iterable[str]) -> None:
    """Takes budget for the leaves and for all nodes above them."""
    keys_before = list[str]()
    for path in paths:
        keys = path.split("/")
        common = sum(takewhile(bool, starmap(operator.eq, zip(keys, keys_before, strict=False))))
        budget.take(keys, len(keys) - common)
        keys_before = keys


def _of_file(file: Path) -> _Named:
    """Returns the leaves of a file by their stored names, for the format of its first bytes."""
    # Not by the suffix: checkpoints of Flax have none, and others may have a wrong one.
    with file.open("rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length < file.stat().st_size:
        return read_safetensors_headers(file)
    return read_npz_headers(file) if start.startswith((b"PK\3\4", b"PK\5\6")) else _msgpack(file)


def _of_folder(folder: Path) -> _Named:
    """Returns the leaves of a folder by their stored names."""
    shards = _shards(folder)
    if shards:
        return (pair for file in shards for pair in read_safetensors_headers(file))
    return read_orbax_headers(folder)


def _msgpack(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a MessagePack file by their stored names."""
    try:
        with file.open("rb") as opened:
            leaves = read_msgpack_headers(opened)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is neither a .safetensors nor an .npz file, nor one of flax.serialization: "
            f"{error}"
        ) from error
    for keys, leaf in leaves.items():
        yield "/".join(keys), leaf
