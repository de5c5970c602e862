"""Which changes to the package no test notices: `make mutants`.

cosmic-ray makes the mutants. Of the tests that run a mutated line, as coverage tells them, the
shortest run first, in a fork of a process that has imported all but the package: seconds for each
mutant. Mutants are taken in an order drawn once, so the first hundreds are a fair sample.
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
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "mutants"
PACKAGE = "freeze_optax"
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
    for path in sorted((ROOT / PACKAGE).glob(f"*{only}*.py")):
        source = path.read_text()
        skipped = list(_without_effect(source))
        for name in OPERATORS:
            operator = get_operator(f"core/{name}")()
            nodes = ast_nodes(get_ast_from_path(path))
            places = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, (start, end) in enumerate(places):
                if any(first <= start < last for first, last in skipped):
                    continue
                text = mutate_code(source, operator, occurrence)
                if text and _parses(text) and text != source:
                    mutant = {"file": path.name, "operator": name, "lines": (start[0], end[0])}
                    found.setdefault((path.name, text), {**mutant, "text": text})
    drawn = list(found.values())
    random.Random(0).shuffle(drawn)
    return drawn


def _without_effect(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change is none: annotations, and `strict` of a zip of what is of one length."""
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            parts.append(node.value)
        for part in filter(None, parts):
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


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
    options = [f"--cov-config={settings}", "--cov-context=test", "--cov-report=", "--durations=0"]
    with log.open("w") as file:
        subprocess.run([*command, *options], cwd=ROOT, stdout=file, check=True)
    data = coverage.CoverageData(str(BUILD / "coverage"))
    data.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        contexts = data.contexts_by_lineno(file).items()
        lines[Path(file).name] = {
            line: sorted({name.rsplit("|", 1)[0] for name in names if name})
            for line, names in contexts
        }
    seconds: dict[str, float] = collections.defaultdict(float)
    for found in re.finditer(r"^([\d.]+)s (?:call|setup) +(\S.*)$", log.read_text(), re.MULTILINE):
        seconds[found[2]] += float(found[1])
    (BUILD / "suite.json").write_text(json.dumps({"lines": lines, "seconds": seconds}))


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
            print(f"{mutant['file']}:{mutant['lines'][0]}  {result['outcome']}")
            print(*(f"    {line}" for line in list(change)[3:]), sep="\n")
    done = outcomes["killed"] + outcomes["timeout"]
    print(f"{done} of {len(results)} mutants killed ({100 * done / max(len(results), 1):.1f} %)")
    print(f"{dict(outcomes)}, of {len(drawn)} drawn")


def prepare(only: str) -> None:
    """Draws the mutants, runs the suite unchanged if that was not done, and forgets all results."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "mutants.json").write_text(json.dumps(mutants(only)))
    for results in BUILD.glob("results-*.jsonl"):
        results.unlink()
    if not (BUILD / "suite.json").exists():
        run_suite()


def run(workers: int, count: int) -> None:
    """Runs the mutants in copies of the checkout, one for each worker."""
    running: list[subprocess.Popen[bytes]] = []
    for worker in range(workers):
        copy = BUILD / f"copy-{worker}"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns(".*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        # Bytecode goes by time and size: a mutant made in the same second can be taken for another.
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["JAX_PLATFORMS"] = "cpu"  # as the tests have it, who say so too late here
        share = [str(BUILD), str(worker), str(workers), str(count)]
        command = [sys.executable, "-m", "tests.mutants_worker", *share]
        running.append(subprocess.Popen(command, cwd=copy, env=environment))
    for process in running:
        process.wait()


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
