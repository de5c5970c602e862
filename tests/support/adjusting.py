"""What the tests of `adjust` share: params, an optimizer with factors, and a step that counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

HOLE = optax.MaskedNode()
NAMES = ["a", "b", "c", "d"]


def make_params() -> Any:
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(size=(8, 2)), jnp.float32) for name in NAMES}


PARAMS = make_params()
INNER = optax.chain(optax.adam(0.1), fo.rates({"a": 0.5, "b": 0.25}))


def factors(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "factors")


def as_numbers(state: Any) -> Any:
    return jax.tree.map(lambda x: x.tolist(), factors(state))


def counted_step(tx: Any, donated: bool = True) -> tuple[Any, list[int]]:
    """A jitted step, and a list that grows with each trace of it."""
    traces: list[int] = []

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donated else ())
    def step(params: Any, state: Any, grads: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step, traces
