"""What the library costs the host: init, tracing and edits, as ratios within one run.

The bare optimizer runs on the trainable leaves alone and takes and returns the rest; a tenth of the
leaves train. Run with `python benchmarks/host.py [leaves ...]`.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import freeze_optax as fo

FROZEN = fo.regex(r".*/w[1-9]")


def params(count: int) -> dict[str, Any]:
    """Blocks of ten arrays, of which the first trains."""
    shapes = [(3, 4), (4, 4), (5, 4)]
    leaves = [jnp.zeros(shapes[i % 3]) for i in range(count)]
    blocks = range(count // 10)
    return {f"block_{i:05d}": {f"w{j}": leaves[10 * i + j] for j in range(10)} for i in blocks}


def medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each function, all run in turns; traces as if for the first time."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            if name.startswith("trace"):
                jax.clear_caches()
            gc.collect()  # or the garbage of one function is paid for by another
            begin = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def trace(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """Traces the function."""

    def run() -> None:
        jax.jit(function).trace(*args)

    return run


def measure(count: int) -> dict[str, float]:
    tree, inner = params(count), optax.adamw(1e-3)
    labels = fo.labels(FROZEN, tree)
    groups = {"frozen": optax.set_to_zero(), "trainable": inner}
    partition, ours = optax.partition(groups, labels), fo.freezable(inner, FROZEN)
    state, peer_state = ours.init(tree), partition.init(tree)
    trainable = {k: {"w0": block["w0"]} for k, block in tree.items()}
    rest = {k: {j: w for j, w in block.items() if j != "w0"} for k, block in tree.items()}
    bare_state = inner.init(trainable)
    half = {k: np.bool_(i % 2) for i, k in enumerate(tree)}
    everything = fo.adopt(ours, inner.init(tree), tree)
    all_groups = optax.partition({"trainable": inner}, "trainable")

    def bare(grads: Any, still: Any, state: Any, params: Any) -> Any:
        updates, state = inner.update(grads, state, params)
        return updates, still, state

    # The traces apart, as they leave the others nothing compiled to start from.
    seconds = medians(
        {
            "init, ours": lambda: ours.init(tree),
            "init, optax.partition": lambda: partition.init(tree),
            "init of all leaves, optax.partition": lambda: all_groups.init(tree),
            "resolve a regex": lambda: fo.mask(FROZEN, tree),
            "freeze half": lambda: fo.freeze(everything, tree, half),
            "park half": lambda: fo.freeze(everything, tree, half, keep_state=True),
            "thaw the other nine tenths": lambda: fo.thaw(state, tree, fo.everything),
        },
        5,
    )
    return seconds | medians(
        {
            "trace of update, bare": trace(bare, trainable, rest, bare_state, trainable),
            "trace of update, ours": trace(ours.update, tree, state, tree),
            "trace of update, optax.partition": trace(partition.update, tree, peer_state, tree),
        },
        7,
    )


RATIOS = [
    ("trace of update, ours", "trace of update, bare"),
    ("trace of update, ours", "trace of update, optax.partition"),
    ("init, ours", "init, optax.partition"),
    ("freeze half", "init of all leaves, optax.partition"),
    ("park half", "init of all leaves, optax.partition"),
    ("thaw the other nine tenths", "init of all leaves, optax.partition"),
]


def main() -> None:
    counts = [int(arg) for arg in sys.argv[1:]] or [100, 1_000, 10_000]
    columns = [measure(count) for count in counts]
    console = Console(width=100)
    table = Table("milliseconds", *(f"{count:,} leaves" for count in counts))
    for name in columns[0]:
        table.add_row(name, *(f"{1e3 * column[name]:.1f}" for column in columns))
    console.print(table)
    table = Table("ratio", *(f"{count:,} leaves" for count in counts))
    for a, b in RATIOS:
        table.add_row(f"{a} / {b}", *(f"{column[a] / column[b]:.2f}" for column in columns))
    console.print(table)
    console.print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].platform}")


if __name__ == "__main__":
    main()
