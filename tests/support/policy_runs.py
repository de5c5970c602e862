"""Params whose gradients have given norms, and runs on them that a policy decides on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import freeze_optax as fo

NAMES = ("embed", "layer_0", "layer_1", "layer_2", "head")
ORDER = list(NAMES[:-1])
SIZES = {name: 2.0**i for i, name in enumerate(NAMES)}
"""The norm of each leaf below a name."""
PARAMS = {
    name: {"kernel": jnp.full((2, 2), size / 2), "bias": jnp.full(4, size / 2)}
    for name, size in SIZES.items()
} | {"head": jnp.full(4, SIZES["head"] / 2)}
SGD = optax.sgd(0.01)
MEASURED = fo.freezable(fo.measured(SGD))


def grads_of_norms(norms: dict[str, Sequence[float]]) -> Any:
    """Gradients like `PARAMS`, whose leaves have these norms: the kernel and the bias."""

    def leaf(x: jax.Array, norm: float) -> jax.Array:
        return jnp.full_like(x, norm / x.size**0.5)

    def of(name: str) -> Any:
        if name == "head":
            return leaf(PARAMS[name], norms[name][0])
        pairs = zip(("kernel", "bias"), norms[name], strict=True)
        return {key: leaf(PARAMS[name][key], norm) for key, norm in pairs}

    return {name: of(name) for name in NAMES}


def frozen_names(state: Any) -> set[str]:
    mask = fo.mask(state, PARAMS)
    found = {name for name in NAMES if all(jax.tree.leaves(mask[name]))}
    assert found == {name for name in NAMES if any(jax.tree.leaves(mask[name]))}
    return found


def steps_of(policy: fo.Convergence, tx: Any, count: int, norms: Any, **options: Any) -> Any:
    """Runs `count` steps with gradients of the norms of each step; returns states and decisions."""
    state, update, decisions = tx.init(PARAMS), jax.jit(tx.update), []
    for step in range(count):
        decisions.append(policy.at(step, state, PARAMS))
        state = fo.set_frozen(state, PARAMS, decisions[-1], **options)
        _, state = update(grads_of_norms(norms(step)), state, PARAMS)
    return state, decisions


def steady(moving: Sequence[str] = ("head",)) -> dict[str, list[float]]:
    """Norms that are twice the size for these names, and a fifth of it for the others."""
    return {name: 2 * [size * (2.0 if name in moving else 0.2)] for name, size in SIZES.items()}
