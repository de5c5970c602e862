"""Trains some leaves of the tree of any library: by a spec, and as a list with a bare optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import freeze_optax as fo

DECAYING_ADAM = optax.adamw(0.1, weight_decay=0.1)


def steps_with(
    frozen: Any, loss: Callable[[Any], Any], tree: Any, jit: Callable[..., Any] = jax.jit
) -> Any:
    """The tree after three steps of the decaying Adam with a spec of what is frozen.

    Args:
      frozen: The spec.
      loss: A function of the tree.
      tree: The params.
      jit: Compiles a step; another one for trees with leaves that are no arrays.
    """
    tx = fo.freezable(DECAYING_ADAM, frozen)

    @jit
    def step(tree: Any, state: Any) -> Any:
        updates, state = tx.update(fo.grad(loss, frozen=state)(tree), state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    state = tx.init(tree)
    for _ in range(3):
        tree, state = step(tree, state)
    return tree


def bare_steps(
    loss: Callable[[Any], Any],
    tree: Any,
    trains: Callable[[str], bool],
    steps: int = 3,
    tx: optax.GradientTransformation = DECAYING_ADAM,
) -> Any:
    """The tree after some steps; `trains` is asked with the path of each leaf that is an array."""
    entries, structure = jax.tree.flatten_with_path(tree)
    leaves = [leaf for _, leaf in entries]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in entries]
    live = [i for i, name in enumerate(names) if isinstance(leaves[i], jax.Array) and trains(name)]
    assert live

    def whole(values):
        put = dict(zip(live, values, strict=True))
        return jax.tree.unflatten(structure, [put.get(i, x) for i, x in enumerate(leaves)])

    @jax.jit
    def step(values, state):
        updates, state = tx.update(jax.grad(lambda v: loss(whole(v)))(values), state, values)
        return optax.apply_updates(values, updates), state

    values = [leaves[i] for i in live]
    state = tx.init(values)
    for _ in range(steps):
        values, state = step(values, state)
    return whole(values)


def assert_same_bits(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        if isinstance(theirs, jax.Array):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        else:
            assert ours is theirs
