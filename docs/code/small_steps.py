"""Steps with the small model, and what they moved.

The steps are not compiled: a model of this size runs faster without. Yours goes under `jax.jit`.
"""

import jax
import numpy as np
import optax
from small_model import batch, loss_fn

import freeze_optax as fo


def train(tx, params, state, steps=1):
    """Trains with `tx`, a `freezable`. Its state says what is frozen."""
    for _ in range(steps):
        grads = fo.grad(loss_fn, frozen=state)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params, state


def plain_train(tx, params, state, steps=1, loss_fn=loss_fn):
    """Trains with any transformation, and with JAX and Optax alone."""
    for _ in range(steps):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def paths(tree):
    """The paths of the leaves that are true."""
    leaves = jax.tree.leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if x]


def moved(before, after):
    """The paths of the leaves that are not what they were."""
    return paths(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after))


def same_bits(a, b):
    """Whether two trees are equal, to the bit."""
    equal = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(equal))
