"""Selectors where optax takes a mask or a label function."""

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from freeze_optax._tree.holes import HOLE

encoder, biases = fo.path("encoder"), fo.path("**/bias")


def tree_of(*four):
    """From the values at encoder/bias, encoder/kernel, head/bias, head/kernel."""
    return {
        "encoder": {"bias": four[0], "kernel": four[1]},
        "head": {"bias": four[2], "kernel": four[3]},
    }


PARAMS = tree_of(*map(jnp.float32, (1.0, 2.0, 3.0, 4.0)))
ONES = tree_of(*[jnp.float32(1.0)] * 4)


def first_update(tx, params, grads):
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.masked(optax.scale(10.0), ~encoder), tree_of(1.0, 1.0, 10.0, 10.0)),
        (optax.masked(optax.scale(10.0), fo.layers("*")[0]), tree_of(10.0, 10.0, 1.0, 1.0)),
        (optax.add_decayed_weights(0.5, mask=~biases), tree_of(1.0, 2.0, 1.0, 3.0)),
        (
            optax.partition(
                {"trainable": optax.sgd(0.5), "frozen": optax.set_to_zero()}, encoder.labels
            ),
            tree_of(0.0, 0.0, -0.5, -0.5),
        ),
    ],
    ids=["masked", "masked by layers", "add_decayed_weights", "partition"],
)
def test_a_selector_goes_straight_into_optax(tx, expected, jitted):
    update = jax.jit(first_update, static_argnums=0) if jitted else first_update
    assert update(tx, PARAMS, ONES) == expected


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (fo.nothing, tree_of(3.0, 6.0, 2.0, 3.0)),
        ("encoder", tree_of(0.0, 0.0, 2.0, 3.0)),
        ("**/kernel", tree_of(3.0, 0.0, 2.0, 0.0)),
    ],
)
def test_a_selector_inside_freezable_may_match_frozen_leaves_only(frozen, expected, jitted):
    decay = optax.add_decayed_weights(0.5, mask=encoder)
    branches = {"trainable": optax.scale(3.0), "frozen": optax.scale(2.0)}
    tx = fo.freezable(optax.chain(decay, optax.partition(branches, biases.labels)), frozen)
    update = jax.jit(first_update, static_argnums=0) if jitted else first_update
    assert update(tx, PARAMS, ONES) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, encoder),
        lambda tx: optax.partition({"frozen": tx, "trainable": optax.sgd(0.1)}, encoder.labels),
        lambda tx: fo.freezable(tx, ~encoder),
        lambda tx: fo.freezable(optax.masked(tx, encoder), "head/bias"),
        lambda tx: optax.chain(
            optax.add_decayed_weights(0.1, mask=encoder), fo.freezable(tx, "head")
        ),
    ],
    ids=["masked", "partition", "freezable", "masked in freezable", "chain"],
)
def test_tree_map_params_goes_through_selectors(wrap):
    tx = wrap(optax.trace(0.9))
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda x: x + 7.0, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert optax.tree_utils.tree_get(mapped, "trace") == tree_of(7.0, 7.0, HOLE, HOLE)
