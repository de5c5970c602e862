"""The wheel as users get it, with one extra or none: what the extra brings, what its absence says.

`make wheel` runs this, and two cases of each test file whose imports are at hand, away from the
checkout: a file or a dependency that is missing shows where it is imported.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

import freeze_optax as fo

TESTS = Path(__file__).parents[1]
# In the order in which `make wheel` installs them into one venv.
BRINGS = {"plot": ["matplotlib"], "cli": ["safetensors", "orbax.checkpoint"], "flax": ["flax"]}
EXTRA = os.environ.get("FREEZE_OPTAX_EXTRA", "")
PARAMS = {"encoder": np.ones((3, 4), np.float32), "head": np.ones((4, 1), np.float32)}
LAST_LINE = "trainable: 4 of 16 parameters (25.00%)"


def has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    # A module below another imports that one, which says with an ImportError what it lacks.
    except ImportError:
        return False


def imported(file: Path) -> set[str]:
    """The packages that a test file imports, by itself or through a helper beside it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names |= {node.module for node in froms}
    members = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    names |= {name for name in members if _helper(name).is_file()}
    helpers = set(map(_helper, names))
    return names.union(*(imported(helper) for helper in helpers if helper.is_file()))


def _helper(module: str) -> Path:
    return TESTS.parent / f"{module.replace('.', '/')}.py"


def fitting() -> list[str]:
    """The test files that can run here; with an extra, those that could not without it."""
    # Those of the pages are about the checkout.
    found = (file for file in sorted(TESTS.rglob("test_*.py")) if file.parent.name != "docs")
    files = {file: imported(file) for file in found}
    return [
        str(file)
        for file, names in files.items()
        if all(map(has, names)) and (not EXTRA or any(map(_is_of_extra, names)))
    ]


def _is_of_extra(name: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in BRINGS[EXTRA])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).parent / "freeze-optax"
    return subprocess.run([str(script), *arguments], text=True, capture_output=True, check=False)


def test_the_package_is_the_one_that_was_built():
    folder = Path(fo.__file__).parent
    assert folder.parent.name == "site-packages"
    assert (folder / "py.typed").is_file()
    assert importlib.metadata.version("freeze_optax") == fo.__version__
    files = importlib.metadata.files("freeze_optax")
    top = {file.parts[0] for file in files if ".." not in file.parts}
    assert top == {"freeze_optax", f"freeze_optax-{fo.__version__}.dist-info"}


def test_an_extra_brings_its_packages_and_none_of_a_later_one():
    extras = ["", *BRINGS]
    installed = extras[: extras.index(EXTRA) + 1]
    here = {extra: [name for name in names if has(name)] for extra, names in BRINGS.items()}
    assert here == {extra: names if extra in installed else [] for extra, names in BRINGS.items()}


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_the_modules_for_flax_name_their_extra(module):
    if has("flax"):
        assert importlib.import_module(f"freeze_optax.{module}").modules
    else:
        with pytest.raises(ImportError, match=r"pip install 'freeze_optax\[flax\]'"):
            importlib.import_module(f"freeze_optax.{module}")


def test_plot_draws_or_names_its_extra():
    summary = fo.summary(PARAMS, "encoder", optimizer=optax.adam(1e-3))
    assert str(summary).splitlines()[-1] == LAST_LINE
    if has("matplotlib"):
        assert summary.plot().get_figure() is not None
    else:
        with pytest.raises(ImportError, match=r"pip install 'freeze_optax\[plot\]'"):
            summary.plot()


def test_the_command_reads_npz_in_any_case(tmp_path):
    np.savez(tmp_path / "params.npz", **PARAMS)
    done = command("summary", str(tmp_path / "params.npz"), "--frozen", "encoder")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == LAST_LINE


def test_the_command_reads_safetensors_or_names_its_extra(tmp_path):
    file = tmp_path / "params.safetensors"
    if has("safetensors"):
        importlib.import_module("safetensors.numpy").save_file(PARAMS, file)
        done = command("summary", str(file), "--frozen", "encoder")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == LAST_LINE
    else:
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        done = command("summary", str(file))
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r".*pip install 'freeze_optax\[cli\]'\n", done.stderr)


@pytest.mark.skipif(EXTRA != "cli", reason="only the extra cli promises to read Orbax")
def test_the_command_reads_orbax(tmp_path):
    ocp = importlib.import_module("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", PARAMS)
    done = command("summary", str(tmp_path / "saved"), "--frozen", "encoder")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == LAST_LINE


if __name__ == "__main__":
    options = ["-p", "no:cacheprovider"]
    status = pytest.main([*options, __file__])
    options += ["-n", "2", "--dist", "worksteal", "-p", "tests.support.few_cases"]
    options += ["-m", "not slow and not exhaustive"]
    os.environ |= {"FREEZE_OPTAX_CASES": "2", "FREEZE_OPTAX_CASES_OF": "file"}
    # With this file again, as an extra may bring no further test.
    sys.exit(status or pytest.main([*options, __file__, *fitting()]))
