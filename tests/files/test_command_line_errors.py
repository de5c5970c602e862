"""The command line where something is wrong: one line, and no traceback whatever happens."""

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import orbax.checkpoint as ocp
import pytest

import freeze_optax as fo
from freeze_optax._files.command_line import main
from tests.support.checkpoints import (
    error,
    output,
    params,
    run,
    save_msgpack,
    save_npz,
    save_orbax,
    save_safetensors,
)

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax warns of its own defaults.
    pytest.mark.filterwarnings("ignore::UserWarning:(orbax|absl)"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_safetensors(file)
    return str(file)


WRONG = [
    ([], "freeze-optax: error: the following arguments are required: COMMAND"),
    (["summary"], "freeze-optax summary: error: the following arguments are required: CHECKP"),
    (["sumary"], "freeze-optax: error: argument COMMAND: invalid choice: 'sumary'"),
    (
        ["summary", "*", "--frosen", "head"],
        "freeze-optax: error: unrecognized arguments: --fro",
    ),
    (["summary", "*", "--depth", "x"], "argument --depth: invalid int value: 'x'"),
    (["summary", "*", "--depth", "1.5"], "argument --depth: invalid int value: '1.5'"),
    (["summary", "*", "--depth", "-1"], "depth is a number of levels, 0 or more, not -1"),
    (["summary", "*", "--depth"], "argument --depth: expected one argument"),
    (["summary", "*", "--frozen"], "argument --frozen: expected at least one argument"),
    (["summary", "*", "--optimizer"], "argument --optimizer: expected one argument"),
    (["summary", "*", "--json", "--frozen", "c["], "'c[': `[` without `]`; write [[] for the"),
    (["summary", "*", "--frozen", "{a"], "pattern '{a': `{` without `}`"),
    (["summary", "*", "--frozen", "a**"], "pattern 'a**': `**` stands for whole components"),
    (["summary", "*", "--frozen", "head", "{0..99999}"], "`{0..99999}` is too long a range"),
    (["summary", "*", "--frozen", ""], "pattern '' selects no leaf"),
    (
        ["summary", "*", "--optimizer", "adamv"],
        "optax has no optimizer 'adamv'; nearest: 'adam",
    ),
    (["summary", "*", "--optimizer", "AdamW"], "optax has no optimizer 'AdamW'; nearest: "),
    (["summary", "*", "--optimizer", ""], "optax has no optimizer ''"),
    (["summary", "*", "--optimizer", "linear_schedule"], "optax has no optimizer 'linear_sche"),
    (["summary", "*", "--optimizer", "os.system"], "optax has no optimizer 'os.system'"),
    (
        ["summary", "*", "--optimizer", "dpsgd"],
        "dpsgd needs l2_norm_clip, noise_multiplier, see",
    ),
    (
        ["summary", "*", "--optimizer", "chain"],
        "chain needs args, which the command line can't set",
    ),
    (
        ["summary", "*", "--optimizer", "masked"],
        "masked needs inner, mask, which the command",
    ),
    (["summary", "/no/such/file"], "error: No such file or directory: /no/such/file"),
    (["summary", "/no/such/folder/"], "error: No such file or directory: /no/such/folder"),
    (["summary", "/dev/null"], "error: /dev/null is not a plain file; copy its contents into one"),
    (["summary", "/no/such\nfile"], "No such file or directory"),
    (["summary", "*", "--un\nknown"], "unrecognized arguments"),
    (["summary", "*", "--frozen", "no\nleaf"], "selects no leaf"),
    (["summary", "*", "--optimizer", "no\nsuch"], "optax has no optimizer"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(given) for given, _ in WRONG])
def test_what_is_wrong_is_told_in_one_line(arguments, said, checkpoint, capsys):
    given = [checkpoint if argument == "*" else argument for argument in arguments]
    line = error(capsys, *given)
    assert said in line
    assert line.startswith(("freeze-optax: error: ", "freeze-optax summary: error: "))


def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_paths(checkpoint, capsys):
    line = error(capsys, "summary", checkpoint, "--frozen", "head", "embedings", "--json")
    assert line == (
        "freeze-optax summary: error: pattern 'embedings' selects no leaf; nearest: "
        "'embeddings', 'embeddings/ids', 'embeddings/word'"
    )
    line = error(capsys, "summary", checkpoint, "--frozen", "encoder/layer/0/dense/kernl")
    assert "nearest: 'encoder/layer/0/dense/kernel'" in line
    line = error(capsys, "summary", checkpoint, "--frozen", "encoder.layer.0.dense")
    assert "pattern 'encoder.layer.0.dense' selects no leaf; slashes separate comp" in line
    assert line.endswith("write 'encoder/layer/0/dense'")


def test_an_error_of_python_has_the_same_words(checkpoint, capsys):
    with pytest.raises(ValueError, match="selects no leaf") as caught:
        fo.summary(params(), "embedings")
    line = error(capsys, "summary", checkpoint, "--frozen", "embedings")
    assert line == f"freeze-optax summary: error: {caught.value}"


CUT = {"safetensors": save_safetensors, "npz": save_npz, "msgpack": save_msgpack}


@pytest.mark.parametrize("save", CUT.values(), ids=CUT)
def test_a_file_that_is_cut_is_told_in_one_line(save, tmp_path, capsys):
    file = tmp_path / "saved"
    save(file)
    data = file.read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:size])
        assert str(file) in error(capsys, "summary", str(file))


def test_folders_that_hold_none_or_several_checkpoints_are_told_in_one_line(tmp_path, capsys):
    assert "holds no .safetensors file" in error(capsys, "summary", str(tmp_path))
    save_orbax(tmp_path / "one")
    save_orbax(tmp_path / "two")
    line = error(capsys, "summary", str(tmp_path))
    assert line.endswith(f"name one: '{tmp_path}/one', '{tmp_path}/two'")


TEN_TIMES = """
import contextlib, sys
from freeze_optax._files.command_line import main
for _ in range(10):
    with contextlib.suppress(SystemExit):
        main(["summary", sys.argv[1]])
"""


def test_a_broken_checkpoint_of_orbax_is_told_in_one_line_of_ours(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {str(i): jnp.ones(2) for i in range(4)})
    for file in (tmp_path / "saved" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    # The threads of its store may say things of their own, late and not each time.
    done = run(sys.executable, "-c", TEN_TIMES, str(tmp_path / "saved"), stdout=subprocess.PIPE)
    assert done.stdout == ""
    told = [line.startswith("freeze-optax summary: error: ") for line in done.stderr.splitlines()]
    assert told.count(True) == 10


def test_a_file_in_a_folder_is_told_by_its_own_name(tmp_path, capsys):
    (tmp_path / "model.safetensors").symlink_to("no such file")
    said = error(capsys, "summary", str(tmp_path))
    assert said.endswith(f"error: No such file or directory: {tmp_path / 'model.safetensors'}")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_file_that_may_not_be_read_is_told_in_one_line(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_safetensors(file)
    file.chmod(0)
    assert "error: Permission denied: " in error(capsys, "summary", str(file))


def test_a_package_that_is_missing_is_told_in_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    save_orbax(tmp_path / "saved")
    install = "; install it with: pip install 'freeze_optax[cli]'"
    monkeypatch.setitem(sys.modules, "safetensors", None)
    line = error(capsys, "summary", checkpoint)
    assert line.endswith(f"this checkpoint is read with safetensors{install}")
    monkeypatch.setitem(sys.modules, "orbax", None)
    line = error(capsys, "summary", str(tmp_path / "saved"))
    assert line.endswith(f"this checkpoint is read with orbax-checkpoint{install}")
    save_npz(tmp_path / "npz")
    save_msgpack(tmp_path / "msgpack")
    for name in ("npz", "msgpack"):
        assert json.loads(output(capsys, str(tmp_path / name), "--json"))["total"] == 418


@pytest.mark.parametrize("arguments", [["--help"], ["summary", "--help"], ["summary", "-h"]])
def test_help_is_printed(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(arguments)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: freeze-optax")
    if len(arguments) > 1:
        for option in ("CHECKPOINT", "--frozen PATTERN", "--optimizer", "--depth", "--json"):
            assert option in out


def test_the_example_in_the_help_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["summary", "--help"])
    example = capsys.readouterr().out.partition("example: freeze-optax ")[2].split()
    assert example[:2] == ["summary", "model.safetensors"]
    monkeypatch.chdir(tmp_path)
    save_safetensors(tmp_path / "model.safetensors")
    main([word.strip("'") for word in example])
    assert capsys.readouterr().out.endswith("trainable: 253 of 418 parameters (60.53%)\n")


def test_arguments_are_those_of_the_process_if_none_are_given(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["freeze-optax", "summary", checkpoint, "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["total"] == 418


def test_the_command_and_the_module_are_the_same(checkpoint):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="freeze-optax")
    assert script.load() is main
    command = Path(sys.executable).with_name("freeze-optax")
    given = ("summary", checkpoint, "--frozen", "head")
    as_command = run(str(command), *given, stdout=subprocess.PIPE)
    as_module = run(sys.executable, "-m", "freeze_optax", *given, stdout=subprocess.PIPE)
    assert (as_command.returncode, as_command.stderr) == (0, "")
    assert (as_module.returncode, as_module.stderr) == (0, "")
    assert as_command.stdout == as_module.stdout
    assert as_module.stdout.endswith("trainable: 396 of 418 parameters (94.74%)\n")


def test_no_accelerator_is_started(tmp_path):
    # Which would take its memory, or wait for whoever has it. Orbax asks for it.
    save_orbax(tmp_path / "saved")
    command = (sys.executable, "-m", "freeze_optax", "summary", str(tmp_path / "saved"))
    given = ("--frozen", "head", "--optimizer", "adam")
    done = run("env", "JAX_PLATFORMS=none_such", *command, *given, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_pipe_that_is_closed_is_no_traceback(form, checkpoint):
    # As behind `| head -1`, once that has its line.
    reads, writes = os.pipe()
    os.close(reads)
    command = (sys.executable, "-m", "freeze_optax", "summary", checkpoint, *form)
    done = run(*command, stdout=writes)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_names_are_printed_as_they_are(tmp_path, capsys):
    names = ["[red]x", ":smile:", "ä [bold]", "{a}", "$x", "`y`", "中文"]
    file = tmp_path / "saved"
    file.write_bytes(msgpack.packb({name: {"w": 0.5} for name in names}))
    printed = output(capsys, str(file), "--depth", "1").splitlines()
    shown = [line.rpartition("trainable")[0].strip() for line in printed[2 : 2 + len(names)]]
    assert sorted(shown) == sorted(names)
    paths = [row["path"] for row in json.loads(output(capsys, str(file), "--json"))["rows"]]
    assert sorted(paths) == sorted(names)
    # A slash separates components here too.
    file.write_bytes(msgpack.packb({"[red]x[/red]": 0.5}))
    printed = output(capsys, str(file), "--depth", "2").splitlines()
    assert [line.split()[0] for line in printed[2:4]] == ["[red]x[", "red]"]


def test_names_do_not_command_the_terminal(tmp_path, capsys):
    file = tmp_path / "saved"
    file.write_bytes(msgpack.packb({"\x1b[31mred\x1b]0;title\x07": 0.5, "b\x08\r\x9b2J": 0.5}))
    printed = output(capsys, str(file))
    assert not [char for char in printed if not char.isprintable() and char != "\n"]


# What moves the cursor, changes colours, deletes, or ends a line, to a terminal or to Python.
COMMANDS = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x08", "\x7f", "\r", "\n", "\x85", "\u2028"]
COMMANDS += ["\u202e", "\x00", "\x0b", "\x1c"]


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_what_is_wrong_does_not_command_the_terminal(command, tmp_path, capsys):
    file = tmp_path / "model"
    about = {"dtype": f"{command}X", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"w": about}, ensure_ascii=False).encode()
    array = msgpack.ExtType(1, msgpack.packb(([1], f"{command}X", bytes(4))))
    safe = len(header).to_bytes(8, "little") + header + bytes(4)
    for data in (safe, msgpack.packb({"w": array}), msgpack.packb({command: 1.0, "w": array})):
        file.write_bytes(data)
        assert error(capsys, "summary", str(file)).isprintable()
    named = tmp_path / f"a{command.replace(chr(0), '')}b"
    given = (["summary", str(named)], ["summary", str(named), "--frozen", command], [command])
    for arguments in (*given, ["summary", str(file), "--depth", command]):
        assert error(capsys, *arguments).isprintable()


def test_a_long_message_is_cut_where_it_is_too_long(checkpoint, capsys):
    line = error(capsys, "summary", checkpoint, "--frozen", "k" * 10_000)
    assert line.startswith("freeze-optax summary: error: pattern 'kkkkkkkkkk")
    assert line.endswith("k […]")
    said = line.removeprefix("freeze-optax summary: error: ").removesuffix(" […]")
    assert len(said) == 600
    words = "word " * 10_000
    line = error(capsys, "summary", checkpoint, "--frozen", words)
    assert line.startswith("freeze-optax summary: error: pattern 'word word")
    assert 600 < len(line) < 700


def test_names_in_json_do_not_command_the_terminal(tmp_path, capsys):
    file = tmp_path / "saved"
    file.write_bytes(msgpack.packb({"a\x7fb": 0.5, "c\x1bd": 0.5}))
    printed = output(capsys, str(file), "--json")
    assert [char for char in printed if not char.isprintable() and char != "\n"] == []
    paths = {row["path"] for row in json.loads(printed)["rows"]}
    assert paths == {"a\x7fb", "c\x1bd"}


def test_a_narrow_terminal_shows_names_and_numbers(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    printed = output(capsys, checkpoint, "--frozen", "embeddings", "--optimizer", "adamw")
    # Wider than the terminal, as numbers that are cut off would be worse than lines that wrap.
    assert max(map(len, printed.splitlines())) <= 80
    for name in ("embeddings", "encoder", "head"):
        assert name in printed
    assert "trainable: 373 of 418 parameters" in printed
    (model,) = [line for line in printed.splitlines() if line.startswith("embeddings")]
    assert model.split()[-2:] == ["0", "bytes"]


def test_what_the_encoding_has_not_is_no_traceback(tmp_path, monkeypatch):
    file = tmp_path / "saved"
    file.write_bytes(msgpack.packb({"ä": 0.5, "b": 0.5}))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    main(["summary", str(file)])
    assert written.getvalue().endswith(b"trainable: 2 of 2 parameters (100.00%)\n")


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_full_disk_is_told_in_one_line(form, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", _FullDisk())
    assert "No space left on device" in error(capsys, "summary", checkpoint, *form)


def test_a_tree_of_many_levels_is_shown(tmp_path, capsys):
    tree: Any = 0.5
    for _ in range(500):
        tree = {"a": tree}
    file = tmp_path / "deep"
    file.write_bytes(msgpack.packb(tree))
    printed = json.loads(output(capsys, str(file), "--json", "--frozen", "a/**/a"))
    assert printed["rows"][-1]["path"] == "/".join("a" * 500)
    assert (printed["total"], printed["frozen"]) == (1, 1)
