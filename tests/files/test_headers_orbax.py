"""What is in a checkpoint of Orbax, whole and broken."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from freeze_optax._files.checkpoint_headers import read_headers
from tests.support.checkpoints import F4, FEW, W, flips, odd_versions

# Orbax warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TREE = {
    "a.b": {"w": jnp.ones((2, 3)), "h": jnp.ones(4, jnp.bfloat16)},
    "list": [jnp.ones(2, jnp.int32), jnp.ones(3, jnp.float8_e4m3fn)],
    "n": np.float64(2.5),
    "i": np.ones(2, np.int64),
    "u": jnp.ones(2, jnp.uint32),
    "bool": jnp.ones(2, bool),
    "c": jnp.ones(2, jnp.complex64),
    "s": jnp.ones(()),
    "e": {},
}
TREE_READ = {
    "a/b/w": W,
    "a/b/h": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
    "list/0": jax.ShapeDtypeStruct((2,), jnp.int32),
    "list/1": jax.ShapeDtypeStruct((3,), jnp.float8_e4m3fn),
    "n": jax.ShapeDtypeStruct((), jnp.float64),
    "i": jax.ShapeDtypeStruct((2,), jnp.int64),
    "u": jax.ShapeDtypeStruct((2,), jnp.uint32),
    "bool": jax.ShapeDtypeStruct((2,), bool),
    "c": jax.ShapeDtypeStruct((2,), jnp.complex64),
    "s": jax.ShapeDtypeStruct((), F4),
}


def _standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def _without_ocdbt(folder, tree):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(folder, tree)
    return folder


@pytest.mark.parametrize("save", [_standard, _without_ocdbt])
def test_orbax_of_every_dtype_and_shape_areread(save, tmp_path):
    assert read_headers(save(tmp_path / "saved", TREE)) == TREE_READ


@pytest.mark.parametrize("save", [_standard, _without_ocdbt])
def test_python_numbers_of_orbax_are_scalars(save, tmp_path):
    headers = read_headers(save(tmp_path / "saved", {"f": 1.5, "i": 3, "w": jnp.ones((2, 3))}))
    assert headers.pop("w") == W
    assert {path: (x.shape, x.dtype.kind) for path, x in headers.items()} == {
        "f": ((), "f"),
        "i": ((), "i"),
    }


def test_text_and_none_of_orbax_are_no_parameters(tmp_path):
    tree = {"name": "bert", "none": None, "w": jnp.ones((2, 3))}
    assert read_headers(_without_ocdbt(tmp_path / "saved", tree)) == {"w": W}


def test_the_steps_of_a_checkpoint_manager_areread(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=ocp.args.StandardSave(TREE))
        manager.save(7, args=ocp.args.StandardSave(TREE))
    assert read_headers(tmp_path / "run" / "0") == TREE_READ
    assert read_headers(tmp_path / "run" / "7" / "default") == TREE_READ
    with pytest.raises(ValueError, match="in the folder of a CheckpointManager, name one step"):
        read_headers(tmp_path / "run")


@pytest.mark.parametrize("save", [_standard, _without_ocdbt])
def test_a_folder_may_be_named_from_where_one_is(save, tmp_path, monkeypatch):
    save(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    for start, names in (
        (tmp_path, ["saved", "./saved/"]),
        (tmp_path / "saved", [".", "../saved"]),
    ):
        monkeypatch.chdir(start)
        for name in names:
            assert read_headers(Path(name)) == {"w": W}


@pytest.mark.parametrize(
    ("save", "name"), [(_standard, "manifest.ocdbt"), (_without_ocdbt, "w/.zarray")]
)
def test_a_pipe_among_the_files_of_orbax_is_not_waited_for(save, name, tmp_path):
    folder = save(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(
        ValueError, match=rf"{name} is not a plain file; copy its contents into one"
    ):
        read_headers(folder)


def test_of_a_step_with_two_items_one_is_to_be_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {
            "params": ocp.args.StandardSave(TREE),
            "optimizer": ocp.args.PyTreeSave({"count": jnp.ones(2)}),
            "about": ocp.args.JsonSave({"a": 1}),
        }
        manager.save(3, args=ocp.args.Composite(**items))
    step = tmp_path / "run" / "3"
    with pytest.raises(
        ValueError, match=r"holds several items, name one: '.*optimizer', '.*params'"
    ):
        read_headers(step)
    assert read_headers(step / "params") == TREE_READ
    assert read_headers(step / "optimizer") == {"count": jax.ShapeDtypeStruct((2,), F4)}


def test_the_metadata_of_orbax_cut_at_any_byte_are_an_error(tmp_path):
    file = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))}) / "_METADATA"
    data = file.read_bytes()
    assert read_headers(file.parent) == {"w": W}
    assert odd_versions(file, (data[:size] for size in range(0, len(data), 7))) == []
    for size in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"\w"):
            read_headers(file.parent)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "3", '{"tree_metadata": 3}', '{"tree_metadata": {"a": {}}}']
)
def test_metadata_of_orbax_that_tell_nothing_are_an_error(text, tmp_path):
    file = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))}) / "_METADATA"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        read_headers(file.parent)


def test_a_flipped_bit_in_the_files_of_orbax_is_an_error_or_another_file(tmp_path):
    folder = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    for file in (folder / "_METADATA", folder / "w" / ".zarray"):
        data = file.read_bytes()
        assert odd_versions(file, flips(data, range(0, 8 * len(data), 61))) == []


def test_an_array_of_orbax_that_is_missing_is_an_error(tmp_path):
    folder = _without_ocdbt(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    (folder / "w" / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"w/\.zarray"):
        read_headers(folder)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(FEW, file)
    folder = _standard(tmp_path / "saved", {"w": jnp.ones((2, 3))})
    install = r"install it with: pip install 'freeze_optax\[cli\]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        for checkpoint in (file, tmp_path):
            with pytest.raises(ImportError, match=f"read with safetensors; {install}"):
                read_headers(checkpoint)
    monkeypatch.setitem(sys.modules, "orbax", None)
    with pytest.raises(ImportError, match=f"read with orbax-checkpoint; {install}"):
        read_headers(folder)
