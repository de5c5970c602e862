"""What is no plain file: pipes, links, folders, devices, and what may not be read."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from tests.support.broken_files import fault, said
from tests.support.checkpoints import run

SAFE = safetensors.numpy.save({"w": np.ones(2, np.float32)})
LEAVES = {"w": (2, 8)}

EACH_IN_TURN = """
import contextlib, resource, sys
from freeze_optax._files.command_line import main
resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2)
for checkpoint in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main(["summary", checkpoint])
    print(checkpoint, "is done", flush=True)
# Not `ru_maxrss`, which begins with the memory of the process that this one was forked from.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def assert_done(*checkpoints: Path) -> None:
    """Asserts that each is told in one line, and that none is waited for or read to no end.

    Nothing in this process can wait in its stead: what is blocked in a library holds the lock.
    """
    try:
        given = [sys.executable, "-c", EACH_IN_TURN, *map(str, checkpoints)]
        done = run(*given, stdout=subprocess.PIPE, timeout=60)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"it never ended; it said {expired.stdout!r}")
    *said, kilobytes = done.stdout.splitlines()
    assert said == [f"{checkpoint} is done" for checkpoint in checkpoints]
    lines = done.stderr.splitlines()
    assert len(lines) == len(checkpoints)
    assert all(line.startswith("freeze-optax summary: error: ") for line in lines)
    assert int(kilobytes) < 2_000_000


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="kilobytes and limits of Linux")


@on_linux
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    pipe, link, folder = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder"
    shards, item, step = tmp_path / "shards", tmp_path / "item", tmp_path / "step" / "default"
    for made in (folder, shards, item, step):
        made.mkdir(parents=True)
    pipes = [pipe, shards / "b.safetensors", item / "_METADATA", step / "_METADATA"]
    for made in pipes:
        os.mkfifo(made)
    link.symlink_to(pipe)
    (folder / "model.safetensors").symlink_to(pipe)
    (shards / "a.safetensors").write_bytes(SAFE)
    assert_done(pipe, link, folder, shards, item, step.parent)


@on_linux
@pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax warns of its own defaults.
def test_a_pipe_in_a_folder_of_orbax_is_not_waited_for(tmp_path):
    folders = []
    for form, names in {True: ("manifest.ocdbt", "d/*"), False: ("w/.zarray",)}.items():
        saved = tmp_path / f"saved{form:d}"
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=form)
        ocp.Checkpointer(handler).save(saved, {"w": np.ones(2, np.float32)})
        for i, name in enumerate(names):
            folder = Path(shutil.copytree(saved, tmp_path / f"broken{form:d}{i}"))
            (file,) = folder.glob(name)
            file.unlink()
            os.mkfifo(file)
            folders.append(folder)
    assert_done(*folders)


@on_linux
def test_a_device_in_a_folder_is_not_read_to_its_end(tmp_path):
    # An archive that is unpacked may hold such links.
    item, shards = tmp_path / "item", tmp_path / "shards"
    for file in (item / "_METADATA", shards / "model.safetensors"):
        file.parent.mkdir()
        file.symlink_to("/dev/zero")
    assert_done(item, shards)


@on_linux
def test_a_shape_of_a_million_axes_is_not_multiplied(tmp_path):
    # The product of so many numbers has as many digits: by hand or by Python, it takes hours.
    shape = [2**64 - 1] * 1_000_000
    array = msgpack.ExtType(1, msgpack.packb((shape, "float32", b"")))
    chunk = msgpack.ExtType(1, msgpack.packb(((2,), "int8", b"ab")))
    # Each of these numbers has a key, so fewer of them will do.
    axes = {str(i): size for i, size in enumerate(shape[:200_000])}
    chunked = {"__msgpack_chunked_array__": True, "shape": axes, "chunks": {"0": chunk}}
    files = [tmp_path / "whole", tmp_path / "in chunks"]
    for file, given in zip(files, (array, chunked), strict=True):
        file.write_bytes(msgpack.packb({"w": given}))
    assert_done(*files)


def test_a_link_to_a_file_is_the_file(tmp_path, capsys):
    (tmp_path / "model").write_bytes(SAFE)
    links = [tmp_path / f"link{i}" for i in range(3)]
    for link, target in zip(links, ["model", "link0", str(tmp_path / "link1")], strict=True):
        link.symlink_to(target)
        assert fault(capsys, link, LEAVES) == ""
        assert said(capsys, link).code == 0
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.safetensors").symlink_to("../model")
    assert fault(capsys, shards, LEAVES) == ""
    assert said(capsys, shards).code == 0


def test_a_link_that_leads_nowhere_is_one_line(tmp_path, capsys):
    nowhere, circle, itself = (tmp_path / name for name in ("nowhere", "circle", "itself"))
    nowhere.symlink_to("no such file")
    circle.symlink_to("itself/circle")
    itself.symlink_to("itself")
    for link in (nowhere, circle, itself, nowhere / "below"):
        assert fault(capsys, link, None) == ""
    for i, target in enumerate(("no such file", "itself")):
        shards = tmp_path / f"shards{i}"
        shards.mkdir()
        (shards / "model.safetensors").symlink_to(target)
        (shards / "itself").symlink_to("itself")
        assert fault(capsys, shards, None) == ""


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, capsys):
    for name in ("model.safetensors", "model.npz", "_METADATA", "default/_METADATA"):
        (tmp_path / name / name).mkdir(parents=True)
    for checkpoint in [tmp_path, *tmp_path.rglob("*")]:
        assert fault(capsys, checkpoint, None) == ""


def test_an_empty_file_of_any_name_is_one_line(tmp_path, capsys):
    for name in ("model", "model.safetensors", "model.npz", "model.msgpack"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(b"")
        for checkpoint in (folder, folder / name):
            assert fault(capsys, checkpoint, None) == ""
    (tmp_path / "_METADATA").write_bytes(b"")
    assert fault(capsys, tmp_path, None) == ""


DEVICES = ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/proc/self/mem", "/proc", "/dev"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_one_line(device, capsys):
    if not Path(device).exists():
        pytest.skip("this system has no such device")
    assert fault(capsys, Path(device), None) == ""


def test_a_socket_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        assert fault(capsys, Path("socket"), None) == ""


WRONG = ["", ".", "..", "a\x00b", "a" * 300, "a/" * 3_000, "~", "~root", "file:///etc/passwd", "-"]


@pytest.mark.parametrize("name", WRONG, ids=lambda name: ascii(name[:9]))
def test_a_path_that_is_none_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = said(capsys, name)
    assert (told.code, told.fault) == (2, "")


NOBODY = 65_534


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """Within it root may read no more than others."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def hidden(capsys: Any) -> Iterator[Path]:
    """A file in a folder in a folder that others may look into."""
    with tempfile.TemporaryDirectory() as above:
        file = Path(above) / "folder" / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(SAFE)
        for path in (Path(above), file.parent, file):
            path.chmod(0o755)
        with _as_nobody():
            assert said(capsys, file).code == 0
            assert said(capsys, file.parent).code == 0
        yield file
        for path in (Path(above), file.parent, file):
            path.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system knows no users")
@pytest.mark.parametrize("level", [0, 1, 2], ids=["the file", "its folder", "the folder above"])
def test_what_may_not_be_read_is_one_line(level, hidden, capsys):
    [hidden, *hidden.parents][level].chmod(0)
    for path in (hidden, hidden.parent):
        with _as_nobody():
            told = said(capsys, path)
        assert (told.code, told.fault) == (2, "")
        assert str(path) in told.err
    with _as_nobody():
        assert "error: Permission denied: " in said(capsys, hidden).err
