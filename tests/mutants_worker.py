"""Runs mutants in forks of a process that has imported all but the package; see `mutants.py`."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Imported here so that no fork has to. None of them starts a backend, which would have threads.
import equinox  # noqa: F401
import flax.linen
import flax.nnx  # noqa: F401
import haiku  # noqa: F401
import hypothesis.strategies  # noqa: F401
import jax.numpy  # noqa: F401
import matplotlib  # noqa: F401
import optax.contrib  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
import rich.table  # noqa: F401
import safetensors.numpy  # noqa: F401
import xdist  # noqa: F401

PACKAGE = "freeze_optax"
QUICK_S, ALL_S, GRACE_S = 8.0, 60.0, 120.0
"""How long the tests of a mutant may have taken unchanged: the first round of them, and all."""


class Tests:
    """Which tests to run for a mutant."""

    def __init__(self, build: Path):
        suite = json.loads((build / "suite.json").read_text())
        self._lines, self._seconds = suite["lines"], suite["seconds"]

    def of(self, mutant: dict[str, Any]) -> list[str]:
        """The tests that run its lines, the shortest first, or those of its file if none does."""
        lines = self._lines.get(mutant["file"], {})
        first, last = mutant["lines"]
        names = {name for line in range(first, last + 1) for name in lines.get(str(line), ())}
        if not names:  # What runs at import is run by no test.
            stem = mutant["file"].removesuffix(".py").lstrip("_")
            names = {name for name in self._seconds if name.startswith(f"tests/test_{stem}")}
        return sorted(names, key=lambda name: self._seconds.get(name, 0.0))

    def within(self, names: list[str], seconds: float, files: int) -> list[str]:
        """As many of the first as there is time for; to collect a file takes time as well."""
        chosen: list[str] = []
        seen: set[str] = set()
        for name in names:
            seconds -= self._seconds.get(name, 0.0)
            file = name.partition("::")[0]
            if seconds < 0 and chosen:
                break
            if file in seen or len(seen) < files:
                seen.add(file)
                chosen.append(name)
        return chosen


class _Chosen:
    """A plugin of pytest that runs some tests in a given order, and tells of the first to fail."""

    def __init__(self, names: list[str], pipe: int):
        self._order, self._pipe = {name: i for i, name in enumerate(names)}, pipe

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._pipe, report.nodeid.encode()[:4096])


def _run_forked(names: list[str], seconds: float) -> tuple[str, str]:
    """What became of the tests in a fork: `killed`, `survived` or `timeout`; and which failed."""
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    # They were imported before pytest could rewrite them.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            code = int(pytest.main([*options, *files], plugins=[_Chosen(names, writing)]))
        finally:
            os._exit(code)
    os.close(writing)
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.02)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome = "timeout"
    else:
        outcome = "killed" if status else "survived"
    with os.fdopen(reading, errors="replace") as pipe:
        return outcome, pipe.read() if status else ""


def work(build: Path, worker: int, workers: int, count: int) -> None:
    """Runs each of the mutants that is this worker's, and notes what became of it."""
    tests = Tests(build)
    drawn = json.loads((build / "mutants.json").read_text())[:count]
    with (build / f"results-{worker}.jsonl").open("a") as results:
        for number in range(worker, len(drawn), workers):
            mutant = drawn[number]
            file = Path(PACKAGE, mutant["file"])
            source = file.read_text()
            names = tests.of(mutant)
            quick = tests.within(names, QUICK_S, files=4)
            outcome, failed = "uncovered", ""
            try:
                file.write_text(mutant["text"])
                if names:
                    outcome, failed = _run_forked(quick, GRACE_S)
                others = [name for name in names if name not in set(quick)]
                if outcome == "survived" and others:
                    rest = tests.within(others, ALL_S, files=len(others))
                    outcome, failed = _run_forked(rest, ALL_S + GRACE_S)
            finally:
                file.write_text(source)
            print(
                json.dumps({"n": number, "outcome": outcome, "by": failed}),
                file=results,
                flush=True,
            )


if __name__ == "__main__":
    build, *numbers = sys.argv[1:]
    work(Path(build), *map(int, numbers))
