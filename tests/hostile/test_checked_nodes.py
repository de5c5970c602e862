"""Nodes that check their array when they are rebuilt, as haliax's `NamedArray` does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.nodes import NamedArray

pytestmark = pytest.mark.usefixtures("standard_promotion")


ADAM = optax.adam(0.1)
ROWS = fo.rows("layers/1/embed", [0, 3])
X = jnp.arange(10.0).reshape(5, 2)
PARAMS = {"layers": [jnp.ones(2), {"embed": NamedArray(X, (5, 2))}], "head": jnp.ones(2)}


def loss(params):
    return (params["layers"][1]["embed"].array ** 2).sum() + params["head"].sum()


REBUILT = {
    "call": lambda: ROWS(PARAMS),
    "mask": lambda: fo.mask(ROWS, PARAMS),
    "partition": lambda: fo.partition(PARAMS, ROWS),
    "init": lambda: fo.freezable(ADAM, ROWS).init(PARAMS),
    "scheduled": lambda: fo.scheduled(ADAM, fo.Phases({0: ROWS})).init(PARAMS),
    "grad": lambda: fo.grad(loss, ROWS, holes=True)(PARAMS),
    "freeze": lambda: fo.freeze(fo.freezable(ADAM).init(PARAMS), PARAMS, ROWS),
    "summary": lambda: fo.summary(PARAMS, ROWS, ADAM),
}


@pytest.mark.parametrize("call", REBUILT.values(), ids=REBUILT)
def test_rows_of_a_node_that_checks_its_shape_are_an_error_with_path_and_remedy(call):
    refused = r"'layers/1/embed/array' is in a NamedArray, which refuses a shape \(.* in place of "
    with pytest.raises(ValueError, match=refused) as error:
        call()
    assert "the bare array" in str(error.value)
    assert str(error.value).endswith("does not match the axes (5, 2)")


def test_what_needs_no_other_shapes_takes_rows_of_it():
    assert fo.summary(PARAMS, ROWS).frozen == 4
    grads = fo.grad(loss, ROWS)(PARAMS)["layers"][1]["embed"].array
    np.testing.assert_array_equal(grads, (2 * X).at[np.array([0, 3])].set(0))
    doubled = fo.apply_updates(PARAMS, PARAMS, ROWS)["layers"][1]["embed"].array
    np.testing.assert_array_equal(doubled, (2 * X).at[np.array([0, 3])].set(X[np.array([0, 3])]))
    held = fo.hold(jax.tree.map(jnp.zeros_like, PARAMS), PARAMS, ROWS)["layers"][1]["embed"].array
    np.testing.assert_array_equal(held[3], X[3])


def test_such_a_node_is_frozen_thawed_and_exported_as_a_whole():
    tx = fo.freezable(ADAM, "layers/1/embed")
    state = fo.thaw(tx.init(PARAMS), PARAMS, "layers")
    back = fo.import_state(tx, PARAMS, fo.export_state(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    grads = fo.grad(loss, state)(PARAMS)
    updates, _ = tx.update(grads, state, PARAMS)
    bare, _ = ADAM.update(grads, ADAM.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(*(x["layers"][1]["embed"].array for x in (updates, bare)))
