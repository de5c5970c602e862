"""Freezing and thawing mid-training, against numbers from other systems and bare optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params() -> dict[str, Any]:
    return {"a": jnp.ones(()), "b": jnp.ones(2), "c": jnp.ones(3)}


def grads_of(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def run(tx: Any, state: Any, tree: Any, *values: float) -> tuple[Any, Any]:
    """Steps with these gradients, the same at every leaf."""
    for value in values:
        updates, state = jax.jit(tx.update)(grads_of(tree, value), state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree, state


def alone(inner: Any, leaf: Any, *values: float) -> Any:
    """What the bare optimizer makes of one leaf."""
    state = inner.init(leaf)
    for value in values:
        updates, state = jax.jit(inner.update)(jnp.full_like(leaf, value), state, leaf)
        leaf = optax.apply_updates(leaf, updates)
    return leaf


NAN = float("nan")


@pytest.mark.parametrize(
    ("inner", "before", "while_parked", "after", "expected"),
    [
        pytest.param(optax.sgd(0.1, momentum=0.9), [1], [1] * 3, [1], 0.71, id="momentum"),
        pytest.param(optax.adam(0.1), [1], [1] * 8, [0.5], 0.806782, id="Adam"),
        pytest.param(
            optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
            [1],
            [100],
            [3],
            0.8,
            id="accumulation",
        ),
        pytest.param(optax.adam(0.1), [1], [NAN] * 8, [0.5], 0.806782, id="NaN while parked"),
    ],
)
def test_a_parked_leaf_goes_on_where_it_stopped_as_in_pytorch_and_optimisers_jl(
    inner, before, while_parked, after, expected
):
    tx, tree = fo.freezable(inner), params()
    tree, state = run(tx, tx.init(tree), tree, *before)
    stopped = tree["a"]
    state = fo.freeze(state, tree, "a", keep_state=True)
    for value in while_parked:
        updates, state = tx.update({**grads_of(tree, 1.0), "a": jnp.array(value)}, state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    assert tree["a"] is stopped
    tree, state = run(tx, fo.thaw(state, tree, "a"), tree, *after)
    np.testing.assert_allclose(tree["a"], expected, rtol=5e-6)


def test_a_leaf_thawed_after_a_thousand_steps_starts_like_a_fresh_adam():
    tx, tree = fo.freezable(optax.adam(0.1), "a"), params()
    state = tx.init(tree)
    counted = optax.tree_utils.tree_set(state, count=jnp.array(1000, jnp.int32))
    state = fo.thaw(counted, tree, "a")
    new, _ = run(tx, state, tree, 3.0)
    np.testing.assert_allclose(tree["a"] - new["a"], 0.1, rtol=1e-5)
    # With the count of the others, as any leaf that joins a shared one: 0.1 * 2.5.
    np.testing.assert_allclose(tree["b"] - new["b"], 0.2515, rtol=1e-3)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(optax.adamw(0.1, weight_decay=0.1), id="adamw"),
        pytest.param(optax.adafactor(0.1, min_dim_size_to_factor=2), id="adafactor"),
        pytest.param(optax.contrib.schedule_free_sgd(0.1), id="schedule_free"),
        pytest.param(optax.rprop(0.1), id="rprop"),
        pytest.param(optax.sgd(0.1), id="stateless"),
    ],
)
def test_a_thawed_leaf_follows_a_fresh_optimizer_and_survivors_theirs(inner, jit):
    tx, tree = fo.freezable(inner, "c"), params()
    tree, state = run(tx, tx.init(tree), tree, 0.3, -0.2)
    thaw = jax.jit(fo.thaw, static_argnums=2) if jit else fo.thaw
    state = thaw(state, tree, "c")
    tree, _ = run(tx, state, tree, 0.5, 0.1)
    fo.testing.assert_frozen(alone(inner, jnp.ones(3), 0.5, 0.1), tree["c"], True)
    for name in ("a", "b"):
        expected = alone(inner, params()[name], 0.3, -0.2, 0.5, 0.1)
        fo.testing.assert_frozen(expected, tree[name], True)
