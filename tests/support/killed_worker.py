"""The runs of tests/support/killed_runs.py in forks that are killed at a place they told of.

python killed_worker.py COURSE KILLS DIRECTORY
"""

import functools
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.support.killed_runs import COURSES, plan_of


def live(course: str, folder: pathlib.Path, tell: Callable[[str], None]) -> None:
    """One life of a run: from its last checkpoint to its end."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="orbax|flax")
    life = COURSES[course](folder, tell).train()
    plan = plan_of(life.state)
    table = plan.part_table
    parts = table and [(leaf, rows and rows.mask.tolist()) for leaf, rows in table.parts]
    pairs = jax.tree.leaves_with_path((life.params, life.state))
    bits = {
        jax.tree_util.keystr(path): [str(x.dtype), x.shape, np.asarray(x).tobytes().hex()]
        for path, x in pairs
    }
    own = [life.step, plan.paths, plan.frozen, plan.cohorts, plan.schedule, parts]
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"plan": own, "bits": bits}))
    tell("finished")


class Child:
    """A life in a process of its own, which at each place that it tells of waits until it may go.

    So that what a kill hits does not hang on how busy the machine is.
    """

    def __init__(self, course: str, folder: pathlib.Path):
        # Before any backend of JAX starts here: its threads do not live through a fork.
        self.told, tell = os.pipe()
        wait, self.may_go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.told)
            os.close(self.may_go)
            code = 1
            try:
                live(course, folder, functools.partial(self.stand, tell, wait))
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(tell)
        os.close(wait)
        self.text = b""

    @staticmethod
    def stand(tell: int, wait: int, place: str) -> None:
        """In the child: tells where it is, and waits."""
        os.write(tell, f"{place}\n".encode())
        os.read(wait, 1)

    def hear(self) -> bool:
        """Waits for the next place, where the child stands then; False when there will be none."""
        heard = os.read(self.told, 4096)
        self.text += heard
        return bool(heard)

    def go(self) -> None:
        os.write(self.may_go, b".")

    def places(self) -> list[str]:
        return self.text.decode().splitlines()

    def end(self) -> int:
        """What the process ended with, once all is heard that it told."""
        while self.hear():
            pass
        os.close(self.told)
        os.close(self.may_go)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


# The place, how often it is passed, and the seconds after it at most; with none it is killed there.
FIRST = [("start", 1, 0.1), ("stepping", 1, 0.05), ("writing", 1, 0.0), ("stepping", 2, 0.0)]
ANY = [
    *[("start", 1, 0.2)],
    *[("writing", n, delay) for n in (2, 3) for delay in (0.0, 0.001, 0.003)],
    *[("written", n, delay) for n in (2, 3) for delay in (0.0, 0.001)],
    *[("stepping", n, delay) for n in (5, 7) for delay in (0.001, 0.002)],
    *[("editing", n, delay) for n in (1, 2) for delay in (0.0, 0.005, 0.01)],
]


def killed(course: str, folder: pathlib.Path, aim: tuple[str, int, float]) -> dict[str, Any]:
    """One life that is killed between a place and the next; whether it was, and what it left."""
    place, times, delay = aim
    child = Child(course, folder)
    while (is_there := child.hear()) and child.places().count(place) < times:
        child.go()
    if is_there and delay:
        child.go()
        time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    code, places = child.end(), child.places()
    if code == 1:
        raise RuntimeError(f"a life of {course!r} failed by itself, after {places[-5:]}")
    resumed = [json.loads(place[8:]) for place in places if place.startswith("resumed ")]
    return {
        "aim": aim,
        "was_cut": code == -signal.SIGKILL and places[-1:] != ["finished"],
        "resumed": resumed[0] if resumed else None,
        "left_half": any("tmp" in path.name for path in folder.iterdir()),
    }


def whole(course: str, folder: pathlib.Path) -> None:
    """One life that nobody kills."""
    child = Child(course, folder)
    while child.hear():
        child.go()
    code = child.end()
    if code:
        raise RuntimeError(f"a life of {course!r} ended with {code}")


def main(course: str, kills: int, folder: pathlib.Path) -> None:
    # So that a life does not begin by compiling: all that it runs, the whole run has run.
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    whole(course, folder / "whole")
    # And once what a restart runs.
    (folder / "whole").rename(folder / "started again")
    whole(course, folder / "started again")
    # Nor by writing there: what a kill cuts would be read by the next life.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    numbers = random.Random(course)
    possible = [aim for aim in ANY if COURSES[course].is_edited or aim[0] != "editing"]
    aims = [*FIRST, *numbers.choices(possible, k=kills - len(FIRST) - 1), ("finished", 1, 0.0)]
    lives = []
    for place, times, most in aims:
        lives.append(killed(course, folder / "killed", (place, times, numbers.uniform(0, most))))
    whole(course, folder / "killed")
    (folder / "lives.json").write_text(json.dumps(lives))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
