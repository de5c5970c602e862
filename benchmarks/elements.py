"""What a step costs that trains one per cent of the elements of a leaf, against all of them.

Bytes and temporary memory are XLA's own figures for the compiled step; times are medians, measured
in turns within this run, as ratios to the update of the whole leaf. Run with `python -m
benchmarks.elements [width]`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo
from benchmarks import results

INNER = optax.adamw(1e-3)
SHARE, BATCH = 0.01, 8
WHOLE = "whole leaf"

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def loss(params: Any, x: Any) -> Any:
    return (jnp.tanh(x @ params["w"]) ** 2).mean()


def updates_alone(tx: optax.GradientTransformation, params: Any) -> Program:
    """An update from a gradient that is there, of the whole leaf or of its elements alone."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=_frozen(state)), state

    state = tx.init(params)
    compact = _frozen(state) is not fo.nothing
    grads = fo.partition(params, state)[0] if compact else params
    return step, (params, state, jax.tree.map(jnp.copy, grads))


def whole_step(tx: optax.GradientTransformation, params: Any, x: Any) -> Program:
    """A step with its gradient."""

    def step(params: Any, state: Any, x: Any) -> Any:
        grads = fo.grad(loss, frozen=_frozen(state))(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=_frozen(state)), state

    return step, (params, tx.init(params), x)


def _frozen(state: Any) -> Any:
    return state if isinstance(state, fo.FreezeState) else fo.nothing


def programs(width: int) -> dict[str, dict[str, Program]]:
    params = {"w": jax.random.normal(jax.random.key(0), (width, width)) / width**0.5}
    x = jax.random.normal(jax.random.key(1), (BATCH, width))
    mask = np.random.default_rng(0).random((width, width)) < SHARE
    tx = fo.freezable(INNER, ~fo.elements("w", mask))
    return {
        "update": {
            WHOLE: updates_alone(INNER, params),
            "fo.elements": updates_alone(tx, params),
        },
        "gradient and update": {
            WHOLE: whole_step(INNER, params, x),
            "fo.elements": whole_step(tx, params, x),
        },
    }


def compiled(program: Program) -> Any:
    step, args = program
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def measured(of_case: dict[str, Program], repeats: int = 30) -> dict[str, dict[str, float]]:
    """For each program the median seconds of a step, all run in turns, and its bytes."""
    runs = {name: compiled(program) for name, program in of_case.items()}
    args = {name: jax.tree.map(jnp.copy, args) for name, (_, args) in of_case.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 3):
        for name, run in runs.items():
            begin = time.perf_counter()
            carried = jax.block_until_ready(run(*args[name]))
            seconds[name].append(time.perf_counter() - begin)
            args[name] = (*carried, *args[name][2:])
    found: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        analysis, memory = run.cost_analysis(), run.memory_analysis()
        params, state, *_ = of_case[name][1]
        ratios = [a / b for a, b in zip(seconds[name][3:], seconds[WHOLE][3:], strict=True)]
        found[name] = {
            "ratio": statistics.median(ratios),
            "milliseconds": 1e3 * statistics.median(seconds[name][3:]),
            "state bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "index bytes": fo.summary(params, _frozen(state)).index_bytes,
            "bytes accessed": analysis["bytes accessed"],
            "temporary bytes": memory.temp_size_in_bytes,
        }
    return found


def main() -> None:
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 4_096
    cases = {name: measured(of_case) for name, of_case in programs(width).items()}
    results.write("elements", {"width": width, "share": SHARE, "cases": cases})
    for name, of_case in cases.items():
        rows = [
            [
                way,
                f"{x['milliseconds']:.2f}",
                f"{x['ratio']:.2f}",
                *(f"{x[key] / 1e6:.2f}" for key in list(x)[2:]),
            ]
            for way, x in of_case.items()
        ]
        columns = ["", "ms", "ratio", "state, MB", "index, MB", "accessed, MB", "temporary, MB"]
        title = f"{name}: {SHARE:.0%} of ({width:,}, {width:,})"
        results.show(results.table(title, columns, rows))
    results.show(results.described(results.machine()))


if __name__ == "__main__":
    main()
