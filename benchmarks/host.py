"""What the library costs the host, at several numbers of leaves, as ratios within one run.

Init, resolving, tracing, lowering, the dispatch of a jitted step, the eager update and edits, with
the growth fitted. A tenth of the leaves train. The bare optimizer runs on these alone; "bare, rest
returned" also returns the others, and "bare, with holes" is given what `fo.partition` leaves. Run
with `python -m benchmarks.host [leaves ...]`.
"""

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo
from benchmarks import results

FROZEN = fo.regex(r".*/w[1-9]")
AS_PREDICATE = fo.where(lambda path, _: path[-1] != "0")
OURS, PARTITION_STYLE = "freeze_optax", "freeze_optax, partition style"
PEER, BARE, BARE_WHOLE = "optax.partition", "bare", "bare, rest returned"
BARE_HOLES = "bare, with holes"

Key = tuple[str, str]
"""What is measured, and of whom."""


class Task(NamedTuple):
    """Something to measure, and what is to be done each time before the clock starts."""

    run: Callable[[], Any]
    before: Callable[[], None] = lambda: None


class Side(NamedTuple):
    """One way of freezing.

    Attributes:
      update: As of an optax transformation.
      apply: From params, updates and state to params.
      state: The state of the optimizer.
      tree: The params, and the gradients too.
      rest: What a step takes beside and does not return.
    """

    update: Callable[..., Any]
    apply: Callable[..., Any]
    state: Any
    tree: Any
    rest: Any = ()


def params(count: int) -> dict[str, Any]:
    """Blocks of ten arrays, of which the first trains."""
    shapes = [(3, 4), (4, 4), (5, 4)]
    leaves = [jnp.zeros(shapes[i % 3]) for i in range(count)]
    blocks = range(count // 10)
    return {f"block_{i:05d}": {f"w{j}": leaves[10 * i + j] for j in range(10)} for i in blocks}


def sides(tree: Any) -> Iterator[tuple[str, Side]]:
    inner = optax.adamw(1e-3)
    ours = fo.freezable(inner, FROZEN)
    trainable, still = fo.partition(tree, FROZEN)
    groups = {"frozen": optax.set_to_zero(), "trainable": inner}
    peer = optax.partition(groups, fo.labels(FROZEN, tree))
    first = {k: {"w0": block["w0"]} for k, block in tree.items()}
    rest = {k: {j: w for j, w in block.items() if j != "w0"} for k, block in tree.items()}

    def bare_whole(grads: Any, state: Any, params: Any) -> Any:
        updates, state = inner.update(grads[0], state, params[0])
        return (updates, grads[1]), state

    def apply_whole(params: Any, updates: Any, _: Any) -> Any:
        return optax.apply_updates(params[0], updates[0]), params[1]

    def apply(params: Any, updates: Any, _: Any) -> Any:
        return optax.apply_updates(params, updates)

    def apply_part(params: Any, updates: Any, _: Any) -> Any:
        return fo.apply_updates(params, updates)

    state = ours.init(tree)
    yield BARE_WHOLE, Side(bare_whole, apply_whole, inner.init(first), (first, rest))
    yield OURS, Side(ours.update, fo.apply_updates, state, tree)
    yield PEER, Side(peer.update, apply, peer.init(tree), tree)
    yield BARE, Side(inner.update, apply, inner.init(first), first, rest)
    yield BARE_HOLES, Side(inner.update, apply_part, inner.init(trainable), trainable, still)
    yield PARTITION_STYLE, Side(ours.update, apply_part, state, trainable, still)


def tracing(side: Side) -> Task:
    args = side.tree, side.state, side.tree
    return Task(lambda: jax.jit(side.update).trace(*args), jax.clear_caches)


def lowering(side: Side) -> Task:
    traced: list[Any] = []

    def trace() -> None:
        jax.clear_caches()
        traced.append(jax.jit(side.update).trace(side.tree, side.state, side.tree))

    return Task(lambda: traced.pop().lower(), trace)


def dispatch(side: Side) -> Task:
    """The call of a jitted step until it returns; what it changes is donated."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def step(params: Any, state: Any, rest: Any) -> Any:  # noqa: ARG001
        updates, state = side.update(params, state, params)
        return side.apply(params, updates, state), state

    carried = [jax.tree.map(jnp.copy, (side.tree, side.state))]

    def run() -> None:
        carried[0] = step(*carried[0], side.rest)

    return Task(run, lambda: jax.block_until_ready(carried[0]))


def eager(side: Side) -> Task:
    return Task(lambda: jax.block_until_ready(side.update(side.tree, side.state, side.tree)))


def once(tree: Any) -> dict[Key, Task]:
    """What is done once in a run, or now and then."""
    inner = optax.adamw(1e-3)
    ours = fo.freezable(inner, FROZEN)
    groups = {"frozen": optax.set_to_zero(), "trainable": inner}
    peer = optax.partition(groups, fo.labels(FROZEN, tree))
    first = {k: {"w0": block["w0"]} for k, block in tree.items()}
    state, everything = ours.init(tree), fo.adopt(ours, inner.init(tree), tree)
    half = {k: np.bool_(i % 2) for i, k in enumerate(tree)}
    all_groups = optax.partition({"trainable": inner}, "trainable")
    runs = {
        ("init", BARE): lambda: inner.init(first),
        ("init", OURS): lambda: ours.init(tree),
        ("init", PEER): lambda: peer.init(tree),
        ("init of all leaves", PEER): lambda: all_groups.init(tree),
        ("resolve a regex", OURS): lambda: fo.mask(FROZEN, tree),
        ("freeze half", OURS): lambda: fo.freeze(everything, tree, half),
        ("park half", OURS): lambda: fo.freeze(everything, tree, half, keep_state=True),
        ("thaw the other nine tenths", OURS): lambda: fo.thaw(state, tree, fo.everything),
        # As a loop does in each step. A predicate is called each time, as it may read the leaves.
        ("repeat an edit by path", OURS): lambda: fo.set_frozen(state, tree, FROZEN),
        ("repeat an edit by predicate", OURS): lambda: fo.set_frozen(state, tree, AS_PREDICATE),
    }
    return {key: Task(lambda run=run: jax.block_until_ready(run())) for key, run in runs.items()}


def samples(tasks: dict[Key, Task], repeats: int) -> dict[Key, list[float]]:
    """The seconds of each task, all run in turns, the first time left out.

    Those of the calling thread: what other programs take away from it is nobody's cost.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in tasks}
    for _ in range(repeats + 1):
        for key, task in tasks.items():
            task.before()
            gc.collect()  # or the garbage of one task is paid for by another
            begin = time.thread_time()
            task.run()
            seconds[key].append(time.thread_time() - begin)
    return {key: times[1:] for key, times in seconds.items()}


EACH = {
    "dispatch of a jitted step": (dispatch, 30),
    "eager update": (eager, 7),
    # Last, as they leave the others nothing compiled to start from.
    "trace of update": (tracing, 5),
    "lowering of update": (lowering, 3),
}


def measure(count: int) -> dict[Key, list[float]]:
    tree = params(count)
    found = samples(once(tree), 5)
    for what, (task, repeats) in EACH.items():
        found |= samples({(what, who): task(side) for who, side in sides(tree)}, repeats)
    return found


RATIOS: list[tuple[Key, Key]] = [
    *((((what, OURS), (what, who))) for what in EACH for who in (BARE_WHOLE, PEER)),
    *((((what, PARTITION_STYLE), (what, who))) for what in EACH for who in (BARE, BARE_HOLES)),
    *((("init", OURS), ("init", who)) for who in (BARE, PEER)),
    *(
        ((what, OURS), ("init of all leaves", PEER))
        for what in (
            "freeze half",
            "park half",
            "thaw the other nine tenths",
            "repeat an edit by path",
            "repeat an edit by predicate",
        )
    ),
]


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def growth(counts: list[int], milliseconds: list[float]) -> float:
    """The exponent of a power law through the times: 1 is linear."""
    return float(np.polyfit(np.log(counts), np.log(milliseconds), 1)[0])


def main() -> None:
    counts = [int(arg) for arg in sys.argv[1:]] or [100, 1_000, 10_000]
    columns = [measure(count) for count in counts]

    def row(key: Key) -> dict[str, Any]:
        times = [1e3 * statistics.median(column[key]) for column in columns]
        exponent = growth(counts, times) if len(counts) > 1 else None
        return {"what": key[0], "who": key[1], "milliseconds": times, "exponent": exponent}

    def compared(a: Key, b: Key) -> dict[str, Any]:
        ratios = [ratio(column[a], column[b]) for column in columns]
        return {"what": a[0], "who": a[1], "to": ", ".join(b[b[0] == a[0] :]), "ratios": ratios}

    times = [row(key) for key in columns[0]]
    ratios = [compared(a, b) for a, b in RATIOS]
    results.write("host", {"leaves": counts, "times": times, "ratios": ratios})
    results.show(*tables(results.read("host")), results.described(results.machine()))


def tables(found: dict[str, Any]) -> tuple[Any, Any]:
    """The times and the ratios."""
    leaves = [f"{count:,} leaves" for count in found["leaves"]]
    times = [
        [
            f"{row['what']}: {row['who']}",
            *(f"{x:.3g}" for x in row["milliseconds"]),
            "—" if row["exponent"] is None else f"{row['exponent']:.2f}",
        ]
        for row in found["times"]
    ]
    ratios = [
        [f"{row['what']}: {row['who']} / {row['to']}", *(f"{x:.2f}" for x in row["ratios"])]
        for row in found["ratios"]
    ]
    return (
        results.table("milliseconds", ["milliseconds", *leaves, "growth"], times),
        results.table("ratios", ["ratio", *leaves], ratios),
    )


if __name__ == "__main__":
    main()
