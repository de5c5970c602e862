"""How XLA brings layers from host memory: out of a stack, or as whole arrays.

Each way keeps what every layer returns, as the forward pass of training does.

`python -m benchmarks.host_copies` prints, for each way, the milliseconds of a call and, on a GPU,
what a profile shows on each of its streams: copies between memories (`MemcpyH2D`) on a stream of
their own, or a kernel on the stream that computes. `--tiny` tries it on a CPU.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, PRODUCTS = 16, 4


def _to_device(x: Any) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _layer_at(stack: Any, i: Any) -> jax.Array:
    return _to_device(jax.lax.dynamic_index_in_dim(stack, i, keepdims=False))


def _apply(x: Any, kernel: Any) -> jax.Array:
    for _ in range(PRODUCTS):
        x = jnp.tanh(x @ kernel)
    return x


def _keeping(bring: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def step(x: Any, kernel: Any) -> Any:
        x = _apply(x, bring(kernel))
        return x, x

    return step


def on_the_device(stack: Any, x: Any) -> Any:
    """The layers are on the device already."""
    return jax.lax.scan(_keeping(lambda kernel: kernel), x, stack)


def ahead_and_clamped(stack: Any, x: Any) -> Any:
    """Fetches the next layer in each step, and in the last step the last one again."""

    def step(state: Any, _: Any) -> Any:
        i, x, kernel = state
        following = _layer_at(stack, jnp.minimum(i + 1, LAYERS - 1))
        x = _apply(x, kernel)
        return (i + 1, x, following), x

    first = jnp.zeros((), jnp.int32), x, _layer_at(stack, 0)
    (_, x, _), kept = jax.lax.scan(step, first, None, LAYERS)
    return x, kept


def ahead_and_linear(stack: Any, x: Any, together: bool = False) -> Any:
    """Fetches the next layer in each step, and applies the last one after the loop.

    The index is a linear function of the count of the loop, which XLA asks for to copy a slice
    without a kernel (`DynamicSliceAnnotator` in its sources).
    """

    def step(state: Any, _: Any) -> Any:
        i, x, kernel = state
        following = _layer_at(stack, i + 1)
        x = _apply(x, kernel)
        if together:
            x, following = jax.lax.optimization_barrier((x, following))
        return (i + 1, x, following), x

    first = jnp.zeros((), jnp.int32), x, _layer_at(stack, 0)
    (_, x, kernel), kept = jax.lax.scan(step, first, None, LAYERS - 1)
    return _apply(x, kernel), kept


def ahead_and_together(stack: Any, x: Any) -> Any:
    """As `ahead_and_linear`, and has the result and the next layer at the same time.

    Or XLA fetches the next layer into the place of this one, when this one was applied. It is what
    `fo.scan` does.
    """
    return ahead_and_linear(stack, x, together=True)


def as_scanned(stack: Any, x: Any) -> Any:
    """Leaves the slice to `lax.scan`, and copies it to the device in the body."""
    return jax.lax.scan(_keeping(_to_device), x, stack)


def whole_arrays(kernels: Sequence[Any], x: Any) -> Any:
    """Copies each of several arrays, in a loop of Python."""
    kept: list[Any] = []
    for kernel in kernels:
        x = _apply(x, _to_device(kernel))
        kept.append(x)
    return x, kept


def milliseconds(call: Callable[[], Any]) -> float:
    """The median time of a call, the first two left out."""
    taken: list[float] = []
    for _ in range(8):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken[2:])


def streams(call: Callable[[], Any]) -> list[str]:
    """What a profile of a call shows on each stream of a GPU; empty elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).glob("**/*.xplane.pb")
        planes = [
            x for x in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU" in x.name
        ]
        return [text for plane in planes for line in plane.lines if (text := _described(line))]


def _described(line: Any) -> str:
    totals: dict[str, list[float]] = {}
    for event in line.events:
        totals.setdefault(event.name.split(".")[0][:32], []).append(event.duration_ns / 1e6)
    largest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:4]
    clauses = [f"{name} {len(times)} times, {sum(times):.2f} ms" for name, times in largest]
    return f"{line.name}: {'; '.join(clauses)}" if clauses else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    width, tokens = (32, 16) if parser.parse_args().tiny else (4_096, 8_192)
    device = jax.devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    on_host = on_device.with_memory_kind("pinned_host")
    numbers = np.random.default_rng(0).normal(size=(LAYERS, width, width), scale=width**-0.5)
    stack = jax.device_put(numbers.astype(np.float32), on_host)
    kernels = [jax.device_put(x, on_host) for x in np.asarray(stack)]
    x = jnp.ones((tokens, width), jnp.float32)
    print(f"{device.device_kind}, JAX {jax.__version__}, {LAYERS} kernels of {kernels[0].nbytes:,}")
    ways: dict[Callable[..., Any], Any] = {
        on_the_device: jax.device_put(stack, on_device),
        ahead_and_clamped: stack,
        ahead_and_linear: stack,
        ahead_and_together: stack,
        as_scanned: stack,
        whole_arrays: kernels,
    }
    for way, weights in ways.items():
        compiled = jax.jit(way).lower(weights, x).compile()
        call = functools.partial(compiled, weights, x)
        print(f"{way.__name__}: {milliseconds(call):.2f} ms a call", flush=True)
        for text in streams(call):
            print(f"    {text}", flush=True)


if __name__ == "__main__":
    main()
