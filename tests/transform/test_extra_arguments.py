"""Extra arguments of `update`: functions of the params, and batches that look like the params."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"x": jnp.ones(2), "y": jnp.full(2, 3.0)}
BATCHES = {
    "other shapes": {"x": jnp.full((5, 2), 9.0), "y": jnp.zeros(5)},
    "the same shapes": {"x": jnp.full(2, 9.0), "y": jnp.zeros(2)},
    "numbers": {"x": 9.0, "y": 0.0},
}


def line_search():
    return optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3))


TRANSFORMATIONS = {
    "frozen": fo.freezable(line_search(), "x"),
    "tied": fo.freezable(fo.tie(line_search(), ("x", "y"))),
    "rows": fo.freezable(line_search(), fo.rows("x", [0])),
}


def recording(seen):
    """A transformation that notes the extra argument `tree` of its updates."""

    def update(updates, state, params=None, *, tree):
        seen.append(tree)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_function_gets_a_batch_with_the_keys_of_the_params_as_it_came(tx, batch):
    seen = []

    def loss(params, batch):
        seen.append(batch)
        return (jnp.sum(batch["x"] * (params["x"] * params["y"])) - jnp.sum(batch["y"])) ** 2

    state = tx.init(PARAMS)
    value, grads = fo.value_and_grad(loss, state)(PARAMS, batch)
    seen.clear()
    tx.update(grads, state, PARAMS, value=value, grad=grads, value_fn=loss, batch=batch)
    assert seen
    assert all(given is batch for given in seen)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_tree_like_the_params_loses_its_frozen_leaves_and_a_batch_with_their_keys_none(batch):
    seen = []
    tx = fo.freezable(recording(seen), "x")
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, tree=batch)
    is_like = jnp.shape(batch["x"]) in ((), (2,))
    expected = {"x": optax.MaskedNode(), "y": batch["y"]} if is_like else batch
    assert jax.tree.structure(seen[0]) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)


@pytest.mark.parametrize(
    "make",
    [jax.jit, jax.tree_util.Partial, eqx.filter_jit, lambda f: jax.tree_util.Partial(f, scale=1.0)],
    ids=["jit", "Partial", "filter_jit", "Partial with leaves"],
)
def test_callables_of_every_kind_are_handed_whole_params(make):
    def loss(params, scale=1.0):
        return scale * ((params["x"] * params["y"] - 2) ** 2).sum()

    tx, bare = fo.freezable(optax.lbfgs(), "x"), optax.lbfgs()
    state = tx.init(PARAMS)
    value, grads = fo.value_and_grad(loss, state)(PARAMS)
    updates, _ = tx.update(grads, state, PARAMS, value=value, grad=grads, value_fn=make(loss))

    def of_y(y):
        return loss({"x": PARAMS["x"], **y})

    own = {"y": PARAMS["y"]}
    expected, _ = bare.update(
        {"y": grads["y"]}, bare.init(own), own, value=value, grad={"y": grads["y"]}, value_fn=of_y
    )
    np.testing.assert_array_equal(updates["y"], expected["y"])


def test_params_that_are_callable_are_a_tree_of_params():
    params = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    seen = []
    tx = fo.freezable(recording(seen), "bias")
    tx.update(params, tx.init(params), params, tree=params)
    assert jax.tree.structure(seen[0]) == jax.tree.structure(fo.partition(params, "bias")[0])


def test_of_params_that_are_one_array_an_argument_with_their_rows_is_like_them():
    params, seen = jnp.arange(4.0), []
    tx = fo.freezable(recording(seen), fo.rows(True, [0, 2]))
    for given in (params, jnp.ones(3), 2.0):
        tx.update(params, tx.init(params), params, tree=given)
    np.testing.assert_array_equal(jax.tree.leaves(seen[0])[0], [1.0, 3.0])
    np.testing.assert_array_equal(seen[1], np.ones(3))
    assert seen[2] == 2.0


@pytest.mark.parametrize("frozen", ["x", fo.rows("x", [0])], ids=["leaf", "rows"])
@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 2), (4, 3)), ((4, 2), (7, 2))])
def test_a_tree_that_is_of_another_shape_in_one_axis_is_none_like_the_params(frozen, shapes):
    params, seen = {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 2))}, []
    given = dict(zip(params, map(jnp.ones, shapes), strict=True))
    tx = fo.freezable(recording(seen), frozen)
    tx.update(params, tx.init(params), params, tree=given)
    assert seen[0] is given
    tx.update(params, tx.init(params), params, tree=params)
    assert seen[1] is not params


def test_a_function_is_handed_all_rows_where_only_some_train():
    params, seen = {"x": jnp.arange(8.0).reshape(4, 2), "y": jnp.ones((4, 2))}, []

    def loss(params):
        seen.append(params)
        return (params["x"] * params["y"]).sum() ** 2

    tx = fo.freezable(line_search(), fo.rows("x", [0, 2]))
    state = tx.init(params)
    value, grads = fo.value_and_grad(loss, state)(params)
    seen.clear()
    tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
    assert {given["x"].shape for given in seen} == {(4, 2)}


def test_a_number_for_a_frozen_leaf_is_left_out_beside_rows_too():
    params, seen = {"x": jnp.ones(3), "y": jnp.ones((4, 2)), "z": jnp.ones(2)}, []
    tx = fo.freezable(recording(seen), fo.path("x") | fo.rows("y", [0]))
    tx.update(params, tx.init(params), params, tree={"x": 1.0, "y": 2.0, "z": 3.0})
    assert seen == [{"x": optax.MaskedNode(), "y": 2.0, "z": 3.0}]
