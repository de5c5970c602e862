"""What a step with frozen rows costs, by XLA's own analysis, against code split by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.compiling import OPTIMISED

pytestmark = pytest.mark.usefixtures("standard_promotion")

VOCABULARY, WIDTH, NEW = 32_000, 512, 100
ROW_BYTES = WIDTH * 4
INNER = optax.adamw(1e-3)
PARAMS = {
    "embed": jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32),
    "head": jax.ShapeDtypeStruct((WIDTH, 2), jnp.float32),
}
IDS = jax.ShapeDtypeStruct((8, 64), jnp.int32)
OLD = fo.rows("embed", slice(0, VOCABULARY - NEW))


def loss(params, ids):
    return ((params["embed"][ids].mean(1) @ params["head"]) ** 2).mean()


def costs(step, *args, donated=(0, 1)):
    compiled = jax.jit(step, donate_argnums=donated).lower(*args).compile(dict(OPTIMISED))
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": analysis["flops"],
        "bytes": analysis["bytes accessed"],
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
    }


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_of(tx, holes=False, loss=loss):
    def step(params, state, batch):
        grads = fo.grad(loss, frozen=state, holes=holes)(params, batch)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def full(params, state, ids):
    updates, state = INNER.update(jax.grad(loss)(params, ids), state, params)
    return optax.apply_updates(params, updates), state


def by_hand(params, state, ids):
    old, trainable = params

    def loss_of(trainable):
        embed = jnp.concatenate([old, trainable["embed"]])
        return loss({**trainable, "embed": embed}, ids)

    updates, state = INNER.update(jax.grad(loss_of)(trainable), state, trainable)
    return (old, optax.apply_updates(trainable, updates)), state


@functools.cache
def costs_by_hand():
    old = jax.ShapeDtypeStruct((VOCABULARY - NEW, WIDTH), jnp.float32)
    trainable = {**PARAMS, "embed": jax.ShapeDtypeStruct((NEW, WIDTH), jnp.float32)}
    state = jax.eval_shape(INNER.init, trainable)
    return costs(by_hand, (old, trainable), state, IDS), nbytes(state)


@functools.cache
def costs_of_full_training():
    return costs(full, PARAMS, jax.eval_shape(INNER.init, PARAMS), IDS)


@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
def test_new_tokens_cost_what_a_table_split_by_hand_costs(holes):
    tx = fo.freezable(INNER, OLD)
    state = jax.eval_shape(tx.init, PARAMS)
    expected, state_bytes = costs_by_hand()
    assert nbytes(state) == state_bytes
    got = costs(step_of(tx, holes), PARAMS, state, IDS)
    for name, value in got.items():
        assert value <= 1.02 * expected[name], name
    assert got["bytes"] < 0.3 * costs_of_full_training()["bytes"]
    assert got["flops"] < 0.01 * costs_of_full_training()["flops"]


@pytest.mark.parametrize(
    "frozen",
    [OLD, ~fo.rows("embed", [*range(50), *range(400, 450)])],
    ids=["one block", "two blocks"],
)
def test_beside_the_gradient_a_step_touches_no_more_than_the_rows_that_train(frozen):
    tx = fo.freezable(INNER, frozen)
    state = jax.eval_shape(tx.init, PARAMS)

    def apply(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    got = costs(apply, PARAMS, PARAMS, state, donated=(1, 2))
    # AdamW reads a gradient, two moments and a param, and writes the last three.
    touched = 7 * (NEW * ROW_BYTES + nbytes(PARAMS["head"]))
    # Of several blocks the pieces are put together as well; the whole table is 45 times as much.
    assert got["bytes"] < 3 * touched
    assert got["temporary"] < 3 * NEW * ROW_BYTES


def test_scattered_rows_cost_the_same_with_zeros_and_with_holes_in_the_gradient():
    frozen = ~fo.rows("embed", np.arange(0, VOCABULARY, VOCABULARY // NEW))
    tx = fo.freezable(INNER, frozen)
    state = jax.eval_shape(tx.init, PARAMS)
    zeros, holes = (costs(step_of(tx, h), PARAMS, state, IDS) for h in (False, True))
    # The update takes the rows that the gradient was made of, so the zeros are never made.
    assert zeros == holes
    assert holes["bytes"] < 0.6 * costs_of_full_training()["bytes"]


def looked_up(params, ids):
    return (jnp.take(params["embed"], ids, axis=0) ** 2).sum()


def scanned(params, ids):
    return jax.lax.scan(lambda c, i: (c + (params["embed"][i] ** 2).sum(), None), 0.0, ids)[0]


@pytest.mark.parametrize("scattered", [False, True], ids=["block", "single rows"])
@pytest.mark.parametrize(
    "loss", [looked_up, jax.checkpoint(looked_up), scanned], ids=["take", "remat", "scan"]
)
def test_lookups_in_a_table_of_which_few_rows_train_make_no_gradient_of_the_table(loss, scattered):
    table = {"embed": jax.ShapeDtypeStruct((8192, 64), jnp.float32)}
    rows = np.arange(0, 8192, 800) if scattered else np.arange(8184, 8192)
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32)

    def whole(params, ids):
        return jax.grad(loss)(params, ids)["embed"][rows]

    def ours(params, ids):
        return fo.grad(loss, ~fo.rows("embed", rows), holes=True)(params, ids)["embed"]

    got, expected = (costs(f, table, ids, donated=())["temporary"] for f in (ours, whole))
    assert expected >= nbytes(table)
    assert got <= 0.05 * expected


DEPTH, SIZE, BATCH = 12, 64, 8
STACK = {
    "layers": {
        "up": jax.ShapeDtypeStruct((DEPTH, SIZE, 4 * SIZE), jnp.float32),
        "down": jax.ShapeDtypeStruct((DEPTH, 4 * SIZE, SIZE), jnp.float32),
    },
    "head": jax.ShapeDtypeStruct((SIZE, 1), jnp.float32),
}
X = jax.ShapeDtypeStruct((BATCH, SIZE), jnp.float32)
LOWER = fo.rows("layers", slice(0, DEPTH - 1))


def layer(h, weights):
    return h + jnp.tanh(h @ weights["up"]) @ weights["down"], None


def test_the_state_of_one_layer_of_twelve_is_a_twelfth():
    state = jax.eval_shape(fo.freezable(INNER, LOWER).init, STACK)
    whole = jax.eval_shape(INNER.init, STACK)
    assert nbytes(state.inner[0].mu["layers"]) * DEPTH == nbytes(whole[0].mu["layers"])


def test_a_scan_that_knows_what_is_frozen_costs_what_two_stacks_cost():
    tx = fo.freezable(INNER, LOWER)

    def step(params, state, x):
        mask = fo.mask(state, params)["layers"]

        def loss(params):
            h, _ = fo.scan(layer, x, params["layers"], frozen=mask, unroll=True)
            return ((h @ params["head"]) ** 2).mean()

        updates, state = tx.update(fo.grad(loss, frozen=state)(params), state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def split(params, state, x):
        lower, trainable = params

        def loss(trainable):
            h, _ = jax.lax.scan(layer, x, lower, unroll=True)
            h, _ = jax.lax.scan(layer, h, trainable["layers"], unroll=True)
            return ((h @ trainable["head"]) ** 2).mean()

        updates, state = INNER.update(jax.grad(loss)(trainable), state, trainable)
        return (lower, optax.apply_updates(trainable, updates)), state

    def rows(count):
        cut = functools.partial(
            jax.tree.map, lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
        )
        return cut(STACK["layers"])

    trainable = {**STACK, "layers": rows(1)}
    args = (rows(DEPTH - 1), trainable), jax.eval_shape(INNER.init, trainable), X
    expected = costs(split, *args)
    got = costs(step, STACK, jax.eval_shape(tx.init, STACK), X)
    one_layer = nbytes(rows(1))
    assert got["flops"] <= 1.02 * expected["flops"]
    # The layer that trains is copied out of the stack.
    assert got["bytes"] <= 1.02 * (expected["bytes"] + 2 * one_layer)
    assert got["temporary"] <= expected["temporary"] + 2 * one_layer
