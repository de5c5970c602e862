"""`rates` and `adjust` in every kind of tree, and inside and outside of other transformations.

The reference is the bare optimizer on plain dicts, and NumPy's products.
"""

from typing import Any

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

import freeze_optax as fo
from tests.support.memories import assert_same_bits
from tests.support.nodes import Quantized
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
RULES = {"a": 0.5, "*/kernel": 0.25}
BY_HAND = {"a": 0.5, "b": 1.0, "c": {"kernel": 0.25, "steps": HOLE}}
SGD = optax.sgd(1.0)
INNER = optax.chain(SGD, fo.rates(RULES))


def make_params() -> Any:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": draw(4, 2), "b": draw(3), "c": {"kernel": draw(2, 2), "steps": jnp.arange(2)}}


PARAMS = make_params()


def numbers(state: Any) -> Any:
    found = optax.tree_utils.tree_get(state, "factors")
    return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def scaled(by_hand: Any, params: Any = PARAMS) -> Any:
    """What `sgd(1.0)` gives for gradients that are the params, times the factors."""

    def one(x: Any, factor: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros_like(x)
        frozen = np.full(x.shape, -0.0, x.dtype)
        return frozen if factor == HOLE else -np.asarray(x) * x.dtype.type(factor)

    return jax.tree.map(one, params, by_hand)


def check(tx: Any, state: Any, by_hand: Any) -> Any:
    assert numbers(state) == by_hand
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert_same_bits(updates, scaled(by_hand))
    return state


INSIDE: dict[str, Any] = {
    "alone": lambda: INNER,
    "masked": lambda: optax.masked(INNER, lambda tree: jax.tree.map(lambda _: True, tree)),
    "partition": lambda: optax.partition({"x": INNER}, fo.groups({True: "x"})),
    "MultiSteps": lambda: optax.MultiSteps(INNER, 1).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), fo.rates(RULES))
    )(rate=1.0),
    "apply_if_finite": lambda: optax.apply_if_finite(INNER, 3),
    "named_chain": lambda: optax.named_chain(("sgd", SGD), ("rates", fo.rates(RULES))),
    "conditionally_mask": lambda: optax.conditionally_mask(INNER, lambda step, **_: step >= 0),
    "tie": lambda: fo.tie(INNER),
}
FEW = {"partition", "MultiSteps", "inject_hyperparams", "tie"}


@pytest.mark.parametrize("name", cases(dict(zip(INSIDE, INSIDE, strict=True)), FEW))
def test_inside_of_other_transformations_edits_and_adjust_work(name):
    tx = fo.freezable(INSIDE[name](), "b")
    state = check(tx, tx.init(PARAMS), BY_HAND | {"b": HOLE})
    state = fo.adjust(fo.thaw(state, PARAMS, "b"), PARAMS, ["b", "c"], 2.0)
    by_hand = BY_HAND | {"b": 2.0, "c": {"kernel": 2.0, "steps": HOLE}}
    state = check(tx, state, by_hand)
    state = fo.freeze(state, PARAMS, "a", keep_state=True)
    assert numbers(state) == by_hand
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert_same_bits(updates, scaled(by_hand | {"a": HOLE}))
    state = fo.adjust(fo.thaw(state, PARAMS, "a"), PARAMS, "a", 0.125)
    check(tx, state, by_hand | {"a": 0.125})


def test_what_optax_masks_has_no_factor_and_two_groups_have_their_own():
    mask = {"a": True, "b": False, "c": True}
    for wrap in (lambda tx: tx, fo.freezable):
        tx = wrap(optax.chain(SGD, optax.masked(fo.rates({"a": 0.5}), mask)))
        state = tx.init(PARAMS)
        by_hand = {"a": 0.5, "b": HOLE, "c": {"kernel": 1.0, "steps": HOLE}}
        assert numbers(state) == by_hand
        updates, _ = tx.update(PARAMS, fo.adjust(state, PARAMS, "a", 0.25), PARAMS)
        expected = scaled({**by_hand, "a": 0.25, "b": 1.0})
        assert_same_bits({k: updates[k] for k in "ab"}, {k: expected[k] for k in "ab"})
        with pytest.raises(ValueError, match=r"'b', which has no factor .* another optimizer's"):
            fo.adjust(state, PARAMS, "b", 0.25)
    # One table for both groups: each sees all the params, and so does each rule.
    groups = fo.groups({"a": "x", True: "y"})
    tx = fo.freezable(optax.partition({"x": INNER, "y": optax.chain(INNER, INNER)}, groups), "b")
    state = fo.thaw(tx.init(PARAMS), PARAMS, "b")
    updates, _ = tx.update(PARAMS, state, PARAMS)
    twice = jax.tree.map(lambda x: -x, scaled({**BY_HAND, "c": {"kernel": 0.0625, "steps": HOLE}}))
    assert_same_bits(updates["a"], scaled(BY_HAND)["a"])
    assert_same_bits(updates["c"]["kernel"], twice["c"]["kernel"])
    with pytest.raises(ValueError, match=r"with 3 states of fo\.rates"):
        fo.adjust(state, PARAMS, "a", 0.5)


@pytest.mark.parametrize("style", ["drop-in", "partition"])
def test_outside_of_freezable_it_has_a_factor_for_every_leaf_it_is_shown(style):
    tx = optax.chain(fo.freezable(SGD, "b"), fo.rates(RULES))
    shown = PARAMS if style == "drop-in" else fo.partition(PARAMS, "b")[0]
    state = tx.init(shown)
    assert numbers(state) == (BY_HAND if style == "drop-in" else BY_HAND | {"b": HOLE})
    state = fo.adjust(state, shown, "c/kernel", 2.0)
    updates, state = tx.update(shown, state, shown)
    expected = scaled(BY_HAND | {"b": HOLE, "c": {"kernel": 2.0, "steps": HOLE}})
    expected = expected if style == "drop-in" else fo.partition(expected, ["b", "c/steps"])[0]
    assert_same_bits(updates, expected)
    if style == "drop-in":
        state = fo.thaw(fo.adjust(state, PARAMS, "b", 0.75), PARAMS, "b")
        updates, _ = tx.update(PARAMS, state, PARAMS)
        assert_same_bits(updates["b"], scaled(BY_HAND | {"b": 0.75})["b"])


def test_both_copies_of_a_lookahead_are_scaled():
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = fo.freezable(optax.chain(optax.lookahead(SGD, 1, 0.5), fo.rates(RULES)), "b")
    bare = fo.freezable(optax.lookahead(SGD, 1, 0.5), "b")
    state = fo.adjust(tx.init(params), params, "a", 0.75)
    updates, _ = tx.update(PARAMS, state, params)
    expected, _ = bare.update(PARAMS, bare.init(params), params)
    by_hand = {"a": 0.75, "b": 1.0, "c": {"kernel": 0.25, "steps": 1}}
    times = lambda u, f: u if u.dtype == jnp.int32 else u * np.float32(f)  # noqa: E731
    for ours, copy in zip(updates, expected, strict=True):
        assert_same_bits(ours, jax.tree.map(times, copy, by_hand))
    inside = fo.freezable(optax.lookahead(INNER, 2, 0.5), "b")
    assert numbers(fo.thaw(inside.init(params), params, "b")) == BY_HAND


def test_a_bare_array_its_rows_and_its_elements_have_one_factor():
    array = jnp.arange(1.0, 7.0).reshape(3, 2)
    inner = optax.chain(SGD, fo.rates({fo.everything: 0.5}))
    diagonal = np.eye(3, 2, dtype=bool)
    for frozen, live in (
        (fo.nothing, np.ones((3, 2), bool)),
        (fo.rows(fo.everything, [1]), np.asarray([[True], [False], [True]])),
        (~fo.elements(fo.everything, diagonal), diagonal),
    ):
        tx = fo.freezable(inner, frozen)
        state = tx.init(array)
        for factor in (0.5, 0.125):
            state = fo.adjust(state, array, fo.everything, factor)
            assert numbers(state) == factor
            updates, _ = tx.update(array, state, array)
            assert_same_bits(updates, np.where(live, -array * np.float32(factor), np.float32(-0.0)))
    elements = fo.elements("a", np.arange(8).reshape(4, 2) % 3 == 0)
    tx = fo.freezable(INNER, elements)
    state = fo.adjust(tx.init(PARAMS), PARAMS, "a", 0.75)
    state = fo.thaw(state, PARAMS, "a")  # with its rule's factor
    updates, _ = tx.update(PARAMS, state, PARAMS)
    by_element = np.where(np.arange(8).reshape(4, 2) % 3 == 0, np.float32(0.5), np.float32(0.75))
    assert_same_bits(updates["a"], -PARAMS["a"] * by_element)
    state = fo.adjust(state, PARAMS, elements, 0.0)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    expected = np.where(by_element == 0.5, np.float32(-0.0), -PARAMS["a"] * np.float32(0.75))
    assert_same_bits(updates["a"], expected)


def boxed() -> Any:
    kernel = nn.Partitioned(PARAMS["c"]["kernel"], names=("x", None))
    logical = nn.LogicallyPartitioned(PARAMS["a"], names=("embed", "mlp"))
    return {**PARAMS, "a": logical, "c": {**PARAMS["c"], "kernel": kernel}}


def test_boxes_of_linen_have_plain_factors_without_axes():
    tx = fo.freezable(optax.chain(optax.adam(0.1), fo.since_thaw(lambda n: 1.0), fo.rates(RULES)))
    state = fo.freeze(tx.init(boxed()), boxed(), "b", keep_state=True)
    state = fo.adjust(state, boxed(), ["a", "b"], 0.75)
    assert numbers(state) == BY_HAND | {"a": 0.75, "b": 0.75}
    # nn.get_partition_spec gives each factor a spec, and none has an axis.
    specs = nn.get_partition_spec(state)
    moments = optax.tree_utils.tree_get(specs, "mu")
    assert (moments["a"], moments["c"]["kernel"]) == (
        PartitionSpec("embed", "mlp"),
        PartitionSpec("x", None),
    )
    found = jax.tree.leaves(
        optax.tree_utils.tree_get(specs, "factors"), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    assert found == [PartitionSpec()] * 3
    updates, _ = tx.update(boxed(), state, boxed())
    assert isinstance(updates["a"], nn.LogicallyPartitioned)
    plain = fo.freeze(tx.init(PARAMS), PARAMS, "b", keep_state=True)
    plain = fo.adjust(plain, PARAMS, ["a", "b"], 0.75)
    assert_same_bits(nn.meta.unbox(state), plain)
    assert_same_bits(nn.meta.unbox(updates), tx.update(PARAMS, plain, PARAMS)[0])
    # Each fits the params of the other.
    assert_same_bits(
        nn.meta.unbox(fo.adjust(state, PARAMS, "c", 2.0)), fo.adjust(plain, boxed(), "c", 2.0)
    )


def test_frozen_dicts_and_sequences_are_trees_like_others():
    for make in (flax.core.FrozenDict, lambda x: [x["a"], x["b"], (x["c"], {})]):
        params = make(PARAMS)
        is_dict = isinstance(params, flax.core.FrozenDict)
        names = ["a", "b", "*/kernel"] if is_dict else ["0", "1", "2/0/kernel"]
        inner = optax.chain(SGD, fo.rates({names[0]: 0.5, names[2]: 0.25}))
        tx = fo.freezable(inner, names[1])
        state = fo.adjust(fo.thaw(tx.init(params), params, names[1]), params, names[1], 2.0)
        assert jax.tree.leaves(numbers(state)) == [0.5, 2.0, 0.25]
        updates, _ = tx.update(params, state, params)
        expected = jax.tree.leaves(scaled(BY_HAND | {"b": 2.0}))
        assert_same_bits(updates, jax.tree.unflatten(jax.tree.structure(params), expected))


def test_equinox_models_and_rules_by_type():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        layers: list[eqx.nn.Linear]
        activation: Any = jax.nn.relu

    keys = jax.random.split(jax.random.key(0), 3)
    layers = [eqx.nn.Linear(2, 2, key=key) for key in keys[1:]]
    model = Model(eqx.nn.Embedding(3, 2, key=keys[0]), layers)
    rules = [
        (fo.of_type(eqx.nn.Embedding), 0.125),
        (fo.of_type(eqx.nn.Linear, fields=("bias",)), 2.0),
        *fo.layerwise("layers/*", 0.5),
    ]
    tx = fo.freezable(optax.chain(SGD, fo.rates(rules, default=None)), "layers/0")
    state = tx.init(model)
    state = fo.thaw(state, model, "layers/0/weight")
    state = fo.adjust(state, model, fo.of_type(eqx.nn.Embedding), 0.75)
    grads = jax.tree.map(lambda x: x if eqx.is_array(x) else None, model)
    updates, _ = tx.update(grads, state, model)
    assert_same_bits(updates.embed.weight, -model.embed.weight * np.float32(0.75))
    assert_same_bits(updates.layers[0].weight, -model.layers[0].weight * np.float32(0.5))
    assert_same_bits(updates.layers[0].bias, np.full(2, -0.0, np.float32))
    assert_same_bits(updates.layers[1].weight, -model.layers[1].weight)
    assert_same_bits(updates.layers[1].bias, -model.layers[1].bias * np.float32(2.0))


def test_a_quantized_node_has_no_factor_until_a_spec_names_its_scale():
    base = Quantized(jnp.ones((4, 3), jnp.int8), jnp.full((1, 3), 0.5), None)
    params = {"base": base, "lora": jnp.ones((4, 3))}
    tx = fo.freezable(optax.chain(SGD, fo.rates({"lora": 0.5})))
    state = tx.init(params)
    assert jax.tree.leaves(numbers(state)) == [0.5]
    with pytest.raises(ValueError, match="'base', which selects no leaf that can be trained"):
        fo.adjust(state, params, "base", 0.5)
    assert jax.tree.leaves(numbers(fo.adjust(state, params, "lora", 0.25))) == [0.25]
    tx = fo.freezable(
        optax.chain(SGD, fo.rates({"base/scale": 0.25})), ~fo.path("base/scale", "lora")
    )
    state = fo.adjust(tx.init(params), params, "lora", 2.0)
    updates, _ = tx.update(params, state, params)
    assert_same_bits(updates["base"].scale, np.full((1, 3), -0.125, np.float32))
    assert_same_bits(updates["lora"], np.full((4, 3), -2.0, np.float32))
    state = fo.adjust(state, params, "base/scale", 0.75)
    assert jax.tree.leaves(numbers(state)) == [0.75, 2.0]


def test_factors_are_no_params_to_optax():
    tx = fo.freezable(optax.chain(optax.adam(0.1), fo.rates(RULES)), fo.rows("a", [0]))
    state = fo.thaw(tx.init(PARAMS), PARAMS, fo.rows("a", [0]))
    kinds = optax.tree_map_params(tx, lambda _: "P", state, transform_non_params=lambda _: "N")
    assert jax.tree.structure(kinds) == jax.tree.structure(state)
    assert set(jax.tree.leaves(optax.tree_utils.tree_get(kinds, "factors"))) == {"N"}
    assert set(jax.tree.leaves(optax.tree_utils.tree_get(kinds, "mu"))) == {"P"}
    # Beside the tree of what trains, as optax asks for one with the holes of the state.
    state = fo.freeze(tx.init(PARAMS), PARAMS, ["a", "b"])
    trainable = fo.partition(PARAMS, state)[0]
    found = optax.tree_map_params(
        tx, lambda _, x: x, state, trainable, transform_non_params=lambda x: x
    )
    assert_same_bits(optax.tree_utils.tree_get(found, "mu"), trainable)
    assert numbers(found) == numbers(state)
    for bare in (fo.rates(RULES), optax.chain(optax.adam(0.1), fo.rates(RULES))):
        mapped = optax.tree_map_params(
            bare, lambda _, x: x, bare.init(PARAMS), PARAMS, transform_non_params=lambda x: x + 1
        )
        assert jax.tree.leaves(numbers(mapped)) == [1.5, 2.0, 1.25]
