"""What freezing costs on an accelerator: times, memory, edits and bits, within minutes.

Each case is run against the split by hand and `optax.partition`, in turns in one process. What is
known stands in `results/gpu.json` after each case, so a run that is cut off keeps it; a case that no
longer fits into the time is left out, and the page says so. Run with `python -m benchmarks.gpu`;
`--tiny` runs all of it anywhere, with tiny models, and keeps nothing.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

# Before JAX starts: what is preallocated would hide the peaks.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Shared with the processes that measure the peaks: they compile nothing anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo
from benchmarks import results, wall
from benchmarks.cases import CLIPPED, Case, language_model
from benchmarks.steps import BY_HAND, DROP_IN, Parts, by_hand, drop_in, optax_partition, stages

PARTITION = "optax.partition"
Ways = dict[str, Callable[[Case], Parts]]
WAYS: Ways = {BY_HAND: partial(by_hand, whole=True), DROP_IN: drop_in, PARTITION: optax_partition}


class Sizes:
    """The sizes of the models, large or tiny."""

    def __init__(self, tiny: bool):
        self.depth, self.width, self.vocabulary = (10, 64, 256) if tiny else (20, 2_048, 32_000)
        self.batch = (2, 16) if tiny else (8, 1_024)
        self.embedding = 1_024 if tiny else 131_072
        self.edited = (4, 32) if tiny else (10, 3_200)  # 10 kernels of 10 million params
        self.optimizers = 4 if tiny else 1_000
        self.seconds = 1.0 if tiny else 10.0

    def model(self, **others: Any) -> Case:
        return language_model(
            self.depth, self.width, self.vocabulary, self.batch, jnp.bfloat16, **others
        )

    def layers(self, trained: list[int]) -> Any:
        still = ",".join(str(i) for i in range(self.depth) if i not in trained)
        return ("embed", "norm", f"layers/layer_{{{still}}}")


class Run:
    """A compiled step that goes on from where it was; its buffers are donated."""

    def __init__(self, case: Case, way: Callable[[Case], Parts]):
        (stage,) = stages(case, way(case))
        lowered = jax.jit(stage.function, donate_argnums=stage.donated).lower(*stage.args)
        begin = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        params, state, *self.others = stage.args
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        # Copies, as one buffer can't be donated twice.
        self.carried = jax.tree.map(jnp.copy, (params, state))

    def __call__(self) -> float:
        """The seconds of a step."""
        begin = time.perf_counter()
        params, state, *_ = jax.block_until_ready(self.step(*self.carried, *self.others))
        seconds = time.perf_counter() - begin
        self.carried = params, state
        return seconds

    def peak_bytes(self) -> int:
        """What XLA allots to arguments, outputs and temporary values together."""
        memory = self.step.memory_analysis()
        parts = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return parts + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def stepped(case: Case, ways: Ways, seconds: float) -> dict[str, Any]:
    """Each way's median milliseconds, ratio to the first way with quartiles, and bytes."""
    with ThreadPoolExecutor(len(ways)) as pool:
        runs = dict(zip(ways, pool.map(lambda way: Run(case, way), ways.values()), strict=True))
    names, first = list(runs), next(iter(runs))
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for i in range(203):
        shift = i % len(names)  # so that nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            taken[name].append(runs[name]())
        if i == 2:  # the first rounds warm up
            taken = {name: [] for name in names}
        if i >= 12 and time.perf_counter() - begin > seconds:
            break
    tokens = case.batch()[:, 1:].size

    def of(name: str) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(taken[name], taken[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(taken[name])
        return {
            "milliseconds": 1e3 * median,
            "low": low,
            "ratio": middle,
            "high": high,
            "tokens per second": tokens / median,
            "peak bytes": runs[name].peak_bytes(),
            "state bytes": runs[name].state_bytes,
            "compile seconds": runs[name].compile_seconds,
        }

    return {"rounds": len(taken[first]), "ways": {name: of(name) for name in names}}


def decoders(sizes: Sizes) -> Iterator[tuple[str, Case]]:
    """A decoder of a billion params of which nine tenths are frozen, in three ways."""
    last = sizes.model()
    kth = [9] if sizes.depth == 10 else [9, 19]
    for name, case in {
        "last tenth of the layers trained": last,
        "LoRA": replace(sizes.model(rank=8), frozen=~fo.path("**/qkv_{a,b}")),
        "every tenth layer trained": replace(last, frozen=sizes.layers(kth)),
    }.items():
        yield f"{name}, clip outside", case
        yield f"{name}, clip inside", replace(case, inner=CLIPPED, around=lambda tx: tx)


def cohorts(case: Case, groups: list[Any]) -> Parts:
    """Ours, with groups of layers that were thawed one after the other."""
    parts = drop_in(case)
    state = fo.freeze(parts.state, parts.params, groups[1:])
    for group in groups[1:]:
        state = fo.thaw(state, parts.params, group)
    return parts._replace(state=state)


def scheduled(case: Case, phases: fo.Phases) -> Parts:
    tx = case.around(fo.scheduled(case.inner, phases))

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    params = case.params()
    return drop_in(case)._replace(params=params, state=tx.init(params), update=update)


def rows_by_hand(case: Case, new: int) -> Parts:
    """The embedding as two arrays, the second of which trains with the layers that do."""
    params = case.params()
    old, fresh = params["embed"][:-new], params["embed"][-new:]
    flags = {**fo.mask(case.frozen, params), "embed": False}
    trainable, rest = fo.partition({**params, "embed": fresh}, flags)
    tx = case.around(case.inner)

    def grad(params: Any, _: Any, __: Any, batch: Any) -> Any:
        trainable, rest, old = params

        def of_trainable(trainable: Any) -> Any:
            merged = fo.merge(trainable, rest)
            merged["embed"] = jnp.concatenate([old, merged["embed"]])
            return case.loss(merged, batch)

        return jax.value_and_grad(of_trainable)(trainable)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params[0])
        return (optax.apply_updates(params[0], updates), *params[1:]), state

    return Parts((trainable, rest, old), tx.init(trainable), (), grad, update)


def others(sizes: Sizes) -> Iterator[tuple[str, Case, Ways]]:
    """What only this package does, against the split by hand that does as much."""
    depth = sizes.depth
    trained = list(range(depth - 9, depth))
    nine = replace(sizes.model(), frozen=sizes.layers(trained))
    by_layer = [f"layers/layer_{i}" for i in trained]
    ways: Ways = {BY_HAND: WAYS[BY_HAND]}
    for count in (1, 3, 9):
        size = 9 // count
        groups = [tuple(by_layer[i : i + size]) for i in range(0, 9, size)]
        ways[f"{count} cohorts"] = partial(cohorts, groups=groups)
    yield "nine layers trained, in cohorts", nine, ways

    counts = [depth // 10, 3, 6, 9]
    phases = {1_000 * i: sizes.layers(list(range(depth - k, depth))) for i, k in enumerate(counts)}
    in_phases: Ways = {
        BY_HAND: WAYS[BY_HAND],
        "scheduled, first of four phases": partial(scheduled, phases=fo.Phases(phases)),
    }
    yield "four phases in one program", replace(sizes.model(), frozen=phases[0]), in_phases

    new = 100
    few = language_model(4, sizes.width, sizes.embedding, sizes.batch, jnp.bfloat16)
    frozen = (fo.rows("embed", slice(None, -new)), "norm", "layers/layer_{0..2}")
    by_rows: Ways = {BY_HAND: partial(rows_by_hand, new=new), DROP_IN: drop_in}
    yield f"{new} rows of {sizes.embedding:,}", replace(few, frozen=frozen), by_rows


def edits(sizes: Sizes) -> dict[str, Any]:
    """Seconds of each edit of 100 million params, survivors that moved, and what a retrace takes."""
    depth, width = sizes.edited
    keys = jax.random.split(jax.random.key(0), 2 * depth)
    params = {f"w{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}
    tx = fo.freezable(optax.adamw(1e-3))
    half = [f"w{i}" for i in range(depth)]
    start = jax.block_until_ready(tx.init(params))
    calls: dict[str, Callable[[Any], Any]] = {
        "freeze": lambda state: fo.freeze(state, params, half),
        "park": lambda state: fo.freeze(state, params, half, keep_state=True),
        "thaw what was dropped": lambda state: fo.thaw(state, params, half),
        "thaw what was parked": lambda state: fo.thaw(state, params, half),
        "edit to the plan that stands": lambda state: fo.set_frozen(state, params, fo.nothing),
    }
    before = {name: start for name in calls}
    before["thaw what was dropped"] = fo.freeze(start, params, half)
    before["thaw what was parked"] = fo.freeze(start, params, half, keep_state=True)

    def buffers(state: Any) -> set[int]:
        return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim == 2}

    found: dict[str, Any] = {"params edited": depth * width * width}
    for name, call in calls.items():
        taken = []
        for _ in range(6):
            begin = time.perf_counter()
            after = jax.block_until_ready(call(before[name]))
            taken.append(time.perf_counter() - begin)
        kept = {x for x in buffers(before[name]) if x in buffers(after)}
        made = len(buffers(after)) - len(kept)
        found[name] = {
            "milliseconds": 1e3 * statistics.median(taken[1:]),
            "survivors kept in place": len(kept),
            "bytes made": made * width * width * 4,
        }

    def step(params: Any, state: Any) -> Any:
        loss = lambda params: sum(jnp.sum(w @ w) for w in params.values())  # noqa: E731
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def retrace(state: Any) -> dict[str, float]:
        jax.clear_caches()
        begin = time.perf_counter()
        lowered = jax.jit(step).lower(params, state)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        return {"trace seconds": middle - begin, "compile seconds": end - middle}

    found["a retrace"] = retrace(before["thaw what was dropped"])
    return found


def bits(sizes: Sizes, deadline: float) -> dict[str, Any]:
    """Which optimizers move a bit of a frozen leaf, and how far trainable updates are from bare."""
    from tests.support import optimizers  # noqa: PLC0415  (of a checkout alone)

    params = optimizers.params()
    special = jnp.asarray([-0.0, 1e-42, jnp.nan, jnp.inf], jnp.float32)
    params["bottom"]["bias"] = special
    trainable, still = fo.partition(params, "bottom")
    batch = jax.random.normal(jax.random.key(1), (5, 6))

    def loss(params: Any) -> jax.Array:
        y = jnp.tanh(batch @ params["middle"]["kernel"] + params["middle"]["bias"])
        y = y + batch @ params["top"]["kernel"] * params["top"]["bias"]
        return (y**2).mean()

    def run(tx: Any, params: Any, loss: Callable[[Any], Any], name: str, ours: bool) -> Any:
        def step(params: Any, state: Any, poison: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params)
            if ours:
                grads["bottom"] = jax.tree.map(lambda x: x * 0 + poison, params["bottom"])
            extra = optimizers.extras(name, loss, value, grads)
            updates, state = tx.update(grads, state, params, **extra)
            params = fo.apply_updates(params, updates, frozen="bottom" if ours else fo.nothing)
            return params, state

        step = jax.jit(step)
        state = tx.init(params)
        for _ in range(5):
            params, state = step(params, state, jnp.float32(jnp.nan))
        return jax.device_get(params)

    def one(pair: Any) -> tuple[str, dict[str, Any]]:
        module, name = pair
        key = f"{module.__name__}.{name}"
        if time.perf_counter() > deadline:
            return key, {"left out": "no time was left"}
        try:
            bare_loss = lambda part: loss(fo.merge(part, still))  # noqa: E731
            bare = run(optimizers.build(*pair), trainable, bare_loss, name, ours=False)
            tx = fo.freezable(optimizers.build(*pair), "bottom")
            mine = run(tx, params, loss, name, ours=True)
        except Exception as error:  # noqa: BLE001  (what fails is a figure here)
            return key, {"error": f"{type(error).__name__}: {error}"[:300]}
        same = all(
            np.asarray(a).tobytes() == np.asarray(b).tobytes()
            for a, b in zip(*map(jax.tree.leaves, (mine["bottom"], params["bottom"])), strict=True)
        )
        pairs = zip(jax.tree.leaves(bare), jax.tree.leaves(fo.partition(mine, "bottom")[0]), strict=True)
        apart = max(ulps(np.asarray(a), np.asarray(b)) for a, b in pairs)
        return key, {"frozen bits kept": same, "ulps": apart}

    chosen = optimizers.complete()[: sizes.optimizers]
    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, chosen))


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """How many floats lie between two arrays at most."""
    ordered = [
        np.where(bits < 0, np.int64(-(2**31)) - bits, bits)
        for bits in (x.astype(np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models, anywhere")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case starts after these")
    args = parser.parse_args()
    begin = time.perf_counter()
    sizes, end = Sizes(args.tiny), begin + 60 * args.minutes
    found: dict[str, Any] = {"steps": {}}

    def keep(say: str) -> None:
        print(f"{time.perf_counter() - begin:6.1f} s  {say}", flush=True)
        if not args.tiny:
            results.write("gpu", found)

    def step_case(name: str, case: Case, ways: Ways, reserve: float) -> None:
        if time.perf_counter() + reserve > end:
            found["steps"][name] = {"left out": "no time was left"}
            keep(f"{name}: left out")
            return
        try:
            found["steps"][name] = stepped(case, ways, sizes.seconds)
        except Exception as error:  # noqa: BLE001  (the other cases go on)
            found["steps"][name] = {"error": f"{type(error).__name__}: {error}"[:600]}
            keep(f"{name}: {type(error).__name__}: {error}"[:1500])
            return
        of_ways = found["steps"][name]["ways"]
        lines = [
            f"    {way}: {x['milliseconds']:.2f} ms, {x['ratio']:.3f} ({x['low']:.3f} to "
            f"{x['high']:.3f}), peak {x['peak bytes'] / 1e9:.3f} GB, state "
            f"{x['state bytes'] / 1e9:.3f} GB, compiled in {x['compile seconds']:.1f} s"
            for way, x in of_ways.items()
        ]
        keep("\n".join([name, *lines]))

    # Most wanted first; what is left out at the end is the least.
    cases = list(decoders(sizes))
    reserve = 0.0 if args.tiny else 45.0
    for name, case in cases[:1]:
        step_case(name, case, WAYS, reserve)
        if jax.default_backend() == "gpu" and not args.tiny:
            counted = {way: wall.peak_apart(way, args.tiny) for way in (BY_HAND, DROP_IN)}
            found["peak bytes as the device counts them"] = counted
            keep(f"peaks as the device counts them: {counted}")
    found["edits"] = edits(sizes)
    keep(f"edits: {found['edits']}")
    for name, case in cases[1:2]:
        step_case(name, case, WAYS, reserve)
    found["bits"] = bits(sizes, min(end, time.perf_counter() + 75))
    keep(f"bits: {found['bits']}")
    rest = [(name, case, WAYS) for name, case in cases[2:]]
    for name, case, ways in [rest[0], *others(sizes), rest[2], rest[1], rest[3]]:
        step_case(name, case, ways, reserve)
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
