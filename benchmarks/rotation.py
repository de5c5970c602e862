"""Layers that train in turns, against the same layers frozen by hand, and against full training.

Run with `python -m benchmarks.rotation`. It writes benchmarks/results/rotation.json, and takes
five minutes on two cores. `benchmarks.gpu` has the same ways on an accelerator.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import freeze_optax as fo
from benchmarks import results
from benchmarks.cases import ADAMW, Case
from benchmarks.run import Run, in_turns, quartiles
from benchmarks.steps import Parts, drop_in

IN_TURNS, BY_ROWS, FULL = "in turns", "the same layers, frozen by hand", "all layers trained"
FOREVER = 1 << 20
BLOCK = tuple[int, ...]


def _update(tx: Any) -> Any:
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return update


def rotating(case: Case, block: BLOCK) -> Parts:
    """Layers in turns; the block comes up at each turn."""
    params = case.params()
    order = [list(block)]
    tx = fo.rotating(case.inner, "layers", len(block), FOREVER, order=order, frozen=case.frozen)
    loss = partial(case.loss, scan=fo.scan)

    def grad(params: Any, state: Any, _: Any, batch: Any) -> Any:
        return fo.value_and_grad(loss, frozen=state)(params, batch)

    return Parts(params, tx.init(params), (), grad, _update(tx))


def by_rows(case: Case, block: BLOCK) -> Parts:
    """All other layers frozen, which is static."""
    params = case.params()
    length = len(jax.tree.leaves(params["layers"])[0])
    still = [i for i in range(length) if i not in block]
    frozen = [fo.rows("layers", still), *case.frozen]
    layers = fo.mask(frozen, params)["layers"]
    loss = partial(case.loss, scan=partial(fo.scan, frozen=layers))
    return drop_in(replace(case, loss=loss, frozen=frozen))


def full(case: Case) -> Parts:
    """All layers trained."""
    return drop_in(case)


def ways(block: BLOCK) -> dict[str, Any]:
    """What trains a block of layers, and what trains all; the first is the reference."""
    return {
        BY_ROWS: partial(by_rows, block=block),
        IN_TURNS: partial(rotating, block=block),
        FULL: full,
    }


def mlp(depth: int, width: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    scale = jnp.float32(width**-0.5)
    shapes = {"up": (depth, width, 4 * width), "down": (depth, 4 * width, width)}
    pairs = zip(keys, shapes.items(), strict=True)
    layers = {name: scale * jax.random.normal(key, shape) for key, (name, shape) in pairs}
    return {"layers": layers}


def mlp_loss(params: Any, batch: jax.Array, scan: Any = jax.lax.scan) -> jax.Array:
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    x, _ = scan(jax.checkpoint(step), batch, params["layers"])
    return (x**2).mean()


def mlp_case(depth: int, width: int, rows: int) -> Case:
    return Case(
        partial(mlp, depth, width), mlp_loss, partial(jnp.ones, (rows, width)), (), inner=ADAMW
    )


def pairs_of_layers(case: Case, blocks: Sequence[BLOCK], rounds: int) -> dict[str, Any]:
    """For each block, the times and bytes of each way; each pair of programs in turns."""
    found: dict[str, Any] = {}
    full_run = Run(case, full)
    for block in blocks:
        made = {name: Run(case, way) for name, way in ways(block).items() if name != FULL}
        made[FULL] = full_run
        taken = in_turns(made, rounds)
        found[",".join(map(str, block))] = {
            name: {
                **quartiles(taken[name], taken[BY_ROWS]),
                "ratio to full": quartiles(taken[name], taken[FULL])["ratio"],
                "peak bytes": run.peak_bytes,
                "state bytes": run.state_bytes,
            }
            for name, run in made.items()
        }
        print(block, {k: round(x["ratio"], 3) for k, x in found[",".join(map(str, block))].items()})
    return found


def throughput(width: int, depth: int, periods: int, every: int) -> dict[str, float]:
    """Seconds of a whole run with random pairs of layers, compilation included, two ways."""
    case = mlp_case(depth, width, 32)
    batch = case.batch()
    rng = np.random.default_rng(0)
    blocks = [sorted(rng.choice(depth, 2, replace=False).tolist()) for _ in range(periods)]

    def loop(tx: Any, loss: Any, edit: Any) -> float:
        begin = time.perf_counter()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any) -> Any:
            grads = fo.grad(loss(state, params), frozen=state)(params, batch)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state

        params = case.params()
        state = tx.init(params)
        for block in blocks:
            state = edit(state, params, block)
            for _ in range(every):
                params, state = step(params, state)
        jax.block_until_ready(params)
        return time.perf_counter() - begin

    def frozen(block: Sequence[int]) -> Any:
        return fo.rows("layers", [i for i in range(depth) if i not in block])

    def of_rows(state: Any, params: Any) -> Any:
        return partial(case.loss, scan=partial(fo.scan, frozen=fo.mask(state, params)["layers"]))

    def set_frozen(state: Any, params: Any, block: Sequence[int]) -> Any:
        return fo.set_frozen(state, params, frozen(block))

    turns = fo.rotating(ADAMW, "layers", 2, every, order=blocks)
    return {
        "one set_frozen a period": loop(
            fo.freezable(ADAMW, frozen(blocks[0])), of_rows, set_frozen
        ),
        IN_TURNS: loop(turns, lambda *_: partial(case.loss, scan=fo.scan), lambda s, *_: s),
    }


def summarized(found: dict[str, Any]) -> dict[str, float]:
    """The means over all blocks, and the worst."""
    of_turns = [x[IN_TURNS] for x in found.values()]
    peak = max(x[FULL]["peak bytes"] for x in found.values())
    return {
        "time to rows, mean": statistics.mean(x["ratio"] for x in of_turns),
        "time to rows, worst": max(x["ratio"] for x in of_turns),
        "time to full, mean": statistics.mean(x["ratio to full"] for x in of_turns),
        "peak to full, worst": max(x["peak bytes"] for x in of_turns) / peak,
        "peak to rows, mean": statistics.mean(
            x[IN_TURNS]["peak bytes"] / x[BY_ROWS]["peak bytes"] for x in found.values()
        ),
        "state to full": max(x["state bytes"] for x in of_turns)
        / max(x[FULL]["state bytes"] for x in found.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models; nothing is kept")
    args = parser.parse_args()
    depth, width, rows, rounds = (4, 32, 8, 4) if args.tiny else (12, 512, 32, 5)
    # Every eleventh of the 66 pairs of 12 layers.
    blocks = list(itertools.combinations(range(depth), 2))[:: 1 if args.tiny else 11]
    found = pairs_of_layers(mlp_case(depth, width, rows), blocks, rounds)
    runs = throughput(*((16, 4, 3, 2) if args.tiny else (128, 12, 60, 5)))
    of_all = {"machine": results.machine(), "short": summarized(found), "runs": runs}
    print(of_all["short"], runs)
    if not args.tiny:
        results.write(results.path("rotation"), {**of_all, "pairs": found})


if __name__ == "__main__":
    main()
