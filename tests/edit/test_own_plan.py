"""A transformation that freezes, inside of another one: it trains, and an edit is an error."""

import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3), "layers": jnp.ones((4, 2))}
GRADS = {"a": 0.5 * jnp.ones(2), "b": jnp.ones(3), "layers": 2 * jnp.ones((4, 2))}

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:freezable.*all 3 leaves are frozen"),
]


def inside(*around):
    tx = fo.freezable(optax.adam(0.1), "a")
    return optax.chain(*around, tx) if around else tx


@pytest.mark.parametrize("around", [(), (optax.clip(1.0),)], ids=["bare", "in a chain"])
def test_two_plans_freeze_the_leaves_of_both_and_refuse_edits(around):
    tx = fo.freezable(inside(*around), "b")
    state = tx.init(PARAMS)
    updates, state = tx.update(GRADS, state, PARAMS)
    chain = optax.chain(*around, optax.adam(0.1))
    alone = {"layers": PARAMS["layers"]}
    expected, _ = chain.update({"layers": GRADS["layers"]}, chain.init(alone), alone)
    assert updates["layers"].tolist() == expected["layers"].tolist()
    assert not updates["a"].any()
    assert not updates["b"].any()
    for edit in (fo.freeze, fo.thaw, fo.set_frozen):
        with pytest.raises(ValueError, match="the inner state has a FreezeState of its own"):
            edit(state, PARAMS, ["b", "layers"])


def test_layers_in_turns_want_the_optimizer_without_freezable():
    tx = fo.rotating(inside(), "layers", 1, 1, order="ascending")
    with pytest.raises(ValueError, match="the inner state has a FreezeState of its own"):
        tx.init(PARAMS)


def test_an_edit_around_layers_in_turns_says_where_freezing_belongs():
    tx = fo.freezable(fo.rotating(optax.adam(0.1), "layers", 1, 1, order="ascending"), "b")
    with pytest.raises(ValueError, match=r"see `stack` and `frozen` \(not fo.freezable around it"):
        fo.thaw(tx.init(PARAMS), PARAMS, "b")
