"""How long a training step takes, as ratios to code split by hand, measured in turns in one run.

On a GPU also a transformer of a billion params, with the peak of its memory. Run with `python -m
benchmarks.wall`; `--tiny` runs that part anywhere, with a tiny model.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

# Before JAX starts: the peaks are those of processes of their own.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks import results
from benchmarks.cases import BILLION, TIMED, TINY_BILLION, Case
from benchmarks.steps import BY_HAND, BY_HAND_PART, WAYS, Way, stages

Times = dict[str, list[float]]


class Run:
    """A compiled step that goes on from where it was; its buffers are donated."""

    def __init__(self, case: Case, way: Way):
        (stage,) = stages(case, way.parts(case))
        jitted = jax.jit(stage.function, donate_argnums=stage.donated)
        self._step = jitted.lower(*stage.args).compile()
        # Copies, as one buffer can't be donated twice.
        params, state, *self._others = stage.args
        self._carried = jax.tree.map(jnp.copy, (params, state))

    def __call__(self) -> float:
        """The seconds of a step."""
        begin = time.perf_counter()
        params, state, *_ = jax.block_until_ready(self._step(*self._carried, *self._others))
        seconds = time.perf_counter() - begin
        self._carried = params, state
        return seconds


def timed(case: Case, rounds: int) -> Times:
    """The seconds of each step of each way, one step of each in every round."""
    runs = {name: Run(case, way) for name, way in WAYS.items()}
    seconds: Times = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + 3):
        shift = i % len(names)  # so that nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            seconds[name].append(runs[name]())
    return {name: of_way[3:] for name, of_way in seconds.items()}


def compared(seconds: Times) -> dict[str, dict[str, float]]:
    """For each way the median time, and the quartiles of its ratios to the split by hand."""

    def of(name: str) -> dict[str, float]:
        by_hand = seconds[BY_HAND if WAYS[name].whole else BY_HAND_PART]
        ratios = [a / b for a, b in zip(seconds[name], by_hand, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1e3 * statistics.median(seconds[name])
        return {"milliseconds": milliseconds, "low": low, "ratio": middle, "high": high}

    return {name: of(name) for name in seconds}


def peak(case: Case, way: Way) -> int | None:
    """The bytes that this process held at most after three steps, where the device counts them."""
    run = Run(case, way)
    for _ in range(3):
        run()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak_apart(way: str, tiny: bool) -> int | None:
    """The same in a process of its own, as a peak can't be reset."""
    command = [sys.executable, "-m", "benchmarks.wall", "--peak", way]
    command += ["--tiny"] if tiny else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def large(tiny: bool, rounds: int) -> dict[str, Any]:
    """Times, peaks and tokens per second of the transformer of a billion params."""
    case = TINY_BILLION if tiny else BILLION
    peaks = {name: peak_apart(name, tiny) for name in WAYS}
    ways = compared(timed(case, rounds))
    tokens = case.batch()[:, 1:].size
    params = jax.tree.leaves(jax.eval_shape(case.params))
    for name, of_way in ways.items():
        of_way["tokens per second"] = 1e3 * tokens / of_way["milliseconds"]
        of_way["peak bytes"] = peaks[name]
    return {"params": sum(x.size for x in params), "tiny": tiny, "ways": ways}


def rows(by_way: dict[str, dict[str, float]]) -> list[list[str]]:
    def row(name: str, of_way: dict[str, Any]) -> list[str]:
        cells = [
            name,
            f"{of_way['milliseconds']:.1f}",
            f"{of_way['ratio']:.2f}",
            f"{of_way['low']:.2f} to {of_way['high']:.2f}",
        ]
        if "peak bytes" in of_way:
            peak = of_way["peak bytes"]
            cells += ["—" if peak is None else f"{peak / 1e9:.2f}"]
            cells += [f"{of_way['tokens per second']:,.0f}"]
        return cells

    return [row(name, of_way) for name, of_way in by_way.items()]


COLUMNS = ["", "ms a step", "ratio to split by hand", "its quartiles"]
LARGE_COLUMNS = [*COLUMNS, "peak, GB", "tokens per second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the GPU part with a tiny model")
    parser.add_argument("--rounds", type=int, default=100, help="steps of each way")
    parser.add_argument("--peak", choices=WAYS, help="only print the peak bytes of one way")
    args = parser.parse_args()
    if args.peak:
        print(peak(TINY_BILLION if args.tiny else BILLION, WAYS[args.peak]))
        return
    cases = {name: compared(timed(case, args.rounds)) for name, case in TIMED.items()}
    on_gpu = jax.default_backend() == "gpu"
    billion = large(args.tiny, args.rounds) if on_gpu or args.tiny else None
    kept = None if billion and billion["tiny"] else billion
    results.write("wall", {"rounds": args.rounds, "cases": cases, "billion": kept})
    for name, by_way in cases.items():
        results.show(results.table(name, COLUMNS, rows(by_way)))
    if billion:
        title = f"transformer of {billion['params']:,} params"
        results.show(results.table(title, LARGE_COLUMNS, rows(billion["ways"])))
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
