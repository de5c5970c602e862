"""Two `freezable`s in one chain: an error where nothing trains, and no false alarm."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._transform import chained

PARAMS = {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 2))}
GRADS = jax.tree.map(lambda x: 2 * x, PARAMS)


def _sgd(frozen):
    return fo.freezable(optax.sgd(0.5), frozen)


def _scheduled(frozen):
    return fo.scheduled(optax.sgd(0.5), fo.Phases({0: frozen}))


NOTHING_TRAINS = {
    "two": lambda: optax.chain(_sgd("x"), _sgd("y")),
    "three": lambda: optax.chain(_sgd("x"), optax.identity(), _sgd("y"), _sgd("y")),
    "nested": lambda: optax.chain(optax.named_chain(("a", _sgd("x"))), optax.chain(_sgd("y"))),
    "rows": lambda: optax.chain(
        _sgd(["y", fo.rows("x", [0, 1])]), _sgd(["y", fo.rows("x", slice(1, 4))])
    ),
    "tied": lambda: optax.chain(
        fo.freezable(fo.tie(optax.sgd(0.5), ("x", "y")), fo.everything), _sgd(fo.nothing)
    ),
    "injected": lambda: optax.chain(
        optax.inject_hyperparams(lambda rate: fo.freezable(optax.sgd(rate), "x"))(0.5), _sgd("y")
    ),
    "scheduled first": lambda: optax.chain(_scheduled("x"), _sgd("y")),
    "phases first": lambda: optax.chain(
        fo.scheduled(optax.sgd(0.5), fo.Phases({0: "x", 5: ["x", fo.rows("y", [0])]})), _sgd("y")
    ),
    "scheduled last": lambda: optax.chain(_sgd("x"), _scheduled("y")),
    "inside of MultiSteps": lambda: optax.MultiSteps(optax.chain(_sgd("x"), _sgd("y")), 2),
}


@pytest.mark.filterwarnings("ignore:freezable.*nothing is left to train")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", NOTHING_TRAINS.values(), ids=NOTHING_TRAINS)
def test_a_chain_of_two_in_which_nothing_trains_is_an_error_that_says_what_to_write(make):
    tx = make()
    state = tx.init(PARAMS)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"this freezable trains \('x.*optax\.partition"):
            update(GRADS, state, PARAMS)


def test_the_error_names_what_the_second_one_trains_and_leaves_no_state_changed():
    tx = optax.chain(_sgd("x"), _sgd("y"))
    with pytest.raises(ValueError, match=r"trains \('x'\) is frozen by another one"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    one = fo.freezable(
        optax.partition(
            {"slow": optax.sgd(0.5), "fast": optax.sgd(1.0)}, {"x": "slow", "y": "fast"}
        )
    )
    updates, _ = one.update(GRADS, one.init(PARAMS), PARAMS)
    assert jax.tree.map(lambda u: u.tolist(), updates) == {
        "x": [[-1.0] * 2] * 4,
        "y": [[-2.0] * 2] * 4,
    }


SOMETHING_TRAINS = {
    "the same set": lambda: optax.chain(_sgd("x"), _sgd("x")),
    "a smaller set": lambda: optax.chain(_sgd("x"), _sgd(fo.nothing)),
    "other rows": lambda: optax.chain(_sgd(fo.rows("x", [0])), _sgd(fo.rows("x", [1]))),
    "nested": lambda: fo.freezable(_sgd("x"), "y"),
    "partitioned": lambda: optax.partition(
        {"x": _sgd(fo.nothing), "y": _sgd(fo.nothing)}, {"x": "x", "y": "y"}
    ),
    "twice accumulated": lambda: optax.chain(_sgd("x"), optax.MultiSteps(_sgd("x"), 1)),
    "nothing trains in the second": lambda: optax.chain(_sgd("x"), _sgd(fo.everything)),
    "tied": lambda: fo.freezable(fo.tie(optax.sgd(0.5), ("x", "y"))),
    "scheduled": lambda: optax.chain(_scheduled("x"), _scheduled("x")),
}


@pytest.mark.filterwarnings("ignore:freezable.*nothing is left to train")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", SOMETHING_TRAINS.values(), ids=SOMETHING_TRAINS)
def test_no_other_chain_is_an_error(make):
    tx = make()
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(GRADS, state, PARAMS)


def test_gradients_that_are_zero_for_another_reason_are_no_error():
    tx = _sgd("y")
    state = tx.init(PARAMS)
    zeros = fo.grad(lambda p: p["y"].sum(), "x")(PARAMS)
    negative = jax.tree.map(lambda x: jnp.full_like(x, -0.0), PARAMS)
    for grads in (zeros, negative):
        _, state = tx.update(grads, state, PARAMS)
    other_updates, _ = _sgd("x").update(GRADS, _sgd("x").init(PARAMS), PARAMS)
    copies = jax.tree.map(jnp.copy, other_updates)
    updates, _ = tx.update(copies, state, PARAMS)
    assert np.asarray(updates["x"]).tobytes() == np.zeros((4, 2), np.float32).tobytes()


def test_no_array_and_no_tracer_is_kept_alive():
    gc.collect()
    before = len(chained._made)
    tx = _sgd("x")
    state = tx.init(PARAMS)
    with jax.checking_leaks():
        jax.jit(lambda grads: tx.update(grads, state, PARAMS)[0])(GRADS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    assert len(chained._made) > before
    del updates
    gc.collect()
    assert len(chained._made) <= before
