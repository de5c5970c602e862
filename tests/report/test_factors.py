"""The column of factors in a summary: those of the rules, or those of the state."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tree(make: Any = array) -> dict[str, Any]:
    layers = {f"layer_{i}": {"bias": make(2), "kernel": make(2, 2)} for i in range(4)}
    return {"embed": make(8, 2), "head": make(2), **layers}


RULES = [("embed", 0.01), *fo.layerwise("layer_*", 0.5)]
TX = fo.freezable(optax.chain(optax.sgd(0.1), fo.rates(RULES)))


def column(summary: fo.Summary) -> dict[str, tuple[float, ...]]:
    return {row.path: row.factors for row in summary.rows}


BY_HAND = {
    "embed": (0.01,),
    "head": (1.0,),
    "layer_0": (0.125,),
    "layer_1": (0.25,),
    "layer_2": (0.5,),
    "layer_3": (1.0,),
}


def test_a_column_has_the_factor_of_each_subtree_that_trains():
    summary = fo.summary(tree(), "layer_0", TX, depth=1)
    assert column(summary) == BY_HAND | {"layer_0": ()}
    assert str(summary).splitlines()[0].split()[-1] == "factor"
    lines = {line.split()[0]: line for line in str(summary).splitlines() if "layer" in line}
    assert lines["layer_2"].endswith(" 0.5")
    assert lines["layer_0"].endswith("0 bytes")
    assert "| `layer_1` | trainable | 6 | 24 bytes | 8 bytes | 0.25 |" in summary.to_markdown()
    assert "factor" in summary._repr_html_()
    rows = json.loads(json.dumps(summary.to_dict()))["rows"]
    assert {row["path"]: tuple(row["factors"]) for row in rows} == column(summary)


def test_a_subtree_with_several_factors_shows_the_lowest_and_the_highest():
    nested = {"encoder": tree(), "top": array(2)}
    rules = [("encoder/embed", 0.01), *fo.layerwise("encoder/layer_*", 0.5)]
    summary = fo.summary(nested, "top", optax.chain(optax.sgd(0.1), fo.rates(rules)), depth=1)
    assert column(summary) == {"encoder": (0.01, 0.125, 0.25, 0.5, 1.0), "top": ()}
    assert "0.01 to 1" in str(summary)
    whole = fo.summary(nested, "top", optax.chain(optax.sgd(0.1), fo.rates(rules)))
    assert {row.path: row.factors for row in whole.rows}["encoder"] == (0.01, 0.125, 0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    "optimizer",
    [None, optax.sgd(0.1), optax.chain(optax.sgd(0.1), fo.rates({})), fo.rates({"embed": 1.0})],
    ids=["none", "without", "no rule", "factor 1"],
)
def test_without_a_factor_other_than_1_there_is_no_column(optimizer):
    summary = fo.summary(tree(), "layer_0", optimizer)
    assert "factor" not in str(summary)
    assert "factor" not in summary.to_markdown()
    assert str(summary).count("\n") == str(fo.summary(tree(), "layer_0")).count("\n") + (
        optimizer is not None
    )


def test_a_state_shows_its_own_factors_adjusted_ones_too():
    params = tree(lambda *shape: jnp.ones(shape))
    state = fo.freeze(TX.init(params), params, "layer_0")
    state = fo.freeze(state, params, "layer_1", keep_state=True)
    state = fo.adjust(state, params, ["embed", "layer_1"], 0.75)
    expected = BY_HAND | {"embed": (0.75,), "layer_0": (), "layer_1": ()}
    for frozen in (state, {"opt_state": state}, (state, jnp.zeros(()))):
        assert column(fo.summary(params, frozen, depth=1)) == expected
        assert column(fo.summary(params, frozen, TX, depth=1)) == expected
    state = fo.adjust(fo.thaw(state, params, "layer_1"), params, "layer_1/bias", 0.0)
    assert column(fo.summary(params, state, depth=1))["layer_1"] == (0.0, 0.75)


def test_parts_of_a_leaf_show_the_factors_of_those_that_train():
    params = tree(lambda *shape: jnp.ones(shape))
    tx = fo.freezable(optax.chain(optax.sgd(0.1), fo.rates({"embed": 0.5})), fo.rows("embed", [0]))
    state = fo.adjust(tx.init(params), params, "embed", 0.25)
    assert column(fo.summary(params, state, depth=1))["embed"] == (0.25,)
    state = fo.thaw(state, params, "embed")
    assert column(fo.summary(params, state, depth=1))["embed"] == (0.25, 0.5)
    state = fo.freeze(state, params, fo.rows("embed", slice(1, 8)), keep_state=True)
    assert column(fo.summary(params, state, depth=1))["embed"] == (0.5,)


def test_the_factors_of_a_scheduled_optimizer_and_of_two_groups_are_shown():
    phases = fo.Phases({0: "layer_0", 5: "embed"})
    tx = fo.scheduled(optax.chain(optax.adam(0.1), fo.rates(RULES)), phases)
    params = tree(lambda *shape: jnp.ones(shape))
    state = tx.init(params)
    found = column(fo.summary(params, state, depth=1))
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in BY_HAND.items() if found[k]}
    assert found["layer_1"] == (0.25,)
    inner = optax.partition(
        {
            "x": optax.chain(optax.sgd(0.1), fo.rates({"embed": 0.25})),
            "y": optax.chain(optax.sgd(0.1), fo.rates({"layer_*": 0.5})),
        },
        fo.groups({"embed": "x", True: "y"}),
    )
    two = fo.summary(params, fo.nothing, fo.freezable(inner), depth=1)
    layers = {f"layer_{i}": (0.5,) for i in range(4)}
    assert column(two) == {"embed": (0.25,), "head": (1.0,), **layers}
    twice = optax.chain(fo.rates({"embed": 0.25}), fo.rates({"embed": 0.5, "head": 3.0}))
    both = column(fo.summary(params, fo.nothing, fo.freezable(twice), depth=1))
    assert (both["embed"], both["head"]) == ((0.125,), (3.0,))


def test_of_traced_and_abstract_states_the_factors_are_not_known():
    params = tree(lambda *shape: jnp.ones(shape))
    abstract = jax.eval_shape(TX.init, params)
    assert set(column(fo.summary(params, abstract, depth=1)).values()) == {()}
    seen = []

    @jax.jit
    def look(state: Any) -> Any:
        seen.append(column(fo.summary(params, state, depth=1)))
        return state

    look(TX.init(params))
    assert set(seen[0].values()) == {()}


def test_boxes_and_variables_are_like_plain_params():
    boxed = {"a": nn.Partitioned(jnp.ones((2, 2)), names=("x", None)), "b": jnp.ones(2)}
    tx = fo.freezable(optax.chain(optax.adam(0.1), fo.rates({"a": 0.5})))
    state = fo.adjust(tx.init(boxed), boxed, "b", 0.25)
    assert column(fo.summary(boxed, state)) == {"a": (0.5,), "b": (0.25,)}
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, fo.freezable(optax.chain(optax.adam(0.1), fo.rates({"bias": 0.5}))), wrt=nnx.Param
    )
    fnnx.adjust(optimizer, model, "kernel", 2.0)
    assert column(fo.summary(model, optimizer)) == {"bias": (0.5,), "kernel": (2.0,)}


def test_factors_are_numbers_as_a_user_wrote_them():
    params = tree(lambda *shape: jnp.ones(shape))
    for factor in (0.1, 1 / 3, 1e-6, 250.0):
        state = fo.adjust(TX.init(params), params, "embed", factor)
        (found,) = column(fo.summary(params, state, depth=1))["embed"]
        assert np.float32(found) == pytest.approx(factor, rel=1e-6)
        assert f"{factor:.3g}" in str(fo.summary(params, state, depth=1))
