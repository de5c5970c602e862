"""Runs mutants one after another in a process that has all tests collected; see `__main__.py`."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import jax
import pytest

from tests.mutation.swap import CannotSwapError, Package

PACKAGE = "freeze_optax"
AGAIN = 75
"""The exit status that asks for a fresh process, as a mutant has left something behind."""
WARM_S, ALL_S, WALL_S = 8.0, 120.0, 30
"""How long tests of a mutant took unchanged, before jax forgets what it compiled, and all of them;
and how long they may take."""


class _TooLongError(BaseException):
    """Raised in whatever runs when a mutant has taken its time: some loop for ever."""


class Tests:
    """Which tests to run for a mutant."""

    def __init__(self, build: Path):
        suite = json.loads((build / "suite.json").read_text())
        self._names, self._lines, self._seconds = suite["tests"], suite["lines"], suite["seconds"]
        self._killers: dict[str, set[str]] = collections.defaultdict(set)

    def seconds(self, name: str) -> float:
        """How long a test takes of the unchanged package."""
        return self._seconds.get(name, 0.0)

    def note(self, mutant: dict[str, Any], killer: str) -> None:
        """Remembers what has killed a mutant of a file, to be tried first for the next."""
        self._killers[mutant["file"]].add(killer)

    def of(self, mutant: dict[str, Any]) -> list[str]:
        """The tests that run its lines: first those that killed others, or are of its file.

        Of a line that only an import runs they are those of the lines around it, or that use what
        it names.
        """
        lines = self._lines.get(mutant["file"], {})
        names: set[str] = set()
        for block in mutant["near"]:
            names = names or {self._names[i] for line in block for i in lines.get(str(line), ())}
        room, _, file = mutant["file"].rpartition("/")
        own = f"tests/{room.lstrip('_')}/test_{file.removesuffix('.py')}".replace("//", "/")
        names = names or {name for name in self._seconds if name.startswith(own)}
        killers = names & self._killers[mutant["file"]]
        near = {name for name in names if name.startswith(own)} - killers
        first = [*self._some(killers, ALL_S / 5), *self._some(near, ALL_S / 5)]
        return [*first, *self._some(names.difference(first), ALL_S)]

    def _some(self, names: set[str], seconds: float) -> list[str]:
        """As many as there is time for: one case of each test, then the next of each."""
        cases: dict[str, int] = collections.Counter()
        order: list[tuple[int, float, str]] = []
        for name in sorted(names, key=self.seconds):
            function = name.partition("[")[0]
            order.append((cases[function], self.seconds(name), name))
            cases[function] += 1
        order.sort()
        ends = itertools.accumulate(took for _, took, _ in order)
        return [name for (_, _, name), end in zip(order, ends, strict=True) if end < seconds]


class Worker:
    """A plugin of pytest that in place of the tests runs mutants."""

    def __init__(self, build: Path, worker: int, workers: int, count: int):
        self._tests = Tests(build)
        self._drawn = json.loads((build / "mutants.json").read_text())[:count]
        self._numbers = range(worker, len(self._drawn), workers)
        self._results = build / f"results-{worker}.jsonl"
        self._started = build / f"started-{worker}"
        self.status = 0

    def pytest_sessionstart(self) -> None:
        # Where a test fails, the smallest example of it is of no interest.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        suite = hypothesis.settings.get_profile("suite")
        hypothesis.settings.register_profile("mutants", suite, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # Not those that count what is alive: here there is more each time.
        left_out = ("slow", "exhaustive")
        items = [x for x in session.items if not any(map(x.get_closest_marker, left_out))]
        self._items = {item.nodeid: item for item in items}
        # What runs next decides what is torn down: here all but what is made once for a session.
        self._first, self._last = items[0], items[-1]
        self._package = Package(PACKAGE, Path(PACKAGE).resolve())
        self._is_fresh = True
        done = {json.loads(line)["n"] for line in self._results.open()}
        for number in self._numbers:
            if number not in done and not self._is_noted(number):
                self.status = AGAIN
                break
        return True

    def _is_noted(self, number: int) -> bool:
        """Runs a mutant and notes what became of it; False where that can't be told."""
        mutant = self._drawn[number]
        self._started.write_text(str(number))
        begin = time.monotonic()
        names = [name for name in self._tests.of(mutant) if name in self._items]
        outcome, killer = self._outcome(mutant, names) if names else ("uncovered", "")
        was_fresh, self._is_fresh = self._is_fresh, False
        is_clean = True
        if killer in self._items:
            self._tests.note(mutant, killer)
            is_clean = not self._fails(killer)
        if not is_clean:
            print(f"{killer} fails after mutant {number}", file=sys.__stderr__, flush=True)
        if is_clean or was_fresh:
            took = round(time.monotonic() - begin, 2)
            result = {"n": number, "outcome": outcome, "by": killer, "seconds": took}
            with self._results.open("a") as file:
                print(json.dumps(result), file=file)
        return is_clean

    def _outcome(self, mutant: dict[str, Any], names: list[str]) -> tuple[str, str]:
        file = Path(PACKAGE, mutant["file"])
        source = file.read_text()
        try:
            file.write_text(mutant["text"])  # for the processes that tests start
            with self._package.mutated(mutant["file"], source, mutant["text"]):
                return self._warm(names)
        except CannotSwapError:
            return _cold(names)
        finally:
            file.write_text(source)

    def _warm(self, names: list[str]) -> tuple[str, str]:
        end, spent = time.monotonic() + WALL_S, 0.0
        for name in names:
            if spent < WARM_S <= spent + self._tests.seconds(name):
                jax.clear_caches()  # it knows functions by what they are, not by their code
            spent += self._tests.seconds(name)
            if self._fails(name):
                return "killed", name
            if time.monotonic() > end:
                break
        return "survived", ""

    def _fails(self, name: str) -> bool:
        """Whether a test fails, by taking too long too."""

        def stop(signal: int, frame: FrameType | None) -> None:
            raise _TooLongError

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(10 + int(5 * self._tests.seconds(name)))
        item, self._has_failed = self._items[name], False
        try:
            following = self._last if item.path == self._first.path else self._first
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except _TooLongError:
            return True
        finally:
            signal.alarm(0)
        return self._has_failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._has_failed = self._has_failed or report.failed


def _cold(names: list[str]) -> tuple[str, str]:
    """What becomes of a mutant in a process of its own, as the file stands."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *options, *names[:200]]
    try:
        done = subprocess.run(command, capture_output=True, timeout=3 * WALL_S, check=False)
    except subprocess.TimeoutExpired:
        return "killed", "(too long in its own process)"
    return ("killed", "(in its own process)") if done.returncode else ("survived", "")


def main() -> None:
    build, *numbers = sys.argv[1:]
    worker = Worker(Path(build), *map(int, numbers))
    # Hypothesis was imported before pytest could rewrite it.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(options, plugins=[worker])
    os._exit(worker.status or int(status))  # threads of what was killed may still wait


if __name__ == "__main__":
    main()
