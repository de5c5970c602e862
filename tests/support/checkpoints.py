"""Checkpoints in every format, their headers, and the command line that reads them."""

import io
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from freeze_optax._files.checkpoint_headers import read_headers
from freeze_optax._files.command_line import main

F4 = jnp.float32
W = jax.ShapeDtypeStruct((2, 3), F4)
FEW = {"a.w": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}
FEW_READ = {"a/w": W, "b": jax.ShapeDtypeStruct((4,), jnp.int8)}


def layer(i: int) -> dict[str, Any]:
    kernel = np.full((4, 6), i, np.float32)
    return {"dense": {"kernel": kernel, "bias": np.full(6, i, np.float32)}}


def params() -> dict[str, Any]:
    return {
        "embeddings": {"word": np.ones((9, 4), np.float32), "ids": np.arange(9)},
        "encoder": {"layer": {str(i): layer(i) for i in range(12)}},
        "head": {"kernel": np.ones((6, 2), jnp.bfloat16), "scale": np.ones((), np.float32)},
    }


def flat(sep: str) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params(), sep=sep)


def save_safetensors(file: Path) -> None:
    safetensors.numpy.save_file(flat("."), file)


def save_npz(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, **flat("."))


def save_compressed(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez_compressed(opened, **flat("/"))


def save_msgpack(file: Path) -> None:
    file.write_bytes(flax.serialization.to_bytes(params()))


def save_shards(folder: Path) -> None:
    folder.mkdir()
    for top, tree in params().items():
        shard = flax.traverse_util.flatten_dict({top: tree}, sep=".")
        safetensors.numpy.save_file(shard, folder / f"{top}.safetensors")


def save_orbax(folder: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, params())


def save_zarr(folder: Path) -> None:
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(folder, params())


def save_step(folder: Path) -> None:
    with ocp.CheckpointManager(folder.parent / "run") as manager:
        manager.save(0, args=ocp.args.StandardSave(params()))
    (folder.parent / "run" / "0").rename(folder)


FORMATS = [
    *(save_safetensors, save_npz, save_compressed, save_msgpack),
    *(save_shards, save_orbax, save_zarr, save_step),
]


def output(capsys: Any, *arguments: str) -> str:
    """What the command prints."""
    main(["summary", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def error(capsys: Any, *arguments: str) -> str:
    """The one line that the command says."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removesuffix("\n")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # On a machine as it is: without the devices and settings of the tests.
    unset = ("JAX_PLATFORMS", "XLA_FLAGS", "COLUMNS", "PYTHONWARNINGS", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        arguments, text=True, stderr=subprocess.PIPE, env=environment, check=False, **options
    )


def read(data: bytes, folder: Path) -> dict[str, Any]:
    """The headers of a file with these bytes."""
    file = folder / "checkpoint"
    file.write_bytes(data)
    return read_headers(file)


def _is_header(leaf: Any) -> bool:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return type(leaf) in (bool, int, float, complex)
    dims = all(type(dim) is int and dim >= 0 for dim in leaf.shape)
    return dims and leaf.dtype.kind not in "OSUmM"


def is_error_or_headers(checkpoint: Path) -> bool:
    """Whether it is read, or said to be broken in one sentence; anything else is raised."""
    try:
        headers = read_headers(checkpoint)
    except (ValueError, OSError) as error:
        return bool(str(error))
    return all(map(_is_header, headers.values())) and all(type(path) is str for path in headers)


def odd_versions(file: Path, versions: Iterable[bytes]) -> list[Any]:
    """The versions of a file that are neither read nor said to be broken."""
    whole, odd = file.read_bytes() if file.exists() else b"", list[Any]()
    for data in versions:
        file.write_bytes(data)
        # A file of Orbax is one of several in a folder.
        checkpoint = file.parent if (file.parent / "_METADATA").exists() else file
        try:
            if not is_error_or_headers(checkpoint):
                odd.append(data)
        except Exception as error:  # noqa: BLE001
            odd.append((error, data))
    file.write_bytes(whole)
    return odd


def flips(data: bytes, bits: Iterable[int]) -> Iterator[bytes]:
    """The data with each of these bits turned over."""
    for i in bits:
        byte, bit = divmod(i, 8)
        yield data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def _told(leaf: Any) -> Any:
    """What stands for a leaf that Flax has restored."""
    if isinstance(leaf, np.ndarray | np.generic):
        return (leaf.shape, leaf.dtype)
    return (type(leaf), leaf if leaf == leaf else "NaN")


def told(headers: dict[str, Any]) -> dict[str, Any]:
    """What was read, to be compared: dtypes and the types of numbers count."""
    return {
        path: (leaf.shape, leaf.dtype)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else _told(0j if isinstance(leaf, complex) else leaf)
        for path, leaf in headers.items()
    }


def leaves_in(node: Any, keys: tuple[str, ...] = ()) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves_in(value, (*keys, str(key)))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from leaves_in(value, (*keys, str(i)))
    elif node is not None and not isinstance(node, str | bytes):
        # What a Python complex is does not count, only that it is one.
        yield keys, _told(0j if type(node) is complex else node)


def restored(data: bytes) -> dict[str, Any]:
    """The same by Flax, which reads the arrays."""
    tree = flax.serialization.msgpack_restore(data)
    return {"/".join(keys).replace(".", "/"): leaf for keys, leaf in leaves_in(tree)}


class Counted(io.FileIO):
    """A file that counts the bytes that are read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int | None:
        read = super().readinto(buffer)
        Counted.count += read or 0
        return read

    def readall(self) -> bytes:
        data = super().readall()
        Counted.count += len(data)
        return data


def npz(save: Any = np.savez, /, **arrays: Any) -> bytes:
    """An .npz file of these arrays."""
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def only_w(shape: Any, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {"w": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}


def tensor(dtype: str, shape: list[int], size: int) -> bytes:
    """A .safetensors file of one tensor, which need not be a right one."""
    about = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"w": about}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(size)
