"""Names that would command a terminal or leave the folder: shown or told, and never obeyed."""

import io
import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np
import pytest
import safetensors.numpy

from tests.support.broken_files import fault, said
from tests.support.checkpoints import npz

# Colours, the title, the clipboard, a screen that is cleared, lines and pages that begin, a
# cursor that moves, text that runs backwards, what looks like nothing, and half a character.
COMMANDS = [
    *("\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;bHM=\x07", "\x1b[2J\x1b[H", "\x9b2J"),
    *("a\nb", "a\r\nb", "a\rb", "a\tb", "a\x0bb", "a\x0cb", "a\x85b", "a\u2028b", "a\u2029b"),
    *("a\x08\x08b", "\x7f", "\x01", "\u202eabc", "\u200b", "\u2066a", "\ufeff", "\U000e0041"),
]
ARRAY = np.ones(2, np.float32)


def _msgpack(names: list[str]) -> bytes:
    return flax.serialization.msgpack_serialize(dict.fromkeys(names, ARRAY))


NAMED = {
    "safetensors": lambda names: safetensors.numpy.save(dict.fromkeys(names, ARRAY)),
    "npz": lambda names: npz(**dict.fromkeys(names, ARRAY)),
    "msgpack": _msgpack,
}
EACH = pytest.mark.parametrize("form", NAMED)


@EACH
def test_no_name_in_a_file_commands_the_terminal(form, tmp_path, capsys):
    file = tmp_path / "model"
    file.write_bytes(NAMED[form](COMMANDS))
    table = said(capsys, file, "--depth", "9")
    assert table.fault == ""
    assert table.code == 0
    lines = table.out.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    # A title, a rule, the names, nothing, two notes, and the end of the last line.
    assert len(lines) == len(COMMANDS) + 6
    as_json = said(capsys, file, "--depth", "9", "--json").out
    assert [line for line in as_json.split("\n") if not line.isprintable()] == []
    assert sorted(row["path"] for row in json.loads(as_json)["rows"]) == sorted(COMMANDS)


@EACH
@pytest.mark.parametrize("arguments", [["--frozen", "nothing"], ["--at", "nothing"]])
def test_no_name_in_an_error_commands_the_terminal(form, arguments, tmp_path, capsys):
    for name in COMMANDS:
        file = tmp_path / "model"
        # The nearest names are told, and those that are there twice.
        for names in ([name, "nothing" + name], [f"{name}.x", f"{name}/x"]):
            file.write_bytes(NAMED[form](names))
            told = said(capsys, file, *arguments)
            assert (told.code, told.fault) == (2, "")


@pytest.mark.parametrize("name", COMMANDS, ids=ascii)
def test_no_dtype_key_or_number_of_a_header_commands_the_terminal(name, tmp_path, capsys):
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: list[Any] = [{name: {**whole, "shape": [9]}}, {"w": name}, {"w": {name: 1}}, name]
    headers += [{"w": {**whole, key: name}} for key in whole]
    headers += [{"w": whole, "__metadata__": {"a": [name]}}]
    files = []
    for header in headers:
        text = json.dumps(header).encode()
        files.append(len(text).to_bytes(8, "little") + text + bytes(8))
    of_msgpack = [((2,), name, bytes(8)), (name, "float32", bytes(8)), ((2,), "float32", name)]
    extensions = [msgpack.ExtType(1, msgpack.packb(parts)) for parts in of_msgpack]
    files += [msgpack.packb({name: extension}) for extension in extensions]
    for key in ("descr", "shape", "fortran_order"):
        about = {"descr": "<f4", "fortran_order": False, "shape": (2,), key: name}
        for text in (repr(about), str(about).replace(repr(name), f"'{name}'"), f"{about}{name}"):
            header = text.encode().ljust(199) + b"\n"
            member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)
            files.append(_archive(member, f"{name}.npy"))
    files += [_archive(b"", name), _archive(b"", f"{name}.npy")]
    file = tmp_path / "model"
    for data in files:
        file.write_bytes(data)
        told = said(capsys, file, "--depth", "9")
        assert told.fault == ""
        assert [line for line in told.out.split("\n") if not line.isprintable()] == []


def _archive(data: bytes, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize("name", COMMANDS, ids=ascii)
def test_no_name_of_a_file_commands_the_terminal(name, tmp_path, capsys):
    folder, shards, steps = tmp_path / name, tmp_path / "shards", tmp_path / "steps"
    for made in (folder, shards, steps / name, steps / f"{name}2"):
        made.mkdir(parents=True)
    (folder / "file").write_bytes(b"")
    (shards / f"{name}.safetensors").write_bytes(bytes(20))
    for step in (steps / name, steps / f"{name}2"):
        (step / "_METADATA").write_text("{}")
    for checkpoint in (folder / "file", folder, shards, steps / name, steps, tmp_path / f"{name}3"):
        told = said(capsys, checkpoint)
        assert (told.code, told.fault) == (2, "")


@pytest.mark.parametrize("name", COMMANDS, ids=ascii)
def test_no_argument_commands_the_terminal(name, tmp_path, capsys):
    file = tmp_path / "model"
    file.write_bytes(_msgpack(["w"]))
    options = [["--frozen", name], ["--at", name], ["--optimizer", name], ["--depth", f"{name}x"]]
    for option in options:
        told = said(capsys, file, *option)
        assert (told.code, told.fault) == (2, "")


OUTSIDE = ["../../evil", "/tmp/evil", "C:\\evil", "..\\evil", "~/evil", "evil\x00", "a/../../evil"]


def test_names_that_lead_out_of_an_archive_are_names(tmp_path, capsys, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    file = inside / "model.npz"
    member = npz(w=ARRAY)
    with zipfile.ZipFile(io.BytesIO(member)) as archive:
        data = archive.read("w.npy")
    for name in OUTSIDE:
        file.write_bytes(_archive(data, f"{name}.npy"))
        told = said(capsys, file)
        assert told.fault == ""
        assert told.code == 2 or told.out.endswith("trainable: 2 of 2 parameters (100.00%)\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model.npz"]


def test_members_that_are_no_files_are_one_line_or_what_they_hold(tmp_path, capsys):
    file = tmp_path / "model.npz"
    with zipfile.ZipFile(io.BytesIO(npz(w=ARRAY))) as archive:
        data = archive.read("w.npy")
    link = zipfile.ZipInfo("w.npy")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    folder = zipfile.ZipInfo("w.npy/")
    folder.external_attr = (stat.S_IFDIR | 0o777) << 16
    for info, contents, leaves in (
        (link, b"/etc/passwd", None),
        (link, data, {"w": (2, 8)}),
        (folder, b"", None),
    ):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(info, contents)
        assert fault(capsys, file, leaves) == ""
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_one_line(tmp_path, capsys):
    file = tmp_path / "model.npz"
    with zipfile.ZipFile(io.BytesIO(npz(w=ARRAY))) as archive:
        data = archive.read("w.npy")
    file.write_bytes(_archive(data, "w.npy", "w.npy"))
    assert "two arrays at 'w'" in said(capsys, file).err


def test_an_archive_in_an_archive_is_not_opened(tmp_path, capsys):
    file = tmp_path / "model.npz"
    inner = npz(w=ARRAY)
    for name in ("inner.npz", "inner.npy", "inner"):
        file.write_bytes(_archive(inner, name))
        assert fault(capsys, file, None) == ""


def test_an_archive_after_something_else_is_no_archive(tmp_path, capsys):
    # Python finds the directory of an archive at its end, whatever the file begins with.
    file = tmp_path / "model"
    for start in (b"#!/bin/sh\n", b"\x7fELF", b"<html>", Path(__file__).read_bytes()[:99]):
        file.write_bytes(start + npz(w=ARRAY))
        assert fault(capsys, file, None) == ""
