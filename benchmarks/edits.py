"""What an edit of the frozen set takes on a device: time, bytes made, and a compile of the step."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache

import freeze_optax as fo

RETRACE, RETRACE_CACHED = "first step after an edit", "the same, from the persistent cache"
TX = fo.freezable(optax.adamw(1e-3))


def edits(depth: int, width: int) -> dict[str, Any]:
    """Edits of one half of `2 * depth` square matrices, and what a retrace takes after one."""
    keys = jax.random.split(jax.random.key(0), 2 * depth)
    params = {f"w{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}
    half = [f"w{i}" for i in range(depth)]
    start = jax.block_until_ready(TX.init(params))
    dropped = fo.freeze(start, params, half)
    parked = fo.freeze(start, params, half, keep_state=True)
    calls: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "freeze": (start, lambda state: fo.freeze(state, params, half)),
        "park": (start, lambda state: fo.freeze(state, params, half, keep_state=True)),
        "thaw what was dropped": (dropped, lambda state: fo.thaw(state, params, half)),
        "thaw what was parked": (parked, lambda state: fo.thaw(state, params, half)),
        "edit to the plan that stands": (
            start,
            lambda state: fo.set_frozen(state, params, fo.nothing),
        ),
    }
    found: dict[str, Any] = {"params edited": depth * width * width}
    found |= {name: edited(*call) for name, call in calls.items()}
    return found | retraced(params, dropped)


def edited(before: Any, call: Callable[[Any], Any]) -> dict[str, Any]:
    """The median time of an edit, and which arrays it made or left where they were."""

    def buffers(state: Any) -> dict[int, int]:
        matrices = (x for x in jax.tree.leaves(state) if x.ndim == 2)
        return {x.unsafe_buffer_pointer(): x.nbytes for x in matrices}

    taken = []
    for _ in range(6):
        begin = time.perf_counter()
        after = jax.block_until_ready(call(before))
        taken.append(time.perf_counter() - begin)
    kept, made = buffers(before), buffers(after)
    return {
        "milliseconds": 1e3 * statistics.median(taken[1:]),
        "survivors kept in place": len(kept.keys() & made.keys()),
        "bytes made": sum(size for place, size in made.items() if place not in kept),
    }


def retraced(params: Any, state: Any) -> dict[str, dict[str, float]]:
    """What the first step after a thaw takes, compiled anew and found in the persistent cache."""
    state = fo.thaw(state, params, "w0")

    def step(params: Any, state: Any) -> Any:
        loss = lambda params: sum((w @ w).sum() for w in params.values())  # noqa: E731
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = TX.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def once(cached: bool) -> dict[str, float]:
        # JAX looks at this option once; the reset makes it look again.
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
        jax.clear_caches()
        begin = time.perf_counter()
        lowered = jax.jit(step).lower(params, state)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        return {"trace seconds": middle - begin, "compile seconds": end - middle}

    try:
        anew = once(cached=False)
        once(cached=True)  # fills the cache
        return {RETRACE: anew, RETRACE_CACHED: once(cached=True)}
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
