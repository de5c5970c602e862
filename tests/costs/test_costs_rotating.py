"""What layers that take turns cost, by XLA's own analysis: k of n in state, gradient and memory."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from tests.support.compiling import OPTIMISED

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, COUNT, WIDTH, BATCH = 12, 2, 64, 4
INNER = optax.adamw(1e-3)
PARAMS = {
    "embed": jax.ShapeDtypeStruct((32, WIDTH), jnp.float32),
    "layers": {
        "b": jax.ShapeDtypeStruct((DEPTH, WIDTH), jnp.float32),
        "w": jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32),
    },
}
X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
TX = fo.rotating(INNER, "layers", COUNT, 5, key=jax.random.key(0), frozen="embed")
STATE = jax.eval_shape(TX.init, PARAMS)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


STACK = nbytes(PARAMS["layers"])
BLOCK = STACK * COUNT // DEPTH


@jax.checkpoint
def layer(h, weights):
    return h + jnp.tanh(h @ weights["w"] + weights["b"]), None


def loss(params, x, scan=fo.scan):
    h, _ = scan(layer, x @ params["embed"].T @ params["embed"], params["layers"])
    return (h**2).mean()


def memory(fun, *args, donated=()):
    compiled = jax.jit(fun, donate_argnums=donated).lower(*args).compile(dict(OPTIMISED))
    return compiled.memory_analysis()


def peak(fun, *args):
    found = memory(fun, *args, donated=(0, 1))
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def test_the_state_is_that_of_the_layers_that_train_to_the_byte():
    cut = lambda x: jax.ShapeDtypeStruct((COUNT, *x.shape[1:]), x.dtype)  # noqa: E731
    block = jax.eval_shape(INNER.init, jax.tree.map(cut, PARAMS["layers"]))
    assert nbytes(STATE.state) == nbytes(block)
    for name in ("mu", "nu"):
        assert nbytes(optax.tree_utils.tree_get(STATE, name)) == BLOCK
    # What rotation itself keeps: the step, the layers and the key.
    assert nbytes(STATE) - nbytes(STATE.state) == 4 + 4 * COUNT + STATE.key.dtype.itemsize


def test_a_gradient_is_that_of_the_layers_that_train_to_the_byte():
    def gradient(params, state, x):
        return fo.grad(loss, frozen=state, holes=True)(params, x)

    found = memory(gradient, PARAMS, STATE, X)
    # XLA counts a pointer to each of the two arrays.
    assert found.output_size_in_bytes == BLOCK + 2 * 8
    # The carry of each layer, and a few arrays of one layer: no second gradient, and no weights.
    carries = DEPTH * BATCH * WIDTH * 4
    assert found.temp_size_in_bytes <= carries + 1.5 * STACK / DEPTH


def test_a_step_needs_less_than_half_of_the_memory_of_full_training():
    def step(params, state, x):
        grads = fo.grad(loss, frozen=state)(params, x)
        updates, state = TX.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def full(params, state, x):
        grads = jax.grad(functools.partial(loss, scan=jax.lax.scan))(params, x)
        updates, state = INNER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = peak(step, PARAMS, STATE, X)
    # The whole gradient and the whole update are never made.
    assert found < nbytes(PARAMS) + nbytes(STATE) + 0.6 * STACK
    assert found <= 0.45 * peak(full, PARAMS, jax.eval_shape(INNER.init, PARAMS), X)
