"""Edits of abstract states, as a plan for a model that fits nowhere needs them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"a": jnp.ones((6, 3)), "b": jnp.ones(4)}
SHAPES = jax.eval_shape(lambda: PARAMS)
TX = fo.freezable(optax.adam(0.1))
EDITS = {
    "freeze": lambda state, params: fo.freeze(state, params, "b"),
    "park": lambda state, params: fo.freeze(state, params, "b", keep_state=True),
    "freeze and thaw": lambda state, params: fo.thaw(fo.freeze(state, params, "b"), params, "b"),
    "park and thaw": lambda state, params: fo.thaw(
        fo.freeze(state, params, "b", keep_state=True), params, "b"
    ),
    "set_frozen": lambda state, params: fo.set_frozen(state, params, "a", keep_state=True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_gives_the_shapes_of_what_it_gives_for_arrays(edit):
    edited = EDITS[edit](jax.eval_shape(TX.init, SHAPES), SHAPES)
    arrays = EDITS[edit](TX.init(PARAMS), PARAMS)
    assert jax.tree.structure(edited) == jax.tree.structure(arrays)
    pairs = zip(*map(jax.tree.leaves, (edited, arrays)), strict=True)
    assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)
    assert {type(x) for x in jax.tree.leaves(edited)} == {jax.ShapeDtypeStruct}
