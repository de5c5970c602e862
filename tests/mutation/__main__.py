"""Which changes to the package no test of `make test` notices: `make mutants`.

cosmic-ray makes the mutants, and each call whose result nobody takes is left out. Those tests run
that run the mutated line, as coverage tells them, in processes that have all tests collected, so
that most mutants take less than a second. They are taken in an order drawn once: the first hundreds
are a fair sample.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from tests.mutation.worker import AGAIN, PACKAGE

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "mutants"
HANGING_S = 150
"""After how long a mutant is killed with its process, where that can't be interrupted."""
OPERATORS = [
    *("AddNot", "ReplaceUnaryOperator_Delete_Not", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceOrWithAnd", "ReplaceAndWithOr", "ZeroIterationForLoop", "RemoveDecorator"),
    *("ExceptionReplacer", "ReplaceContinueWithBreak", "ReplaceBreakWithContinue"),
    *("ReplaceComparisonOperator_" + x for x in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *("ReplaceComparisonOperator_" + x for x in ("Gt_GtE", "Lt_LtE", "LtE_Lt", "GtE_Gt")),
    *("ReplaceBinaryOperator_" + x for x in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul")),
    *("ReplaceBinaryOperator_" + x for x in ("BitOr_BitAnd", "BitAnd_BitOr", "Pow_Mul")),
    *("ReplaceBinaryOperator_" + x for x in ("FloorDiv_Mul", "Mod_Mul", "LShift_RShift")),
    *("ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Invert", "NumberReplacer"),
]


def mutants(only: str) -> list[dict[str, Any]]:
    """The mutants of the files whose name has `only` in it, in their drawn order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    files = {path.relative_to(ROOT / PACKAGE).as_posix(): path for path in _sources()}
    for file, path in sorted((file, path) for file, path in files.items() if only in file):
        source = path.read_text()
        tree = ast.parse(source)
        for name, (first, last), text in [*_operated(path, tree), *_without_calls(source, tree)]:
            near = [list(range(first, last + 1)), *_around(tree, first)]
            mutant = {"file": file, "operator": name, "near": near, "text": text}
            found.setdefault((file, text), mutant)
    drawn = list(found.values())
    random.Random(0).shuffle(drawn)
    return drawn


def _sources() -> Iterator[Path]:
    return (ROOT / PACKAGE).rglob("*.py")


def _operated(path: Path, tree: ast.Module) -> Iterator[tuple[str, tuple[int, int], str]]:
    """What each operator makes of a file: its name, the lines that it changes, the text."""
    source = path.read_text()
    skipped, nodes = list(_without_effect(tree)), list(ast_nodes(get_ast_from_path(path)))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if any(first <= start < last for first, last in skipped):
                continue
            text = mutate_code(source, operator, occurrence)
            if text and _parses(text) and text != source:
                yield name, (start[0], end[0]), text


def _without_calls(source: str, tree: ast.Module) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The file without one of the calls that are made for what they do, checks above all."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            first, last = node.lineno, _last(node)
            text = [*lines[: first - 1], " " * node.col_offset, "pass\n", *lines[last:]]
            yield "DropCall", (first, last), "".join(text)


def _around(tree: ast.Module, line: int) -> Iterator[list[int]]:
    """The lines of the statements around one, the innermost first; last, those that use its name.

    Of functions the body alone, as the rest runs at import.
    """
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and _first(node) <= line <= _last(node)
    ]
    for node in reversed(around):
        first = node.body[0] if isinstance(node, ast.FunctionDef) else node
        yield list(range(first.lineno, _last(node) + 1))
    targets = getattr(around[0], "targets", [getattr(around[0], "target", None)]) if around else []
    nodes = [node for target in targets if target for node in ast.walk(target)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    yield [x.lineno for x in ast.walk(tree) if isinstance(x, ast.Name) and x.id in names]


def _first(node: ast.stmt) -> int:
    return min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))


def _last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _without_effect(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change is none: for type checkers, or `strict` of a zip of what is of one length."""
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            parts.append(node.value)
        parts += [
            x
            for x in getattr(node, "decorator_list", ())
            if isinstance(x, ast.Name) and x.id == "final"
        ]
        for part in filter(None, parts):
            at = max(part.col_offset - 1, 0)  # the @ of a decorator
            yield (part.lineno, at), (part.end_lineno, part.end_col_offset)


def _parses(text: str) -> bool:
    with contextlib.suppress(SyntaxError):
        return bool(ast.parse(text))
    return False


def run_suite() -> None:
    """Runs all tests once, and notes which of them run each line and how long they take."""
    log = BUILD / "suite.log"
    settings = BUILD / "settings.ini"  # coverage erases what begins like its data
    settings.write_text(f"[run]\nsource = {PACKAGE}\ndata_file = {BUILD / 'coverage'}\n")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-vv", "--cov"]
    command += ["-m", "not slow and not exhaustive"]
    options = [f"--cov-config={settings}", "--cov-context=test", "--cov-report=", "--durations=0"]
    with log.open("w") as file:
        subprocess.run([*command, *options], cwd=ROOT, stdout=file, check=True)
    data = coverage.CoverageData(str(BUILD / "coverage"))
    data.read()
    tests: dict[str, int] = {}  # by number, as each runs thousands of lines
    lines: dict[str, dict[int, list[int]]] = {}
    for file in data.measured_files():
        contexts = data.contexts_by_lineno(file).items()
        lines[Path(file).relative_to(ROOT / PACKAGE).as_posix()] = {
            line: sorted({tests.setdefault(x.rsplit("|", 1)[0], len(tests)) for x in names if x})
            for line, names in contexts
        }
    seconds: dict[str, float] = collections.defaultdict(float)
    for found in re.finditer(r"^([\d.]+)s (?:call|setup) +(\S.*)$", log.read_text(), re.MULTILINE):
        seconds[found[2]] += float(found[1])
    suite = {"tests": list(tests), "lines": lines, "seconds": seconds}
    (BUILD / "suite.json").write_text(json.dumps(suite))


def report(count: int) -> None:
    """Prints the score, and the change of each mutant that survived."""
    drawn = json.loads((BUILD / "mutants.json").read_text())[:count]
    lines = [line for file in BUILD.glob("results-*.jsonl") for line in file.open()]
    results = [json.loads(line) for line in lines]
    outcomes = collections.Counter(result["outcome"] for result in results)
    for result in sorted(results, key=lambda result: drawn[result["n"]]["file"]):
        if result["outcome"] in ("survived", "uncovered"):
            mutant = drawn[result["n"]]
            before = (ROOT / PACKAGE / mutant["file"]).read_text().splitlines()
            change = difflib.unified_diff(before, mutant["text"].splitlines(), lineterm="", n=0)
            print(f"{mutant['file']}:{mutant['near'][0][0]}  {result['outcome']}")
            print(*(f"    {line}" for line in list(change)[3:]), sep="\n")
    done = outcomes["killed"]
    print(f"{done} of {len(results)} mutants killed ({100 * done / max(len(results), 1):.1f} %)")
    print(f"{dict(outcomes)}, of {len(drawn)} drawn")


def prepare(only: str) -> None:
    """Draws the mutants, and runs the suite unchanged if that was not done.

    Results of the same mutants are kept: a run that was stopped goes on.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    drawn, file = json.dumps(mutants(only)), BUILD / "mutants.json"
    if not file.exists() or file.read_text() != drawn:
        file.write_text(drawn)
        for results in BUILD.glob("results-*.jsonl"):
            results.unlink()
    if not (BUILD / "suite.json").exists():
        run_suite()


def run(workers: int, count: int) -> None:
    """Runs the mutants in copies of the checkout, one for each worker."""
    running = {worker: _started(worker, workers, count) for worker in range(workers)}
    while running:
        time.sleep(0.1)
        for worker, process in list(running.items()):
            started = BUILD / f"started-{worker}"
            if process.poll() is None:
                if time.time() - started.stat().st_mtime < HANGING_S:
                    continue
                os.killpg(process.pid, signal.SIGKILL)
                with (BUILD / f"results-{worker}.jsonl").open("a") as file:
                    killed = {"n": int(started.read_text()), "outcome": "killed", "by": "(hangs)"}
                    print(json.dumps(killed), file=file)
            if process.wait() in (AGAIN, -signal.SIGKILL):
                running[worker] = _started(worker, workers, count)
            else:
                del running[worker]


def _started(worker: int, workers: int, count: int) -> subprocess.Popen[bytes]:
    copy = BUILD / f"copy-{worker}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
    # Bytecode goes by time and size: a mutant made in the same second can be taken for another.
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["JAX_PLATFORMS"] = "cpu"  # as the tests have it, who say so too late here
    (BUILD / f"results-{worker}.jsonl").touch()
    (BUILD / f"started-{worker}").touch()
    share = [str(BUILD), str(worker), str(workers), str(count)]
    command = [sys.executable, "-m", "tests.mutation.worker", *share]
    with (BUILD / f"worker-{worker}.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the files to change")
    parser.add_argument("--count", type=int, default=10**6, help="how many mutants to run")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    prepare(given.only)
    run(given.workers, given.count)
    report(given.count)


if __name__ == "__main__":
    main()
