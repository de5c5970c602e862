"""Folders of Orbax, each file of them cut, flipped, missing, or written by hand to mislead."""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.support.broken_files import Leaves, fault, odd_files, said
from tests.support.checkpoints import flips
from tests.support.sampling import stride

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WHOLE: Leaves = {"w": (6, 24)}
FORMS = {"ocdbt": True, "zarr": False}
EACH = pytest.mark.parametrize("form", FORMS)


@functools.cache
def _saved(form: str, above: Path) -> Path:
    folder = above / form
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=FORMS[form])
    ocp.Checkpointer(handler).save(folder, {"w": jnp.ones((2, 3))})
    return folder


@pytest.fixture
def folder(form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be broken."""
    return Path(shutil.copytree(_saved(form, tmp_path_factory.getbasetemp()), tmp_path / "saved"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def whole(_: bytes) -> Leaves:
    return WHOLE


def in_zarray(data: bytes) -> Leaves | None:
    """What the JSON beside an array says of it; None if it says nothing."""
    try:
        about = json.loads(data)
        count = math.prod(about["shape"])
        return {"w": (count, count * np.dtype(about["dtype"]).itemsize)}
    except (ValueError, KeyError, TypeError):
        return None


@EACH
def test_a_whole_folder_is_told_of_as_it_is(form, folder, capsys):
    assert fault(capsys, folder, WHOLE) == ""
    assert said(capsys, folder).code == 0
    assert fault(capsys, folder, {"w": (6, 25)}).startswith("said ")


@EACH
def test_a_folder_may_be_named_from_where_one_is(form, folder, capsys, monkeypatch):
    for start, paths in {folder.parent: ("saved", "./saved/"), folder: (".", "../saved")}.items():
        monkeypatch.chdir(start)
        for path in paths:
            told = said(capsys, path)
            assert (told.code, told.fault, told.err) == (0, "", "")
            assert told.out.endswith("trainable: 6 of 6 parameters (100.00%)\n")


@pytest.mark.sampled
@EACH
def test_a_file_cut_at_any_byte_is_one_line_or_what_it_was(form, folder, capsys):
    for file in files_of(folder):
        data = file.read_bytes()
        cut = (data[:size] for size in range(0, len(data), stride(3)))
        leaves_of = in_zarray if file.name == ".zarray" else whole
        assert odd_files(capsys, file, cut, leaves_of, folder) == []
    assert fault(capsys, folder, WHOLE) == ""


@pytest.mark.sampled
@EACH
def test_a_flipped_bit_is_one_line_or_what_it_makes(form, folder, capsys):
    read: dict[str, Callable[[bytes], Leaves | None]] = {".zarray": in_zarray, "_METADATA": whole}
    for file in files_of(folder):
        if file.name not in read and file.parent.name != "d" and file.suffix != ".ocdbt":
            continue
        data = file.read_bytes()
        flipped = flips(data, range(0, 8 * len(data), stride(7)))
        assert odd_files(capsys, file, flipped, read.get(file.name, whole), folder) == []
    assert fault(capsys, folder, WHOLE) == ""


@EACH
def test_without_any_one_of_its_files_it_is_one_line_or_what_it_was(form, folder, capsys):
    for file in files_of(folder):
        data = file.read_bytes()
        file.unlink()
        assert fault(capsys, folder, WHOLE) == ""
        for leads_to in ("nowhere", file.name, "/dev/null", "/proc"):
            file.symlink_to(leads_to)
            assert fault(capsys, folder, WHOLE) == ""
            file.unlink()
        file.mkdir()
        assert fault(capsys, folder, WHOLE) == ""
        file.rmdir()
        file.write_bytes(data)
    assert said(capsys, folder).code == 0


def _metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / "_METADATA"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def _leaf(**entries: Any) -> Callable[[Any], Any]:
    """Changes what is said of the one leaf: of its key, or of its value."""

    def change(about: Any) -> Any:
        ((name, leaf),) = about["tree_metadata"].items()
        (key,), value = leaf["key_metadata"], leaf["value_metadata"]
        key = {**key, **{k: v for k, v in entries.items() if k in key}}
        value = {**value, **{k: v for k, v in entries.items() if k not in key}}
        leaf = {"key_metadata": [key], "value_metadata": value}
        return {**about, "tree_metadata": {name: leaf}}

    return change


NAMES = ["\x1b[31m", "a\nb", "a\x07", "..", "../..", "../../etc", "", "/", ".", "w\x00", "v", "W"]
NAMES += ["/etc", "/dev/zero", "http://localhost:1/w", "a" * 300, "a/" * 2_000, "\udc80"]


@EACH
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_leaf_that_is_not_in_the_folder_is_one_line(form, name, folder, capsys):
    _metadata(folder, _leaf(key=name))
    assert fault(capsys, folder, None) == ""


EVIL = "__import__('os').system('touch evil')"
TYPES = [
    EVIL,
    "os.system",
    "builtins.eval",
    "pickle",
    "None",
    "\x1b[31m",
    "a\nb",
    "",
    None,
    3,
    [],
    {},
]


@EACH
@pytest.mark.parametrize("kind", TYPES, ids=ascii)
def test_a_type_that_orbax_has_not_is_one_line_and_not_called(
    form, kind, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for entry in ({"value_type": kind}, {"key_type": kind}):
        _metadata(folder, _leaf(**entry))
        assert fault(capsys, folder, WHOLE) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


SHAPES = [[-2, 3], [0, 3], [2**63, 1], [2**62, 2**62], [10**30], [2.5], [True], ["2"], "23", None]
SHAPES += [[[2]], [1] * 33, [1] * 100_000, {}, 6, [math.nan], []]
DTYPES = [
    "O",
    "|O",
    "<V4",
    "<M8[s]",
    "<U2",
    "|S5",
    "<f5",
    "\x1b[31m",
    "a\nb",
    EVIL,
    "",
    None,
    3,
    [],
]
DTYPES += [[["a", "<f4"], ["b", "<f4"]], [["\x1b[31m", "<f4"]], "<c16", "bfloat16", "float8_e4m3fn"]


@pytest.mark.parametrize("form", ["zarr"])
@pytest.mark.parametrize(
    ("key", "value"),
    [*(("shape", shape) for shape in SHAPES), *(("dtype", dtype) for dtype in DTYPES)],
    ids=lambda value: ascii(value)[:20],
)
def test_an_array_of_no_shape_or_dtype_is_one_line_or_what_it_says(
    form, key, value, folder, capsys
):
    file = folder / "w" / ".zarray"
    about = {**json.loads(file.read_text()), key: value}
    if key == "shape":
        about["chunks"] = value
    file.write_text(json.dumps(about))
    told = said(capsys, folder)
    assert told.fault == ""
    assert told.code == 2 or told.out.count("trainable") > 0


TEXTS = {
    "nothing": "",
    "no JSON": "{'a': 1}",
    "zeros": "\x00" * 9,
    "null": "null",
    "a list": "[]",
    "a number": "9" * 10_000,
    "nested deep": "[" * 100_000,
    "nested deep in dicts": '{"tree_metadata":' * 100_000,
    "a name twice": '{"tree_metadata": {}, "tree_metadata": 3}',
    "nothing in it": '{"tree_metadata": {}}',
    "no tree": '{"tree_metadata": [1]}',
    "infinite": '{"tree_metadata": Infinity}',
    "a pickle": "cos\nsystem\n(S'touch evil'\ntR.",
    "keys that are code": json.dumps({"tree_metadata": {f"({EVIL},)": {}}}),
}


@EACH
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_metadata_that_are_none_are_one_line(form, text, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "_METADATA").write_text(text)
    assert fault(capsys, folder, {}) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@EACH
def test_nothing_in_a_folder_is_changed_by_looking(form, folder, capsys):
    def seen() -> list[Any]:
        paths = sorted([folder, *folder.rglob("*")])
        return [(path, path.stat().st_mtime_ns, path.is_file()) for path in paths]

    before = seen()
    assert said(capsys, folder).code == 0
    _metadata(folder, lambda about: {**about, "use_zarr3": True})
    os.utime(folder / "_METADATA", ns=(0, next(t for p, t, _ in before if p.name == "_METADATA")))
    assert fault(capsys, folder, WHOLE) == ""
    assert seen() == before
