"""What a step costs of which only some rows train: new tokens, and the last of stacked layers.

Against full training and against the arrays split by hand. Bytes and temporary memory are XLA's
own figures for the compiled step, and so are FLOPs where there is no loop; times are medians,
measured in turns within this run, as ratios to the split by hand. Run with `python
benchmarks/rows.py`.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import freeze_optax as fo

INNER = optax.adamw(1e-3)
VOCABULARIES, WIDTH, NEW = (32_000, 128 * 1024), 512, 100
DEPTH, SIZE, BATCH = 12, 256, 64

Loss = Callable[[Any], Any]
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def plain_step(loss: Loss) -> Callable[..., Any]:
    """A step on all that is passed."""

    def step(params: Any, state: Any) -> Any:
        updates, state = INNER.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def split_step(loss: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A step on the second of a pair, split by hand."""

    def step(pair: Any, state: Any) -> Any:
        still, params = pair
        grads = jax.grad(lambda params: loss(still, params))(params)
        updates, state = INNER.update(grads, state, params)
        return (still, optax.apply_updates(params, updates)), state

    return step


def our_step(tx: optax.GradientTransformation, loss: Callable[[Any, Any], Any]) -> Any:
    """A step with the frozen rows left in their arrays; the loss is also given the state."""

    def step(params: Any, state: Any) -> Any:
        grads = fo.grad(lambda params: loss(params, state), frozen=state)(params)
        updates, state_ = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state_), state_

    return step


def new_tokens(vocabulary: int) -> dict[str, Program]:
    """The last 100 rows of an embedding of so many tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (vocabulary, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, 2)),
    }
    ids = jax.random.randint(keys[2], (8, 64), 0, vocabulary)

    def loss(params: Any, _: Any = None) -> Any:
        return ((params["embed"][ids].mean(1) @ params["head"]) ** 2).mean()

    def split_loss(old: Any, params: Any) -> Any:
        return loss({**params, "embed": jnp.concatenate([old, params["embed"]])})

    tx = fo.freezable(INNER, fo.rows("embed", slice(0, vocabulary - NEW)))
    trainable = {**params, "embed": params["embed"][-NEW:]}
    pair = params["embed"][:-NEW], trainable
    return {
        "full training": (plain_step(loss), (params, INNER.init(params))),
        "fo.rows": (our_step(tx, loss), (params, tx.init(params))),
        "split by hand": (split_step(split_loss), (pair, INNER.init(trainable))),
    }


def last_layer() -> dict[str, Program]:
    """The last of twelve stacked layers."""
    keys = jax.random.split(jax.random.key(0), 4)
    layers = {
        "up": jax.random.normal(keys[0], (DEPTH, SIZE, 4 * SIZE)) / SIZE**0.5,
        "down": jax.random.normal(keys[1], (DEPTH, 4 * SIZE, SIZE)) / SIZE,
    }
    params = {"layers": layers, "head": jax.random.normal(keys[2], (SIZE, 1))}
    x = jax.random.normal(keys[3], (BATCH, SIZE))

    def layer(h: Any, weights: Any) -> Any:
        return h + jnp.tanh(h @ weights["up"]) @ weights["down"], None

    def loss_of(h: Any, params: Any) -> Any:
        return ((h @ params["head"]) ** 2).mean()

    def loss(params: Any, _: Any = None) -> Any:
        h, _ = jax.lax.scan(layer, x, params["layers"])
        return loss_of(h, params)

    def loss_with_scan(params: Any, state: Any) -> Any:
        frozen = fo.mask(state, params)["layers"]
        h, _ = fo.scan(layer, x, params["layers"], frozen=frozen)
        return loss_of(h, params)

    def split_loss(lower: Any, params: Any) -> Any:
        h, _ = jax.lax.scan(layer, x, lower)
        h, _ = jax.lax.scan(layer, h, params["layers"])
        return loss_of(h, params)

    tx = fo.freezable(INNER, fo.rows("layers", slice(0, DEPTH - 1)))
    trainable = {**params, "layers": jax.tree.map(lambda x: x[-1:], layers)}
    pair = jax.tree.map(lambda x: x[:-1], layers), trainable
    return {
        "full training": (plain_step(loss), (params, INNER.init(params))),
        "fo.rows": (our_step(tx, loss), (params, tx.init(params))),
        "fo.rows, fo.scan": (our_step(tx, loss_with_scan), (params, tx.init(params))),
        "split by hand": (split_step(split_loss), (pair, INNER.init(trainable))),
    }


def compiled(program: Program) -> Any:
    step, args = program
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def times(programs: dict[str, Program], repeats: int = 30) -> dict[str, float]:
    """The median seconds of a step of each, all run in turns."""
    runs = {name: compiled(program) for name, program in programs.items()}
    args = {name: jax.tree.map(jnp.copy, args) for name, (_, args) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 3):
        for name, run in runs.items():
            begin = time.perf_counter()
            args[name] = jax.block_until_ready(run(*args[name]))
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(measured[3:]) for name, measured in seconds.items()}


def product_flops(program: Program) -> float:
    """The FLOPs of all matrix products, a loop counted by its length, where XLA counts it once."""

    def count(jaxpr: Any) -> float:
        return sum(of_equation(equation) for equation in jaxpr.eqns)

    def of_equation(equation: Any) -> float:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            (left, _), (out,) = equation.invars, equation.outvars
            return 2 * out.aval.size * math.prod(left.aval.shape[i] for i in contracted)
        inner = [p for p in equation.params.values() if hasattr(p, "jaxpr")]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        return times * sum(count(getattr(p.jaxpr, "jaxpr", p.jaxpr)) for p in inner)

    step, args = program
    return count(jax.make_jaxpr(step)(*args).jaxpr)


def table(title: str, programs: dict[str, Program], loops: bool) -> Table:
    """A row for each program."""
    seconds = times(programs)
    names = ["state", "FLOPs of products" if loops else "FLOPs", "bytes accessed", "temporary"]
    shown = [name for name in names if not (loops and name == "bytes accessed")]
    rows = Table("", *shown, "time", title=title)
    for name, program in programs.items():
        run = compiled(program)
        analysis, memory = run.cost_analysis(), run.memory_analysis()
        cells = {
            "state": f"{sum(x.nbytes for x in jax.tree.leaves(program[1][1])) / 1e6:,.2f} MB",
            "FLOPs": f"{analysis['flops'] / 1e6:,.2f} M",
            "FLOPs of products": f"{product_flops(program) / 1e6:,.0f} M",
            "bytes accessed": f"{analysis['bytes accessed'] / 1e6:,.2f} MB",
            "temporary": f"{memory.temp_size_in_bytes / 1e6:,.2f} MB",
        }
        ratio = seconds[name] / seconds["split by hand"]
        rows.add_row(name, *(cells[column] for column in shown), f"{ratio:.2f}")
    return rows


def main() -> None:
    device = jax.devices()[0]
    console = Console(width=110)
    console.print(f"JAX {jax.__version__}, optax {optax.__version__}, {device.device_kind}")
    for vocabulary in VOCABULARIES:
        tokens = f"{NEW} of {vocabulary:,} tokens, width {WIDTH}"
        console.print(table(tokens, new_tokens(vocabulary), loops=False))
    layers = f"1 of {DEPTH} stacked layers, width {SIZE}"
    console.print(table(layers, last_layer(), loops=True))


if __name__ == "__main__":
    main()
