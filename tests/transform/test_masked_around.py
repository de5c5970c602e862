"""A `freezable` inside of `optax.partition` or `optax.masked` sees some leaves, and says so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

PARAMS = {"embed": jnp.ones(2), "layers": jnp.full(2, 2.0), "head": jnp.full(2, 3.0)}
LABELS = {"embed": "a", "layers": "a", "head": "b"}
MASK = {"embed": True, "layers": True, "head": False}
INNER = fo.freezable(optax.sgd(0.5), "embed")
AROUND = {
    "partition": optax.partition({"a": INNER, "b": optax.sgd(0.25)}, LABELS),
    "masked": optax.chain(optax.masked(INNER, MASK)),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def loss(params):
    return (params["embed"] * params["layers"] * params["head"]).sum()


USES = {
    "grad": lambda state: fo.grad(loss, frozen=state)(PARAMS),
    "apply_updates": lambda state: fo.apply_updates(PARAMS, PARAMS, frozen=state),
    "mask": lambda state: fo.mask(state, PARAMS),
    "summary": lambda state: fo.summary(PARAMS, state),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("around", AROUND)
def test_its_state_is_no_spec_for_leaves_that_it_never_saw(around, use):
    state = AROUND[around].init(PARAMS)
    with pytest.raises(ValueError, match=r"does not say whether 'head' is frozen.* put it around"):
        USES[use](state)


def test_a_hole_for_a_whole_subtree_is_the_same_mistake():
    params = {**PARAMS, "head": {"w": jnp.ones(2)}}
    state = optax.masked(INNER, MASK).init(params)
    with pytest.raises(ValueError, match=r"only in the tree: 'head/w'.*; its fo\.freezable is ins"):
        fo.mask(state, params)


def test_with_the_spec_itself_all_groups_train():
    tx = AROUND["partition"]
    grads = fo.grad(loss, frozen="embed")(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    after = fo.apply_updates(PARAMS, updates, frozen="embed")
    expected = {"embed": [1.0, 1.0], "layers": [0.5, 0.5], "head": [2.5, 2.5]}
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_where_it_saw_all_leaves_its_state_is_a_spec():
    everything = optax.masked(INNER, True)
    assert fo.mask(everything.init(PARAMS), PARAMS)["embed"] is True
    seen = {name: PARAMS[name] for name in ("embed", "layers")} | {"head": optax.MaskedNode()}
    state = AROUND["partition"].init(PARAMS)
    assert fo.mask(state, seen)["layers"] is False


def test_params_with_holes_of_the_users_own_say_that_these_are_frozen():
    trainable, _ = fo.partition(PARAMS, "head")
    state = INNER.init(trainable)
    assert fo.mask(state, PARAMS) == {"embed": True, "layers": False, "head": True}
