"""Whether optimizers keep the bits of frozen leaves, and how far trainable ones are from bare."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo
from tests.support import optimizers

FROZEN = "bottom"


def bits(count: int, deadline: float) -> dict[str, Any]:
    """For each of the first optimizers of optax, whether bits were kept, and the distance in ulps.

    One that fails says so. One that starts after the deadline, on `time.perf_counter`, is left out.
    """
    with ThreadPoolExecutor(8) as pool:
        names = [f"{module.__name__}.{name}" for module, name in optimizers.complete()[:count]]
        found = pool.map(lambda pair: of(*pair, deadline), optimizers.complete()[:count])
        return dict(zip(names, found, strict=True))


def of(module: ModuleType, name: str, deadline: float) -> dict[str, Any]:
    """Compares five steps of ours with five of the bare optimizer on the trainable leaves alone."""
    if time.perf_counter() > deadline:
        return {"left out": "no time was left"}
    params = optimizers.params()
    # A careless update changes the bits of these.
    params[FROZEN]["bias"] = jnp.asarray([-0.0, 1e-42, jnp.nan, jnp.inf], jnp.float32)
    trainable, still = fo.partition(params, FROZEN)
    try:
        bare = trained(
            optimizers.build(module, name),
            trainable,
            lambda trainable: loss(fo.merge(trainable, still)),
            name,
        )
        ours = fo.freezable(optimizers.build(module, name), FROZEN)
        mine = trained(ours, params, loss, name, frozen=FROZEN)
    except Exception as error:  # noqa: BLE001  (what fails is a figure here)
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    pairs = zip(*map(jax.tree.leaves, (mine[FROZEN], params[FROZEN])), strict=True)
    kept = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    pairs = zip(*map(jax.tree.leaves, (bare, fo.partition(mine, FROZEN)[0])), strict=True)
    return {"frozen bits kept": kept, "ulps": max(ulps(a, b) for a, b in pairs)}


def loss(params: Any) -> jax.Array:
    batch = jax.random.normal(jax.random.key(1), (5, 6))
    y = jnp.tanh(batch @ params["middle"]["kernel"] + params["middle"]["bias"])
    y = y + batch @ params["top"]["kernel"] * params["top"]["bias"]
    return (y**2).mean()


def trained(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    loss: Callable[[Any], jax.Array],
    name: str,
    frozen: Any = fo.nothing,
) -> Any:
    """The params after five steps, in which each gradient of a frozen leaf is NaN."""

    def step(params: Any, state: Any, poison: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        flags = fo.mask(frozen, params)
        grads = jax.tree.map(lambda x, flag: x * 0 + poison if flag else x, grads, flags)
        extra = optimizers.extras(name, loss, value, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return fo.apply_updates(params, updates, frozen=frozen), state

    step, state = jax.jit(step), tx.init(params)
    for _ in range(5):
        params, state = step(params, state, jnp.float32(jnp.nan))
    return jax.device_get(params)


def ulps(a: Any, b: Any) -> int:
    """How many floats lie between two arrays at most."""
    ordered = [
        np.where(bits < 0, np.int64(-(2**31)) - bits, bits)
        for bits in (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))
