"""What freezing costs on an accelerator: times, memory, edits and bits, within minutes.

Each case is run against the split by hand and `optax.partition`, in turns in one process. What is
known is written after each case, so a run that is cut off keeps it. A case that no longer fits into
the time is left out, and says so. Run with `python -m benchmarks.gpu`; `--tiny` runs all of it
anywhere, with tiny models. `python -m benchmarks.gpu_report` writes the page.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks import results, streaming
from benchmarks.cases import Case
from benchmarks.decoder import FIRST, WAYS, Decoder, Ways, step_cases
from benchmarks.edits import edits
from benchmarks.run import WARM_UP, Run, Times, in_turns, quartiles

DECODER, PEAKS, EDITS, BITS = "decoder", "peak bytes as the device counts them", "edits", "bits"
BANDWIDTH = f"{streaming.ON_HOST}: bandwidth"
CACHE = "JAX_COMPILATION_CACHE_DIR"
Figures = dict[str, Any]


def failure(error: Exception) -> Figures:
    """An error as a figure; of memory that did not suffice, the bytes that XLA asked for."""
    text = f"{type(error).__name__}: {error}"
    asked = re.search(r"allocate ([\d.]+)([KMGT]i?)?B", text)
    if "RESOURCE_EXHAUSTED" not in text or asked is None:
        return {"error": text[:600]}
    number, unit = asked.groups(default="")
    base = 1_024 if unit.endswith("i") else 1_000
    return {"out of memory": int(float(number) * base ** " KMGT".index(unit[:1] or " "))}


def device_bytes() -> float:
    """How much memory JAX may use, where the device says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))


def compiled(case: Case, ways: Ways) -> dict[str, Run | Figures]:
    """A run of each way, or why there is none; compiled at the same time."""
    params = case.params()  # once for all ways
    case = replace(case, params=lambda: params)

    def run(way: Callable[[Case], Any]) -> Run | Figures:
        try:
            return Run(case, way)
        except Exception as error:  # noqa: BLE001  (the other ways go on)
            return failure(error)

    with ThreadPoolExecutor(len(ways)) as pool:
        return dict(zip(ways, pool.map(run, ways.values()), strict=True))


def fits(run: Run, runs: Iterable[Run]) -> Figures | None:
    """Warms up; says so if a step does not fit into the memory beside what the runs hold."""
    held = sum(run.held_bytes for run in runs)
    # XLA's own analysis decides, as a step that fails may leave the allocator in pieces.
    if held + run.added_bytes > 0.97 * device_bytes():
        return {"out of memory": run.added_bytes}
    try:
        for _ in range(WARM_UP):
            run()
    except Exception as error:  # noqa: BLE001  (the other ways go on)
        return failure(error)
    return None


def stepped(case: Case, ways: Ways, seconds: float) -> Figures:
    """Each way's times, ratios to the first way, and bytes."""
    made = compiled(case, ways)
    gc.collect()
    runs = {name: run for name, run in made.items() if isinstance(run, Run)}
    figures: dict[str, Figures] = {
        name: {
            "peak bytes": run.peak_bytes,
            "state bytes": run.state_bytes,
            **({"host bytes": run.host_bytes} if run.host_bytes else {}),
            "compile seconds": run.compile_seconds,
        }
        if isinstance(run, Run)
        else run
        for name, run in made.items()
    }
    made.clear()
    for name in list(runs):
        if failed := fits(runs[name], runs.values()):
            figures[name] |= failed
            del runs[name]
    taken: Times = in_turns(runs, 200, seconds) if runs else {}
    tokens = case.batch()[:, 1:].size
    for name, of_way in taken.items():
        found = quartiles(of_way, taken.get(next(iter(ways)), of_way))
        if next(iter(ways)) not in taken:
            found = {"milliseconds": found["milliseconds"]}
        found["tokens per second"] = 1e3 * tokens / found["milliseconds"]
        figures[name] = found | figures[name]
    return {"rounds": max(map(len, taken.values()), default=0), "ways": figures}


def bandwidth(tiny: bool) -> Figures:
    return {"bytes per second": streaming.measured_bandwidth(1 << (20 if tiny else 30))}


def streamed(case: streaming.Streaming, seconds: float, found: Figures) -> Figures:
    """The same of each way to hold a base, with how long its transfer takes at least."""
    measured = found.get(BANDWIDTH, {}).get("bytes per second")
    transfer = case.transfer(measured) if measured else {}
    return stepped(case.case, streaming.WAYS, seconds) | transfer


def lines(name: str, found: Figures) -> str:
    def line(way: str, x: Figures) -> str:
        parts = [
            f"{x['milliseconds']:.2f} ms" if "milliseconds" in x else "",
            f"{x['ratio']:.3f} ({x['low']:.3f} to {x['high']:.3f})" if "ratio" in x else "",
            f"peak {x['peak bytes'] / 1e9:.3f} GB" if "peak bytes" in x else "",
            f"host {x['host bytes'] / 1e9:.3f} GB" if "host bytes" in x else "",
            f"state {x['state bytes'] / 1e9:.3f} GB" if "state bytes" in x else "",
            f"compiled in {x['compile seconds']:.1f} s" if "compile seconds" in x else "",
            f"out of memory at {x['out of memory'] / 1e9:.2f} GB" if "out of memory" in x else "",
            x.get("error", ""),
        ]
        return f"    {way}: {', '.join(filter(None, parts))}"

    of_ways = [line(way, x) for way, x in found.get("ways", {}).items()]
    whole = "".join(f": {key}: {found[key]}" for key in ("left out", "error") if key in found)
    of_ways += [
        f"    {way}: the transfer alone takes at least {least:.2f} ms"
        for way, least in found.get("least milliseconds", {}).items()
    ]
    return "\n".join([name + whole, *of_ways])


def peak(way: str, tiny: bool) -> int | None:
    """The bytes that this process held at most after three steps, where the device counts them."""
    case, ways = step_cases(Decoder(tiny))[FIRST]
    run = Run(case, ways[way])
    for _ in range(3):
        run()
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak_apart(way: str, tiny: bool) -> Any:
    """The same in a process of its own, as a peak can't be reset."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--peak", way, *["--tiny"] * tiny]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=120, env=env
        )
        return json.loads(done.stdout.split()[-1])
    except subprocess.CalledProcessError as error:
        return failure(RuntimeError(error.stderr[-2_000:]))
    except Exception as error:  # noqa: BLE001  (the cases go on)
        return failure(error)


def peaks(tiny: bool) -> Figures:
    """Of each way. The first tunes what all share, alone on the device; this process holds none."""
    first, *others = WAYS
    found = {first: peak_apart(first, tiny)}
    with ThreadPoolExecutor(len(others)) as pool:
        return found | dict(
            zip(others, pool.map(lambda way: peak_apart(way, tiny), others), strict=True)
        )


class Journal:
    """What was found, kept after each case; a case that fails or has no time left says so."""

    def __init__(self, path: Path | None, end: float):
        self.found: Figures = {}
        self.path, self.begin, self.end = path, time.perf_counter(), end

    def add(self, name: str, measure: Callable[[], Figures], reserve: float, step: bool) -> None:
        """Measures a case, unless fewer seconds are left than are to be in reserve."""
        if time.perf_counter() + reserve > self.end:
            figures: Figures = {"left out": "no time was left"}
        else:
            try:
                figures = measure()
            except Exception as error:  # noqa: BLE001  (the other cases go on)
                figures = failure(error)
        gc.collect()  # a step and its jaxpr hold each other, and the buffers
        kept = self.found.setdefault("steps", {}) if step else self.found
        kept[name] = figures
        self.say(lines(name, figures) if step else f"{name}: {figures}")
        if self.path:
            results.write(self.path, self.found)

    def say(self, text: str) -> None:
        """Prints, with the seconds since the start."""
        print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)


def tested_bits(count: int, deadline: float) -> Figures:
    # Here, as the optimizers' module needs packages of the tests: the other cases need none.
    from benchmarks.bits import bits  # noqa: PLC0415

    return bits(count, deadline)


def measure(tiny: bool, journal: Journal, only: list[str]) -> None:
    """All cases whose name has one of these words in it; all without words."""
    decoder = Decoder(tiny)
    seconds, reserve = (0.1, 0.0) if tiny else (8.0, 40.0)
    until = min(journal.end, journal.begin + 180)
    planned: list[tuple[str, Callable[[], Figures], bool]] = []
    on_host = decoder.streamings()
    for name, (case, ways) in step_cases(decoder).items():
        of_case: Callable[[], Figures] = lambda case=case, ways=ways: stepped(case, ways, seconds)  # noqa: E731
        if name in on_host:
            # A step may take long, so this is as much time as the rounds need.
            of_case = lambda x=on_host[name]: streamed(x, seconds / 2, journal.found)  # noqa: E731
        planned.append((name, of_case, True))
    planned.insert(1, (EDITS, lambda: edits(*((2, 32) if tiny else (10, 3_200))), False))
    planned.insert(3, (BITS, lambda: tested_bits(2 if tiny else 1_000, until), False))
    planned.insert(0, (BANDWIDTH, lambda: bandwidth(tiny), False))
    planned.insert(0, (DECODER, decoder.described, False))
    if not tiny:  # first, as this process must not hold the device meanwhile
        planned.insert(0, (PEAKS, lambda: peaks(tiny), False))
    for name, of_case, step in planned:
        if not only or any(word in name for word in only):
            journal.add(name, of_case, reserve, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models, anywhere; not kept")
    parser.add_argument("--minutes", type=float, default=6.5, help="no case starts near their end")
    parser.add_argument("--out", type=Path, help="where to write, if not to benchmarks/results")
    parser.add_argument("--only", nargs="+", default=[], help="cases with such a word in the name")
    parser.add_argument("--peak", choices=WAYS, help="only print the peak bytes of one way")
    args = parser.parse_args()
    # Before JAX asks for the device. One block of memory for all, or the allocator's blocks are
    # too small for a large step later; the rest is for what CUDA's libraries take themselves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    if args.tiny:  # what compiles is all that is looked at
        from tests.support.compiling import QUICK_FLAGS  # noqa: PLC0415

        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_FLAGS}"
    # Shared with the processes that measure the peaks: what they compile and tune is not done anew.
    folder = os.environ.setdefault(CACHE, tempfile.mkdtemp(prefix="freeze_optax_bench_"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if args.peak:
        print(json.dumps(peak(args.peak, args.tiny)))
        return
    path = args.out or (None if args.tiny else results.path("gpu"))
    journal = Journal(path, time.perf_counter() + 60 * args.minutes)
    measure(args.tiny, journal, args.only)
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
