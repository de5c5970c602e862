"""A run that is killed again and again, at any moment, ends bitwise where one that is not ends."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support import killed_worker
from tests.support.killed_runs import COURSES

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 500
KILLS = {"phases": 50, "by hand": 25, "orbax": 16, "scheduled": 15}


def run(course: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Each life that was killed: where that was, what it had resumed from, and what it left."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Programs that are small and run once do not repay the compiler's work on them.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("XLA_FLAGS", None)
    log = folder / "log"
    command = [sys.executable, killed_worker.__file__, course, str(KILLS[course]), str(folder)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        # The life that hangs, too.
        os.killpg(process.pid, signal.SIGKILL)
        code = f"{process.wait()}, as it was too slow"
    assert code == 0, f"{course} ended with {code}\n{log.read_text()}"
    return json.loads((folder / "lives.json").read_text())


def end(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Every bit that one of the runs ended with, by path, and its plan."""
    return json.loads((folder / f"{name}.json").read_text())


def check_that_kills_hit(course: str, lives: list[dict[str, Any]]) -> None:
    """That the runs were cut in all their parts, and had much to lose."""
    cut = [life for life in lives if life["was_cut"]]
    assert len(cut) >= 0.8 * KILLS[course]
    places = {"start", "stepping", "writing"}
    if COURSES[course].is_edited:
        places |= {"editing"}
    assert {life["aim"][0] for life in cut} >= places
    assert any(life["left_half"] for life in cut), "no checkpoint was cut in the middle"
    steps = [life["resumed"]["step"] for life in lives if life["resumed"]]
    assert steps == sorted(steps)
    assert len(set(steps)) >= len(lives) / 3
    assert len(steps) < len(lives), "no life ended before the first checkpoint"
    assert max(life["resumed"]["cohorts"] for life in lives if life["resumed"]) >= 3
    if COURSES[course].is_edited:
        assert max(life["resumed"]["parked"] for life in lives if life["resumed"]) >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("course", KILLS)
def test_a_run_that_is_killed_again_and_again_ends_bitwise_where_an_uninterrupted_one_ends(
    course, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("killed")
    lives = run(course, folder)
    check_that_kills_hit(course, lives)
    whole = end(folder, "whole")
    assert len(whole["bits"]) > 10
    for name in ("killed", "started again"):
        other = end(folder, name)
        assert other["plan"] == whole["plan"]
        assert list(other["bits"]) == list(whole["bits"])
        odd = [path for path, leaf in whole["bits"].items() if other["bits"][path] != leaf]
        assert not odd, f"{name!r} ended otherwise at {odd}"
